"""The state with a few elements more in one call, compiled with numba: with few, the time is that of the calls."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, config, types
from numba.extending import intrinsic
from torch import Tensor
from torch.autograd import forward_ad

from minibatch_transport import compiled

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "nsz", "contract"}}
_INLINE: dict[str, Any] = {**_OPTIONS, "inline": "always"}
_SCALARS: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float64: np.float64}
_TYPES = (Tensor, torch.nn.Parameter)
_SERIES = tuple(1 / math.factorial(k) for k in range(13, -1, -1))
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
    if config.DISABLE_JIT:  # type: ignore[attr-defined]  # addresses are of use to compiled code alone
        return None
    if forward_ad._current_level >= 0:  # forward-mode derivatives are kept without grad mode too
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


@intrinsic
def _power_of_two(typing: Any, exponent: Any) -> Any:
    """``2^k`` of a whole number given as a float, where it is a normal number."""
    bits, digits = (32, 23) if exponent == types.float32 else (64, 52)

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        whole = builder.fptosi(values[0], ir.IntType(bits))
        biased = builder.add(whole, ir.Constant(whole.type, 2 ** (bits - digits - 2) - 1))
        return builder.bitcast(builder.shl(biased, ir.Constant(whole.type, digits)), values[0].type)

    return exponent(exponent), code


@compiled(**{**_OPTIONS, "fastmath": {"nsz", "contract"}})
def _exp(x, lowest):  # type: ignore[no-untyped-def]
    """``exp(x)`` of numbers <= 0 in place, 0 below ``lowest``: a series around multiples of log 2, which vectorises."""
    real = x.dtype.type
    for t in range(len(x)):
        y = x[t] if x[t] > lowest else lowest
        k = np.rint(y * real(1.4426950408889634))
        rest = y - k * real(0.693145751953125)  # log 2 in two parts, of which the first has few digits
        rest = rest - k * real(1.4286068203094172e-06)
        value = real(0)
        for c in _SERIES:
            value = value * rest + real(c)
        x[t] = value * _power_of_two(k) if x[t] >= lowest else real(0)


@compiled(**_INLINE)
def _products(x, elements, step, out, to):  # type: ignore[no-untyped-def]
    """``out[i to] = <x, elements[i step :]>``, four elements at a time."""
    width, size = len(x), -(-len(out) // to)
    zero = x.dtype.type(0)
    done = size - size % 4
    for i in range(0, done, 4):
        a, b, c, d = zero, zero, zero, zero
        y = elements[i * step : i * step + width]
        z = elements[(i + 1) * step : (i + 1) * step + width]
        u = elements[(i + 2) * step : (i + 2) * step + width]
        v = elements[(i + 3) * step : (i + 3) * step + width]
        for t in range(width):
            a += x[t] * y[t]
            b += x[t] * z[t]
            c += x[t] * u[t]
            d += x[t] * v[t]
        out[i * to], out[(i + 1) * to], out[(i + 2) * to], out[(i + 3) * to] = a, b, c, d
    for i in range(done, size):
        a = zero
        y = elements[i * step : i * step + width]
        for t in range(width):
            a += x[t] * y[t]
        out[i * to] = a


@compiled(**_INLINE)
def _mix(shares, elements, step, out):  # type: ignore[no-untyped-def]
    """Add ``sum_i shares[i] elements[i step :]``, four elements at a time, and return the sum of the shares."""
    width, size, total = len(out), len(shares), out.dtype.type(0)
    done = size - size % 4
    for i in range(0, done, 4):
        y = elements[i * step : i * step + width]
        z = elements[(i + 1) * step : (i + 1) * step + width]
        u = elements[(i + 2) * step : (i + 2) * step + width]
        v = elements[(i + 3) * step : (i + 3) * step + width]
        a, b, c, d = shares[i], shares[i + 1], shares[i + 2], shares[i + 3]
        for t in range(width):
            out[t] += (a * y[t] + b * z[t]) + (c * u[t] + d * v[t])
        total += (a + b) + (c + d)
    for i in range(done, size):
        y = elements[i * step : i * step + width]
        for t in range(width):
            out[t] += shares[i] * y[t]
        total += shares[i]
    return total


@compiled(**_OPTIONS)
def _absorb(scale, sizes, steps, given, after):  # type: ignore[no-untyped-def]
    """`absorb` by addresses, 0 for None: features, weight, queries, offsets, total, mass, peak, and the new three."""
    sets, heads, slots, width, size, dim = sizes
    features, weight, queries = _at(given[0], scale), _at(given[1], scale), _at(given[2], scale)
    offsets = _at(given[3], scale)
    old_total, old_mass, old_peak = _at(given[4], scale), _at(given[5], scale), _at(given[6], scale)
    total, mass, peak = _at(after[0], scale), _at(after[1], scale), _at(after[2], scale)
    # Of each slot the state's share and those of the elements, first as logits.
    shares = np.empty((slots, 1 + size), old_total.dtype)
    lowest, tiny = np.finfo(shares.dtype).min, np.log(np.finfo(shares.dtype).tiny)
    # Numbers of an element after the map, of a head among them, and from a key to its value.
    mapped, head_step, value_at = (2 * heads * width, width, heads * width) if given[1] != 0 else (0, 0, 0)
    elements = np.empty(size * mapped, shares.dtype)
    finite = True
    for b in range(sets):
        keys, step = features[b * steps[0] : _END], steps[1]
        if mapped:
            for r in range(mapped):
                _products(weight[r * dim : (r + 1) * dim], keys, step, elements[r:], mapped)
            keys, step = elements, mapped
        for h in range(heads):
            first = (b * heads + h) * slots
            for k in range(slots):
                logits = shares[k, 1:]
                at = (h * slots + k) * steps[2]
                _products(queries[at : at + width], keys[h * head_step :], step, logits, 1)
                old = top = old_peak[first + k]
                for i in range(size):
                    logit = scale * logits[i]
                    finite &= abs(logit) < np.inf
                    if given[3] != 0:
                        logit += offsets[b * size + i]
                    logits[i] = logit
                    top = logit if logit > top else top
                peak[first + k] = top
                # Of sets without elements so far it is -inf, and nothing is subtracted from itself at infinity.
                top = top if top > lowest else lowest
                for i in range(size):
                    logits[i] -= top
                shares[k, 0] = old - top
            _exp(shares.reshape(-1), tiny)
            for k in range(slots):
                at = (first + k) * width
                new, old = total[at : at + width], old_total[at : at + width]
                for d in range(width):
                    new[d] = shares[k, 0] * old[d]
                seen = _mix(shares[k, 1:], keys[h * head_step + value_at :], step, new)
                mass[first + k] = shares[k, 0] * old_mass[first + k] + seen
    return finite
