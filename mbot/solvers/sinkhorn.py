"""Sinkhorn's iterations: one driver for balanced, KL-unbalanced and partial problems, and for costs of any geometry.

All of them minimise ``<C, P> + reg * (entropy of P) + (terms in the marginals)``, so that

    P_ij = exp(phi_i + psi_j - C_ij / reg),

and alternate exact minimisations over ``phi`` and ``psi``: a round. The two arguments that differ are the geometry
(`mbot.geometry`: log-sum-exp over the costs) and the marginal step (`mbot.solvers.marginals`).

The schedule: a small ``reg`` is approached from above, a few rounds at each level, then rounds at ``reg`` until one
would move less than a share ``tol`` of the mass; a problem leaves the batch when it has converged. Where rounds
converge slowly, single balanced problems over-relax them by the rate seen (Thibault et al. 2021; Lehmann et al. 2022),
and matrices of moderate size take Newton steps for the same fixed point (Brauer et al. 2017).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mbot.geometry import Dense, Geometry
from mbot.solvers.marginals import Balanced, KLRelaxed, Marginal

_START = 0.5  # first regularisation, as a share of the costs' range
_WARM = 16.0  # first regularisation from given potentials, in units of the final one
_SCALING = 0.25  # ratio of successive regularisations
_ROUNDS = 8  # rounds at most at each of them
_ROUGHLY = 0.1  # share of the mass that may still move at each of them
_AHEAD = 10  # rounds between looks at the error of small problems, and on a device, where every look waits
_SMALL = {"cuda": 1 << 24, "cpu": 1 << 14}  # cells of a problem below which they are looked at so rarely
_ROUNDING = 1e-3  # largest relative error of a plan's entries, from the rounding of its potentials
_DIGITS = 1e9  # range of costs, in units of a raised reg, at which potentials have enough digits
_NEWTON_SIZE = 2048  # rows up to which a dense Newton system is solved
_REACH = 12.0  # largest change of a potential in a Newton step
_TRIALS = 8  # lengths of a Newton step
_RELAX_SIZE = 1 << 16  # cells of problems that over-relax; smaller ones take Newton steps alone
_RELAX_BELOW = 0.3  # error below which over-relaxation starts
_RELAX_EVERY = 6  # rounds that a rate is measured over
_RELAX_SLOW = 0.85  # rate above which more of it is tried
_RELAX_MOST = 1.95


@dataclass
class Solution:
    """Potentials ``(B, n)``, ``(B, m)`` in units of reg, float64, and how the rounds ended, ``(B,)`` each.

    ``error`` is the share of the mass that another round would move, ``inf`` where potentials are too large to give a
    plan in float64; ``plan`` ``(B, n, m)`` is there if wanted.
    """

    phi: Tensor
    psi: Tensor
    error: Tensor
    iterations: Tensor
    converged: Tensor
    plan: Tensor | None = None

    def put(self, which: Tensor, other: Solution) -> None:
        """Write the solution of some problems; iterations add up."""
        for name in ("phi", "psi", "error", "converged"):
            getattr(self, name)[which] = getattr(other, name)
        self.iterations[which] += other.iterations


class Rounds:
    """The problems that are still running, with their potentials."""

    def __init__(self, geometry: Any, log_a: Tensor, log_b: Tensor, rows: Marginal, cols: Marginal) -> None:
        self.geometry, self.log_a, self.log_b, self.rows, self.cols = geometry, log_a, log_b, rows, cols
        self.phi, self.psi = (torch.where(w > -torch.inf, w, 0) for w in (log_a, log_b))
        self.all_live = isinstance(geometry, Dense) and geometry.reached is None
        self.lost = torch.zeros_like(log_a[:, 0], dtype=torch.bool)

    def take(self, which: Tensor) -> Rounds:
        """Some of the problems."""
        some = Rounds(self.geometry.take(which), self.log_a[which], self.log_b[which], self.rows, self.cols)
        some.phi, some.psi, some.lost = self.phi[which], self.psi[which], self.lost[which]
        return some

    def _updated(self, step: Marginal, sums: Tensor, log_weight: Tensor, potential: Tensor) -> Tensor:
        """The potential after a step. Points without part or without a pair get the largest of the others."""
        new = step(sums, log_weight)
        if self.all_live:
            return new
        live = new.isfinite()
        most = new.masked_fill(~live, -torch.inf).amax(1, keepdim=True)
        return torch.where(live, new, torch.where(most > -torch.inf, most, potential))

    def round(self, relax: float = 1.0) -> Tensor:
        """Rows, then columns; returns the share of the mass that the round moved, ``(B,)``."""
        shift = self.rows.shift(self.phi, self.log_a, self.psi, self.log_b)
        if shift is not None:
            self.phi, self.psi = self.phi + shift, self.psi - shift
        self.geometry.prepare(self.psi)
        sums = self.geometry.row_sums(self.psi)
        new = self._updated(self.rows, sums, self.log_a, self.phi)
        error = _moved(sums + self.phi, new - self.phi)
        if relax == 1.0:
            self.phi = new
            self.end_cols()
            return error
        self.phi = torch.lerp(self.phi, new, relax)
        sums = self.geometry.col_sums(self.phi)
        new = self._updated(self.cols, sums, self.log_b, self.psi)
        error = torch.maximum(error, _moved(sums + self.psi, new - self.psi))
        self.psi = torch.lerp(self.psi, new, relax)
        return error

    def more(self, count: int) -> None:
        """Further rounds, without a look at how far they go."""
        for _ in range(count):
            self.phi = self._updated(self.rows, self.geometry.row_sums(self.psi), self.log_a, self.phi)
            self.psi = self._updated(self.cols, self.geometry.col_sums(self.phi), self.log_b, self.psi)

    def residual(self) -> tuple[Tensor, Tensor, Tensor]:
        """Change of ``phi`` in another round, the share of the mass that it would move, and the mass, ``(B,)``."""
        sums = self.geometry.row_sums(self.psi)
        change = self._updated(self.rows, sums, self.log_a, self.phi) - self.phi
        return change, _moved(sums + self.phi, change), (sums + self.phi).exp().sum(1)

    def end_cols(self) -> None:
        """Columns once more without over-relaxation: a round leaves them exact."""
        self.psi = self._updated(self.cols, self.geometry.col_sums(self.phi), self.log_b, self.psi)

    def look_for_digits(self) -> None:
        """Mark problems as lost if their potentials are too large for a plan in float64: further rounds cannot help."""
        self.lost |= ~(rounding(self, torch.float64) <= _ROUNDING)

    def from_above(self, reg: float, spread: float, warm: bool) -> int:
        """Potentials for ``reg`` by way of larger ones; returns the rounds spent."""
        level, rows, cols = max(reg, _START * spread), self.rows, self.cols
        if warm:
            level = min(_WARM * reg, level)
            self.geometry.at(level)
            self.phi = self.phi * (reg / level)
            self.geometry.prepare(self.psi)
            self.end_cols()
        spent = 0
        while level > reg and not bool(self.lost.all()):
            self.geometry.at(level)
            self.rows, self.cols = rows.at(level / reg), cols.at(level / reg)
            for _ in range(_ROUNDS):
                spent += 1
                if float(self.round().amax()) < _ROUGHLY:
                    break
            if not isinstance(rows, KLRelaxed):  # potentials are free up to a constant, and large ones lose digits
                apart = (self.phi.amax(1, keepdim=True) - self.psi.amax(1, keepdim=True)) / 2
                self.phi, self.psi = self.phi - apart, self.psi + apart
            lower = max(reg, level * _SCALING)
            self.phi, self.psi = self.phi * (level / lower), self.psi * (level / lower)  # constant in cost units
            level = lower
            self.look_for_digits()
        self.geometry.at(reg)
        self.rows, self.cols = rows, cols
        return spent


def _moved(log_mass: Tensor, change: Tensor) -> Tensor:
    """Share of the mass that a change of potentials moves, ``(B,)``; none where there is no mass."""
    return (log_mass.softmax(1) * change.clamp_max(50).expm1().abs()).sum(1).nan_to_num(0, torch.inf)


def solve(
    geometry: Geometry, log_a: Tensor, log_b: Tensor, rows: Marginal, cols: Marginal, *, reg: float, spread: float,
    max_iter: int, tol: float, start: Tensor | None = None, plans: bool = False,
) -> Solution:  # fmt: skip
    """Run the schedule.

    Args:
        geometry: the costs.
        log_a: ``(B, n)`` logs of the rows' weights, float64; ``-inf``: takes no part.
        log_b: ``(B, m)`` logs of the columns' weights.
        rows: what the problem asks of its rows.
        cols: what it asks of its columns.
        reg: regularisation, in units of the cost.
        spread: range of the costs (about).
        max_iter: rounds at ``reg``.
        tol: share of the mass that a round may still move at the end.
        start: ``(B, n)`` potentials ``phi`` to start from; None starts from the weights.
        plans: whether plans are wanted, for which the geometry must be `Dense`.
    """
    running = Rounds(geometry, log_a, log_b, rows, cols)
    if start is not None:
        running.phi = start.double()
    begun = running.from_above(reg, spread, start is not None)
    problems, n, m = geometry.shape
    device = log_a.device
    out = Solution(
        torch.zeros_like(log_a),
        torch.zeros_like(log_b),
        torch.full((problems,), torch.inf, dtype=torch.float64, device=device),
        torch.zeros(problems, dtype=torch.int64, device=device),
        torch.zeros(problems, dtype=torch.bool, device=device),
        torch.zeros_like(geometry.cost) if plans and isinstance(geometry, Dense) else None,
    )
    active = torch.arange(problems, device=device)
    newton = _NewtonSteps(tol) if isinstance(geometry, Dense) and n <= _NEWTON_SIZE else None
    large = problems == 1 and n * m >= _RELAX_SIZE
    relaxation = _Relaxation() if large and rows.relaxes and cols.relaxes else None
    ahead = _AHEAD if n * m < _SMALL["cuda" if log_a.is_cuda else "cpu"] else 1
    spent = 0
    while True:
        relax = relaxation.factor if relaxation else 1.0
        error = running.round(relax)
        spent += 1
        finished = ~(error > tol) | running.lost if spent < max_iter else torch.ones_like(active, dtype=torch.bool)
        if bool(finished.any()):
            if relax != 1.0:
                running.end_cols()
            which, ended = active[finished], running if bool(finished.all()) else running.take(finished)
            ended.look_for_digits()
            error_then = error[finished].masked_fill(ended.lost, torch.inf)
            spent_then = torch.full_like(which, begun + spent)
            out.put(which, Solution(ended.phi, ended.psi, error_then, spent_then, error_then <= tol))
            if out.plan is not None:
                out.plan[which] = ended.geometry.plan(ended.phi, ended.psi)
            keep = ~finished
            if not bool(keep.any()):
                return out
            running, active, error = running.take(keep), active[keep], error[keep]
            if newton:
                newton.take(keep)
        running.more(more := max(0, min(ahead, max_iter - spent) - 1))
        spent += more
        if relaxation:
            relaxation.look(float(error), spent)
        if newton and newton.look(running, error, spent) and relaxation:
            relaxation = _Relaxation()


class _Relaxation:
    """Factor of over-relaxed rounds for one problem, by the rate that its error falls at."""

    def __init__(self) -> None:
        self.factor, self.most = 1.0, _RELAX_MOST
        self.errors: list[float] = []

    def look(self, error: float, spent: int) -> None:
        """Note the error of the last round, and change the factor for the next one."""
        if self.factor == 1.0 and spent >= 4 and self.errors and error < min(_RELAX_BELOW, self.errors[-1]):
            self.factor = min(self.most, 2 / (1 + math.sqrt(1 - min(error / self.errors[-1], 0.9999))))
            self.errors.clear()
        self.errors.append(error)
        if self.factor == 1.0 or len(self.errors) < _RELAX_EVERY:
            return
        rate = (self.errors[-1] / self.errors[0]) ** (1 / (len(self.errors) - 1))
        if error > 2 * min(self.errors):
            self.factor, self.most = 1.0, (self.factor + self.most) / 2 - 0.1  # it does not pay, or was too much
        elif rate > _RELAX_SLOW:
            self.factor = min(self.most, self.factor + 0.1)
        self.errors.clear()


class _NewtonSteps:
    """Newton steps for the fixed point of a round, where further rounds would cost more."""

    def __init__(self, tol: float) -> None:
        self.tol, self.previous, self.since = tol, torch.full((), torch.inf, dtype=torch.float64), 0

    def take(self, which: Tensor) -> None:
        """Go on with some of the problems."""
        if self.previous.ndim:
            self.previous = self.previous[which]

    def look(self, running: Rounds, error: Tensor, spent: int) -> bool:
        """Every ten rounds: take a step where the rate just seen would need more rounds than its price."""
        if spent < self.since + 10:
            return False
        rounds, self.since = spent - self.since, spent
        rate = (error / self.previous.to(error.device)).clamp(1e-6, 1 - 1e-6)
        price = 20 + running.phi.shape[1] / 10
        slow = (rounds * (self.tol / error).log() / rate.log() > price) & (error < 0.5)
        self.previous = torch.where(slow, torch.inf, error)
        if spent <= 10 or not bool(slow.any()):
            return False
        some = running.take(slow)
        newton_step(some)
        running.phi[slow], running.psi[slow] = some.phi, some.psi
        return True


def newton_step(running: Rounds) -> None:
    """One step, as far as the dual objective grows or the error shrinks; else none. Safeguarded by both."""
    change, error, mass = running.residual()
    direction = _direction(running, change)
    objective = _dual(running, mass)
    length = (_REACH / direction.abs().amax(-1)).clamp_max(1)[:, None].nan_to_num(0)
    todo = torch.ones_like(error, dtype=torch.bool)
    for _ in range(_TRIALS):
        trial = running.take(todo)
        trial.phi = trial.phi + (length * direction)[todo]
        trial.end_cols()
        _, moved, mass = trial.residual()
        better = (moved < 0.8 * error[todo]) | (_dual(trial, mass) > objective[todo])
        which = todo.nonzero()[:, 0][better]
        running.phi[which], running.psi[which] = trial.phi[better], trial.psi[better]
        todo[which] = False
        if not bool(todo.any()):
            return
        length = 0.25 * length


def _dual(running: Rounds, mass: Tensor) -> Tensor:
    """The dual objective in units of reg, ``(B,)``; every step of a round raises it."""
    return running.rows.dual(running.phi, running.log_a) + running.cols.dual(running.psi, running.log_b) - mass


def _direction(running: Rounds, change: Tensor) -> Tensor:
    """Newton direction for the fixed point of ``phi``, in float64."""
    plan = running.geometry.plan(running.phi, running.psi).double()
    rows, cols = plan.sum(2), plan.sum(1)
    to_col = plan.mT / torch.where(cols > 0, cols, 1)[:, :, None]  # -d psi / d phi before the column step
    to_row = plan / torch.where(rows > 0, rows, 1)[:, :, None]
    inner = _slope(running.cols, cols.log() - running.psi, running.log_b, to_col)
    jacobian = _slope(running.rows, rows.log() - running.phi, running.log_a, to_row @ inner)
    # A little more than the identity: a plan in blocks makes the system singular, and the direction that shifts the
    # blocks against each other must keep its sign.
    system = (1 + 1e-10) * torch.eye(plan.shape[1], dtype=plan.dtype, device=plan.device) - jacobian
    if not isinstance(running.rows, KLRelaxed):  # potentials are free up to a constant
        system = system + 1 / plan.shape[1]
    return torch.linalg.solve_ex(system, change[:, :, None])[0][:, :, 0]


def _slope(step: Marginal, sums: Tensor, log_weight: Tensor, matrix: Tensor) -> Tensor:
    """The step's derivative applied to the rows of ``matrix``, without its sign."""
    diagonal, left, right = step.slope(sums, log_weight)
    return diagonal[:, :, None] * matrix + left[:, :, None] * (right[:, None, :] @ matrix)


def rounding(found: Solution | Rounds, dtype: torch.dtype) -> Tensor:
    """Relative error of a plan's entries from the rounding of its potentials, where it matters; else 0. ``(B,)``."""
    extents = [p.amax(1) - p.amin(1) for p in (found.phi, found.psi)]
    error = torch.finfo(dtype).eps * torch.maximum(*extents)
    return torch.where(error < _ROUNDING, 0, error.nan_to_num(torch.inf))


def raised(spread: Tensor, reg: float) -> Tensor:
    """Factors on ``reg``, powers of 4, that leave potentials of costs in ranges ``spread`` ``(B,)`` enough digits."""
    return torch.exp2(2 * (spread.log2() - math.log2(_DIGITS * reg)).div(2).ceil())


def drowned(spread: Tensor, reg: float) -> Tensor:
    """Error of a plan whose ``reg`` had to be `raised`, ``(B,)``: the rounding of potentials as large as the costs."""
    return (torch.finfo(torch.float64).eps * spread / reg).clamp(_ROUNDING, 1)


def solve_one(
    geometry: Geometry, log_a: Tensor, log_b: Tensor, *, reg: float, spread: float, max_iter: int, tol: float,
    start: Tensor | None = None,
) -> tuple[Solution, float]:  # fmt: skip
    """Run the schedule for one balanced problem; see `solve`.

    Returns:
        The solution, and the regularisation that it is in units of: ``reg``, or a larger one where potentials of costs
        so large would have no digits. Its error says so then.
    """
    found = solve(
        geometry, log_a, log_b, Balanced(), Balanced(), reg=reg, spread=spread, max_iter=max_iter, tol=tol, start=start
    )
    if bool(found.error < torch.inf):
        found.error = torch.maximum(found.error, rounding(found, torch.float64))
        return found, reg
    wide = torch.full_like(found.error, spread)
    larger, error = float(raised(wide, reg)) * reg, drowned(wide, reg)
    found = solve(geometry, log_a, log_b, Balanced(), Balanced(), reg=larger, spread=spread, max_iter=max_iter, tol=tol)
    found.error, found.converged[:] = torch.maximum(found.error, error), False
    return found, larger
