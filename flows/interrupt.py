"""Early stops of a run: on a signal, after the step is finished and saved; or on values that are not finite."""

from __future__ import annotations

import math
import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from flows import checkpoint
from flows.sharded import whole

INTERRUPTED = 75
"""Exit code of a run that saved itself on SIGTERM or SIGINT (EX_TEMPFAIL: start it again and it goes on)."""

_LEAST_SCALE = 1e-4  # of an fp16 loss; at 65536 to begin with, it halves when a gradient overflows


class Interrupted(SystemExit):
    """Raised by a training loop that stopped on a signal; uncaught, it ends the process with code 75.

    Attributes:
        checkpoint: where the state was saved, or None.
    """

    def __init__(self, message: str, checkpoint: Path | None) -> None:
        super().__init__(INTERRUPTED)
        self.message, self.checkpoint = message, checkpoint

    def __str__(self) -> str:
        return self.message


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient stopped being a number; the weights of the last checkpoint are untouched."""


class NumberGuard:
    """Finds losses, gradients, weights and buffers that are not finite before they are saved.

    Losses and gradients are found without waiting for the device.

    Args:
        device: where losses and gradients are.
        folder: of the checkpoints, or None.
        model: what is trained; its buffers that are not finite now, such as a mask, are meant to be so.
    """

    def __init__(self, device: torch.device, folder: Path | None, model: nn.Module) -> None:
        self.folder = folder
        self.meant = sorted(name for name, buffer in model.named_buffers() if not bool(buffer.isfinite().all()))
        self.bad = torch.zeros((), dtype=torch.bool, device=device)
        self.loss = self.norm = torch.tensor(math.nan)
        self.scale = math.inf

    def note(self, loss: Tensor, norm: Tensor, scaler: torch.amp.GradScaler) -> None:
        """Record a step's loss and gradient norm.

        A gradient scaler skips steps whose gradient overflows and halves its scale; that is an error only where the
        scale has become useless.
        """
        self.loss, self.norm = loss, norm
        self.bad |= ~loss.isfinite()
        if not scaler.is_enabled():
            self.bad |= ~norm.isfinite()
        else:
            self.scale = scaler.get_scale()
            self.bad |= self.scale < _LEAST_SCALE

    def stop(self, step: int, rate: float, precision: str) -> NoReturn:
        """Raise the error for a step whose loss or gradient is not finite."""
        said = f"the loss is {float(self.loss):g}, the gradient norm {float(self.norm):g}"
        if self.scale < _LEAST_SCALE:
            said = f"the gradient overflows at every loss scale down to {2 * self.scale:g}"
        raise NonFiniteLoss(
            f"step {step}: {said}, at learning rate {rate:g} in {precision}. {self._what_is_left()} Lower the learning "
            "rate, clip gradients, or use bf16 or fp32 instead of fp16"
        )

    def check_weights(self, step: int, rate: float, *models: nn.Module) -> None:
        """Refuse weights that are not finite, such as a too large step leaves behind."""
        named = [pair for model in models for pair in (*model.named_parameters(), *model.named_buffers())]
        bad = [name for name, p in named if name not in self.meant and not bool(whole(p.isfinite().all()))]
        if bad:
            raise NonFiniteLoss(
                f"after step {step} weights are not finite ({', '.join(bad[:3])}), at learning rate {rate:g}; they are "
                f"not saved. {self._what_is_left()} Lower the learning rate, or clip gradients"
            )

    def _what_is_left(self) -> str:
        last = None if self.folder is None else checkpoint.last_good(self.folder)
        return f"The last good checkpoint is {last}." if last else "There is no good checkpoint yet."


class Signals:
    """While entered, SIGTERM and SIGINT set ``received``; a second one acts as usual. Main thread only, else inert."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}
        self._owner = os.getpid()

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner or self.received is not None:  # a data worker, or the second time
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number
