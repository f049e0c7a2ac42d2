"""Image completion: from some pixels of an image, a normal distribution of all of them, better as pixels arrive.

    python examples/image_completion.py                             # scikit-learn's digits, 8 x 8; 2 minutes
    python examples/image_completion.py --data-root DATA --seeds 3  # DATA/mnist/*.gz, 28 x 28; 5 minutes a seed
    python examples/image_completion.py --data photographs          # 32 x 32 crops of scikit-learn's two photographs
    python examples/image_completion.py --data-root DATA --choose   # what the settings were chosen by

Conditional neural processes (Garnelo et al. 2018, arXiv 1807.01613) with the set encoders of Willette et al. 2023
(arXiv 2208.12401, there on CelebA). A model sees a test image as a stream, and is asked at each context size.

* UMBC as published: a set transformer makes one vector of its slots, which all pixels are read from.
* UMBC, local slots: slots that start at places far from each other, tell their mass, and are asked by place
  (`SlotPooling.init_slots`, ``mass_feature``, `SlotQuery`). Asked, not placed: the same but for the slots, which
  start alike.
* One slot, and Deep Sets.
* Kernel regression on the observed pixels: nothing is trained, and all pixels are kept.

All have He's initialisation of their perceptrons. Settings were chosen on validation images (``--choose``), which are
in neither of the other two parts; the table is of test images.
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
from common import Beside, arguments, he_init, kept, plotter, save, save_picture, slot_block, spread, table
from torch import Tensor, nn
from tqdm import tqdm

import flows
import setenc
from setenc import tasks

LOCAL, ASKED, PUBLISHED, ONE, MEAN = (
    "UMBC, local slots",
    "UMBC, asked, not placed",
    "UMBC as published",
    "one slot",
    "Deep Sets",
)
KERNEL = "kernel regression"
COLOURS = {
    LOCAL: "#b2182b",
    ASKED: "#ef8a62",
    PUBLISHED: "#8c510a",
    ONE: "#1b7837",
    MEAN: "#762a83",
    KERNEL: "0.35",
}


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
    "photographs": Setting(64, 64, 4, (100, 500), 100, (30, 100, 200, 300, 500), 1200),
    "cifar10": Setting(64, 64, 4, (100, 500), 100, (30, 100, 200, 300, 500), 1200),
}


class Choice(NamedTuple):
    """What was chosen on validation images.

    Args:
        steps: for each step of the setting: cheap models take more, for about the same time.
        lr: of Adam.
        skip: the embedded pixel beside what a perceptron makes of it.
        sharpness: deviation of the logits of placed slots.
        slots: for each slot of the setting.
        mass: slots tell their mass, and the set its size.
        block: a transformer block on the slots.
    """

    steps: float = 1.0
    lr: float = 1e-3
    skip: bool = True
    sharpness: float = 3.0
    slots: float = 1.0
    mass: bool = True
    block: bool = True


CHOICES = {
    LOCAL: Choice(),
    ONE: Choice(steps=1.5),
    MEAN: Choice(steps=1.5),
    PUBLISHED: Choice(),
    ASKED: Choice(),
}
CANDIDATES = {  # what may be otherwise; Deep Sets takes over what one slot chose
    LOCAL: [{}, {"sharpness": 4.0}, {"slots": 0.5}, {"mass": False}, {"block": False, "steps": 1.5}],
    PUBLISHED: [{}, {"skip": False}],
    ONE: [{}, {"skip": False}],
}


def load(name: str, root: Path | None) -> dict[str, Tensor]:
    """Images ``(N, C, H, W)`` in [0, 1] to train on, to choose settings by, and to test."""
    if name == "photographs":
        from sklearn.datasets import load_sample_images

        photographs = torch.stack([torch.from_numpy(image.copy()) for image in load_sample_images().images])
        images = photographs.permute(0, 3, 1, 2).unfold(2, 32, 16).unfold(3, 32, 16).float() / 255
        columns = {"train": slice(0, 18), "validation": slice(20, 27), "test": slice(29, None)}  # no pixel in two
        return {k: images[:, :, :, c].permute(0, 2, 3, 1, 4, 5).flatten(0, 2) for k, c in columns.items()}
    if name == "digits":
        images = flows.datasets.digits().images.float() / 255
        images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
        return dict(zip(("train", "validation", "test"), images.split([1200, 300, 297]), strict=True))
    if root is None:
        raise SystemExit(f"--data {name} needs --data-root: the folder with its files, or with {name}/")
    if name == "mnist":
        first, test = (flows.datasets.mnist(root, train=train).images.float() / 255 for train in (True, False))
    else:
        first, test = cifar10(root)
    held = len(first) // 6
    return {"train": first[:-held], "validation": first[-held:], "test": test}


def cifar10(root: Path) -> tuple[Tensor, Tensor]:
    """From the official batches, or from an npz of ``x_train`` and ``x_test`` ``(N, 32, 32, 3)``."""
    packed = [path for path in sorted(root.glob("cifar10/*.npz")) if "x_train" in np.load(path)]
    if packed:
        with np.load(packed[0]) as file:
            parts = [torch.from_numpy(file[key]).permute(0, 3, 1, 2) for key in ("x_train", "x_test")]
    else:
        parts = [flows.datasets.cifar10(root, train=train).images for train in (True, False)]
    return parts[0].float() / 255, parts[1].float() / 255


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
    optimiser = torch.optim.Adam(model.parameters(), lr=choice.lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    smallest, largest = setting.contexts
    losses, began = [], time.process_time()
    for _ in tqdm(range(steps), desc=f"{name}, seed {seed}", unit="step"):
        batch = images[torch.randint(len(images), (args.batch,), generator=generator)]
        size = int(torch.randint(smallest, largest + 1, (), generator=generator))
        context, grid, colours = tasks.pixel_sets(batch, size, generator=generator)
        target = torch.randperm(grid.shape[1], generator=generator)[: args.targets]
        loss = model.loss(context, grid[:, target], colours[:, target], gradient="sampled", chunk_size=setting.gradient)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses, time.process_time() - began


@torch.no_grad()
def completions(
    model: tasks.ImageCompletion, pixels: Tensor, grid: Tensor, sizes: tuple[int, ...]
) -> list[tuple[Tensor, Tensor]]:
    """Means and standard deviations after each number of ``pixels``, read once as a stream."""
    state, found, seen = model.enc.init_state(len(pixels)), [], 0
    for size in sizes:
        state, seen = model.enc.update(state, pixels[:, seen:size]), size
        found.append(model.predict(model.enc.readout(state), grid))
    return found


def nll(prediction: tuple[Tensor, Tensor], colours: Tensor) -> Tensor:
    """Of each pixel, the mean over its channels ``(B, M)``."""
    return -torch.distributions.Normal(*prediction).log_prob(colours).mean(-1)


def rows_of(pixels: Tensor, shape: tuple[int, int]) -> Tensor:
    """Places ``(B, n)`` of pixels ``(B, n, 2 + C)`` among all pixels of their image, row by row."""
    row, column = (pixels[..., :2] * torch.tensor(shape)).round().long().unbind(-1)
    return row * shape[1] + column


class Test:
    """Images whose pixels arrive in an order fixed once; scores on all pixels, and on those not yet seen."""

    def __init__(self, images: Tensor, count: int, sizes: tuple[int, ...], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.images = images[torch.randperm(len(images), generator=generator)[:count]]
        self.pixels, self.grid, self.colours = tasks.pixel_sets(self.images, max(sizes), generator=generator)
        self.sizes, self.places = sizes, rows_of(self.pixels, self.images.shape[-2:])

    def scores(self, predictions: list[tuple[Tensor, Tensor]]) -> dict[str, list[float]]:
        """Mean NLL after each number of pixels."""
        return {part: [self.score(p, n, part) for p, n in zip(predictions, self.sizes, strict=True)] for part in PARTS}

    def score(self, prediction: tuple[Tensor, Tensor], size: int, part: str) -> float:
        """Mean NLL of ``all`` pixels or of the ``unseen`` ones, after ``size`` of them."""
        values = nll(prediction, self.colours)
        if part == "all":
            return float(values.mean())
        unseen = torch.ones_like(values, dtype=torch.bool).scatter(1, self.places[:, :size], False)
        return float(values[unseen].mean())


PARTS = ("unseen", "all")


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
    shown = []
    scales = [(a, b) for a in (0.02, 0.07, 0.15, 0.2, 0.25, 0.3, 0.4) for b in (0.4, 0.7, 0.9, 1.1, 1.4)]
    for size in test.sizes:
        best = dict.fromkeys(PARTS, (float("inf"), 0.0, 0.0, 0.0))
        for width in (0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0, 1.25, 1.5, 2.0, 3.0):
            first, variance = regression(validation, size, width)
            for a, b in scales:
                deviation = (a**2 + b**2 * variance).sqrt().clamp_min(0.1)
                for part in PARTS:
                    best[part] = min(best[part], (validation.score((first, deviation), size, part), width, a, b))
        for part in PARTS:
            _, width, a, b = best[part]
            first, variance = regression(test, size, width)
            prediction = first, (a**2 + b**2 * variance).sqrt().clamp_min(0.1)
            scores[part].append(test.score(prediction, size, part))
            if part == "unseen":
                shown.append(first[:2])
    return scores, shown


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
    predictions = completions(model.eval(), test.pixels, test.grid, test.sizes)
    with torch.no_grad():
        whole, _ = model(test.pixels, test.grid)
    facts = {
        **test.scores(predictions),
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
    sizes, (channels, height, width) = test.sizes, test.images.shape[1:]
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

    def image(flat: Tensor) -> Tensor:
        picture = flat.clamp(0, 1).unflatten(0, (height, width))
        return picture.expand(-1, -1, 3) if channels == 1 else picture

    rows = ("seen", *shots)
    columns = len(sizes) + 1
    grid = figure.add_gridspec(
        2 * len(rows), columns, left=0.5, right=0.995, bottom=0.01, top=0.95, wspace=0.04, hspace=0.06
    )
    for which in range(2):
        for row, name in enumerate(rows):
            for column in range(columns):
                cell = figure.add_subplot(grid[which * len(rows) + row, column])
                cell.set(xticks=[], yticks=[])
                cell.spines[:].set_color("0.6")
                if column == len(sizes):
                    if row == 0:
                        cell.imshow(image(test.images[which].flatten(1).T))
                    else:
                        cell.axis("off")
                elif name == "seen":
                    cell.imshow(known(test.pixels[which, : sizes[column]], height, width, channels))
                else:
                    cell.imshow(image(shots[name][column][which]))
                if column == 0:
                    cell.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)
                if which == row == 0:
                    cell.set_title("truth" if column == len(sizes) else f"{sizes[column]} pixels", fontsize=10)
    save_picture(figure, path)


def known(pixels: Tensor, height: int, width: int, channels: int) -> Tensor:
    """The image ``(H, W, 3)`` of known pixels ``(n, 2 + C)`` on blue."""
    shown = torch.tensor([0.60, 0.72, 0.87]).repeat(height * width, 1)
    shown[rows_of(pixels, (height, width))] = pixels[:, 2:].expand(-1, 3) if channels == 1 else pixels[:, 2:]
    return shown.unflatten(0, (height, width))


def cells(columns: list[list[float]]) -> list[list[str]]:
    """Of each model and size the mean and spread over seeds, the best of a column bold; ``[model][size][seed]``."""
    best = [min(mean(v) for v in column) for column in zip(*columns, strict=True)]
    return [
        [f"**{spread(v)}**" if mean(v) == b else spread(v) for v, b in zip(model, best, strict=True)]
        for model in columns
    ]


def page(
    found: dict[str, list[dict[str, Any]]], floor: dict[str, float], kernel: dict[str, list[float]],
    parts: dict[str, Tensor], test: Test, setting: Setting, args: argparse.Namespace,
) -> str:  # fmt: skip
    """The tables, and how to read them."""
    channels, height, width = test.images.shape[1:]
    smallest, largest = setting.contexts
    tables = []
    for part in PARTS:
        values = [[list(v) for v in zip(*(run[part] for run in runs), strict=True)] for runs in found.values()]
        rows = [[kind, *line] for kind, line in zip(found, cells(values), strict=True)]
        rows.append([KERNEL, *(f"{v:.3f}" for v in kernel[part])])
        rows.append(["each pixel's mean and deviation", *[f"{floor[part]:.3f}"] * len(test.sizes)])
        tables.append(table([f"NLL of {part} pixels", *(f"{size} seen" for size in test.sizes)], rows))
    costs = [
        [
            kind,
            round(args.steps * CHOICES[kind].steps),
            runs[0]["parameters"],
            f"{mean(run['seconds'] for run in runs):.0f}",
        ]
        for kind, runs in found.items()
    ]
    gap = max(run["streamed_against_whole"] for runs in found.values() for run in runs)
    return (
        f"# Image completion: {args.data}, {height} × {width}, {channels} channel{'s' * (channels > 1)}\n\n"
        f"Mean negative log-likelihood (nats a pixel and channel) of {len(test.images)} test images from random pixels "
        f"that arrive as a stream: mean ± deviation over {args.seeds} seed{'s' * (args.seeds > 1)}, the best trained "
        f"model bold. Deviations are at least 0.1, so no model is below "
        f"{torch.distributions.Normal(0.0, 0.1).entropy() - 0.5:.3f}. A model that copies what it has seen is good on "
        f"*all* pixels; *unseen* ones are what completion is about.\n\n{tables[0]}\n\n{tables[1]}\n\n"
        f"{table(['model', 'steps', 'parameters', 'CPU s'], costs)}\n\n"
        f"Training: Adam, cosine, {args.batch} of {len(parts['train'])} images a step, width {setting.width}, "
        f"{setting.slots} slots, sines and cosines of the coordinates at {setting.frequencies} frequencies, contexts "
        f"of {smallest} to {largest} pixels of which {setting.gradient} carry gradients, {args.targets} target pixels "
        "at most; He's initialisation of the perceptrons, and the embedded pixel beside its features, for all. "
        "Settings were compared on 300 validation images of MNIST (`--choose`). Kernel regression keeps all observed "
        "pixels, where UMBC keeps "
        f"{setting.slots} × {setting.width} numbers; its width and its two scales of the deviation are chosen on 200 "
        "validation images for each size and score. The official protocol (CelebA) has 200,000 steps of 256 images at "
        f"width 128 with 128 slots. Completions from the stream and from the whole context differ by {gap:.0e} at most."
        "\n"
    )


def choose(parts: dict[str, Tensor], setting: Setting, args: argparse.Namespace) -> None:
    """What candidates reach on validation images at a third of the steps: the mean over the sizes of training."""
    test = Test(parts["validation"], 300, setting.shown, 1)
    inside = [i for i, size in enumerate(setting.shown) if setting.contexts[0] <= size <= setting.contexts[1]]
    args.steps //= 3
    rows, figures = [], []
    for kind, candidates in CANDIDATES.items():
        if not any(part in kind for part in args.only):
            continue
        for changed in candidates:
            choice = CHOICES[kind]._replace(**changed)
            facts, _ = run(kind, choice, parts, test, setting, args, 100 + args.seed)
            score = mean(facts["unseen"][i] for i in inside)
            says = ", ".join(f"{k} {v:g}" if v not in (True, False) else f"{k} {v}" for k, v in changed.items())
            rows.append([kind, says or "as chosen", f"{score:.3f}", f"{facts['seconds']:.0f}"])
            print(*rows[-1], flush=True)
            figures.append({"model": kind, "changed": changed, "score": score, **facts})
    text = (
        f"# Image completion, choices on validation images: {args.data}\n\nMean NLL of unseen pixels over contexts of "
        f"{', '.join(str(setting.shown[i]) for i in inside)} pixels, 300 validation images, seed {100 + args.seed}, "
        "a third of the steps of the table of test images. *Steps*, *slots*: for each of the setting. Deep Sets takes "
        "over what one slot chose.\n\n"
        f"{table(['model', 'changed', 'NLL', 'CPU s'], rows)}\n"
    )
    save(f"image_completion_{args.data}_choices", args, text, {"runs": figures})


def main() -> None:
    parser = arguments(__doc__, "image_completion")
    parser.add_argument("--data", choices=tuple(SETTINGS), help="default: mnist with --data-root, else digits")
    parser.add_argument("--steps", type=int, help="default: 1200, digits 600; the official protocol has 200,000")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--targets", type=int, default=200, help="random pixels in the loss of a step")
    parser.add_argument("--test-images", type=int, default=500)
    parser.add_argument("--choose", action="store_true", help="compare settings on validation images")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the names of models; default: all")
    parser.add_argument("--kept", type=Path, help="file of finished runs: read if there, written after each")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.test_images = 50, 60
    args.data = args.data or ("digits" if args.data_root is None else "mnist")
    setting, name = SETTINGS[args.data], "image_completion"
    args.steps = args.steps or setting.steps
    if args.data != "digits":
        name += f"_{args.data}"
    args.out.mkdir(parents=True, exist_ok=True)
    parts = load(args.data, args.data_root)
    if args.choose:
        choose(parts, setting, args)
        return
    test = Test(parts["test"], args.test_images, setting.shown, 0)
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
