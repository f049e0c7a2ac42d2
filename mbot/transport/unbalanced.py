"""Unbalanced optimal transport with KL-relaxed marginals (Chizat et al. 2018; JUMBOT, Fatras et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mbot import checks
from mbot.eager import outside_graphs
from mbot.plan import Plan
from mbot.solvers.entropic import solve_matrices, uniform_mass
from mbot.solvers.marginals import KLRelaxed
from mbot.transport.base import Transport, flat_weights
from mbot.transport.entropic import entropic_potentials, plan_of


@dataclass(frozen=True)
class UnbalancedOT(Transport):
    """``min <C, P> + reg KL(P | a ⊗ b) + reg_marginal (KL(P 1 | a) + KL(P^T 1 | b))``, the transport of m-UOT.

    ``KL(p | q) = Σ p log(p / q) - p + q``. The plan's mass is not fixed: it shrinks where the cost is large against
    ``reg_marginal``, and so does the value. Both parameters are in cost units: rescaling the cost changes the method.

    The entropy is relative to ``a ⊗ b``. The m-UOT papers' code used that of POT 0.8.2, ``KL(P | 1)``: the costs
    ``C + reg * (log a + log b)`` (weights of the rows and columns) turn one problem into the other, plan and value up
    to the constant ``reg * (n m - Σa Σb)``.

    Args:
        reg: entropic regularisation > 0.
        reg_marginal: price of marginal deviations > 0 (``τ``, POT's ``reg_m``); large values approach `EntropicOT`.
        max_iter: iterations before giving up with a `mbot.ConvergenceWarning`.
        tol: share of the mass that an update may still move at the end.
    """

    reg: float
    reg_marginal: float
    max_iter: int = 10_000
    tol: float = 1e-6

    def __post_init__(self) -> None:
        checks.store(
            self,
            reg=checks.positive(self.reg, "reg"),
            reg_marginal=checks.positive(self.reg_marginal, "reg_marginal"),
            max_iter=checks.count(self.max_iter, "max_iter"),
            tol=checks.positive(self.tol, "tol"),
        )

    def weight_slopes(self, plan: Plan, cost: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """See `Transport`; totals are free here. A point keeps the share ``exp(-f / reg_marginal)`` of its weight.

        Points that no pair of a mass leads to keep none; their potentials have no limit.
        """
        rate = self.reg_marginal / (self.reg_marginal + self.reg)
        slopes = []
        potentials = entropic_potentials(plan, cost, a, b, self.reg, rate)
        sides = ((a, plan.row_mass(), b), (b, plan.col_mass(), a))
        for potential, (weight, mass, others) in zip(potentials, sides, strict=True):
            share = torch.where((weight > 0) & (mass == 0), 0, (-potential / self.reg_marginal).exp())
            total = others.sum(-1)
            slopes.append(self.reg_marginal * (1 - share) + self.reg * (total[..., None] - share))
        return slopes[0], slopes[1]

    @outside_graphs
    def uniform_mass(self, cost: Tensor) -> Tensor | None:
        """See `Transport`."""
        step = KLRelaxed(self.reg_marginal / self.reg)
        return uniform_mass(cost, step, reg=self.reg, max_iter=self.max_iter, tol=self.tol)

    def _solve(self, cost: Tensor, a: Tensor | None, b: Tensor | None) -> Plan:
        flat = cost.reshape(-1, *cost.shape[-2:])
        uniform = a is None and b is None
        a, b = flat_weights(cost, a, b)
        step = KLRelaxed(self.reg_marginal / self.reg)
        solve = partial(solve_matrices, step=step, reg=self.reg, max_iter=self.max_iter, tol=self.tol)
        if uniform:
            found = solve(flat, a, b, uniform=True)
        else:
            # Scaled to one total they have the same plan, and potentials that do not drift apart where totals differ.
            ratio = b.sum(-1, keepdim=True) / a.sum(-1, keepdim=True)
            found = solve(flat, a * ratio.sqrt(), b / ratio.sqrt())
            shift = (1 + step.ratio) * ratio.log() / 2
            found.phi, found.psi = found.phi - shift, found.psi + shift
        return plan_of("UnbalancedOT", cost, found, found.report(step, a, b, self.reg), self.reg, self.max_iter)
