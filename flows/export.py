"""Trained weights as one safetensors file: the averaged model's, with what it takes to build that model again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flows.checkpoint import write_atomically
from mbot import __version__

_MARK = "flows-model"


def export(run: str | Path, out: str | Path, checkpoint: str | Path | None = None) -> Path:
    """Write the model of a run of the command line as a safetensors file.

    The names are those of the plain model's ``state_dict``; weights are averaged where the run averages. The metadata
    hold the settings of the run (no paths), the shape of a sample and the number of classes or condition features.

    Args:
        run: folder of the run.
        out: file to write.
        checkpoint: a certain checkpoint; None for the newest.

    Returns:
        The file written.

    Raises:
        ImportError: without the package safetensors.
        ValueError: no run there.
        CheckpointError: the checkpoint cannot be read.
    """
    save = _safetensors().torch.save
    from flows import build
    from flows.settings import plain

    config, task, model = build.load_run(
        Path(run), None if checkpoint is None else Path(checkpoint), torch.device("cpu")
    )
    settings = {k: v for k, v in plain(config).items() if not isinstance(getattr(config, k), Path)}
    facts = {"shape": list(task.shape), "num_classes": task.num_classes, "condition_dim": task.condition_dim}
    metadata = {"format": "pt", "kind": _MARK, "library": __version__, "config": json.dumps(settings),
                "model": json.dumps(facts)}  # fmt: skip
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, lambda file: file.write(save(weights, metadata)))
    return out


def load_model(path: str | Path) -> nn.Module:
    """The model of a file that ``python -m flows export`` wrote, on the CPU, in eval mode; no data set is needed.

    Raises:
        ImportError: without the package safetensors.
        FileNotFoundError: no such file.
        ValueError: no safetensors file, or one of another library.
    """
    safetensors = _safetensors()
    from flows import build
    from flows.config import TrainConfig
    from flows.settings import typed

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is truncated, damaged or no safetensors file ({error})") from error
    if about.get("kind") != _MARK:
        raise ValueError(
            f"{path} was not written by `python -m flows export`: load its tensors with safetensors.torch.load_file"
        )
    facts = json.loads(about["model"])
    config = TrainConfig(**typed(TrainConfig, json.loads(about["config"]), str(path)))
    facts["shape"] = tuple(facts["shape"])
    nothing: Any = None
    model = build.build_model(config, build.Task(nothing, **facts))
    model.load_state_dict(weights)
    return model.eval()


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("model files need the package safetensors: pip install safetensors") from error
    return safetensors
