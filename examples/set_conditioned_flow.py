"""A set as the condition of a flow: some points predict their population, some pixels complete a digit.

    python examples/set_conditioned_flow.py                        # both tasks, one seed; 8 minutes of one core
    python examples/set_conditioned_flow.py --tasks population --seeds 3

A set encoder (UMBC, Willette et al. 2023, arXiv 2208.12401) turns a set of any size into a vector, the condition of a
flow; the flow-matching loss alone trains both. Which coupling is right follows from what the condition is (C²OT, Cheng
and Schwing 2025, arXiv 2503.10636):

* ``population``: from points of an unknown mixture, generate fresh points of it. One set conditions many targets, so
  its identity is a class: C²OT with discrete conditions pairs inside each set, exactly. Gradients are those of the full
  sets, sampled: of a large set one chunk of 128 points is backpropagated.
* ``digits``: from some pixels, generate the whole image. Each condition comes once, so C²OT prices the mismatch of two
  embeddings. These move with the encoder: they are detached, and pairs are random for the first half of the steps.
  Before the embeddings mean something, C²OT is OT: the noise tells the image, and the encoder has nothing to learn.

Compared at equal budgets: the coupling (independent, OT that ignores the set, C²OT) under UMBC, and Deep Sets under
C²OT. Two more UMBC under C²OT: for populations one whose slots tell their mass, since shares of a population are what a
mean forgets; for digits one whose slots start at places far from each other and are asked by place: what each of the
64 pixels reads, in four numbers, is the condition (`SlotQuery`).
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from statistics import mean
from typing import Any, NamedTuple

import torch
from common import Beside, arguments, he_init, plotter, save, save_picture, slot_block, spread, table
from torch import Tensor, nn
from tqdm import tqdm

import flows
import mbot
import setenc
from setenc import tasks

MASS, ASKED = "UMBC, mass", "UMBC, asked by place"
METHODS = (("UMBC", "C²OT"), ("UMBC", "independent"), ("UMBC", "OT"), ("Deep Sets", "C²OT"))
COLOURS = ("#1b7837", "#2166ac", "#b2182b", "#762a83", "#e08214", "#8c510a")
SOLVERS = {"many": {"method": "rk4", "steps": 8}, "few": {"method": "euler", "steps": 2}}
Scores = dict[str, dict[int, float]]


class Batch(NamedTuple):
    """Sets ``(S, n, e)``, samples to generate ``(T, d)``, and the set that conditions each of these ``(T,)``."""

    observed: Tensor
    targets: Tensor
    owner: Tensor


class SetFlow(nn.Module):
    """A set encoder and the velocity field that it conditions.

    Args:
        encoder: ``"UMBC"`` (slots, a set transformer on them), also with ``", mass"`` of the slots or ``", asked by
            place"`` (slots that start apart, read by every place); or ``"Deep Sets"`` (the mean, a deep perceptron).
        task: sizes of elements and samples, number of slots, width of the field.
        width: features of the encoder and of the condition.
    """

    def __init__(self, encoder: str, task: Task, width: int) -> None:
        super().__init__()
        features: nn.Module = setenc.MLPDecoder(task.element_dim, width, num_layers=3, hidden_dim=width)
        self.query, size = None, width
        if encoder == ASKED:
            features = Beside(nn.Identity(), features)
            in_dim = task.element_dim + width
            pooling: setenc.Pooling = setenc.SlotPooling(in_dim, width, 16, num_heads=1, residual=False)
            decoder: nn.Module = nn.Sequential(slot_block(width, 4), nn.LayerNorm(width))
            targets = task.places()
            columns, size = slice(0, targets.shape[1]), 4 * len(targets)
            self.query = setenc.SlotQuery(pooling, columns=columns)
            self.register_buffer("targets", targets, persistent=False)
            self.reading = he_init(nn.Sequential(nn.Linear(width, 4), nn.Flatten(), nn.BatchNorm1d(size, affine=False)))
        else:
            if encoder == "Deep Sets":
                pooling = setenc.DeepSetsPooling(width, width)
                decoder = setenc.MLPDecoder(width, hidden_dim=2 * width, num_layers=4)
            else:
                pooling = setenc.SlotPooling(width, width, task.slots)
                decoder = setenc.SetTransformerDecoder(width, 2, num_outputs=1)
            # What tells sets apart is small at first, and whatever they share grows: standardised, it cannot fade.
            decoder = nn.Sequential(decoder, nn.Flatten(), nn.BatchNorm1d(width, affine=False))
        self.enc = setenc.UMBC(features, pooling, decoder, mass_feature=encoder in (MASS, ASKED))
        he_init(self.enc)
        if encoder in (MASS, ASKED):
            nn.init.normal_(self.enc.mass_map.weight, std=0.1)
        if encoder == ASKED:
            elements = task.draw(torch.Generator().manual_seed(0)).observed
            pooling.init_slots(features(elements), columns=columns)
        self.field = flows.models.ResidualMLP(task.sample_dim, condition_dim=size, width=task.field_width, expansion=2)

    def condition(self, observed: Any, **options: Any) -> Tensor:
        """Conditions ``(S, c)`` of sets; ``options`` (gradient, chunk_size, …) go to `setenc.encode`."""
        output = setenc.encode(self.enc, observed, **options)
        if self.query is not None:
            output = self.reading(self.query(output, self.targets.expand(len(output), -1, -1)))
        return output

    def loss(self, batch: Batch, coupling: mbot.Coupling, generator: torch.Generator, **options: Any) -> Tensor:
        """Flow matching under a coupling that may look at the sets' identity and at their (detached) embeddings."""
        condition = self.condition(batch.observed, generator=generator, **options)
        y = {"set": batch.owner, "embedding": condition.detach()[batch.owner]}
        noise = torch.randn(batch.targets.shape, generator=generator)
        points = flows.FlowMatching(coupling).sample(noise, batch.targets, y, generator=generator)
        return flows.regression_loss(lambda t, x, y: self.field(t, x, condition[y["set"]]), points)

    def generate(self, condition: Tensor, noise: Tensor, solver: str) -> Tensor:
        """Samples ``(S, m, d)`` for conditions ``(S, c)`` from noise ``(S, m, d)``."""
        y = condition.repeat_interleave(noise.shape[1], 0)
        return flows.integrate(self.field, noise.flatten(0, 1), y=y, **SOLVERS[solver]).final.view_as(noise)


class Population:
    """Points of a random Gaussian mixture, streamed, condition a flow to fresh ones; squared W2 to the truth."""

    name, unit, score, element_dim, sample_dim, field_width = "population", "points", "W2²", 2, 2, 64
    slots, panels, wait, extra = 16, (3, 5), 0.0, ((MASS, "C²OT"),)

    def __init__(self, args: argparse.Namespace) -> None:
        self.conditional = mbot.ConditionalOTCoupling({"set": "discrete"})
        self.options = {"chunk_size": 128, "gradient": "sampled", "num_gradient_chunks": 1}
        self.sets, self.points, self.largest, self.counts = 16, 48, 512, (10, 100, 1000, 10_000)
        test_sets, test_points = 16, 512
        if args.quick:
            self.sets, self.points, self.counts, test_sets, test_points = 8, 16, (10, 100, 1000), 3, 64
        self.draw_sets = partial(tasks.mixture_sets, num_components=3)
        generator = torch.Generator().manual_seed(args.seed + 1000)
        x = self.draw_sets(test_sets, self.counts[-1] + 2 * test_points, generator=generator).x
        self.observed, self.fresh, self.again = x.split([self.counts[-1], test_points, test_points], 1)
        self.noise = torch.randn(self.fresh.shape, generator=generator)
        picks = {n: self.observed[:, torch.randint(n, (test_points,), generator=generator)] for n in self.counts}
        self.references = {"the observed points": {n: self.distance(x) for n, x in picks.items()}}
        self.references["fresh true points"] = dict.fromkeys(self.counts, self.distance(self.again))

    def draw(self, generator: torch.Generator) -> Batch:
        """Fresh mixtures: 10 to ``largest`` observed points (log-uniform), other points as targets."""
        share = float(torch.rand((), generator=generator))
        n = round(10 * (self.largest / 10) ** share)
        observed, targets = self.draw_sets(self.sets, n + self.points, generator=generator).x.split([n, self.points], 1)
        return Batch(observed, targets.flatten(0, 1), torch.arange(self.sets).repeat_interleave(self.points))

    def distance(self, generated: Tensor) -> float:
        """Mean over sets of the exact squared W2 to fresh true points."""
        return mean(map(flows.metrics.squared_wasserstein2, generated, self.fresh))

    @torch.no_grad()
    def conditions(self, model: SetFlow) -> dict[int, Tensor]:
        """Conditions after 10, 100, … points of one stream, in chunks of 500; the state is all that is kept."""
        state, seen, found = model.enc.init_state(len(self.observed)), 0, {}
        for count in self.counts:
            for chunk in self.observed[:, seen:count].split(500, 1):
                state = model.enc.update(state, chunk)
            seen, found[count] = count, model.enc.readout(state)
        return found

    def evaluate(self, model: SetFlow) -> Scores:
        """Squared W2 over the number of observed points, with many and with few solver steps."""
        conditions = self.conditions(model)
        draw = partial(model.generate, noise=self.noise)
        return {s: {n: self.distance(draw(c, solver=s)) for n, c in conditions.items()} for s in SOLVERS}

    def remarks(self, _: Any, model: SetFlow) -> tuple[str, dict[str, Any]]:
        """What streaming costs: the size of the state, and how far streamed conditions are from those of whole sets."""
        with torch.no_grad():
            gap = float((self.conditions(model)[self.counts[-1]] - model.condition(self.observed)).abs().max())
        state = model.enc.init_state(1)
        size = sum(part.numel() for part in (state.total, state.mass, state.peak))
        text = (
            f"Trained on 10 to {self.largest} points. A stream's state is {size:,} numbers, whatever it has seen; "
            f"streamed in chunks of 500 and whole, sets of {self.counts[-1]:,} points give conditions at most "
            f"{gap:.0e} apart."
        )
        return text, {"streamed_gap": gap, "state_numbers": size}

    def show(self, model: SetFlow, axes: Any) -> None:
        """A row a population: its first points and what the flow makes of them."""
        samples = {n: model.generate(c, self.noise, "many") for n, c in self.conditions(model).items()}
        first, last = self.counts[0], self.counts[-1]
        generated = [(f"generated after {n:,}", samples[n]) for n in (first, self.counts[1], last)]
        columns = [(f"{first} observed", self.observed[:, :first]), *generated, ("true", self.fresh)]
        for row, line in enumerate(axes):
            for ax, (title, points) in zip(line, columns, strict=True):
                colour = COLOURS[0] if "gen" in title else "0.2"
                ax.scatter(*points[row].T, s=14 if points.shape[1] <= 10 else 2, lw=0, color=colour)
                ax.set(xlim=(-5.5, 5.5), ylim=(-5.5, 5.5), aspect="equal")
                if row == 0:
                    ax.set_title(title, fontsize=9)


class Digits:
    """Pixels of a digit condition a flow to the whole image; energy score of the samples against the true image."""

    name, unit, score, element_dim, sample_dim, field_width = "digits", "pixels", "energy score", 13, 64, 128
    slots, panels, wait, extra = 8, (4, 7), 0.5, ((ASKED, "C²OT"),)

    def __init__(self, args: argparse.Namespace) -> None:
        from sklearn.svm import SVC

        self.conditional = mbot.ConditionalOTCoupling({"embedding": "continuous"}, target_ratio=0.01)
        self.options: dict[str, Any] = {}
        images, labels = flows.datasets.digits().rows(torch.randperm(1797, generator=torch.Generator().manual_seed(0)))
        self.batch, self.counts, test = 128, (5, 10, 20, 40), 60 if args.quick else 360
        self.train, self.test = images[:1437] / 2 + 0.5, images[1437:][:test] / 2 + 0.5
        self.labels = labels[1437:][:test].repeat_interleave(4)
        self.classifier = SVC().fit(self.train.flatten(1).numpy(), labels[:1437].numpy())
        generator = torch.Generator().manual_seed(args.seed + 1000)
        self.pixels = {n: tasks.pixel_sets(self.test, n, generator=generator)[0] for n in self.counts}
        self.noise = torch.randn(test, 4, 64, generator=generator)
        name, near = "4 nearest training images", {n: self.neighbours(pixels) for n, pixels in self.pixels.items()}
        self.references = {name: {n: self.energy(x) for n, x in near.items()}}
        self.found = {name: {n: self.right(x) for n, x in near.items()}}

    def draw(self, generator: torch.Generator) -> Batch:
        """Training images, and 4 to 64 pixels of each."""
        rows = torch.randint(len(self.train), (self.batch,), generator=generator)
        count = int(torch.randint(4, 65, (), generator=generator))
        images = self.train[rows]
        pixels, _, _ = tasks.pixel_sets(images, count, generator=generator)
        return Batch(self.elements(pixels), 2 * images.flatten(1) - 1, torch.arange(self.batch))

    @staticmethod
    def elements(pixels: Tensor) -> Tensor:
        """Pixels ``(S, n, 3)`` with sines and cosines of their places at three frequencies: ``(S, n, 13)``."""
        angle = (pixels[..., :2, None] * torch.tensor([1.0, 2.0, 4.0]) * torch.pi).flatten(2)
        return torch.cat((angle.sin(), angle.cos(), 2 * pixels[..., 2:] - 1), -1)

    def places(self) -> Tensor:
        """Every place as an element, but for its value ``(64, 12)``: what asks the slots."""
        _, grid, colours = tasks.pixel_sets(self.train[:1], 1)
        return self.elements(torch.cat((grid, colours), -1))[0, :, :-1]

    def neighbours(self, observed: Tensor) -> Tensor:
        """The training images that agree best with the observed pixels, ``(T, 4, 64)``: no model at all."""
        place = (observed[..., 0] * 64 + observed[..., 1] * 8).long()
        known = self.train.flatten(1).T[place]
        near = (known - observed[..., 2:]).square().sum(1).topk(4, largest=False).indices
        return 2 * self.train.flatten(1)[near] - 1

    def energy(self, x: Tensor) -> float:
        """Energy score (Gneiting and Raftery 2007) ``E|x - y| - E|x - x'| / 2`` of samples ``(T, 4, 64)``."""
        truth = 2 * self.test.flatten(1)[:, None] - 1
        return float(((x - truth).norm(dim=2).mean(1) - torch.cdist(x, x).sum((1, 2)) / 4 / 3 / 2).mean())

    def right(self, x: Tensor) -> float:
        """Share of samples in which a classifier of real images sees the true digit."""
        return float((self.classifier.predict((x / 2 + 0.5).flatten(0, 1).numpy()) == self.labels.numpy()).mean())

    @torch.no_grad()
    def samples(self, model: SetFlow, n: int, solver: str) -> Tensor:
        """Completions ``(T, 4, 64)`` of every test image from ``n`` of its pixels."""
        return model.generate(model.condition(self.elements(self.pixels[n])), self.noise, solver)

    def evaluate(self, model: SetFlow) -> Scores:
        """Energy scores, and the share of right digits, over the number of observed pixels."""
        samples = {(solver, n): self.samples(model, n, solver) for solver in SOLVERS for n in self.counts}
        scores = {solver: {n: self.energy(samples[solver, n]) for n in self.counts} for solver in SOLVERS}
        return {**scores, "right": {n: self.right(samples["many", n]) for n in self.counts}}

    def remarks(self, found: list[dict[str, Any]], _: Any) -> tuple[str, dict[str, Any]]:
        """A table of the share of completions that show the true digit."""
        names = [f"{m['encoder']}, {m['coupling']}" for m in found]
        shares = [[spread([run["right"][n] for run in m["runs"]]) for n in self.counts] for m in found]
        rows = [[name, *line] for name, line in zip(names, shares, strict=True)]
        rows += [[name, *(f"{v:.3f}" for v in values.values())] for name, values in self.found.items()]
        text = table(["", *(f"{n} pixels" for n in self.counts)], rows)
        return f"Share of completions in which a classifier sees the true digit:\n\n{text}", {"found": self.found}

    def show(self, model: SetFlow, axes: Any) -> None:
        """A row a digit: two numbers of observed pixels, two completions of each, the true image."""
        few, more = self.counts[1], self.counts[2]
        for row, line in enumerate(axes):
            pictures = []
            for n in (few, more):
                known = torch.full((8, 8), torch.nan)
                place = (self.pixels[n][row, :, :2] * 8).long()
                known[place[:, 0], place[:, 1]] = 2 * self.pixels[n][row, :, 2] - 1
                samples = self.samples(model, n, "many")[row, :2].unflatten(1, (8, 8))
                pictures += [(f"{n} pixels", known), *(("completed", x) for x in samples)]
            for ax, (title, image) in zip(line, [*pictures, ("true", 2 * self.test[row, 0] - 1)], strict=True):
                ax.imshow(image, cmap="gray_r", vmin=-1, vmax=1)
                ax.set_facecolor("#cfe3f2")
                if row == 0:
                    ax.set_title(title, fontsize=9)


TASKS = {"population": Population, "digits": Digits}
Task = Population | Digits


def train(task: Task, encoder: str, coupling: str, args: argparse.Namespace, seed: int) -> tuple[SetFlow, float]:
    """A trained model in eval mode, and the processor time of a step in milliseconds."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = SetFlow(encoder, task, args.width)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max(args.steps, 2))
    rules = {"independent": mbot.IndependentCoupling(), "OT": mbot.OTCoupling(), "C²OT": task.conditional}
    began = time.process_time()
    for step in tqdm(range(args.steps), desc=f"{task.name}: {encoder}, {coupling}", unit="step", mininterval=1):
        rule = rules["independent" if coupling == "C²OT" and step < task.wait * args.steps else coupling]
        optimizer.zero_grad()
        model.loss(task.draw(generator), rule, generator, **task.options).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval(), 1000 * (time.process_time() - began) / args.steps


def compare(task: Task, args: argparse.Namespace) -> tuple[list[dict[str, Any]], SetFlow]:
    """Every method's scores over the seeds; and the first one's model, for the picture."""
    found: list[dict[str, Any]] = []
    models: list[SetFlow] = []
    for encoder, coupling in METHODS + task.extra:
        if not any(part in f"{encoder}; {coupling}" for part in args.methods):
            continue
        trained = [train(task, encoder, coupling, args, seed) for seed in range(args.seed, args.seed + args.seeds)]
        models += [model for model, _ in trained]
        runs, cost = [task.evaluate(model) for model, _ in trained], mean(cost for _, cost in trained)
        size = sum(p.numel() for name, p in models[-1].named_parameters() if not name.startswith("field"))
        found.append({"encoder": encoder, "coupling": coupling, "runs": runs, "ms": cost, "encoder_size": size})
    return found, models[0]


def results(task: Task, found: list[dict[str, Any]]) -> str:
    """The task's tables, a row a method and a column a number of observed elements."""
    last = f"{task.counts[-1]:,}"
    header = ["encoder", "coupling", *(f"{n:,} {task.unit}" for n in task.counts), f"2 steps, {last}", "CPU ms/step"]
    rows: list[list[Any]] = []
    for method in found:
        cells = [spread([run["many"][n] for run in method["runs"]]) for n in task.counts]
        few = spread([run["few"][task.counts[-1]] for run in method["runs"]])
        rows.append([method["encoder"], method["coupling"], *cells, few, f"{method['ms']:.0f}"])
    rows += [[k, "–", *(f"{v[n]:.3f}" for n in task.counts), "–", "–"] for k, v in task.references.items()]
    return table(header, rows)


def picture(task: Task, found: list[dict[str, Any]], model: SetFlow, path: Any) -> None:
    """Samples of the first method on the left, scores over the number of observed elements on the right."""
    plt = plotter()
    figure = plt.figure(figsize=(13, 4.6))
    left, right = figure.subfigures(1, 2, width_ratios=(1.55, 1))
    axes = left.subplots(*task.panels)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_color("0.8")
    task.show(model, axes)
    left.subplots_adjust(left=0.01, right=0.99, top=0.93, bottom=0.02, wspace=0.05, hspace=0.05)
    ax = right.subplots()
    for method, colour in zip(found, COLOURS, strict=False):
        values = [mean(run["many"][n] for run in method["runs"]) for n in task.counts]
        ax.plot(task.counts, values, "o-", ms=4, color=colour, label=f"{method['encoder']}, {method['coupling']}")
    for (name, scores), colour in zip(task.references.items(), ("0.6", "0.2"), strict=False):
        ax.plot(task.counts, scores.values(), "--", color=colour, label=name)
    ax.set(xscale="log", yscale="log", xlabel=f"observed {task.unit}")
    ax.set_xticks(task.counts, [f"{n:,}" for n in task.counts])
    ax.minorticks_off()
    ticks = [v for v in (0.1, 0.2, 0.5, 1, 1.5, 2, 3, 5, 10) if ax.get_ylim()[0] < v < ax.get_ylim()[1]]
    ax.set_yticks(ticks, [f"{v:g}" for v in ticks])
    ax.set_title(f"{task.score}, lower is better", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.45, -0.13), ncols=3)
    right.subplots_adjust(left=0.1, right=0.97, top=0.9, bottom=0.24)
    save_picture(figure, path)


def main() -> None:
    parser = arguments(__doc__, "set_conditioned_flow", data=False)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=1, help="runs of every method")
    parser.add_argument("--methods", nargs="+", default=[""], help="parts of 'encoder; coupling' to run; default: all")
    parser.add_argument("--width", type=int, default=64, help="of the encoder and of the condition")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.width = 20, 16
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.tasks:
        task: Task = TASKS[name](args)
        found, model = compare(task, args)
        remarks, facts = task.remarks(found, model)
        sizes = {m["encoder"]: m["encoder_size"] for m in found}
        page = (
            f"# Sets as conditions of a flow: {name}\n\n{task.score} over the number of observed {task.unit}, lower is "
            f"better. {args.steps:,} steps, {args.seeds} seed(s) from {args.seed}, width {args.width}; data, field and "
            "budget are the same for all methods. Samples by 8 Runge-Kutta steps; in the column before the last by 2 "
            f"Euler steps. No published values: the combination is new.\n\n{results(task, found)}\n\n{remarks}\n\n"
            f"Parameters of the encoder: {', '.join(f'{name} {size:,}' for name, size in sizes.items())}."
        )
        picture(task, found, model, args.out / f"set_conditioned_flow_{name}.png")
        save(f"set_conditioned_flow_{name}", args, page, {"methods": found, "references": task.references, **facts})


if __name__ == "__main__":
    main()
