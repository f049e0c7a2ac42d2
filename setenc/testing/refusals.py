"""Inputs that a pooling must refuse, and those that it must take at any size."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from setenc.pooling import DeepSetsPooling, InstancePooling, JointPooling, Pooling
from setenc.state import SetState
from setenc.testing.tools import copied, elements, refused, stream, true


def bad_input_is_refused(pooling: Pooling) -> None:
    """Wrong shapes, kinds and values are a TypeError or a ValueError."""
    pool = copied(pooling)
    x = elements(pool, 2, 5)
    ones = torch.ones(2, 5, device=x.device)
    bad: list[tuple[type[Exception], str, tuple[Any, ...]]] = [
        (ValueError, "too few dimensions", (x[0],)),
        (ValueError, "too few features", (x[..., 1:],)),
        (ValueError, "a mask of another size", (x, ones[:, :4].bool())),
        (TypeError, "a mask that is not bool", (x, ones)),
        (ValueError, "weights of another size", (x, None, ones[0])),
        (ValueError, "negative weights", (x, None, -ones)),
        (ValueError, "weights that are NaN", (x, None, ones * math.nan)),
        (ValueError, "elements that are NaN", (torch.where(x > x.mean(), math.nan, x),)),
        (ValueError, "elements that are infinite", (torch.where(x > x.mean(), math.inf, x),)),
        (TypeError, "elements that are integers", (x.long(),)),
        (TypeError, "elements of another dtype", (x.float(),)),
    ]
    for error, what, arguments in bad:
        # Values on an accelerator are not checked until the state is read.
        for call in (pool, lambda *given: pool.readout(pool.update(pool.init_state(2), *given))):
            refused(partial(call, *arguments), error, what, arguments)
    refused(lambda: pool.update(pool.init_state(3), x), ValueError, "a chunk of another number of sets", (x,))
    refused(lambda: pool.init_state(3).merge(pool.init_state(2)), ValueError, "states of other sizes", ())
    merge: Callable[[Any], SetState] = pool.init_state(3).merge
    refused(partial(merge, x), TypeError, "a tensor as a state", (x,))


def states_of_others_are_refused(pooling: Pooling) -> None:
    """Neither an update nor a read-out takes the state of another pooling, of another dtype, or no state."""
    pool = copied(pooling)
    x = elements(pool, 2, 5)
    size = pool.out_dim
    others = [
        DeepSetsPooling(pool.in_dim, size + 1, "mean"),
        DeepSetsPooling(pool.in_dim, size + 1, "max"),
        InstancePooling(pool.in_dim, size + 1, pool.num_slots + 1),
        JointPooling(DeepSetsPooling(pool.in_dim, size + 1), InstancePooling(pool.in_dim, size + 1)),
    ]
    states: list[tuple[type[Exception], Any]] = [
        (ValueError, other.to(x).init_state(2)) for other in others if type(other) is not type(pool)
    ]
    states += [(ValueError, copy.deepcopy(pool).float().init_state(2)), (TypeError, None), (TypeError, x)]
    for error, state in states:
        what = f"the state {type(state).__name__} of another pooling"
        refused(partial(pool.update, state, x), error, what, (x,))
        refused(partial(pool.readout, state), error, what, ())


@torch.no_grad()
def huge_elements_are_right_or_refused(pooling: Pooling) -> None:
    """Elements of any size give what float64 gives, or a ValueError: never NaN, and never something else."""
    exact, pool = copied(pooling), copied(pooling, torch.float32)
    for power in (-30, 4, 10, 18, 19, 20, 25, 30, 38):
        x = (10.0**power * elements(pool, 2, 5).double()).clamp(-3e38, 3e38).float()
        expected = exact(x.double())
        for call in (pool, lambda x: pool.readout(stream(pool, pool.init_state(2), x.split(2, 1)))):
            try:
                found = call(x)
            except ValueError:
                continue
            true(bool(found.isfinite().all()), "the result of huge elements is finite", x=x)
            gap, size = (found.double() - expected).abs().max(), expected.abs().max()
            true(bool(gap <= 1e-3 * size), f"elements of size 1e{power} give what float64 gives", x=x)
