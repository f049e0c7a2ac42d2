"""Attention of targets over slots: every target reads the slots that attended to elements like it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from setenc import checks
from setenc.pooling import SlotPooling


class SlotQuery(nn.Module):
    """Attention of targets over decoded slots, with the keys and queries of the pooling that filled them.

    The pooling gives element ``i`` to slot ``k`` by ``<q_k, key(x_i)>``. The logits of a target are the same product,
    normalised over the slots instead of the set: ``softmax_k(exp(τ) <q_k, key(t)> / sqrt(dim / H))`` mixes the values,
    a linear map of the decoded slots. A target thus finds the slots that saw the elements around it from the first step
    on; attention with weights of its own takes long to learn that, and one vector for the whole set cannot know it.

    Targets do not see each other: any number of them, also in chunks, gives the same results in memory that grows with
    the chunk.

    Args:
        pooling: the pooling of the encoder; its parameters are shared.
        dim: features of a decoded slot and of a result, a multiple of the pooling's heads; None is the pooling's.
        columns: features of an element that a target knows, such as its coordinates; None is all of them.

    >>> pooling = setenc.SlotPooling(3, 16, 4, residual=False)
    >>> enc, query = setenc.UMBC(None, pooling, setenc.SAB(16)), SlotQuery(pooling, columns=slice(0, 2))
    >>> query(enc(torch.randn(5, 50, 3)), torch.randn(5, 9, 2)).shape
    torch.Size([5, 9, 16])
    """

    def __init__(
        self, pooling: SlotPooling, dim: int | None = None, *, columns: slice | Sequence[int] | None = None
    ) -> None:
        super().__init__()
        if not isinstance(pooling, SlotPooling):
            raise TypeError(f"pooling must be a setenc.SlotPooling; got {type(pooling).__name__}")
        self.dim, _ = checks.heads(pooling.out_dim if dim is None else dim, pooling.num_heads)
        self.pooling = pooling
        self.columns = checks.columns(columns, pooling.in_dim)
        self.log_sharpness = nn.Parameter(torch.zeros(()))
        self.value = nn.Linear(self.dim, self.dim)
        self.register_parameter("key", None)
        self.register_parameter("queries", None)

    def free(self) -> None:
        """From now on use keys and queries of its own, which start as copies: add them to the optimiser."""
        self.key, self.queries = (nn.Parameter(shared.detach().clone()) for shared in self._shared())

    def _shared(self) -> tuple[Tensor, Tensor]:
        weight = self.pooling.key_value.weight[: self.pooling.out_dim, self.columns]
        return weight, self.pooling.queries()

    def forward(self, slots: Tensor, targets: Tensor) -> Tensor:
        """Read-outs ``(B, M, dim)`` of targets ``(B, M, c)`` from decoded slots ``(B, K, dim)``."""
        own = self.key is not None and self.queries is not None
        key, queries = (self.key, self.queries) if own else self._shared()
        heads = self.pooling.num_heads
        slots = checks.slots(slots, self.value.weight, number=self.pooling.num_slots)
        targets, width = checks.as_tensor(targets), key.shape[1]
        if isinstance(targets, Tensor) and targets.shape != (len(slots), *targets.shape[1:2], width):
            wanted = f"({len(slots)}, M, {width})"
            raise ValueError(f"targets must have shape (B, M, c) = {wanted}; got {tuple(targets.shape)}")
        targets = checks.finite_targets(checks.slots(targets, key, "targets"))
        asked = F.linear(targets, key * self.log_sharpness.exp()).unflatten(-1, (heads, -1)).transpose(1, 2)
        values = self.value(slots).unflatten(-1, (heads, -1)).transpose(1, 2)
        queries = queries.expand(len(slots), -1, -1, -1)
        return F.scaled_dot_product_attention(asked, queries, values).transpose(1, 2).flatten(2)

    def extra_repr(self) -> str:
        """Settings, for printing."""
        return f"dim={self.dim}, columns={self.columns}, tied={self.key is None}"
