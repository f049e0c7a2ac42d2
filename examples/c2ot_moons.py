"""C²OT on 8 gaussians -> moons: every cell of the paper's Figure 1, measured beside published.

    python examples/c2ot_moons.py                       # all cells, 1 seed, 20,000 steps: an hour on 2 cores
    python examples/c2ot_moons.py --conditions class --couplings c2ot --seeds 0 1
    python examples/c2ot_moons.py --quick               # under a minute, figures that mean nothing

Protocol (Cheng and Schwing 2025, arXiv 2503.10636, and its official code): network batch 256 cut from OT batches of
1024, Adam at 3e-4, residual MLP, squared W2 between 10,000 generated and 10,000 fresh points, after one Euler step and
with dopri5 at tolerance 1e-4 (in chunks of 256; NFE is the mean over chunks). Finished runs are kept in the results
file and skipped when the command is repeated.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch
from common import machine, quick_flag, quick_note, spread
from torch import Tensor
from tqdm import tqdm

import flows
import mbot

CONDITIONS = ("none", "class", "x")
COUPLINGS = ("fm", "ot", "c2ot", "wcfm")

# (condition, coupling) -> squared W2 with Euler-1, with the adaptive solver (mean, std over 10 seeds), and the NFE.
# Figure 1 of the paper; NFE from its supplement (class only).
PUBLISHED = {
    ("none", "fm"): ((6.232, 0.186), (0.120, 0.045), None),
    ("none", "ot"): ((0.072, 0.025), (0.050, 0.040), None),
    ("class", "fm"): ((2.573, 0.112), (0.059, 0.029), 91.1),
    ("class", "ot"): ((0.483, 0.059), (0.462, 0.025), 32.9),
    ("class", "c2ot"): ((0.048, 0.010), (0.018, 0.006), 58.9),
    ("x", "fm"): ((0.732, 0.052), (0.028, 0.010), None),
    ("x", "ot"): ((8.276, 6.510), (2.143, 1.993), None),
    ("x", "c2ot"): ((0.077, 0.024), (0.013, 0.003), None),
}


@dataclass(frozen=True)
class Protocol:
    """Budget and settings of one run."""

    steps: int = 20_000
    batch: int = 256
    ot_batch: int = 1024
    lr: float = 3e-4
    target_ratio: float = 0.05
    reg: float = 3.0
    evaluate: int = 10_000
    sorted_fm: bool = False


def coupling_for(name: str, condition: str, protocol: Protocol) -> mbot.Coupling:
    """The coupling of one column of the table."""
    if name == "fm":
        return mbot.IndependentCoupling()
    if name == "wcfm":
        return mbot.WeightedCoupling(reg=protocol.reg)
    if name == "ot" or condition == "none":
        return mbot.OTCoupling()
    if condition == "class":
        return mbot.ConditionalOTCoupling("discrete")
    return mbot.ConditionalOTCoupling("continuous", target_ratio=protocol.target_ratio, condition_cost="sqeuclidean")


def draw(n: int, condition: str, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
    """Noise, data and conditions ``(n, 1)`` from the official toy's generators."""
    x0 = flows.datasets.eight_gaussians(n, generator=generator)
    x1, label = flows.datasets.moons(n, official=True, generator=generator)
    y = {"none": None, "class": label[:, None].float() * 2 - 1, "x": x1[:, :1]}[condition]
    return x0, x1, y


def train(
    name: str, condition: str, protocol: Protocol, seed: int, progress: bool = True
) -> tuple[torch.nn.Module, dict[str, float]]:
    """Train one model; returns it with the seconds spent and the seconds of coupling per step."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = flows.models.ResidualMLP(2, condition_dim=0 if condition == "none" else 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=protocol.lr, fused=True)
    matcher = flows.FlowMatching(coupling_for(name, condition, protocol))
    bar = tqdm(total=protocol.steps, desc=f"{condition}/{name} seed {seed}", disable=not progress, unit="step")
    began, coupling_seconds, step, loss = time.perf_counter(), 0.0, 0, torch.zeros(())
    while step < protocol.steps:
        x0, x1, y = draw(protocol.ot_batch, condition, generator)
        if not protocol.sorted_fm:  # official data come sorted; see --sorted-fm
            order = torch.randperm(len(x1), generator=generator)
            x1, y = x1[order], None if y is None else y[order]
        at = time.perf_counter()
        batch = matcher.sample(x0, x1, y, generator=generator)
        coupling_seconds += time.perf_counter() - at
        for piece in batch.split(protocol.batch):
            if step == protocol.steps:
                break
            optimizer.zero_grad()
            loss = flows.regression_loss(model, piece)
            loss.backward()
            optimizer.step()
            step += 1
            bar.update()
        if step % 500 < protocol.ot_batch // protocol.batch:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    bar.close()
    seconds = time.perf_counter() - began
    return model.eval(), {"train_seconds": seconds, "coupling_seconds_per_step": coupling_seconds / step}


def evaluate(model: torch.nn.Module, condition: str, protocol: Protocol, seed: int) -> dict[str, float]:
    """Squared W2 after one Euler step and with the adaptive solver, and the solver's mean NFE."""
    x0, x1, y = draw(protocol.evaluate, condition, torch.Generator().manual_seed(seed + 10_000))
    euler = flows.integrate(model, x0, y=y, method="euler", steps=1).final
    ends, evaluations = [], []
    for begin in range(0, len(x0), protocol.batch):
        part = slice(begin, begin + protocol.batch)
        solved = flows.integrate(model, x0[part], y=None if y is None else y[part], rtol=1e-4, atol=1e-4)
        ends.append(solved.final)
        evaluations.append(solved.nfe)
    return {
        "euler1": flows.metrics.squared_wasserstein2(euler, x1),
        "adaptive": flows.metrics.squared_wasserstein2(torch.cat(ends), x1),
        "nfe": mean(evaluations),
    }


def table(runs: list[dict]) -> str:
    """Markdown table of all finished cells beside the published values."""
    lines = [
        "| condition | coupling | seeds | Euler-1 W2² | published | adaptive W2² | published | NFE | published "
        "| coupling s/step |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for condition in CONDITIONS:
        for name in COUPLINGS:
            cell = [r for r in runs if r["condition"] == condition and r["coupling"] == name]
            if not cell:
                continue
            e, a, nfe = PUBLISHED.get((condition, name), (None, None, None))
            lines.append(
                f"| {condition} | {name} | {len(cell)} | {spread([r['euler1'] for r in cell])} "
                f"| {f'{e[0]:.3f} ± {e[1]:.3f}' if e else '–'} | {spread([r['adaptive'] for r in cell])} "
                f"| {f'{a[0]:.3f} ± {a[1]:.3f}' if a else '–'} | {spread([r['nfe'] for r in cell], 1)} "
                f"| {nfe or '–'} | {mean(r['coupling_seconds_per_step'] for r in cell):.4f} |"
            )
    return "\n".join(lines)


def report(runs: list[dict], protocol: Protocol) -> str:
    """The Markdown page written beside the JSON."""
    return "\n".join(
        [
            "# C²OT on 8 gaussians -> moons",
            "",
            f"Measured by `python examples/c2ot_moons.py` at {protocol.steps:,} steps; published: Figure 1 of "
            "arXiv 2503.10636 (mean ± std of 10 seeds). Squared W2 of "
            f"{protocol.evaluate:,} points; adaptive: dopri5 at 1e-4. All runs: the JSON beside this file.",
            "",
            table([r for r in runs if r.items() >= asdict(protocol).items()]),
            "",
            *([f"**{quick_note()}**", ""] if quick_note() else []),
            f"Machine: {machine()}.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conditions", nargs="+", choices=CONDITIONS, default=CONDITIONS)
    parser.add_argument("--couplings", nargs="+", choices=COUPLINGS, default=COUPLINGS[:3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=Protocol.steps)
    parser.add_argument("--target-ratio", type=float, default=Protocol.target_ratio, help="r of C²OT under x")
    parser.add_argument("--reg", type=float, default=Protocol.reg, help="temperature of W-CFM")
    parser.add_argument("--evaluate", type=int, default=Protocol.evaluate, help="points that W2 is measured on")
    parser.add_argument(
        "--sorted-fm",
        action="store_true",
        help="leave the data in the official toy's sorted order, so that each FM batch sees half an arc of one class",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/c2ot_moons"))
    quick_flag(parser)
    args = parser.parse_args()
    if args.quick:
        args.steps, args.evaluate = 8, 300
    protocol = Protocol(
        steps=args.steps,
        target_ratio=args.target_ratio,
        reg=args.reg,
        evaluate=args.evaluate,
        sorted_fm=args.sorted_fm,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "c2ot_moons.json"
    runs: list[dict] = json.loads(results.read_text())["runs"] if results.exists() else []
    for seed in args.seeds:
        for condition in args.conditions:
            for name in args.couplings:
                key = {"condition": condition, "coupling": name, "seed": seed, **asdict(protocol)}
                done = any(all(run.get(k) == v for k, v in key.items()) for run in runs)
                if done or (condition == "none" and name == "c2ot"):  # without conditions C²OT is OT
                    continue
                model, times = train(name, condition, protocol, seed)
                runs.append({**key, **times, **evaluate(model, condition, protocol, seed)})
                partial = results.with_suffix(".tmp")
                partial.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=1))
                partial.replace(results)
                (args.out / "c2ot_moons.md").write_text(report(runs, protocol))
    print(report(runs, protocol))
    print(f"written: {results} and {args.out / 'c2ot_moons.md'}")


if __name__ == "__main__":
    main()
