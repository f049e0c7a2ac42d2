"""Cells at a time that was never shown: leave-one-timepoint-out on a single-cell time series.

    python examples/single_cell.py --data DATA/single_cell/emt_a549_10d.npz
    python examples/single_cell.py                      # a small series that is made here: cells that split in two

The file holds coordinates ``x`` (N, d) and time labels ``t`` (N,). For each inner time, a flow is trained on the steps
between the other times (the gap is bridged by one step), the cells of the time before are pushed to the left-out time,
and the earth mover's distance to its true cells is measured (Tong et al. 2024, arXiv 2302.00482, section 5.2: an MLP
3 × 64 SELU, sigma 0.1, whitened coordinates). Two rows need no training: the cells of the time before, unmoved, and the
middle of OT pairs of the two neighbours.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

import torch
from common import quick_flag, quick_note
from torch import Tensor, nn
from tqdm import tqdm

import flows
import mbot

# Tong et al. 2024, Table 5: mean over left-out times of the data sets CITE (100-d), EB (5-d) and Multi (100-d)
PUBLISHED = {"I-CFM": "0.965 / 0.872 / 1.085", "OT-CFM": "0.882 / 0.790 / 0.937", "SB-CFM": "1.067 / 1.221 / 1.129"}


class Net(nn.Module):
    """The published MLP, time appended."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        widths = [dim + 1, 64, 64, 64]
        layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.SELU())]
        self.body = nn.Sequential(*layers, nn.Linear(64, dim))

    def forward(self, t: Tensor, x: Tensor, y: object = None) -> Tensor:
        """Velocity; no conditions."""
        return self.body(torch.cat((x, t[:, None]), 1))


def made_series(cells: int, times: int = 5, dim: int = 5, seed: int = 0) -> flows.datasets.CellSeries:
    """Cells that move along an arc and split into two fates, ``cells`` a time, in ``dim`` coordinates."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.arange(times).repeat_interleave(cells)
    age = t + 0.3 * torch.randn(len(t), generator=generator)  # cells of one time are not of one age
    fate = torch.randint(2, (len(t),), generator=generator) * 2 - 1
    x = 0.4 * torch.randn(len(t), dim, generator=generator)
    x[:, 0] += 3 * (age / times * 2).sin()
    x[:, 1] += fate * (age - times / 2).clamp_min(0)
    x[:, 2] += age
    return flows.datasets.CellSeries((x - x.mean(0)) / x.std(0), t)


def matchers() -> dict[str, flows.FlowMatching]:
    """The three methods of the published table."""
    line = flows.LinearPath(sigma=0.1)
    return {
        "I-CFM": flows.FlowMatching(path=line),
        "OT-CFM": flows.FlowMatching(mbot.OTCoupling(), line),
        "SB-CFM": flows.FlowMatching(path=flows.SchrodingerBridgePath(sigma=1.0)),
    }


def predict(
    matcher: flows.FlowMatching, series: flows.datasets.CellSeries, held: int, seed: int, steps: int, batch: int
) -> Tensor:
    """Train without the time ``held`` and push the cells before it there."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    intervals, _ = series.leave_out(held)
    model = Net(series.x.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-5)
    for _ in range(steps):
        loss = torch.zeros(())
        for begin, end in intervals:
            ends = [series.at(time) for time in (begin, end)]
            x0, x1 = (cells[torch.randint(len(cells), (batch,), generator=generator)] for cells in ends)
            points = matcher.sample(x0, x1, generator=generator)
            span = end - begin
            points = replace(points, t=begin + span * points.t, ut=points.ut / span)
            loss = loss + flows.regression_loss(model, points)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    times = torch.linspace(held - 1, held, 101)
    return flows.integrate(model.eval(), series.at(held - 1), method="euler", times=times).final


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="an .npz file; by default a small series is made")
    parser.add_argument("--dims", type=int, help="leading coordinates to keep")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/single_cell"))
    quick_flag(parser)
    args = parser.parse_args()
    if args.quick:
        args.steps, args.seeds = 3, args.seeds[:1]
    if args.data is None:
        series, stem = made_series(60 if args.quick else 300, dim=args.dims or 5), "made"
    else:
        series, stem = flows.datasets.CellSeries.load(args.data, dims=args.dims, whiten=True), args.data.stem
    inner = range(1, series.times - 1)
    if not inner:
        raise SystemExit(f"{args.data} has {series.times} times; leaving one out needs three")
    errors: dict[str, dict[int, list[float]]] = {}
    for held in inner:
        before, after, truth = (series.at(held + shift) for shift in (-1, 1, 0))
        n = min(len(before), len(after))
        generator = torch.Generator().manual_seed(0)
        some = [cells[torch.randperm(len(cells), generator=generator)[:n]] for cells in (before, after)]
        start, end = mbot.OTCoupling()(*some).apply(*some)
        errors.setdefault("unmoved", {})[held] = [flows.metrics.wasserstein1(before, truth)]
        errors.setdefault("middle of OT pairs", {})[held] = [flows.metrics.wasserstein1((start + end) / 2, truth)]
    jobs = [
        (name, matcher, held, seed) for name, matcher in matchers().items() for held in inner for seed in args.seeds
    ]
    for name, matcher, held, seed in tqdm(jobs):
        predicted = predict(matcher, series, held, seed, args.steps, args.batch)
        errors.setdefault(name, {}).setdefault(held, []).append(flows.metrics.wasserstein1(predicted, series.at(held)))
    lines = [
        f"# Leave one time out: {'a series made here' if args.data is None else args.data.name}",
        "",
        f"Earth mover's distance to the left-out cells, mean ± deviation over seeds {args.seeds}; {args.steps:,} steps "
        f"of batch {args.batch} an interval, whitened coordinates ({series.x.shape[1]}-d, {len(series.x):,} cells, "
        f"{series.times} times). Published figures are for other data sets (CITE / EB / Multi): only the order of the "
        "methods can be compared.",
        "",
        "| method | " + " | ".join(f"t = {held}" for held in inner) + " | mean | published, other data |",
        "|" + " --- |" * (len(inner) + 3),
    ]
    for name, by_time in errors.items():
        cells = [
            f"{mean(by_time[held]):.3f}" + (f" ± {stdev(by_time[held]):.3f}" if len(by_time[held]) > 1 else "")
            for held in inner
        ]
        average = mean(mean(values) for values in by_time.values())
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {average:.3f} | {PUBLISHED.get(name, '–')} |")
    lines += ["", f"**{quick_note()}**"] if args.quick else []
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"single_cell_{stem}"
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    stem.with_suffix(".json").write_text(json.dumps({"steps": args.steps, "errors": errors}, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
