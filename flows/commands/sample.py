"""The command ``sample``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flows import build
from flows.commands.common import parse, picture
from flows.config import ONE_STEP, Method
from flows.settings import ConfigError
from mbot import checks


@dataclass(frozen=True)
class SampleConfig:
    """Draw samples from a trained run: a picture, and an .npz file with samples, conditions and noise."""

    run: Path
    """Folder of the run."""
    checkpoint: Path | None = None
    """A certain checkpoint; by default the newest."""
    num: int = 100
    """How many."""
    label: int | None = None
    """Class of all samples; by default all classes in turn."""
    guidance: float = 1.0
    """Guidance scale; 1 for none, negative leads away from the class."""
    method: Method | None = None
    """Solver; by default dopri5, or in runs of mean-flow the steps of the average velocity."""
    steps: int | None = None
    """Steps of a fixed-step solver, or of the average velocity (by default one)."""
    tolerance: float = 1e-4
    """Of dopri5, relative and absolute."""
    seed: int = 0
    """Of the noise."""
    device: str = "auto"
    """auto: a GPU where there is one."""
    out: Path | None = None
    """Prefix of the files written; by default samples/sample in the run's folder."""


def sample(arguments: list[str]) -> None:
    """The command ``sample``."""
    config: SampleConfig = parse(SampleConfig, arguments, "sample")
    checks.count(config.num, "--num")
    trained, task, model = build.load_run(config.run, config.checkpoint, build.device_of(config.device))
    build.check_guidance(config.guidance, trained, task)
    generator = torch.Generator().manual_seed(config.seed)
    y = task.conditions(config.num, generator)
    if config.label is not None:
        if not task.num_classes:
            raise ConfigError(f"--label {config.label}: the run in {config.run} has no classes")
        if not 0 <= config.label < task.num_classes:
            raise ConfigError(f"--label must lie in 0 … {task.num_classes - 1}; got {config.label}")
        y = torch.full((config.num,), config.label)
    solver: dict[str, Any] = {"method": config.method, "steps": config.steps}
    if trained.objective == "distillation":
        if config.method not in (None, ONE_STEP["method"]) or config.steps not in (None, 1):
            raise ConfigError(f"the run in {config.run} is sampled in one Euler step: leave --method and --steps out")
        solver = ONE_STEP
    x, x0, nfe = build.generate(
        model, task, y, config.num, generator, guidance=config.guidance, rtol=config.tolerance, atol=config.tolerance,
        **solver,
    )  # fmt: skip
    out = config.out or config.run / "samples" / "sample"
    out.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {"x": x.numpy(), "x0": x0.numpy()} | ({} if y is None else {"y": y.numpy()})
    out = out.with_suffix("") if out.suffix in (".npz", ".png") else out
    file = out.with_name(f"{out.name}.npz")
    np.savez(file, **arrays)
    shown = picture(x, task, out)
    print(f"{config.num} samples at {nfe:.0f} NFE: {file}" + (f", {shown}" if shown else ""))
