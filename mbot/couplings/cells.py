"""Laguerre cells: the data point of each noise by its score ``<x, y_j> + g_j - |y_j|² / 2``, within classes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mbot.cost import pairwise
from mbot.numerics import rows_of
from mbot.random import draw
from mbot.transport import ExactOT

_CELLS = {"cuda": 1 << 24, "cpu": 1 << 20}  # scores made at a time; of more, a processor would wait for memory
_EXACT = 4096  # noises that are assigned at once, by exact transport


def class_sizes(points: Tensor, codes: Tensor | None) -> Tensor:
    """Number of points in the class of each point, ``(N,)``."""
    if codes is None:
        return points.new_full((len(points),), float(len(points)))
    return torch.bincount(codes).to(points.dtype)[codes]


def cells(x: Tensor, points: Tensor, values: Tensor, codes: Tensor | None, wanted: Tensor | None) -> Tensor:
    """The cell of each noise, ``(n,)``: the largest score, among the points of its class if there are classes.

    Args:
        x: ``(n, d)`` noises.
        points: ``(N, d)`` data points.
        values: ``(N,)`` potentials.
        codes: ``(N,)`` classes 0 … c-1 of the points, or None for one class.
        wanted: ``(n,)`` classes of the noises.
    """
    target = torch.empty(len(x), dtype=torch.int64, device=x.device)
    for askers, members, y, offset in _classes(x, points, values, codes, wanted):
        for part in askers.split(_rows(members)):
            target[part] = members[torch.addmm(offset, rows_of(x, part), y.T).argmax(1)]
    return target


def masses(
    x: Tensor, points: Tensor, values: Tensor, codes: Tensor | None, wanted: Tensor | None, reg: float
) -> Tensor:
    """Noises in each cell ``(N,)``; with ``reg > 0`` each is divided by ``softmax(score / reg)``."""
    if reg == 0:
        hits = torch.bincount(cells(x, points, values, codes, wanted), minlength=len(points))
        return hits.to(points.dtype)
    total = torch.zeros_like(values)
    for askers, members, y, offset in _classes(x, points, values, codes, wanted):
        for part in askers.split(_rows(members)):
            total[members] += torch.addmm(offset, rows_of(x, part), y.T).div_(reg).softmax(1).sum(0)
    return total


def balanced_cells(
    x: Tensor, points: Tensor, values: Tensor, codes: Tensor | None, wanted: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, float]:  # fmt: skip
    """A point for each noise, every point (of a class) equally often up to rounding; and the share in their own cells.

    Points keep the noises of their cells in order, up to their number. The others go to the cells of the points that
    are not full, round after round; the last 4096 are assigned by exact transport.
    """
    target = torch.empty(len(x), dtype=torch.int64, device=x.device)
    kept = 0
    for askers, members, y, offset in _classes(x, points, values, codes, wanted):
        times, more = divmod(len(askers), len(members))
        room = torch.full((len(members),), times, device=x.device)
        room[draw(torch.randperm, len(members), generator=generator, device=x.device)[:more]] += 1
        waiting, turn = askers, 0
        while len(waiting) > (_EXACT if turn else 0):
            free = torch.nonzero(room)[:, 0] if turn else torch.arange(len(members), device=x.device)
            parts = waiting.split(_rows(free))
            own = free[torch.cat([torch.addmm(offset[free], x[part], y[free].T).argmax(1) for part in parts])]
            taken = _position_in_cell(own, len(room)) < room[own]
            target[waiting[taken]] = members[own[taken]]
            room -= torch.bincount(own[taken], minlength=len(room))
            kept += int(taken.sum()) if turn == 0 else 0
            waiting, turn = waiting[~taken], turn + 1
        if len(waiting):
            free = torch.repeat_interleave(room)
            source = ExactOT().plan(pairwise(x[waiting], y[free], "sqeuclidean")).matching()
            assert source is not None
            target[waiting[source]] = members[free]
    return target, kept / len(x)


def _classes(
    x: Tensor, points: Tensor, values: Tensor, codes: Tensor | None, wanted: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """For each class: its noises and its points (positions), the centred points, and what is added to ``<x, y>``."""
    y = points - points.mean(0)
    offset = values - y.square().sum(1) / 2
    if codes is None or wanted is None:
        yield torch.arange(len(x), device=x.device), torch.arange(len(y), device=x.device), y, offset
        return
    order, ends = codes.argsort(stable=True), torch.bincount(codes).cumsum(0).tolist()
    rows, last = wanted.argsort(stable=True), torch.bincount(wanted, minlength=len(ends)).cumsum(0).tolist()
    for members, askers in zip(_between(order, ends), _between(rows, last), strict=True):
        if len(askers):
            yield askers, members, y[members], offset[members]


def _between(index: Tensor, ends: list[int]) -> list[Tensor]:
    return [index[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def _rows(members: Tensor) -> int:
    """Noises that are scored at a time."""
    return max(1, _CELLS["cuda" if members.is_cuda else "cpu"] // len(members))


def _position_in_cell(own: Tensor, count: int) -> Tensor:
    """For each noise, the number of those before it in the same cell."""
    order = own.argsort(stable=True)
    sizes = torch.bincount(own, minlength=count)
    position = torch.empty_like(own)
    position[order] = torch.arange(len(own), device=own.device) - (sizes.cumsum(0) - sizes)[own[order]]
    return position
