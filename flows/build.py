"""From settings to objects: coupling, model and trainer of a command-line run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mbot
from flows import checkpoint, paths, registry
from flows.config import DiagnoseConfig, Model, TrainConfig
from flows.guidance import GuidedModel
from flows.integrate import integrate
from flows.loader import CoupledLoader
from flows.lr_schedule import warmup_schedule
from flows.matching import Objective
from flows.mean_flow import MeanFlow, takes_until
from flows.models import DIT_PRESETS, PRESETS, DiT, ResidualMLP, UNet
from flows.pairs import PairedDataset
from flows.reflow import AnnealingReflow
from flows.seeds import derive_seed, generator_at
from flows.settings import ConfigError, plain, read_file, typed
from flows.task import Task, load_task
from flows.times import TimeLaw
from flows.trainer import Trainer

_FITTING: tuple[Model, ...] = ("digits", "mnist", "cifar10-otcfm")  # U-Nets from small to large images


def build_coupling(config: TrainConfig | DiagnoseConfig, task: Task) -> mbot.Coupling:
    """The coupling of a configuration, not fitted to its data yet."""
    conditions = bool(task.num_classes or task.condition_dim)
    name = config.coupling
    if name == "auto":
        own = build_path(config).default_coupling() if isinstance(config, TrainConfig) else mbot.IndependentCoupling()
        if own != mbot.IndependentCoupling():
            return own
        name = "c2ot"
    name = "ot" if name == "c2ot" and not conditions else name
    settings: dict[str, Any] = {} if config.reg is None else {"reg": config.reg}
    if name == "wcfm":
        settings.setdefault("reg", 0.09 * torch.Size(task.shape).numel() ** 0.5)
    if name == "c2ot":
        settings["condition"] = "discrete" if task.num_classes else "continuous"
        settings |= {} if task.num_classes else {"target_ratio": config.target_ratio}
    settings |= registry.settings_of("coupling", config.settings)
    return registry.make(registry.couplings()[name], f"--coupling {name}", settings)


def build_path(config: TrainConfig) -> paths.Path:
    """The path of a configuration."""
    settings = {} if config.sigma is None else {"sigma": config.sigma}
    settings |= registry.settings_of("path", config.settings)
    return registry.make(registry.path_classes()[config.path], f"--path {config.path}", settings)


def build_times(config: TrainConfig) -> TimeLaw | None:
    """The time law of a configuration; None for that of its objective."""
    settings = registry.settings_of("times", config.settings)
    if config.times == "auto":
        if settings:
            raise ConfigError(f"--settings times.{next(iter(settings))}=… belongs to a law: name it with --times")
        return None
    return registry.make(registry.time_laws()[config.times], f"--times {config.times}", settings)


def build_objective(config: TrainConfig) -> Objective:
    """The objective of a configuration, without the coupling, which its loader has."""
    if config.objective not in registry.objectives():
        raise ConfigError(f"--objective {config.objective} needs a teacher: python -m flows distill trains for it")
    settings: dict[str, Any] = registry.settings_of("objective", config.settings)
    own = {f.name for f in dataclasses.fields(MeanFlow)} - {f.name for f in dataclasses.fields(Objective)}
    unknown = set(settings) - (own if config.objective == "mean-flow" else set())
    if unknown:
        has = ", ".join(sorted(own)) if config.objective == "mean-flow" else "none"
        raise ConfigError(f"--objective {config.objective} has no setting {', '.join(sorted(unknown))}; it has {has}")
    times = build_times(config)
    settings |= {"path": build_path(config)} | ({} if times is None else {"times": times})
    return registry.make(registry.objectives()[config.objective], f"--objective {config.objective}", settings)


def build_loader(config: TrainConfig, task: Task, device: torch.device | str | None = None) -> CoupledLoader:
    """The loader of a configuration, with a coupling that is fitted to the data if it can be."""

    def loader(coupling: mbot.Coupling | None) -> CoupledLoader:
        return CoupledLoader(
            task.dataset, None if task.source is None else task.source.dataset, coupling, config.batch_size,
            config.ot_batch_size, config.num_workers, source_sampling=config.source_sampling,
            seed=config.seed, device=device, coupling_scope=config.coupling_scope, timeout=config.timeout,
        )  # fmt: skip

    coupling = build_coupling(config, task)
    if coupling.needs_data_set:
        coupling = fitted(coupling, loader(None).batches.load_whole(), generator_at(config.seed, "fit"), task)
    return loader(coupling)


def _loader_of_pairs(
    config: TrainConfig, pairs: PairedDataset | AnnealingReflow, device: torch.device
) -> CoupledLoader:
    return CoupledLoader(
        pairs, batch_size=config.batch_size, num_workers=config.num_workers, seed=config.seed, device=device
    )


def fitted(coupling: Any, data: tuple[Tensor, Any], generator: torch.Generator, task: Task) -> Any:
    """A coupling that learned what it has to learn of a task's samples and conditions; others as they are."""
    if not hasattr(coupling, "fit"):
        return coupling
    noise: Any = None if task.source is None else lambda n, generator=None: task.starts(n, None, generator)
    return coupling.fit(*data, noise=noise, generator=generator)


def build_model(config: TrainConfig, task: Task) -> nn.Module:
    """A freshly initialised model, the same for the same seed."""
    conditions: dict[str, Any] = {"num_classes": task.num_classes, "condition_dim": task.condition_dim}
    conditions["average_velocity"] = config.objective == "mean-flow"
    name = config.model
    if name == "auto":
        name = next((key for key in _FITTING if PRESETS[key]["image_size"] >= task.shape[-1]), _FITTING[-1])
        name = name if task.images else "mlp"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "model"))
        if config.dropout is not None and name not in PRESETS:
            raise ConfigError(f"--dropout is of the U-Nets; --model {name} has none")
        if name == "mlp":
            features = torch.Size(task.shape).numel()
            return ResidualMLP(features, width=config.mlp_width, depth=config.mlp_depth, **conditions)
        if not task.images:
            raise ConfigError(f"--model {name} is for images; {config.data} has samples of shape {task.shape}")
        if name in DIT_PRESETS:
            return _transformer(task, name, conditions)
        changes: dict[str, Any] = {"in_channels": task.shape[0], "image_size": task.shape[-1]}
        if config.dropout is not None:
            changes["dropout"] = config.dropout
        shift = PRESETS[name]["image_size"] / task.shape[-1]
        changes["attention"] = tuple(int(size / shift) for size in PRESETS[name]["attention"])
        return UNet.preset(name, **changes, **conditions)


def _transformer(task: Task, name: str, conditions: dict[str, int]) -> DiT:
    side = DIT_PRESETS[name]["patch_size"]
    if any(pixels % side for pixels in task.shape[1:]):
        raise ConfigError(f"--model {name} has patches of {side} pixels, which do not divide images {task.shape}")
    return DiT.preset(name, in_channels=task.shape[0], **conditions)


def device_of(name: str) -> torch.device:
    """A device by name; ``auto`` is this process's GPU where there is one."""
    import os

    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error


def build_trainer(
    config: TrainConfig,
    task: Task,
    device: torch.device,
    preview: Any = None,
    *,
    model: nn.Module | None = None,
    pairs: PairedDataset | AnnealingReflow | None = None,
    objective: Objective | None = None,
) -> Trainer:
    """The trainer of a configuration.

    Args:
        config: settings.
        task: its data.
        device: of the model.
        preview: as for `flows.Trainer`.
        model: what is trained; None for a freshly initialised model.
        pairs: served instead of the data.
        objective: None for that of the configuration.
    """
    model = (build_model(config, task) if model is None else model).to(device)
    loader = build_loader(config, task, device) if pairs is None else _loader_of_pairs(config, pairs, device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, betas=config.betas, eps=config.eps)
    length = config.steps if config.decay == "linear" else None
    return Trainer(
        model,
        loader,
        steps=config.steps,
        objective=build_objective(config) if objective is None else objective,
        optimizer=optimizer,
        scheduler=warmup_schedule(optimizer, warmup=config.warmup, steps=length),
        out=config.out,
        seed=config.seed,
        ema=config.ema,
        ema_reference_batch=config.ema_reference_batch,
        precision=config.precision,
        clip=config.clip,
        accumulate=config.accumulate,
        compile=config.compile,
        condition_dropout=config.condition_dropout if task.num_classes or task.condition_dim else 0.0,
        checkpoint_every=config.checkpoint_every,
        keep=config.keep,
        log_every=config.log_every,
        tensorboard=config.tensorboard,
        progress=config.progress,
        preview=preview,
        preview_every=config.preview_every,
        config=plain(config),
    )


def load_run(run: Path, which: Path | None, device: torch.device) -> tuple[TrainConfig, Task, nn.Module]:
    """Settings, data and the (averaged) model of a trained run, in eval mode.

    Raises:
        ConfigError: no run there.
        CheckpointError: the checkpoint cannot be read.
    """
    settings = run / "config.toml"
    if not settings.is_file():
        raise ConfigError(f"{run} is not the folder of a run: it has no config.toml")
    config = TrainConfig(**typed(TrainConfig, read_file(settings), str(settings)))
    found = which or checkpoint.latest(run / "checkpoints")
    if found is None:
        raise ConfigError(f"{run} has no checkpoint yet")
    state = checkpoint.load(found)
    task = load_task(config)
    model = build_model(config, task)
    weights = state["model"]
    if state["ema"] is not None:
        weights = {k.removeprefix("module."): v for k, v in state["ema"].items() if k.startswith("module.")}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise checkpoint.CheckpointError(f"{found} holds another model than {settings} says: {error}") from error
    return config, task, model.to(device).eval()


def check_guidance(guidance: float, trained: TrainConfig, task: Task) -> None:
    """Refuse a guidance scale that the model was not trained for."""
    if guidance == 1:
        return
    if not task.num_classes and not task.condition_dim:
        raise ConfigError(f"--guidance {guidance:g} needs a model with conditions; this one has none")
    if not trained.condition_dropout:
        raise ConfigError(
            f"--guidance {guidance:g} needs a model that was trained without conditions some of the time; this run has "
            "condition_dropout 0 (train with --condition-dropout 0.1)"
        )


def generate(
    model: Any,
    task: Task,
    y: Tensor | None,
    n: int,
    generator: torch.Generator,
    *,
    guidance: float = 1.0,
    batch_size: int = 500,
    progress: Callable[[int], object] | None = None,
    **solver: Any,
) -> tuple[Tensor, Tensor, float]:
    """Samples on the CPU, from where the task's flows start: ``(x1, x0, mean NFE of a batch)``.

    ``solver`` goes to `flows.integrate`; without a ``method``, a model of average velocities takes its own steps.
    ``progress`` is called with the number of samples after each batch.
    """
    x0 = task.starts(n, y, generator)
    field = model if guidance == 1 or y is None else GuidedModel(model, guidance)
    device = next(model.parameters()).device
    ends, evaluations = [], []
    for begin in range(0, n, batch_size):
        rows = slice(begin, begin + batch_size)
        start, given = x0[rows].to(device), None if y is None else y[rows].to(device)
        if takes_until(model) and solver.get("method") is None:
            steps = solver.get("steps") or 1
            ends.append(MeanFlow.sample(field, start, given, steps).cpu())
            evaluations.append(steps)
        else:
            solved = integrate(field, start, y=given, **{**solver, "method": solver.get("method") or "dopri5"})
            ends.append(solved.final.cpu())
            evaluations.append(solved.nfe)
        if progress is not None:
            progress(len(ends[-1]))
    return torch.cat(ends), x0, sum(evaluations) / len(evaluations)
