"""The mini-batch OT coupling (Tong et al. 2024, arXiv 2302.00482; Pooladian et al. 2023, arXiv 2304.14772)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mbot import checks
from mbot.cost import Cost, check_cost, pairwise
from mbot.couplings.base import Coupling, Labels, Pairs, squared_reg
from mbot.couplings.drawing import every_target, kept_targets, refilled, with_replacement
from mbot.diagnostics import plan_entropy
from mbot.transport import ExactOT, Transport, ValueTransport


@dataclass(frozen=True)
class OTCoupling(Coupling):
    """Pairs along a transport plan of the two batches; class-agnostic (conditions are ignored).

    =====================  ======================================  ====================================================
    transport              pairs                                   marginals of the pairs
    =====================  ======================================  ====================================================
    `ExactOT`, n = m       a **permutation**: every sample once    those of the batches
    `ExactOT`, n != m      every x1 once, a source of its column   x1 exact, x0 in expectation
    `EntropicOT`           every x1 once, a source of its column   x1 exact, x0 in expectation
    `UnbalancedOT`         every x1 once, a source of its column   x1 exact; x0 tilted away from far-off samples
    `PartialOT`            only the pairs that the plan keeps      both lose what is expensive to move (outliers)
    =====================  ======================================  ====================================================

    x1 (and whatever goes with it) keeps its own order. An exact partial plan of equal batches keeps a whole number of
    pairs, ``mass · n`` rounded to the nearest (at least one). What becomes of the other samples is up to ``refill``:

    * None: they leave the batch, which has ``mass · n`` pairs. Training never sees the samples that are dropped more
      often: both marginals are biased towards the cheap region, the smaller the mass the more.
    * ``"sampled"``: kept pairs are drawn again until there is one for each x1. The batch has its full size, the bias
      of the marginals is that of None, and some pairs occur twice.
    * ``"independent"``: the samples left over are paired with each other at random. Every sample is used as often as
      without transport: **no bias of the marginals**; the share ``1 - mass`` of the pairs is independent.

    With ``replacement=True`` as many pairs as x1 has samples are drawn independently with probability proportional to
    their mass (torchcfm's scheme): both marginals are those of the plan in expectation, and a permutation plan yields
    about 63 % distinct pairs.

    Under conditions this coupling skews the noise that each condition sees (Cheng & Schwing 2025, Eq. 7): sampling
    then starts from noise that training never saw for that condition. Use `ConditionalOTCoupling` there, but see its
    notes on classifier-free guidance.

    ``info`` holds ``transport_cost`` (the mean of the drawn pairs), ``plan_entropy`` (see `mbot.plan_entropy`),
    ``error`` (of the plan, see `mbot.Plan`) and, for partial plans, ``kept``, the number of pairs from the plan.

    Args:
        transport: how the plan is computed.
        cost: ground cost, see `mbot.pairwise_cost`.
        replacement: draw pairs independently of each other.
        refill: what happens to samples that a partial plan leaves: None, ``"sampled"`` or ``"independent"``.

    >>> x0, x1 = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[2.1], [0.1], [9.0]])
    >>> OTCoupling()(x0, x1).source.tolist()
    [1, 0, 2]
    >>> pairs = OTCoupling(mbot.PartialOT(mass=0.67))(x0, x1)
    >>> pairs.source.tolist(), pairs.target.tolist()
    ([2, 0], [0, 1])
    """

    ignores_conditions = True

    transport: Transport = field(default_factory=ExactOT)
    cost: Cost = "sqeuclidean"
    replacement: bool = False
    refill: str | None = None

    def __post_init__(self) -> None:
        check_transport(self.transport)
        check_cost(self.cost)
        checks.store(self, replacement=checks.flag(self.replacement, "replacement"))
        if self.refill is not None:
            checks.choice(self.refill, "refill", ("sampled", "independent"))
            if not self.transport.leaves_mass:
                raise ValueError(
                    f"refill applies to partial transport, which leaves samples unpaired; got {self.transport!r}"
                )
            if self.replacement:
                raise ValueError("give refill or replacement, not both: draws with replacement fill the whole batch")

    @property
    def entropic_reg(self) -> float | None:
        """See `Coupling`: that of the transport."""
        reg = self.transport.entropic_reg
        return None if reg is None else squared_reg(reg, self.cost)

    def _pair(
        self, x0: Tensor, x1: Tensor, y0: Labels | None, y1: Labels | None, generator: torch.Generator | None
    ) -> Pairs:
        cost = pairwise(x0, x1, self.cost)
        n, m = cost.shape
        transport = self.transport.for_pairs(n, m)
        plan = transport.plan(cost)
        if bool(plan.total_mass() <= 0):
            raise ValueError(f"{transport!r} moves no mass between these batches: no pair can be drawn")
        info: dict[str, Any] = {"plan_entropy": float(plan_entropy(plan)), "error": float(plan.error)}
        if self.replacement:
            source, target = with_replacement(plan, m, generator)
        elif transport.leaves_mass and plan.matching() is None:
            source, target = kept_targets(plan, generator)
            info["kept"] = len(target)
            if self.refill == "independent":
                source, target = refilled(source, target, n, m, generator)
            elif self.refill == "sampled":
                more = with_replacement(plan, m - len(target), generator)
                target, order = torch.cat((target, more[1])).sort(stable=True)
                source = torch.cat((source, more[0]))[order]
        else:
            source, target = every_target(plan, generator)
        info["transport_cost"] = float(cost[source, target].mean())
        return Pairs(source, target, info=info)


def check_transport(transport: Transport) -> None:
    """A transport that has plans, or a TypeError."""
    if isinstance(transport, ValueTransport):
        raise TypeError(f"transport must have plans to pair by; {transport!r} has values only")
    if not isinstance(transport, Transport):
        raise TypeError(f"transport must be an mbot transport such as ExactOT(); got {transport!r}")
