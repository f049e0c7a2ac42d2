"""Newton steps of small balanced problems between Sinkhorn rounds, compiled with numba; see `mbot.kernels.scaling`."""

from __future__ import annotations

from typing import Any

import numpy as np

from minibatch_transport import compiled

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "nsz", "contract"}}
_REACH = 12.0  # largest change of a potential in a Newton step


@compiled(**_OPTIONS)
def factorise(kernel, a, b, sums, u, v, system):  # type: ignore[no-untyped-def]
    """The Newton system of a balanced problem with exact columns, as Cholesky's upper factor; returns success.

    With ``P = u P0 v`` a step solves ``(diag(P 1) - P diag(1 / b) P^T) d log u = a - P 1``; a constant added to the
    matrix chooses among potentials, which are free up to one.
    """
    n, m = kernel.shape
    total = 0.0
    for weight in a:
        total += weight
    parts = np.zeros((4, n))  # four columns of the plan
    system[:] = total / (n * n)
    for first in range(0, m, 4):
        for j in range(first, first + 4):
            scale = v[j] / np.sqrt(b[j]) if j < m and b[j] > 0.0 else 0.0
            for i in range(n):
                parts[j - first, i] = kernel[i, j] * u[i] * scale if scale > 0.0 else 0.0
        for i in range(n):
            p, q, r, s = parts[0, i], parts[1, i], parts[2, i], parts[3, i]
            for k in range(i, n):
                system[i, k] -= (p * parts[0, k] + q * parts[1, k]) + (r * parts[2, k] + s * parts[3, k])
    for i in range(n):
        mass = sums[i] * u[i]
        system[i, i] += mass * (1.0 + 1e-10) if mass > 0.0 else total
    for k in range(n):
        if not system[k, k] > 0.0:
            return False
        scale = 1.0 / np.sqrt(system[k, k])
        for i in range(k, n):
            system[k, i] *= scale
        for i in range(k + 1, n):
            factor = system[k, i]
            for j in range(i, n):
                system[i, j] -= factor * system[k, j]
    return True


@compiled(**_OPTIONS)
def newton_step(system, a, sums, u, new):  # type: ignore[no-untyped-def]
    """Row scalings after a step with a factorised system."""
    n, most = len(a), 0.0
    for i in range(n):
        new[i] = a[i] - sums[i] * u[i]
    for k in range(n):
        new[k] /= system[k, k]
        for i in range(k + 1, n):
            new[i] -= system[k, i] * new[k]
    for i in range(n - 1, -1, -1):
        entry = new[i]
        for k in range(i + 1, n):
            entry -= system[i, k] * new[k]
        new[i] = entry / system[i, i]
        most = max(most, abs(new[i]))
    length = min(1.0, _REACH / most)
    for i in range(n):
        new[i] = u[i] * np.exp(length * new[i])
