"""The command ``evaluate``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flows import build, evaluation
from flows.commands.common import parse
from mbot import checks


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure a trained run with few and many steps; prints a table and writes evaluation.json and evaluation.md."""

    run: Path
    """Folder of the run."""
    checkpoint: Path | None = None
    """A certain checkpoint; by default the newest."""
    num: int = 1000
    """Samples a row of the table."""
    guidance: float = 1.0
    """Guidance scale; 1 for none."""
    seed: int = 0
    """Of noise and classifier."""
    device: str = "auto"
    """auto: a GPU where there is one."""


def evaluate(arguments: list[str]) -> None:
    """The command ``evaluate``."""
    config: EvaluateConfig = parse(EvaluateConfig, arguments, "evaluate")
    checks.count(config.num, "--num")
    trained, task, model = build.load_run(config.run, config.checkpoint, build.device_of(config.device))
    build.check_guidance(config.guidance, trained, task)
    result = evaluation.evaluate(
        model, task, num=config.num, seed=config.seed, guidance=config.guidance, progress=True,
        one_step=trained.objective == "distillation",
    )  # fmt: skip
    print(evaluation.as_table(result))
    evaluation.write(result, config.run)
