"""Step times and straightening: brute force, closed forms, what is promised."""

import copy
import itertools

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
    noise = lambda n, g: torch.randn(n, 2, generator=g)
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
    for number in (2, 8):
        with pytest.raises(ValueError, match=f"source must give the pool=4 noises that it is asked for; got {number}"):
            flows.straighten(flows.models.ResidualMLP(2), lambda n, g, number=number: torch.randn(number, 2),
                             torch.tensor([0.0, 1.0]), pool=4)  # fmt: skip
    with pytest.raises(ValueError, match="each of the 4 samples of the pool=4 noises; got 7"):
        flows.straighten(flows.models.ResidualMLP(2, num_classes=3), x0, torch.tensor([0.0, 1.0]), pool=4,
                         conditions=torch.zeros(7).long())  # fmt: skip
    with pytest.raises(TypeError, match="pool must be an int"):
        flows.straighten(flows.models.ResidualMLP(2), x0, torch.tensor([0.0, 1.0]), pool=4.0)


def test_straightening_in_half_precision():
    model = flows.models.ResidualMLP(2, width=8).bfloat16()
    losses = flows.straighten(
        model, torch.randn(8, 2).bfloat16(), torch.linspace(0, 1, 3), iterations=2, pool=8, grid=4
    )
    assert len(losses) == 2


@pytest.mark.parametrize("rank", [None, 2])
def test_straightening_that_diverges_stops_before_the_weights_do(rank):
    model = flows.models.ResidualMLP(2, width=8, depth=1)
    with pytest.raises(flows.NonFiniteLoss, match=r"iteration \d+: the loss is .*the gradient norm .*Lower lr"):
        flows.straighten(model, torch.randn(64, 2), torch.linspace(0, 1, 3), iterations=20, pool=64, lr=1e15, rank=rank)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
