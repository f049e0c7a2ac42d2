"""Path energy and W2 of five couplings on 8 gaussians, against torchcfm trained in the same run with the same model.

    python benchmarks/flows_planar.py
    python benchmarks/flows_planar.py --steps 20000 --seeds 0 1 2 3 4     the published length

Protocol (Tong et al. 2024, arXiv 2302.00482, and the 2-D runner of torchcfm): MLP 3 × 64 SELU with the time appended,
AdamW 1e-3 with weight decay 1e-5, batch 512, sigma 0.1 (the bridge: 1), Euler with 101 time points. torchcfm is used
where it is installed (pip install --no-deps torchcfm); its couplings are drawn by numpy, which is seeded.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import mean, median, stdev

import numpy as np
import torch
from harness import write
from torch import Tensor, nn
from tqdm import tqdm

import flows
import mbot

# (problem, method) -> published NPE (mean, deviation); N -> 8 gaussians W2 is published for the bridge only
PUBLISHED = {
    ("N", "I-CFM"): "0.222 ± 0.032",
    ("N", "OT-CFM"): "0.018 ± 0.014",
    ("moons", "I-CFM"): "2.738 ± 0.181",
    ("moons", "OT-CFM"): "0.053 ± 0.035",
}


class Net(nn.Module):
    """torchcfm's MLP for the plane."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(3, 64), nn.SELU(), nn.Linear(64, 64), nn.SELU(), nn.Linear(64, 64), nn.SELU(), nn.Linear(64, 2)
        )

    def forward(self, t: Tensor, x: Tensor, y: object = None) -> Tensor:
        """Velocity; no conditions."""
        return self.body(torch.cat((x, t[:, None]), 1))


def draw(problem: str, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Noise, data, and the gaussian that each datum is nearest to (the condition of C²OT's coupling)."""
    if problem == "N":
        x0 = torch.randn(n, 2, generator=generator)
    else:
        x0, _ = flows.datasets.moons(n, generator=generator)
    x1 = flows.datasets.eight_gaussians(n, generator=generator)
    angle = torch.atan2(x1[:, 1], x1[:, 0])
    return x0, x1, (angle / (torch.pi / 4)).round().long() % 8


Sampler = Callable[[Tensor, Tensor, Tensor, torch.Generator], flows.FlowBatch]


def ours(method: str) -> Sampler:
    """A sampler of training batches by this library."""
    matcher = {
        "I-CFM": flows.FlowMatching(path=flows.LinearPath(sigma=0.1)),
        "OT-CFM": flows.FlowMatching(mbot.OTCoupling(), flows.LinearPath(sigma=0.1)),
        "SB-CFM": flows.FlowMatching(path=flows.SchrodingerBridgePath(sigma=1.0)),
        "C²OT": flows.FlowMatching(mbot.ConditionalOTCoupling(), flows.LinearPath(sigma=0.1)),
        "W-CFM": flows.FlowMatching(mbot.WeightedCoupling(reg=3.0), flows.LinearPath(sigma=0.1)),
    }[method]

    def sample(x0: Tensor, x1: Tensor, y: Tensor, generator: torch.Generator) -> flows.FlowBatch:
        batch = matcher.sample(x0, x1, y if method == "C²OT" else None, generator)
        return flows.FlowBatch(batch.t, batch.xt, batch.ut, None, batch.weight)

    return sample


def theirs(method: str) -> Sampler | None:
    """The same by torchcfm, where it is installed and has the method."""
    try:
        from torchcfm import conditional_flow_matching as cfm
    except ImportError:
        return None
    kinds = {
        "I-CFM": lambda: cfm.ConditionalFlowMatcher(sigma=0.1),
        "OT-CFM": lambda: cfm.ExactOptimalTransportConditionalFlowMatcher(sigma=0.1),
        "SB-CFM": lambda: cfm.SchrodingerBridgeConditionalFlowMatcher(sigma=1.0, ot_method="sinkhorn"),
    }
    if method not in kinds:
        return None
    matcher = kinds[method]()

    def sample(x0: Tensor, x1: Tensor, y: Tensor, generator: torch.Generator) -> flows.FlowBatch:
        t, xt, ut = matcher.sample_location_and_conditional_flow(x0, x1)
        return flows.FlowBatch(t, xt, ut)

    return sample


def run(problem: str, sample: Sampler, seed: int, steps: int, bar: tqdm) -> dict[str, float]:
    """Train one model and measure it."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  torchcfm's couplings
    generator = torch.Generator().manual_seed(seed)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-5)
    seconds = []
    for _ in range(steps):
        x0, x1, y = draw(problem, 512, generator)
        began = time.perf_counter()
        batch = sample(x0, x1, y, generator)
        seconds.append(time.perf_counter() - began)
        loss = flows.regression_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.update()
    x0, x1, _ = draw(problem, 4096, torch.Generator().manual_seed(seed + 1000))
    end = flows.integrate(model, x0, method="euler", steps=100).final
    optimal = flows.metrics.squared_wasserstein2(x0, x1)
    return {
        "NPE": flows.metrics.normalized_path_energy(model, x0, optimal),
        "W2": flows.metrics.wasserstein2(end, x1),
        "ms": 1000 * median(seconds),
    }


def spread(values: list[float]) -> str:
    text = f"{mean(values):.3f}"
    return f"{text} ± {stdev(values):.3f}" if len(values) > 1 else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    methods = ("I-CFM", "OT-CFM", "SB-CFM", "C²OT", "W-CFM")
    jobs = [(p, m, lib, s) for p in ("N", "moons") for m in methods for lib in ("ours", "torchcfm") for s in args.seeds]
    jobs = [job for job in jobs if job[2] == "ours" or theirs(job[1]) is not None]
    found: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    with tqdm(total=args.steps * len(jobs)) as bar:
        for problem, method, library, seed in jobs:
            sample = ours(method) if library == "ours" else theirs(method)
            assert sample is not None
            found.setdefault((problem, method, library), []).append(run(problem, sample, seed, args.steps, bar))
    tables = {}
    for problem, title in (("N", "normal → 8 gaussians"), ("moons", "moons → 8 gaussians")):
        rows = []
        for method in methods:
            mine, peer = found[problem, method, "ours"], found.get((problem, method, "torchcfm"))
            row = {"method": method, "NPE published": PUBLISHED.get((problem, method), "–")}
            for key in ("NPE", "W2"):
                row[f"{key}, torchcfm"] = spread([r[key] for r in peer]) if peer else "–"
                row[f"{key}, ours"] = spread([r[key] for r in mine])
            speed = mean(r["ms"] for r in mine)
            row["coupling ms/step, torchcfm"] = mean(r["ms"] for r in peer) if peer else "–"
            row["ours"] = speed
            row["ratio"] = mean(r["ms"] for r in peer) / speed if peer else "–"
            rows.append(row)
        tables[title] = rows
    notes = (
        f"{args.steps:,} steps of batch 512 (published: about 20,000), seeds {args.seeds}, mean ± deviation; NPE and "
        "W2 on 4,096 fresh points, Euler with 100 steps. The time is the median of drawing one coupled training batch "
        "(pairs, times, points on the path). C²OT is conditioned on the gaussian that a point belongs to, its model is "
        "not, so that it solves the same problem: it cannot be as straight as OT. W-CFM: temperature 3. torchcfm's "
        "SB-CFM runs with Sinkhorn; it draws pairs with replacement. N is a standard normal."
    )
    write("flows_planar", "Path energy and W2 in the plane", tables, notes)


if __name__ == "__main__":
    main()
