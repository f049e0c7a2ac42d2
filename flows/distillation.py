"""One-step students of a flow, from its pairs and its field (SlimFlow; Zhu et al., ECCV 2024, arXiv 2407.12718)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flows.integrate import evaluate
from flows.loader import CoupledLoader
from flows.matching import (
    CoupledBatch,
    FlowBatch,
    Objective,
    VelocityModel,
    check_velocity,
    squared_error,
    times_dtype,
    weighted_mean,
)
from flows.pairs import PairedDataset, eval_mode, fingerprint, module_of
from flows.paths import LinearPath, beside
from flows.reflow import AnnealingReflow
from flows.trainer import Trainer
from mbot import checks
from mbot.conditions import concatenate
from mbot.random import draw


@dataclass(frozen=True)
class Distillation(Objective):
    """Training of a student S whose one Euler step ``x0 + S(0, x0, y)`` is a sample, in a `flows.Trainer`.

    The sum of two mean squared errors over features. Regression, on pairs of a teacher: S(0, x0) against ``x1 - x0``.
    Guided: from noise z the student's own step is followed to ``x_t = z + t S(0, z)``, where the teacher's velocity w
    says how to go on, so S(0, z) regresses ``x_t + (1 - t) w - z``, without a gradient through it. That needs no pairs,
    and one call of the teacher a sample; it is as good as the teacher's field is straight, so reflow it first.

    Args:
        coupling: independent pairs, which leaves those of a `flows.PairedDataset` as they are.
        path: straight lines without noise.
        times: t of the guided term is drawn from this law and moved from [0, 1] to ``span``.
        time_weight: as for `flows.FlowMatching`, of both terms.
        teacher: ``model(t, x, y) -> velocity`` in eval mode, on the student's device; None without the guided term.
        regression: weight of the regression, >= 0.
        guided: weight of the guided term, >= 0.
        span: first and last t of the guided term, in [0, 1).
        fresh_noise: z is standard normal; else it is the start points of the batch, for flows that start elsewhere.

    >>> teacher, student = flows.models.ResidualMLP(2), flows.models.ResidualMLP(2, width=16)
    >>> Distillation(teacher=teacher).loss(student, torch.randn(8, 2), torch.randn(8, 2)).backward()
    """

    teacher: VelocityModel | None = field(default=None, kw_only=True)
    regression: float = field(default=1.0, kw_only=True)
    guided: float = field(default=1.0, kw_only=True)
    span: tuple[float, float] = field(default=(0.2, 0.8), kw_only=True)
    fresh_noise: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.store(
            self,
            regression=checks.positive(self.regression, "regression", allow_zero=True),
            guided=checks.positive(self.guided, "guided", allow_zero=True),
            span=tuple(checks.positive(t, "span", allow_zero=True) for t in _as_tuple(self.span)),
        )
        if self.path != LinearPath():
            raise ValueError(f"a student takes one straight step: path must be LinearPath(); got {self.path!r}")
        if not self.regression and not self.guided:
            raise ValueError("regression and guided must not both be 0: nothing would be trained")
        if len(self.span) != 2 or not self.span[0] <= self.span[1] < 1:
            raise ValueError(f"span must be two times 0 <= first <= last < 1; got {self.span}")
        if self.guided and not callable(self.teacher):
            raise TypeError(f"the guided term needs a teacher model(t, x, y), or give guided=0; got {self.teacher!r}")

    @cached_property
    def _teacher(self) -> str:
        return fingerprint(self.teacher) if self.guided else "None"

    def settings(self) -> dict[str, str]:
        """Settings by which runs are compared, as text; of the teacher, its weights."""
        return {**super().settings(), "teacher": self._teacher}

    def along(self, batch: CoupledBatch, generator: torch.Generator | None = None) -> FlowBatch:
        """Times of the guided term, with the starts and displacements of the pairs and noise for the guided term."""
        t, _ = self._times(len(batch.x1), generator, batch.x1.device, times_dtype(batch.x1))
        noise = batch.x0
        if self.fresh_noise and self.guided:
            x = batch.x0
            noise = draw(torch.randn, *x.shape, generator=generator, device=x.device, dtype=x.dtype)
        t = self.span[0] + (self.span[1] - self.span[0]) * t
        weight = self._weight(t, batch.weight)
        return FlowBatch(t, batch.x0, batch.x1 - batch.x0, batch.y, weight, batch.info, noise)

    def batch_loss(self, model: VelocityModel, batch: FlowBatch) -> Tensor:
        """The weighted terms on a batch of `along`, a scalar; one call of the model."""
        z = batch.noise
        if z is None:
            raise ValueError("the batch has no noise: take it from Distillation.along")
        starts = [batch.xt] * (self.regression > 0) + [z] * (self.guided > 0)
        start, y = torch.cat(starts), concatenate([batch.y] * len(starts))
        step = check_velocity(model(batch.t.new_zeros(len(start)), start, y), start)
        loss = step.new_zeros(())
        if self.regression:
            loss = loss + self.regression * weighted_mean(squared_error(step[: len(z)], batch.ut), batch.weight)
        if self.guided:
            own = step[-len(z) :]
            error = squared_error(own, self.target(z, own.detach(), batch.t, batch.y))
            loss = loss + self.guided * weighted_mean(error, batch.weight)
        return loss

    @torch.no_grad()
    def target(self, z: Tensor, step: Tensor, t: Tensor, y: Any = None) -> Tensor:
        """Targets ``(B, d…)`` of the student's steps from z in the guided term, by one call of the teacher."""
        assert self.teacher is not None
        share = beside(t, z).to(z.dtype)
        xt = z + share * step.to(z.dtype)
        return xt + (1 - share) * evaluate(self.teacher, t, xt, y) - z


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def distill(
    student: nn.Module,
    teacher: VelocityModel | None,
    pairs: PairedDataset | AnnealingReflow,
    *,
    steps: int,
    regression: float = 1.0,
    guided: float = 1.0,
    span: tuple[float, float] = (0.2, 0.8),
    made_by: VelocityModel | None = None,
    batch_size: int = 128,
    num_workers: int = 0,
    seed: int = 0,
    resume: bool | str | Path = False,
    **settings: Any,
) -> nn.Module:
    """Train a student, in place, to make a sample in one step; see `Distillation` for the two terms.

    Args:
        student: any module ``model(t, x, y)``, on its device; it is called at t = 0 only. The weights of a reflowed
            model are a good start.
        teacher: velocity model of the guided term, on that device; a module runs in eval mode. None with ``guided=0``.
        pairs: start points with the teacher's samples, and conditions, which the guided term takes too. Pairs that
            `flows.generate_pairs` made from noise give it fresh noise as well; others, their start points.
        steps: optimiser steps.
        regression: weight of the regression on pairs; 0 for none.
        guided: weight of the guided term; 0 for none.
        span: t of the guided term is uniform between these.
        made_by: the model that made the pairs, where that is not the teacher: the flow that it was reflowed from, say.
        batch_size: pairs a step.
        num_workers: as for `flows.CoupledLoader`.
        seed: of order, times and noise.
        resume: as for `flows.Trainer.fit`.
        settings: of `flows.Trainer`: ``out``, ``optimizer``, ``ema``, ``clip``, ``checkpoint_every``, …

    Returns:
        The model to sample from, in eval mode: the averaged student, or the student itself with ``ema=None``.
        ``flows.integrate(model, noise, y=y, method="euler", steps=1)`` draws samples.

    Raises:
        TypeError: pairs of another kind, no teacher, or a student that is no module.
        ValueError: pairs that another model made, a student that shares weights with the teacher, fewer pairs than a
            batch, or settings out of range.
        CheckpointError, Interrupted, NonFiniteLoss: as for `flows.Trainer.fit`.
    """
    made = pairs.pairs if isinstance(pairs, AnnealingReflow) else pairs
    if not isinstance(made, PairedDataset):
        raise TypeError(
            f"pairs must be a flows.PairedDataset, such as generate_pairs makes; got {type(pairs).__name__}"
        )
    if not isinstance(student, nn.Module):
        raise TypeError(f"student must be a torch.nn.Module called as model(t, x, y); got {type(student).__name__}")
    trained = {id(p) for p in student.parameters()}
    if any(id(p) in trained for p in module_of(teacher).parameters()):
        raise ValueError("the student shares weights with its teacher, which would move with it: give copy.deepcopy(…)")
    maker = teacher if made_by is None else made_by
    if maker is not None and made.teacher not in (None, fingerprint(maker)):
        who = "teacher" if made_by is None else "made_by"
        raise ValueError(
            f"the pairs were made by {made.teacher}, but {who} is {fingerprint(maker)}: make them with it, or give the "
            "model that made them as made_by"
        )
    objective = Distillation(
        teacher=teacher if guided else None, regression=regression, guided=guided, span=span,
        fresh_noise=made.info.get("start") == "noise",
    )  # fmt: skip
    device = next((p.device for p in student.parameters()), torch.device("cpu"))
    loader = CoupledLoader(pairs, batch_size=batch_size, num_workers=num_workers, seed=seed, device=device)
    trainer = Trainer(student, loader, steps=steps, objective=objective, seed=seed, **settings)
    with eval_mode(teacher):
        trainer.fit(resume)
    return trainer.sampling_model.eval()
