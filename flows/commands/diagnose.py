"""The command ``diagnose``."""

from __future__ import annotations

import torch

from flows import build
from flows import diagnose as examine
from flows.commands.common import parse
from flows.config import DiagnoseConfig
from mbot import checks


def diagnose(arguments: list[str]) -> None:
    """The command ``diagnose``."""
    config: DiagnoseConfig = parse(DiagnoseConfig, arguments, "diagnose")
    checks.count(config.num, "--num")
    task = build.load_task(config)
    generator = torch.Generator().manual_seed(config.seed)
    x1, y = task.draw(config.num, generator)
    x0, y0 = torch.randn(x1.shape, generator=generator), None
    if task.source is not None:
        x0, y0 = task.source.draw(config.num, generator)
    coupling = build.fitted(build.build_coupling(config, task), (x1, y), generator, task)
    print(examine(coupling, x0, x1, y, y0=y0, generator=generator))
