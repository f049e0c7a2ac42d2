"""Amortised clustering: four set encoders read points in chunks and predict the mixture that they come from.

    python examples/amortized_clustering.py                  # 1500 steps a run: 5-8 minutes of one core
    python examples/amortized_clustering.py --seeds 3 --runs "sets of 64"    # what slots know, with spread
    python examples/amortized_clustering.py --steps 50000    # the paper's length: hours
    python examples/amortized_clustering.py --models runs/amortized_clustering/models.pt    # train once, look often

The MVN task of Willette et al. 2023 (arXiv 2208.12401): sets of 512 points from mixtures of four Gaussians, read by
UMBC with a set transformer over its slots, by SSE (slot-sigmoid attention, a perceptron on each slot), by Deep Sets,
and by a Set Transformer, which is not mini-batch consistent and averages the encodings of chunks. UMBC is trained with
exact full-set gradients, with sampled ones of 64 or 8 points, and on sets of 64 or 8 points only. Two more UMBC tell
the decoder how much of the set each slot saw (mass), which weighted means forget and proportions need: the same model,
and one of 32 slots placed at points far from each other. Sizes and learning rates are those of the official code. The
tables of the paper were not at hand; true mixtures have a negative log-likelihood of 1.567, the floor.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from common import Beside, arguments, best_bold, plotter, save, save_picture, slot_block, spread, table
from setenc_stream import contours, streams
from torch import Tensor, nn
from tqdm import tqdm

import setenc
from setenc import tasks
from setenc.tasks.clustering import mixture_log_likelihood
from setenc.tasks.completion import PixelEmbedding

POINTS, BATCH, WIDTH = 512, 10, 128
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
MASS, LOCAL = "UMBC+ST, mass", "UMBC, 32 local slots, mass"
COLOURS = {
    "UMBC+ST": "#b2182b",
    MASS: "#f4a582",
    LOCAL: "#67001f",
    "SSE": "#1b7837",
    "Deep Sets": "#762a83",
    "Set Transformer": "#2166ac",
}
STYLES = {512: "-", 64: "--", 8: ":"}


class Run(NamedTuple):
    """A model, how its gradient is had, and how many points carry one: also its chunk at test."""

    model: str
    gradient: str
    n: int

    def __str__(self) -> str:
        of = {"subset": "sets of", "sampled": "512, sampled", "exact": "512, exact", "full": "512, full"}[self.gradient]
        return f"{self.model}, {of} {self.n}" if self.gradient in ("subset", "sampled") else f"{self.model}, {of}"


RUNS = (
    Run("UMBC+ST", "exact", 512),
    Run("UMBC+ST", "sampled", 64),
    Run("UMBC+ST", "sampled", 8),
    Run("UMBC+ST", "subset", 64),
    Run("UMBC+ST", "subset", 8),
    Run(MASS, "subset", 64),
    Run(LOCAL, "subset", 64),
    Run("SSE", "sampled", 64),
    Run("Deep Sets", "sampled", 64),
    Run("Set Transformer", "full", 512),
    Run("Set Transformer", "subset", 64),
    Run("Set Transformer", "subset", 8),
)


class ChunkAverage(nn.Module):
    """A set encoder that is not mini-batch consistent, made to stream: chunks are encoded apart and averaged."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, x: Tensor) -> Tensor:
        """The output for one chunk."""
        return self.decoder(self.encoder(x))

    def init_state(self, batch_size: int) -> list[Tensor]:
        """Encodings of no chunks."""
        return []

    def update(self, state: list[Tensor], chunk: Tensor) -> list[Tensor]:
        """With the encoding of another chunk."""
        return [*state, self.encoder(chunk)]

    def readout(self, state: list[Tensor]) -> Tensor:
        """The output for the mean encoding."""
        return self.decoder(torch.stack(state).mean(0))


class SetTransformer(tasks.MixtureClustering):
    """The baseline of Lee et al. 2019 (arXiv 1810.00825): induced self-attention over points, pooling, `SAB` blocks."""

    def __init__(self) -> None:
        super().__init__(width=WIDTH)
        encoder = nn.Sequential(nn.Linear(2, WIDTH), setenc.ISAB(WIDTH, 16, norm=True), setenc.PMA(WIDTH, 4, norm=True))
        self.enc = ChunkAverage(encoder, setenc.SetTransformerDecoder(WIDTH, 3, out_dim=5, norm=True))

    def forward(self, x: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The mixture predicted from points ``(B, N, 2)`` in one chunk."""
        return self.mixture(self.enc(x))


class Places(nn.Module):
    """Points with sines and cosines of their coordinates: keys that tell places, whatever their length."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = PixelEmbedding(3)

    def forward(self, x: Tensor) -> Tensor:
        """``(…, 2)`` to ``(…, 14)``."""
        return self.embed(x / 10 + 0.5)


def local_slots() -> tasks.MixtureClustering:
    """UMBC of 32 slots that start at points far from each other, tell their mass, and are pooled to four by `PMA`."""
    model = tasks.MixtureClustering(width=WIDTH)
    pooling = setenc.SlotPooling(WIDTH + 14, WIDTH, 32, num_heads=1)
    blocks = nn.Sequential(*(slot_block(WIDTH, 4) for _ in range(2)), nn.LayerNorm(WIDTH))
    decoder = nn.Sequential(blocks, setenc.PMA(WIDTH, 4, norm=True), nn.Linear(WIDTH, 5))
    extractor = Beside(Places(), setenc.MLPDecoder(14, WIDTH, hidden_dim=WIDTH, num_layers=2))
    model.enc = setenc.UMBC(extractor, pooling, decoder, mass_feature=True)
    points = tasks.mixture_sets(64, 64, generator=torch.Generator().manual_seed(77)).x
    pooling.init_slots(extractor(points), columns=slice(0, 14))
    return model


def build(name: str) -> tasks.MixtureClustering:
    """A model with the official code's sizes."""
    if name == LOCAL:
        return local_slots()
    if name == MASS:
        model = tasks.MixtureClustering(width=WIDTH)
        model.enc = setenc.UMBC(model.enc.extractor, model.enc.pooling, model.enc.decoder, mass_feature=True)
        return model
    if name == "Set Transformer":
        return SetTransformer()
    if name == "SSE":
        pooling = setenc.SlotPooling(WIDTH, WIDTH, 4, activation="slot-sigmoid")
        return tasks.MixtureClustering(pooling=pooling, decoder=setenc.MLPDecoder(WIDTH, 5, num_layers=4))
    if name == "Deep Sets":
        decoder = nn.Sequential(setenc.MLPDecoder(WIDTH, 20), nn.Flatten(), nn.Unflatten(1, (4, 5)))
        return tasks.MixtureClustering(pooling=setenc.DeepSetsPooling(WIDTH, WIDTH, "mean", norm=True), decoder=decoder)
    return tasks.MixtureClustering(width=WIDTH)


def options(gradient: str, n: int) -> dict[str, Any]:
    """Of `setenc.encode`, for points that carry gradients ``n`` at a time."""
    if gradient in ("full", "subset"):
        return {}
    return {"gradient": gradient, "chunk_size": 128 if gradient == "exact" else n}


def train(run: Run, model: tasks.MixtureClustering, steps: int, seed: int) -> tuple[list[float], float]:
    """Fresh sets every step, Adam at 1e-3 and a tenth of it from 70 % on; losses, and processor seconds a step."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [int(0.7 * steps)], gamma=0.1)
    losses, began = [], time.process_time()
    for _ in tqdm(range(steps), desc=str(run), unit="step"):
        x = tasks.mixture_sets(BATCH, run.n if run.gradient == "subset" else POINTS, generator=generator).x
        optimiser.zero_grad()
        loss = model.loss(x, **options(run.gradient, run.n))
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses, (time.process_time() - began) / steps


def trained(args: argparse.Namespace, seed: int) -> dict[Run, dict[str, Any]]:
    """All runs, each kept in ``args.models`` as soon as it is finished, and read from there if it is."""
    kept = torch.load(args.models, weights_only=True) if args.models and args.models.exists() else {}
    found: dict[Run, dict[str, Any]] = {}
    for run in RUNS:
        if not any(part in str(run) for part in args.runs):
            continue
        torch.manual_seed(seed)
        model, name = build(run.model), f"{run} ({args.steps} steps, seed {seed})"
        if name not in kept:
            losses, seconds = train(run, model, args.steps, seed)
            kept[name] = {"model": model.state_dict(), "losses": losses, "seconds": seconds}
            if args.models:
                args.models.parent.mkdir(parents=True, exist_ok=True)
                torch.save(kept, args.models)
        model.load_state_dict(kept[name]["model"])
        found[run] = {**kept[name], "model": model.eval()}
    return found


@torch.no_grad()
def read(model: tasks.MixtureClustering, chunks: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The mixture predicted from a stream of chunks ``(B, n, 2)``."""
    state = None
    for chunk in chunks:
        state = model.enc.update(model.enc.init_state(len(chunk)) if state is None else state, chunk)
    return model.mixture(model.enc.readout(state))


def nll_by_size(run: Run, model: tasks.MixtureClustering, x: Tensor) -> dict[str, list[float]]:
    """Of all points and of the points seen, after 8, 16, … points in chunks of the run's size, or in one chunk."""
    found: dict[str, list[float]] = {"all": [], "seen": [], "whole": []}
    for size in SIZES:
        mixture = read(model, x[:, :size].split(run.n, 1))
        found["all"].append(float(-mixture_log_likelihood(x, *mixture).mean()))
        found["seen"].append(float(-mixture_log_likelihood(x[:, :size], *mixture).mean()))
        with torch.no_grad():
            found["whole"].append(float(-mixture_log_likelihood(x, *model(x[:, :size])).mean()))
    return found


def nll_by_stream(model: tasks.MixtureClustering, sets: tasks.MixtureSets) -> tuple[dict[str, float], float]:
    """Of sets read to their end in four kinds of stream, and how far the predictions of a set are apart at most."""
    values: dict[str, list[float]] = {}
    apart = 0.0
    for x, labels in zip(sets.x, sets.labels, strict=True):
        ends = []
        for name, chunks in streams(labels, torch.Generator().manual_seed(0)).items():
            mixture = read(model, (x[None, chunk] for chunk in chunks))
            values.setdefault(name, []).append(float(-mixture_log_likelihood(x[None], *mixture).mean()))
            ends.append(torch.cat([t.flatten() for t in mixture]))
        apart = max(apart, float((torch.stack(ends) - ends[0]).abs().max()))
    return {name: sum(found) / len(found) for name, found in values.items()}, apart


def exact_against_full(model: tasks.MixtureClustering, x: Tensor) -> float:
    """Norm of the difference of the gradients over the norm of the ordinary one, over all parameters."""
    gradients = []
    model.train()
    for gradient in ("full", "exact"):
        torch.manual_seed(0)  # the same random slots
        model.zero_grad()
        model.loss(x, **options(gradient, POINTS)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    model.eval()
    return float((gradients[1] - gradients[0]).norm() / gradients[0].norm())


def spaced_set(points: int, seed: int) -> tasks.MixtureSets:
    """A set whose four components can be told apart by eye."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        sets = tasks.mixture_sets(1, points, generator=generator)
        if float(sets.proportions.min()) > 0.1 and float(torch.pdist(sets.means[0]).min()) > 2.5:
            return sets


def averages(runs: list[dict[str, Any]], part: str) -> list[float]:
    """Over seeds, of the NLL after each number of points."""
    return [mean(values) for values in zip(*(run["nll"][part] for run in runs), strict=True)]


def picture(found: dict[Run, list[dict[str, Any]]], oracle: float, sets: tasks.MixtureSets, path: Path) -> None:
    """NLL over the number of points seen, and one set with the mixtures that four models predict from all of it."""
    plt = plotter()
    figure = plt.figure(figsize=(14.5, 6.4))
    curve = figure.add_axes((0.035, 0.09, 0.51, 0.84))
    for run, results in found.items():
        style = {"color": COLOURS[run.model], "ls": STYLES[run.n], "marker": "osD"[(512, 64, 8).index(run.n)], "ms": 4}
        if run.gradient == "subset" and run.model == "UMBC+ST":
            style |= {"color": "#ef8a62"}
        curve.plot(SIZES, averages(results, "all"), label=str(run), **style)
    curve.axhline(oracle, color="0.2", lw=1.2, label="true mixtures")
    curve.set(xscale="log", xticks=SIZES, xticklabels=SIZES, xlabel="points seen", ylim=(oracle - 0.1, 5))
    curve.set_title("NLL of all 1024 points, by what the model was trained on", fontsize=11)
    curve.minorticks_off()
    curve.spines[["top", "right"]].set_visible(False)
    curve.legend(frameon=False, fontsize=9, ncols=2, loc="upper right")
    x = sets.x
    shown = {run.model: run for run in found}  # of each model the last run, or the one with 64 sampled
    shown |= {run.model: run for run in found if (run.gradient, run.n) == ("sampled", 64)}
    first = [name for name in (LOCAL, "UMBC+ST", "Set Transformer", "Deep Sets", *shown) if name in shown]
    for place, name in enumerate(list(dict.fromkeys(first))[:4]):
        run = shown[name]
        ax = figure.add_axes((0.57 + 0.215 * (place % 2), 0.49 - 0.475 * (place // 2), 0.205, 0.42))
        mixture = read(found[run][0]["model"], x.split(8, 1))
        contours(ax, mixture)
        ax.scatter(*x[0].T, s=3, lw=0, color=COLOURS[name])
        nll = float(-mixture_log_likelihood(x, *mixture).mean())
        ax.set(xticks=[], yticks=[], xlim=(-5.5, 5.5), ylim=(-5.5, 5.5), aspect="equal")
        ax.set_title(f"{name}: NLL {nll:.2f}", fontsize=11, pad=4)
    text = f"one set of {x.shape[1]} points, read in chunks of 8; true mixture: NLL {float(sets.oracle_nll()):.2f}"
    figure.text(0.78, 0.965, text, ha="center", fontsize=11)
    save_picture(figure, path)


def page(
    found: dict[Run, list[dict[str, Any]]], oracle: tuple[float, float], gradient: float, args: argparse.Namespace
) -> str:
    """The tables, and how to read them."""
    lines = {str(run): (runs, "all") for run, runs in found.items()}
    lines |= {f"{run}; read whole": (runs, "whole") for run, runs in found.items() if run.model == "Set Transformer"}
    rows = best_bold({name: [run["nll"][part] for run in runs] for name, (runs, part) in lines.items()})
    for row, (runs, _) in zip(rows, lines.values(), strict=True):
        row.append(f"{1000 * mean(run['seconds'] for run in runs):.4g}")
    ends = []
    kinds = next(iter(found.values()))[0]["streams"]
    for run, runs in found.items():
        apart = max(each["apart"] for each in runs)
        ends.append([run, *(spread([each["streams"][kind] for each in runs]) for kind in kinds), f"{apart:.1e}"])
    return (
        f"# Amortised clustering: mixtures of four Gaussians from the points seen so far\n\n"
        f"Mean negative log-likelihood (nats a point) of all 1024 points of {args.test_sets} test sets, under the "
        f"mixture predicted from the first 8, 16, … points. They are read in chunks as large as what carried gradients "
        f"in training; the Set Transformer depends on that (*read whole*: in one chunk), the others do not. True "
        f"mixtures: {oracle[0]:.3f} on these sets, {oracle[1]:.3f} on 2000 fresh ones.\n\n"
        f"Training: {args.steps} steps of Adam on {BATCH} fresh sets, lr 1e-3, a tenth of it from 70 % on, width "
        f"{WIDTH}; {args.seeds} seed{'s' * (args.seeds > 1)} from {args.seed}, mean ± deviation. The official protocol "
        "has 50,000 steps. *512, exact*: full-set "
        f"gradients in two passes; on a trained model they differ from ordinary backprop by {gradient:.0e} of its "
        f"norm. *512, sampled 64*: the state is that of all 512 points, 64 of them carry (scaled) gradients. *sets of "
        f"64*: trained on sets of 64 points.\n\n"
        f"{table(['trained on', *map(str, SIZES), 'CPU ms/step'], rows)}\n\n"
        f"## Read to the end in four kinds of stream\n\nNLL of a set after all of it has been read, and the "
        f"largest difference between the predictions for one set.\n\n"
        f"{table(['trained on', *kinds, 'largest difference'], ends)}\n\n"
        "UMBC, SSE and Deep Sets end in the same mixture whatever the stream; the Set Transformer, which averages "
        "chunks, does not. No figures of the paper's tables were at hand to compare with.\n"
    )


def figures(found: dict[Run, list[dict[str, Any]]], steps: int) -> list[dict[str, Any]]:
    """Of every run and seed; its loss averaged over fiftieths of the training."""
    every = max(steps // 50, 1)
    kept = ("seed", "nll", "streams", "apart", "seconds")
    return [
        {
            **run._asdict(),
            "sizes": SIZES,
            **{name: results[name] for name in kept},
            "losses": torch.tensor(results["losses"])[: steps - steps % every].view(-1, every).mean(1).tolist(),
        }
        for run, runs in found.items()
        for results in runs
    ]


def main() -> None:
    parser = arguments(__doc__, "amortized_clustering", data=False)
    parser.add_argument("--steps", type=int, default=1500, help="of every run; the official protocol has 50,000")
    parser.add_argument(
        "--runs", nargs="+", default=[""], help="those whose names in the table contain one of these; default: all"
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--test-sets", type=int, default=200)
    parser.add_argument("--models", type=Path, help="file of trained models: read if there, written otherwise")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.test_sets = 25, 20
    args.out.mkdir(parents=True, exist_ok=True)
    if all(run.model == "Set Transformer" for run in RUNS if any(part in str(run) for part in args.runs)):
        parser.error(f"--runs must leave a run of UMBC, SSE or Deep Sets; got {args.runs} of {[*map(str, RUNS)]}")
    found: dict[Run, list[dict[str, Any]]] = {}
    for seed in range(args.seed, args.seed + args.seeds):
        for run, results in trained(args, seed).items():
            found.setdefault(run, []).append({"seed": seed, **results})
    generator = torch.Generator().manual_seed(args.seed + 1000)
    test = tasks.mixture_sets(args.test_sets, SIZES[-1], generator=generator)
    streamed = tasks.mixture_sets(1 if args.quick else 8, 128 if args.quick else POINTS, generator=generator)
    fresh = tasks.mixture_sets(2000, SIZES[-1], generator=generator).oracle_nll()
    for run, results in tqdm([(run, r) for run, runs in found.items() for r in runs], desc="test", unit="run"):
        results["nll"] = nll_by_size(run, results["model"], test.x)
        results["streams"], results["apart"] = nll_by_stream(results["model"], streamed)
        print(run, results["seed"], *(f"{v:.3f}" for v in results["nll"]["whole"]), flush=True)
    streaming = next(run for run in found if run.model != "Set Transformer")
    gradient = exact_against_full(found[streaming][0]["model"], test.x[:BATCH, :POINTS])
    oracle = float(test.oracle_nll()), float(fresh)
    name = "amortized_clustering" + f"_{args.steps}_steps" * (args.seeds > 1)
    picture(found, oracle[0], spaced_set(POINTS, args.seed), args.out / f"{name}.png")
    content = {"oracle_nll": oracle[0], "oracle_nll_fresh": oracle[1], "exact_against_full": gradient}
    save(name, args, page(found, oracle, gradient, args), {**content, "runs": figures(found, args.steps)})


if __name__ == "__main__":
    main()
