"""Reports of a training run: progress bar, CSV file (kept when a run is resumed), TensorBoard events on request."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flows.checkpoint import write_atomically

COLUMNS = ("step", "epoch", "loss", "lr", "grad_norm", "steps_per_second", "wait_share", "seconds")


@dataclass(frozen=True)
class TrainResult:
    """Facts of a finished run: steps done, last loss, seconds of this call, of which waiting for the loader."""

    step: int
    loss: float
    seconds: float
    wait_seconds: float
    checkpoint: Path | None


class RunLog:
    """Figures of a run, written by one process.

    Args:
        out: the run's folder, for ``metrics.csv`` (and ``tensorboard/``); None writes no files.
        steps: length of the run, for the bar.
        first: step that the run starts from; later rows of an older attempt are removed from the CSV.
        tensorboard: write event files too (needs the package tensorboard).
        progress: show the bar.
        waited: seconds that were waited for batches before this attempt.
        on_row: called with each row as a dict, once it is written.
    """

    def __init__(
        self,
        out: Path | None,
        *,
        steps: int,
        first: int,
        tensorboard: bool,
        progress: bool,
        waited: float = 0.0,
        on_row: Callable[[dict[str, float]], Any] | None = None,
    ) -> None:
        self.on_row = on_row
        self._last = time.perf_counter(), waited, first
        # A disabled bar would still take tqdm's lock, which forked processes share: one that is killed keeps it.
        self.bar = tqdm(total=steps, initial=first, unit="step", dynamic_ncols=True) if progress else None
        self.path = None if out is None else out / "metrics.csv"
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            rows = []
            if self.path.exists() and first:
                with open(self.path, newline="") as file:
                    rows = [row for row in csv.DictReader(file) if (row["step"] or "").isdigit() and None not in row]
            kept = [row for row in rows if int(row["step"]) <= first]
            text = [",".join(COLUMNS)] + [",".join(str(row[name] or "") for name in COLUMNS) for row in kept]
            write_atomically(self.path, lambda file: file.write(("\n".join(text) + "\n").encode()))
        self.writer: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError("tensorboard=True needs the package tensorboard: pip install tensorboard") from error
            if out is None:
                raise ValueError("tensorboard=True writes files: give the run a folder, out")
            self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=first + 1)

    def step(self) -> None:
        """One step is done."""
        if self.bar is not None:
            self.bar.update()

    def row(self, step: int, waited: float, **figures: float) -> None:
        """Figures of one moment, under the names of `COLUMNS`; rates are those since the last row.

        Args:
            step: steps done.
            waited: seconds waited for batches, in all.
            figures: epoch, loss, lr, grad_norm.
        """
        now = time.perf_counter(), waited, step
        seconds = max(now[0] - self._last[0], 1e-9)
        figures |= {
            "step": step,
            "steps_per_second": (step - self._last[2]) / seconds,
            "wait_share": (waited - self._last[1]) / seconds,
            "seconds": seconds,
        }
        self._last = now
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{figures['loss']:.4g}", wait=f"{figures['wait_share']:.0%}")
        if self.path is not None:
            with open(self.path, "a", newline="") as file:
                csv.writer(file).writerow([_short(figures.get(name)) for name in COLUMNS])
        if self.writer is not None:
            for name, value in figures.items():
                if name != "step":
                    self.writer.add_scalar(name, value, int(figures["step"]))
        if self.on_row is not None:
            self.on_row({name: figures[name] for name in COLUMNS if name in figures})

    def close(self) -> None:
        """End the bar and flush the files."""
        if self.bar is not None:
            self.bar.close()
        if self.writer is not None:
            self.writer.close()


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
