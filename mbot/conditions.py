"""Conditions of samples: their containers, classes and missing values, the same for couplings, loaders and models.

The conditions of n samples are one of

* None: the samples have none;
* a tensor or NumPy array, ``(n,)`` or ``(n, c…)``, of any boolean, integer or floating dtype; arrays of strings too;
* a sequence of n values: numbers, strings, None, or rows of equal length of these;
* a pandas Series or DataFrame, or whatever else has ``.iloc``: its rows count by position, not by their index;
* a dict of these by name.

They may be on any device. **Classes** are equal where their values are: numbers across dtypes (1, 1.0 and True are one
class) and exactly at any size, strings as they are; a number equals no string. A **missing** condition, one that was
dropped for classifier-free guidance, is None or NaN; a row of several values is NaN in all of them. Among the integers
of a model's labels, where there is no NaN, it is -1 (`flows.null_condition`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbot.numerics import rows_of

Labels = Tensor | Sequence[Any] | Mapping[str, Any] | Any
"""Conditions, one a sample: a tensor ``(n,)`` or ``(n, c…)``, a NumPy array, a sequence (strings included), a pandas
Series or DataFrame, or a dict of several of these by name."""


def check(y: Labels | None, size: int, name: str, samples: str) -> None:
    """One condition for each of ``size`` samples, in a container that can be indexed by position."""
    if isinstance(y, Mapping):
        for key, part in y.items():
            check(part, size, f"{name}[{key!r}]", samples)
    elif y is not None:
        if isinstance(y, (str, bytes)) or not hasattr(y, "__getitem__") or getattr(y, "ndim", 1) == 0:
            raise TypeError(f"{name} must be a tensor, array, sequence, Series or dict; got {type(y).__name__}")
        if len(y) != size:
            raise ValueError(
                f"{name} must hold one condition for each of the {size} samples of {samples}; got {len(y)}"
            )


def select(y: Labels | None, rows: Tensor | slice) -> Any:
    """The conditions at some rows, in the container they came in.

    Args:
        y: conditions.
        rows: a slice or an int64 index, on any device.

    >>> select({"age": torch.arange(4), "name": ["a", "b", "c", "d"]}, torch.tensor([3, 0]))
    {'age': tensor([3, 0]), 'name': ['d', 'a']}
    """
    if y is None:
        return None
    if isinstance(y, Mapping):
        return {key: select(value, rows) for key, value in y.items()}
    if isinstance(y, Tensor):
        return y[rows] if isinstance(rows, slice) else rows_of(y, rows.to(y.device))
    index: Any = rows if isinstance(rows, slice) else rows.cpu().numpy()
    if hasattr(y, "iloc"):
        return y.iloc[index]
    if isinstance(y, np.ndarray) or isinstance(rows, slice):
        return y[index]
    values = [y[i] for i in index.tolist()]
    return tuple(values) if isinstance(y, tuple) else values


def concatenate(parts: Sequence[Any]) -> Any:
    """Conditions of several batches in one container.

    >>> concatenate([["a"], ["b", "c"]])
    ['a', 'b', 'c']
    """
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, Mapping):
        return {key: concatenate([part[key] for part in parts]) for key in first}
    if all(isinstance(part, Tensor) for part in parts):
        return torch.cat(list(parts))
    parts = [_array(part) for part in parts]
    if all(isinstance(part, np.ndarray) and part.dtype == parts[0].dtype for part in parts):
        return np.concatenate(parts)
    return [value for part in parts for value in part]


def to_device(y: Labels | None, device: torch.device | str) -> Any:
    """The conditions (or samples) with their tensors on a device.

    Copies to a device do not wait for it; one to the CPU could be read before it has arrived, so it does.
    """
    if isinstance(y, Mapping):
        return {key: to_device(value, device) for key, value in y.items()}
    return y.to(device, non_blocking=torch.device(device).type != "cpu") if isinstance(y, Tensor) else y


def detached(y: Labels | None) -> Any:
    """The conditions with their tensors as constants, which no gradient reaches."""
    if isinstance(y, Mapping):
        return {key: detached(value) for key, value in y.items()}
    return y.detach() if isinstance(y, Tensor) else y


def as_tensor(y: Labels, name: str, *, integers: bool = True) -> Tensor:
    """Numbers ``(n,)``, or rows of numbers ``(n, c…)``, as a tensor; a tensor as it is.

    Args:
        y: conditions that are no dict.
        name: for the errors.
        integers: missing ones among integers are -1; False makes them floating point, where they are NaN.

    Raises:
        TypeError: not numbers.
        ValueError: rows of unequal length.
    """
    if isinstance(y, Tensor):
        return y
    values = _array(y)
    if isinstance(values, np.ndarray) and values.dtype.kind in "biuf":
        return torch.from_numpy(np.array(values, values.dtype.newbyteorder("=")))
    if isinstance(values, (Mapping, str)):
        raise TypeError(f"{name} must be numeric; got a {type(y).__name__}")
    if not hasattr(values, "__iter__"):
        raise TypeError(f"{name} must hold one condition a sample; got {y!r}. For one class: torch.full((n,), {y!r})")
    plain = [_plain(value) for value in values]
    gone = [_missing(value) for value in plain]
    known = [value for value, out in zip(plain, gone, strict=True) if not out]
    strange = next((v for value in known for v in _flat(value) if not isinstance(v, (bool, int, float))), None)
    if strange is not None:
        raise TypeError(f"{name} must be numeric; it holds {strange!r}")
    try:
        tensor = torch.tensor(known or [-1 if integers else torch.nan])
    except (ValueError, RuntimeError) as error:  # rows of unequal length; integers beyond int64
        raise ValueError(f"{name} must hold numbers, or rows of equally many ({error})") from None
    if not any(gone):
        return tensor
    tensor = tensor if tensor.is_floating_point() else tensor.long() if integers else tensor.float()
    full = tensor.new_full((len(plain), *tensor.shape[1:]), torch.nan if tensor.is_floating_point() else -1)
    full[~torch.tensor(gone)] = tensor[: len(known)]
    return full


def continuous(y: Labels) -> bool:
    """Whether conditions are floating-point numbers, in place of classes."""
    try:
        return as_tensor(y, "y").is_floating_point()
    except TypeError:
        return False


def vectors(y: Labels, name: str, device: torch.device) -> tuple[Tensor, np.ndarray]:
    """Continuous conditions as floating point ``(n, c)`` on a device, and which of them are missing.

    Raises:
        TypeError: not real numbers.
        ValueError: rows of unequal length.
    """
    tensor = as_tensor(y, name, integers=False).detach().to(device)
    if tensor.is_complex():
        raise TypeError(f"{name} must hold real numbers; got {tensor.dtype}")
    if not tensor.is_floating_point():  # large integers need more digits
        exact = tensor.double()
        tensor = exact if bool((exact.float() != exact).any()) else exact.float()
    tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).reshape(len(tensor), -1)
    return tensor, tensor.isnan().all(-1).cpu().numpy()


def class_codes(
    y0: Labels, y1: Labels, *, names: tuple[str, str] = ("y0", "y1"), allow_missing: bool | None = None
) -> tuple[np.ndarray, np.ndarray, list[Any]]:
    """Labels as codes that both sides share.

    Args:
        y0: conditions of n samples; of dicts, all keys together make a class.
        y1: conditions of m samples.
        names: of the two, for the errors.
        allow_missing: missing labels are a class of their own, with the last code; else they are refused. None: the
            caller has no setting ``allow_dropped`` that an error could name.

    Returns:
        int64 codes ``(n,)`` and ``(m,)``, numbered as the classes come up in ``y1`` and then in ``y0``; and the classes
        by code, with "dropped" as the last.

    Raises:
        TypeError: neither numbers nor strings.
        ValueError: rows of unequal length, numbers on one side and strings on the other, missing labels.
    """
    names = names[::-1]
    if isinstance(y0, Mapping) != isinstance(y1, Mapping) or (isinstance(y0, Mapping) and set(y0) != set(y1)):
        keys = [sorted(y) if isinstance(y, Mapping) else type(y).__name__ for y in (y1, y0)]
        raise ValueError(f"{names[0]} and {names[1]} must have equal keys; got {keys[0]} and {keys[1]}")
    sides = [_rows(y, name) for y, name in zip((y1, y0), names, strict=True)]
    kinds = [(side.dtype, side.shape[1]) if isinstance(side, np.ndarray) else None for side in sides]
    if kinds[0] != kinds[1]:
        sides = [_tuples(side) for side in sides]  # Python's values are compared exactly
    gone = [_gone(side, name, allow_missing) for side, name in zip(sides, names, strict=True)]
    if isinstance(sides[0], np.ndarray):
        given = [side[~out] for side, out in zip(sides, gone, strict=True)]
        joint = np.concatenate(given)
        joint, axis = (joint[:, 0], None) if joint.shape[1] == 1 else (joint, 0)
        values, first, codes = np.unique(joint, axis=axis, return_index=True, return_inverse=True)
        order = first.argsort()
        classes, codes = _tuples(values[order]), order.argsort()[codes.reshape(-1)]
    else:
        given = [
            [row for row, g in zip(side, out, strict=True) if not g] for side, out in zip(sides, gone, strict=True)
        ]
        classes, codes = _numbered([*given[0], *given[1]], " and ".join(names))
        words, others = ({isinstance(value, (str, bytes)) for row in part for value in row} for part in given)
        if words ^ others == {True, False}:
            raise ValueError(f"{' and '.join(names)} must hold labels of one kind: numbers, or strings")
    code1, code0 = (np.full(len(out), len(classes), np.int64) for out in gone)
    code1[~gone[0]], code0[~gone[1]] = codes[: len(given[0])], codes[len(given[0]) :]
    return code0, code1, [*(row[0] if len(row) == 1 else row for row in classes), "dropped"]


def _numbered(rows: list[tuple[Any, ...]], names: str) -> tuple[list[tuple[Any, ...]], np.ndarray]:
    """Distinct rows as they come up, and the number of each row among them."""
    seen: dict[Any, int] = {}
    try:
        codes = np.array([seen.setdefault(row, len(seen)) for row in rows], np.int64)
    except TypeError as error:
        raise TypeError(f"{names} must hold numbers or strings ({error})") from None
    widths = sorted({len(row) for row in seen})
    if len(widths) > 1:
        raise ValueError(f"the rows of {names} must hold equally many values; got {widths}")
    return list(seen), codes


def _rows(y: Labels, name: str) -> Any:
    """Labels as an array ``(n, c)`` of numbers or strings, or as a list of n tuples."""
    if isinstance(y, Tensor):
        y = y.detach().cpu()
        y = (y.float() if y.is_floating_point() and y.dtype.itemsize < 4 else y).numpy()
    if isinstance(y, Mapping):  # a row is the values of all keys
        if not y:
            raise ValueError(f"{name} is a dict without keys")
        return [
            _flat(row) for row in zip(*(_tuples(_rows(y[key], f"{name}[{key!r}]")) for key in sorted(y)), strict=True)
        ]
    array = _array(y)
    if not isinstance(array, np.ndarray) or array.dtype == object:
        return _tuples(array)
    if array.dtype.kind not in "biufUS":
        raise TypeError(f"{name} must hold numbers or strings; got {array.dtype}")
    return array.reshape(len(array), -1)


def _tuples(rows: Any) -> list[tuple[Any, ...]]:
    """Rows as tuples of Python's values."""
    return [_flat(row) for row in (rows.tolist() if isinstance(rows, np.ndarray) else rows)]


def _flat(value: Any) -> tuple[Any, ...]:
    value = _plain(value)
    return tuple(v for part in value for v in _flat(part)) if isinstance(value, (list, tuple)) else (value,)


def _array(y: Any) -> Any:
    """Series and DataFrames as arrays; all else as it is."""
    return y.to_numpy() if hasattr(y, "iloc") else y


def _plain(value: Any) -> Any:
    """One condition as Python's values."""
    return value.tolist() if isinstance(value, (Tensor, np.ndarray, np.generic)) else value


def _missing(value: Any) -> bool:
    try:
        return value is None or bool(value != value)
    except TypeError:  # pandas' NA is neither equal to itself nor unequal
        return True


def _gone(rows: Any, name: str, allowed: bool | None) -> np.ndarray:
    """Whether each row is missing, ``(n,)``."""
    if isinstance(rows, np.ndarray):
        gone, partly = (rows != rows).all(1), (rows != rows).any(1)
    else:
        missing = [[_missing(value) for value in row] for row in rows]
        gone, partly = (np.array([how(row) for row in missing], bool) for how in (all, any))
    if partly.any() and not allowed:
        hint = " (allow_dropped=True takes these as dropped conditions)" if allowed is False else ""
        raise ValueError(
            f"{name} must hold a label for each sample; {partly.sum()} are None or NaN, the first at index "
            f"{partly.argmax()}{hint}"
        )
    if (partly & ~gone).any():
        raise ValueError(f"row {(partly & ~gone).argmax()} of {name} is missing in part: None and NaN stand for a row")
    return gone
