"""Exact minimum-cost matchings of a given cardinality, for a batch of problems.

A matching with k pairs of n rows and columns is an assignment in which q = n - k rows go to a sink D at no cost and q
columns are filled from a source R at no cost. Two stages a problem, as for the full assignment:

1. for large problems, the epsilon-scaled auction on the matrix with q copies of D and of R, in float32, for prices
   that are nearly optimal;
2. an exact finish in float64 in which D and R are single nodes with capacity q: their copies are identical, and a
   shortest-path search would visit every one of them at the same distance. One more such path, from D to R, gives
   the matching with one pair more.

Dual variables certify the result, like the assignments of `mbot.kernels.assignment`.
"""

from __future__ import annotations

import numpy as np

from mbot.kernels.assignment import COLD_EPSILON, auction, relax, unusual
from mbot.kernels.scans import BLOCK, OPTIONS, least_of, total_of, two_smallest
from mbot.kernels.threads import run_slices
from minibatch_transport import compiled

_COLD = 80  # up to this many rows the finish is faster from zero prices than the auction and the finish together


@compiled(**OPTIONS)
def _start(cost, low, scale, q, work):  # type: ignore[no-untyped-def]
    """Column prices and the price of D from an auction on the augmented matrix; in units of the cost."""
    n = cost.shape[0]
    size = n + q
    scaled = work[: size * size].reshape(size, size)
    # The cost of going to D is free to choose; near the cost of a marginal pair few rows fight over it.
    smallest = np.empty(n)
    top = 0.0
    for i in range(n):
        least = np.inf
        for j in range(n):
            s = (cost[i, j] - low) * scale
            scaled[i, j] = s
            least = min(least, s)
            top = max(top, s)
        smallest[i] = least
    smallest.sort()
    outside = 1.5 * smallest[n - q - 1] if n > q else 0.0
    scaled[:n, n:] = outside
    scaled[n:, :n] = outside
    scaled[n:, n:] = 2 * top + 1
    price = np.zeros(size, np.float32)
    auction(scaled, price, COLD_EPSILON, np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.int64))
    return price


@compiled(**OPTIONS)
def _group_minimum(cost, col_of, group_cost, group_row, only):  # type: ignore[no-untyped-def]
    """Cheapest member of D for every column (``only`` < 0), or for the columns whose cheapest member was ``only``."""
    n = cost.shape[0]
    if only < 0:
        group_cost[:] = np.inf
        group_row[:] = -1
    else:
        for j in range(n):
            if group_row[j] == only:
                group_cost[j] = np.inf
                group_row[j] = -2
    for i in range(n):
        if col_of[i] == n:
            for j in range(n):
                if (only < 0 or group_row[j] == -2 or group_row[j] >= 0) and cost[i, j] < group_cost[j]:
                    group_cost[j] = cost[i, j]
                    group_row[j] = i


@compiled(**OPTIONS)
def _finish(cost, q, price, col_of, row_of, dist, open_dist, taker, free, zero, group_cost, group_row):  # type: ignore[no-untyped-def]
    """Exact matching with n - q pairs from any prices. Returns the levels of D and R: ``theta`` and ``tau``."""
    n = cost.shape[0]
    # R fills columns of the highest price: give the q highest one common price.
    tau = np.sort(price)[n - q]
    for j in range(n):
        price[j] = min(price[j], tau)
        row_of[j] = -1
    best, want = dist, taker
    for i in range(n):
        first, _, j = two_smallest(cost[i], price, n)
        best[i] = first
        want[i] = j
    # D takes the q rows whose best pair is the most expensive.
    order = np.argsort(best[:n])
    theta = best[order[n - q]]
    for t in range(n - q, n):
        col_of[order[t]] = n
    unmatched = 0
    for t in range(n - q):
        i = order[t]
        if row_of[want[i]] < 0:
            row_of[want[i]] = i
            col_of[i] = want[i]
        else:
            col_of[i] = -1
            free[unmatched] = i
            unmatched += 1
    supply = q
    for j in range(n):
        if row_of[j] < 0 and price[j] == tau and supply > 0:
            row_of[j] = n
            supply -= 1

    for _ in range(2):  # augmenting row reduction, with D as one more place to go
        todo, unmatched, k, steps = unmatched, 0, 0, 0
        while k < todo:
            i = free[k]
            k += 1
            first, second, j = two_smallest(cost[i], price, n)
            if theta <= first:
                free[unmatched] = i
                unmatched += 1
                continue
            second = min(second, theta)
            loser = row_of[j]
            lowered = price[j] - (second - first)
            strict = lowered < price[j]
            if strict:
                price[j] = lowered
            elif loser == n:
                free[unmatched] = i
                unmatched += 1
                continue
            row_of[j] = i
            col_of[i] = j
            if loser == n:
                supply += 1
            elif loser >= 0:
                col_of[loser] = -1
                steps += 1
                if strict and steps < 20 * n:
                    k -= 1
                    free[k] = loser
                else:
                    free[unmatched] = loser
                    unmatched += 1

    _group_minimum(cost, col_of, group_cost, group_row, -1)
    for f in range(unmatched + supply):  # shortest augmenting paths from the free rows, then from R
        start = free[f] if f < unmatched else n
        for j in range(n):
            h = cost[start, j] - price[j] if start < n else -price[j]
            dist[j] = h
            open_dist[j] = h
            taker[j] = start
        # Distance of D, the row that would enter it, and whether the way through D has been taken: once it has, rounding
        # must not find a shorter way to D, which would be a circle.
        sink, sink_taker, passed = np.inf, -1, False
        if start < n:
            sink, sink_taker = theta, start
        source_at = -2 if start == n else -1  # the column through which R was reached
        while True:
            least, _, end = two_smallest(open_dist, zero, n)
            if not passed and sink < least:
                passed = True
                shift = theta - sink
                for j in range(n):
                    h = group_cost[j] - price[j] - shift
                    better = (h < dist[j]) & (open_dist[j] < np.inf)
                    dist[j] = h if better else dist[j]
                    open_dist[j] = h if better else open_dist[j]
                    taker[j] = group_row[j] if better else taker[j]
                continue
            i = row_of[end]
            if i < 0:
                break
            open_dist[end] = np.inf  # settled
            if i == n:
                if source_at != -1:
                    continue
                source_at = end
                shift = -price[end] - least
                relax(zero, price, shift, dist, open_dist, taker, n)
                continue
            row = cost[i]
            shift = row[end] - price[end] - least
            relax(row, price, shift, dist, open_dist, taker, i)
            if not passed and theta - shift < sink:
                sink, sink_taker = theta - shift, i
        level = least
        for j in range(n):
            if dist[j] < level:
                price[j] += dist[j] - level
        if sink < level:
            theta += level - sink
        if source_at >= 0:
            tau += min(dist[source_at] - level, 0.0)
        elif source_at == -2:
            tau = -level
        while True:  # trace back
            i = taker[end]
            row_of[end] = i
            if i == n:
                if start == n:
                    break
                end = source_at
                continue
            previous = col_of[i]
            col_of[i] = end
            if previous == n:  # i leaves D; another row enters
                entering = sink_taker
                previous = col_of[entering]
                col_of[entering] = n
                _group_minimum(cost, col_of, group_cost, group_row, i)
                for j in range(n):
                    if cost[entering, j] < group_cost[j]:
                        group_cost[j] = cost[entering, j]
                        group_row[j] = entering
                i = entering
            if i == start:
                break
            end = previous
    return theta, tau


@compiled(**OPTIONS)
def _one_more(cost, price, col_of, row_of, dist, open_dist, taker, zero, group_cost, group_row):  # type: ignore[no-untyped-def]
    """Turn an optimal matching into one with one pair more, along the shortest path from D to R. Returns D's level."""
    n = cost.shape[0]
    for j in range(n):
        dist[j] = group_cost[j] - price[j]
        open_dist[j] = dist[j]
        taker[j] = group_row[j]
    while True:
        least, _, end = two_smallest(open_dist, zero, n)
        i = row_of[end]
        if i == n:
            break
        open_dist[end] = np.inf  # settled
        row = cost[i]
        shift = row[end] - price[end] - least
        relax(row, price, shift, dist, open_dist, taker, i)
    for j in range(n):
        if dist[j] < least:
            price[j] += dist[j] - least
    while True:  # trace back to the row that leaves D
        i = taker[end]
        row_of[end] = i
        previous = col_of[i]
        col_of[i] = end
        if previous == n:
            return least
        end = previous


@compiled(**OPTIONS)
def _write(cost, theta, tau, price, col_of, column, u, v):  # type: ignore[no-untyped-def]
    """Write the matching and its dual variables.

    Row duals are at most theta, those of unmatched rows equal it; prices and tau likewise.
    """
    n = cost.shape[0]
    for j in range(n):
        price[j] = min(price[j], tau)
        v[j] = price[j]
    for i in range(n):
        least, _, _ = two_smallest(cost[i], price, n)
        u[i] = min(least, theta)
        column[i] = -1 if col_of[i] == n else col_of[i]


@compiled(**OPTIONS)
def room_for(n, q):  # type: ignore[no-untyped-def]
    """Arrays that solving problems of n rows, q of them unmatched, works in."""
    work, real, whole = np.empty((n + q) ** 2, np.float32), np.empty((4, n)), np.empty((5, n), np.int64)
    zero = np.zeros(max(n, BLOCK))
    return work, real[0], real[1], real[2], real[3], whole[0], whole[1], whole[2], whole[3], whole[4], zero


@compiled(**OPTIONS)
def match_one(cost, low, excess, q, room, column, u, v):  # type: ignore[no-untyped-def]
    """A problem of ordinary costs, given their least and how far their mean is above it; see `match`.

    Args:
        cost: ``(n, n)``.
        low: least cost.
        excess: mean cost minus ``low``.
        q: rows that stay unmatched.
        room: from `room_for`.
        column: ``(E, n)`` int64, written.
        u: ``(n,)`` row duals, written.
        v: ``(n,)`` column duals, written.
    """
    n = cost.shape[0]
    work, dist, open_dist, group_cost, price, row_of, taker, free, group_row, col_of, zero = room
    price[:] = 0.0
    if excess > 0 and n > _COLD:
        start = _start(cost, low, 1.0 / excess, q, work)
        for j in range(n):
            price[j] = start[j] * excess
    theta, tau = _finish(cost, q, price, col_of, row_of, dist, open_dist, taker, free, zero, group_cost, group_row)
    _write(cost, theta, tau, price, col_of, column[0], u, v)
    if len(column) > 1:
        theta = _one_more(cost, price, col_of, row_of, dist, open_dist, taker, zero, group_cost, group_row)
        _write(cost, theta, tau, price, col_of, column[1], u, v)


@compiled(**OPTIONS)
def _solve(flat, size, q, capped, begin, stop, column, row_dual, col_dual):  # type: ignore[no-untyped-def]
    n, room = size, room_for(size, q)
    for p in range(begin, stop):
        entries = flat[p * n * n : (p + 1) * n * n]
        low, total = least_of(entries, room[-1]), total_of(entries)
        if not capped and unusual(entries, low, total):
            column[:, p] = -1
            row_dual[p], col_dual[p] = np.nan, np.nan
            continue
        cost, excess = entries.reshape(n, n), total / (n * n) - low
        match_one(cost, low, excess, q, room, column[:, p], row_dual[p], col_dual[p])


def match(
    flat: np.ndarray, size: int, cardinality: int, more: bool = False, capped: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Minimum-cost matchings with exactly ``cardinality`` pairs of square problems of one size.

    Args:
        flat: cost matrices one after another, row by row; float32 or float64, contiguous.
        size: rows n of each problem.
        cardinality: pairs k, ``0 < k < n``.
        more: solve for k + 1 pairs too.
        capped: see `mbot.kernels.assignment.assign`.

    Returns:
        ``column`` ``(E, B, n)`` with E = 1 or, with ``more``, 2 cardinalities, -1 for unmatched rows; and dual
        variables ``f, g`` ``(B, n)`` with ``f + g <= cost``, optimal for both.
    """
    problems = len(flat) // (size * size)
    column = np.empty((1 + more, problems, size), np.int64)
    f, g = np.empty((2, problems, size))

    def solve(begin: int, stop: int) -> None:
        _solve(flat, size, size - cardinality, capped, begin, stop, column, f, g)

    run_slices(solve, [1.0] * problems)
    return column, f, g
