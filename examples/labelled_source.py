"""From one labelled data set to another: digits of one style become digits of another style and keep their class.

    python examples/labelled_source.py                                  # scikit-learn's digits, upright to turned
    python examples/labelled_source.py --data-root DATA --task mnist-usps

Flows start at the images of the source, not at noise, in the principal components of both data sets. The model is not
told the class: it keeps it where the pairs it trained on do. Independent pairs and plain OT ignore the labels; within
classes there are independent pairs (sources matched to the targets' classes) and conditional OT, with sources drawn
independently (class counts differ, transport is exact) or matched. Measured on held-out images: the share whose class a
classifier of the target style still finds, and the squared W2 to the target's images of that class.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import numpy as np
import torch
from common import arguments, plotter, save, save_picture, spread, table
from domain_adaptation import turned
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from tqdm import tqdm

import flows
import mbot

METHODS: dict[str, tuple[mbot.Coupling, str]] = {
    "independent": (mbot.IndependentCoupling(), "independent"),
    "OT": (mbot.OTCoupling(), "independent"),
    "independent within classes": (mbot.IndependentCoupling(), "matched"),
    "C²OT": (mbot.ConditionalOTCoupling(), "independent"),
    "C²OT, sources matched": (mbot.ConditionalOTCoupling(), "matched"),
}
Labelled = tuple[Tensor, Tensor]


def images(args: argparse.Namespace) -> tuple[Labelled, Labelled, Labelled, Labelled]:
    """Training and held-out images with labels: of the source, then of the target."""
    generator = torch.Generator().manual_seed(0)
    if args.task == "digits":
        data = flows.datasets.digits()
        x, y = data.rows(torch.randperm(len(data), generator=generator))
        half = len(x) // 2  # no image is in both data sets
        ends = (x[:half], y[:half]), (turned(x[half:], 60.0, generator), y[half:])
        (a, b), (c, d) = (((x[200:], y[200:]), (x[:200], y[:200])) for x, y in ends)
        return a, b, c, d
    if args.data_root is None:
        raise SystemExit(f"--task {args.task} needs --data-root, a folder with mnist/ and usps/")
    source = []
    for train, count in ((True, args.images), (False, 1000)):
        data = flows.datasets.mnist(args.data_root, train=train)
        x, y = data.rows(torch.randperm(len(data), generator=generator)[:count])
        source.append((F.interpolate(x, size=(16, 16), mode="bilinear", antialias=True, align_corners=False), y))
    target = []
    with np.load(args.data_root / "usps/usps_u16div2000.npz") as file:
        for part, count in (("train", None), ("test", 1000)):
            x = torch.from_numpy(file[f"x_{part}"].astype(np.float32) / 1000 - 1).reshape(-1, 1, 16, 16)
            target.append((x[:count], torch.from_numpy(file[f"y_{part}"].astype(np.int64))[:count]))
    return source[0], source[1], target[0], target[1]


class Components:
    """The leading principal components of images, to unit mean variance."""

    def __init__(self, x: Tensor, count: int) -> None:
        self.shape, flat = x.shape[1:], x.flatten(1)
        self.mean = flat.mean(0)
        _, _, self.axes = torch.pca_lowrank(flat - self.mean, count, niter=6)
        self.scale = ((flat - self.mean) @ self.axes).std()

    def __call__(self, x: Tensor) -> Tensor:
        """``(n, count)``."""
        return (x.flatten(1) - self.mean) @ self.axes / self.scale

    def images(self, z: Tensor) -> Tensor:
        """Back to pixels."""
        return (z * self.scale @ self.axes.T + self.mean).reshape(-1, *self.shape)


def measure(z: Tensor, y: Tensor, target: Labelled, classifier: LogisticRegression) -> dict[str, Any]:
    """Share of kept classes, and squared W2 to the target's samples of the class, mean over the classes."""
    kept = float((classifier.predict(z.numpy()) == y.numpy()).mean())
    apart = [flows.metrics.squared_wasserstein2(z[y == c], target[0][target[1] == c]) for c in y.unique()]
    together = flows.metrics.squared_wasserstein2(z, target[0])
    return {"kept": kept, "by_class": sum(apart) / len(apart), "w2": together, "each class": apart}


def main() -> None:
    parser = arguments(__doc__, "labelled_source")
    parser.add_argument("--task", choices=("digits", "mnist-usps"), default="digits")
    parser.add_argument("--images", type=int, default=20_000, help="of MNIST")
    parser.add_argument("--components", type=int, default=48)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    if args.quick:
        args.steps, args.seeds = 50, [0]
    torch.manual_seed(args.seed)
    source, start, target, end = images(args)
    space = Components(torch.cat((source[0], target[0])), min(args.components, source[0][0].numel()))
    inside = [(space(x), y) for x, y in (source, start, target, end)]
    classifier = LogisticRegression(C=0.3, max_iter=500).fit(inside[2][0].numpy(), inside[2][1].numpy())
    found: dict[str, Any] = {"source, unmoved": [measure(*inside[1], inside[3], classifier)]}
    found["target, held out against trained on"] = [measure(*inside[3], inside[2], classifier)]
    moved = {}
    for name, seed in tqdm([(name, seed) for name in METHODS for seed in args.seeds]):
        coupling, sampling = METHODS[name]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*ignores", UserWarning)  # that is what two of the rows show
            loader = flows.CoupledLoader(
                TensorDataset(*inside[2]), TensorDataset(*inside[0]), coupling, 128, 640, seed=seed,
                source_sampling=sampling,
            )  # fmt: skip
        torch.manual_seed(seed)
        model = flows.models.ResidualMLP(inside[0][0].shape[1], width=128, depth=3)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in tqdm(range(args.steps), desc=name, leave=False):
            batch = loader.next_batch()
            loss = flows.regression_loss(model, flows.along_path(flows.LinearPath(), batch.x0, batch.x1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        loader.close()
        z = flows.integrate(model.eval(), inside[1][0]).final
        moved.setdefault(name, z)
        found.setdefault(name, []).append(measure(z, start[1], inside[3], classifier))
    rows = [
        [name, *(spread([run[key] for run in runs]) for key in ("kept", "by_class", "w2"))]
        for name, runs in found.items()
    ]
    said = {"digits": "scikit-learn's digits, upright to turned by 60°", "mnist-usps": "MNIST to USPS, 16 × 16 pixels"}
    page = f"""# From one labelled data set to another: {said[args.task]}

{len(source[0]):,} source and {len(target[0]):,} target images in {space.axes.shape[1]} principal components; an MLP
(3 blocks of 128 features) that is not told the class, {args.steps:,} steps of 128 pairs, coupled 640 at a time; seeds
{", ".join(map(str, args.seeds))}.
Held-out source images are pushed to the target; classes are read by a logistic regression of the target style.

{table(["pairs", "class kept", "W2² by class", "W2²"], rows)}
"""
    plt = plotter()
    shown = [int(torch.nonzero(start[1] == c)[0]) for c in range(10)]
    figure, axes = plt.subplots(len(moved) + 1, 10, figsize=(7, 0.75 * (len(moved) + 1)))
    for row, (name, z) in zip(axes, [("source", inside[1][0]), *moved.items()], strict=True):
        for ax, image in zip(row, space.images(z[shown]), strict=True):
            ax.imshow(image[0].clamp(-1, 1), cmap="gray_r")
            ax.set(xticks=[], yticks=[])
        row[0].set_ylabel(name.replace(" ", "\n", 1), rotation=0, ha="right", va="center", fontsize=7)
    figure.tight_layout(pad=0.3)
    stem = "labelled_source" + ("_mnist_usps" if args.task == "mnist-usps" else "")
    args.out.mkdir(parents=True, exist_ok=True)
    save_picture(figure, args.out / f"{stem}.png")
    save(stem, args, page, {"runs": found})


if __name__ == "__main__":
    main()
