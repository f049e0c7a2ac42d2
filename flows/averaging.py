"""Exponential moving averages of a model's weights, which samples are drawn with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def averaged_model(model: nn.Module, decay: float, steps: Callable[[], int]) -> AveragedModel:
    """The average ``a + (1 - d) (w - a)`` of weights and buffers, with ``d = min(decay, (1 + step) / (10 + step))``.

    Args:
        model: its weights are in float32 or better.
        decay: in [0, 1).
        steps: returns the number of steps done; called at each update.

    Raises:
        ValueError: weights of half precision, in which the average would stand still.
    """
    half = {str(p.dtype) for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize < 4}
    if half:
        raise ValueError(
            f"ema cannot average weights of {', '.join(half)}: such numbers swallow its small steps. Keep float32 "
            "weights and train with precision='bf16', or give ema=None"
        )

    def average(averaged: Any, current: Any, count: Any) -> None:
        step = steps()
        get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))(averaged, current, count)

    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)
