"""Sources of costs, for solvers that look at all pairs: a matrix, points, or rows of either on several ranks.

A solver sees the costs ``C`` of a batch of problems only through sums over the exponentials of scaled potentials:

    log sum_j exp(psi_j - C_ij / reg)  of each row,        log sum_i exp(phi_i - C_ij / reg)  of each column.

`Dense` keeps the matrix and a scaled kernel (stabilised scaling, Schmitzer 2019), so that a sum is a matrix product.
`Points` makes the costs of one pair of clouds again in each pass, a tile at a time, in O(n d) memory; on a CUDA device
with Triton a pass is one fused kernel, and no tile is written to memory. `Sharded` adds up the ranks' parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from mbot.cost import Cost, pairwise
from mbot.kernels.device_streaming import Fused

_RANGE = {torch.float32: 20.0, torch.float64: 200.0}  # changes of potentials at which a kernel is renewed
_CACHED = 1 << 18  # entries of a tile that stays in a processor's cache


class Geometry(Protocol):
    """Costs of ``B`` problems, as solvers see them. Potentials are ``(B, n)`` and ``(B, m)`` float64, without unit."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(B, n, m)``."""

    def at(self, reg: float) -> None:
        """Work at another regularisation."""

    def prepare(self, psi: Tensor) -> None:
        """Make what the next sums over the columns need."""

    def row_sums(self, psi: Tensor) -> Tensor:
        """``log sum_j exp(psi_j - C_ij / reg)``, ``(B, n)`` float64."""

    def col_sums(self, phi: Tensor) -> Tensor:
        """``log sum_i exp(phi_i - C_ij / reg)``, ``(B, m)`` float64."""

    def col_tiles(self, cells: int) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the columns of one problem with ``-C / reg`` as ``(columns, n)``, at most ``cells`` at a time."""


class Dense:
    """Cost matrices ``(B, n, m)`` in memory; ``+inf`` forbids a pair.

    The kernel is ``exp(row + col - C / reg)`` with the largest entry of each row 1, at potentials ``col`` near the
    recent ones; sums that underflow with it are taken in the log domain.
    """

    def __init__(self, cost: Tensor, forbidden: bool = False) -> None:
        self.cost, self.reg = cost, 1.0
        self.kernel: Tensor | None = None
        self.row = self.col = cost.new_zeros(0, dtype=torch.float64)
        allowed = cost < torch.inf if forbidden else None
        self.reached = None if allowed is None else (allowed.any(2), allowed.any(1))

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(B, n, m)``."""
        problems, n, m = self.cost.shape
        return problems, n, m

    def take(self, which: Tensor) -> Dense:
        """Some of the problems."""
        some = Dense(self.cost[which])
        some.reg, some.reached = self.reg, self.reached and (self.reached[0][which], self.reached[1][which])
        if self.kernel is not None:
            some.kernel, some.row, some.col = self.kernel[which], self.row[which], self.col[which]
        return some

    def at(self, reg: float) -> None:
        """See `Geometry`."""
        self.reg, self.kernel = reg, None

    def prepare(self, psi: Tensor) -> None:
        """See `Geometry`: kernels of problems whose potentials have moved far are made again."""
        if self.kernel is not None:
            moved, most = (psi - self.col).abs(), _RANGE[self.cost.dtype]
            if float(moved.amax()) < most:
                return
            stale = ~(moved.amax(1) < most)
            if not bool(stale.all()):
                self.kernel[stale], self.row[stale], self.col[stale] = self._kernel(self.cost[stale], psi[stale])
                return
        self.kernel, self.row, self.col = self._kernel(self.cost, psi)

    def _kernel(self, cost: Tensor, psi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        most = psi.amax(1, keepdim=True)
        cost = cost if self.reg >= torch.finfo(cost.dtype).tiny else cost.double()  # 1 / reg has to be a number
        col = (psi - most).to(cost.dtype)
        kernel = torch.sub(col[:, None, :], cost, alpha=1 / self.reg)
        row = -kernel.amax(2)
        if self.reached:
            row = torch.where(row < torch.inf, row, row.amin(1, keepdim=True).nan_to_num(posinf=0))
        kernel += row[:, :, None]
        return _exp(kernel), row.double() - most, col.double() + most

    def row_sums(self, psi: Tensor) -> Tensor:
        """See `Geometry`."""
        assert self.kernel is not None
        scaled = (psi - self.col).exp().to(self.kernel.dtype)
        sums = (scaled[:, None, :] @ self.kernel.mT)[:, 0].double().log() - self.row
        return self._mended(sums, self.cost, psi, 0)

    def col_sums(self, phi: Tensor) -> Tensor:
        """See `Geometry`."""
        assert self.kernel is not None
        shift = self._shift(phi)
        top = shift.amax(1, keepdim=True)
        scaled = _exp((shift - top).to(self.kernel.dtype))
        sums = (scaled[:, None, :] @ self.kernel)[:, 0].double().log() + top - self.col
        return self._mended(sums, self.cost.mT, phi, 1)

    def _shift(self, phi: Tensor) -> Tensor:
        """``phi`` relative to the kernel's; rows without a pair have none, wherever their potential is."""
        shift = phi - self.row
        return shift if self.reached is None else torch.where(self.reached[0], shift, -torch.inf)

    def _mended(self, sums: Tensor, cost: Tensor, potential: Tensor, axis: int) -> Tensor:
        """The sums; where the kernel underflows, computed in the log domain."""
        known = sums if self.reached is None else torch.where(self.reached[axis], sums, 0)
        if math.isfinite(float(known.sum())):
            return sums
        problem, point = (~known.isfinite()).nonzero(as_tuple=True)
        sums[problem, point] = torch.logsumexp(potential[problem] - cost[problem, point].double() / self.reg, 1)
        return sums

    def plan(self, phi: Tensor, psi: Tensor) -> Tensor:
        """``exp(phi + psi - C / reg)``, ``(B, n, m)``, in the costs' dtype: what the recent sums are sums of."""
        assert self.kernel is not None
        plan = self.kernel * self._shift(phi).exp().to(self.kernel.dtype)[:, :, None]
        return plan.mul_((psi - self.col).exp().to(plan.dtype)[:, None, :]).to(self.cost.dtype)

    def col_tiles(self, cells: int) -> Iterator[tuple[slice, Tensor]]:
        """See `Geometry`."""
        cost = self.cost[0]
        step = max(1, (cells if cost.is_cuda else min(cells, _CACHED)) // len(cost))
        for begin in range(0, cost.shape[1], step):
            cols = slice(begin, begin + step)
            yield cols, cost[:, cols].T.div(-self.reg)


def _exp(exponents: Tensor) -> Tensor:
    """Exponentials, in place; those that would be denormal numbers, which are slow, are 0."""
    return torch.threshold_(exponents, math.log(torch.finfo(exponents.dtype).tiny), -torch.inf).exp_()


@dataclass
class Points:
    """Costs of one pair of clouds ``(n, d)`` and ``(m, d)``, made again in each pass, at most ``cells`` at a time.

    Costs above ``limit`` count as forbidden pairs.
    """

    x: Tensor
    y: Tensor
    cost: Cost
    cells: int
    reg: float = 1.0
    limit: float = torch.inf
    fused: Fused | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.fused = Fused.of(self.x, self.y, self.cost)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(1, n, m)``."""
        return 1, len(self.x), len(self.y)

    def at(self, reg: float) -> None:
        """See `Geometry`."""
        self.reg = reg

    def prepare(self, psi: Tensor) -> None:
        """See `Geometry`: nothing."""

    def col_tiles(self, cells: int) -> Iterator[tuple[slice, Tensor]]:
        """See `Geometry`."""
        return self._tiles(True, min(cells, self.cells))

    def _tiles(self, of_cols: bool, cells: int) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the rows (or columns) with ``-C / reg`` against the whole other side."""
        x, y = (self.y, self.x) if of_cols else (self.x, self.y)
        step = max(1, (cells if x.is_cuda else min(cells, _CACHED)) // len(y))
        for begin in range(0, len(x), step):
            part = slice(begin, begin + step)
            if isinstance(self.cost, str) and self.cost == "dot":
                yield part, (x[part] / self.reg) @ y.T
            elif isinstance(self.cost, str):
                yield part, pairwise(x[part], y, self.cost).div_(-self.reg)
            else:
                costs = pairwise(y, x[part], self.cost).T if of_cols else pairwise(x[part], y, self.cost)
                yield part, torch.where(costs > self.limit, -torch.inf, costs / -self.reg)

    def row_sums(self, psi: Tensor) -> Tensor:
        """See `Geometry`."""
        return self._sums(psi[0], False)[None]

    def col_sums(self, phi: Tensor) -> Tensor:
        """See `Geometry`."""
        return self._sums(phi[0], True)[None]

    def _sums(self, potential: Tensor, of_cols: bool) -> Tensor:
        if self.fused is not None:
            return self.fused.log_sums(potential, self.reg, of_cols)
        sums = torch.empty(len(self.y if of_cols else self.x), dtype=torch.float64, device=self.x.device)
        for part, tile in self._tiles(of_cols, self.cells):
            tile += potential.to(tile.dtype)
            top = tile.amax(1, keepdim=True).clamp_min(torch.finfo(tile.dtype).min)
            sums[part] = tile.sub_(top).exp_().sum(1).double().log() + top[:, 0].double()
        return sums

    def transported(self, phi: Tensor, psi: Tensor, of_cols: bool) -> tuple[Tensor, Tensor, Tensor]:
        """``P y`` ``(n, d)`` and row sums ``(n,)`` of ``P = exp(phi + psi - C / reg)``, and the points x.

        ``of_cols`` exchanges the sides. All points may be shifted by one centre.
        """
        if self.fused is not None:
            return self.fused.transported(phi, psi, self.reg, of_cols)
        x, y, own, other = (self.y, self.x, psi, phi) if of_cols else (self.x, self.y, phi, psi)
        moved, mass = torch.empty_like(x), x.new_empty(len(x))
        for part, tile in self._tiles(of_cols, self.cells):
            plan = tile.add_((own[part, None]).to(tile.dtype)).add_(other.to(tile.dtype)).exp_()
            moved[part], mass[part] = plan @ y, plan.sum(1)
        return moved, mass, x


class Shard:
    """The part of the rows of one problem that this process holds: all of them. `mbot.distributed` has ranks' parts.

    Columns and potentials are whole in every process.
    """

    first = 0  # index of the first row held

    def own(self, values: Tensor) -> Tensor:
        """The part of values ``(…, n)`` of all rows that belongs to the rows held."""
        return values

    def gather(self, values: Tensor) -> Tensor:
        """Values ``(n,)`` of all rows from those of the rows held."""
        return values

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes."""
        return values

    def broadcast(self, values: Tensor) -> Tensor:
        """The same random numbers in every process."""
        return values

    def mean(self, x: Tensor) -> Tensor:
        """Mean of all rows, from the rows held."""
        return x.mean(0)

    def thinned(self, x: Tensor, most: int) -> Tensor:
        """At most ``most`` of all rows, evenly, from the rows held."""
        return x[:: -(-len(x) // most)]

    def geometry(self, inner: Any) -> Any:
        """The costs of all rows, from those of the rows held."""
        return inner

    def split(self, geometry: Any, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A draw in each column, cut down to the rows held.

        Args:
            geometry: what `geometry` returned, after a pass over the columns.
            uniform: ``(m,)`` shares of the columns' mass, in the order of the rows.

        Returns:
            ``(m,)`` each: whether the draw is among the rows held, at which share of their mass, and their share of
            the column's mass.
        """
        return torch.ones_like(uniform, dtype=torch.bool), uniform, torch.ones_like(uniform)
