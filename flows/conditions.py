"""Conditions of any kind (tensors, arrays, lists, dicts of them) followed through indexing, copying and dropping."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mbot import checks
from mbot.labels import select, to_device
from mbot.random import draw

__all__ = ["drop_conditions", "null_condition", "select", "to_device"]


def null_condition(y: Any) -> Any:
    """The "no condition" of classifier-free guidance, for every row of ``y``.

    Labels (integers) become -1 and vectors (floating point) NaN, which the models of `flows.models` embed as zero; a
    dict is taken value by value.

    >>> null_condition(torch.tensor([3, 5]))
    tensor([-1, -1])
    """
    if isinstance(y, dict):
        return {key: null_condition(value) for key, value in y.items()}
    if not isinstance(y, Tensor) or y.dtype == torch.bool or y.is_complex():
        what = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"conditions that are dropped must be tensors of integers or floating point; got {what}")
    return torch.full_like(y, torch.nan if y.is_floating_point() else -1)


def drop_conditions(y: Any, probability: float, generator: torch.Generator | None = None) -> Any:
    """Conditions with each row replaced by `null_condition` with a probability (Ho and Salimans, arXiv 2207.12598).

    A row of a dict is dropped as a whole.

    Args:
        y: conditions, ``(B, …)`` tensors.
        probability: in [0, 1].
        generator: source of randomness.
    """
    if not 0 <= checks.positive(probability, "probability", allow_zero=True) <= 1:
        raise ValueError(f"probability must lie in [0, 1]; got {probability!r}")
    if y is None or probability == 0:
        return y
    first = next(iter(y.values())) if isinstance(y, dict) else y
    null = null_condition(y)
    dropped = draw(torch.rand, len(first), generator=generator, device=first.device) < probability

    def mix(value: Any, without: Any) -> Any:
        if isinstance(value, dict):
            return {key: mix(value[key], without[key]) for key in value}
        return torch.where(dropped.reshape(-1, *([1] * (value.ndim - 1))), without, value)

    return mix(y, null)
