"""The main job in four minutes: two point clouds, four couplings, a flow-matching model each, numbers and a picture.

    make demo          or          python examples/demo.py --out runs/demo

Trains FM, OT, C²OT and W-CFM on 8 gaussians -> moons with the class as condition, at a reduced budget, prints squared
W2 after one Euler step and with the adaptive solver beside the published values (which are for 20,000 steps), and
writes ``demo.png``, ``demo.json`` and ``demo.md``.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from c2ot_moons import COUPLINGS, Protocol, coupling_for, draw, evaluate, table, train
from common import machine, quick_flag, quick_note
from torch import Tensor

import flows

TITLES = {"fm": "FM (independent)", "ot": "OT", "c2ot": "C²OT", "wcfm": "W-CFM"}
COLOURS = ("#b2182b", "#2166ac")


def picture(models: dict[str, torch.nn.Module], protocol: Protocol, seed: int, path: Path) -> None:
    """Couplings on top; one-step and adaptive trajectories below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    generator = torch.Generator().manual_seed(seed)
    x0, x1, y = draw(256, "class", generator)
    z0, _, z = draw(400, "class", generator)
    figure, axes = plt.subplots(3, len(models), figsize=(3.1 * len(models), 9.4), sharex=True, sharey=True)
    for column, (name, model) in enumerate(models.items()):
        pairs = coupling_for(name, "class", protocol)(x0, x1, y1=y, generator=generator)
        start, end = pairs.apply(x0, x1)
        weight = torch.ones(len(end)) if pairs.weight is None else (pairs.weight / 3).clamp_max(1)
        lines(axes[0, column], torch.stack((start, end)), y[:, 0] > 0, weight)
        lines(axes[1, column], flows.integrate(model, z0, y=z, method="euler", steps=1).x, z[:, 0] > 0)
        times = torch.linspace(0, 1, 40)
        lines(axes[2, column], flows.integrate(model, z0, y=z, times=times).x, z[:, 0] > 0)
        axes[0, column].set_title(TITLES[name], fontsize=13)
    for row, label in enumerate(("coupling of one batch", "one Euler step", "adaptive solver")):
        axes[row, 0].set_ylabel(label, fontsize=12)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[], xlim=(-7.5, 7.5), ylim=(-7.5, 7.5), aspect="equal")
        ax.spines[:].set_visible(False)
    title = "8 gaussians → moons given the class (colour): crosses are noise, dots are samples"
    figure.suptitle(f"{title}\n{quick_note()}".strip(), fontsize=12)
    figure.tight_layout(rect=(0, 0, 1, 0.99))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def lines(ax, x: Tensor, upper: Tensor, weight: Tensor | None = None) -> None:
    """Trajectories ``(T, B, 2)`` in two colours, drawn as strongly as their weights."""
    from matplotlib.collections import LineCollection

    weight = torch.ones(x.shape[1]) if weight is None else weight
    grey = [(0.45, 0.45, 0.45, 0.5 * strength) for strength in weight.tolist()]
    ax.add_collection(LineCollection(x.transpose(0, 1).numpy(), colors=grey, linewidths=0.5, zorder=1))
    for colour, members in zip(COLOURS, (~upper, upper), strict=True):
        ax.scatter(*x[0, members].T, s=12, marker="x", lw=0.7, color=colour, alpha=0.35, zorder=2)
        ax.scatter(*x[-1, members].T, s=6, lw=0, color=colour, zorder=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--evaluate", type=int, default=4000, help="points that W2 is measured on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    quick_flag(parser)
    args = parser.parse_args()
    if args.quick:
        args.steps, args.evaluate = 8, 300
    protocol = Protocol(steps=args.steps, evaluate=args.evaluate)
    args.out.mkdir(parents=True, exist_ok=True)
    models, runs = {}, []
    for name in COUPLINGS:
        models[name], times = train(name, "class", protocol, args.seed)
        figures = evaluate(models[name], "class", protocol, args.seed)
        runs.append({"condition": "class", "coupling": name, "seed": args.seed, **asdict(protocol), **times, **figures})
    page = (
        f"8 gaussians -> moons given the class, {protocol.steps:,} steps of batch {protocol.batch} "
        f"(published: 20,000), squared W2 on {protocol.evaluate:,} points (published: 10,000), seed {args.seed}"
        f"\n\n{table(runs)}\n" + (f"\n**{quick_note()}**\n" if args.quick else "")
    )
    picture(models, protocol, args.seed, args.out / "demo.png")
    (args.out / "demo.md").write_text(page)
    (args.out / "demo.json").write_text(json.dumps({"machine": machine(), "seed": args.seed, "runs": runs}, indent=1))
    print(page)
    print(f"written: {args.out}/demo.png, demo.md, demo.json")


if __name__ == "__main__":
    main()
