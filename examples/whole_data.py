"""Whole-data couplings: each image with a noise of its own, beside mini-batch couplings, in few steps of the solver.

    python examples/whole_data.py --quick
    python examples/whole_data.py --seeds 0 1 2                    # scikit-learn's digits, minutes
    python examples/whole_data.py --data-root data --steps 4000    # MNIST's 60,000 images

Flows live in 64 principal components and are conditioned on the class. Independent pairs and batches of 1024 (OT, and
C²OT inside classes) draw fresh noise for every batch; `mbot.DataCoupling` matches one noise to each image over the
whole data set: fixed, or exchanged inside training batches and replaced every few epochs; over all classes, or inside
each. Measured with Euler-1, 2, 4 and the adaptive solver, from fresh noise: Fréchet distance of a small classifier's
features to the images, and the share in which it finds the class asked for. A fixed noise can be learned by heart:
"loss, fresh / seen" is the loss on pairs of new noises, matched in the same way, over that on the noises served;
"nearest" is the mean distance of adaptive samples to the nearest training image, over that of held-out images.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from common import arguments, save, spread, table
from couplings_on_digits import Components
from torch import Tensor
from torch.utils.data import TensorDataset
from tqdm import tqdm

import flows
import mbot
from flows import build, evaluation
from flows.config import TrainConfig
from flows.matching import along_path, regression_loss

SOLVERS: dict[str, dict[str, Any]] = {
    "Euler-1": {"method": "euler", "steps": 1},
    "Euler-2": {"method": "euler", "steps": 2},
    "Euler-4": {"method": "euler", "steps": 4},
    "adaptive": {"method": "dopri5"},
}


def methods(args: argparse.Namespace) -> dict[str, tuple[mbot.Coupling, int]]:
    """Couplings, and the OT batch of each."""
    moving = {"exchange": True, "refresh": args.refresh}
    return {
        "FM": (mbot.IndependentCoupling(), args.batch),
        "OT": (mbot.OTCoupling(), args.ot_batch),
        "C²OT": (mbot.ConditionalOTCoupling(), args.ot_batch),
        "whole, fixed": (mbot.DataCoupling(exchange=False), args.batch),
        "whole, moving": (mbot.DataCoupling(**moving), args.batch),
        "whole, fixed, by class": (mbot.DataCoupling(exchange=False, conditional=True), args.batch),
        "whole, moving, by class": (mbot.DataCoupling(conditional=True, **moving), args.batch),
    }


def fitted(coupling: Any, codes: Tensor, labels: Tensor, seed: int) -> mbot.Coupling:
    """A coupling with noises for these data, where it brings its own."""
    generator = torch.Generator().manual_seed(seed)
    return coupling.fit(codes, labels, generator=generator) if coupling.brings_noise else coupling


def pairs(loader: flows.CoupledLoader, count: int) -> flows.CoupledBatch:
    """So many pairs that a loader serves."""
    batches = [loader.next_batch() for _ in range(-(-count // loader.batch_size))]
    loader.close()
    return flows.CoupledBatch(*(torch.cat([getattr(b, name) for b in batches]) for name in ("x0", "x1", "y")))


@torch.no_grad()
def loss_on(model: torch.nn.Module, batch: flows.CoupledBatch) -> float:
    """Flow-matching loss on given pairs, at the same times for all."""
    generator = torch.Generator().manual_seed(1)
    points = [along_path(flows.LinearPath(), batch.x0, batch.x1, generator) for _ in range(4)]
    losses = [regression_loss(lambda t, x, _: model(t, x, batch.y), part) for part in points]
    return float(torch.stack(losses).mean())


def one_run(args: argparse.Namespace, name: str, seed: int, data: dict[str, Any]) -> dict[str, Any]:
    """Train with one coupling, and measure."""
    coupling, ot_batch = methods(args)[name]
    codes, labels = data["codes"], data["labels"]

    def loader(seed: int) -> flows.CoupledLoader:
        paired, largest = fitted(coupling, codes, labels, seed), len(codes) // args.batch * args.batch
        return flows.CoupledLoader(
            TensorDataset(codes, labels), None, paired, args.batch, min(ot_batch, largest), seed=seed
        )

    began = time.process_time()
    torch.manual_seed(seed)
    model = flows.models.ResidualMLP(codes.shape[1], num_classes=10, width=args.width, depth=3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = flows.warmup_schedule(optimizer, warmup=50, steps=args.steps)
    trainer = flows.Trainer(
        model, loader(seed), steps=args.steps, optimizer=optimizer, scheduler=schedule, seed=seed, ema=0.999,
        progress=False,
    )  # fmt: skip
    trainer.fit()
    seconds = time.process_time() - began
    model = trainer.sampling_model.eval()
    served, fresh = pairs(trainer.loader, args.samples), pairs(loader(seed + 1000), args.samples)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(args.samples, codes.shape[1], generator=generator)
    y = labels[torch.randint(len(labels), (args.samples,), generator=generator)]
    found: dict[str, Any] = {"method": name, "seed": seed, "seconds": seconds, "rows": {}}
    for solver, settings in SOLVERS.items():
        end = flows.integrate(model, noise, y=y, **settings)
        images = data["decode"](end.final)
        found["rows"][solver] = {
            "Fréchet": flows.metrics.frechet_distance(data["judge"].features(images).detach(), data["features"]),
            "consistency": flows.metrics.condition_consistency(data["judge"], images, y).accuracy,
        }
    found["nfe"] = float(end.nfe)
    found["fresh / seen"] = loss_on(model, fresh) / loss_on(model, served)
    found["nearest"] = float(nearest(end.final, codes).mean() / nearest(data["held out"], codes).mean())
    found["cost"] = float((served.x0 - served.x1).square().sum(1).mean())
    return found


def nearest(x: Tensor, data: Tensor) -> Tensor:
    """Distance of each sample to the nearest of the data."""
    return torch.cat([torch.cdist(part, data).amin(1) for part in x.split(500)])


def load(args: argparse.Namespace) -> dict[str, Any]:
    """The images as principal components, a classifier, and what samples are compared with."""
    name = "mnist" if args.data_root else "digits"
    task = build.load_task(TrainConfig(data=name, data_root=args.data_root))
    judge, accuracy = evaluation.train_classifier(task, 0, steps=50 if args.quick else 500)
    images, labels = task.dataset.rows(torch.randperm(len(task.dataset), generator=torch.Generator().manual_seed(0)))
    held = len(images) // 6
    basis = Components(images[held:][:20_000], min(args.components, images[0].numel()))
    codes = basis.encode(images)
    features = torch.cat([judge.features(part).detach() for part in images[:10_000].split(500)])
    print(f"{len(images) - held} {name} to train on, {held} held out; classifier {accuracy:.1%} right", flush=True)
    return {
        "name": name, "judge": judge, "decode": basis.decode, "features": features,
        "held out": codes[:held][: args.samples], "codes": codes[held:], "labels": labels[held:],
    }  # fmt: skip


def report(args: argparse.Namespace, data: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    """The page: a table for each measure, and one of what fixed noise does."""
    mine = {name: [run for run in runs if run["method"] == name] for name in methods(args)}
    mine = {name: found for name, found in mine.items() if found}
    parts = []
    for measure, digits in (("Fréchet", 2), ("consistency", 3)):
        rows = [[name, *(spread([r["rows"][s][measure] for r in found], digits) for s in SOLVERS)]
                for name, found in mine.items()]  # fmt: skip
        parts.append(f"## {measure}\n\n{table(['coupling', *SOLVERS], rows)}\n")
    columns = {"cost of its pairs": "cost", "loss, fresh / seen": "fresh / seen", "nearest": "nearest",
               "adaptive NFE": "nfe", "CPU seconds": "seconds"}  # fmt: skip
    rows = [[name, *(spread([r[key] for r in found], 0 if key in ("nfe", "seconds") else 2)
                     for key in columns.values())] for name, found in mine.items()]  # fmt: skip
    parts.append(f"## What fixed noise does\n\n{table(['coupling', *columns], rows)}\n")
    return (
        f"# Whole-data couplings on {data['name']}\n\n"
        f"{len(data['codes']):,} images in {data['codes'].shape[1]} principal components, MLP of 3 blocks and "
        f"{args.width} features, {args.steps:,} steps of batch {args.batch}; OT and C²OT from batches of "
        f"{args.ot_batch}; moving: exchanged inside training batches, replaced every {args.refresh} epochs. "
        f"{args.samples} samples a cell, mean ± deviation over seeds {sorted({r['seed'] for r in runs})}.\n\n"
        + "\n".join(parts)
    )


def main() -> None:
    parser = arguments(__doc__, "whole_data")
    parser.add_argument("--seeds", nargs="+", type=int, help="in place of --seed")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--components", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--ot-batch", type=int, default=1024)
    parser.add_argument("--refresh", type=int, default=5, help="epochs after which moving noises are replaced")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--samples", type=int, default=2000)
    args = parser.parse_args()
    if args.quick:
        args.steps, args.samples = 30, 100
    wanted = args.methods or list(methods(args))
    if unknown := set(wanted) - set(methods(args)):
        parser.error(f"--methods must be of {', '.join(methods(args))}; got {', '.join(unknown)}")
    data, runs = load(args), []
    name = "whole_data" if data["name"] == "digits" else f"whole_data_{data['name']}"
    for seed in tqdm(args.seeds or [args.seed], unit="seed"):
        for method in wanted:
            runs.append(one_run(args, method, seed, data))
            page = report(args, data, runs)
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / f"{name}.md").write_text(page)  # a long run that is stopped has not run in vain
    save(name, args, page, {"runs": runs})


if __name__ == "__main__":
    main()
