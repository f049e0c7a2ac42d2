"""Ground costs between points: every pair of two clouds, or the matched pairs of a sparse plan.

The squared Euclidean cost is ``|x - y|^2`` (no factor 1/2). Half-precision points are computed with in float32;
autocast and TF32 products are switched off inside.

Squared distances are expanded, ``|x|^2 + |y|^2 - 2 <x, y>`` about the clouds' common centre, or the origin where that
is as good. That cancels where points
lie closer to each other than to the centre (groups far apart, an outlier). So the rounding of the expansion is compared
with the smallest cost of each row. Where it is too large for a few pairs, these are computed by differences; else all
costs in float64, and by differences where float64 cancels too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mbot import checks
from mbot.eager import outside_graphs
from mbot.numerics import full_float32, no_autocast, product

Cost = str | Callable[[Tensor, Tensor], Tensor]
"""The name of a cost, or a callable ``(…, n, d), (…, m, d) -> (…, n, m)``."""

# Up to this many features the differences are summed directly, which is exact at coinciding points and as fast as a
# matrix product for so few columns.
DIRECT_FEATURES = 4
# Relative error that the smallest costs may have.
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-8}
_SAMPLE = 16  # points of a cloud by which its centre is judged
_MANY = 1 << 18  # numbers of two clouds; copies of fewer cost less than to judge
_FEW = 4  # pairs a point that are computed by differences
_CELLS = 1 << 22  # entries of the largest float64 matrix (32 MB) that is made on the careful way


class _Squared(torch.autograd.Function):
    """The squared distances that are already known, with their derivatives of any order.

    Points of few features may lie closer together than float32 tells in their products, so these are in float64.
    """

    @staticmethod
    def forward(x: Tensor, y: Tensor, squared: Tensor) -> Tensor:
        return squared

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        if x.shape[-1] <= DIRECT_FEATURES:
            x, y, grad = x.double(), y.double(), grad.double()
            centre = _centre(x, y)
            x, y = x - centre, y - centre
        with no_autocast(x):
            sides = [
                (2 * _displaced(own, other, part)).sum_to_size(given.shape).to(given.dtype) if needed else None
                for own, other, part, needed, given in zip(
                    (x, y), (y, x), (grad, grad.mT), ctx.needs_input_grad[:2], ctx.saved_tensors, strict=True
                )
            ]
        return (*sides, None)


def _displaced(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """``sum_j weight_ij (x_i - y_j)``, ``(…, n, d)``, for points that are centred."""
    if x.shape[-1] > DIRECT_FEATURES:
        return weight.sum(-1, keepdim=True) * x - product(weight, y)
    y = torch.cat((torch.ones_like(y[..., :1]), y), -1)  # sums and products in one pass over the weights
    total, moved = product(weight, y).split((1, x.shape[-1]), -1)
    return total * x - moved


def _centre(x: Tensor, y: Tensor) -> Tensor:
    """The middle of the means of two clouds, ``(…, 1, d)``; the mean of y where a process has no x."""
    x, y = (x if x.shape[-2] else y).detach(), y.detach()
    return torch.lerp(x.mean(-2, keepdim=True), y.mean(-2, keepdim=True), 0.5)


def _asked(x: Tensor, y: Tensor) -> bool:
    """Whether backward will ask for derivatives."""
    return torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)


def _known(x: Tensor, y: Tensor, squared: Tensor) -> Tensor:
    return _Squared.apply(x, y, squared) if _asked(x, y) else squared


def _norms(points: Tensor) -> Tensor:
    """Squared norms; a norm is one pass over the points, a sum of squares writes the squares first."""
    return torch.linalg.vector_norm(points, dim=-1).square_()


def _expanded(x: Tensor, y: Tensor, norms_x: Tensor, norms_y: Tensor) -> Tensor:
    """``|x - y|^2`` by the expansion, a new tensor; rounding may leave negative numbers."""
    if x.ndim == y.ndim == 2:
        return torch.addmm(norms_y, x, y.mT, alpha=-2).add_(norms_x[:, None])
    # The factor where there are fewer numbers: memory costs more than the arithmetic.
    inner = (x @ y.mT).mul_(-2) if y.shape[-2] < x.shape[-1] else (-2 * x) @ y.mT
    return inner.add_(norms_x[..., :, None]).add_(norms_y[..., None, :])


def _certain(squared: Tensor, norms: Tensor) -> bool:
    """Whether the expansion's rounding is small against the smallest cost of the rows.

    It is about ``eps |x|^2`` for all targets that are not much farther from the centre than x; costs of farther ones
    are as large as their norms, and precise. A power mean over the rows: a close pair by chance does no harm.
    """
    share = torch.linalg.vector_norm(norms / squared.amin(-1), 4, dim=-1)
    limit = certain_share(squared.dtype) * squared.shape[-2] ** 0.25
    return not share.numel() or float(share.amax() if share.ndim else share) <= limit


def certain_share(dtype: torch.dtype) -> float:
    """Squared norms about the centre, relative to the least cost, up to which the expansion is precise enough."""
    return _TOLERANCE[dtype] / torch.finfo(dtype).eps


def _direct(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances of points with few features, feature by feature."""
    x, y = x.mT.contiguous(), y.mT.contiguous()  # numbers in a row are subtracted by vectors
    apart = (p.unsqueeze(-1) - q.unsqueeze(-2) for p, q in zip(x.unbind(-2), y.unbind(-2), strict=True))
    if _asked(x, y):
        return functools.reduce(torch.add, (difference.square() for difference in apart))
    squared = next(apart).square_()
    for difference in apart:
        squared.addcmul_(difference, difference)
    return squared


def _near_the_origin(x: Tensor, y: Tensor) -> bool:
    """Whether the centre of two clouds is small against their spread, by a few points; centring would copy both."""
    if x.ndim > 2 or y.ndim > 2 or x.device.type != "cpu":  # a device would be waited for
        return False
    if not len(x) or x.numel() + y.numel() <= _MANY:  # a process may have none
        return False
    with torch.no_grad():
        some = [points[:: -(-len(points) // _SAMPLE)] for points in (x, y)]
        centre = torch.lerp(some[0].mean(0), some[1].mean(0), 0.5)
        spread = _norms(some[0]).mean() + _norms(some[1]).mean()
        return float(centre.square().sum()) * 4 <= float(spread)


def _squared(given_x: Tensor, given_y: Tensor, prepare: Callable[[Tensor], Tensor]) -> Tensor | None:
    """Squared distances of the prepared points, None where they would not be precise."""
    x, y, rounded = prepare(given_x), prepare(given_y), prepare is unit
    if x.shape[-1] <= DIRECT_FEATURES and not rounded:
        closed = x.dtype == torch.float32 and _asked(x, y)
        squared = _Squared.apply(x, y, _direct(x.detach(), y.detach())) if closed else _direct(x, y)
        return squared if math.isfinite(squared.detach().sum()) else None
    if not _near_the_origin(x, y):
        centre = _centre(x, y)
        x, y = x - centre, y - centre
    with torch.no_grad():
        norms_x, norms_y = _norms(x), _norms(y)
        squared = _expanded(x, y, norms_x, norms_y)
        if rounded:  # points of norm 1 are rounded by eps, which the centre does not see
            norms_x, norms_y = torch.ones_like(norms_x), torch.ones_like(norms_y)
    if _certain(squared, norms_x):
        return _known(x, y, squared)
    if _asked(x, y) or not math.isfinite(squared.sum()):
        return None
    # Between points and themselves (conditions, say) the diagonal cancels alone: few entries to compute by differences.
    share = torch.finfo(squared.dtype).eps / _TOLERANCE[squared.dtype]
    few = _FEW * math.prod(squared.shape[:-2]) * sum(squared.shape[-2:])
    where = squared < share * (norms_x.amax(-1) + norms_y.amax(-1))[..., None, None]  # no third matrix, and some more
    if int(where.sum()) > few:
        where = squared < share * (norms_x[..., :, None] + norms_y[..., None, :])
        if int(where.sum()) > few:
            return None
    _difference(squared, where, given_x, given_y, lambda points: prepare(points.double()))
    return squared


def _careful(x: Tensor, y: Tensor, cost: str) -> Tensor:
    """The cost in float64, some rows at a time, and by differences where that cancels; in the dtype of the points."""
    batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    tolerance = 1e-2 * _TOLERANCE[x.dtype]
    prepare, finish = _OF_SQUARES[cost]
    prepared = prepare(y.double())
    parts = []
    for rows in x.split(max(1, _CELLS // (batch.numel() * y.shape[-2])), -2):
        left = prepare(rows.double())
        if left.shape[-1] <= DIRECT_FEATURES:
            parts.append(finish(_direct(left, prepared)).to(x.dtype))
            continue
        centre = torch.lerp(_median(left), _median(prepared), 0.5)
        left, right = left - centre, prepared - centre
        with torch.no_grad():
            norms_x, norms_y = _norms(left), _norms(right)
            squared = _expanded(left, right, norms_x, norms_y)
            size = norms_x[..., :, None] + norms_y[..., None, :]
            _difference(squared, squared * tolerance < torch.finfo(torch.float64).eps * size, left, right, _same)
        parts.append(finish(_known(left, right, squared)).to(x.dtype))
    result = parts[0] if len(parts) == 1 else torch.cat(parts, -2)
    return finite_costs(result, cost)


def _median(points: Tensor) -> Tensor:
    """Upper median of each feature, ``(…, 1, d)``: a centre that single outliers do not move."""
    middle = points.shape[-2] // 2
    return points.detach().sort(-2).values[..., middle : middle + 1, :]


def _difference(squared: Tensor, where: Tensor, x: Tensor, y: Tensor, prepare: Callable[[Tensor], Tensor]) -> None:
    """Overwrite some squared distances by sums of squared differences of the prepared points."""
    batch = squared.shape[:-2]
    x, y = x.expand(*batch, *x.shape[-2:]), y.expand(*batch, *y.shape[-2:])
    for pairs in where.nonzero().split(max(1, _CELLS // x.shape[-1])):
        *at, i, j = pairs.T
        squared[*at, i, j] = (prepare(x[*at, i]) - prepare(y[*at, j])).square_().sum(-1).to(squared.dtype)


def finite_costs(costs: Tensor, cost: str) -> Tensor:
    """The costs, if none of them is too large for their dtype."""
    if not math.isfinite(costs.detach().sum()) and not bool(costs.detach().isfinite().all()):
        raise ValueError(
            f"the {cost!r} costs of these points do not fit into {costs.dtype}: rescale the points"
            + ("" if costs.dtype == torch.float64 else " or pass them in float64")
        )
    return costs


def root(squared: Tensor) -> Tensor:
    """Square root whose gradient at zero is zero, not NaN."""
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1).sqrt(), 0)


def unit(x: Tensor) -> Tensor:
    """Points ``(…, d)`` scaled to norm 1; a point of norm 0 has no direction and is refused."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    if not norm.numel():
        return x
    least, most = torch.stack(norm.detach().aminmax()).tolist()
    if x.dtype == torch.float32 and not 1e-15 < least <= most < math.inf:  # squares under- or overflow
        return unit(x.double()).float()
    if x.dtype == torch.float64 and not 1e-140 < least <= most < 1e140:
        largest = x.detach().abs().amax(-1, keepdim=True)
        x = x / torch.where(largest > 0, largest, 1)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        least = float(norm.detach().amin())
    if least == 0:
        raise ValueError(f"the cosine cost needs non-zero vectors; {int((norm == 0).sum())} have norm 0")
    return x / norm


def expansion_holds(x: Tensor, y: Tensor, cost: str, most: int = 1024) -> bool:
    """Whether sums over all pairs of two clouds ``(n, d)``, ``(m, d)`` may expand a named cost in the points' dtype.

    Judged by the costs between at most ``most`` points a side.
    """
    if cost == "dot":
        return True
    with torch.no_grad():
        sample_x, sample_y = (points[:: -(-len(points) // most)] for points in (x, y))
        costs = pairwise(sample_x, sample_y, cost)
        if cost == "cosine":
            return _certain(2 * costs, torch.ones_like(costs[:, 0]))
        squared = costs.square() if cost == "euclidean" else costs
        centre = torch.lerp(x.mean(0), y.mean(0), 0.5)
        size = _norms(x - centre).mean() + _norms(y - centre).mean()
        within = float(size) <= certain_share(x.dtype) * float(squared.amin(1).mean())
        return _certain(squared, _norms(sample_x - centre)) and within


class _OfSquares(NamedTuple):
    prepare: Callable[[Tensor], Tensor]  # of the points
    finish: Callable[[Tensor], Tensor]  # of the squared distances


def _same(x: Tensor) -> Tensor:
    return x


_OF_SQUARES = {
    "sqeuclidean": _OfSquares(_same, _same),
    "euclidean": _OfSquares(_same, root),
    # Half the squared distance on the sphere: 1 - <x, y> would cancel between directions that are close.
    "cosine": _OfSquares(unit, lambda squared: squared / 2),
}
_NAMES = (*_OF_SQUARES, "dot")


def _between(x: Tensor, y: Tensor, cost: str) -> Tensor:
    """A named cost of all pairs."""
    if cost == "dot":
        return finite_costs(product(-x, y.mT) if x.shape[-1] < y.shape[-2] else -product(x, y.mT), cost)
    prepare, finish = _OF_SQUARES[cost]
    squared = _squared(x, y, prepare)
    return _careful(x, y, cost) if squared is None else finish(squared)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision in float32, all else as it is: what costs are computed in."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def check_cost(cost: Cost) -> Cost:
    """Return ``cost`` if it names a ground cost or is callable; raise otherwise."""
    if isinstance(cost, str):
        checks.choice(cost, "cost", _NAMES)
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
    with no_autocast(x), full_float32():
        x, y = at_least_float32(x), at_least_float32(y)
        if isinstance(cost, str):
            return _between(x, y, cost)
        result = cost(x, y)
    shape = (*torch.broadcast_shapes(x.shape[:-2], y.shape[:-2]), x.shape[-2], y.shape[-2])
    if not isinstance(result, Tensor) or tuple(result.shape) != shape:
        got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"a callable cost must return shape {shape}; got {got}")
    return result


def paired(x: Tensor, y: Tensor, cost: str) -> Tensor:
    """Named cost of matched points: ``(…, d), (…, d) -> (…)``, in float64."""
    with no_autocast(x):
        x, y = at_least_float32(x), at_least_float32(y)
        if cost == "dot":
            return -(x * y).sum(-1, dtype=torch.float64)
        prepare, finish = _OF_SQUARES[cost]
        if cost == "cosine":
            x, y = x.double(), y.double()
        return finish(torch.linalg.vector_norm(prepare(x) - prepare(y), dim=-1, dtype=torch.float64).square())
