"""Numbers that tell what a coupling does: effective sample size, and C²OT's ratio r(w)."""

from __future__ import annotations

import torch
from torch import Tensor

from mbot import checks


def effective_sample_size(weight: Tensor) -> Tensor:
    """Kish's effective sample size ``(Σw)² / Σw²`` over the last axis: between 1 and the number of weights.

    Args:
        weight: ``(…, n)`` non-negative weights, on any scale.

    >>> effective_sample_size(torch.tensor([1.0, 1.0, 0.0, 0.0]))
    tensor(2.)
    """
    weight = checks.finite(checks.floating(weight, "weight"), "weight")
    if weight.ndim == 0 or weight.shape[-1] == 0:
        raise ValueError(f"weight must have shape (…, n) with n >= 1; got {tuple(weight.shape)}")
    if bool((weight < 0).any()) or bool((weight.sum(-1) == 0).any()):
        raise ValueError("weight must be non-negative with a positive sum")
    scaled = weight / weight.amax(-1, keepdim=True)  # squares of tiny weights must not underflow
    return scaled.sum(-1).square() / scaled.square().sum(-1)


def condition_ratio(cost: Tensor, condition_cost: Tensor, weight: float) -> float:
    """Share r(w) of other partners that are at least as cheap as the one at hand (C²OT, Eq. 13, row-wise).

    ``r(w) = mean over (i, j) of [cost_ij + w * condition_cost_ij <= cost_ii]``. Partners on which w has no influence
    do not count: the diagonal, and pairs of equal conditions (``condition_cost_ij = 0``). The published definition
    counts them, which puts a floor under r that no w can pass (1/n from the diagonal alone).

    Args:
        cost: ``(n, n)`` costs between source i and target j, aligned so that (i, i) is the random pair at hand.
        condition_cost: ``(n, n)`` non-negative costs between their conditions.
        weight: w >= 0.

    Returns:
        r(w) in [0, 1]; NaN if no partner counts.
    """
    eligible = condition_cost > 0
    eligible = eligible & ~torch.eye(len(cost), dtype=torch.bool, device=cost.device)
    cheaper = cost + weight * condition_cost <= cost.diagonal()[:, None]
    total = int(eligible.count_nonzero())
    return int((cheaper & eligible).count_nonzero()) / total if total else float("nan")
