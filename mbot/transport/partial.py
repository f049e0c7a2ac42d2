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
from mbot.kernels import device_matching
from mbot.plan import Plan
from mbot.transport.base import Transport, potentials_of
from mbot.transport.entropic import flat_weights, plan_of
from mbot.transport.exact import (
    ExactOT,
    _check_allowed,
    _forbid,
    _general,
    _plan,
    _relative,
    check_allowed_on_device,
    forbid_on_device,
    plan_on_device,
    relative_on_device,
)
from mbot.transport.sinkhorn import sinkhorn
from mbot.transport.steps import Capped


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

    def weight_slopes(self, plan: Plan, cost: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """See `Transport`: more weight lowers the value where all of it moves, and changes nothing elsewhere."""
        if self.mass == 0:
            return torch.zeros_like(a), torch.zeros_like(b)
        if self.reg > 0 and bool((a == 0).any() | (b == 0).any()):
            raise ValueError("the entropic partial value has no derivative in a weight that is 0; detach the weights")
        f, g = potentials_of(self, plan)
        return tuple(  # type: ignore[return-value]
            potential - potential.masked_fill(weight == 0, -torch.inf).amax(-1, keepdim=True)
            for potential, weight in ((f, a), (g, b))
        )

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
        if bool(((totals - mass).abs() <= (1e-12 if uniform else 1e-5) * mass).all()) and mass >= limit * (1 - 1e-12):
            return ExactOT()._solve(cost, a, b)
        if uniform and n == m and device_matching.applies(cost, max(1, int(np.floor(mass * n + 1e-9)))):
            return _uniform_on_device(cost, mass)
        flat = np.ascontiguousarray(cost.reshape(-1, n, m).cpu().numpy())
        if uniform and n == m:
            return _plan("PartialOT", cost, _uniform(flat, mass))
        return _plan("PartialOT", cost, _with_dummies(flat, flat_a.cpu().numpy(), flat_b.cpu().numpy(), mass))

    def _entropic(self, cost: Tensor, a: Tensor, b: Tensor, mass: float) -> Plan:
        step = Capped(mass)
        found = sinkhorn(
            cost.reshape(-1, *cost.shape[-2:]), a, b, reg=self.reg, row_step=step, col_step=step, weighted=False,
            max_iter=self.max_iter, tol=self.tol,
        )  # fmt: skip
        objective = (found.rows * found.phi).sum(-1) + (found.cols * found.psi).sum(-1)
        return plan_of("PartialOT", cost, found, self.reg * objective, self.reg, self.max_iter)


def _bends(mass: float, n: int) -> tuple[float, int, float]:
    """Pairs that make up the mass, the whole ones among them, and the weight of the plan with one pair more."""
    pairs = mass * n
    lower = int(np.floor(pairs + 1e-9))
    return pairs, lower, pairs - lower if pairs - lower > 1e-9 * lower else 0.0


def _uniform_on_device(cost: Tensor, mass: float) -> Plan:
    """`_uniform` for tensors ``(…, n, n)``, on their device."""
    n = cost.shape[-1]
    walled, forbidden = forbid_on_device(cost.reshape(-1, n, n))
    pairs, lower, share = _bends(mass, n)
    plans = [(lower, 1 - share)] * (lower > 0) + [(lower + 1, share)] * (share > 0)
    cols, masses, error = [], [], walled.new_zeros(len(walled), dtype=torch.float64)
    for cardinality, weight in plans:
        found = device_matching.match(walled, cardinality)
        used = found.column >= 0
        col = found.column.clamp_min(0)
        matched = walled.gather(2, col[:, :, None])[:, :, 0].double().abs() * used
        size = matched.sum(1) + found.row_dual.abs().sum(1) + found.col_dual.abs().sum(1)
        error = torch.maximum(error, relative_on_device(found.gap, size, pairs * found.typical))
        cols.append(col)
        masses.append(torch.where(used, weight / n, 0.0))
    col, amount = torch.cat(cols, 1), torch.cat(masses, 1)
    row = torch.arange(n, device=cost.device).repeat(len(plans)).expand_as(col)
    check_allowed_on_device(forbidden, row, col, amount)
    return plan_on_device("PartialOT", cost, row, col, amount.to(cost.dtype), error, found.row_dual, found.col_dual)


def _uniform(cost: np.ndarray, mass: float):  # type: ignore[no-untyped-def]
    """Uniform square problems: interpolate between the cardinalities below and above ``mass * n``."""
    from mbot.kernels.cardinality import match

    problems, n, _ = cost.shape
    walled, forbidden = _forbid(cost)
    pairs, lower, share = _bends(mass, n)
    # The plan with ``lower`` pairs, the one with a pair more, or both.
    weights = [1 - share] * (lower > 0) + [share] * (share > 0)
    column, duals_f, duals_g, gaps = match(walled.reshape(-1), n, max(lower, 1), more=lower > 0 and share > 0)
    typical = np.abs(walled).mean((1, 2), dtype=np.float64)
    rows, cols, masses, error = [], [], [], np.zeros(problems)
    for col, f, g, gap, weight in zip(column, duals_f, duals_g, gaps, weights, strict=True):
        amount = np.where(col >= 0, weight / n, 0.0)
        col = np.where(col >= 0, col, 0)
        matched = np.abs(np.take_along_axis(walled, col[..., None], -1)[..., 0]) * (amount > 0)
        size = matched.sum(1, dtype=np.float64) + np.abs(f).sum(1) + np.abs(g).sum(1)
        error = np.maximum(error, _relative(gap, size, pairs * typical))
        rows.append(np.broadcast_to(np.arange(n), col.shape))
        cols.append(col)
        masses.append(amount)
    row, col, amount = (np.concatenate(part, axis=1) for part in (rows, cols, masses))
    _check_allowed(forbidden, row, col, amount)
    return row, col, amount, error, duals_f[-1], duals_g[-1]


def _with_dummies(cost: np.ndarray, a: np.ndarray, b: np.ndarray, mass: float):  # type: ignore[no-untyped-def]
    """Any weights: a dummy source and a dummy target take what does not move; between them nothing may."""
    problems, n, m = cost.shape
    walled, forbidden = _forbid(cost)
    augmented = np.zeros((problems, n + 1, m + 1))
    augmented[:, :n, :m] = walled
    augmented[:, n, m] = np.inf
    more_a = np.maximum(b.sum(1, keepdims=True) - mass, 0)
    more_b = np.maximum(a.sum(1, keepdims=True) - mass, 0)
    row, col, amount, error, f, g = _general(
        augmented, np.concatenate((a, more_a), 1), np.concatenate((b, more_b), 1), "network_simplex"
    )
    amount = np.where((row < n) & (col < m), amount, 0.0)
    row, col = np.where(amount > 0, row, 0), np.where(amount > 0, col, 0)
    _check_allowed(forbidden, row, col, amount)
    return row, col, amount, error, f[:, :n], g[:, :m]
