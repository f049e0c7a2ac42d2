"""Bijections of large clouds, compiled with numba: halving two clouds together, grouping pairs, exact exchanges.

Every function works on a range of nodes, rows or blocks, writes only what belongs to it, and sums in a fixed order: the
result depends neither on the number of threads nor on how the ranges are cut.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mbot.kernels.assignment import match_from, room_for
from minibatch_transport import compiled

_OPTIONS: dict[str, Any] = {"nogil": True, "boundscheck": False, "error_model": "numpy"}
_SUMS: dict[str, Any] = {**_OPTIONS, "fastmath": {"reassoc", "contract", "nnan", "nsz"}}
_TILE = 512  # columns of costs made at a time, which stay in the cache
_ROUNDS = 8  # of alternating cuts
_ROUNDING = 1e-13  # relative; gains below it are none


@compiled(**_OPTIONS)
def _hash(seed):  # type: ignore[no-untyped-def]
    """Splitmix64: a random number from a position."""
    z = np.uint64(seed) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@compiled(**_OPTIONS)
def _below(seed, n):  # type: ignore[no-untyped-def]
    return np.int64(_hash(seed) % np.uint64(n))


@compiled(**_OPTIONS)
def _spread_out(i, count, size, seed):  # type: ignore[no-untyped-def]
    """The i-th of ``count`` of ``size`` positions, one at random from each equal part."""
    return i if count == size else (i * size + _below(seed + np.uint64(i), size)) // count


@compiled(**_SUMS)
def _dot(a, centre, v):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for k in range(len(v)):
        total += (a[k] - centre[k]) * v[k]
    return total


@compiled(**_SUMS)
def _dot_sum(a, b, centre, v):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for k in range(len(v)):
        total += ((a[k] + b[k]) - centre[k]) * v[k]
    return total


@compiled(**_SUMS)
def _inner(a, b):  # type: ignore[no-untyped-def]
    total = 0.0
    for k in range(len(a)):
        total += np.float64(a[k]) * b[k]
    return total


@compiled(**_OPTIONS)
def _split_sum(points, values, out):  # type: ignore[no-untyped-def]
    """Sum of the points above the median of ``values``, less that of the others."""
    cut = np.partition(values, len(values) // 2)[len(values) // 2]
    out[:] = 0
    for i in range(len(points)):
        sign = np.float32(1) if values[i] > cut else np.float32(-1)
        for k in range(len(out)):
            out[k] += sign * points[i, k]


@compiled(**_OPTIONS)
def _gather(points, index, out):  # type: ignore[no-untyped-def]
    """Rows about their mean, which is returned."""
    n, d = len(index), points.shape[1]
    total, mean = np.zeros(d), np.empty(d, np.float32)
    for i in range(n):
        row = points[index[i] % len(points)]
        for k in range(d):
            total[k] += row[k]
    for k in range(d):
        mean[k] = total[k] / n
    for i in range(n):
        row = points[index[i] % len(points)]
        for k in range(d):
            out[i, k] = row[k] - mean[k]
    return mean


@compiled(**_OPTIONS)
def _halves(x, y, rows, cols, seed, sample, centre_x, centre_y, v, u):  # type: ignore[no-untyped-def]
    """Directions that cut two clouds into halves which belong together: x along v, y along u.

    For squared distances the best coupling of two equal halves maximises <mean x' - mean x'', mean y' - mean y''>. Each
    side is cut in turn at its median along the other's difference of means, until the product stops growing.
    """
    size, d = len(rows), x.shape[1]
    count = min(size, sample)
    xs, ys = np.empty((count, d), np.float32), np.empty((count, d), np.float32)
    picked = np.empty((2, count), np.int64)
    for i in range(count):
        picked[0, i] = rows[_spread_out(i, count, size, seed)]
        picked[1, i] = cols[_spread_out(i, count, size, seed + np.uint64(count))] % len(y)
    centre_x[:] = _gather(x, picked[0], xs)
    centre_y[:] = _gather(y, picked[1], ys)
    v[:] = ys[_below(seed + np.uint64(2 * count), count)] - ys[_below(seed + np.uint64(2 * count + 1), count)]
    origin, values, product = np.zeros(d, np.float32), np.empty(count, np.float32), -1.0
    for _ in range(_ROUNDS):
        for i in range(count):
            values[i] = _dot(xs[i], origin, v)
        _split_sum(xs, values, u)
        for i in range(count):
            values[i] = _dot(ys[i], origin, u)
        _split_sum(ys, values, v)
        before, product = product, _inner(u, v)
        if product <= before * (1 + 1e-4):
            break


@compiled(**_OPTIONS)
def halves(x, y, rows, cols, bounds, cuts, begin, stop, seed, sample, centre, direction):  # type: ignore[no-untyped-def]
    """`_halves` of the nodes ``begin:stop`` that are cut; node p holds rows and columns ``bounds[p]:bounds[p + 1]``."""
    for p in range(begin, stop):
        a, b = bounds[p], bounds[p + 1]
        if cuts[p] > 0:
            own = _hash(np.uint64(seed) + _hash(np.uint64(p)))
            at = centre[0, p], centre[1, p], direction[0, p], direction[1, p]
            _halves(x, y, rows[a:b], cols[a:b], own, sample, at[0], at[1], at[2], at[3])


@compiled(**_OPTIONS)
def project(points, index, node, begin, stop, step, centre, direction, out):  # type: ignore[no-untyped-def]
    """Positions of points along the directions of their nodes, ``step`` points at a time."""
    for i in range(begin * step, min(stop * step, len(index))):
        out[i] = _dot(points[index[i] % len(points)], centre[node[i]], direction[node[i]])


@compiled(**_OPTIONS)
def cut(index, values, bounds, cuts, begin, stop, out):  # type: ignore[no-untyped-def]
    """Each node's ``cuts[p]`` entries of largest value first (of equal ones the earlier), otherwise in their order."""
    for p in range(begin, stop):
        a, b, h = bounds[p], bounds[p + 1], cuts[p]
        if h == 0:
            out[a:b] = index[a:b]
            continue
        limit = np.partition(values[a:b], b - a - h)[b - a - h]
        ties = h
        for i in range(a, b):
            ties -= values[i] > limit
        first, second = a, a + h
        for i in range(a, b):
            above = values[i] > limit
            if not above and values[i] == limit and ties > 0:
                above = True
                ties -= 1
            if above:
                out[first] = index[i]
                first += 1
            else:
                out[second] = index[i]
                second += 1


@compiled(**_OPTIONS)
def midpoint_directions(x, y, source, cols, bounds, begin, stop, seed, power, sample, centre, direction):  # type: ignore[no-untyped-def]
    """Directions along which pairs are parted by their midpoints ``x + y``.

    The difference of two random midpoints (``power`` 0), or a random vector after power steps with their covariance.
    """
    d = x.shape[1]
    for p in range(begin, stop):
        a, size = bounds[p], bounds[p + 1] - bounds[p]
        own, count = _hash(np.uint64(seed) + _hash(np.uint64(p))), min(size, sample)
        z, mean, v = np.empty((count, d), np.float32), np.zeros(d), direction[p]
        for i in range(count):
            j = cols[a + _spread_out(i, count, size, own)]
            z[i] = x[source[j]] + y[j % len(y)]
            for k in range(d):
                mean[k] += z[i, k]
        for k in range(d):
            centre[p, k] = mean[k] / count
        own += np.uint64(count)
        if power == 0:
            v[:] = z[_below(own, count)] - z[_below(own + np.uint64(1), count)]
            continue
        for k in range(d):
            v[k] = np.float64(_hash(own + np.uint64(k)) >> np.uint64(11)) / 2.0**52 - 1
        step = np.empty(d)
        for _ in range(power):
            step[:] = 0
            for i in range(count):
                along = _dot(z[i], centre[p], v)
                for k in range(d):
                    step[k] += along * (z[i, k] - centre[p, k])
            length = np.sqrt(np.sum(step * step)) + 1e-300
            for k in range(d):
                v[k] = step[k] / length


@compiled(**_OPTIONS)
def project_midpoints(x, y, source, cols, node, begin, stop, step, centre, direction, out):  # type: ignore[no-untyped-def]
    """`project` of the midpoints of pairs."""
    for i in range(begin * step, min(stop * step, len(cols))):
        j = cols[i]
        out[i] = _dot_sum(x[source[j]], y[j % len(y)], centre[node[i]], direction[node[i]])


@compiled(**{**_OPTIONS, "fastmath": {"contract", "nnan", "nsz"}})
def _scores(x, y_columns, out):  # type: ignore[no-untyped-def]
    """``-x @ y_columns``, four rows and four features at a time."""
    (n, d), m = x.shape, y_columns.shape[1]
    for j0 in range(0, m, _TILE):
        j1 = min(m, j0 + _TILE)
        for i in range(0, n, 4):
            out[i : i + 4, j0:j1] = 0
        i = 0
        while i + 4 <= n:
            c0, c1, c2, c3 = out[i, j0:j1], out[i + 1, j0:j1], out[i + 2, j0:j1], out[i + 3, j0:j1]
            x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
            k = 0
            while k + 4 <= d:
                a0, a1, a2, a3 = x0[k], x0[k + 1], x0[k + 2], x0[k + 3]
                b0, b1, b2, b3 = x1[k], x1[k + 1], x1[k + 2], x1[k + 3]
                e0, e1, e2, e3 = x2[k], x2[k + 1], x2[k + 2], x2[k + 3]
                f0, f1, f2, f3 = x3[k], x3[k + 1], x3[k + 2], x3[k + 3]
                y0, y1 = y_columns[k, j0:j1], y_columns[k + 1, j0:j1]
                y2, y3 = y_columns[k + 2, j0:j1], y_columns[k + 3, j0:j1]
                for j in range(j1 - j0):
                    p, q, r, s = y0[j], y1[j], y2[j], y3[j]
                    c0[j] -= a0 * p + a1 * q + a2 * r + a3 * s
                    c1[j] -= b0 * p + b1 * q + b2 * r + b3 * s
                    c2[j] -= e0 * p + e1 * q + e2 * r + e3 * s
                    c3[j] -= f0 * p + f1 * q + f2 * r + f3 * s
                k += 4
            while k < d:
                a0, b0, e0, f0 = x0[k], x1[k], x2[k], x3[k]
                y0 = y_columns[k, j0:j1]
                for j in range(j1 - j0):
                    c0[j] -= a0 * y0[j]
                    c1[j] -= b0 * y0[j]
                    c2[j] -= e0 * y0[j]
                    c3[j] -= f0 * y0[j]
                k += 1
            i += 4
        for r in range(i, n):
            row = out[r, j0:j1]
            for k in range(d):
                a0, y0 = x[r, k], y_columns[k, j0:j1]
                for j in range(j1 - j0):
                    row[j] -= a0 * y0[j]


@compiled(**_OPTIONS)
def exchange(x, y, origin, rows, cols, bounds, begin, stop, epsilon, fresh, source, price):  # type: ignore[no-untyped-def]
    """Exact matchings of the blocks ``begin:stop``, which replace their pairs where that lowers the cost.

    Costs are ``-<x, y>``, about each block's own means. The prices of the columns, about ``origin``, start the solver
    and keep their mean: blocks of many sweeps make one potential of them.

    Args:
        x: points of the rows.
        y: points of the columns; column j is the point ``j % len(y)``.
        origin: ``(d,)`` about the mean of x.
        rows: of the pairs.
        cols: of the pairs.
        bounds: block p is the pairs ``bounds[p]:bounds[p + 1]``.
        begin: first block.
        stop: last block and one.
        epsilon: first step of the auction; from `FIRST_EPSILON` on the prices are ignored.
        fresh: whether there are no pairs yet.
        source: the row of each column, written.
        price: of each column, written.
    """
    d, largest = x.shape[1], 1
    for p in range(begin, stop):
        largest = max(largest, bounds[p + 1] - bounds[p])
    flat, columns = np.empty(largest * largest, np.float32), np.empty(largest * d, np.float32)
    xs, ys = np.empty((largest, d), np.float32), np.empty((largest, d), np.float32)
    start, shift, column = np.empty(largest), np.empty(largest), np.empty(largest, np.int64)
    room = room_for(largest)
    for p in range(begin, stop):
        a, n = bounds[p], bounds[p + 1] - bounds[p]
        i, j = rows[a : a + n], cols[a : a + n]
        if fresh:
            source[j] = i
        mean_x = _gather(x, i, xs[:n])
        _gather(y, j, ys[:n])
        y_columns = columns[: n * d].reshape(d, n)
        for k in range(d):
            for t in range(n):
                y_columns[k, t] = ys[t, k]
        cost = flat[: n * n].reshape(n, n)
        _scores(xs[:n], y_columns, cost)
        mean = 0.0
        for t in range(n):
            shift[t] = 0.0
            for k in range(d):
                shift[t] += (np.float64(mean_x[k]) - origin[k]) * ys[t, k]
            start[t] = price[j[t]] + shift[t]
            mean += price[j[t]] / n
        match_from(cost, start[:n], epsilon, column[:n], room)
        gain, size = 0.0, 0.0
        for t in range(n):
            now, then = _inner(xs[t], ys[column[t]]), _inner(xs[t], ys[t])
            gain += now - then
            size += abs(now) + abs(then)
        if fresh or gain > _ROUNDING * size:
            after = 0.0
            for t in range(n):
                source[j[column[t]]] = i[t]
                after += (start[t] - shift[t]) / n
            for t in range(n):
                price[j[t]] = start[t] - shift[t] + mean - after


@compiled(**_OPTIONS)
def squared_distances(x, y, source, begin, stop, step, out):  # type: ignore[no-untyped-def]
    """Sums of the squared distances of pairs, ``step`` pairs each."""
    for p in range(begin, stop):
        total = 0.0
        for j in range(p * step, min(len(source), (p + 1) * step)):
            a, b = x[source[j]], y[j % len(y)]
            for k in range(len(a)):
                difference = np.float64(a[k]) - b[k]
                total += difference * difference
        out[p] = total


@compiled(**_OPTIONS)
def least_reduced(x, about_x, rows, y, about_y, cols, price, begin, stop, step, out):  # type: ignore[no-untyped-def]
    """For each row, the least of ``-<x, y> - price`` over the columns; ``step`` rows at a time, about given points."""
    d = x.shape[1]
    columns, cost = np.empty((d, _TILE), np.float32), np.empty((step, _TILE), np.float32)
    some = np.empty((step, d), np.float32)
    for p in range(begin, stop):
        a, b = p * step, min(len(rows), (p + 1) * step)
        for i in range(a, b):
            out[i] = np.inf
            for k in range(d):
                some[i - a, k] = x[rows[i], k] - about_x[k]
        for first in range(0, len(cols), _TILE):
            m = min(len(cols) - first, _TILE)
            for j in range(m):
                for k in range(d):
                    columns[k, j] = y[cols[first + j], k] - about_y[k]
            _scores(some[: b - a], columns[:, :m], cost[:, :m])
            for i in range(a, b):
                least = np.inf
                for j in range(m):
                    least = min(least, cost[i - a, j] - price[first + j])
                out[i] = min(out[i], least)
