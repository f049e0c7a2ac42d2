"""Step times, straightening and likelihood: brute force, closed forms, what is promised."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flows
from flows import step_times


def bend(t, x, y):
    """A field that turns fast in the middle."""
    turn = 6 * torch.exp(-((t[:, None] - 0.6) ** 2) / 0.01)
    return torch.stack((-x[:, 1], x[:, 0]), 1) * turn + x


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 7), steps=st.integers(1, 6), seed=st.integers(0, 10_000))
def test_the_path_is_the_best_of_all(n, steps, seed):
    cost = torch.rand(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cost = cost.masked_fill(torch.ones(n, n).tril().bool(), torch.inf)
    if steps >= n:
        with pytest.raises(ValueError, match="no path"):
            step_times.best_path(cost, steps)
        return
    nodes, total = step_times.best_path(cost, steps)
    paths = [(0, *middle, n - 1) for middle in itertools.combinations(range(1, n - 1), steps - 1)]
    sums = [sum(float(cost[a, b]) for a, b in itertools.pairwise(path)) for path in paths]
    assert total == pytest.approx(min(sums))
    assert tuple(nodes.tolist()) == paths[sums.index(min(sums))]


def test_jump_costs_are_the_errors_of_the_jumps():
    x0 = torch.randn(20, 2, dtype=torch.float64)
    cost = step_times.jump_costs(bend, x0, grid=10)
    x = flows.integrate(bend, x0, method="euler", times=torch.linspace(0, 1, 11, dtype=torch.float64)).x
    t = torch.tensor(0.2, dtype=torch.float64)
    jump = x[2] + 0.5 * bend(t.expand(20), x[2], None)
    assert float(cost[2, 7]) == pytest.approx(float((x[7] - jump).square().mean()), rel=1e-5)
    assert bool((cost.diagonal(1) == 0).all())
    assert bool(cost.tril().isinf().logical_or(cost.tril() == 0).all())
    assert bool(cost[3, :4].isinf().all())


@pytest.mark.parametrize("steps", [1, 2, 4, 6, 8, 50])
def test_a_schedule_is_never_worse_than_equal_steps(steps):
    x0 = torch.randn(100, 2)
    times = flows.bellman_schedule(bend, x0, steps=steps, grid=50)
    assert len(times) == steps + 1
    assert (float(times[0]), float(times[-1])) == (0, 1)
    cost = step_times.jump_costs(bend, x0, grid=50)
    assert step_times.path_cost(cost, times) <= step_times.path_cost(cost, torch.linspace(0, 1, steps + 1)) + 1e-12


def test_a_schedule_helps_a_field_that_turns_at_once():
    x0 = torch.randn(200, 2)
    exact = flows.integrate(bend, x0, rtol=1e-7, atol=1e-7).final
    times = flows.bellman_schedule(bend, x0[:100], steps=8)
    placed = flows.integrate(bend, x0, method="euler", times=times).final
    equal = flows.integrate(bend, x0, method="euler", steps=8).final
    assert float((placed - exact).norm()) < 0.8 * float((equal - exact).norm())
    inside = (times > 0.4) & (times < 0.8)
    assert int(inside.sum()) >= 4


def trained_field():
    """A small model fitted to `bend`."""
    torch.manual_seed(0)
    model = flows.models.ResidualMLP(2, width=32, depth=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(300):
        t, x = torch.rand(128), 2 * torch.randn(128, 2)
        loss = (model(t, x) - bend(t, x, None)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("rank", [None, 4])
def test_straightening_brings_few_steps_to_the_fine_end_points(rank):
    model = trained_field()
    before = copy.deepcopy(model)
    g = torch.Generator().manual_seed(1)
    times = torch.linspace(0, 1, 5)
    noise = lambda n, g: torch.randn(n, 2, generator=g)  # noqa: E731
    losses = flows.straighten(
        model, noise, times, iterations=300, batch_size=64, pool=256, lr=3e-3, rank=rank, generator=g
    )
    assert losses[-1] < losses[0]
    x0 = torch.randn(200, 2, generator=g)
    goal = flows.integrate(before, x0, method="euler", steps=100).final
    error = [float((flows.integrate(m, x0, method="euler", times=times).final - goal).norm()) for m in (before, model)]
    assert error[1] < 0.7 * error[0]
    changed = [not torch.equal(a, b) for a, b in zip(before.parameters(), model.parameters(), strict=True)]
    assert any(changed)
    if rank is not None:  # biases stay, and the updates have that rank
        update = model.blocks[0][0].weight - before.blocks[0][0].weight
        assert int(torch.linalg.matrix_rank(update, atol=1e-5)) <= rank
        assert torch.equal(model.output.bias, before.output.bias)


def test_bad_schedules():
    x0 = torch.randn(4, 2)
    with pytest.raises(ValueError, match="at most grid=10; got 11"):
        flows.bellman_schedule(bend, x0, steps=11, grid=10)
    with pytest.raises(ValueError, match="square"):
        step_times.best_path(torch.zeros(2, 3), 1)
    with pytest.raises(ValueError, match="strictly increasing"):
        flows.straighten(flows.models.ResidualMLP(2), x0, torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="at least pool=1024 rows; got 4"):
        flows.straighten(flows.models.ResidualMLP(2), x0, torch.tensor([0.0, 1.0]))


def affine(t, x, y):
    """x1 = exp(1) x0 + 2 (e - 1) in the first coordinate, x1 = exp(-1) x0 in the others."""
    rate = torch.full_like(x, -1.0)
    rate[:, 0] = 1.0
    drift = torch.zeros_like(x)
    drift[:, 0] = 2.0
    return rate * x + drift


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
@pytest.mark.parametrize("d", [1, 3])
def test_likelihood_of_an_affine_flow_is_the_gaussians(trace, d):
    """Hutchinson is exact here too: the Jacobian is diagonal."""
    x1 = torch.randn(10, d, dtype=torch.float64)
    got = flows.log_likelihood(affine, x1, trace=trace, rtol=1e-8, atol=1e-8)
    mean, std = torch.zeros(d, dtype=torch.float64), torch.full((d,), math.exp(-1), dtype=torch.float64)
    mean[0], std[0] = 2 * (math.e - 1), math.e
    torch.testing.assert_close(got, torch.distributions.Normal(mean, std).log_prob(x1).sum(1), rtol=1e-6, atol=1e-6)


def test_hutchinson_is_unbiased_on_a_mixing_field():
    a = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 3
    x1 = torch.randn(4, 5, dtype=torch.float64)
    field = lambda t, x, y: x @ a.T  # noqa: E731
    g = torch.Generator().manual_seed(0)
    exact = flows.log_likelihood(field, x1, trace="exact")
    guess = flows.log_likelihood(field, x1, trace="hutchinson", probes=800, generator=g)
    torch.testing.assert_close(guess, exact, rtol=0.02, atol=0.05)
    torch.testing.assert_close(
        exact, flows.log_likelihood(field, x1, trace="exact", method="rk4", steps=40), rtol=1e-4, atol=1e-4
    )


def test_a_density_integrates_to_one():
    """Over a fine grid of the plane, for a model and its images' shape."""
    model = trained_field()
    side = torch.linspace(-12, 12, 121)
    points = torch.cartesian_prod(side, side)
    density = flows.log_likelihood(model, points, method="rk4", steps=20).exp()
    assert float(density.sum() * (side[1] - side[0]) ** 2) == pytest.approx(1, abs=0.03)
    net = flows.models.UNet.preset("digits", num_classes=2).eval()
    out = flows.log_likelihood(net, torch.randn(2, 1, 8, 8), y=torch.tensor([0, 1]), method="euler", steps=2)
    assert out.shape == (2,)
    assert not out.requires_grad
    assert all(p.grad is None for p in net.parameters())


def test_bad_likelihood():
    x = torch.zeros(2, 2)
    for arguments, says in (
        ({"trace": "none"}, "trace must be one of"),
        ({"method": "rk4"}, "give steps"),
        ({"probes": 0, "trace": "hutchinson"}, "probes must be at least 1"),
    ):
        with pytest.raises(ValueError, match=says):
            flows.log_likelihood(affine, x, **arguments)
    with pytest.raises(ValueError, match=r"shape \(B, d…\)"):
        flows.log_likelihood(affine, torch.zeros(2))
