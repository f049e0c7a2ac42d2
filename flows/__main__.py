"""Command line: ``python -m flows train|sample|evaluate|diagnose``."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from flows import config as settings
from flows.config import ConfigError, DiagnoseConfig, EvaluateConfig, SampleConfig, TrainConfig
from flows.interrupt import Interrupted, NonFiniteLoss

USAGE = """usage: python -m flows COMMAND [options]

  train      train a flow on a data set; ends with samples and a table of metrics
  sample     draw samples from a trained run
  evaluate   measure a trained run with few and many steps
  diagnose   what a coupling does to a data set, before training

python -m flows COMMAND --help lists the options of a command.
A first run:  python -m flows train --data digits --out runs/digits
Several processes:  torchrun --nproc-per-node N -m flows train ..."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {"train": train, "sample": sample, "evaluate": evaluate, "diagnose": diagnose}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] not in commands:
        print(f"unknown command {arguments[0]!r}\n\n{USAGE}", file=sys.stderr)
        return 2
    from flows.checkpoint import CheckpointError
    from flows.integrate import IntegrationError
    from flows.loader import WorkerDied

    try:
        commands[arguments[0]](arguments[1:])
    except Interrupted as stop:
        print(f"{stop}; run the same command with --resume to go on", file=sys.stderr)
        return int(stop.code or 0)
    except CheckpointError as error:
        flag = "--resume-from" if arguments[0] == "train" else "--checkpoint"
        hint = f"\n  {flag} {error.previous}" if error.previous else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        return 3
    except WorkerDied as error:
        print(f"error: {error} (--resume)", file=sys.stderr)
        return 3
    except (NonFiniteLoss, IntegrationError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 4
    except (ConfigError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 3
    return 0


def parse(kind: Any, arguments: list[str], command: str) -> Any:
    """Flags over a file over a preset over the defaults."""
    import tyro

    values: dict[str, Any] = {}
    if kind is TrainConfig:
        file = _value_of(arguments, "--config")
        stored = {} if file is None else settings.typed(kind, settings.read_file(Path(file)), file)
        preset = _value_of(arguments, "--preset") or stored.get("preset", "none")
        values = settings.typed(kind, settings.PRESETS.get(preset, {}), f"preset {preset}") | stored
    given: dict[str, Any] = {"default": kind(**values)} if kind in (TrainConfig, DiagnoseConfig) else {}
    return settings.check(tyro.cli(kind, prog=f"python -m flows {command}", args=arguments, **given))


def train(arguments: list[str]) -> None:
    """The command ``train``."""
    config: TrainConfig = parse(TrainConfig, arguments, "train")
    from flows import build, checkpoint, evaluation
    from flows.checkpoint import write_atomically
    from flows.datasets import save_grid

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several:
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() and config.device != "cpu" else "gloo",
            timeout=timedelta(seconds=config.timeout),
        )
    try:
        device = build.device_of(config.device)
        first = not several or dist.get_rank() == 0
        if several and config.download and not first:
            dist.barrier()  # one process downloads
        task = build.load_task(config)
        if several and config.download and first:
            dist.barrier()
        build.check_guidance(config.guidance, config, task)

        def preview(model: Any, step: int) -> None:
            generator = torch.Generator().manual_seed(config.seed)
            y = task.conditions(100, generator)
            x, _, _ = build.generate(model, task, y, 100, generator, guidance=config.guidance)
            _picture(x, task, config.out / "samples" / f"step-{step:08d}", save_grid)

        trainer = build.build_trainer(config, task, device, preview)
        with trainer.lock:
            if not (config.resume or config.resume_from) and checkpoint.latest(config.out / "checkpoints"):
                raise ConfigError(
                    f"{config.out} holds a run already: --resume continues it, --out names another folder"
                )
            resume = config.resume_from or (checkpoint.latest(config.out / "checkpoints") if config.resume else None)
            if resume is not None:
                settings.same_run(trainer.load(resume), config)
            if first:  # only now: settings that were refused must not replace those of the run
                config.out.mkdir(parents=True, exist_ok=True)
                resolved = settings.to_toml(config).encode()
                write_atomically(config.out / "config.toml", lambda file: file.write(resolved))
            trainer.fit()
            if first and config.evaluate:
                model = trainer.sampling_model.eval()
                result = evaluation.evaluate(
                    model, task, num=config.evaluate, seed=config.seed, guidance=config.guidance
                )
                evaluation.write(result, config.out)
                print(evaluation.as_table(result))
            if first:
                print(f"written: {config.out} (checkpoints, metrics.csv, samples, evaluation.md)")
    finally:
        if several:
            dist.destroy_process_group()


def sample(arguments: list[str]) -> None:
    """The command ``sample``."""
    config: SampleConfig = parse(SampleConfig, arguments, "sample")
    from flows import build
    from flows.datasets import save_grid

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
    x, x0, nfe = build.generate(
        model, task, y, config.num, generator, guidance=config.guidance, method=config.method, steps=config.steps,
        rtol=config.tolerance, atol=config.tolerance,
    )  # fmt: skip
    out = config.out or config.run / "samples" / "sample"
    out.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {"x": x.numpy(), "x0": x0.numpy()} | ({} if y is None else {"y": y.numpy()})
    np.savez(out.with_suffix(".npz"), **arrays)
    picture = _picture(x, task, out, save_grid)
    print(f"{config.num} samples at {nfe:.0f} NFE: {out.with_suffix('.npz')}" + (f", {picture}" if picture else ""))


def evaluate(arguments: list[str]) -> None:
    """The command ``evaluate``."""
    config: EvaluateConfig = parse(EvaluateConfig, arguments, "evaluate")
    from flows import build, evaluation

    trained, task, model = build.load_run(config.run, config.checkpoint, build.device_of(config.device))
    build.check_guidance(config.guidance, trained, task)
    result = evaluation.evaluate(model, task, num=config.num, seed=config.seed, guidance=config.guidance)
    evaluation.write(result, config.run)
    print(evaluation.as_table(result))


def diagnose(arguments: list[str]) -> None:
    """The command ``diagnose``."""
    config: DiagnoseConfig = parse(DiagnoseConfig, arguments, "diagnose")
    from flows import build
    from flows import diagnose as examine

    task = build.load_task(config)
    generator = torch.Generator().manual_seed(config.seed)
    x1, y = task.draw(config.num, generator)
    x0, y0 = torch.randn(x1.shape, generator=generator), None
    if task.source is not None:
        x0, y0 = task.source.draw(config.num, generator)
    coupling = build.fitted(build.build_coupling(config, task), (x1, y), generator, task)
    print(examine(coupling, x0, x1, y, y0=y0, generator=generator))


def _value_of(arguments: list[str], flag: str) -> str | None:
    """The value of a flag that decides the defaults of others."""
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(f"{flag}="):
            return argument.split("=", 1)[1]
    return None


def _picture(x: torch.Tensor, task: Any, stem: Path, save_grid: Any) -> Path | None:
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


if __name__ == "__main__":
    sys.exit(main())
