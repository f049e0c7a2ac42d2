"""Conditions of any kind (tensors, arrays, lists, dicts of them), followed through indexing, joining and copying."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def select(y: Any, rows: Tensor | slice) -> Any:
    """The conditions at some rows, in the container they came in.

    Args:
        y: None, a tensor or array ``(n, …)``, a sequence of n values, or a dict of these.
        rows: a slice or an int64 index.

    >>> select({"age": torch.arange(4), "name": ["a", "b", "c", "d"]}, torch.tensor([3, 0]))
    {'age': tensor([3, 0]), 'name': ['d', 'a']}
    """
    if y is None:
        return None
    if isinstance(y, dict):
        return {key: select(value, rows) for key, value in y.items()}
    if isinstance(rows, slice):
        return y[rows]
    if isinstance(y, Tensor):
        return y[rows.to(y.device)]
    index = rows.cpu().numpy()
    return y[index] if isinstance(y, np.ndarray) else [y[i] for i in index]


def concatenate(parts: Sequence[Any]) -> Any:
    """Conditions of several batches in one container of their kind.

    >>> concatenate([["a"], ["b", "c"]])
    ['a', 'b', 'c']
    """
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, dict):
        return {key: concatenate([part[key] for part in parts]) for key in first}
    if isinstance(first, np.ndarray):
        return np.concatenate(list(parts))
    return torch.cat(list(parts)) if isinstance(first, Tensor) else [value for part in parts for value in part]


def to_device(y: Any, device: torch.device | str) -> Any:
    """The conditions with their tensors on a device."""
    if isinstance(y, dict):
        return {key: to_device(value, device) for key, value in y.items()}
    return y.to(device, non_blocking=True) if isinstance(y, Tensor) else y
