"""Exact linear assignment for a batch of dense cost matrices, compiled with numba.

Two stages a problem:

1. an auction with epsilon-scaling (Bertsekas 1988) in float32 on costs scaled to least 0 and mean 1, from the mean
   costs of the columns: prices that are nearly optimal, for about 15 to 40 vectorised scans a row;
2. an exact finish in float64 from those prices (Jonker and Volgenant 1987): greedy matching on each row's cheapest
   column, augmenting row reduction, then shortest augmenting paths for the rows that are left, usually a handful.

Stage 1 only decides how short stage 2 is: the result is optimal whatever the prices. The final prices are dual
variables, by which `mbot.certify` certifies it.
"""

from __future__ import annotations

import numpy as np

from mbot.kernels import HUGE, LARGEST_COST, SAMPLE, SMALL
from mbot.kernels.scans import BLOCK, OPTIONS, least_of, total_of, two_smallest
from mbot.kernels.threads import run_slices
from minibatch_transport import compiled

# First epsilon of an auction that starts from the columns' mean costs, or from no prices; in units of the mean minus
# the least cost.
FIRST_EPSILON, COLD_EPSILON = 0.05, 0.25
_PART = 0.8  # of the mean prices, the best over clouds in 2 to 3072 features
_FEW = 48  # up to this many rows the finish is as fast without the auction if it begins with half the rows matched
_FACTOR, _STOP, _SMALL_STOP = 0.15, 0.1, 0.3  # ratio of the steps; the last one, times n, of large and small problems


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
def auction(cost, price, epsilon, col_of, row_of, queue):  # type: ignore[no-untyped-def]
    """Epsilon-scaled auction from given prices: near-optimal ones are left. ``cost`` has least 0 and mean 1."""
    n = cost.shape[0]
    last = max((_STOP if n > _FEW else _SMALL_STOP) / n, 1e-5)
    while True:
        for i in range(n):
            col_of[i] = -1
            row_of[i] = -1
            queue[i] = i
        head, waiting, bids = 0, n, 0
        while waiting > 0 and bids < 64 * n:  # the bound only guards against price wars; the finish is exact
            # Two rows bid on the same prices: their scans overlap in the processor. Prices only fall, so the second
            # bid stays valid unless both want the same column.
            i = queue[head]
            first, second, j = two_smallest(cost[i], price, n)
            rival, other_j = -1, -1
            other_first, other_second = first, second
            if waiting > 1:
                rival = queue[head + 1 if head + 1 < n else 0]
                other_first, other_second, other_j = two_smallest(cost[rival], price, n)
            for turn in range(2):
                if turn == 1:
                    if rival < 0 or other_j == j:
                        break
                    i, first, second, j = rival, other_first, other_second, other_j
                head = head + 1 if head + 1 < n else 0
                waiting -= 1
                bids += 1
                price[j] -= (second - first) + epsilon
                loser = row_of[j]
                row_of[j] = i
                col_of[i] = j
                if loser >= 0:
                    col_of[loser] = -1
                    tail = head + waiting
                    queue[tail - n if tail >= n else tail] = loser
                    waiting += 1
        if epsilon <= last:
            return
        epsilon *= _FACTOR


@compiled(**OPTIONS)
def relax(row, price, shift, dist, open_dist, parent, via):  # type: ignore[no-untyped-def]
    """Shorten the distances of the columns that are not settled yet by going through the row ``via``."""
    for j in range(len(dist)):
        h = row[j] - price[j] - shift
        better = (h < dist[j]) & (open_dist[j] < np.inf)
        dist[j] = h if better else dist[j]
        open_dist[j] = h if better else open_dist[j]
        parent[j] = via if better else parent[j]


@compiled(**OPTIONS)
def mean_prices(cost, total, price):  # type: ignore[no-untyped-def]
    """Prices to start from: a part of the columns' mean costs, less the mean of all.

    Of costs ``f_i + g_j`` the whole of them would be optimal.
    """
    n = cost.shape[0]
    price[:] = 0.0
    for i in range(n):
        row = cost[i]
        for j in range(n):
            price[j] += row[j]
    for j in range(n):
        price[j] = _PART * (price[j] / n - total / (n * n))


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
def _finish(cost, price, col_of, row_of, dist, open_dist, parent, free, unmatched, zero):  # type: ignore[no-untyped-def]
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
        row = cost[start]
        for j in range(n):
            h = row[j] - price[j]
            dist[j] = h
            open_dist[j] = h
            parent[j] = start
        while True:
            least, _, end = two_smallest(open_dist, zero, n)
            i = row_of[end]
            if i < 0:
                break
            open_dist[end] = np.inf  # settled
            row = cost[i]
            shift = row[end] - price[end] - least
            relax(row, price, shift, dist, open_dist, parent, i)
        for j in range(n):
            if open_dist[j] == np.inf:
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
    whole, real = np.empty((3, largest), np.int64), np.empty((2, largest), np.float64)
    scaled, narrow = np.empty(largest * largest, np.float32), np.empty(largest, np.float32)
    return scaled, narrow, real[0], real[1], whole[0], whole[1], whole[2], np.zeros(max(largest, BLOCK))


@compiled(**OPTIONS, inline="always")
def both_stages(cost, low, excess, price, epsilon, col_of, room):  # type: ignore[no-untyped-def]
    """An auction from the prices with first step ``epsilon`` ``excess`` (mean minus least cost), and the finish."""
    n = cost.shape[0]
    scaled_flat, price32, dist, open_dist, row_of, parent, free, zero = room
    left = _greedy(cost, price, col_of, row_of, free) if n <= _FEW else n
    if excess > 0 and left > n // 2:
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
    _finish(cost, price, col_of, row_of[:n], dist[:n], open_dist[:n], parent[:n], free[:n], left, zero)


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
    low, total, mean = least_of(entries, room[7]), total_of(entries), 0.0
    if epsilon >= FIRST_EPSILON:
        mean_prices(cost, total, price)
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
        low = least_of(entries, room[7])
        total = total_of(entries)
        excess = total / (n * n) - low
        if not capped and unusual(entries, low, total):
            for i in range(n):
                col_of[i], row_dual[at + i], price[i] = i, np.nan, np.nan
            continue
        price[:] = 0.0
        if not capped:  # caps would make up the means
            mean_prices(cost, total, price)
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
