"""Image completion: from some pixels of an image, a normal distribution of all of them, better as pixels arrive.

    python examples/image_completion.py                             # scikit-learn's digits, 8 x 8; 2 minutes
    python examples/image_completion.py --data-root DATA --seeds 3  # DATA/mnist/*.gz, 28 x 28; 5 minutes a seed
    python examples/image_completion.py --data-root DATA --data cifar10

Conditional neural processes (Garnelo et al. 2018, arXiv 1807.01613) with the set encoders of Willette et al. 2023
(arXiv 2208.12401, there on CelebA). A model sees a test image as a stream, and is asked at each context size.

* UMBC as published: a set transformer makes one vector of its slots, which all pixels are read from.
* UMBC, local slots: slots that start at places far from each other, tell their mass, and are asked by place
  (`SlotPooling.init_slots`, ``mass_feature``, `SlotQuery`). Asked, not placed: the same but for the slots, which
  start alike.
* One slot, and Deep Sets.
* Kernel regression on the observed pixels: nothing is trained, and all pixels are kept.

All have He's initialisation of their perceptrons. Settings were chosen on validation images
(``image_completion_choices.py``), which are in neither of the other two parts; the table is of test images.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch
from common import (
    Beside,
    arguments,
    best_bold,
    cifar10_images,
    he_init,
    kept,
    plotter,
    save,
    save_picture,
    slot_block,
    table,
)  # fmt: skip
from torch import Tensor, nn
from tqdm import tqdm

import flows
import setenc
from setenc import tasks

LOCAL, ASKED, PUBLISHED = "UMBC, local slots", "UMBC, asked, not placed", "UMBC as published"
ONE, MEAN, KERNEL = "one slot", "Deep Sets", "kernel regression"
MODELS = (LOCAL, ONE, MEAN, PUBLISHED, ASKED)
COLOURS = dict(zip((*MODELS, KERNEL), ("#b2182b", "#1b7837", "#762a83", "#8c510a", "#ef8a62", "0.35"), strict=True))
PARTS = ("unseen", "all")
BATCH, TARGETS = 16, 200  # images of a step, and pixels of each in the loss


class Setting(NamedTuple):
    """Sizes for a data set: of the models, of the contexts in training and at test, and of what carries gradients."""

    width: int
    slots: int
    frequencies: int
    contexts: tuple[int, int]
    gradient: int
    shown: tuple[int, ...]
    steps: int


SETTINGS = {
    "digits": Setting(48, 16, 2, (16, 48), 16, (4, 8, 16, 32, 48), 600),
    "mnist": Setting(64, 64, 4, (100, 500), 100, (30, 100, 200, 300, 500), 1200),
    "cifar10": Setting(64, 64, 4, (100, 500), 100, (30, 100, 200, 300, 500), 1200),
}


class Choice(NamedTuple):
    """What was chosen on validation images.

    Args:
        steps: for each step of the setting: cheap models take more, for about the same time.
        skip: the embedded pixel beside what a perceptron makes of it.
        sharpness: deviation of the logits of placed slots.
        slots: for each slot of the setting.
        mass: slots tell their mass, and the set its size.
        block: a transformer block on the slots.
    """

    steps: float = 1.0
    skip: bool = True
    sharpness: float = 3.0
    slots: float = 1.0
    mass: bool = True
    block: bool = True


CHOICES = {name: Choice(steps=1.5 if name in (ONE, MEAN) else 1.0) for name in MODELS}


def load(name: str, root: Path | None) -> dict[str, Tensor]:
    """Images ``(N, C, H, W)`` in [0, 1] to train on, to choose settings by, and to test."""
    if name == "digits":
        images = flows.datasets.digits().images.float() / 255
        images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
        return dict(zip(("train", "validation", "test"), images.split([1200, 300, 297]), strict=True))
    if root is None:
        raise SystemExit(f"--data {name} needs --data-root: the folder with its files, or with {name}/")
    if name == "mnist":
        first, test = (flows.datasets.mnist(root, train=train).images.float() / 255 for train in (True, False))
    else:
        first, test = (cifar10_images(root, train=train).float() / 255 for train in (True, False))
    held = len(first) // 6
    return {"train": first[:-held], "validation": first[-held:], "test": test}


class Completion(tasks.ImageCompletion):
    """Means and deviations of all pixels, from one vector for the image or from slots that each pixel asks.

    Args:
        kind: its name in the tables.
        channels: colours of a pixel.
        setting: sizes.
        choice: what was chosen.
        pixels: pixels ``(B, n, 2 + channels)`` of some images, at whose places local slots start.
    """

    def __init__(self, kind: str, channels: int, setting: Setting, choice: Choice, pixels: Tensor) -> None:
        width, place = setting.width, 2 + 4 * setting.frequencies
        super().__init__(channels, width=width, num_slots=1, num_frequencies=setting.frequencies)
        perceptron = setenc.MLPDecoder(place + channels, width, hidden_dim=width, num_layers=4)
        in_dim = width + (place + channels) * choice.skip
        attend = {"num_heads": 1, "residual": False}
        count = round(setting.slots * choice.slots)
        self.query = None
        mass = False
        if kind in (LOCAL, ASKED):
            places = [0, 1, *range(2 + channels, place + channels)]
            pooling: setenc.Pooling = setenc.SlotPooling(in_dim, width, count, **attend)
            blocks = [slot_block(width, 1)] if choice.block else []
            decoder: nn.Module = nn.Sequential(*blocks, nn.LayerNorm(width))
            self.query, mass = setenc.SlotQuery(pooling, columns=places), choice.mass
        elif kind == MEAN:
            pooling, decoder = setenc.DeepSetsPooling(in_dim, width, "mean", norm=True), setenc.MLPDecoder(width)
        elif kind == ONE:
            pooling, decoder = setenc.SlotPooling(in_dim, width, 1, slot_norm=True, **attend), setenc.MLPDecoder(width)
        else:
            pooling = setenc.SlotPooling(in_dim, width, count, slot_norm=True, **attend)
            decoder = setenc.SetTransformerDecoder(width, 2, num_heads=1, num_outputs=1, norm=True)
        join = Beside if choice.skip else nn.Sequential
        # Shares of the set and its size: how many pixels each slot has seen.
        options = {"mass_feature": mass, "size_feature": mass}
        self.enc = setenc.UMBC(join(self.embed, perceptron), pooling, decoder, **options)
        he_init(self.enc.extractor)
        he_init(self.head)
        if kind == LOCAL:
            pooling.init_slots(self.enc.extractor(pixels), choice.sharpness, columns=places)

    def predict(self, image: Tensor, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """From the decoded slots or the vector of an image, at ``coordinates`` ``(B, M, 2)``."""
        if self.query is not None:
            image = self.query(image, self.embed(coordinates))
        return super().predict(image, coordinates)


def train(
    name: str, model: Completion, images: Tensor, setting: Setting, choice: Choice, args: argparse.Namespace, seed: int
) -> tuple[list[float], float]:
    """Adam, cosine; contexts of random sizes, the loss on random pixels. Losses, and processor seconds in all."""
    generator = torch.Generator().manual_seed(seed)
    steps = round(args.steps * choice.steps)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    smallest, largest = setting.contexts
    losses, began = [], time.process_time()
    for _ in tqdm(range(steps), desc=f"{name}, seed {seed}", unit="step"):
        batch = images[torch.randint(len(images), (BATCH,), generator=generator)]
        size = int(torch.randint(smallest, largest + 1, (), generator=generator))
        context, grid, colours = tasks.pixel_sets(batch, size, generator=generator)
        target = torch.randperm(grid.shape[1], generator=generator)[:TARGETS]
        loss = model.loss(context, grid[:, target], colours[:, target], gradient="sampled", chunk_size=setting.gradient)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses, time.process_time() - began


class Test:
    """Images whose pixels arrive in an order fixed once; scores on all pixels, and on those not yet seen."""

    def __init__(self, images: Tensor, count: int, sizes: tuple[int, ...], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.images = images[torch.randperm(len(images), generator=generator)[:count]]
        self.pixels, self.grid, self.colours = tasks.pixel_sets(self.images, max(sizes), generator=generator)
        row, column = (self.pixels[..., :2] * torch.tensor(images.shape[-2:])).round().long().unbind(-1)
        self.sizes, self.places = sizes, row * images.shape[-1] + column

    def score(self, prediction: tuple[Tensor, Tensor], size: int, part: str) -> float:
        """Mean NLL of ``all`` pixels or of the ``unseen`` ones, after ``size`` of them."""
        values = -torch.distributions.Normal(*prediction).log_prob(self.colours).mean(-1)
        if part == "all":
            return float(values.mean())
        unseen = torch.ones_like(values, dtype=torch.bool).scatter(1, self.places[:, :size], False)
        return float(values[unseen].mean())


def regression(test: Test, size: int, width: float) -> tuple[Tensor, Tensor]:
    """Weighted mean and variance of the observed colours around each pixel; the kernel's width is in pixels."""
    scale = torch.tensor(test.images.shape[-2:])
    moments = []
    for grid, observed in zip(test.grid.split(20), test.pixels[:, :size].split(20), strict=True):
        distance = torch.cdist(grid * scale, observed[..., :2] * scale).square()
        weight = (-0.5 * distance / width**2).softmax(-1)
        moments.append(weight @ torch.cat((observed[..., 2:], observed[..., 2:] ** 2), -1))
    first, second = torch.cat(moments).chunk(2, -1)
    return first, (second - first.square()).clamp_min(0)


def kernel_regression(validation: Test, test: Test) -> tuple[dict[str, list[float]], list[Tensor]]:
    """Scores on ``test``, and means of its first two images; width and two scales chosen for each size and score."""
    scores: dict[str, list[float]] = {part: [] for part in PARTS}
    shots = []
    scales = [(a, b) for a in (0.02, 0.07, 0.15, 0.2, 0.25, 0.3, 0.4) for b in (0.4, 0.7, 0.9, 1.1, 1.4)]
    widths = (0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0, 1.25, 1.5, 2.0, 3.0)
    for size in test.sizes:
        moments = {width: regression(validation, size, width) for width in widths}
        for part in PARTS:
            tried = ((validation.score(normal(*moments[w], *s), size, part), w, s) for w in widths for s in scales)
            _, width, best = min(tried)
            prediction = normal(*regression(test, size, width), *best)
            scores[part].append(test.score(prediction, size, part))
            if part == "unseen":
                shots.append(prediction[0][:2])
    return scores, shots


def normal(first: Tensor, variance: Tensor, a: float, b: float) -> tuple[Tensor, Tensor]:
    """A mean, and a deviation from a variance; at least the 0.1 of the trained models."""
    return first, (a**2 + b**2 * variance).sqrt().clamp_min(0.1)


def run(
    kind: str, choice: Choice, parts: dict[str, Tensor], test: Test, setting: Setting, args: argparse.Namespace,
    seed: int,
) -> tuple[dict[str, Any], list[Tensor]]:  # fmt: skip
    """Train one model and score it; the means that it predicts for the first two images."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    pixels, _, _ = tasks.pixel_sets(parts["train"][:64], setting.contexts[0], generator=generator)
    model = Completion(kind, test.images.shape[1], setting, choice, pixels)
    losses, seconds = train(kind, model, parts["train"], setting, choice, args, seed)
    model.eval()
    state, predictions, seen = model.enc.init_state(len(test.pixels)), [], 0
    with torch.no_grad():
        whole, _ = model(test.pixels, test.grid)
        for size in test.sizes:  # read once, as a stream
            state, seen = model.enc.update(state, test.pixels[:, seen:size]), size
            predictions.append(model.predict(model.enc.readout(state), test.grid))
    facts = {
        **{part: [test.score(*each, part) for each in zip(predictions, test.sizes, strict=True)] for part in PARTS},
        "streamed_against_whole": float((predictions[-1][0] - whole).abs().max()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": seconds,
        "losses": [mean(losses[i : i + 25]) for i in range(0, len(losses), 25)],
    }
    return facts, [first[:2] for first, _ in predictions]


def picture(
    found: dict[str, list[dict[str, Any]]], floor: dict[str, float], kernel: dict[str, list[float]],
    shots: dict[str, list[Tensor]], test: Test, path: Path,
) -> None:  # fmt: skip
    """NLL of unseen pixels over the context, and completions of two images as their contexts grow."""
    plt = plotter()
    sizes, shape = test.sizes, test.images.shape[-2:]
    figure = plt.figure(figsize=(14, 6.6))
    ax = figure.add_axes((0.045, 0.09, 0.34, 0.84))
    for kind, runs in found.items():
        values = np.array([run["unseen"] for run in runs])
        ax.plot(sizes, values.mean(0), "o-", ms=4, color=COLOURS[kind], label=kind)
        ax.fill_between(sizes, values.min(0), values.max(0), color=COLOURS[kind], alpha=0.2, lw=0)
    ax.plot(sizes, kernel["unseen"], "s--", ms=4, color=COLOURS[KERNEL], label=KERNEL)
    ax.axhline(floor["unseen"], color="0.6", ls=":", label="each pixel's mean and deviation")
    ax.set(xlabel="pixels seen", title="NLL of unseen pixels, nats a channel")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    rows = 1 + len(shots)
    grid = figure.add_gridspec(
        2 * rows, len(sizes) + 1, left=0.5, right=0.995, bottom=0.01, top=0.95, wspace=0.04, hspace=0.06
    )
    cells = grid.subplots()
    for cell in cells.flat:
        cell.set(xticks=[], yticks=[])
        cell.spines[:].set_color("0.6")
    for column, title in enumerate([*(f"{size} pixels" for size in sizes), "truth"]):
        cells[0, column].set_title(title, fontsize=10)
    for which, block in enumerate((cells[:rows], cells[rows:])):
        for row, name in zip(block, ("seen", *shots), strict=True):
            row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)
            for column, size in enumerate(sizes):
                if name == "seen":
                    seen = test.places[which, :size]
                    colours = torch.tensor([0.60, 0.72, 0.87]).repeat(test.colours.shape[1], 1)  # blue where unknown
                    colours[seen] = test.colours[which, seen].expand(-1, 3)
                else:
                    colours = shots[name][column][which]
                row[column].imshow(as_image(colours, shape))
            row[-1].axis("off")
        block[0, -1].imshow(as_image(test.colours[which], shape))
        block[0, -1].axis("on")
    save_picture(figure, path)


def as_image(colours: Tensor, shape: tuple[int, int]) -> Tensor:
    """Pixels ``(H * W, C)`` as an image ``(H, W, 3)``."""
    return colours.clamp(0, 1).expand(-1, 3).unflatten(0, shape)


def page(
    found: dict[str, list[dict[str, Any]]], floor: dict[str, float], kernel: dict[str, list[float]],
    parts: dict[str, Tensor], test: Test, setting: Setting, args: argparse.Namespace,
) -> str:  # fmt: skip
    """The tables, and how to read them."""
    channels, height, width = test.images.shape[1:]
    smallest, largest = setting.contexts
    tables = []
    for part in PARTS:
        rows = best_bold({kind: [run[part] for run in runs] for kind, runs in found.items()})
        rows.append([KERNEL, *(f"{v:.3f}" for v in kernel[part])])
        rows.append(["each pixel's mean and deviation", *[f"{floor[part]:.3f}"] * len(test.sizes)])
        tables.append(table([f"NLL of {part} pixels", *(f"{size} seen" for size in test.sizes)], rows))
    costs = []
    for kind, runs in found.items():
        seconds = mean(run["seconds"] for run in runs)
        costs.append([kind, round(args.steps * CHOICES[kind].steps), runs[0]["parameters"], f"{seconds:.0f}"])
    gap = max(run["streamed_against_whole"] for runs in found.values() for run in runs)
    return (
        f"# Image completion: {args.data}, {height} × {width}, {channels} channel{'s' * (channels > 1)}\n\n"
        f"Mean negative log-likelihood (nats a pixel and channel) of {len(test.images)} test images from random pixels "
        f"that arrive as a stream: mean ± deviation over {args.seeds} seed{'s' * (args.seeds > 1)}, the best trained "
        f"model bold. Deviations are at least 0.1, so no model is below "
        f"{torch.distributions.Normal(0.0, 0.1).entropy() - 0.5:.3f}. A model that copies what it has seen is good on "
        f"*all* pixels; *unseen* ones are what completion is about.\n\n{tables[0]}\n\n{tables[1]}\n\n"
        f"{table(['model', 'steps', 'parameters', 'CPU s'], costs)}\n\n"
        f"Training: Adam, cosine, {BATCH} of {len(parts['train'])} images a step, width {setting.width}, "
        f"{setting.slots} slots, sines and cosines of the coordinates at {setting.frequencies} frequencies, contexts "
        f"of {smallest} to {largest} pixels of which {setting.gradient} carry gradients, {TARGETS} target pixels "
        "at most; He's initialisation of the perceptrons, and the embedded pixel beside its features, for all. "
        "Settings were compared on 300 validation images of MNIST (`image_completion_choices.py`). Kernel regression "
        f"keeps all observed pixels, where UMBC keeps {setting.slots} × {setting.width} numbers; its width and its two "
        "scales of the deviation are chosen on 200 validation images for each size and score. The official protocol "
        "(CelebA) has 200,000 steps of 256 images at width 128 with 128 slots. Completions from the stream and from "
        f"the whole context differ by {gap:.0e} at most.\n"
    )


def main() -> None:
    parser = arguments(__doc__, "image_completion")
    parser.add_argument("--data", choices=tuple(SETTINGS), help="default: mnist with --data-root, else digits")
    parser.add_argument("--steps", type=int, help="default: 1200, digits 600; the official protocol has 200,000")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the names of models; default: all")
    parser.add_argument("--kept", type=Path, help="file of finished runs: read if there, written after each")
    args = parser.parse_args()
    if args.quick:
        args.steps = 50
    args.data = args.data or ("digits" if args.data_root is None else "mnist")
    setting, name = SETTINGS[args.data], "image_completion" + f"_{args.data}" * (args.data != "digits")
    args.steps = args.steps or setting.steps
    args.out.mkdir(parents=True, exist_ok=True)
    parts = load(args.data, args.data_root)
    test = Test(parts["test"], 60 if args.quick else 500, setting.shown, 0)
    first, deviation = (s.flatten(1).T for s in (parts["train"].mean(0), parts["train"].std(0).clamp_min(0.1)))
    last = (first.expand_as(test.colours), deviation.expand_as(test.colours))
    floor = {part: mean(test.score(last, size, part) for size in test.sizes) for part in PARTS}
    validation = Test(parts["validation"], 200, setting.shown, 1)
    kernel, means = kept(args.kept, f"{args.data}: {KERNEL}", partial(kernel_regression, validation, test))
    found: dict[str, list[dict[str, Any]]] = {}
    shots = {}
    for kind, choice in CHOICES.items():
        if not any(part in kind for part in args.only):
            continue
        for seed in range(args.seed, args.seed + args.seeds):
            label = f"{args.data}: {kind}, {args.steps} steps, seed {seed}, {choice}"
            facts, shown = kept(args.kept, label, partial(run, kind, choice, parts, test, setting, args, seed))
            found.setdefault(kind, []).append(facts)
            if seed == args.seed and kind in (LOCAL, ONE):
                shots[kind] = shown
            print(kind, seed, *(f"{v:.3f}" for v in facts["all"]), f"{facts['seconds']:.0f} s", flush=True)
    shots[KERNEL] = means
    picture(found, floor, kernel, shots, test, args.out / f"{name}.png")
    content = {"floor": floor, "kernel": kernel, "models": found}
    save(name, args, page(found, floor, kernel, parts, test, setting, args), content)


if __name__ == "__main__":
    main()
