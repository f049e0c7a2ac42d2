"""Base of the transports: a frozen dataclass of settings that solves a batch of problems in one call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mbot import checks
from mbot.cost import Cost, pairwise
from mbot.eager import outside_graphs
from mbot.envelope import first_order, has_tangent, matched_values
from mbot.numerics import full_float32
from mbot.plan import Plan


@dataclass(frozen=True)
class Transport(ABC):
    """A transport problem with its settings; immutable, comparable, picklable.

    ``transport.plan(cost)`` gives plans, ``transport(x, y)`` transport costs that differentiate in the points.
    A subclass implements ``_solve``.

    Attributes:
        leaves_mass: whether its settings say how much mass moves, which may be less than all.
        entropic_reg: the regularisation, if its plans are the entropic ones of given marginals; else None.
    """

    leaves_mass: ClassVar[bool] = False

    @property
    def entropic_reg(self) -> float | None:
        """See the class."""
        return None

    @outside_graphs
    def plan(self, cost: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Plan:
        """Solve a batch of problems.

        Args:
            cost: ``(…, n, m)`` costs; ``+inf`` forbids a pair.
            a: ``(…, n)`` source weights, or None for uniform ``1/n``. A point of weight 0 takes no part.
            b: ``(…, m)`` target weights, or None for uniform ``1/m``.

        Returns:
            The plans, constants for autograd, in the cost's dtype (float32 for half precision) and on its device.

        Raises:
            TypeError: ``cost`` or a weight is not a floating-point tensor.
            ValueError: empty or non-finite costs, wrong shapes, negative or unmatched weights, another device.
        """
        cost = checks.cost_matrix(cost).detach()
        a = checks.weights(a, cost.shape[-2], cost, "a")
        b = checks.weights(b, cost.shape[-1], cost, "b")
        if cost.numel() == 0:
            return _no_plans(cost)
        with torch.no_grad(), full_float32():
            return self._solve(cost, a, b)

    def uniform_mass(self, cost: Tensor) -> Tensor | None:
        """The masses ``(n, m)`` of `plan` for one small problem with uniform weights, without the rest of a `Plan`.

        None where they do not come faster so, for any other costs, and without convergence: ask `plan` then. A subclass
        that has other plans than its parent overrides it.
        """
        return None

    @abstractmethod
    def _solve(self, cost: Tensor, a: Tensor | None, b: Tensor | None) -> Plan:
        """Plans of checked costs ``(…, n, m)``; weights are float64 ``(…, n)`` and ``(…, m)``, or None if uniform."""

    @outside_graphs
    def __call__(
        self, x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None, cost: Cost = "sqeuclidean"
    ) -> Tensor:
        """Transport cost between point clouds.

        Args:
            x: ``(…, n, d)`` source points.
            y: ``(…, m, d)`` target points.
            a: ``(…, n)`` source weights, or None for uniform.
            b: ``(…, m)`` target weights, or None for uniform.
            cost: ground cost, see `mbot.pairwise_cost`.

        Returns:
            ``(…,)`` values of the objective in cost units (regularised transports include their penalty terms),
            differentiable in the points and the weights: the plan is held constant, which by the envelope theorem
            gives the gradient of the value. Second derivatives in the points are right for exact transport; all
            others are an error.
        """
        x, y = checks.clouds(weighted_points(x, a), weighted_points(y, b))
        matrix = pairwise(x, y, cost) if not isinstance(cost, str) else None
        with torch.no_grad():
            costs = pairwise(x, y, cost) if matrix is None else matrix.detach()
            plan = self.plan(costs, a, b)
        if matrix is None and plan.is_sparse:
            return self._differentiable(_sparse_values(plan, x, y, costs, str(cost)), plan, costs, a, b)
        return self._differentiable(plan.cost(pairwise(x, y, cost) if matrix is None else matrix), plan, costs, a, b)

    def for_pairs(self, n: int, m: int) -> Transport:
        """The transport that pairs of ``n`` and ``m`` samples are drawn from: itself, if nothing has to be rounded."""
        return self

    def matched_pairs(self, n: int, m: int) -> float | None:
        """Pairs in the plan of a uniform ``n × m`` problem where it is the cheapest matching of so many; else None."""
        return None

    @outside_graphs
    def value(self, cost: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        """Value of the objective for given costs ``(…, n, m)``: ``(…,)``, differentiable in costs and weights.

        See `plan`; second derivatives are right (0 in the costs) for exact transport, and an error for all others.
        """
        plan = self.plan(cost, a, b)
        return self._differentiable(plan.cost(cost), plan, cost.detach(), a, b)

    def _differentiable(self, moved: Tensor, plan: Plan, cost: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
        """The value from ``<C, P>``, with its derivatives in weights that require gradients."""
        if any(weight is not None and has_tangent(weight) for weight in (a, b)):
            raise NotImplementedError(
                "values have no forward-mode derivatives in weights; take backward's, or detach them"
            )
        value = moved + plan.penalty
        if not torch.is_grad_enabled():
            return value
        given = [weight if weight is not None and weight.requires_grad else None for weight in (a, b)]
        if given == [None, None]:
            return value if plan.piecewise_constant or not value.requires_grad else first_order(value)
        with torch.no_grad():
            checked = (checks.weights(weight, size, cost, "") for weight, size in zip((a, b), plan.size, strict=True))
            full = [
                cost.new_full((*plan.batch_shape, size), 1 / size, dtype=torch.float64) if weight is None else weight
                for weight, size in zip(checked, plan.size, strict=True)
            ]
            slopes = self.weight_slopes(plan, cost, *full)
        return first_order(value, given[0], given[1], *slopes)

    def weight_slopes(self, plan: Plan, cost: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives ``(…, n)``, ``(…, m)`` of the value in the weights ``a`` and ``b``.

        The total stays: potentials are free up to a constant, and these have mean 0.
        """
        f, g = potentials_of(self, plan)
        return f - f.mean(-1, keepdim=True), g - g.mean(-1, keepdim=True)


def potentials_of(transport: Transport, plan: Plan) -> tuple[Tensor, Tensor]:
    """The plan's potentials, in float64."""
    if plan.potentials is None:
        raise TypeError(f"{transport!r} gives no potentials, which derivatives in the weights are made of; detach them")
    return plan.potentials[0].double(), plan.potentials[1].double()


@dataclass(frozen=True)
class ValueTransport(ABC):
    """A transport between point clouds that has values and no plans, such as `SlicedOT`; with its settings.

    Its randomness comes from the generator that a call is given: as much for any clouds of equal features.
    """

    @abstractmethod
    def __call__(
        self, x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None, cost: Cost = "sqeuclidean",
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """Values ``(…,)`` between clouds ``(…, n, d)`` and ``(…, m, d)`` with weights, differentiable in the points."""

    @abstractmethod
    def grid(
        self, xs: Tensor, ys: Tensor, a: Tensor | None = None, b: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """All ``(k, k')`` values between ``k`` clouds ``(k, n, d)`` and ``k'`` clouds ``(k', m, d)``."""


def _no_plans(cost: Tensor) -> Plan:
    """The plans of a batch without problems."""
    index = cost.new_zeros(*cost.shape[:-2], 1, dtype=torch.int64)
    potentials = cost.new_zeros(cost.shape[:-1]), cost.new_zeros((*cost.shape[:-2], cost.shape[-1]))
    return Plan(index.to(cost.dtype), (cost.shape[-2], cost.shape[-1]), index, index, potentials=potentials)


def weighted_points(points: Any, weight: Any) -> Any:
    """Points ``(…, n, d)`` with those of weight 0 moved onto one that has weight: where they lie changes nothing.

    Padding may be anything, NaN included. Points whose weights require gradients stay, as the gradients depend on them.
    """
    if not (isinstance(points, Tensor) and isinstance(weight, Tensor)) or weight.requires_grad:
        return points
    if points.ndim < 2 or weight.ndim < 1 or points.shape[-2] != weight.shape[-1] or not bool((weight == 0).any()):
        return points  # wrong shapes are for the checks
    try:
        batch = torch.broadcast_shapes(points.shape[:-2], weight.shape[:-1])
    except RuntimeError:
        return points
    points = points.expand(*batch, *points.shape[-2:])
    index = (weight != 0).int().argmax(-1, keepdim=True).expand(*batch, 1)[..., None]
    return torch.where((weight == 0)[..., None], torch.take_along_dim(points.detach(), index, -2), points)


def _sparse_values(plan: Plan, x: Tensor, y: Tensor, costs: Tensor, cost: str) -> Tensor:
    """``<C, P>`` of each problem from its matched pairs, so that backward never touches an n × m matrix."""
    batch = plan.batch_shape
    problems = batch.numel()
    x, y = (points.expand(*batch, *points.shape[-2:]).reshape(-1, points.shape[-1]) for points in (x, y))
    row, col, mass = (part.reshape(problems, part.shape[-1]) for part in plan.entries())
    problem = torch.arange(problems, device=x.device)[:, None]
    n, m = plan.size
    matched = costs.reshape(problems, n * m).gather(-1, row * m + col)
    values = matched_values(
        x, y,
        (problem * n + row).flatten(), (problem * m + col).flatten(),
        mass.flatten(), torch.where(mass > 0, matched, 0).flatten(), problems, cost,
    )  # fmt: skip
    return values.reshape(batch)


def flat_weights(cost: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """Float64 weights ``(B, n)`` and ``(B, m)`` of a batch of ``B`` problems, uniform where none were given."""
    problems = cost.shape[:-2].numel()

    def flat(weight: Tensor | None, size: int) -> Tensor:
        if weight is None:
            return torch.full((problems, size), 1 / size, dtype=torch.float64, device=cost.device)
        return weight.reshape(problems, size)

    return flat(a, cost.shape[-2]), flat(b, cost.shape[-1])
