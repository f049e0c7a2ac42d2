"""Partial optimal transport: move a given mass at the least cost (m-POT, Nguyen et al. 2022, arXiv 2108.09645).

``min <C, P>`` over ``P >= 0`` with row sums at most ``a``, column sums at most ``b`` and total ``mass``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mbot import checks
from mbot.plan import Plan
from mbot.problem import Live, Problems, Solution
from mbot.solvers.entropic import solve_matrices
from mbot.solvers.marginals import UpperBounded
from mbot.solvers.matching import match
from mbot.solvers.simplex import simplex
from mbot.transport.base import Transport, flat_weights, potentials_of
from mbot.transport.entropic import plan_of
from mbot.transport.exact import ExactOT


@dataclass(frozen=True)
class PartialOT(Transport):
    """Exact or entropic partial transport of a batch of problems.

    ``reg = 0``: exact. With uniform weights and n = m the optimum is piecewise linear in the mass with bends at
    multiples of 1/n: cardinality-constrained assignments at the two neighbouring bends are solved and interpolated.
    Otherwise the dummy-point problem goes to the network simplex. ``mass`` equal to the whole mass is `ExactOT`;
    ``mass = 0`` is the zero plan. Costs of any sign are right, and ``+inf`` forbids a pair.

    ``reg > 0``: ``min <C, P> + reg Σ P log P`` over the same plans, by exact alternating minimisation in the log
    domain (the fixed point of the Bregman-Dykstra projections of Benamou et al. 2015, with one correction a row and a
    column instead of three matrices). This is POT's objective; the Sinkhorn problem with dummy points is another one.

    The value is not renormalised: it shrinks with the mass, as in the m-POT loss.

    Uniform square problems on a CUDA device are solved there, as by `ExactOT`, up to 16,384 rows with the dummy ones.

    Args:
        mass: total mass to move, between 0 and the smaller total weight (1 for uniform weights).
        reg: entropic regularisation in cost units; 0 for exact.
        max_iter: iterations of the entropic solver before a `mbot.ConvergenceWarning`.
        tol: share of the mass that an entropic update may still move at the end.

    >>> x = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    >>> y = torch.tensor([[3.0], [4.0], [5.0]], dtype=torch.float64)
    >>> PartialOT(mass=1 / 3)(x, y), PartialOT(mass=0.5)(x, y), PartialOT(mass=1.0)(x, y)
    (tensor(0., dtype=torch.float64), tensor(0.3333, dtype=torch.float64), tensor(4., dtype=torch.float64))
    """

    leaves_mass: ClassVar[bool] = True

    mass: float
    reg: float = 0.0
    max_iter: int = 10_000
    tol: float = 1e-6

    def __post_init__(self) -> None:
        checks.store(
            self,
            mass=checks.positive(self.mass, "mass", allow_zero=True),
            reg=checks.positive(self.reg, "reg", allow_zero=True),
            max_iter=checks.count(self.max_iter, "max_iter"),
            tol=checks.positive(self.tol, "tol"),
        )

    def for_pairs(self, n: int, m: int) -> PartialOT:
        """Of equal batches, an exact plan that moves a whole number of pairs: the nearest, at least one."""
        if self.mass == 0 or self.reg > 0 or n != m:
            return self
        return replace(self, mass=max(1, round(self.mass * n)) / n)

    def matched_pairs(self, n: int, m: int) -> float | None:
        """See `Transport`."""
        return self.mass * n if n == m and self.reg == 0 and self.mass < 1 - 1e-12 else None

    def weight_slopes(self, plan: Plan, cost: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """See `Transport`: more weight lowers the value where all of it moves, and changes nothing elsewhere."""
        if self.mass == 0:
            return torch.zeros_like(a), torch.zeros_like(b)
        if self.reg > 0 and bool((a == 0).any() | (b == 0).any()):
            raise ValueError("the entropic partial value has no derivative in a weight that is 0; detach the weights")
        f, g = potentials_of(self, plan)
        f, g = (
            potential - potential.masked_fill(weight == 0, -torch.inf).amax(-1, keepdim=True)
            for potential, weight in ((f, a), (g, b))
        )
        return f, g

    def _solve(self, cost: Tensor, a: Tensor | None, b: Tensor | None) -> Plan:
        n, m = cost.shape[-2:]
        uniform = a is None and b is None
        flat_a, flat_b = flat_weights(cost, a, b)
        totals = torch.stack((flat_a.sum(-1), flat_b.sum(-1)))
        limit = 1.0 if uniform else float(totals.amin())
        if self.mass > limit * (1 + 1e-5):
            raise ValueError(
                f"mass must lie in [0, {limit:.6g}], the smaller total weight; got {self.mass:g}. "
                "Lower it, or pass weights with a larger total"
            )
        mass = min(self.mass, limit)  # sums of weights, such as n times 1/n in float32, may fall short by rounding
        if mass == 0:
            empty = torch.zeros(*cost.shape[:-2], 1, dtype=torch.int64, device=cost.device)
            return Plan(empty.to(cost.dtype), (n, m), empty, empty)
        if self.reg > 0:
            return self._entropic(cost, flat_a, flat_b, mass)
        # No more than rounding in float64: the rest may be what no plan can move at a price.
        if bool(((totals - mass).abs() <= 1e-12 * mass).all()):
            return ExactOT()._solve(cost, a, b)
        flat = cost.reshape(-1, n, m)
        if uniform and n == m:
            return match(Problems.dense(flat, mass=mass * n)).plan("PartialOT", cost, 1 / n)
        return _with_dummies(flat.cpu(), flat_a.cpu(), flat_b.cpu(), mass).plan("PartialOT", cost)

    def _entropic(self, cost: Tensor, a: Tensor, b: Tensor, mass: float) -> Plan:
        flat = cost.reshape(-1, *cost.shape[-2:])
        step = UpperBounded(mass)
        found = solve_matrices(flat, a, b, step, reg=self.reg, max_iter=self.max_iter, tol=self.tol)
        return plan_of("PartialOT", cost, found, found.report(step, a, b, self.reg), self.reg, self.max_iter)


def _with_dummies(cost: Tensor, a: Tensor, b: Tensor, mass: float) -> Solution:
    """Any weights: a dummy source and a dummy target take what does not move; between them nothing may."""
    n, m = cost.shape[1:]
    augmented = torch.nn.functional.pad(cost.double(), (0, 1, 0, 1))
    most = augmented.abs().amax((1, 2))
    augmented[:, n, m] = torch.where(most == torch.inf, most, (2 * most).clamp(1e-300, checks.LARGEST_COST))
    # A point moves no more than all that moves; the dummies of much heavier ones would round a small mass.
    a, b = a.clamp_max(2 * mass), b.clamp_max(2 * mass)
    a, b = (torch.cat((w, (v.sum(1, keepdim=True) - mass).clamp_min(0)), 1) for w, v in ((a, b), (b, a)))
    live = Live.of(a, b)
    found = live.solve(augmented, {simplex: np.arange(len(cost))})
    real = (found.rows < n) & (found.col < m)
    row, col, amount = (torch.where(real, part, 0) for part in (found.rows, found.col, found.mass))
    return replace(found, row=row, col=col, mass=amount, f=found.f[:, :n], g=found.g[:, :m])
