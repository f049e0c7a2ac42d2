"""Exact and entropic partial transport: the papers' toys, linear programming, POT where POT is right."""

import threading
from itertools import combinations, permutations

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, linprog

import mbot
from mbot import ExactOT, PartialOT, pairwise_cost


def linear_program(cost, a, b, mass):
    n, m = cost.shape
    rows, cols = np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))
    solved = linprog(
        cost.ravel(), A_ub=np.vstack([rows, cols]), b_ub=np.concatenate([a, b]), A_eq=np.ones((1, n * m)), b_eq=[mass]
    )
    assert solved.success
    return solved.fun


def line(*numbers):
    return torch.tensor([[0.0, float(i)] for i in numbers], dtype=torch.float64)


SHIFT = torch.tensor([1.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("mass", "pairs", "squared", "euclidean"),
    [
        (1, {(0, 0): 1 / 3, (1, 1): 1 / 3, (2, 2): 1 / 3}, 5, 5**0.5),
        (2 / 3, {(1, 0): 1 / 3, (2, 1): 1 / 3}, 4 / 3, 2 * 2**0.5 / 3),
        (1 / 2, {(1, 0): 1 / 6, (2, 0): 1 / 6, (2, 1): 1 / 6}, 5 / 6, (2 * 2**0.5 + 1) / 6),
        (1 / 3, {(2, 0): 1 / 3}, 1 / 3, 1 / 3),
    ],
)
def test_m_pot_figure(mass, pairs, squared, euclidean):
    """x1, x2, x3 against y3, y4, y5 (mbot.md 6.2): all four optima are unique, so plans are compared as well."""
    x, y = line(1, 2, 3), line(3, 4, 5) + SHIFT
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for (i, j), amount in pairs.items():
        expected[i, j] = amount
    for cost, value in (("sqeuclidean", squared), ("euclidean", euclidean)):
        matrix = pairwise_cost(x, y, cost)
        plan = PartialOT(mass).plan(matrix)
        torch.testing.assert_close(plan.to_dense(), expected, rtol=0, atol=1e-12)
        assert float(plan.cost(matrix)) == pytest.approx(value, abs=1e-12)
        assert float(PartialOT(mass)(x, y, cost=cost)) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_brute_force_over_all_matchings(n):
    cost = torch.randn(3, n, n, dtype=torch.float64)
    for k in range(1, n + 1):
        best = torch.full((3,), torch.inf, dtype=torch.float64)
        for rows in combinations(range(n), k):
            for cols in permutations(range(n), k):
                best = torch.minimum(best, cost[:, rows, cols].sum(-1) / n)
        plan = PartialOT(k / n).plan(cost)
        torch.testing.assert_close(plan.cost(cost), best, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(plan.total_mass(), torch.full((3,), k / n, dtype=torch.float64))


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(1, 9),
    m=st.integers(1, 9),
    share=st.floats(0.0, 1.0),
    kind=st.sampled_from(["integer", "real", "negative", "constant"]),
    weights=st.sampled_from(["uniform", "random", "totals differ"]),
    seed=st.integers(0, 2**31),
)
def test_any_problem_against_linear_programming(n, m, share, kind, weights, seed):
    g = torch.Generator().manual_seed(seed)
    cost = {
        "integer": torch.randint(-3, 4, (n, m), generator=g).double(),
        "real": torch.rand(n, m, generator=g, dtype=torch.float64),
        "negative": -1 - torch.rand(n, m, generator=g, dtype=torch.float64),
        "constant": torch.zeros(n, m, dtype=torch.float64),
    }[kind]
    a = b = None
    wa, wb = torch.full((n,), 1 / n, dtype=torch.float64), torch.full((m,), 1 / m, dtype=torch.float64)
    if weights != "uniform":
        wa, wb = (
            torch.rand(n, generator=g, dtype=torch.float64) + 0.01,
            torch.rand(m, generator=g, dtype=torch.float64) + 0.01,
        )
        if weights == "random":
            wb = wb * (wa.sum() / wb.sum())
        a, b = wa, wb
    mass = share * float(min(wa.sum(), wb.sum()))
    plan = PartialOT(mass).plan(cost, a, b)
    assert float(plan.total_mass()) == pytest.approx(mass, rel=1e-9, abs=1e-12)
    assert bool((plan.row_mass() <= wa + 1e-9).all())
    assert bool((plan.col_mass() <= wb + 1e-9).all())
    expected = linear_program(cost.numpy(), wa.numpy(), wb.numpy(), mass)
    assert float(plan.cost(cost)) == pytest.approx(expected, rel=1e-7, abs=1e-8)


@pytest.mark.parametrize("n", [49, 98, 100, 196, 200])
def test_full_mass_is_exact_ot_bit_for_bit_where_pot_raises_infeasible(n):
    cost = pairwise_cost(torch.randn(2, n, 3), torch.randn(2, n, 3))
    full = PartialOT(mass=1.0).plan(cost)
    exact = ExactOT().plan(cost)
    assert torch.equal(full.cost(cost), exact.cost(cost))
    assert torch.equal(full.to_dense(), exact.to_dense())
    weights = torch.full((n,), 1 / n)
    torch.testing.assert_close(PartialOT(mass=1.0).plan(cost, weights, weights).cost(cost), exact.cost(cost))


def test_no_mass_is_the_zero_plan():
    x, y = torch.randn(2, 4, 3, requires_grad=True), torch.randn(2, 4, 3)
    for transport in (PartialOT(0), PartialOT(0.0, reg=0.1)):
        plan = transport.plan(pairwise_cost(x.detach(), y))
        assert float(plan.to_dense().abs().sum()) == 0
        value = transport(x, y)
        assert value.tolist() == [0, 0]
        value.sum().backward()
        assert float(x.grad.abs().sum()) == 0


@pytest.mark.parametrize("n", [64, 200])
@pytest.mark.parametrize("mass", [0.123, 0.5, 0.9])
@pytest.mark.parametrize("d", [2, 50])
def test_against_pot_at_size(n, mass, d):
    g = torch.Generator().manual_seed(n)
    cost = pairwise_cost(*(torch.randn(3, n, d, generator=g, dtype=torch.float64) for _ in range(2)))
    uniform = np.full(n, 1 / n)
    value = PartialOT(mass).plan(cost).cost(cost)
    for p in range(3):
        expected = ot.partial.partial_wasserstein2(uniform, uniform, cost[p].numpy(), m=mass)
        assert float(value[p]) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("n", [2, 16, 20, 21, 33, 71])
@pytest.mark.parametrize("kind", ["uniform", "ties", "plane", "line", "outliers"])
def test_matchings_of_any_number_of_pairs(n, kind):
    """With and without an auction; rows of blocks and rests; few pairs and nearly all."""
    from mbot.kernels.cardinality import match

    random = np.random.default_rng(n)
    x, y = random.normal(size=(3, n, 1, 2)), random.normal(size=(3, 1, n, 2))
    cost = {
        "uniform": random.random((3, n, n)) - 7, "ties": random.integers(0, 4, (3, n, n)).astype(np.float32),
        "plane": ((x - y) ** 2).sum(-1), "line": np.abs(x - y)[..., 0],
        "outliers": np.where(random.random((3, n, n)) < 0.1, 1e6, random.random((3, n, n))),
    }[kind]  # fmt: skip
    for pairs in {1, n // 3 or 1, n * 4 // 5, n - 1}:
        columns, f, g = match(cost.ravel(), n, pairs, more=True, capped=True)
        assert (f[:, :, None] + g[:, None] <= cost + 1e-12 * np.abs(cost).max()).all()
        for extra, column in enumerate(columns):
            q = n - pairs - extra
            for p in range(3):
                padded = np.pad(cost[p].astype(np.float64), (0, q))
                padded[n:, n:] = 1e8
                rows = (column[p] >= 0).nonzero()[0]
                assert len(set(column[p, rows])) == len(rows) == pairs + extra
                value = cost[p, rows, column[p, rows]].sum(dtype=np.float64)
                assert value == pytest.approx(padded[linear_sum_assignment(padded)].sum(), rel=1e-12, abs=1e-12)
                dual = f[p].sum() + g[p].sum() - q * (f[p].max() + g[p].max())
                assert value == pytest.approx(dual, rel=1e-12, abs=1e-14 * n * float(np.abs(cost).max()))


def test_the_value_is_convex_and_piecewise_linear_in_the_mass():
    cost = pairwise_cost(torch.randn(7, 2, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64))
    masses = torch.linspace(0, 1, 57, dtype=torch.float64)  # eight steps between two bends
    values = torch.stack([PartialOT(float(s)).plan(cost).cost(cost) for s in masses])
    slopes = values.diff()
    assert bool((slopes.diff() > -1e-12).all())
    for bend in range(7):
        inside = slopes[8 * bend : 8 * bend + 8]
        torch.testing.assert_close(inside, inside[:1].expand(8), rtol=1e-6, atol=1e-9)


def test_forbidden_pairs():
    cost = torch.rand(6, 6, dtype=torch.float64)
    cost[:4, :4] = torch.inf  # at most 4 pairs exist
    plan = PartialOT(4 / 6).plan(cost)
    assert float(plan.to_dense()[:4, :4].sum()) == 0
    assert bool(torch.isfinite(plan.cost(cost)))
    with pytest.raises(ValueError, match="forbidden"):
        PartialOT(5 / 6).plan(cost)
    uneven = torch.rand(2, 3, dtype=torch.float64)
    uneven[0] = torch.inf
    assert float(PartialOT(0.5).plan(uneven).to_dense()[0].sum()) == 0


@pytest.mark.parametrize("reg", [0.0, 0.1])
def test_mass_is_checked_against_the_weights(reg):
    cost = torch.rand(3, 3)
    with pytest.raises(ValueError, match=r"mass must lie in \[0, 1\], the smaller total weight; got 1.2"):
        PartialOT(1.2, reg=reg).plan(cost)
    with pytest.raises(ValueError, match=r"\[0, 0.6\]"):
        PartialOT(0.7, reg=reg).plan(cost, torch.full((3,), 0.2))
    for bad in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="mass must be a finite number >= 0"):
            PartialOT(bad, reg=reg)
    with pytest.raises(ValueError, match="reg must be a finite number >= 0"):
        PartialOT(0.5, reg=-1.0)


# --- entropic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(8, 8), (6, 9)])
@pytest.mark.parametrize("mass", [0.3, 0.8, 0.99])
@pytest.mark.parametrize("reg", [1.0, 0.1, 0.02])
def test_entropic_partial_against_pot_s_log_domain_solver(n, m, mass, reg):
    g = torch.Generator().manual_seed(n)
    cost = torch.rand(2, n, m, generator=g, dtype=torch.float64)
    a, b = torch.rand(n, generator=g, dtype=torch.float64) + 0.1, torch.rand(m, generator=g, dtype=torch.float64) + 0.1
    a, b = a / a.sum(), b / b.sum()
    plan = PartialOT(mass, reg=reg, tol=1e-12).plan(cost, a, b).to_dense()
    for p in range(2):
        expected = ot.partial.entropic_partial_wasserstein(
            a.numpy(),
            b.numpy(),
            cost[p].numpy(),
            reg=reg,
            m=mass,
            numItermax=20_000,
            stopThr=1e-9,  # its plan is then right to a thousandth of the tolerances below
            method="sinkhorn_log",
        )
        torch.testing.assert_close(plan[p], torch.from_numpy(expected), rtol=1e-4, atol=1e-6)


def test_entropic_partial_where_pot_s_default_returns_nan():
    x = torch.linspace(0, 10, 20, dtype=torch.float64)[:, None]
    cost = pairwise_cost(x, x + 1)
    plan = PartialOT(0.5, reg=0.01).plan(cost)
    assert bool(torch.isfinite(plan.to_dense()).all())
    assert float(plan.total_mass()) == pytest.approx(0.5, rel=1e-6)
    exact = PartialOT(0.5).plan(cost)
    assert float(plan.cost(cost)) == pytest.approx(float(exact.cost(cost)), abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mass", [0.2, 0.8, 1.0])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_entropic_partial_keeps_its_constraints(dtype, mass, scale):
    cost = scale * torch.rand(5, 30, 40, dtype=dtype)
    plan = PartialOT(mass, reg=0.01 * scale).plan(cost)
    torch.testing.assert_close(plan.total_mass().double(), torch.full((5,), mass).double(), rtol=1e-5, atol=0)
    assert float(plan.row_mass().max()) <= 1 / 30 + 1e-6
    assert float(plan.col_mass().max()) <= 1 / 40 + 1e-6


def test_the_entropic_value_is_the_minimum_of_its_objective():
    cost = torch.rand(6, 6, dtype=torch.float64)
    transport = PartialOT(0.6, reg=0.1, tol=1e-12)
    plan = transport.plan(cost).to_dense()
    value = float(transport.value(cost))
    assert value == pytest.approx(float((plan * cost).sum() + 0.1 * (plan * plan.log()).sum()), rel=1e-9)
    other = mbot.PartialOT(0.6).plan(cost).to_dense()
    for share in (0.01, 0.3):
        mixed = (1 - share) * plan + share * other  # feasible
        assert float((mixed * cost).sum() + 0.1 * mixed.xlogy(mixed).sum()) > value


def test_entropic_plans_in_float32_with_columns_out_of_reach():
    """The scaled kernel of some columns underflows; their share of the mass is too small to matter."""
    g = torch.Generator().manual_seed(66)
    x, y = (torch.randn(64, 64, 2, generator=g) for _ in range(2))
    cost = pairwise_cost(x, y + 1)[[24, 32, 38, 49]]
    plan = PartialOT(0.7, reg=0.05).plan(cost)
    assert bool(plan.converged.all())
    torch.testing.assert_close(plan.total_mass(), torch.full((4,), 0.7), rtol=2e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e5])
def test_ties_that_rounding_breaks_do_not_keep_the_kernel_from_ending(scale):
    """A path through the rows that stay unmatched once came round to them again, shorter by a last digit."""

    def solve():
        for seed in range(400):
            g = torch.Generator().manual_seed(seed)
            x, y = (torch.randn(1, 16, 5, generator=g, dtype=torch.float64).round() * scale for _ in range(2))
            cost = x.square().sum(-1)[..., None] + y.square().sum(-1)[:, None] - 2 * x @ y.mT
            for pairs in (4.0, 12.8):
                plan = PartialOT(pairs / 16).plan(cost)
                assert bool(plan.converged)
        ended.append(True)

    ended = []
    thread = threading.Thread(target=solve, daemon=True)
    thread.start()
    thread.join(60)
    assert ended


@pytest.mark.parametrize("mass", [1e-15, 1e-12, 1e-8])
def test_a_mass_that_is_small_against_the_weights_is_precise(mass):
    g = torch.Generator().manual_seed(0)
    cost = torch.rand(4, 6, generator=g, dtype=torch.float64) + 0.1
    a, b = (torch.rand(size, generator=g, dtype=torch.float64) for size in (4, 6))
    a, b = a / a.sum(), b / b.sum()
    plan = PartialOT(mass).plan(cost, a, b)
    assert float(plan.total_mass()) == pytest.approx(mass, rel=1e-12, abs=0)
    assert float(plan.cost(cost)) == pytest.approx(mass * float(cost.min()), rel=1e-12, abs=0)
    f, g = plan.potentials  # nothing is full, so all are the largest
    assert torch.equal(f, f[:1].expand(4))
    assert torch.equal(g, g[:1].expand(6))


def test_the_rest_of_nearly_all_mass_stays_however_little_it_is():
    a, b = torch.tensor([1.0, 9e-6], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
    cost = torch.tensor([[1.0], [1e6]], dtype=torch.float64)
    assert float(PartialOT(1.0).value(cost, a, b)) == pytest.approx(1.0, rel=1e-9)
    forbidden = torch.tensor([[1.0], [torch.inf]], dtype=torch.float64)
    assert float(PartialOT(1.0).value(forbidden, a, b)) == pytest.approx(1.0, rel=1e-9)
