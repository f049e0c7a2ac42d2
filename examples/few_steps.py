"""From many steps to one: reflow, annealing reflow for a small student, distillation and MeanFlow, side by side.

    python examples/few_steps.py                          # 8 gaussians -> moons given the class, 3 seeds: 20 minutes
    python examples/few_steps.py --data digits            # scikit-learn's digits given their class, 3 seeds: 12 minutes
    python examples/few_steps.py --kept runs/few.pt       # finished parts are kept there and not trained again

Teachers are trained by flow matching on independent, OT and C²OT pairs. From the independent one come pairs of start
point and sample (`flows.generate_pairs`), on which its copies and students of a quarter of its parameters are trained:
by reflow (Liu et al. 2022, arXiv 2209.03003), once and twice, by annealing reflow and by distillation with and without
the flow-guided term (SlimFlow; Zhu et al. 2024, arXiv 2407.12718). MeanFlow (Geng et al. 2025, arXiv 2505.13447)
needs no teacher. Measured on fresh points: squared W2 on moons, Fréchet distance and consistency on digits.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from common import arguments, kept, plotter, save, save_picture, spread, table
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from tqdm import tqdm

import flows
import mbot
from flows import evaluation, metrics

MATCHED = 512  # points that a coupling sees
COUPLINGS = {"FM": None, "OT": mbot.OTCoupling(), "C²OT": mbot.ConditionalOTCoupling("discrete")}
SOLVERS: dict[str, dict[str, Any]] = {
    "adaptive": {"method": "dopri5"},
    "100 Euler steps": {"method": "euler", "steps": 100},
    "one step": {"method": "euler", "steps": 1},
}

DATA = "other data"
ONCE, TWICE = "FM reflowed once, one step", "FM reflowed twice, one step"
DISTILLED = "reflowed and distilled"
GUIDED = "reflowed and distilled, flow-guided"
SMALL, ANNEALED = "small student, reflow", "small student, annealing reflow"
AVERAGE = "MeanFlow, {} pairs"


@dataclass(frozen=True)
class Setting:
    """Budget of a data set; chosen on seeds from 100 on, whose draws no table uses."""

    teacher: int  # steps
    average: int  # steps of MeanFlow
    student: int  # steps of reflow and of distillation
    small: int  # steps of a small student
    annealed: int  # those of them in which start points anneal, exponentially
    batch: int
    average_batch: int  # of MeanFlow
    pairs: int  # made by a model
    width: int  # small students have half of it
    lr: float  # peak of Adam's rate, which falls to 0
    average_lr: float  # of MeanFlow
    share: float  # of MeanFlow's intervals
    times: Any  # of MeanFlow
    test: int  # points measured


# fmt: off
SETTINGS = {
    "moons": Setting(
        teacher=2000, average=4000, student=1000, small=3000, annealed=600, batch=128, average_batch=512,
        pairs=10_000, width=64, lr=2e-3, average_lr=4e-3, share=0.75, times=flows.UniformTimes(), test=4000,
    ),
    "digits": Setting(
        teacher=1500, average=1500, student=1000, small=3000, annealed=600, batch=128, average_batch=128,
        pairs=5_000, width=128, lr=1e-3, average_lr=1e-3, share=0.75, times=flows.UniformTimes(), test=600,
    ),
}
# fmt: on


class Moons:
    """Eight gaussians to two moons, given the moon."""

    classes, shape, measures = 2, (2,), ("W2²",)

    def __init__(self, seed: int, test: int) -> None:
        self.data: Dataset[Any] = TensorDataset(*flows.datasets.moons(32_768, generator=generator(seed, "data")))
        made = generator(seed, "test")
        self.reference, self.y = flows.datasets.moons(test, official=True, generator=made)
        self.x0 = self.source(test, made)
        x, y = flows.datasets.moons(3 * test, generator=made)  # as many of each class as in the reference
        self.others = torch.cat([x[y == c][: int((self.y == c).sum())] for c in range(2)])
        self.others_y = self.y

    @staticmethod
    def source(n: int, generator: torch.Generator | None = None) -> Tensor:
        """Start points."""
        return flows.datasets.eight_gaussians(n, generator=generator)

    def measure(self, x: Tensor, y: Tensor) -> dict[str, float]:
        """Squared W2 to the reference."""
        return {"W2²": metrics.squared_wasserstein2(x, self.reference)}


class Digits:
    """Noise to scikit-learn's digits, given the digit; a third of the images is held out to measure against."""

    classes, shape, measures = 10, (1, 8, 8), ("Fréchet", "consistency")
    num_classes, source = classes, None

    def __init__(self, seed: int, test: int) -> None:
        everything = flows.datasets.digits()
        x, labels = everything.rows(torch.randperm(len(everything), generator=generator(seed, "split")))
        self.x, self.labels = x[test:], labels[test:]
        self.data: Dataset[Any] = TensorDataset(self.x, self.labels)
        made = generator(seed, "test")
        self.y, self.x0 = labels[:test], torch.randn(test, *self.shape, generator=made)
        rows = torch.randperm(len(self.x), generator=made)[:test]
        self.others, self.others_y = self.x[rows], self.labels[rows]
        self.judge, self.accuracy = evaluation.train_classifier(self, seed)
        self.features = self.judge.features(x[:test]).detach()

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Training images and their labels, for the classifier."""
        rows = torch.randperm(len(self.x), generator=generator)[:n]
        return self.x[rows], self.labels[rows]

    def measure(self, x: Tensor, y: Tensor) -> dict[str, float]:
        """Fréchet distance of the classifier's features to held-out images, and how often it sees the class asked."""
        with torch.no_grad():
            distance = metrics.frechet_distance(self.judge.features(x), self.features)
        return {"Fréchet": distance, "consistency": metrics.condition_consistency(self.judge, x, y).accuracy}


PROBLEMS = {"moons": Moons, "digits": Digits}
TITLES = {"moons": "8 gaussians to moons, given the moon", "digits": "scikit-learn's digits, given the digit"}
MEASURED = {
    "moons": "Squared W2 between {} samples and as many points of the toy, spaced evenly on each moon.",
    "digits": "{} samples: Fréchet distance to held-out images in the features of a small classifier, trained on the "
    "other images, and the share in which it finds the digit asked for.",
}
NOTES = {
    "moons": "OT pairs ignore the moon that is asked for, and their flow, solved exactly or in one step, mixes both. "
    "MeanFlow on independent pairs misses its limit narrowly; on the seeds of the choice it kept it, and twice as many "
    "steps of half the batch changed nothing there.",
    "digits": "OT pairs ignore the digit that is asked for: their flow is far from the data however it is solved, and "
    "MeanFlow of such pairs inherits that. C²OT pairs keep the classes.",
}


def generator(seed: int, name: str) -> torch.Generator:
    """A stream of random numbers for one use."""
    return torch.Generator().manual_seed(1000 * seed + sum(map(ord, name)))


def network(problem: Any, width: int, seed: int, average: bool = False) -> nn.Module:
    """A perceptron that is told the class."""
    torch.manual_seed(seed)
    dim = int(torch.tensor(problem.shape).prod())
    return flows.models.ResidualMLP(dim, num_classes=problem.classes, width=width, average_velocity=average)


def optimisation(model: nn.Module, steps: int, setting: Setting) -> dict[str, Any]:
    """Settings of a trainer: Adam, a linear decay to 0."""
    optimizer = torch.optim.Adam(model.parameters(), lr=setting.lr, fused=True)
    schedule = flows.warmup_schedule(optimizer, warmup=min(50, steps // 4), steps=steps)
    return {"optimizer": optimizer, "scheduler": schedule, "clip": 1.0, "ema": None, "progress": False}


def train(
    model: nn.Module, data: Dataset[Any], problem: Any, steps: int, setting: Setting, seed: int,
    coupling: mbot.Coupling | None = None, objective: flows.Objective | None = None,
) -> None:  # fmt: skip
    """Train on a data set or on pairs."""
    together = setting.batch if coupling is None else max(setting.batch, MATCHED)
    source = problem.source if data is problem.data else None  # pairs have their own start points
    loader = flows.CoupledLoader(data, source, coupling, setting.batch, together, seed=seed)
    options = optimisation(model, steps, setting)
    flows.Trainer(model, loader, steps=steps, objective=objective, seed=seed, **options).fit()


class Run:
    """Everything of one seed: models, pairs and rows, each kept as soon as it is there."""

    def __init__(self, name: str, setting: Setting, seed: int, path: Path | None) -> None:
        self.problem, self.setting, self.seed = PROBLEMS[name](seed, setting.test), setting, seed
        self.label, self.path = f"{name}, {setting}, seed {seed}", path
        self.models: dict[str, nn.Module] = {}
        self.seconds: dict[str, float] = {}  # of a part and all that it rests on
        self.rows: dict[str, dict[str, Any]] = {}

    def _kept(self, what: str, make: Callable[[], Any]) -> Any:
        return kept(self.path, f"{self.label}: {what}", make)

    def train(self, what: str, model: nn.Module, fit: Callable[[nn.Module], Any], after: str | None = None) -> None:
        """A model, trained by ``fit`` after another part."""

        def make() -> dict[str, Any]:
            began = time.process_time()
            fit(model)
            return {"state": model.state_dict(), "seconds": time.process_time() - began}

        found = self._kept(what, make)
        model.load_state_dict(found["state"])
        self.models[what] = model.eval()
        self.seconds[what] = found["seconds"] + (self.seconds[after] if after else 0.0)

    def pairs(self, teacher: str) -> flows.PairedDataset:
        """Pairs that a model makes."""
        n, problem = self.setting.pairs, self.problem
        made = generator(self.seed, "pairs")
        y = torch.randint(problem.classes, (n,), generator=made)
        x0 = None if problem.source is None else problem.source(n, made)

        def make() -> dict[str, Any]:
            began = time.process_time()
            found = flows.generate_pairs(
                self.models[teacher], n, y=y, x0=x0, shape=problem.shape, seed=self.seed, rtol=1e-3, atol=1e-3
            )
            spent = time.process_time() - began
            return {"x0": found.x0, "x1": found.x1, "info": found.info, "seconds": spent}

        found = self._kept(f"pairs of {teacher}", make)
        self.seconds[f"pairs of {teacher}"] = found["seconds"] + self.seconds[teacher]
        return flows.PairedDataset(found["x0"], found["x1"], y, info=found["info"])

    def measure(self, row: str, what: str, sample: Callable[[nn.Module], tuple[Tensor, float]]) -> None:
        """A row of the table."""

        def make() -> dict[str, Any]:
            x, nfe = sample(self.models[what])
            shown = x[:: max(1, len(x) // 1000)]
            return {"nfe": nfe, **self.problem.measure(x, self.problem.y), "shown": shown}

        self.rows[row] = {**self._kept(f"row {row}", make), "seconds": self.seconds[what]}

    def euler(self, row: str, what: str, solver: str = "one step") -> None:
        """The row of a model solved as a flow."""

        def sample(model: nn.Module) -> tuple[Tensor, float]:
            solved = flows.integrate(model, self.problem.x0, y=self.problem.y, **SOLVERS[solver])
            return solved.final, solved.nfe

        self.measure(row, what, sample)

    def all(self) -> dict[str, dict[str, Any]]:
        """Every row."""
        problem, setting, seed = self.problem, self.setting, self.seed
        fit = partial(train, problem=problem, setting=setting, seed=seed)
        others = {"nfe": 0, "seconds": 0.0, "shown": problem.others[:: max(1, len(problem.others) // 1000)]}
        self.rows[DATA] = self._kept("row data", lambda: problem.measure(problem.others, problem.others_y)) | others
        for name, coupling in COUPLINGS.items():
            model = network(problem, setting.width, seed)
            self.train(name, model, lambda m, c=coupling: fit(m, problem.data, steps=setting.teacher, coupling=c))
            for solver in SOLVERS:
                self.euler(f"{name}, {solver}", name, solver)

        pairs = self.pairs("FM")
        copied = copy.deepcopy(self.models["FM"])
        self.train(ONCE, copied, partial(fit, data=pairs, steps=setting.student), "pairs of FM")
        self.euler(ONCE, ONCE)
        again = self.pairs(ONCE)
        copied = copy.deepcopy(self.models[ONCE])
        self.train(TWICE, copied, partial(fit, data=again, steps=setting.student), f"pairs of {ONCE}")
        self.euler(TWICE, TWICE)
        for name, guided in ((DISTILLED, 0.0), (GUIDED, 1.0)):

            def distil(student: nn.Module, guided: float = guided) -> None:
                options = optimisation(student, setting.student, setting)
                flows.distill(
                    student, self.models[ONCE], again, steps=setting.student, guided=guided, batch_size=setting.batch,
                    seed=seed, **options,
                )  # fmt: skip

            self.train(name, copy.deepcopy(self.models[ONCE]), distil, f"pairs of {ONCE}")
            self.euler(name, name)

        annealed = flows.AnnealingReflow(pairs, setting.annealed, "exp", source=problem.source)
        for name, data in ((SMALL, pairs), (ANNEALED, annealed)):
            model = network(problem, setting.width // 2, seed)
            self.train(name, model, partial(fit, data=data, steps=setting.small), "pairs of FM")
            self.euler(name, name)

        average = replace(setting, batch=setting.average_batch, lr=setting.average_lr)
        for name, coupling in COUPLINGS.items():
            what = AVERAGE.format(name.replace("FM", "independent"))
            objective = flows.MeanFlow(share=setting.share, times=setting.times, power=0.0)
            model = network(problem, setting.width, seed, average=True)
            options = {"steps": setting.average, "coupling": coupling, "objective": objective, "setting": average}
            self.train(what, model, partial(fit, data=problem.data, **options))
            self.measure(what, what, lambda m: (flows.MeanFlow.sample(m, problem.x0, problem.y), 1))
        return self.rows


def ratios(runs: list[dict[str, dict[str, Any]]], measure: str) -> list[list[str]]:
    """What was expected of means over seeds, and what came: ``[claim, limit, found, met]``."""

    def value(row: str) -> float:
        return mean(run[row][measure] for run in runs)

    teacher, solved = value("FM, 100 Euler steps"), value("FM, adaptive")
    claims = [(f"{row} / teacher's 100 Euler steps", value(row) / teacher, 1.2) for row in (DISTILLED, GUIDED)]
    claims.append((f"{ANNEALED} / {SMALL}", value(ANNEALED) / value(SMALL), 1.0))
    names = [AVERAGE.format(c) for c in ("independent", "OT", "C²OT")]
    claims += [(f"{name} / adaptive FM", value(name) / solved, 2.0) for name in names]
    return [[name, f"≤ {limit:g}", f"{found:.2f}", "yes" if found <= limit else "no"] for name, found, limit in claims]


def page(runs: list[dict[str, dict[str, Any]]], setting: Setting, sizes: tuple[int, int], args: Any) -> str:
    """The tables, and how to read them."""
    problem = PROBLEMS[args.data]
    rows = [
        [
            name,
            *(spread([run[name][m] for run in runs]) for m in problem.measures),
            f"{mean(run[name]['nfe'] for run in runs):.0f}" if name != DATA else "–",
            f"{mean(run[name]['seconds'] for run in runs):.0f}",
        ]
        for name in runs[0]
    ]
    first = problem.measures[0]
    return (
        f"# Few steps: {TITLES[args.data]}\n\n{MEASURED[args.data].format(setting.test)} Mean ± deviation over "
        f"{len(runs)} seed{'s' * (len(runs) > 1)} from {args.seed}. *{DATA}* is what a perfect model would reach: "
        "samples of finite number differ. CPU s: all that a row rests on, teacher and pairs included.\n\n"
        f"{table(['model', *problem.measures, 'NFE', 'CPU s'], rows)}\n\nExpected of the mean {first}:\n\n"
        f"{table(['ratio', 'expected', 'found', 'met'], ratios(runs, first))}\n\n"
        f"Teachers have {sizes[0]:,} parameters, small students {sizes[1]:,}. Steps of {setting.batch} samples: "
        f"{setting.teacher:,} for teachers, {setting.student:,} for reflow and distillation, {setting.small:,} for "
        f"small students, in {setting.annealed:,} of which start points anneal (exponentially); {setting.average:,} "
        f"steps of {setting.average_batch} for MeanFlow. Adam at {setting.lr:g} ({setting.average_lr:g} for MeanFlow), "
        f"linear decay. OT and C²OT match {MATCHED} points at once. {setting.pairs:,} pairs come from the adaptive "
        "solver at 1e-3. Reflow and distillation start from the weights of the model that made their pairs, small "
        "students from scratch. The distilled models learn from pairs of the model reflowed once, which is the "
        f"teacher of the flow-guided term too. MeanFlow: intervals for a share of {setting.share:g} of the pairs, "
        f"{setting.times}, no weights. Settings were chosen on seeds from 100 on, with other draws.\n\n"
        f"{NOTES[args.data]}\n"
    )


def picture(rows: dict[str, dict[str, Any]], data: str, path: Path) -> None:
    """Samples of each row of one seed: points in the plane, or a line of images."""
    plt = plotter()
    shown = {name: row["shown"] for name, row in rows.items() if "100 Euler" not in name}
    if data == "moons":
        figure, axes = plt.subplots(3, -(-len(shown) // 3), figsize=(14, 7))
        for ax in axes.flat:
            ax.axis("off")
        for ax, (name, x) in zip(axes.flat, shown.items(), strict=False):
            ax.scatter(*x.T, s=1, color="#2166ac")
            ax.set(xlim=(-5.5, 7.5), ylim=(-4, 4.5), aspect="equal")
            ax.set_title(f"{name}\nW2² {rows[name]['W2²']:.3f}, NFE {rows[name]['nfe']:.0f}", fontsize=8)
    else:
        figure, axes = plt.subplots(len(shown), 1, figsize=(9, 0.55 * len(shown)))
        for ax, (name, x) in zip(axes, shown.items(), strict=True):
            ax.imshow(x[:24, 0].clamp(-1, 1).permute(1, 0, 2).flatten(1), cmap="gray_r")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            ax.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    figure.tight_layout()
    save_picture(figure, path)


def main() -> None:
    parser = arguments(__doc__, "few_steps", data=False)
    parser.add_argument("--data", choices=tuple(SETTINGS), default="moons")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from --seed on")
    parser.add_argument("--kept", type=Path, help="file of finished parts: read if there, written after each")
    args = parser.parse_args()
    torch.set_num_threads(1)
    setting = SETTINGS[args.data]
    if args.quick:
        args.seeds = 1
        setting = replace(setting, teacher=20, average=20, student=20, small=20, pairs=300, test=200)
    args.out.mkdir(parents=True, exist_ok=True)
    runs = []
    for seed in tqdm(range(args.seed, args.seed + args.seeds), unit="seed"):
        run = Run(args.data, setting, seed, args.kept)
        runs.append(run.all())
        sizes = [flows.models.parameter_count(run.models[name]) for name in ("FM", SMALL)]
        for name, row in runs[-1].items():
            print(f"{seed} {name:40}", *(f"{k} {v:.4g}" for k, v in row.items() if k != "shown"), flush=True)
    name = f"few_steps_{args.data}"
    picture(runs[0], args.data, args.out / f"{name}.png")
    figures = [{what: {k: v for k, v in row.items() if k != "shown"} for what, row in run.items()} for run in runs]
    save(name, args, page(runs, setting, sizes, args), {"setting": vars(setting), "runs": figures})


if __name__ == "__main__":
    main()
