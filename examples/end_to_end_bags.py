"""Bags of images end to end: a CNN learns from the labels of bags of thousands of images, in the memory of a chunk.

    python examples/end_to_end_bags.py                      # scikit-learn's digits, 8 x 8; 2 minutes
    python examples/end_to_end_bags.py --data-root DATA     # DATA/mnist/*.gz, 28 x 28; 2 minutes a seed

A bag holds digits; one in twenty is a 9 if its label is 1 (one at least), and none if it is 0. Which image is a 9 is
never told. Image network, slots and the most suspicious image (`setenc.tasks.BagClassifier` around
`setenc.PerElement`) are trained together: every image of a bag is backpropagated, in two passes over its chunks
(``gradient="exact"``). Bags grow in training. Beside it, the same model over an image network that stays as it started.

Memory and seconds are those of one bag, in a process of its own, against ordinary backprop through the whole bag; its
images are made chunk by chunk, as a reader of files would.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from common import arguments, peak_memory, plotter, save, save_picture, spread, table
from torch import Tensor, nn
from tqdm import tqdm

import flows
import setenc
from setenc import tasks

SHARE = 0.05
MODELS = ("end to end", "frozen image network")
Chunks = Callable[[], Iterator[Tensor]]


def classifier(width: int = 32) -> tasks.BagClassifier:
    """A small CNN, normalised inside each image, under slots and the most suspicious image."""
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.GroupNorm(2, 8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.GroupNorm(2, 16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, width), nn.ReLU(),
    )  # fmt: skip
    pooling = setenc.SlotPooling(width, width, 4)
    return tasks.BagClassifier(width, width=width, extractor=setenc.PerElement(network), pooling=pooling, dropout=0.0)


class Bags:
    """Bags drawn from images kept as bytes: rows of each, and a fresh iterator over its chunks as floats."""

    def __init__(self, root: Path | None, train: bool, chunk: int) -> None:
        if root is not None:
            data = flows.datasets.mnist(root, train=train)
            rows = torch.arange(len(data))
        else:
            data = flows.datasets.digits()
            halves = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tensor_split(2)
            rows = halves[int(train)]
        self.images, labels, self.chunk = data.images[rows], data.labels[rows], chunk
        self.nines, self.others = torch.nonzero(labels == 9)[:, 0], torch.nonzero(labels != 9)[:, 0]

    def draw(self, count: int, size: int, generator: torch.Generator) -> tuple[Chunks, Tensor]:
        """Chunks ``(count, n, 1, H, W)`` of ``count`` bags, every second one positive, and their labels."""
        rows = self.others[torch.randint(len(self.others), (count, size), generator=generator)]
        labels = (torch.arange(count) % 2).float()
        nines = max(round(SHARE * size), 1)
        places = torch.rand(count, size, generator=generator).argsort(1)[:, :nines]
        some = self.nines[torch.randint(len(self.nines), places.shape, generator=generator)]
        rows = torch.where(labels[:, None] > 0, rows.scatter(1, places, some), rows)

        def chunks() -> Iterator[Tensor]:
            return (self.images[part].float() / 127.5 - 1 for part in rows.split(self.chunk, 1))

        return chunks, labels


def train(model: tasks.BagClassifier, bags: Bags, args: argparse.Namespace, frozen: bool, seed: int) -> float:
    """Stages of growing bags, AdamW with one cycle each; processor seconds."""
    generator = torch.Generator().manual_seed(seed)
    if frozen:
        model.enc.extractor.requires_grad_(False)
    began = time.process_time()
    for size, count, steps in args.stages:
        rate = 3e-3 * (count / args.stages[0][1]) ** 0.5
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
        for _ in tqdm(range(steps), desc=f"{count} bags of {size:,}", unit="step"):
            chunks, labels = bags.draw(count, size, generator)
            optimiser.zero_grad()
            model.loss(chunks, labels, gradient="exact").backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
    return time.process_time() - began


@torch.no_grad()
def evaluate(model: tasks.BagClassifier, bags: Bags, sizes: dict[int, int]) -> dict[int, dict[str, float]]:
    """Accuracy at 1/2 and AUC on bags of unseen images, read as streams."""
    from sklearn.metrics import roc_auc_score

    generator, found = torch.Generator().manual_seed(10_000), {}
    for size, count in sizes.items():
        drawn = [bags.draw(2, size, generator) for _ in range(count // 2)]
        score = torch.cat([model.score(chunks, gradient="none") for chunks, _ in drawn])
        truth = torch.cat([labels for _, labels in drawn])
        right = ((score > 0.5) == (truth > 0.5)).float().mean()
        found[size] = {"accuracy": float(right), "auc": float(roc_auc_score(truth.numpy(), score.numpy()))}
    return found


def made(count: int, side: int, chunk: int) -> Chunks:
    """A bag of random images that is never in memory at once."""

    def chunks() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        for begin in range(0, count, chunk):
            yield torch.rand(1, min(chunk, count - begin), 1, side, side, generator=generator)

    return chunks


def measure(gradient: str, count: int, side: int, chunk: int) -> None:
    """Print peak memory of this process and seconds of forward and backward of one bag of ``count`` images."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, label = classifier(), torch.ones(1)
    model.loss(made(2 * chunk, side, chunk), label, gradient="exact").backward()
    model.zero_grad()
    began = time.process_time()
    if gradient == "full":
        model.loss(torch.cat(list(made(count, side, chunk)()), 1), label).backward()
    else:
        model.loss(made(count, side, chunk), label, gradient=gradient).backward()
    seconds = time.process_time() - began
    peak = peak_memory()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    print(json.dumps({"seconds": seconds, "mb": peak, "norm": float(norm)}))


def costs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Of every bag size, exact and full, each in a process of its own."""
    found = []
    for gradient, sizes in (("exact", args.measured), ("full", [n for n in args.measured if n <= args.full])):
        for count in sizes:
            command = [sys.executable, __file__, "--measure", gradient, *map(str, (count, args.side, args.chunk))]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append({"gradient": gradient, "images": count, **json.loads(done.stdout)})
    return found


def picture(found: dict[str, list[dict[str, Any]]], spent: list[dict[str, Any]], path: Path) -> None:
    """Accuracy over the size of bags, and peak memory over it."""
    plt = plotter()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    for name, colour in zip(MODELS, ("#b2182b", "0.5"), strict=True):
        sizes = list(found[name][0]["scores"])
        values = torch.tensor([[run["scores"][n]["accuracy"] for n in sizes] for run in found[name]])
        left.plot(sizes, values.mean(0), "o-", color=colour, label=name)
        left.fill_between(sizes, values.amin(0), values.amax(0), color=colour, alpha=0.2, lw=0)
    left.set(xscale="log", xlabel="images in a bag", title="accuracy", ylim=(0.4, 1.02))
    for gradient, colour in (("exact", "#b2182b"), ("full", "#2166ac")):
        sizes, memory = zip(*((s["images"], s["mb"]) for s in spent if s["gradient"] == gradient), strict=True)
        right.plot(sizes, memory, "o-", color=colour, label=f"{gradient} gradient")
    right.set(xscale="log", yscale="log", xlabel="images in a bag", title="peak memory of the process, MB")
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False)
    figure.tight_layout()
    save_picture(figure, path)


def page(found: dict[str, list[dict[str, Any]]], spent: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """The tables, and how to read them."""
    sizes = list(found[MODELS[0]][0]["scores"])
    tables = []
    for key, says in (("accuracy", "accuracy at 1/2"), ("auc", "AUC")):
        rows = [
            [
                name,
                *(spread([run["scores"][n][key] for run in runs]) for n in sizes),
                f"{mean(r['seconds'] for r in runs):.0f}",
            ]
            for name, runs in found.items()
        ]
        tables.append(table([says, *(f"{n:,} images" for n in sizes), "CPU s of training"], rows))
    rows = [[s["gradient"], f"{s['images']:,}", f"{s['mb']:.0f}", f"{s['seconds']:.2f}"] for s in spent]
    exact = [s["mb"] for s in spent if s["gradient"] == "exact"]
    pairs = [(s, t) for s in spent for t in spent if (s["gradient"], t["gradient"]) == ("exact", "full")]
    apart = max(abs(s["norm"] / t["norm"] - 1) for s, t in pairs if s["images"] == t["images"])
    stages = ", ".join(f"{steps} steps of {count} bags of {size:,}" for size, count, steps in args.stages)
    source = "scikit-learn's digits" if args.data_root is None else "MNIST"
    return (
        f"# Bags of images, end to end\n\n{source}, {args.side} × {args.side}; one image in {round(1 / SHARE)} of a "
        f"positive bag is a 9, and none of a negative one. Trained on {stages}, every image with its exact gradient. "
        f"Test bags of other images: {', '.join(f'{c} of {n:,}' for n, c in args.tested.items())}. Mean ± deviation "
        f"over {args.seeds} seed{'s' * (args.seeds > 1)}.\n\n" + "\n\n".join(tables) + "\n\n"
        "## What one bag costs\n\nForward and backward, one thread, each in a process of its own, in chunks of "
        f"{args.chunk} images; *full* is ordinary backprop. The memory of the exact gradient is that of a chunk, the "
        f"largest figure over the smallest {max(exact) / min(exact):.2f} (libraries included, in all of them); norms "
        f"of the two gradients differ by {apart:.0e}.\n\n"
        f"{table(['gradient', 'images', 'peak memory of the process, MB', 'CPU s'], rows)}\n"
    )


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], *map(int, sys.argv[3:]))
        return
    parser = arguments(__doc__, "end_to_end_bags")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--chunk", type=int, default=250, help="images of a bag in memory at a time")
    args = parser.parse_args()
    args.stages = [(10, 32, 700), (20, 16, 300), (200, 4, 40), (2000, 2, 10)]
    args.tested, args.measured, args.full = {200: 100, 2000: 20, 20_000: 6}, [1000, 5000, 20_000, 50_000], 20_000
    if args.quick:
        args.stages, args.tested = [(20, 8, 20), (200, 2, 3)], {20: 40, 2000: 4}
        args.measured, args.full, args.chunk = [500, 2000], 500, 100
    args.side = 28 if args.data_root else 8
    args.out.mkdir(parents=True, exist_ok=True)
    spent = costs(args)
    bags = [Bags(args.data_root, train, args.chunk) for train in (True, False)]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in MODELS}
    for name in MODELS:
        for seed in range(args.seed, args.seed + args.seeds):
            torch.manual_seed(seed)
            model = classifier()
            seconds = train(model, bags[0], args, "frozen" in name, seed)
            found[name].append({"seconds": seconds, "scores": evaluate(model.eval(), bags[1], args.tested)})
            print(name, seed, found[name][-1], flush=True)
    picture(found, spent, args.out / "end_to_end_bags.png")
    save("end_to_end_bags", args, page(found, spent, args), {"models": found, "costs": spent})


if __name__ == "__main__":
    main()
