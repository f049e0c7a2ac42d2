"""Entropic problems with matrices of costs: forbidden pairs, the compiled iterations, and the check of every plan."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mbot.geometry import Dense
from mbot.solvers.marginals import KLRelaxed, Marginal
from mbot.solvers.sinkhorn import Solution, rounding, solve
from mbot.solvers.support import large_entries, usable_pairs

_WIDE = 2e3  # costs spread over more regularisations than this need float64, and a look at the largest
_PATIENCE = 400  # rounds that problems with forbidden pairs get before these are looked at
_CACHED = 1 << 18  # cells of a problem that a core's cache holds in float64, for the compiled kernel
_PLAIN = 300.0  # costs spread over fewer regularisations than this never leave the range of float64
_REFINE = 50  # rounds on plans whose potentials have too few digits
_BUDGET = 400  # rounds in the compiled kernel, and two a row, before Newton steps are the quicker way to the end


@dataclass
class Plans(Solution):
    """Solutions with their plans ``(B, n, m)`` in the costs' dtype, and the plans' marginals in float64.

    ``error`` and ``converged`` are measured on the plan: its marginals against what the problem asks for.
    """

    plan: Tensor = None  # type: ignore[assignment]
    rows: Tensor = None  # type: ignore[assignment]
    cols: Tensor = None  # type: ignore[assignment]

    def relative_to(self, a: Tensor, b: Tensor) -> Plans:
        """The same with potentials of ``P = a b exp(phi + psi - C / reg)``; 0 at points of weight 0."""
        self.phi = torch.where(a > 0, self.phi - a.log(), 0)
        self.psi = torch.where(b > 0, self.psi - b.log(), 0)
        return self

    @classmethod
    def unsolved(cls, cost: Tensor) -> Plans:
        """Room for the problems ``cost`` ``(B, n, m)``, with an error of -1."""
        problems, n, m = cost.shape
        zeros = [torch.zeros(problems, size, dtype=torch.float64, device=cost.device) for size in (n, m, n, m)]
        error = torch.full((problems,), -1.0, dtype=torch.float64, device=cost.device)
        return cls(zeros[0], zeros[1], error, error.long() + 1, error > 0, torch.zeros_like(cost), zeros[2], zeros[3])

    def take(self, which: Tensor) -> Plans:
        """Some of the problems; no iterations yet."""
        some = Plans(**{name: part[which] for name, part in vars(self).items()})
        some.iterations = torch.zeros_like(some.iterations)
        return some

    def put(self, which: Tensor, other: Solution) -> None:
        """Write the solution of some problems; iterations add up."""
        super().put(which, other)
        assert isinstance(other, Plans)
        self.plan[which], self.rows[which], self.cols[which] = other.plan, other.rows, other.cols


def solve_matrices(
    cost: Tensor, a: Tensor, b: Tensor, step: Marginal, *, reg: float, max_iter: int, tol: float
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

    Raises:
        ValueError: forbidden pairs leave no plan with the marginals.
    """
    tol = max(tol, 8 * torch.finfo(cost.dtype).eps)
    if not bool((a > 0).all() & (b > 0).all()):
        cost = torch.where((a > 0)[:, :, None] & (b > 0)[:, None, :], cost, torch.inf)
    low, high = cost.amin((1, 2)).double(), cost.amax((1, 2)).double()
    spread = high - low
    if bool((spread <= _WIDE * reg).all()):
        return _checked(cost, a, b, low, spread, step, reg, max_iter, tol)
    low = torch.where(low < torch.inf, low, 0)
    wanted, floor = step.least(a), reg * step.negligible
    excess = cost.double() - low[:, None, None]
    limit = large_entries(excess, a, b, floor, wanted)
    if bool((limit == -torch.inf).any()):
        raise ValueError("too many points with weight have only forbidden pairs (cost +inf)")
    allowed = (excess < torch.inf) & (excess <= limit[:, None, None])

    def run(which: Tensor, budget: int) -> Plans:
        left = torch.where(allowed[which], cost[which], torch.inf)
        spread = torch.where(allowed[which], excess[which], 0).amax((1, 2))
        return _checked(left, a[which], b[which], low[which], spread, step, reg, budget, tol, forbidden=True)

    must_hold = (wanted > 0) & ~allowed.all(2).all(1)
    patience = min(max_iter, _PATIENCE) if bool(must_hold.any()) else max_iter
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
    cost: Tensor, a: Tensor, b: Tensor, low: Tensor, spread: Tensor, step: Marginal, reg: float, max_iter: int,
    tol: float, forbidden: bool = False,
) -> Plans:  # fmt: skip
    """The solution for given forbidden pairs; in float64 where the costs spread too far for float32."""
    dtype = cost.dtype
    if bool((spread > _WIDE * reg).any()):
        cost = cost.double()
    half = (low / (2 * reg))[:, None]  # costs are lowered to a least one of 0, and each side's potentials by half
    if forbidden and isinstance(step, KLRelaxed):  # points without a pair take no part
        a, b = torch.where(cost.amin(2) < torch.inf, a, 0), torch.where(cost.amin(1) < torch.inf, b, 0)
    log_a, log_b = step.lowered(a.log(), half), step.lowered(b.log(), half)
    found = _solved(cost, low, spread, log_a, log_b, step, reg, max_iter, tol, forbidden)
    enough = tol * (1 + 1e-6) + 8 * torch.finfo(found.plan.dtype).eps
    error = _error(found, step, log_a, log_b)
    coarse = (found.converged & (error > enough)).nonzero()[:, 0]
    if len(coarse):
        log_a, log_b = log_a[coarse], log_b[coarse]
        found.put(coarse, _refined(found.take(coarse), step, log_a, log_b, min(max_iter, _REFINE), tol))
        error[coarse] = _error(found.take(coarse), step, log_a, log_b)
    found.error, found.converged = error, error <= enough
    found.phi, found.psi, found.plan = found.phi + half, found.psi + half, found.plan.to(dtype)
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


def _solved(
    cost: Tensor, low: Tensor, spread: Tensor, log_a: Tensor, log_b: Tensor, step: Marginal, reg: float,
    max_iter: int, tol: float, forbidden: bool,
) -> Plans:  # fmt: skip
    """Potentials for costs lowered by ``low``: by the compiled kernel as far as it goes, then by the driver."""
    problems, n, m = cost.shape
    most = _CACHED if problems < torch.get_num_threads() else 8 * _CACHED  # a problem has one thread in the kernel
    easy = spread <= _PLAIN * reg
    if cost.device.type != "cpu" or n * m > most or not bool(easy.any()):
        return _by_rounds(cost, low, spread, log_a, log_b, step, reg, max_iter, tol, forbidden)
    budget = min(max_iter, _BUDGET + 2 * n)
    if bool(easy.all()):
        out = _compiled(cost, low, log_a, log_b, step, reg, budget, tol)
    else:
        out = Plans.unsolved(cost)
        out.put(easy, _compiled(cost[easy], low[easy], log_a[easy], log_b[easy], step, reg, budget, tol))
    untried = ~(out.error >= 0)
    slow = ~out.converged & ~untried & (out.iterations < max_iter)
    for left, begun in ((untried, False), (slow, True)):
        if bool(left.any()):
            start = out.phi[left] if begun else None
            rest = max_iter - int(out.iterations[left].max())
            some = _by_rounds(
                cost[left], low[left], spread[left], log_a[left], log_b[left], step, reg, rest, tol, forbidden, start
            )
            out.put(left, some)
    return out


def _by_rounds(
    cost: Tensor, low: Tensor, spread: Tensor, log_a: Tensor, log_b: Tensor, step: Marginal, reg: float,
    max_iter: int, tol: float, forbidden: bool, start: Tensor | None = None,
) -> Plans:  # fmt: skip
    """The driver's solution."""
    geometry = Dense(cost - low[:, None, None].to(cost.dtype), forbidden or bool((log_a == -torch.inf).any()))
    widest = float(spread.amax())
    found = solve(
        geometry, log_a, log_b, step, step, reg=reg, spread=widest if start is None else 0.0, max_iter=max_iter,
        tol=tol, start=start, plans=True,
    )  # fmt: skip
    plan = found.plan
    assert plan is not None
    rows, cols = plan.sum(2, dtype=torch.float64), plan.sum(1, dtype=torch.float64)
    return Plans(found.phi, found.psi, found.error, found.iterations, found.converged, plan, rows, cols)


def _compiled(
    cost: Tensor, low: Tensor, log_a: Tensor, log_b: Tensor, step: Marginal, reg: float, budget: int, tol: float
) -> Plans:
    """The compiled kernel's solution; a negative error where it had to give up."""
    from mbot.kernels.scaling import iterate

    plan = low[:, None, None] - cost.double()
    plan.div_(reg).exp_()
    found = iterate(plan.numpy(), log_a.exp().numpy(), log_b.exp().numpy(), *step.compiled(), budget, tol)
    u, v, error, iterations, rows, cols = (torch.from_numpy(part) for part in found)
    converged = (error >= 0) & (error <= tol)
    iterations = torch.where(error >= 0, iterations, 0)
    return Plans(u.log(), v.log(), error, iterations, converged, plan.to(cost.dtype), rows, cols)
