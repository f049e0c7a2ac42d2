"""Few steps that are placed well: Bellman step times of a trained flow against equal steps.

    python examples/boss_schedule.py            # 2 minutes

Trains a flow from a Gaussian to two moons with independent pairs (whose trajectories bend), finds the best K Euler step
times by dynamic programming (BOSS stage 1, Nguyen et al. 2024, arXiv 2312.16414), and optionally fine-tunes the field
so that its K jumps meet its own trajectory (stage 2, ``--straighten``). Measured: the programme's cost and the exact
squared W2 to data. The published figures are FIDs of image models and have no counterpart here.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from common import arguments, plotter, save, save_picture, table, train_flow
from torch import Tensor

import flows
import mbot
from flows.step_times import jump_costs, path_cost


def draw(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise and moons."""
    return torch.randn(n, 2, generator=generator), flows.datasets.moons(n, generator=generator)[0]


def picture(schedules: dict[int, Tensor], ends: dict[str, Tensor], notes: dict[str, str], path: Path) -> None:
    """Step times, and samples at the smallest K."""
    plt = plotter()
    figure, axes = plt.subplots(1, 1 + len(ends), figsize=(3.4 * (1 + len(ends)), 3.8))
    for row, (k, schedule) in enumerate(schedules.items()):
        axes[0].plot(schedule, [row] * (k + 1), "o-", color="#2166ac", ms=4)
        axes[0].plot(torch.linspace(0, 1, k + 1), [row - 0.25] * (k + 1), "|", color="0.5", ms=8)
    axes[0].set(yticks=range(len(schedules)), yticklabels=[f"K = {k}" for k in schedules], xlabel="time")
    axes[0].set_title("Bellman times (dots), equal (bars)", fontsize=10)
    axes[0].spines[["top", "right", "left"]].set_visible(False)
    for ax, (name, points) in zip(axes[1:], ends.items(), strict=True):
        ax.scatter(*points.T, s=3, lw=0, color="#2166ac")
        ax.set(xlim=(-6, 8), ylim=(-6, 6), xticks=[], yticks=[], aspect="equal")
        ax.set_title(f"{name}\n{notes[name]}", fontsize=10)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    save_picture(figure, path)


def main() -> None:
    parser = arguments(__doc__, "boss_schedule", data=False)
    parser.add_argument("--steps", type=int, default=3000, help="of training")
    parser.add_argument("--counts", nargs="+", type=int, default=(3, 4, 6, 8), help="K")
    parser.add_argument("--grid", type=int, default=100)
    parser.add_argument("--points", type=int, default=2000)
    parser.add_argument("--straighten", type=int, default=0, metavar="ITERATIONS", help="of stage 2; 0 leaves it out")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.counts, args.points = 150, (3, 6), 400
    torch.manual_seed(args.seed)
    model = train_flow(flows.models.ResidualMLP(2, width=64), mbot.IndependentCoupling(), draw,
                       steps=args.steps, seed=args.seed, name="training")  # fmt: skip
    generator = torch.Generator().manual_seed(args.seed + 1)
    x0, data = draw(args.points, generator)
    rollout, _ = draw(100, generator)
    costs = jump_costs(model, rollout, grid=args.grid)
    fine = flows.metrics.squared_wasserstein2(flows.integrate(model, x0).final, data)

    def end(field: torch.nn.Module, times: Tensor) -> Tensor:
        return flows.integrate(field, x0, method="euler", times=times).final

    rows, runs, schedules, ends, notes = [], [], {}, {}, {}
    for k in args.counts:
        schedule, equal = flows.bellman_schedule(model, rollout, steps=k, grid=args.grid), torch.linspace(0, 1, k + 1)
        schedules[k] = schedule
        found = {"equal steps": end(model, equal), "Bellman": end(model, schedule)}
        if args.straighten:
            tuned = copy.deepcopy(model)
            flows.straighten(tuned, draw(2000, generator)[0], schedule, iterations=args.straighten,
                             generator=torch.Generator().manual_seed(args.seed))  # fmt: skip
            found["Bellman, fine-tuned"] = end(tuned.eval(), schedule)
        w2 = {name: flows.metrics.squared_wasserstein2(points, data) for name, points in found.items()}
        if k == min(args.counts):
            ends, notes = found, {name: f"K = {k}, W2² {value:.3f}" for name, value in w2.items()}
        cost_of_equal, cost = (path_cost(costs, times) for times in (equal, schedule))
        rows.append([k, cost_of_equal, cost, *w2.values()])
        runs.append({"steps": k, "uniform_cost": cost_of_equal, "cost": cost, "squared_w2": w2,
                     "times": schedule.tolist()})  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    picture(schedules, ends, notes, args.out / "boss_schedule.png")
    header = ["K", "cost of equal steps", "Bellman cost", *(f"W2², {name}" for name in ends)]
    page = (
        f"# Bellman step times on noise -> moons\n\n{args.steps:,} training steps with independent pairs; squared W2 "
        f"of {args.points} points after K Euler steps; the adaptive solver reaches {fine:.3g}. The programme minimises "
        "the sum of squared local errors on 100 noises, so its own cost never exceeds that of equal steps; W2 is not "
        f"what it minimises. Seed {args.seed}.\n\n{table(header, rows)}\n"
    )
    save("boss_schedule", args, page, {"adaptive_squared_w2": fine, "schedules": runs})


if __name__ == "__main__":
    main()
