"""The mini-batch OT coupling (Tong et al. 2024, arXiv 2302.00482; Pooladian et al. 2023, arXiv 2304.14772)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mbot.cost import Cost, _pairwise, check_cost
from mbot.couplings.base import Coupling, Labels, Pairs, pairs_of_plan
from mbot.transport import ExactOT, Transport


@dataclass(frozen=True)
class OTCoupling(Coupling):
    """Pairs along an optimal transport plan of the two batches; class-agnostic (conditions are ignored).

    With exact transport and equal sizes the pairs are a **permutation**: every sample exactly once, x1 (and whatever
    goes with it) in its own order, the noise permuted. Otherwise each x1 appears once, with a source drawn from its
    column of the plan.

    Under conditions this coupling skews the noise that each condition sees (Cheng & Schwing 2025, Eq. 7): sampling
    then starts from noise that training never saw for that condition. Use `ConditionalOTCoupling` there.

    Args:
        transport: how the plan is computed.
        cost: ground cost, see `mbot.pairwise_cost`.

    >>> x0, x1 = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[2.1], [0.1], [1.1]])
    >>> OTCoupling()(x0, x1).source.tolist()
    [2, 0, 1]
    """

    transport: Transport = field(default_factory=ExactOT)
    cost: Cost = "sqeuclidean"

    def __post_init__(self) -> None:
        if not isinstance(self.transport, Transport):
            raise TypeError(f"transport must be an mbot transport such as ExactOT(); got {self.transport!r}")
        check_cost(self.cost)

    def _pair(
        self,
        x0: Tensor,
        x1: Tensor,
        y0: Labels | None,
        y1: Labels | None,
        generator: torch.Generator | None,
    ) -> Pairs:
        return pairs_by_cost(_pairwise(x0, x1, self.cost), self.transport, generator)


def pairs_by_cost(cost: Tensor, transport: Transport, generator: torch.Generator | None) -> Pairs:
    """Pairs along the plan of one cost matrix ``(n, m)``, with the mean cost of the drawn pairs in ``info``."""
    source, target = pairs_of_plan(transport.plan(cost), generator)
    return Pairs(source, target, info={"transport_cost": float(cost[source, target].mean())})
