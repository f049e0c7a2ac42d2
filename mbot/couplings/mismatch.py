"""Conditions of C²OT: some forbid a pair, others add a price to its cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbot import checks
from mbot.conditions import Labels, class_codes, vectors
from mbot.cost import pairwise

COSTS = ("cosine", "sqeuclidean")


@dataclass(frozen=True)
class Condition:
    """One of several conditions of `ConditionalOTCoupling`.

    Args:
        kind: ``"discrete"`` or ``"continuous"``.
        weight: discrete: None never pairs two classes; a number lets them pair at this price. Continuous: factor on
            the condition cost (None: 1). Prices are relative to each other; the coupling's own weight (given, or found
            for its target ratio) multiplies all of them.
        cost: condition cost of a continuous one: ``"cosine"`` (``1 - cos``) or ``"sqeuclidean"``.

    >>> Condition("discrete"), Condition("continuous", weight=2.0).price
    (Condition(kind='discrete', weight=None, cost='cosine'), 2.0)
    """

    kind: str = "discrete"
    weight: float | None = None
    cost: str = "cosine"

    def __post_init__(self) -> None:
        checks.choice(self.kind, "condition", ("discrete", "continuous"))
        checks.choice(self.cost, "condition_cost", COSTS)
        if self.weight is not None:
            checks.store(self, weight=checks.positive(self.weight, "weight"))

    @property
    def hard(self) -> bool:
        """Whether unequal conditions may not pair at any price."""
        return self.kind == "discrete" and self.weight is None

    @property
    def price(self) -> float:
        """Factor on the condition cost."""
        return 1.0 if self.weight is None else self.weight


def named_conditions(condition: Any, condition_cost: str) -> dict[str, Condition]:
    """The settings of all conditions by name; a single one has the name ``""``."""
    if isinstance(condition, str):
        checks.choice(condition, "condition", ("discrete", "continuous"))
        return {"": Condition(condition, cost=condition_cost)}
    if not isinstance(condition, Mapping) or not condition:
        raise TypeError(
            f"condition must be 'discrete', 'continuous', or a dict of conditions by name; got {condition!r}"
        )
    named = {
        name: Condition(value, cost=condition_cost) if isinstance(value, str) else value
        for name, value in condition.items()
    }
    for name, value in named.items():
        if not isinstance(value, Condition):
            raise TypeError(f"condition[{name!r}] must be 'discrete', 'continuous' or a Condition; got {value!r}")
    return named


@dataclass
class Sides:
    """Checked conditions of both sides: classes that must be equal, and values whose difference has a price.

    Attributes:
        codes0, codes1: ``(n,)`` class of each sample; only equal ones may pair.
        names: names of these classes.
        terms: of the conditions at a price: the price, the cost, and both sides' values ``(n, c)``.
        dropped: number of dropped conditions of the target side.
    """

    codes0: np.ndarray
    codes1: np.ndarray
    names: list[Any]
    terms: list[tuple[float, str, Tensor, Tensor]]
    dropped: int

    def mismatch(self, rows: Tensor, cols: Tensor) -> Tensor:
        """Sum of the priced condition costs between some samples of both sides, ``(k, l)``."""
        total = None
        for price, cost, values0, values1 in self.terms:
            part = mismatch_cost(values0[rows], values1[cols], cost).mul_(price)
            total = part if total is None else total.add_(part)
        assert total is not None
        return total


def sides(conditions: dict[str, Condition], y0: Labels, y1: Labels, like: Tensor, allow_dropped: bool) -> Sides:
    """Check the conditions of both sides against the settings.

    Args:
        conditions: from `named_conditions`.
        y0: conditions of the source: as the settings name them, or one that is not a dict.
        y1: conditions of the target.
        like: the samples, for their device.
        allow_dropped: NaN rows, NaN labels and None mean dropped conditions; else they are refused.
    """
    classes: list[tuple[np.ndarray, np.ndarray, list[Any]]] = []
    terms: list[tuple[float, str, Tensor, Tensor]] = []
    dropped = 0
    for name, condition in conditions.items():
        label = f"[{name!r}]" if name else ""
        part0, part1 = (_named(y, name, conditions, side) for y, side in ((y0, "y0"), (y1, "y1")))
        if condition.kind == "discrete":
            both = f"y0{label}", f"y1{label}"
            code0, code1, names = class_codes(part0, part1, names=both, allow_missing=allow_dropped)
            gone0, gone1 = code0 == len(names) - 1, code1 == len(names) - 1
            dropped += int(gone1.sum())
            if condition.hard:
                classes.append((code0, code1, names))
                continue  # a dropped label is a class of its own already
            value0, value1 = (torch.from_numpy(code).to(like.device)[:, None] for code in (code0, code1))
            terms.append((condition.price, "unequal", value0, value1))
        else:
            (value0, gone0), (value1, gone1) = (
                _vectors(y, side + label, like.device, allow_dropped) for y, side in ((part0, "y0"), (part1, "y1"))
            )
            dropped += int(gone1.sum())
            if value0.shape[1] != value1.shape[1]:
                raise ValueError(
                    f"y0{label} and y1{label} must have equal features; got {tuple(value0.shape)} and "
                    f"{tuple(value1.shape)}"
                )
            kind = torch.promote_types(value0.dtype, value1.dtype)
            value0, value1 = value0.to(kind), value1.to(kind)
            if condition.cost == "cosine":
                _check_cosine(value0, value1, gone0, gone1, label)
            terms.append((condition.price, condition.cost, value0, value1))
        if gone0.any() or gone1.any():
            classes.append((gone0.astype(np.int64), gone1.astype(np.int64), ["given", "dropped"]))
    if not classes:
        alone = [np.zeros(len(values), np.int64) for values in terms[0][2:]]
        return Sides(alone[0], alone[1], ["all"], terms, dropped)
    return Sides(*_joint(classes), terms, dropped)


def _named(y: Labels, name: str, conditions: dict[str, Condition], side: str) -> Any:
    """The values of one condition."""
    if not name:
        if isinstance(y, Mapping):
            raise TypeError(f"{side} is a dict of conditions: give the coupling a dict of settings by the same names")
        return y
    if not isinstance(y, Mapping):
        raise TypeError(f"{side} must be a dict with the conditions {list(conditions)}; got {type(y).__name__}")
    if y.get(name) is None:
        raise ValueError(f"{side} must hold the conditions {list(conditions)}; {name!r} is missing, got {list(y)}")
    return y[name]


def _joint(classes: list[tuple[np.ndarray, np.ndarray, list[Any]]]) -> tuple[np.ndarray, np.ndarray, list[Any]]:
    """Classes of several conditions at once."""
    if len(classes) == 1:
        return classes[0]
    size = len(classes[0][0])
    stacked = np.stack([np.concatenate((code0, code1)) for code0, code1, _ in classes], 1)
    combinations, codes = np.unique(stacked, axis=0, return_inverse=True)
    names = [tuple(part[2][c] for part, c in zip(classes, row, strict=True)) for row in combinations]
    codes = codes.reshape(-1)
    return codes[:size], codes[size:], names


def _vectors(y: Labels, name: str, device: torch.device, allow_dropped: bool) -> tuple[Tensor, np.ndarray]:
    """Continuous conditions ``(n, c)`` and which are dropped; those count as equal and pair with no others."""
    values, gone = vectors(y, name, device)
    if allow_dropped:
        values = values.masked_fill(torch.from_numpy(gone).to(device)[:, None], 1.0)
    return checks.finite(values, name), gone & allow_dropped


def _check_cosine(y0: Tensor, y1: Tensor, gone0: np.ndarray, gone1: np.ndarray, label: str) -> None:
    """Refuse conditions that the cosine cannot tell apart."""
    for y, name in ((y0, f"y0{label}"), (y1, f"y1{label}")):
        zero = (y == 0).all(-1)
        if bool(zero.any()):
            raise ValueError(
                f"condition_cost='cosine' needs non-zero conditions; {int(zero.sum())} rows of {name} are zero, "
                f"the first at index {int(zero.int().argmax())}. Use one-hot rows for labels, "
                "condition_cost='sqeuclidean', or, for dropped conditions, rows of NaN and allow_dropped=True"
            )
    both = torch.cat([y[torch.from_numpy(~gone).to(y.device)] for y, gone in ((y0, gone0), (y1, gone1))])
    if y0.shape[1] == 1 and len(both.unique()) > len(both.sign().unique()):
        raise ValueError(
            "condition_cost='cosine' sees only the sign of scalar conditions and cannot tell these apart; "
            "use condition_cost='sqeuclidean', or one-hot rows for labels"
        )


def mismatch_cost(y0: Tensor, y1: Tensor, cost: str) -> Tensor:
    """Condition costs ``(n, m)`` between rows ``(n, c)`` and ``(m, c)``, exactly 0 for equal conditions."""
    if cost == "unequal":
        return (y0 != y1.mT).float()
    same0, same1 = _same_rows(y0, y1)
    return pairwise(y0, y1, cost).masked_fill_(same0[:, None] == same1, 0)


def _same_rows(y0: Tensor, y1: Tensor) -> tuple[Tensor, Tensor]:
    """Codes ``(n,)``, ``(m,)`` that are equal where rows are."""
    both = torch.cat((y0, y1)) + 0.0  # -0 and 0 are one value
    _, codes = np.unique(both.cpu().numpy().view(f"V{both.element_size() * both.shape[1]}")[:, 0], return_inverse=True)
    found = torch.from_numpy(codes.reshape(-1)).to(y0.device)
    return found[: len(y0)], found[len(y0) :]
