"""Flow matching in the plane with six couplings and paths: path energy and W2 beside the published values.

    python examples/cfm_2d.py                                          # 1,500 steps: 4 minutes
    python examples/cfm_2d.py --steps 20000 --seeds 0 1 2 3 4          # the published length, hours
    python examples/cfm_2d.py --problems N-moons --methods I-CFM OT-CFM

Protocol of Tong et al. 2024 (arXiv 2302.00482) and the 2-D runner of torchcfm: MLP 3 × 64 SELU with the time
appended, AdamW at 1e-3 with weight decay 1e-5, batch 512, sigma 0.1 (the bridge: 1), Euler with 101 time points. NPE is
the excess of the path energy over optimal transport, as a share of it: 0 is optimal. C²OT pairs inside classes (the
gaussian, the moon) and W-CFM weighs pairs; neither is in that paper. No model is told the class, so that all rows solve
one problem: C²OT, which keeps the noise of each class whole, cannot be as straight as OT here; the problem it is made
for is in examples/c2ot_moons.py. torchcfm itself is in the same table in benchmarks/flows_planar.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import arguments, plotter, save, save_picture, spread, table
from torch import Tensor, nn
from tqdm import tqdm

import flows
import mbot

PROBLEMS = {"N-gaussians": "N → 8 gaussians", "moons-gaussians": "moons → 8 gaussians", "N-moons": "N → moons"}
METHODS = ("I-CFM", "FM", "OT-CFM", "SB-CFM", "C²OT", "W-CFM")

# Tong et al. 2024, mean and deviation of 5 seeds; W2 is the root. Other cells of its tables are not known to us.
PUBLISHED_NPE = {
    ("N-gaussians", "I-CFM"): "0.222 ± 0.032",
    ("N-gaussians", "FM"): "0.174",
    ("N-gaussians", "OT-CFM"): "0.018 ± 0.014",
    ("moons-gaussians", "I-CFM"): "2.738 ± 0.181",
    ("moons-gaussians", "OT-CFM"): "0.053 ± 0.035",
}
PUBLISHED_W2 = {
    ("N-gaussians", "SB-CFM"): "0.454 ± 0.164",
    ("N-moons", "I-CFM"): "0.338 ± 0.109",
    ("N-moons", "FM"): "0.246",
    ("N-moons", "OT-CFM"): "0.239 ± 0.048",
}


class PlanarMLP(nn.Module):
    """torchcfm's network for the plane; conditions are not looked at."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(3, width), nn.SELU(), nn.Linear(width, width), nn.SELU(), nn.Linear(width, width), nn.SELU(),
            nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, t: Tensor, x: Tensor, y: object = None) -> Tensor:
        """Velocity at times ``(B,)`` and points ``(B, 2)``."""
        return self.body(torch.cat((x, t[:, None]), 1))


def matcher(method: str, reg: float = 3.0) -> flows.FlowMatching:
    """The coupling and path of a row; ``reg`` is the temperature of W-CFM."""
    linear = flows.LinearPath(sigma=0.1)
    return {
        "I-CFM": lambda: flows.FlowMatching(path=linear),
        "FM": lambda: flows.FlowMatching(path=flows.TargetPath(sigma=0.1)),
        "OT-CFM": lambda: flows.FlowMatching(mbot.OTCoupling(), linear),
        "SB-CFM": lambda: flows.FlowMatching(path=flows.SchrodingerBridgePath(sigma=1.0)),  # couples by itself
        "C²OT": lambda: flows.FlowMatching(mbot.ConditionalOTCoupling(), linear),
        "W-CFM": lambda: flows.FlowMatching(mbot.WeightedCoupling(reg), linear),
    }[method]()


def draw(problem: str, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Source points, target points, and the classes of the latter (the nearest gaussian, or the moon)."""
    source, target = problem.split("-")
    x0 = torch.randn(n, 2, generator=generator)
    if source == "moons":
        x0, _ = flows.datasets.moons(n, generator=generator)
    if target == "moons":
        return x0, *flows.datasets.moons(n, generator=generator)
    x1 = flows.datasets.eight_gaussians(n, generator=generator)
    return x0, x1, (torch.atan2(x1[:, 1], x1[:, 0]) / (torch.pi / 4)).round().long() % 8


def train(problem: str, method: str, seed: int, args: argparse.Namespace) -> nn.Module:
    """One model."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = PlanarMLP()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-5)
    matching = matcher(method, args.reg)
    for _ in tqdm(range(args.steps), desc=f"{problem} {method}, seed {seed}", unit="step"):
        optimizer.zero_grad()
        matching.loss(model, *draw(problem, args.batch, generator), generator=generator).backward()
        optimizer.step()
    return model.eval()


def measure(problem: str, model: nn.Module, seed: int, points: int) -> dict[str, float]:
    """NPE, and W2 between generated and fresh points, with 100 Euler steps."""
    x0, x1, _ = draw(problem, points, torch.Generator().manual_seed(seed + 1000))
    end = flows.integrate(model, x0, method="euler", steps=100).final
    optimal = flows.metrics.squared_wasserstein2(x0, x1)
    return {
        "npe": flows.metrics.normalized_path_energy(model, x0, optimal),
        "w2": flows.metrics.wasserstein2(end, x1),
        "floor": flows.metrics.wasserstein2(x1, draw(problem, points, torch.Generator().manual_seed(seed + 2000))[1]),
    }


def picture(models: dict[tuple[str, str], nn.Module], args: argparse.Namespace, path: Path) -> None:
    """Trajectories: a row a problem, a column a method."""
    from matplotlib.collections import LineCollection

    plt = plotter()
    size = (1.9 * len(args.methods), 2.0 * len(args.problems) + 0.3)
    figure, axes = plt.subplots(len(args.problems), len(args.methods), figsize=size, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[], xlim=(-7, 7), ylim=(-7, 7), aspect="equal")
        ax.spines[:].set_visible(False)
    for row, problem in enumerate(args.problems):
        x0, _, _ = draw(problem, 250, torch.Generator().manual_seed(5))
        axes[row, 0].set_ylabel(PROBLEMS[problem])
        for column, method in enumerate(args.methods):
            axes[0, column].set_title(method)
            if (problem, method) not in models:
                continue
            x = flows.integrate(models[problem, method], x0, method="euler", steps=100).x[::4]
            ax = axes[row, column]
            ax.add_collection(LineCollection(x.transpose(0, 1).numpy(), colors="0.65", linewidths=0.4))
            ax.scatter(*x[0].T, s=2, color="#b2182b", lw=0, zorder=2)
            ax.scatter(*x[-1].T, s=2, color="#2166ac", lw=0, zorder=3)
    figure.tight_layout()
    save_picture(figure, path, dpi=100)


def main() -> None:
    parser = arguments(__doc__, "cfm_2d", data=False)
    parser.add_argument("--seeds", nargs="+", type=int, help="several runs of each cell (default: --seed)")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--points", type=int, default=4096, help="points that NPE and W2 are measured on")
    parser.add_argument("--reg", type=float, default=3.0, help="temperature of W-CFM")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.batch, args.points = 150, 128, 300
    args.seeds = args.seeds or [args.seed]
    models: dict[tuple[str, str], nn.Module] = {}
    runs, tables = [], []
    for problem in args.problems:
        rows = []
        for method in args.methods:
            if method == "FM" and not problem.startswith("N-"):
                continue  # its path starts from a standard normal
            cell = []
            for seed in args.seeds:
                model = train(problem, method, seed, args)
                models.setdefault((problem, method), model)
                cell.append({"problem": problem, "method": method, "seed": seed,
                             **measure(problem, model, seed, args.points)})  # fmt: skip
            runs += cell
            key = (problem, method)
            rows.append([method, spread([r["npe"] for r in cell]), PUBLISHED_NPE.get(key, "–"),
                         spread([r["w2"] for r in cell]), PUBLISHED_W2.get(key, "–")])  # fmt: skip
        floor = spread([r["floor"] for r in runs if r["problem"] == problem and r["method"] == args.methods[0]])
        head = ["method", "NPE", "published NPE", "W2", "published W2"]
        tables.append(f"## {PROBLEMS[problem]}\n\nTwo fresh samples are {floor} apart.\n\n{table(head, rows)}\n")
    args.out.mkdir(parents=True, exist_ok=True)
    picture(models, args, args.out / "cfm_2d.png")
    page = (
        f"# Flow matching in the plane\n\n{args.steps:,} steps of batch {args.batch} (published: about 20,000), seeds "
        f"{args.seeds} (published: 5); NPE and W2 (with its root) on {args.points:,} fresh points, 100 Euler "
        f"steps. W-CFM: temperature {args.reg:g}. N is a standard normal.\n\n" + "\n".join(tables)
    )
    save("cfm_2d", args, page, {"runs": runs})


if __name__ == "__main__":
    main()
