"""Draws from dense plans on the CPU, given their random numbers; see `mbot.solvers.drawing`."""

from __future__ import annotations

import numpy as np

from minibatch_transport import compiled


@compiled(nogil=True, error_model="numpy")
def rounded(share, uniform):  # type: ignore[no-untyped-def]
    """Each index i as often as ``share_i`` says, in order, rounded up or down by one random number."""
    position = np.empty(len(share))
    total = 0.0
    for i in range(len(share)):
        whole = np.rint(share[i])
        total += whole if abs(share[i] - whole) < 1e-6 else share[i]  # rounding must not split a certain draw
        position[i] = np.floor(total + uniform)
    index, k = np.empty(max(0, np.int64(position[-1])), np.int64), 0
    for i in range(len(share)):
        while k < position[i]:
            index[k] = i
            k += 1
    return index


@compiled(nogil=True, error_model="numpy")
def block_sums(mass, size):  # type: ignore[no-untyped-def]
    """Sums of the columns over ``size`` rows at a time."""
    n, m = mass.shape
    sums = np.zeros((-(-n // size), m))
    for i in range(n):
        line = sums[i // size]
        for j in range(m):
            line[j] += mass[i, j]
    return sums


@compiled(nogil=True, error_model="numpy")
def columns_by_mass(mass, count, uniform, size):  # type: ignore[no-untyped-def]
    """``count`` columns, see `rounded`, each in proportion to its mass; and their `block_sums`."""
    sums = block_sums(mass, size)
    share = np.zeros(mass.shape[1])
    for block in range(len(sums)):
        for j in range(len(share)):
            share[j] += sums[block, j]
    unit = count / share.sum()
    for j in range(len(share)):
        share[j] *= unit
    return rounded(share, uniform), sums


@compiled(nogil=True, error_model="numpy")
def rows_from(mass, sums, target, uniform, size):  # type: ignore[no-untyped-def]
    """A row for each target, drawn from its column, of which ``sums`` are the `block_sums`."""
    n = len(mass)
    source = np.empty(len(target), np.int64)
    for k in range(len(target)):
        j = target[k]
        total = 0.0
        for block in range(len(sums)):
            total += sums[block, j]
        wanted, reached, start, chosen, row = uniform[k] * total, 0.0, 0.0, 0, 0
        for block in range(len(sums)):  # the first whose cumulative mass is larger, or the last with mass
            if sums[block, j] > 0.0:
                chosen, start = block, reached
                reached += sums[block, j]
                if reached > wanted:
                    break
        for i in range(chosen * size, min(n, (chosen + 1) * size)):
            if mass[i, j] > 0.0:
                row = i
                start += mass[i, j]
                if start > wanted:
                    break
        source[k] = row
    return source


@compiled(nogil=True, error_model="numpy")
def rows_of_columns(mass, target, uniform, size):  # type: ignore[no-untyped-def]
    """A row for each target, drawn from its column; ``size`` rows are summed up before one of them is chosen."""
    return rows_from(mass, block_sums(mass, size), target, uniform, size)
