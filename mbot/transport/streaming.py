"""Potentials of entropic OT between large uniform batches: one loop, the costs held as a matrix or made in tiles.

``P_ij = exp(phi_i + psi_j - c_ij / eps)`` with row sums 1/n and column sums 1/m. The loop sees the costs only through

    soft_rows(psi)_i = log sum_j exp(psi_j - c_ij / eps)        and the same for columns.

Costs that fit into the memory allowed are held, with the current kernel, and an iteration is two matrix products
(stabilised scaling, Schmitzer 2019). Otherwise every pass makes them again, some rows at a time. Small eps is
approached from above; over-relaxation by the rate seen (Thibault et al. 2021; Lehmann et al. 2022) saves passes.
On a CUDA device with Triton a pass is one fused kernel, and no tile is ever written to memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from mbot.cost import Cost, pairwise
from mbot.kernels.device_streaming import Fused

_RANGE = 20.0  # |log scaling| at which a held kernel is renewed
_START = 0.5  # first eps, as a share of the costs' range
_WARM = 16.0  # first eps from a warm start, in units of the final one
_SCALING = 0.25  # ratio of successive eps
_ROUNDS = 8  # iterations at most at each eps on the way
_CACHED = 1 << 18  # entries of a tile that stays in a processor's cache
_RELAX_BELOW = 0.3  # error below which over-relaxation starts
_RELAX_EVERY = 6  # iterations that a rate is measured over
_RELAX_SLOW = 0.85  # rate above which more of it is tried
_RELAX_MOST = 1.95
_ROUNDING = 1e-3  # largest relative error of a plan's entries, from the rounding of its potentials


class Rows:
    """Where the rows of the costs are: all of them here. `mbot.distributed` spreads them over ranks.

    Columns and potentials are whole everywhere; with all rows here, nothing has to be exchanged.
    """

    first = 0  # index of the first row here

    def here(self, values: Tensor) -> Tensor:
        """The part ``(n_here, …)`` of values of all rows ``(n, …)``."""
        return values

    def gather(self, values: Tensor) -> Tensor:
        """Values of all rows from those of the rows here."""
        return values

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the places that hold rows."""
        return values

    def agreed(self, values: Tensor) -> Tensor:
        """The same random numbers everywhere."""
        return values

    def mean(self, x: Tensor) -> Tensor:
        """Mean row, from the rows here."""
        return x.mean(0)

    def thinned(self, x: Tensor, most: int) -> Tensor:
        """At most ``most`` of all rows, evenly, from the rows here."""
        return x[:: -(-len(x) // most)]

    def spread(self, layout: Layout) -> Layout:
        """The layout of all rows, from that of the rows here."""
        return layout

    def split(self, layout: Layout, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A draw in each column, cut down to the rows here.

        Args:
            layout: what `spread` returned, after a pass over the columns.
            uniform: ``(m,)`` shares of the columns' mass, in the order of the rows.

        Returns:
            ``(m,)`` each: whether the draw falls here, at which share of the mass here, and the column's mass here.
        """
        return torch.ones_like(uniform, dtype=torch.bool), uniform, torch.ones_like(uniform)


class Layout(Protocol):
    """How the loop sees the costs."""

    @property
    def size(self) -> tuple[int, int]:
        """Numbers of rows and columns."""

    def set(self, eps: float) -> None:
        """Work at another regularisation."""

    def soft_rows(self, phi: Tensor, psi: Tensor) -> Tensor:
        """``log sum_j exp(psi_j - c_ij / eps)``, ``(n,)`` float64; ``phi`` is where the rows are now."""

    def soft_cols(self, phi: Tensor, psi: Tensor) -> Tensor:
        """``log sum_i exp(phi_i - c_ij / eps)``, ``(m,)``."""

    def col_tiles(self, cells: int) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the columns with ``-c / eps`` as ``(columns, n)``, at most ``cells`` at a time."""


class Held:
    """A cost matrix in memory, and its kernel at recent potentials."""

    def __init__(self, cost: Tensor) -> None:
        self.cost = cost
        self.eps = 1.0
        self.kernel: Tensor | None = None
        self.phi = self.psi = cost.new_zeros(0, dtype=torch.float64)  # where the kernel was made

    @property
    def size(self) -> tuple[int, int]:
        """Numbers of rows and columns."""
        return self.cost.shape[0], self.cost.shape[1]

    def set(self, eps: float) -> None:
        """See `Layout`."""
        self.eps, self.kernel = eps, None

    def _renewed(self, phi: Tensor, psi: Tensor) -> Tensor:
        near = self.kernel is not None and bool(
            ((phi - self.phi).abs().amax() < _RANGE) & ((psi - self.psi).abs().amax() < _RANGE)
        )
        if near:
            assert self.kernel is not None
            return self.kernel
        self.phi, self.psi = phi.clone(), psi.clone()
        # Rows are centred in float64 before the kernel takes the precision of the costs.
        kernel = self.cost * (-1 / self.eps)
        kernel += psi.to(kernel.dtype)
        self.phi = -kernel.amax(1).double()
        kernel += self.phi.to(kernel.dtype)[:, None]
        self.kernel = kernel.exp_()
        return self.kernel

    def soft_rows(self, phi: Tensor, psi: Tensor) -> Tensor:
        """See `Layout`."""
        kernel = self._renewed(self.phi if self.kernel is not None else phi, psi)
        scaled = (psi - self.psi).exp().to(kernel.dtype)
        soft = (kernel @ scaled).double().log() - self.phi
        return soft if bool(soft.sum().isfinite()) else self._exact(self.cost, psi)

    def soft_cols(self, phi: Tensor, psi: Tensor) -> Tensor:
        """See `Layout`."""
        kernel = self._renewed(self.phi if self.kernel is not None else phi, psi)
        shift = phi - self.phi
        top = shift.amax()
        scaled = (shift - top).exp().to(kernel.dtype)
        soft = (scaled @ kernel).double().log() + top - self.psi
        return soft if bool(soft.sum().isfinite()) else self._exact(self.cost.T, phi)

    def _exact(self, cost: Tensor, potential: Tensor) -> Tensor:
        """A pass without the kernel, for potentials that it underflows at."""
        return torch.logsumexp(potential.to(cost.dtype) - cost / self.eps, 1).double()

    def col_tiles(self, cells: int) -> Iterator[tuple[slice, Tensor]]:
        """See `Layout`."""
        cells = cells if self.cost.is_cuda else min(cells, _CACHED)
        step = max(1, cells // self.size[0])
        for begin in range(0, self.size[1], step):
            cols = slice(begin, begin + step)
            yield cols, self.cost[:, cols].T.div(-self.eps)


@dataclass
class Streamed:
    """Costs made anew in every pass, at most ``cells`` at a time."""

    x: Tensor
    y: Tensor
    cost: Cost
    cells: int
    eps: float = 1.0
    fused: Fused | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.fused = Fused.of(self.x, self.y, self.cost)

    @property
    def size(self) -> tuple[int, int]:
        """Numbers of rows and columns."""
        return len(self.x), len(self.y)

    def set(self, eps: float) -> None:
        """See `Layout`."""
        self.eps = eps

    def col_tiles(self, cells: int) -> Iterator[tuple[slice, Tensor]]:
        """See `Layout`."""
        return self._tiles(self.y, self.x, True, min(cells, self.cells))

    def _tiles(self, x: Tensor, y: Tensor, turned: bool, cells: int) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the rows of ``x`` with ``-c / eps`` against all of ``y``; ``turned``: x is the target side."""
        cells = cells if x.is_cuda else min(cells, _CACHED)
        step = max(1, cells // len(y))
        for begin in range(0, len(x), step):
            rows = slice(begin, begin + step)
            if isinstance(self.cost, str) and self.cost == "dot":
                yield rows, (x[rows] / self.eps) @ y.T
            elif turned and not isinstance(self.cost, str):
                yield rows, pairwise(y, x[rows], self.cost).T.div(-self.eps)
            else:
                yield rows, pairwise(x[rows], y, self.cost).div_(-self.eps)

    def soft_rows(self, phi: Tensor, psi: Tensor) -> Tensor:
        """See `Layout`."""
        return self._soft(self.x, self.y, psi, False)

    def soft_cols(self, phi: Tensor, psi: Tensor) -> Tensor:
        """See `Layout`."""
        return self._soft(self.y, self.x, phi, True)

    def pull(self, phi: Tensor, psi: Tensor, *, turned: bool) -> tuple[Tensor, Tensor, Tensor]:
        """``P y`` ``(n, d)`` and row sums ``(n,)`` of ``P = exp(phi + psi - c / eps)``, and the points x.

        ``turned`` exchanges the sides. Points and pulled ones may both be shifted by the same centre.
        """
        if self.fused is not None:
            return self.fused.pull(phi, psi, self.eps, turned)
        x, y, own, other = (self.y, self.x, psi, phi) if turned else (self.x, self.y, phi, psi)
        pulled, mass = torch.empty_like(x), x.new_empty(len(x))
        for rows, tile in self._tiles(x, y, turned, self.cells):
            plan = tile.add_((own[rows, None]).to(tile.dtype)).add_(other.to(tile.dtype)).exp_()
            pulled[rows], mass[rows] = plan @ y, plan.sum(1)
        return pulled, mass, x

    def _soft(self, x: Tensor, y: Tensor, potential: Tensor, turned: bool) -> Tensor:
        if self.fused is not None:
            return self.fused.soft(potential, self.eps, turned)
        soft = torch.empty(len(x), dtype=torch.float64, device=x.device)
        for rows, tile in self._tiles(x, y, turned, self.cells):
            tile += potential.to(tile.dtype)
            top = tile.amax(1, keepdim=True)
            soft[rows] = tile.sub_(top).exp_().sum(1).double().log() + top[:, 0].double()
        return soft


@dataclass
class Potentials:
    """Where the loop ended: potentials in units of eps (float64), the error of the marginals, iterations."""

    phi: Tensor
    psi: Tensor
    error: float
    iterations: int
    converged: bool


def solve(
    layout: Layout, eps: float, spread: float, *, max_iter: int, tol: float, start: Tensor | None, device: torch.device,
    log_a: Tensor | None = None, log_b: Tensor | None = None,
) -> Potentials:  # fmt: skip
    """Run the loop.

    Args:
        layout: the costs.
        eps: regularisation, in units of the cost.
        spread: range of the costs (about); eps is approached from half of it.
        max_iter: iterations at the final eps; each passes over rows and columns.
        tol: L1 error of the marginals to stop at.
        start: ``(n,)`` source potentials in cost units to start from; None starts from nothing.
        device: of the potentials.
        log_a: ``(n,)`` logs of the row sums, finite; None for ``1/n``.
        log_b: ``(m,)`` logs of the column sums, of the same total.
    """
    n, m = layout.size
    row_mass: Tensor | float = -math.log(n) if log_a is None else log_a
    col_mass: Tensor | float = -math.log(m) if log_b is None else log_b
    phi = torch.zeros(n, dtype=torch.float64, device=device)
    psi = torch.zeros(m, dtype=torch.float64, device=device)
    level, spent = max(eps, _START * spread), 0
    if start is not None:
        level = max(eps, min(_WARM * eps, level))
        layout.set(level)
        phi = start.double() / level
        psi = col_mass - layout.soft_cols(phi, psi)
    while level > eps:
        layout.set(level)
        for _ in range(_ROUNDS):
            spent += 1
            phi, psi, error = _round(layout, phi, psi, 1.0, row_mass, col_mass)
            if error < 0.1:
                break
        lower = max(eps, level * _SCALING)
        phi, psi, level = phi * (level / lower), psi * (level / lower), lower
    layout.set(eps)
    relax, most = 1.0, _RELAX_MOST
    history: list[float] = []
    for iteration in range(1, max_iter + 1):
        phi, psi, error = _round(layout, phi, psi, relax, row_mass, col_mass)
        if error <= tol or not math.isfinite(error):
            break
        if relax == 1.0 and iteration >= 4 and history and error < min(_RELAX_BELOW, history[-1]):
            relax = min(most, 2 / (1 + math.sqrt(1 - min(error / history[-1], 0.9999))))
            history.clear()
        history.append(error)
        if relax == 1.0 or len(history) < _RELAX_EVERY:
            continue
        rate = (history[-1] / history[0]) ** (1 / (len(history) - 1))
        if error > 2 * min(history):
            relax, most = 1.0, (relax + most) / 2 - 0.1  # it does not pay here, or was too much
        elif rate > _RELAX_SLOW:
            relax = min(most, relax + 0.1)
        history.clear()
    if relax != 1.0:  # leave with exact columns, as a plain iteration does
        psi = col_mass - layout.soft_cols(phi, psi)
    # Potentials of many regularisations have no digits left that would tell one plan from another.
    rounding = torch.finfo(phi.dtype).eps * float(torch.maximum(*(p.amax() - p.amin() for p in (phi, psi))))
    error = error if rounding < _ROUNDING else max(error, rounding)
    return Potentials(phi, psi, error, spent + iteration, error <= tol)


def _round(
    layout: Layout, phi: Tensor, psi: Tensor, relax: float, row_mass: Tensor | float, col_mass: Tensor | float
) -> tuple[Tensor, Tensor, float]:
    """Rows, then columns; and the L1 error that the marginals had before their step, as a share of the mass."""
    step = row_mass - layout.soft_rows(phi, psi) - phi
    error = _moved(step, row_mass)
    phi = phi + relax * step
    step = col_mass - layout.soft_cols(phi, psi) - psi
    if relax != 1.0:
        error = torch.maximum(error, _moved(step, col_mass))
    return phi, psi + relax * step, float(error)


def _moved(step: Tensor, log_mass: Tensor | float) -> Tensor:
    """Share of the mass that a step of the potentials moves."""
    moved = (-step).clamp_max(50).expm1().abs()
    return moved.mean() if isinstance(log_mass, float) else (log_mass.softmax(0) * moved).sum()
