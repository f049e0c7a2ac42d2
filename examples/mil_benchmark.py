"""Multiple-instance learning on real bags: molecules, parts of photographs, proteins, songs of birds.

    python examples/mil_benchmark.py --data-root DATA              # MUSK, Elephant, Fox, Tiger, ...: DATA/mil/*.npz
    python examples/mil_benchmark.py --data-root DATA --shuffles 10 --sets musk1
    python examples/mil_benchmark.py                               # bags that are made here, without files

The six models of ``mil.py`` under stratified cross-validation over the bags. Features are standardised by the training
folds alone, and the number of steps is fixed beforehand: no test bag chooses anything.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from common import arguments, kept, plotter, save, save_picture, spread, table
from mil import MODELS, bars, build, fit, legend, measures, some_bags
from torch import Tensor
from tqdm import tqdm

SETS = ("musk1", "musk2", "elephant", "fox", "tiger", "protein", "birds_brown_creeper", "corel_dogs")
MEASURES = {"accuracy": "accuracy", "auc": "AUC, mean over folds"}


def load_bags(path: Path) -> tuple[list[Tensor], Tensor]:
    """Bags ``(n_i, d)`` and labels ``(B,)`` of an npz with instances ``x``, bounds ``ptr`` and labels ``y``."""
    with np.load(path) as file:
        x, bounds = torch.from_numpy(file["x"]).float(), file["ptr"]
        labels = torch.from_numpy(file["y"]).float()
    return [x[a:b] for a, b in pairwise(bounds)], labels


def made_bags() -> tuple[list[Tensor], Tensor]:
    """Sixty bags of 3 to 9 instances, every second one with an instance that is shifted."""
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(60) % 2).float()
    bags = [torch.randn(3 + i % 7, 6, generator=generator) for i in range(60)]
    for bag, label in zip(bags, labels, strict=True):
        bag[0] += 4 * label
    return bags, labels


def cross_validate(
    name: str, bags: list[Tensor], labels: Tensor, folds: int, steps: int, seed: int
) -> dict[str, float]:
    """Accuracy over all folds of one shuffle, and the mean AUC of the folds."""
    from sklearn.model_selection import StratifiedKFold

    right, areas = 0, []
    for fold, (train, test) in enumerate(StratifiedKFold(folds, shuffle=True, random_state=seed).split(labels, labels)):
        torch.manual_seed(1000 * seed + fold)
        known = torch.cat([bags[i] for i in train])
        shift, scale = known.mean(0), known.std(0)
        scale = scale.where(scale > 1e-6, 1)
        standard = [(bag - shift) / scale for bag in bags]
        model = build(name, known.shape[1], 64, 0.5)
        fit(model, partial(some_bags, [standard[i] for i in train], labels[train]), steps, 2e-3)
        with torch.no_grad():
            found = measures(model.score([standard[i] for i in test]), labels[test])
        right += round(found["accuracy"] * len(test))
        areas.append(found["auc"])
    return {"accuracy": right / len(bags), "auc": mean(areas)}


def main() -> None:
    parser = arguments(__doc__, "mil_benchmark")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--shuffles", type=int, default=2, help="of the bags, each a cross-validation")
    parser.add_argument("--folds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--kept", type=Path, help="file of finished runs: read if there, written after each")
    args = parser.parse_args()
    if args.quick:
        args.shuffles, args.folds, args.steps = 1, 2, 10
    data = {"made": made_bags()}
    if args.data_root is not None:
        paths = [path for path in (args.data_root / "mil" / f"{name}.npz" for name in args.sets) if path.is_file()]
        if not paths:
            raise SystemExit(f"no bags in {args.data_root / 'mil'}: looked for {', '.join(args.sets)} (.npz)")
        data = {path.stem: load_bags(path) for path in paths}
    args.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, list[dict[str, float]]]] = {name: {stem: [] for stem in data} for name in MODELS}
    for seed in tqdm(range(args.seed, args.seed + args.shuffles), desc="shuffles", unit="shuffle"):
        for stem, (bags, labels) in data.items():
            for name in MODELS:
                run = partial(cross_validate, name, bags, labels, args.folds, args.steps, seed)
                scores = kept(args.kept, f"{stem}, {name}, {args.folds} folds, {args.steps} steps, seed {seed}", run)
                found[name][stem].append(scores)
                print(stem, name, seed, scores, flush=True)
    tables = []
    for measure, says in MEASURES.items():
        rows = [[name, *(spread([r[measure] for r in v]) for v in sets.values())] for name, sets in found.items()]
        tables.append(table([says, *data], rows))
    most = [max(float(labels.mean()), 1 - float(labels.mean())) for _, labels in data.values()]
    facts = [
        ["bags", *(len(bags) for bags, _ in data.values())],
        ["instances", *(sum(map(len, bags)) for bags, _ in data.values())],
        ["features", *(bags[0].shape[1] for bags, _ in data.values())],
        ["accuracy of the more frequent label", *(f"{share:.3f}" for share in most)],
    ]
    page = (
        f"# Multiple-instance learning: real bags\n\n{args.folds}-fold cross-validation, mean ± deviation over "
        f"{args.shuffles} shuffle(s), {args.steps} steps of 50 bags. Published accuracies: none at hand.\n\n"
        + "\n\n".join([*tables, table(["data", *data], facts)])
    )
    plt = plotter()
    figure, axes = plt.subplots(2, 1, figsize=(1 + 1.6 * max(len(data), 4), 7), layout="tight")
    for ax, (measure, says) in zip(axes, MEASURES.items(), strict=True):
        bars(ax, {s: {m: [r[measure] for r in by_set[s]] for m, by_set in found.items()} for s in data})
        ax.set(ylim=(0.4, 1), title=f"cross-validated {says}")
        ax.spines[["top", "right"]].set_visible(False)
    legend(axes[-1])
    save_picture(figure, args.out / "mil_benchmark.png")
    save("mil_benchmark", args, page, {"sets": found})


if __name__ == "__main__":
    main()
