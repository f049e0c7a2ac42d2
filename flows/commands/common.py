"""What several commands do: read their settings, draw a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from flows import settings
from flows.build import Task
from flows.config import PRESETS, DiagnoseConfig, TrainConfig
from flows.datasets import save_grid


def parse(kind: Any, arguments: list[str], command: str) -> Any:
    """Flags over a file over a preset over the defaults."""
    import tyro

    values: dict[str, Any] = {}
    if kind is TrainConfig:
        file = _value_of(arguments, "--config")
        stored = {} if file is None else settings.typed(kind, settings.read_file(Path(file)), file)
        preset = _value_of(arguments, "--preset") or stored.get("preset", "none")
        values = settings.typed(kind, PRESETS.get(preset, {}), f"preset {preset}") | stored
    given: dict[str, Any] = {"default": kind(**values)} if kind in (TrainConfig, DiagnoseConfig) else {}
    return settings.check(tyro.cli(kind, prog=f"python -m flows {command}", args=arguments, **given))


def _value_of(arguments: list[str], flag: str) -> str | None:
    """The value of a flag that decides the defaults of others."""
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(f"{flag}="):
            return argument.split("=", 1)[1]
    return None


def picture(x: torch.Tensor, task: Task, stem: Path) -> Path | None:
    """Images as a grid, points in the plane as a scatter plot (where matplotlib is installed)."""
    path = stem.with_suffix(".png")
    if task.images and task.shape[0] in (1, 3):
        save_grid(x, path, scale=max(1, 32 // task.shape[-1]))
        return path
    if task.shape != (2,):
        return None
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure, ax = plt.subplots(figsize=(5, 5))
    ax.scatter(x[:, 0], x[:, 1], s=4)
    ax.set_aspect("equal")
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path
