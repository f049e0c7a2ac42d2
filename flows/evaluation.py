"""The table at the end of a run: samples of few and many steps, measured against the data."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from flows import metrics
from flows.build import generate
from flows.config import ONE_STEP
from flows.mean_flow import takes_until
from flows.seeds import derive_seed, generator_at
from flows.task import Task

SOLVERS: dict[str, dict[str, Any]] = {
    "Euler-1": {"method": "euler", "steps": 1},
    "Euler-2": {"method": "euler", "steps": 2},
    "Euler-4": {"method": "euler", "steps": 4},
    "Euler-5": {"method": "euler", "steps": 5},
    "Euler-10": {"method": "euler", "steps": 10},
    "adaptive": {"method": "dopri5", "rtol": 1e-4, "atol": 1e-4},
}
"""Of velocities."""
AVERAGE_STEPS: dict[str, dict[str, Any]] = {
    "1 step": {"steps": 1},
    "2 steps": {"steps": 2},
    "4 steps": {"steps": 4},
    "adaptive": SOLVERS["adaptive"],
}
"""Of average velocities, beside the velocity that the same model is."""


class SmallClassifier(nn.Module):
    """Two convolutions and a layer of 64 features, on which samples are compared; returns logits."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4),
            nn.Flatten(), nn.Linear(64 * 16, 64), nn.ReLU(),
        )  # fmt: skip
        self.logits = nn.Linear(64, max(1, classes))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to logits."""
        return self.logits(self.features(x))


def train_classifier(
    task: Task, seed: int, *, steps: int = 500, largest: int = 20_000
) -> tuple[SmallClassifier, float]:
    """A small classifier of a labelled data set and its accuracy on a held-out tenth (at most ``largest`` samples)."""
    generator = generator_at(seed, "classifier")
    x, y = task.draw(largest, generator)
    if y is None:
        raise ValueError("a classifier needs labels")
    tested = max(1, len(x) // 10)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "classifier"))
        model = SmallClassifier(task.shape[0], task.num_classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(steps):
        rows = tested + torch.randint(len(x) - tested, (128,), generator=generator)
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    accuracy = metrics.condition_consistency(model, x[:tested], y[:tested]).accuracy
    return model, accuracy


def evaluate(
    model: Any,
    task: Task,
    *,
    num: int,
    seed: int,
    guidance: float = 1.0,
    classifier: SmallClassifier | None = None,
    shape: tuple[int, ...] | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
    progress: bool = False,
    one_step: bool = False,
) -> dict[str, Any]:
    """Measure a model with each of `SOLVERS`, or one of average velocities with each of `AVERAGE_STEPS`.

    Images with labels: consistency and Fréchet distance by a small classifier, trained in the call; other images:
    sliced W2. Points: squared W2 (exact), straightness. The row "data" compares the data with themselves: what a
    perfect model would reach.

    Args:
        model: velocity model in eval mode.
        task: its data.
        num: samples a row; at most half of the data.
        seed: of noise and classifier.
        guidance: guidance scale.
        classifier: used instead of a newly trained one.
        shape: of a sample of the model, where that is not the data's: a flow in a latent space.
        decode: from such samples to the data's space.
        progress: show a bar of samples drawn.
        one_step: the model is a distilled student, which has no other steps than one.

    Returns:
        ``{"rows": {solver: {measure: value}}, "facts": {...}}``, plain values.
    """
    check_size(task)
    generator = generator_at(seed, "evaluate")
    real, labels = task.draw(2 * num, generator)
    num = len(real) // 2
    reference, other = real[:num], real[num : 2 * num]
    y = task.conditions(num, generator)
    facts: dict[str, Any] = {"samples": num, "guidance": guidance}
    measure: Callable[[Tensor, Tensor | None], dict[str, float]]
    solvers = {"1 step": ONE_STEP} if one_step else AVERAGE_STEPS if takes_until(model) else SOLVERS
    bar = tqdm(total=num * len(solvers), unit="sample", disable=not progress, desc="measuring")
    hook = _calls_on(bar, model) if progress else None
    if task.images and task.num_classes:
        if classifier is None:
            bar.set_description("measuring: a classifier is trained")
            classifier, facts["classifier_accuracy"] = train_classifier(task, seed)
        judge = classifier
        features = metrics.in_batches(judge.features, reference, 500)

        def measure(x: Tensor, y: Tensor | None) -> dict[str, float]:
            found = metrics.condition_consistency(judge, x, cast(Tensor, y))
            distance = metrics.frechet_distance(metrics.in_batches(judge.features, x, 500), features)
            return {"consistency": found.accuracy, "cross-entropy": found.cross_entropy, "Fréchet": distance}

    elif task.images:

        def measure(x: Tensor, y: Tensor | None) -> dict[str, float]:
            return {"sliced W2": metrics.sliced_wasserstein2(x, reference, generator=generator_at(seed, "sliced"))}

    else:

        def measure(x: Tensor, y: Tensor | None) -> dict[str, float]:
            return {"W2²": metrics.squared_wasserstein2(x, reference)}

    space = task if shape is None else replace(task, shape=shape)
    rows: dict[str, dict[str, float]] = {}
    for name, solver in solvers.items():
        bar.set_description(f"measuring: {name}")
        x, _, nfe = generate(
            model, space, y, num, generator_at(seed, "noise"), guidance=guidance, progress=bar.update, **solver
        )  # fmt: skip
        rows[name] = {"NFE": nfe, **measure(x if decode is None else decode(x), y)}
    rows["data"] = {"NFE": 0, **measure(other, None if labels is None else labels[num : 2 * num])}
    if not task.images and not one_step:
        bar.set_description("measuring: straightness")
        x0 = space.starts(num, y, generator_at(seed, "noise"))
        facts["straightness"] = metrics.straightness(model, x0, y=y)
        facts["path_energy"] = metrics.path_energy(model, x0, y=y)
    bar.close()
    if hook is not None:
        hook.remove()
    return {"rows": rows, "facts": facts}


def check_size(task: Task) -> None:
    """Refuse data that are too few to be halved and measured."""
    least = 4 if task.images and task.num_classes else 2  # a covariance on either side
    if len(task.dataset) < least:
        raise ValueError(
            f"samples are measured against one half of the data, and the other half too: {len(task.dataset)} samples "
            f"are fewer than {least}. Train with --evaluate 0"
        )


def _calls_on(bar: Any, model: nn.Module) -> Any:
    """Count the calls of a model on a bar, twice a second: one batch of an adaptive solver may take minutes."""
    calls, shown = 0, time.monotonic()

    def count(*_: object) -> None:
        nonlocal calls, shown
        calls += 1
        if time.monotonic() - shown > 0.5:
            bar.set_postfix_str(f"{calls} calls of the model")
            shown = time.monotonic()

    return model.register_forward_hook(count)


def as_table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    rows = result["rows"]
    columns = list(next(iter(rows.values())))
    lines = ["| solver | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = [f"{row[c]:.0f}" if c == "NFE" and row[c] == int(row[c]) else f"{row[c]:.4g}" for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    facts = "; ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in result["facts"].items())
    return "\n".join([*lines, "", f"{facts}."])


def write(result: dict[str, Any], out: Path) -> None:
    """``evaluation.json`` and ``evaluation.md`` in a folder."""
    (out / "evaluation.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    (out / "evaluation.md").write_text(as_table(result) + "\n")
