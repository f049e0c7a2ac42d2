"""Pairs drawn from plans of every kind: the right law, the right samples, and BoMb's permutations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mbot
from mbot import BoMbCoupling, EntropicOT, ExactOT, IndependentCoupling, OTCoupling, PartialOT, UnbalancedOT
from mbot.couplings.drawing import permutations, sources_of, with_replacement
from mbot.solvers import drawing

DRAWS = 2000


def clouds(n, m, d=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(m, d, generator=g) + 0.5


def frequency(source, target, n, m):
    return torch.zeros(n, m).index_put_((source, target), torch.tensor(1.0), accumulate=True)


@pytest.mark.parametrize("sparse", [False, True])
def test_sources_follow_their_column(sparse):
    dense = torch.tensor([[0.1, 0.0, 0.3], [0.1, 0.0, 0.0], [0.0, 0.2, 0.3]])
    plan = mbot.Plan(dense, (3, 3))
    if sparse:  # padded, in no order, with one cell in two parts
        entries = [(2, 2, 0.3), (0, 0, 0.1), (0, 0, 0.0), (2, 1, 0.2), (1, 0, 0.06), (0, 2, 0.3), (1, 0, 0.04)]
        row, col, mass = (torch.tensor(part) for part in zip(*entries, strict=True))
        plan = mbot.Plan(mass, (3, 3), row, col)
    target = torch.arange(3).repeat(DRAWS)
    source = sources_of(plan, target, torch.Generator().manual_seed(0))
    expected = dense / dense.sum(0)
    seen = frequency(source, target, 3, 3) / DRAWS
    torch.testing.assert_close(seen, expected, atol=4 / DRAWS**0.5, rtol=0)
    assert bool((seen[expected == 0] == 0).all())
    source, target = with_replacement(plan, 3 * DRAWS, torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        frequency(source, target, 3, 3) / (3 * DRAWS), dense / dense.sum(), atol=4 / DRAWS**0.5, rtol=0
    )


@given(st.integers(1, 100), st.integers(1, 9), st.booleans(), st.integers(0, 2**31))
def test_compiled_draws_are_those_of_a_device(n, m, double, seed):
    """Columns with holes, whole blocks without mass, and random numbers at the ends of their range."""
    g = torch.Generator().manual_seed(seed)
    mass = torch.rand(n, m, generator=g, dtype=torch.float64 if double else torch.float32)
    mass *= torch.rand(n, m, generator=g) < 0.3
    mass[int(torch.randint(n, (), generator=g))] += 0.5
    target = torch.randint(m, (50,), generator=g)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    uniform = torch.cat((ends, torch.rand(48, generator=g, dtype=torch.float64)))
    source = drawing.rows_of_columns(mass, target, uniform)
    assert source.equal(drawing._rows_of_columns(mass, target, uniform))
    assert bool((mass[source, target] > 0).all())
    share = mass.double().sum(0) * 3
    assert drawing.rounded(share, uniform[-1:]).equal(drawing._rounded(share, uniform[-1:]))


def test_permutations_have_the_plan_s_law_exactly():
    x, y = clouds(5, 5)
    plan = EntropicOT(reg=1.0).plan(mbot.pairwise_cost(x, y).expand(DRAWS, 5, 5))
    source = permutations(plan, torch.Generator().manual_seed(0))
    assert bool((source.sort(-1).values == torch.arange(5)).all())
    seen = frequency(source.flatten(), torch.arange(5).repeat(DRAWS), 5, 5) / DRAWS
    torch.testing.assert_close(seen, 5 * plan.to_dense()[0], atol=4 / DRAWS**0.5, rtol=0)


def test_mass_that_a_plan_leaves_is_paired_independently():
    """Two of four pairs are kept; the two others are paired with each other either way, half of the time each."""
    dense = torch.zeros(DRAWS, 4, 4)
    dense[:, 0, 1] = dense[:, 3, 0] = 0.25
    source = permutations(mbot.Plan(dense, (4, 4)), torch.Generator().manual_seed(0))
    seen = frequency(source.flatten(), torch.arange(4).repeat(DRAWS), 4, 4) / DRAWS
    expected = torch.tensor([[0, 1, 0, 0], [0, 0, 0.5, 0.5], [0, 0, 0.5, 0.5], [1, 0, 0, 0]])
    torch.testing.assert_close(seen, expected, atol=4 / DRAWS**0.5, rtol=0)


def test_entropic_pairs_follow_the_plan_and_every_x1_comes_once():
    x0, x1 = clouds(6, 6)
    coupling = OTCoupling(EntropicOT(reg=1.0))
    expected = 6 * EntropicOT(reg=1.0).plan(mbot.pairwise_cost(x0, x1)).to_dense()
    g, seen = torch.Generator().manual_seed(0), torch.zeros(6, 6)
    for _ in range(600):
        pairs = coupling(x0, x1, generator=g)
        assert pairs.target.tolist() == list(range(6))
        seen += frequency(pairs.source, pairs.target, 6, 6) / 600
    torch.testing.assert_close(seen, expected, atol=4 / 600**0.5, rtol=0)


def test_large_and_small_regularisation_are_the_independent_and_the_optimal_coupling():
    x0, x1 = clouds(64, 64)
    exact = OTCoupling()(x0, x1)
    sharp = OTCoupling(EntropicOT(reg=1e-3))(x0, x1)
    assert torch.equal(sharp.source, exact.source)
    assert exact.info["plan_entropy"] == 0
    assert sharp.info["plan_entropy"] < 0.03
    assert OTCoupling(EntropicOT(reg=1e4))(x0, x1).info["plan_entropy"] == pytest.approx(1, abs=1e-4)


def test_unbalanced_pairs_use_every_x1_and_rarely_a_far_off_x0():
    x0, x1 = clouds(40, 40)
    x0[0] += 100
    pairs = OTCoupling(UnbalancedOT(reg=0.1, reg_marginal=1.0))(x0, x1)
    assert pairs.target.tolist() == list(range(40))
    assert 0 not in pairs.source
    x0[0] -= 100
    x1[7] += 6  # moved at a loss of mass: still there once by default, seldom among independent draws
    coupling = OTCoupling(UnbalancedOT(reg=0.1, reg_marginal=0.5), replacement=True)
    assert 7 in OTCoupling(coupling.transport)(x0, x1).target
    drawn = torch.cat([coupling(x0, x1).target for _ in range(50)])
    assert int((drawn == 7).sum()) < 5


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 20), share=st.floats(0.01, 1), seed=st.integers(0, 1000))
def test_partial_pairs_are_those_of_the_plan_and_a_refill_is_a_permutation(n, share, seed):
    x0, x1 = clouds(n, n, seed=seed)
    kept = max(1, round(share * n))
    pairs = OTCoupling(PartialOT(mass=share))(x0, x1)
    assert len(pairs) == pairs.info.get("kept", n) == kept
    plan = PartialOT(mass=kept / n).plan(mbot.pairwise_cost(x0, x1)).to_dense()
    assert bool((plan[pairs.source, pairs.target] > 0).all())
    assert pairs.target.tolist() == sorted(set(pairs.target.tolist()))
    assert len(set(pairs.source.tolist())) == kept

    full = OTCoupling(PartialOT(mass=share), refill="independent")(x0, x1)
    assert sorted(full.source.tolist()) == full.target.tolist() == list(range(n))
    assert torch.equal(full.source[pairs.target], pairs.source)

    again = OTCoupling(PartialOT(mass=share), refill="sampled")(x0, x1)
    assert len(again) == n
    assert set(zip(again.source.tolist(), again.target.tolist(), strict=True)) == set(
        zip(pairs.source.tolist(), pairs.target.tolist(), strict=True)
    )
    assert bool((again.target.diff() >= 0).all())


def test_an_outlier_is_dropped_and_comes_back_only_when_refilled_independently():
    x0, x1 = clouds(50, 50)
    x1[13] += 50
    assert 13 not in OTCoupling(PartialOT(mass=0.8))(x0, x1).target
    assert 13 not in OTCoupling(PartialOT(mass=0.8), refill="sampled")(x0, x1).target
    assert 13 in OTCoupling(PartialOT(mass=0.8), refill="independent")(x0, x1).target


@pytest.mark.parametrize(("n", "m"), [(30, 30), (20, 30), (30, 20)])
@pytest.mark.parametrize("reg", [0.0, 0.5])
def test_partial_plans_in_general_keep_targets_by_their_mass(n, m, reg):
    x0, x1 = clouds(n, m)
    transport = PartialOT(mass=0.55, reg=reg)
    plan = transport.plan(mbot.pairwise_cost(x0, x1))
    share = plan.col_mass() * m
    g, seen = torch.Generator().manual_seed(0), torch.zeros(m)
    for _ in range(300):
        pairs = OTCoupling(transport)(x0, x1, generator=g)
        assert abs(len(pairs) - 0.55 * m) < 1
        assert len(pairs.target.unique()) == len(pairs)
        seen[pairs.target] += 1 / 300
    if reg > 0 or n != m:
        torch.testing.assert_close(seen, share, atol=4 * 0.5 / 300**0.5, rtol=0)


def test_draws_with_replacement_repeat_themselves():
    """Of n draws from n equally likely pairs 1 - 1/e are distinct; a permutation has them all."""
    x0, x1 = clouds(2000, 2000)
    pairs = OTCoupling(replacement=True)(x0, x1)
    exact = OTCoupling()(x0, x1)
    assert len(pairs.source.unique()) / 2000 == pytest.approx(1 - 2.718281828**-1, abs=0.03)
    assert torch.equal(exact.source[pairs.target], pairs.source)


@pytest.mark.parametrize("n", [1, 31, 32, 33, 100])
def test_dense_draws_invert_the_cumulative_mass_of_their_column(n):
    """Whatever the number of rows is to the blocks that they are summed in; half of them hold nothing."""
    g = torch.Generator().manual_seed(n)
    mass = torch.rand(n, 7, generator=g) * (torch.rand(n, 7, generator=g) < 0.5)
    mass[torch.randint(n, (7,), generator=g), torch.arange(7)] = 0.3
    target = torch.randint(7, (500,), generator=g)
    source = sources_of(mbot.Plan(mass, (n, 7)), target, torch.Generator().manual_seed(1))
    share = torch.rand(500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ends = mass.double().cumsum(0).T[target].contiguous()
    assert torch.equal(source, torch.searchsorted(ends, share[:, None] * ends[:, -1:], right=True)[:, 0])


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 40), k=st.integers(1, 45), seed=st.integers(0, 1000), reg=st.sampled_from([0.0, 0.3]))
def test_bomb_is_a_permutation_between_optimal_and_arbitrary(n, k, seed, reg):
    x0, x1 = clouds(n, n, seed=seed)
    pairs = BoMbCoupling(num_batches=k, reg=reg)(x0, x1)
    assert sorted(pairs.source.tolist()) == pairs.target.tolist() == list(range(n))
    assert pairs.info["transport_cost"] >= OTCoupling()(x0, x1).info["transport_cost"] - 1e-5
    if n % min(k, n) == 0 and reg == 0:
        assert pairs.info["outer_cost"] == pytest.approx(pairs.info["transport_cost"], rel=1e-4)


@pytest.mark.parametrize("k", [1, 60, 100])
def test_bomb_with_one_batch_or_batches_of_one_is_optimal(k):
    x0, x1 = clouds(60, 60)
    cost = BoMbCoupling(num_batches=k)(x0, x1).info["transport_cost"]
    assert cost == pytest.approx(OTCoupling()(x0, x1).info["transport_cost"], rel=1e-5)


def test_bomb_costs_less_than_mini_batches_alone_and_more_with_more_of_them():
    x0, x1 = clouds(512, 512)
    g = torch.Generator().manual_seed(0)
    costs = {k: BoMbCoupling(num_batches=k)(x0, x1, generator=g).info["transport_cost"] for k in (2, 16)}
    alone = sum(OTCoupling()(x0[i : i + 32], x1[i : i + 32]).info["transport_cost"] for i in range(0, 512, 32)) / 16
    independent = float((x0 - x1).square().sum(1).mean())
    assert OTCoupling()(x0, x1).info["transport_cost"] < costs[2] < costs[16] < alone < independent


def test_bomb_regularisation_goes_from_matched_to_random_mini_batches():
    x0, x1 = clouds(256, 256)
    regs = (0.0, 0.1, 100.0)
    cost = [sum(BoMbCoupling(num_batches=16, reg=reg)(x0, x1).info["outer_cost"] for _ in range(4)) / 4 for reg in regs]
    assert cost[0] < cost[2]
    assert cost[0] <= cost[1] + 0.02 <= cost[2] + 0.04


@pytest.mark.parametrize("transport", [EntropicOT(0.2), PartialOT(0.6), UnbalancedOT(0.2, 1.0), PartialOT(0.6, 0.2)])
def test_bomb_is_a_permutation_for_every_inner_transport(transport):
    x0, x1 = clouds(50, 50)
    coupling = BoMbCoupling(transport, num_batches=4)
    pairs = coupling(x0, x1, generator=torch.Generator().manual_seed(0))
    assert sorted(pairs.source.tolist()) == list(range(50))
    assert float((x0[pairs.source] - x1).square().sum(1).mean()) < float((x0 - x1).square().sum(1).mean())


def test_plan_entropy_of_known_plans():
    matched = mbot.Plan(torch.full((4,), 0.25), (4, 4), torch.arange(4), torch.tensor([2, 0, 3, 1]))
    assert float(mbot.plan_entropy(matched)) == 0
    blocks = torch.zeros(4, 4)
    blocks[:2, :2] = blocks[2:, 2:] = 1 / 8
    assert float(mbot.plan_entropy(mbot.Plan(blocks, (4, 4)))) == pytest.approx(0.5)
    mass = torch.tensor([0.1, 0.2, 0.7])
    assert float(mbot.plan_entropy(mbot.Plan(3 * mass[:, None] * mass, (3, 3)))) == pytest.approx(1)
    halves = mbot.Plan(torch.full((2, 2), 0.5), (2, 2), torch.tensor([[0, 0], [0, 1]]), torch.tensor([[1, 1], [0, 1]]))
    assert mbot.plan_entropy(halves).tolist() == pytest.approx([0, 0], abs=1e-7)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: OTCoupling(refill="independent"), ValueError, "refill applies to partial"),
        (lambda: OTCoupling(PartialOT(0.5), refill="again"), ValueError, "'sampled', 'independent'"),
        (lambda: OTCoupling(PartialOT(0.5), refill="sampled", replacement=True), ValueError, "not both"),
        (lambda: OTCoupling(mbot.SlicedOT()), TypeError, "must have plans"),
        (lambda: BoMbCoupling(mbot.SlicedOT(), num_batches=2), TypeError, "must have plans"),
        (lambda: BoMbCoupling(num_batches=0), ValueError, "at least 1"),
        (lambda: BoMbCoupling(num_batches=2.0), TypeError, "must be an int"),
        (lambda: BoMbCoupling(num_batches=2, reg=-1), ValueError, "reg must"),
        (lambda: BoMbCoupling(ExactOT, num_batches=2), TypeError, "mbot transport"),
        (lambda: OTCoupling(PartialOT(0.0))(*clouds(4, 4)), ValueError, "moves no mass"),
    ],
)
def test_bad_settings(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_independent_is_the_limit_of_partial_mass_to_zero():
    x0, x1 = clouds(200, 200)
    few = OTCoupling(PartialOT(mass=0.005), refill="independent")(x0, x1)
    assert sorted(few.source.tolist()) == list(range(200))
    independent = IndependentCoupling()(x0, x1)
    assert few.info["transport_cost"] == pytest.approx(float((x0 - x1).square().sum(1).mean()), rel=0.2)
    assert len(few) == len(independent)
