"""Parts of several commands: settings, the processes of ``torchrun``, training, a picture of samples."""

from __future__ import annotations

import gc
import importlib
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from flows import build, checkpoint, evaluation, settings
from flows.checkpoint import CheckpointError, write_atomically
from flows.config import ONE_STEP, PRESETS, DiagnoseConfig, TrainConfig, same_run
from flows.datasets import save_grid
from flows.settings import ConfigError
from flows.task import Task
from flows.trainer import Trainer
from mbot import checks


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


@contextmanager
def processes(device: str, timeout: float) -> Iterator[bool]:
    """Join the processes of ``torchrun``, where it started this one; yields whether this is the first.

    Afterwards no thread of the group is left: gloo's may still hold tensors, and one that asks for the interpreter lock
    to drop them while the interpreter ends aborts the process. They end with the last reference to the group, which
    wrapped models have (they are in cycles, and in the frames that an error has passed through), and functions that
    torch defines while there is a group.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        yield True
        return
    importlib.import_module("torch.distributed.nn.functional")  # wrapping a model would; the group is a default there
    backend = "nccl" if torch.cuda.is_available() and device != "cpu" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield dist.get_rank() == 0
    except BaseException as error:
        _clear_frames(error)
        raise
    finally:
        gc.collect()
        dist.destroy_process_group()


def _clear_frames(error: BaseException | None) -> None:
    """Forget the local variables where an error, and those behind it, came from."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def wait_for_all() -> None:
    """Go on when all processes have come here."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def run_training(config: TrainConfig, task: Task, make: Callable[[Any], Trainer], first: bool) -> None:
    """Train a run from its start or its last checkpoint, then measure it.

    Args:
        config: its settings, which are written to its folder.
        task: its data.
        make: the trainer, given its preview.
        first: whether this process writes.
    """
    one_step = config.objective == "distillation"
    if checks.count(config.evaluate, "--evaluate", at_least=0):
        evaluation.check_size(task)

    def preview(model: nn.Module, step: int) -> None:
        generator = torch.Generator().manual_seed(config.seed)
        y = task.conditions(100, generator)
        solver = ONE_STEP if one_step else {}
        x, _, _ = build.generate(model, task, y, 100, generator, guidance=config.guidance, **solver)
        picture(x, task, config.out / "samples" / f"step-{step:08d}")

    trainer = make(preview)
    with trainer.lock, _hints("--resume-from"):
        check_unused(config)
        resume = config.resume_from or (checkpoint.latest(config.out / "checkpoints") if config.resume else None)
        if resume is not None:
            same_run(trainer.load(resume), config)
        if first:  # only now: settings that were refused must not replace those of the run
            config.out.mkdir(parents=True, exist_ok=True)
            resolved = settings.to_toml(config).encode()
            write_atomically(config.out / "config.toml", lambda file: file.write(resolved))
        trainer.fit()
        if first and config.evaluate:
            model = trainer.sampling_model.eval()
            result = evaluation.evaluate(
                model, task, num=config.evaluate, seed=config.seed, guidance=config.guidance, progress=config.progress,
                one_step=one_step,
            )  # fmt: skip
            print(evaluation.as_table(result))
            evaluation.write(result, config.out)
        if first:
            written = sorted(path.name for path in config.out.iterdir() if path.name[0] != ".")
            print(f"written: {config.out} ({', '.join(written)})")


@contextmanager
def _hints(flag: str) -> Iterator[None]:
    """Checkpoint errors say which flag takes an older checkpoint."""
    try:
        yield
    except CheckpointError as error:
        error.flag = flag
        raise


def check_unused(config: TrainConfig) -> None:
    """Refuse to begin a run in the folder of another one."""
    if not (config.resume or config.resume_from) and checkpoint.latest(config.out / "checkpoints"):
        raise ConfigError(f"{config.out} holds a run already: --resume continues it, --out names another folder")


def picture(x: torch.Tensor, task: Task, stem: Path) -> Path | None:
    """Images as a grid, points in the plane as a scatter plot (where matplotlib is installed)."""
    path = stem.with_name(f"{stem.name}.png")
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
