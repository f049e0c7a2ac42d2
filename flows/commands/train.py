"""The command ``train``."""

from __future__ import annotations

from flows import build
from flows.commands.common import parse, processes, run_training, wait_for_all
from flows.config import TrainConfig
from flows.task import fitting_batches, load_task


def train(arguments: list[str]) -> None:
    """The command ``train``."""
    config: TrainConfig = parse(TrainConfig, arguments, "train")
    with processes(config.device, config.timeout) as first:
        device = build.device_of(config.device)
        if config.download and not first:
            wait_for_all()  # one process downloads
        task = load_task(config)
        if config.download and first:
            wait_for_all()
        build.check_guidance(config.guidance, config, task)
        config, smaller = fitting_batches(config, task)
        if smaller and first:
            print(smaller)
        run_training(config, task, lambda preview: build.build_trainer(config, task, device, preview), first)
