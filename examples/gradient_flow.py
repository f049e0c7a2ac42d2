"""Gradient flow of 1000 points from one density to another, under six mini-batch losses at the same m and k.

    python examples/gradient_flow.py                                     # two drawn densities; 2-4 minutes
    python examples/gradient_flow.py --data-root DATA                    # DATA/densities/density_a.png, density_b.png
    python examples/gradient_flow.py --batch-size 4 --steps 5000 --lr 0.001

Euler steps ``x <- x - lr N grad`` of m-OT, BoMb-OT, e-BoMb-OT, m-UOT, m-POT and BoMb-POT (section "gradient flow" of
Nguyen et al. 2022, arXiv 2102.05912, and its official code: k = 4, lr 0.001, 5000 steps). The official panels have
m = 16 for the balanced losses and m = 4 for the others; here all have the same m. No published values are known to us:
the table is measured only. Progress is the exact squared W2 to the target points, times 100 as the official code
prints it.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import arguments, plotter, save, save_picture, table
from torch import Tensor
from tqdm import tqdm

import flows
import mbot

SNAPSHOTS = 5
COLOURS = ("#b2182b", "#2166ac", "#67a9cf", "#7f3b08", "#1b7837", "#762a83")


def losses(args: argparse.Namespace, generator: torch.Generator) -> dict[str, mbot.MiniBatchLoss]:
    """The six losses of the comparison, all on the grid of k × k pairs of batches of m points."""
    partial, unbalanced = mbot.PartialOT(mass=args.mass), mbot.UnbalancedOT(args.reg, args.tau)
    batches = {"num_batches": args.num_batches, "batch_size": args.batch_size, "generator": generator}
    return {
        "m-OT": mbot.MiniBatchOT(mbot.ExactOT(), **batches),
        "BoMb-OT": mbot.BoMbOT(mbot.ExactOT(), **batches),
        "e-BoMb-OT": mbot.BoMbOT(mbot.ExactOT(), reg=args.outer_reg, **batches),
        "m-UOT": mbot.MiniBatchOT(unbalanced, **batches),
        "m-POT": mbot.MiniBatchOT(partial, **batches),
        "BoMb-POT": mbot.BoMbOT(partial, **batches),
    }


def drawn_density(kind: str) -> Tensor:
    """A grey ``(100, 100)`` image: a tilted bar, or two crescents around a dot."""
    y, x = torch.meshgrid(torch.linspace(1, 0, 100), torch.linspace(0, 1, 100), indexing="ij")
    if kind == "source":
        along, across = (x - 0.3) + (y - 0.3), (x - 0.3) - (y - 0.3)
        return ((along / 0.35).square() + (across / 0.12).square() < 1).float()
    radius, angle = (x - 0.62).hypot(y - 0.6), torch.atan2(y - 0.6, x - 0.62)
    ring = ((radius - 0.27).abs() < 0.055) & ((angle + 0.6).sin().abs() > 0.35)
    return (ring | (radius < 0.09)).float()


def read_density(path: Path) -> Tensor:
    """A grey image as a density: dark is mass."""
    from PIL import Image

    image = Image.open(path).convert("RGBA")
    return 1 - torch.from_numpy(np.asarray(image)[..., 0].copy()).float() / 255


def sample_density(density: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Points ``(n, 2)`` in the unit square: pixels in proportion to their mass, with jitter of half a pixel."""
    height, width = density.shape
    pixel = torch.multinomial(density.flatten(), n, replacement=True, generator=generator)
    row, col = pixel // width, pixel % width
    points = torch.stack(((col + 0.5) / width, 1 - (row + 0.5) / height), 1)
    return points + torch.randn(n, 2, generator=generator) * 0.5 / width


@dataclass
class Flow:
    """One loss's run: where the points are at the snapshots, and the squared W2 to the target over the steps."""

    snapshots: list[Tensor]
    steps: list[int]
    squared_w2: list[float]
    spread: float
    seconds: float


def run(name: str, loss: mbot.MiniBatchLoss, x: Tensor, y: Tensor, args: argparse.Namespace) -> Flow:
    """Follow the gradient of one loss."""
    x = x.clone()
    flow, measured_seconds, began = Flow([], [], [], 0.0, 0.0), 0.0, time.process_time()
    measure = set(torch.linspace(0, args.steps, args.measures).round().int().tolist())
    show = set(torch.linspace(0, args.steps, SNAPSHOTS).round().int().tolist())
    for step in tqdm(range(args.steps + 1), desc=name, unit="step"):
        at = time.process_time()
        if step in measure:
            flow.steps.append(step)
            flow.squared_w2.append(flows.metrics.squared_wasserstein2(x, y))
        if step in show:
            flow.snapshots.append(x.clone())
        measured_seconds += time.process_time() - at
        if step < args.steps:
            x.requires_grad_(True)
            (gradient,) = torch.autograd.grad(loss(x, y), x)
            x = x.detach() - args.lr * len(x) * gradient
    flow.seconds = time.process_time() - began - measured_seconds
    flow.spread = float(x.var(0).sum() / y.var(0).sum())
    return flow


def picture(found: dict[str, Flow], y: Tensor, args: argparse.Namespace, path: Path) -> None:
    """Snapshots, one row a loss, and the squared W2 of all over the steps."""
    plt = plotter()
    figure = plt.figure(figsize=(14, 9.4))
    grid = figure.add_gridspec(len(found), SNAPSHOTS, left=0.04, right=0.62, bottom=0.02, top=0.95, wspace=0, hspace=0)
    curve = figure.add_axes((0.68, 0.28, 0.31, 0.45))
    everything = torch.cat((next(iter(found.values())).snapshots[0], y))
    (left, bottom), (right, top) = everything.amin(0) - 0.03, everything.amax(0) + 0.03
    shown = torch.linspace(0, args.steps, SNAPSHOTS).round().int().tolist()
    for row, (name, flow) in enumerate(found.items()):
        for column, points in enumerate(flow.snapshots):
            ax = figure.add_subplot(grid[row, column])
            ax.scatter(*y.T, s=1.5, lw=0, color="0.8")
            ax.scatter(*points.T, s=1.5, lw=0, color=COLOURS[row])
            ax.set(xticks=[], yticks=[], xlim=(left, right), ylim=(bottom, top), aspect="equal")
            ax.spines[:].set_color("0.85")
            if column == 0:
                ax.set_ylabel(name, fontsize=12)
            if row == 0:
                ax.set_title(f"step {shown[column]}", fontsize=10)
        curve.plot(flow.steps, [100 * w for w in flow.squared_w2], color=COLOURS[row], label=name)
    curve.set(
        yscale="log", xlabel="step", title=f"100 · W2² to the target, m = {args.batch_size}, k = {args.num_batches}"
    )
    curve.legend(frameon=False)
    curve.spines[["top", "right"]].set_visible(False)
    save_picture(figure, path)


def main() -> None:
    parser = arguments(__doc__, "gradient_flow")
    parser.add_argument("--points", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=0.0025, help="steps · lr = 5 is the official flow time")
    parser.add_argument("--batch-size", type=int, default=16, help="m, of every loss")
    parser.add_argument("--num-batches", type=int, default=4, help="k")
    parser.add_argument("--mass", type=float, default=0.8, help="s of m-POT and BoMb-POT")
    parser.add_argument("--reg", type=float, default=0.005, help="entropy of m-UOT")
    parser.add_argument("--tau", type=float, default=0.1, help="marginal price of m-UOT")
    parser.add_argument("--outer-reg", type=float, default=0.01, help="lambda of e-BoMb-OT")
    parser.add_argument("--measures", type=int, default=41, help="how often W2 is measured")
    args = parser.parse_args()
    if args.quick:
        args.points, args.steps, args.measures = 200, 50, 5
        args.lr = 5 / args.steps
    args.out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(args.seed)
    if args.data_root is None:
        densities = drawn_density("source"), drawn_density("target")
    else:
        densities = tuple(read_density(args.data_root / f"densities/density_{side}.png") for side in "ab")
    x, y = (sample_density(d, args.points, generator) for d in densities)
    found = {}
    for name in losses(args, generator):
        loss = losses(args, torch.Generator().manual_seed(args.seed))[name]  # all flows draw the same batches
        found[name] = run(name, loss, x, y, args)
    picture(found, y, args, args.out / "gradient_flow.png")
    best = min(f.squared_w2[-1] for f in found.values())
    header = ["loss", *(f"step {s}" for s in flow_steps(args)), "final spread", "CPU ms/step"]
    rows = []
    for name, flow in found.items():
        picked = [100 * flow.squared_w2[flow.steps.index(s)] for s in flow_steps(args)]
        final = f"**{picked[-1]:.4g}**" if flow.squared_w2[-1] == best else picked[-1]
        rows.append([name, *picked[:-1], final, flow.spread, 1000 * flow.seconds / args.steps])
    again = flows.metrics.squared_wasserstein2(sample_density(densities[1], args.points, generator), y)
    page = (
        f"# Gradient flow of {args.points} points, m = {args.batch_size}, k = {args.num_batches} for every loss\n\n"
        f"100 · W2² (exact, {args.points} against {args.points} points) over the steps; two fresh samples of the "
        f"target density are {100 * again:.3g} apart. Final spread: variance of the points over that of the target (1 "
        f"is right, less is contraction). lr {args.lr:g}; s = {args.mass:g}; m-UOT with reg {args.reg:g}, "
        f"tau {args.tau:g}; e-BoMb with lambda {args.outer_reg:g}; {'drawn' if args.data_root is None else 'image'} "
        f"densities; seed {args.seed}. No published values are known.\n\n{table(header, rows)}\n\n"
        "The balanced losses stop at the bias of their batches: they contract, m-OT more than BoMb-OT. The partial "
        "losses may leave the dearest share 1 - s of every pair of batches where it is, so far points move late or "
        "never: right for outliers, wrong where all mass must arrive.\n"
    )
    figures = {"fresh_samples_squared_w2": again}
    figures["flows"] = {
        name: {"steps": f.steps, "squared_w2": f.squared_w2, "spread": f.spread, "seconds": f.seconds}
        for name, f in found.items()
    }
    save("gradient_flow", args, page, figures)


def flow_steps(args: argparse.Namespace) -> list[int]:
    """The measured steps that the table shows."""
    measured = torch.linspace(0, args.steps, args.measures).round().int().tolist()
    return measured[:: max(1, len(measured) // 4)]


if __name__ == "__main__":
    main()
