"""Path energy and W2 of five couplings on 8 gaussians, against torchcfm trained in the same run with the same model.

    python benchmarks/flows_planar.py                                  1,500 steps, 3 seeds: half an hour on one core
    python benchmarks/flows_planar.py --steps 20000 --seeds 0 1 2 3 4  the published length

Protocol (Tong et al. 2024, arXiv 2302.00482, and the 2-D runner of torchcfm): MLP 3 × 64 SELU with the time appended,
AdamW 1e-3 with weight decay 1e-5, batch 512, sigma 0.1 (the bridge: 1), Euler with 101 time points.

The comparison is paired: for one seed both libraries start from the same weights and see the same data in the same
order; where a coupling draws no random numbers, times and path noise are the same numbers too. Differences are then
judged by a paired t-test over the seeds. torchcfm is used where it is installed (pip install --no-deps torchcfm); its
pairs are drawn by numpy, which is seeded. Times are the processor's, of both libraries in turn on the same batches.
Finished runs are kept in ``--out`` and skipped when the command is repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from harness import medians, write
from scipy.stats import ttest_rel
from torch import Tensor
from tqdm import tqdm

import flows
import mbot

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from cfm_2d import PUBLISHED_NPE, PlanarMLP

METHODS = ("I-CFM", "OT-CFM", "SB-CFM", "C²OT", "W-CFM")
PROBLEMS = {"N": "normal → 8 gaussians", "moons": "moons → 8 gaussians"}
BATCH = 512


def draw(problem: str, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Noise, data, and the gaussian that each datum is nearest to (the condition of C²OT's coupling)."""
    if problem == "N":
        x0 = torch.randn(n, 2, generator=generator)
    else:
        x0, _ = flows.datasets.moons(n, generator=generator)
    x1 = flows.datasets.eight_gaussians(n, generator=generator)
    angle = torch.atan2(x1[:, 1], x1[:, 0])
    return x0, x1, (angle / (torch.pi / 4)).round().long() % 8


Sampler = Callable[[Tensor, Tensor, Tensor], flows.FlowBatch]  # randomness from torch's default generator


def ours(method: str) -> Sampler:
    """A sampler of training batches by this library."""
    matcher = {
        "I-CFM": flows.FlowMatching(path=flows.LinearPath(sigma=0.1)),
        "OT-CFM": flows.FlowMatching(mbot.OTCoupling(), flows.LinearPath(sigma=0.1)),
        "SB-CFM": flows.FlowMatching(path=flows.SchrodingerBridgePath(sigma=1.0)),
        "C²OT": flows.FlowMatching(mbot.ConditionalOTCoupling(), flows.LinearPath(sigma=0.1)),
        "W-CFM": flows.FlowMatching(mbot.WeightedCoupling(reg=3.0), flows.LinearPath(sigma=0.1)),
    }[method]

    def sample(x0: Tensor, x1: Tensor, y: Tensor) -> flows.FlowBatch:
        batch = matcher.sample(x0, x1, y if method == "C²OT" else None)
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

    def sample(x0: Tensor, x1: Tensor, y: Tensor) -> flows.FlowBatch:
        return flows.FlowBatch(*matcher.sample_location_and_conditional_flow(x0, x1))

    return sample


def run(problem: str, sample: Sampler, seed: int, steps: int, bar: tqdm) -> dict[str, float]:
    """Train one model and measure it."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  torchcfm's couplings
    data = torch.Generator().manual_seed(seed)
    model = PlanarMLP()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-5)
    for _ in range(steps):
        loss = flows.regression_loss(model, sample(*draw(problem, BATCH, data)))
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
    }


def milliseconds(problem: str, method: str, repeats: int) -> dict[str, float]:
    """Processor time of one coupled training batch (pairs, times, points on the path), by library."""
    found = {"ours": ours(method), "torchcfm": theirs(method)}
    streams = {name: torch.Generator().manual_seed(0) for name in found}

    def once(name: str, sample: Sampler) -> Callable[[], object]:
        batches = [draw(problem, BATCH, streams[name]) for _ in range(repeats + 2)]
        return lambda: sample(*batches.pop())

    todo = {name: once(name, sample) for name, sample in found.items() if sample is not None}
    return {k: 1000 * v for k, v in medians(todo, repeats=repeats, warmup=2, clock=time.process_time).items()}


def spread(values: Sequence[float]) -> str:
    text = f"{mean(values):.3f}"
    return f"{text} ± {stdev(values):.3f}" if len(values) > 1 else text


def judged(mine: Sequence[float], peer: Sequence[float]) -> str:
    """Which is lower, by a paired t-test over seeds at 5 %."""
    if len(mine) < 3:
        return "too few seeds"
    p = float(ttest_rel(mine, peer).pvalue)
    verdict = "equal" if not p < 0.05 else "ours lower" if mean(mine) < mean(peer) else "ours higher"
    return f"{mean(a - b for a, b in zip(mine, peer, strict=True)):+.3f}, {verdict}" + (
        f" (p {p:.2f})" if p == p else ""
    )


def rows(
    problem: str, methods: Sequence[str], found: dict[str, dict[str, float]], seeds: Sequence[int], repeats: int
) -> list[dict[str, object]]:
    """The table of one problem."""
    table = []
    for method in methods:
        mine, peer = (
            [found[key] for seed in seeds if (key := f"{problem}/{method}/{library}/{seed}") in found]
            for library in ("ours", "torchcfm")
        )
        row: dict[str, object] = {
            "method": method,
            "NPE published": PUBLISHED_NPE.get((f"{problem}-gaussians", method), "–"),
        }
        for key in ("NPE", "W2"):
            values = [[r[key] for r in part] for part in (mine, peer)]
            row[f"{key}, torchcfm"] = spread(values[1]) if peer else "–"
            row[f"{key}, ours"] = spread(values[0])
            row[f"{key}, difference"] = judged(*values) if peer else "–"
        speed = milliseconds(problem, method, repeats)
        row["ms a batch, torchcfm"] = speed.get("torchcfm", "–")
        row["ms, ours"] = speed["ours"]
        row["ratio"] = speed["torchcfm"] / speed["ours"] if "torchcfm" in speed and method != "I-CFM" else "–"
        table.append(row)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--repeats", type=int, default=25, help="timed batches")
    parser.add_argument("--out", type=Path, help="finished runs; default runs/flows_planar_STEPS.json")
    args = parser.parse_args()
    out = args.out or Path(f"runs/flows_planar_{args.steps}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(out.read_text()) if out.exists() else {}
    libraries = {"ours": ours, "torchcfm": theirs}
    jobs = [(s, p, m, lib) for s in args.seeds for p in args.problems for m in args.methods for lib in libraries]
    jobs = [job for job in jobs if f"{job[1]}/{job[2]}/{job[3]}/{job[0]}" not in found]
    jobs = [job for job in jobs if libraries[job[3]](job[2]) is not None]
    with tqdm(total=args.steps * len(jobs)) as bar:
        for seed, problem, method, library in jobs:
            sample = libraries[library](method)
            assert sample is not None
            found[f"{problem}/{method}/{library}/{seed}"] = run(problem, sample, seed, args.steps, bar)
            out.write_text(json.dumps(found, indent=1) + "\n")
    notes = (
        f"{args.steps:,} steps of batch {BATCH} (published: about 20,000), seeds {args.seeds}, mean ± deviation; NPE "
        "and W2 on 4,096 fresh points, Euler with 100 steps. Both libraries start from the same weights and see the "
        "same data; the difference is ours minus torchcfm, judged by a paired t-test over seeds at 5 %. The time is "
        "the processor's median for one coupled training batch (pairs, times, points on the path); I-CFM has no pairs. "
        "C²OT is conditioned on the gaussian that a point belongs to, its model is not, so that it solves the same "
        "problem: it cannot be as straight as OT. W-CFM: temperature 3. torchcfm's SB-CFM runs with Sinkhorn; torchcfm "
        "draws pairs with replacement, ours use every sample once. N is a standard normal."
    )
    tables = {PROBLEMS[p]: rows(p, args.methods, found, args.seeds, args.repeats) for p in args.problems}
    write("flows_planar", "Path energy and W2 in the plane", tables, notes)


if __name__ == "__main__":
    main()
