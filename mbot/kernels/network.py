"""The network simplex on a dense cost matrix, for weights of any kind; compiled with numba.

A basis is a spanning tree of the n rows and m columns. A pivot lets a pair of negative reduced cost enter, moves mass
round the cycle that it closes, and drops the pair that this empties. Three things make it short:

1. the first tree is greedy with respect to prices, those of a coarse problem: every third row and column, which have
   the weights of those around them, solved in the same way;
2. pivots choose among a pool of promising pairs; the whole matrix is scanned only to fill it and to prove optimality;
3. potentials are computed anew from the tree at each scan, so rounding does not add up.

Trees are strongly feasible (Cunningham 1976): a leaving pair is chosen among equals so that degenerate pivots do not
cycle.
"""

from __future__ import annotations

import numpy as np

from mbot.kernels.scans import OPTIONS, two_smallest
from minibatch_transport import compiled

_STEP, _FEW = 3, 100  # of the coarse problem; below so many rows or columns there is none
_POOL, _OF_A_ROW, _SHARE = 3, 10, 0.5  # pairs in the pool, times n + m; of a row, within a share of its least one
_MOST = 200  # pivots, times n + m: many times what random problems take
_TOLERANCE, _ROUNDING = 1e-11, 1e-15  # of reduced costs, in units of the plan's cost and of the largest cost


def network(cost, a, b):  # type: ignore[no-untyped-def]
    """The cheapest plan of one problem.

    Args:
        cost: ``(n, m)`` float64, C-contiguous, between 0 and 1.
        a: ``(n,)`` float64, positive, of sum 1.
        b: ``(m,)`` likewise.

    Returns:
        Rows, columns and masses ``(n + m - 1,)`` of the plan's entries, the columns' potentials ``(m,)``, and whether
        the plan is optimal; it is not if that took too many pivots.
    """
    price = cost.min(0)
    if min(cost.shape) >= _FEW:
        rows, cols = (np.arange(0, size, _STEP) for size in cost.shape)
        few = np.ascontiguousarray(cost[::_STEP, ::_STEP])
        coarse = network(few, np.add.reduceat(a, rows), np.add.reduceat(b, cols))[3]
        price = (cost - (cost[:, ::_STEP] - coarse).min(1)[:, None]).min(0)
    return _solved(cost, a, b, price)


@compiled(**OPTIONS)
def _solved(cost, a, b, price):  # type: ignore[no-untyped-def]
    n, m = cost.shape
    nodes = n + m
    # Of each node: its parent, first child, siblings and depth; the mass on the pair with its parent; its potential,
    # negative in rows, so that those of a subtree move together.
    parent, first = np.full(nodes, -1, np.int32), np.full(nodes, -1, np.int32)
    following, previous = first.copy(), first.copy()
    depth, flow, potential = np.zeros(nodes, np.int32), np.zeros(nodes), np.zeros(nodes)
    tree = (parent, first, following, previous, depth, flow, potential)
    root = _greedy(cost, a, b, price, tree)
    room = max(_POOL * nodes, 2 * _OF_A_ROW)
    row, col, costs = np.empty(room, np.int32), np.empty(room, np.int32), np.empty(room)
    size, turn, shift, pivots, idle = 0, 0, 0, 0, 0
    price = potential[n:]
    # Until all rows were scanned without a pivot: rounding may find pairs there that the pool has no use for.
    while idle < n and pivots <= _MOST * nodes:
        tolerance = max(_TOLERANCE * _settle(cost, root, tree), _ROUNDING)
        if size > room // 2:
            size = _thinned(row, col, costs, size, potential, n)
        scanned = 0
        while scanned < n and size + _OF_A_ROW <= room:
            i = turn
            turn = (turn + 1) % n
            scanned += 1
            least = two_smallest(cost[i], price, m)[0] + potential[i]
            if least < -tolerance:
                bound, last = min(_SHARE * least, -tolerance) - potential[i], size + _OF_A_ROW
                for k in range(m):
                    j = k + shift if k + shift < m else k + shift - m
                    if cost[i, j] - price[j] <= bound:
                        row[size], col[size], costs[size] = i, j, cost[i, j]
                        size += 1
                        if size == last:
                            break
                shift = (shift + m // 3 + 1) % m  # not always the first columns
        more = _improve(row, col, costs, size, tolerance, n, tree, _MOST * nodes + 1 - pivots)
        idle = idle + scanned if more == 0 else 0
        pivots += more
    rows, cols = np.empty(nodes - 1, np.int64), np.empty(nodes - 1, np.int64)
    mass, k = np.empty(nodes - 1), 0
    for x in range(nodes):
        if x != root:
            rows[k], cols[k], mass[k] = min(x, parent[x]), max(x, parent[x]) - n, flow[x]
            k += 1
    return rows, cols, mass, price.copy(), pivots <= _MOST * nodes


@compiled(**OPTIONS)
def _greedy(cost, a, b, price, tree):  # type: ignore[no-untyped-def]
    """Fill the tree with a plan in which each row takes its cheapest columns that are left; returns the root."""
    parent, first, following, previous, _, flow, _ = tree
    n, m = cost.shape
    left, active, count = b.copy(), np.arange(m), m
    for i in range(n):
        rest = a[i]
        while True:
            best, least = 0, np.inf
            for k in range(count):
                reduced = cost[i, active[k]] - price[active[k]]
                if reduced < least:
                    best, least = k, reduced
            j = active[best]
            # Of two that end together the column goes first: no pair without mass leads away from the root.
            if count == 1 or (left[j] > rest and i < n - 1):
                parent[i], flow[i] = n + j, rest
                left[j] = max(left[j] - rest, 0.0)
                break
            parent[n + j], flow[n + j] = i, left[j]
            rest = max(rest - left[j], 0.0)
            count -= 1
            active[best] = active[count]
    for x in range(n + m):
        if parent[x] >= 0:
            _hang(x, parent[x], parent, first, following, previous)
    return n + active[0]


@compiled(**OPTIONS, inline="always")
def _hang(x, above, parent, first, following, previous):  # type: ignore[no-untyped-def]
    parent[x], previous[x], following[x] = above, -1, first[above]
    if first[above] >= 0:
        previous[first[above]] = x
    first[above] = x


@compiled(**OPTIONS)
def _next(x, top, parent, first, following):  # type: ignore[no-untyped-def]
    """The node after ``x`` in the subtree of ``top``, parents first; -1 at the end."""
    if first[x] >= 0:
        return first[x]
    while x != top and following[x] < 0:
        x = parent[x]
    return -1 if x == top else following[x]


@compiled(**OPTIONS)
def _settle(cost, root, tree):  # type: ignore[no-untyped-def]
    """Potentials and depths from the tree; returns what its plan costs."""
    parent, first, following, _, depth, flow, potential = tree
    n, total = len(cost), 0.0
    potential[root], depth[root] = 0.0, 0
    x = _next(root, root, parent, first, following)
    while x >= 0:
        above = parent[x]
        paid = cost[min(x, above), max(x, above) - n]
        potential[x] = potential[above] - paid if x < n else potential[above] + paid
        depth[x] = depth[above] + 1
        total += flow[x] * paid
        x = _next(x, root, parent, first, following)
    return total


@compiled(**OPTIONS)
def _thinned(row, col, costs, size, potential, n):  # type: ignore[no-untyped-def]
    """Keep pairs of the pool that are cheaper than its mean; none where that is most of them. Returns how many."""
    mean, kept = 0.0, 0
    for e in range(size):
        mean += (costs[e] + potential[row[e]] - potential[n + col[e]]) / size
    for e in range(size):
        if costs[e] + potential[row[e]] - potential[n + col[e]] <= mean:
            row[kept], col[kept], costs[kept] = row[e], col[e], costs[e]
            kept += 1
    return kept if kept <= min(0.9 * size, len(row) - _OF_A_ROW) else 0  # a row's pairs have room


@compiled(**OPTIONS)
def _improve(row, col, costs, size, tolerance, n, tree, most):  # type: ignore[no-untyped-def]
    """Pivot until no pair of the pool has a negative reduced cost, ``most`` times at most; returns how many times."""
    potential = tree[6]
    block, at, since, pivots = max(int(4 * np.sqrt(size)), 20), 0, 0, 0
    while since < size and pivots < most:
        least, which = -tolerance, -1
        while since < size and which < 0:
            stop = min(at + block, size)
            since += stop - at
            for e in range(at, stop):
                reduced = costs[e] + potential[row[e]] - potential[n + col[e]]
                if reduced < least:
                    least, which = reduced, e
            at = stop if stop < size else 0
        if which >= 0:
            _pivot(np.int64(row[which]), np.int64(n + col[which]), least, n, tree)
            since = 0
            pivots += 1
    return pivots


@compiled(**OPTIONS, inline="always")
def _pivot(i, j, reduced, n, tree):  # type: ignore[no-untyped-def]
    """The pair of the nodes ``i``, a row, and ``j``, a column, enters the tree."""
    parent, first, following, previous, depth, flow, potential = tree
    # Mass leaves pairs whose lower node is a row on the way from i up, and a column on the way from j.
    x, y, out, other, amount, less = i, j, -1, -1, np.inf, np.inf
    while x != y:
        if depth[x] >= depth[y]:
            if x < n and flow[x] < amount:
                amount, out = flow[x], x
            x = parent[x]
        else:
            if y >= n and flow[y] <= less:
                less, other = flow[y], y
            y = parent[y]
    join, inner, outer = x, i, j
    if less <= amount:
        amount, out, inner, outer = less, other, j, i
    for end in (i, j):
        x = end
        while x != join and amount > 0:
            flow[x] += -amount if (x < n) == (end < n) else amount
            x = parent[x]
    # What hung on the pair that leaves hangs on the one that enters: turn round the way between them.
    x, above, load = inner, outer, amount
    while True:
        old, had = parent[x], flow[x]
        if previous[x] >= 0:
            following[previous[x]] = following[x]
        else:
            first[old] = following[x]
        if following[x] >= 0:
            previous[following[x]] = previous[x]
        _hang(x, above, parent, first, following, previous)
        flow[x] = load
        if x == out:
            break
        x, above, load = old, x, had
    change = -reduced if inner < n else reduced
    x = inner
    while True:  # `_next` written out: nearly all the time goes here, and a call would double it
        depth[x] = depth[parent[x]] + 1
        potential[x] += change
        if first[x] >= 0:
            x = first[x]
        else:
            while x != inner and following[x] < 0:
                x = parent[x]
            if x == inner:
                break
            x = following[x]
