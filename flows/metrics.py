"""Measuring generated samples, trajectories and couplings. Distances are exact at the sizes they are used at."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flows.integrate import integrate
from flows.matching import VelocityModel
from mbot import ExactOT, checks, pairwise_cost


def squared_wasserstein2(x: Tensor, y: Tensor) -> float:
    """Squared 2-Wasserstein distance between two samples: exact optimal transport, squared Euclidean cost, no root.

    This is what the C²OT and BoMb-OT tables print. Equal sizes are solved as an assignment (10,000 points in the plane
    take seconds and about 1.5 GB), others by network simplex.

    Args:
        x: ``(n, d…)`` points.
        y: ``(m, d…)`` points, same features.

    >>> squared_wasserstein2(torch.zeros(2, 1), torch.tensor([[1.0], [3.0]]))
    5.0
    """
    x, y = checks.samples(x, y, "x", "y")
    cost = pairwise_cost(x.detach().double(), y.detach().double())
    return max(0.0, float(ExactOT().plan(cost).cost(cost)))


def wasserstein2(x: Tensor, y: Tensor) -> float:
    """2-Wasserstein distance between two samples, the root of `squared_wasserstein2`.

    >>> wasserstein2(torch.zeros(2, 1), torch.tensor([[3.0], [3.0]]))
    3.0
    """
    return squared_wasserstein2(x, y) ** 0.5


def _speeds(model: VelocityModel, x0: Tensor, y: Any, steps: int) -> tuple[Tensor, Tensor]:
    """Velocities at the left ends of ``steps`` Euler steps, ``(steps, B, d…)``, and the end points."""
    checks.count(steps, "steps")
    x = integrate(model, x0, y=y, method="euler", steps=steps).x
    return x.diff(dim=0) * steps, x[-1]


def path_energy(model: VelocityModel, x0: Tensor, *, y: Any = None, steps: int = 100) -> float:
    """Kinetic energy ``E ∫ |v_t(x_t)|^2 dt`` along the model's own Euler trajectories from ``x0``.

    At least the squared W2 between start and end; equal to it for an optimal flow.

    Args:
        model: ``model(t, x, y) -> velocity``.
        x0: ``(B, d…)`` start points.
        y: conditions.
        steps: Euler steps.
    """
    velocity, _ = _speeds(model, x0, y, steps)
    return float(velocity.double().square().flatten(2).sum(-1).mean())


def normalized_path_energy(
    model: VelocityModel, x0: Tensor, squared_w2: float, *, y: Any = None, steps: int = 100
) -> float:
    """Normalised path energy ``|energy - W2^2| / W2^2`` (NPE of Tong et al. 2024); 0 for an optimal flow."""
    squared_w2 = checks.positive(squared_w2, "squared_w2")
    return abs(path_energy(model, x0, y=y, steps=steps) - squared_w2) / squared_w2


def straightness(model: VelocityModel, x0: Tensor, *, y: Any = None, steps: int = 100) -> float:
    """``E ∫ |(x_1 - x_0) - v_t(x_t)|^2 dt`` along the model's trajectories (Liu et al. 2023); 0 for straight lines.

    Args:
        model: ``model(t, x, y) -> velocity``.
        x0: ``(B, d…)`` start points.
        y: conditions.
        steps: Euler steps.
    """
    velocity, x1 = _speeds(model, x0, y, steps)
    return float(((x1 - x0) - velocity).double().square().flatten(2).sum(-1).mean())


class PriorSkew(NamedTuple):
    """How well the condition can be predicted from the noise: cross-validated accuracy or R², and its chance level."""

    score: float
    chance: float
    kind: str


def prior_skew(noise: Tensor, condition: Any, *, folds: int = 5, generator: torch.Generator | None = None) -> PriorSkew:
    """Predict the condition from the paired noise (Cheng and Schwing 2025): at chance for a condition-safe coupling.

    Args:
        noise: ``(n, d…)`` noise as paired, ``x0[pairs.source]``.
        condition: ``(n,)`` or ``(n, c…)``, the conditions as paired. Integers, booleans and strings are classes and
            scored by accuracy; floating-point values are scored by R² (mean over columns).
        folds: cross-validation folds.
        generator: source of the forest's and the folds' seed.

    Returns:
        ``(score, chance, kind)``: chance is the share of the largest class, or 0 for R².

    A random forest in up to 16 dimensions, a linear model in more. The score scatters around chance by about
    ``0.8 / sqrt(n)``; R² of an unpredictable condition is slightly negative.
    """
    from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.model_selection import KFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    noise = checks.finite(checks.floating(noise, "noise"), "noise")
    x = noise.detach().cpu().flatten(1).numpy()
    target = condition.detach().cpu().numpy() if isinstance(condition, Tensor) else np.asarray(condition)
    if len(target) != len(x):
        raise ValueError(f"condition must hold one value for each of the {len(x)} noises; got {len(target)}")
    if len(x) < 2 * checks.count(folds, "folds", at_least=2):
        raise ValueError(f"prior_skew needs at least {2 * folds} pairs for {folds} folds; got {len(x)}")
    seed = int(torch.randint(2**31 - 1, (1,), generator=generator, device=generator.device if generator else None))
    split = KFold(folds, shuffle=True, random_state=seed)
    flat = target.reshape(len(target), -1)
    small = x.shape[1] <= 16
    if flat.dtype.kind == "f":
        model: Any = (
            RandomForestRegressor(100, min_samples_leaf=5, random_state=seed)
            if small
            else make_pipeline(StandardScaler(), Ridge(alpha=float(x.shape[1])))
        )
        score = cross_val_score(model, x, flat if flat.shape[1] > 1 else flat[:, 0], cv=split, scoring="r2").mean()
        return PriorSkew(float(score), 0.0, "r2")
    classes, codes = np.unique(flat, axis=0, return_inverse=True)
    codes = codes.reshape(-1)
    chance = float(np.bincount(codes).max() / len(codes))
    if len(classes) == 1:
        return PriorSkew(1.0, 1.0, "accuracy")
    model = (
        RandomForestClassifier(100, min_samples_leaf=5, random_state=seed)
        if small
        else make_pipeline(StandardScaler(), LogisticRegression(C=1 / x.shape[1], max_iter=200))
    )
    return PriorSkew(float(cross_val_score(model, x, codes, cv=split).mean()), chance, "accuracy")
