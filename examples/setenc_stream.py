"""A set encoder reads a stream of points and says at any time which mixture of Gaussians they come from.

    python examples/setenc_stream.py --out docs/images

Trains a small amortised clustering model (UMBC, four slots, sampled full-set gradients), then streams one set in four
ways: one point at a time, one class after the other, one point of each class at a time, and in random chunks. What
the state has seen differs on the way, and the four end in the same prediction. Writes ``setenc_stream.png``.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from common import quick_flag, quick_note
from torch import Tensor

from setenc import tasks
from setenc.tasks.clustering import mixture_log_likelihood

COLOURS = ("#b2182b", "#2166ac", "#1b7837", "#762a83")
SHOWN = (1, 10, 100)


def train(steps: int, points: int, seed: int, width: int = 128) -> tasks.MixtureClustering:
    """Predict the mixture of ``points`` points from the first few or many of them; 128 points carry gradients."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = tasks.MixtureClustering(width=width)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=max(steps, 2))
    for _ in range(steps):
        x = tasks.mixture_sets(16, points, generator=generator).x
        seen = int(math.exp(float(torch.rand((), generator=generator)) * math.log(points + 1)))
        optimiser.zero_grad()
        options = {"chunk_size": 64, "gradient": "sampled", "num_gradient_chunks": 2}
        model.loss(x[:, : max(seen, 1)], target=x, **options).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return model.eval()


def streams(labels: Tensor, generator: torch.Generator) -> dict[str, list[Tensor]]:
    """Four ways to cut the elements of one set into chunks of indices."""
    order = torch.randperm(len(labels), generator=generator)
    classes = [order[labels[order] == k] for k in range(4)]
    longest = max(map(len, classes))
    rounds = [torch.stack([c[i] for c in classes if i < len(c)]) for i in range(longest)]
    return {
        "one point at a time": list(order.split(1)),
        "one class after the other": [i for c in classes for i in c.split(1)],
        "one point of each class at a time": rounds,
        "128 random chunks": list(order.tensor_split(128)),
    }


@torch.no_grad()
def anytime(model: tasks.MixtureClustering, x: Tensor, chunks: list[Tensor]) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
    """What was seen, and the predicted mixture, when 1, 10, 100 and all points have passed (or just more)."""
    state, seen, shots = model.enc.init_state(1), torch.zeros(0, dtype=torch.long), []
    for chunk in chunks:
        state, seen = model.enc.update(state, x[:, chunk]), torch.cat((seen, chunk))
        if len(shots) < len(SHOWN) and len(seen) >= SHOWN[len(shots)]:
            shots.append((seen, model.mixture(model.enc.readout(state))))
    return [*shots, (seen, model.mixture(model.enc.readout(state)))]


def contours(ax: Any, mixture: tuple[Tensor, ...]) -> None:
    """The density of a mixture of the plane, in grey."""
    axis = torch.linspace(-5.5, 5.5, 160)
    density = mixture_log_likelihood(torch.cartesian_prod(axis, axis)[None], *mixture)[0].reshape(160, 160).T
    levels = float(density.max()) - torch.tensor([6.0, 4.0, 2.5, 1.2, 0.4])
    ax.contourf(axis, axis, density, [*levels, float(density.max()) + 1e-3], cmap="Greys", alpha=0.55)
    ax.contour(axis, axis, density, levels, colors="0.35", linewidths=0.6, linestyles="solid")


def picture(sets: tasks.MixtureSets, shots: dict[str, list], path: Path) -> None:
    """A row for each stream, a column for each time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    x, labels = sets.x[0], sets.labels[0]
    figure, axes = plt.subplots(len(shots), len(SHOWN) + 1, figsize=(10.4, 10.9), sharex=True, sharey=True)
    for row, (name, columns) in zip(axes, shots.items(), strict=True):
        for ax, (seen, mixture) in zip(row, columns, strict=True):
            contours(ax, mixture)
            for k, colour in enumerate(COLOURS):
                mine = seen[labels[seen] == k]
                size = 34 if len(seen) < 20 else 9
                ax.scatter(*x[mine].T, s=size, color=colour, lw=0.4, edgecolor="white", zorder=3)
            nll = -mixture_log_likelihood(x[None], *mixture).mean()
            ax.text(0.03, 0.03, f"{len(seen)} seen · NLL of all {nll:.2f}", transform=ax.transAxes, fontsize=9)
            ax.set(xticks=[], yticks=[], xlim=(-5.5, 5.5), ylim=(-5.5, 5.5), aspect="equal")
        row[0].set_ylabel(name, fontsize=9.5)
    for ax, title in zip(axes[0], (*(f"after {n}" for n in SHOWN), f"after all {len(labels)}"), strict=True):
        ax.set_title(title, fontsize=12)
    floor = float(sets.oracle_nll())
    figure.suptitle(
        "One set in four kinds of stream: the mixture predicted so far (contours), the points seen (colour: class).\n"
        f"The last column is the same for every stream; the true mixture has NLL {floor:.2f}. {quick_note()}",
        fontsize=11,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.985))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--points", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/setenc_stream"))
    quick_flag(parser)
    args = parser.parse_args()
    if args.quick:
        args.steps, args.points = 8, 200
    model = train(args.steps, args.points, args.seed)
    generator = torch.Generator().manual_seed(args.seed + 100)
    test = tasks.mixture_sets(200, args.points, generator=generator)
    with torch.no_grad():
        score = float(model.loss(test.x))
    print(f"NLL of 200 fresh sets of {args.points}: {score:.3f}; true mixtures {float(test.oracle_nll()):.3f}")
    generator = torch.Generator().manual_seed(args.seed + 2)
    sets = tasks.mixture_sets(1, args.points, generator=generator)
    while float(sets.proportions.min()) < 0.12 or float(torch.pdist(sets.means[0]).min()) < 2.5:
        sets = tasks.mixture_sets(1, args.points, generator=generator)
    shots = {name: anytime(model, sets.x, cut) for name, cut in streams(sets.labels[0], generator).items()}
    ends = [torch.cat([t.flatten() for t in columns[-1][1]]) for columns in shots.values()]
    apart = max(float((end - ends[0]).abs().max()) for end in ends)
    print(f"largest difference between the four last predictions: {apart:.1e}")
    picture(sets, shots, args.out / "setenc_stream.png")
    print(f"written: {args.out}/setenc_stream.png")


if __name__ == "__main__":
    main()
