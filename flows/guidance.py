"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598; for flows: Zheng et al. 2023, arXiv 2311.13443)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flows.matching import VelocityModel
from flows.paths import beside
from mbot import checks
from mbot.conditions import as_tensor, concatenate
from mbot.random import draw


def null_condition(y: Any) -> Any:
    """The "no condition" of classifier-free guidance, for every row of ``y``.

    Integers and booleans become the int64 label -1, floating point becomes NaN (the models of `flows.models` embed
    both as zero), and what is not numeric a list of None. A dict is taken value by value.

    >>> null_condition(torch.tensor([3, 5], dtype=torch.uint8)), null_condition(["a dog", "a cat"])
    (tensor([-1, -1]), [None, None])
    """
    y = _droppable(y)
    if isinstance(y, Mapping):
        return {key: null_condition(value) for key, value in y.items()}
    return [None] * len(y) if isinstance(y, list) else torch.full_like(y, torch.nan if y.is_floating_point() else -1)


def check_share(value: float, name: str) -> float:
    """A number in [0, 1], or an error that names it."""
    share = checks.positive(value, name, allow_zero=True)
    if share > 1:
        raise ValueError(f"{name} must lie in [0, 1]; got {value!r}")
    return share


def drop_conditions(y: Any, probability: float, generator: torch.Generator | None = None) -> Any:
    """Conditions with each row replaced by `null_condition` with a probability (Ho and Salimans, arXiv 2207.12598).

    A row of a dict is dropped as a whole.

    Args:
        y: conditions, see `mbot.conditions`.
        probability: in [0, 1].
        generator: source of randomness.

    Returns:
        Tensors of int64 or floating point where conditions are numeric, else lists.
    """
    if check_share(probability, "probability") == 0 or y is None:
        return y
    first = _droppable(y)
    while isinstance(first, Mapping):
        first = next(iter(first.values()))
    device = first.device if isinstance(first, Tensor) else torch.device("cpu")
    dropped = draw(torch.rand, len(first), generator=generator, device=device) < probability

    def mix(value: Any, without: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: mix(value[key], without[key]) for key in value}
        if isinstance(value, list):
            return [w if gone else v for v, w, gone in zip(value, without, dropped.tolist(), strict=True)]
        return torch.where(beside(dropped.to(value.device), value), without, value)

    return mix(_droppable(y), null_condition(y))


def _droppable(y: Any) -> Any:
    """Conditions in a form that has a "no condition": int64 or floating-point tensors, lists, or dicts of these."""
    if isinstance(y, Mapping):
        return {key: _droppable(value) for key, value in y.items()}
    try:
        tensor = as_tensor(y, "y")
    except TypeError:
        return list(y)
    if tensor.is_complex():
        raise TypeError(f"conditions that are dropped must be real; got {tensor.dtype}")
    return tensor if tensor.is_floating_point() else tensor.long()


@dataclass(frozen=True, eq=False)
class GuidedModel:
    """A velocity field pushed along its condition: ``v(∅) + scale (v(y) - v(∅))``.

    For a model trained with dropped conditions, of velocities or of average ones (which take ``until``). Scale 1 is the
    conditional field, 0 the unconditional one, more than 1 follows the condition harder, less than 0 leads away from
    it. Both fields come from one call at twice the batch; a plain scale of 1 or 0 makes one call at the batch's size.
    Works wherever a model does, `flows.integrate` included.

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

    def __call__(self, t: Tensor, x: Tensor, y: Any = None, **until: Tensor) -> Tensor:
        """Guided velocity, ``(B, d…)``."""
        if y is None:
            raise ValueError("guidance needs conditions: pass y")
        y = _droppable(y)
        nothing = self.null(y)
        if not isinstance(self.scale, Tensor) and self.scale in (0, 1):
            return self.model(t, x, y if self.scale == 1 else nothing, **until)
        twice = {name: torch.cat((time, time)) for name, time in until.items()}
        both = self.model(torch.cat((t, t)), torch.cat((x, x)), concatenate([nothing, y]), **twice)
        without, given = both.chunk(2)
        scale: Any = self.scale
        if isinstance(scale, Tensor):
            if len(scale) != len(x):
                raise ValueError(f"scale must hold one number for each of the {len(x)} samples; got {len(scale)}")
            scale = beside(scale.to(x.device, x.dtype), x)
        return without + scale * (given - without)
