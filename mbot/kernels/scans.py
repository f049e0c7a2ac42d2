"""Scans of a row of costs less prices: minima, the second least, sums; most of the run time of a matching."""

from __future__ import annotations

from functools import partial, reduce
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
BLOCK, _LANES = 32, 8  # entries that a minimum is taken of at a time; as many as a vector of float32 has
_LONG = 256  # from here on blocks are compared first, and only the best of them is scanned for its two smallest
_FLAGS = ("nnan", "nsz")


class _Vectors:
    """Vectors of 32 bytes of the entries of ``row - price``, in the price's type.

    Written in LLVM's vector instructions, which exist on every target: numba leaves a minimum loop scalar.
    """

    def __init__(self, context, builder, signature, args):  # type: ignore[no-untyped-def]
        self.context, self.builder, self.types, self.args = context, builder, signature.args, args
        bits = signature.args[1].dtype.bitwidth
        self.lanes, self.whole = 256 // bits, ir.IntType(bits)
        self.real = context.get_value_type(signature.args[1].dtype)

    def place(self, k, offset):  # type: ignore[no-untyped-def]
        """Pointer to the vector of the k-th argument from ``offset`` on, a name for what is loaded, the alignment."""
        kind = self.types[k]
        data = self.context.make_array(kind)(self.context, self.builder, self.args[k]).data
        vector = ir.VectorType(self.context.get_value_type(kind.dtype), self.lanes)
        return self.builder.bitcast(self.builder.gep(data, [offset]), vector.as_pointer()), "", kind.dtype.bitwidth // 8

    def apart(self, offset):  # type: ignore[no-untyped-def]
        """``row - price`` from ``offset`` on."""
        row, price = (self.builder.load(*self.place(k, offset)) for k in (0, 1))
        if row.type != price.type:
            row = self.builder.fpext(row, price.type)
        return self.builder.fsub(row, price)

    def each(self, begin, stop, body):  # type: ignore[no-untyped-def]
        """Run ``body(offset, fresh)`` for each vector of a range no shorter than one.

        The last one ends with the range and may overlap the one before it; ``fresh`` says which of its lanes do not.
        It is None where all of them are.
        """
        b, kind = self.builder, begin.type
        end = b.add(begin, b.and_(b.sub(stop, begin), ir.Constant(kind, -self.lanes)))
        with cgutils.for_range_slice(b, begin, end, ir.Constant(kind, self.lanes)) as (offset, _):
            body(offset, None)
        with b.if_then(b.icmp_signed("<", end, stop)):
            first = b.sub(stop, ir.Constant(kind, self.lanes))
            lane = ir.Constant(ir.VectorType(self.whole, self.lanes), list(range(self.lanes)))
            body(first, b.icmp_signed(">=", lane, self.splat(self.short(b.sub(end, first)))))

    def short(self, number):  # type: ignore[no-untyped-def]
        """A whole number, as wide as the reals are."""
        return number if number.type == self.whole else self.builder.trunc(number, self.whole)

    def splat(self, number):  # type: ignore[no-untyped-def]
        """A vector of one number."""
        vector = ir.Constant(ir.VectorType(number.type, self.lanes), ir.Undefined)
        for lane in range(self.lanes):
            vector = self.builder.insert_element(vector, number, ir.Constant(ir.IntType(32), lane))
        return vector

    def pick(self, comparison, left, right):  # type: ignore[no-untyped-def]
        """The smaller (``"<"``) or larger (``">"``) of two vectors, lane by lane."""
        return self.builder.select(self.builder.fcmp_ordered(comparison, left, right, flags=_FLAGS), left, right)

    def least(self, vector):  # type: ignore[no-untyped-def]
        """The least of the lanes."""
        real = isinstance(vector.type.element, (ir.FloatType, ir.DoubleType))
        name = f"llvm.vector.reduce.{'fmin' if real else 'umin'}.v{self.lanes}{'f' if real else 'i'}{self.whole.width}"
        kind = ir.FunctionType(vector.type.element, [vector.type])
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(function, [vector], fastmath=_FLAGS if real else ())


class _Nearest:
    """In each lane the least of the vectors seen, where it begins, and, if asked for, the second least."""

    def __init__(self, vectors, runner_up):  # type: ignore[no-untyped-def]
        self.vectors = vectors
        infinity = ir.Constant(ir.VectorType(vectors.real, vectors.lanes), [float("inf")] * vectors.lanes)
        nowhere = ir.Constant(ir.VectorType(vectors.whole, vectors.lanes), [0] * vectors.lanes)
        self.least, self.start = (cgutils.alloca_once_value(vectors.builder, x) for x in (infinity, nowhere))
        self.second = cgutils.alloca_once_value(vectors.builder, infinity) if runner_up else None

    def see(self, vector, offset):  # type: ignore[no-untyped-def]
        """A vector that starts at ``offset``."""
        v, b = self.vectors, self.vectors.builder
        least = b.load(self.least)
        better = b.fcmp_ordered("<", vector, least, flags=_FLAGS)
        if self.second:
            b.store(v.pick("<", v.pick(">", vector, least), b.load(self.second)), self.second)
        b.store(b.select(better, vector, least), self.least)
        b.store(b.select(better, v.splat(v.short(offset)), b.load(self.start)), self.start)

    def found(self):  # type: ignore[no-untyped-def]
        """The least, the first column that has it as int64, and, if asked for, the second least."""
        v, b = self.vectors, self.vectors.builder
        lanes = b.load(self.least)
        least = v.least(lanes)
        equal = b.fcmp_ordered("==", lanes, v.splat(least))
        start = b.load(self.start)
        columns = b.add(start, ir.Constant(start.type, list(range(v.lanes))))
        column = v.least(b.select(equal, columns, ir.Constant(start.type, [2**31 - 1] * v.lanes)))
        column = column if column.type.width == 64 else b.zext(column, ir.IntType(64))
        if not self.second:
            return least, column
        second = v.least(b.select(equal, b.load(self.second), lanes))
        mask = b.bitcast(equal, ir.IntType(v.lanes))
        others = b.and_(mask, b.sub(mask, ir.Constant(mask.type, 1)))  # the mask without its lowest bit
        tie = b.icmp_unsigned("!=", others, ir.Constant(mask.type, 0))
        return least, column, b.select(tie, least, second)


@intrinsic
def _block_min(typing_context, row, price, offset):  # type: ignore[no-untyped-def]
    """Smallest of the block ``row - price`` that starts at ``offset``."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        v = _Vectors(context, builder, signature, args)
        starts = (builder.add(args[2], ir.Constant(args[2].type, k)) for k in range(0, BLOCK, v.lanes))
        return v.least(reduce(partial(v.pick, "<"), map(v.apart, starts)))

    return price.dtype(row, price, offset), codegen


@intrinsic
def _scan(typing_context, row, price, begin, stop):  # type: ignore[no-untyped-def]
    """Two smallest of ``row - price`` in a range of at least `_LANES` entries, and the column of the first."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        v = _Vectors(context, builder, signature, args)
        nearest = _Nearest(v, runner_up=True)

        def see(offset, fresh):  # type: ignore[no-untyped-def]
            vector = v.apart(offset)
            if fresh is not None:
                vector = builder.select(fresh, vector, ir.Constant(vector.type, [float("inf")] * v.lanes))
            nearest.see(vector, offset)

        v.each(*args[2:4], see)
        least, column, second = nearest.found()
        return context.make_tuple(builder, signature.return_type, [least, second, column])

    return types.Tuple((price.dtype, price.dtype, types.int64))(row, price, begin, stop), codegen


# Inlined by force: left to itself, LLVM makes a call of it in the copies that its callers keep on disk, which then run
# slower than in the process that compiled them.
@compiled(**OPTIONS, forceinline=True)
def two_smallest(row, price, n):  # type: ignore[no-untyped-def]
    """Smallest and second smallest of ``row - price``, and the first one's column. Free of unpredictable branches."""
    infinity = price.dtype.type(np.inf)
    first, second, column = infinity, infinity, 0
    if n < _LANES:
        for k in range(n):
            h = row[k] - price[k]
            better = h < first
            worse = first if better else h
            second = worse if worse < second else second
            first = h if better else first
            column = k if better else column
        return first, second, column
    begin, stop, rest = 0, n, infinity
    if n >= _LONG:
        best, last = infinity, n // BLOCK - 1
        for block in range(last + 1):
            least = _block_min(row, price, block * BLOCK)
            if block == last:  # it ends with the row
                end = _block_min(row, price, n - BLOCK)
                least = end if end < least else least
            better = least < best
            worse = best if better else least
            rest = worse if worse < rest else rest
            best = least if better else best
            begin = block * BLOCK if better else begin
        stop = n if begin == last * BLOCK else begin + BLOCK
    first, second, column = _scan(row, price, begin, stop)
    return first, rest if rest < second else second, column


@intrinsic
def _relax(typing_context, row, price, n, shift, dist, parent, via):  # type: ignore[no-untyped-def]
    """`relaxed` for at least `_LANES` columns."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        v = _Vectors(context, builder, signature, args)
        nearest, shift, via = _Nearest(v, runner_up=False), v.splat(args[3]), v.splat(args[6])

        def shorten(offset, _):  # type: ignore[no-untyped-def]
            through = builder.fsub(v.apart(offset), shift)
            (dist, *hint), (parent, *other_hint) = v.place(4, offset), v.place(5, offset)
            before = builder.load(dist, *hint)
            better = builder.fcmp_ordered("<", through, before)
            after = builder.select(better, through, before)
            builder.store(after, dist, hint[1])
            builder.store(builder.select(better, via, builder.load(parent, *other_hint)), parent, other_hint[1])
            nearest.see(after, offset)

        v.each(ir.Constant(args[2].type, 0), args[2], shorten)
        return context.make_tuple(builder, signature.return_type, nearest.found())

    return types.Tuple((price.dtype, types.int64))(row, price, n, shift, dist, parent, via), codegen


@compiled(**OPTIONS)
def relaxed(row, price, shift, dist, parent, via):  # type: ignore[no-untyped-def]
    """Shorten distances to ``row - price - shift``, setting their ``parent`` to ``via``; the least and its column.

    Args:
        row: ``(n,)`` or more.
        price: ``(n,)`` float64; ``-inf`` at columns to leave alone.
        shift: float64.
        dist: ``(n,)`` float64, written.
        parent: ``(n,)`` int64, written.
        via: int64.
    """
    n, least, column = len(dist), np.inf, 0
    if n >= _LANES:
        return _relax(row, price, n, shift, dist, parent, via)
    for k in range(n):
        h = row[k] - price[k] - shift
        if h < dist[k]:
            dist[k], parent[k] = h, via
        if dist[k] < least:
            least, column = dist[k], k
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
    n, least = len(entries), np.inf
    if n < BLOCK:
        least, _, _ = two_smallest(entries, zero, n)
        return least
    for e in range(0, n - BLOCK, BLOCK):
        least = min(least, _block_min(entries[e : e + BLOCK], zero, 0))
    return min(least, _block_min(entries[n - BLOCK :], zero, 0))
