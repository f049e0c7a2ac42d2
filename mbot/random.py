"""Random numbers from an explicit generator, wherever it lives, delivered on the device that wants them."""

from __future__ import annotations

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
