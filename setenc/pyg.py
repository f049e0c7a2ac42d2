"""Set encoders as aggregations of PyTorch Geometric; needs ``torch_geometric`` (extra ``pyg``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    from torch_geometric.nn.aggr import Aggregation
except ImportError as error:
    raise ImportError("setenc.pyg needs torch_geometric: pip install torch_geometric") from error

from setenc.encoder import UMBC
from setenc.pooling import Pooling
from setenc.ragged import Ragged


class SetAggregation(Aggregation):
    """A set encoder that replaces a sum or mean over neighbours, or over the nodes of a graph.

    Args:
        encoder: a `UMBC`, or a `Pooling` over the features.

    >>> pool = SetAggregation(setenc.SlotPooling(3, 8, 2))
    >>> pool(torch.randn(5, 3), torch.tensor([0, 1, 0, 2, 1])).shape
    torch.Size([3, 16])
    """

    def __init__(self, encoder: UMBC | Pooling) -> None:
        super().__init__()
        if not isinstance(encoder, UMBC | Pooling):
            raise TypeError(f"encoder must be a setenc.UMBC or a setenc.Pooling; got {type(encoder).__name__}")
        self.encoder = encoder if isinstance(encoder, UMBC) else UMBC(None, encoder, None)

    def forward(
        self,
        x: Tensor,
        index: Tensor | None = None,
        ptr: Tensor | None = None,
        dim_size: int | None = None,
        dim: int = -2,
        **_: Any,
    ) -> Tensor:
        """The sets' results one after the other, flat: ``(T, d)`` to ``(B, …)``; sets without elements are defined.

        Args:
            x: ``(T, d)`` elements.
            index: ``(T,)`` the set of each, in any order.
            ptr: ``(B + 1,)`` instead: where each set begins in ``x``.
            dim_size: sets ``B``; None is the largest index and one.
            dim: -2, the elements' dimension.
        """
        if x.ndim != 2 or dim not in (-2, 0):
            raise ValueError(f"x must have shape (T, d), with dim=-2; got {tuple(x.shape)} and dim={dim}")
        if ptr is None:
            index = x.new_zeros(len(x), dtype=torch.int64) if index is None else index
            index = _checked(index, len(x), dim_size)
            order = index.argsort(stable=True)
            sizes = torch.bincount(index, minlength=dim_size or 0)
            x, ptr = x[order], torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
        out: Tensor = self.encoder(Ragged(x, ptr))
        return out.flatten(1)

    def __repr__(self) -> str:
        return f"SetAggregation({self.encoder})"


def _checked(index: Any, count: int, dim_size: int | None) -> Tensor:
    """The set of each of ``count`` elements, below ``dim_size``."""
    if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64) or index.shape != (count,):
        given = (index.dtype, tuple(index.shape)) if isinstance(index, Tensor) else type(index).__name__
        raise ValueError(f"index must be an int64 tensor, one set for each of the {count} elements; got {given}")
    low, high = (int(v) for v in index.aminmax()) if count else (0, -1)
    if low < 0 or (dim_size is not None and high >= dim_size):
        raise ValueError(f"index must lie in [0, dim_size), dim_size = {dim_size}; it ranges from {low} to {high}")
    return index
