"""Deep Sets pooling: the mean, sum or maximum of projected elements (Zaheer et al. 2017, arXiv 1703.06114)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from setenc import checks
from setenc.pooling.base import Parts, Pooling, accumulate, found, full_precision, normalised
from setenc.state import SetState, larger


class DeepSetsPooling(Pooling):
    """One slot: the mean, sum or maximum of linear projections of the elements.

    Weights multiply elements in means and sums; in a maximum an element counts if its weight is positive. Where
    elements tie for the maximum, the gradient goes to the first of them.

    Args:
        in_dim: features of an element.
        dim: features of the result.
        reduce: ``"mean"`` (blind to the number of elements), ``"sum"`` or ``"max"``.
        norm: layer-normalise the result.

    >>> pooling = DeepSetsPooling(3, 8, "max")
    >>> pooling(torch.randn(2, 5, 3)).shape
    torch.Size([2, 1, 8])
    """

    def __init__(self, in_dim: int, dim: int, reduce: str = "mean", *, norm: bool = False) -> None:
        self.reduce = checks.choice(reduce, "reduce", ("mean", "sum", "max"))
        dim, maximum = checks.count(dim, "dim"), self.reduce == "max"
        heads, values = (dim, 0) if maximum else (1, dim)
        super().__init__(in_dim, dim, num_slots=1, num_heads=heads, value_dim=values)
        self.value = nn.Linear(self.in_dim, dim)
        self.norm = nn.LayerNorm(dim) if checks.flag(norm, "norm") else nn.Identity()

    def _part(
        self, features: Tensor, slots: Tensor, offset: Tensor | None, peak: Tensor | None, onto: Parts | None
    ) -> Parts:
        values = self.value(features).to(self._dtype)
        if self.reduce == "max":
            if offset is not None:
                # A weight does not scale a maximum; one that is no weight (NaN by now) is not lost.
                logs = offset[:, 0, 0, :, None]
                values = values + torch.where(logs == -torch.inf, logs, 0 * logs)
            peak = found(values.max(1).values[..., None], offset)
            if onto is not None:
                peak = larger(onto[2], peak)
            return peak.new_zeros(*peak.shape, 0), torch.zeros_like(peak), peak
        if self.reduce == "mean":
            logs = values.detach().new_zeros(values.shape[0], 1, 1, values.shape[1])
            with full_precision(values.device):
                return accumulate(logs, values[:, None], offset, peak, onto)
        # A sum is in units of a weight of 1.
        with full_precision(values.device):
            weights = values.new_ones(*values.shape[:2]) if offset is None else offset[:, 0, 0].exp()
            total, mass = (weights[:, None] @ values)[:, None], weights.sum(1)[:, None, None]
        if onto is not None:
            total, mass = onto[0] + total, onto[1] + mass
        return total, mass, torch.zeros_like(mass)

    def readout(self, state: SetState) -> Tensor:
        """The mean, sum or maximum ``(B, 1, dim)``."""
        self.check_state(state)
        if self.reduce == "max":
            pooled = torch.where(state.peak == -torch.inf, 0, state.peak).mT
        elif self.reduce == "sum":
            pooled = state.total[:, 0]
        else:
            pooled = state.mean()[:, 0]
        return normalised(self.norm, pooled, self.like.dtype)

    def extra_repr(self) -> str:
        """Settings, for printing."""
        return f"{super().extra_repr()}, reduce={self.reduce!r}"
