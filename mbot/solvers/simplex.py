"""The network simplex, for problems of any weights."""

from __future__ import annotations

import numpy as np
import torch

from mbot.certify import certified
from mbot.kernels.threads import run_slices
from mbot.problem import Problems, Solution


def simplex(problems: Problems) -> Solution:
    """The cheapest plan of each problem. Points have positive weights.

    Returns:
        Certified solutions with potentials; see `mbot.certify.certified`.
    """
    return certified(problems, _simplex)


def _simplex(problems: Problems) -> Solution:
    from mbot.kernels.assignment import unusual
    from mbot.kernels.network import network

    count, (n, m) = problems.count, problems.size
    assert problems.a is not None
    assert problems.b is not None
    a, b = problems.a.numpy(), problems.b.numpy()
    row, col = np.zeros((2, count, n + m - 1), np.int64)
    mass, f, g = np.zeros((count, n + m - 1)), np.zeros((count, n)), np.zeros((count, m))

    def solve(begin: int, stop: int) -> None:
        for p in range(begin, stop):
            c = np.ascontiguousarray(problems.matrix(p).numpy(), np.float64)
            rows, cols = c.shape
            with np.errstate(over="ignore"):
                total = c.sum()
            if not problems.capped and unusual(c.ravel(), c.min(), total):
                f[p], g[p] = np.nan, np.nan
                continue
            # Tolerances of both solvers are absolute: costs in [0, 1] and a total mass of 1.
            low, span, total = c.min(), np.ptp(c) or 1.0, a[p].sum()
            scaled, left, right = (c - low) / span, a[p, :rows] / total, b[p, :cols] / total
            i, j, moved, price, optimal = network(scaled, left, right)
            if not optimal:
                import ot

                # The iteration limit is far above what it needs; the default of 1e5 stops early at n >= 2048.
                plan, log = ot.lp.emd(left, right, scaled, numItermax=1_000_000_000, log=True)
                (i, j), price = np.nonzero(plan), log["v"]
                moved = plan[i, j]
            used = moved > 0
            entries = np.count_nonzero(used)
            row[p, :entries], col[p, :entries], mass[p, :entries] = i[used], j[used], total * moved[used]
            g[p, :cols] = span * price
            f[p, :rows] = (c - g[p, :cols]).min(1)

    run_slices(solve, (problems.rows * problems.cols).astype(float))
    tensor = torch.from_numpy
    return Solution(tensor(row), tensor(col), tensor(mass), tensor(f), tensor(g))
