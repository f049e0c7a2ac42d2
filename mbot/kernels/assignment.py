"""Exact linear assignment for a batch of dense cost matrices, compiled with numba.

Two stages a problem:

1. an auction with epsilon-scaling (Bertsekas 1988) in float32 on costs scaled to least 0 and mean 1, from the mean
   costs of the columns: prices that are nearly optimal, for a few vectorised scans a row;
2. an exact finish in float64 from those prices (Jonker and Volgenant 1987): greedy matching on each row's cheapest
   column, augmenting row reduction, then shortest augmenting paths for the rows that are left, usually a handful.

Stage 1 only decides how short stage 2 is: the result is optimal whatever the prices. The final prices are dual
variables, by which `mbot.certify` certifies it.
"""

from __future__ import annotations

import numpy as np

from mbot.kernels import HUGE, LARGEST_COST, SAMPLE, SMALL
from mbot.kernels.auctions import auction
from mbot.kernels.scans import BLOCK, OPTIONS, least_of, relaxed, total_of, two_smallest
from mbot.kernels.threads import run_slices
from minibatch_transport import compiled

# First epsilon of an auction that starts from the columns' mean costs, or from no prices; in units of the mean minus
# the least cost.
FIRST_EPSILON, COLD_EPSILON = 0.025, 0.25
PART = 0.8  # of the mean prices, the best over clouds in 2 to 3072 features
# Up to so many rows the finish is as fast without the auction if it begins with no more than this share to match.
_FEW, _LEFT = 24, 7 / 16


@compiled(nogil=True, error_model="numpy")
def unusual(entries, low, total):  # type: ignore[no-untyped-def]
    """Whether costs are not finite, or few of them huge, given their least, their sum and a sample."""
    count, small = len(entries), 0
    excess, step = total / count - low, count // SAMPLE + 1
    if not (abs(low) <= LARGEST_COST and excess <= LARGEST_COST):  # or NaN
        return True
    for k in range(SAMPLE):
        above = np.float64(entries[k * step % count]) - low
        small += above > 0.0 and above * HUGE < excess
    return SMALL * small >= SAMPLE


@compiled(**OPTIONS)
def mean_prices(cost, total, part, price):  # type: ignore[no-untyped-def]
    """Prices to start from: ``part`` of the columns' mean costs, less the mean of all.

    Of costs ``f_i + g_j`` the whole of them would be optimal.
    """
    n = cost.shape[0]
    price[:] = 0.0
    for i in range(n):
        row = cost[i]
        for j in range(n):
            price[j] += row[j]
    for j in range(n):
        price[j] = part * (price[j] / n - total / (n * n))


@compiled(**OPTIONS)
def _greedy(cost, price, col_of, row_of, free):  # type: ignore[no-untyped-def]
    """Match rows with their cheapest columns, the first of them where several want one. Returns how many are left."""
    n = cost.shape[0]
    for i in range(n):
        col_of[i] = -1
        row_of[i] = -1
    unmatched = 0
    for i in range(n):
        _, _, j = two_smallest(cost[i], price, n)
        if row_of[j] < 0:
            row_of[j] = i
            col_of[i] = j
        else:
            free[unmatched] = i
            unmatched += 1
    return unmatched


@compiled(**OPTIONS)
def _finish(cost, price, col_of, row_of, dist, reach, closed, parent, free, unmatched):  # type: ignore[no-untyped-def]
    """Exact assignment after `_greedy`, from any prices; on return the prices are optimal dual variables."""
    n = cost.shape[0]
    for _ in range(2):  # augmenting row reduction: a bid without epsilon
        todo, unmatched, k, steps = unmatched, 0, 0, 0
        while k < todo:
            i = free[k]
            k += 1
            first, second, j = two_smallest(cost[i], price, n)
            loser = row_of[j]
            lowered = price[j] - (second - first)
            strict = lowered < price[j]
            if strict:
                price[j] = lowered
            row_of[j] = i
            col_of[i] = j
            if loser >= 0:
                col_of[loser] = -1
                steps += 1
                if strict and steps < 20 * n:
                    k -= 1
                    free[k] = loser
                else:
                    free[unmatched] = loser
                    unmatched += 1

    for f in range(unmatched):  # shortest augmenting paths
        start = free[f]
        for j in range(n):
            closed[j] = price[j]
            reach[j] = np.inf
        row, shift, via = cost[start], 0.0, start
        while True:
            least, end = relaxed(row, closed, shift, reach, parent, via)
            via = row_of[end]
            if via < 0:
                break
            dist[end], reach[end], closed[end] = least, np.inf, -np.inf  # settled
            row = cost[via]
            shift = row[end] - price[end] - least
        for j in range(n):
            if closed[j] == -np.inf:
                price[j] += dist[j] - least
        while True:
            i = parent[end]
            row_of[end] = i
            previous = col_of[i]
            col_of[i] = end
            end = previous
            if i == start:
                break


@compiled(**OPTIONS)
def room_for(largest):  # type: ignore[no-untyped-def]
    """Arrays that solving a problem of up to so many rows works in."""
    whole, real = np.empty((3, largest), np.int64), np.empty((3, largest), np.float64)
    scaled, narrow = np.empty(largest * largest, np.float32), np.empty(largest, np.float32)
    return scaled, narrow, real[0], real[1], real[2], whole[0], whole[1], whole[2], np.zeros(max(largest, BLOCK))


@compiled(**OPTIONS, inline="always")
def both_stages(cost, low, excess, price, epsilon, col_of, room):  # type: ignore[no-untyped-def]
    """An auction from the prices with first step ``epsilon`` ``excess`` (mean minus least cost), and the finish."""
    n = cost.shape[0]
    scaled_flat, price32, dist, reach, closed, row_of, parent, free, _ = room
    left = _greedy(cost, price, col_of, row_of, free) if n <= _FEW else n
    if excess > 0 and left > _LEFT * n:
        scale = 1.0 / excess
        entries, scaled = cost.reshape(n * n), scaled_flat[: n * n]
        for e in range(n * n):
            scaled[e] = (entries[e] - low) * scale
        for j in range(n):
            price32[j] = price[j] * scale
        auction(scaled.reshape(n, n), price32[:n], epsilon, col_of, row_of[:n], free[:n])
        for j in range(n):
            price[j] = price32[j] * excess
        left = n
    if left == n:
        left = _greedy(cost, price, col_of, row_of, free)
    _finish(cost, price, col_of, row_of[:n], dist[:n], reach[:n], closed[:n], parent[:n], free[:n], left)


@compiled(**OPTIONS)
def match_from(cost, price, epsilon, col_of, room):  # type: ignore[no-untyped-def]
    """The optimal matching of one square problem of ordinary costs, from prices near its optimal ones.

    Args:
        cost: ``(n, n)`` float32.
        price: ``(n,)`` float64 prices of the columns to start from; optimal ones on return.
        epsilon: first step of the auction, in units of mean minus least cost; from `FIRST_EPSILON` prices are ignored.
        col_of: ``(n,)`` the column of each row, written.
        room: from `room_for`.
    """
    n = cost.shape[0]
    entries = cost.reshape(n * n)
    low, total, mean = least_of(entries, room[8]), total_of(entries), 0.0
    if epsilon >= FIRST_EPSILON:
        mean_prices(cost, total, PART, price)
    for j in range(n):
        mean += price[j] / n
    for j in range(n):
        price[j] -= mean
    both_stages(cost, low, total / (n * n) - low, price, epsilon, col_of, room)


@compiled(**OPTIONS)
def _solve(flat, starts, sizes, points, capped, begin, stop, column, row_dual, col_dual):  # type: ignore[no-untyped-def]
    """Problems ``begin:stop``; problem p is ``flat[starts[p]:]`` as a square of ``sizes[p]`` rows."""
    largest = 1
    for p in range(begin, stop):
        largest = max(largest, sizes[p])
    room = room_for(largest)
    for p in range(begin, stop):
        n = sizes[p]
        at = points[p]
        entries = flat[starts[p] : starts[p] + n * n]
        cost = entries.reshape(n, n)
        col_of = column[at : at + n]
        price = col_dual[at : at + n]
        low = least_of(entries, room[8])
        total = total_of(entries)
        excess = total / (n * n) - low
        if not capped and unusual(entries, low, total):
            for i in range(n):
                col_of[i], row_dual[at + i], price[i] = i, np.nan, np.nan
            continue
        price[:] = 0.0
        if not capped:  # caps would make up the means
            mean_prices(cost, total, PART, price)
        both_stages(cost, low, excess, price, COLD_EPSILON if capped else FIRST_EPSILON, col_of, room)
        for i in range(n):
            row_dual[at + i], _, _ = two_smallest(cost[i], price, n)


def assign(flat: np.ndarray, sizes: np.ndarray, capped: bool = False) -> tuple[np.ndarray, ...]:
    """Minimum-cost perfect matchings of square problems of any sizes.

    Args:
        flat: the cost matrices one after another, row by row; float32 or float64, contiguous.
        sizes: ``(B,)`` int64, rows of each problem; ``sum(sizes ** 2) == len(flat)``.
        capped: costs are finite, and taken as they are; else problems with infinite or huge ones get NaN duals.

    Returns:
        ``column`` (the column of each row), ``row_dual`` and ``col_dual`` (float64), each of length ``sum(sizes)``.
    """
    points = np.concatenate(([0], np.cumsum(sizes)))
    starts = np.concatenate(([0], np.cumsum(sizes * sizes)))
    column = np.empty(points[-1], np.int64)
    row_dual, col_dual = np.empty(points[-1]), np.empty(points[-1])

    def solve(begin: int, stop: int) -> None:
        _solve(flat, starts, sizes, points, capped, begin, stop, column, row_dual, col_dual)

    run_slices(solve, sizes**2.5)
    return column, row_dual, col_dual
