"""What solved entropic problems report beside their plans, from vectors: potentials in units of the cost, penalties."""

from __future__ import annotations

import numpy as np

from mbot.kernels.scaling import BALANCED, KL_RELAXED, UPPER_BOUNDED
from minibatch_transport import compiled


@compiled(nogil=True, error_model="numpy")
def _product(x, y):  # type: ignore[no-untyped-def]
    """Their inner product, and the sums of both."""
    product, left, right = 0.0, 0.0, 0.0
    for i in range(len(x)):
        product += x[i] * y[i]
        left += x[i]
        right += y[i]
    return product, left, right


@compiled(nogil=True, error_model="numpy")
def _relative(potential, weight, mass, marginal):  # type: ignore[no-untyped-def]
    """Potentials less the logarithms of the weights, in place; their product with the masses, and the divergence."""
    product, divergence, last, log = 0.0, 0.0, 0.0, 0.0
    for i in range(len(weight)):
        if weight[i] != last:  # often all are equal
            last = weight[i]
            log = np.log(last)
        potential[i] = potential[i] - log if last > 0.0 else 0.0
        product += potential[i] * mass[i]
        divergence += last - marginal[i]
        if marginal[i] > 0.0:
            divergence += marginal[i] * (np.log(marginal[i]) - log)
    return product, divergence


@compiled(nogil=True, error_model="numpy")
def report(plan, phi, psi, a, b, rows, cols, transport, kind, parameter, reg):  # type: ignore[no-untyped-def]
    """Potentials and penalties in the dtype of the plans; see `mbot.solvers.entropic.Plans.report`."""
    dtype = plan.dtype
    f, g, penalty = np.empty(phi.shape, dtype), np.empty(psi.shape, dtype), np.empty(len(phi), dtype)
    of_rows, of_cols = np.empty(phi.shape[1]), np.empty(psi.shape[1])
    for p in range(len(phi)):
        for i in range(len(of_rows)):
            of_rows[i] = phi[p, i]
        for j in range(len(of_cols)):
            of_cols[j] = psi[p, j]
        if kind == UPPER_BOUNDED:
            value = _product(of_rows, rows[p])[0] + _product(of_cols, cols[p])[0]
        else:
            x, y = (a[p], b[p]) if kind == BALANCED else (rows[p], cols[p])
            left, apart = _relative(of_rows, a[p], x, rows[p])
            right, more = _relative(of_cols, b[p], y, cols[p])
            _, mass, all_rows = _product(rows[p], a[p])
            value = left + right - mass + all_rows * _product(cols[p], b[p])[2]
            if kind == KL_RELAXED:
                value += parameter * (apart + more)
        penalty[p] = reg * value - transport[p]
        for i in range(len(of_rows)):
            f[p, i] = reg * of_rows[i]
        for j in range(len(of_cols)):
            g[p, j] = reg * of_cols[j]
    return f, g, penalty
