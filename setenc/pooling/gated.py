"""Gated attention pooling of multiple-instance learning (Ilse et al. 2018, arXiv 1802.04712)."""

from __future__ import annotations

from torch import Tensor, nn

from setenc import checks
from setenc.pooling.base import Pooling
from setenc.state import SetState


class GatedAttentionPooling(Pooling):
    """ABMIL: one slot, ``sum_i a_i h_i`` with ``a = softmax_i(w' (tanh(V h_i) * sigmoid(U h_i)))``.

    The logit of an element depends on that element only, so the pooling streams like any softmax.

    Args:
        in_dim: features of an element.
        dim: features of ``h``, a linear projection of the element, and of the result.
        hidden_dim: features of the gate; None is ``dim``.

    >>> GatedAttentionPooling(3, 8)(torch.randn(2, 5, 3)).shape
    torch.Size([2, 1, 8])
    """

    def __init__(self, in_dim: int, dim: int, *, hidden_dim: int | None = None) -> None:
        dim = checks.count(dim, "dim")
        super().__init__(in_dim, dim, num_slots=1, num_heads=1, value_dim=dim)
        self.hidden_dim = dim if hidden_dim is None else checks.count(hidden_dim, "hidden_dim")
        self.value = nn.Linear(self.in_dim, dim)
        self.gate = nn.Linear(dim, 2 * self.hidden_dim)
        self.logit = nn.Linear(self.hidden_dim, 1, bias=False)

    def logits(self, features: Tensor) -> Tensor:
        """Attention logits ``(B, n)`` of features ``(B, n, in_dim)``, before normalising over the set."""
        return self._logits(self.value(features))

    def _logits(self, values: Tensor) -> Tensor:
        squash, gate = self.gate(values).chunk(2, -1)
        return self.logit(squash.tanh() * gate.sigmoid())[..., 0]

    def _scores(self, features: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        values = self.value(features)
        return self._logits(values).to(self._dtype)[:, None, None], values.to(self._dtype)[:, None]

    def readout(self, state: SetState) -> Tensor:
        """The weighted mean ``(B, 1, dim)``."""
        self.check_state(state)
        return checks.finite(state.mean()[:, 0].to(self.like.dtype))
