"""Minimum-cost matchings of a batch of dense problems on the costs' own device, without a copy to the CPU.

Three stages, none of which waits for the device:

1. a short epsilon-scaled Sinkhorn in float32 for column prices that are nearly optimal: after it, all but a few rows
   can have their cheapest column (measured at n = 128: 2 to 4 rows are left, at n = 2048 about 25);
2. these pairs, then shortest augmenting paths in float64 for the rows that are left (Jonker and Volgenant 1987);
3. a scan of the rows at the final prices: dual variables, by which `mbot.certify` certifies the result.

Stage 1 only decides how long stage 2 takes: the result is optimal whatever the prices. A matching with k < n pairs is
the assignment with n - k dummy rows and columns, whose costs are never written to memory.

Each stage is a Triton kernel with a plain-torch reference beside it (`Reference`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mbot.kernels import HUGE, LARGEST_COST, SAMPLE, SMALL
from mbot.kernels.device import triton_module

LARGEST = 16384  # columns (dummies included) of a problem whose state fits one thread block
_FIRST, _RATIO = 0.25, 0.7  # epsilon: first and ratio, in units of the mean minus the least cost
_TINY = 1e-30


def triton_kernels() -> ModuleType | None:
    """The Triton kernels, or None where they cannot be used."""
    return triton_module("triton_matching")


def applies(cost: Tensor, size: int) -> bool:
    """Whether problems with so many rows (dummies included) are solved on their device: CUDA, Triton, not too large."""
    return cost.is_cuda and size <= LARGEST and triton_kernels() is not None


@dataclass
class Problems:
    """``B`` square problems with ``n`` rows, completed by ``size - n`` dummy rows and columns.

    Attributes:
        cost: ``(B, n, n)`` finite costs, float32 or float64, contiguous.
        size: rows with the dummies.
        outside: ``(B,)`` float64, cost between a dummy and a real point.
        big_m: ``(B,)`` float64, cost between two dummies; no optimal matching pays it.
        low: ``(B,)`` float64, least cost.
        excess: ``(B,)`` float64, mean minus least cost.
    """

    cost: Tensor
    size: int
    outside: Tensor
    big_m: Tensor
    low: Tensor
    excess: Tensor

    @property
    def n(self) -> int:
        """Real rows."""
        return self.cost.shape[-1]

    def schedule(self) -> tuple[int, int]:
        """Levels and rounds at each of them of the Sinkhorn start: more for more rows, down to about 0.01 / n."""
        last = max(0.01 / self.size, 2e-6)  # below it float32 has no digits left
        levels = max(8, math.ceil(math.log(last / _FIRST) / math.log(_RATIO)))
        rounds = 8 if self.size > 512 else 4 if self.size > min(256, self.n) else 2
        return levels, rounds

    def levels(self) -> list[float]:
        """Epsilon of each level, in units of the excess."""
        return [_FIRST * _RATIO**level for level in range(self.schedule()[0])]


def problems_of(cost: Tensor, cardinality: int) -> Problems:
    """Complete square problems by the dummies that leave ``cardinality`` pairs."""
    count, n, _ = cost.shape
    flat = cost.reshape(count, -1)
    low = flat.amin(1).double()
    excess = (flat.mean(1, dtype=torch.float64) - low).clamp_min(0)
    size, outside, big_m = 2 * n - cardinality, low, low
    if size > n:
        # The cost of going outside is free to choose; near that of a marginal pair few rows fight over it.
        outside = cost.amin(2).sort(dim=1).values[:, cardinality - 1].double().contiguous()
        typical = excess + low.abs()
        # k + t pairs cost at least t * low more than the best k of them, so this is never worth paying.
        big_m = 2 * outside - low + torch.where(typical > 0, typical, 1)
    return Problems(cost.contiguous(), size, outside, big_m, low, excess)


class Reference:
    """The three stages in plain torch, on any device: what the kernels compute, slowly."""

    @staticmethod
    def _full(problems: Problems) -> Tensor:
        """Costs with the dummies, ``(B, size, size)`` float64."""
        count, n, size = len(problems.cost), problems.n, problems.size
        full = problems.outside[:, None, None].expand(count, size, size).clone()
        full[:, n:, n:] = problems.big_m[:, None, None]
        full[:, :n, :n] = problems.cost
        return full

    @classmethod
    def start(cls, problems: Problems) -> Tensor:
        """Prices ``(B, size)`` in float64 that are nearly optimal."""
        excess = torch.where(problems.excess > 0, problems.excess, 1)
        unit = ((cls._full(problems) - problems.low[:, None, None]) / excess[:, None, None]).float()
        price = unit.new_zeros(unit.shape[:2])
        rounds = problems.schedule()[1]
        for epsilon in problems.levels():
            for _ in range(rounds):
                plan = ((price[:, None, :] - unit) / epsilon).softmax(2)
                price = price - epsilon * plan.sum(1).clamp_min(_TINY).log()
        return price.double() * problems.excess[:, None]

    @classmethod
    def scan(cls, problems: Problems, price: Tensor) -> tuple[Tensor, Tensor]:
        """The least of ``cost - price`` of each row, ``(B, size)`` float64, and its first column."""
        least, want = (cls._full(problems) - price[:, None, :]).min(2)
        return least, want

    @classmethod
    def finish(cls, problems: Problems, price: Tensor, row_of: Tensor, col_of: Tensor) -> None:
        """Shortest augmenting paths for the rows without a column (-1), one row of each problem at a time; in place."""
        cost = cls._full(problems)
        which = torch.arange(len(cost), device=cost.device)
        while bool((col_of < 0).any()):
            live = which[(col_of < 0).any(1)]
            start = (col_of[live] < 0).int().argmax(1)
            c, p = cost[live], price[live]
            at = torch.arange(len(live), device=cost.device)
            dist = c[at, start] - p
            parent = start[:, None].expand_as(dist).clone()
            unsettled = torch.ones_like(dist, dtype=torch.bool)
            taken, dummy = row_of[live] >= 0, row_of[live] >= problems.n
            left = start >= problems.n  # paths that left from a dummy row: the others, its copies, need no visit
            while True:
                reach = dist.masked_fill(~unsettled | (dummy & left[:, None]), torch.inf)
                least = reach.amin(1)
                end = torch.where(reach == least[:, None], 1 + (~taken).int(), 0).argmax(1)  # free columns first
                row = row_of[live, end]
                busy = row >= 0
                if not bool(busy.any()):
                    break
                unsettled[at[busy], end[busy]] = False
                left = left | (row >= problems.n)
                shift = c[at, row, end] - p[at, end] - least
                h = c[at, row] - p - shift[:, None]
                better = unsettled & (h < dist) & busy[:, None]
                dist, parent = torch.where(better, h, dist), torch.where(better, row[:, None], parent)
            price[live] = torch.where(dist < least[:, None], p + (dist - least[:, None]), p)
            moving = at
            while len(moving):
                problem, stop = live[moving], end[moving]
                row = parent[moving, stop]
                row_of[problem, stop] = row
                end[moving] = col_of[problem, row]
                col_of[problem, row] = stop
                moving = moving[row != start[moving]]


def match(
    cost: Tensor, cardinality: int | None = None, more: bool = False, capped: bool = False, kernels: Any = None
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Minimum-cost matchings with exactly ``cardinality`` pairs.

    Args:
        cost: ``(B, n, n)`` costs, float32 or float64.
        cardinality: pairs k, ``0 < k <= n``; None for all n.
        more: solve for k + 1 pairs too (``k < n``).
        capped: costs are finite, and taken as they are; else problems with infinite or huge ones get NaN duals.
        kernels: the stages; None for Triton's on a CUDA device and the reference anywhere else.

    Returns:
        The column of each row, ``(B, n)`` int64, -1 for unmatched rows, of each cardinality; and dual variables
        ``f, g`` ``(B, n)`` in float64 with ``f + g <= cost``, optimal for all of them.
    """
    if kernels is None:
        kernels = triton_kernels() if cost.is_cuda else None
        kernels = kernels or Reference
    n = cost.shape[-1]
    strange = None if capped else _unusual(cost.flatten(1))
    if strange is not None and bool(strange.any()):
        columns, f, g = match(cost.masked_fill(strange[:, None, None], 0), cardinality, more, True, kernels)
        return columns, f.masked_fill(strange[:, None], torch.nan), g
    problems = problems_of(cost, n if cardinality is None else cardinality)
    price = kernels.start(problems).nan_to_num(0, 0, 0)  # costs beyond float32's range start from nothing
    if problems.size > n:
        price = _equal_outside(problems, price, kernels).nan_to_num(0, 0, 0)  # a search among NaN would never end
    _, want = kernels.scan(problems, price)
    row_of, col_of = _first_pairs(problems, price, want.long())
    if kernels is Reference:
        col_of, row_of = col_of.long(), row_of.long()
    kernels.finish(problems, price, row_of, col_of)
    columns = [_real(col_of, n)]
    if more:
        problems, price, row_of, col_of = _without_a_dummy(problems, price, row_of, col_of)
        kernels.finish(problems, price, row_of, col_of)
        columns.append(_real(col_of, n))
    least, _ = kernels.scan(problems, price)
    return columns, least[:, :n], price[:, :n]


def _unusual(flat: Tensor) -> Tensor:
    """See `mbot.kernels.assignment.unusual`; of each row of ``flat``."""
    low = flat.amin(1).double()
    excess = flat.mean(1, dtype=torch.float64) - low
    above = flat[:, :: flat.shape[1] // SAMPLE + 1].double() - low[:, None]
    small = (above > 0) & (above * HUGE < excess[:, None])
    return ~((low.abs() <= LARGEST_COST) & (excess <= LARGEST_COST)) | (SMALL * small.sum(1) >= above.shape[1])


def _real(col_of: Tensor, n: int) -> Tensor:
    return torch.where(col_of < n, col_of, -1)[:, :n].long()


def _without_a_dummy(
    problems: Problems, price: Tensor, row_of: Tensor, col_of: Tensor
) -> tuple[Problems, Tensor, Tensor, Tensor]:
    """The problems without their last dummy row and column, whose partners are free: one more pair."""
    last = problems.size - 1
    row, col = row_of[:, last:].long(), col_of[:, last:].long()
    row_of, col_of = row_of.scatter(1, col, -1), col_of.scatter(1, row, -1)
    price, row_of, col_of = (part[:, :last].contiguous() for part in (price, row_of, col_of))
    return replace(problems, size=last), price, row_of, col_of


def _equal_outside(problems: Problems, price: Tensor, kernels: Any) -> Tensor:
    """Prices at which the dummies have a choice, and as many real points want them as there are.

    The dummies are copies of each other. At the optimum the real columns that stay free have one price, the highest,
    and the rows that stay free have the largest least reduced costs.
    """
    n, spare = problems.n, problems.size - problems.n
    dearest = price[:, :n].topk(spare, 1, sorted=False).values.amin(1, keepdim=True)
    price = torch.cat((torch.minimum(price[:, :n], dearest), torch.full_like(price[:, n:], -torch.inf)), 1)
    least, _ = kernels.scan(problems, price)  # over real columns
    last = least[:, :n].topk(spare, 1, sorted=False).values.amin(1, keepdim=True)
    price[:, n:] = problems.outside[:, None] - last
    return price


def _first_pairs(problems: Problems, price: Tensor, want: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns that can be paired at once, ``(B, size)`` int32 each, -1 for none.

    Every pair is of a row and a column of its least reduced cost. Of the rows that want a column the first one gets
    it; those that want a dummy get one each, and so do the dummies of the free columns at the highest price.
    """
    n, size = problems.n, problems.size
    rows = torch.arange(size, device=want.device, dtype=torch.int32).expand_as(want)
    if size > n:
        outside = want[:, :n] >= n
        turn = outside.cumsum(1)
        real = torch.where(outside, torch.where(turn <= size - n, n - 1 + turn, size), want[:, :n])
        wanted = torch.zeros(len(want), size + 1, dtype=torch.bool, device=want.device).scatter_(1, real, True)
        free = (price[:, :n] == price[:, :n].amax(1, keepdim=True)) & ~wanted[:, :n]
        turn = torch.where(free, free.cumsum(1), 0).clamp_max(size - n + 1)
        position = torch.full((len(want), size - n + 2), size, device=want.device).scatter_(1, turn, rows[:, :n].long())
        chosen = torch.where(want[:, n:] < n, position[:, 1:-1], size)
        want = torch.cat((real, chosen), 1)
    taker = torch.full((len(want), size + 1), size, dtype=torch.int32, device=want.device)
    taker = taker.scatter_reduce_(1, want, rows, "amin")
    col_of = torch.where((taker.gather(1, want) == rows) & (want < size), want, -1).int()
    row_of = torch.where(taker < size, taker, -1)[:, :size].contiguous()
    return row_of, col_of
