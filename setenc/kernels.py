"""The state with a few elements more in one call, compiled with numba: with few, the time is that of the calls."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import carray, types
from numba.extending import intrinsic
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from minibatch_transport import compiled

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "nsz", "contract"}}
_SCALARS: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float64: np.float64}
_TYPES = (Tensor, torch.nn.Parameter)
_END = 2**60  # arrays at an address do not know theirs


def absorb(
    slots: Tensor,
    query_at: int,
    weight: Tensor | None,
    features: Tensor,
    offset: Tensor | None,
    onto: tuple[Tensor, Tensor, Tensor],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Total, mass and peak with elements of logits ``scale <query, key>`` added to those in ``onto``.

    None where a tensor is more than its numbers on the CPU, or laid out in another way, and where not all logits are
    finite, as of all elements that are not.

    Args:
        slots: ``(H K, h)``, with queries that start at the column ``query_at``.
        query_at: see ``slots``.
        weight: ``(2 H V, d)``, the map to the keys and then the values of all heads; None where the features are both.
        features: ``(B, n, d)``.
        offset: ``(B, 1, 1, n)`` logarithms of the elements' weights, -inf at padding; None where all are 1.
        onto: total ``(B, H, K, V)``, mass and peak ``(B, H, K)``.
        scale: of the logits.
    """
    total, mass, peak = onto
    shape, dtype = total.shape, total.dtype
    sets, size, dim = features.shape
    if not (len(shape) == 4 and shape[0] == sets and mass.shape == peak.shape == shape[:3] and dtype in _SCALARS):
        return None
    if weight is not None and weight.shape != (2 * shape[1] * shape[3], dim):
        return None
    addresses = []
    for x in (features, weight, slots, offset, total, mass, peak):
        if x is not None and not (
            type(x) in _TYPES and x.is_cpu and x.dtype == dtype and not x.is_neg()
            and (x.is_contiguous() or (x is features and x.stride(2) == 1))
        ):  # fmt: skip
            return None
        try:
            addresses.append(0 if x is None else x.data_ptr())
        except RuntimeError:  # a tensor in a transform of torch.func
            return None
    # Forward-mode derivatives are kept without grad mode too.
    if any(x is not None and unpack_dual(x).tangent is not None for x in (features, weight, slots, total)):
        return None
    addresses[2] += query_at * slots.element_size()
    new = torch.empty_like(total), torch.empty_like(mass), torch.empty_like(peak)
    finite = _absorb(
        _SCALARS[dtype](scale),
        (*shape, size, dim),
        (features.stride(0), features.stride(1), slots.stride(0)),
        tuple(addresses),
        (new[0].data_ptr(), new[1].data_ptr(), new[2].data_ptr()),
    )
    return new if finite else None


@intrinsic
def _pointer(typing: Any, address: Any, like: Any) -> Any:
    """A pointer from the address of numbers in the dtype of ``like``."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(address, like), code


@compiled(**_OPTIONS)
def _at(address, like):  # type: ignore[no-untyped-def]
    """The numbers at an address, in the dtype of ``like``."""
    return carray(_pointer(address, like), (_END,))


@compiled(**_OPTIONS)
def _dot(x, y):  # type: ignore[no-untyped-def]
    total = x.dtype.type(0)
    for d in range(len(x)):
        total += x[d] * y[d]
    return total


@compiled(**_OPTIONS)
def _add(x, share, y):  # type: ignore[no-untyped-def]
    for d in range(len(x)):
        x[d] += share * y[d]


@compiled(**_OPTIONS)
def _absorb(scale, sizes, steps, given, after):  # type: ignore[no-untyped-def]
    """`absorb` by addresses, 0 for None: features, weight, queries, offsets, total, mass, peak, and the three new ones."""
    sets, heads, slots, width, size, dim = sizes
    features, weight, queries = _at(given[0], scale), _at(given[1], scale), _at(given[2], scale)
    offsets = _at(given[3], scale)
    old_total, old_mass, old_peak = _at(given[4], scale), _at(given[5], scale), _at(given[6], scale)
    total, mass, peak = _at(after[0], scale), _at(after[1], scale), _at(after[2], scale)
    logits = np.empty(size, old_total.dtype)
    lowest = np.finfo(logits.dtype).min
    # Numbers of an element after the map, of a head among them, and from a key to its value.
    mapped, head_step, value_at = (2 * heads * width, width, heads * width) if given[1] != 0 else (0, 0, 0)
    elements = np.empty(size * mapped, logits.dtype)
    finite = True
    cell = 0
    for b in range(sets):
        keys, step = features[b * steps[0] : _END], steps[1]
        if mapped:
            for r in range(mapped):
                row = weight[r * dim : (r + 1) * dim]
                for i in range(size):
                    elements[i * mapped + r] = _dot(row, keys[i * step : i * step + dim])
            keys, step = elements, mapped
        for h in range(heads):
            for k in range(slots):
                query = queries[(h * slots + k) * steps[2] : (h * slots + k) * steps[2] + width]
                top = old_peak[cell]
                for i in range(size):
                    key = i * step + h * head_step
                    logit = scale * _dot(query, keys[key : key + width])
                    finite &= abs(logit) < np.inf
                    if given[3] != 0:
                        logit += offsets[b * size + i]
                    logits[i] = logit
                    top = logit if logit > top else top
                peak[cell] = top
                # Of sets without elements so far it is -inf, and nothing is subtracted from itself at infinity.
                top = top if top > lowest else lowest
                rate = math.exp(old_peak[cell] - top)
                new, old = total[cell * width : (cell + 1) * width], old_total[cell * width : (cell + 1) * width]
                for d in range(width):
                    new[d] = rate * old[d]
                weights = rate * old_mass[cell]
                for i in range(size):
                    share = math.exp(logits[i] - top)
                    weights += share
                    value = i * step + h * head_step + value_at
                    _add(new, share, keys[value : value + width])
                mass[cell] = weights
                cell += 1
    return finite
