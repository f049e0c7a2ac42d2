"""Numbers that tell what a coupling does: effective sample size, entropy of a plan, marginal tilt, C²OT's r(w)."""

from __future__ import annotations

import torch
from torch import Tensor

from mbot import checks
from mbot.cost import at_least_float32
from mbot.plan import Plan


def effective_sample_size(weight: Tensor) -> Tensor:
    """Kish's effective sample size ``(Σw)² / Σw²`` over the last axis: between 1 and the number of weights.

    Args:
        weight: ``(…, n)`` non-negative weights, on any scale.

    >>> effective_sample_size(torch.tensor([1.0, 1.0, 0.0, 0.0]))
    tensor(2.)
    """
    weight = at_least_float32(checks.finite(checks.floating(weight, "weight"), "weight"))
    if weight.ndim == 0 or weight.shape[-1] == 0:
        raise ValueError(f"weight must have shape (…, n) with n >= 1; got {tuple(weight.shape)}")
    if bool((weight < 0).any()) or bool((weight.sum(-1) == 0).any()):
        raise ValueError("weight must be non-negative with a positive sum")
    scaled = weight / weight.amax(-1, keepdim=True)  # squares of tiny weights must not underflow
    return scaled.sum(-1).square() / scaled.square().sum(-1)


def marginal_tilt(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Inequality of weights: relative variances ``Var(τ) / E[τ]²`` of the row and the column sums τ, ``(…,)``.

    Args:
        weight: ``(…, n, m)`` non-negative weights of all pairs, on any scale, with a positive total.

    >>> marginal_tilt(torch.tensor([[3.0, 3.0], [1.0, 1.0]]))
    (tensor(0.2500), tensor(0.))
    """
    weight = at_least_float32(checks.finite(checks.floating(weight, "weight"), "weight"))
    if weight.ndim < 2 or bool((weight < 0).any()) or bool((weight.sum((-2, -1)) <= 0).any()):
        raise ValueError(f"weight must be (…, n, m), non-negative, with a positive total; got {tuple(weight.shape)}")

    def relative_variance(sums: Tensor) -> Tensor:
        return (sums / sums.mean(-1, keepdim=True)).var(-1, correction=0)

    return relative_variance(weight.sum(-1)), relative_variance(weight.sum(-2))


def plan_entropy(plan: Plan) -> Tensor:
    """Normalised entropy of plans, ``(…,)``: 0 for a matching, 1 for the independent coupling of the plan's marginals.

    ``(H(P) - max(H(a), H(b))) / min(H(a), H(b))`` with the entropies of the plan and of its two marginals. For
    uniform weights and n = m this is the renormalised entropy ``H(P) / log n - 1`` of Zhang et al. 2025 (large
    Sinkhorn couplings, arXiv 2506.05526), who advise a ``reg`` that brings it to about 0.1. A plan between single
    points counts as a matching.

    >>> plan_entropy(mbot.Plan(torch.full((2, 2), 0.25), (2, 2)))
    tensor(1., dtype=torch.float64)
    """
    if plan.matching() is not None:
        return plan.total_mass().new_zeros(plan.batch_shape, dtype=torch.float64)
    total = plan.total_mass().double()
    total = torch.where(total > 0, total, 1)

    def entropy(part: Tensor) -> Tensor:
        part = part.flatten(len(plan.batch_shape))
        return total.log() - torch.xlogy(part, part).sum(-1, dtype=torch.float64) / total

    rows, cols = entropy(plan.row_mass().double()), entropy(plan.col_mass().double())
    whole = entropy(plan.distinct_mass())
    larger, smaller = torch.maximum(rows, cols), torch.minimum(rows, cols)
    return torch.where(smaller > 1e-9, (whole - larger) / smaller.clamp_min(1e-9), 0.0).clamp(0, 1)


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
    cheaper, total = ratio_counts(cost, condition_cost, weight)
    return cheaper / total if total else float("nan")


def ratio_counts(cost: Tensor, condition_cost: Tensor, weight: float) -> tuple[int, int]:
    """Numerator and denominator of `condition_ratio`: partners that are at least as cheap, and partners that count."""
    cost, condition_cost = at_least_float32(cost), at_least_float32(condition_cost)
    eligible = (condition_cost > 0).fill_diagonal_(False)
    cheaper = cost + weight * condition_cost <= cost.diagonal()[:, None]
    return int((cheaper & eligible).count_nonzero()), int(eligible.count_nonzero())
