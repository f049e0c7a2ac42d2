"""Auctions with epsilon-scaling (Bertsekas 1988) in float32: prices that are nearly optimal, for the exact finish."""

from __future__ import annotations

import numpy as np

from mbot.kernels.scans import OPTIONS, two_smallest
from minibatch_transport import compiled

_TOGETHER = 4  # rows that bid at a time
_FACTOR, _LAST, _LEAST = 0.13, 0.015, 1e-5  # of the steps: about their ratio, the last one times n, and its bound
_FIRST_PARTIAL, _FACTOR_PARTIAL, _LAST_PARTIAL = 0.05, 0.15, 0.15  # the first step, their ratio, the last one times n


@compiled(**OPTIONS, inline="always")
def _scanned(cost, price, queue, head, waiting, first, second, wanted):  # type: ignore[no-untyped-def]
    """Bids of the rows at the head of the queue: their two smallest costs and columns; returns how many there are.

    They bid on the same prices, as their scans overlap in the processor.
    """
    n, together = cost.shape[0], min(waiting, _TOGETHER)
    for k in range(together):
        at = head + k
        first[k], second[k], wanted[k] = two_smallest(cost[queue[at - n if at >= n else at]], price, n)
    return together


@compiled(**OPTIONS, inline="always")
def _outdated(wanted, k):  # type: ignore[no-untyped-def]
    """Whether a bid before the k-th wants its column. Prices only fall, so any other bid stays valid."""
    clash = False
    for other in range(k):
        clash |= wanted[other] == wanted[k]
    return clash


@compiled(**OPTIONS)
def auction(cost, price, epsilon, col_of, row_of, queue):  # type: ignore[no-untyped-def]
    """Epsilon-scaled auction from given prices: near-optimal ones are left. ``cost`` has least 0 and mean 1."""
    n = cost.shape[0]
    last = max(_LAST / n, _LEAST)
    steps = max(0, int(np.ceil(np.log(last / epsilon) / np.log(_FACTOR) - 0.3)))
    factor = (last / epsilon) ** (1.0 / max(steps, 1))
    first, second = np.empty(_TOGETHER, np.float32), np.empty(_TOGETHER, np.float32)
    wanted = np.empty(_TOGETHER, np.int64)
    for _ in range(steps + 1):
        for i in range(n):
            col_of[i] = -1
            row_of[i] = -1
            queue[i] = i
        head, waiting, bids = 0, n, 0
        while waiting > 0 and bids < 64 * n:  # the bound only guards against price wars; the finish is exact
            for k in range(_scanned(cost, price, queue, head, waiting, first, second, wanted)):
                if _outdated(wanted, k):
                    break
                i, j = queue[head], wanted[k]
                head = head + 1 if head + 1 < n else 0
                waiting -= 1
                bids += 1
                price[j] -= (second[k] - first[k]) + epsilon
                loser = row_of[j]
                row_of[j] = i
                col_of[i] = j
                if loser >= 0:
                    col_of[loser] = -1
                    tail = head + waiting
                    queue[tail - n if tail >= n else tail] = loser
                    waiting += 1
        epsilon *= factor


@compiled(**OPTIONS)
def smallest(values, k):  # type: ignore[no-untyped-def]
    """The k-th smallest of values, counted from 0; they are reordered."""
    low, high = 0, len(values) - 1
    while low < high:
        pivot, i, j = values[(low + high) // 2], low, high
        while i <= j:
            while values[i] < pivot:
                i += 1
            while pivot < values[j]:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if k <= j:
            high = j
        elif k >= i:
            low = i
        else:
            break
    return values[k]


@compiled(**OPTIONS)
def partial_auction(cost, price, open_price, level, zero, best, row_of, queue, taken):  # type: ignore[no-untyped-def]
    """Epsilon-scaled auction in which q rows go to D and q columns are filled from R. ``cost`` has least 0, mean 1.

    Each place of D has a level, at which a row enters it. Before each step the places are made equally dear, and the
    columns that R fills: as no price ever rises, what one of them was overbid by would be lost on all others.
    """
    n, q, epsilon = cost.shape[0], len(level), _FIRST_PARTIAL
    first, second = np.empty(_TOGETHER, np.float32), np.empty(_TOGETHER, np.float32)
    wanted = np.empty(_TOGETHER, np.int64)
    for i in range(n):
        best[i], _, _ = two_smallest(cost[i], price, n)
        row_of[i] = n
    level[:] = smallest(best, n - q)
    while True:
        tau = np.float32(np.inf)
        for j in range(n):
            tau = min(tau, price[j]) if row_of[j] == n else tau
        for j in range(n):
            price[j] = min(price[j], tau)
            open_price[j] = -price[j]
            row_of[j], queue[j] = -1, j
        cheapest, _, place = two_smallest(level, zero, q)
        level[:] = cheapest
        taken[:q] = -1
        head, waiting, supply, bids = 0, n, q, 0
        while waiting + supply > 0 and bids < 64 * n:  # the bound only guards against price wars; the finish is exact
            if waiting == 0:  # R fills the column of the highest price
                least, runner_up, j = two_smallest(open_price, zero, n)
                price[j] -= (runner_up - least) + epsilon
                open_price[j] = np.inf
                if row_of[j] >= 0:
                    queue[head] = row_of[j]
                    waiting = 1
                row_of[j] = n
                supply -= 1
                bids += 1
                continue
            for k in range(_scanned(cost, price, queue, head, waiting, first, second, wanted)):
                if _outdated(wanted, k):
                    break
                i, j = queue[head], wanted[k]
                head = head + 1 if head + 1 < n else 0
                waiting -= 1
                bids += 1
                if cheapest < first[k]:
                    loser = taken[place]
                    taken[place], level[place] = i, first[k] + epsilon
                    cheapest, _, place = two_smallest(level, zero, q)
                else:
                    price[j] -= (min(second[k], cheapest) - first[k]) + epsilon
                    open_price[j] = -price[j]
                    loser = row_of[j]
                    row_of[j] = i
                    if loser == n:
                        supply += 1
                        loser = -1
                if loser >= 0:
                    tail = head + waiting
                    queue[tail - n if tail >= n else tail] = loser
                    waiting += 1
        if epsilon * n <= _LAST_PARTIAL:
            return
        epsilon *= _FACTOR_PARTIAL
