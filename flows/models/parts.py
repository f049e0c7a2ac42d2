"""Parts of the models: checked inputs, features of times and positions, attention with forward-mode derivatives."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F


def sinusoids(values: Tensor, dim: int) -> Tensor:
    """Features ``(B, dim)`` of values ``(B,)``: cosines, then sines, with periods from 2π to nearly 20,000π.

    In float32 or better.
    """
    half = dim // 2
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    rate = torch.exp(-math.log(10_000) / half * torch.arange(half, device=values.device, dtype=torch.float32))
    angle = values[:, None] * rate
    return F.pad(torch.cat((angle.cos(), angle.sin()), 1), (0, dim % 2))


def time_features(t: Tensor, dim: int) -> Tensor:
    """Sinusoids ``(B, dim)`` of times in [0, 1], which are stretched to the diffusion models' [0, 1000]."""
    return sinusoids(1000 * t.to(torch.promote_types(t.dtype, torch.float32)), dim)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention ``(…, n, d)``, fused where no forward-mode derivative is asked for."""
    if forward_ad.unpack_dual(q).tangent is None:
        return F.scaled_dot_product_attention(q, k, v)
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


def check_input(t: Tensor, x: Tensor, weight: Tensor, fits: bool, wanted: str) -> None:
    """Refuse times and points that a model was not built for.

    Args:
        t: one time a sample, or one for all.
        x: points.
        weight: one of the model's, for its dtype.
        fits: whether the points have the model's shape.
        wanted: that shape in words.
    """
    if not fits:
        raise ValueError(f"x must have shape {wanted}; got {tuple(x.shape)}")
    if not isinstance(t, Tensor) or t.ndim != 1 or len(t) not in (1, len(x)):
        got = tuple(t.shape) if isinstance(t, Tensor) else repr(t)
        raise ValueError(f"t must be a tensor of one time a sample, ({len(x)},); got {got}")
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"x and the model's weights must have one dtype; got {x.dtype} and {weight.dtype}")
