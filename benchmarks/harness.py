"""What the benchmarks share: interleaved medians, and result files as JSON and Markdown."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
_PACKAGES = (
    "torch",
    "numpy",
    "scipy",
    "POT",
    "geomloss",
    "lapx",
    "numba",
    "torchcfm",
    "triton",
    "flash-sinkhorn",
    "pykeops",
    "torch-linear-assignment",
)


SLOW = 10.0  # a candidate that takes more seconds than this is run twice in all, not repeats + warmup times


def medians(
    candidates: Mapping[str, Callable[[], Any]],
    repeats: int = 5,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each candidate; their runs alternate, so that a busy spell of the machine hits all alike.

    ``clock=time.process_time`` counts the processor's seconds instead of the wall's: for work on one thread the same,
    and undisturbed by other processes.
    """
    slow = set()
    for name, candidate in candidates.items():
        for _ in range(warmup):
            start = clock()
            candidate()
            if clock() - start > SLOW:
                slow.add(name)
                break
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats):
        for name, candidate in candidates.items():
            if turn == 0 or name not in slow:
                start = clock()
                candidate()
                seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def machine() -> dict[str, Any]:
    """Where and with what the figures were taken."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write(name: str, title: str, tables: Mapping[str, Sequence[Mapping[str, Any]]], notes: str) -> None:
    """Write ``results/NAME.json`` and ``results/NAME.md`` and print the latter.

    Args:
        name: of the files.
        title: first line.
        tables: heading -> rows; a row maps column titles to cells (floats are seconds or ratios, kept in full in JSON).
        notes: what was compared, in Markdown.
    """
    facts = machine()
    where = (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['torch_threads']} torch threads, "
        + ", ".join(f"{key} {value}" for key, value in facts["versions"].items())
        + f"; {facts['date']}"
    )
    lines = [f"# {title}", "", notes.strip(), "", f"`python benchmarks/{Path(sys.argv[0]).name}`: {where}."]
    for heading, rows in tables.items():
        columns = list(rows[0])
        lines += ["", f"## {heading}", "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        lines += ["| " + " | ".join(_cell(row[column]) for column in columns) + " |" for row in rows]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": facts, "tables": tables}, indent=1) + "\n")
    print("\n".join(lines))


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
