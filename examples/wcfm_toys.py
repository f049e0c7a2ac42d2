"""W-CFM on 8 gaussians -> moons: what its temperature buys and what it costs.

    python examples/wcfm_toys.py                # 4 minutes
    python examples/wcfm_toys.py --regs 1 3 10 30 --steps 10000

Weighted flow matching (arXiv 2507.22270) solves no transport problem: independent pairs are weighted by
``exp(-|x0 - x1| / reg)``. A small reg straightens paths, and tilts both marginals towards near pairs; a large one does
neither. Measured over reg, plain and with the tilt corrected, beside FM and OT: squared W2 to data, normalised path
energy (NPE, Tong et al. 2024: 0 for an optimal flow), effective sample size and the tilt of the data. The paper's
table is known to us in words only: W-CFM is worse than OT-CFM on both measures here, and a larger reg tilts less and
is less straight.
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
    """FM, OT, and W-CFM over the temperatures, plain and corrected."""
    found: dict[str, mbot.Coupling] = {"FM": mbot.IndependentCoupling(), "OT": mbot.OTCoupling()}
    for reg in args.regs:
        found[f"W-CFM {reg:g}"] = mbot.WeightedCoupling(reg)
        found[f"corrected {reg:g}"] = mbot.WeightedCoupling(reg, correction="sinkhorn")
    return found


def draw(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """8 gaussians and moons."""
    return flows.datasets.eight_gaussians(n, generator=generator), flows.datasets.moons(n, generator=generator)[0]


def picture(runs: dict[str, dict], args: argparse.Namespace, path: Path) -> None:
    """W2, NPE and tilt over reg, with FM and OT as levels."""
    plt = plotter()
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4))
    for ax, key, title in zip(axes, ("squared_w2", "npe", "tilt"), ("W2² to data", "NPE", "tilt of data"), strict=True):
        for kind, colour in (("W-CFM", "#b2182b"), ("corrected", "#1b7837")):
            values = [runs[f"{kind} {reg:g}"][key] for reg in args.regs]
            ax.plot(args.regs, values, "o-", color=colour, label=kind)
        for name, style in (("FM", ":"), ("OT", "--")):
            ax.axhline(runs[name][key], color="0.4", ls=style, label=name)
        ax.set(xscale="log", xlabel="reg", title=title)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.tight_layout()
    save_picture(figure, path)


def main() -> None:
    parser = arguments(__doc__, "wcfm_toys", data=False)
    parser.add_argument("--regs", nargs="+", type=float, default=(0.5, 1.0, 3.0, 10.0))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--points", type=int, default=2000)
    args = parser.parse_args()
    if args.quick:
        args.regs, args.steps, args.batch, args.points = (1.0, 10.0), 60, 128, 300
    generator = torch.Generator().manual_seed(args.seed + 1)
    x0, data = draw(args.points, generator)
    optimal = flows.metrics.squared_wasserstein2(x0, data)
    rows, runs = [], {}
    for name, coupling in couplings(args).items():
        diagnosis = flows.diagnose(coupling, *draw(1000, generator), generator=generator)
        torch.manual_seed(args.seed)
        model = train_flow(flows.models.ResidualMLP(2, width=64), coupling, draw,
                           steps=args.steps, batch=args.batch, seed=args.seed, name=name)  # fmt: skip
        runs[name] = {
            "squared_w2": flows.metrics.squared_wasserstein2(flows.integrate(model, x0).final, data),
            "npe": flows.metrics.normalized_path_energy(model, x0, optimal),
            "effective": diagnosis.effective,
            "tilt": diagnosis.tilt[1],
        }
        rows.append([name, *runs[name].values()])
    args.out.mkdir(parents=True, exist_ok=True)
    picture(runs, args, args.out / "wcfm_toys.png")
    page = (
        f"# W-CFM on 8 gaussians -> moons\n\n{args.steps:,} steps of batch {args.batch}; {args.points} points with the "
        "adaptive solver; effective sample size as a share of 1000 pairs, tilt as relative variance of the weight of "
        f"a data point (0: all count alike). Seed {args.seed}. No published values are known.\n\n"
        f"{table(['coupling', 'W2²', 'NPE', 'effective', 'tilt of data'], rows)}\n"
    )
    save("wcfm_toys", args, page, {"optimal_squared_w2": optimal, "couplings": runs})


if __name__ == "__main__":
    main()
