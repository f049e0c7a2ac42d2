"""Matchings of all pairs of two lists of mini-batches under squared distances.

One cost matrix is made at a time, matched and certified: it stays in the processor's cache, and the costs of all pairs
are never in memory together.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mbot.kernels import LARGEST_COST
from mbot.kernels.assignment import FIRST_EPSILON, PART, both_stages, mean_prices, room_for
from mbot.kernels.cardinality import chunks, solve
from mbot.kernels.certificate import error_of
from mbot.kernels.scans import BLOCK, OPTIONS, least_of, total_of, two_smallest
from minibatch_transport import compiled

_SUMS = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "nsz", "contract"}}


@compiled(**_SUMS)
def centred(x, y):  # type: ignore[no-untyped-def]
    """``-2 (x - c)`` and ``y - c`` of two clouds about their common centre c, and squared norms ``|x - c|^2`` of both.

    Args:
        x: ``(n, d)``.
        y: ``(m, d)`` of the same dtype.
    """
    d, dtype = x.shape[1], x.dtype
    centre, middle = np.zeros(d), np.empty(d, dtype)
    for points in (x, y):
        mean = np.zeros(d)
        for point in points:
            for k in range(d):
                mean[k] += point[k]
        for k in range(d):
            centre[k] += mean[k] / (2 * len(points))
    for k in range(d):
        middle[k] = centre[k]
    left, right = np.empty_like(x), np.empty_like(y)
    norms_x, norms_y = np.empty(len(x), dtype), np.empty(len(y), dtype)
    for points, out, norms, factor in ((x, left, norms_x, dtype.type(-2)), (y, right, norms_y, dtype.type(1))):
        for i in range(len(points)):
            norm = dtype.type(0)
            for k in range(d):
                apart = points[i, k] - middle[k]
                out[i, k] = factor * apart
                norm += apart * apart
            norms[i] = norm
    return left, right, norms_x, norms_y


@compiled(**_SUMS)
def _usual(low, total):  # type: ignore[no-untyped-def]
    """Whether costs of this least and sum can be matched; apart, as the matchings are compiled for no NaN."""
    return abs(low) <= LARGEST_COST and total <= LARGEST_COST


@compiled(**OPTIONS, inline="always")
def _make(product, first, x, y, norms_x, norms_y, row, col, zero, cost, least):  # type: ignore[no-untyped-def]
    """Costs of the ``(n, n)`` pairs from ``row`` and ``col`` on, and the least of each row."""
    n = cost.shape[0]
    for r in range(n):
        line = cost[r]
        if len(product):
            inner, norms, norm = product[row - first + r, col : col + n], norms_y[col : col + n], norms_x[row + r]
            for c in range(n):
                line[c] = inner[c] + (norm + norms[c])
        else:
            for k in range(x.shape[1]):
                at, others = x[row + r, k], y[k, col : col + n]
                for c in range(n):
                    apart = at - others[c]
                    line[c] = apart * apart if k == 0 else line[c] + apart * apart
        least[r] = least_of(line, zero)


@compiled(**OPTIONS)
def complete(costs_of, wide, begin, stop, out):  # type: ignore[no-untyped-def]
    """Problems ``begin:stop`` of the grid, all of whose points are matched.

    Args:
        costs_of: ``product, first, x, y, norms_x, norms_y``: ``-2 <x, y>`` of the points from row ``first`` on with all
            targets, or ``(0, 0)`` to make costs by differences of the features; ``(k n, d)`` points; ``(d, k' n)``
            points of the other side, feature by feature; ``(k n,)`` and ``(k' n,)`` squared norms, where there are
            products.
        wide: k'; problem p is between mini-batch ``p // wide`` and ``p % wide``.
        begin: first problem.
        stop: end of the problems.
        out: ``column, values, error, least``, written: ``(k k', 1, n)`` int64, the column of each row; ``(k k',)``
            float64, cost of the pairs; ``(k k',)`` float64 as of `mbot.kernels.certificate`, NaN of problems that
            were left out; ``(k k', n)``, least cost of each row.
    """
    product, first, x, y, norms_x, norms_y = costs_of
    column, values, error, least = out
    n = column.shape[2]
    room, ordered, ones = room_for(n), np.arange(n), np.ones(n)
    cost, price, f, costs = np.empty((n, n), x.dtype), np.empty(n), np.empty(n), np.empty(n)
    left_a, left_b = np.empty(n), np.empty(n)
    entries = cost.reshape(n * n)
    for p in range(begin, stop):
        _make(product, first, x, y, norms_x, norms_y, p // wide * n, p % wide * n, room[8], cost, least[p])
        low, total = least_of(least[p], room[8]), total_of(entries)
        error[p] = np.nan
        if not _usual(low, total):
            continue
        match = column[p, 0]
        mean_prices(cost, total, PART, price)
        both_stages(cost, low, total / (n * n) - low, price, FIRST_EPSILON, match, room)
        value = 0.0
        for i in range(n):
            f[i], _, _ = two_smallest(cost[i], price, n)
            costs[i] = cost[i, match[i]]
            value += costs[i]
        values[p] = value
        left_a[:] = 1.0
        left_b[:] = 1.0
        error[p] = error_of(costs, ordered, match, ones, f, price, left_a, left_b, -1.0, 0.0)


def partial(
    costs_of: tuple[Any, ...], wide: int, begin: int, stop: int, out: tuple[np.ndarray, ...], pairs: int, share: float
) -> None:
    """As `complete`, with so many pairs, or a share of the mass in matchings with a pair more.

    Args:
        costs_of: see `complete`.
        wide: likewise.
        begin: likewise.
        stop: likewise.
        out: likewise; columns are ``(k k', E, n)``, -1 of rows that are not matched; E = 1, or 2 with a share.
        pairs: of the first matching.
        share: of the mass that the second one has.
    """
    n = out[0].shape[2]
    for first, last in chunks(begin, stop, n):
        flat, (f, g) = np.empty((last - first) * n * n), np.empty((2, last - first, n))
        column, values, error, least = (part[first:last] for part in out)
        _make_all(costs_of, wide, first, flat, least)
        solve(flat, n - pairs, False, column, f, g)
        _judge(flat, pairs, share, f, g, column, values, error)


@compiled(**OPTIONS)
def _make_all(costs_of, wide, begin, flat, least):  # type: ignore[no-untyped-def]
    """Costs of the problems from ``begin`` on."""
    product, first, x, y, norms_x, norms_y = costs_of
    n = least.shape[1]
    costs, zero = flat.reshape(len(least), n, n), np.zeros(max(n, BLOCK))
    for e in range(len(least)):
        p = begin + e
        _make(product, first, x, y, norms_x, norms_y, p // wide * n, p % wide * n, zero, costs[e], least[e])


@compiled(nogil=True, error_model="numpy")
def _judge(flat, pairs, share, f, g, column, values, error):  # type: ignore[no-untyped-def]
    """Costs and errors of plans made of one matching, or of two."""
    count, n = column.shape[1:]
    rows, cols = np.arange(count * n) % n, np.empty(count * n, np.int64)
    mass, costs, left_a, left_b = np.empty(count * n), np.empty(count * n), np.empty(n), np.empty(n)
    for p in range(len(column)):
        value = 0.0
        for e in range(count * n):
            j = column[p, e // n, e % n]
            mass[e] = 0.0 if j < 0 else share if e >= n else 1.0 - share
            cols[e] = max(j, 0)
            costs[e] = flat[(p * n + e % n) * n + cols[e]]
            value += mass[e] * costs[e]
        values[p] = value
        left_a[:] = 1.0
        left_b[:] = 1.0
        error[p] = error_of(costs, rows, cols, mass, f[p], g[p], left_a, left_b, pairs + share, 0.0)


@compiled(**_SUMS)
def unsure(norms, least, wide):  # type: ignore[no-untyped-def]
    """Fourth power mean over the rows of their squared norms, relative to their least cost with any target.

    Args:
        norms: ``(k n,)``.
        least: ``(k k', n)`` least costs with each mini-batch of targets.
        wide: k'.
    """
    n, total = least.shape[1], 0.0
    for row in range(len(norms)):
        low = least[row // n * wide, row % n]
        for j in range(1, wide):
            low = min(low, least[row // n * wide + j, row % n])
        share = norms[row] / np.float64(low)
        total += share * share * share * share
    return (total / len(norms)) ** 0.25


@compiled(**_SUMS)
def moved(x, y, column, shares, weight, by_target, begin, stop, out):  # type: ignore[no-untyped-def]
    """Gradients in the points of one side, mini-batches ``begin:stop``: weighted sums of displacements.

    Args:
        x: ``(k n, d)``.
        y: ``(k' n, d)``.
        column: ``(k, k', E, n)`` int64, the column of each row in each matching; -1 for none.
        shares: ``(E,)`` float64 weights of the matchings.
        weight: ``(k, k')`` float64 weights of the problems, of any sign.
        by_target: whether for the points of y.
        begin: first mini-batch.
        stop: end of the mini-batches.
        out: of the side's shape, added to.
    """
    n, d = column.shape[3], x.shape[1]
    for one in range(begin, stop):
        for other in range(column.shape[0] if by_target else column.shape[1]):
            i, j = (other, one) if by_target else (one, other)
            if weight[i, j] != 0:  # negative where the loss is subtracted
                for e in range(len(shares)):
                    factor = x.dtype.type((-2 if by_target else 2) * weight[i, j] * shares[e])
                    for r in range(n):
                        if column[i, j, e, r] >= 0:
                            # By indices: views of the rows would be counted as references, at most of the run time.
                            left, right = i * n + r, j * n + column[i, j, e, r]
                            line = right if by_target else left
                            for k in range(d):
                                out[line, k] += factor * (x[left, k] - y[right, k])
