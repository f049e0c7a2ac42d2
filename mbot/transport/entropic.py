"""Entropic optimal transport (Cuturi 2013), stable in the log domain and batched."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mbot import checks, convergence
from mbot.cost import Cost
from mbot.eager import outside_graphs
from mbot.plan import Plan
from mbot.solvers.entropic import Plans, solve_matrices, uniform_mass
from mbot.solvers.marginals import Balanced
from mbot.transport.base import Transport, flat_weights, weighted_points
from mbot.transport.large_clouds import entropic_values, too_large


@dataclass(frozen=True)
class EntropicOT(Transport):
    """Entropic optimal transport ``min <C, P> + reg * KL(P | a ⊗ b)`` with marginals a and b.

    Args:
        reg: regularisation > 0, in units of the cost (POT's ``reg``, OTT's ``epsilon``, geomloss's ``blur ** 2`` up to
            its factor: geomloss halves the squared cost).
        max_iter: iterations before giving up with a `mbot.ConvergenceWarning`.
        tol: L1 error of the marginals at which a problem stops, as a share of the mass; in float32 at least 1e-6.

    ``transport(x, y)`` is the whole objective, so that its gradient (the plan, by the envelope theorem) is that of the
    value; ``plan.cost(C)`` is the transport part alone. ``Plan.potentials`` are ``(f, g)`` with
    ``P = a b exp((f + g - C) / reg)``.

    Between clouds of more than 2^27 pairs (2^24 on a CUDA device) ``transport(x, y)`` makes no cost matrix for the
    costs ``"sqeuclidean"``, ``"dot"`` and ``"cosine"``: value and gradients come from passes over tiles, in O(n d)
    memory. Where Triton is installed these are fused CUDA kernels (not of float64 points).
    """

    reg: float
    max_iter: int = 10_000
    tol: float = 1e-6

    def __post_init__(self) -> None:
        checks.store(
            self,
            reg=checks.positive(self.reg, "reg"),
            max_iter=checks.count(self.max_iter, "max_iter"),
            tol=checks.positive(self.tol, "tol"),
        )

    @property
    def entropic_reg(self) -> float:
        """Its ``reg``."""
        return self.reg

    @outside_graphs
    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        a: Tensor | None = None,
        b: Tensor | None = None,
        cost: Cost = "sqeuclidean",
    ) -> Tensor:
        """See `Transport`; large clouds make no cost matrix."""
        if isinstance(x, Tensor) and isinstance(y, Tensor) and x.ndim > 1 and y.ndim > 1 and too_large(x, y, cost):
            x, y = checks.clouds(weighted_points(x, a), weighted_points(y, b))
            return entropic_values(x, y, a, b, str(cost), self.reg, self.max_iter, self.tol)
        return super().__call__(x, y, a, b, cost)

    def weight_slopes(self, plan: Plan, cost: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """See `Transport`."""
        f, g = entropic_potentials(plan, cost, a, b, self.reg, 1.0)
        return f - f.mean(-1, keepdim=True), g - g.mean(-1, keepdim=True)

    @outside_graphs
    def uniform_mass(self, cost: Tensor) -> Tensor | None:
        """See `Transport`."""
        return uniform_mass(cost, Balanced(), reg=self.reg, max_iter=self.max_iter, tol=self.tol)

    def _solve(self, cost: Tensor, a: Tensor | None, b: Tensor | None) -> Plan:
        flat = cost.reshape(-1, *cost.shape[-2:])
        uniform = a is None and b is None
        a, b = flat_weights(cost, a, b)
        b = b if uniform else checks.equal_totals(a, b)
        step = Balanced()
        found = solve_matrices(
            flat, a, b, step, reg=self.reg, max_iter=self.max_iter, tol=self.tol, uniform=uniform
        )  # fmt: skip
        return plan_of("EntropicOT", cost, found, found.report(step, a, b, self.reg), self.reg, self.max_iter)


def entropic_potentials(plan: Plan, cost: Tensor, a: Tensor, b: Tensor, reg: float, rate: float) -> list[Tensor]:
    """Potentials in float64, those of points of weight 0 completed by an update of ``rate`` from the other side's."""
    assert plan.potentials is not None
    f, g = (potential.double() for potential in plan.potentials)
    sides = []
    for own, other, weight, weights, matrix in ((f, g, a, b, cost), (g, f, b, a, cost.mT)):
        if bool((weight == 0).any()):
            log_sums = ((other / reg + weights.log())[..., None, :] - matrix.double() / reg).logsumexp(-1)
            own = torch.where(weight > 0, own, -rate * reg * log_sums)
        sides.append(own)
    return sides


def plan_of(
    name: str, cost: Tensor, found: Plans, report: tuple[Tensor, Tensor, Tensor], reg: float, max_iter: int
) -> Plan:
    """The loop's result as a dense `Plan` of the cost's batch shape, with a warning where it did not converge."""
    batch, (n, m) = cost.shape[:-2], cost.shape[-2:]
    f, g, penalty = report
    parts = [found.plan, found.converged, found.error, found.iterations, f, g, penalty]
    if len(batch) != 1:
        parts = [part.reshape((*batch, *part.shape[1:])) for part in parts]
    mass, converged, error, iterations, f, g, penalty = parts
    plan = Plan(
        mass, (n, m), converged=converged, error=error, iterations=iterations, potentials=(f, g), penalty=penalty
    )
    convergence.warn_unconverged(
        name, plan, f"Raise max_iter (now {max_iter}), raise reg (now {reg:g}, in cost units), or loosen tol."
    )
    return plan
