"""Drawing mini-batches: index tensors for k batches of m points, by the laws of the mini-batch OT papers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mbot.numerics import running_sum
from mbot.random import draw


def draw_batches(
    size: int,
    num_batches: int,
    batch_size: int,
    *,
    replacement: bool = False,
    disjoint: bool = False,
    weight: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device,
    name: str = "x",
) -> Tensor:
    """Indices of ``k`` mini-batches of ``m`` points, ``(k, m)`` int64.

    Args:
        size: number of points.
        num_batches: k.
        batch_size: m.
        replacement: draw the points of a batch independently, in proportion to their weights; else each batch is a
            uniform m-subset of the points with positive weight, and batches are independent of each other.
        disjoint: without replacement, no point in two batches either (k · m points are needed).
        weight: ``(size,)`` point weights; points of weight 0 are never drawn.
        generator: source of randomness.
        device: where the indices are wanted.
        name: of the point cloud, for messages.

    Raises:
        ValueError: more points than there are, without replacement.
    """
    if replacement:
        if weight is None:
            uniform = draw(torch.rand, num_batches, batch_size, generator=generator, device=device, dtype=torch.float64)
            return (uniform * size).long().clamp_max(size - 1)
        cumulative = running_sum(weight.double(), 0)
        uniform = draw(torch.rand, num_batches, batch_size, generator=generator, device=device, dtype=torch.float64)
        last = int(torch.nonzero(weight)[-1])
        return torch.searchsorted(cumulative, uniform * cumulative[-1], right=True).clamp_max(last)
    support = None if weight is None or bool((weight > 0).all()) else torch.nonzero(weight > 0)[:, 0]
    available = size if support is None else len(support)
    needed = num_batches * batch_size if disjoint else batch_size
    if needed > available:
        what = f"{num_batches} disjoint batches of {batch_size}" if disjoint else f"a batch of {batch_size}"
        raise ValueError(
            f"{what} cannot be drawn without replacement from the {available} points of {name} with weight; "
            "lower num_batches or batch_size, or draw with replacement=True"
        )
    if disjoint:
        index = draw(torch.randperm, available, generator=generator, device=device)[:needed]
        index = index.reshape(num_batches, batch_size)
    elif available <= 64 * batch_size:
        keys = draw(torch.rand, num_batches, available, generator=generator, device=device)
        index = keys.topk(batch_size, dim=-1).indices
    else:
        index = _sparse_subsets(available, num_batches, batch_size, generator, device)
    return index if support is None else support[index]


def rounds(
    size: int, batch_size: int, *, generator: torch.Generator | None = None, device: torch.device, name: str = "x"
) -> Iterator[Tensor]:
    """Endless mini-batches ``(m,)`` that go through all points in one random order after the other.

    No point is twice in a mini-batch: the last one of an order is filled up from the order's beginning.
    """
    if batch_size > size:
        raise ValueError(f"a batch of {batch_size} cannot be drawn from the {size} points of {name}; lower batch_size")
    while True:
        order = draw(torch.randperm, size, generator=generator, device=device)
        yield from torch.cat((order, order[: -size % batch_size])).split(batch_size)


def _sparse_subsets(
    size: int, num_batches: int, batch_size: int, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """Small subsets of many points: independent draws, with repeated ones drawn again until none is left."""
    index = draw_batches(size, num_batches, batch_size, replacement=True, generator=generator, device=device)
    while True:
        ordered, order = index.sort(dim=-1, stable=True)
        again = torch.zeros_like(index, dtype=torch.bool)
        again.scatter_(-1, order[:, 1:], ordered[:, 1:] == ordered[:, :-1])
        if not bool(again.any()):
            return index
        fresh = draw_batches(size, 1, int(again.sum()), replacement=True, generator=generator, device=device)
        index[again] = fresh[0]
