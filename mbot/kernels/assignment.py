"""Exact linear assignment for a batch of dense cost matrices, compiled with numba.

Two stages a problem:

1. an auction with epsilon-scaling (Bertsekas 1988) in float32 on costs shifted and scaled to unit spread: prices that
   are nearly optimal, for about 15 to 40 vectorised scans a row;
2. an exact finish in float64 from those prices (Jonker and Volgenant 1987): greedy matching on each row's cheapest
   column, augmenting row reduction, then shortest augmenting paths for the rows that are left, usually a handful.

Stage 1 only decides how short stage 2 is: the result is optimal whatever the prices. The final prices are dual
variables, by which `mbot.problem` certifies it.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from mbot.kernels import HUGE, LARGEST_COST, SAMPLE, SMALL
from mbot.kernels.threads import run_slices

# No "ninf": infinity marks settled columns below.
OPTIONS: dict[str, Any] = {
    "nogil": True,
    "cache": True,
    "boundscheck": False,
    "error_model": "numpy",
    "fastmath": {"nnan", "nsz"},
}
BLOCK, _SHORT = 32, 8
_FLAGS = ("nnan", "nsz")
_START, _FACTOR, _STOP = 0.25, 0.15, 0.1  # epsilon: first, ratio, last × n; in units of the costs' spread


def _reduced(context, builder, signature, args, width):  # type: ignore[no-untyped-def]
    """Vectors of ``row[offset:offset + width] - price[offset:offset + width]``, in the price's type.

    Written in LLVM's vector instructions, which exist on every target: numba leaves a minimum loop scalar, and these
    scans are nine tenths of the run time.
    """
    row_type, price_type, _ = signature.args
    narrow, wide = context.get_value_type(row_type.dtype), context.get_value_type(price_type.dtype)
    lanes = 32 // (price_type.dtype.bitwidth // 8)

    def load(array_type, value, element, k):  # type: ignore[no-untyped-def]
        data = context.make_array(array_type)(context, builder, value).data
        at = builder.gep(data, [builder.add(args[2], ir.Constant(args[2].type, k * lanes))])
        vector = ir.VectorType(element, lanes)
        return builder.load(builder.bitcast(at, vector.as_pointer()), align=array_type.dtype.bitwidth // 8)

    vectors = []
    for k in range(width // lanes):
        entries = load(row_type, args[0], narrow, k)
        if narrow != wide:
            entries = builder.fpext(entries, ir.VectorType(wide, lanes))
        vectors.append(builder.fsub(entries, load(price_type, args[1], wide, k)))
    return vectors, wide, lanes


def _pick(builder, comparison, left, right):  # type: ignore[no-untyped-def]
    """The smaller (``"<"``) or larger (``">"``) of two vectors, lane by lane."""
    return builder.select(builder.fcmp_ordered(comparison, left, right, flags=_FLAGS), left, right)


def _least_lane(builder, vector, wide, lanes):  # type: ignore[no-untyped-def]
    name = f"llvm.vector.reduce.fmin.v{lanes}f{32 if wide == ir.FloatType() else 64}"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(wide, [ir.VectorType(wide, lanes)]), name)
    return builder.call(function, [vector], fastmath=_FLAGS)


@intrinsic
def _block_min(typing_context, row, price, offset):  # type: ignore[no-untyped-def]
    """Smallest of the block ``row - price`` that starts at ``offset``."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        vectors, wide, lanes = _reduced(context, builder, signature, args, BLOCK)
        least = reduce(lambda left, right: _pick(builder, "<", left, right), vectors)
        return _least_lane(builder, least, wide, lanes)

    return price.dtype(row, price, offset), codegen


def _two_smallest_of(width):  # type: ignore[no-untyped-def]
    """Intrinsic: smallest and second smallest of ``width`` entries of ``row - price``, and the first one's position."""

    @intrinsic
    def scan(typing_context, row, price, offset):  # type: ignore[no-untyped-def]
        result = types.Tuple((price.dtype, price.dtype, types.int64))

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            vectors, wide, lanes = _reduced(context, builder, signature, args, width)
            # In each lane: the least and, where there are several vectors, the second least.
            least, second = vectors[0], ir.Constant(ir.VectorType(wide, lanes), [float("inf")] * lanes)
            for vector in vectors[1:]:
                second = _pick(builder, "<", second, _pick(builder, ">", least, vector))
                least = _pick(builder, "<", least, vector)
            first = _least_lane(builder, least, wide, lanes)
            splat = ir.Constant(ir.VectorType(wide, lanes), ir.Undefined)
            for lane in range(lanes):
                splat = builder.insert_element(splat, first, ir.Constant(ir.IntType(32), lane))
            bits = ir.IntType(width)
            mask = ir.Constant(bits, 0)
            for k, vector in enumerate(vectors):
                equal = builder.bitcast(builder.fcmp_ordered("==", vector, splat), ir.IntType(lanes))
                if width > lanes:
                    equal = builder.shl(builder.zext(equal, bits), ir.Constant(bits, k * lanes))
                mask = builder.or_(mask, equal)
            position = builder.cttz(mask, ir.Constant(ir.IntType(1), 0))
            others = builder.select(builder.fcmp_ordered("==", least, splat), second, least)
            rest = _least_lane(builder, others, wide, lanes)
            ties = builder.and_(mask, builder.sub(mask, ir.Constant(bits, 1)))  # the mask without its lowest bit
            rest = builder.select(builder.icmp_unsigned("!=", ties, ir.Constant(bits, 0)), first, rest)
            at = builder.add(args[2], builder.zext(position, args[2].type))
            return context.make_tuple(builder, signature.return_type, [first, rest, at])

        return result(row, price, offset), codegen

    return scan


_scan_block, _scan_short = _two_smallest_of(BLOCK), _two_smallest_of(_SHORT)


@njit(**OPTIONS)
def two_smallest(row, price, n):  # type: ignore[no-untyped-def]
    """Smallest and second smallest of ``row - price``, and the first one's column. Free of unpredictable branches."""
    infinity = price.dtype.type(np.inf)
    first, second, column = infinity, infinity, 0
    blocks = n // BLOCK
    if blocks == 1:
        first, second, column = _scan_block(row, price, 0)
    elif blocks > 1:
        best, rest, start = infinity, infinity, 0  # minima of the blocks: the least, and the least of the others
        for block in range(blocks):
            least = _block_min(row, price, block * BLOCK)
            better = least < best
            worse = best if better else least
            rest = worse if worse < rest else rest
            best = least if better else best
            start = block * BLOCK if better else start
        first, second, column = _scan_block(row, price, start)
        second = rest if rest < second else second
    j = blocks * BLOCK
    while j + _SHORT <= n:
        least, runner_up, at = _scan_short(row, price, j)
        better = least < first
        worse = first if better else least
        second = second if second < worse else worse
        second = runner_up if runner_up < second else second
        first = least if better else first
        column = at if better else column
        j += _SHORT
    for k in range(j, n):
        h = row[k] - price[k]
        better = h < first
        worse = first if better else h
        second = worse if worse < second else second
        first = h if better else first
        column = k if better else column
    return first, second, column


@njit(nogil=True, cache=True, fastmath={"reassoc", "nsz"})
def total_of(entries):  # type: ignore[no-untyped-def]
    """Sum in float64, in any order."""
    total = 0.0
    for e in range(len(entries)):
        total += entries[e]
    return total


@njit(**OPTIONS)
def least_of(entries, zero):  # type: ignore[no-untyped-def]
    """Least of any number of entries; ``zero`` holds as many zeros as a block."""
    least, e = np.inf, 0
    while e + BLOCK <= len(entries):
        least = min(least, _block_min(entries[e : e + BLOCK], zero, 0))
        e += BLOCK
    for k in range(e, len(entries)):
        least = min(least, entries[k])
    return least


@njit(nogil=True, cache=True, error_model="numpy")
def unusual(entries, low, total):  # type: ignore[no-untyped-def]
    """Whether costs are not finite, or few of them huge, given their least, their sum and a sample."""
    count, small = len(entries), 0
    spread, step = total / count - low, count // SAMPLE + 1
    if not (abs(low) <= LARGEST_COST and spread <= LARGEST_COST):  # or NaN
        return True
    for k in range(SAMPLE):
        above = np.float64(entries[k * step % count]) - low
        small += above > 0.0 and above * HUGE < spread
    return SMALL * small >= SAMPLE


@njit(**OPTIONS)
def auction(cost, price, col_of, row_of, queue):  # type: ignore[no-untyped-def]
    """Epsilon-scaled auction: leaves near-optimal column prices. ``cost`` has unit spread."""
    n = cost.shape[0]
    last = max(_STOP / n, 1e-5)
    epsilon = _START
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


@njit(**OPTIONS)
def relax(row, price, shift, dist, open_dist, parent, via):  # type: ignore[no-untyped-def]
    """Shorten the distances of the columns that are not settled yet by going through the row ``via``."""
    for j in range(len(dist)):
        h = row[j] - price[j] - shift
        better = (h < dist[j]) & (open_dist[j] < np.inf)
        dist[j] = h if better else dist[j]
        open_dist[j] = h if better else open_dist[j]
        parent[j] = via if better else parent[j]


@njit(**OPTIONS)
def _finish(cost, price, col_of, row_of, dist, open_dist, parent, free, zero):  # type: ignore[no-untyped-def]
    """Exact assignment from any prices; on return the prices are optimal dual variables."""
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


@njit(**OPTIONS)
def _solve(flat, starts, sizes, points, capped, begin, stop, column, row_dual, col_dual):  # type: ignore[no-untyped-def]
    """Problems ``begin:stop``; problem p is ``flat[starts[p]:]`` as a square of ``sizes[p]`` rows."""
    largest = 1
    for p in range(begin, stop):
        largest = max(largest, sizes[p])
    scaled_flat = np.empty(largest * largest, np.float32)
    price32_all = np.empty(largest, np.float32)
    dist_all = np.empty(largest, np.float64)
    open_all = np.empty(largest, np.float64)
    row_of_all = np.empty(largest, np.int64)
    parent_all = np.empty(largest, np.int64)
    free_all = np.empty(largest, np.int64)
    zero = np.zeros(max(largest, BLOCK))
    for p in range(begin, stop):
        n = sizes[p]
        at = points[p]
        entries = flat[starts[p] : starts[p] + n * n]
        cost = entries.reshape(n, n)
        col_of = column[at : at + n]
        price = col_dual[at : at + n]
        low = least_of(entries, zero)
        total = total_of(entries)
        spread = total / (n * n) - low
        if not capped and unusual(entries, low, total):
            for i in range(n):
                col_of[i], row_dual[at + i], price[i] = i, np.nan, np.nan
            continue
        price[:] = 0.0
        if spread > 0 and n > 2:
            scale = 1.0 / spread
            scaled = scaled_flat[: n * n]
            for e in range(n * n):
                scaled[e] = (entries[e] - low) * scale
            price32 = price32_all[:n]
            price32[:] = 0.0
            auction(scaled.reshape(n, n), price32, col_of, row_of_all[:n], free_all[:n])
            for j in range(n):
                price[j] = price32[j] * spread
        _finish(cost, price, col_of, row_of_all[:n], dist_all[:n], open_all[:n], parent_all[:n], free_all[:n], zero)
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
