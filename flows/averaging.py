"""Exponential moving averages of a model's weights, which samples are drawn with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flows.pairs import eval_mode
from mbot import checks


def check_decay(ema: float | None) -> float | None:
    """A decay in [0, 1), or None for no average."""
    decay = None if ema is None else checks.positive(ema, "ema", allow_zero=True)
    if decay is not None and decay >= 1:
        raise ValueError(f"ema must lie in [0, 1) or be None; got {ema!r}")
    return decay


class Averaged(AveragedModel):
    """The average ``a + (1 - d^scale) (w - a)`` of weights and buffers, ``d = min(decay, (1 + n) / (10 + n))``.

    n is ``scale`` times the updates before. A batch of ``scale`` times the samples then averages over as many samples
    (Busbridge et al. 2023, arXiv 2307.13813). Buffers that have no average are those of the model: integers, booleans,
    half precision, and entries that are not finite, such as the ``-inf`` of a mask.

    Args:
        model: its weights are in float32 or better.
        decay: in [0, 1).
        scale: samples of a step, relative to those that ``decay`` is meant for.

    Raises:
        ValueError: weights of half precision, in which the average would stand still.
    """

    def __init__(self, model: nn.Module, decay: float, scale: float = 1.0) -> None:
        half = {str(p.dtype) for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize < 4}
        if half:
            raise ValueError(
                f"ema cannot average weights of {', '.join(half)}: such numbers swallow its small steps. Keep float32 "
                "weights and train with precision='bf16', or give ema=None"
            )
        super().__init__(model, multi_avg_fn=self._average, use_buffers=True)
        self.decay, self.scale = decay, scale

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """One step, in place."""
        super().update_parameters(model)
        current = dict(model.named_buffers())
        for name, buffer in self.module.named_buffers():
            now = current[name].to(buffer.device)
            buffer.copy_(torch.where(buffer.isfinite(), buffer, now) if _has_average(buffer) else now)

    def _average(self, averaged: Any, current: Any, count: Any) -> None:
        if _has_average(averaged[0]):
            step = self.scale * int(self.n_averaged)  # on the CPU, as count may not be
            get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)) ** self.scale)(averaged, current, count)


def _has_average(values: torch.Tensor) -> bool:
    """Whether a small step is not lost in rounding."""
    return values.dtype.itemsize >= 4 and (values.is_floating_point() or values.is_complex())


@contextmanager
def at_rest(model: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """The model in eval mode, without gradients; afterwards its modes and torch's default generators are as before."""
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []), eval_mode(model):
        yield model
