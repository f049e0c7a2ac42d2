"""Exponentials, logarithms and extents of arrays in place of numpy's, as loops that vectorise; compiled with numba.

Sums are in the order that is written: digits of ``log 2`` in two parts would not survive another one.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minibatch_transport import compiled

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"nsz", "contract"}}
_EXP = tuple(1 / math.factorial(k) for k in range(12, -1, -1))
_LOG = tuple(1 / k for k in range(21, 2, -2))
_LANES = 32  # running extremes: numba leaves those of one number scalar


@compiled(nogil=True, error_model="numpy", fastmath={"nnan", "nsz"})
def extent(numbers):  # type: ignore[no-untyped-def]
    """The least and the largest finite one of some numbers, in their dtype; infinities of the other sign if none is."""
    infinity = numbers.dtype.type(np.inf)
    low, high = np.full(_LANES, infinity), np.full(_LANES, -infinity)
    whole = len(numbers) - len(numbers) % _LANES
    for start in range(0, whole, _LANES):
        part = numbers[start : start + _LANES]
        for k in range(_LANES):
            c = part[k]
            finite = c if c < infinity else -infinity
            low[k] = c if c < low[k] else low[k]
            high[k] = finite if finite > high[k] else high[k]
    least, most = infinity, -infinity
    for k in range(_LANES):
        least, most = min(least, low[k]), max(most, high[k])
    for c in numbers[whole:]:
        finite = c if c < infinity else -infinity
        least, most = min(least, c), max(most, finite)
    return least, most


@compiled(**_OPTIONS)
def _series(x, coefficients):  # type: ignore[no-untyped-def]
    """A polynomial from its coefficients, the highest first."""
    value = 0.0
    for c in coefficients:
        value = value * x + c
    return value


@compiled(**_OPTIONS)
def exp(x, bits):  # type: ignore[no-untyped-def]
    """``exp(x)`` in place, to rounding and 0 below -690: a series around multiples of log 2, which vectorises."""
    powers = bits.view(np.float64)
    for t in range(len(x)):
        y = x[t] if x[t] > -700.0 else -700.0
        y = y if y < 700.0 else 700.0
        k = np.rint(y * 1.4426950408889634)
        r = y - k * 0.6931471803691238  # log 2 in two parts, of which the first has few digits
        r = r - k * 1.9082149292705877e-10
        x[t] = _series(r, _EXP) if y > -690.0 else 0.0
        bits[t] = (np.int64(np.int32(k)) + 1023) << 52
    for t in range(len(x)):
        x[t] *= powers[t]


@compiled(**_OPTIONS)
def log(x, out, bits):  # type: ignore[no-untyped-def]
    """``log(x)`` of normal positive numbers, to rounding: exponents, and ``2 artanh`` of what is left."""
    given, rest = x.view(np.int64), bits.view(np.float64)
    for t in range(len(x)):
        exponent = (given[t] - 4604544271217802240) >> 52  # of x in units of sqrt(1/2)
        bits[t] = given[t] - (exponent << 52)
        out[t] = np.float64(np.int32(exponent))
    for t in range(len(x)):
        s = (rest[t] - 1.0) / (rest[t] + 1.0)
        q = s * s
        out[t] = out[t] * 0.6931471805599453 + 2.0 * (s + s * q * _series(q, _LOG))
