"""Entropic problems with matrices of costs: forbidden pairs, the compiled iterations, and the check of every plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from mbot import checks
from mbot.geometry import Dense
from mbot.solvers import fast_paths
from mbot.solvers.marginals import KLRelaxed, Marginal
from mbot.solvers.sinkhorn import Solution, drowned, raised, rounding, solve
from mbot.solvers.support import large_entries, usable_pairs

_WIDE = 2e3  # costs spread over more regularisations than this need float64, and a look at the largest
_CACHED = 1 << 18  # cells of a problem that a core's cache holds in float64, for the compiled kernel
_MOST = 1 << 21  # cells of a problem from which on the driver is the faster way
_REFINE = 50  # rounds on plans whose potentials have too few digits
_BUDGET = 400  # rounds (and two a row of costs) in the compiled kernel, and before forbidden pairs are examined
_COMPILED = ("cpu", torch.float32), ("cpu", torch.float64)  # costs that the compiled kernel takes
_CHEAP = 1 << 18  # cells that the kernel goes through in less time than the driver needs to begin: more of its rounds


@dataclass(kw_only=True)
class Plans(Solution):
    """Solutions with their plans ``(B, n, m)`` in the costs' dtype, and the plans' marginals in float64.

    ``error`` and ``converged`` are measured on the plan: its marginals against what the problem asks for.
    """

    plan: Tensor = field()  # the base has none in places
    rows: Tensor
    cols: Tensor
    transport: Tensor  # ``<C, P>``

    def report(self, step: Marginal, a: Tensor, b: Tensor, reg: float) -> tuple[Tensor, Tensor, Tensor]:
        """Potentials in units of the cost, ``(B, n)`` and ``(B, m)``, and what the objective adds to ``<C, P>``.

        Potentials are those of ``P = a b exp((f + g - C) / reg)``, 0 at points of weight 0; of `UpperBounded` problems
        those of ``P = exp((f + g - C) / reg)``. All in the dtype of the plans.
        """
        if self.plan.device.type == "cpu" and fast_paths.get():
            from mbot.kernels.objective import report

            vectors = (self.plan, self.phi, self.psi, a, b, self.rows, self.cols, self.transport)
            parts = report(*(part.contiguous().numpy() for part in vectors), *step.compiled(), reg)
            return torch.from_numpy(parts[0]), torch.from_numpy(parts[1]), torch.from_numpy(parts[2])
        phi, psi = self.phi, self.psi
        if step.relative:
            phi, psi = torch.where(a > 0, phi - a.log(), 0), torch.where(b > 0, psi - b.log(), 0)
        penalty = reg * step.objective(phi, psi, a, b, self.rows, self.cols) - self.transport
        dtype = self.plan.dtype
        return (reg * phi).to(dtype), (reg * psi).to(dtype), penalty.to(dtype)

    def take(self, which: Tensor) -> Plans:
        """Some of the problems; no iterations yet."""
        some = Plans(**{name: part[which] for name, part in vars(self).items()})
        some.iterations = torch.zeros_like(some.iterations)
        return some

    def put(self, which: Tensor, other: Solution) -> None:
        """Write the solution of some problems; iterations add up."""
        super().put(which, other)
        for name in ("plan", "rows", "cols", "transport"):
            getattr(self, name)[which] = getattr(other, name)


def solve_matrices(
    cost: Tensor, a: Tensor, b: Tensor, step: Marginal, *, reg: float, max_iter: int, tol: float, uniform: bool = False
) -> Plans:
    """Solve, and check the plans against what they claim.

    Entries that are large against all others are tried as forbidden pairs first (`mbot.solvers.support`). Where
    forbidden pairs keep the rounds from converging, pairs that no plan can use are forbidden as well.

    Args:
        cost: ``(B, n, m)``, float32 or float64; ``+inf`` forbids a pair.
        a: ``(B, n)`` weights of the rows, in float64; points of weight 0 take no part.
        b: ``(B, m)`` weights of the columns.
        step: what the problem asks of its rows, and of its columns.
        reg: regularisation > 0.
        max_iter: rounds.
        tol: stop when a round would move less than this share of the mass.
        uniform: whether the weights are all above 0 anyway.

    Raises:
        ValueError: forbidden pairs leave no plan with the marginals.
    """
    tol = max(tol, 8 * torch.finfo(cost.dtype).eps)
    if not uniform and not (float(a.amin()) > 0 and float(b.amin()) > 0):
        cost = torch.where((a > 0)[:, :, None] & (b > 0)[:, None, :], cost, torch.inf)
    cost = step.with_mass(cost, a, b, reg)
    return _compiled_first(cost, a, b, step, reg, max_iter, tol, partial(_solved, step=step, reg=reg, tol=tol))


def uniform_mass(cost: Tensor, step: Marginal, *, reg: float, max_iter: int, tol: float) -> Tensor | None:
    """The plan ``(n, m)`` of a problem with uniform weights, if the compiled kernel is all that it takes; else None.

    Arguments are those of `solve_matrices`; the costs ``(n, m)`` are checked here.
    """
    kind = cost.device.type, cost.dtype
    if kind not in _COMPILED or cost.ndim != 2 or not 0 < cost.numel() <= _CACHED or not fast_paths.get():
        return None
    cost, (n, m) = cost.detach(), cost.shape
    least, most = (float(extreme) for extreme in cost.aminmax())
    checks.cost_range(cost, least, most)
    if not step.ordinary(least, most, reg):
        return None
    from mbot.kernels.scaling import iterate

    tol = max(tol, 8 * torch.finfo(cost.dtype).eps)
    weights = np.full((1, n), 1 / n), np.full((1, m), 1 / m)
    plan, *_, share, _ = iterate(
        cost.contiguous().numpy()[None], *weights, *step.compiled(), reg, _budget(max_iter, n, m), tol
    )
    return torch.from_numpy(plan[0]) if 0 <= share[0] <= tol else None


def _budget(max_iter: int, n: int, m: int) -> int:
    """Rounds that a problem gets in the compiled kernel; most are left to the driver, which has ways of its own."""
    least = _BUDGET + 2 * n
    return min(max_iter, max(least, min(least + _CHEAP // (n * m), max_iter // 4)))


def _compiled_first(
    cost: Tensor, a: Tensor, b: Tensor, step: Marginal, reg: float, max_iter: int, tol: float,
    others: Callable[..., Plans], forbidden: bool = False,
) -> Plans:  # fmt: skip
    """Plans by the compiled kernel, and by ``others``, a function like `_solved`, where it does not finish."""
    _, n, m = cost.shape
    # A problem has one thread in the kernel, which still is the faster way for one alone.
    if cost.device.type != "cpu" or n * m > _MOST or not fast_paths.get():
        return others(cost, a, b, max_iter=max_iter)
    budget = _budget(max_iter, n, m)
    if not forbidden and bool(cost.amax() == torch.inf):  # which pairs are of use is asked before many rounds
        budget = min(max_iter, _BUDGET + 2 * n)
    found = _compiled(cost, a, b, step, reg, budget, tol)
    if bool(found.converged.all()):
        return found
    untried, slow = found.error < 0, ~found.converged & (found.iterations < max_iter)
    if not forbidden:  # which pairs are of use has not been asked yet
        untried |= slow & (cost.amax((1, 2)) == torch.inf)
        found.iterations[untried] = 0
    for left, begun in ((untried, False), (slow & ~untried, True)):
        if bool(left.any()):
            rest = max_iter - int(found.iterations[left].max())
            start = found.phi[left] if begun else None
            found.put(left, others(cost[left], a[left], b[left], max_iter=rest, start=start))
    return found


def _solved(
    cost: Tensor, a: Tensor, b: Tensor, step: Marginal, reg: float, max_iter: int, tol: float,
    start: Tensor | None = None,
) -> Plans:  # fmt: skip
    """The driver's plans; it begins at the potentials ``start`` if no pairs are forbidden."""
    low, high = cost.amin((1, 2)).double(), cost.amax((1, 2)).double()
    if bool((high - low <= _WIDE * reg).all()):
        return _checked(cost, a, b, step, reg, max_iter, tol, start)
    low = torch.where(low < torch.inf, low, 0)
    wanted, floor = step.least(a), reg * step.negligible
    excess = cost.double() - low[:, None, None]
    limit = large_entries(excess, a, b, floor, wanted)
    if bool((limit == -torch.inf).any()):
        raise ValueError("too many points with weight have only forbidden pairs (cost +inf)")
    allowed = (excess < torch.inf) & (excess <= limit[:, None, None])

    def run(which: Tensor, budget: int) -> Plans:
        left = torch.where(allowed[which], cost[which], torch.inf)
        others = partial(_checked, step=step, reg=reg, tol=tol, forbidden=True)
        return _compiled_first(left, a[which], b[which], step, reg, budget, tol, others, forbidden=True)

    must_hold = (wanted > 0) & ~allowed.all(2).all(1)
    patience = min(max_iter, _BUDGET + 2 * cost.shape[1]) if bool(must_hold.any()) else max_iter
    found = run(torch.arange(len(cost), device=cost.device), patience)
    left = (~found.converged).nonzero()[:, 0]
    if patience == max_iter or not len(left):
        return found
    while True:
        usable, missing = usable_pairs(allowed[left], a[left], b[left], wanted[left])
        short = left[missing > 1e-9]
        if not len(short):
            break
        if bool((limit[short] == torch.inf).any()):
            raise ValueError(
                "forbidden pairs (cost +inf) leave no plan: there is no way for a share "
                f"{float(missing.max()):.3g} of the mass. Allow more pairs, or use UnbalancedOT or less mass"
            )
        limit[short] = large_entries(excess[short], a[short], b[short], floor, wanted[short], limit[short])
        allowed[short] = (excess[short] < torch.inf) & (excess[short] <= limit[short, None, None])
    allowed[left] &= usable
    found.put(left, run(left, max_iter))
    return found


def _checked(
    cost: Tensor, a: Tensor, b: Tensor, step: Marginal, reg: float, max_iter: int, tol: float,
    start: Tensor | None = None, forbidden: bool = False,
) -> Plans:  # fmt: skip
    """The solution for given forbidden pairs; in float64 where the costs spread too far for float32.

    Where ``reg`` is too small against the potentials for float64, a plan of a larger one stands in, not converged.
    """
    dtype = cost.dtype
    low = cost.amin((1, 2)).double()
    low = torch.where(low < torch.inf, low, 0)
    spread = cost.masked_fill(cost == torch.inf, -torch.inf).amax((1, 2)).double() - low
    if bool((spread > _WIDE * reg).any()):
        cost = cost.double()
        most = float((low.abs() + spread).amax())
        if most / checks.LARGEST_COST > reg:
            raise ValueError(
                f"costs must be at most {checks.LARGEST_COST:g} times reg; got {most:g} at reg {reg:g}. Raise reg"
            )
    half = (low / (2 * reg))[:, None]  # costs are lowered to a least one of 0, and each side's potentials by half
    if forbidden and isinstance(step, KLRelaxed):  # points without a pair take no part
        a, b = torch.where(cost.amin(2) < torch.inf, a, 0), torch.where(cost.amin(1) < torch.inf, b, 0)
    log_a, log_b = step.lowered(a.log(), half), step.lowered(b.log(), half)
    if start is not None:
        start = start - half
    found = _by_rounds(cost, low, spread, log_a, log_b, step, reg, max_iter, tol, forbidden, start)
    lost = found.error == torch.inf
    enough = tol * (1 + 1e-6) + 8 * torch.finfo(found.plan.dtype).eps
    error = _error(found, step, log_a, log_b)
    coarse = (found.converged & (error > enough)).nonzero()[:, 0]
    if len(coarse):
        log_a, log_b = log_a[coarse], log_b[coarse]
        found.put(coarse, _refined(found.take(coarse), step, log_a, log_b, min(max_iter, _REFINE), tol))
        error[coarse] = _error(found.take(coarse), step, log_a, log_b)
    found.error, found.converged = error, error <= enough
    found.phi, found.psi, found.plan = found.phi + half, found.psi + half, found.plan.to(dtype)
    found.transport = torch.where(found.plan > 0, cost, 0).mul(found.plan).sum((1, 2), dtype=torch.float64)
    factors = raised(spread, reg)
    for factor in factors[lost].unique().tolist():
        which = (lost & (factors == factor)).nonzero()[:, 0]
        other = _checked(
            cost[which], a[which], b[which], step.at(factor), factor * reg, min(max_iter, _BUDGET), tol, None, forbidden
        )
        other.phi, other.psi, other.plan = factor * other.phi, factor * other.psi, other.plan.to(dtype)
        other.error = torch.maximum(other.error, drowned(spread[which], reg))
        other.converged[:] = False
        found.put(which, other)
    return found


def _error(found: Plans, step: Marginal, log_a: Tensor, log_b: Tensor) -> Tensor:
    """Distance of the plans' marginals from what the problem asks for, as a share of the mass, ``(B,)``."""
    error = rounding(found, found.plan.dtype)
    for potential, mass, log_weight in ((found.phi, found.rows, log_a), (found.psi, found.cols, log_b)):
        wanted = step.masses(potential, mass, log_weight)
        total = torch.maximum(mass.sum(1), wanted.sum(1))
        error = torch.maximum(error, (mass - wanted).abs().sum(1) / torch.where(total > 0, total, 1))
    return error


def _refined(found: Plans, step: Marginal, log_a: Tensor, log_b: Tensor, rounds: int, tol: float) -> Plans:
    """Rounds on the plans themselves, for potentials so large that their last digit is more than ``tol``."""
    for _ in range(rounds):
        for axis, potential, log_weight in ((2, found.phi, log_a), (1, found.psi, log_b)):
            mass = found.plan.sum(axis, dtype=torch.float64)
            ratio = torch.where(mass > 0, step.masses(potential, mass, log_weight) / mass, 1)
            potential += ratio.log()
            found.plan *= ratio.unsqueeze(axis).to(found.plan.dtype)
        found.rows, found.cols = (found.plan.sum(axis, dtype=torch.float64) for axis in (2, 1))
        if bool((_error(found, step, log_a, log_b) <= tol).all()):
            break
    return found


def _by_rounds(
    cost: Tensor, low: Tensor, spread: Tensor, log_a: Tensor, log_b: Tensor, step: Marginal, reg: float,
    max_iter: int, tol: float, forbidden: bool, start: Tensor | None,
) -> Plans:  # fmt: skip
    """The driver's solution for costs lowered by ``low``, on their way to `_checked`."""
    geometry = Dense(cost - low[:, None, None].to(cost.dtype), forbidden or bool((log_a == -torch.inf).any()))
    widest = float(spread.amax())
    found = solve(
        geometry, log_a, log_b, step, step, reg=reg, spread=widest if start is None else 0.0, max_iter=max_iter,
        tol=tol, start=start, plans=True,
    )  # fmt: skip
    plan = found.plan
    assert plan is not None
    rows, cols = plan.sum(2, dtype=torch.float64), plan.sum(1, dtype=torch.float64)
    transport = torch.zeros_like(found.error)  # `_checked` fills it in
    return Plans(
        found.phi, found.psi, found.error, found.iterations, found.converged, plan=plan, rows=rows, cols=cols,
        transport=transport,
    )  # fmt: skip


def _compiled(cost: Tensor, a: Tensor, b: Tensor, step: Marginal, reg: float, budget: int, tol: float) -> Plans:
    """The compiled kernel's solution; a negative error where it had to give up."""
    from mbot.kernels.scaling import iterate

    c, rows, cols = (part.contiguous().numpy() for part in (cost, a, b))
    found = iterate(c, rows, cols, *step.compiled(), reg, budget, tol)
    share = found[6]
    plan, phi, psi, row_mass, col_mass, transport, error, iterations, converged = (
        torch.from_numpy(part) for part in (*found, (share >= 0) & (share <= tol))
    )
    return Plans(phi, psi, error, iterations, converged, plan=plan, rows=row_mass, cols=col_mass, transport=transport)
