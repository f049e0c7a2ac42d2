"""Matchings of all pairs of mini-batches in few compiled calls, without a tensor of all costs.

This is the fast path of a grid of equal mini-batches on the CPU; where it does not apply, or a plan could not be
certified by it, `mbot.solvers.matching.match` solves the problems from their costs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mbot.cost import DIRECT_FEATURES, certain_share
from mbot.kernels.threads import run_slices
from mbot.numerics import full_float32, no_autocast
from mbot.problem import TOLERANCE
from mbot.solvers import fast_paths
from mbot.solvers.matching import split_pairs

_CHUNK = 1 << 20  # inner products that are made at a time


@dataclass(frozen=True)
class GridMatching:
    """Certified matchings between mini-batches ``(k, n, d)`` and ``(k', n, d)``.

    Attributes:
        values: ``(k, k')`` float64, costs of the plans.
        error: ``(k k',)`` as of `mbot.problem.Solution`.
        column: ``(k, k', E, n)`` int64, the column of each row in each of E matchings; -1 for none.
        shares: ``(E,)`` float64, the mass of each pair of a matching.
    """

    values: Tensor
    error: np.ndarray
    column: np.ndarray
    shares: np.ndarray

    def entries(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows and columns of the pairs, and their masses times weights of the problems: ``(k, k', e)``."""
        n = self.column.shape[3]
        column = torch.from_numpy(self.column).flatten(2)
        row = torch.arange(n).repeat(len(self.shares)).expand_as(column)
        mass = torch.from_numpy(self.shares).to(weight.dtype).repeat_interleave(n) * weight[..., None]
        return row, column.clamp_min(0), torch.where(column < 0, 0, mass)

    def gradients(self, x: Tensor, y: Tensor, weight: Tensor, needed: tuple[bool, ...]) -> list[Tensor | None]:
        """Gradients of ``sum_ij weight_ij values_ij`` in the points of either side, where they are needed."""
        from mbot.kernels.grid import moved

        left, right = (points.detach().flatten(0, 1).numpy() for points in (x, y))
        weights = weight.double().numpy()
        found: list[Tensor | None] = []
        for side, points in enumerate((x, y)):
            if not needed[side]:
                found.append(None)
                continue
            out = torch.zeros_like(points, memory_format=torch.contiguous_format)
            array = out.flatten(0, 1).numpy()

            def some(begin: int, stop: int, by_target: bool = bool(side), array: np.ndarray = array) -> None:
                moved(left, right, self.column, self.shares, weights, by_target, begin, stop, array)

            run_slices(some, np.ones(len(points)), self.column.size / len(points) * points.shape[2])
            found.append(out)
        return found


def match_grid(x: Tensor, y: Tensor, pairs: float) -> GridMatching | None:
    """The cheapest matchings of all pairs of mini-batches under the squared Euclidean cost.

    Args:
        x: ``(k, n, d)`` mini-batches, without gradient.
        y: ``(k', n, d)``.
        pairs: how many pairs of the n move, as `mbot.solvers.matching.match` takes it.

    Returns:
        The matchings; None if they need another path: a device, half precision, costs that cancel in the points'
        dtype, costs that are not finite, a plan that is not certified.
    """
    (k, n, d), wide = x.shape, len(y)
    if not (fast_paths.get() and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and pairs >= 1):
        return None
    from mbot.kernels import grid as kernel

    left, right = (points.reshape(-1, d).contiguous().numpy() for points in (x, y))
    lower, share = split_pairs(pairs)
    shares = np.array([1 - share, share][: 1 + (share > 0)])
    column, least = np.empty((k * wide, len(shares), n), np.int64), np.empty((k * wide, n), left.dtype)
    values, error = np.empty((2, k * wide))
    out = column, values, error, least
    solve, extra = (kernel.complete, ()) if lower == n else (kernel.partial, (lower, share))
    direct = d <= DIRECT_FEATURES
    if direct:
        batches, norms = k, (np.empty(0, left.dtype),) * 2
        product, others = np.empty((0, 0), left.dtype), np.ascontiguousarray(right.T)
    else:
        batches = max(1, _CHUNK // (wide * n * n))
        left, others, *norms = kernel.centred(left, right)

    for first in range(0, k, batches):
        some = slice(first * n, (first + batches) * n)
        if not direct:
            with no_autocast(x), full_float32():
                product = (torch.from_numpy(left[some]) @ torch.from_numpy(others).T).numpy()

        def part(begin: int, stop: int, first: int = first, product: np.ndarray = product) -> None:
            costs_of = product, first * n, left, others, *norms
            solve(costs_of, wide, first * wide + begin, first * wide + stop, out, *extra)

        run_slices(part, np.ones(min(batches, k - first) * wide), n**2.5)
    if not (error <= TOLERANCE).all():
        return None
    if not direct and not kernel.unsure(norms[0], least, wide) <= certain_share(x.dtype):
        return None
    values = values.reshape(k, wide) / n
    return GridMatching(torch.from_numpy(values), error, column.reshape(k, wide, len(shares), n), shares / n)
