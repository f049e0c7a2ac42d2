"""Sinkhorn's iterations for a batch of small problems, one problem a thread, compiled with numba.

For problems whose costs spread over few enough regularisations that ``P0 = exp(-C / reg)`` neither under- nor overflows
in float64. Iterations then are two products of ``P0`` with positive scalings ``u = exp(phi)`` and ``v``, the matrix
stays in the cache, and no logarithm is taken. The steps of `mbot.solvers.marginals` are (``r = P0 v``): balanced
``u = a / r``, KL-relaxed ``u = a / r^rate``, and upper-bounded ``u = min(a / r, t)`` with one ``t`` for all rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mbot.kernels.compiled import compiled
from mbot.kernels.threads import run_slices

BALANCED, KL_RELAXED, UPPER_BOUNDED = 0, 1, 2
_OPTIONS: dict[str, Any] = {
    "nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "nsz", "contract"},
}  # fmt: skip
_HUGE = 1e250  # scalings beyond this (or its inverse) are not followed


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
def _update(sums, weight, scale, kind, parameter, cap):  # type: ignore[no-untyped-def]
    """New scalings from ``sums``; returns the cap and the mass that the change moves, or -1 where it fails."""
    moved, total = 0.0, 0.0
    if kind == UPPER_BOUNDED:
        cap = _cap(weight, sums, parameter, cap)
        if not 1 / _HUGE < cap < _HUGE:
            return cap, -1.0
    for i in range(len(scale)):
        if weight[i] > 0.0:
            new = weight[i] * sums[i] ** -parameter if kind == KL_RELAXED else weight[i] / sums[i]
            if kind == UPPER_BOUNDED:
                new = min(new, cap)
            if not 1 / _HUGE < new < _HUGE:
                return cap, -1.0
            moved += sums[i] * abs(new - scale[i])
            total += sums[i] * scale[i]
            scale[i] = new
    return cap, moved / total


@compiled(**_OPTIONS)
def _solve(plan, a, b, kind, parameter, budget, tol, begin, stop, u_all, v_all, error, iterations, row_mass, col_mass):  # type: ignore[no-untyped-def]
    n, m = plan.shape[1:]
    rows, cols, before = np.empty(n), np.empty(m), np.empty(n)
    for p in range(begin, stop):
        kernel, u, v = plan[p], u_all[p], v_all[p]
        for i in range(n):
            u[i] = a[p, i] if a[p, i] > 0.0 else 1.0
        for j in range(m):
            v[j] = b[p, j] if b[p, j] > 0.0 else 1.0
        row_cap = col_cap = 1.0
        for turn in range(budget + 1):
            for i in range(n):
                total = 0.0
                for j in range(m):
                    total += kernel[i, j] * v[j]
                rows[i] = total
            before[:] = u
            row_cap, error[p] = _update(rows, a[p], u, kind, parameter, row_cap)
            # The first turn starts from columns that no step has been made for.
            done = turn > 0 and 0.0 <= error[p] <= tol
            if done or error[p] < 0.0 or turn == budget:
                u[:] = before
                break
            cols[:] = 0.0
            for i in range(n):
                scale = u[i]
                for j in range(m):
                    cols[j] += scale * kernel[i, j]
            col_cap, moved = _update(cols, b[p], v, kind, parameter, col_cap)
            iterations[p] = turn + 1
            if moved < 0.0:
                error[p] = -1.0
                break
        col_mass[p] = 0.0
        for i in range(n):
            total = 0.0
            for j in range(m):
                mass = kernel[i, j] * u[i] * v[j]
                kernel[i, j] = mass
                col_mass[p, j] += mass
                total += mass
            row_mass[p, i] = total


def iterate(
    plan: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    kind: int,
    parameter: float,
    budget: int,
    tol: float,
) -> tuple[np.ndarray, ...]:
    """Iterate every problem until an update moves less than ``tol`` of its mass, or ``budget`` times.

    Args:
        plan: ``(B, n, m)`` float64, ``P0``; the plan on return.
        a: ``(B, n)`` float64 weights of the rows; rows of weight 0 take no part and are 0 in ``P0``.
        b: ``(B, m)`` weights of the columns.
        kind: `BALANCED`, `KL_RELAXED` or `UPPER_BOUNDED`.
        parameter: the rate of `KL_RELAXED`, the mass of `UPPER_BOUNDED`.
        budget: iterations.
        tol: share of the mass.

    Returns:
        ``u`` ``(B, n)`` and ``v`` ``(B, m)``; the share of the mass that one more update would move, ``(B,)``, negative
        where scalings grew out of range (the problem then needs the log domain from the start); iterations ``(B,)``;
        and the plan's row and column sums, ``(B, n)`` and ``(B, m)``.
    """
    problems, n, m = plan.shape
    u, v = np.empty((problems, n)), np.empty((problems, m))
    error, iterations = np.empty(problems), np.zeros(problems, np.int64)
    sums = np.empty((problems, n)), np.empty((problems, m))

    def solve(begin: int, stop: int) -> None:
        _solve(plan, a, b, kind, parameter, budget, tol, begin, stop, u, v, error, iterations, *sums)

    run_slices(solve, np.ones(problems))
    return u, v, error, iterations, *sums
