"""The data set of a command-line run, with what a model and its samples need to know of it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import TensorDataset

from flows import datasets, registry
from flows.config import DiagnoseConfig, TrainConfig
from flows.items import all_conditions, read
from flows.seeds import generator_at
from flows.settings import ConfigError
from flows.sources import Pools


@dataclass(frozen=True, eq=False)
class Task:
    """A data set, and facts about it that a model is built from.

    Attributes:
        dataset: map-style.
        shape: of a sample.
        num_classes: of labels, or 0.
        condition_dim: of condition vectors, or 0.
        source: the data that flows start from; None for standard normal noise.
    """

    dataset: Any
    shape: tuple[int, ...]
    num_classes: int = 0
    condition_dim: int = 0
    source: Task | None = None

    @property
    def images(self) -> bool:
        """Whether samples are images."""
        return len(self.shape) == 3

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Samples and conditions drawn without replacement, as many as there are up to ``n``."""
        rows = torch.randperm(len(self.dataset), generator=generator)[:n]
        items = [self.dataset[int(row)] for row in rows]
        if not isinstance(items[0], (tuple, list)):
            return torch.stack(items), None
        x = torch.stack([item[0] for item in items])
        if len(items[0]) == 1 or not (self.num_classes or self.condition_dim):
            return x, None
        return x, torch.stack([torch.as_tensor(item[1]) for item in items])

    def conditions(self, n: int, generator: torch.Generator) -> Tensor | None:
        """Conditions to sample for: every class in turn, or vectors of the data."""
        if self.num_classes:
            return torch.arange(n) % self.num_classes
        if not self.condition_dim:
            return None
        rows = torch.randint(len(self.dataset), (n,), generator=generator)
        return torch.stack([self.dataset[int(row)][1] for row in rows])

    def starts(self, n: int, y: Tensor | None, generator: torch.Generator) -> Tensor:
        """Points that flows start from: noise, or source samples of the classes ``y`` where both sides have classes."""
        if self.source is None:
            return torch.randn(n, *self.shape, generator=generator)
        if y is not None and self.num_classes and self.source.num_classes:
            rows = Pools(all_conditions(self.source.dataset, 0), y).draw(torch.arange(n), generator)
        else:
            rows = torch.randint(len(self.source.dataset), (n,), generator=generator)
        return read(self.source.dataset, rows, int(rows.sum()))[0]


def load_task(config: TrainConfig | DiagnoseConfig) -> Task:
    """The data set of a configuration, with the one that flows start from.

    Raises:
        ConfigError: one needs --data-root or --source-root, or their samples differ in shape.
        FileNotFoundError, ValueError: the files are missing or damaged.
    """
    task = _load("data", config.data, config.data_root, config.conditional, config)
    if config.source_data is None:
        return task
    source = _load("source", config.source_data, config.source_root, config.source_labels, config)
    if source.shape != task.shape:
        raise ConfigError(
            f"--source-data {config.source_data} has samples of shape {source.shape}, --data {config.data} of "
            f"{task.shape}; flows start and end in the same space"
        )
    return replace(task, source=source)


def _load(flag: str, name: str, root: Path | None, conditional: bool, config: TrainConfig | DiagnoseConfig) -> Task:
    flip = getattr(config, "flip", False)
    make = registry.data_sets()[name]
    offered: dict[str, Any] = {
        "n": 20_000, "generator": generator_at(config.seed, flag), "root": root, "path": root,
        "size": config.image_size, "flip": flip, "download": config.download, "labels": conditional,
        "x": config.samples_key, "y": config.labels_key if conditional else None,
    }  # fmt: skip
    taken = {key: offered[key] for key in inspect.signature(make).parameters if key in offered}
    if root is None and {"root", "path"} & set(taken):
        shown = {"data": "--data", "source": "--source-data"}[flag]
        raise ConfigError(f"{shown} {name} is read from files: say where they are with --{flag}-root")
    made = make(**taken)
    dataset: Any = TensorDataset(*made) if isinstance(made, tuple) else made
    dataset = TensorDataset(made) if isinstance(made, Tensor) else dataset
    if isinstance(dataset, datasets.ImageData):
        dataset.flip = flip
        if not conditional:
            dataset.labels = None
    elif isinstance(dataset, TensorDataset) and not conditional:
        dataset = TensorDataset(dataset.tensors[0])
    item = dataset[0]
    if not isinstance(item, (tuple, list)) or len(item) == 1 or not conditional:
        return Task(dataset, tuple((item[0] if isinstance(item, (tuple, list)) else item).shape))
    x, y = item
    if torch.is_tensor(y) and y.is_floating_point():
        return Task(dataset, tuple(x.shape), condition_dim=y.numel())
    labels: Any = dataset.tensors[1] if isinstance(dataset, TensorDataset) else dataset.labels
    if torch.is_tensor(labels) and int(labels.min()) < 0:
        raise ConfigError(f"labels must be 0, 1, 2, …; the smallest of {root or name} is {int(labels.min())}")
    classes = int(labels.max()) + 1 if isinstance(dataset, TensorDataset) else len(dataset.classes)
    return Task(dataset, tuple(x.shape), num_classes=classes)


def fitting_batches(config: TrainConfig, task: Task) -> tuple[TrainConfig, str | None]:
    """The settings with batches that the data set fills, and what was changed in words, or None.

    Raises:
        ConfigError: fewer samples than processes.
    """
    size, world = len(task.dataset), dist.get_world_size() if dist.is_initialized() else 1
    if size >= world * config.ot_batch_size:
        return config, None
    if size < world:
        raise ConfigError(f"--data {config.data} holds {size} samples, fewer than the {world} processes")
    batch = min(config.batch_size, size // world)
    ot_batch = size // world // batch * batch
    said = (
        f"{size} samples are fewer than an OT batch of {config.ot_batch_size}"
        + (f" in each of {world} processes" if world > 1 else "")
        + f": --ot-batch-size {ot_batch} --batch-size {batch}"
    )
    return replace(config, batch_size=batch, ot_batch_size=ot_batch), said
