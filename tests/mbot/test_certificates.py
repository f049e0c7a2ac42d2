"""Entropic plans are held to what they claim: marginals, mass, optimality; and large costs are forbidden pairs."""

import warnings

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import mbot
from mbot import EntropicOT, PartialOT, UnbalancedOT

INF = float("inf")
KINDS = st.sampled_from(["balanced", "partial", "unbalanced"])


def problem(n, m, seed, dtype, weighted, forbidden):
    """Costs, weights of one total, and a mask of forbidden pairs that leaves a plan: the north-west corner's."""
    g = torch.Generator().manual_seed(seed)
    cost = torch.randn(n, m, generator=g, dtype=torch.float64).to(dtype)
    a, b = torch.ones(n, dtype=torch.float64), torch.ones(m, dtype=torch.float64)
    if weighted:
        a, b = (torch.rand(k, generator=g, dtype=torch.float64) + 0.05 for k in (n, m))
    a, b = a / a.sum(), b / b.sum()
    ends_a, ends_b = a.cumsum(0), b.cumsum(0)
    corner = torch.minimum(ends_a[:, None], ends_b) - torch.maximum((ends_a - a)[:, None], ends_b - b) > -1e-9
    mask = (torch.rand(n, m, generator=g) < forbidden) & ~corner
    order = torch.randperm(n, generator=g)
    return cost, a[order], b, mask[order]


def transport(kind, reg, share, tau, dtype):
    tol = 1e-9 if dtype == torch.float64 else 1e-6
    return {
        "balanced": EntropicOT(reg, tol=tol),
        "partial": PartialOT(share, reg=reg, tol=tol),
        "unbalanced": UnbalancedOT(reg, tau, tol=tol),
    }[kind]


def held_to(t, plan, cost, a, b, tol):
    """The plan's marginals and the optimality conditions, on the plan and its potentials."""
    mass, (f, g) = plan.to_dense().double(), plan.potentials
    rows, cols = mass.sum(1), mass.sum(0)
    assert bool((mass >= 0).all())
    assert bool((mass[cost == INF] == 0).all())
    if isinstance(t, EntropicOT):
        assert float((rows - a).abs().sum()) <= tol
        assert float((cols - b).abs().sum()) <= tol
    elif isinstance(t, PartialOT):
        assert float(mass.sum()) == pytest.approx(t.mass, rel=tol)
        for sums, weight, potential in ((rows, a, f), (cols, b, g)):
            assert float((sums - weight).clamp_min(0).sum()) <= tol
            open_ = sums < weight * (1 - 1e-4) - tol  # what is not full has the largest potential of its side
            if bool(open_.any()):
                assert float(potential[open_].min()) >= float(potential.max()) - 1e-4 * t.reg
    else:
        for sums, weight, potential in ((rows, a, f), (cols, b, g)):
            wanted = torch.where(sums > 0, weight * (-potential.double() / t.reg_marginal).exp(), 0)
            assert float((sums - wanted).abs().sum()) <= (1 + t.reg / t.reg_marginal) * 2 * tol * float(mass.sum())
    reference = 1.0 if isinstance(t, PartialOT) else a[:, None] * b
    gibbs = reference * ((f.double()[:, None] + g.double() - cost.double()) / t.reg).exp()
    used = mass > 0
    torch.testing.assert_close(mass[used], gibbs[used], rtol=1e-6 if cost.dtype == torch.float64 else 5e-3, atol=1e-9)


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 9),
    m=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    weighted=st.booleans(),
    forbidden=st.sampled_from([0.0, 0.5]),
    kind=KINDS,
    reg=st.sampled_from([0.01, 0.05, 0.5, 5.0, 500.0]),
    share=st.sampled_from([0.01, 0.3, 0.6, 0.999, 1.0]),
    tau=st.sampled_from([0.01, 1.0, 1e4]),
)
@example(  # too slow for rounds alone
    n=4, m=4, seed=0, dtype=torch.float32, weighted=False, forbidden=0.0, kind="partial", reg=0.05, share=1.0, tau=1.0
)
def test_every_plan_is_what_it_claims(n, m, seed, dtype, weighted, forbidden, kind, reg, share, tau):
    cost, a, b, mask = problem(n, m, seed, dtype, weighted, forbidden)
    cost[mask] = INF
    if kind == "unbalanced":
        cost = cost.abs()  # a gain would be taken exp(gain / tau) times
    t = transport(kind, reg, share, tau, dtype)
    plan = t.plan(cost, a if weighted else None, b if weighted else None)
    assert bool(plan.converged)
    assert float(plan.error) <= t.tol * (1 + 1e-6) + 1e-6 * (dtype == torch.float32)
    held_to(t, plan, cost, a, b, 4 * t.tol + 2e-6 * (dtype == torch.float32))


@pytest.mark.parametrize("mass", [0.6, 0.999, 1 - 1e-9])
@pytest.mark.parametrize(("n", "m"), [(2, 1), (3, 1), (4, 1), (1, 4), (3, 2), (32, 32)])
def test_partial_plans_move_their_mass_where_every_row_is_full(n, m, mass):
    cost = torch.randn(20, n, m, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    for reg in (0.1, 5.0):
        plan = PartialOT(mass, reg=reg).plan(cost)
        assert bool(plan.converged.all())
        torch.testing.assert_close(plan.total_mass(), torch.full((20,), mass).double(), rtol=2e-6, atol=0)


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(2, 9),
    m=st.integers(2, 9),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    weighted=st.booleans(),
    kind=KINDS,
    large=st.sampled_from([1e9, 1e12, 1e20, 3e38, 1e300]),
    spoiled=st.booleans(),
)
@example(n=6, m=7, seed=192, dtype=torch.float32, weighted=True, kind="partial", large=1e9, spoiled=False)  # 869 rounds
def test_large_costs_are_forbidden_pairs_where_they_can_be_avoided(n, m, seed, dtype, weighted, kind, large, spoiled):
    cost, a, b, mask = problem(n, m, seed, dtype, weighted, 0.5)
    large = min(large, 0.99 * torch.finfo(dtype).max)
    t = transport(kind, 0.05, 0.7, 1.0, dtype)
    if spoiled and kind == "unbalanced":
        mask[0] = True
    forbidden, finite = cost.clone(), cost.clone()
    forbidden[mask] = INF
    finite[mask] = large * (1 - 0.5 * torch.rand(n, m, generator=torch.Generator().manual_seed(1))).to(dtype)[mask]
    weights = (a, b) if weighted else (None, None)
    with warnings.catch_warnings():  # some entropic partial problems take longer than they may, and say so
        warnings.simplefilter("ignore" if kind == "partial" else "error", mbot.ConvergenceWarning)
        expected, plan = t.plan(forbidden, *weights), t.plan(finite, *weights)
    assert bool(plan.converged) == bool(expected.converged)
    assert int(plan.iterations) == int(expected.iterations)
    torch.testing.assert_close(plan.to_dense(), expected.to_dense(), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(plan.penalty, expected.penalty, rtol=1e-5, atol=1e-6)
    assert float(plan.to_dense()[mask].sum()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("large", [1e9, 1e20, 1e38])
def test_the_way_round_large_costs(large, dtype):
    """Only the diagonal is free of them, though other pairs cost little."""
    never = large
    cost = torch.tensor(
        [[0.2, never, 0.8, never], [0.2, 0.3, 0.2, never], [1.0, never, 0.3, never], [never, never, never, 0.6]],
        dtype=dtype,
    )
    plan = EntropicOT(0.05).plan(cost)
    assert float(plan.cost(cost)) == pytest.approx(0.35, abs=1e-4)
    assert bool(plan.converged)


@pytest.mark.parametrize("kind", ["balanced", "partial"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_costs_that_cannot_be_avoided_are_paid_or_not_certified(dtype, kind):
    cost = torch.rand(4, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))
    for large in (1e5, 1e7, 1e9, 1e12, 1e20):
        finite = cost.clone()
        finite[:2, 1:] = large  # two rows and one cheap column: a quarter of the mass has to pay
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", mbot.ConvergenceWarning)
            t = EntropicOT(0.05) if kind == "balanced" else PartialOT(1 - 1e-6, reg=0.05)
            plan = t.plan(finite)
        if bool(plan.converged):
            torch.testing.assert_close(plan.row_mass(), torch.full((4,), 0.25, dtype=dtype), rtol=1e-4, atol=0)
            assert float(plan.cost(finite)) == pytest.approx(0.25 * large, rel=1e-4)
            assert large <= 1e9
        else:
            assert large >= 1e9  # potentials of 1e9 / 0.05 have no more digits
            assert float(plan.error) > 1e-6


def test_levels_of_large_costs_are_tried_from_the_top():
    """Some of the 1e9 are needed, the 1e18 are not."""
    cost = torch.rand(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cost[:2, 1:] = 1e9
    cost[0, 3] = cost[1, 2] = 1e18
    plan = EntropicOT(0.05).plan(cost)
    assert bool(plan.converged)
    assert float(plan.cost(cost)) == pytest.approx(0.25e9, rel=1e-5)
    assert float(plan.to_dense()[[0, 1], [3, 2]].sum()) == 0


def test_pairs_that_leave_no_plan_are_refused():
    cost = torch.rand(4, 4, dtype=torch.float64)
    cost[:2, 1:] = INF
    for t in (EntropicOT(0.1), PartialOT(0.9, reg=0.1)):
        with pytest.raises(ValueError, match="no way for a share"):
            t.plan(cost)
    assert bool(PartialOT(0.75, reg=0.1, tol=1e-9).plan(cost).converged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_of_weight_zero_may_cost_anything(dtype):
    cost = torch.rand(5, 6, dtype=dtype)
    a, b = torch.ones(5), torch.ones(6)
    a[2] = b[4] = 0
    a, b = a / a.sum(), b / b.sum()
    keep_a, keep_b = a > 0, b > 0
    spoiled = cost.clone()
    spoiled[2], spoiled[:, 4] = -3e30, 1e35
    for kind in ("balanced", "partial", "unbalanced"):
        t = transport(kind, 0.1, 0.6, 1.0, dtype)
        expected = t.plan(cost[keep_a][:, keep_b], a[keep_a], b[keep_b])
        plan = t.plan(spoiled, a, b)
        torch.testing.assert_close(plan.to_dense()[keep_a][:, keep_b], expected.to_dense(), rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(t.value(spoiled, a, b), t.value(cost, a, b), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tau", [1e2, 1e4, 1e7, 1e12])
@pytest.mark.parametrize("total", [0.01, 2.0, 30.0])
def test_unequal_totals_and_stiff_marginals(tau, total):
    """The plan tends to the balanced one between weights scaled to the geometric mean of the totals."""
    cost = torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b = torch.full((4,), total / 4, dtype=torch.float64), torch.full((3,), 1 / 3, dtype=torch.float64)
    t = UnbalancedOT(0.1, tau)
    plan = t.plan(cost, a, b)
    assert int(plan.iterations) < 500
    assert float(plan.total_mass()) == pytest.approx(total**0.5, rel=20 / tau)
    f, g = plan.potentials
    if tau <= 1e7:
        torch.testing.assert_close(plan.row_mass(), a * (-f / tau).exp(), rtol=1e-5, atol=0)
        torch.testing.assert_close(plan.col_mass(), b * (-g / tau).exp(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("offset", [1e6, -1e6])
def test_an_offset_of_the_costs_changes_no_plan(offset):
    cost = torch.rand(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t in (EntropicOT(0.1, tol=1e-9), PartialOT(0.6, reg=0.1, tol=1e-9)):
        torch.testing.assert_close(t.plan(cost + offset).to_dense(), t.plan(cost).to_dense(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_whose_costs_overflow_are_refused(dtype):
    scale = 0.1 * torch.finfo(dtype).max
    x, y = (torch.rand(16, 2, dtype=dtype, generator=torch.Generator().manual_seed(k)) * scale for k in (0, 1))
    couplings = [mbot.SemidiscreteCoupling(steps=5), mbot.WeightedCoupling(1.0, cost="dot")]
    couplings += [mbot.WeightedCoupling(1.0, cost=cost, correction="sinkhorn") for cost in ("dot", "sqeuclidean")]
    for coupling in couplings:
        with pytest.raises(ValueError, match=r"fit|finite"):
            coupling(x, y)
    with pytest.raises(ValueError, match="do not fit into"):
        mbot.SemidiscreteCoupling(steps=5).fit(y)


def test_a_sampler_whose_regularisation_drowns_in_rounding_says_so():
    x, y = (1e10 * torch.rand(8, 2, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    with pytest.warns(mbot.ConvergenceWarning, match="raise reg"):
        mbot.compat.OTPlanSampler("sinkhorn").get_map(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("others", [0, 1])
def test_unbalanced_problems_whose_pairs_are_all_forbidden_have_an_empty_plan(dtype, others):
    cost = torch.rand(1 + others, 3, 4, dtype=dtype)
    cost[0] = INF
    plan = UnbalancedOT(0.5, 1.0).plan(cost)
    assert bool(plan.converged.all())
    assert float(plan.error[0]) == float(plan.total_mass()[0]) == 0
    assert bool((plan.total_mass()[1:] > 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [10.0, 100.0, 1e3, 1e5])
def test_unbalanced_plans_that_vanish_converge(dtype, scale):
    """Masses down to nothing, at potentials of many regularisations."""
    g = torch.Generator().manual_seed(0)
    x, y = (scale * torch.randn(2, size, 3, generator=g).to(dtype) for size in (7, 9))
    plan = UnbalancedOT(0.5, 1.0, tol=1e-8).plan(mbot.pairwise_cost(x, y))
    assert bool(plan.converged.all())
    assert bool((plan.iterations < 500).all())


@settings(max_examples=60, deadline=None)
@given(
    kind=KINDS,
    problems=st.integers(1, 3),
    n=st.integers(1, 8),
    m=st.integers(1, 8),
    power=st.floats(8, 30),
    costs=st.sampled_from(["even", "close", "wide", "negative", "equal"]),
    tau=st.sampled_from([0.3, 1.0, 1e4, 1e10]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_costs_that_are_huge_against_reg(kind, problems, n, m, power, costs, tau, dtype, seed):
    """Plans and certificates are finite, and no certificate claims more than the plan holds."""
    cost = torch.rand(problems, n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cost = {
        "even": cost, "close": 1 + 1e-3 * cost, "wide": cost**8, "negative": cost - 0.5, "equal": torch.ones_like(cost)
    }[costs]  # fmt: skip
    cost = (0.3 * 10**power * cost).to(dtype)
    t = {
        "balanced": EntropicOT(0.3, max_iter=60),
        "partial": PartialOT(0.6, reg=0.3, max_iter=60),
        "unbalanced": UnbalancedOT(0.3, tau, max_iter=60),
    }[kind]
    if kind == "unbalanced" and float(cost.min()) < -800 * (0.3 + 2 * tau):
        with pytest.raises(ValueError, match="may exceed"):
            t.plan(cost)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mbot.ConvergenceWarning)
        try:
            plan = t.plan(cost)
        except ValueError:
            assume(kind == "unbalanced" and float(cost.min()) < -80 * (0.3 + 2 * tau))
        value = t.value(cost)
    mass = plan.to_dense().double()
    for part in (mass, plan.error, plan.penalty, value, *plan.potentials):
        assert bool(part.isfinite().all())
    assert bool((plan.error <= t.tol * 1.01)[plan.converged].all())
    rows, cols = mass.sum(2), mass.sum(1)
    if kind == "balanced":
        off = torch.maximum((rows - 1 / n).abs().sum(1), (cols - 1 / m).abs().sum(1))
    elif kind == "partial":
        over = (rows - 1 / n).clamp_min(0).sum(1) + (cols - 1 / m).clamp_min(0).sum(1)
        off = torch.maximum(over, (rows.sum(1) - 0.6).abs())
    else:
        off = torch.zeros(problems, dtype=torch.float64)  # any mass is one of a problem with other weights
    assert bool((off <= 2 * plan.error + 1e-5).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("large", [1e16, 1e20, 1e30])
def test_plans_at_a_reg_that_drowns_are_those_of_a_larger_one(dtype, large):
    """Not certified, and next to an exact plan."""
    cost = torch.rand(3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype) * large
    for t, exact in ((EntropicOT(0.3), mbot.ExactOT()), (PartialOT(0.5, reg=0.3), PartialOT(0.5))):
        with pytest.warns(mbot.ConvergenceWarning, match="raise reg"):
            plan = t.plan(cost)
        assert not bool(plan.converged.any())
        assert bool((plan.error >= 1e-3).all() & (plan.error <= 1).all())
        torch.testing.assert_close(plan.cost(cost), exact.plan(cost).cost(cost), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("large", [1e4, 1e10, 1e30])
def test_unbalanced_plans_of_huge_costs_are_empty_and_their_value_is_the_price_of_all_mass(dtype, large):
    cost = large * (1 + torch.rand(2, 4, 3, dtype=dtype, generator=torch.Generator().manual_seed(0)))
    t = UnbalancedOT(0.3, 1.0)
    plan = t.plan(cost)
    assert bool(plan.converged.all())
    assert float(plan.to_dense().sum()) == 0
    torch.testing.assert_close(t.value(cost), torch.full((2,), 2.3, dtype=dtype))
    with pytest.raises(ValueError, match="may exceed"):
        t.plan(-cost)


def test_costs_beyond_any_number_of_regs_are_refused():
    cost = torch.rand(3, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="at most 1e\\+300 times reg"):
        EntropicOT(1e-200).plan(cost * 1e200)
