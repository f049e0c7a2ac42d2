"""The compiled Sinkhorn iterations against the log-domain loop, which is their reference."""

import pytest
import torch

from mbot import EntropicOT, PartialOT, UnbalancedOT, pairwise_cost
from mbot.solvers import entropic

TRANSPORTS = [
    EntropicOT(0.3, tol=1e-10),
    UnbalancedOT(0.3, 0.7, tol=1e-10),
    PartialOT(0.6, reg=0.3, tol=1e-10),
]


def costs(problems=5, n=9, m=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(n + m)
    x = torch.randn(problems, n, 2, generator=generator, dtype=dtype)
    return pairwise_cost(x, torch.randn(problems, m, 2, generator=generator, dtype=dtype) + 1)


@pytest.fixture
def by_loop(monkeypatch):
    """The plan without the kernel."""

    def solve(transport, *args):
        with monkeypatch.context() as patch:
            patch.setattr(entropic, "_CACHED", 0)
            return transport.plan(*args)

    return solve


@pytest.mark.parametrize("transport", TRANSPORTS, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("weights", ["uniform", "drawn", "some zero"])
def test_kernel_and_loop_give_one_plan(transport, weights, by_loop):
    cost = costs()
    cost[0, 0, 1:] = torch.inf  # one pair left for that row
    a = b = None
    if weights != "uniform":
        a, b = (torch.rand(5, size, dtype=torch.float64) + 0.1 for size in (9, 7))
        if weights == "some zero":
            a[:, 2] = b[:, 3] = 0
        a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
        if type(transport) is EntropicOT:
            a[0], b[0] = a[1], b[1]
            cost[0] = cost[1]
    elif type(transport) is EntropicOT:
        cost[0] = cost[1]  # 1/9 cannot all go where only 1/7 may arrive and others are forbidden: keep it feasible
    found, reference = transport.plan(cost, a, b), by_loop(transport, cost, a, b)
    assert bool(found.converged.all())
    torch.testing.assert_close(found.to_dense(), reference.to_dense(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.penalty, reference.penalty, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("transport", TRANSPORTS, ids=lambda t: type(t).__name__)
def test_any_slow_problem_goes_on_in_the_loop(transport, monkeypatch, by_loop):
    cost = costs()
    monkeypatch.setattr(entropic, "_BUDGET", -17)  # 2 n - 17 = 1 iteration
    found, reference = transport.plan(cost), by_loop(transport, cost)
    assert bool(found.converged.all())
    torch.testing.assert_close(found.to_dense(), reference.to_dense(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("make", [EntropicOT, lambda reg: PartialOT(0.6, reg=reg), lambda reg: UnbalancedOT(reg, 1.0)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_costs_of_any_spread_in_one_batch(make, scale, by_loop):
    cost = costs() * torch.tensor([1.0, 3.0, 10.0, 100.0, 1e3], dtype=torch.float64)[:, None, None] * scale
    transport = make(0.5 * scale)
    found, reference = transport.plan(cost), by_loop(transport, cost)
    assert bool(found.converged.all())
    torch.testing.assert_close(found.cost(cost), reference.cost(cost), rtol=1e-4, atol=1e-6 * scale)


def test_capped_step_fills_rows_up_to_their_weights():
    """Two rows of very different reach: the level is found wherever the search starts."""
    cost = torch.tensor([[[0.0, 30.0], [60.0, 90.0]]], dtype=torch.float64)
    plan = PartialOT(0.9, reg=0.3, tol=1e-12).plan(cost).to_dense()[0]
    assert plan.sum() == pytest.approx(0.9)
    assert plan.sum(1).tolist() == pytest.approx([0.5, 0.4])
    assert plan.sum(0).tolist() == pytest.approx([0.5, 0.4])


def test_float32_costs_are_iterated_in_float64_and_returned_in_float32():
    cost = costs(dtype=torch.float32)
    plan = EntropicOT(0.01).plan(cost)
    assert plan.mass.dtype == torch.float32
    assert float((plan.row_mass() - 1 / 9).abs().max()) < 1e-6


def test_results_do_not_depend_on_the_number_of_threads():
    cost, threads = costs(problems=40), torch.get_num_threads()
    try:
        plans = []
        for count in (1, 2):
            torch.set_num_threads(count)
            plans.append(EntropicOT(0.1).plan(cost).to_dense())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*plans)
