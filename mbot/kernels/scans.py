"""Scans of a row of costs less prices: minima, the second least, sums; nine tenths of an assignment's run time."""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from minibatch_transport import compiled

# No "ninf": infinity marks settled columns below.
OPTIONS: dict[str, Any] = {
    "nogil": True,
    "boundscheck": False,
    "error_model": "numpy",
    "fastmath": {"nnan", "nsz"},
}
BLOCK, _SHORT = 32, 8
_FLAGS = ("nnan", "nsz")


def _reduced(context, builder, signature, args, width):  # type: ignore[no-untyped-def]
    """Vectors of ``row[offset:offset + width] - price[offset:offset + width]``, in the price's type.

    Written in LLVM's vector instructions, which exist on every target: numba leaves a minimum loop scalar, and these
    scans are nine tenths of the run time.
    """
    row_type, price_type = signature.args[:2]
    narrow, wide = context.get_value_type(row_type.dtype), context.get_value_type(price_type.dtype)
    lanes = 32 // (price_type.dtype.bitwidth // 8)

    vectors = []
    for k in range(width // lanes):
        entries = builder.load(*_vector(context, builder, row_type, args[0], args[2], k, lanes))
        if narrow != wide:
            entries = builder.fpext(entries, ir.VectorType(wide, lanes))
        prices = builder.load(*_vector(context, builder, price_type, args[1], args[2], k, lanes))
        vectors.append(builder.fsub(entries, prices))
    return vectors, wide, lanes


def _vector(context, builder, array_type, value, offset, k, lanes):  # type: ignore[no-untyped-def]
    """Pointer to the k-th vector of an array from ``offset`` on, a name for what is loaded, and the alignment."""
    data = context.make_array(array_type)(context, builder, value).data
    at = builder.gep(data, [builder.add(offset, ir.Constant(offset.type, k * lanes))])
    vector = ir.VectorType(context.get_value_type(array_type.dtype), lanes)
    return builder.bitcast(at, vector.as_pointer()), "", array_type.dtype.bitwidth // 8


def _splat(builder, value, lanes):  # type: ignore[no-untyped-def]
    vector = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    for lane in range(lanes):
        vector = builder.insert_element(vector, value, ir.Constant(ir.IntType(32), lane))
    return vector


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
            splat = _splat(builder, first, lanes)
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


# Inlined by force: left to itself, LLVM makes a call of it in the copies that its callers keep on disk, which then run
# slower than in the process that compiled them.
@compiled(**OPTIONS, forceinline=True)
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


def _relax_of(width):  # type: ignore[no-untyped-def]
    """Intrinsic: relax ``width`` distances, as `relaxed` does; their least."""

    @intrinsic
    def relax(typing_context, row, price, offset, shift, dist, parent, via):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            vectors, wide, lanes = _reduced(context, builder, signature, args, width)
            dist_type, parent_type = signature.args[4:6]
            shifts, vias, nearest = _splat(builder, args[3], lanes), _splat(builder, args[6], lanes), []
            for k, vector in enumerate(vectors):
                at, name, align = _vector(context, builder, dist_type, args[4], args[2], k, lanes)
                before, through = builder.load(at, name, align), builder.fsub(vector, shifts)
                better = builder.fcmp_ordered("<", through, before)
                nearest.append(builder.select(better, through, before))
                builder.store(nearest[-1], at, align)
                at, name, align = _vector(context, builder, parent_type, args[5], args[2], k, lanes)
                builder.store(builder.select(better, vias, builder.load(at, name, align)), at, align)
            least = reduce(lambda left, right: _pick(builder, "<", left, right), nearest)
            return _least_lane(builder, least, wide, lanes)

        return price.dtype(row, price, offset, shift, dist, parent, via), codegen

    return relax


_relax_block, _relax_short = _relax_of(BLOCK), _relax_of(_SHORT)


@compiled(**OPTIONS)
def relaxed(row, price, shift, dist, parent, via, zero):  # type: ignore[no-untyped-def]
    """Shorten distances to ``row - price - shift``, setting their ``parent`` to ``via``; the least and its column.

    Args:
        row: ``(n,)`` or more.
        price: ``(n,)`` float64; ``-inf`` at columns to leave alone.
        shift: a number.
        dist: ``(n,)`` float64, written.
        parent: ``(n,)`` int64, written.
        via: a whole number.
        zero: at least as many zeros.
    """
    n, least, start, column, j = len(dist), np.inf, 0, -1, 0
    while j + BLOCK <= n:
        low = _relax_block(row, price, j, shift, dist, parent, via)
        start = j if low < least else start
        least = min(low, least)
        j += BLOCK
    blocks = j
    while j + _SHORT <= n:
        low = _relax_short(row, price, j, shift, dist, parent, via)
        start = j if low < least else start
        least = min(low, least)
        j += _SHORT
    for k in range(j, n):
        h = row[k] - price[k] - shift
        if h < dist[k]:
            dist[k], parent[k] = h, via
        if dist[k] < least:
            least, column = dist[k], k
    if column < 0 and start < blocks:
        _, _, column = _scan_block(dist, zero, start)
    elif column < 0:
        _, _, column = _scan_short(dist, zero, start)
    return least, column


@compiled(nogil=True, fastmath={"reassoc", "nsz"})
def total_of(entries):  # type: ignore[no-untyped-def]
    """Sum in float64, in any order."""
    total = 0.0
    for e in range(len(entries)):
        total += entries[e]
    return total


@compiled(**OPTIONS)
def least_of(entries, zero):  # type: ignore[no-untyped-def]
    """Least of any number of entries; ``zero`` holds as many zeros as a block."""
    least, e = np.inf, 0
    while e + BLOCK <= len(entries):
        least = min(least, _block_min(entries[e : e + BLOCK], zero, 0))
        e += BLOCK
    rest, _, _ = two_smallest(entries[e:], zero, len(entries) - e)
    return min(least, rest)
