"""What the sections of the GPU benchmarks share: times, memory, rows kept as they come, the ceilings of the card."""

from __future__ import annotations

import math
import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

Row = dict[str, Any]
Tables = dict[str, list[Row]]


class Bench:
    """The device, the deadline, and how times and memory are taken.

    Args:
        device: ``cuda`` or ``cpu``.
        quick: tiny sizes.
        save: given all tables after each row.
        budget: seconds after which no further row is begun.
    """

    def __init__(
        self, device: str, quick: bool, save: Callable[[Tables], Any] = lambda tables: None, budget: float = math.inf
    ) -> None:
        self.device, self.quick, self.began = torch.device(device), quick, time.perf_counter()
        self.cuda = self.device.type == "cuda"
        self.tables: Tables = {}
        self._save, self._budget = save, budget
        self._ceilings: dict[str, float] | None = None

    def sync(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], Any], most: float = 3.0) -> float:
        """Median of up to 7 runs in about ``most`` seconds, at least one, after one to compile that does not count."""
        call()
        found: list[float] = []
        while len(found) < 7 and sum(found) < most:
            self.sync()
            start = time.perf_counter()
            call()
            self.sync()
            found.append(time.perf_counter() - start)
        return statistics.median(found)

    def megabytes(self, call: Callable[[], Any]) -> float | str:
        """Peak memory of the device in a call, beyond what it held before."""
        if not self.cuda:
            return "-"
        self.sync()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        self.sync()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def row(self, table: str, facts: Row, measure: Callable[[Row], None]) -> None:
        """One row, which ``measure`` fills; a failure adds its text, and nothing is begun after the deadline."""
        row = dict(facts)
        self.tables.setdefault(table, []).append(row)
        if time.perf_counter() - self.began > self._budget:
            row["note"] = "skipped: out of time"
        else:
            try:
                measure(row)
            except Exception as error:
                traceback.print_exc()
                if self.cuda:
                    torch.cuda.empty_cache()
                row["note"] = f"failed: {type(error).__name__}: {str(error)[:200]}"
        self._save({heading: uniform(rows) for heading, rows in self.tables.items()})

    @property
    def ceilings(self) -> dict[str, float]:
        """What this card can do in a second: bytes copied, float32 operations in products, base-2 exponentials."""
        if self._ceilings is None:
            self._ceilings = _ceilings(self)
        return self._ceilings

    def floor(self, *, moved: float = 0.0, operations: float = 0.0, exponentials: float = 0.0) -> float | str:
        """Seconds below which no code gets that moves so many bytes and computes so much, on a card."""
        if not self.cuda:
            return "-"
        known = self.ceilings
        return max(
            moved / known["bytes/s"], operations / known["float32 operations/s"],
            exponentials / known["exponentials/s"],
        )  # fmt: skip


def _ceilings(bench: Bench) -> dict[str, float]:
    """Bandwidth and products are measured. Of exponentials a multiprocessor makes 16 a clock (sm_80 to sm_120)."""
    block = torch.empty(1 << (20 if bench.quick else 30), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(block)
    copied = 2 * len(block) / bench.seconds(lambda: target.copy_(block), 0.5)
    size = 256 if bench.quick else 8192
    a, b = torch.randn(2, size, size, device=bench.device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        multiplied = 2 * size**3 / bench.seconds(lambda: a @ b, 0.5)
    finally:
        torch.set_float32_matmul_precision(before)
    found = {"bytes/s": copied, "float32 operations/s": multiplied}
    if bench.cuda:
        card = torch.cuda.get_device_properties(bench.device)
        # In kHz; versions of torch without it get the boost clock of Hopper's cards.
        found["exponentials/s"] = 16 * card.multi_processor_count * 1e3 * getattr(card, "clock_rate", 1_980_000)
    return found


def against(row: Row, seconds: float, floor: float | str) -> None:
    """Enter a floor, and how many times longer the measured time is."""
    row["floor, s"] = floor
    row["time / floor"] = seconds / floor if isinstance(floor, float) and floor else "-"


def clouds(shape: tuple[int, ...], d: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(math.prod(shape) + d)
    x, y = (torch.randn(*shape, d, generator=g) for _ in range(2))
    return x.to(device), (y + 1).to(device)


def busy(bench: Bench, call: Callable[[], Any]) -> float | str:
    """Summed kernel time over wall time, from torch's profiler."""
    if not bench.cuda:
        return "-"
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    call()
    bench.sync()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        start = time.perf_counter()
        for _ in range(5):
            call()
        bench.sync()
        wall = time.perf_counter() - start
    device = sum(
        event.self_device_time_total for event in record.key_averages() if event.device_type == DeviceType.CUDA
    )
    return device * 1e-6 / wall if device else "-"  # a machine without CUPTI records nothing


def uniform(table: list[Row]) -> list[Row]:
    """Every row with every column, as tables are written."""
    columns = list(dict.fromkeys(column for row in table for column in row))
    return [{column: row.get(column, "") for column in columns} for row in table]
