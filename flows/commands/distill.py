"""The command ``distill``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flows import build, checkpoint
from flows.commands.common import check_unused, parse, run_training
from flows.commands.reflow import StudentConfig, check_number, student_of, student_run, teacher_of
from flows.config import TrainConfig
from flows.distillation import Distillation
from flows.pairs import PairedDataset, fingerprint
from flows.settings import ConfigError
from flows.task import Task


@dataclass(frozen=True, kw_only=True)
class DistillConfig(StudentConfig):
    """Train a student that samples in one step: by regression on pairs, and along the teacher's field (SlimFlow).

    Writes a run into --out, as train does; sample and evaluate take its one step. The teacher is best a reflowed run,
    whose paths are straight. Exit codes are those of train.
    """

    pairs: Path
    """Folder of pairs that the teacher made or, if it is a reflowed run, was trained on: the folder pairs in a run of
    reflow."""
    student: Path | None = None
    """Run whose weights and size the student starts with; by default the teacher's."""
    regression: float = 1.0
    """Weight of the regression on pairs; 0 for none."""
    guided: float = 1.0
    """Weight of the guided term, which takes one call of the teacher a sample; 0 for none."""


def distill(arguments: list[str]) -> None:
    """The command ``distill``."""
    config: DistillConfig = parse(DistillConfig, arguments, "distill")
    with teacher_of(config) as (teacher, device, first):
        task, field, base, start = teacher.task, teacher.field, teacher.config, teacher.model
        pairs = PairedDataset.load(config.pairs)
        _check_pairs(config, task, field, pairs)
        _check_flow("--run", config.run, base)
        if config.student is not None:
            base, own, start = build.load_run(config.student, None, device)
            _check_flow("--student", config.student, base)
            if own.shape != task.shape:
                raise ConfigError(f"samples of --student {config.student} have shape {own.shape}, not {task.shape}")
            if (own.num_classes, own.condition_dim) != (task.num_classes, task.condition_dim):
                raise ConfigError(f"--student {config.student} takes other conditions than the model of {config.run}")
        # Without its condition a start point has no single end, so conditions are not dropped.
        changes: dict[str, Any] = {
            "objective": "distillation",
            "condition_dropout": 0.0,
            "times": "auto",
            "settings": (),
        }
        run = replace(student_run(config, base), **changes)
        check_number(len(pairs), run)
        student = student_of(config, run, base, task, start)
        objective = Distillation(
            teacher=field, regression=config.regression, guided=config.guided,
            fresh_noise=pairs.info["start"] == "noise",
        )  # fmt: skip
        check_unused(run)
        run_training(
            run,
            task,
            lambda show: build.build_trainer(run, task, device, show, model=student, pairs=pairs, objective=objective),
            first,
        )


def _check_flow(flag: str, run: Path, trained: TrainConfig) -> None:
    if trained.objective != "flow-matching":
        raise ConfigError(f"{flag} {run} must be a run of flow-matching; it is one of {trained.objective}")


def _check_pairs(config: DistillConfig, task: Task, teacher: Any, pairs: PairedDataset) -> None:
    """Refuse pairs of other samples, or of a model that the teacher is not."""
    if pairs.shape != task.shape:
        raise ConfigError(
            f"pairs in {config.pairs} have samples of shape {pairs.shape}, those of {config.run} {task.shape}"
        )
    conditional = bool(task.num_classes or task.condition_dim)
    if (pairs.y is not None) != conditional:
        has = ("no", "some")[pairs.y is not None]
        raise ConfigError(
            f"the model of {config.run} takes {'' if conditional else 'no '}conditions; the pairs have {has}"
        )
    if pairs.teacher == fingerprint(teacher):
        return
    found = config.checkpoint or checkpoint.latest(config.run / "checkpoints")
    trained_on = None if found is None else checkpoint.load(found)["loader"]["settings"].get("pairs")
    if config.guidance != 1 or trained_on != pairs.identity:
        raise ConfigError(
            f"the pairs in {config.pairs} were made by another model ({pairs.teacher}) than that of {config.run} at "
            f"guidance {config.guidance:g} ({fingerprint(teacher)}), which was not trained on them either"
        )
