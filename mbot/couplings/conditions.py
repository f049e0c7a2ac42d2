"""Conditions of C²OT: labels of any kind, vectors, dropped ones; what keeps a pair apart, and at which price."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbot import checks
from mbot.cost import pairwise, unit
from mbot.couplings.base import Labels
from mbot.numerics import product

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
    """Checked conditions of both sides: what must be equal, and what costs.

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
            (part0, gone0), (part1, gone1) = (_without_dropped(y, allow_dropped) for y in (part0, part1))
            code0, code1, names = _class_codes(part0, part1, gone0, gone1, label)
            if condition.hard:
                classes.append((code0, code1, names))
            else:
                value0, value1 = (torch.from_numpy(code).to(like.device)[:, None] for code in (code0, code1))
                terms.append((condition.price, "unequal", value0, value1))
        else:
            (value0, gone0), (value1, gone1) = (
                _vectors(y, like, side + label, allow_dropped) for y, side in ((part0, "y0"), (part1, "y1"))
            )
            if value0.shape != value1.shape:
                raise ValueError(
                    f"y0{label} and y1{label} must have equal features; got {tuple(value0.shape)} and "
                    f"{tuple(value1.shape)}"
                )
            if condition.cost == "cosine":
                _check_cosine(value0, value1, gone0, gone1, label)
            terms.append((condition.price, condition.cost, value0, value1))
        dropped += int(gone1.sum())
        if condition.kind == "discrete" and condition.hard:
            continue  # a dropped label is a class of its own already
        if gone0.any() or gone1.any():
            classes.append((gone0.astype(np.int64), gone1.astype(np.int64), ["given", "dropped"]))
    if not classes:
        zeros = np.zeros(len(like), np.int64)
        return Sides(zeros, zeros, ["all"], terms, dropped)
    return Sides(*_joint(classes), terms, dropped)


def _named(y: Labels, name: str, conditions: dict[str, Condition], side: str) -> Any:
    """The values of one condition."""
    if not name:
        if isinstance(y, Mapping):
            raise TypeError(f"{side} is a dict of conditions: give the coupling a dict of settings by the same names")
        return y
    if not isinstance(y, Mapping):
        raise TypeError(f"{side} must be a dict with the conditions {list(conditions)}; got {type(y).__name__}")
    if name not in y:
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


def _without_dropped(labels: Any, allow_dropped: bool) -> tuple[Any, np.ndarray]:
    """Labels as an array, and which of them are dropped (None, NaN); all of them present if not allowed."""
    array = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    gone = np.zeros(len(array), bool)
    if allow_dropped and array.dtype.kind == "f":
        gone = np.isnan(array).reshape(len(array), -1).all(1)
        array = np.where(gone.reshape(-1, *[1] * (array.ndim - 1)), 0, array)
    elif allow_dropped and array.dtype.kind == "O":
        gone = np.array([v is None or v != v for v in array], bool)
        if gone.any() and not gone.all():
            stand_in = array[~gone][0]
            array = np.asarray([stand_in if g else v for v, g in zip(array, gone, strict=True)])
        elif gone.any():
            array = np.zeros(len(array), np.int64)
    return array, gone


def class_codes(y0: Labels, y1: Labels) -> tuple[np.ndarray, np.ndarray, list[Any]]:
    """Labels of any kind as codes ``(n,)``, ``(m,)`` shared by both sides, and the classes by code."""
    (array0, gone0), (array1, gone1) = (_without_dropped(y, False) for y in (y0, y1))
    return _class_codes(array0, array1, gone0, gone1, "")


def _class_codes(
    y0: np.ndarray, y1: np.ndarray, gone0: np.ndarray, gone1: np.ndarray, label: str
) -> tuple[np.ndarray, np.ndarray, list[Any]]:
    """Labels of any kind as codes shared by both sides (dropped ones the last), and the classes for messages."""
    rows = []
    for array, name in ((y0, f"y0{label}"), (y1, f"y1{label}")):
        if array.dtype.kind not in "biufUSO":
            raise TypeError(f"{name} must hold numbers or strings; got dtype {array.dtype}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(
                f"{name} must be finite; it holds NaN or infinite labels (allow_dropped=True takes NaN and None as "
                "dropped conditions)"
            )
        rows.append(array.reshape(len(array), -1))
    if rows[0].shape[1] != rows[1].shape[1] or (rows[0].dtype.kind in "USO") != (rows[1].dtype.kind in "USO"):
        raise ValueError(
            f"y0{label} and y1{label} must hold labels of one kind; got shapes {rows[0].shape} and {rows[1].shape}, "
            f"dtypes {rows[0].dtype} and {rows[1].dtype}"
        )
    stacked = np.concatenate(rows)
    stacked = stacked.astype(str) if stacked.dtype.kind == "O" else stacked
    if stacked.shape[1] == 1:
        classes, codes = np.unique(stacked[:, 0], return_inverse=True)
    else:
        classes, codes = np.unique(stacked, axis=0, return_inverse=True)
    codes = codes.reshape(-1)
    codes[np.concatenate((gone0, gone1))] = len(classes)
    return codes[: len(rows[0])], codes[len(rows[0]) :], [*classes.tolist(), "dropped"]


def _vectors(y: Labels, x: Tensor, name: str, allow_dropped: bool) -> tuple[Tensor, np.ndarray]:
    """Continuous conditions as a new float tensor ``(n, c)`` on the device of the samples, and which are dropped."""
    if allow_dropped and not isinstance(y, Tensor | np.ndarray) and any(row is None for row in y):
        given = [row for row in y if row is not None]
        nothing = torch.full_like(torch.as_tensor(given[0], dtype=torch.float32), torch.nan) if given else torch.nan
        y = torch.stack([torch.as_tensor(nothing if row is None else row, dtype=torch.float32) for row in y])
    try:
        tensor = torch.as_tensor(y)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be numeric for condition='continuous'; got {type(y).__name__}") from None
    if tensor.is_complex():
        raise TypeError(f"{name} must be real; got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on the samples' device {x.device}; got {tensor.device}")
    tensor = tensor.detach().reshape(len(tensor), -1)
    tensor = tensor.double() if tensor.dtype == torch.float64 else tensor.float()
    gone = torch.zeros(len(tensor), dtype=torch.bool, device=tensor.device)
    if allow_dropped:
        gone = tensor.isnan().all(-1)
        tensor = tensor.masked_fill(gone[:, None], 1.0)  # equal among themselves; they pair with no others
    return checks.finite(tensor, name), gone.cpu().numpy()


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
    between = pairwise(y0, y1, "sqeuclidean") if cost == "sqeuclidean" else 1 - product(unit(y0), unit(y1).mT)
    same0, same1 = _same_rows(y0, y1)
    return between.clamp_min_(0).masked_fill_(same0[:, None] == same1, 0)


def _same_rows(y0: Tensor, y1: Tensor) -> tuple[Tensor, Tensor]:
    """Codes ``(n,)``, ``(m,)`` that are equal where rows are."""
    both = torch.cat((y0, y1)) + 0.0  # -0 and 0 are one value
    _, codes = np.unique(both.cpu().numpy().view(f"V{both.element_size() * both.shape[1]}")[:, 0], return_inverse=True)
    found = torch.from_numpy(codes.reshape(-1)).to(y0.device)
    return found[: len(y0)], found[len(y0) :]
