"""The grid of inner problems between mini-batches: solved in batched calls, summed with gradients where they count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from mbot import checks
from mbot.cost import Cost, pairwise
from mbot.envelope import matched_values
from mbot.plan import Plan
from mbot.transport import SlicedOT, Transport

# Cost matrices of a grid are made and solved at most this many entries at a time (256 MB in float32).
_CHUNK = 1 << 26


@dataclass
class _Block:
    """Sub-grid of batches of one size a side: batches ``i`` of xs against batches ``j`` of ys."""

    i: slice
    j: slice
    values: Tensor  # (k_i, k_j), with gradients if ``plans`` is None
    plans: list[Plan] | None = None  # by chunks of rows
    costs: list[Tensor] | None = None  # costs of the plans' entries (sparse plans only)
    x: Tensor | None = None  # (k_i, m, d)
    y: Tensor | None = None
    cost: Cost = "sqeuclidean"


@dataclass
class Grid:
    """Values ``(k, k')`` of the inner problems, batch weights, and what gradients and plans need.

    Attributes:
        values: without gradient; ``(k, 1)`` if only the pairs (X_i, Y_i) were solved.
        u: ``(k,)`` weights of the source batches, with expectation of the sum 1.
        v: ``(k',)`` weights of the target batches.
        pairs: ``(k, 1)`` weights of the pairs (X_i, Y_i) if only these were solved; else None.
    """

    values: Tensor
    u: Tensor
    v: Tensor
    blocks: list[_Block]
    pairs: Tensor | None = None
    rows: Tensor | None = None
    cols: Tensor | None = None

    @classmethod
    def of_values(cls, values: Tensor) -> Grid:
        """A grid whose differentiable values ``(k, k')`` are given."""
        k, k2 = values.shape
        u, v = values.new_full((k,), 1 / k), values.new_full((k2,), 1 / k2)
        return cls(values.detach(), u, v, [_Block(slice(0, k), slice(0, k2), values)])

    @classmethod
    def solve(
        cls,
        transport: Any,
        xs: Tensor | Sequence[Tensor],
        ys: Tensor | Sequence[Tensor],
        a: Tensor | None,
        b: Tensor | None,
        u: Tensor | None,
        v: Tensor | None,
        rows: Tensor | None,
        cols: Tensor | None,
        *,
        cost: Cost,
        generator: torch.Generator | None,
        aligned: bool,
    ) -> Grid:
        """Solve all pairs (or the aligned ones) of mini-batches.

        Args:
            transport: an mbot transport or a callable on clouds.
            xs: ``(k, m, d…)`` or a sequence of ``(m_i, d…)``.
            ys: ``(k', m', d…)`` or a sequence.
            a: ``(k, m)`` weights inside the batches of xs, or None.
            b: ``(k', m')`` likewise.
            u: ``(k,)`` factors on the batches of xs (expectation 1), or None.
            v: ``(k',)`` likewise.
            rows: ``(k, m)`` indices of the points in the full problem, or None.
            cols: ``(k', m')`` likewise.
            cost: ground cost.
            generator: for transports that draw (sliced).
            aligned: solve the pairs (X_i, Y_i) only.
        """
        stacks_x, stacks_y = _stacks(xs, "xs"), _stacks(ys, "ys")
        k, k2 = stacks_x[-1][0].stop, stacks_y[-1][0].stop
        if aligned and k != k2:
            raise ValueError(f"pairing='aligned' needs as many batches of xs as of ys; got {k} and {k2}")
        blocks = []
        for i, x in stacks_x:
            for j, y in stacks_y:
                if aligned:
                    lo, hi = max(i.start, j.start), min(i.stop, j.stop)
                    if lo >= hi:
                        continue
                    part = slice(lo, hi)
                    x_part, y_part = x[lo - i.start : hi - i.start], y[lo - j.start : hi - j.start]
                    ins = (None if a is None else a[part], None if b is None else b[part])
                    blocks.append(_solve_aligned(transport, part, x_part, y_part, *ins, cost, generator))
                else:
                    ins = (None if a is None else a[i], None if b is None else b[j])
                    blocks.append(_solve_block(transport, i, j, x, y, *ins, cost, generator))
        like = blocks[0].values
        values = like.detach() if len(blocks) == 1 else like.new_zeros((k, 1) if aligned else (k, k2))
        for block in blocks if len(blocks) > 1 else []:
            values[block.i, block.j] = block.values.detach()
        u, v, pairs = _weights(_shares(stacks_x), _shares(stacks_y), u, v, like, aligned)
        return cls(values, u, v, blocks, pairs, rows, cols)

    def independent(self) -> Tensor:
        """Weights of the m-OT average: ``u_i v_j`` on the grid, those of the pairs if these are aligned."""
        return self.u[:, None] * self.v if self.pairs is None else self.pairs

    def total(self, weight: Tensor) -> Tensor:
        """``sum_ij weight_ij D_ij``, differentiable in the points through the pairs of positive weight."""
        parts = [_block_total(block, weight[block.i, block.j]) for block in self.blocks]
        return torch.stack(parts).sum()

    def scatter(self, weight: Tensor, n: int, m: int) -> Plan:
        """The full ``n × m`` plan ``sum_ij weight_ij P_ij`` in the points' own indices."""
        if self.rows is None or self.cols is None or self.blocks[0].plans is None:
            raise TypeError("only mbot transports that have plans give one; SlicedOT and callables have values alone")
        cells, masses = [], []
        for block in self.blocks:
            first = block.i.start
            for plan in block.plans or []:
                count = plan.batch_shape[0]
                part = slice(first, first + count)
                first += count
                row, col, mass = _entries(plan)
                w = weight[part, block.j].reshape(*plan.batch_shape)
                if self.pairs is not None:
                    rows, cols = self.rows[part], self.cols[part]
                else:
                    rows, cols = self.rows[part][:, None], self.cols[block.j][None]
                rows, cols = rows.expand(*plan.batch_shape, -1), cols.expand(*plan.batch_shape, -1)
                cells.append((rows.gather(-1, row) * m + cols.gather(-1, col)).flatten())
                masses.append((w[..., None] * mass).flatten())
        cell, mass = torch.cat(cells), torch.cat(masses)
        cell, mass = cell[mass > 0], mass[mass > 0]
        unique, inverse = cell.unique(return_inverse=True)
        mass = mass.new_zeros(len(unique)).index_add_(0, inverse, mass)
        return Plan(mass, (n, m), unique // m, unique % m)


def _weights(
    share_x: Tensor, share_y: Tensor, u: Tensor | None, v: Tensor | None, like: Tensor, aligned: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weights of the batches of either side, and of the pairs if only the aligned ones count; see `Grid`."""
    pairs = None
    if aligned:
        pairs = (share_x * share_y).sqrt()
        for factor in (u, v):
            pairs = pairs if factor is None else pairs.to(factor) * factor
        pairs = pairs.to(like)[:, None]
    of_x, of_y = (
        (share if factor is None else share.to(factor) * factor).to(like)
        for share, factor in ((share_x, u), (share_y, v))
    )
    return of_x, of_y, pairs


def _batches(batches: Tensor | Sequence[Tensor], name: str) -> Tensor | Sequence[Tensor]:
    """Mini-batches, at least one."""
    if isinstance(batches, Tensor) and batches.ndim < 3:
        raise ValueError(f"{name} must have shape (batches, points, features…); got {tuple(batches.shape)}")
    if not isinstance(batches, Tensor | Sequence) or len(batches) == 0:
        raise ValueError(f"{name} must be a tensor or a sequence of at least one mini-batch; got {batches!r}")
    return batches


def _stacks(batches: Tensor | Sequence[Tensor], name: str) -> list[tuple[slice, Tensor]]:
    """Runs of equally shaped batches, stacked and flattened to ``(k, m, d)``."""
    batches = _batches(batches, name)
    if isinstance(batches, Tensor):
        return [(slice(0, len(batches)), batches.flatten(2))]
    stacks, start = [], 0
    for _, run in groupby(batches, key=lambda batch: batch.shape):
        members = list(run)
        stacks.append((slice(start, start + len(members)), torch.stack(members).flatten(2)))
        start += len(members)
    return stacks


def _shares(stacks: list[tuple[slice, Tensor]]) -> Tensor:
    """Share of all points that each batch holds, ``(k,)``, float64."""
    sizes = torch.tensor([batch.shape[1] for part, batch in stacks for _ in range(part.stop - part.start)])
    return sizes.double() / sizes.sum()


def _solve_block(
    transport: Any, i: slice, j: slice, x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None,
    cost: Cost, generator: torch.Generator | None,
) -> _Block:  # fmt: skip
    checks.clouds(x[:, None], y[None], "xs", "ys")
    if isinstance(transport, SlicedOT):
        return _Block(i, j, transport.grid(x, y, a, b, generator=generator))
    if not isinstance(transport, Transport):
        return _Block(i, j, _call_pairs(transport, x, y))
    if not isinstance(cost, str):
        matrix = pairwise(x[:, None], y[None], cost)
        return _Block(i, j, transport.value(matrix, *_in_batch(a, b)))
    k, m, k2, m2 = len(x), x.shape[1], len(y), y.shape[1]
    step = max(1, _CHUNK // (k2 * m * m2))
    plans, costs, values = [], [], []
    with torch.no_grad():
        flat_y = y.reshape(-1, y.shape[-1])
        for start in range(0, k, step):
            part = x[start : start + step]
            matrix = pairwise(part.reshape(-1, x.shape[-1]), flat_y, cost)
            matrix = matrix.reshape(len(part), m, k2, m2).transpose(1, 2).contiguous()
            plan = transport.plan(matrix, *_in_batch(None if a is None else a[start : start + step], b))
            value, matched = _valued(plan, matrix)
            values.append(value)
            plans.append(plan)
            costs += matched
    return _Block(i, j, torch.cat(values), plans, costs, x, y, cost)


def _valued(plan: Plan, matrix: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Values of the problems, and the costs of the plans' entries (none of dense plans)."""
    if plan.row is None or plan.col is None:
        return plan.cost(matrix) + plan.penalty, []
    matched = matrix.flatten(-2).gather(-1, plan.row * matrix.shape[-1] + plan.col)
    matched = torch.where(plan.mass > 0, matched, 0)  # padding may sit at a forbidden pair
    return (matched * plan.mass).sum(-1) + plan.penalty, [matched]


def _in_batch(a: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return None if a is None else a[:, None], None if b is None else b[None]


def _solve_aligned(
    transport: Any, part: slice, x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None,
    cost: Cost, generator: torch.Generator | None,
) -> _Block:  # fmt: skip
    checks.clouds(x, y, "xs", "ys")
    j = slice(0, 1)
    if isinstance(transport, SlicedOT):
        return _Block(part, j, transport(x, y, a, b, generator=generator)[:, None])
    if not isinstance(transport, Transport):
        return _Block(part, j, torch.stack([_scalar(transport(p, q)) for p, q in zip(x, y, strict=True)])[:, None])
    if not isinstance(cost, str):
        return _Block(part, j, transport(x, y, a, b, cost)[:, None])
    with torch.no_grad():
        matrix = pairwise(x, y, cost)
        plan = transport.plan(matrix, a, b)
        values, costs = _valued(plan, matrix)
    return _Block(part, j, values[:, None], [plan], costs, x, y, cost)


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


def _entries(plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and mass of a plan's entries, whatever its form."""
    if plan.row is not None and plan.col is not None:
        return plan.row, plan.col, plan.mass
    n, m = plan.size
    index = torch.arange(n * m, device=plan.mass.device).expand(*plan.batch_shape, -1)
    return index // m, index % m, plan.mass.flatten(-2)


def _block_total(block: _Block, weight: Tensor) -> Tensor:
    if block.plans is None:
        return torch.where(weight > 0, weight * block.values, 0).sum()
    assert block.x is not None
    assert block.y is not None
    total, first = block.values.new_zeros(()), 0
    aligned = block.plans[0].mass.ndim == (2 if block.plans[0].is_sparse else 3)
    for index, plan in enumerate(block.plans):
        count = plan.batch_shape[0]
        w = weight[first : first + count].reshape(plan.batch_shape)
        x = block.x[first : first + count]
        y = block.y[first : first + count] if aligned else block.y
        total = total + _plan_total(plan, w, x, y, block, index, aligned) + (w * plan.penalty).sum()
        first += count
    return total


def _plan_total(plan: Plan, weight: Tensor, x: Tensor, y: Tensor, block: _Block, index: int, aligned: bool) -> Tensor:
    """``sum weight <C, P>`` of one chunk of plans."""
    (k, n, d), m = x.shape, y.shape[1]
    flat_x, flat_y = x.reshape(-1, d), y.reshape(-1, d)
    pairs = torch.nonzero(weight)
    i, j = (pairs[:, 0], pairs[:, 0]) if aligned else (pairs[:, 0], pairs[:, 1])
    at = tuple(pairs.T)
    if plan.row is not None and plan.col is not None:
        assert block.costs is not None
        row = i[:, None] * n + plan.row[at]
        col = j[:, None] * m + plan.col[at]
        mass = weight[at][:, None] * plan.mass[at]
        costs = block.costs[index][at]
        return matched_values(
            flat_x, flat_y, row.flatten(), col.flatten(), mass.flatten(), costs.flatten(), 1, str(block.cost)
        )[0]
    scaled = plan.mass * weight[..., None, None]
    if aligned:
        return (scaled * pairwise(x, y, block.cost)).sum()
    full = scaled.transpose(1, 2).reshape(k * n, -1)
    return torch.where(full > 0, full * pairwise(flat_x, flat_y, block.cost), 0).sum()
