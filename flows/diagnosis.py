"""Diagnosis of a coupling in one call: gain, bias and price, measured on samples without any network."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from flows.metrics import PriorSkew, prior_skew
from mbot import Coupling, Pairs, checks, conditions, convergence
from mbot.random import draw

_SMALLEST = 16  # samples below which nothing can be said about skew or smaller batches
_PARTS = 4  # smaller batches that the whole one is compared with, where no batch size is given


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """Findings of `diagnose`; ``print`` it, or take ``as_dict()`` for a log.

    Attributes:
        coupling: what was examined.
        samples: number of x1 samples in a batch.
        pairs: number of pairs that a batch gives.
        cost: mean squared distance of the pairs (weighted).
        cost_to_independent: the same as a share of the independent coupling's; 1 means nothing was gained.
        cost_of_larger: cost of a larger batch as a share of a smaller one's; the lower, the more a larger batch gains.
            None for few samples, and for couplings that need a whole data set.
        smaller, larger: the two batch sizes of this comparison.
        skew: by condition, how well it is predicted from the paired noise, with the chance level; empty without
            conditions. At chance, sampling may start from any noise. Empty for sources with conditions of their own,
            from which flows start by condition.
        crossing: by discrete condition that both sides have, the share of the pairs that join unequal ones.
        unique: distinct pairs as a share of the x1 samples; 1 for a permutation, .63 for draws with replacement.
        effective: effective sample size of the pairs' weights (repeats add up) as a share of the x1 samples.
        tilt: relative variance of the weight with which a sample takes part in training, for x0 and x1, without the
            part that is chance; 0 means that all samples count equally.
        plan_entropy: 0 for a matching, 1 for the independent coupling; None if the coupling has no plan.
        seconds: of one call, the median.
        advice: one line.
        weight: ``(m,)`` mean weight of each x1 sample over the rounds.
    """

    coupling: str
    samples: int
    pairs: int
    cost: float
    cost_to_independent: float
    cost_of_larger: float | None
    smaller: int
    larger: int
    skew: dict[str, PriorSkew]
    unique: float
    effective: float
    tilt: tuple[float, float]
    plan_entropy: float | None
    seconds: float
    advice: str
    weight: Tensor
    crossing: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Everything but the weights of single samples, as numbers, strings and dictionaries that JSON takes."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "weight"}
        values["skew"] = {name: skew._asdict() for name, skew in self.skew.items()}
        return values | {"tilt": list(self.tilt)}

    def __str__(self) -> str:
        entropy = "-" if self.plan_entropy is None else f"{self.plan_entropy:.3f}"
        larger = "-"
        if self.cost_of_larger is not None:
            larger = f"{self.cost_of_larger:.3f}  (batch of {self.larger} against {self.smaller})"
        rows = [
            ("pairs", f"{self.pairs} of {self.samples} samples"),
            ("transport cost", f"{self.cost:.4g}"),
            ("  to independent", f"{self.cost_to_independent:.3f}"),
            ("  of a larger batch", larger),
            *((f"prior skew, {name}", f"{s.kind} {s.score:.3f}  (chance {s.chance:.3f})")
              for name, s in self.skew.items()),
            *((f"pairs across {name}", f"{share:.3f}") for name, share in self.crossing.items()),
            ("unique fraction", f"{self.unique:.3f}"),
            ("effective samples", f"{self.effective:.3f}"),
            ("marginal tilt", f"x0 {self.tilt[0]:.3f}, x1 {self.tilt[1]:.3f}"),
            ("plan entropy", entropy),
            ("seconds", f"{self.seconds:.4f}"),
        ]  # fmt: skip
        width = max(len(name) for name, _ in rows)
        return "\n".join([self.coupling, *(f"  {name:<{width}}  {value}" for name, value in rows), f"  {self.advice}"])


def diagnose(
    coupling: Coupling,
    x0: Tensor,
    x1: Tensor,
    y: Any = None,
    *,
    y0: Any = None,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
    rounds: int = 8,
) -> Diagnosis:
    """Examine a coupling on samples as training would see them.

    The coupling pairs x0 and x1 ``rounds`` times, with x0 in another order each time; the tilt is the variance between
    samples of their mean weight over the rounds, less the variance that single rounds explain.

    Args:
        coupling: an mbot coupling.
        x0: ``(n, d…)`` noise, or samples of another data set.
        x1: ``(m, d…)`` data.
        y: conditions of the data, one a sample, or a dict of several; see `mbot.conditions`. Integers, booleans and
            strings are classes, floating-point values are continuous.
        y0: conditions of the source samples.
        generator: source of randomness.
        batch_size: samples that the coupling gets in training: the first so many are examined, and all samples serve
            as the larger batch. None: all samples are one batch, and quarters of it serve as the smaller batch.
        rounds: calls of the coupling.

    Returns:
        The findings.

    Raises:
        TypeError: not a coupling, or samples of unequal dtype.
        ValueError: whatever the coupling refuses; a batch size above the number of samples.

    >>> x0, x1 = torch.randn(256, 2), torch.randn(256, 2) + 3
    >>> y = (x1[:, 0] > 3).long()
    >>> found = diagnose(mbot.OTCoupling(), x0, x1, y)
    >>> found.skew["y"].score > found.skew["y"].chance + 0.2
    True
    >>> print(found.advice[:40])
    The paired noise tells the condition y (
    """
    if not isinstance(coupling, Coupling):
        raise TypeError(f"coupling must be an mbot coupling such as OTCoupling(); got {coupling!r}")
    checks.samples(x0, x1)
    conditions.check(y, len(x1), "y", "x1")
    conditions.check(y0, len(x0), "y0", "x0")
    labels0 = None if coupling.ignores_conditions else y0
    checks.count(rounds, "rounds", at_least=2)
    n, m = len(x0), len(x1)
    if batch_size is not None and checks.count(batch_size, "batch_size") > min(n, m):
        raise ValueError(f"batch_size must be at most the number of samples ({min(n, m)}); got {batch_size}")
    larger_cost, smaller, larger = _larger(coupling, x0, x1, y, labels0, batch_size, generator)
    if batch_size is not None:
        first = slice(0, batch_size)
        x0, x1 = x0[first], x1[first]
        y, y0, labels0 = (conditions.select(labels, first) for labels in (y, y0, labels0))
        n = m = batch_size

    seconds, weights = [], []
    with convergence.deferred() as kept:
        for number in range(rounds):
            order = torch.arange(n, device=x0.device)
            if number:  # the first as they come
                order = draw(torch.randperm, n, generator=generator, device=x0.device)
            start = time.perf_counter()
            found = coupling(x0[order], x1, conditions.select(labels0, order), y, generator=generator)
            if x1.is_cuda:
                torch.cuda.synchronize(x1.device)
            seconds.append(time.perf_counter() - start)
            weights.append(_totals(found, order, n, m))
            if number == 0:
                pairs = found
    convergence.tell(kept, set())

    start_x, end_x = pairs.apply(x0, x1)
    weight = torch.ones(len(pairs), dtype=torch.float64) if pairs.weight is None else pairs.weight.double().cpu()
    squared = (start_x.double() - end_x.double()).square().flatten(1).sum(1).cpu()
    cost = float((weight * squared).sum() / weight.sum())
    independent = _independent_cost(x0, x1)
    _, merged = torch.unique((pairs.source * m + pairs.target).cpu(), return_inverse=True)
    merged_weight = torch.zeros(int(merged.max()) + 1, dtype=torch.float64).index_add_(0, merged, weight)
    effective = float(merged_weight.sum().square() / merged_weight.square().sum()) / m
    skews = _skews(start_x, y, pairs, generator) if y0 is None else {}
    sides = [torch.stack(side) for side in zip(*weights, strict=True)]
    facts: dict[str, Any] = {
        "cost_to_independent": cost / independent if independent > 0 else 1.0,
        "cost_of_larger": larger_cost, "smaller": smaller, "larger": larger, "skew": skews,
        "crossing": _crossing(pairs, y0, y, weight), "unique": len(merged_weight) / m, "effective": effective,
        "tilt": (_tilt(sides[0]), _tilt(sides[1])),
    }  # fmt: skip
    entropy = pairs.info.get("plan_entropy")
    return Diagnosis(
        coupling=repr(coupling), samples=m, pairs=len(pairs), cost=cost,
        plan_entropy=None if entropy is None else float(entropy), seconds=statistics.median(seconds),
        advice=_advice(**facts, samples=m), weight=sides[1].mean(0), **facts,
    )  # fmt: skip


def _squared(pairs: Pairs, x0: Tensor, x1: Tensor) -> tuple[float, float]:
    """Weighted sum of squared distances, and the weight."""
    start, end = pairs.apply(x0, x1)
    squared = (start.double() - end.double()).square().flatten(1).sum(1)
    weight = torch.ones_like(squared) if pairs.weight is None else pairs.weight.double()
    return float((weight * squared).sum()), float(weight.sum())


def _independent_cost(x0: Tensor, x1: Tensor) -> float:
    """Mean squared distance over all n · m pairs."""
    x0, x1 = x0.detach().flatten(1).double(), x1.detach().flatten(1).double()
    centre = x1.mean(0)
    x0, x1 = x0 - centre, x1 - centre
    return float(x0.square().sum(1).mean() + x1.square().sum(1).mean())


def _larger(
    coupling: Coupling, x0: Tensor, x1: Tensor, y: Any, y0: Any, batch_size: int | None,
    generator: torch.Generator | None,
) -> tuple[float | None, int, int]:  # fmt: skip
    """Cost of all samples at once as a share of that in smaller batches, and the two sizes."""
    whole = min(len(x0), len(x1))
    size = batch_size or whole // _PARTS
    if size < 2 or whole < max(_SMALLEST, 2 * size) or coupling.needs_data_set:
        return None, size, whole
    total, weight = 0.0, 0.0

    def couple(rows: slice) -> tuple[float, float]:
        labels0, labels1 = conditions.select(y0, rows), conditions.select(y, rows)
        return _squared(coupling(x0[rows], x1[rows], labels0, labels1, generator=generator), x0[rows], x1[rows])

    with convergence.deferred():  # the call on the user's batch warns
        try:
            for begin in range(0, whole - size + 1, size)[:_PARTS]:
                part, share = couple(slice(begin, begin + size))
                total, weight = total + part, weight + share
            cost, share = couple(slice(0, whole))
        except ValueError:
            if y0 is None:
                raise
            return None, size, whole  # a part may lack a class
    return (cost / share) / (total / weight) if total > 0 else 1.0, size, whole


def _totals(pairs: Pairs, order: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Total weight of each x0 and x1 sample in one round, with mean 1 on either side."""
    weight = torch.ones(len(pairs), dtype=torch.float64) if pairs.weight is None else pairs.weight.double().cpu()
    source = torch.zeros(n, dtype=torch.float64).index_add_(0, order[pairs.source].cpu(), weight)
    target = torch.zeros(m, dtype=torch.float64).index_add_(0, pairs.target.cpu(), weight)
    return source / source.mean(), target / target.mean()


def _tilt(totals: Tensor) -> float:
    """Variance between samples of their mean over the rounds ``(r, n)``, without what the rounds' own scatter adds."""
    if totals.shape[1] < 2:
        return 0.0
    between = totals.mean(0).var()
    within = totals.var(0).mean() / len(totals)
    return max(0.0, float(between - within))


def _skews(noise: Tensor, y: Any, pairs: Pairs, generator: torch.Generator | None) -> dict[str, PriorSkew]:
    if y is None or len(pairs) < _SMALLEST:
        return {}
    named = y if isinstance(y, Mapping) else {"y": y}
    return {
        str(name): prior_skew(noise, conditions.select(value, pairs.target), generator=generator)
        for name, value in named.items()
    }  # fmt: skip


def _crossing(pairs: Pairs, y0: Any, y: Any, weight: Tensor) -> dict[str, float]:
    """Share of the pairs between unequal classes, by condition that both sides have."""
    if y0 is None or y is None:
        return {}
    named0, named1 = (labels if isinstance(labels, Mapping) else {"y": labels} for labels in (y0, y))
    found = {}
    for name in [name for name in named0 if name in named1]:
        ends = conditions.select(named0[name], pairs.source), conditions.select(named1[name], pairs.target)
        if not any(conditions.continuous(labels) for labels in ends):
            code0, code1, _ = conditions.class_codes(*ends, allow_missing=True)
            found[str(name)] = float(weight[torch.from_numpy(code0 != code1)].sum() / weight.sum())
    return found


def _advice(
    *, cost_to_independent: float, cost_of_larger: float | None, smaller: int, larger: int,
    skew: dict[str, PriorSkew], crossing: dict[str, float], unique: float, effective: float,
    tilt: tuple[float, float], samples: int,
) -> str:  # fmt: skip
    """The first thing to change, the worst bias first."""
    scatter = max(0.05, 2.5 * 0.8 / samples**0.5)
    for name, found in skew.items():
        if found.score > found.chance + scatter:
            return (
                f"The paired noise tells the condition {name} ({found.kind} {found.score:.2f}, chance "
                f"{found.chance:.2f}): use ConditionalOTCoupling, unless you sample with classifier-free guidance."
            )
    for name, share in crossing.items():
        if share > 0:
            return (
                f"{share:.0%} of the pairs join unequal {name}: use ConditionalOTCoupling with the conditions of both."
            )
    if crossing and tilt[0] > 0.05:
        return (
            f"Samples of x0 do not count alike (tilt {tilt[0]:.2f}): its classes come in other proportions than those "
            "of x1. A CoupledLoader with source_sampling='matched' draws sources as x1 asks for them."
        )
    if max(tilt) > 0.05:
        side = "x0" if tilt[0] > tilt[1] else "x1"
        return (
            f"Samples of {side} do not count alike (tilt {max(tilt):.2f}), so the model learns another distribution: "
            "raise reg, set correction='sinkhorn' (weighted), refill='independent' (partial) or a smaller k (nearest)."
        )
    if unique < 0.9:
        return f"Only {unique:.0%} of the batch are distinct pairs: draw without replacement, or use exact transport."
    if effective < 0.5:
        return f"The weights leave {effective:.0%} of the batch effective: raise reg, or use a larger batch."
    if cost_to_independent > 0.97:
        return (
            "No bias found, but pairs cost as much as independent ones: use a larger OT batch, a smaller reg or (C²OT) "
            "a larger target_ratio."
        )
    if cost_of_larger is not None and cost_of_larger < 0.9:
        return (
            f"No bias found. A batch of {larger} costs {1 - cost_of_larger:.0%} less than one of {smaller}: a larger "
            "OT batch is worth its time."
        )
    return f"No bias found; pairs cost {1 - cost_to_independent:.0%} less than independent ones."


def plot_diagnosis(diagnosis: Diagnosis, axes: Any = None) -> Any:
    """Draw a diagnosis: costs, prior skew against chance, and the weights of the x1 samples.

    Args:
        diagnosis: from `diagnose`.
        axes: three matplotlib axes; None makes a figure.

    Returns:
        The matplotlib figure.
    """
    import matplotlib.pyplot as plt

    if axes is None:
        axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")[1]
    costs = {"independent": 1.0, "this coupling": diagnosis.cost_to_independent}
    axes[0].bar(list(costs), list(costs.values()), color=["#bbbbbb", "#2166ac"])
    axes[0].set(title="transport cost", ylabel="share of the independent one")
    names = list(diagnosis.skew) or ["no condition"]
    scores = [s.score for s in diagnosis.skew.values()] or [0.0]
    axes[1].bar(names, scores, color="#b2182b")
    for index, found in enumerate(diagnosis.skew.values()):
        axes[1].hlines(found.chance, index - 0.4, index + 0.4, colors="black", label=None if index else "chance")
    if diagnosis.skew:
        axes[1].legend()
    axes[1].set(title="condition predicted from the noise", ylim=(min(0.0, *scores, 0.0), 1))
    axes[2].hist(diagnosis.weight.numpy(), bins=30, color="#4d9221")
    axes[2].axvline(1, color="black", linewidth=1)
    axes[2].set(title=f"weight of a sample (tilt {diagnosis.tilt[1]:.3f})", xlabel="mean over rounds")
    figure = axes[0].figure
    figure.suptitle(diagnosis.coupling)
    return figure
