"""Conditional optimal transport, C²OT (Cheng and Schwing, ICCV 2025, arXiv 2503.10636).

Ordinary mini-batch OT makes the noise depend on the condition. C²OT gives noise i the condition of its random partner
(y0 = y1) and pairs along ``|x0_i - x1_j|^2 + w f(y0_i, y1_j)``, so that noise and condition stay independent.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbot import checks
from mbot.cost import _pairwise, _unit
from mbot.couplings.base import Coupling, Labels, Pairs
from mbot.couplings.optimal import pairs_by_cost
from mbot.diagnostics import condition_ratio
from mbot.transport import ExactOT
from mbot.transport.exact import assign_blocks

_DEFAULT_RATIO = 0.01  # the paper's setting in all experiments


@dataclass(frozen=True)
class ConditionalOTCoupling(Coupling):
    """C²OT: optimal transport that keeps the noise independent of the condition.

    ``condition="discrete"``: noise and data pair only within a class. The problem splits into one exact assignment a
    class; there is no large weight. Labels may be of any kind: a tensor ``(n,)`` or rows ``(n, c)`` (one-hot, several
    attributes), a NumPy array, a list of strings.

    ``condition="continuous"``: conditions are vectors and a mismatch costs ``w · f(y0_i, y1_j)``; equal conditions
    cost exactly 0. Set w by ``weight``, or by ``target_ratio``, the share r(w) of other partners that are at least as
    cheap as the random one at hand (`mbot.condition_ratio`; the paper uses 0.01, which is the default; 0.05 to 0.1
    pairs more and straightens more). r is a step function of w with known steps, so the w that meets the target is
    an order statistic: it is computed exactly for each batch, with no search and nothing carried between batches.

    If ``y0`` is not given, the noise takes the condition of its random partner: ``y0 = y1``. The result is a
    permutation; x1 keeps its order. ``info`` holds ``weight`` and ``ratio`` (continuous) or ``classes`` (discrete).

    Args:
        condition: ``"discrete"`` or ``"continuous"``.
        weight: fixed w >= 0 (continuous only). 0 is plain OT; large values approach the independent coupling.
        target_ratio: r in (0, 1) that w is chosen for, in each batch (continuous only; not together with ``weight``).
        condition_cost: f for continuous conditions: ``"cosine"`` (``1 - cos``) or ``"sqeuclidean"``.

    Raises (when called):
        ValueError: no ``y1``; class counts of ``y0`` and ``y1`` that differ; unequal batch sizes; conditions that are
            not finite, have norm 0 under ``"cosine"``, or are scalars that ``"cosine"`` cannot tell apart.

    >>> x0, x1 = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.tensor([[3.0], [2.0], [1.0], [0.0]])
    >>> ConditionalOTCoupling()(x0, x1, y1=["a", "a", "b", "b"]).source.tolist()
    [1, 0, 3, 2]
    """

    condition: str = "discrete"
    weight: float | None = None
    target_ratio: float | None = None
    condition_cost: str = "cosine"

    def __post_init__(self) -> None:
        checks.choice(self.condition, "condition", ("discrete", "continuous"))
        checks.choice(self.condition_cost, "condition_cost", ("cosine", "sqeuclidean"))
        if self.condition == "discrete" and (self.weight is not None or self.target_ratio is not None):
            raise ValueError(
                "discrete conditions are matched exactly: weight and target_ratio apply to condition='continuous' "
                "(pass one-hot rows there to let classes mix at a price)"
            )
        if self.weight is not None and self.target_ratio is not None:
            raise ValueError("give weight or target_ratio, not both: the target chooses the weight")
        if self.weight is not None:
            checks.positive(self.weight, "weight", allow_zero=True)
        if self.target_ratio is not None and not 0 < checks.positive(self.target_ratio, "target_ratio") < 1:
            raise ValueError(f"target_ratio must lie in (0, 1); got {self.target_ratio!r}")

    def _pair(
        self,
        x0: Tensor,
        x1: Tensor,
        y0: Labels | None,
        y1: Labels | None,
        generator: torch.Generator | None,
    ) -> Pairs:
        if y1 is None:
            raise ValueError("a conditional coupling needs y1, the condition of each sample of x1")
        if len(x0) != len(x1):
            raise ValueError(
                f"a conditional coupling needs equally many samples of x0 and x1; got {len(x0)} and {len(x1)}"
            )
        if self.condition == "discrete":
            return _pair_within_classes(x0, x1, y1 if y0 is None else y0, y1)
        return self._pair_continuous(x0, x1, _vectors(y1 if y0 is None else y0, x0, "y0"), _vectors(y1, x1, "y1"))

    def _pair_continuous(self, x0: Tensor, x1: Tensor, y0: Tensor, y1: Tensor) -> Pairs:
        if y0.shape != y1.shape:
            raise ValueError(f"y0 and y1 must have equal features; got {tuple(y0.shape)} and {tuple(y1.shape)}")
        cost = _pairwise(x0, x1, "sqeuclidean")
        mismatch = _mismatch(y0, y1, self.condition_cost)
        if self.weight is not None:
            weight = float(self.weight)
        else:
            weight = _weight_for_ratio(cost, mismatch, self.target_ratio or _DEFAULT_RATIO)
        info: dict[str, Any] = {"weight": weight, "ratio": condition_ratio(cost, mismatch, weight)}
        pairs = pairs_by_cost(cost + weight * mismatch, ExactOT(), None)
        info["transport_cost"] = float(cost[pairs.source, pairs.target].mean())
        return Pairs(pairs.source, pairs.target, info=info)


def _class_codes(y0: Labels, y1: Labels) -> tuple[np.ndarray, np.ndarray, list[Any]]:
    """Labels of any kind as codes 0 … c-1 shared by both sides, and the classes for messages."""
    rows = []
    for labels, name in ((y0, "y0"), (y1, "y1")):
        array = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
        if array.dtype.kind not in "biufUSO":
            raise TypeError(f"{name} must hold numbers or strings; got dtype {array.dtype}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{name} must be finite; it holds NaN or infinite labels")
        rows.append(array.reshape(len(array), -1))
    if rows[0].shape[1] != rows[1].shape[1] or (rows[0].dtype.kind in "USO") != (rows[1].dtype.kind in "USO"):
        raise ValueError(
            f"y0 and y1 must hold labels of one kind; got shapes {rows[0].shape} and {rows[1].shape}, "
            f"dtypes {rows[0].dtype} and {rows[1].dtype}"
        )
    stacked = np.concatenate(rows)
    if stacked.shape[1] == 1:
        classes, codes = np.unique(
            stacked[:, 0].astype(str) if stacked.dtype.kind == "O" else stacked[:, 0], return_inverse=True
        )
    else:
        stacked = stacked.astype(str) if stacked.dtype.kind == "O" else stacked
        classes, codes = np.unique(stacked, axis=0, return_inverse=True)
    codes = codes.reshape(-1)
    return codes[: len(rows[0])], codes[len(rows[0]) :], classes.tolist()


def _pair_within_classes(x0: Tensor, x1: Tensor, y0: Labels, y1: Labels) -> Pairs:
    code0, code1, classes = _class_codes(y0, y1)
    count0, count1 = (np.bincount(code, minlength=len(classes)) for code in (code0, code1))
    wrong = np.flatnonzero(count0 != count1)
    if len(wrong):
        listed = "; ".join(f"class {classes[c]!r}: {count0[c]} in y0, {count1[c]} in y1" for c in wrong[:10])
        more = f"; and {len(wrong) - 10} more classes" if len(wrong) > 10 else ""
        raise ValueError(
            f"y0 and y1 must hold each class equally often; {listed}{more}. "
            "Leave y0 out to give the noise the labels of its random partners"
        )
    ends = np.cumsum(count0)[:-1]
    blocks = zip(
        np.split(np.argsort(code0, kind="stable"), ends), np.split(np.argsort(code1, kind="stable"), ends), strict=True
    )
    members = [(torch.from_numpy(rows).to(x0.device), torch.from_numpy(cols).to(x0.device)) for rows, cols in blocks]
    source = torch.empty(len(x1), dtype=torch.int64, device=x1.device)
    total = 0.0
    costs = [_pairwise(x0[rows], x1[cols], "sqeuclidean") for rows, cols in members]
    for (rows, cols), cost, matched in zip(members, costs, assign_blocks(costs), strict=True):
        source[cols] = rows[matched]
        total += float(cost[matched, torch.arange(len(cols), device=cost.device)].sum())
    info = {"classes": len(classes), "transport_cost": total / len(x1)}
    return Pairs(source, torch.arange(len(x1), device=x1.device), info=info)


def _vectors(y: Labels, x: Tensor, name: str) -> Tensor:
    """Continuous conditions as a new float tensor ``(n, c)`` on the device of the samples."""
    try:
        tensor = torch.as_tensor(y)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be numeric for condition='continuous'; got {type(y).__name__}") from None
    if tensor.is_complex():
        raise TypeError(f"{name} must be real; got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on the samples' device {x.device}; got {tensor.device}")
    tensor = tensor.detach().reshape(len(tensor), -1)
    return checks.finite(tensor.double() if tensor.dtype == torch.float64 else tensor.float(), name)


def _mismatch(y0: Tensor, y1: Tensor, condition_cost: str) -> Tensor:
    """Condition costs ``(n, n)``, exactly 0 for equal conditions."""
    if condition_cost == "sqeuclidean":
        mismatch = _pairwise(y0, y1, "sqeuclidean")
    else:
        for y, name in ((y0, "y0"), (y1, "y1")):
            zero = (y == 0).all(-1)
            if bool(zero.any()):
                raise ValueError(
                    f"condition_cost='cosine' needs non-zero conditions; {int(zero.sum())} rows of {name} are zero, "
                    f"the first at index {int(zero.int().argmax())}. Use one-hot rows for labels, or "
                    "condition_cost='sqeuclidean'"
                )
        both = torch.cat((y0, y1))
        if y0.shape[1] == 1 and len(both.unique()) > len(both.sign().unique()):
            raise ValueError(
                "condition_cost='cosine' sees only the sign of scalar conditions and cannot tell these apart; "
                "use condition_cost='sqeuclidean', or one-hot rows for labels"
            )
        mismatch = (1 - _unit(y0) @ _unit(y1).mT).clamp_min(0)
    _, codes = torch.unique(torch.cat((y0, y1)), dim=0, return_inverse=True)
    return mismatch.masked_fill_(codes[: len(y0), None] == codes[None, len(y0) :], 0)


def _weight_for_ratio(cost: Tensor, mismatch: Tensor, target: float) -> float:
    """The weight w at which r(w) comes closest to the target.

    Pair (i, j) is counted by r(w) as long as ``w <= (cost_ii - cost_ij) / mismatch_ij``, so the wanted w lies between
    two order statistics of these thresholds.
    """
    eligible = (mismatch > 0).fill_diagonal_(False)
    total = int(eligible.count_nonzero())
    if total == 0:
        return 0.0  # all conditions are equal: any w gives plain OT
    threshold = ((cost.diagonal()[:, None] - cost) / mismatch).masked_fill_(~eligible, -torch.inf)
    ceiling = int((threshold >= 0).count_nonzero()) / total
    if target > ceiling:
        _warn_unreachable(target, f"at most r(0) = {ceiling:.4g} is possible", "plain OT (weight 0) is used")
        return 0.0
    wanted = round(target * total)
    if wanted == 0:
        _warn_unreachable(
            target, f"r moves in steps of {1 / total:.4g} here, its floor above 0", "the weight at that floor is used"
        )
        wanted = 1
    # Midway between the wanted-th largest threshold and the next smaller one: robust to rounding when r is evaluated.
    upper = threshold.flatten().kthvalue(threshold.numel() - wanted + 1).values
    lower = threshold.masked_fill_(threshold >= upper, -torch.inf).amax().clamp_min(0)
    return float(upper.double() + lower.double()) / 2


def _warn_unreachable(target: float, why: str, instead: str) -> None:
    warnings.warn(
        f"ConditionalOTCoupling: target_ratio={target:g} cannot be reached in this batch ({why}); {instead}. "
        "Use a larger batch or another target_ratio",
        checks.ConvergenceWarning,
        stacklevel=2,
    )
