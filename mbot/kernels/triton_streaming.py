"""Triton kernels that pass over all pairs of two clouds without a matrix of them: O(n d) memory.

With ``c(x, y) = u(x) + v(y) - s <x, y>`` (squared Euclidean: s = 2; dot: s = 1 and no norms), a log-sum-exp over the
targets is one over ``bias_j + scale <x_i, y_j>``, and the norms go into the bias and into the result. Up to four
features are differenced directly, which is exact at coinciding points. Products and sums are in float32 (never TF32),
of float32, float16 or bfloat16 points; a running maximum keeps the exponents in range. All exponents are in base 2.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

COSTS = ("sqeuclidean", "dot")
_DIRECT_FEATURES = 4
_LOG2E = 1 / math.log(2)
PRECISION = "ieee"  # of products of float32 points; "tf32x3", three TF32 products for one, is measured beside it


@triton.jit
def _products(
    x, y, rows, cols, n, m, d,
    DIRECT: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of inner products, or of negative squared distances if ``DIRECT``; float32."""
    result = tl.zeros([M, N], tl.float32)
    if DIRECT:
        for k in tl.static_range(D):
            left = tl.load(x + rows * d + k, mask=rows < n, other=0.0).to(tl.float32)
            right = tl.load(y + cols * d + k, mask=cols < m, other=0.0).to(tl.float32)
            gap = left[:, None] - right[None, :]
            result -= gap * gap
    else:
        for first in range(0, d, D):
            k = first + tl.arange(0, D)
            left = tl.load(x + rows[:, None] * d + k[None, :], mask=(rows[:, None] < n) & (k[None, :] < d), other=0.0)
            right = tl.load(y + cols[None, :] * d + k[:, None], mask=(cols[None, :] < m) & (k[:, None] < d), other=0.0)
            result = tl.dot(left, right, result, input_precision=PRECISION)
    return result


@triton.jit
def _log_sums_kernel(
    x, y, bias, out, n, m, d, scale,
    DIRECT: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``log2 sum_j exp2(bias_j + scale * product_ij)`` of ``M`` rows of one problem."""
    problem = tl.program_id(1).to(tl.int64)
    x += problem * n * d
    y += problem * m * d
    rows = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    for first in range(0, m, N):
        cols = first + tl.arange(0, N).to(tl.int64)
        shift = tl.load(bias + problem * m + cols, mask=cols < m, other=float("-inf"))
        exponent = shift[None, :] + scale * _products(x, y, rows, cols, n, m, d, DIRECT, D, M, N, PRECISION)
        higher = tl.maximum(top, tl.max(exponent, 1))
        # While nothing reaches a row its maximum is -inf, and the difference of two of these is no number.
        level = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - level) + tl.sum(tl.exp2(exponent - level[:, None]), 1)
        top = higher
    tl.store(out + problem * n + rows, top + tl.log2(total), mask=rows < n)


@triton.jit
def _transported_kernel(
    x, y, offset, bias, out, mass, n, m, d, scale,
    DIRECT: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
    OUT: tl.constexpr,
):  # fmt: skip
    """Rows of ``P @ y`` (some of their features) and the row sums, ``P_ij = exp2(offset_i + bias_j + scale p_ij)``."""
    problem = tl.program_id(1).to(tl.int64)
    x += problem * n * d
    y += problem * m * d
    rows = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    features = tl.program_id(2) * OUT + tl.arange(0, OUT)
    own = tl.load(offset + problem * n + rows, mask=rows < n, other=float("-inf"))
    sums = tl.zeros([M], tl.float32)
    moved = tl.zeros([M, OUT], tl.float32)
    for first in range(0, m, N):
        cols = first + tl.arange(0, N).to(tl.int64)
        shift = tl.load(bias + problem * m + cols, mask=cols < m, other=float("-inf"))
        exponent = own[:, None] + (
            shift[None, :] + scale * _products(x, y, rows, cols, n, m, d, DIRECT, D, M, N, PRECISION)
        )
        plan = tl.exp2(exponent)
        sums += tl.sum(plan, 1)
        points = tl.load(
            y + cols[:, None] * d + features[None, :], mask=(cols[:, None] < m) & (features[None, :] < d), other=0.0
        )
        moved = tl.dot(plan, points.to(tl.float32), moved, input_precision=PRECISION)
    tl.store(
        out + (problem * n + rows)[:, None] * d + features[None, :],
        moved,
        mask=(rows[:, None] < n) & (features[None, :] < d),
    )
    limit = tl.where(tl.program_id(2) == 0, n, 0)  # one of the programs that share the rows
    tl.store(mass + problem * n + rows, sums, mask=rows < limit)


def _shape(n: int, d: int, cost: str) -> dict[str, Any]:
    """Tiles: fewer rows a block while there are too few blocks to fill the device."""
    direct = cost == "sqeuclidean" and d <= _DIRECT_FEATURES
    rows = 64 if n >= 16384 else 32 if n >= 4096 else 16
    features = d if direct else 16 if d <= 16 else 32  # all of them, or a block of a product
    return {"DIRECT": direct, "D": features, "M": rows, "N": 64, "PRECISION": PRECISION, "num_stages": 2,
            "enable_fp_fusion": True}  # fmt: skip


# A log-sum-exp over differences: wide tiles of few rows, whose reductions cost the same whatever their columns.
_WIDE = {"M": 8, "N": 512, "num_warps": 2}


def _terms(potential: Tensor, square: Tensor, eps: float) -> Tensor:
    """Potentials in base 2 less the points' own term of the cost, float32."""
    return (potential.double() - square / eps).mul_(_LOG2E).float().contiguous()


def probe() -> None:
    """Launch a kernel on the current device; raises what Triton raises."""
    point = torch.zeros(1, 1, 1, device="cuda")
    log_sums(point, point, point[0], "sqeuclidean", 1.0)


def squares(points: Tensor, cost: str) -> Tensor:
    """The points' own terms of the cost where the kernels have products, ``(B, n)`` float64; else 0."""
    if cost == "sqeuclidean" and points.shape[-1] > _DIRECT_FEATURES:
        return points.double().square().sum(-1)
    return torch.zeros((), dtype=torch.float64, device=points.device)


def _scale(d: int, cost: str, eps: float) -> float:
    return float(_LOG2E / eps) * (2 if cost == "sqeuclidean" and d > _DIRECT_FEATURES else 1)


def _on(points: Tensor) -> Any:
    return torch.cuda.device(points.device) if points.is_cuda else nullcontext()


def log_sums(
    x: Tensor, y: Tensor, potential: Tensor, cost: str, eps: float, known: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """``log sum_j exp(potential_j - c(x_i, y_j) / eps)``.

    Args:
        x: ``(B, n, d)`` points, float32 or half precision.
        y: ``(B, m, d)`` points, of the same type.
        potential: ``(B, m)`` in units of eps.
        cost: one of `COSTS`.
        eps: regularisation, in units of the cost.
        known: `squares` of both clouds, if they are at hand.

    Returns:
        ``(B, n)`` in float64.
    """
    x, y = x.contiguous(), y.contiguous()
    (count, n, d), m = x.shape, y.shape[1]
    own, other = known or (squares(x, cost), squares(y, cost))
    bias = _terms(potential, other, eps)
    out = torch.empty(count, n, dtype=torch.float32, device=x.device)
    shape = _shape(n, d, cost) | {"num_warps": 4}
    if shape["DIRECT"]:
        shape |= _WIDE
    with _on(x):
        _log_sums_kernel[(triton.cdiv(n, shape["M"]), count)](x, y, bias, out, n, m, d, _scale(d, cost, eps), **shape)
    return out.double() * math.log(2) - own / eps


def transported(
    x: Tensor, y: Tensor, phi: Tensor, psi: Tensor, cost: str, eps: float, known: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """``P @ y`` ``(B, n, d)`` and row sums ``(B, n)`` of ``P = exp(phi + psi - c / eps)``; see `log_sums`."""
    x, y = x.contiguous(), y.contiguous()
    (count, n, d), m = x.shape, y.shape[1]
    own, other = known or (squares(x, cost), squares(y, cost))
    offset, bias = _terms(phi, own, eps), _terms(psi, other, eps)
    moved = torch.empty(count, n, d, dtype=torch.float32, device=x.device)
    mass = torch.empty(count, n, dtype=torch.float32, device=x.device)
    width = min(64, max(16, triton.next_power_of_2(d)))
    shape = _shape(n, d, cost) | {"num_warps": 8}
    if shape["DIRECT"]:
        shape["num_stages"] = 1  # Triton before 3.3 cannot pipeline it
    with _on(x):
        _transported_kernel[(triton.cdiv(n, shape["M"]), count, triton.cdiv(d, width))](
            x, y, offset, bias, moved, mass, n, m, d, _scale(d, cost, eps), OUT=width, **shape
        )
    return moved, mass
