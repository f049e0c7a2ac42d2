"""Exact minimum-cost matchings of a given cardinality, for a batch of problems.

A matching with k pairs of n rows and columns is an assignment in which q = n - k rows go to a sink D at no cost and q
columns are filled from a source R at no cost. Two stages a problem, as for the full assignment:

1. for prices that are nearly optimal, the epsilon-scaled auction in float32; small problems start from the mean costs
   of the columns. The places of D are bid for as one object and R bids as one person (Bertsekas and Castanon 1989):
   copies of them that compete with each other would make most bids;
2. an exact finish in float64 in which D and R are single nodes with capacity q: their copies are identical, and a
   shortest-path search would visit every one of them at the same distance. One more such path, from D to R, gives
   the matching with one pair more.

Dual variables certify the result, like the assignments of `mbot.kernels.assignment`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mbot.kernels.assignment import mean_prices, unusual
from mbot.kernels.auctions import partial_auction, smallest
from mbot.kernels.scans import BLOCK, OPTIONS, least_of, relaxed, total_of, two_smallest
from mbot.kernels.threads import run_slices
from minibatch_transport import compiled

_PART = 0.5  # of the mean prices, the best over clouds in 2 and 64 features
_CHUNK = 1 << 15  # costs
_FEW = 16  # up to this many pairs the finish is faster from mean prices than after an auction


@compiled(**OPTIONS)
def _finish(cost, q, price, col_of, row_of, dist, reach, closed, taker, free, zero, group_cost, group_row):  # type: ignore[no-untyped-def]
    """Exact matching with n - q pairs from any prices. Returns the levels of D and R: ``theta`` and ``tau``."""
    n = cost.shape[0]
    # R fills columns of the highest price: give the q highest one common price.
    for j in range(n):
        dist[j] = price[j]
    tau = smallest(dist, n - q)
    for j in range(n):
        price[j] = min(price[j], tau)
        row_of[j] = -1
    best, want = reach, taker
    for i in range(n):
        best[i], _, want[i] = two_smallest(cost[i], price, n)
        dist[i] = best[i]
    # D takes the q rows whose best pair is the most expensive.
    theta = smallest(dist, n - q)
    room = q
    for i in range(n):
        room -= best[i] > theta
    unmatched = 0
    for i in range(n):
        if best[i] > theta or (best[i] == theta and room > 0):
            room -= best[i] == theta
            col_of[i] = n
        elif row_of[want[i]] < 0:
            row_of[want[i]] = i
            col_of[i] = want[i]
        else:  # the cheaper pair stays
            other = row_of[want[i]]
            if best[i] < best[other]:
                row_of[want[i]], col_of[i] = i, want[i]
                col_of[other], free[unmatched] = -1, other
            else:
                col_of[i], free[unmatched] = -1, i
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

    group_cost[:] = np.inf  # of each column, the cheapest row in D
    for i in range(n):
        if col_of[i] == n:
            relaxed(cost[i], zero, 0.0, group_cost, group_row, i)
    for f in range(unmatched + supply):  # shortest augmenting paths from the free rows, then from R
        start = free[f] if f < unmatched else n
        for j in range(n):
            closed[j] = price[j]
            reach[j] = np.inf
        # Distance of D, the row that would enter it, and whether the way through D has been taken. After that
        # rounding must find no shorter way to D, which would be a circle.
        sink, sink_taker, passed = np.inf, -1, False
        row = zero
        if start < n:
            row, sink, sink_taker = cost[start], theta, start
        source_at = -2 if start == n else -1  # the column through which R was reached
        shift, via = 0.0, start
        while True:
            least, end = relaxed(row, closed, shift, reach, taker, via)
            if not passed and sink < least:
                row, shift, via, passed = group_cost, theta - sink, n + 1, True
                continue
            via = row_of[end]
            if via < 0:
                break
            dist[end], reach[end], closed[end] = least, np.inf, -np.inf  # settled
            row, shift = zero, -price[end] - least
            if via < n:
                row = cost[via]
                shift += row[end]
                if not passed and theta - shift < sink:
                    sink, sink_taker = theta - shift, via
            elif source_at == -1:
                source_at = end
            else:
                shift = -np.inf  # nothing gets nearer through R again
        for j in range(n):
            if closed[j] == -np.inf and dist[j] < least:
                price[j] += dist[j] - least
        if sink < least:
            theta += least - sink
        if source_at >= 0:
            tau += min(dist[source_at] - least, 0.0)
        elif source_at == -2:
            tau = -least
        while True:  # trace back
            i = taker[end]
            if i == n + 1:
                i = group_row[end]
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
                _exchange(cost, col_of, group_cost, group_row, i, entering)
                i = entering
            if i == start:
                break
            end = previous
    return theta, tau


@compiled(**OPTIONS)
def _exchange(cost, col_of, group_cost, group_row, left, entered):  # type: ignore[no-untyped-def]
    """The cheapest rows in D once ``left`` has left it and ``entered`` has entered it."""
    n = cost.shape[0]
    for j in range(n):
        if group_row[j] == left:
            group_cost[j] = np.inf
            for i in range(n):
                if col_of[i] == n and cost[i, j] < group_cost[j]:
                    group_cost[j], group_row[j] = cost[i, j], i
        elif cost[entered, j] < group_cost[j]:
            group_cost[j], group_row[j] = cost[entered, j], entered


@compiled(**OPTIONS)
def _one_more(cost, price, col_of, row_of, dist, reach, closed, taker, group_cost, group_row):  # type: ignore[no-untyped-def]
    """Turn an optimal matching into one with one pair more, along the shortest path from D to R. Returns D's level."""
    n = cost.shape[0]
    for j in range(n):
        closed[j] = price[j]
        reach[j] = np.inf
    row, shift, via = group_cost, 0.0, n + 1
    while True:
        least, end = relaxed(row, closed, shift, reach, taker, via)
        via = row_of[end]
        if via == n:
            break
        dist[end], reach[end], closed[end] = least, np.inf, -np.inf  # settled
        row = cost[via]
        shift = row[end] - price[end] - least
    for j in range(n):
        if closed[j] == -np.inf and dist[j] < least:
            price[j] += dist[j] - least
    while True:  # trace back to the row that leaves D
        i = taker[end] if taker[end] <= n else group_row[end]
        row_of[end] = i
        previous = col_of[i]
        col_of[i] = end
        if previous == n:
            return least
        end = previous


@compiled(**OPTIONS)
def _write(cost, theta, tau, price, col_of, column, u):  # type: ignore[no-untyped-def]
    """Write the matching and its dual variables.

    Row duals are at most theta, those of unmatched rows equal it; prices and tau likewise.
    """
    n = cost.shape[0]
    for j in range(n):
        price[j] = min(price[j], tau)
    for i in range(n):
        least, _, _ = two_smallest(cost[i], price, n)
        u[i] = min(least, theta)
        column[i] = -1 if col_of[i] == n else col_of[i]


@compiled(nogil=True, error_model="numpy")
def _measured(flat, capped, least, excess):  # type: ignore[no-untyped-def]
    """Least cost of each problem, and how far the mean is above it: -1 where costs are infinite or huge."""
    cells, zero = len(flat) // len(least), np.zeros(BLOCK)
    for p in range(len(least)):
        entries = flat[p * cells : (p + 1) * cells]
        low, total = least_of(entries, zero), total_of(entries)
        least[p] = low
        excess[p] = -1.0 if not capped and unusual(entries, low, total) else max(total / cells - low, 0.0)


@compiled(**OPTIONS)
def _start(flat, least, excess, q, prices):  # type: ignore[no-untyped-def]
    """Prices near the optimal ones, by auctions."""
    n = prices.shape[1]
    scaled, zero, best = np.empty((n, n), np.float32), np.zeros(max(n, BLOCK), np.float32), np.empty(n)
    price, open_price, level = np.empty(n, np.float32), np.empty(n, np.float32), np.empty(q, np.float32)
    row_of, queue, taken = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(q, np.int64)
    for p in range(len(prices)):
        if excess[p] > 0:
            scale, low, at = 1.0 / excess[p], least[p], p * n * n
            for i in range(n):
                for j in range(n):
                    scaled[i, j] = (flat[at + i * n + j] - low) * scale
            price[:] = 0.0
            partial_auction(scaled, price, open_price, level, zero, best, row_of, queue, taken)
            for j in range(n):
                prices[p, j] = price[j] * excess[p]


@compiled(**OPTIONS)
def _start_few(flat, least, excess, prices):  # type: ignore[no-untyped-def]
    """Prices by the mean costs of the columns."""
    n = prices.shape[1]
    for p in range(len(prices)):
        if excess[p] > 0:
            cost = flat[p * n * n : (p + 1) * n * n].reshape(n, n)
            mean_prices(cost, (least[p] + excess[p]) * (n * n), _PART, prices[p])


@compiled(**OPTIONS)
def _end(flat, excess, q, column, row_dual, col_dual):  # type: ignore[no-untyped-def]
    """The matchings, from prices of the columns in ``col_dual``."""
    more, n = column.shape[1] > 1, column.shape[2]
    zero, dist, reach, closed, group_cost = np.zeros(max(n, BLOCK)), np.empty(n), np.empty(n), np.empty(n), np.empty(n)
    row_of, taker, free = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.int64)
    group_row, col_of = np.empty(n, np.int64), np.empty(n, np.int64)
    for p in range(len(column)):
        if excess[p] < 0:
            column[p] = -1
            row_dual[p], col_dual[p] = np.nan, np.nan
            continue
        cost, price = flat[p * n * n : (p + 1) * n * n].reshape(n, n), col_dual[p]
        theta, tau = _finish(
            cost, q, price, col_of, row_of, dist, reach, closed, taker, free, zero, group_cost, group_row
        )
        for e in range(1 + more):
            if e == 1:
                theta = _one_more(cost, price, col_of, row_of, dist, reach, closed, taker, group_cost, group_row)
            _write(cost, theta, tau, price, col_of, column[p, e], row_dual[p])


def solve(
    flat: np.ndarray, q: int, capped: bool, column: np.ndarray, row_dual: np.ndarray, col_dual: np.ndarray
) -> None:
    """Solve problems one after another; see `match`.

    Args:
        flat: ``(B n n,)`` float64 costs.
        q: rows that stay unmatched.
        capped: see `mbot.kernels.assignment.assign`; else problems with infinite or huge costs get NaN duals.
        column: ``(B, E, n)`` int64, written.
        row_dual: ``(B, n)``, written.
        col_dual: ``(B, n)``, written.
    """
    least, excess = np.empty((2, len(column)))
    _measured(flat, capped, least, excess)
    col_dual[:] = 0
    if column.shape[2] - q > _FEW:  # a function of its own: small problems need not compile it
        _start(flat, least, excess, q, col_dual)
    elif not capped:  # caps would make up the means
        _start_few(flat, least, excess, col_dual)
    _end(flat, excess, q, column, row_dual, col_dual)


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
    problems, cells = len(flat) // (size * size), size * size
    column = np.empty((problems, 1 + more, size), np.int64)
    f, g = np.empty((2, problems, size))

    def some(begin: int, stop: int) -> None:
        for first, last in chunks(begin, stop, size):  # one type, as compiling takes seconds, and little memory
            costs = flat[first * cells : last * cells].astype(np.float64, copy=False)
            solve(costs, size - cardinality, capped, column[first:last], f[first:last], g[first:last])

    run_slices(some, [1.0] * problems)
    return column.swapaxes(0, 1), f, g


def chunks(begin: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """Ranges of problems of so many rows whose costs stay in the processor's cache."""
    step = max(1, _CHUNK // size**2)
    for first in range(begin, stop, step):
        yield first, min(first + step, stop)
