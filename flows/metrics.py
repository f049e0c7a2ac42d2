"""Measuring generated samples, trajectories and couplings. Distances are exact at the sizes they are used at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flows.integrate import trajectory
from flows.matching import VelocityModel
from mbot import ExactOT, SlicedOT, checks, conditions, pairwise_cost


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


def wasserstein1(x: Tensor, y: Tensor) -> float:
    """1-Wasserstein distance between two samples (earth mover's distance): exact, Euclidean cost.

    The measure of the published single-cell tables.

    Args:
        x: ``(n, d…)`` points.
        y: ``(m, d…)`` points, same features.

    >>> wasserstein1(torch.zeros(2, 1), torch.tensor([[1.0], [3.0]]))
    2.0
    """
    x, y = checks.samples(x, y, "x", "y")
    cost = pairwise_cost(x.detach().double(), y.detach().double(), "euclidean")
    return max(0.0, float(ExactOT().plan(cost).cost(cost)))


def sliced_wasserstein2(
    x: Tensor, y: Tensor, *, num_projections: int = 500, generator: torch.Generator | None = None
) -> float:
    """Sliced 2-Wasserstein distance: the root of the mean squared W2 over random directions (Bonneel et al. 2015).

    Args:
        x: ``(n, d…)`` points.
        y: ``(m, d…)`` points, same features.
        num_projections: directions.
        generator: source of the directions.

    >>> sliced_wasserstein2(torch.zeros(2, 1), torch.tensor([[3.0], [3.0]]))
    3.0
    """
    x, y = checks.samples(x, y, "x", "y")
    squared = SlicedOT(num_projections=num_projections)(x.detach().double(), y.detach().double(), generator=generator)
    return max(0.0, float(squared)) ** 0.5


def squared_mmd(x: Tensor, y: Tensor, *, bandwidth: float | None = None) -> float:
    """Squared maximum mean discrepancy, unbiased, of a Gaussian kernel mixture (Gretton et al. 2012, Eq. 3).

    The kernel is the mean of ``exp(-|x - y|² / (2 s² b²))`` for s in 1/4, 1/2, 1, 2, 4. Around 0 (below it as often as
    above) for samples of one distribution.

    Args:
        x: ``(n, d…)`` points, n >= 2.
        y: ``(m, d…)`` points, m >= 2.
        bandwidth: b; None for the median distance in ``y``, so that values are comparable for one reference ``y``.
    """
    x, y = checks.samples(x, y, "x", "y")
    if min(len(x), len(y)) < 2:
        raise ValueError(f"squared_mmd needs at least two points a side; got {len(x)} and {len(y)}")
    x, y = x.detach().double(), y.detach().double()
    within_y = pairwise_cost(y, y)
    if bandwidth is None:
        distinct = within_y[~torch.eye(len(y), dtype=torch.bool, device=y.device)]
        bandwidth = float(distinct.median()) ** 0.5
        if bandwidth == 0:
            raise ValueError("most points of y are equal, so their median distance is 0: give a bandwidth")
    scales = [2 * (checks.positive(bandwidth, "bandwidth") * s) ** 2 for s in (0.25, 0.5, 1.0, 2.0, 4.0)]

    def mean(cost: Tensor, same: bool) -> Tensor:
        kernel = torch.stack([(-cost / scale).exp() for scale in scales]).mean(0)
        if not same:
            return kernel.mean()
        return (kernel.sum() - kernel.diagonal().sum()) / (len(kernel) * (len(kernel) - 1))

    return float(mean(pairwise_cost(x, x), True) + mean(within_y, True) - 2 * mean(pairwise_cost(x, y), False))


class ConditionConsistency(NamedTuple):
    """Accuracy and mean cross-entropy of a classifier that predicts the condition of generated samples."""

    accuracy: float
    cross_entropy: float


def condition_consistency(
    classifier: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, *, batch_size: int = 500
) -> ConditionConsistency:
    """Condition consistency of Cheng and Schwing (2025) by a given classifier.

    Args:
        classifier: samples ``(B, d…)`` to logits ``(B, classes)``; put modules in eval mode yourself.
        x: ``(n, d…)`` generated samples.
        y: ``(n,)`` integer labels that they were generated for.
        batch_size: samples a call.
    """
    if not isinstance(y, Tensor) or y.shape != (len(x),) or y.is_floating_point():
        raise ValueError(f"y must hold one integer label for each of the {len(x)} samples")
    logits = checks.finite(in_batches(classifier, x, batch_size), "the classifier's logits").double()
    y = y.to(logits.device, torch.int64)
    found = (logits.argmax(1) == y).double().mean()
    return ConditionConsistency(float(found), float(torch.nn.functional.cross_entropy(logits, y)))


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Fréchet distance of two Gaussians fitted to features: ``|m - m'|² + tr(S + S' - 2 (S S')^(1/2))``.

    With features of an Inception network this is FID (Heusel et al. 2017, arXiv 1706.08500). Computed in float64 from
    unbiased covariances; biased upwards for few samples, so compare only equal sample sizes.

    Args:
        x: ``(n, d)`` features of generated samples.
        y: ``(m, d)`` features of real samples.

    >>> round(frechet_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [3.0]])), 6)
    1.0
    """
    x, y = checks.samples(x, y, "x", "y")
    if min(len(x), len(y)) < 2:
        raise ValueError(f"frechet_distance needs at least two samples a side; got {len(x)} and {len(y)}")
    x, y = x.detach().double(), y.detach().double()
    cov_x, cov_y = (torch.atleast_2d(torch.cov(f.T)) for f in (x, y))
    values, vectors = torch.linalg.eigh(cov_x)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_y @ root).clamp_min(0).sqrt().sum()
    shift = (x.mean(0) - y.mean(0)).square().sum()
    return max(0.0, float(shift + cov_x.trace() + cov_y.trace() - 2 * cross))


def fid(
    generated: Tensor,
    real: Tensor,
    *,
    extractor: Callable[[Tensor], Tensor] | None = None,
    weights: str | None = None,
    batch_size: int = 100,
) -> float:
    """Fréchet inception distance of images, by torchmetrics, or of a feature extractor of one's own.

    Args:
        generated: ``(n, 3, H, W)`` in [-1, 1]; any samples ``(n, d…)`` with an extractor.
        real: ``(m, 3, H, W)``, the same.
        extractor: samples ``(B, d…)`` to features ``(B, k)``; needs no further package and no network.
        weights: path of the Inception weights of torch-fidelity; None lets it fetch them.
        batch_size: images a call.

    Raises:
        ImportError: no extractor, and torchmetrics (extra ``fid``) is not installed.
    """
    if extractor is not None:
        return frechet_distance(in_batches(extractor, generated, batch_size), in_batches(extractor, real, batch_size))
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise ImportError(
            "fid without an extractor needs pip install torchmetrics torch-fidelity torchvision; or give extractor, a "
            "function from images to features"
        ) from error
    measure = FrechetInceptionDistance(normalize=True, feature_extractor_weights_path=weights).to(generated.device)
    for images, are_real in ((generated, False), (real, True)):
        for part in images.split(batch_size):
            measure.update((part.clamp(-1, 1) + 1) / 2, real=are_real)
    return float(measure.compute())


def in_batches(function: Callable[[Tensor], Tensor], x: Tensor, batch_size: int) -> Tensor:
    """A function of samples applied to some at a time, without gradients."""
    with torch.no_grad():
        return torch.cat([function(part) for part in x.split(checks.count(batch_size, "batch_size"))])


def _speeds(model: VelocityModel, x0: Tensor, y: Any, steps: int) -> tuple[Tensor, Tensor]:
    """Velocities at the left ends of ``steps`` Euler steps, ``(steps, B, d…)``, and the end points."""
    checks.count(steps, "steps")
    x = trajectory(model, x0, y=y, method="euler", steps=steps).x
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
    """Cross-validated accuracy or R² of predicting the condition from the noise, and its chance level."""

    score: float
    chance: float
    kind: str


def prior_skew(noise: Tensor, condition: Any, *, folds: int = 5, generator: torch.Generator | None = None) -> PriorSkew:
    """Predict the condition from the paired noise (Cheng and Schwing 2025): at chance for a condition-safe coupling.

    Args:
        noise: ``(n, d…)`` noise as paired, ``x0[pairs.source]``.
        condition: conditions as paired, see `mbot.conditions`. Integers, booleans and strings are classes and scored
            by accuracy, with missing ones as a class; floating-point values are scored by R² (mean over columns), where
            they are not missing.
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
    x = noise.detach().cpu().flatten(1).to(torch.promote_types(noise.dtype, torch.float32)).numpy()
    conditions.check(condition, len(x), "condition", "noise")
    continuous = conditions.continuous(condition)
    if continuous:
        values, dropped = conditions.vectors(condition, "condition", torch.device("cpu"))
        x, flat = x[~dropped], checks.finite(values[torch.from_numpy(~dropped)], "condition").numpy()
    else:
        codes, _, _ = conditions.class_codes(condition, condition, allow_missing=True)
    if len(x) < 2 * checks.count(folds, "folds", at_least=2):
        raise ValueError(f"prior_skew needs at least {2 * folds} pairs for {folds} folds; got {len(x)}")
    seed = int(torch.randint(2**31 - 1, (1,), generator=generator, device=generator.device if generator else None))
    split = KFold(folds, shuffle=True, random_state=seed)
    small = x.shape[1] <= 16
    if continuous:
        model: Any = (
            RandomForestRegressor(100, min_samples_leaf=5, random_state=seed)
            if small
            else make_pipeline(StandardScaler(), Ridge(alpha=float(x.shape[1])))
        )
        score = cross_val_score(model, x, flat if flat.shape[1] > 1 else flat[:, 0], cv=split, scoring="r2").mean()
        return PriorSkew(float(score), 0.0, "r2")
    chance = float(np.bincount(codes).max() / len(codes))
    if chance == 1:
        return PriorSkew(1.0, 1.0, "accuracy")
    model = (
        RandomForestClassifier(100, min_samples_leaf=5, random_state=seed)
        if small
        else make_pipeline(StandardScaler(), LogisticRegression(C=1 / x.shape[1], max_iter=200))
    )
    return PriorSkew(float(cross_val_score(model, x, codes, cv=split).mean()), chance, "accuracy")
