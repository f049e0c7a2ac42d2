"""The BoMb coupling: mini-batches of a large batch are matched first, then paired inside (Nguyen et al. 2022).

BoMb-OT (arXiv 2102.05912) as a coupling. Against one assignment of the whole batch, O(n^3), the k² inner problems
take O(n^3 / k) and can run side by side; the pairs cost more, the less the larger the mini-batches are.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import Tensor

from mbot import checks
from mbot.cost import Cost, check_cost, paired, pairwise
from mbot.couplings.base import Coupling, Labels, Pairs, in_order
from mbot.couplings.drawing import permutations
from mbot.couplings.optimal import check_transport
from mbot.numerics import rows_of
from mbot.random import draw
from mbot.transport import EntropicOT, ExactOT, Transport

# Inner costs that are held at a time (256 MB in float32); of more than these, a processor would wait for memory.
_CHUNK = {"cuda": 1 << 26, "cpu": 1 << 20}


@dataclass(frozen=True)
class BoMbCoupling(Coupling):
    """A permutation of the batch: random mini-batches are matched by an outer problem and paired inside.

    Both sides are split at random into k mini-batches (of n // k and n // k + 1 samples where k does not divide n; of
    one sample if n < k). The inner transport values every pair of mini-batches; the outer problem matches them,
    exactly (``reg = 0``) or by a random permutation along its entropic plan; matched mini-batches are paired along
    their inner plan. Plans that are not permutations (entropic, partial, unbalanced inner transports; an entropic
    outer one) are drawn from as permutations: pair (i, j) with probability ``n P_ij``; mass that a plan leaves is
    paired independently. Marginals are therefore always exact: every sample is used once.

    For unequal batches every x1 is used once, with sources taken as evenly as possible.

    ``info`` holds ``transport_cost`` (mean over the pairs; named costs only), ``num_batches``, ``outer_cost`` (the mean
    value of the matched pairs of mini-batches) and ``error`` (the largest of all plans, see `mbot.Plan`).

    Args:
        transport: the inner transport.
        num_batches: k, mini-batches a side.
        reg: entropic regularisation of the outer problem, in units of the inner values; 0 for exact.
        cost: ground cost, see `mbot.pairwise_cost`.

    >>> x0, x1 = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.tensor([[3.0], [2.0], [1.0], [0.0]])
    >>> BoMbCoupling(num_batches=1)(x0, x1).source.tolist()
    [3, 2, 1, 0]
    """

    ignores_conditions = True

    transport: Transport = field(default_factory=ExactOT)
    _: KW_ONLY
    num_batches: int
    reg: float = 0.0
    cost: Cost = "sqeuclidean"

    def __post_init__(self) -> None:
        check_transport(self.transport)
        checks.store(
            self,
            num_batches=checks.count(self.num_batches, "num_batches"),
            reg=checks.positive(self.reg, "reg", allow_zero=True),
        )
        check_cost(self.cost)

    def _pair(
        self, x0: Tensor, x1: Tensor, y0: Labels | None, y1: Labels | None, generator: torch.Generator | None
    ) -> Pairs:
        n, device = len(x1), x1.device
        even = in_order(x0, x1, generator)[0]
        if len(x0) > n:
            even = draw(torch.randperm, len(x0), generator=generator, device=device)[:n]
        k = min(self.num_batches, n)
        rows, cols = (draw(torch.randperm, n, generator=generator, device=device) for _ in range(2))
        small, larger = n // k, n % k  # the first `larger` mini-batches hold one sample more
        cut = larger * (small + 1)
        source = torch.empty(n, dtype=torch.int64, device=device)
        outer_cost, errors = 0.0, []
        for part, batches in ((slice(0, cut), larger), (slice(cut, n), k - larger)):
            if batches:
                left, right = even[rows[part]].reshape(batches, -1), cols[part].reshape(batches, -1)
                matched, values, error = self._match(x0, x1, left, right, generator)
                plan = self.transport.plan(pairwise(rows_of(x0, left[matched]), rows_of(x1, right), self.cost))
                source[right] = left[matched].gather(1, permutations(plan, generator))
                outer_cost += float(values.gather(0, matched[None]).sum()) / k
                errors += [error, plan.error.max()]
        target = torch.arange(n, device=device)
        info: dict[str, Any] = {"num_batches": k, "outer_cost": outer_cost, "error": float(torch.stack(errors).max())}
        if isinstance(self.cost, str):
            info["transport_cost"] = float(paired(rows_of(x0, source), x1, self.cost).mean())
        return Pairs(source, target, info=info)

    def _match(
        self, x0: Tensor, x1: Tensor, left: Tensor, right: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The source mini-batch of each target mini-batch, all values ``(k, k)``, and the largest error of a plan."""
        k, size = left.shape
        step = max(1, _CHUNK["cuda" if x0.is_cuda else "cpu"] // (k * size * size))
        values, errors = [], []
        for begin in range(0, k, step):
            some = left[begin : begin + step]
            cost = pairwise(rows_of(x0, some.flatten()), rows_of(x1, right.flatten()), self.cost)
            cost = cost.reshape(len(some), size, k, size).transpose(1, 2).contiguous()
            plan = self.transport.plan(cost)
            values.append(plan.cost(cost) + plan.penalty)
            errors.append(plan.error.max())
        table = torch.cat(values)
        outer: Transport = EntropicOT(self.reg) if self.reg > 0 else ExactOT()
        plan = outer.plan(table)
        return permutations(plan, generator), table, torch.stack([*errors, plan.error]).max()
