"""Image completion: from some pixels of an image, a normal distribution of all of them, better as pixels arrive.

    python examples/image_completion.py                             # scikit-learn's digits, 8 x 8; 2-3 minutes
    python examples/image_completion.py --data-root DATA            # DATA/mnist/*.gz, 28 x 28; 5-8 minutes
    python examples/image_completion.py --data photographs          # 32 x 32 crops of scikit-learn's two photographs

Conditional neural processes (Garnelo et al. 2018, arXiv 1807.01613) with the set encoders of Willette et al. 2023
(arXiv 2208.12401, there on CelebA): UMBC with a set transformer over its slots, trained on large contexts of which 100
pixels carry (scaled) gradients, or on contexts of 100 pixels only; one slot without set transformer; Deep Sets. A model
sees a test image as a stream, and is asked at each context size. No published values were at hand.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import arguments, plotter, save, save_picture, table
from torch import Tensor, nn
from tqdm import tqdm

import flows
import setenc
from setenc import tasks

COLOURS = {
    "UMBC": "#b2182b",
    "UMBC, small contexts": "#ef8a62",
    "one slot": "#1b7837",
    "Deep Sets": "#762a83",
}


class Setting(NamedTuple):
    """Sizes for a data set: of the models, of the contexts in training and at test, and of what carries gradients."""

    width: int
    slots: int
    frequencies: int
    contexts: tuple[int, int]
    gradient: int
    shown: tuple[int, ...]


SETTINGS = {
    "digits": Setting(48, 16, 2, (16, 48), 16, (2, 4, 8, 16, 32, 48)),
    "mnist": Setting(96, 64, 4, (100, 500), 100, (10, 30, 100, 200, 300, 500)),
    "photographs": Setting(96, 64, 4, (200, 500), 100, (30, 100, 200, 300, 400, 500)),
}


def load(name: str, root: Path | None) -> tuple[Tensor, Tensor]:
    """Training and test images ``(N, C, H, W)`` in [0, 1]."""
    if name == "mnist":
        if root is None:
            raise SystemExit("--data mnist needs --data-root: the folder with its idx files, or with mnist/")
        return tuple(flows.datasets.mnist(root, train=train).images.float() / 255 for train in (True, False))  # type: ignore[return-value]
    if name == "photographs":
        from sklearn.datasets import load_sample_images

        photographs = torch.stack([torch.from_numpy(image.copy()) for image in load_sample_images().images])
        images = photographs.permute(0, 3, 1, 2).unfold(2, 32, 16).unfold(3, 32, 16).float() / 255
        left, right = images[:, :, :, :27], images[:, :, :, 29:]  # no pixel in both
        return tuple(part.permute(0, 2, 3, 1, 4, 5).flatten(0, 2) for part in (left, right))  # type: ignore[return-value]
    images = flows.datasets.digits().images.float() / 255
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    return images[:1500], images[1500:]


def models(channels: int, setting: Setting) -> dict[str, tasks.ImageCompletion]:
    """The comparison: all have the same extractor, and the same head on one vector for the image."""
    width = setting.width
    one = setenc.SlotPooling(width, width, 1, num_heads=1, residual=False, slot_norm=True)
    mean = setenc.DeepSetsPooling(width, width, "mean", norm=True)

    def make(pooling: setenc.Pooling | None = None, decoder: nn.Module | None = None) -> tasks.ImageCompletion:
        sizes: dict[str, Any] = {"width": width, "num_slots": setting.slots, "num_frequencies": setting.frequencies}
        return tasks.ImageCompletion(channels, pooling=pooling, decoder=decoder, **sizes)

    return {
        "UMBC": make(),
        "UMBC, small contexts": make(),
        "one slot": make(one, setenc.MLPDecoder(width)),
        "Deep Sets": make(mean, setenc.MLPDecoder(width)),
    }


def train(
    name: str, model: tasks.ImageCompletion, images: Tensor, setting: Setting, args: argparse.Namespace
) -> tuple[list[float], float]:
    """Adam at 1e-3, cosine; contexts of random sizes, the loss on random pixels. Losses, processor seconds a step."""
    generator = torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, args.steps)
    (smallest, largest), small = setting.contexts, "small" in name
    losses, began = [], time.process_time()
    for _ in tqdm(range(args.steps), desc=name, unit="step"):
        batch = images[torch.randint(len(images), (args.batch,), generator=generator)]
        size = int(torch.randint(smallest, largest + 1, (), generator=generator))
        context, grid, colours = tasks.pixel_sets(batch, setting.gradient if small else size, generator=generator)
        target = torch.randperm(grid.shape[1], generator=generator)[: args.targets]
        loss = model.loss(context, grid[:, target], colours[:, target], gradient="sampled", chunk_size=setting.gradient)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses, (time.process_time() - began) / args.steps


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
    """Of each pixel and channel ``(B, M, C)``."""
    return -torch.distributions.Normal(*prediction).log_prob(colours)


def picture(
    curves: dict[str, list[float]], floor: float, shots: dict[str, list[Tensor]], pixels: Tensor, images: Tensor,
    setting: Setting, path: Path,
) -> None:  # fmt: skip
    """NLL over the context, and completions of two images as their contexts grow."""
    plt = plotter()
    sizes, (channels, height, width) = setting.shown, images.shape[1:]
    figure = plt.figure(figsize=(14, 6.6))
    ax = figure.add_axes((0.045, 0.09, 0.34, 0.84))
    for name, values in curves.items():
        ax.plot(sizes, values, "o-", ms=4, color=COLOURS[name], label=name)
    ax.axhline(floor, color="0.5", ls=":", label="each pixel's mean and deviation")
    ax.set(xlabel="pixels seen", title="NLL of all pixels, nats a channel")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)

    def image(flat: Tensor) -> Tensor:
        picture = flat.clamp(0, 1).unflatten(0, (height, width))
        return picture.expand(-1, -1, 3) if channels == 1 else picture

    rows = ("seen", *(name for name in shots if "small" not in name))
    columns = len(sizes) + 1
    grid = figure.add_gridspec(
        2 * len(rows), columns, left=0.47, right=0.995, bottom=0.01, top=0.95, wspace=0.04, hspace=0.06
    )
    for which in range(2):
        for row, name in enumerate(rows):
            for column in range(columns):
                cell = figure.add_subplot(grid[which * len(rows) + row, column])
                cell.set(xticks=[], yticks=[])
                cell.spines[:].set_color("0.6")
                if column == len(sizes):
                    if row == 0:
                        cell.imshow(image(images[which].flatten(1).T))
                    else:
                        cell.axis("off")
                elif name == "seen":
                    cell.imshow(known(pixels[which, : sizes[column]], height, width, channels))
                else:
                    cell.imshow(image(shots[name][column][which]))
                if column == 0:
                    cell.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)
                if which == row == 0:
                    cell.set_title("truth" if column == len(sizes) else f"{sizes[column]} pixels", fontsize=10)
    save_picture(figure, path)


def known(pixels: Tensor, height: int, width: int, channels: int) -> Tensor:
    """The image ``(H, W, 3)`` of known pixels ``(n, 2 + C)`` on blue."""
    shown = torch.tensor([0.60, 0.72, 0.87]).repeat(height, width, 1)
    row, column = (pixels[:, :2] * torch.tensor([height, width])).round().long().T
    shown[row, column] = pixels[:, 2:].expand(-1, 3) if channels == 1 else pixels[:, 2:]
    return shown


def main() -> None:
    parser = arguments(__doc__, "image_completion")
    parser.add_argument("--data", choices=tuple(SETTINGS), help="default: mnist with --data-root, else digits")
    parser.add_argument("--steps", type=int, default=4000, help="the official protocol has 200,000")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--targets", type=int, default=200, help="random pixels in the loss of a step")
    parser.add_argument("--test-images", type=int, default=500)
    args = parser.parse_args()
    if args.quick:
        args.steps, args.test_images = 200, 100
    args.data = args.data or ("digits" if args.data_root is None else "mnist")
    setting, name = SETTINGS[args.data], "image_completion"
    if args.data != "digits":
        name += f"_{args.data}"
    args.out.mkdir(parents=True, exist_ok=True)
    training, test = load(args.data, args.data_root)
    generator = torch.Generator().manual_seed(args.seed)
    test = test[torch.randperm(len(test), generator=generator)[: args.test_images]]
    pixels, grid, colours = tasks.pixel_sets(test, max(setting.shown), generator=generator)
    mean, std = (s.flatten(1).T for s in (training.mean(0), training.std(0).clamp_min(0.1)))
    floor = float(nll((mean, std), colours).mean())
    found, shots = {}, {}
    torch.manual_seed(args.seed)
    for kind, model in models(test.shape[1], setting).items():
        losses, seconds = train(kind, model, training, setting, args)
        predictions = completions(model.eval(), pixels, grid, setting.shown)
        shots[kind] = [mean for mean, _ in predictions]
        with torch.no_grad():
            whole, _ = model(pixels, grid)
        found[kind] = {
            "nll": [float(nll(p, colours).mean()) for p in predictions],
            "streamed_against_whole": float((shots[kind][-1] - whole).abs().max()),
            "parameters": sum(p.numel() for p in model.parameters()),
            "seconds": seconds,
            "losses": [sum(losses[i : i + 50]) / len(losses[i : i + 50]) for i in range(0, len(losses), 50)],
        }
    curves = {kind: results["nll"] for kind, results in found.items()}
    picture(curves, floor, shots, pixels, test, setting, args.out / f"{name}.png")
    save(name, args, page(found, floor, training, len(test), setting, args), {"floor": floor, "models": found})


def page(
    found: dict[str, dict[str, Any]], floor: float, training: Tensor, tested: int, setting: Setting,
    args: argparse.Namespace,
) -> str:  # fmt: skip
    """The table, and how to read it."""
    best = [min(column) for column in zip(*(r["nll"] for r in found.values()), strict=True)]
    rows = []
    for kind, results in found.items():
        cells = [f"**{v:.3f}**" if v == b else f"{v:.3f}" for v, b in zip(results["nll"], best, strict=True)]
        rows.append([kind, *cells, results["parameters"], 1000 * results["seconds"]])
    channels, height, width = training.shape[1:]
    smallest, largest = setting.contexts
    return (
        f"# Image completion: {args.data}, {height} × {width}, {channels} channel{'s' * (channels > 1)}\n\n"
        f"Mean negative log-likelihood (nats a pixel and channel) of all pixels of {tested} test images, from random "
        f"pixels that arrive as a stream. Deviations are at least 0.1, so no model is below "
        f"{torch.distributions.Normal(0.0, 0.1).entropy() - 0.5:.3f}; each pixel's mean and deviation over the "
        f"training images: {floor:.3f}.\n\n"
        f"Training: {args.steps} steps of Adam on {args.batch} of {len(training)} images, lr 1e-3, cosine, width "
        f"{setting.width}, {setting.slots} slots, sines and cosines of the coordinates at {setting.frequencies} "
        f"frequencies, contexts of {smallest} to {largest} pixels of which "
        f"{setting.gradient} carry gradients (*small contexts*: of {setting.gradient} pixels), {args.targets} target "
        f"pixels at most; seed {args.seed}; one run each. The official protocol (CelebA) has 200,000 steps of 256 "
        f"images at width 128 with 128 slots and plain coordinates. Completions from the stream and from the whole "
        f"context differ by {max(r['streamed_against_whole'] for r in found.values()):.0e} at most.\n\n"
        f"{table(['model', *(f'{size} pixels' for size in setting.shown), 'parameters', 'CPU ms/step'], rows)}\n"
    )


if __name__ == "__main__":
    main()
