"""Sinkhorn's iterations for a batch of small problems, from costs to plans, one problem a thread, compiled with numba.

Iterations are two products of ``P0 = exp((low - C) / reg)`` with positive scalings ``u`` and ``v``, the matrix stays in
the cache, and no logarithm is taken. The steps of `mbot.solvers.marginals` are (``r = P0 v``): balanced
``u = a / r``, KL-relaxed ``u = a / r^rate``, and upper-bounded ``u = min(a / r, t)`` with one ``t`` for all rows.

Where costs spread over so many regularisations that ``P0`` would under- or overflow in float64, the first rounds are
for larger ones. Their potentials then go into the exponent, ``P0 = exp((low + f + g - C) / reg)``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mbot.kernels.exponentials import exp, extent, log
from mbot.kernels.newton import factorise, newton_step
from mbot.kernels.threads import run_slices
from minibatch_transport import compiled

BALANCED, KL_RELAXED, UPPER_BOUNDED = 0, 1, 2
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "nsz", "contract"}}
_HUGE = 1e250  # scalings beyond this (or its inverse) are not followed
_SOON, _LOOK, _FEW = 4, 6, 8  # rounds between looks at the rate, at first and later, and that are left as they are
_NEWTON_SIZE = 256  # rows up to which Newton steps are taken here
_SLAB = 4096  # exponentials that are taken at a time
_RELAX_MOST, _RELAX_BELOW = 1.9, 0.1  # largest factor, and the error from which rounds are over-relaxed
_STEEP = 600.0  # logarithm of the largest entry of a kernel with potentials in it, which free masses may exceed
_FARTHEST = 12.0  # largest change of a potential by an extrapolation
_DIRECT = 300.0  # costs spread over fewer regularisations than this never leave the range of float64
_NEAR, _WIDEST = 100.0, 2000.0  # from the first up to the second, problems come from larger regularisations
_ROUNDS, _ROUGHLY = 8, 0.1  # rounds at most at each of these, and the share of the mass that may still move there


@compiled(**_OPTIONS)
def _cap(weight, sums, mass, t):  # type: ignore[no-untyped-def]
    """The t at which ``sum min(weight, t sums)`` is ``mass``: Newton's method on a concave piecewise linear function.

    From any start where the function has a slope it is below the root after one step, and then climbs, one bend or
    more a step. Where every row is full there is no slope: it starts below the root then, with no row full.
    """
    previous = -np.inf
    for _ in range(len(weight) + 3):
        full, open_mass, slope = 0.0, 0.0, 0.0
        for i in range(len(weight)):
            capped = weight[i] <= t * sums[i]
            full += weight[i] if capped else 0.0
            open_mass += 0.0 if capped else sums[i]
            slope += sums[i]
        if open_mass > 0.0:
            t = (mass - full) / open_mass
        elif full > mass and previous == -np.inf:
            t = mass / slope
            continue
        else:  # the mass is the whole weight: any larger t will do
            return t
        if t <= previous:
            return t
        previous = t
    return t


@compiled(**_OPTIONS)
def _update(sums, weight, scale, new, bits, kind, parameter, cap):  # type: ignore[no-untyped-def]
    """New scalings from ``sums``; returns the cap, the share of the mass that moves (-1: out of range), and the mass.

    Points of weight 0 are scaled by 0.
    """
    if kind == KL_RELAXED:
        log(sums, new, bits)
        for i in range(len(new)):
            new[i] *= -parameter / (1.0 + parameter)
        exp(new, bits)
    elif kind == UPPER_BOUNDED:
        cap = _cap(weight, sums, parameter, cap)
        if not 1 / _HUGE < cap < _HUGE:
            return cap, -1.0, 0.0
    most = cap if kind == UPPER_BOUNDED else np.inf
    moved, total, mass, lost = 0.0, 0.0, 0.0, 0
    for i in range(len(new)):
        value = weight[i] * new[i] if kind == KL_RELAXED else weight[i] / sums[i]
        value = value if value < most else most
        fits = (sums[i] > 1e-290) & (value > 1 / _HUGE) & (value < _HUGE)
        live = weight[i] > 0.0
        lost += 1 if live & (not fits) else 0
        value = value if live else 0.0
        moved += sums[i] * abs(value - scale[i])
        total += sums[i] * scale[i]
        mass += sums[i] * value
        new[i] = value
    return cap, (moved / total if lost == 0 else -1.0), mass


@compiled(**_OPTIONS)
def _row_sums(kernel, v, out):  # type: ignore[no-untyped-def]
    """``kernel v``, eight rows at a time: their sums do not wait for each other."""
    n, m = kernel.shape
    for i in range(0, n - 7, 8):
        s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = 0.0
        for j in range(m):
            scale = v[j]
            s0 += kernel[i, j] * scale
            s1 += kernel[i + 1, j] * scale
            s2 += kernel[i + 2, j] * scale
            s3 += kernel[i + 3, j] * scale
            s4 += kernel[i + 4, j] * scale
            s5 += kernel[i + 5, j] * scale
            s6 += kernel[i + 6, j] * scale
            s7 += kernel[i + 7, j] * scale
        out[i], out[i + 1], out[i + 2], out[i + 3] = s0, s1, s2, s3
        out[i + 4], out[i + 5], out[i + 6], out[i + 7] = s4, s5, s6, s7
    for i in range(n - n % 8, n):
        s0 = 0.0
        for j in range(m):
            s0 += kernel[i, j] * v[j]
        out[i] = s0


@compiled(**_OPTIONS)
def _col_sums(kernel, u, out):  # type: ignore[no-untyped-def]
    """``u kernel``, eight rows at a time: an eighth of the reads and writes of the sums."""
    n, m = kernel.shape
    out[:] = 0.0
    for i in range(0, n - 7, 8):
        u0, u1, u2, u3, u4, u5, u6, u7 = u[i], u[i + 1], u[i + 2], u[i + 3], u[i + 4], u[i + 5], u[i + 6], u[i + 7]
        for j in range(m):
            half = (u0 * kernel[i, j] + u1 * kernel[i + 1, j]) + (u2 * kernel[i + 2, j] + u3 * kernel[i + 3, j])
            rest = (u4 * kernel[i + 4, j] + u5 * kernel[i + 5, j]) + (u6 * kernel[i + 6, j] + u7 * kernel[i + 7, j])
            out[j] += half + rest
    for i in range(n - n % 8, n):
        for j in range(m):
            out[j] += u[i] * kernel[i, j]


@compiled(**{**_OPTIONS, "fastmath": {"nsz", "contract"}})  # in order: large scalings are divided before they grow
def _beyond(new, scale, relax):  # type: ignore[no-untyped-def]
    """Over-relaxed scalings, ``scale (new / scale)^relax`` to third order in small changes; large ones stay plain."""
    ahead, back = (relax + 1.0) / 2.0, (1.0 - relax) / 2.0
    for i in range(len(new)):
        change = new[i] - scale[i]
        near = 2.0 * abs(change) < scale[i]  # false for points of weight 0
        share = (scale[i] + ahead * change) / (scale[i] + back * change if near else 1.0)
        new[i] = scale[i] * share if near else new[i]


@compiled(**_OPTIONS)
def _extrapolate(new, scale, factor, bits):  # type: ignore[no-untyped-def]
    """Write ``scale (new / scale)^factor`` to ``new``, with a smaller factor where changes would be huge."""
    for i in range(len(new)):
        new[i] = new[i] / scale[i] if scale[i] > 0.0 else 1.0
    log(new, new, bits)
    most = _FARTHEST
    for change in new:
        most = max(most, factor * abs(change))
    factor *= _FARTHEST / most
    for i in range(len(new)):
        new[i] *= factor
    exp(new, bits)
    for i in range(len(new)):
        new[i] *= scale[i]


@compiled(**_OPTIONS)
def _rounds(kernel, a, b, kind, parameter, budget, tol, u, v, bits, work, system):  # type: ignore[no-untyped-def]
    """Rounds until one would move less than ``tol`` of the mass; returns the scalings, that share, and the rounds.

    Every few rounds balanced problems look at the rate just seen. They go on with over-relaxed rounds by the factor
    that is the best for it (Young's formula for successive over-relaxation), or, where these would be many, too, take
    a Newton step, and then further ones, with the same system as long as each halves the error. One that raises it is
    undone. The last round is a plain one, which leaves the columns exact.

    Other problems go where rounds of that rate would lead (Aitken's extrapolation), and take plain ones from there.
    """
    n, m, newton = len(u), len(v), len(system) > 0
    new_u, rows, plain, new_v, cols = work[0, :n], work[1, :n], work[2, :n], work[3, :m], work[4, :m]
    relax, most = 1.0, _RELAX_MOST if kind == BALANCED else 1.0
    row_cap = col_cap = 1.0
    before, since, rate, look, stepped = np.inf, 0, -np.inf, 2 if kind == BALANCED else _LOOK, False
    price = 5.0 + 0.75 * n
    for turn in range(budget + 1):
        _row_sums(kernel, v, rows)
        row_cap, error, row_mass = _update(rows, a, u, new_u, bits, kind, parameter, row_cap)
        # The first turn starts from columns that no step has been made for.
        if not error >= 0.0 or (turn > 0 and error <= tol and relax == 1.0) or turn == budget:
            return u, v, error, turn
        if error <= tol or turn == budget - 1:
            relax = 1.0
        if stepped and not error < before:
            new_u, plain = plain, new_u
            before, since, look, stepped = np.inf, turn, turn + _LOOK, False
        elif kind != BALANCED and (stepped or turn >= look):
            rate = 0.0 if stepped else np.log(error / before) / (turn - since)
            stepped = -np.inf < rate < 0.0 and np.log(tol / error) / rate > _FEW
            if stepped:
                for i in range(n):
                    plain[i] = new_u[i]
                _extrapolate(new_u, u, 1.0 / (1.0 - np.exp(rate)), bits)
            before, since, look = error, turn, turn + _LOOK
        elif stepped or turn >= look:
            if not stepped:
                rate = min(np.log(error / before) / (turn - since), -1e-9)
                if relax > 1.0 and error > 0.5 * before:  # it was too much, or does not pay
                    relax, most, before = 1.0, 1.0, np.inf
                elif most > 1.0 and error < _RELAX_BELOW:
                    seen = np.exp(rate)
                    seen = min((seen + relax - 1.0) ** 2 / (seen * relax * relax), 0.9999)  # of plain rounds
                    best, left = min(2.0 / (1.0 + np.sqrt(1.0 - seen)), most), np.log(tol / error)
                    if left / np.log(seen) > _FEW and left / np.log(best - 1.0) < 2.0 * price:
                        relax, rate = best, -np.inf
            if not (stepped and error <= 0.5 * before):
                slow = newton and relax == 1.0 and np.log(tol / error) / rate > price
                stepped = slow and factorise(kernel, a, b, rows, u, v, system)
            if stepped:
                plain, new_u = new_u, plain  # the round instead of the step
                newton_step(system, a, rows, u, new_u)
            before, since, look = error, turn, turn + (_LOOK if relax > 1.0 or turn > _LOOK else _SOON)
        if relax > 1.0:
            _beyond(new_u, u, relax)
        u, new_u = new_u, u
        _col_sums(kernel, u, cols)
        col_cap, moved, col_mass = _update(cols, b, v, new_v, bits, kind, parameter, col_cap)
        if not moved >= 0.0:
            return u, v, -1.0, turn
        if relax > 1.0:
            _beyond(new_v, v, relax)
        v, new_v = new_v, v
        if kind == KL_RELAXED:
            # Where the dual is largest along (u t, v / t): after exact updates its terms are the masses themselves.
            shift = (row_mass / col_mass) ** (parameter / 2.0)
            if not 1 / _HUGE < shift < _HUGE:
                return u, v, -1.0, turn
            for i in range(n):
                u[i] *= shift
            for j in range(m):
                v[j] /= shift
    return u, v, -1.0, budget


@compiled(**_OPTIONS)
def _plan(cost, kernel, u, v, plan, rows, cols):  # type: ignore[no-untyped-def]
    """Write the plan and its marginals; returns ``<C, P>``."""
    n, m = cost.shape
    cols[:] = 0.0
    for i in range(n):
        total, scale = 0.0, u[i]
        for j in range(m):
            mass = kernel[i, j] * scale * v[j]
            kernel[i, j] = mass
            total += mass
            cols[j] += mass
        rows[i] = total
    transport = 0.0
    for i in range(n):
        total = 0.0
        for j in range(m):
            mass = kernel[i, j]
            plan[i, j] = mass
            total += mass * cost[i, j] if mass > 0.0 else 0.0
        transport += total
    return transport


@compiled(**_OPTIONS)
def _begin(given, potential, half, relaxed, first, weight, scale):  # type: ignore[no-untyped-def]
    """Write weights and first scalings for potentials that are in the kernel; returns whether both are in range.

    KL-relaxed weights change with them: ``relaxed`` is ``reg + reg_marginal``, infinite for the other kinds.
    """
    most = 0.0
    for i in range(len(weight)):
        weight[i] = given[i]
        if relaxed < np.inf:
            lost = (potential[i] + half) / relaxed
            most = max(most, abs(lost))
            weight[i] *= np.exp(-lost)
        scale[i] = weight[i] if first else (1.0 if given[i] > 0.0 else 0.0)
    return most < np.log(_HUGE)


@compiled(**_OPTIONS)
def _absorb(scale, weight, potential, room, reg, bits):  # type: ignore[no-untyped-def]
    """Add ``reg log scale`` to potentials in units of the cost; points of weight 0 keep theirs."""
    for i in range(len(scale)):
        scale[i] = scale[i] if weight[i] > 0.0 else 1.0
    log(scale, room[: len(scale)], bits)
    for i in range(len(scale)):
        potential[i] += reg * room[i]


@compiled(**_OPTIONS)
def _solve(  # type: ignore[no-untyped-def]
    cost, a_all, b_all, kind, parameter, reg, budget, tol, begin, stop,
    plan, phi, psi, rows, cols, transport, error, turns,
):  # fmt: skip
    n, m = cost.shape[1:]
    kernel, bits = np.empty((n, m)), np.empty(max(min(n * m, _SLAB), n + m), np.int64)
    entries, room, work = kernel.reshape(n * m), np.empty(max(n, m)), np.empty((5, max(n, m)))
    system = np.empty((n, n) if kind == BALANCED and n <= _NEWTON_SIZE else (0, 0))
    a, u, f, b, v, g = np.empty(n), np.empty(n), np.empty(n), np.empty(m), np.empty(m), np.empty(m)
    for p in range(begin, stop):
        error[p], turns[p] = -1.0, 0
        least_cost, most_cost = extent(cost[p].reshape(-1))
        low, high = np.float64(least_cost), np.float64(most_cost)
        half, level = low / 2.0, reg  # costs are lowered by ``low``, and potentials on each side by half of it
        widest = _DIRECT if kind == UPPER_BOUNDED else _WIDEST
        if not (high - low <= widest * reg and abs(half / reg) < np.inf and 1.0 / reg < np.inf):
            continue
        while kind != UPPER_BOUNDED and high - low > _NEAR * level:
            level *= 4.0
        f[:] = 0.0
        g[:] = 0.0
        first, rounds, share = True, 0, -1.0
        while True:
            inverse = 1.0 / level
            for i in range(n):
                for j in range(m):
                    kernel[i, j] = ((low - np.float64(cost[p, i, j])) + (f[i] + g[j])) * inverse
            fits = first or extent(entries)[1] < _STEEP
            for t in range(0, n * m, _SLAB):
                exp(entries[t : t + _SLAB], bits)
            relaxed = level + parameter * reg if kind == KL_RELAXED else np.inf
            fits &= _begin(a_all[p], f, half, relaxed, first, a, u) & _begin(b_all[p], g, half, relaxed, first, b, v)
            if not fits:
                break
            least, enough = (budget, tol) if level == reg else (_ROUNDS, _ROUGHLY)
            ratio = parameter * (reg / level) if kind == KL_RELAXED else parameter
            found_u, found_v, share, more = _rounds(kernel, a, b, kind, ratio, least, enough, u, v, bits, work, system)
            first, rounds = False, rounds + more
            if level == reg or not share >= 0.0:
                break
            _absorb(found_u, a, f, room, level, bits)
            _absorb(found_v, b, g, room, level, bits)
            if kind == BALANCED:  # potentials are free up to a constant, and large ones lose digits
                apart = (extent(f)[1] - extent(g)[1]) / 2.0
                for i in range(n):
                    f[i] -= apart
                for j in range(m):
                    g[j] += apart
            level = max(level / 4.0, reg)
        if not (fits and share >= 0.0):
            continue
        error[p], turns[p] = share, rounds
        transport[p] = _plan(cost[p], kernel, found_u, found_v, plan[p], rows[p], cols[p])
        _absorb(found_u, a, f, room, reg, bits)
        _absorb(found_v, b, g, room, reg, bits)
        for i in range(n):
            phi[p, i] = (f[i] + half) / reg
        for j in range(m):
            psi[p, j] = (g[j] + half) / reg


def iterate(
    cost: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    kind: int,
    parameter: float,
    reg: float,
    budget: int,
    tol: float,
) -> tuple[np.ndarray, ...]:
    """Iterate every problem until a round would move less than ``tol`` of its mass, or ``budget`` times.

    Args:
        cost: ``(B, n, m)`` float32 or float64; ``+inf`` forbids a pair.
        a: ``(B, n)`` float64 weights of the rows; all costs of rows of weight 0 are ``+inf``.
        b: ``(B, m)`` weights of the columns.
        kind: `BALANCED`, `KL_RELAXED` or `UPPER_BOUNDED`.
        parameter: the ratio of `KL_RELAXED`, the mass of `UPPER_BOUNDED`.
        reg: regularisation.
        budget: rounds.
        tol: share of the mass.

    Returns:
        Plans ``(B, n, m)`` in the costs' dtype; in float64 potentials in units of reg ``(B, n)``, ``(B, m)``, row and
        column sums of the plans, and ``<C, P>`` ``(B,)``; the share of the mass that one more round would move,
        ``(B,)``, negative where costs spread too far or scalings left the range of float64 (nothing else is written
        then); and rounds ``(B,)``.
    """
    problems, n, m = cost.shape
    sides = [np.empty((problems, size)) for size in (n, m, n, m)]
    out = np.empty_like(cost), *sides, np.empty(problems), np.empty(problems), np.empty(problems, np.int64)

    def solve(begin: int, stop: int) -> None:
        _solve(cost, a, b, kind, parameter, reg, budget, tol, begin, stop, *out)

    run_slices(solve, np.ones(problems), 10.0 * n * m)
    return out
