"""What a transport problem asks of its row and column masses: the one step in which the Sinkhorn problems differ.

See `mbot.transport.sinkhorn` for the loop around them: from ``S_i``, the log of the row masses at ``phi = 0``, a step
gives the new ``phi_i``, in units of ``reg``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mbot.numerics import running_sum


class Step(Protocol):
    """What a problem asks of its row (or column) masses. Points of log-weight ``-inf`` take no part."""

    def plain(self, amount: Tensor) -> tuple[int, float, Tensor]:
        """The step's kind, parameter and factors ``(B,)`` in `mbot.kernels.scaling`, for weights `shifted` by it."""

    def __call__(self, soft: Tensor, log_weight: Tensor) -> Tensor:
        """``phi`` from ``S``; both ``(B, n)``."""

    def slope(self, soft: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Derivative of the step: ``d phi = -(diagonal * dS + left * <right, dS>)``, each ``(B, n)``."""

    def dual(self, phi: Tensor, log_weight: Tensor) -> Tensor:
        """What ``phi`` contributes to the dual objective, in units of ``reg``, up to a constant: ``(B,)``."""

    def mass(self, phi: Tensor, mass: Tensor, log_weight: Tensor) -> Tensor:
        """Row masses after another step, from those at ``phi``; both ``(B, n)``. A solved problem keeps its own."""

    def shift(self, phi: Tensor, log_a: Tensor, psi: Tensor, log_b: Tensor) -> Tensor:
        """What moves from ``psi`` to ``phi`` where the dual is largest along that line, the plan's own: ``(B, 1)``."""

    def least(self, weight: Tensor) -> Tensor:
        """Mass that must move, ``(B,)``."""

    def shifted(self, log_weight: Tensor, amount: Tensor) -> Tensor:
        """Log-weights ``(B, n)`` at which potentials lowered by ``amount`` ``(B, 1)`` solve the problem."""

    @property
    def negligible(self) -> float:
        """A difference of costs, in units of ``reg``, that no plan with mass can overcome."""


@dataclass(frozen=True)
class Balanced:
    """Row masses equal their weights."""

    negligible = 100.0

    def plain(self, amount: Tensor) -> tuple[int, float, Tensor]:
        """See `Step`."""
        return 0, 0.0, torch.ones_like(amount)

    def __call__(self, soft: Tensor, log_weight: Tensor) -> Tensor:
        """``phi = log weight - S``."""
        return log_weight - soft

    def slope(self, soft: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One."""
        return torch.ones_like(soft), torch.zeros_like(soft), torch.zeros_like(soft)

    def dual(self, phi: Tensor, log_weight: Tensor) -> Tensor:
        """``<weight, phi>``."""
        return (log_weight.exp() * phi).sum(-1)

    def mass(self, phi: Tensor, mass: Tensor, log_weight: Tensor) -> Tensor:
        """The weights."""
        return log_weight.exp()

    def shift(self, phi: Tensor, log_a: Tensor, psi: Tensor, log_b: Tensor) -> Tensor:
        """None: the dual is constant."""
        return torch.zeros_like(phi[:, :1])

    def least(self, weight: Tensor) -> Tensor:
        """All of it."""
        return weight.sum(-1)

    def shifted(self, log_weight: Tensor, amount: Tensor) -> Tensor:
        """The same."""
        return log_weight


@dataclass(frozen=True)
class KLRelaxed:
    """Row masses pay ``reg_marginal * KL(mass | weight)``; ``ratio = reg_marginal / reg``."""

    ratio: float

    @property
    def rate(self) -> float:
        """What is left of an undamped step."""
        return self.ratio / (1 + self.ratio)

    @property
    def negligible(self) -> float:
        """See `Step`: an entry beyond it would pay less than the smallest number."""
        return 800.0 * (1 + 2 * self.ratio)

    def plain(self, amount: Tensor) -> tuple[int, float, Tensor]:
        """See `Step`."""
        return 1, self.rate, (-amount / (1 + self.ratio)).exp()

    def __call__(self, soft: Tensor, log_weight: Tensor) -> Tensor:
        """The damped step of Chizat et al. 2018."""
        return self.rate * (log_weight - soft)

    def slope(self, soft: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rate."""
        return torch.full_like(soft, self.rate), torch.zeros_like(soft), torch.zeros_like(soft)

    def dual(self, phi: Tensor, log_weight: Tensor) -> Tensor:
        """``-ratio <weight, exp(-phi / ratio)>``."""
        return -self.ratio * (log_weight - phi / self.ratio).exp().sum(-1)

    def mass(self, phi: Tensor, mass: Tensor, log_weight: Tensor) -> Tensor:
        """Damped towards ``weight exp(-phi / ratio)``; nothing where no pair leads to."""
        change = self.rate * (log_weight - phi / self.ratio - mass.log())
        return torch.where((mass > 0) & (log_weight > -torch.inf), mass * change.exp(), 0)

    def shift(self, phi: Tensor, log_a: Tensor, psi: Tensor, log_b: Tensor) -> Tensor:
        """Both sides' terms of the dual equal (Séjourné et al. 2022)."""
        terms = [(w - p / self.ratio).logsumexp(-1, keepdim=True) for w, p in ((log_a, phi), (log_b, psi))]
        return self.ratio / 2 * (terms[0] - terms[1])

    def least(self, weight: Tensor) -> Tensor:
        """None of it."""
        return torch.zeros_like(weight[:, 0])

    def shifted(self, log_weight: Tensor, amount: Tensor) -> Tensor:
        """``log weight - amount / ratio``."""
        return log_weight - amount / self.ratio


@dataclass(frozen=True)
class Capped:
    """Row masses are at most their weights and their sum is ``total``."""

    total: float

    negligible = 100.0

    def plain(self, amount: Tensor) -> tuple[int, float, Tensor]:
        """See `Step`."""
        return 2, self.total, torch.ones_like(amount)

    def _level(self, soft: Tensor, log_weight: Tensor) -> Tensor:
        """The level at which ``sum min(weight, exp(level + S))`` is ``total``, ``(B, 1)``.

        The sum grows with the level and bends at ``log weight - S`` of each row: with these sorted, the level is found
        in closed form between two bends.
        """
        bend = torch.where(log_weight > -torch.inf, log_weight - soft, -torch.inf)
        bend, order = bend.sort(-1)
        full = log_weight.gather(-1, order).exp()
        open_mass = torch.where(full > 0, soft.gather(-1, order), -torch.inf)
        before = running_sum(full, -1) - full  # mass of the rows that are full, and log mass of those that are open
        after = open_mass.flip(-1).logcumsumexp(-1).flip(-1)
        level = (self.total - before).clamp_min(0).log() - after
        fits = level <= bend
        # Rounding may leave no level that fits when the mass is the whole weight: all rows are full then.
        level = torch.where(fits, level, torch.inf).gather(-1, fits.int().argmax(-1, keepdim=True))
        return torch.where(fits.any(-1, keepdim=True), level, torch.inf)

    def __call__(self, soft: Tensor, log_weight: Tensor) -> Tensor:
        """``phi = min(log weight - S, level)``."""
        return torch.minimum(log_weight - soft, self._level(soft, log_weight))

    def slope(self, soft: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Full rows follow their own S; open ones share the level, which follows their average S."""
        level = self._level(soft, log_weight)
        live = log_weight > -torch.inf
        full = (log_weight - soft <= level) & live
        share = torch.where(full | ~live, -torch.inf, soft).softmax(-1).nan_to_num(0)
        return full.to(soft.dtype), (~full).to(soft.dtype), share

    def dual(self, phi: Tensor, log_weight: Tensor) -> Tensor:
        """``<weight, phi - level> + total * level`` with the smallest level that is at least ``phi``."""
        level = phi.masked_fill(log_weight == -torch.inf, -torch.inf).amax(-1)
        weight = log_weight.exp()
        return (weight * phi).sum(-1) - (weight.sum(-1) - self.total) * level

    def mass(self, phi: Tensor, mass: Tensor, log_weight: Tensor) -> Tensor:
        """``min(weight, exp(level + S))`` with ``exp(S) = mass / exp(phi)``."""
        relative = (phi - phi.masked_fill(mass <= 0, -torch.inf).amax(-1, keepdim=True)).nan_to_num(0)
        soft = torch.where(mass > 0, mass.log() - relative, -torch.inf)
        return torch.minimum(log_weight, self._level(soft, log_weight) + soft).exp()

    def shift(self, phi: Tensor, log_a: Tensor, psi: Tensor, log_b: Tensor) -> Tensor:
        """None: the dual is constant."""
        return torch.zeros_like(phi[:, :1])

    def least(self, weight: Tensor) -> Tensor:
        """The mass."""
        return torch.full_like(weight[:, 0], self.total)

    def shifted(self, log_weight: Tensor, amount: Tensor) -> Tensor:
        """The same."""
        return log_weight
