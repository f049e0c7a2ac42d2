"""Minimum-cost matchings of square problems with points of equal weight: of all points, or of a number of pairs.

This module chooses the backend: numba's kernels on the CPU; Triton's on a CUDA device (or, in tests, their plain-torch
reference), where a problem's state fits one thread block.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from mbot.certify import certified
from mbot.kernels import device_matching
from mbot.problem import Problems, Solution

_ROUNDING = 1e-12  # of a mass that is a whole number of pairs
_Columns = list[Tensor]  # of each matching, ``(B, n)`` int64, the column of each row; -1 for none


def match(problems: Problems) -> Solution:
    """The cheapest matching of each square problem.

    Args:
        problems: points have weight 1. ``mass`` is the number of pairs, below n; it need not be whole: the optimum is
            linear in it between whole numbers. Problems of different sizes are matched completely.

    Returns:
        Certified solutions with potentials; see `mbot.certify.certified`.
    """
    return certified(problems, _match)


def _match(problems: Problems) -> Solution:
    n = problems.size[0]
    if problems.mass is None:
        shares, (columns, f, g) = [1.0], _complete(problems)
    else:
        lower, share = split_pairs(problems.mass)
        if lower == 0:
            return _cheapest_pair(problems, share)
        shares, (columns, f, g) = [1 - share, share][: 1 + (share > 0)], _partial(problems, lower, share > 0)
    weight = torch.ones_like(f) if problems.a is None else problems.a
    if problems.mass is None:
        return Solution(None, columns[0], weight, f, g)
    column = torch.cat(columns, 1)
    mass = torch.cat([weight * share for share in shares], 1)
    row = torch.arange(n, device=f.device).repeat(len(shares)).expand_as(column)
    return Solution(row, column.clamp_min(0), torch.where(column < 0, 0, mass), f, g)


def split_pairs(mass: float) -> tuple[int, float]:
    """The pairs of the smaller of two matchings that make up a plan of this mass, and the share of the larger one."""
    whole = round(mass)
    if abs(mass - whole) <= _ROUNDING * whole:
        return whole, 0.0
    lower = math.floor(mass)
    return lower, mass - lower


def _cheapest_pair(problems: Problems, mass: float) -> Solution:
    """The cheapest pair of each problem, of a mass below 1."""
    count, n = problems.count, problems.size[0]
    least, cell = problems.flat.view(count, -1).min(1, keepdim=True)
    f = least.double().expand(-1, n)
    return Solution(cell // n, cell % n, torch.full_like(least, mass, dtype=torch.float64), f, torch.zeros_like(f))


def _complete(problems: Problems) -> tuple[_Columns, Tensor, Tensor]:
    n = problems.size[0]
    if not device_matching.applies(problems.flat, n):
        from mbot.kernels.assignment import assign

        column, f, g = assign(_array(problems.flat), problems.rows, problems.capped)
        return [_padded(problems, column)], _padded(problems, f), _padded(problems, g)
    if problems.sizes is None:
        return device_matching.match(problems.flat.view(-1, n, n), capped=problems.capped)
    return _blocks_on_device(problems)


def _partial(problems: Problems, pairs: int, more: bool) -> tuple[_Columns, Tensor, Tensor]:
    """Matchings with so many pairs and, with ``more``, with a pair more; potentials are optimal for both."""
    n = problems.size[0]
    if device_matching.applies(problems.flat, 2 * n - pairs):
        return device_matching.match(problems.flat.view(-1, n, n), pairs, more, problems.capped)
    from mbot.kernels.cardinality import match as kernel

    columns, f, g = (
        torch.from_numpy(part).to(problems.flat.device)
        for part in kernel(_array(problems.flat), n, pairs, more, problems.capped)
    )
    return list(columns), f, g


def _array(flat: Tensor) -> np.ndarray:
    return flat.contiguous().cpu().numpy()


def _padded(problems: Problems, points: np.ndarray) -> Tensor:
    """Values of the rows of all problems, given one after another, as ``(B, n)``."""
    count, n = problems.count, problems.size[0]
    if problems.sizes is not None:
        full = np.zeros((count, n), points.dtype)
        full[np.arange(n) < problems.rows[:, None]] = points
        points = full
    return torch.from_numpy(points.reshape(count, n)).to(problems.flat.device)


def _blocks_on_device(problems: Problems) -> tuple[_Columns, Tensor, Tensor]:
    """Problems of different sizes, in batches of similar ones filled up by dummy points, which match each other."""
    count, n = problems.count, problems.size[0]
    flat, device = problems.flat, problems.flat.device
    column = torch.zeros(count, n, dtype=torch.int64, device=device)
    f, g = torch.zeros(2, count, n, dtype=torch.float64, device=device)
    left = np.argsort(problems.rows)[::-1]
    while len(left):
        top = int(problems.rows[left[0]])
        some, left = np.split(left, [int((2 * problems.rows[left] > top).sum())])
        sizes, start, which = (
            torch.from_numpy(part.copy()).to(device) for part in (problems.rows[some], problems.starts[some], some)
        )
        at = torch.arange(top, device=device)
        real = at < sizes[:, None]
        inside = real[:, :, None] & real[:, None, :]
        index = start[:, None, None] + at[:, None] * sizes[:, None, None] + at
        cost = flat[torch.where(inside, index, index[:, :1, :1])].double()  # a cost of the problem for the dummies
        low, high = cost.flatten(1).aminmax(dim=1)
        # A dummy has one partner, so that no two want the same. Any other pair with a dummy costs more than what could
        # replace it; still more would set the unit of the start, which then leaves more rows.
        outside = high + torch.where(high > low, high - low, high.abs().clamp_min(1))
        own = torch.eye(top, dtype=torch.bool, device=device)
        cost = torch.where(inside, cost, torch.where(own, low[:, None, None], outside[:, None, None]))
        (found,), f_some, g_some = device_matching.match(cost, capped=problems.capped)
        column[which, :top] = torch.where(real, found, 0)
        f[which, :top], g[which, :top] = torch.where(real, f_some, 0), torch.where(real, g_some, 0)
    return [column], f, g
