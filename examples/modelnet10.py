"""Point clouds of any size: which object, from 100 points of its surface or from all, read as a stream.

    python examples/modelnet10.py                              # six solids that are made here; 2 minutes
    python examples/modelnet10.py --data-root DATA --seeds 3   # DATA/modelnet10/*.npz: 10 kinds of furniture

Trained on 100 random points of each shape, tested on 100, on 1,000, and on all points streamed in chunks of 64: in
random order, and from below to above, as a scanner might deliver them. UMBC with local slots
(`SlotPooling.init_slots`, ``mass_feature``, a transformer block on the slots), UMBC as published (a set transformer on
slots that start alike; Willette et al. 2023, arXiv 2208.12401), Deep Sets with a maximum (the pooling of PointNet, Qi
et al. 2017, arXiv 1612.00593), and a Set Transformer (Lee et al. 2019, arXiv 1810.00825), which must see a set at once:
of a stream it averages the encodings of chunks. All see the same sines and cosines of the coordinates, and start from
He's initialisation.

The npz holds ``points_u16`` (N, n, 3) in a random order, ``label``, ``is_test`` and ``classes`` of the official split.
Each shape is centred and scaled to the unit ball.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from common import Beside, arguments, he_init, plotter, save, save_picture, slot_block, spread, table
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import setenc

LOCAL, PUBLISHED, MAX, ONE_SHOT = "UMBC, local slots", "UMBC as published", "Deep Sets, max", "Set Transformer"
COLOURS = {LOCAL: "#b2182b", PUBLISHED: "#ef8a62", MAX: "#762a83", ONE_SHOT: "#2166ac"}
SOLIDS = ("sphere", "box", "cylinder", "cone", "torus", "tetrahedron")
POINTS, CHUNK, WIDTH, FREQUENCIES = 100, 64, 64, 3
PLACES = 3 + 6 * FREQUENCIES


class Places(nn.Module):
    """Coordinates with their sines and cosines at ``π 2^j``."""

    def forward(self, x: Tensor) -> Tensor:
        """``(…, 3)`` to ``(…, PLACES)``."""
        angles = (x[..., None] * torch.pi * 2.0 ** torch.arange(FREQUENCIES)).flatten(-2)
        return torch.cat((x, angles.sin(), angles.cos()), -1)


def solids(count: int, points: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points ``(count, points, 3)`` of stretched and turned solids, with a little noise, and their kinds."""
    kinds = torch.arange(count) % len(SOLIDS)

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator)

    turn, height, side = 2 * torch.pi * uniform(count, points), 2 * uniform(count, points) - 1, uniform(count, points)
    circle = torch.stack((turn.cos(), turn.sin()), -1)
    normal = F.normalize(torch.randn(count, points, 3, generator=generator), dim=-1)
    square = 2 * uniform(count, points, 3) - 1
    face = F.one_hot(torch.randint(3, (count, points), generator=generator), 3)
    box = torch.where(face > 0, (side[..., None] > 0.5) * 2.0 - 1, square)
    rim = torch.where(side < 0.3, (side / 0.3).sqrt(), torch.ones(()))  # a disc at the bottom, and the wall
    level = torch.where(side < 0.3, -torch.ones(()), height)
    cylinder = torch.cat((rim[..., None] * circle, level[..., None]), -1)
    radius = torch.where(side < 0.3, rim, ((1 - height) / 2).clamp_min(0).sqrt())
    cone = torch.cat((radius[..., None] * circle, torch.where(side < 0.3, level, 1 - 2 * radius)[..., None]), -1)
    tube = 0.35 * torch.stack(((torch.pi * height).cos(), (torch.pi * height).sin()), -1)
    torus = torch.cat(((0.65 + tube[..., :1]) * circle, tube[..., 1:]), -1)
    corners = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    shares = -uniform(count, points, 3).clamp_min(1e-6).log()
    which = torch.stack([(torch.arange(4) + k) % 4 for k in range(4)])[:, :3]
    faces = corners[which[torch.randint(4, (count, points), generator=generator)]]
    tetrahedron = ((shares / shares.sum(-1, keepdim=True))[..., None] * faces).sum(-2)
    x = torch.stack((normal, box, cylinder, cone, torus, tetrahedron))[kinds, torch.arange(count)]
    x = x * (0.5 + uniform(count, 1, 3))
    angle = 2 * torch.pi * uniform(count)
    zero = torch.zeros(count)
    turned = torch.stack(
        (angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero, zero, zero, zero + 1), -1
    ).view(count, 3, 3)
    return x @ turned.mT + 0.02 * torch.randn(x.shape, generator=generator), kinds


def load(args: argparse.Namespace) -> tuple[dict[str, tuple[Tensor, Tensor]], list[str]]:
    """Points ``(N, n, 3)`` in the unit ball and kinds ``(N,)`` to train on and to test, and the names of the kinds."""
    if args.data_root is None:
        generator = torch.Generator().manual_seed(0)
        count = 120 if args.quick else 1200
        drawn = {part: solids(n, 1024, generator) for part, n in (("train", 2 * count), ("test", count // 2))}
        names = list(SOLIDS)
    else:
        found = sorted((args.data_root / "modelnet10").glob("*.npz")) or sorted(args.data_root.glob("modelnet10*.npz"))
        if not found:
            raise SystemExit(f"no modelnet10/*.npz in {args.data_root}")
        with np.load(found[0]) as file:
            x = torch.from_numpy(file["points_u16"].astype(np.float32) / 65535)
            x = x * torch.from_numpy(file["scale"])[:, None, None] + torch.from_numpy(file["lo"])[:, None]
            kinds, tests = torch.from_numpy(file["label"]).long(), torch.from_numpy(file["is_test"])
            names = [str(name) for name in file["classes"]]
        drawn = {"train": (x[~tests], kinds[~tests]), "test": (x[tests], kinds[tests])}
    return {part: (centred(x), kinds) for part, (x, kinds) in drawn.items()}, names


def centred(x: Tensor) -> Tensor:
    """Shapes in the unit ball around their mean."""
    x = x - x.mean(1, keepdim=True)
    return x / x.norm(dim=-1).amax(1)[:, None, None]


class OneShot(nn.Module):
    """A set transformer that must see a set at once; of a stream it averages the encodings of chunks."""

    def __init__(self, kinds: int) -> None:
        super().__init__()
        blocks = (setenc.ISAB(WIDTH, 16, norm=True), setenc.ISAB(WIDTH, 16, norm=True))
        self.encoder = nn.Sequential(
            extractor(), nn.Linear(PLACES + WIDTH, WIDTH), *blocks, setenc.PMA(WIDTH, norm=True)
        )
        self.decoder = nn.Linear(WIDTH, kinds)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, 1, kinds)`` from points seen at once."""
        return self.decoder(self.encoder(x))

    def stream(self, chunks: tuple[Tensor, ...]) -> Tensor:
        """Logits from chunks."""
        return self.decoder(torch.stack([self.encoder(chunk) for chunk in chunks]).mean(0))


def extractor() -> nn.Module:
    """Embedded points, and a perceptron of them beside: what all models start from."""
    return Beside(Places(), setenc.MLPDecoder(PLACES, WIDTH, hidden_dim=WIDTH, num_layers=3))


def build(name: str, kinds: int, points: Tensor) -> nn.Module:
    """A model by its name; local slots start at places of ``points``."""
    if name == ONE_SHOT:
        return he_init(OneShot(kinds))
    in_dim = PLACES + WIDTH
    head = nn.Linear(WIDTH, kinds)
    if name == MAX:
        decoder: nn.Module = setenc.MLPDecoder(WIDTH, kinds, num_layers=3)
        return he_init(setenc.UMBC(extractor(), setenc.DeepSetsPooling(in_dim, WIDTH, "max"), decoder))
    if name == PUBLISHED:
        decoder = nn.Sequential(setenc.SetTransformerDecoder(WIDTH, 2, num_outputs=1, norm=True), head)
        return he_init(setenc.UMBC(extractor(), setenc.SlotPooling(in_dim, WIDTH, 32), decoder))
    pooling = setenc.SlotPooling(in_dim, WIDTH, 32, num_heads=1, residual=False)
    decoder = nn.Sequential(slot_block(WIDTH, 4), nn.LayerNorm(WIDTH), setenc.PMA(WIDTH, norm=True), head)
    enc = setenc.UMBC(extractor(), pooling, decoder, mass_feature=True)
    he_init(enc)
    nn.init.normal_(enc.mass_map.weight, std=0.1)
    pooling.init_slots(enc.extractor(points), columns=slice(0, PLACES))
    return enc


def train(model: nn.Module, x: Tensor, kinds: Tensor, args: argparse.Namespace, seed: int, name: str) -> float:
    """Adam with one cycle on random points, turned a little and stretched; processor seconds a step."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, args.lr, total_steps=args.steps)
    began = time.process_time()
    for _ in tqdm(range(args.steps), desc=name, unit="step"):
        rows = torch.randint(len(x), (args.batch,), generator=generator)
        places = torch.rand(args.batch, x.shape[1], generator=generator).argsort(1)[:, :POINTS]
        points = x[rows[:, None], places] * (0.8 + 0.4 * torch.rand(args.batch, 1, 3, generator=generator))
        loss = F.cross_entropy(model(points)[:, 0], kinds[rows], label_smoothing=0.1)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return (time.process_time() - began) / args.steps


@torch.no_grad()
def streamed(model: nn.Module, x: Tensor) -> Tensor:
    """Logits from a stream of chunks."""
    chunks = x.split(CHUNK, 1)
    if isinstance(model, OneShot):
        return model.stream(chunks)
    state = model.init_state(len(x))
    for chunk in chunks:
        state = model.update(state, chunk)
    return model.readout(state)


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, kinds: Tensor) -> dict[str, float]:
    """Accuracies, and the largest difference between the logits of streams and of whole sets."""
    right: dict[str, list[Tensor]] = {name: [] for name in ("100", "1,000", "all, streamed", "all, from below")}
    apart = 0.0
    for part, wanted in zip(x.split(100), kinds.split(100), strict=True):
        scan = part.gather(1, part[..., 2:].argsort(1).expand(-1, -1, 3))
        logits = (model(part[:, :POINTS]), model(part[:, :1000]), streamed(model, part), streamed(model, scan))
        whole = model(part)
        apart = max(apart, *(float((found - whole).abs().max()) for found in logits[2:]))
        for kept, found in zip(right.values(), logits, strict=True):
            kept.append(found[:, 0].argmax(-1) == wanted)
    return {**{name: float(torch.cat(values).float().mean()) for name, values in right.items()}, "apart": apart}


def picture(found: dict[str, list[dict[str, Any]]], data: tuple[Tensor, Tensor], names: list[str], path: Path) -> None:
    """A shape of each of some kinds, and accuracies."""
    plt = plotter()
    figure = plt.figure(figsize=(12, 3.2))
    shown = min(len(names), 5)
    for kind in range(shown):
        ax = figure.add_axes((0.01 + 0.135 * kind, 0.05, 0.135, 0.85), projection="3d")
        points = data[0][int((data[1] == kind).nonzero()[0])][:600]
        ax.scatter(*points.T, s=2, c=points[:, 2], lw=0)
        ax.set_axis_off()
        ax.set_title(names[kind].replace("_", " "), fontsize=9)
    ax = figure.add_axes((0.73, 0.16, 0.25, 0.74))
    for name, runs in found.items():
        columns = [key for key in runs[0] if key not in ("apart", "seconds", "parameters")]
        values = np.array([[run[key] for key in columns] for run in runs])
        ax.errorbar(range(len(columns)), values.mean(0), values.std(0), fmt="o-", ms=4, color=COLOURS[name], label=name)
        ax.set_xticks(
            range(len(columns)), [key.replace(", ", ",\n") if "all" in key else key for key in columns], fontsize=8
        )
    ax.set_title("accuracy, trained on 100 points", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=7)
    save_picture(figure, path)


def main() -> None:
    parser = arguments(__doc__, "modelnet10")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3, help="highest rate of the one-cycle schedule")
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    if args.quick:
        args.steps, args.batch = 30, 16
    args.out.mkdir(parents=True, exist_ok=True)
    data, names = load(args)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in COLOURS}
    for name in COLOURS:
        for seed in range(args.seed, args.seed + args.seeds):
            torch.manual_seed(seed)
            model = build(name, len(names), data["train"][0][:64, :POINTS])
            seconds = train(model, *data["train"], args, seed, f"{name}, seed {seed}")
            size = sum(p.numel() for p in model.parameters())
            found[name].append({**evaluate(model.eval(), *data["test"]), "seconds": seconds, "parameters": size})
            print(name, seed, found[name][-1], flush=True)
    stem = "modelnet10" if args.data_root else "modelnet10_solids"
    picture(found, data["test"], names, args.out / f"{stem}.png")
    columns = [key for key in found[LOCAL][0] if key not in ("apart", "seconds", "parameters")]
    rows = [
        [
            name,
            *(spread([run[key] for run in runs]) for key in columns),
            f"{max(run['apart'] for run in runs):.0e}",
            runs[0]["parameters"],
            f"{1000 * mean(run['seconds'] for run in runs):.0f}",
        ]
        for name, runs in found.items()
    ]
    text = (
        f"# Point clouds of any size: {'ModelNet10' if args.data_root else 'made solids'}\n\nAccuracy on "
        f"{len(data['test'][1])} test shapes of {len(names)} kinds, mean ± deviation over {args.seeds} "
        f"seed{'s' * (args.seeds > 1)}. Trained on {POINTS} random points of {len(data['train'][1])} shapes, "
        f"{args.steps} steps of {args.batch}, width {WIDTH}; nothing was chosen on test shapes. Streams of all "
        f"{data['test'][0].shape[1]:,} points come in chunks of {CHUNK}: in random order, and from below to above. "
        "*Apart*: the largest difference of a logit between a stream and the whole set. No published values were at "
        "hand.\n\n"
        f"{table(['points', *columns, 'apart', 'parameters', 'CPU ms/step'], rows)}\n"
    )
    save(stem, args, text, {"kinds": names, "models": found})


if __name__ == "__main__":
    main()
