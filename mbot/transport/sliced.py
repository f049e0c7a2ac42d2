"""Sliced Wasserstein distance: the mean over random directions of one-dimensional transport costs.

In one dimension the optimal plan is the monotone one, so a batch of clouds is projected and sorted once, and every pair
of clouds then costs a difference of sorted projections (Bonneel et al. 2015; m-SW and BoMb-SW in arXiv 2102.05912).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mbot import checks
from mbot.cost import Cost, at_least_float32, pairwise
from mbot.eager import outside_graphs
from mbot.numerics import no_autocast, product, running_sum
from mbot.random import draw
from mbot.transport.base import ValueTransport, weighted_points


@dataclass(frozen=True)
class SlicedOT(ValueTransport):
    """``SW_p^p(x, y) = mean over directions of W_p^p`` of the projections (no root); values only, from points.

    Equal sizes compare sorted projections; unequal sizes and weights compare quantile functions. Directions are drawn
    anew in each call, uniformly on the sphere. The cost is ``|x - y|^p``: the argument ``cost`` of other transports
    does not apply.

    Args:
        num_projections: directions.
        p: power of the distance, >= 1.

    >>> SlicedOT(num_projections=8)(torch.zeros(3, 1), torch.full((3, 1), 2.0))
    tensor(4.)
    """

    num_projections: int = 100
    p: float = 2

    def __post_init__(self) -> None:
        checks.store(
            self,
            num_projections=checks.count(self.num_projections, "num_projections"),
            p=checks.positive(self.p, "p"),
        )
        if self.p < 1:
            raise ValueError(f"p must be at least 1; got {self.p}")

    @outside_graphs
    def __call__(
        self, x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None, cost: Cost = "sqeuclidean",
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """Sliced transport cost between point clouds.

        Args:
            x: ``(…, n, d)`` source points.
            y: ``(…, m, d)`` target points.
            a: ``(…, n)`` source weights, or None for uniform; normalised to 1.
            b: ``(…, m)`` target weights, or None for uniform; normalised to 1.
            cost: leave at its default.
            generator: source of the directions.

        Returns:
            ``(…,)`` values, differentiable in points and weights.
        """
        x, y = checks.clouds(weighted_points(x, a), weighted_points(y, b))
        if cost != "sqeuclidean":
            raise ValueError(f"SlicedOT's cost is |x - y|^p with p={self.p}; leave cost at its default, got {cost!r}")
        return self._values(x, y, a, b, generator, self._distance)

    @outside_graphs
    def grid(
        self, xs: Tensor, ys: Tensor, a: Tensor | None = None, b: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """All ``(k, k')`` values between ``k`` clouds ``(k, n, d)`` and ``k'`` clouds ``(k', m, d)``.

        Each cloud is projected and sorted once, not once a pair.
        """
        return self._values(xs, ys, a, b, generator, self._all_distances)

    def _all_distances(self, u: _Projected, v: _Projected) -> Tensor:
        if self.p == 2 and u.cumulative is None and v.cumulative is None and u.values.shape[1:] == v.values.shape[1:]:
            # |u - v|^2 over directions and ranks at once
            left, right = u.values.flatten(1), v.values.flatten(1)
            return pairwise(left, right, "sqeuclidean") / left.shape[1]
        return torch.stack([self._distance(u[i : i + 1], v) for i in range(len(u.values))])

    def _values(
        self, x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, generator: torch.Generator | None,
        distances: Callable[[_Projected, _Projected], Tensor],
    ) -> Tensor:  # fmt: skip
        with no_autocast(x):
            x, y = at_least_float32(x), at_least_float32(y)
            directions = draw(
                torch.randn, self.num_projections, x.shape[-1], generator=generator, device=x.device, dtype=x.dtype
            )
            directions = torch.nn.functional.normalize(directions, dim=-1)
            centre = torch.lerp(x.detach().flatten(0, -2).mean(0), y.detach().flatten(0, -2).mean(0), 0.5)
            left, right = x - centre, y - centre
            values = distances(_project(left, a, directions, "a"), _project(right, b, directions, "b"))
            exact = x.dtype == torch.float64 or not values.numel()
            if exact or self._precise(left.detach(), right.detach(), values.detach()):
                return values
            # The points themselves, for the difference to a far centre is rounded.
            left, right, directions = x.double() - centre, y.double() - centre, directions.double()
            return distances(_project(left, a, directions, "a"), _project(right, b, directions, "b")).float()

    def _precise(self, x: Tensor, y: Tensor, values: Tensor) -> bool:
        """Whether the rounding of projections in float32 is below 1e-5 of the smallest distance."""
        of_x, of_y = (torch.linalg.vector_norm(points, dim=-1).square().mean() for points in (x, y))
        return float((of_x + of_y) / x.shape[-1]) <= 7000 * float(values.amin()) ** (2 / self.p)

    def _distance(self, u: _Projected, v: _Projected) -> Tensor:
        n, m = u.values.shape[-1], v.values.shape[-1]
        if u.cumulative is None and v.cumulative is None and n == m:
            return (u.values - v.values).abs().pow(self.p).mean((-2, -1))
        # Between two jumps of either quantile function both are constant.
        ua, vb = u.jumps(), v.jumps()
        batch = torch.broadcast_shapes(u.values.shape[:-1], v.values.shape[:-1])
        ua, vb = ua.expand(*batch, n).contiguous(), vb.expand(*batch, m).contiguous()
        ends = torch.cat((ua, vb), -1).sort(-1).values
        widths = ends.diff(dim=-1, prepend=torch.zeros_like(ends[..., :1]))
        middle = (ends - widths / 2).contiguous()
        at_u = torch.searchsorted(ua, middle).clamp_max(n - 1)
        at_v = torch.searchsorted(vb, middle).clamp_max(m - 1)
        gap = u.values.expand(*batch, n).gather(-1, at_u) - v.values.expand(*batch, m).gather(-1, at_v)
        return (gap.abs().pow(self.p) * widths).sum(-1).mean(-1)


@dataclass(frozen=True)
class _Projected:
    """Sorted projections ``(…, L, n)`` and the cumulative weights at them (None: uniform)."""

    values: Tensor
    cumulative: Tensor | None

    def __getitem__(self, index: slice) -> _Projected:
        return _Projected(self.values[index], None if self.cumulative is None else self.cumulative[index])

    def jumps(self) -> Tensor:
        """Positions of the jumps of the quantile function, increasing to 1."""
        if self.cumulative is not None:
            return self.cumulative
        n = self.values.shape[-1]
        return torch.arange(1, n + 1, device=self.values.device, dtype=self.values.dtype) / n


def _project(points: Tensor, weight: Tensor | None, directions: Tensor, name: str) -> _Projected:
    values, order = product(directions, points.mT).sort(-1)
    checked = checks.weights(weight, points.shape[-2], points[..., :1].mT, name)
    if weight is None or checked is None:
        return _Projected(values, None)
    weight = weight.double().expand_as(checked)  # with its gradients
    weight = (weight / weight.sum(-1, keepdim=True)).to(points.dtype)
    return _Projected(values, running_sum(weight[..., None, :].expand_as(values).gather(-1, order), -1))
