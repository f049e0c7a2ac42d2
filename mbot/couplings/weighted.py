"""Weighted conditional flow matching, W-CFM (Calvo-Ordoñez, Meunier et al. 2025, arXiv 2507.22270)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mbot import checks
from mbot.cost import Cost, check_cost, paired, pairwise
from mbot.couplings.base import Coupling, Labels, Pairs, in_order
from mbot.diagnostics import effective_sample_size, marginal_tilt
from mbot.geometry import Dense
from mbot.numerics import rows_of
from mbot.solvers.marginals import Balanced
from mbot.solvers.sinkhorn import solve

_TOL = 1e-12  # share of the mass that rounds of the correction may still move at the end
_MOST = 512  # samples a side that a curve is computed from


@dataclass(frozen=True)
class WeightedCoupling(Coupling):
    """Independent pairs weighted by the Gibbs kernel ``w = exp(-c(x0, x1) / reg)``; no transport problem is solved.

    The weights approximate entropic OT with constant potentials, so both marginals are **tilted** unless the problem is
    symmetric: samples that are far from everything (bright images, outliers) get little weight. Larger ``reg`` tilts
    less and straightens less; `suggest_reg` looks for the elbow. ``correction="sinkhorn"`` undoes the tilt: a few
    rounds of centring the rows and columns of the batch's log-kernel give the potentials that the kernel lacks, and
    the weights become those of entropic OT, ``exp(phi(x0) + psi(x1) - c / reg)``. It costs the n × m kernel.

    Weights are computed in the log domain and normalised to mean 1 over the batch (the paper writes the loss without a
    normalisation).

    Which cost: ``"euclidean"`` is the paper's. In high dimensions it weighs the norms of x0 and x1, which belong to no
    pair: with ``"dot"`` they drop out and what is left is the pair's own part. ``"sqeuclidean"`` at ``2 |x0 - x1| reg``
    gives locally the same weights as ``"euclidean"`` at ``reg``, with lighter tails.

    ``info`` holds ``effective_sample_size``, ``(Σw)² / Σw²``: the number of equally weighted pairs that carry as much
    information. With the correction also the tilt of the two marginals before and after it, ``tilt_before`` and
    ``tilt`` as pairs (x0, x1): relative variances ``Var(τ) / E[τ]²`` of a sample's total weight τ, 0 where all samples
    count alike.

    Args:
        reg: temperature, in units of the cost. The paper's rule is ``κ √d`` (5.0 for CIFAR-10, d = 3072).
        cost: ground cost; the paper uses the plain Euclidean distance. A callable must return ``(…, 1, 1)`` for
            single points.
        correction: None, or ``"sinkhorn"``.
        iterations: rounds of the correction; each centres the rows, then the columns.
    """

    ignores_conditions = True

    reg: float
    cost: Cost = "euclidean"
    correction: str | None = None
    iterations: int = 10

    def __post_init__(self) -> None:
        checks.store(
            self,
            reg=checks.positive(self.reg, "reg"),
            iterations=checks.count(self.iterations, "iterations"),
        )
        check_cost(self.cost)
        if self.correction is not None:
            checks.choice(self.correction, "correction", ("sinkhorn",))

    def _pair(
        self,
        x0: Tensor,
        x1: Tensor,
        y0: Labels | None,
        y1: Labels | None,
        generator: torch.Generator | None,
    ) -> Pairs:
        source, target = in_order(x0, x1, generator)
        info: dict[str, Any] = {}
        if self.correction is not None:
            kernel = -checks.finite(pairwise(x0, x1, self.cost), "the costs of the pairs").double() / self.reg
            log_a, log_b = (kernel.new_full((1, size), -math.log(size)) for size in kernel.shape)
            found = solve(
                Dense(-kernel[None]), log_a, log_b, Balanced(), Balanced(), reg=1.0, spread=0.0,
                max_iter=self.iterations, tol=_TOL,
            )  # fmt: skip
            phi, psi = found.phi[0], found.psi[0]
            info["tilt_before"] = _tilt(kernel)
            info["tilt"] = _tilt(kernel + phi[:, None] + psi)
            log_weight = (kernel[source, target] + phi[source]) + psi[target]
        else:
            x0, x1 = rows_of(x0, source), rows_of(x1, target)
            if isinstance(self.cost, str):
                cost = paired(x0, x1, self.cost)
            else:
                cost = self.cost(x0[:, None], x1[:, None])[:, 0, 0]
            log_weight = -checks.finite(cost, "the costs of the pairs").double() / self.reg
        weight = log_weight.softmax(0) * len(log_weight)
        info["effective_sample_size"] = float(effective_sample_size(weight))
        return Pairs(source, target, weight.to(x1.dtype if x1.dtype.itemsize >= 4 else torch.float32), info)


def _tilt(log_weight: Tensor) -> tuple[float, float]:
    rows, cols = marginal_tilt((log_weight - log_weight.amax()).exp())
    return float(rows), float(cols)


@dataclass(frozen=True, eq=False)
class RegCurve:
    """Effects of each regularisation of `WeightedCoupling` on two batches; see `reg_curve`.

    Attributes:
        reg: ``(k,)`` regularisations, increasing.
        kappa: ``(k,)`` ``reg / √d``.
        tilt: ``(k,)`` relative variance of the samples' total weights, the larger of the two sides'.
        effective_share: ``(k,)`` effective sample size of the product weights as a share of all pairs.
        elbow: index of the suggested regularisation.
    """

    reg: Tensor
    kappa: Tensor
    tilt: Tensor
    effective_share: Tensor
    elbow: int


def reg_curve(x0: Tensor, x1: Tensor, cost: Cost = "euclidean", *, points: int = 41) -> RegCurve:
    """Tilt of the marginals against the regularisation of `WeightedCoupling`, and its elbow.

    The paper sets ``reg = κ √d`` and picks κ from a log grid at the elbow of ``Var(τ) / E[τ]²``, by eye. Here the grid
    is 0.01 to 100 times the standard deviation of the costs; the elbow is the point farthest below the straight line
    between the ends of the curve ``tilt / (1 + tilt)`` (the share of the samples that the tilt wastes) over log reg.

    Args:
        x0: ``(n, d…)`` source samples; more than 512 are thinned out evenly.
        x1: ``(m, d…)`` target samples.
        cost: the coupling's cost.
        points: of the grid.

    Raises:
        ValueError: costs that are all equal, or invalid samples.
    """
    x0, x1 = checks.samples(x0, x1)
    checks.count(points, "points", at_least=3)
    x0, x1 = (x.detach()[:: -(-len(x) // _MOST)] for x in (x0, x1))
    costs = pairwise(x0, x1, cost).double()
    spread = float(costs.std()) if costs.numel() > 1 else 0.0
    if not spread > 1e-9 * float(costs.abs().mean()):
        raise ValueError("all pairs of these samples cost the same: every reg gives equal weights")
    reg = spread * torch.logspace(-2, 2, points, dtype=torch.float64)
    tilt, share = [], []
    for value in reg.tolist():
        weight = ((costs.amin() - costs) / value).clamp_(min=-300).exp_()  # no denormal numbers, which are slow
        tilt.append(float(torch.stack(marginal_tilt(weight)).amax()))
        share.append(float(effective_sample_size(weight.flatten())) / weight.numel())
    tilts = torch.tensor(tilt, dtype=torch.float64)
    wasted = tilts / (1 + tilts)
    line = torch.lerp(wasted[0], wasted[-1], torch.linspace(0, 1, points, dtype=torch.float64))
    return RegCurve(
        reg, reg / x0.shape[1] ** 0.5, tilts, torch.tensor(share, dtype=torch.float64), int((line - wasted).argmax())
    )


def suggest_reg(x0: Tensor, x1: Tensor, cost: Cost = "euclidean") -> float:
    """A regularisation for `WeightedCoupling`, ``κ √d`` with κ at the elbow of the marginals' tilt; see `reg_curve`.

    Args:
        x0: ``(n, d…)`` source samples.
        x1: ``(m, d…)`` target samples.
        cost: the coupling's cost.

    >>> x0, x1 = torch.randn(200, 64), 2 * torch.randn(200, 64)
    >>> reg = suggest_reg(x0, x1)
    >>> round(suggest_reg(10 * x0, 10 * x1) / reg, 3)  # it scales with the data
    10.0
    """
    curve = reg_curve(x0, x1, cost)
    return float(curve.reg[curve.elbow])
