"""Multiple-instance learning: a label for a bag of instances, in bags of up to 100,000.

    python examples/mil.py                                     # rare instances, bags of digits; 3 minutes
    python examples/mil.py --data-root DATA --parts digits     # bags of MNIST digits

Six models on the same features: UMBC (8 slots, a set transformer on them; Willette et al. 2023, arXiv 2208.12401),
UMBC with the largest logit of a single instance beside it (their model of slides), DSMIL (attention from the instance
with the largest logit, and that logit; Li, Li and Eliceiri 2021, arXiv 2011.08939), gated attention (Ilse et al. 2018,
arXiv 1802.04712), and Deep Sets with maximum and mean.

* ``large``: positive bags hold 10 shifted instances, whatever their size. Trained on bags of 100, 1,000, 10,000, then
  100,000, with exact or sampled gradients of the whole bag in the memory of a chunk. Beside the accuracy at 1/2: the
  area under the ROC curve, and the accuracy at the middle of the mean logits of 16 fresh bags of that size. What moves
  between the three is the threshold, not the instances.
* ``digits``: bags of about 10 images, positive with a 9 among them (the pattern of Ilse et al.).

Molecules, animals, proteins and birds are in ``mil_benchmark.py``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from common import arguments, he_init, peak_memory, plotter, save, save_picture, spread, table
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import flows
import setenc
from setenc import tasks

MODELS = ("UMBC", "UMBC + instance", "DSMIL", "gated attention", "Deep Sets, max", "Deep Sets, mean")
COLOURS = dict(zip(MODELS, ("#1b7837", "#7fbf7b", "#e08214", "#2166ac", "#b2182b", "#f4a582"), strict=True))


class PooledBags(nn.Module):
    """A bag's logit from one pooling; the interface of `setenc.tasks.BagClassifier`."""

    def __init__(self, extractor: nn.Module, pooling: setenc.Pooling, decoder: nn.Module) -> None:
        super().__init__()
        self.bag = setenc.UMBC(extractor, pooling, decoder)

    def score(self, x: Any, **options: Any) -> Tensor:
        """Probabilities ``(B,)``."""
        return setenc.encode(self.bag, x, **options)[:, 0, 0].sigmoid()

    def loss(self, x: Any, labels: Tensor, **options: Any) -> Tensor:
        """Binary cross-entropy with ``labels`` ``(B,)``."""
        logits = setenc.encode(self.bag, x, **options)[:, 0, 0]
        return F.binary_cross_entropy_with_logits(logits, labels)


class CriticalBags(nn.Module):
    """A bag's logit from attention of its critical instance, and that instance's own, as in DSMIL."""

    def __init__(self, extractor: nn.Module, width: int) -> None:
        super().__init__()
        self.enc = setenc.UMBC(extractor, setenc.DSMILPooling(width, width), None)
        self.bag = nn.Linear(width, 1)

    def logits(self, x: Any, **options: Any) -> Tensor:
        """``(2, B)``: of the bag and of its critical instance."""
        slots = setenc.encode(self.enc, x, **options)
        return torch.stack((self.bag(slots[:, 0])[:, 0], slots[:, 1, 0]))

    def score(self, x: Any, **options: Any) -> Tensor:
        """Probabilities ``(B,)``: the mean of both."""
        return self.logits(x, **options).sigmoid().mean(0)

    def loss(self, x: Any, labels: Tensor, **options: Any) -> Tensor:
        """The mean of the two binary cross-entropies with ``labels`` ``(B,)``."""
        logits = self.logits(x, **options)
        return F.binary_cross_entropy_with_logits(logits, labels.expand_as(logits))


def build(name: str, in_dim: int, width: int, dropout: float) -> nn.Module:
    """A model by its name in the tables."""
    extractor = nn.Sequential(
        nn.Linear(in_dim, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, width), nn.ReLU()
    )
    slots = setenc.SlotPooling(width, width, 8)
    if name == "UMBC + instance":
        return he_init(tasks.BagClassifier(width, width=width, extractor=extractor, pooling=slots, dropout=dropout / 2))
    if name == "UMBC":
        return he_init(PooledBags(extractor, slots, setenc.SetTransformerDecoder(width, 1, out_dim=1, num_outputs=1)))
    if name == "DSMIL":
        return he_init(CriticalBags(extractor, width))
    if name == "gated attention":
        pooling: setenc.Pooling = setenc.GatedAttentionPooling(width, width)
    else:
        pooling = setenc.DeepSetsPooling(width, width, name.split(", ")[1])
    return he_init(PooledBags(extractor, pooling, setenc.MLPDecoder(width, 1, num_layers=2)))


def fit(model: nn.Module, draw: Callable[[int], tuple[Any, Tensor]], steps: int, lr: float, **options: Any) -> None:
    """Steps of AdamW on the bags of ``draw(step)``."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(steps, 2))
    for step in range(steps):
        x, labels = draw(step)
        optimizer.zero_grad()
        model.loss(x, labels, **options).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def measures(score: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy at 1/2, and the area under the ROC curve."""
    from sklearn.metrics import roc_auc_score

    return {"accuracy": accuracy(score, labels, 0.5), "auc": float(roc_auc_score(labels.numpy(), score.numpy()))}


def accuracy(score: Tensor, labels: Tensor, threshold: float) -> float:
    """Share of bags on the right side of a threshold."""
    return float(((score > threshold) == (labels > 0.5)).float().mean())


def middle(score: Tensor, labels: Tensor) -> float:
    """The threshold half way between the mean logits of positive and of negative bags."""
    logits = score.double().logit(eps=1e-7)
    return float(((logits[labels > 0.5].mean() + logits[labels < 0.5].mean()) / 2).sigmoid())


# Bags of digits ------------------------------------------------------------------------------------------------------


def digit_pool(root: Path | None, train: bool) -> tuple[Tensor, Tensor]:
    """Images ``(N, d)`` and digits ``(N,)``: MNIST where there are files, else a half of scikit-learn's digits."""
    if root is not None:
        data = flows.datasets.mnist(root, train=train)
        rows = torch.arange(len(data))
    else:
        data = flows.datasets.digits()
        rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tensor_split(2)[int(train)]
    images, digits = data.rows(rows)
    return images.flatten(1), digits


def digit_bags(pool: tuple[Tensor, Tensor], n: int, generator: torch.Generator) -> tuple[list[Tensor], Tensor]:
    """``n`` bags of 10 ± 2 images, every second one with a 9 among them."""
    images, digits = pool
    nines, others = (torch.nonzero(digits == 9)[:, 0], torch.nonzero(digits != 9)[:, 0])
    sizes = (10 + 2 * torch.randn(n, generator=generator)).round().clamp_min(2).long()
    bags = []
    for i, size in enumerate(sizes.tolist()):
        rows = others[torch.randint(len(others), (size,), generator=generator)]
        if i % 2:
            rows[0] = nines[torch.randint(len(nines), (), generator=generator)]
        bags.append(images[rows])
    return bags, (torch.arange(n) % 2).float()


def some_bags(bags: list[Tensor], labels: Tensor, step: int) -> tuple[list[Tensor], Tensor]:
    """Fifty of the bags, others at each step."""
    rows = torch.randperm(len(bags), generator=torch.Generator().manual_seed(step))[:50]
    return [bags[i] for i in rows], labels[rows]


def digits(args: argparse.Namespace, seeds: list[int]) -> tuple[str, dict[str, Any]]:
    """Accuracy and AUC on bags of unseen images."""
    pools = [digit_pool(args.data_root, train) for train in (True, False)]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in MODELS}
    for seed in tqdm(seeds, desc="digits", unit="seed"):
        generator = torch.Generator().manual_seed(seed)
        bags, labels = digit_bags(pools[0], args.bags, generator)
        test, truth = digit_bags(pools[1], 500, generator)
        for name in MODELS:
            torch.manual_seed(seed)
            model = build(name, bags[0].shape[1], 64, 0.2)
            fit(model, partial(some_bags, bags, labels), args.digit_steps, 2e-3)
            with torch.no_grad():
                found[name].append(measures(model.score(test), truth))
    rows = [[name, *(spread([run[k] for run in runs]) for k in ("accuracy", "auc"))] for name, runs in found.items()]
    source = "scikit-learn's digits" if args.data_root is None else "MNIST"
    text = (
        f"{source}, {args.bags} training bags, {args.digit_steps} steps of 50 bags, 500 test bags of other images, "
        f"mean ± deviation over {len(seeds)} seeds.\n\n{table(['model', 'accuracy', 'AUC'], rows)}"
    )
    return text, {"source": source, "runs": found}


# Large bags ----------------------------------------------------------------------------------------------------------

MEASURES = {"accuracy": "accuracy at 1/2", "fresh": "accuracy, threshold by fresh bags", "auc": "AUC"}
rare = partial(tasks.rare_instance_bags, num_positive=10, shift=5.0)


def grown_memory(size: int, chunk: int) -> dict[str, float]:
    """By how much forward and backward of one bag raise the peak memory of the process, in MB; the largest last."""
    model = build("UMBC", 16, 32, 0.0)
    x, label = rare(1, size)
    model.loss(x[:, : 2 * chunk], label, chunk_size=chunk, gradient="exact").backward()
    before = peak_memory()
    grown = {}
    for gradient in ("sampled", "exact", "full"):
        model.loss(x, label, chunk_size=chunk, gradient=gradient).backward()
        grown[gradient] = peak_memory() - before
    return grown


def large(args: argparse.Namespace, seeds: list[int]) -> tuple[str, dict[str, Any]]:
    """Train on growing bags; accuracy on bags of every size, time of a step, memory of the gradient."""
    sizes, chunk = args.sizes, args.chunk
    memory = grown_memory(sizes[-1], chunk)
    runs = [(name, "exact") for name in MODELS]
    runs.insert(1, ("UMBC", "sampled"))
    generator = torch.Generator().manual_seed(10_000)
    tests = {size: rare(args.test_bags, size, generator=generator) for size in sizes}
    fresh = {size: rare(16, size, generator=generator) for size in sizes}
    found: list[dict[str, Any]] = []
    for name, gradient in tqdm(runs, desc="large", unit="model"):
        scores: dict[str, dict[int, list[float]]] = {m: {n: [] for n in sizes} for m in MEASURES}
        for seed in seeds:
            torch.manual_seed(seed)
            generator = torch.Generator().manual_seed(seed)
            model = build(name, 16, 32, 0.0)
            options = {"chunk_size": chunk, "gradient": gradient, "num_gradient_chunks": 2}
            for size, (bags, steps) in zip(sizes, args.stages, strict=True):
                began = time.process_time()
                draw = partial(rare, bags, size, generator=generator)
                rate = 3e-3 * bags / args.stages[0][0]  # in proportion to the bags of a step
                fit(model, lambda _, draw=draw: draw(), steps, rate, **options)
                cost = (time.process_time() - began) / steps / bags
            for size, (x, labels) in tests.items():
                with torch.no_grad():
                    score, known = (
                        torch.cat([model.score(bag, chunk_size=chunk, gradient="none") for bag in bags.split(1)])
                        for bags in (x, fresh[size][0])
                    )
                values = measures(score, labels)
                values["fresh"] = accuracy(score, labels, middle(known, fresh[size][1]))
                for measure, value in values.items():
                    scores[measure][size].append(value)
        found.append({"model": name, "gradient": gradient, **scores, "seconds": cost})
        print(name, gradient, scores, flush=True)
    return large_page(found, memory, args, len(seeds)), {"runs": found, "memory_mb": memory}


def large_page(found: list[dict[str, Any]], memory: dict[str, float], args: argparse.Namespace, seeds: int) -> str:
    """The tables of large bags, and how to read them."""
    sizes = args.sizes
    stages = ", ".join(
        f"{steps} steps of {bags} bags of {n:,}" for n, (bags, steps) in zip(sizes, args.stages, strict=True)
    )
    tables = []
    for measure, says in MEASURES.items():
        rows = [
            [run["model"], run["gradient"], *(spread(run[measure][n]) for n in sizes), f"{run['seconds']:.2f}"]
            for run in found
        ]
        tables.append(table([says, "gradient", *(f"{n:,}" for n in sizes), "CPU s/bag"], rows))
    return (
        f"10 shifted instances in a positive bag. {stages}; {args.test_bags} test bags of each size; {seeds} "
        f"seed(s). The last column: forward and backward of one bag of {sizes[-1]:,}.\n\n"
        + "\n\n".join(tables)
        + "\n\n"
        "Where the AUC is near 1 and the accuracy is not, bags are told apart at a threshold that moves with their "
        "size. The share of a softmax on 10 of n instances falls with n, and the logit with it; 16 fresh bags of the "
        "new size find the threshold again.\n\n"
        f"Forward and backward of one bag of {sizes[-1]:,} raise the peak memory of the process by "
        + ", ".join(f"{value:.0f} MB ({name})" for name, value in memory.items())
        + f", in chunks of {args.chunk:,}."
    )


def picture(figures: dict[str, Any], path: Path) -> None:
    """A panel a part: accuracies."""
    plt = plotter()
    figure, axes = plt.subplots(1, len(figures), figsize=(5.2 * len(figures), 4.2), squeeze=False)
    for ax, (part, found) in zip(axes[0], figures.items(), strict=True):
        if part == "large":
            for run in found["runs"]:
                sizes, values = zip(*((n, mean(v)) for n, v in run["accuracy"].items()), strict=True)
                style = "o--" if run["gradient"] == "sampled" else "o-"
                name = run["model"] + (" (sampled)" if run["gradient"] == "sampled" else "")
                ax.plot(sizes, values, style, color=COLOURS[run["model"]], ms=4, label=name)
            ax.set(xscale="log", xlabel="instances of a bag", title="10 positive instances: accuracy")
        else:
            bars(ax, {"": {name: [run["accuracy"] for run in runs] for name, runs in found["runs"].items()}})
            ax.set(ylim=(0.4, 1), title="bags of digits: accuracy")
        legend(ax)
    figure.tight_layout()
    save_picture(figure, path)


def bars(ax: Any, groups: dict[str, dict[str, list[float]]]) -> None:
    """A group of bars for each name: the mean of every model's values."""
    for i, (name, colour) in enumerate(COLOURS.items()):
        heights = [mean(group[name]) for group in groups.values()]
        places = [place + (i - 2.5) * 0.14 for place in range(len(groups))]
        ax.bar(places, heights, 0.13, color=colour, label=name)
    ax.set_xticks(range(len(groups)), list(groups))


def legend(ax: Any) -> None:
    """Below a panel without a frame."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)


PARTS = {"large": large, "digits": digits}
TITLES = {"large": "Rare instances in large bags", "digits": "Bags of digits"}


def main() -> None:
    parser = arguments(__doc__, "mil")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=2, help="runs of digits")
    parser.add_argument("--large-seeds", type=int, default=1, help="runs of large")
    parser.add_argument("--digit-steps", type=int, default=400)
    parser.add_argument("--bags", type=int, default=200, help="training bags of digits")
    parser.add_argument("--sizes", type=int, nargs=4, default=[100, 1000, 10_000, 100_000], help="of large bags")
    parser.add_argument("--test-bags", type=int, default=30, help="of each size of large bags")
    parser.add_argument("--chunk", type=int, default=4000, help="instances of a large bag in memory at a time")
    args = parser.parse_args()
    args.stages = [(16, 200), (8, 100), (4, 30), (2, 10)]
    if args.quick:
        args.seeds, args.digit_steps, args.bags = 1, 50, 60
        args.sizes, args.stages, args.chunk = [50, 200, 1000, 20_000], [(8, 20), (8, 10), (4, 5), (1, 2)], 1000
        args.test_bags = 8
    args.out.mkdir(parents=True, exist_ok=True)
    page, figures = "# Multiple-instance learning", {}
    for part in args.parts:
        count = args.large_seeds if part == "large" else args.seeds
        text, figures[part] = PARTS[part](args, list(range(args.seed, args.seed + count)))
        page += f"\n\n## {TITLES[part]}\n\n{text}"
    picture(figures, args.out / "mil.png")
    save("mil", args, page, figures)


if __name__ == "__main__":
    main()
