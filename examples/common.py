"""What the example scripts share: their common options, the training of small flows, and what each run leaves."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import flows
import mbot


def arguments(description: str | None, name: str, *, data: bool = True) -> argparse.ArgumentParser:
    """A parser with ``--quick``, ``--seed``, ``--out`` and, where a script can use files, ``--data-root``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    quick_flag(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs") / name)
    if data:
        parser.add_argument(
            "--data-root", type=Path, help="folder with the real data; without it, the embedded default"
        )
    if find_spec("matplotlib") is None:  # before minutes of work
        raise SystemExit('the examples draw with matplotlib: pip install -c constraints.txt -e ".[examples]"')
    return parser


def quick_flag(parser: argparse.ArgumentParser) -> None:
    """The option ``--quick``, which every script has."""
    parser.add_argument("--quick", action="store_true", help="a tiny budget: under a minute on 2 cores")


def peak_memory() -> float:
    """Largest memory that this process had, in MB; NaN where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return float("nan")
    unit = 1024**2 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def quick_note() -> str:
    """What the figures and pictures of ``--quick`` say of themselves; else nothing."""
    return (
        "Quick setting: a tiny budget shows that this runs, not what the methods reach."
        if "--quick" in sys.argv
        else ""
    )


def mark_quick(figure: Any) -> None:
    """Write that note into a picture."""
    figure.text(0.995, 0.003, quick_note(), ha="right", va="bottom", fontsize=8, color="#b2182b")


def machine() -> str:
    """The machine in words, for the results file."""
    return (
        f"{os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}, {torch.get_num_threads()} threads"
    )


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean, with the standard deviation where there is one."""
    text = f"{mean(values):.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if len(values) > 1 else text


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; floats with four significant digits."""
    cells = [[f"{c:.4g}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    lines = [list(header), *cells]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join((text[0], "|" + "---|" * len(header), *text[1:]))


def best_bold(models: dict[str, list[list[float]]]) -> list[list[str]]:
    """Rows of a table, one a model: mean and spread over ``[seed][column]``, the smallest of each column bold."""
    columns = {name: [list(values) for values in zip(*runs, strict=True)] for name, runs in models.items()}
    best = [min(map(mean, column)) for column in zip(*columns.values(), strict=True)]
    return [
        [name, *(f"**{spread(v)}**" if mean(v) == b else spread(v) for v, b in zip(values, best, strict=True))]
        for name, values in columns.items()
    ]


def train_flow(
    model: torch.nn.Module,
    coupling: mbot.Coupling,
    draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]],
    *,
    steps: int,
    batch: int = 256,
    seed: int = 0,
    lr: float = 1e-3,
    name: str = "",
) -> torch.nn.Module:
    """Flow matching on fresh draws ``draw(n, generator) -> (x0, x1)`` with Adam; returns the model in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    matcher = flows.FlowMatching(coupling)
    for _ in tqdm(range(steps), desc=name, unit="step"):
        optimizer.zero_grad()
        matcher.loss(model, *draw(batch, generator), generator=generator).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def he_init(module: torch.nn.Module) -> torch.nn.Module:
    """He's initialisation of all linear maps, biases of zero; returns the module.

    torch's default shrinks what tells one set from another by about 0.4 in each layer, and its biases add constants:
    behind eight layers all sets look the same, and training starts on a plateau.
    """
    for part in module.modules():
        if isinstance(part, torch.nn.Linear):
            torch.nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
            if part.bias is not None:
                torch.nn.init.zeros_(part.bias)
    return module


class Beside(torch.nn.Module):
    """What ``first`` makes of an element, and beside it what ``then`` makes of that: keys see places directly."""

    def __init__(self, first: torch.nn.Module, then: torch.nn.Module) -> None:
        super().__init__()
        self.first, self.then = first, then

    def forward(self, x: Tensor) -> Tensor:
        """``(…, n, d)`` to ``(…, n, features)``."""
        x = self.first(x)
        return torch.cat((x, self.then(x)), -1)


def slot_block(width: int, num_heads: int) -> torch.nn.Module:
    """A transformer block on slots, normalised before each half."""
    return torch.nn.TransformerEncoderLayer(width, num_heads, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)


def cifar10_images(root: Path, *, train: bool) -> Tensor:
    """Bytes ``(N, 3, 32, 32)`` of the official batches, or of an npz with ``x_train`` and ``x_test``, channels last."""
    for path in sorted(root.glob("cifar10/*.npz")):
        with np.load(path) as file:
            if "x_train" in file:
                return torch.from_numpy(file["x_train" if train else "x_test"]).permute(0, 3, 1, 2)
    return flows.datasets.cifar10(root, train=train).images


def plotter() -> Any:
    """``matplotlib.pyplot`` that draws to files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_picture(figure: Any, path: Path, dpi: int = 80) -> None:
    """Save a figure as a PNG of 128 colours: a third of the bytes of one in full colour."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    mark_quick(figure)
    figure.savefig(buffer, dpi=dpi)
    Image.open(buffer).convert("RGB").quantize(128, method=Image.Quantize.FASTOCTREE).save(path, optimize=True)
    plotter().close(figure)


def kept(path: Path | None, name: str, make: Callable[[], Any]) -> Any:
    """What ``make`` found under this name, from the file of finished runs if it is there."""
    runs = torch.load(path, weights_only=True) if path and path.exists() else {}
    if name not in runs:
        runs[name] = make()
        if path:
            torch.save(runs, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
    return runs[name]


def _shown(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments without ``--out``, and with folders of one's own by their names."""
    pairs = zip(arguments, [None, *arguments], strict=False)
    kept = [a for a, before in pairs if "--out" not in (a, before)]
    return [shlex.quote(Path(a).name if "/" in a else a) for a in kept]


def save(name: str, args: argparse.Namespace, page: str, figures: dict[str, Any]) -> None:
    """Write ``name.md`` and ``name.json`` (figures, options, machine) under ``args.out``, and print the page."""
    options = {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("out", "data_root")}
    command = " ".join([f"python examples/{Path(sys.argv[0]).name}", *_shown(sys.argv[1:])])
    note = f"**{quick_note()}**\n\n" if args.quick else ""
    page = f"{page.rstrip()}\n\n{note}Command: `{command}`. Machine: {machine()}.\n"
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.md").write_text(page)
    content = {"machine": machine(), "options": options, **figures}
    (args.out / f"{name}.json").write_text(json.dumps(content, indent=1, default=str) + "\n")
    print(page)
    print(f"written to {args.out}: " + ", ".join(sorted(p.name for p in args.out.glob(f"{name}*"))))
