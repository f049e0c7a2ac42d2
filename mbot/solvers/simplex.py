"""The network simplex, for problems of any weights: POT's solver, run to optimality."""

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
    import ot

    from mbot.kernels.assignment import unusual

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
            # POT's tolerances are absolute: give it costs in [0, 1] and a total mass of 1. The iteration limit is far
            # above what the simplex needs; POT's default of 1e5 stops early at n >= 2048.
            low, span, total = c.min(), np.ptp(c) or 1.0, a[p].sum()
            plan, log = ot.lp.emd(
                a[p, :rows] / total, b[p, :cols] / total, (c - low) / span, numItermax=1_000_000_000, log=True
            )
            at = np.nonzero(plan)
            entries = len(at[0])
            row[p, :entries], col[p, :entries] = at
            mass[p, :entries] = total * plan[at]
            g[p, :cols] = span * log["v"]
            f[p, :rows] = (c - g[p, :cols]).min(1)

    run_slices(solve, (problems.rows * problems.cols).astype(float))
    tensor = torch.from_numpy
    return Solution(tensor(row), tensor(col), tensor(mass), tensor(f), tensor(g))
