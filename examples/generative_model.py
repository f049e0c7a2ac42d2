"""A generator of digits trained by mini-batch transport alone, with no discriminator: m-OT against BoMb-OT at equal k.

    python examples/generative_model.py                    # scikit-learn's digits; 6 minutes
    python examples/generative_model.py --data-root DATA   # MNIST from DATA/mnist

A small network maps noise to images; its loss is the transport cost between k mini-batches of generated and k of real
images, averaged over the k × k pairs (m-OT) or transported between the mini-batches (BoMb-OT; Nguyen et al. 2022, arXiv
2102.05912), with exact or sliced inner problems. Measured: the exact W2 between generated and held-out images. Every
run has the same steps and, at one k, sees the same batches; the published runs train k times as long at larger k, so
compare m-OT with BoMb-OT at one k, not one k with another.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import arguments, plotter, save, save_picture, table
from torch import Tensor, nn
from tqdm import tqdm

import flows
import mbot

# Transport cost to 10,000 MNIST test images (the BoMb-OT author's blog): entropic inner problems, sliced ones.
PUBLISHED = {
    ("OT", 1): (28.12, 28.12), ("OT", 2): (27.88, 27.53), ("OT", 4): (27.60, 27.41), ("OT", 8): (27.36, 27.10),
    ("SW", 1): (37.57, 37.57), ("SW", 2): (36.01, 35.27), ("SW", 4): (35.18, 34.19), ("SW", 8): (34.33, 33.17),
}  # fmt: skip


def losses(inner: str, k: int, args: argparse.Namespace) -> dict[str, mbot.MiniBatchLoss]:
    """m-OT and BoMb-OT over exact or sliced transport."""
    transport = mbot.ExactOT() if inner == "OT" else mbot.SlicedOT(num_projections=args.projections)
    batches = {"num_batches": k, "batch_size": args.batch_size}
    return {
        f"m-{inner}": mbot.MiniBatchOT(transport, **batches, generator=torch.Generator().manual_seed(args.seed)),
        f"BoMb-{inner}": mbot.BoMbOT(transport, **batches, generator=torch.Generator().manual_seed(args.seed)),
    }


def real_images(args: argparse.Namespace) -> tuple[Tensor, Tensor, int]:
    """Training and held-out images as rows in [-1, 1], and their side."""
    if args.data_root is None:
        data = flows.datasets.digits()
        x = data.rows(torch.randperm(len(data), generator=torch.Generator().manual_seed(args.seed)))[0]
        train, test = x[:1297], x[1297:]
    else:
        train = flows.datasets.mnist(args.data_root).rows(torch.arange(args.images))[0]
        test = flows.datasets.mnist(args.data_root, train=False).rows(torch.arange(args.evaluate))[0]
    return train.flatten(1), test.flatten(1), train.shape[-1]


def train(name: str, loss: mbot.MiniBatchLoss, real: Tensor, args: argparse.Namespace) -> nn.Module:
    """A generator trained with one loss."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = nn.Sequential(
        nn.Linear(args.latent, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, real.shape[1]), nn.Tanh()
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.5, 0.999))
    k, m = loss.num_batches[0], args.batch_size
    for _ in tqdm(range(args.steps), desc=f"{name}, k = {k}", unit="step"):
        rows = torch.randint(len(real), (k, m), generator=generator)
        noise = torch.randn(k, m, args.latent, generator=generator)
        optimizer.zero_grad()
        loss.from_batches(model(noise), real[rows]).backward()
        optimizer.step()
    return model.eval()


def picture(samples: dict[str, Tensor], side: int, notes: dict[str, str], path: Path) -> None:
    """Sixty generated images a model."""
    plt = plotter()
    figure, axes = plt.subplots(1, len(samples), figsize=(2.9 * len(samples), 2.3))
    for ax, (name, images) in zip(axes, samples.items(), strict=True):
        tiles = images[:60].reshape(5, 12, side, side).permute(0, 2, 1, 3).reshape(5 * side, 12 * side)
        ax.imshow(-tiles, cmap="gray", vmin=-1, vmax=1)
        ax.set_title(f"{name}\n{notes[name]}", fontsize=10)
        ax.axis("off")
    figure.tight_layout()
    save_picture(figure, path)


def main() -> None:
    parser = arguments(__doc__, "generative_model")
    parser.add_argument("--counts", nargs="+", type=int, default=(1, 2, 4, 8), help="k")
    parser.add_argument("--batch-size", type=int, default=50, help="m")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--latent", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--projections", type=int, default=100, help="directions of the sliced losses")
    parser.add_argument("--images", type=int, default=60_000, help="MNIST training images in use")
    parser.add_argument("--evaluate", type=int, default=2000, help="MNIST test images that W2 is measured to")
    args = parser.parse_args()
    if args.quick:
        args.counts, args.steps, args.batch_size = (1, 2), 40, 20
    real, test, side = real_images(args)
    noise = torch.randn(len(test), args.latent, generator=torch.Generator().manual_seed(args.seed + 1))
    draw = torch.randperm(len(real), generator=torch.Generator().manual_seed(args.seed))[: len(test)]
    floor = flows.metrics.wasserstein2(real[draw], test)
    samples, notes, rows, runs, biggest = {"real": test}, {"real": f"W2 {floor:.2f}"}, [], [], max(args.counts)
    for inner in ("OT", "SW"):
        for k in args.counts:
            cell = []
            for name, loss in losses(inner, k, args).items():
                model = train(name, loss, real, args)
                with torch.no_grad():
                    made = model(noise)
                cell.append(flows.metrics.wasserstein2(made, test))
                runs.append({"loss": name, "k": k, "w2": cell[-1]})
                if k == biggest:
                    samples[name], notes[name] = made, f"k = {k}, W2 {cell[-1]:.2f}"
            rows.append([inner, k, *cell, *PUBLISHED.get((inner, k), ("–", "–"))])
    args.out.mkdir(parents=True, exist_ok=True)
    picture(samples, side, notes, args.out / "generative_model.png")
    data = "scikit-learn digits" if args.data_root is None else "MNIST"
    page = (
        f"# A generator trained by mini-batch transport: {data}\n\n"
        f"Exact W2 between {len(test):,} generated and as many held-out images with pixels in [-1, 1]; as many "
        f"training images are {floor:.4g} away. {args.steps:,} steps at every k, m = {args.batch_size}, "
        f"seed {args.seed}. At k = 1 the two losses are one. Published: MNIST, entropic inner problems, other network, "
        "budget and pixel range, so only the order within a row compares.\n\n"
        f"{table(['inner', 'k', 'm-OT', 'BoMb-OT', 'published m-OT', 'published BoMb-OT'], rows)}\n"
    )
    save("generative_model", args, page, {"floor": floor, "runs": runs})


if __name__ == "__main__":
    main()
