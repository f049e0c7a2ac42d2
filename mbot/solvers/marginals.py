"""Proximal update of one potential. Balanced, KL-unbalanced and partial Sinkhorn differ only in this step.

Plans are ``P = exp(phi + psi - C / reg)``. From ``S_i = log sum_j exp(psi_j - C_ij / reg)``, the log of the row masses
at ``phi = 0``, a step gives the new ``phi_i``. Points of log-weight ``-inf`` take no part.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from mbot.numerics import running_sum

_UNDERFLOW = -745.0  # log of a mass that is 0 in float64


class Marginal(ABC):
    """The condition on row (or column) masses of a problem; the defaults are those of fixed and bounded masses."""

    relaxes = False  # whether over-relaxed steps converge
    relative = True  # whether potentials are reported relative to the weights

    @property
    def negligible(self) -> float:
        """Difference of costs, in units of reg, that no plan with mass can overcome."""
        return 100.0

    @abstractmethod
    def compiled(self) -> tuple[int, float]:
        """The step's kind and parameter in `mbot.kernels.scaling`."""

    @abstractmethod
    def __call__(self, sums: Tensor, log_weight: Tensor) -> Tensor:
        """``phi`` from ``S``; both ``(B, n)``."""

    @abstractmethod
    def slope(self, sums: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Derivative of the step: ``d phi = -(diagonal * dS + left * <right, dS>)``, each ``(B, n)``."""

    @abstractmethod
    def dual(self, phi: Tensor, log_weight: Tensor) -> Tensor:
        """The terms of ``phi`` in the dual objective, in units of reg, up to a constant: ``(B,)``."""

    @abstractmethod
    def objective(self, phi: Tensor, psi: Tensor, a: Tensor, b: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        """The objective in units of reg, ``(B,)``, from potentials as they are reported and the plan's marginals."""

    @abstractmethod
    def least(self, weight: Tensor) -> Tensor:
        """Mass that must move, ``(B,)``."""

    @abstractmethod
    def masses(self, phi: Tensor, mass: Tensor, log_weight: Tensor) -> Tensor:
        """Row masses after another step, from those at ``phi``; both ``(B, n)``. A solved problem keeps its own."""

    def shift(self, phi: Tensor, log_a: Tensor, psi: Tensor, log_b: Tensor) -> Tensor | None:
        """The t at which the dual objective of ``(phi + t, psi - t)`` is largest, ``(B, 1)``; None for 0."""
        return None

    def lowered(self, log_weight: Tensor, amount: Tensor) -> Tensor:
        """Log-weights ``(B, n)`` at which potentials lowered by ``amount`` ``(B, 1)`` solve the problem."""
        return log_weight

    def ordinary(self, least: float, most: float, reg: float) -> bool:
        """Whether costs in this range are such that all plans of bounded weights have masses that are numbers."""
        return most < math.inf

    def with_mass(self, cost: Tensor, a: Tensor, b: Tensor, reg: float) -> Tensor:
        """The costs, ``+inf`` where no plan has a mass that is a number of float64.

        Raises:
            ValueError: a mass that overflows the costs' dtype.
        """
        return cost

    def at(self, factor: float) -> Marginal:
        """The same problem in units of ``factor * reg``."""
        return self


@dataclass(frozen=True)
class Balanced(Marginal):
    """Row masses equal their weights."""

    relaxes = True

    def compiled(self) -> tuple[int, float]:
        """See `Marginal`."""
        return 0, 0.0

    def __call__(self, sums: Tensor, log_weight: Tensor) -> Tensor:
        """``phi = log weight - S``."""
        return log_weight - sums

    def slope(self, sums: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One."""
        return torch.ones_like(sums), torch.zeros_like(sums), torch.zeros_like(sums)

    def dual(self, phi: Tensor, log_weight: Tensor) -> Tensor:
        """``<weight, phi>``."""
        return (log_weight.exp() * phi).sum(-1)

    def objective(self, phi: Tensor, psi: Tensor, a: Tensor, b: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        """The dual value: its error is of second order in the potentials'."""
        return (a * phi).sum(-1) + (b * psi).sum(-1) - rows.sum(-1) + a.sum(-1) * b.sum(-1)

    def least(self, weight: Tensor) -> Tensor:
        """All of it."""
        return weight.sum(-1)

    def masses(self, phi: Tensor, mass: Tensor, log_weight: Tensor) -> Tensor:
        """The weights."""
        return log_weight.exp()


@dataclass(frozen=True)
class KLRelaxed(Marginal):
    """Row masses pay ``reg_marginal * KL(mass | weight)``; ``ratio = reg_marginal / reg``.

    The entropy is relative to the product of the weights.
    """

    ratio: float

    @property
    def rate(self) -> float:
        """Length of a step relative to a balanced one."""
        return self.ratio / (1 + self.ratio)

    @property
    def negligible(self) -> float:
        """See `Marginal`: an entry beyond it would pay less than the smallest number."""
        return 800.0 * (1 + 2 * self.ratio)

    def compiled(self) -> tuple[int, float]:
        """See `Marginal`."""
        return 1, self.ratio

    def __call__(self, sums: Tensor, log_weight: Tensor) -> Tensor:
        """``phi = log weight - rate S``, the damped step of Chizat et al. 2018."""
        return log_weight - self.rate * sums

    def slope(self, sums: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rate."""
        return torch.full_like(sums, self.rate), torch.zeros_like(sums), torch.zeros_like(sums)

    def _terms(self, phi: Tensor, log_weight: Tensor) -> Tensor:
        """Logs of the masses that these potentials imply."""
        return torch.where(log_weight > -torch.inf, log_weight / self.rate - phi / self.ratio, -torch.inf)

    def dual(self, phi: Tensor, log_weight: Tensor) -> Tensor:
        """``-ratio sum weight exp((log weight - phi) / ratio)``."""
        return -self.ratio * self._terms(phi, log_weight).exp().sum(-1)

    def objective(self, phi: Tensor, psi: Tensor, a: Tensor, b: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        """Entropy relative to ``a ⊗ b``, the cost, and what the masses pay."""
        entropy = (rows * phi).sum(-1) + (cols * psi).sum(-1) - rows.sum(-1) + a.sum(-1) * b.sum(-1)
        return entropy + self.ratio * (_divergence(rows, a) + _divergence(cols, b))

    def least(self, weight: Tensor) -> Tensor:
        """None of it."""
        return torch.zeros_like(weight[:, 0])

    def masses(self, phi: Tensor, mass: Tensor, log_weight: Tensor) -> Tensor:
        """A damped step towards the masses that the potentials imply; 0 for points without a pair."""
        change = self.rate * (self._terms(phi, log_weight) - mass.log())
        return torch.where((mass > 0) & (log_weight > -torch.inf), mass * change.exp(), 0)

    def shift(self, phi: Tensor, log_a: Tensor, psi: Tensor, log_b: Tensor) -> Tensor:
        """At the best t the dual terms of both sides are equal (Séjourné et al. 2022)."""
        rows, cols = (self._terms(*side).logsumexp(-1, keepdim=True) for side in ((phi, log_a), (psi, log_b)))
        return (self.ratio / 2 * (rows - cols)).nan_to_num(0)  # no point takes part: nothing to shift

    def lowered(self, log_weight: Tensor, amount: Tensor) -> Tensor:
        """``log weight - amount / (1 + ratio)``."""
        return log_weight - amount / (1 + self.ratio)

    def ordinary(self, least: float, most: float, reg: float) -> bool:
        """See `Marginal`."""
        return max(most, -least) <= 50.0 * reg * (1 + 2 * self.ratio)

    def with_mass(self, cost: Tensor, a: Tensor, b: Tensor, reg: float) -> Tensor:
        """See `Marginal`. By optimality ``(1 + 2 ratio) log P_ij <= (1 + ratio) log (a_i b_j) - C_ij / reg``.

        The total mass reaches the largest of these bounds.
        """
        least, most = cost.aminmax()
        if self.ordinary(float(least), float(most), reg) and float(a.amax()) * float(b.amax()) <= 1e10:
            return cost
        share = (1 + self.ratio) / (1 + 2 * self.ratio)
        bound = share * (a.log()[:, :, None] + b.log()[:, None, :]) - cost.double() / (reg * (1 + 2 * self.ratio))
        largest = torch.finfo(cost.dtype).max
        if float(bound.amax()) > math.log(largest / (cost.shape[1] * cost.shape[2])):
            raise ValueError(
                f"the plan's mass may exceed {largest:.3g}, the largest number of {cost.dtype}: it grows like "
                f"exp(-cost / (reg + 2 reg_marginal)), and the least cost is {float(least):g} against "
                f"{reg * (1 + 2 * self.ratio):g}. Raise reg_marginal, or add a constant to the costs"
            )
        return torch.where(bound < _UNDERFLOW, torch.inf, cost)

    def at(self, factor: float) -> KLRelaxed:
        """See `Marginal`."""
        return KLRelaxed(self.ratio / factor)


@dataclass(frozen=True)
class UpperBounded(Marginal):
    """Row masses are at most their weights, and their sum is ``total``."""

    relative = False

    total: float

    def compiled(self) -> tuple[int, float]:
        """See `Marginal`."""
        return 2, self.total

    def _level(self, sums: Tensor, log_weight: Tensor) -> Tensor:
        """The level at which ``sum min(weight, exp(level + S))`` is ``total``, ``(B, 1)``.

        The sum grows with the level and bends at ``log weight - S`` of each row: with these sorted, the level is found
        in closed form between two bends.
        """
        bend = torch.where(log_weight > -torch.inf, log_weight - sums, -torch.inf)
        bend, order = bend.sort(-1)
        full = log_weight.gather(-1, order).exp()
        open_mass = torch.where(full > 0, sums.gather(-1, order), -torch.inf)
        before = running_sum(full, -1) - full  # mass of the rows that are full, and log mass of those that are open
        after = open_mass.flip(-1).logcumsumexp(-1).flip(-1)
        level = (self.total - before).clamp_min(0).log() - after
        fits = level <= bend
        # Rounding may leave no level that fits when the mass is the whole weight: all rows are full then.
        level = torch.where(fits, level, torch.inf).gather(-1, fits.int().argmax(-1, keepdim=True))
        return torch.where(fits.any(-1, keepdim=True), level, torch.inf)

    def __call__(self, sums: Tensor, log_weight: Tensor) -> Tensor:
        """``phi = min(log weight - S, level)``."""
        return torch.minimum(log_weight - sums, self._level(sums, log_weight))

    def slope(self, sums: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Full rows follow their own S; open ones share the level, which follows their average S."""
        level = self._level(sums, log_weight)
        live = log_weight > -torch.inf
        full = (log_weight - sums <= level) & live
        share = torch.where(full | ~live, -torch.inf, sums).softmax(-1).nan_to_num(0)
        return full.to(sums.dtype), (~full).to(sums.dtype), share

    def dual(self, phi: Tensor, log_weight: Tensor) -> Tensor:
        """``<weight, phi - level> + total * level`` with the smallest level that is at least ``phi``."""
        level = phi.masked_fill(log_weight == -torch.inf, -torch.inf).amax(-1)
        weight = log_weight.exp()
        return (weight * phi).sum(-1) - (weight.sum(-1) - self.total) * level

    def objective(self, phi: Tensor, psi: Tensor, a: Tensor, b: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        """Entropy of the plan, and the cost."""
        return (rows * phi).sum(-1) + (cols * psi).sum(-1)

    def least(self, weight: Tensor) -> Tensor:
        """The mass."""
        return torch.full_like(weight[:, 0], self.total)

    def masses(self, phi: Tensor, mass: Tensor, log_weight: Tensor) -> Tensor:
        """``min(weight, exp(level + S))`` with ``exp(S) = mass / exp(phi)``."""
        relative = (phi - phi.masked_fill(mass <= 0, -torch.inf).amax(-1, keepdim=True)).nan_to_num(0)
        sums = torch.where(mass > 0, mass.log() - relative, -torch.inf)
        # Where the level is infinite all points are full, those without mass too.
        return torch.minimum(log_weight, (self._level(sums, log_weight) + sums).nan_to_num(torch.inf)).exp()


def _divergence(x: Tensor, p: Tensor) -> Tensor:
    """Generalised Kullback-Leibler divergence over the last axis, with 0 log 0 = 0."""
    return (x.xlogy(x) - x.xlogy(p) - x + p).sum(-1)
