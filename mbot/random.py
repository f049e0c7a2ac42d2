"""Random numbers from an explicit generator, wherever it lives, delivered on the device that wants them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def draw(
    sampler: Callable[..., Tensor],
    *size: int,
    generator: torch.Generator | None,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``sampler(*size)`` (torch.rand, torch.randn, torch.randperm) from ``generator``, on ``device``.

    The numbers are drawn on the generator's own device, so that one CPU generator serves data on any device with the
    same results; None draws from torch's default generator of ``device``.
    """
    where = device if generator is None else generator.device
    return sampler(*size, generator=generator, device=where, dtype=dtype).to(device)


_GOLDEN, _MIX = -0x61C8864680B583EB, (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # splitmix64's, as signed numbers
_AT_ONCE = 1 << 17  # numbers made at a time, which stay in the cache


def normals_at(seed: int, numbers: Tensor, d: int) -> Tensor:
    """Standard normal noises ``(n, d)`` by number: each a function of the seed and its own number, on every device.

    Splitmix64 of a counter, turned normal by Box and Muller in float64; float32 on return.

    Args:
        seed: of the sequence of noises.
        numbers: ``(n,)`` int64, which of them.
        d: features of a noise.
    """
    pairs = -(-d // 2)
    noise = torch.empty(len(numbers), d, device=numbers.device)
    key = _mixed(torch.tensor(seed))
    step = max(1, _AT_ONCE // pairs)
    for part, out in zip(numbers.split(step), noise.split(step), strict=True):
        counter = 2 * (part[:, None] * pairs + torch.arange(pairs, device=part.device))
        radius, angle = (
            ((_mixed(key.to(part.device) + _GOLDEN * (counter + k)) >> 11 & (1 << 53) - 1) + 1).double() * 2.0**-53
            for k in (0, 1)
        )
        radius, angle = (-2 * radius.log()).sqrt(), 2 * math.pi * angle
        out[:, :pairs] = radius * angle.cos()
        out[:, pairs:] = (radius * angle.sin())[:, : d - pairs]
    return noise


def _mixed(z: Tensor) -> Tensor:
    """Splitmix64's last step, of int64 numbers that wrap around."""
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * _MIX[0]
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * _MIX[1]
    return z ^ (z >> 31 & (1 << 33) - 1)
