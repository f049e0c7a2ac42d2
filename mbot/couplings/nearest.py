"""The nearest of k noises for each data point (Li et al. 2025, arXiv 2505.18521): no assignment, no batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mbot import checks
from mbot.cost import at_least_float32
from mbot.couplings.base import Coupling, Labels, Pairs
from mbot.random import draw

_NUMBERS = 1 << 24  # differences held at a time


@dataclass(frozen=True)
class NearestNoiseCoupling(Coupling):
    """For each data point the nearest of ``k`` noises of its own, by squared Euclidean distance.

    Given ``k · m`` noises for m data points, point i chooses among rows ``k i`` to ``k i + k - 1``: nothing is shared
    within the batch, so m = 1 works as well as any other. `flows.CoupledLoader` draws that many. From another number n
    of noises each point is offered k different ones at random (all, where there are fewer), each noise equally often
    on average (exactly, where n is a multiple of k); one noise may then serve several points.

    **The chosen noise is not normal any more.** A noise is the likelier chosen the nearer it is to the data, while
    sampling starts from any noise. Data at the origin choose short noises; data far away choose noises that
    lie on their side, by ``E max`` of k normals: .56, 1.03, 1.54, 2.04 for k = 2, 4, 10, 32. Two clusters, opposite
    classes or a mean that is not zero make that a bias of the prior, and given a class it is larger than over all.
    *Choosing a method* in the documentation has measurements over d and k. Transport of a batch has no such bias: it
    uses every noise once. Small k, centred data and high dimension bias least, and gain least.

    Conditions are ignored: each point chooses for itself. With ``source_sampling="matched"`` of the loader the k
    sources of a point are of its class.

    ``info`` holds ``transport_cost``, the mean squared distance of the pairs.

    Args:
        k: noises that a data point chooses among; 1 is the independent coupling.

    >>> x0, x1 = torch.tensor([[0.0], [9.0], [4.0], [5.0]]), torch.tensor([[8.0], [0.0]])
    >>> NearestNoiseCoupling(2)(x0, x1).source.tolist()
    [1, 2]
    """

    k: int = 4
    ignores_conditions = True

    def __post_init__(self) -> None:
        checks.store(self, k=checks.count(self.k, "k"))

    @property
    def sources_per_target(self) -> int:
        """Its ``k``."""
        return self.k

    def _pair(
        self, x0: Tensor, x1: Tensor, y0: Labels | None, y1: Labels | None, generator: torch.Generator | None
    ) -> Pairs:
        source, least = [], []
        offered = self._offered(len(x0), len(x1), generator, x1.device)
        x0, x1 = at_least_float32(x0), at_least_float32(x1)
        step = max(1, _NUMBERS // (offered.shape[1] * x1.shape[1]))
        for rows, points in zip(offered.split(step), x1.split(step), strict=True):
            distance, nearest = (x0[rows] - points[:, None]).square().sum(-1).min(1)
            source.append(rows.gather(1, nearest[:, None])[:, 0])
            least.append(distance)
        cost = checks.finite(torch.cat(least).double().mean(), "the mean squared distance of the pairs")
        target = torch.arange(len(x1), device=x1.device)
        return Pairs(torch.cat(source), target, info={"transport_cost": float(cost)})

    def _offered(self, n: int, m: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """The sources that each target chooses among, ``(m, k)``, none twice in a row."""
        if n == self.k * m:
            return torch.arange(n, device=device).reshape(m, self.k)
        k = min(self.k, n)
        groups = n // k
        orders = [draw(torch.randperm, n, generator=generator, device=device) for _ in range(-(-m // groups))]
        return torch.cat([order[: groups * k].reshape(groups, k) for order in orders])[:m]
