"""The grid of inner problems between mini-batches: solved in batched calls, summed with gradients where they count.

Two sides of mini-batches and a scheme (inner transport, ground cost, pairing) make a grid: blocks of problems of one
size, with the values of all problems and the weights of the batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from mbot import checks
from mbot.blocks import Block, MatchedBlock, PlanBlock, ValueBlock
from mbot.cost import Cost, pairwise
from mbot.plan import Plan
from mbot.problem import tell
from mbot.solvers.grid import match_grid
from mbot.transport import Transport, ValueTransport

Inner = Transport | ValueTransport | Callable[[Tensor, Tensor], Tensor]
"""An inner transport: of mbot, or a callable on two clouds ``(m, d)`` or on batches of them."""

Batches = Tensor | Sequence[Tensor]
"""Mini-batches: ``(k, m, d…)``, or a sequence of ``(m_i, d…)``."""

# Most entries of costs made and solved at a time: 16 MB in float32. More leave the cache, fewer make more calls.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Side:
    """The mini-batches of one side.

    Attributes:
        points: the mini-batches.
        name: of the side, for messages.
        index: ``(k, m)`` positions of the points in the cloud that they were drawn from; None for given mini-batches.
        inside: ``(k, m)`` weights inside the mini-batches; None for uniform ones.
        factor: ``(k,)`` factors on the weights of the mini-batches, of expectation 1; None for 1.

    Raises:
        ValueError: weights or factors that require gradients, which plans of mini-batches do not have.
    """

    points: Batches
    name: str
    index: Tensor | None = None
    inside: Tensor | None = None
    factor: Tensor | None = None

    def __post_init__(self) -> None:
        checks.constant_weights(self.inside, "inside", "a grid of mini-batches")
        checks.constant_weights(self.factor, "factor", "a grid of mini-batches")

    def batches(self) -> Batches:
        """The mini-batches, after a check that there are any."""
        points, name = self.points, self.name
        if isinstance(points, Tensor) and points.ndim < 3:
            raise ValueError(f"{name} must have shape (batches, points, features…); got {tuple(points.shape)}")
        if not isinstance(points, Tensor | Sequence) or len(points) == 0:
            raise ValueError(f"{name} must be a tensor or a sequence of at least one mini-batch; got {points!r}")
        return points

    @property
    def sizes(self) -> list[int]:
        """Points in each mini-batch."""
        points = self.points
        return [points.shape[1]] * len(points) if isinstance(points, Tensor) else [len(batch) for batch in points]

    def runs(self) -> list[tuple[slice, Tensor]]:
        """Neighbouring mini-batches of one shape, stacked and flattened to ``(k, m, d)``, with their positions."""
        points = self.batches()
        if isinstance(points, Tensor):
            return [(slice(0, len(points)), points.flatten(2))]
        runs, start = [], 0
        for _, run in groupby(points, key=lambda batch: batch.shape):
            members = list(run)
            runs.append((slice(start, start + len(members)), torch.stack(members).flatten(2)))
            start += len(members)
        return runs

    def weights_inside(self, part: slice) -> Tensor | None:
        """Weights inside some of the mini-batches."""
        return None if self.inside is None else self.inside[part]


@dataclass(frozen=True)
class Scheme:
    """Settings of the problems of a grid.

    Attributes:
        transport: the inner transport.
        cost: ground cost of transports that have plans.
        aligned: whether only the pairs (X_i, Y_i) count, not all pairs.
        generator: for inner transports that draw.
    """

    transport: Inner
    cost: Cost
    aligned: bool = False
    generator: torch.Generator | None = None

    def solve(self, x: Side, y: Side) -> Grid:
        """Solve the problems between two sides."""
        if self.aligned and len(x.batches()) != len(y.batches()):
            raise ValueError(
                f"pairing='aligned' needs as many batches of xs as of ys; got {len(x.points)} and {len(y.points)}"
            )
        blocks = [block for part in self._parts(x, y) for block in self._blocks(part)]
        values = blocks[0].values.detach()
        if len(blocks) > 1:
            values = values.new_zeros(len(x.points), 1 if self.aligned else len(y.points))
            for block in blocks:
                values[block.where] = block.values.detach()
        u, v, pairs = batch_weights(x.sizes, y.sizes, x.factor, y.factor, values, self.aligned)
        return Grid(values, u, v, pairs, blocks)

    def _parts(self, x: Side, y: Side) -> Iterator[_Part]:
        """Sub-grids of mini-batches of one size a side."""
        runs_y = y.runs()
        for i, xs in x.runs():
            for j, ys in runs_y:
                if not self.aligned:
                    checks.clouds(xs[:, None], ys[None], x.name, y.name)
                    yield _Part((i, j), xs, ys, x.weights_inside(i), y.weights_inside(j))
                    continue
                low, high = max(i.start, j.start), min(i.stop, j.stop)
                if low < high:
                    both = slice(low, high)
                    left, right = xs[low - i.start : high - i.start], ys[low - j.start : high - j.start]
                    checks.clouds(left, right, x.name, y.name)
                    yield _Part((both, slice(0, 1)), left, right, x.weights_inside(both), y.weights_inside(both))

    def _blocks(self, part: _Part) -> Iterator[Block]:
        """The problems of a sub-grid, solved: in one block, or in several where their costs are many."""
        transport, cost, (_, x, y, a, b) = self.transport, self.cost, part
        if isinstance(transport, Transport) and isinstance(cost, str):
            yield from self._planned(part, transport, cost)
            return
        if isinstance(transport, Transport):
            left, right, weights = (x, y, (a, b)) if self.aligned else (x[:, None], y[None], _all_pairs(a, b))
            values = transport.value(pairwise(left, right, cost), *weights)
        elif isinstance(transport, ValueTransport):
            value = transport if self.aligned else transport.grid
            values = value(x, y, a, b, generator=self.generator)
        elif self.aligned:
            values = torch.stack([_scalar(transport(p, q)) for p, q in zip(x, y, strict=True)])
        else:
            values = _call_pairs(transport, x, y)
        yield ValueBlock(part.where, values[:, None] if self.aligned else values)

    def _planned(self, part: _Part, transport: Transport, cost: str) -> Iterator[Block]:
        """The problems of a transport that has plans, a bounded number of costs at a time."""
        (i, j), x, y, a, b = part
        (k, n, _), (k2, m, _) = x.shape, y.shape
        pairs = transport.matched_pairs(n, m)
        if pairs and cost == "sqeuclidean" and a is None and b is None and not self.aligned:
            found = match_grid(x.detach(), y.detach(), pairs)
            if found is not None:
                tell(type(transport).__name__, found.error)
                yield MatchedBlock(part.where, found.values.to(x.dtype), found, x, y)
                return
        step = k if self.aligned else max(1, _CHUNK // (k2 * n * m))
        for start in range(0, k, step):
            some = slice(start, start + step)
            left, weights = x[some], (None if a is None else a[some], b)
            costs = pairwise(left, y, cost) if self.aligned else pairwise(left.flatten(0, 1), y.flatten(0, 1), cost)
            with torch.no_grad():
                matrices = costs.detach()
                if not self.aligned:
                    matrices = matrices.reshape(-1, n, k2, m).transpose(1, 2).contiguous()
                    weights = _all_pairs(*weights)
                plan = transport.plan(matrices, *weights)
            where = slice(i.start + start, i.start + start + len(left)), j
            yield PlanBlock.of(where, plan, matrices, costs, left, y, cost, self.aligned)


class _Part(NamedTuple):
    """A sub-grid: where its values are in the table of all, mini-batches ``(k, n, d)``, ``(k', m, d)``, weights."""

    where: tuple[slice, slice]
    x: Tensor
    y: Tensor
    a: Tensor | None
    b: Tensor | None


@dataclass(frozen=True)
class Grid:
    """Solved problems between mini-batches.

    Attributes:
        values: ``(k, k')`` without gradient; ``(k, 1)`` if only the pairs (X_i, Y_i) were solved.
        u: ``(k,)`` weights of the source batches, with expectation of the sum 1.
        v: ``(k',)`` weights of the target batches.
        pairs: ``(k, 1)`` weights of the pairs (X_i, Y_i) if only these were solved; else None.
        blocks: the problems.
    """

    values: Tensor
    u: Tensor
    v: Tensor
    pairs: Tensor | None
    blocks: Sequence[Block]

    @classmethod
    def of_values(cls, values: Tensor, aligned: bool) -> Grid:
        """A grid whose differentiable values are given: ``(k, k')``, or ``(k, 1)`` of pairs."""
        k, k2 = values.shape
        weights = batch_weights([1] * k, [1] * (k if aligned else k2), None, None, values, aligned)
        return cls(values.detach(), *weights, [ValueBlock((slice(0, k), slice(0, k2)), values)])

    def independent(self) -> Tensor:
        """Weights of the m-OT average: ``u_i v_j`` on the grid, those of the pairs if these are aligned."""
        return self.u[:, None] * self.v if self.pairs is None else self.pairs

    def total(self, weight: Tensor) -> Tensor:
        """``sum_ij weight_ij D_ij``, differentiable in the points through the problems of positive weight."""
        if len(self.blocks) == 1:
            return self.blocks[0].total(weight)
        return torch.stack([block.total(weight[block.where]) for block in self.blocks]).sum()

    def scatter(self, weight: Tensor, rows: Tensor, cols: Tensor, n: int, m: int) -> Plan:
        """The full ``n × m`` plan ``sum_ij weight_ij P_ij`` of mini-batches of the points ``rows`` and ``cols``."""
        cells, masses = [], []
        for block in self.blocks:
            row, col, mass = block.entries(weight[block.where])
            i, j = block.where
            left, right = (rows[i][:, None], cols[j][None]) if self.pairs is None else (rows[i], cols[i])
            left, right = (index.expand(*row.shape[:-1], -1) for index in (left, right))
            cells.append((left.gather(-1, row) * m + right.gather(-1, col)).flatten())
            masses.append(mass.flatten())
        cell, mass = torch.cat(cells), torch.cat(masses)
        cell, mass = cell[mass > 0], mass[mass > 0]
        unique, inverse = cell.unique(return_inverse=True)
        mass = mass.new_zeros(len(unique)).index_add_(0, inverse, mass)
        return Plan(mass, (n, m), unique // m, unique % m)


def batch_weights(
    sizes_x: Sequence[int], sizes_y: Sequence[int], u: Tensor | None, v: Tensor | None, like: Tensor, aligned: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weights of mini-batches by their sizes and factors, and of the pairs if only these count; see `Grid`.

    Args:
        sizes_x: points in each mini-batch of one side.
        sizes_y: likewise of the other.
        u: factors on the one side (see `Side`).
        v: factors on the other.
        like: for dtype and device.
        aligned: whether only pairs count.
    """
    share_x, share_y = (
        torch.tensor([size / total for size in sizes], dtype=torch.float64)
        for sizes, total in ((sizes_x, sum(sizes_x)), (sizes_y, sum(sizes_y)))
    )
    of_x, of_y = (
        (share if factor is None else share.to(factor) * factor).to(like)
        for share, factor in ((share_x, u), (share_y, v))
    )
    if not aligned:
        return of_x, of_y, None
    pairs = (share_x * share_y).sqrt()
    for factor in (u, v):
        pairs = pairs if factor is None else pairs.to(factor) * factor
    return of_x, of_y, pairs.to(like)[:, None]


def _all_pairs(a: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Weights inside the mini-batches as weights of all pairs of them."""
    return None if a is None else a[:, None], None if b is None else b[None]


def _scalar(value: Tensor) -> Tensor:
    if value.numel() != 1:
        raise ValueError(f"a callable transport must return one value for two clouds; got shape {tuple(value.shape)}")
    return value.reshape(())


def _call_pairs(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Values of a callable for all pairs: in one call if it maps batches of clouds to a vector, else pair by pair."""
    k, k2 = len(x), len(y)
    left = x[:, None].expand(k, k2, *x.shape[1:]).reshape(k * k2, *x.shape[1:])
    right = y[None].expand(k, k2, *y.shape[1:]).reshape(k * k2, *y.shape[1:])
    try:
        values = function(left.contiguous(), right.contiguous())
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError, NotImplementedError):
        values = None
    if not isinstance(values, Tensor) or values.shape != (k * k2,):
        values = torch.stack([_scalar(function(p, q)) for p, q in zip(left, right, strict=True)])
    return values.reshape(k, k2)
