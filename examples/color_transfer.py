"""Colour transfer between two images by mini-batch transport of palettes or of all pixels.

    python examples/color_transfer.py                                   # scikit-learn's sample images; 2 minutes
    python examples/color_transfer.py --data-root DATA                  # DATA/colour_transfer/s1.png and t1.png
    python examples/color_transfer.py --source a.jpg --target b.jpg --batch-size 100
    python examples/color_transfer.py --clusters 0 --megapixels 1 --num-batches 4 --batch-size 250 --visits 4

m-OT, m-POT and BoMb-OT against full OT, on palettes of 3000 k-means clusters a side (section "colour transfer" of
Nguyen et al. 2022, arXiv 2102.05912: k = m = 10) or, with ``--clusters 0``, on every pixel in memory that does not grow
with the number of pairs. Each point is visited ``--visits`` times (167 is the official code's mean at its 5000
iterations), and goes to the mean of the colours that it was matched to, weighted and divided by the mass that it sent:
the official code divides the picture by its maximum instead. The published comparison is pictures only; the exact W2
between the transported and the target palette is ours.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import arguments, mark_quick, peak_memory, plotter, save, table
from PIL import Image
from torch import Tensor

import flows
import mbot

HEADER = ("method", "palette W2", "spread", "reached", "CPU seconds")
FULL = (
    "While the costs of all pairs of colours fit in memory, as those of palettes do, full OT is the better and the "
    "faster choice; mini-batches are for all pixels (`--clusters 0`), where it has no answer."
)


def losses(args: argparse.Namespace) -> dict[str, mbot.MiniBatchLoss]:
    """The mini-batch methods, all on the same batches."""

    def batches() -> dict:
        generator = torch.Generator().manual_seed(args.seed)
        return {
            "num_batches": args.num_batches,
            "batch_size": args.batch_size,
            "disjoint": True,
            "generator": generator,
        }

    return {
        "m-OT": mbot.MiniBatchOT(mbot.ExactOT(), **batches()),
        "m-POT": mbot.MiniBatchOT(mbot.PartialOT(mass=args.mass), **batches()),
        "BoMb-OT": mbot.BoMbOT(mbot.ExactOT(), **batches()),
    }


def transport(loss: mbot.MiniBatchLoss, x: Tensor, y: Tensor, args: argparse.Namespace) -> Moved:
    """Barycentric map of the plan that all visits together give."""
    size = args.num_batches * args.batch_size
    loss.plan(x[:size], y[:size])  # compiles the solver
    began = time.process_time()
    mapped, reached = loss.barycentric_map(x, y, visits=args.visits)
    return Moved(mapped, float(reached.float().mean()), time.process_time() - began)


@dataclass
class Moved:
    """Transported colours, the share of points that sent mass (the others keep their colour), and processor seconds."""

    colours: Tensor
    reached: float
    seconds: float


def full_transport(x: Tensor, y: Tensor) -> Moved:
    """Optimal transport of whole palettes."""
    began = time.process_time()
    mapped, reached = mbot.ExactOT().plan(mbot.pairwise_cost(x, y)).barycentric_map(y)
    return Moved(mapped, float(reached.float().mean()), time.process_time() - began)


def read(path: Path | None, sample: str, megapixels: float | None) -> np.ndarray:
    """An image as floats ``(H, W, 3)`` in [0, 1], from a file or from scikit-learn's samples."""
    if path is None:
        from sklearn.datasets import load_sample_image

        image = Image.fromarray(load_sample_image(sample))
    else:
        image = Image.open(path).convert("RGB")
    if megapixels is not None:
        factor = (megapixels * 1e6 / (image.width * image.height)) ** 0.5
        image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)
    return np.asarray(image, dtype=np.float32) / 255


def palette(image: np.ndarray, clusters: int, seed: int) -> tuple[Tensor, Tensor]:
    """Colours ``(n, 3)`` and the colour of each pixel; every pixel is its own if ``clusters`` is 0."""
    pixels = image.reshape(-1, 3)
    if clusters == 0:
        return torch.from_numpy(pixels), torch.arange(len(pixels))
    from sklearn.cluster import MiniBatchKMeans

    found = MiniBatchKMeans(clusters, batch_size=4096, n_init=1, max_iter=20, random_state=seed).fit(pixels)
    return torch.from_numpy(found.cluster_centers_).float().clamp(0, 1), torch.from_numpy(found.labels_).long()


def distance(colours: Tensor, target: Tensor, seed: int) -> float:
    """Exact W2 in grey levels (0 … 255) between palettes, or between 3000 pixels of each."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (p[torch.randperm(len(p), generator=generator)[:3000]] for p in (colours, target))
    return round(255 * flows.metrics.wasserstein2(x, y), 3)


def picture(images: dict[str, np.ndarray], palettes: dict[str, Tensor], notes: dict[str, str], path: Path) -> None:
    """The images, and under each its palette in the red-blue plane."""
    plt = plotter()
    generator = torch.Generator().manual_seed(0)
    figure, axes = plt.subplots(2, len(images), figsize=(2.7 * len(images), 4.9), height_ratios=(1, 1.15))
    for (name, image), top, below in zip(images.items(), *axes, strict=True):
        top.imshow(image.clip(0, 1))
        top.set_title(name, fontsize=12)
        top.axis("off")
        colours = palettes[name]
        shown = colours[torch.randperm(len(colours), generator=generator)[:3000]].clamp(0, 1)
        below.scatter(shown[:, 0], shown[:, 2], c=shown.numpy(), s=4, lw=0)
        below.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=[], yticks=[], aspect="equal")
        below.set_xlabel(notes.get(name, ""), fontsize=10)
    axes[1, 0].set_ylabel("palette: blue against red", fontsize=10)
    figure.tight_layout()
    mark_quick(figure)
    figure.savefig(path, dpi=80, pil_kwargs={"quality": 85})
    plt.close(figure)


def main() -> None:
    parser = arguments(__doc__, "color_transfer")
    parser.add_argument("--source", type=Path, help="image to recolour")
    parser.add_argument("--target", type=Path, help="image to take colours from")
    parser.add_argument("--clusters", type=int, default=3000, help="colours of a palette; 0 for every pixel")
    parser.add_argument("--megapixels", type=float, help="resize both images to this many million pixels")
    parser.add_argument("--batch-size", type=int, default=10, help="m")
    parser.add_argument("--num-batches", type=int, default=10, help="k")
    parser.add_argument("--mass", type=float, default=0.9, help="s of m-POT")
    parser.add_argument("--visits", type=int, default=167, help="how often each colour is in a batch")
    args = parser.parse_args()
    if args.quick:
        args.clusters, args.visits, args.megapixels = min(args.clusters, 200), min(args.visits, 4), 0.01
    if args.data_root is not None:
        folder = args.data_root / "colour_transfer"
        args.source, args.target = args.source or folder / "s1.png", args.target or folder / "t1.png"
    args.out.mkdir(parents=True, exist_ok=True)
    source, target = read(args.source, "flower.jpg", args.megapixels), read(args.target, "china.jpg", args.megapixels)
    (x, labels), (y, _) = (palette(image, args.clusters, args.seed) for image in (source, target))
    found = {name: transport(loss, x, y, args) for name, loss in losses(args).items()}
    if args.clusters:
        found["full OT"] = full_transport(x, y)
    images, palettes = {"source": source}, {"source": x}
    start = distance(x, y, args.seed)
    notes, rows = {"source": f"W2 {start:.1f}"}, [["none", start, float(x.var(0).sum() / y.var(0).sum()), "–", "–"]]
    figures = {"source": {"w2": start}}
    for name, moved in found.items():
        w2, spread = distance(moved.colours, y, args.seed), float(moved.colours.var(0).sum() / y.var(0).sum())
        palettes[name], images[name] = moved.colours, moved.colours[labels].reshape(source.shape).numpy()
        Image.fromarray((images[name] * 255).round().clip(0, 255).astype(np.uint8)).save(
            args.out / f"color_transfer_{name.replace(' ', '_')}.png"
        )
        notes[name] = f"W2 {w2:.1f}, {moved.seconds:.1f} s"
        rows.append([name, w2, spread, f"{100 * moved.reached:.1f} %", f"{moved.seconds:.1f}"])
        figures[name] = {"w2": w2, "spread": spread, "reached": moved.reached, "seconds": moved.seconds}
    images["target"], palettes["target"] = target, y
    picture(images, palettes, notes, args.out / "color_transfer.jpg")
    peak = peak_memory()
    what = f"palettes of {args.clusters} colours" if args.clusters else f"all pixels ({len(x):,} to {len(y):,})"
    compared = "" if args.clusters else " (3000 pixels of each)"
    page = (
        f"# Colour transfer, {what}\n\n"
        f"k = {args.num_batches}, m = {args.batch_size}, {args.visits} visits a colour, m-POT with s = {args.mass:g}, "
        f"seed {args.seed}. W2: exact, in grey levels, between the transported and the target palette{compared}. "
        "Spread: variance of the transported palette over the target's. Reached: colours that sent any mass. Colours "
        "count equally, as in the official code; on all pixels they count as often as they occur. "
        f"No distances or times are published.\n\n{table(HEADER, rows)}\n\n"
        f"Peak memory of the process: {peak:,.0f} MB.{' ' + FULL if args.clusters else ''}\n"
    )
    save("color_transfer", args, page, {"peak_memory_mb": peak, "methods": figures})


if __name__ == "__main__":
    main()
