"""Flow matching on data with outliers: exact, unbalanced and partial couplings.

    python examples/outliers.py                 # 3 minutes
    python examples/outliers.py --share 0.1 --mass 0.85 --tau 5

Two moons, of which 5 % lie on a far ring instead. Independent and exact couplings must use every sample, so the flow
learns the outliers as well. A partial coupling (`mbot.PartialOT`, batches keep their cheapest share of pairs) and an
unbalanced one (`mbot.UnbalancedOT`, pairs drawn in proportion to a plan that avoids dear samples) leave most of them
out, at the price of a bias: what is dear to reach is rarer, outlier or not. Measured: the share of generated points
that are farther than 1 from every clean one, and the squared W2 to clean data.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import arguments, plotter, save, save_picture, table, train_flow
from torch import Tensor

import flows
import mbot


def couplings(args: argparse.Namespace) -> dict[str, mbot.Coupling]:
    """The couplings of the comparison."""
    return {
        "independent": mbot.IndependentCoupling(),
        "OT": mbot.OTCoupling(),
        "unbalanced": mbot.OTCoupling(mbot.UnbalancedOT(args.reg, args.tau), replacement=True),
        "partial": mbot.OTCoupling(mbot.PartialOT(mass=args.mass)),
        "partial, refilled": mbot.OTCoupling(mbot.PartialOT(mass=args.mass), refill="independent"),
    }


def data(n: int, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Moons ``(n, 2)`` in which each point is an outlier with probability ``share``, and which ones are."""
    clean, _ = flows.datasets.moons(n, generator=generator)
    angle = torch.rand(n, generator=generator) * 2 * torch.pi
    radius = 12 + torch.rand(n, generator=generator) * 2
    far = radius[:, None] * torch.stack((angle.cos(), angle.sin()), 1)
    outlier = torch.rand(n, generator=generator) < share
    return torch.where(outlier[:, None], far, clean), outlier


def picture(samples: dict[str, Tensor], outlier: Tensor, notes: dict[str, str], path: Path) -> None:
    """Training data and generated points, those far from clean data in red."""
    plt = plotter()
    figure, axes = plt.subplots(2, 3, figsize=(10.5, 7.4))
    far = {"data": outlier}
    for ax, (name, points) in zip(axes.flat, samples.items(), strict=True):
        red = far.get(name, notes.get(name + " far"))
        ax.scatter(*points[~red].T, s=3, lw=0, color="#2166ac")
        ax.scatter(*points[red].T, s=5, lw=0, color="#b2182b")
        ax.set(xlim=(-15, 15), ylim=(-15, 15), xticks=[], yticks=[], aspect="equal")
        ax.set_title(f"{name}: {notes[name]}", fontsize=11)
        ax.spines[:].set_color("0.8")
    figure.tight_layout()
    save_picture(figure, path)


def main() -> None:
    parser = arguments(__doc__, "outliers", data=False)
    parser.add_argument("--share", type=float, default=0.05, help="of outliers in the data")
    parser.add_argument("--mass", type=float, default=0.9, help="of the partial couplings")
    parser.add_argument("--reg", type=float, default=0.5, help="entropy of the unbalanced coupling, in cost units")
    parser.add_argument("--tau", type=float, default=10.0, help="its marginal price, in cost units")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--points", type=int, default=2000, help="generated and compared")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.batch, args.points = 100, 128, 400
    generator = torch.Generator().manual_seed(args.seed + 1)
    clean, _ = data(args.points, 0.0, generator)
    reference, _ = data(4 * args.points, 0.0, generator)
    shown, outlier = data(args.points, args.share, generator)
    noise = torch.randn(args.points, 2, generator=generator)
    samples, rows, figures = {"data": shown}, [], {}
    notes: dict = {"data": f"{100 * float(outlier.float().mean()):.1f} % outliers"}
    floor = flows.metrics.squared_wasserstein2(reference[: args.points], clean)
    rows.append(["training data", f"{100 * float(outlier.float().mean()):.1f} %",
                 flows.metrics.squared_wasserstein2(shown, clean), "–"])  # fmt: skip
    for name, coupling in couplings(args).items():
        pairs = coupling(torch.randn(args.points, 2, generator=generator), shown, generator=generator)
        used = float(outlier[pairs.target].float().mean())
        torch.manual_seed(args.seed)
        model = train_flow(
            flows.models.ResidualMLP(2, width=64), coupling,
            lambda n, g: (torch.randn(n, 2, generator=g), data(n, args.share, g)[0]),
            steps=args.steps, batch=args.batch, seed=args.seed, name=name,
        )  # fmt: skip
        points = flows.integrate(model, noise, method="midpoint", steps=25).final
        far = torch.cdist(points, reference).amin(1) > 1
        share, w2 = float(far.float().mean()), flows.metrics.squared_wasserstein2(points, clean)
        kept = flows.metrics.squared_wasserstein2(points[~far], clean) if bool((~far).any()) else float("inf")
        samples[name], notes[name], notes[name + " far"] = points, f"{100 * share:.1f} % far, W2² {w2:.2f}", far
        rows.append([name, f"{100 * used:.1f} %", w2, f"{100 * share:.1f} %", kept])
        figures[name] = {"outliers_in_pairs": used, "far": share, "squared_w2": w2, "squared_w2_without_far": kept}
    rows[0].append("–")
    args.out.mkdir(parents=True, exist_ok=True)
    picture(samples, outlier, notes, args.out / "outliers.png")
    header = ["coupling", "outliers among its pairs", "W2² to clean data", "generated far points", "W2² without them"]
    page = (
        f"# Flow matching on data with {100 * args.share:g} % outliers\n\n"
        f"{args.steps:,} steps of batch {args.batch}, {args.points} generated points, seed {args.seed}; partial mass "
        f"{args.mass:g}; unbalanced with reg {args.reg:g}, tau {args.tau:g}. Two clean samples are {floor:.3g} apart. "
        "'Refilled' pairs what a partial plan leaves at random, which removes its bias and its robustness alike.\n\n"
        f"{table(header, rows)}\n"
    )
    save("outliers", args, page, {"clean_squared_w2": floor, "couplings": figures})


if __name__ == "__main__":
    main()
