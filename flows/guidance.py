"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598; for flows: Zheng et al. 2023, arXiv 2311.13443)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flows.matching import VelocityModel
from mbot import checks
from mbot.random import draw


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


@dataclass(frozen=True, eq=False)
class GuidedModel:
    """A velocity field pushed along its condition: ``v(∅) + scale (v(y) - v(∅))``.

    For a model trained with dropped conditions. Scale 1 is the conditional field, 0 the unconditional one, more than 1
    follows the condition harder, less than 0 leads away from it. Both fields come from one call at twice the batch; a
    plain scale of 1 or 0 makes one call at the batch's size. Works wherever a model does, `flows.integrate` included.

    Args:
        model: ``model(t, x, y) -> velocity``.
        scale: one number, or a tensor ``(B,)`` with one a sample.
        null: the "no condition" that the model was trained with, as a function of ``y``; by default
            `flows.null_condition`.

    >>> field = lambda t, x, y: y.clamp_min(0)[:, None].float().expand_as(x)
    >>> GuidedModel(field, torch.tensor([2.0, -1.0]))(torch.zeros(2), torch.zeros(2, 1), torch.tensor([3, 3]))
    tensor([[ 6.],
            [-3.]])
    """

    model: VelocityModel
    scale: float | Tensor
    null: Any = field(default=null_condition)

    def __post_init__(self) -> None:
        if not isinstance(self.scale, Tensor) or self.scale.ndim == 0:
            checks.store(self, scale=checks.number(self.scale, "scale"))
        elif self.scale.ndim != 1:
            raise ValueError(f"scale must be a number or a tensor (B,); got shape {tuple(self.scale.shape)}")
        else:
            checks.finite(self.scale, "scale")

    def __call__(self, t: Tensor, x: Tensor, y: Any = None) -> Tensor:
        """Guided velocity, ``(B, d…)``."""
        if y is None:
            raise ValueError("guidance needs conditions: pass y")
        nothing = self.null(y)
        if not isinstance(self.scale, Tensor) and self.scale in (0, 1):
            return self.model(t, x, y if self.scale == 1 else nothing)
        both = self.model(torch.cat((t, t)), torch.cat((x, x)), _stack(nothing, y))
        without, given = both.chunk(2)
        scale: Any = self.scale
        if isinstance(scale, Tensor):
            if len(scale) != len(x):
                raise ValueError(f"scale must hold one number for each of the {len(x)} samples; got {len(scale)}")
            scale = scale.to(x.device, x.dtype).reshape(-1, *([1] * (x.ndim - 1)))
        return without + scale * (given - without)


def _stack(first: Any, second: Any) -> Any:
    if isinstance(first, dict):
        return {key: _stack(first[key], second[key]) for key in first}
    return torch.cat((first, second))
