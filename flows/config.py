"""Typed settings of the command line: one flat dataclass; those that only one command has are with that command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import tyro

from flows import registry
from flows.integrate import METHODS
from flows.settings import ConfigError, plain

if TYPE_CHECKING:
    Data: TypeAlias = str
    Coupling: TypeAlias = str
    PathName: TypeAlias = str
    TimesName: TypeAlias = str
    ObjectiveName: TypeAlias = str
    Model: TypeAlias = str
    Method: TypeAlias = str
else:
    Data = Literal[tuple(registry.data_sets())]
    Coupling = Literal[("auto", *registry.couplings())]
    PathName = Literal[tuple(registry.path_classes())]
    TimesName = Literal[("auto", *registry.time_laws())]
    ObjectiveName = Literal[(*registry.objectives(), "distillation")]
    Model = Literal[("auto", *registry.model_names())]
    Method = Literal[METHODS]


@dataclass(frozen=True)
class TrainConfig:
    """Train a flow and end with samples and a table of metrics.

    Writes into --out: config.toml (these settings, resolved), checkpoints/, metrics.csv, samples/*.png, evaluation.json
    and evaluation.md. Exit codes: 0 done, 2 wrong settings, 3 unusable checkpoint or data, 4 values not finite,
    75 stopped by SIGTERM or SIGINT after saving (run the same command with --resume).
    """

    out: Path = Path("runs/flow")
    """Folder of the run."""
    config: Path | None = None
    """TOML, YAML or JSON file with settings under these names; flags override it."""
    preset: Literal["none", "cifar10-c2ot", "cifar10-otcfm", "imagenet32-c2ot"] = "none"
    """Settings of a paper; the file and the flags override them."""
    data: Data = "digits"
    """What to learn. digits and the planar families need no files."""
    data_root: Path | None = None
    """Folder (mnist, fashion-mnist, cifar10, folder) or file (arrays: .npy, .npz, .csv, .tsv) of the data."""
    samples_key: str = "auto"
    """Of arrays: key of the samples in an .npz file, or columns of a .csv or .tsv table (a,b,c); auto: x, or all."""
    labels_key: str = "auto"
    """Of arrays: key or column of the labels (or other conditions); auto: y of an .npz file, none of a table."""
    download: bool = False
    """Fetch missing data through torchvision, where that is installed."""
    image_size: int = 32
    """Pixels a side of the images of a folder."""
    flip: bool = False
    """Mirror a random half of the images."""
    conditional: bool = True
    """Train with the data's labels or condition vectors, where it has some."""
    source_data: Data | None = None
    """Start of the flows: a data set instead of noise, with samples of the same shape."""
    source_root: Path | None = None
    """Folder or file of that data."""
    source_labels: bool = True
    """Use the labels of that data, so that c2ot pairs within classes."""
    source_sampling: Literal["independent", "matched"] = "independent"
    """Which of them an OT batch gets: any, or for each sample of the data one of its class."""
    coupling: Coupling = "auto"
    """How noise and data are paired: independently (fm), by OT, by conditional OT (c2ot; ot without conditions), with
    weights (wcfm), ... auto: the path's own pairs where it asks for some, else c2ot."""
    target_ratio: float | None = None
    """Of c2ot with continuous conditions: the ratio r that its weight is chosen for (paper: 0.01)."""
    reg: float | None = None
    """Of couplings with regularisation; of wcfm it is by default 0.09 sqrt(d), the paper's choice on CIFAR-10."""
    settings: tuple[str, ...] = ()
    """Further settings of coupling, path, times, objective: coupling.num_batches=4,
    coupling.transport=PartialOT(mass=0.9)."""
    path: PathName = "linear"
    """How pairs are connected."""
    sigma: float | None = None
    """Noise of the path; by default the path's own."""
    objective: ObjectiveName = "flow-matching"
    """What is learned: velocities, or average velocities that sample in one step (mean-flow), whose settings are share,
    power and floor: --settings objective.share=0.5. distillation is that of runs which the command distill made."""
    times: TimesName = "auto"
    """Law of the times that the model is trained at; its settings follow --settings, such as times.mean=-0.4. auto: the
    objective's own, uniform for flow-matching."""
    model: Model = "auto"
    """auto: a U-Net that fits the images, an MLP for points. dit: a small transformer; others by a paper's size."""
    mlp_width: int = 128
    """Hidden features of the MLP; at least as many as the data has is wise."""
    mlp_depth: int = 3
    """Residual blocks of the MLP."""
    steps: int = 800
    """Optimiser steps."""
    batch_size: int = 128
    """Pairs a training step (and process)."""
    ot_batch_size: int = 640
    """Pairs coupled at once, a multiple of batch_size; both become smaller where the data set is."""
    coupling_scope: Literal["rank", "global"] = "rank"
    """Under torchrun: couple the batch of each process, or all of them together."""
    timeout: float = 1800.0
    """Under torchrun: seconds that a process waits for the others; if one is lost, the run then ends with an error."""
    num_workers: int = 0
    """Worker processes that load and couple; 0: a background thread."""
    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Of Adam."""
    eps: float = 1e-8
    """Of Adam."""
    warmup: int = 100
    """Steps of linear warm-up."""
    decay: Literal["constant", "linear"] = "linear"
    """Learning rate after the warm-up."""
    ema: float | None = 0.999
    """Decay of the averaged weights that are sampled from; None for none."""
    ema_reference_batch: int | None = None
    """Samples of a step that ema is meant for: other batches get the same half-life in samples; None: ema as it is."""
    clip: float | None = 1.0
    """Largest gradient norm; None for no clipping."""
    accumulate: int = 1
    """Training batches an optimiser step."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast."""
    compile: bool = False
    """Run the model through torch.compile."""
    dropout: float | None = None
    """Of the U-Net; by default its preset's."""
    condition_dropout: float = 0.1
    """Share of conditions dropped, so that samples can be guided; 0 for none."""
    guidance: float = 1.0
    """Guidance scale of the samples at the end; 1 for none."""
    seed: int = 0
    """Of everything."""
    device: str = "auto"
    """auto: a GPU where there is one."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    keep: int = 3
    """Checkpoints kept."""
    log_every: int = 50
    """Steps between rows of metrics.csv."""
    preview_every: int | None = None
    """Steps between grids of samples; None for one at the end."""
    evaluate: Annotated[int, tyro.conf.arg(aliases=("--evaluate-samples",))] = 500
    """Samples that the table at the end is measured on; 0 for no table."""
    tensorboard: bool = False
    """Write TensorBoard event files."""
    progress: bool = True
    """Show a progress bar."""
    resume: bool = False
    """Go on from the newest checkpoint in --out (or from the start where there is none)."""
    resume_from: Path | None = None
    """Go on from this checkpoint."""


@dataclass(frozen=True)
class DiagnoseConfig:
    """Report what a coupling does to a data set before anything is trained: cost, skew, unique samples, advice."""

    data: Data = "digits"
    """What is paired with standard normal noise."""
    data_root: Path | None = None
    """Folder or file of the data."""
    samples_key: str = "auto"
    """Of arrays: key of the samples in an .npz file, or columns of a .csv or .tsv table (a,b,c); auto: x, or all."""
    labels_key: str = "auto"
    """Of arrays: key or column of the labels (or other conditions); auto: y of an .npz file, none of a table."""
    download: bool = False
    """Fetch missing data through torchvision, where that is installed."""
    image_size: int = 32
    """Pixels a side of the images of a folder."""
    conditional: bool = True
    """Use the data's conditions."""
    source_data: Data | None = None
    """Start of the flows: a data set instead of noise, with samples of the same shape."""
    source_root: Path | None = None
    """Folder or file of that data."""
    source_labels: bool = True
    """Use the labels of that data, so that c2ot pairs within classes."""
    coupling: Coupling = "auto"
    """As for train."""
    target_ratio: float | None = None
    """Of c2ot with continuous conditions."""
    reg: float | None = None
    """Of couplings with regularisation."""
    settings: tuple[str, ...] = ()
    """Further settings of the coupling, such as coupling.num_batches=4."""
    num: int = 1000
    """Samples in the batch that is coupled."""
    seed: int = 0
    """Of everything."""


ONE_STEP: dict[str, Any] = {"method": "euler", "steps": 1}
"""How a run of distillation is sampled."""

PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    # Cheng and Schwing 2025 (arXiv 2503.10636), their CIFAR-10 run: two GPUs of this batch size
    "cifar10-c2ot": {
        "data": "cifar10", "model": "cifar10-c2ot", "flip": True, "coupling": "c2ot", "steps": 100_000,
        "batch_size": 128, "ot_batch_size": 640, "lr": 2e-4, "betas": (0.9, 0.95), "eps": 1e-6, "warmup": 5000,
        "decay": "constant", "ema": 0.9999, "clip": 1.0, "precision": "bf16", "compile": True,
        "condition_dropout": 0.0, "checkpoint_every": 5000, "preview_every": 10_000,
    },
    # Tong et al. 2024 (arXiv 2302.00482), unconditional
    "cifar10-otcfm": {
        "data": "cifar10", "model": "cifar10-otcfm", "flip": True, "coupling": "ot", "conditional": False,
        "steps": 400_000, "batch_size": 128, "ot_batch_size": 128, "lr": 2e-4, "betas": (0.9, 0.999), "warmup": 5000,
        "decay": "constant", "ema": 0.9999, "clip": 1.0, "condition_dropout": 0.0, "checkpoint_every": 20_000,
        "preview_every": 20_000,
    },
    # Cheng and Schwing 2025, ImageNet-32 with text features: four GPUs; --data arrays with x (images) and y (features)
    "imagenet32-c2ot": {
        "data": "arrays", "model": "imagenet32-c2ot", "flip": True, "coupling": "c2ot", "target_ratio": 0.2,
        "steps": 300_000, "batch_size": 128, "ot_batch_size": 6400, "lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-6,
        "warmup": 20_000, "decay": "linear", "ema": 0.9999, "clip": 1.0, "precision": "bf16", "compile": True,
        "condition_dropout": 0.0, "checkpoint_every": 10_000, "preview_every": 20_000,
    },
}  # fmt: skip
"""Settings of the papers' image runs, by name (flows' command line: --preset)."""


# Settings that a resumed run may change, since the trained weights do not depend on them (with more steps, linear decay
# ends later).
_FREE = {
    "out", "config", "preset", "data_root", "source_root", "download", "steps", "num_workers", "guidance", "device",
    "compile", "checkpoint_every", "keep", "log_every", "preview_every", "evaluate", "tensorboard", "progress",
    "resume", "resume_from",
}  # fmt: skip


def same_run(saved: dict[str, Any], config: TrainConfig) -> None:
    """Refuse to go on with a run under other settings than those it began with.

    Args:
        saved: plain settings from a checkpoint.
        config: settings of now.

    Raises:
        ConfigError: names what differs.
    """
    mine = plain(config)
    differ = [
        f"--{name.replace('_', '-')}: then {saved[name]}, now {value}"
        for name, value in mine.items()
        if name not in _FREE and name in saved and plain(saved[name]) != value
    ]
    if differ:
        raise ConfigError(
            f"--resume goes on with the settings that the run in {config.out} began with; its config.toml holds them. "
            "These differ: " + "; ".join(differ)
        )
