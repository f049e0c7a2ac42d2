"""Weighted conditional flow matching, W-CFM (Calvo-Ordoñez, Meunier et al. 2025, arXiv 2507.22270)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mbot import checks
from mbot.cost import Cost, _paired, check_cost
from mbot.couplings.base import Coupling, Labels, Pairs, in_order
from mbot.diagnostics import effective_sample_size


@dataclass(frozen=True)
class WeightedCoupling(Coupling):
    """Independent pairs weighted by the Gibbs kernel ``w = exp(-c(x0, x1) / reg)``; no transport problem is solved.

    The weights approximate entropic OT with constant potentials, so both marginals are tilted unless the problem is
    symmetric; larger ``reg`` tilts less and straightens less. They are computed in the log domain and normalised to
    mean 1 over the batch (the paper writes the loss without a normalisation). ``info["effective_sample_size"]`` is
    ``(Σw)² / Σw²``: the number of equally weighted pairs that carry as much information.

    Args:
        reg: temperature, in units of the cost. The paper's rule is ``κ √d`` (5.0 for CIFAR-10, d = 3072).
        cost: ground cost; the paper uses the plain Euclidean distance. A callable must return ``(…, 1, 1)`` for
            single points.
    """

    reg: float
    cost: Cost = "euclidean"

    def __post_init__(self) -> None:
        checks.positive(self.reg, "reg")
        check_cost(self.cost)

    def _pair(
        self,
        x0: Tensor,
        x1: Tensor,
        y0: Labels | None,
        y1: Labels | None,
        generator: torch.Generator | None,
    ) -> Pairs:
        source, target = in_order(x0, x1, generator)
        x0, x1 = x0[source], x1[target]
        if isinstance(self.cost, str):
            cost = _paired(x0, x1, self.cost)
        else:
            cost = self.cost(x0[:, None], x1[:, None])[:, 0, 0]
        log_weight = -cost.double() / self.reg
        weight = log_weight.softmax(0) * len(log_weight)
        info = {"effective_sample_size": float(effective_sample_size(weight))}
        return Pairs(source, target, weight.to(x1.dtype if x1.dtype.itemsize >= 4 else torch.float32), info)
