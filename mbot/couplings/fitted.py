"""Couplings that are fitted to a data set: its classes, its fingerprint, and what is saved of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from mbot.conditions import Labels, check, class_codes
from mbot.couplings.base import Coupling

_HASHED = 1 << 20  # numbers hashed at a time


def codes_of(y: Labels | None, points: Tensor, name: str) -> Tensor:
    """Classes ``(N,)`` of the points of a data set, as 0 … c-1."""
    if y is None:
        raise ValueError(f"conditional=True needs {name}, the class of each of the {len(points)} points; got none")
    check(y, len(points), name, "the data set")
    return torch.from_numpy(class_codes(y, y, names=(name, name))[1]).to(points.device)


def fingerprint(points: Tensor, codes: Tensor | None = None) -> int:
    """A hash of points ``(n, d)`` and of their classes ``(n,)``, in order; the same for every device and float dtype.

    Two data sets that differ in one number have different ones, but for a chance of about 2^-60.
    """
    n, d = points.shape
    keys = torch.randint(2**62, (-(-d // 2) + 1,), generator=torch.Generator().manual_seed(n)).to(points.device) * 2 + 1
    total = torch.zeros((), dtype=torch.int64, device=points.device)
    step = max(1, _HASHED // d)
    for begin in range(0, n, step):
        part = torch.nn.functional.pad(points[begin : begin + step].float() + 0.0, (0, d % 2))  # -0 and 0 are one
        row = (part.contiguous().view(torch.int64) * keys[1:]).sum(1)
        if codes is not None:
            row += (codes[begin : begin + step] + 1) * keys[0]
        row = (row ^ (row >> 29)) * keys[0]  # mixed, so that sums over rows do not take one for another
        position = torch.arange(begin, begin + len(row), device=row.device)
        total += ((row ^ (row >> 32)) * (2 * position + 1)).sum()
    return int(total)


def check_fitted(coupling: Coupling, known: int, size: int, points: Tensor, codes: Tensor | None, name: str) -> None:
    """Refuse all but the data set of ``size`` points with the fingerprint ``known``, which a coupling was fitted to."""
    if known == fingerprint(points, codes):
        return
    what = f"{len(points)} points" if len(points) != size else "as many others, another order or other classes"
    raise ValueError(
        f"{name} must be the data set that the coupling was fitted to, {size} points; got {what} (random transforms "
        f"make others too). Fit a new {type(coupling).__name__} to it"
    )


def state_of(coupling: Coupling, fitted: str) -> dict[str, Any]:
    """Settings, and the attributes of the part ``fitted`` where there is one, as plain values and tensors."""
    state = {f.name: getattr(coupling, f.name) for f in dataclasses.fields(coupling)}
    part = state.pop(fitted)
    if part is not None:
        state[fitted] = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
    return state
