"""The command ``export``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flows.commands.common import parse
from flows.export import export as write
from flows.settings import ConfigError


@dataclass(frozen=True)
class ExportConfig:
    """Write the model of a trained run as a safetensors file, with its settings as metadata."""

    run: Path
    """Folder of the run."""
    out: Path
    """File to write: model.safetensors."""
    checkpoint: Path | None = None
    """A certain checkpoint; by default the newest."""


def export(arguments: list[str]) -> None:
    """The command ``export``."""
    config: ExportConfig = parse(ExportConfig, arguments, "export")
    try:
        print(f"written: {write(config.run, config.out, config.checkpoint)}")
    except ImportError as error:
        raise ConfigError(str(error)) from error
