"""Passes over all pairs of two clouds on a CUDA device, fused: which inputs they take, and what they are given."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mbot.cost import expansion_holds, unit
from mbot.kernels.device import triton_module

COSTS = ("sqeuclidean", "dot", "cosine")


def triton_kernels() -> ModuleType | None:
    """The Triton kernels, or None where they cannot be used."""
    return triton_module("triton_streaming")


@dataclass
class Fused:
    """Two clouds in the form that the kernels take: ``(1, n, d)``, contiguous, shifted to their common centre."""

    x: Tensor
    y: Tensor
    cost: str
    constant: float  # what the cost has more than the kernels' cost
    kernels: Any
    squares: tuple[Tensor, Tensor]  # the points' own terms of the cost

    @classmethod
    def of(cls, x: Tensor, y: Tensor, cost: Any) -> Fused | None:
        """The clouds ``(n, d)``, ``(m, d)``, or None where the kernels do not apply.

        They need CUDA, Triton, and float32 points that are not too far apart for the expansion of the cost.
        """
        if not (x.is_cuda and isinstance(cost, str) and cost in COSTS and x.dtype != torch.float64):
            return None
        kernels = triton_kernels()
        return cls.prepared(x, y, cost, kernels) if kernels is not None and expansion_holds(x, y, cost) else None

    @classmethod
    def prepared(cls, x: Tensor, y: Tensor, cost: str, kernels: Any) -> Fused:
        """The clouds for given kernels."""
        constant = 0.0
        if cost == "cosine":
            x, y, cost, constant = unit(x), unit(y), "dot", 1.0
        elif cost == "sqeuclidean" and x.dtype == torch.float32:  # half-precision points would lose digits to a shift
            centre = (x.mean(0) + y.mean(0)) / 2
            x, y = x - centre, y - centre
        x, y = x[None].contiguous(), y[None].contiguous()
        return cls(x, y, cost, constant, kernels, (kernels.squares(x, cost), kernels.squares(y, cost)))

    def log_sums(self, potential: Tensor, eps: float, of_cols: bool) -> Tensor:
        """``log sum_j exp(potential_j - c_ij / eps)`` of each row, or of each column if ``of_cols``; float64."""
        x, y = (self.y, self.x) if of_cols else (self.x, self.y)
        known = self.squares[::-1] if of_cols else self.squares
        return self.kernels.log_sums(x, y, potential[None], self.cost, eps, known)[0] - self.constant / eps

    def transported(self, phi: Tensor, psi: Tensor, eps: float, of_cols: bool) -> tuple[Tensor, Tensor, Tensor]:
        """``P y`` and row sums of ``P = exp(phi + psi - c / eps)``, and the points x, all about one centre."""
        x, y, own, other = (self.y, self.x, psi, phi) if of_cols else (self.x, self.y, phi, psi)
        known = self.squares[::-1] if of_cols else self.squares
        own = (own - self.constant / eps)[None]
        moved, mass = self.kernels.transported(x, y, own, other[None], self.cost, eps, known)
        return moved[0], mass[0], x[0]
