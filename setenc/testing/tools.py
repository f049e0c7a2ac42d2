"""Helpers of the checks in `setenc.testing`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from setenc.encoder import UMBC
from setenc.pooling import Pooling
from setenc.state import SetState


def copied(pooling: Pooling, dtype: torch.dtype = torch.float64) -> Pooling:
    """A copy in eval mode."""
    return copy.deepcopy(pooling).to(dtype).eval()


def like(module: torch.nn.Module) -> Tensor:
    """A parameter."""
    return next(module.parameters())


def trained(module: torch.nn.Module) -> list[Tensor]:
    """Parameters that require gradients."""
    return [p for p in module.parameters() if p.requires_grad]


def elements(pooling: Pooling, batch: int, size: int, seed: int = 0) -> Tensor:
    """Features ``(batch, size, in_dim)`` from a seed."""
    x = torch.randn(batch, size, pooling.in_dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(like(pooling))


def passes(pooling: Pooling, start: SetState, absorb: Callable[[SetState], SetState]) -> SetState:
    """The state after every pass that the pooling makes over its elements."""
    state = absorb(start)
    for _ in range(pooling.num_passes - 1):
        state = absorb(pooling.next_pass(state))
    return state


def updated(pooling: Any, parts: Sequence[dict[str, Any]], state: SetState) -> SetState:
    """The state after chunks, given as the arguments of ``update``."""
    for part in parts:
        state = pooling.update(state, part["x"], part.get("mask"), part.get("weights"))
    return state


def stream(pooling: Any, start: SetState, chunks: Sequence[Any]) -> SetState:
    """The state of a stream of chunks."""
    pool = pooling.pooling if isinstance(pooling, UMBC) else pooling
    return passes(pool, start, partial(updated, pooling, [{"x": chunk} for chunk in chunks]))


def true(condition: bool, what: str, **inputs: Any) -> None:
    """A condition, or an error with the input."""
    if not condition:
        raise AssertionError(f"broken: {what}. Input: {inputs}")


def close(ours: Tensor, theirs: Tensor, what: str, tolerance: float | None = None, /, **inputs: Any) -> None:
    """Equal results, to 1e-12 in float64 and 1e-5 else, or an error with the input."""
    if tolerance is None:
        tolerance = 1e-12 if theirs.dtype == torch.float64 else 1e-5
    try:
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    except AssertionError as error:
        raise AssertionError(f"{what} must not change the result. {error}\nInput: {inputs}") from None


def same_state(ours: SetState, theirs: SetState, what: str, *, exact: bool = True, **inputs: Any) -> None:
    """Equal states, or an error with the input."""
    for a, b in zip(ours.parts, theirs.parts, strict=True):
        for name in ("total", "mass", "peak", "count"):
            mine, other = getattr(a, name), getattr(b, name)
            if exact:
                true(torch.equal(mine, other), f"{what}: its {name}", **inputs)
            else:
                close(mine, other, f"{what}: its {name}", **inputs)


def refused(call: Callable[[], Any], error: type[Exception], what: str, inputs: Any) -> None:
    """An error of one kind, or an AssertionError with the input."""
    try:
        call()
    except error:
        return
    except Exception as other:
        raise AssertionError(f"{what} must be a {error.__name__}; got {other!r}. Input: {inputs}") from other
    raise AssertionError(f"{what} must be a {error.__name__}; it was accepted. Input: {inputs}")
