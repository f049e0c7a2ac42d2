"""The compiled Sinkhorn iterations against the log-domain loop, which is their reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbot import EntropicOT, MiniBatchOT, PartialOT, UnbalancedOT, pairwise_cost
from mbot.kernels import exponentials, newton, scaling
from mbot.solvers import entropic
from mbot.solvers.marginals import UpperBounded
from mbot.testing import without_fast_paths

TRANSPORTS = [
    EntropicOT(0.3, tol=1e-10),
    UnbalancedOT(0.3, 0.7, tol=1e-10),
    PartialOT(0.6, reg=0.3, tol=1e-10),
]


def costs(problems=5, n=9, m=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(n + m)
    x = torch.randn(problems, n, 2, generator=generator, dtype=dtype)
    return pairwise_cost(x, torch.randn(problems, m, 2, generator=generator, dtype=dtype) + 1)


def by_loop(transport, *args):
    """The plan without the kernel."""
    with without_fast_paths():
        return transport.plan(*args)


@pytest.mark.parametrize("transport", TRANSPORTS, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("weights", ["uniform", "drawn", "some zero"])
def test_kernel_and_loop_give_one_plan(transport, weights):
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
def test_any_slow_problem_goes_on_in_the_loop(transport, monkeypatch):
    cost = costs()
    monkeypatch.setattr(entropic, "_BUDGET", -17)  # 2 n - 17 = 1 iteration
    found, reference = transport.plan(cost), by_loop(transport, cost)
    assert bool(found.converged.all())
    torch.testing.assert_close(found.to_dense(), reference.to_dense(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("make", [EntropicOT, lambda reg: PartialOT(0.6, reg=reg), lambda reg: UnbalancedOT(reg, 1.0)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_costs_of_any_spread_in_one_batch(make, scale):
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


def test_results_do_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr("mbot.kernels.threads._WORTH", 0)
    cost, threads = costs(problems=40), torch.get_num_threads()
    try:
        plans = []
        for count in (1, 2):
            torch.set_num_threads(count)
            plans.append(EntropicOT(0.1).plan(cost).to_dense())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*plans)


def test_the_switch_leaves_out_the_kernel(monkeypatch):
    monkeypatch.setattr(scaling, "iterate", None)
    with without_fast_paths():
        EntropicOT(0.3).plan(costs())
    with pytest.raises(TypeError):
        EntropicOT(0.3).plan(costs())


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(["entropic", "unbalanced", "partial"]),
    problems=st.integers(1, 4),
    n=st.integers(1, 12),
    m=st.integers(1, 12),
    reg=st.sampled_from([0.002, 0.02, 0.3, 5.0]),
    scale=st.sampled_from([1e-20, 1.0, 1e15]),
    offset=st.sampled_from([0.0, -2.0, 50.0]),
    weights=st.sampled_from(["uniform", "drawn", "some zero"]),
    costs=st.sampled_from(["real", "ties", "forbidden", "one far"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_kernel_and_loop_agree_over_the_range(kind, problems, n, m, reg, scale, offset, weights, costs, dtype, seed):
    """Plans, values, marginals and errors; points of weight 0, forbidden pairs and costs of any size included."""
    g = torch.Generator().manual_seed(seed)
    cost = torch.rand(problems, n, m, generator=g, dtype=dtype) + offset
    if costs == "ties":
        cost = cost.round()
    elif costs == "forbidden":
        cost[torch.rand(problems, n, m, generator=g) < 0.2] = torch.inf
    elif costs == "one far":
        cost[0, 0, 0] = 1e4
    a = b = None
    if weights != "uniform":
        a, b = (torch.rand(problems, size, generator=g, dtype=torch.float64) + 0.1 for size in (n, m))
        if weights == "some zero":
            a[:, 1:] *= torch.rand(problems, n - 1, generator=g) < 0.6
            b[:, 1:] *= torch.rand(problems, m - 1, generator=g) < 0.6
        a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    reg = max(reg, 0.02) if kind == "partial" else reg  # smaller ones take very many rounds there
    reg, tol = reg * scale, 1e-9 if dtype == torch.float64 else 1e-6
    transport = {
        "entropic": EntropicOT(reg, tol=tol),
        "unbalanced": UnbalancedOT(reg, 1.5 * scale, tol=tol),
        "partial": PartialOT(0.6, reg=reg, tol=tol),
    }[kind]
    cost = cost * scale
    try:
        reference = by_loop(transport, cost, a, b)
    except ValueError:
        with pytest.raises(ValueError, match="forbidden"):
            transport.plan(cost, a, b)
        return
    found = transport.plan(cost, a, b)
    assert found.converged.tolist() == reference.converged.tolist() == [True] * problems
    assert bool((found.error <= 1.1 * tol + 1e-6 * (dtype == torch.float32)).all())
    assert bool((found.iterations > 0).all())
    # A plan right to tol in its marginals is right to tol times the condition of the problem.
    close = {"rtol": 0, "atol": 1e-3 if dtype == torch.float32 else 1e-6}
    torch.testing.assert_close(found.mass, reference.mass, **close)
    torch.testing.assert_close(found.row_mass(), reference.row_mass(), **close)
    size = scale * max(1.0, abs(offset))
    for name in ("cost", "penalty"):
        values = [plan.cost(cost) if name == "cost" else plan.penalty for plan in (found, reference)]
        torch.testing.assert_close(values[0] / size, values[1] / size, **close)
    positive = (a > 0) if a is not None else torch.ones(problems, n, dtype=torch.bool)
    assert bool(found.potentials[0][positive].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inner", TRANSPORTS, ids=lambda t: type(t).__name__)
def test_losses_and_gradients_of_kernel_and_loop(inner, dtype):
    g = torch.Generator().manual_seed(0)
    xs, ys = (torch.randn(3, 8, 2, generator=g, dtype=dtype) for _ in range(2))
    loss, found = MiniBatchOT(inner, num_batches=3, batch_size=8), []
    for context in (without_fast_paths(), torch.enable_grad()):
        x = xs.clone().requires_grad_()
        with context:
            value = loss.from_batches(x, ys)
        found.append((value.detach(), *torch.autograd.grad(value, x)))
    torch.testing.assert_close(*found, rtol=1e-5 if dtype == torch.float32 else 1e-8, atol=1e-6)


def test_exponentials_and_logarithms_are_those_of_numpy():
    x = np.concatenate((np.linspace(-689, 700, 4001), [0.0, -0.0, -1e-300, -np.inf, -750.0]))
    bits, found = np.empty(len(x), np.int64), x.copy()
    exponentials.exp(found, bits)
    np.testing.assert_allclose(found[:-2], np.exp(x[:-2]), rtol=1e-15)
    assert found[-2:].tolist() == [0, 0]
    y, logs = np.exp(np.linspace(-690, 700, 4001)), np.empty(4001)
    exponentials.log(y, logs, bits)
    np.testing.assert_allclose(logs, np.log(y), rtol=1e-15, atol=1e-15)


def test_points_of_weight_zero_beside_a_far_one():
    """The far point's potential is large, and so is the one that the points without weight get: nothing times it."""
    cost, a = torch.tensor([[[1e4], [0.3], [0.4], [0.2]]]), torch.tensor([[0.3, 0.3, 0.0, 0.4]])
    for plan in (EntropicOT(0.02).plan(cost, a), by_loop(EntropicOT(0.02), cost, a)):
        assert bool(plan.converged.all())
        torch.testing.assert_close(plan.mass[0, :, 0], a[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [2, 7, 40])
@pytest.mark.parametrize("m", [3, 33])
def test_problems_that_take_newton_steps_end_where_rounds_do(n, m, dtype):
    """Two groups of points with little to exchange; points without weight and a forbidden pair."""
    g = torch.Generator().manual_seed(n + m)
    x, y = torch.randn(4, n, 2, generator=g, dtype=dtype), torch.randn(4, m, 2, generator=g, dtype=dtype)
    x[:, n // 2 :], y[:, m // 2 :] = x[:, n // 2 :] + 3, y[:, m // 2 :] + 3
    cost = pairwise_cost(x, y)
    reg = float(cost.max()) / 150
    a, b = (torch.rand(4, size, generator=g, dtype=torch.float64) + 0.1 for size in (n, m))
    if n > 2:
        a[:2, 0] = b[2:, 0] = 0
        cost[0, 1, 1] = torch.inf
    a, b = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
    tol = 1e-6 if dtype == torch.float32 else 1e-11
    transport = EntropicOT(reg, tol=tol)
    found, reference = transport.plan(cost, a, b), by_loop(transport, cost, a, b)
    assert bool(found.converged.all())
    close = {"rtol": 0, "atol": 1e-4 if dtype == torch.float32 else 1e-7}
    torch.testing.assert_close(found.mass, reference.mass, **close)
    torch.testing.assert_close(found.row_mass().double(), a, rtol=0, atol=2e-6)


def test_newton_steps_save_rounds():
    cost = costs(problems=50, n=16, m=16)
    reg, a = 0.1 * float(cost.mean()), 1 / 16
    kernel, v, u = (-cost / reg).exp(), torch.ones(50, 16, 1, dtype=torch.float64), None
    for _ in range(300):
        u = a / (kernel @ v)
        v = a / (kernel.mT @ u)
    assert float((u * (kernel @ v) - a).abs().sum(1).max()) > 1e-6
    assert int(EntropicOT(reg).plan(cost).iterations.max()) < 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [120, 450, 1900])
@pytest.mark.parametrize("kind", ["entropic", "unbalanced"])
def test_costs_of_a_wide_spread_come_from_larger_regularisations(kind, spread, dtype, monkeypatch):
    """In the kernel alone; with a least cost below 0, points of weight 0 and a forbidden pair."""
    cost = costs(problems=3, n=9, m=11, dtype=dtype) - 1
    cost[0, 3, 4] = torch.inf
    reg = float(cost[cost < torch.inf].max() - cost.min()) / spread
    g = torch.Generator().manual_seed(spread)
    a, b = (torch.rand(3, size, generator=g, dtype=torch.float64) + 0.1 for size in (9, 11))
    a[1, 0] = b[2, 1] = 0
    a, b = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
    tol = 1e-6 if dtype == torch.float32 else 1e-10
    transport = EntropicOT(reg, tol=tol) if kind == "entropic" else UnbalancedOT(reg, 4.0, tol=tol)
    reference = by_loop(transport, cost, a, b)
    monkeypatch.setattr(entropic, "_BUDGET", 20_000)
    monkeypatch.setattr(entropic, "_solved", lambda *_, **__: pytest.fail("the loop was called"))
    found = transport.plan(cost, a, b)
    assert bool(found.converged.all() & reference.converged.all())
    close = {"rtol": 0, "atol": 1e-3 if dtype == torch.float32 else 1e-6}
    torch.testing.assert_close(found.mass, reference.mass, **close)
    torch.testing.assert_close(found.penalty, reference.penalty, **close)
    f, g = found.potentials
    live = (found.mass > 1e-6) & (cost < torch.inf)
    entropy = (f[..., :, None] + g[..., None, :] - cost) / reg + (a[:, :, None] * b[:, None, :]).log().to(dtype)
    torch.testing.assert_close(entropy[live], found.mass[live].log(), rtol=0, atol=2e-3)


def test_over_relaxed_rounds_are_fewer():
    """A plain round gains a fifth of a digit here; problems too large for Newton steps, which save rounds as well."""
    x = torch.randn(1, 300, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cost = pairwise_cost(x, x.flip(1) * 0.7 + 1)
    reg, weight = 0.05 * float(cost.mean()), np.full((1, 300), 1 / 300)
    *_, error, rounds = scaling.iterate(cost.numpy(), weight, weight, scaling.BALANCED, 0.0, reg, 1000, 1e-9)
    kernel, v = (-cost[0] / reg).exp(), torch.ones(300, 1, dtype=torch.float64)
    for _ in range(2 * int(rounds[0])):
        u = 1 / 300 / (kernel @ v)
        v = 1 / 300 / (kernel.T @ u)
    assert float(error[0]) <= 1e-9 < float((u * (kernel @ v) - 1 / 300).abs().sum())
    scale, new = np.array([1.0, 1e250, 2.0, 0.0]), np.array([1.01, 0.99e250, 4.0, 0.0])
    scaling._beyond(new, scale, 1.5)
    np.testing.assert_allclose(new, [1.01**1.5, 0.99**1.5 * 1e250, 4.0, 0.0], rtol=1e-6)
    scale, new = np.array([1.0, 1.0, 1.0, 0.0]), np.array([1.1, 0.9, 1.0, 0.0])
    scaling._extrapolate(new[:3], scale[:3], 4.0, np.empty(3, np.int64))
    np.testing.assert_allclose(new, [1.1**4, 0.9**4, 1.0, 0.0])
    scale, new = np.array([1.0, 2.0, 0.0]), np.array([np.exp(1.0), 2.0 * np.exp(-0.5), 0.0])
    scaling._extrapolate(new, scale, 100.0, np.empty(3, np.int64))
    np.testing.assert_allclose(new, [np.exp(12.0), 2 * np.exp(-6.0), 0.0])  # in the same direction, and no farther


def relaxed_step(sums, weight):
    return weight / sums ** (50 / 51)


def bounded_step(sums, weight):
    """Scalings of at most a level, found by bisection, at which 0.8 of the mass moves."""
    low, high = np.zeros((len(sums), 1)), (weight / sums).max(1, keepdims=True)
    for _ in range(80):
        level = (low + high) / 2
        less = np.minimum(weight, level * sums).sum(1, keepdims=True) < 0.8
        low, high = np.where(less, level, low), np.where(less, high, level)
    return np.minimum(weight / sums, high)


@pytest.mark.parametrize(
    ("kind", "parameter", "step"),
    [(scaling.KL_RELAXED, 50.0, relaxed_step), (scaling.UPPER_BOUNDED, 0.8, bounded_step)],
    ids=["relaxed", "bounded"],
)
def test_extrapolated_rounds_are_fewer(kind, parameter, step):
    """Than plain ones, which lead to the same plan."""
    x = torch.randn(20, 24, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cost = pairwise_cost(x, x.flip(1) * 0.7 + 1)
    cost -= cost.amin((1, 2), keepdim=True)
    reg, weight = 0.05 * float(cost.mean()), np.full((20, 24), 1 / 24)
    plan, *_, error, rounds = scaling.iterate(cost.numpy(), weight, weight, kind, parameter, reg, 3000, 1e-9)
    kernel, u, v, needed = np.exp(-cost.numpy() / reg), weight, weight, np.zeros(20)
    for _ in range(1000):
        before, sums = u, np.einsum("pij,pj->pi", kernel, v)
        u = step(sums, weight)
        needed += (sums * abs(u - before)).sum(1) > 1e-9 * (sums * before).sum(1)
        v = step(np.einsum("pij,pi->pj", kernel, u), weight)
        if kind == scaling.KL_RELAXED:
            rows, cols = ((weight * (weight / scale) ** (1 / parameter)).sum(1, keepdims=True) for scale in (u, v))
            u, v = u * (rows / cols) ** (parameter / 2), v / (rows / cols) ** (parameter / 2)
    plain = u[:, :, None] * kernel * v[:, None, :]
    assert (error <= 1e-9).all()
    assert 1.5 * rounds.mean() < needed.mean() < 900
    np.testing.assert_allclose(plan, plain, atol=1e-7)


def test_a_newton_step_is_one():
    """Against the derivative of the marginals, with the columns kept exact."""
    cost = costs(problems=1, n=6, m=5)[0].numpy() / 10
    kernel, a, b, u = np.exp(-cost), np.full(6, 1 / 6), np.full(5, 1 / 5), np.linspace(0.5, 2, 6)
    sums, new, system = np.empty(6), np.empty(6), np.empty((6, 6))

    def rows(log_u):
        scaled = np.exp(log_u)[:, None] * kernel
        return (scaled * (b / scaled.sum(0))).sum(1)

    v = b / (u @ kernel)
    sums[:] = kernel @ v
    assert newton.factorise(kernel, a, b, sums, u, v, system)
    newton.newton_step(system, a, sums, u, new)
    step, h = np.log(new / u), 1e-6
    change = (rows(np.log(u) + h * step) - rows(np.log(u) - h * step)) / (2 * h)
    np.testing.assert_allclose(change, a - sums * u, atol=1e-8)


@pytest.mark.parametrize("spread", [200.0, 700.0, 1900.0])
def test_free_masses_beyond_what_an_exponential_holds(spread):
    """Their potentials in the exponent would be cut off there, and the plan be that of a cut kernel."""
    g = torch.Generator().manual_seed(1)
    cost = spread * torch.rand(12, 9, generator=g, dtype=torch.float64) - min(2 * spread, 1450)
    transport = UnbalancedOT(reg=1.0, reg_marginal=1.0, tol=1e-9)
    found = transport.plan(cost)
    with without_fast_paths():
        expected = transport.plan(cost)
    assert bool(found.converged & expected.converged)
    torch.testing.assert_close(found.mass, expected.mass, rtol=1e-6, atol=0)


def test_full_columns_that_a_plan_does_not_reach_have_an_error():
    step = UpperBounded(1.0)
    weight = torch.tensor([[1 - 1e-12, 1e-12]], dtype=torch.float64)
    mass = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(step.masses(torch.zeros_like(mass), mass, weight.log()), weight)
