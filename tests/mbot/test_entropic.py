"""Entropic and unbalanced transport: peers' plans, our own objectives, hard problems, per-problem stopping."""

import numpy as np
import ot
import pytest
import torch

import mbot
from mbot import EntropicOT, ExactOT, UnbalancedOT, pairwise_cost


def problem(*batch, n=12, m=12, d=2, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, n, d, generator=g, dtype=dtype)
    return x, torch.randn(*batch, m, d, generator=g, dtype=dtype) + 0.5


def random_weights(n, m):
    a, b = torch.rand(n, dtype=torch.float64) + 0.1, torch.rand(m, dtype=torch.float64) + 0.1
    return a / a.sum(), b / b.sum()


@pytest.mark.parametrize(("n", "m"), [(12, 12), (7, 15)])
@pytest.mark.parametrize("reg", [5.0, 0.5, 0.2])
def test_plan_and_transport_cost_agree_with_pot(n, m, reg):
    x, y = problem(3, n=n, m=m)
    a, b = random_weights(n, m)
    cost = pairwise_cost(x, y)
    plan = EntropicOT(reg, tol=1e-12).plan(cost, a, b)
    for p in range(3):
        expected = ot.sinkhorn(
            a.numpy(), b.numpy(), cost[p].numpy(), reg, method="sinkhorn_log", numItermax=20_000, stopThr=1e-13
        )
        torch.testing.assert_close(plan.to_dense()[p], torch.from_numpy(expected), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(plan.row_mass(), a.expand(3, n), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(plan.col_mass(), b.expand(3, m), rtol=1e-10, atol=1e-12)


def test_the_value_is_the_objective_and_the_potentials_give_the_plan():
    x, y = problem()
    a, b = random_weights(12, 12)
    cost = pairwise_cost(x, y)
    plan = EntropicOT(0.3, tol=1e-12).plan(cost, a, b)
    dense, outer = plan.to_dense(), a[:, None] * b
    objective = (dense * cost).sum() + 0.3 * (dense * (dense / outer).log() - dense + outer).sum()
    assert float(EntropicOT(0.3, tol=1e-12)(x, y, a, b)) == pytest.approx(float(objective), rel=1e-12)
    f, g = plan.potentials
    torch.testing.assert_close(outer * ((f[:, None] + g - cost) / 0.3).exp(), dense, rtol=1e-9, atol=1e-15)
    assert float(plan.cost(cost) + plan.penalty) == pytest.approx(float(objective), rel=1e-12)


def test_limits_in_reg():
    x, y = problem(2)
    cost = pairwise_cost(x, y)
    independent = EntropicOT(1e4).plan(cost)
    torch.testing.assert_close(
        independent.to_dense(), torch.full((2, 12, 12), 1 / 144, dtype=torch.float64), rtol=1e-2, atol=0
    )
    sharp = EntropicOT(1e-3).plan(cost).cost(cost)
    exact = ExactOT().plan(cost).cost(cost)
    torch.testing.assert_close(sharp, exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [16, 64])
@pytest.mark.parametrize("share", [0.2, 0.02, 0.005])
def test_small_regularisations_converge(dtype, n, share):
    """Plain Sinkhorn needs tens of thousands of iterations here; plans fall apart into nearly separate blocks."""
    x, y = problem(16, n=n, m=n, dtype=dtype, seed=1)
    cost = pairwise_cost(x, y)
    plan = EntropicOT(share * float(cost.mean()), tol=1e-5).plan(cost)
    assert bool(plan.converged.all())
    assert int(plan.iterations.max()) < 1500
    assert float((plan.row_mass() - 1 / n).abs().sum(-1).max()) < 2e-5
    assert float((plan.col_mass() - 1 / n).abs().sum(-1).max()) < 2e-5


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_units_do_not_matter(scale):
    x, y = problem(2, dtype=torch.float32)
    plan = EntropicOT(0.1).plan(pairwise_cost(x, y)).to_dense()
    scaled = EntropicOT(0.1 * scale).plan(scale * pairwise_cost(x, y)).to_dense()
    torch.testing.assert_close(plan, scaled, rtol=1e-3, atol=1e-5)


def test_each_problem_stops_by_itself():
    x, y = problem(4)
    cost = pairwise_cost(x, y) * torch.tensor([0.01, 0.1, 1.0, 10.0], dtype=torch.float64)[:, None, None]
    together = EntropicOT(0.2).plan(cost)
    assert len(together.iterations.unique()) > 1
    for p in range(4):
        alone = EntropicOT(0.2).plan(cost[p])
        torch.testing.assert_close(together.to_dense()[p], alone.to_dense(), rtol=1e-3, atol=1e-6)
    assert bool((together.error <= 1e-6).all())


def test_running_out_of_iterations_warns_with_count_error_and_knob():
    x, y = problem(5)
    with pytest.warns(
        mbot.ConvergenceWarning, match=r"EntropicOT: \d of 5 problems did not converge .* Raise max_iter"
    ):
        plan = EntropicOT(0.02, max_iter=3).plan(pairwise_cost(x, y))
    assert not bool(plan.converged.all())
    assert bool(torch.isfinite(plan.to_dense()).all())


def test_one_hard_problem_does_not_spoil_the_others():
    x, y = problem(3)
    cost = pairwise_cost(x, y) * torch.tensor([0.1, 20.0, 0.1], dtype=torch.float64)[:, None, None]
    with pytest.warns(mbot.ConvergenceWarning, match="1 of 3"):
        plan = EntropicOT(0.5, max_iter=10).plan(cost)
    assert plan.converged.tolist() == [True, False, True]


def test_forbidden_pairs_get_nothing():
    cost = torch.rand(2, 5, 5, dtype=torch.float64)
    cost[:, torch.arange(5), torch.arange(5)] = torch.inf
    for transport in (EntropicOT(0.1), UnbalancedOT(0.1, 1.0), mbot.PartialOT(0.7, reg=0.1)):
        plan = transport.plan(cost)
        assert float(plan.to_dense().diagonal(dim1=-2, dim2=-1).sum()) == 0
        assert bool(torch.isfinite(transport.value(cost)).all())
    cost[0, 0] = torch.inf
    with pytest.raises(ValueError, match="only forbidden pairs"):
        EntropicOT(0.1).plan(cost)
    assert float(UnbalancedOT(0.1, 1.0).plan(cost).row_mass()[0, 0]) == 0


# --- unbalanced ----------------------------------------------------------------------------------------------------


def unbalanced_objective(plan, cost, a, b, reg, tau):
    def kl(p, q):
        return (p.xlogy(p) - p.xlogy(q) - p + q).sum()

    return (plan * cost).sum() + reg * kl(plan, a[:, None] * b) + tau * (kl(plan.sum(1), a) + kl(plan.sum(0), b))


@pytest.mark.parametrize("tau", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("reg", [1.0, 0.1])
def test_unbalanced_plans_agree_with_pot(tau, reg):
    x, y = problem(2, n=9, m=11)
    a, b = random_weights(9, 11)
    b = 1.3 * b
    cost = pairwise_cost(x, y)
    plan = UnbalancedOT(reg, tau, tol=1e-12).plan(cost, a, b)
    for p in range(2):
        expected = ot.unbalanced.sinkhorn_unbalanced(
            a.numpy(), b.numpy(), cost[p].numpy(), reg, tau,
            method="sinkhorn", reg_type="kl", numItermax=200_000, stopThr=1e-14,
        )  # fmt: skip
        torch.testing.assert_close(plan.to_dense()[p], torch.from_numpy(expected), rtol=1e-5, atol=1e-9)


def test_unbalanced_entropy_relative_to_one_is_a_change_of_the_costs():
    """POT 0.8.2, which the m-UOT papers used, and POT's ``reg_type="entropy"`` now: reg Σ P log P - P."""
    n, m, reg, tau = 5, 7, 0.3, 1.5
    cost = torch.rand(n, m, dtype=torch.float64)
    a, b = torch.rand(n, dtype=torch.float64) + 0.5, torch.rand(m, dtype=torch.float64) + 0.2
    expected = torch.from_numpy(
        ot.unbalanced.sinkhorn_unbalanced(
            a.numpy(), b.numpy(), cost.numpy(), reg, tau, reg_type="entropy", numItermax=100_000, stopThr=1e-14
        )
    )
    transport = UnbalancedOT(reg, tau, tol=1e-12)
    shifted = cost + reg * (a[:, None] * b).log()
    torch.testing.assert_close(transport.plan(shifted, a, b).to_dense(), expected, rtol=1e-7, atol=1e-10)

    def kl(p, q):
        return float((p * (p / q).log() - p + q).sum())

    value = float((cost * expected).sum()) + reg * kl(expected, torch.ones_like(expected))
    value += tau * (kl(expected.sum(1), a) + kl(expected.sum(0), b))
    constant = reg * (n * m - float(a.sum() * b.sum()))
    assert float(transport.value(shifted, a, b)) + constant == pytest.approx(value, rel=1e-9)
    assert (transport.plan(cost, a, b).to_dense() - expected).abs().max() > 1e-2


@pytest.mark.parametrize("tau", [0.05, 1.0, 20.0])
def test_the_unbalanced_value_is_the_minimum_of_its_objective(tau):
    """POT's reported value leaves out mass terms; here the objective is evaluated directly."""
    x, y = problem(n=6, m=5)
    a, b = random_weights(6, 5)
    cost = pairwise_cost(x, y)
    transport = UnbalancedOT(0.2, tau, tol=1e-13)
    plan = transport.plan(cost, a, b).to_dense()
    value = float(transport(x, y, a, b))
    assert value == pytest.approx(float(unbalanced_objective(plan, cost, a, b, 0.2, tau)), rel=1e-9)
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = plan * (1 + 0.02 * torch.randn(plan.shape, generator=g, dtype=torch.float64))
        assert float(unbalanced_objective(other, cost, a, b, 0.2, tau)) >= value


def test_unbalanced_limits_and_outliers():
    x, y = problem(2)
    cost = pairwise_cost(x, y)
    stiff = UnbalancedOT(0.2, 1e6, tol=1e-9).plan(cost).to_dense()
    torch.testing.assert_close(stiff, EntropicOT(0.2, tol=1e-9).plan(cost).to_dense(), rtol=1e-3, atol=1e-6)
    far = y.clone()
    far[:, 0] += 1000.0
    lost = UnbalancedOT(0.2, 1.0).plan(pairwise_cost(x, far))
    assert float(lost.col_mass()[:, 0].max()) < 1e-12
    values = [float(UnbalancedOT(0.2, 1.0)(x[0], y[0] + s)) for s in (0, 30, 3000)]
    assert values[0] < values[1] <= values[2] + 1e-6 <= 2.5  # saturates where OT grows without bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unbalanced_converges_for_stiff_marginals_and_small_reg(dtype):
    x, y = problem(8, n=32, m=32, dtype=dtype)
    cost = pairwise_cost(x, y)
    for tau in (0.1, 10.0, 1000.0):
        plan = UnbalancedOT(0.01 * float(cost.mean()), tau, tol=1e-5).plan(cost)
        assert bool(plan.converged.all())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: EntropicOT(0), "reg must be a finite number > 0"),
        (lambda: EntropicOT(-1.0), "reg must be"),
        (lambda: EntropicOT(1.0, tol=0), "tol must be"),
        (lambda: EntropicOT(1.0, max_iter=0), "max_iter must be at least 1"),
        (lambda: UnbalancedOT(1.0, 0.0), "reg_marginal must be"),
        (lambda: EntropicOT(1.0).plan(torch.rand(2, 2), torch.tensor([0.9, 0.9])), "equal totals"),
    ],
)
def test_bad_settings(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_large_problem_in_float32_keeps_its_marginals():
    x, y = problem(1, n=600, m=500, d=64, dtype=torch.float32)
    plan = EntropicOT(5.0).plan(pairwise_cost(x, y))
    # the documented stopping rule: L1 error of the marginals, 1e-6 by default
    assert float((plan.row_mass().double() - 1 / 600).abs().sum()) < 2e-6
    np.testing.assert_allclose(plan.col_mass()[0].numpy(), 1 / 500, rtol=1e-4)


def test_one_problem_is_solved_by_the_kernel_whatever_the_threads(monkeypatch):
    """The driver would be several times slower there, and only where torch has more than one thread."""
    from mbot.solvers import entropic

    sizes, kernel = [], entropic._compiled
    monkeypatch.setattr(entropic, "_compiled", lambda cost, *rest: (sizes.append(cost.shape), kernel(cost, *rest))[1])
    x = torch.randn(2, 700, 3, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert bool(EntropicOT(5.0).plan(mbot.pairwise_cost(x[0], x[1])).converged)
    finally:
        torch.set_num_threads(threads)
    assert sizes == [(1, 700, 700)]
