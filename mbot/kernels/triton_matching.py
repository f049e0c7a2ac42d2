"""Triton kernels of `mbot.kernels.device_matching`: one problem a thread block, or its rows spread over the device.

Within a block, threads share a problem's state through global memory that stays in the first-level cache. Shared
arrays are read-only while a path is searched or traced; changes are collected in registers and written between two
barriers, so no thread reads what another may be writing.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from mbot.kernels.device_matching import Problems

_BLOCKWISE = 512  # columns up to which a single block runs the whole Sinkhorn start
_TILE = 4096  # entries of a tile of rows
_STRIP = 128  # columns of a program that renews prices
_PROGRAMS = 528  # programs that a pass is spread over: four a multiprocessor of a large card


@triton.jit
def _entries(cost, rows, cols, n, outside, big_m, DUMMIES: tl.constexpr):
    """Costs in float64 at broadcast rows and columns; 0 beyond the last where there are no dummies."""
    real = (rows < n) & (cols < n)
    entries = tl.load(cost + rows * n + cols, mask=real, other=0.0).to(tl.float64)
    if DUMMIES:
        entries = tl.where(real, entries, tl.where((rows >= n) & (cols >= n), big_m, outside))
    return entries


@triton.jit
def _units(cost, lows, excesses, outsides, big_ms, problem):
    """Factors that scale costs to units of their excess above the least one, and the dummies' costs half-way scaled.

    In two steps, each with the root of the excess: neither overflows nor underflows for costs of float32's range.
    """
    low, excess = tl.load(lows + problem), tl.load(excesses + problem)
    excess = tl.where(excess > 0, excess, 1.0)
    root = 1 / tl.sqrt(excess)
    outside, big_m = tl.load(outsides + problem) - low, tl.load(big_ms + problem) - low
    entry = cost.dtype.element_ty
    return (
        root.to(entry),
        (low * root).to(entry),
        root.to(tl.float32),
        (outside * root).to(tl.float32),
        (big_m * root).to(tl.float32),
    )


@triton.jit
def _column_masses(
    cost, level, begin, stop, sharpness, n, size, scale, shift, outside, big_m,
    DUMMIES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Column sums over some rows of the plan whose rows sum to one.

    ``level`` are the prices over epsilon, -inf beyond the last column; ``sharpness`` is the second step to units of
    the excess, over epsilon. Exponents are in base 2. The start spends its time here.
    """
    cols = tl.arange(0, BLOCK)[None, :]
    masses = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(begin, stop, ROWS):
        rows = first + tl.arange(0, ROWS)[:, None]
        real = (rows < n) & (cols < n)
        halfway = (tl.load(cost + rows * n + cols, mask=real, other=0.0) * scale - shift).to(tl.float32)
        if DUMMIES:
            halfway = tl.where(real, halfway, tl.where((rows >= n) & (cols >= n), big_m, outside))
        exponent = level[None, :] - halfway * sharpness
        plan = tl.exp2(exponent - tl.max(exponent, 1)[:, None])
        share = tl.where(first + tl.arange(0, ROWS) < stop, 1 / tl.sum(plan, 1), 0.0)
        masses += plan * share[:, None]
    return tl.sum(masses, 0)


@triton.jit
def _start_kernel(
    cost, lows, excesses, outsides, big_ms, prices, n, size, levels, rounds, inverse, growth,
    DUMMIES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The whole epsilon-scaled Sinkhorn of one problem in one block."""
    problem = tl.program_id(0).to(tl.int64)
    cost += problem * n * n
    scale, shift, stretch, outside, big_m = _units(cost, lows, excesses, outsides, big_ms, problem)
    cols = tl.arange(0, BLOCK)
    price = tl.zeros([BLOCK], tl.float32)
    for _level in range(levels):
        for _round in range(rounds):
            level = tl.where(cols < size, price * inverse, float("-inf"))
            masses = _column_masses(
                cost, level, 0, size, stretch * inverse, n, size, scale, shift, outside, big_m, DUMMIES, ROWS, BLOCK
            )
            price -= tl.log2(tl.maximum(masses, 1e-30)) / inverse
        inverse = inverse * growth
    tl.store(prices + problem * size + cols, price, mask=cols < size)


@triton.jit
def _pass_kernel(
    cost, lows, excesses, outsides, big_ms, prices, masses, n, size, inverse, share,
    DUMMIES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Column masses of ``share`` rows of one problem: one iteration's work of one block."""
    problem, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cost += problem * n * n
    scale, shift, stretch, outside, big_m = _units(cost, lows, excesses, outsides, big_ms, problem)
    cols = tl.arange(0, BLOCK)
    level = tl.load(prices + problem * size + cols, mask=cols < size, other=float("-inf")) * inverse
    begin = part * share
    stop = tl.minimum(begin + share, size)
    sums = _column_masses(
        cost, level, begin, stop, stretch * inverse, n, size, scale, shift, outside, big_m, DUMMIES, ROWS, BLOCK
    )
    tl.store(masses + (problem * tl.num_programs(1) + part) * size + cols, sums, mask=cols < size)


@triton.jit
def _price_kernel(prices, masses, size, parts, step, BLOCK: tl.constexpr):
    """The prices' step of one iteration, from the column masses of all parts; ``step`` is epsilon, in base 2."""
    problem = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mass = tl.zeros([BLOCK], tl.float32)
    for part in range(parts):
        mass += tl.load(masses + (problem * parts + part) * size + cols, mask=cols < size, other=1.0)
    price = tl.load(prices + problem * size + cols, mask=cols < size, other=0.0)
    tl.store(prices + problem * size + cols, price - step * tl.log2(tl.maximum(mass, 1e-30)), mask=cols < size)


@triton.jit
def _scan_kernel(
    cost, prices, outsides, big_ms, least, want, n, size,
    DUMMIES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Least reduced cost of some rows, and the first column that has it."""
    problem = tl.program_id(0).to(tl.int64)
    cost += problem * n * n
    outside, big_m = tl.load(outsides + problem), tl.load(big_ms + problem)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    price = tl.load(prices + problem * size + cols, mask=cols < size, other=0.0)
    reduced = _entries(cost, rows[:, None], cols[None, :], n, outside, big_m, DUMMIES) - price[None, :]
    reduced = tl.where(cols[None, :] < size, reduced, float("inf"))
    smallest = tl.min(reduced, 1)
    first = tl.min(tl.where(reduced == smallest[:, None], cols[None, :], BLOCK), 1)
    tl.store(least + problem * size + rows, smallest, mask=rows < size)
    tl.store(want + problem * size + rows, first, mask=rows < size)


# Facts of a path search about a column, in one integer with the row that it was reached from.
_DUMMY = tl.constexpr(1 << 28)  # its row is a dummy
_TAKEN = tl.constexpr(1 << 29)  # it has a row
_SETTLED = tl.constexpr(1 << 30)  # its distance is final


@triton.jit
def _nearest(dist, tag, asleep, cols, BLOCK: tl.constexpr):
    """The least distance of the columns to visit, and where; free columns before taken ones."""
    visit = (tag < _SETTLED) & ((tag & asleep) == 0)
    least = tl.min(tl.where(visit, dist, float("inf")), 0)
    key = tl.where(visit & (dist == least), cols + tl.where((tag & _TAKEN) != 0, BLOCK, 0), 2 * BLOCK)
    return least, tl.min(key, 0) % BLOCK


@triton.jit
def _finish_kernel(
    cost, prices, outsides, big_ms, rows_of, cols_of, parents, n, size,
    DUMMIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Shortest augmenting paths of one problem, for each row whose column is -1.

    Dummy rows are copies of each other: a path that has left from one finds nothing shorter from the others, whose
    columns need no visit. Distances and tags stay in registers; prices, of which there may be 128 KB, do not.
    """
    problem = tl.program_id(0).to(tl.int64)
    cost += problem * n * n
    prices += problem * size
    rows_of += problem * size
    cols_of += problem * size
    parents += problem * size
    outside, big_m = tl.load(outsides + problem), tl.load(big_ms + problem)
    cols = tl.arange(0, BLOCK)
    inside = cols < size
    for start in range(size):
        if tl.load(cols_of + start) < 0:
            row_of = tl.load(rows_of + cols, mask=inside, other=-1)
            tag = start + tl.where(row_of >= 0, _TAKEN, 0) + tl.where(inside, 0, _SETTLED)
            asleep = tl.zeros([], tl.int32)
            if DUMMIES:
                tag += tl.where(row_of >= n, _DUMMY, 0)
                asleep = tl.where(start >= n, _DUMMY, 0)
            price = tl.load(prices + cols, mask=inside, other=0.0)
            dist = _entries(cost, tl.zeros([BLOCK], tl.int32) + start, cols, n, outside, big_m, DUMMIES) - price
            least, end = _nearest(dist, tag, asleep, cols, BLOCK)
            row = tl.load(rows_of + end)
            while row >= 0:
                tag = tl.where(cols == end, tag | _SETTLED, tag)
                if DUMMIES:
                    asleep = tl.where(row >= n, _DUMMY, asleep)
                shift = _entries(cost, row, end, n, outside, big_m, DUMMIES) - tl.load(prices + end) - least
                price = tl.load(prices + cols, mask=inside, other=0.0)
                via = tl.zeros([BLOCK], tl.int32) + row
                through = _entries(cost, via, cols, n, outside, big_m, DUMMIES) - price - shift
                better = (tag < _SETTLED) & (through < dist)
                dist = tl.where(better, through, dist)
                tag = tl.where(better, (tag & (_DUMMY | _TAKEN)) | row, tag)
                least, end = _nearest(dist, tag, asleep, cols, BLOCK)
                row = tl.load(rows_of + end)
            tl.debug_barrier()  # or the compiler takes the prices of the first load, and keeps them in registers
            price = tl.load(prices + cols, mask=inside, other=0.0)
            tl.debug_barrier()
            tl.store(prices + cols, tl.where(dist < least, price + (dist - least), price), mask=inside)
            tl.store(parents + cols, tag & (_DUMMY - 1), mask=inside)
            tl.debug_barrier()
            # Trace the path back. Memory is only read here; the new pairs are written once all threads have passed.
            row_of = tl.load(rows_of + cols, mask=inside, other=0)
            col_of = tl.load(cols_of + cols, mask=inside, other=0)
            while end >= 0:
                row = tl.load(parents + end)
                previous = tl.load(cols_of + row)
                row_of = tl.where(cols == end, row, row_of)
                col_of = tl.where(cols == row, end, col_of)
                end = previous  # -1 at the row that had no column
            tl.debug_barrier()
            tl.store(rows_of + cols, row_of, mask=inside)
            tl.store(cols_of + cols, col_of, mask=inside)
            tl.debug_barrier()


def _block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _tile(size: int) -> dict[str, Any]:
    """Shape and warps of tiles of whole rows."""
    block = _block(size)
    warps = 4 if block < 128 else 8 if block <= 4096 else 16
    return {
        "ROWS": max(1, _TILE // block),
        "BLOCK": block,
        "num_warps": warps,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }


def _on(cost: Tensor) -> Any:
    return torch.cuda.device(cost.device) if cost.is_cuda else nullcontext()


def probe() -> None:
    """Launch a kernel on the current device; raises what Triton raises."""
    price, masses = torch.zeros(1, 1, device="cuda"), torch.ones(1, 1, 1, device="cuda")
    _price_kernel[(1, 1)](price, masses, 1, 1, 1.0, BLOCK=16)


def start(problems: Problems) -> Tensor:
    """See `mbot.kernels.device_matching.Reference.start`."""
    cost, n, size = problems.cost, problems.n, problems.size
    count, tile = len(cost), _tile(size)
    price = torch.zeros(count, size, dtype=torch.float32, device=cost.device)
    levels, rounds = problems.levels(), problems.schedule()[1]
    given = (cost, problems.low, problems.excess, problems.outside, problems.big_m)
    with _on(cost):
        if size <= _BLOCKWISE:
            inverse, growth = 1 / (levels[0] * math.log(2)), levels[0] / levels[1]
            _start_kernel[(count,)](*given, price, n, size, len(levels), rounds, inverse, growth, size > n, **tile)
        else:
            steps = triton.cdiv(size, tile["ROWS"])
            parts = min(steps, max(1, _PROGRAMS // count))
            share = triton.cdiv(steps, parts) * tile["ROWS"]
            parts = triton.cdiv(size, share)
            masses = torch.empty(count, parts, size, dtype=torch.float32, device=cost.device)
            for epsilon in levels:
                step = epsilon * math.log(2)
                for _ in range(rounds):
                    _pass_kernel[(count, parts)](*given, price, masses, n, size, 1 / step, share, size > n, **tile)
                    _price_kernel[(count, triton.cdiv(size, _STRIP))](price, masses, size, parts, step, BLOCK=_STRIP)
    return price.double() * problems.excess[:, None]


def scan(problems: Problems, price: Tensor) -> tuple[Tensor, Tensor]:
    """See `mbot.kernels.device_matching.Reference.scan`."""
    cost, size, tile = problems.cost, problems.size, _tile(problems.size)
    least = torch.empty_like(price)
    want = torch.empty(price.shape, dtype=torch.int32, device=cost.device)
    with _on(cost):
        _scan_kernel[(len(cost), triton.cdiv(size, tile["ROWS"]))](
            cost, price, problems.outside, problems.big_m, least, want, problems.n, size, size > problems.n, **tile
        )
    return least, want


def finish(problems: Problems, price: Tensor, row_of: Tensor, col_of: Tensor) -> None:
    """See `mbot.kernels.device_matching.Reference.finish`."""
    cost, size = problems.cost, problems.size
    block = _block(size)
    with _on(cost):
        _finish_kernel[(len(cost),)](
            cost, price, problems.outside, problems.big_m, row_of, col_of, torch.empty_like(row_of), problems.n, size,
            size > problems.n, BLOCK=block, num_warps=min(32, max(1, block // 256)), num_stages=1,
            enable_fp_fusion=True,
        )  # fmt: skip
