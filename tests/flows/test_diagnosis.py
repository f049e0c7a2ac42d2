"""flows.diagnose: every figure against couplings whose bias is known."""

import json

import pytest
import torch

import flows
import mbot
from mbot import (
    ConditionalOTCoupling,
    EntropicOT,
    IndependentCoupling,
    OTCoupling,
    PartialOT,
    UnbalancedOT,
    WeightedCoupling,
)


def samples(n=256, seed=0):
    """Two classes, one left and one right of the noise."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 2, (n,), generator=g)
    x0 = torch.randn(n, 2, generator=g)
    x1 = 0.5 * torch.randn(n, 2, generator=g)
    x1[:, 0] += 4.0 * (2 * y - 1)
    return x0, x1, y


def examine(coupling, *args, **options):
    return flows.diagnose(coupling, *args, generator=torch.Generator().manual_seed(0), **options)


def test_optimal_transport_is_cheap_and_skewed():
    x0, x1, y = samples()
    found = examine(OTCoupling(), x0, x1, y)
    assert found.skew["y"].score > 0.9
    assert found.cost == pytest.approx(OTCoupling()(x0, x1).info["transport_cost"], rel=1e-5)
    independent = torch.cdist(x0.double(), x1.double()).square().mean()
    assert found.cost_to_independent == pytest.approx(found.cost / float(independent), rel=1e-5)
    assert found.unique == found.effective == 1
    assert found.tilt == (0, 0)
    assert found.plan_entropy == 0
    assert "ConditionalOTCoupling" in found.advice


def test_conditional_transport_is_safe():
    found = examine(ConditionalOTCoupling(), *samples())
    assert found.skew["y"].score < found.skew["y"].chance + 0.1
    assert found.advice.startswith("No bias found")
    assert 0.5 < found.cost_to_independent < 1


def test_the_independent_coupling_gains_nothing():
    found = examine(IndependentCoupling(), *samples())
    assert found.cost_to_independent == pytest.approx(1, abs=0.05)
    assert found.cost_of_larger == pytest.approx(1, abs=1e-9)
    assert "as much as independent" in found.advice


def test_draws_with_replacement_show_in_the_unique_fraction_not_in_the_tilt():
    found = examine(OTCoupling(replacement=True), *samples()[:2])
    assert found.unique == pytest.approx(0.632, abs=0.06)
    assert found.effective == pytest.approx(0.5, abs=0.08)
    assert max(found.tilt) < 0.05
    assert "distinct" in found.advice


@pytest.mark.parametrize(
    ("coupling", "tilted"),
    [
        (WeightedCoupling(1.0), True),
        (WeightedCoupling(1.0, correction="sinkhorn"), False),
        (OTCoupling(PartialOT(0.7)), True),
        (OTCoupling(PartialOT(0.7), refill="sampled"), True),
        (OTCoupling(PartialOT(0.7), refill="independent"), False),
        (OTCoupling(EntropicOT(1.0)), False),
        (OTCoupling(UnbalancedOT(1.0, 1.0), replacement=True), True),
    ],
    ids=repr,
)
def test_tilt_of_the_marginals(coupling, tilted):
    """Data of two widths: what is far off is dropped, or weighted down, in every round."""
    x0, x1, _ = samples()
    x1 = x1 * torch.linspace(0.2, 1.5, 256)[:, None]
    found = examine(coupling, x0, x1, rounds=12)
    assert (max(found.tilt) > 0.05) == tilted
    if tilted:
        assert "count alike" in found.advice
        assert float(found.weight.mean()) == pytest.approx(1)


def test_a_larger_batch_costs_less_and_the_batch_size_says_which():
    x0, x1 = torch.randn(512, 2), torch.randn(512, 2)
    whole = examine(OTCoupling(), x0, x1, rounds=2)
    assert (whole.samples, whole.smaller, whole.larger) == (512, 128, 512)
    assert whole.cost_of_larger < 0.8
    part = examine(OTCoupling(), x0, x1, batch_size=64, rounds=2)
    assert (part.samples, part.smaller, part.larger) == (64, 64, 512)
    assert part.cost_of_larger < whole.cost_of_larger
    assert "512" in part.advice


def test_several_conditions_of_all_kinds_are_examined_by_name():
    x0, x1, y = samples()
    conditions = {"side": ["right" if v else "left" for v in y.tolist()], "height": x1[:, 1:].numpy()}
    found = examine(OTCoupling(), x0, x1, conditions, rounds=2)
    assert found.skew["side"].kind == "accuracy"
    assert found.skew["height"].kind == "r2"
    assert found.skew["side"].score > 0.9
    assert found.skew["height"].score > 0.5


def test_couplings_of_a_whole_data_set():
    x0, x1, y = samples(64)
    found = examine(mbot.SemidiscreteCoupling(steps=300, tol=1.0).fit(x1), x0, x1, y, rounds=2)
    assert found.cost_of_larger is None
    assert found.skew["y"].score > 0.8
    assert found.pairs == 64


def test_prints_and_serialises():
    found = examine(OTCoupling(), *samples())
    text = str(found)
    for part in ("transport cost", "to independent", "prior skew, y", "unique fraction", "plan entropy", "seconds"):
        assert part in text
    assert found.advice in text.splitlines()[-1]
    again = json.loads(json.dumps(found.as_dict()))
    assert again["skew"]["y"]["kind"] == "accuracy"
    assert again["unique"] == 1
    assert "weight" not in again


def test_plots():
    import matplotlib

    matplotlib.use("Agg")
    for y in (samples()[2], None):
        figure = flows.plot_diagnosis(examine(OTCoupling(), *samples()[:2], y, rounds=2))
        assert len(figure.axes) == 3
        matplotlib.pyplot.close(figure)


def test_small_unequal_and_image_batches():
    found = examine(OTCoupling(), torch.randn(5, 3, 4, 4), torch.randn(7, 3, 4, 4), torch.arange(7))
    assert found.skew == {}
    assert found.cost_of_larger is None
    assert found.samples == found.pairs == 7
    assert "-" in str(found)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda x0, x1: flows.diagnose("ot", x0, x1), TypeError, "mbot coupling"),
        (lambda x0, x1: flows.diagnose(OTCoupling(), x0, x1, rounds=1), ValueError, "rounds"),
        (lambda x0, x1: flows.diagnose(OTCoupling(), x0, x1, batch_size=300), ValueError, "batch_size must be at most"),
        (lambda x0, x1: flows.diagnose(OTCoupling(), x0.long(), x1), TypeError, "floating"),
        (lambda x0, x1: flows.diagnose(mbot.ConditionalOTCoupling(), x0, x1), ValueError, "y1"),
    ],
)
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call(*samples()[:2])
