"""Exact transport against brute force, linear programming, scipy and POT."""

from itertools import permutations

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, linprog

import mbot
from mbot import EntropicOT, ExactOT, PartialOT, pairwise_cost


def linear_program(cost, a, b):
    """The optimal value by a general LP solver."""
    n, m = cost.shape
    rows = np.kron(np.eye(n), np.ones(m))
    cols = np.kron(np.ones(n), np.eye(m))
    solved = linprog(cost.ravel(), A_eq=np.vstack([rows, cols]), b_eq=np.concatenate([a, b]), method="highs")
    assert solved.success
    return solved.fun


@pytest.mark.parametrize("n", range(1, 8))
def test_brute_force_over_all_permutations(n):
    cost = torch.randn(4, n, n, dtype=torch.float64)
    every = torch.tensor(list(permutations(range(n))))
    best = cost[:, torch.arange(n), every].sum(-1).amin(-1) / n
    torch.testing.assert_close(ExactOT().plan(cost).cost(cost), best, rtol=1e-12, atol=1e-12)


def test_toys_of_the_mini_batch_papers():
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
    y = x + torch.tensor([1.0, 0.0], dtype=torch.float64)
    plan = ExactOT().plan(pairwise_cost(x, y))
    torch.testing.assert_close(plan.to_dense(), torch.eye(3, dtype=torch.float64) / 3)
    assert float(ExactOT()(x, y)) == pytest.approx(1, abs=1e-15)
    assert float(ExactOT()(x[:1], y)) == pytest.approx((1 + 2 + 5) / 3, abs=1e-15)


@pytest.mark.parametrize("solver", ["assignment", "network_simplex"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 16), (2, 2, 33), (1, 128), (1, 300)])
@pytest.mark.parametrize("kind", ["low", "high", "ties", "negative"])
def test_uniform_square_problems_against_scipy(solver, dtype, shape, kind):
    *batch, n = shape
    g = torch.Generator().manual_seed(n)
    if kind == "ties":
        cost = torch.randint(0, 4, (*batch, n, n), generator=g).to(dtype)
    elif kind == "negative":
        cost = torch.randn(*batch, n, n, generator=g, dtype=dtype) - 3
    else:
        d = 2 if kind == "low" else 100
        cost = pairwise_cost(*(torch.randn(*batch, n, d, generator=g, dtype=dtype) for _ in range(2)))
    plan = ExactOT(solver).plan(cost)
    exact = cost.double().flatten(0, -3).numpy()
    expected = [c[linear_sum_assignment(c)].sum() / n for c in exact]
    value = plan.cost(cost.double()).flatten()
    torch.testing.assert_close(
        value, torch.tensor(expected, dtype=torch.float64), rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=1e-12
    )
    uniform = torch.full((*batch, n), 1 / n, dtype=dtype)
    torch.testing.assert_close(plan.row_mass(), uniform)
    torch.testing.assert_close(plan.col_mass(), uniform)
    assert float(plan.error.max()) < 1e-11  # of the cost of the plan


@pytest.mark.parametrize("n", [1024, 2048])
def test_large_problems_are_optimal_where_a_capped_simplex_is_not(n):
    """At n = 2048 POT's default iteration limit returns a worse plan with only a warning."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 2, generator=g, dtype=torch.float64), torch.randn(n, 2, generator=g, dtype=torch.float64)
    cost = pairwise_cost(x, y)
    plan = ExactOT().plan(cost)
    expected = ot.emd2([], [], cost.numpy(), numItermax=10**9)
    assert float(plan.cost(cost)) == pytest.approx(expected, rel=1e-9)
    f, h = plan.potentials
    assert float((f[:, None] + h - cost).max()) < 1e-9
    assert float(f.mean() + h.mean()) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "m"), [(5, 5), (4, 9), (9, 4), (1, 6), (30, 20)])
def test_general_weights_against_linear_programming_and_pot(n, m, dtype):
    g = torch.Generator().manual_seed(n * m)
    cost = pairwise_cost(torch.randn(3, n, 2, generator=g), torch.randn(3, m, 2, generator=g)).to(dtype)
    a, b = torch.rand(3, n, generator=g, dtype=dtype), torch.rand(3, m, generator=g, dtype=dtype)
    a[1, 0] = 0 if n > 1 else a[1, 0]
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    plan = ExactOT().plan(cost, a, b)
    torch.testing.assert_close(plan.row_mass(), a)
    torch.testing.assert_close(plan.col_mass(), b)
    for p in range(3):
        pa, pb, pc = (t[p].double().numpy() for t in (a, b, cost))
        pb = pb * (pa.sum() / pb.sum())
        value = float(plan.cost(cost.double())[p])
        assert value == pytest.approx(linear_program(pc, pa, pb), rel=1e-5 if dtype == torch.float32 else 1e-9)
        assert value == pytest.approx(ot.emd2(pa, pb, pc), rel=1e-5 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("total", [1e-6, 1.0, 1e6])
def test_weights_need_not_sum_to_one(total):
    cost = torch.rand(6, 8, dtype=torch.float64)
    a = torch.rand(6, dtype=torch.float64)
    b = torch.rand(8, dtype=torch.float64)
    a, b = a / a.sum(), b / b.sum()
    plan = ExactOT().plan(cost, total * a, total * b)
    torch.testing.assert_close(plan.to_dense(), total * ExactOT().plan(cost, a, b).to_dense(), rtol=1e-9, atol=0)


def test_weights_of_one_side_only_and_shared_by_the_batch():
    cost = torch.rand(3, 4, 4, dtype=torch.float64)
    a = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    plan = ExactOT().plan(cost, a)
    torch.testing.assert_close(plan.row_mass(), a.expand(3, 4))
    torch.testing.assert_close(plan.col_mass(), torch.full((3, 4), 0.25, dtype=torch.float64))
    torch.testing.assert_close(plan.cost(cost), ExactOT().plan(cost, a.expand(3, 4)).cost(cost))


def test_float32_weights_that_sum_to_one_only_roughly():
    """Unequal sums make POT return a zero plan with a warning; ours are balanced in float64 first."""
    a, b = torch.rand(1000), torch.rand(1000)
    a, b = a / a.sum(), b / b.sum() * (1 + 3e-6)
    plan = ExactOT().plan(torch.rand(1000, 1000), a, b)
    assert float(plan.total_mass()) == pytest.approx(1, rel=1e-5)


def test_forbidden_pairs():
    cost = torch.rand(2, 5, 5, dtype=torch.float64)
    cost[:, torch.arange(5), torch.arange(5)] = torch.inf
    for plan in (ExactOT().plan(cost), ExactOT("network_simplex").plan(cost)):
        assert float(plan.to_dense().diagonal(dim1=-2, dim2=-1).sum()) == 0
        for p in range(2):
            best = linear_sum_assignment(cost[p].numpy())
            assert float(plan.cost(cost)[p]) == pytest.approx(cost[p][best].mean().item(), rel=1e-12)
    cost[1, 2] = torch.inf
    with pytest.raises(ValueError, match="no plan avoids the forbidden pairs"):
        ExactOT().plan(cost)
    with pytest.raises(ValueError, match="every pair"):
        ExactOT().plan(torch.full((3, 3), torch.inf))


def test_constant_huge_and_tiny_costs():
    n = 20
    assert float(ExactOT().plan(torch.full((n, n), 7.0)).cost(torch.full((n, n), 7.0))) == pytest.approx(7)
    cost = torch.rand(n, n, dtype=torch.float64)
    expected = float(ExactOT().plan(cost).cost(cost))
    for scale in (1e-30, 1e30):
        assert float(ExactOT().plan(scale * cost).cost(scale * cost)) == pytest.approx(scale * expected, rel=1e-12)
    for transport in (ExactOT(), mbot.PartialOT(0.5)):  # sums of the costs overflow float32
        plan = transport.plan((3e38 * cost).float())
        assert bool(plan.converged)
        assert float(plan.cost(cost)) == pytest.approx(float(transport.plan(cost).cost(cost)), rel=1e-6)
    shifted = cost + 1e6
    assert float(ExactOT().plan(shifted).cost(cost)) == pytest.approx(expected, rel=1e-6)
    outlier = cost.clone()
    outlier[0, 0] = 1e12
    assert float(ExactOT().plan(outlier).cost(outlier)) == pytest.approx(
        outlier.numpy()[linear_sum_assignment(outlier.numpy())].mean(), rel=1e-9
    )


def test_no_problems_have_no_matchings():
    from mbot.kernels.assignment import assign

    assert [len(part) for part in assign(np.empty(0), np.empty(0, np.int64))] == [0, 0, 0]


@pytest.mark.parametrize("dtypes", [(np.float32, np.float32), (np.float32, np.float64), (np.float64, np.float64)])
@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_the_kernel_scans_rows_of_any_length(dtypes, levels):
    """Single entries, vectors, the rest of a vector, and blocks; ties anywhere; the first column of the least one."""
    from mbot.kernels.scans import two_smallest

    random = np.random.default_rng(levels)
    for n in (*range(1, 140), *range(250, 330), 511, 512, 513):
        row = random.integers(0, levels, n).astype(dtypes[0])
        price = random.integers(0, 2, n).astype(dtypes[1])
        reduced = row - price
        first, second, column = two_smallest(row, price, n)
        assert (first, second) == tuple(np.sort(np.append(reduced, np.inf))[:2])
        assert column == reduced.argmin()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("levels", [2, 1000])
def test_the_kernel_relaxes_rows_of_any_length(dtype, levels):
    from mbot.kernels.scans import relaxed

    random = np.random.default_rng(levels)
    for n in range(1, 140):
        row, price = random.integers(0, levels, n).astype(dtype), random.integers(0, levels, n).astype(np.float64)
        price[1:][random.random(n - 1) < 0.3] = -np.inf  # settled
        dist, parent = random.integers(0, levels, n).astype(np.float64), np.full(n, 7)
        dist[price == -np.inf] = np.inf
        through = row - price - 0.5
        shorter, nearest = through < dist, np.minimum(dist, through)
        longer = np.append(row, np.full(9, -1000, dtype))  # as many columns count as there are distances
        least, column = relaxed(longer, price, 0.5, dist, parent, 3)
        np.testing.assert_array_equal(dist, nearest)
        np.testing.assert_array_equal(parent, np.where(shorter, 3, 7))
        assert least == nearest.min() == nearest[column]


def test_threads_do_not_change_the_result():
    cost = pairwise_cost(torch.randn(37, 24, 3), torch.randn(37, 24, 3))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = ExactOT().plan(cost)
        torch.set_num_threads(4)
        together = ExactOT().plan(cost)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone.col, together.col)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 12),
    values=st.sampled_from(["integer", "real", "rank one"]),
    seed=st.integers(0, 2**31),
)
def test_any_square_problem_is_a_certified_optimal_permutation(n, values, seed):
    g = torch.Generator().manual_seed(seed)
    cost = {
        "integer": torch.randint(-3, 4, (n, n), generator=g).double(),
        "real": torch.randn(n, n, generator=g, dtype=torch.float64),
        "rank one": torch.randn(n, 1, generator=g, dtype=torch.float64)
        * torch.randn(n, generator=g, dtype=torch.float64),
    }[values]
    plan = ExactOT().plan(cost)
    assert sorted(plan.matching().tolist()) == list(range(n))
    best = cost.numpy()[linear_sum_assignment(cost.numpy())].mean()
    assert float(plan.cost(cost)) == pytest.approx(best, rel=1e-12, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 7), m=st.integers(1, 7), zeros=st.integers(0, 3), seed=st.integers(0, 2**31))
def test_any_weighted_problem_moves_exactly_its_weights_at_the_lp_cost(n, m, zeros, seed):
    g = torch.Generator().manual_seed(seed)
    cost = torch.randn(n, m, generator=g, dtype=torch.float64)
    a, b = torch.rand(n, generator=g, dtype=torch.float64), torch.rand(m, generator=g, dtype=torch.float64)
    a[: min(zeros, n - 1)] = 0
    a, b = a / a.sum(), b / b.sum()
    plan = ExactOT().plan(cost, a, b)
    torch.testing.assert_close(plan.row_mass(), a, rtol=0, atol=1e-12)
    torch.testing.assert_close(plan.col_mass(), b, rtol=0, atol=1e-12)
    expected = linear_program(cost.numpy(), a.numpy(), b.numpy())
    assert float(plan.cost(cost)) == pytest.approx(expected, rel=1e-8, abs=1e-9)


@pytest.mark.parametrize(
    ("kwargs", "error", "says"),
    [
        ({"cost": torch.zeros(3, 3, dtype=torch.int64)}, TypeError, "floating-point"),
        ({"cost": torch.zeros(3)}, ValueError, r"shape \(…, n, m\)"),
        ({"cost": torch.zeros(2, 0, 3)}, ValueError, "n, m >= 1"),
        ({"cost": torch.full((2, 2), torch.nan)}, ValueError, "NaN"),
        ({"cost": torch.full((2, 2), -torch.inf)}, ValueError, "-inf"),
        ({"cost": torch.zeros(2, 2), "a": torch.ones(3)}, ValueError, r"a must have shape \(…, 2\)"),
        ({"cost": torch.zeros(2, 2), "a": torch.ones(2).long()}, TypeError, "a must be a floating"),
        ({"cost": torch.zeros(2, 2), "b": torch.tensor([1.5, -0.5])}, ValueError, "b must be non-negative"),
        ({"cost": torch.zeros(2, 2), "b": torch.tensor([0.0, 0.0])}, ValueError, "positive total"),
        ({"cost": torch.zeros(2, 2), "b": torch.tensor([torch.nan, 1])}, ValueError, "finite"),
        ({"cost": torch.zeros(2, 2), "a": torch.ones(2)}, ValueError, "equal totals"),
        ({"cost": torch.zeros(4, 2, 2), "a": torch.ones(3, 2) / 2}, ValueError, "batch axes"),
        ({"cost": torch.zeros(2, 2), "a": torch.ones(2, device="meta")}, ValueError, "device"),
    ],
)
def test_bad_input(kwargs, error, says):
    with pytest.raises(error, match=says):
        ExactOT().plan(**kwargs)


def test_bad_settings():
    with pytest.raises(ValueError, match="solver must be one of"):
        ExactOT(solver="simplex")
    with pytest.raises(ValueError, match="needs uniform weights"):
        ExactOT("assignment").plan(torch.rand(2, 3))
    with pytest.raises(ValueError, match="needs uniform weights"):
        ExactOT("assignment").plan(torch.rand(2, 2), torch.tensor([0.4, 0.6]))


def test_values_need_no_matrix_in_backward():
    """The gradient of exact transport touches matched pairs only."""
    x = torch.randn(2, 50, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 50, 3, dtype=torch.float64)
    ExactOT()(x, y).sum().backward()
    plan = mbot.ExactOT().plan(pairwise_cost(x.detach(), y))
    expected = 2 * (x.detach() - y.gather(1, plan.col[..., None].expand(-1, -1, 3))) / 50
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("transport", [ExactOT(), PartialOT(0.5), EntropicOT(1e300)], ids=repr)
def test_costs_whose_sums_overflow_are_refused(transport):
    """A search for a shortest path among infinite distances never ended."""
    cost = (torch.rand(1, 20, 20, dtype=torch.float64) * 2 - 1) * 1.7e308
    with pytest.raises(ValueError, match=r"at most 1e\+300 in magnitude, \+inf apart; its largest is 1\.\d+e\+308"):
        transport.plan(cost)
    cost[0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="at most 1e"):
        transport.plan(cost)


@pytest.mark.parametrize("value", [0.0, 5.0, -5.0, 1e17, -1e17, 1e300, 1e-30])
@pytest.mark.parametrize("transport", [ExactOT(), PartialOT(2 / 3)], ids=repr)
def test_forbidden_pairs_are_avoided_at_any_scale_of_the_costs(transport, value):
    cost = torch.full((2, 3, 3), torch.inf, dtype=torch.float64)
    cost[0].fill_diagonal_(value)
    cost[1] = cost[0].flip(1)
    cost[1, 0, 0] = value * (1 - 1e-9)  # nearly as cheap as what it forbids
    plan = transport.plan(cost)
    assert float(plan.to_dense()[cost == torch.inf].abs().max()) == 0
    torch.testing.assert_close(
        plan.cost(cost), torch.full((2,), value * getattr(transport, "mass", 1), dtype=torch.float64)
    )
    assert bool(plan.converged.all())
