"""Duality gaps of a batch of plans, in one pass over their entries."""

from __future__ import annotations

import numpy as np

from minibatch_transport import compiled

_EPS, _TINY, _LARGEST = (float(getattr(np.finfo(np.float64), name)) for name in ("eps", "tiny", "max"))


@compiled(nogil=True, error_model="numpy")
def _most(x):  # type: ignore[no-untyped-def]
    most = x[0]
    for value in x:
        most = value if value > most else most
    return most


@compiled(nogil=True, error_model="numpy")
def error_of(costs, rows, cols, mass, f, g, left_a, left_b, moved, floor):  # type: ignore[no-untyped-def]
    """Gap between the cost of a plan and its dual value, relative to the cost; see `errors`.

    Args:
        costs: ``(e,)`` float64 of the entries.
        rows: ``(e,)`` int64.
        cols: ``(e,)`` int64.
        mass: ``(e,)`` float64; entries of mass 0 are not looked at.
        f: ``(n,)`` float64 potentials.
        g: ``(m,)`` likewise.
        left_a: ``(n,)`` weights; what the plan does not move is left in it.
        left_b: ``(m,)`` likewise.
        moved: mass of a partial problem, which may leave some everywhere; -1 if all moves.
        floor: cost per mass that a smaller one counts as.
    """
    gap, own, total, rounding = 0.0, 0.0, 0.0, 0.0
    for e in range(len(mass)):
        amount = mass[e]
        if amount > 0:
            i, j = rows[e], cols[e]
            gap += amount * (costs[e] - f[i] - g[j])
            own += amount * abs(costs[e])
            rounding += amount * (abs(f[i]) + abs(g[j]))
            total += amount
            left_a[i] -= amount
            left_b[j] -= amount
    stray = abs(total - moved) if moved >= 0 else 0.0
    top_f, top_g = (_most(f), _most(g)) if moved >= 0 else (0.0, 0.0)  # the potentials of what is left behind
    for i in range(len(f)):
        gap += left_a[i] * (top_f - f[i])
        stray += abs(left_a[i]) if moved < 0 or left_a[i] < 0 else 0.0
    for j in range(len(g)):
        gap += left_b[j] * (top_g - g[j])
        stray += abs(left_b[j]) if moved < 0 or left_b[j] < 0 else 0.0
    error = (abs(gap) + _EPS * rounding) / max(own, floor * total, _TINY) + stray / total
    return min(error, _LARGEST) if abs(gap) < np.inf else np.inf


@compiled(nogil=True, error_model="numpy")
def errors(flat, start, stride, row, col, mass, f, g, a, b, moved, floor):  # type: ignore[no-untyped-def]
    """Gap between the cost of each plan and its dual value, relative to the cost.

    By complementary slackness the gap is ``sum P (C - f - g)``, less what is missing at the points times their
    potentials, so nothing large cancels. Two terms are added: what rounding may hide of it, and the share of the mass
    that violates the marginals.

    Args:
        flat: costs; entry e of problem p costs ``flat[start[p] + stride[p] * row + col]``, or ``flat[start[p] + e]``
            if the stride is 0.
        start: ``(B,)`` int64.
        stride: ``(B,)`` int64.
        row: ``(B, e)`` int64; ``(0, 0)`` if entry e is in row e.
        col: ``(B, e)`` int64.
        mass: ``(B, e)`` float64.
        f: ``(B, n)`` float64 potentials.
        g: ``(B, m)`` likewise.
        a: ``(B, n)`` float64 weights, or ``(0, 0)`` for 1 a point.
        b: ``(B, m)`` likewise.
        moved: mass of partial problems, which may leave some everywhere; -1 if all moves.
        floor: ``(B,)`` float64, cost per mass that a smaller one counts as.

    Returns:
        ``(B,)`` float64; ``+inf`` where a forbidden pair is used or potentials are NaN.
    """
    entries = mass.shape[1]
    found, costs, ordered = np.empty(len(mass)), np.zeros(entries), np.arange(entries)
    left_a, left_b = np.empty(f.shape[1]), np.empty(g.shape[1])
    for p in range(len(mass)):
        left_a[:] = 1.0
        left_b[:] = 1.0
        if len(a):
            # One by one: numba would compile the message of a shape error of the slices, which takes the longest.
            for i in range(len(left_a)):
                left_a[i] = a[p, i]
            for j in range(len(left_b)):
                left_b[j] = b[p, j]
        rows = row[p] if len(row) else ordered
        for e in range(entries):
            if mass[p, e] > 0:
                costs[e] = flat[start[p] + (stride[p] * rows[e] + col[p, e] if stride[p] else e)]
        found[p] = error_of(costs, rows, col[p], mass[p], f[p], g[p], left_a, left_b, moved, floor[p])
    return found
