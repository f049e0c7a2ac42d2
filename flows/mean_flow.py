"""Average velocities, which go from noise to data in one step (MeanFlow; Geng et al. 2025, arXiv 2505.13447)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from flows.guidance import GuidedModel, check_share
from flows.integrate import IntegrationError, evaluate, start_points, state_dtype
from flows.matching import FlowBatch, Objective, check_velocity, squared_error, times_dtype, weighted_mean
from flows.models.condition import interval_length
from flows.paths import beside
from flows.times import LogitNormalTimes, TimeLaw
from mbot import checks
from mbot.random import draw


def takes_until(model: Any) -> bool:
    """Whether a model of `flows.models` was built for average velocities."""
    return getattr(model, "interval", None) is not None


def _average(model: Any, t: Tensor, x: Tensor, y: Any, until: Tensor) -> Any:
    """An average velocity, or in words that the model has none."""
    try:
        return model(t, x, y, until=until)
    except TypeError as error:
        if "unexpected keyword argument 'until'" not in str(error):
            raise
        raise TypeError(
            f"average velocities need a model that is called as model(t, x, y, until=until): {error}. Models of "
            "flows.models take it with average_velocity=True, wrapped ones with order='x, t, until, y'"
        ) from error


@dataclass(frozen=True)
class MeanFlow(Objective):
    """Training of average velocities ``u(t, x, until) = 1/(until - t) ∫ v(τ, x_τ) dτ`` on pairs of any coupling.

    Differentiating ``(until - t) u`` along the flow gives ``u = v + (until - t) du/dt``, where ``du/dt`` is the
    derivative of u along ``(v, 1, 0)`` in ``(x, t, until)``. The model regresses the right side, with the velocity of
    the pair's path for v, the derivative of the model itself by `torch.func.jvp`, and no gradient through either. Where
    ``until = t`` that is plain flow matching. The derivative is taken in float32, also under autocast, with attention
    that is not fused, and outside of what `torch.compile` compiles.

    A model is called as ``model(t, x, y, until=until)``; `flows.models` are built for it by ``average_velocity=True``.
    Without ``until`` it gives the velocity at t, so that it runs in `flows.integrate` too.

    Args:
        coupling: as for `flows.FlowMatching`.
        path: as for `flows.FlowMatching`.
        times: law of the times. An interval is the two draws of a pair, sorted.
        time_weight: as for `flows.FlowMatching`, at the start of the interval.
        share: of the pairs that get an interval, in [0, 1]; the others have ``until = t``.
        power: p of the weights ``1 / (e + floor)^p``, where e is the squared error of a pair, averaged over features;
            0 for none. The paper takes 0.75 to 1 on images. The optimum of a weighted loss is no mean of the velocities
            any more, and the fewer features there are, the further it is off: take 0 in few dimensions.
        floor: of the weights, > 0.

    >>> model = flows.models.ResidualMLP(2, average_velocity=True)
    >>> MeanFlow(mbot.OTCoupling()).loss(model, torch.randn(64, 2), torch.randn(64, 2) + 3).backward()
    >>> MeanFlow.sample(model, torch.randn(5, 2), steps=1).shape
    torch.Size([5, 2])
    """

    times: TimeLaw = field(default_factory=lambda: LogitNormalTimes(-0.4, 1.0))
    share: float = 0.25
    power: float = 0.0
    floor: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.store(
            self,
            share=check_share(self.share, "share"),
            power=checks.positive(self.power, "power", allow_zero=True),
            floor=checks.positive(self.floor, "floor"),
        )

    def batch_loss(self, model: Any, batch: FlowBatch) -> Tensor:
        """``mean w |u - (ut + (until - t) du/dt)|^2`` on points of `along`, a scalar."""
        error = squared_error(*self.regression(model, batch))
        weight = (error.detach() + self.floor) ** -self.power
        return weighted_mean(weight * error, batch.weight)

    def regression(self, model: Any, batch: FlowBatch) -> tuple[Tensor, Tensor]:
        """The model's average velocities and their targets, both ``(B, d…)``; the targets carry no gradient."""
        if batch.until is None:
            raise ValueError("the batch has no intervals: take it from MeanFlow.along")
        x, velocity, until = batch.xt.to(state_dtype(batch.xt)), batch.ut.to(state_dtype(batch.ut)), batch.until
        length = beside(interval_length(batch.t, until), x).to(x.dtype)

        def average(x: Tensor, t: Tensor) -> Tensor:
            return check_velocity(_average(model, t, x, batch.y, until), x)

        with torch.autocast(x.device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
            if not self.share:
                return average(x, batch.t), velocity
            u, slope, *_ = jvp(average, (x, batch.t), (velocity, torch.ones_like(batch.t)))
        return u, velocity + length * slope.detach()

    @staticmethod
    def sample(model: Any, x0: Tensor, y: Any = None, steps: int = 1, guidance: float | Tensor = 1.0) -> Tensor:
        """Samples ``(B, d…)`` by ``steps`` equal steps ``x + (until - t) u(t, x, until)``. Gradients are not recorded.

        Args:
            model: ``model(t, x, y, until=until)``. Put modules in eval mode yourself.
            x0: ``(B, d…)`` start points, floating point.
            y: conditions, handed to the model as they are.
            steps: calls of the model (of twice the batch with guidance).
            guidance: scale w of the average velocities ``u(∅) + w (u(y) - u(∅))`` of a model trained with dropped
                conditions; see `flows.GuidedModel`. It is the guided flow for ever smaller steps, and near it for one.

        Raises:
            IntegrationError: the samples are not finite.
        """
        field = model if isinstance(guidance, (int, float)) and guidance == 1 else GuidedModel(model, guidance)
        x = start_points(x0, "x0").to(state_dtype(x0))
        grid = torch.linspace(0, 1, checks.count(steps, "steps") + 1, dtype=times_dtype(x0), device=x.device)
        with torch.no_grad():
            for t, end in pairwise(grid):
                until = end.expand(len(x)).to(x0.dtype)
                x = x + (end - t) * evaluate(partial(_average, field, until=until), t, x.to(x0.dtype), y).to(x.dtype)
        if not bool(x.isfinite().all()):
            raise IntegrationError("the samples are not finite. Check the model's outputs")
        return x.to(x0.dtype)

    def _times(
        self, n: int, generator: torch.Generator | None, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        t = self.times(n, generator, device, dtype)
        if not self.share:
            return t, t
        other = self.times(n, generator, device, dtype)
        apart = draw(torch.rand, n, generator=generator, device=device) < self.share
        return torch.where(apart, torch.minimum(t, other), t), torch.where(apart, torch.maximum(t, other), t)
