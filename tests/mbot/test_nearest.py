"""NearestNoiseCoupling: the nearest of a point's own noises, and what that does to the noise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mbot
from mbot import NearestNoiseCoupling


def normal(n, d, seed=0, dtype=torch.float32):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.integers(0, 1000))
def test_each_point_takes_the_nearest_of_its_own_noises(k, m, d, seed):
    x0, x1 = normal(k * m, d, seed), normal(m, d, seed + 1)
    pairs = NearestNoiseCoupling(k)(x0, x1)
    own = [min(range(k * i, k * i + k), key=lambda j: float((x0[j] - x1[i]).square().sum())) for i in range(m)]
    assert pairs.source.tolist() == own
    assert pairs.target.tolist() == list(range(m))
    cost = (x0[own] - x1).double().square().sum(1).mean()
    assert pairs.info["transport_cost"] == pytest.approx(float(cost), rel=1e-5)
    for i in range(m):  # a batch is its points one by one
        alone = NearestNoiseCoupling(k)(x0[k * i : k * i + k], x1[i : i + 1])
        assert int(alone.source) + k * i == own[i]


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000))
def test_other_numbers_of_noises_are_offered_at_random_none_twice_to_a_point(k, n, m, seed):
    offered = NearestNoiseCoupling(k)._offered(n, m, torch.Generator().manual_seed(seed), torch.device("cpu"))
    assert offered.shape == (m, k if n == k * m else min(k, n))
    assert all(len(set(row)) == len(row) for row in offered.tolist())
    groups = n // offered.shape[1]
    for begin in range(0, m, groups):
        block = offered[begin : begin + groups]
        assert len(block.unique()) == block.numel()


def test_tiles_change_nothing(monkeypatch):
    x0, x1 = normal(60, 3), normal(20, 3, 1)
    whole = NearestNoiseCoupling(3)(x0, x1).source
    monkeypatch.setattr("mbot.couplings.nearest._NUMBERS", 20)
    assert torch.equal(NearestNoiseCoupling(3)(x0, x1).source, whole)


def test_the_noise_that_is_served_is_shifted_as_said():
    """Far data: the largest of k normals along the data's direction, the others untouched."""
    m, far = 40_000, torch.tensor([1e4, 0.0, 0.0])
    for k, mean in ((1, 0.0), (2, 1 / math.sqrt(math.pi)), (4, 1.0294), (10, 1.5388)):
        x0 = normal(k * m, 3, k)
        chosen = x0[NearestNoiseCoupling(k)(x0, far.expand(m, 3)).source]
        assert chosen.mean(0).tolist() == pytest.approx([mean, 0.0, 0.0], abs=0.02)
        assert chosen[:, 1:].var(0).tolist() == pytest.approx([1.0, 1.0], abs=0.03)
    # Data at the origin choose short noises: at d = 2, |noise|² is exponential with mean 2, the least of k with 2 / k.
    x0 = normal(4 * m, 2, 5)
    chosen = x0[NearestNoiseCoupling(4)(x0, torch.zeros(m, 2)).source]
    assert float(chosen.square().sum(1).mean()) == pytest.approx(0.5, rel=0.02)


def test_half_precision_is_computed_in_float32():
    x0, x1 = normal(40, 8).bfloat16(), normal(10, 8, 1).bfloat16()
    assert torch.equal(NearestNoiseCoupling(4)(x0, x1).source, NearestNoiseCoupling(4)(x0.float(), x1.float()).source)


def test_bad_input():
    for k, error in ((0, ValueError), (2.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="k must"):
            NearestNoiseCoupling(k)
    big = torch.full((2, 3), 3e30)
    with pytest.raises(ValueError, match="mean squared distance"):
        NearestNoiseCoupling(1)(big, -big)
    with pytest.warns(UserWarning, match="NearestNoiseCoupling ignores the conditions of the source"):
        NearestNoiseCoupling(2)(normal(4, 2), normal(2, 2), [0, 1, 0, 1], [0, 1])


def test_it_says_how_many_sources_a_target_has():
    assert NearestNoiseCoupling(7).sources_per_target == 7
    assert mbot.IndependentCoupling().sources_per_target == 1
    assert mbot.OTCoupling().sources_per_target is None
