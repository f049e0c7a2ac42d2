"""The independent coupling of I-CFM (Lipman et al. 2023; Tong et al. 2024, arXiv 2302.00482)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mbot.couplings.base import Coupling, Labels, Pairs, in_order


@dataclass(frozen=True)
class IndependentCoupling(Coupling):
    """Row i of x0 with row i of x1: a draw from the product measure when the two batches are drawn independently.

    Shuffle a batch first if its order means something (sorted classes, a time series). Unequal sizes use every x1 once
    and the rows of x0 as evenly as possible.

    >>> pairs = IndependentCoupling()(torch.zeros(3, 2), torch.ones(3, 2))
    >>> pairs.source.tolist(), pairs.target.tolist()
    ([0, 1, 2], [0, 1, 2])
    """

    ignores_conditions = True

    @property
    def sources_per_target(self) -> int:
        """The one of its own row."""
        return 1

    @property
    def entropic_reg(self) -> float:
        """Infinite."""
        return math.inf

    def _pair(
        self, x0: Tensor, x1: Tensor, y0: Labels | None, y1: Labels | None, generator: torch.Generator | None
    ) -> Pairs:
        return Pairs(*in_order(x0, x1, generator))
