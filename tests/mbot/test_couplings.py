"""OT, weighted and independent couplings: the pairs themselves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

import mbot
from mbot import OTCoupling, WeightedCoupling, pairwise_cost


def test_ot_pairs_each_target_with_its_optimal_noise_in_the_target_s_order():
    x0 = torch.tensor([[0.0], [1.0], [2.0]])
    x1 = torch.tensor([[2.2], [0.2], [1.2]])
    pairs = OTCoupling()(x0, x1)
    assert pairs.source.tolist() == [2, 0, 1]
    assert pairs.target.tolist() == [0, 1, 2]
    assert pairs.info["transport_cost"] == pytest.approx(0.04, rel=1e-5)


@pytest.mark.parametrize("shape", [(2,), (3072,), (3, 8, 8)])
def test_ot_is_optimal(shape):
    x0, x1 = torch.randn(100, *shape), torch.randn(100, *shape)
    pairs = OTCoupling()(x0, x1)
    cost = pairwise_cost(x0.flatten(1).double(), x1.flatten(1).double())
    rows, cols = linear_sum_assignment(cost.numpy())
    assert float(cost[pairs.source, pairs.target].sum()) == pytest.approx(cost.numpy()[rows, cols].sum(), rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 30), duplicates=st.booleans(), seed=st.integers(0, 2**31))
def test_ot_on_equal_sizes_is_always_a_permutation(n, duplicates, seed):
    g = torch.Generator().manual_seed(seed)
    x0, x1 = torch.randn(n, 2, generator=g), torch.randn(n, 2, generator=g)
    if duplicates:
        x0[:] = x0[0]
        x1[: n // 2] = x1[0]
    assert sorted(OTCoupling()(x0, x1).source.tolist()) == list(range(n))


def test_unequal_sizes_sample_each_target_s_column():
    """Two sources, four targets at their places: every target meets its own side, every time."""
    x0 = torch.tensor([[0.0], [10.0]])
    x1 = torch.tensor([[0.1], [9.9], [0.2], [10.2]])
    assert OTCoupling()(x0, x1).source.tolist() == [0, 1, 0, 1]
    # one target between two sources: half of the mass from either
    g = torch.Generator().manual_seed(0)
    drawn = [int(OTCoupling()(x0, x1[:1], generator=g).source) for _ in range(400)]
    assert 0.42 < sum(drawn) / 400 < 0.58


def test_ot_ignores_conditions_and_skips_nothing_for_gradients():
    x0, x1 = torch.randn(8, 2, requires_grad=True), torch.randn(8, 2, requires_grad=True)
    plain = OTCoupling()(x0, x1)
    labelled = OTCoupling()(x0, x1, y1=torch.arange(8))
    assert torch.equal(plain.source, labelled.source)
    a, b = plain.apply(x0, x1)
    (a * b).sum().backward()
    torch.testing.assert_close(x0.grad, x1.detach()[plain.source.argsort()])


def test_weights_are_the_normalised_gibbs_kernel():
    x0, x1 = torch.randn(50, 3, dtype=torch.float64), torch.randn(50, 3, dtype=torch.float64)
    pairs = WeightedCoupling(reg=0.7)(x0, x1)
    kernel = torch.exp(-(x0 - x1).norm(dim=1) / 0.7)
    torch.testing.assert_close(pairs.weight, kernel / kernel.mean())
    ess = kernel.sum() ** 2 / (kernel**2).sum()
    assert pairs.info["effective_sample_size"] == pytest.approx(float(ess))
    squared = WeightedCoupling(reg=0.7, cost="sqeuclidean")(x0, x1).weight
    called = WeightedCoupling(reg=0.7, cost=lambda x, y: (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1))
    torch.testing.assert_close(called(x0, x1).weight, squared)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_weights_are_finite_where_the_plain_kernel_underflows(dtype):
    """CIFAR-like: d = 3072 and reg = 5 give exp(-62 / 5) on average; reg = 0.05 underflows float64 everywhere."""
    x0, x1 = torch.randn(64, 3, 32, 32).to(dtype), torch.randn(64, 3, 32, 32).clamp(-1, 1).to(dtype)
    for reg in (5.0, 0.05):
        weight = WeightedCoupling(reg)(x0, x1).weight
        assert weight.dtype == (torch.float32 if dtype == torch.float16 else dtype)
        assert bool(torch.isfinite(weight).all())
        assert float(weight.double().mean()) == pytest.approx(1, rel=1e-5)


def test_independent_pairs_come_as_they_are_and_evenly_for_unequal_sizes():
    x0, x1 = torch.randn(4, 2), torch.randn(10, 2)
    counts = torch.bincount(mbot.IndependentCoupling()(x0, x1).source, minlength=4)
    assert sorted(counts.tolist()) == [2, 2, 3, 3]
    assert mbot.IndependentCoupling()(x0, x1[:4]).source.tolist() == [0, 1, 2, 3]


def test_effective_sample_size():
    assert float(mbot.effective_sample_size(torch.ones(7))) == pytest.approx(7)
    assert mbot.effective_sample_size(torch.eye(3)).tolist() == [1, 1, 1]
    tiny = torch.tensor([1e-30, 1e-30, 0.0])
    assert float(mbot.effective_sample_size(tiny)) == pytest.approx(2)
    for bad in (torch.tensor([-1.0, 2.0]), torch.zeros(3), torch.zeros(0), torch.tensor([torch.nan])):
        with pytest.raises(ValueError, match="weight must"):
            mbot.effective_sample_size(bad)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: WeightedCoupling(reg=0), ValueError, "reg must be a finite number > 0; got 0"),
        (lambda: WeightedCoupling(reg=-1.0), ValueError, "got -1.0"),
        (lambda: WeightedCoupling(reg=float("nan")), ValueError, "finite"),
        (lambda: WeightedCoupling(reg="big"), TypeError, "must be a number"),
        (lambda: WeightedCoupling(reg=1, cost="l2"), ValueError, "cost must be one of"),
        (lambda: OTCoupling(transport="exact"), TypeError, "mbot transport"),
        (lambda: OTCoupling(cost="l2"), ValueError, "cost must be one of"),
    ],
)
def test_bad_settings(make, error, says):
    with pytest.raises(error, match=says):
        make()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_diagnostics_of_half_precision_are_summed_in_more(dtype):
    weight = torch.rand(300, 400, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = mbot.effective_sample_size(weight)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, mbot.effective_sample_size(weight.float()))
    torch.testing.assert_close(mbot.marginal_tilt(weight), mbot.marginal_tilt(weight.float()))
    cost = weight[:, :300]
    assert mbot.condition_ratio(cost, cost.mT, 0.01) == mbot.condition_ratio(cost.float(), cost.mT.float(), 0.01)


def test_targets_that_an_unbalanced_plan_leaves_without_mass_are_told():
    x0, x1 = torch.zeros(3, 1), torch.tensor([[0.0], [30.0], [0.1]])
    coupling = OTCoupling(mbot.UnbalancedOT(reg=0.1, reg_marginal=0.5))
    with pytest.warns(UserWarning, match=r"1 of 3 targets .* no mass"):
        pairs = coupling(x0, x1)
    assert pairs.target.tolist() == [0, 2]
