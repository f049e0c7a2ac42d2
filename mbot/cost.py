"""Ground costs between points: every pair of two clouds, or the matched pairs of a sparse plan.

The squared Euclidean cost is ``|x - y|^2`` (no factor 1/2). Half-precision points are computed with in float32;
autocast and TF32 products are switched off inside, and large-dimensional squared distances are taken about the clouds'
common centre, so that an offset of the data does not cancel digits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mbot import checks
from mbot.eager import outside_graphs
from mbot.numerics import full_float32, product

Cost = str | Callable[[Tensor, Tensor], Tensor]
"""The name of a cost, or a callable ``(…, n, d), (…, m, d) -> (…, n, m)``."""

# Up to this many features the differences are summed directly, which is exact at coinciding points and as fast as a
# matrix product for so few columns.
_DIRECT_FEATURES = 4


def _squared(x: Tensor, y: Tensor) -> Tensor:
    if x.shape[-1] <= _DIRECT_FEATURES:
        return sum(  # type: ignore[return-value]
            (x[..., :, None, k] - y[..., None, :, k]).square() for k in range(x.shape[-1])
        )
    centre = (y.detach().mean(-2, keepdim=True) + x.detach().mean(-2, keepdim=True)) / 2
    x, y = x - centre, y - centre
    # In place, and the factor where there are fewer numbers: memory costs more than the arithmetic.
    inner = product(x, y.mT).mul_(-2) if y.shape[-2] < x.shape[-1] else product(-2 * x, y.mT)
    # A norm is one pass over the points; a sum of squares writes the squares first.
    norms_x, norms_y = (torch.linalg.vector_norm(points, dim=-1).square() for points in (x, y))
    return inner.add_(norms_x[..., :, None]).add_(norms_y[..., None, :]).clamp_min_(0)


def _root(squared: Tensor) -> Tensor:
    """Square root whose gradient at zero is zero, not NaN."""
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1).sqrt(), 0)


def unit(x: Tensor) -> Tensor:
    """Points ``(…, d)`` scaled to norm 1; a point of norm 0 has no direction and is refused."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    if bool((norm == 0).any()):
        raise ValueError(f"the cosine cost needs non-zero vectors; {int((norm == 0).sum())} have norm 0")
    return x / norm


@dataclass(frozen=True)
class _GroundCost:
    pairwise: Callable[[Tensor, Tensor], Tensor]  # (…, n, d), (…, m, d) -> (…, n, m)
    paired: Callable[[Tensor, Tensor], Tensor]  # (…, d), (…, d) -> (…)


_COSTS: dict[str, _GroundCost] = {
    "sqeuclidean": _GroundCost(_squared, lambda x, y: (x - y).square().sum(-1)),
    "euclidean": _GroundCost(lambda x, y: _root(_squared(x, y)), lambda x, y: _root((x - y).square().sum(-1))),
    # Half the squared distance on the sphere: 1 - <x, y> would cancel between directions that are close.
    "cosine": _GroundCost(
        lambda x, y: _squared(unit(x), unit(y)) / 2,
        lambda x, y: (unit(x) - unit(y)).square().sum(-1) / 2,
    ),
    "dot": _GroundCost(lambda x, y: -product(x, y.mT), lambda x, y: -(x * y).sum(-1)),
}


def _named(cost: str) -> _GroundCost:
    checks.choice(cost, "cost", tuple(_COSTS))
    return _COSTS[cost]


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision in float32, all else as it is: what costs are computed in."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def check_cost(cost: Cost) -> Cost:
    """Return ``cost`` if it names a ground cost or is callable; raise otherwise."""
    if isinstance(cost, str):
        _named(cost)
    elif not callable(cost):
        raise TypeError(f"cost must be a name or a callable (x, y) -> (…, n, m); got {cost!r}")
    return cost


@outside_graphs
def pairwise_cost(x: Tensor, y: Tensor, cost: Cost = "sqeuclidean", *, feature_ndim: int = 1) -> Tensor:
    """Cost of moving every point of ``x`` to every point of ``y``.

    Args:
        x: ``(…, n, d)`` source points, floating point; batch axes broadcast against those of ``y``.
        y: ``(…, m, d)`` target points, same dtype and device.
        cost: ``"sqeuclidean"`` (``|x - y|^2``), ``"euclidean"``, ``"cosine"`` (``1 - cos``, in ``[0, 2]``), ``"dot"``
            (``-<x, y>``; same optimal plans as ``"sqeuclidean"``), or a callable ``(x, y) -> (…, n, m)``.
        feature_ndim: number of trailing axes that make up one point; 3 for images ``(…, n, C, H, W)``.

    Returns:
        ``(…, n, m)`` costs, differentiable in both arguments; float32 for half-precision points.

    Raises:
        TypeError: not floating-point tensors, or two different dtypes.
        ValueError: empty clouds, unequal features, non-finite points, unknown cost, two devices, zero vectors under
            ``"cosine"``, or a callable that returns another shape.

    >>> x, y = torch.tensor([[0.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 2.0]])
    >>> pairwise_cost(x, y)
    tensor([[1., 5.],
            [2., 2.]])
    """
    x, y = checks.clouds(x, y, feature_ndim=feature_ndim)
    return pairwise(x, y, cost)


def pairwise(x: Tensor, y: Tensor, cost: Cost) -> Tensor:
    """`pairwise_cost` of checked points ``(…, n, d)``."""
    check_cost(cost)
    with torch.autocast(x.device.type, enabled=False), full_float32():
        x, y = at_least_float32(x), at_least_float32(y)
        if isinstance(cost, str):
            return _named(cost).pairwise(x, y)
        result = cost(x, y)
    shape = (*torch.broadcast_shapes(x.shape[:-2], y.shape[:-2]), x.shape[-2], y.shape[-2])
    if not isinstance(result, Tensor) or tuple(result.shape) != shape:
        got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"a callable cost must return shape {shape}; got {got}")
    return result


def paired(x: Tensor, y: Tensor, cost: str) -> Tensor:
    """Named cost of matched points: ``(…, d), (…, d) -> (…)``."""
    with torch.autocast(x.device.type, enabled=False), full_float32():
        return _named(cost).paired(at_least_float32(x), at_least_float32(y))
