"""C²OT with several conditions at once, and with conditions dropped for classifier-free guidance."""

import pickle

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

import flows
import mbot
from mbot import Condition, ConditionalOTCoupling, OTCoupling, pairwise_cost


def data(n=120, classes=3, c=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    x0, x1 = torch.randn(n, 2, generator=g), torch.randn(n, 2, generator=g)
    y = torch.randint(0, classes, (n,), generator=g)
    return x0, x1 + y[:, None], y, torch.randn(n, c, generator=g)


def cosine(v):
    u = v.double() / v.double().norm(dim=1, keepdim=True)
    return 1 - u @ u.T


def optimum(cost):
    rows, cols = linear_sum_assignment(cost.numpy())
    return float(cost[rows, cols].sum())


def total(cost, pairs):
    return float(cost[pairs.source, pairs.target].sum())


def test_a_dict_of_one_is_that_condition():
    x0, x1, y, v = data()
    one = ConditionalOTCoupling({"label": "discrete"})(x0, x1, y1={"label": y, "other": v})
    assert torch.equal(one.source, ConditionalOTCoupling()(x0, x1, y1=y).source)
    two = ConditionalOTCoupling({"text": "continuous"}, target_ratio=0.05)(x0, x1, y1={"text": v})
    assert torch.equal(two.source, ConditionalOTCoupling("continuous", target_ratio=0.05)(x0, x1, y1=v).source)


def test_blocks_and_prices_together_are_optimal():
    x0, x1, y, v = data()
    shade = torch.rand(120, 1)
    coupling = ConditionalOTCoupling(
        {
            "label": "discrete",
            "text": Condition("continuous", weight=2.0),
            "shade": Condition("continuous", weight=0.5, cost="sqeuclidean"),
        },
        weight=3.0,
    )
    pairs = coupling(x0, x1, y1={"label": y, "text": v, "shade": shade})
    joint = pairwise_cost(x0.double(), x1.double()) + 3 * (
        2 * cosine(v) + 0.5 * pairwise_cost(shade.double(), shade.double())
    )
    joint[y[:, None] != y] = 1e9
    assert torch.equal(y[pairs.source], y)
    assert total(joint, pairs) == pytest.approx(optimum(joint), rel=1e-6)
    assert pairs.info["classes"] == 3


@pytest.mark.parametrize("target", [0.01, 0.05, 0.2])
def test_the_ratio_is_met_over_all_blocks(target):
    x0, x1, y, v = data(n=400)
    coupling = ConditionalOTCoupling({"label": "discrete", "text": "continuous"}, target_ratio=target)
    info = coupling(x0, x1, y1={"label": y, "text": v}).info
    assert info["ratio"] == pytest.approx(target, rel=0.02)
    # counted from the definition, over pairs of equal class
    cost, mismatch = pairwise_cost(x0.double(), x1.double()), cosine(v)
    eligible = (y[:, None] == y) & ~torch.eye(400, dtype=torch.bool)
    cheaper = cost + info["weight"] * mismatch <= cost.diagonal()[:, None]
    assert float((cheaper & eligible).sum() / eligible.sum()) == pytest.approx(target, rel=0.03)


def test_classes_at_a_price_mix_when_it_is_low():
    x0, x1, y, _ = data()
    for price, mixes in ((0.3, True), (1e4, False)):
        coupling = ConditionalOTCoupling({"label": Condition("discrete", weight=price)}, weight=1.0)
        pairs = coupling(x0, x1, y1={"label": y})
        joint = pairwise_cost(x0.double(), x1.double()) + price * (y[:, None] != y)
        assert total(joint, pairs) == pytest.approx(optimum(joint), rel=1e-6)
        assert bool((y[pairs.source] != y).any()) == mixes


def test_two_discrete_conditions_split_by_both():
    x0, x1, y, v = data()
    names = np.where(v[:, 0] > 0, "warm", "cold")
    pairs = ConditionalOTCoupling({"label": "discrete", "tone": "discrete"})(x0, x1, y1={"label": y, "tone": names})
    assert torch.equal(y[pairs.source], y)
    assert (names[pairs.source] == names).all()
    assert pairs.info["classes"] == 6
    rows = torch.stack((y, (v[:, 0] > 0).long()), 1)
    assert torch.equal(ConditionalOTCoupling()(x0, x1, y1=rows).source, pairs.source)


@pytest.mark.parametrize(
    "drop",
    [
        lambda y, gone: torch.where(gone, torch.nan, y.float()),
        lambda y, gone: [None if g else f"class {v}" for v, g in zip(y.tolist(), gone.tolist(), strict=True)],
        lambda y, gone: torch.where(gone, -1, y),
    ],
    ids=["nan", "none", "null class"],
)
def test_dropped_labels_pair_among_themselves_whatever_their_class(drop):
    x0, x1, y, _ = data()
    gone = torch.rand(120) < 0.3
    pairs = ConditionalOTCoupling(allow_dropped=True)(x0, x1, y1=drop(y, gone))
    assert torch.equal(gone[pairs.source], gone)
    kept = ~gone
    assert torch.equal(y[pairs.source][kept], y[kept])
    among = OTCoupling()(x0[gone], x1[gone])
    assert torch.equal(pairs.source[gone], gone.nonzero()[:, 0][among.source])


def test_dropped_vectors_pair_among_themselves_at_no_price():
    x0, x1, _, v = data()
    gone = torch.rand(120) < 0.3
    coupling = ConditionalOTCoupling("continuous", weight=5.0, allow_dropped=True)
    with_nan = v.masked_fill(gone[:, None], torch.nan)
    pairs = coupling(x0, x1, y1=with_nan)
    assert pairs.info["dropped"] == int(gone.sum())
    assert torch.equal(gone[pairs.source], gone)
    among = OTCoupling()(x0[gone], x1[gone])
    assert torch.equal(pairs.source[gone], gone.nonzero()[:, 0][among.source])
    kept = ConditionalOTCoupling("continuous", weight=5.0)(x0[~gone], x1[~gone], y1=v[~gone])
    assert torch.equal(pairs.source[~gone], (~gone).nonzero()[:, 0][kept.source])
    rows = [None if g else row for row, g in zip(v.tolist(), gone.tolist(), strict=True)]
    assert torch.equal(coupling(x0, x1, y1=rows).source, pairs.source)


def test_all_and_no_conditions_dropped():
    x0, x1, y, v = data(n=30)
    every = torch.full((30,), torch.nan)
    plain = OTCoupling()(x0, x1).source
    assert torch.equal(ConditionalOTCoupling(allow_dropped=True)(x0, x1, y1=every).source, plain)
    assert torch.equal(ConditionalOTCoupling(allow_dropped=True)(x0, x1, y1=[None] * 30).source, plain)
    coupling = ConditionalOTCoupling("continuous", allow_dropped=True)
    assert torch.equal(coupling(x0, x1, y1=every[:, None].expand(30, 4)).source, plain)
    none = ConditionalOTCoupling(allow_dropped=True)(x0, x1, y1=y)
    assert none.info["dropped"] == 0
    assert torch.equal(none.source, ConditionalOTCoupling()(x0, x1, y1=y).source)
    assert bool(v.isfinite().all())


def test_conditions_dropped_one_by_one_pair_with_their_like():
    x0, x1, y, v = data(n=200)
    no_label, no_text = torch.rand(200) < 0.3, torch.rand(200) < 0.3
    coupling = ConditionalOTCoupling({"label": "discrete", "text": "continuous"}, weight=1.0, allow_dropped=True)
    conditions = {
        "label": torch.where(no_label, torch.nan, y.float()),
        "text": v.masked_fill(no_text[:, None], torch.nan),
    }
    pairs = coupling(x0, x1, y1=conditions)
    for gone in (no_label, no_text):
        assert torch.equal(gone[pairs.source], gone)
    assert torch.equal(y[pairs.source][~no_label], y[~no_label])


def test_the_unconditional_branch_sees_the_same_noise_as_the_others():
    """Dropping by chance: whether a label is there cannot be told from the noise, and neither can the label."""
    g = torch.Generator().manual_seed(0)
    x0, x1, y, _ = data(n=1500)
    x1 = x1 + 3 * y[:, None]
    gone = torch.rand(1500, generator=g) < 0.3
    pairs = ConditionalOTCoupling(allow_dropped=True)(x0, x1, y1=torch.where(gone, torch.nan, y.float()))
    noise = x0[pairs.source]
    for condition in (gone.long(), torch.where(gone, 3, y)):
        skew = flows.metrics.prior_skew(noise, condition, generator=g)
        assert skew.score < skew.chance + 0.05


def test_flow_matching_carries_a_dict_of_conditions():
    x0, x1, y, v = data(n=30)
    fm = flows.FlowMatching(ConditionalOTCoupling({"label": "discrete", "text": "continuous"}, weight=1.0))
    batch = fm.sample(x0, x1, {"label": y, "text": v})
    assert torch.equal(batch.y["label"], y)
    part = batch[3:7]
    assert torch.equal(part.y["text"], v[3:7])


def test_settings_pickle_and_compare():
    coupling = ConditionalOTCoupling({"a": "discrete", "b": Condition("continuous", weight=2.0)}, target_ratio=0.1)
    assert pickle.loads(pickle.dumps(coupling)) == coupling
    assert repr(coupling) in repr(coupling)
    settings = {"a": "discrete"}
    coupling = ConditionalOTCoupling(settings)
    settings["b"] = "continuous"
    assert coupling == ConditionalOTCoupling({"a": "discrete"})


@pytest.mark.parametrize(
    ("make", "y", "error", "says"),
    [
        ({"condition": {"a": "both"}}, None, ValueError, "condition must be one of"),
        ({"condition": {}}, None, TypeError, "a dict of conditions"),
        ({"condition": {"a": 3}}, None, TypeError, r"condition\['a'\] must be"),
        ({"condition": {"a": "discrete"}, "weight": 1.0}, None, ValueError, "matched exactly"),
        ({"condition": {"a": "discrete"}}, torch.zeros(4), TypeError, "y0 must be a dict"),
        ({"condition": {"a": "discrete"}}, {"b": torch.zeros(4)}, ValueError, "'a' is missing"),
        ({"condition": "discrete"}, {"b": torch.zeros(4)}, TypeError, "by the same names"),
        ({"condition": {"a": "discrete"}}, {"a": torch.zeros(3)}, ValueError, r"y1\['a'\] must hold one condition"),
        ({"condition": {"a": "continuous"}}, {"a": torch.zeros(4, 2)}, ValueError, r"rows of y0\['a'\] are zero"),
        ({"condition": "continuous", "allow_dropped": True},
         torch.tensor([[1.0, torch.nan]] * 4), ValueError, "finite"),
        ({"condition": "continuous"}, torch.full((4, 2), torch.nan), ValueError, "finite"),
    ],
)  # fmt: skip
def test_bad_input(make, y, error, says):
    x0, x1, *_ = data(n=4)
    with pytest.raises(error, match=says):
        ConditionalOTCoupling(**make)(x0, x1, y1=y)


def test_a_condition_s_weight_must_be_positive():
    with pytest.raises(ValueError, match="weight"):
        Condition("continuous", weight=0.0)
    with pytest.raises(ValueError, match="condition_cost"):
        Condition("continuous", cost="l1")
    assert mbot.Condition("discrete").hard
