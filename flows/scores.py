"""Scores beside velocities, and the stochastic flow that they give (SF2M; Tong et al. 2024, arXiv 2307.03672)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flows.integrate import IntegrationError, Trajectory, evaluate, start_points, state_dtype, time_grid
from flows.matching import FlowBatch, Objective, VelocityModel, squared_error, weighted_mean
from flows.paths import AffinePath, Path, SchrodingerBridgePath, beside
from mbot import checks
from mbot.random import draw


@dataclass(frozen=True)
class ScoreMatching(Objective):
    """Training of scores on a path with noise: the model becomes ``s = (sigma² / 2) ∇ log p_t``.

    That is what `flows.integrate_sde` adds to the velocity. The loss is ``|lambda(t) s + noise|²`` with ``lambda(t) =
    2 std(t) / sigma²``, which is finite at both ends, where the score of a bridge is not. Score and velocity may share
    a batch, and a network: ``batch = matching.sample(x0, x1)``, then ``matching.batch_loss(velocity, batch) +
    ScoreMatching(path=path).batch_loss(score, batch)``.

    Args:
        coupling: as for `flows.FlowMatching`.
        path: an affine path with noise, by default the Schrödinger bridge.
        times: as for `flows.FlowMatching`.
        time_weight: as for `flows.FlowMatching`.

    Raises:
        ValueError: a path without noise, which has no scores of its own.
    """

    path: Path = field(default_factory=SchrodingerBridgePath)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.path, AffinePath) and self.path.needs_noise and hasattr(self.path, "sigma")):
            raise ValueError(f"scores need an affine path with noise, sigma > 0; got {self.path}")

    def batch_loss(self, model: VelocityModel, batch: FlowBatch) -> Tensor:
        """``mean w |lambda(t) s + noise|^2`` on points of `along`, a scalar."""
        if batch.noise is None:
            raise ValueError("the batch has no noise: take it from the path of this objective")
        path: Any = self.path
        std = torch.as_tensor(path.std(batch.t)[0], dtype=batch.t.dtype, device=batch.t.device).expand(len(batch))
        factor = beside(2 / path.sigma**2 * std, batch.xt).to(batch.noise)
        return weighted_mean(squared_error(factor * model(batch.t, batch.xt, batch.y), -batch.noise), batch.weight)


def integrate_sde(
    velocity: VelocityModel,
    score: VelocityModel,
    x0: Tensor,
    *,
    sigma: float,
    steps: int,
    y: Any = None,
    generator: torch.Generator | None = None,
) -> Trajectory:
    """Follow ``dX = (velocity + score) dt + sigma dW`` from ``x0`` at time 0 to time 1 (Euler and Maruyama).

    ``score`` is the true score times ``sigma² / 2``: what `flows.ScoreMatching` trains on a path of the same ``sigma``.
    With it the points have at each time the law that `flows.integrate` gives them without noise. For a true score
    ``∇ log p_t`` hand in ``lambda t, x, y: 0.5 * sigma**2 * true(t, x, y)``. Gradients are not recorded.

    Args:
        velocity: ``velocity(t, x, y)``, t of shape ``(B,)``. Put modules in eval mode yourself.
        score: ``score(t, x, y) = (sigma² / 2) ∇ log p_t(x)``, likewise.
        x0: ``(B, d…)`` start points, floating point. The state is kept in float32 or better.
        sigma: standard deviation of the noise of a unit of time, > 0.
        steps: equal steps; the law of the points is right but for an error of order 1 / steps.
        y: conditions, handed to both as they are.
        generator: source of the noise.

    Returns:
        The points at all ``steps + 1`` times; ``nfe`` counts the calls of both models.

    Raises:
        ValueError: ``sigma`` of 0 (the flow without noise is that of `flows.integrate`), no steps.
        IntegrationError: a velocity, a score or a point is not finite.
    """
    sigma = checks.number(sigma, "sigma")
    if sigma <= 0:
        raise ValueError(f"sigma must be > 0; got {sigma:g}. Without noise there is no score: use flows.integrate")
    count = checks.count(steps, "steps")
    times = time_grid("euler", count, None, start_points(x0, "x0"))
    x = x0.to(state_dtype(x0))
    points = [x]
    with torch.no_grad():
        for t, length in zip(times, times.diff(), strict=False):
            at = x.to(x0.dtype)
            drift = evaluate(velocity, t, at, y).to(x.dtype) + evaluate(score, t, at, y).to(x.dtype)
            noise = draw(torch.randn, *x.shape, generator=generator, device=x.device, dtype=x.dtype)
            x = x + length * drift + sigma * length.sqrt() * noise
            if not bool(x.isfinite().all()):
                raise IntegrationError(
                    f"the stochastic flow could not go on at time {float(t):.4g}: velocity, score or point are not "
                    "finite. Check the models' outputs"
                )
            points.append(x)
    return Trajectory(times, torch.stack(points).to(x0.dtype), 2 * count)
