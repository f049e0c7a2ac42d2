"""Exact optimal transport: linear assignment for uniform weights, network simplex for all others.

``min <C, P>`` over ``P >= 0`` with row sums ``a`` and column sums ``b``. Every plan is certified: dual variables give
a lower bound on the optimum, and the relative gap is in ``Plan.error``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mbot import checks
from mbot.plan import Plan
from mbot.problem import Live, Problems, Solution
from mbot.solvers.matching import match
from mbot.solvers.simplex import simplex
from mbot.transport.base import Transport, flat_weights


@dataclass(frozen=True)
class ExactOT(Transport):
    """Exact (unregularised) optimal transport of a batch of problems, always optimal.

    Args:
        solver: ``"assignment"`` (uniform weights, n = m, after dropping points of weight zero; a permutation),
            ``"network_simplex"`` (any weights; POT's where ours takes too many pivots), or ``"auto"``: the assignment
            wherever it applies. There is no crossover to pick by: in every cell measured (n = 256 … 4096, d = 2 and
            3072, Gaussian and clustered clouds) its kernel was faster than the best of scipy, POT's network simplex
            and lapx; the table is ``benchmarks/results/mbot_one_problem.md``.

    Uniform square problems on a CUDA device are solved there where Triton is installed (it comes with torch's CUDA
    builds) and n is at most 16,384; a call then waits for the device three times, to check its input and its result.
    All other problems on a device are solved on the CPU, and the plan is copied back.

    >>> x = torch.tensor([[0.0], [1.0], [2.0]])
    >>> ExactOT()(x, x.flip(0) + 0.5)
    tensor(0.2500)
    """

    solver: str = "auto"

    def __post_init__(self) -> None:
        checks.choice(self.solver, "solver", ("auto", "assignment", "network_simplex"))

    def matched_pairs(self, n: int, m: int) -> float | None:
        """See `Transport`."""
        return n if n == m and self.solver != "network_simplex" else None

    def _solve(self, cost: Tensor, a: Tensor | None, b: Tensor | None) -> Plan:
        n, m = cost.shape[-2:]
        flat = cost.reshape(-1, n, m)
        if a is None and b is None and self.matched_pairs(n, m):
            return match(Problems.dense(flat)).plan("ExactOT", cost, 1 / n)
        a, b = flat_weights(cost, a, b)
        b = checks.equal_totals(a, b)
        return _weighted(flat.cpu(), a.cpu(), b.cpu(), self.solver).plan("ExactOT", cost)


def _weighted(cost: Tensor, a: Tensor, b: Tensor, solver: str) -> Solution:
    """Problems ``(B, n, m)`` with weights of equal totals, each by the solver that fits it."""
    live = Live.of(a, b)
    square = live.square
    if solver == "assignment" and not square.all():
        p = int(square.argmin())
        raise ValueError(
            f"solver='assignment' needs uniform weights and equally many points of positive weight; problem {p} has "
            f"{live.rows[p]} and {live.cols[p]}, {'uniform' if live.even[p] else 'non-uniform'}. Use solver='auto'"
        )
    if solver == "network_simplex":
        square[:] = False
    return live.solve(cost, {match: np.flatnonzero(square), simplex: np.flatnonzero(~square)})
