"""Sources of the chunks of `setenc.encode`: slices of a tensor, windows of ragged sets, or a user's iterators."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from setenc import checks
from setenc.ragged import Ragged, is_ragged
from setenc.random import DRAWS


class Chunk(NamedTuple):
    """Elements with their mask and weights, and where in the source tensor they are."""

    x: Any
    mask: Tensor | None
    weights: Tensor | None
    index: Any = None

    def clone(self) -> Chunk:
        """A copy in memory of its own."""
        x = Ragged(self.x.values.clone(), self.x.offsets) if isinstance(self.x, Ragged) else self.x.clone()
        mask, weights = (None if t is None else t.clone() for t in (self.mask, self.weights))
        return Chunk(x, mask, weights, self.index)


class Source:
    """Chunks, from the start each time it is iterated.

    ``x`` is the tensor they come from, if there is one. ``chunks_of_set`` ``(B,)`` counts each set's own chunks where
    every set has its own order, of which the first ones are drawn for the gradient; None where all sets share chunks.
    ``reuses_memory``: a chunk may be overwritten by the next one.
    """

    x: Tensor | None = None
    mask: Tensor | None = None
    weights: Tensor | None = None
    chunks_of_set: Tensor | None = None
    reuses_memory = False

    def tensors(self) -> dict[str, Tensor]:
        """The user's tensors that are read each time, by their names."""
        found = {"x": self.x, "mask": self.mask, "weights": self.weights}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def __iter__(self) -> Iterator[Chunk]:
        raise NotImplementedError


def source_of(
    x: Any, mask: Tensor | None, weights: Tensor | None, size: int | None, draws: int | None, seed: int
) -> Source:
    """The chunks of what a user gives to `setenc.encode`."""
    x = checks.as_tensor(x)
    if is_ragged(x):
        checks.no_mask(mask)
        return RaggedSource(Ragged.of(x), weights, size, draws, seed)
    if isinstance(x, Tensor):
        x, mask, weights = checks.elements(x, mask, weights)
        if draws is not None and mask is not None:
            mask = mask.clone()  # the graph of what is packed holds on to it
            packed = None if weights is None else weights[mask]
            return RaggedSource(Ragged.from_mask(x, mask), packed, size, draws, seed)
        return TensorSource(x, mask, weights, size)
    if not callable(x):
        raise TypeError(
            "x_or_chunks must be a tensor, a ragged batch, or a callable that returns a fresh iterator of chunks each "
            f"time (the data may be read twice); got {type(x).__name__}. For a loader: lambda: iter(loader)"
        )
    return IteratorSource(x, mask, weights, size)


class TensorSource(Source):
    """Slices of a batch of sets of one (padded) size."""

    def __init__(self, x: Tensor, mask: Tensor | None, weights: Tensor | None, size: int | None) -> None:
        self.x: Tensor = x
        self.mask, self.weights, self.size = mask, weights, size or max(x.shape[1], 1)

    def __iter__(self) -> Iterator[Chunk]:
        for begin in range(0, max(self.x.shape[1], 1), self.size):
            index = (slice(None), slice(begin, begin + self.size))
            mask, weights = (t if t is None else t[index] for t in (self.mask, self.weights))
            yield Chunk(self.x.detach()[index], mask, weights, index)


class RaggedSource(Source):
    """Windows of sets of different sizes: chunk ``t`` holds the ``t``-th part of each set that has one.

    Where chunks are drawn, every set has its parts in an order of its own, and the first ones are the drawn ones.
    """

    def __init__(self, ragged: Ragged, weights: Tensor | None, size: int | None, draws: int | None, seed: int) -> None:
        self.ragged = ragged
        self.x: Tensor = ragged.values
        self.weights = None if weights is None else checks.packed_weights(weights, self.x)
        self.size = size or max(int(ragged.sizes.max()) if len(ragged) else 1, 1)
        parts = (ragged.sizes + self.size - 1) // self.size
        self.count = max(int(parts.max()) if len(ragged) else 0, 1)
        self.order = None
        if draws is not None:
            self.chunks_of_set = parts
            random = torch.Generator().manual_seed(DRAWS + seed)
            key = torch.rand(len(parts), self.count, generator=random).to(parts.device)
            missing = torch.arange(self.count, device=parts.device) >= parts[:, None]
            self.order = key.masked_fill(missing, 2).argsort(1)

    def __iter__(self) -> Iterator[Chunk]:
        for t in range(self.count):
            which = torch.full_like(self.ragged.sizes, t) if self.order is None else self.order[:, t]
            rows, offsets = self.ragged.window(which, self.size)
            weights = None if self.weights is None else self.weights[rows]
            yield Chunk(Ragged(self.x.detach()[rows], offsets), None, weights, rows)


class IteratorSource(Source):
    """Chunks from the user's iterators, cut where they are larger than ``size``."""

    reuses_memory = True

    def __init__(
        self, make: Callable[[], Iterable[Any]], mask: Tensor | None, weights: Tensor | None, size: int | None
    ) -> None:
        self.make, self.size = make, size
        self.mask, self.weights = checks.stream_part(mask, "mask"), checks.stream_part(weights, "weights")

    def __iter__(self) -> Iterator[Chunk]:
        begin = 0
        for item in self.make():
            parts = item if isinstance(item, tuple) else (item,)
            if not 1 <= len(parts) <= 3:
                raise ValueError(
                    f"a chunk must be elements, or (elements, mask[, weights]); got a tuple of {len(parts)}"
                )
            x, mask, weights = (*map(checks.as_tensor, parts), None, None)[:3]
            length = x.shape[1] if isinstance(x, Tensor) and x.ndim > 1 else 0
            if mask is None and self.mask is not None:
                mask = self.mask[:, begin : begin + length]
            if weights is None and self.weights is not None:
                weights = self.weights[:, begin : begin + length]
            begin += length
            x, mask, weights = checks.elements(x, mask, weights, "a chunk")
            checks.constant(x, "a chunk from an iterator")
            checks.constant(weights, "weights")
            size = self.size or max(length, 1)
            for start in range(0, max(length, 1), size):
                cut = [t if t is None else t[:, start : start + size] for t in (x, mask, weights)]
                yield Chunk(cut[0], cut[1], cut[2])
        checks.stream_length(self.mask, begin, "mask")
        checks.stream_length(self.weights, begin, "weights")
