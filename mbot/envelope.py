"""Values of sparse plans with gradients through the points alone (envelope theorem), without an n × m matrix.

For ``sum_e w_e c(x_row(e), y_col(e))`` the gradients of the named costs are weighted sums of matched points:

    squared Euclidean:  d/dx_i = 2 sum_e w_e (x_i - y_col(e))
    Euclidean:          the same with w_e / (2 c_e) for w_e
    dot:                d/dx_i = - sum_e w_e y_col(e)

and cosine is half the squared Euclidean between normalised points. The sums are embedding bags: no row of matched
points is ever copied. They cancel between points that are much closer to each other than to 0; these are summed in
float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from mbot.cost import at_least_float32, root, unit
from mbot.numerics import no_autocast


def matched_values(
    x: Tensor, y: Tensor, row: Tensor, col: Tensor, mass: Tensor, costs: Tensor, groups: int, cost: str
) -> Tensor:
    """Transport costs of groups of plan entries, differentiable in the points and the masses.

    Args:
        x: ``(N, d)`` all source points.
        y: ``(M, d)`` all target points.
        row: ``(e,)`` int64, an entry's source point.
        col: ``(e,)`` its target point.
        mass: ``(e,)`` its mass; entries of mass 0 must have a finite cost.
        costs: ``(e,)`` its cost, without gradient.
        groups: number of values; each is of as many entries, one after the other.
        cost: name of the ground cost.

    Returns:
        ``(groups,)`` values.
    """
    with no_autocast(x):
        x, y, costs = at_least_float32(x), at_least_float32(y), costs.detach()
        if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
            if x.dtype == torch.float32 and _cancels(x.detach(), y.detach(), row, col, mass.detach(), costs, cost):
                x, y = x.double(), y.double()
            if cost == "cosine":
                x, y = unit(x), unit(y)
        return _MatchedValues.apply(x, y, row, col, mass, costs, groups, cost)


def _cancels(x: Tensor, y: Tensor, row: Tensor, col: Tensor, mass: Tensor, costs: Tensor, cost: str) -> bool:
    """Whether the gradients' sums would have relative errors of more than about 1e-5 in float32."""
    if cost == "dot" or not len(costs):
        return False
    limit = 3500  # (1e-5 / eps)² / 2
    if cost == "cosine":
        squared, size = 2 * costs, torch.full_like(costs, 2)
    else:
        squared = costs if cost == "sqeuclidean" else costs.square()
        parts = (
            torch.where(mass > 0, squared, torch.inf).amin(),
            *(torch.linalg.vector_norm(points, torch.inf) for points in (x, y)),
        )
        least, most_x, most_y = torch.stack(parts).tolist()  # one wait for a device
        if x.shape[1] * (most_x**2 + most_y**2) <= limit * least:  # the usual case
            return False
        of_x, of_y = (torch.linalg.vector_norm(points, dim=-1).square() for points in (x, y))
        size = of_x[row] + of_y[col]
    share = torch.where(mass > 0, size / squared, 0)
    return not float(torch.linalg.vector_norm(share, 4)) <= limit * len(share) ** 0.25


class _MatchedValues(torch.autograd.Function):
    """Forward: the weighted sums of known costs. Backward: the closed forms above."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, row: Tensor, col: Tensor, mass: Tensor, costs: Tensor,
                groups: int, cost: str) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, y, row, col, mass, costs)
        ctx.groups, ctx.cost = groups, cost
        return (mass * costs).reshape(groups, len(mass) // max(groups, 1)).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, row, col, mass, costs = ctx.saved_tensors
        of_group = grad.repeat_interleave(len(mass) // max(ctx.groups, 1))
        weight, by_mass = mass * of_group, ctx.needs_input_grad[4]
        needed = ctx.needs_input_grad[:2]
        if (
            torch.is_grad_enabled()
        ):  # for second derivatives: the saved costs are constants, so the costs are computed again
            left, right = x[row], y[col]
            costs = _matched_costs(left, right, ctx.cost)
            total = (weight * costs).sum()
            # In the matched points: the incoming gradient does not depend on them.
            grads = [
                torch.autograd.grad(total, ends, create_graph=True)[0] if wanted else None
                for ends, wanted in zip((left, right), needed, strict=True)
            ]
            sides = (
                None if part is None else torch.zeros_like(p).index_add(0, index, part)
                for p, index, part in zip((x, y), (row, col), grads, strict=True)
            )
            return (*sides, None, None, of_group * costs if by_mass else None, *[None] * 3)
        of_mass = of_group * costs if by_mass else None
        if ctx.cost == "sqeuclidean":
            weight = 2 * weight
        elif ctx.cost == "euclidean":
            weight = torch.where(costs > 0, weight / torch.where(costs > 0, costs, 1), 0)
        own = ctx.cost != "dot"
        grad_x = _weighted_differences(x, y, row, col, weight, own) if needed[0] else None
        grad_y = _weighted_differences(y, x, col, row, weight, own) if needed[1] else None
        return (grad_x, grad_y, None, None, of_mass, *[None] * 3)


def _matched_costs(x: Tensor, y: Tensor, cost: str) -> Tensor:
    """Costs of matched points ``(e, d)``, of points that are normalised already under ``"cosine"``; differentiable."""
    if cost == "dot":
        return -(x * y).sum(-1)
    squared = (x - y).square().sum(-1)
    return root(squared) if cost == "euclidean" else squared / 2 if cost == "cosine" else squared


def _weighted_differences(x: Tensor, y: Tensor, row: Tensor, col: Tensor, weight: Tensor, own: bool) -> Tensor:
    """``sum_e weight_e (x_i - y_col(e))`` over the entries of each row i; without the ``x_i`` if not ``own``."""
    if x.is_cuda or bool((row[1:] < row[:-1]).any()):  # on a device, asking would cost more than sorting
        order = row.argsort(stable=True)  # sums in a fixed order: the same result on every run
        row, col, weight = row[order], col[order], weight[order]
    starts = torch.searchsorted(row, torch.arange(len(x), device=x.device))
    weight = weight.to(y.dtype)
    summed = embedding_bag(col, y, starts, mode="sum", per_sample_weights=weight)
    if not own:
        return -summed
    total = x.new_zeros(len(x)).index_add_(0, row, weight)
    return total[:, None] * x - summed


def first_order(
    value: Tensor, a: Tensor | None = None, b: Tensor | None = None, slope_a: Tensor | None = None,
    slope_b: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Values ``(…,)`` with given derivatives in weights. Differentiating their gradients is an error.

    Args:
        value: values whose plan is held constant, which is right for first derivatives alone.
        a: ``(…, n)`` weights that require gradients, or None.
        b: ``(…, m)`` likewise.
        slope_a: ``(…, n)`` derivative of each value in ``a``.
        slope_b: ``(…, m)`` in ``b``.
    """
    return _FirstOrder.apply(value, a, b, slope_a, slope_b)


class _FirstOrder(torch.autograd.Function):
    """Forward: the value. Backward: its derivatives; differentiating these raises the error of `_Refused`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, a: Tensor | None, b: Tensor | None, slope_a: Tensor | None,
                slope_b: Tensor | None) -> Tensor:  # fmt: skip
        ctx.save_for_backward(value, a, b, slope_a, slope_b)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        value, *weights, slope_a, slope_b = ctx.saved_tensors
        if torch.is_grad_enabled():
            grad = _Refused.apply(grad, value, *weights)
        slopes = (
            (grad[..., None] * slope).sum_to_size(weight.shape).to(weight.dtype) if needed else None
            for weight, slope, needed in zip(weights, (slope_a, slope_b), ctx.needs_input_grad[1:3], strict=True)
        )
        return (grad, *slopes, None, None)


class _Refused(torch.autograd.Function):
    """A gradient that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *inputs: Tensor | None) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            "second derivatives of this transport are not available: its plan and potentials are held constant in the "
            "first. They are right for exact transport (ExactOT, and PartialOT with reg=0) in points and costs"
        )
