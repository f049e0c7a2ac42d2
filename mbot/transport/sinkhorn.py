"""The log-domain Sinkhorn loop for a batch of problems: balanced, KL-unbalanced and partial transport share it.

All of them minimise ``<C, P> + reg * (entropy of P) + (terms in the marginals)``, so that

    P_ij = exp(phi_i + psi_j + L_ij),        L = -C / reg + log(reference weights),

and alternate exact minimisations over ``phi`` and ``psi`` (in units of ``reg``). A problem differs only in its step:
from ``S_i = log sum_j exp(psi_j + L_ij)``, the log of the row masses at ``phi = 0``, to the new ``phi_i``.

Four things make it fast. Potentials live in the log domain, but between renewals of ``P`` the iterations are plain
products with it, on scalings kept within ``exp(±range)`` (stabilised scaling, Schmitzer 2019). A small ``reg`` is
approached from above (epsilon-scaling). Where the iterations converge slowly, Newton's method solves the same fixed
point (Brauer et al. 2017), safeguarded by the residual. A problem leaves the batch when it has converged. On the CPU,
small problems that need no renewal run in a compiled kernel first (`mbot.kernels.scaling`); what it leaves comes here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mbot.transport.steps import KLRelaxed, Step
from mbot.transport.support import large_entries, usable_pairs

_RANGE = {torch.float32: 20.0, torch.float64: 200.0}  # |log scaling| at which P is renewed, far from overflow
_REACH = 12.0  # largest change of a potential in a Newton step
_TRIALS = 8  # lengths of a Newton step
_EVERY = 10  # iterations between checks
_WIDE = 2e3  # costs spread over more regularisations than this need float64, and a look at the largest
_ROUNDING = 1e-3  # largest relative error of a plan's entries, from the rounding of its potentials
_PATIENCE = 400  # iterations that problems with forbidden pairs get before these are looked at
_DIRECT = 40  # costs spread over fewer regularisations than this need no epsilon-scaling
_SCALING = 0.25  # ratio of successive regularisations on the way down to reg
_ROUNDS = 4  # rounds at most at each of them
_NEWTON_SIZE = 2048  # rows up to which a dense Newton system is solved
_CACHED = 1 << 18  # cells of a problem that a core's cache holds in float64, for the compiled kernel
_PLAIN = 300.0  # costs spread over fewer regularisations than this need no renewal in float64
_BUDGET = 400  # iterations in it, and two a row, before Newton steps are the quicker way to the end


@dataclass
class Solution:
    """What the loop returns, for ``B`` problems: plans, float64 potentials in units of ``reg``, how it ended.

    ``rows`` and ``cols`` are the plans' marginals in float64; ``error`` and ``converged`` are measured on them.
    """

    plan: Tensor
    phi: Tensor
    psi: Tensor
    error: Tensor
    iterations: Tensor
    converged: Tensor
    rows: Tensor
    cols: Tensor

    @classmethod
    def empty(cls, like: Tensor) -> Solution:
        """Room for the problems of ``like`` ``(B, n, m)``."""
        problems, n, m = like.shape

        def zeros(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(problems, *size, dtype=dtype, device=like.device)

        return cls(
            plan=torch.zeros_like(like),
            phi=zeros(n),
            psi=zeros(m),
            error=zeros().fill_(torch.inf),
            iterations=zeros(dtype=torch.int64),
            converged=zeros(dtype=torch.bool),
            rows=zeros(n),
            cols=zeros(m),
        )

    def put(self, rows: Tensor, other: Solution) -> None:
        """Write the solution of some problems; iterations add up."""
        for name in ("plan", "phi", "psi", "error", "converged", "rows", "cols"):
            getattr(self, name)[rows] = getattr(other, name).to(getattr(self, name).dtype)
        self.iterations[rows] += other.iterations


def sinkhorn(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    reg: float,
    row_step: Step,
    col_step: Step,
    weighted: bool,
    max_iter: int,
    tol: float,
) -> Solution:
    """Solve, and check the plans against what they claim.

    Entries that are large against all others are tried as forbidden pairs first (`mbot.transport.support`). Where
    forbidden pairs keep the iterations from converging, pairs that no plan can use are forbidden as well.

    Args:
        cost: ``(B, n, m)``, float32 or float64; ``+inf`` forbids a pair.
        a: ``(B, n)`` weights of the rows, in float64; points of weight 0 take no part.
        b: ``(B, m)`` weights of the columns.
        reg: regularisation > 0.
        row_step: what the problem asks of its rows.
        col_step: what it asks of its columns.
        weighted: whether the entropy is relative to ``a ⊗ b`` (True) or to the counting measure.
        max_iter: iterations (each updates rows and columns once).
        tol: stop when an update would move less than this share of the mass.

    Raises:
        ValueError: forbidden pairs leave no plan with the marginals.
    """
    tol = max(tol, 8 * torch.finfo(cost.dtype).eps)
    if not bool((a > 0).all() & (b > 0).all()):
        cost = torch.where((a > 0)[:, :, None] & (b > 0)[:, None, :], cost, torch.inf)
    low, high = _range(cost)

    def run(cost: Tensor, rows: Tensor | slice, budget: int) -> Solution:
        return _checked(cost, a[rows], b[rows], low[rows], reg, row_step, col_step, weighted, budget, tol)

    wide = high - low > _WIDE * reg
    if not bool((wide | (high == torch.inf)).any()):
        return run(cost, slice(None), max_iter)
    wanted = row_step.least(a)
    floor = reg * row_step.negligible
    excess = cost.double() - low[:, None, None]
    limit = torch.full_like(low, torch.inf)
    limit[wide] = large_entries(excess[wide], a[wide], b[wide], floor, wanted[wide])
    allowed = (excess < torch.inf) & (excess <= limit[:, None, None])
    must_hold = (wanted > 0) & ~allowed.all((1, 2))
    patience = min(max_iter, _PATIENCE) if bool(must_hold.any()) else max_iter
    found = run(torch.where(allowed, cost, torch.inf), slice(None), patience)
    left = (~found.converged).nonzero()[:, 0]  # with time to spare
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
    found.put(left, run(torch.where(allowed[left], cost[left], torch.inf), left, max_iter))
    return found


def _range(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest cost of each problem, ``(B,)`` float64; ``+inf`` if a pair is forbidden, 0 if all are."""
    low, high = cost.amin((1, 2)).double(), cost.amax((1, 2)).double()
    return torch.where(low < torch.inf, low, 0), high


def _checked(
    cost: Tensor, a: Tensor, b: Tensor, low: Tensor, reg: float, row_step: Step, col_step: Step, weighted: bool,
    max_iter: int, tol: float,
) -> Solution:  # fmt: skip
    """The solution for given forbidden pairs; in float64 where the costs spread too far for float32."""
    dtype, spread = cost.dtype, _range(cost)[1] - low
    if bool((spread == torch.inf).any()):
        spread = (torch.where(cost < torch.inf, cost, -torch.inf).amax((1, 2)).double() - low).clamp_min(0)
    if bool((spread > _WIDE * reg).any()):
        cost = cost.double()
    log_a, log_b = (w.log() if weighted else torch.where(w > 0, 0.0, -torch.inf) for w in (a, b))
    reference = (log_a[:, :, None] + log_b[:, None, :]).to(cost.dtype)  # -inf: takes no part
    half = (low / (2 * reg))[:, None]
    log_a, log_b = row_step.shifted(a.log(), half), col_step.shifted(b.log(), half)
    factor = row_step.plain(half[:, 0])
    cost = cost - low[:, None, None].to(cost.dtype)
    found = _run(cost, reference, a, b, log_a, log_b, factor, spread, reg, row_step, col_step, max_iter, tol)
    _certify(found, log_a, log_b, row_step, col_step, tol)
    bare = ((found.rows == 0) & (a > 0)).any(-1) | ((found.cols == 0) & (b > 0)).any(-1)
    if bool(bare.any()):  # points whose mass is less than the smallest number: products say nothing of their potentials
        loop = _Loop(reference[bare] - cost[bare] / reg, log_a[bare], log_b[bare], row_step, col_step)
        loop.phi, loop.psi = found.phi[bare], found.psi[bare]
        loop.log_update()
        found.phi[bare] = torch.where(found.rows[bare] == 0, loop.phi, found.phi[bare])
        found.psi[bare] = torch.where(found.cols[bare] == 0, loop.psi, found.psi[bare])
    found.phi += half
    found.psi += half
    found.plan = found.plan.to(dtype)
    return found


def _certify(found: Solution, a: Tensor, b: Tensor, row_step: Step, col_step: Step, tol: float) -> None:
    """Measure the error on the plan itself: its marginals, and whether its digits are more than rounding."""
    found.rows, found.cols = found.plan.sum(-1, dtype=torch.float64), found.plan.sum(-2, dtype=torch.float64)
    eps = torch.finfo(found.plan.dtype).eps
    rounding = eps * torch.maximum(*(_extent(p) for p in (found.phi, found.psi)))
    error = torch.where(rounding < _ROUNDING, 0, rounding)
    for step, potential, mass, weight in (
        (row_step, found.phi, found.rows, a),
        (col_step, found.psi, found.cols, b),
    ):
        wanted = step.mass(potential, mass, weight)
        total = torch.maximum(mass.sum(-1), wanted.sum(-1))
        error = torch.maximum(error, (mass - wanted).abs().sum(-1) / torch.where(total > 0, total, 1))
    found.error, found.converged = error, error <= tol * (1 + 1e-6) + 8 * eps


def _extent(potential: Tensor) -> Tensor:
    return potential.amax(-1) - potential.amin(-1)


def _run(
    cost: Tensor, reference: Tensor, a: Tensor, b: Tensor, log_a: Tensor, log_b: Tensor,
    plain: tuple[int, float, Tensor], spread: Tensor, reg: float, row_step: Step, col_step: Step, max_iter: int,
    tol: float,
) -> Solution:  # fmt: skip
    """The loop, for costs whose least is 0."""

    def loop(rows: Tensor) -> _Loop:
        return _Loop(reference[rows] - cost[rows] / reg, log_a[rows], log_b[rows], row_step, col_step)

    out = Solution.empty(cost)
    todo = torch.ones_like(out.converged)
    n, m = cost.shape[1:]
    most = _CACHED if len(cost) < torch.get_num_threads() else 8 * _CACHED  # a problem has one thread in the kernel
    if cost.device.type == "cpu" and n * m <= most:
        easy = spread <= _PLAIN * reg
        rows = easy.nonzero()[:, 0]
        if len(rows):
            failed = _plain(out, rows, cost, reference, a, b, plain, reg, max_iter, tol)
            todo = ~easy | failed
            slow = easy & ~failed & ~out.converged & (out.iterations < max_iter)
            if bool(slow.any()):  # go on from where the kernel stopped
                some = loop(slow)
                some.phi, some.psi, some.plan = out.phi[slow], out.psi[slow], out.plan[slow]
                some.drift = torch.zeros_like(some.drift)
                out.put(slow, _iterate(some, max_iter - int(out.iterations[slow].max()), tol))
    if not bool(todo.any()):
        return out
    some, widest = loop(todo), float(spread[todo].amax())
    if widest <= _RANGE[cost.dtype] * reg:  # the plan at equal potentials neither under- nor overflows
        some.plan = some.kernel.exp()
        some.drift = torch.zeros_like(some.drift)
    else:
        some = _from_above(some, reference[todo], cost[todo], reg, widest)
    out.put(todo, _iterate(some, max_iter, tol))
    return out


def _plain(
    out: Solution, rows: Tensor, cost: Tensor, reference: Tensor, a: Tensor, b: Tensor,
    step: tuple[int, float, Tensor], reg: float, max_iter: int, tol: float,
) -> Tensor:  # fmt: skip
    """Run the problems ``rows`` in the compiled kernel; returns which problems it had to give up, ``(B,)``."""
    from mbot.kernels.scaling import iterate

    n = cost.shape[1]
    whole = len(rows) == len(cost)
    some, log_weight = (cost, reference) if whole else (cost[rows], reference[rows])
    plan = some.double().div_(-reg) if some.dtype != torch.float64 else some / -reg
    plan.add_(log_weight).exp_()
    u, v, error, iterations = (
        torch.from_numpy(part)
        for part in iterate(
            plan.numpy(),
            a[rows].contiguous().numpy(),
            b[rows].contiguous().numpy(),
            step[0],
            step[1],
            step[2][rows].numpy(),
            min(max_iter, _BUDGET + 2 * n),
            tol,
        )
    )
    good = error >= 0
    out.plan[rows], out.phi[rows], out.psi[rows] = plan.to(out.plan.dtype), u.log(), v.log()
    out.converged[rows], out.iterations[rows] = good & (error <= tol), torch.where(good, iterations, 0)
    failed = torch.zeros(len(cost), dtype=torch.bool)
    failed[rows] = ~good
    return failed


def _from_above(loop: _Loop, reference: Tensor, cost: Tensor, reg: float, spread: float) -> _Loop:
    """Potentials for ``reg`` by epsilon-scaling.

    Roughly converged at each level: below it the plan may fall apart into blocks that no longer see each other.
    """
    level, kernel = spread / _DIRECT, loop.kernel
    while level > reg:
        loop.kernel, loop.drift = reference - cost / level, torch.full_like(loop.drift, torch.inf)
        for _ in range(_ROUNDS):
            change, error = loop.round(_EVERY // 2)
            if float(error.amax()) < 0.05:
                break
            if cost.shape[1] <= _NEWTON_SIZE:
                loop.newton(change, error)
        lower = max(reg, level * _SCALING)
        loop.phi, loop.psi = loop.phi * (level / lower), loop.psi * (level / lower)  # constant in units of the cost
        level = lower
    loop.kernel, loop.drift = kernel, torch.full_like(loop.drift, torch.inf)
    return loop


def _masked(step: Step, soft: Tensor, log_weight: Tensor, otherwise: Tensor | float = 0.0) -> Tensor:
    """The step, with another value for points that take no part or that nothing reaches."""
    potential = step(soft, log_weight)
    return torch.where((log_weight > -torch.inf) & (potential < torch.inf), potential, otherwise)


class _Loop:
    """The problems that are still running: kernels ``L`` and plans in the cost's dtype, vectors in float64.

    ``plan = exp(phi + psi + L)`` is renewed from the potentials when these have moved by more than ``_RANGE`` since
    the last renewal, and multiplied by the changes in between: cheaper, and free of the rounding of large potentials.
    """

    def __init__(self, kernel: Tensor, log_a: Tensor, log_b: Tensor, row_step: Step, col_step: Step) -> None:
        self.kernel, self.log_a, self.log_b, self.row_step, self.col_step = kernel, log_a, log_b, row_step, col_step
        self.phi, self.psi = torch.zeros_like(log_a), torch.zeros_like(log_b)
        self.plan, self.drift = kernel, torch.full_like(log_a[:, 0], torch.inf)

    def _log_plan(self, phi: Tensor | None, psi: Tensor | None) -> Tensor:
        kernel = self.kernel
        if phi is not None:
            kernel = kernel + phi[:, :, None].to(kernel.dtype)
        return kernel if psi is None else kernel + psi[:, None, :].to(kernel.dtype)

    def log_update(self) -> None:
        """One exact update of both potentials."""
        self.phi = _masked(self.row_step, self._log_plan(None, self.psi).logsumexp(-1).double(), self.log_a)
        self.psi = _masked(self.col_step, self._log_plan(self.phi, None).logsumexp(-2).double(), self.log_b)

    def renew(self) -> None:
        """The plan from the potentials, after an exact update."""
        self.log_update()
        shift = self.row_step.shift(self.phi, self.log_a, self.psi, self.log_b)
        self.phi, self.psi = self.phi + shift, self.psi - shift
        self.plan = self._log_plan(self.phi, self.psi).exp_()
        self.drift = torch.zeros_like(self.drift)

    def updates(self, count: int) -> None:
        """``count`` updates of both potentials as products with the plan."""
        plan, transposed = self.plan, self.plan.mT
        row_scale, col_scale = torch.zeros_like(self.phi), torch.zeros_like(self.psi)
        most = 3 * _RANGE[plan.dtype]  # a longer way is taken in several rounds: exp must not overflow
        for _ in range(count):
            soft = _times(plan, col_scale.exp()).log() - self.phi
            row_scale = (_masked(self.row_step, soft, self.log_a, self.phi) - self.phi).clamp(-most, most)
            soft = _times(transposed, row_scale.exp()).log() - self.psi
            col_scale = (_masked(self.col_step, soft, self.log_b, self.psi) - self.psi).clamp(-most, most)
        self.plan = _scaled(plan, row_scale, col_scale)
        self._move(row_scale, col_scale)

    def _move(self, row_scale: Tensor, col_scale: Tensor) -> None:
        self.phi, self.psi = self.phi + row_scale, self.psi + col_scale
        self.drift = self.drift + torch.maximum(row_scale.abs().amax(-1), col_scale.abs().amax(-1))

    def round(self, count: int) -> tuple[Tensor, Tensor]:
        """Some updates, on a plan that is fresh enough; returns the `residual`."""
        if bool((self.drift > _RANGE[self.kernel.dtype]).any()):
            self.renew()
        self.updates(count)
        return self.residual()

    def residual(self) -> tuple[Tensor, Tensor]:
        """Change of ``phi`` that a row update would make, and the share of the mass that it would move."""
        mass = self.plan.sum(-1).double()
        change = _masked(self.row_step, mass.log() - self.phi, self.log_a, self.phi) - self.phi
        total = mass.sum(-1)
        return change, (mass * change.expm1().abs()).sum(-1) / torch.where(total > 0, total, 1)

    def dual(self) -> Tensor:
        """The dual objective in units of ``reg``, ``(B,)``; every update raises it."""
        return (
            self.row_step.dual(self.phi, self.log_a)
            + self.col_step.dual(self.psi, self.log_b)
            - self.plan.sum((-2, -1))
        )

    _PARTS = ("kernel", "log_a", "log_b", "phi", "psi", "plan", "drift")

    def part(self, mask: Tensor) -> _Loop:
        """Some of the problems."""
        some = _Loop(self.kernel[:0], self.log_a[:0], self.log_b[:0], self.row_step, self.col_step)
        for name in self._PARTS:
            setattr(some, name, getattr(self, name)[mask])
        return some

    def newton_direction(self, change: Tensor) -> Tensor:
        """Newton direction for the fixed point ``row_step(col_step(phi)) = phi``; solved in float64."""
        plan = self.plan.double()
        rows, cols = plan.sum(-1), plan.sum(-2)
        to_col = plan.mT / torch.where(cols > 0, cols, 1)[:, :, None]  # -d psi / d phi before the column step
        to_row = plan / torch.where(rows > 0, rows, 1)[:, :, None]
        inner = _slope(self.col_step, cols.log() - self.psi, self.log_b, to_col)
        jacobian = _slope(self.row_step, rows.log() - self.phi, self.log_a, to_row @ inner)
        # A little more than the identity: a plan in blocks makes the system singular, and the direction that shifts
        # the blocks against each other must keep its sign.
        system = (1 + 1e-10) * torch.eye(plan.shape[1], dtype=plan.dtype, device=plan.device) - jacobian
        if not isinstance(self.row_step, KLRelaxed):  # potentials are free up to a constant
            system = system + 1 / plan.shape[1]
        return torch.linalg.solve_ex(system, change[:, :, None])[0][:, :, 0]

    def newton(self, change: Tensor, error: Tensor) -> None:
        """One step along Newton's direction, as far as the dual objective grows or the residual shrinks; else none."""
        objective = self.dual()
        direction = self.newton_direction(change)
        length = (_REACH / direction.abs().amax(-1)).clamp_max(1)[:, None].nan_to_num(0)
        todo = torch.ones_like(error, dtype=torch.bool)
        for _ in range(_TRIALS):
            trial = self.part(todo)
            row_scale = (length * direction)[todo]
            plan = _scaled(trial.plan, row_scale)
            soft = plan.sum(-2).double().log() - trial.psi
            col_scale = _masked(trial.col_step, soft, trial.log_b, trial.psi) - trial.psi
            trial.plan = _scaled(plan, cols=col_scale)
            trial._move(row_scale, col_scale)
            better = (trial.residual()[1] < 0.8 * error[todo]) | (trial.dual() > objective[todo])
            rows = todo.nonzero()[:, 0][better]
            for name in ("phi", "psi", "plan", "drift"):
                getattr(self, name)[rows] = getattr(trial, name)[better]
            todo[rows] = False
            if not bool(todo.any()):
                return
            length = 0.25 * length


def _times(plan: Tensor, vector: Tensor) -> Tensor:
    """Product of a batch of matrices with float64 vectors, in the matrices' precision."""
    return (plan @ vector[:, :, None].to(plan.dtype))[:, :, 0].double()


def _scaled(plan: Tensor, rows: Tensor | None = None, cols: Tensor | None = None) -> Tensor:
    """The plan with its rows and columns scaled by exponentials."""
    if rows is not None:
        plan = plan * rows.exp()[:, :, None].to(plan.dtype)
    return plan if cols is None else plan * cols.exp()[:, None, :].to(plan.dtype)


def _slope(step: Step, soft: Tensor, log_weight: Tensor, matrix: Tensor) -> Tensor:
    """The step's derivative applied to the rows of ``matrix``, without its sign."""
    diagonal, left, right = step.slope(soft, log_weight)
    return diagonal[:, :, None] * matrix + left[:, :, None] * (right[:, None, :] @ matrix)


def _iterate(loop: _Loop, max_iter: int, tol: float) -> Solution:
    problems, device = len(loop.kernel), loop.kernel.device
    out = Solution.empty(loop.kernel)
    active = torch.arange(problems, device=device)
    previous = torch.full((problems,), torch.inf, dtype=loop.phi.dtype, device=device)
    spent = 0
    while True:
        rounds = max(1, min(_EVERY, max_iter - spent))
        change, error = loop.round(rounds)
        spent += rounds

        finished = (error <= tol) | (spent >= max_iter) | ~torch.isfinite(error)
        if bool(finished.any()):
            rows = active[finished]
            out.plan[rows], out.phi[rows], out.psi[rows] = loop.plan[finished], loop.phi[finished], loop.psi[finished]
            out.error[rows], out.iterations[rows] = error[finished].double(), spent
            out.converged[rows] = error[finished] <= tol
            keep = ~finished
            if not bool(keep.any()):
                return out
            active, change, error, previous = (t[keep] for t in (active, change, error, previous))
            loop = loop.part(keep)

        # How many more iterations at the rate just seen? A Newton step costs about 20 + n / 10 of them.
        rate = (error / previous).clamp(1e-6, 1 - 1e-6)
        slow = (rounds * (tol / error).log() / rate.log() > 20 + loop.plan.shape[1] / 10) & (error < 0.5)
        previous = error
        if loop.plan.shape[1] <= _NEWTON_SIZE and spent > _EVERY and bool(slow.any()):
            some = loop.part(slow)
            some.newton(change[slow], error[slow])
            for name in _Loop._PARTS[3:]:
                getattr(loop, name)[slow] = getattr(some, name)
            previous = torch.where(slow, torch.inf, previous)
