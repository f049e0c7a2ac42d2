"""The command ``train``."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flows import build, checkpoint, evaluation
from flows.checkpoint import write_atomically
from flows.commands.common import parse, picture
from flows.config import TrainConfig, same_run
from flows.settings import ConfigError, to_toml


def train(arguments: list[str]) -> None:
    """The command ``train``."""
    config: TrainConfig = parse(TrainConfig, arguments, "train")

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
        config, smaller = build.fitting_batches(config, task)
        if smaller and first:
            print(smaller)

        def preview(model: Any, step: int) -> None:
            generator = torch.Generator().manual_seed(config.seed)
            y = task.conditions(100, generator)
            x, _, _ = build.generate(model, task, y, 100, generator, guidance=config.guidance)
            picture(x, task, config.out / "samples" / f"step-{step:08d}")

        trainer = build.build_trainer(config, task, device, preview)
        with trainer.lock:
            if not (config.resume or config.resume_from) and checkpoint.latest(config.out / "checkpoints"):
                raise ConfigError(
                    f"{config.out} holds a run already: --resume continues it, --out names another folder"
                )
            resume = config.resume_from or (checkpoint.latest(config.out / "checkpoints") if config.resume else None)
            if resume is not None:
                same_run(trainer.load(resume), config)
            if first:  # only now: settings that were refused must not replace those of the run
                config.out.mkdir(parents=True, exist_ok=True)
                resolved = to_toml(config).encode()
                write_atomically(config.out / "config.toml", lambda file: file.write(resolved))
            trainer.fit()
            if first and config.evaluate:
                model = trainer.sampling_model.eval()
                result = evaluation.evaluate(
                    model,
                    task,
                    num=config.evaluate,
                    seed=config.seed,
                    guidance=config.guidance,
                    progress=config.progress,
                )
                evaluation.write(result, config.out)
                print(evaluation.as_table(result))
            if first:
                print(f"written: {config.out} ({', '.join(_written(config.out))})")
    finally:
        if several:
            dist.destroy_process_group()


def _written(out: Path) -> list[str]:
    """What lies in the folder of a run, without hidden files."""
    return sorted(path.name for path in out.iterdir() if path.name[0] != ".")
