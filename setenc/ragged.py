"""Batches of sets of different sizes, packed one after the other, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from setenc import checks


@dataclass(eq=False)
class Ragged:
    """``B`` sets in one tensor: set ``j`` is ``values[offsets[j]:offsets[j + 1]]``.

    Wherever an encoder takes a batch ``(B, n, …)`` it takes a `Ragged`, a list of sets ``(n_j, …)`` or a nested
    tensor (``torch.jagged``) too; weights are then packed too, ``(T,)``. The extractor sees all elements as one
    batch of one set ``(1, T, …)``.

    Args:
        values: ``(T, …)`` elements of all sets.
        offsets: ``(B + 1,)`` int64, from 0 to T, never falling.

    >>> ragged = Ragged.of([torch.zeros(3, 2), torch.ones(1, 2)])
    >>> ragged.sizes
    tensor([3, 1])
    """

    values: Tensor
    offsets: Tensor

    def __post_init__(self) -> None:
        offsets = self.offsets
        if not isinstance(self.values, Tensor) or not isinstance(offsets, Tensor) or self.values.ndim == 0:
            raise TypeError("values and offsets must be tensors, values with a dimension of elements")
        if offsets.dtype not in (torch.int32, torch.int64) or offsets.ndim != 1 or len(offsets) < 1:
            raise TypeError(f"offsets must be an int64 tensor (B + 1,); got {offsets.dtype} {tuple(offsets.shape)}")
        self.offsets = offsets = offsets.to(self.values.device, torch.int64)
        if int(offsets[0]) != 0 or int(offsets[-1]) != len(self.values) or bool((offsets.diff() < 0).any()):
            raise ValueError(
                f"offsets must rise from 0 to the number of elements {len(self.values)}; got {offsets.tolist()[:8]}…"
            )

    @classmethod
    def of(cls, sets: Any) -> Ragged:
        """From a `Ragged`, a sequence of sets ``(n_j, …)``, or a nested tensor of layout ``torch.jagged``."""
        if isinstance(sets, Ragged):
            return sets
        if isinstance(sets, Tensor):
            if sets.layout != torch.jagged:
                raise TypeError(f"a nested tensor must have the layout torch.jagged; got a tensor of {sets.layout}")
            if isinstance(sets.shape[1], int):
                raise ValueError(f"sets of a nested tensor must differ in their first dimension; got {sets.shape}")
            nested: Any = sets
            values, offsets, lengths = nested.values(), nested.offsets(), nested.lengths()
            if lengths is None:
                return cls(values, offsets)
            owner, position = _ranges(lengths)  # its sets are windows of the values
            return cls(values[offsets[owner] + position], torch.nn.functional.pad(lengths.cumsum(0), (1, 0)))
        sets = [checks.as_tensor(s) for s in sets] if isinstance(sets, Sequence) else sets
        if not isinstance(sets, Sequence) or not sets or not all(isinstance(s, Tensor) and s.ndim >= 1 for s in sets):
            raise TypeError(
                "a batch of sets must be a tensor (B, n, …), a Ragged, or a non-empty list of tensors or arrays (n, …)"
            )
        if len({s.shape[1:] for s in sets}) > 1:
            raise ValueError(f"sets must have equal features; got {sorted({tuple(s.shape[1:]) for s in sets})}")
        sizes = torch.tensor([0, *map(len, sets)])
        return cls(torch.cat(list(sets)), sizes.cumsum(0))

    @classmethod
    def from_mask(cls, x: Tensor, mask: Tensor) -> Ragged:
        """The real elements of a padded batch ``(B, n, …)``."""
        x, real, _ = checks.elements(x, mask, None)
        if real is None:
            raise TypeError("mask must be a bool tensor (B, n), True at real elements; got None")
        return cls(x[real], torch.nn.functional.pad(real.sum(1).cumsum(0), (1, 0)))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def sizes(self) -> Tensor:
        """``(B,)`` elements of each set."""
        return self.offsets.diff()

    def blocks(self, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Cut every set into ``M`` blocks of ``width`` elements: index ``(M, width)``, mask, owner ``(M,)``."""
        count = (self.sizes + width - 1) // width
        owner, position = _ranges(count)
        index = (self.offsets[owner] + position * width)[:, None] + torch.arange(width, device=owner.device)
        mask = index < self.offsets[owner + 1][:, None]
        return index.where(mask, 0), mask, owner

    def window(self, which: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Rows of the ``which[j]``-th ``size`` elements of each set ``j``, and the offsets of what they make."""
        start = torch.minimum(self.offsets[:-1] + which * size, self.offsets[1:])
        taken = torch.minimum(start + size, self.offsets[1:]) - start
        owner, position = _ranges(taken)
        return start[owner] + position, torch.nn.functional.pad(taken.cumsum(0), (1, 0))


def is_ragged(x: Any) -> bool:
    """Whether ``x`` is one of the forms that `Ragged.of` takes."""
    return isinstance(x, Ragged | list | tuple) or (isinstance(x, Tensor) and x.is_nested)


def _ranges(counts: Tensor) -> tuple[Tensor, Tensor]:
    """``0 … counts[j] - 1`` for each ``j``, concatenated, with the ``j`` of each."""
    owner = torch.repeat_interleave(counts)
    return owner, torch.arange(len(owner), device=counts.device) - (counts.cumsum(0) - counts)[owner]
