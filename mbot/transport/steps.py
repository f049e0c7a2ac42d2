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
    """What a problem asks of its row (or column) masses."""

    def plain(self) -> tuple[int, float]:
        """The step's kind and parameter in `mbot.kernels.scaling`."""

    def __call__(self, soft: Tensor, weight: Tensor) -> Tensor:
        """``phi`` from ``S``; both ``(B, n)``."""

    def slope(self, soft: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Derivative of the step: ``d phi = -(diagonal * dS + left * <right, dS>)``, each ``(B, n)``."""

    def dual(self, phi: Tensor, weight: Tensor) -> Tensor:
        """What ``phi`` contributes to the dual objective, in units of ``reg``: ``(B,)``."""


@dataclass(frozen=True)
class Balanced:
    """Row masses equal their weights."""

    def plain(self) -> tuple[int, float]:
        """See `Step`."""
        return 0, 0.0

    def __call__(self, soft: Tensor, weight: Tensor) -> Tensor:
        """``phi = log weight - S``."""
        return weight.log() - soft

    def slope(self, soft: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One."""
        return torch.ones_like(soft), torch.zeros_like(soft), torch.zeros_like(soft)

    def dual(self, phi: Tensor, weight: Tensor) -> Tensor:
        """``<weight, phi>``."""
        return (weight * phi).sum(-1)


@dataclass(frozen=True)
class KLRelaxed:
    """Row masses pay ``reg_marginal * KL(mass | weight)``; ``rate = reg_marginal / (reg_marginal + reg)``."""

    rate: float

    def plain(self) -> tuple[int, float]:
        """See `Step`."""
        return 1, self.rate

    def __call__(self, soft: Tensor, weight: Tensor) -> Tensor:
        """The damped step of Chizat et al. 2018."""
        return self.rate * (weight.log() - soft)

    def slope(self, soft: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rate."""
        return torch.full_like(soft, self.rate), torch.zeros_like(soft), torch.zeros_like(soft)

    def dual(self, phi: Tensor, weight: Tensor) -> Tensor:
        """``-k <weight, exp(-phi / k) - 1>`` with ``k = reg_marginal / reg``."""
        k = self.rate / (1 - self.rate)
        return -k * (weight * (-phi / k).expm1()).sum(-1)


@dataclass(frozen=True)
class Capped:
    """Row masses are at most their weights and their total is ``mass``."""

    mass: float

    def plain(self) -> tuple[int, float]:
        """See `Step`."""
        return 2, self.mass

    def _level(self, soft: Tensor, weight: Tensor) -> Tensor:
        """The level at which ``sum min(weight, exp(level + S))`` is ``mass``, ``(B, 1)``.

        The sum grows with the level and bends at ``log weight - S`` of each row: with these sorted, the level is found
        in closed form between two bends.
        """
        bend = torch.where(weight > 0, weight.log() - soft, -torch.inf)
        bend, order = bend.sort(-1)
        full = weight.gather(-1, order)
        open_mass = torch.where(full > 0, soft.gather(-1, order), -torch.inf)
        before = running_sum(full, -1) - full  # mass of the rows that are full, and log mass of those that are open
        after = open_mass.flip(-1).logcumsumexp(-1).flip(-1)
        level = (self.mass - before).clamp_min(0).log() - after
        fits = level <= bend
        # Rounding may leave no level that fits when the mass is the whole weight: all rows are full then.
        level = torch.where(fits, level, torch.inf).gather(-1, fits.int().argmax(-1, keepdim=True))
        return torch.where(fits.any(-1, keepdim=True), level, torch.inf)

    def __call__(self, soft: Tensor, weight: Tensor) -> Tensor:
        """``phi = min(log weight - S, level)``."""
        return torch.minimum(weight.log() - soft, self._level(soft, weight))

    def slope(self, soft: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Full rows follow their own S; open ones share the level, which follows their average S."""
        level = self._level(soft, weight)
        full = (weight.log() - soft <= level) & (weight > 0)
        share = torch.where(full | (weight <= 0), -torch.inf, soft).softmax(-1).nan_to_num(0)
        return full.to(soft.dtype), (~full).to(soft.dtype), share

    def dual(self, phi: Tensor, weight: Tensor) -> Tensor:
        """``<weight, phi - level> + mass * level`` with the smallest level that is at least ``phi``."""
        level = phi.masked_fill(weight <= 0, -torch.inf).amax(-1)
        return (weight * phi).sum(-1) - (weight.sum(-1) - self.mass) * level
