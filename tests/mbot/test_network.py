"""The network simplex against POT's, on what is hard for it: ties, equal weights, thin problems, a coarse start."""

import numpy as np
import ot
import pytest
import torch

from mbot import ExactOT, pairwise_cost
from mbot.kernels import network as kernel


def problem(kind, n, m):
    g = torch.Generator().manual_seed(n + m)
    x, y = (torch.randn(size, 2, generator=g, dtype=torch.float64) for size in (n, m))
    cost = pairwise_cost(x, y) if kind != "ties" else torch.randint(0, 4, (n, m), generator=g).double()
    a, b = ((torch.rand(size, generator=g, dtype=torch.float64) + 1e-3) for size in (n, m))
    if kind == "even":
        a, b = torch.ones_like(a), torch.ones_like(b)
    if kind == "uneven":
        a, b = a**8, b**8
    return cost, a / a.sum(), b / b.sum()


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 7), (7, 1), (2, 3), (40, 40), (90, 60), (100, 101), (130, 320), (350, 350)]
)
@pytest.mark.parametrize("kind", ["cloud", "ties", "even", "uneven"])
def test_plans_are_optimal(kind, size):
    cost, a, b = (tensor.numpy() for tensor in problem(kind, *size))
    cost = (cost - cost.min()) / (np.ptp(cost) or 1)
    rows, cols, mass, price, optimal = kernel.network(cost, a, b)
    plan = np.zeros(size)
    np.add.at(plan, (rows, cols), mass)
    assert optimal
    assert mass.min() >= 0
    np.testing.assert_allclose(plan.sum(1), a, atol=1e-14)
    np.testing.assert_allclose(plan.sum(0), b, atol=1e-14)
    value = (plan * cost).sum()
    assert value == pytest.approx(ot.emd2(a, b, cost, numItermax=10**9), rel=1e-9, abs=1e-14)
    assert (cost - price).min(1) @ a + price @ b == pytest.approx(value, rel=1e-10, abs=1e-14)


def test_pots_solver_takes_over_after_too_many_pivots(monkeypatch):
    cost, a, b = problem("cloud", 30, 40)
    expected = ExactOT().plan(cost, a, b)
    solve = kernel.network
    monkeypatch.setattr(kernel, "network", lambda *given: (*solve(*given)[:2], None, None, False))
    plan = ExactOT().plan(cost, a, b)
    assert bool(plan.converged)
    torch.testing.assert_close(plan.to_dense(), expected.to_dense(), rtol=0, atol=1e-12)


def test_reduced_costs_as_large_as_their_tolerance():
    """Computed in another order they are on its other side: a scan finds a pair that no pivot wants. It must end."""
    g = torch.Generator().manual_seed(17)
    f, h = (torch.rand(size, generator=g, dtype=torch.float64) for size in (12, 9))
    f[0] = h[0] = 0
    cost = f[:, None] + h + 1e-15 * torch.randint(0, 4, (12, 9), generator=g)
    a, b = (1e-7 * torch.rand(size, generator=g, dtype=torch.float64) for size in (12, 9))
    a[0], b[0] = 1 - a[1:].sum(), 1 - b[1:].sum()
    assert bool(ExactOT().plan(cost, a, b).converged)
