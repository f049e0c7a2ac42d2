"""Entropic transport between clouds too large for a matrix of their costs: passes over tiles, O(n d) memory.

The potentials come from passes over tiles (`mbot.geometry.Points`); the value is the dual one, whose error is of second
order in theirs; and its gradient in the points is, by the envelope theorem, a weighted sum of targets:

    squared Euclidean:  d/dx_i = 2 sum_j P_ij (x_i - y_j)          dot:  d/dx_i = - sum_j P_ij y_j

and in the weights the potentials.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mbot import checks, convergence
from mbot.cost import Cost, at_least_float32, expansion_holds, pairwise, unit
from mbot.envelope import first_order
from mbot.geometry import Points
from mbot.numerics import full_float32, no_autocast
from mbot.solvers.sinkhorn import solve_one

_CELLS = 1 << 24  # entries of the largest tile
_MOST = {"cuda": 1 << 24, "cpu": 1 << 27}  # entries of a cost matrix beyond which it is not made
_PROBE = 1024


def too_large(x: Tensor, y: Tensor, cost: Cost) -> bool:
    """Whether problems between ``(…, n, d)`` and ``(…, m, d)`` are solved without their cost matrix."""
    most = _MOST["cuda" if x.is_cuda else "cpu"]
    named = isinstance(cost, str) and cost in ("sqeuclidean", "dot", "cosine")
    return named and x.shape[-2] * y.shape[-2] > most and min(x.numel(), y.numel()) > 0


def entropic_values(
    x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, cost: str, reg: float, max_iter: int, tol: float
) -> Tensor:
    """The values ``(…,)`` of `EntropicOT` on checked points, one large problem after another."""
    batch, given = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2]), (a, b)
    like = torch.empty((), device=x.device).expand(*batch, 1, 1)
    weights = []
    for weight, points, name in ((a, x, "a"), (b, y, "b")):
        size = points.shape[-2]
        weight = checks.weights(weight, size, like, name)
        if weight is None:
            weight = torch.full((size,), 1 / size, dtype=torch.float64, device=x.device).expand(*batch, size)
        weights.append(weight.reshape(-1, size))
    left, right = weights[0], checks.equal_totals(*weights)
    with no_autocast(x), full_float32():
        x, y = at_least_float32(x), at_least_float32(y)
        x, y = (
            points.expand(*batch, *points.shape[-2:]).flatten(0, -3) if batch else points[None] for points in (x, y)
        )
        with_slopes = torch.is_grad_enabled() and any(weight is not None and weight.requires_grad for weight in given)
        with convergence.one_warning():
            found = [
                _value(*problem, cost, reg, max_iter, tol, with_slopes)
                for problem in zip(x, y, left, right, strict=True)
            ]
        values = torch.stack([value for value, _ in found]).reshape(batch)
    if not with_slopes:
        return values
    slopes = (torch.stack(side).reshape(*batch, -1) for side in zip(*(slopes for _, slopes in found), strict=True))
    a, b = (weight if weight is not None and weight.requires_grad else None for weight in given)
    return first_order(values, a, b, *(slope - slope.mean(-1, keepdim=True) for slope in slopes))  # totals stay


def _value(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, cost: str, reg: float, max_iter: int, tol: float, with_slopes: bool
) -> tuple[Tensor, list[Tensor]]:
    """The value of one problem and, if wanted, the potentials ``(n,)`` and ``(m,)`` of all points."""
    given, dtype, factor, name = (x.detach(), y.detach()), x.dtype, 1.0, cost
    if not bool((a > 0).all() & (b > 0).all()):
        x, y, a, b = x[a > 0], y[b > 0], a[a > 0], b[b > 0]  # points of weight 0 take no part
    exact = dtype if expansion_holds(x, y, cost, _PROBE) else torch.float64
    x, y = x.to(exact), y.to(exact)
    centre = torch.lerp(x.detach().mean(0), y.detach().mean(0), 0.5) if cost == "sqeuclidean" else None
    if cost == "cosine":
        cost, factor, reg = "sqeuclidean", 0.5, 2 * reg
    x, y = _prepared(x, name, centre), _prepared(y, name, centre)
    with torch.no_grad():
        sample = pairwise(x[:: -(-len(x) // _PROBE)], y[:: -(-len(y) // _PROBE)], cost)
        spread = float(sample.amax() - sample.amin())
        # Exponents of the size of spread / reg are rounded; no marginal is more exact than that.
        tol = max(tol, 4 * torch.finfo(x.dtype).eps * (8 + spread / reg))
        geometry = Points(x.detach(), y.detach(), cost, _CELLS, reg)
        found, larger = solve_one(
            geometry, a.log()[None], b.log()[None], reg=reg, spread=spread, max_iter=max_iter, tol=tol
        )
        error = float(found.error)
        advice = f"Raise max_iter (now {max_iter}), raise reg (now {factor * reg:g}, in cost units), or loosen tol."
        convergence.count_unconverged("EntropicOT", not error <= tol, 1, error, advice)
        phi, psi, total = found.phi[0], found.psi[0], a.sum()
        dual = (a * (phi - a.log())).sum() + (b * (psi - b.log())).sum() - total + total * b.sum()
        value = (larger * dual).to(x.dtype)
        slopes = []
        if with_slopes:  # one more half-round on either side, for the points of weight 0 as well
            left, right = (_prepared(points.to(exact), name, centre) for points in given)
            rows = Points(left, geometry.y, cost, _CELLS, larger).row_sums(psi[None])
            cols = Points(geometry.x, right, cost, _CELLS, larger).col_sums(phi[None])
            slopes = [-factor * larger * sums[0] for sums in (rows, cols)]
    return (factor * first_order(_Value.apply(x, y, value, geometry, phi, psi))).to(dtype), slopes


def _prepared(points: Tensor, cost: str, centre: Tensor | None) -> Tensor:
    """Points between which a cost is the squared distance (half of it for ``"cosine"``), or minus the product."""
    if cost == "cosine":
        return unit(points)
    return points if centre is None else points - centre


class _Value(torch.autograd.Function):
    """Forward: the known value. Backward: one pass over the pairs for each side that needs it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, value: Tensor, geometry: Any, phi: Tensor, psi: Tensor) -> Tensor:
        ctx.save_for_backward(phi, psi)
        ctx.geometry = geometry
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        phi, psi = ctx.saved_tensors
        sides: list[Tensor | None] = [None, None]
        for side in (0, 1):
            if ctx.needs_input_grad[side]:
                with full_float32():
                    moved, mass, points = ctx.geometry.transported(phi, psi, bool(side))
                dot = ctx.geometry.cost == "dot"
                sides[side] = grad * (-moved if dot else 2 * (mass[:, None] * points - moved))
        return (*sides, *[None] * 4)
