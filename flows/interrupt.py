"""How a run stops early: a signal is noticed, the step finished, the state saved; or the loss is no number."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

INTERRUPTED = 75
"""Exit code of a run that saved itself on SIGTERM or SIGINT (EX_TEMPFAIL: start it again and it goes on)."""


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
