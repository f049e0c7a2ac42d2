"""Batches of exact transport problems and their solutions.

A problem is ``min <C, P>`` over ``P >= 0`` with row sums ``a`` and column sums ``b``; a partial one moves a given mass,
with row sums at most ``a`` and column sums at most ``b``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mbot import convergence
from mbot.plan import Plan

TOLERANCE = 1e-9  # of the gap, relative to the cost of the plan


@dataclass(frozen=True)
class Problems:
    """``B`` problems of any sizes, their costs one after another.

    Attributes:
        flat: ``(sum n_p m_p,)`` costs, row by row, float32 or float64; ``+inf`` forbids a pair.
        count: B.
        size: the largest n and m.
        sizes: ``(B,)`` int64 each, ``n_p`` and ``m_p``, where they differ.
        a, b: ``(B, n)`` and ``(B, m)`` float64 weights of equal totals, 0 beyond a problem's size; None where every
            point has weight 1.
        mass: what a partial problem moves; None to move everything.
        capped: whether solvers must take the costs as they are; else they leave out problems with infinite or huge
            costs, which get NaN potentials.
    """

    flat: Tensor
    count: int
    size: tuple[int, int]
    sizes: tuple[np.ndarray, np.ndarray] | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    mass: float | None = None
    capped: bool = False

    @staticmethod
    def dense(cost: Tensor, a: Tensor | None = None, b: Tensor | None = None, mass: float | None = None) -> Problems:
        """Problems of one size, ``(B, n, m)``."""
        count, n, m = cost.shape
        return Problems(cost.reshape(-1), count, (n, m), None, a, b, mass)

    @staticmethod
    def blocks(costs: list[Tensor], a: Tensor | None = None, b: Tensor | None = None) -> Problems:
        """Problems of different sizes, ``(n_p, m_p)`` each; points have weight 1 where no weights are given."""
        rows, cols = (np.array([cost.shape[axis] for cost in costs]) for axis in (0, 1))
        flat = costs[0].reshape(-1) if len(costs) == 1 else torch.cat([cost.reshape(-1) for cost in costs])
        if a is None or b is None:
            a, b = (
                torch.from_numpy((np.arange(sizes.max()) < sizes[:, None]).astype(np.float64)).to(flat.device)
                for sizes in (rows, cols)
            )
        return Problems(flat, len(costs), (int(rows.max()), int(cols.max())), (rows, cols), a, b)

    @cached_property
    def rows(self) -> np.ndarray:
        """``(B,)`` int64, rows of each problem."""
        return np.full(self.count, self.size[0]) if self.sizes is None else self.sizes[0]

    @cached_property
    def cols(self) -> np.ndarray:
        """``(B,)`` int64, columns of each problem."""
        return np.full(self.count, self.size[1]) if self.sizes is None else self.sizes[1]

    @cached_property
    def starts(self) -> np.ndarray:
        """``(B + 1,)`` where each problem's costs begin, and the end."""
        if self.sizes is None:
            return np.arange(self.count + 1) * (self.size[0] * self.size[1])
        return np.concatenate(([0], np.cumsum(self.rows * self.cols)))

    def matrix(self, p: int) -> Tensor:
        """Costs of one problem, ``(n_p, m_p)``."""
        return self.flat[self.starts[p] : self.starts[p + 1]].view(self.rows[p], self.cols[p])

    def parts(self) -> Iterator[Tensor]:
        """The costs as dense batches ``(·, n, m)``: one, or one a problem where sizes differ."""
        if self.sizes is None:
            yield self.flat.view(-1, *self.size)
        else:
            yield from (self.matrix(p)[None] for p in range(self.count))

    def take(self, which: np.ndarray) -> Problems:
        """Some of the problems."""
        sides = ((self.a, self.rows), (self.b, self.cols))
        a, b = (None if weight is None else weight[which, : sizes[which].max()] for weight, sizes in sides)
        if self.sizes is None:
            return Problems.dense(next(self.parts())[which], a, b, self.mass)
        return Problems.blocks([self.matrix(p) for p in which], a, b)

    def least_above(self, bound: Tensor) -> Tensor:
        """The least cost above ``bound`` ``(B,)``, ``+inf`` where there is none."""
        pieces = zip(self.parts(), [bound] if self.sizes is None else bound.split(1), strict=True)
        return torch.cat([torch.where(cost > at[:, None, None], cost, torch.inf).amin((1, 2)) for cost, at in pieces])

    def at(self, row: Tensor | None, col: Tensor) -> Tensor:
        """Costs ``(B, e)`` in float64 of entries with these rows (None: entry i is in row i) and columns."""
        if row is None:
            row = torch.arange(col.shape[1], device=col.device)
        if self.sizes is None:
            n, m = self.size
            return self.flat.view(self.count, n * m).gather(1, row * m + col).double()
        start, stride = (torch.from_numpy(each).to(row.device)[:, None] for each in (self.starts[:-1], self.cols))
        index = (start + row * stride + col).clamp_max(len(self.flat) - 1)  # padding may lie beyond the last problem
        return self.flat[index].double()

    def under(self, cap: Tensor) -> Problems:
        """The problems with costs of at most ``cap`` ``(B,)``, in float64."""
        caps = [cap] if self.sizes is None else cap.split(1)
        pieces = zip(self.parts(), caps, strict=True)
        flat = [cost.double().minimum(most[:, None, None]).reshape(-1) for cost, most in pieces]
        return replace(self, flat=flat[0] if len(flat) == 1 else torch.cat(flat), capped=True)


@dataclass(frozen=True)
class Live:
    """The points of positive weight of ``B`` problems with weights ``a`` ``(B, n)`` and ``b`` ``(B, m)``.

    Attributes:
        a, b: the weights.
        points: ``(B, n)`` and ``(B, m)`` int64, the points of each problem, those with weight first.
        rows, cols: ``(B,)`` how many have weight.
        even: ``(B,)`` whether these weigh the same, on either side.
    """

    a: Tensor
    b: Tensor
    points: tuple[Tensor, Tensor]
    rows: np.ndarray
    cols: np.ndarray
    even: np.ndarray

    @staticmethod
    def of(a: Tensor, b: Tensor) -> Live:
        """Points of positive weight."""
        order, even = [], torch.ones(len(a), dtype=torch.bool)
        for weight in (a, b):
            order.append((weight <= 0).byte().argsort(dim=1, stable=True))
            most, least = weight.amax(1), torch.where(weight > 0, weight, torch.inf).amin(1)
            even = even & (most - least <= 1e-12 * least)
        rows, cols = ((weight > 0).sum(1).numpy() for weight in (a, b))
        return Live(a, b, (order[0], order[1]), rows, cols, even.numpy())

    @property
    def square(self) -> np.ndarray:
        """``(B,)`` whether a matching solves the problem."""
        return self.even & (self.rows == self.cols)

    def solve(self, cost: Tensor, solvers: dict[Callable[[Problems], Solution], np.ndarray]) -> Solution:
        """Solutions of the problems ``cost`` ``(B, n, m)``, each by the solver that its index is given for.

        Points of weight zero take no part, but have potentials: the largest that fit, targets first.
        """
        count, n, m = cost.shape
        row, col = torch.zeros(2, count, n + m, dtype=torch.int64)
        mass, f, g = (torch.zeros(count, size, dtype=torch.float64) for size in (n + m, n, m))
        error = np.zeros(count)
        for solve, which in solvers.items():
            if len(which) == 0:
                continue
            some = torch.from_numpy(which)
            left, right = (
                points[some, : sizes[which].max()]
                for points, sizes in zip(self.points, (self.rows, self.cols), strict=True)
            )
            found = solve(self._problems(cost, which, left, right))
            width = found.col.shape[1]
            row[some, :width], col[some, :width] = left.gather(1, found.rows), right.gather(1, found.col)
            mass[some, :width], error[which] = found.mass, found.error
            f[some], g[some] = f[some].scatter(1, left, found.f), g[some].scatter(1, right, found.g)
        if self.rows.min() < n or self.cols.min() < m:
            f, g = self._extended(cost.double(), f, g)
        used = (mass > 0).any(0).nonzero()  # with holes, where entries of a capped cost were rounding
        width = int(used[-1]) + 1 if len(used) else 0
        return Solution(row[:, :width], col[:, :width], mass[:, :width], f, g, error)

    def _problems(self, cost: Tensor, which: np.ndarray, left: Tensor, right: Tensor) -> Problems:
        """Some of the problems, without the points of weight zero."""
        some = torch.from_numpy(which)
        a, b = self.a[some].gather(1, left), self.b[some].gather(1, right)
        if self.rows[which].min() == cost.shape[1] and self.cols[which].min() == cost.shape[2]:
            return Problems.dense(cost[some], a, b)
        sizes = zip(which, left, self.rows[which], right, self.cols[which], strict=True)
        return Problems.blocks([cost[p].index_select(0, i[:n]).index_select(1, j[:m]) for p, i, n, j, m in sizes], a, b)

    def _extended(self, cost: Tensor, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Potentials of all points from those of the points with weight."""
        cost = cost.minimum(cost.masked_fill(cost == torch.inf, -torch.inf).amax((1, 2), keepdim=True))
        g = torch.where(self.b > 0, g, (cost - f.masked_fill(self.a <= 0, -torch.inf)[:, :, None]).amin(1))
        return torch.where(self.a > 0, f, (cost - g[:, None, :]).amin(2)), g


@dataclass(frozen=True)
class Solution:
    """Plans of ``B`` problems as entries, with potentials.

    Attributes:
        row, col: ``(B, e)`` int64; row is None where entry i is in row i.
        mass: ``(B, e)`` float64; entries of mass 0 are padding.
        f, g: ``(B, n)`` and ``(B, m)`` float64 with ``f_i + g_j <= C_ij``. The dual value of a partial problem is
            ``<a, f> + <b, g> - (sum a - mass) max f - (sum b - mass) max g``.
        error: ``(B,)`` float64 on the host, the gap relative to the cost of the plan; filled in by `certified`.
    """

    row: Tensor | None
    col: Tensor
    mass: Tensor
    f: Tensor
    g: Tensor
    error: np.ndarray | None = None

    @property
    def rows(self) -> Tensor:
        """The rows of the entries."""
        return (
            torch.arange(self.col.shape[1], device=self.col.device).expand_as(self.col)
            if self.row is None
            else self.row
        )

    def take(self, which: np.ndarray | slice, size: tuple[int, int] | None = None) -> Solution:
        """Copies of some solutions, with potentials of the first points (None: of all)."""
        row = None if self.row is None else self.row[which].clone()
        n, m = (self.f.shape[1], self.g.shape[1]) if size is None else size
        f, g = self.f[which, :n].clone(), self.g[which, :m].clone()
        return Solution(row, self.col[which].clone(), self.mass[which].clone(), f, g)

    def put(self, to: np.ndarray, other: Solution) -> None:
        """Replace some solutions, in place, by others of at most their sizes."""
        for name in ("row", "col", "mass", "f", "g"):
            old, new = getattr(self, name), getattr(other, name)
            if old is not None:
                old[to] = torch.nn.functional.pad(new, (0, old.shape[1] - new.shape[1]))

    def plan(self, name: str, cost: Tensor, unit: float = 1.0) -> Plan:
        """The plans in the dtype, on the device and in the batch shape of ``cost`` ``(…, n, m)``.

        Masses are multiplied by ``unit``. A warning in the name of ``name`` says if plans are not certified.
        """
        batch, size = cost.shape[:-2], (cost.shape[-2], cost.shape[-1])

        most = torch.finfo(cost.dtype).max  # potentials may be larger than any cost

        def shaped(tensor: Tensor, dtype: torch.dtype) -> Tensor:
            tensor = tensor.to(cost.device, dtype)
            return tensor if len(batch) == 1 else tensor.reshape(*batch, tensor.shape[1])

        def potential(tensor: Tensor) -> Tensor:
            return shaped(tensor.clamp(-most, most) if cost.dtype != tensor.dtype else tensor, cost.dtype)

        tell(name, self.error)
        assert self.error is not None
        error = torch.from_numpy(self.error).to(cost.device).reshape(batch)
        return Plan(
            shaped(self.mass * unit, cost.dtype),
            size,
            shaped(self.rows, torch.int64),
            shaped(self.col, torch.int64),
            converged=error <= TOLERANCE,
            error=error,
            potentials=(potential(self.f), potential(self.g)),
        )


def tell(name: str, error: np.ndarray | None) -> None:
    """Warn in the name of a solver if plans of these errors are not certified."""
    assert error is not None
    worst = float(error.max())
    failed = int((error > TOLERANCE).sum()) if worst > TOLERANCE else 0
    convergence.count_unconverged(name, failed, error.size, worst, "Rescale the cost or pass it in float64.")
