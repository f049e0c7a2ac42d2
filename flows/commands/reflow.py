"""The command ``reflow``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from flows import build
from flows.commands.common import check_unused, parse, processes, run_training, wait_for_all
from flows.config import Method, Model, TrainConfig
from flows.guidance import GuidedModel
from flows.pairs import PairedDataset, generate_pairs
from flows.reflow import AnnealingReflow
from flows.seeds import derive_seed, generator_at
from flows.settings import ConfigError
from flows.task import Task
from mbot import checks


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """Settings of the commands that train on pairs: the student, and what differs from the teacher's training."""

    run: Path
    """Folder of the teacher's run."""
    out: Path
    """Folder of the new run."""
    checkpoint: Path | None = None
    """A certain checkpoint of the teacher; by default the newest."""
    guidance: float = 1.0
    """Guidance scale of the teacher; 1 for none."""
    from_scratch: bool = False
    """Start from fresh weights, not from the teacher's. A student of another size does so anyway."""
    model: Model | None = None
    """Student; by default the teacher's model."""
    mlp_width: int | None = None
    """Hidden features of the MLP; by default the teacher's."""
    mlp_depth: int | None = None
    """Residual blocks of the MLP; by default the teacher's."""
    steps: int | None = None
    """Optimiser steps; this and what follows is by default as the teacher was trained."""
    batch_size: int | None = None
    """Pairs a training step (and process)."""
    lr: float | None = None
    """Peak learning rate."""
    ema: float | None = None
    """Decay of the averaged weights."""
    num_workers: int | None = None
    """Worker processes that load pairs; 0: a background thread."""
    checkpoint_every: int | None = None
    """Steps between checkpoints."""
    log_every: int | None = None
    """Steps between rows of metrics.csv."""
    timeout: float = 1800.0
    """Under torchrun: seconds that a process waits for the others, also while the first makes pairs."""
    seed: int = 0
    """Of everything."""
    device: str = "auto"
    """auto: a GPU where there is one."""
    evaluate: int = 1000
    """Samples that the table at the end is measured on; 0 for no table."""
    progress: bool = True
    """Show progress bars."""
    resume: bool = False
    """Go on from the newest checkpoint in --out (or from the start where there is none)."""
    resume_from: Path | None = None
    """Go on from this checkpoint."""


@dataclass(frozen=True, kw_only=True)
class ReflowConfig(StudentConfig):
    """Train again on pairs of a run: noise, and the samples that its model makes of it (rectified flow).

    Writes pairs into --out/pairs and a run into --out, as train does: sample, evaluate and reflow take it. Starts from
    the teacher's weights, or from scratch; then --warmup-steps anneals from independent noise to the pairs' (SlimFlow).
    What is stopped goes on with --resume, in the middle of the pairs too. Exit codes are those of train. Several
    processes: torchrun --nproc-per-node N -m -- flows reflow ... (without the --, torchrun takes --run for its own).
    """

    pairs: int = 20_000
    """How many."""
    method: Method = "dopri5"
    """Solver that makes them."""
    solver_steps: int | None = None
    """Steps of a fixed-step solver."""
    tolerance: float = 1e-4
    """Of dopri5, relative and absolute."""
    warmup_steps: int = 0
    """Batches over which noise anneals from independent of the sample to the pair's; 0 for none."""
    schedule: Literal["linear", "cosine", "exp"] = "linear"
    """How it anneals."""
    flip: bool = False
    """Mirror a random half of the pairs, noise and image alike."""


class Teacher(NamedTuple):
    """The run that a student learns from: its settings, data and model, and the field that the student follows."""

    config: TrainConfig
    task: Task
    model: nn.Module
    field: Any


@contextmanager
def teacher_of(config: StudentConfig) -> Iterator[tuple[Teacher, torch.device, bool]]:
    """Join the processes, and load the teacher; also its device, and whether this process is the first."""
    with processes(config.device, config.timeout) as first:
        device = build.device_of(config.device)
        trained, task, model = build.load_run(config.run, config.checkpoint, device)
        build.check_guidance(config.guidance, trained, task)
        field = model if config.guidance == 1 else GuidedModel(model, config.guidance)
        yield Teacher(trained, task, model, field), device, first


def reflow(arguments: list[str]) -> None:
    """The command ``reflow``."""
    config: ReflowConfig = parse(ReflowConfig, arguments, "reflow")
    with teacher_of(config) as (teacher, device, first):
        trained, task = teacher.config, teacher.task
        if trained.objective == "distillation":
            raise ConfigError(f"{config.run} is a student of one step, without a flow: reflow the teacher of it")
        run = student_run(config, trained)
        matched = task.source is not None and task.source.num_classes and task.num_classes
        if config.warmup_steps and matched:
            raise ConfigError(
                f"--warmup-steps {config.warmup_steps} starts from any point of {trained.source_data}; flows of "
                f"{config.run} start from those of a class"
            )
        model = student_of(config, run, trained, task, teacher.model)
        check_unused(run)
        checks.count(config.pairs, "--pairs")
        check_number(config.pairs, run)
        if first:
            make_pairs(config, task, teacher.field)
        wait_for_all()
        pairs = PairedDataset.load(config.out / "pairs")
        source = None if task.source is None else fresh_starts(task)
        annealing = AnnealingReflow(pairs, config.warmup_steps, config.schedule, source=source, flip=config.flip)
        served = annealing if config.warmup_steps or config.flip else pairs
        run_training(
            run, task, lambda show: build.build_trainer(run, task, device, show, model=model, pairs=served), first
        )


def fresh_starts(task: Task) -> Callable[[int, torch.Generator | None], torch.Tensor]:
    """Start points of flows from data, drawn on the CPU whatever the generator's device."""

    def source(n: int, generator: torch.Generator | None) -> torch.Tensor:
        device = None if generator is None else generator.device
        seed = torch.randint(2**62, (1,), generator=generator, device=device)
        return task.starts(n, None, torch.Generator().manual_seed(int(seed)))

    return source


def student_run(config: StudentConfig, trained: TrainConfig) -> TrainConfig:
    """The settings of the student's training: the teacher's, with what was given."""
    if config.out.resolve() == config.run.resolve():
        raise ConfigError(f"--out must be another folder than that of --run; got {config.out} twice")
    names = ("model", "mlp_width", "mlp_depth", "steps", "batch_size", "lr", "ema", "num_workers", "checkpoint_every",
             "log_every")  # fmt: skip
    given = {name: value for name in names if (value := getattr(config, name)) is not None}
    always = {
        name: getattr(config, name)
        for name in ("out", "timeout", "seed", "device", "evaluate", "progress", "resume", "resume_from")
    }
    settings = tuple(s for s in trained.settings if not s.startswith(("coupling.", "path.")))
    return replace(
        trained, **given, **always, coupling="fm", path="linear", sigma=None, settings=settings, config=None,
        preset="none", ot_batch_size=given.get("batch_size", trained.batch_size), guidance=1.0, flip=False,
        source_sampling="independent",
    )  # fmt: skip


def student_of(
    config: StudentConfig, run: TrainConfig, trained: TrainConfig, task: Task, teacher: nn.Module
) -> nn.Module:
    """The model that is trained: a copy of the teacher, or fresh weights."""
    student = build.build_model(run, task)
    size = (run.model, run.mlp_width, run.mlp_depth)
    if not config.from_scratch and size == (trained.model, trained.mlp_width, trained.mlp_depth):
        student.load_state_dict(teacher.state_dict())
    return student


def check_number(pairs: int, run: TrainConfig) -> None:
    """Refuse fewer pairs than a batch, before they are made."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if pairs < world * run.batch_size:
        each = f" in each of {world} processes" if world > 1 else ""
        raise ConfigError(f"{pairs} pairs are fewer than a batch of {run.batch_size}{each}: lower --batch-size")


def make_pairs(config: ReflowConfig, task: Task, field: Any) -> None:
    """Pairs of the teacher's field in the folder ``pairs`` of the run; those that are there already are kept."""
    generator = generator_at(config.seed, "pairs")
    y = task.conditions(config.pairs, generator)
    x0: torch.Tensor | None = None if task.source is None else task.starts(config.pairs, y, generator)
    generate_pairs(
        field, config.pairs, y=y, shape=task.shape, x0=x0, method=config.method, steps=config.solver_steps,
        rtol=config.tolerance, atol=config.tolerance, seed=derive_seed(config.seed, "pairs"), out=config.out / "pairs",
        progress=config.progress,
    )  # fmt: skip
