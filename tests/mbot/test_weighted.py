"""W-CFM's correction of the tilt, and the choice of its regularisation."""

import pytest
import torch

import mbot
from mbot import EntropicOT, WeightedCoupling, pairwise_cost, reg_curve, suggest_reg


def off_centre(n=64, d=2, seed=0):
    """Noise at the origin, data around (4, 0, …): samples near the origin are favoured by the plain kernel."""
    g = torch.Generator().manual_seed(seed)
    x0, x1 = torch.randn(n, d, generator=g), torch.randn(n, d, generator=g)
    x1[:, 0] += 4
    return x0.double(), x1.double()


def test_enough_rounds_give_the_weights_of_the_entropic_plan():
    x0, x1 = off_centre()
    pairs = WeightedCoupling(2.0, correction="sinkhorn", iterations=500)(x0, x1)
    plan = EntropicOT(2.0, tol=1e-12).plan(pairwise_cost(x0, x1, "euclidean")).to_dense()
    expected = plan.diagonal() / plan.diagonal().mean()
    torch.testing.assert_close(pairs.weight, expected, rtol=1e-6, atol=0)
    assert max(pairs.info["tilt"]) < 1e-12


def test_a_few_rounds_take_most_of_the_tilt_away():
    x0, x1 = off_centre(256)
    plain = WeightedCoupling(1.0)(x0, x1)
    pairs = WeightedCoupling(1.0, correction="sinkhorn")(x0, x1)
    before, after = pairs.info["tilt_before"], pairs.info["tilt"]
    kernel = torch.exp(-pairwise_cost(x0, x1, "euclidean"))
    for side, value in enumerate(before):
        sums = kernel.sum(1 - side)
        assert value == pytest.approx(float(sums.var(correction=0) / sums.mean() ** 2))
        assert after[side] < value / 20
    assert after[1] < 1e-20  # the columns are centred last
    # The plain weights prefer data on the side of the noise: the weighted mean is off, the corrected one is not.
    shift = {name: float((p.weight[:, None] * x1).mean(0)[0] - x1.mean(0)[0]) for name, p in
             (("plain", plain), ("corrected", pairs))}  # fmt: skip
    assert shift["plain"] < -0.3
    assert abs(shift["corrected"]) < abs(shift["plain"]) / 2


def test_correction_with_unequal_sizes_uses_every_x1_and_mean_one():
    x0, x1 = off_centre(30)
    for a, b in ((x0[:20], x1), (x0, x1[:20])):
        pairs = WeightedCoupling(1.0, correction="sinkhorn")(a, b)
        assert pairs.target.tolist() == list(range(len(b)))
        assert float(pairs.weight.mean()) == pytest.approx(1)


def test_correction_is_finite_where_the_kernel_underflows():
    x0, x1 = torch.randn(32, 3, 32, 32), torch.rand(32, 3, 32, 32) * 2 - 1
    for cost in ("euclidean", "sqeuclidean", "dot"):
        pairs = WeightedCoupling(0.05, cost=cost, correction="sinkhorn")(x0, x1)
        assert bool(torch.isfinite(pairs.weight).all())


def test_the_dot_cost_drops_what_belongs_to_no_pair():
    """Scaling one image up changes its weight under the Euclidean cost; around zero noise it does not under dot."""
    x0, x1 = torch.zeros(4, 8), torch.ones(4, 8)
    x1[0] *= 3
    assert torch.equal(WeightedCoupling(1.0, cost="dot")(x0, x1).weight, torch.ones(4))
    assert float(WeightedCoupling(1.0)(x0, x1).weight[0]) < 0.1


def test_the_tilt_falls_with_reg_and_the_elbow_lies_inside():
    x0, x1 = off_centre(200, d=16)
    curve = reg_curve(x0, x1)
    assert bool((curve.tilt.diff() < 1e-9).all())
    assert bool((curve.effective_share.diff() > -1e-9).all())
    torch.testing.assert_close(curve.reg, curve.kappa * 4)
    assert 0 < curve.elbow < len(curve.reg) - 1
    reg = suggest_reg(x0, x1)
    assert reg == float(curve.reg[curve.elbow])
    assert 0.005 < float(curve.tilt[curve.elbow]) < 0.5
    assert suggest_reg(3 * x0, 3 * x1) == pytest.approx(3 * reg)
    assert suggest_reg(3 * x0, 3 * x1, "sqeuclidean") == pytest.approx(9 * suggest_reg(x0, x1, "sqeuclidean"))


def test_the_elbow_of_a_known_curve():
    """Costs that belong to x1 alone, c_j = s z_j with normal z: tilt = exp(s² / reg²) - 1, elbow where
    2 v exp(-v) = slope of the line, v = (s / reg)²."""
    z = torch.distributions.Normal(0, 1).icdf((torch.arange(2000, dtype=torch.float64) + 0.5) / 2000)
    x0, x1 = torch.zeros(2, 1, dtype=torch.float64), z[:, None]
    reg = suggest_reg(x0, x1, cost=lambda x, y: 3 * y[..., 0].expand(*x.shape[:-1], -1) + 0 * x)
    assert reg / 3 == pytest.approx(4.2, rel=0.2)


def test_many_samples_are_thinned_out():
    x0, x1 = off_centre(1500)
    assert suggest_reg(x0, x1) == pytest.approx(suggest_reg(x0[::3], x1[::3]), rel=1e-12)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: WeightedCoupling(1.0, correction="newton"), ValueError, "'sinkhorn'; got 'newton'"),
        (lambda: WeightedCoupling(1.0, iterations=0), ValueError, "iterations"),
        (lambda: suggest_reg(torch.zeros(4, 2), torch.ones(4, 2)), ValueError, "cost the same"),
        (lambda: suggest_reg(torch.zeros(4, 2), torch.ones(4, 3)), ValueError, "equal features"),
        (lambda: reg_curve(torch.randn(4, 2), torch.ones(4, 2), points=2), ValueError, "points"),
        (lambda: mbot.marginal_tilt(torch.zeros(2, 2)), ValueError, "positive total"),
        (lambda: mbot.marginal_tilt(-torch.ones(2, 2)), ValueError, "non-negative"),
    ],
)
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call()
