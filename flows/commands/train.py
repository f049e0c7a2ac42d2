"""The command ``train``."""

from __future__ import annotations

import contextlib

from flows import build
from flows.commands.common import first_alone, parse, processes, run_training
from flows.config import TrainConfig
from flows.task import fitting_batches, load_task


def train(arguments: list[str]) -> None:
    """The command ``train``."""
    config: TrainConfig = parse(TrainConfig, arguments, "train")
    with processes(config.device, config.timeout) as first:
        device = build.device_of(config.device)
        with first_alone(first) if config.download else contextlib.nullcontext():
            task = load_task(config)
        build.check_guidance(config.guidance, config, task)
        config, smaller = fitting_batches(config, task)
        if smaller and first:
            print(smaller)
        run_training(config, task, lambda preview: build.build_trainer(config, task, device, preview), first)
