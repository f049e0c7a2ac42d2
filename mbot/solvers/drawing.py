"""Draws from dense plans, given their random numbers: a row for each column, and shares rounded to whole numbers.

Compiled on the CPU, where these are many small operations; the functions with an underscore are what a device runs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mbot.numerics import running_sum

_BLOCK = 32  # rows that are summed up before one of them is chosen
_INSIDE = 1e-6, 1 - 1e-6  # what a whole number is rounded by: its own rounding must not split a certain draw


def first_beyond(ends: Tensor, mass: Tensor, wanted: Tensor) -> Tensor:
    """The first cell whose cumulative mass ``ends`` ``(…, n)`` is beyond ``wanted`` ``(…, k)``; never one without mass.

    Args:
        ends: cumulative mass.
        mass: of the cells.
        wanted: amounts.
    """
    cell = torch.searchsorted(ends, wanted, right=True)
    last = mass.shape[-1] - 1 - (mass > 0).flip(-1).int().argmax(-1, keepdim=True)
    return cell.minimum(last)


def rows_of_columns(mass: Tensor, target: Tensor, uniform: Tensor) -> Tensor:
    """A row for each target, drawn from its column; never a cell without mass.

    Args:
        mass: ``(n, m)``, of columns that have mass.
        target: ``(k,)`` int64 columns.
        uniform: ``(k,)`` float64 random numbers in [0, 1).
    """
    if mass.device.type != "cpu":
        return _rows_of_columns(mass, target, uniform)
    from mbot.kernels.drawing import rows_of_columns as kernel

    return torch.from_numpy(kernel(*(part.contiguous().numpy() for part in (mass, target, uniform)), _BLOCK))


def _rows_of_columns(mass: Tensor, target: Tensor, uniform: Tensor) -> Tensor:
    # First the block of rows, then the row in it: one pass in the order of memory, and no cumulative sums of the plan.
    blocks = -(-len(mass) // _BLOCK)
    mass = F.pad(mass, (0, 0, 0, blocks * _BLOCK - len(mass)))
    sums = mass.reshape(blocks, _BLOCK, -1).sum(1, dtype=torch.float64).T[target]
    ends = running_sum(sums, -1)
    wanted = uniform[:, None] * ends[:, -1:]
    block = first_beyond(ends, sums, wanted)
    rows = _BLOCK * block + torch.arange(_BLOCK, device=target.device)
    inside = mass[rows, target[:, None]].double()
    cell = first_beyond(running_sum(inside, -1), inside, wanted - (ends - sums).gather(-1, block))
    return rows.gather(-1, cell)[:, 0]


def rounded(share: Tensor, uniform: Tensor) -> Tensor:
    """Each index i of ``share`` ``(n,)`` (float64) as often as it says, rounded up or down by one random number.

    Args:
        share: non-negative numbers.
        uniform: ``(1,)`` float64 in [0, 1).
    """
    if share.device.type != "cpu":
        return _rounded(share, uniform)
    from mbot.kernels.drawing import rounded as kernel

    return torch.from_numpy(kernel(share.contiguous().numpy(), _inside(uniform)))


def _rounded(share: Tensor, uniform: Tensor) -> Tensor:
    uniform = uniform.clamp(*_INSIDE)
    whole = share.round()
    share = torch.where((share - whole).abs() < 1e-6, whole, share)  # rounding must not split a certain draw
    position = running_sum(share, 0) + uniform
    times = position.floor().diff(prepend=position.new_zeros(1)).long()
    return torch.arange(len(share), device=share.device).repeat_interleave(times)


def _inside(uniform: Tensor) -> float:
    return min(max(float(uniform), _INSIDE[0]), _INSIDE[1])


def stratified(mass: Tensor, count: int, numbers: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
    """Pairs of a dense plan: each column as often as its mass says, in order, and a row drawn from it each time.

    Args:
        mass: ``(n, m)``.
        count: number of pairs.
        numbers: so many random numbers, ``(k,)`` float64 in [0, 1); asked for one, and then for one a pair.

    Returns:
        ``(row, column)`` int64, ``(count,)`` each.
    """
    if mass.device.type != "cpu":
        share = mass.sum(0, dtype=torch.float64)
        target = _rounded(share * (count / share.sum()), numbers(1))
        return _rows_of_columns(mass, target, numbers(len(target))), target
    from mbot.kernels import drawing as kernels

    cells = mass.contiguous().numpy()
    target, sums = kernels.columns_by_mass(cells, count, _inside(numbers(1)), _BLOCK)
    source = kernels.rows_from(cells, sums, target, numbers(len(target)).numpy(), _BLOCK)
    return torch.from_numpy(source), torch.from_numpy(target)
