"""Values of sparse plans with gradients through the points alone (envelope theorem), without an n × m matrix.

For ``sum_e w_e c(x_row(e), y_col(e))`` the gradients of the named costs are weighted sums of matched points:

    squared Euclidean:  d/dx_i = 2 sum_e w_e (x_i - y_col(e))
    Euclidean:          the same with w_e / (2 c_e) for w_e
    dot:                d/dx_i = - sum_e w_e y_col(e)

and cosine is dot between normalised points. The sums are embedding bags: no row of matched points is ever copied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from mbot.cost import at_least_float32, unit


def matched_values(
    x: Tensor, y: Tensor, row: Tensor, col: Tensor, mass: Tensor, costs: Tensor, group: Tensor, groups: int, cost: str
) -> Tensor:
    """Transport costs of groups of plan entries, differentiable in the points.

    Args:
        x: ``(N, d)`` all source points.
        y: ``(M, d)`` all target points.
        row: ``(e,)`` int64, an entry's source point.
        col: ``(e,)`` its target point.
        mass: ``(e,)`` its mass; entries of mass 0 must have a finite cost.
        costs: ``(e,)`` its cost, without gradient.
        group: ``(e,)`` the value that it counts towards.
        groups: number of values.
        cost: name of the ground cost.

    Returns:
        ``(groups,)`` values.
    """
    with torch.autocast(x.device.type, enabled=False):
        x, y = at_least_float32(x), at_least_float32(y)
        if cost == "cosine":
            x, y, cost = unit(x), unit(y), "dot"
        return _MatchedValues.apply(x, y, row, col, mass.detach(), costs.detach(), group, groups, cost)


class _MatchedValues(torch.autograd.Function):
    """Forward: the weighted sums of known costs. Backward: the closed forms above."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, row: Tensor, col: Tensor, mass: Tensor, costs: Tensor,
                group: Tensor, groups: int, cost: str) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, y, row, col, mass, costs, group)
        ctx.cost = cost
        if groups == 1:
            return (mass * costs).sum()[None]
        return costs.new_zeros(groups).index_add_(0, group, mass * costs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, row, col, mass, costs, group = ctx.saved_tensors
        weight = mass * grad[group]
        if ctx.cost == "sqeuclidean":
            weight = 2 * weight
        elif ctx.cost == "euclidean":
            weight = torch.where(costs > 0, weight / torch.where(costs > 0, costs, 1), 0)
        own = ctx.cost != "dot"
        grad_x = _pull(x, y, row, col, weight, own) if ctx.needs_input_grad[0] else None
        grad_y = _pull(y, x, col, row, weight, own) if ctx.needs_input_grad[1] else None
        return (grad_x, grad_y, *[None] * 7)


def _pull(x: Tensor, y: Tensor, row: Tensor, col: Tensor, weight: Tensor, own: bool) -> Tensor:
    """``sum_e weight_e (x_i - y_col(e))`` over the entries of each row i; without the ``x_i`` if not ``own``."""
    if x.is_cuda or bool((row[1:] < row[:-1]).any()):  # to ask costs more there than to sort
        order = row.argsort(stable=True)  # sums in a fixed order: the same result on every run
        row, col, weight = row[order], col[order], weight[order]
    starts = torch.searchsorted(row, torch.arange(len(x), device=x.device))
    weight = weight.to(y.dtype)
    pulled = embedding_bag(col, y, starts, mode="sum", per_sample_weights=weight)
    if not own:
        return -pulled
    total = x.new_zeros(len(x)).index_add_(0, row, weight)
    return total[:, None] * x - pulled
