"""Blocks of solved problems between mini-batches: their values, their share of a loss, and the entries of their plans.

There is one kind for problems with values alone, one for plans, and one for matchings without a tensor of their costs.
Weighted sums are differentiable in the points and in the weights, where these are positive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mbot.envelope import first_order, has_tangent, matched_values
from mbot.plan import Plan
from mbot.solvers.grid import GridMatching


@dataclass(frozen=True)
class ValueBlock:
    """Problems with values alone, which differentiate: ``(k, k')``, or ``(k, 1)`` of pairs."""

    where: tuple[slice, slice]
    values: Tensor

    def total(self, weight: Tensor) -> Tensor:
        """``sum_ij weight_ij values_ij`` over the problems of positive weight."""
        return torch.where(weight > 0, weight * self.values, 0).sum()

    def entries(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """An error: there is no plan."""
        raise TypeError("only mbot transports that have plans give one; SlicedOT and callables have values alone")


@dataclass(frozen=True)
class PlanBlock:
    """Problems that were solved for plans, which are constants: gradients flow through the costs of their entries.

    Attributes:
        where: where its values are in the table of all.
        values: ``(k, k')``, or ``(k, 1)`` of pairs; without gradient.
        plan: of batch shape ``(k, k')``, or ``(k,)`` of pairs.
        costs: of a dense plan those of all pairs, ``(k n, k' m)`` or as the plan's masses, None where they do not
            differentiate; of a sparse one those of its entries, without gradient.
        x: ``(k, n, d)`` mini-batches.
        y: ``(k', m, d)``, or ``(k, m, d)`` of pairs.
        cost: name of the ground cost.
        aligned: whether these are pairs of mini-batches.
    """

    where: tuple[slice, slice]
    values: Tensor
    plan: Plan
    costs: Tensor | None
    x: Tensor
    y: Tensor
    cost: str
    aligned: bool

    @staticmethod
    def of(
        where: tuple[slice, slice], plan: Plan, matrices: Tensor, costs: Tensor, x: Tensor, y: Tensor, cost: str,
        aligned: bool,
    ) -> PlanBlock:  # fmt: skip
        """The block of a plan for ``matrices`` ``(k, k', n, m)``, or ``(k, n, m)`` of pairs, made of ``costs``."""
        if plan.is_sparse:
            row, col, mass = plan.entries()
            matched = matrices.flatten(-2).gather(-1, row * matrices.shape[-1] + col)
            matched = torch.where(mass > 0, matched, 0)  # padding may sit at a forbidden pair
            kept: Tensor | None = matched
            values = (matched * mass).sum(-1)
        else:
            kept = costs if costs.requires_grad or has_tangent(costs) else None
            values = (plan.mass * matrices).sum((-2, -1))
        values = values + plan.penalty
        return PlanBlock(where, values[:, None] if aligned else values, plan, kept, x, y, cost, aligned)

    def total(self, weight: Tensor) -> Tensor:
        """``sum_ij weight_ij values_ij``, differentiable through the problems of positive weight."""
        weight = weight.reshape(self.plan.batch_shape)
        if self.costs is None:
            return (weight * self.values.reshape(weight.shape)).sum()
        if self.plan.is_sparse:
            return self._matched(weight, self.costs) + (weight * self.plan.penalty).sum()
        if has_tangent(self.costs) or has_tangent(weight):
            moved = (_laid_out(self.plan.mass, weight, self.costs.shape) * self.costs).sum()
            return moved + (weight * self.plan.penalty).sum()
        total: Tensor = _PlanTotal.apply(self.costs, weight, self.plan.mass, self.values.reshape(weight.shape))
        return first_order(total) if total.requires_grad else total

    def _matched(self, weight: Tensor, costs: Tensor) -> Tensor:
        """The part of sparse plans' transport costs."""
        plan = self.plan
        x, y, (n, m) = self.x.flatten(0, 1), self.y.flatten(0, 1), plan.size
        at = torch.nonzero(weight, as_tuple=True)
        row, col, mass = (part[at] for part in plan.entries())
        row, col = (at[0][:, None] * n + row).flatten(), (at[-1][:, None] * m + col).flatten()
        mass, matched = (weight[at][:, None] * mass).flatten(), costs[at].flatten()
        total = matched_values(x, y, row, col, mass, matched, 1, self.cost)[0]
        return total if plan.piecewise_constant else first_order(total)

    def entries(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows and columns inside the mini-batches, and weighted masses: ``(k, k', e)``, or ``(k, e)`` of pairs."""
        row, col, mass = self.plan.entries()
        return row, col, weight.reshape(*self.plan.batch_shape, 1) * mass


def _laid_out(mass: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
    """Weighted masses ``(k, k', n, m)`` where the costs of their pairs are, ``(k n, k' m)``, if not there already."""
    if mass.ndim == len(shape):
        return mass * weight[..., None, None]
    # Weights of all rows, and first: an elementwise product is laid out as its first operand, here in one pass.
    weight = weight[:, None, :, None].expand(-1, mass.shape[2], -1, -1).contiguous()
    return (weight * mass.transpose(1, 2)).reshape(shape)


class _PlanTotal(torch.autograd.Function):
    """Forward: the weighted sum of known values ``(k, k')``. Backward: the masses of their plans, as constants."""

    @staticmethod
    def forward(ctx: Any, costs: Tensor, weight: Tensor, mass: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mass, values)
        ctx.shape = costs.shape
        return (weight * values).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, mass, values = ctx.saved_tensors
        of_costs, of_weight = ctx.needs_input_grad[:2]
        return (
            _laid_out(mass, grad * weight, ctx.shape) if of_costs else None,
            grad * values if of_weight else None,
            None,
            None,
        )


@dataclass(frozen=True)
class MatchedBlock:
    """Problems ``(k, k')`` that were matched without a tensor of their costs; see `PlanBlock`."""

    where: tuple[slice, slice]
    values: Tensor
    found: GridMatching
    x: Tensor
    y: Tensor

    def total(self, weight: Tensor) -> Tensor:
        """See `PlanBlock`."""
        total: Tensor = _MatchedTotal.apply(self.x, self.y, weight, self.found)
        return total

    def entries(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `PlanBlock`."""
        return self.found.entries(weight)


class _MatchedTotal(torch.autograd.Function):
    """Forward: the weighted sum of the values. Backward: sums of displacements, by the compiled kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight: Tensor, found: GridMatching) -> Tensor:
        ctx.save_for_backward(x, y, weight)
        ctx.found = found
        return (weight * found.values).sum().to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight = ctx.saved_tensors
        *needed, by_weight = ctx.needs_input_grad[:3]
        if not torch.is_grad_enabled():
            of_weight = (grad * ctx.found.values * (weight > 0)).to(weight.dtype) if by_weight else None
            return (*ctx.found.gradients(x, y, weight * grad, tuple(needed)), of_weight, None)
        # For second derivatives: a sum that autograd knows. The incoming gradient depends on no point.
        row, col, mass = ctx.found.entries(torch.where(weight > 0, weight, 0))
        i, j = (torch.arange(size)[:, None] for size in weight.shape)
        apart = x[i[:, None], row] - y[j, col]
        total = (mass.to(x.dtype) * apart.square().sum(-1)).sum()
        inputs = [part for part, wanted in zip((x, y, weight), (*needed, by_weight), strict=True) if wanted]
        grads = iter(torch.autograd.grad(total, inputs, grad, create_graph=True))
        return (*(next(grads) if wanted else None for wanted in (*needed, by_weight)), None)


Block = ValueBlock | PlanBlock | MatchedBlock
