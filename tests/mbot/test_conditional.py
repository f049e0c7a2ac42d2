"""C²OT: exact blocks, safe conditions, an adaptive weight that meets its target, and no history."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, linprog

import mbot
from mbot import ConditionalOTCoupling, condition_ratio, pairwise_cost
from mbot.couplings.mismatch import mismatch_cost


def data(n=120, classes=4, d=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    x0, x1 = torch.randn(n, d, generator=g), torch.randn(n, d, generator=g) + 2
    return x0, x1, torch.randint(0, classes, (n,), generator=g)


# --- discrete ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 2, 10, 119])
def test_blocks_are_optimal_and_nothing_crosses_classes(classes):
    x0, x1, y = data(classes=classes)
    pairs = ConditionalOTCoupling()(x0, x1, y1=y)
    assert torch.equal(y[pairs.source], y[pairs.target])
    cost = pairwise_cost(x0.double(), x1.double())
    best = 0.0
    for c in y.unique():
        inside = torch.nonzero(y == c)[:, 0]
        block = cost[inside][:, inside].numpy()
        best += block[linear_sum_assignment(block)].sum()
    assert float(cost[pairs.source, pairs.target].sum()) == pytest.approx(best, rel=1e-6)
    assert pairs.info["transport_cost"] == pytest.approx(best / 120, rel=1e-5)
    assert pairs.info["classes"] == len(y.unique())


def test_one_class_is_plain_ot_and_all_different_is_the_identity():
    x0, x1, _ = data()
    assert torch.equal(ConditionalOTCoupling()(x0, x1, y1=torch.zeros(120)).source, mbot.OTCoupling()(x0, x1).source)
    assert ConditionalOTCoupling()(x0, x1, y1=torch.randperm(120)).source.tolist() == list(range(120))


def test_labels_of_every_kind_give_the_same_pairs():
    x0, x1, y = data()
    expected = ConditionalOTCoupling()(x0, x1, y1=y).source
    names = [f"class {c}" for c in y.tolist()]
    kinds = [
        y.to(torch.int32),
        y.to(torch.uint8),
        y.float(),
        y.double()[:, None],
        torch.nn.functional.one_hot(y),
        torch.nn.functional.one_hot(y).float()[:, None, :],
        y.numpy(),
        y.tolist(),
        names,
        np.array(names),
        np.array(names, dtype=object),
        torch.stack((y % 2, y // 2), 1),
    ]
    for labels in kinds:
        assert torch.equal(ConditionalOTCoupling()(x0, x1, y1=labels).source, expected)


def test_booleans_and_negative_labels():
    x0, x1, y = data(classes=2)
    expected = ConditionalOTCoupling()(x0, x1, y1=y).source
    assert torch.equal(ConditionalOTCoupling()(x0, x1, y1=y.bool()).source, expected)
    assert torch.equal(ConditionalOTCoupling()(x0, x1, y1=2 * y - 1).source, expected)


def test_noise_with_labels_of_its_own():
    x0, x1, y = data()
    y0 = y[torch.randperm(120)]
    pairs = ConditionalOTCoupling()(x0, x1, y0, y)
    assert torch.equal(y0[pairs.source], y[pairs.target])
    assert sorted(pairs.source.tolist()) == list(range(120))


def cheapest(cost):
    """Each target once, sources equally often up to rounding, at least cost: a linear program with integral corners."""
    n, m = cost.shape
    ones = np.eye(n).repeat(m, 1)
    use = np.vstack((ones, -ones))
    limit = np.concatenate((np.full(n, -(-m // n)), np.full(n, -(m // n))))
    found = linprog(cost.flatten(), use, limit, np.tile(np.eye(m), n), np.ones(m), bounds=(0, 1))
    assert found.status == 0
    return found.fun


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 13)), min_size=1, max_size=3), st.integers(0, 99), st.data()
)
def test_unequal_class_counts_are_an_exact_transport(counts, seed, draw):
    g = torch.Generator().manual_seed(seed)
    y0, y1 = (torch.cat([torch.full((c[side],), i) for i, c in enumerate(counts)]) for side in (0, 1))
    assume(len(y0) and len(y1))
    y0, y1 = y0[torch.randperm(len(y0), generator=g)], y1[torch.randperm(len(y1), generator=g)]
    dtype, far = (
        draw.draw(st.sampled_from([torch.float32, torch.float64])),
        draw.draw(st.sampled_from([0.0, 1.0, 50.0])),
    )
    x0 = torch.randn(len(y0), 2, generator=g, dtype=dtype) + far * y0[:, None]
    x1 = torch.randn(len(y1), 2, generator=g, dtype=dtype)
    lacking = [i for i, (a, b) in enumerate(counts) if bool(a) != bool(b)]
    if lacking:
        with pytest.raises(ValueError, match=f"class {lacking[0]}: |class {lacking[-1]}: "):
            ConditionalOTCoupling()(x0, x1, y0, y1)
    shared = [i for i, (a, b) in enumerate(counts) if a and b]
    if not shared:
        with pytest.raises(ValueError, match="same classes"):
            ConditionalOTCoupling(missing="drop")(x0, x1, y0, y1)
        return
    pairs = ConditionalOTCoupling(missing="drop")(x0, x1, y0, y1)
    assert torch.equal(pairs.target, torch.nonzero(torch.isin(y1, torch.tensor(shared)))[:, 0])
    assert torch.equal(y0[pairs.source], y1[pairs.target])
    assert pairs.info["left_out"] == len(y1) - len(pairs)
    cost, best = pairwise_cost(x0.double(), x1.double()), 0.0
    for i in shared:
        rows, cols = (torch.nonzero(y == i)[:, 0] for y in (y0, y1))
        times = torch.bincount(pairs.source, minlength=len(y0))[rows]
        assert int(times.max()) - int(times.min()) <= 1
        best += cheapest(cost[rows][:, cols].numpy())
    assert float(cost[pairs.source, pairs.target].sum()) == pytest.approx(best, rel=1e-5, abs=1e-5)
    assert pairs.info["transport_cost"] == pytest.approx(best / len(pairs), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("counts", [[(1, 4), (3, 1)], [(2, 7), (3, 1)], [(4, 4), (1, 1), (5, 2)]])
def test_a_small_class_that_is_looked_at_again(counts, seed):
    """A block that is not certified at first is smaller than those beside it."""
    g = torch.Generator().manual_seed(seed)
    y0, y1 = (torch.cat([torch.full((c[side],), i) for i, c in enumerate(counts)]) for side in (0, 1))
    pairs = ConditionalOTCoupling()(torch.randn(len(y0), 2, generator=g), torch.randn(len(y1), 2, generator=g), y0, y1)
    assert torch.equal(y0[pairs.source], y1)
    assert pairs.info["error"] < 1e-9


def test_unequal_counts_at_a_price():
    g = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(5, 2, generator=g), torch.randn(13, 2, generator=g)
    v0, v1 = torch.randn(5, 3, generator=g), torch.randn(13, 3, generator=g)
    pairs = ConditionalOTCoupling("continuous", weight=2.0, condition_cost="sqeuclidean")(x0, x1, v0, v1)
    joint = pairwise_cost(x0.double(), x1.double()) + 2 * pairwise_cost(v0.double(), v1.double())
    assert float(joint[pairs.source, pairs.target].sum()) == pytest.approx(cheapest(joint.numpy()), rel=1e-6)
    assert "ratio" not in pairs.info
    for y0, y1 in ((v0, v1), (v1.flip(0), v1)):
        with pytest.raises(ValueError, match="with y0 of its own give weight"):
            ConditionalOTCoupling("continuous", target_ratio=0.1)(torch.cat((x0, x1))[: len(y0)], x1, y0, y1)
    with pytest.raises(ValueError, match="needs equally many samples"):
        ConditionalOTCoupling()(x0, x1, y1=torch.zeros(13))
    with pytest.raises(ValueError, match="missing must be one of"):
        ConditionalOTCoupling(missing="ignore")


def test_classes_that_one_side_lacks_are_named():
    x0, x1, _ = data(n=5)
    with pytest.raises(ValueError, match=r"same classes; class 'c': 1 in y0, 0 in y1\. missing='drop' leaves out"):
        ConditionalOTCoupling()(x0, x1, ["a", "a", "a", "b", "c"], ["a", "a", "a", "b", "b"])
    with pytest.raises(ValueError, match="and 2 more classes"):
        ConditionalOTCoupling()(*data(n=12)[:2], torch.arange(12), torch.arange(12) + 100 * (torch.arange(12) > 5))


def test_conditions_do_not_leak_into_the_noise():
    """The acceptance test of the method: the class cannot be read off the paired noise, under OT it can."""
    g = torch.Generator().manual_seed(0)
    from flows.datasets import eight_gaussians, moons
    from flows.metrics import prior_skew

    x0, (x1, y) = eight_gaussians(1500, generator=g), moons(1500, generator=g)
    ot = mbot.OTCoupling()(x0, x1)
    safe = ConditionalOTCoupling()(x0, x1, y1=y)
    skewed = prior_skew(x0[ot.source], y, generator=g)
    chance = prior_skew(x0[safe.source], y, generator=g)
    assert skewed.score > skewed.chance + 0.25
    assert chance.score < chance.chance + 0.04
    x = x1[:, :1]
    adaptive = ConditionalOTCoupling("continuous", target_ratio=0.01, condition_cost="sqeuclidean")
    assert prior_skew(x0[ot.source], x, generator=g).score > 0.5
    assert prior_skew(x0[adaptive(x0, x1, y1=x).source], x, generator=g).score < 0.06


# --- continuous --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition_cost", ["cosine", "sqeuclidean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("target", [0.005, 0.01, 0.05, 0.2])
@pytest.mark.parametrize("n", [128, 256])
def test_the_ratio_reaches_its_target_within_two_percent(condition_cost, dtype, target, n):
    g = torch.Generator().manual_seed(n)
    x0, x1 = torch.randn(n, 8, generator=g, dtype=dtype), torch.randn(n, 8, generator=g, dtype=dtype)
    y = torch.randn(n, 5, generator=g, dtype=dtype)
    info = ConditionalOTCoupling("continuous", target_ratio=target, condition_cost=condition_cost)(x0, x1, y1=y).info
    assert info["ratio"] == pytest.approx(target, rel=0.02)
    # recomputed from the definition, in float64, row by row
    cost = pairwise_cost(x0.double(), x1.double())
    unit = y.double() / y.double().norm(dim=1, keepdim=True)
    between = 1 - unit @ unit.T if condition_cost == "cosine" else pairwise_cost(y.double(), y.double())
    other = ~torch.eye(n, dtype=torch.bool)
    counted = (cost + info["weight"] * between <= cost.diagonal()[:, None])[other]
    assert float(counted.double().mean()) == pytest.approx(target, rel=0.02)


def test_ratio_with_tied_conditions_counts_only_what_w_can_change():
    """Two classes as ±1: half of all pairs are ties. Counting them would put r's floor at 1/4, far above 0.05."""
    x0, x1, y = data(n=200, classes=2)
    y = 2.0 * y - 1
    info = ConditionalOTCoupling("continuous", target_ratio=0.05)(x0, x1, y1=y).info
    assert info["ratio"] == pytest.approx(0.05, rel=0.02)
    assert info["weight"] < 1e3


def test_condition_ratio_toy():
    cost = torch.tensor([[2.0, 1.0, 9.0], [0.0, 3.0, 1.0], [5.0, 5.0, 5.0]])
    between = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    # countable: (0,1), (0,2), (1,0), (2,0); (1,2) and (2,1) are ties of equal conditions
    assert condition_ratio(cost, between, 0.0) == pytest.approx(3 / 4)  # (0,1), (1,0), (2,0)
    assert condition_ratio(cost, between, 1.0) == pytest.approx(2 / 4)  # (0,1) is on the edge and counts
    assert condition_ratio(cost, between, 3.0) == pytest.approx(1 / 4)
    assert condition_ratio(cost, between, 4.0) == 0
    assert np.isnan(condition_ratio(cost, torch.zeros(3, 3), 1.0))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(8, 40), share=st.floats(0.02, 1), seed=st.integers(0, 2**31))
def test_the_weight_is_the_best_step_of_the_ratio(n, share, seed):
    """r moves in steps of 1/(n(n-1)) up to r(0); no weight comes closer to a target there than half a step."""
    g = torch.Generator().manual_seed(seed)
    x0, x1 = torch.randn(n, 3, generator=g, dtype=torch.float64), torch.randn(n, 3, generator=g, dtype=torch.float64)
    y = torch.randn(n, 4, generator=g, dtype=torch.float64)
    largest = ConditionalOTCoupling("continuous", weight=0.0)(x0, x1, y1=y).info["ratio"]
    assume(largest > 0)
    target = max(share * largest, 1 / (n * (n - 1)))
    info = ConditionalOTCoupling("continuous", target_ratio=target)(x0, x1, y1=y).info
    assert abs(info["ratio"] - target) <= 0.5 / (n * (n - 1)) + 1e-9


def test_limits_of_the_weight():
    x0, x1, _ = data(n=60)
    y = torch.randn(60, 3)
    free = ConditionalOTCoupling("continuous", weight=0.0)(x0, x1, y1=y)
    assert torch.equal(free.source, mbot.OTCoupling()(x0, x1).source)
    tied = ConditionalOTCoupling("continuous", weight=1e9)(x0, x1, y1=y)
    assert tied.source.tolist() == list(range(60))


def test_a_large_weight_on_one_hot_rows_is_the_discrete_coupling():
    x0, x1, y = data(n=100)
    rows = torch.nn.functional.one_hot(y).double()
    soft = ConditionalOTCoupling("continuous", weight=1e4)(x0.double(), x1.double(), y1=rows)
    hard = ConditionalOTCoupling()(x0.double(), x1.double(), y1=y)
    assert torch.equal(soft.source, hard.source)


def test_pairs_minimise_the_joint_cost():
    x0, x1, _ = data(n=80)
    y = torch.rand(80, 2)
    pairs = ConditionalOTCoupling("continuous", weight=7.0, condition_cost="sqeuclidean")(x0, x1, y1=y)
    joint = (pairwise_cost(x0.double(), x1.double()) + 7 * pairwise_cost(y.double(), y.double())).numpy()
    best = joint[linear_sum_assignment(joint)].sum()
    assert joint[pairs.source, pairs.target].sum() == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("condition_cost", ["cosine", "sqeuclidean"])
@pytest.mark.parametrize("c", [1, 3, 512])
def test_equal_conditions_cost_exactly_nothing(condition_cost, c):
    y = torch.randn(30, c).repeat(2, 1) * 100 if c > 1 else (torch.randn(30, 1).sign()).repeat(2, 1)
    between = mismatch_cost(y, y.clone(), condition_cost)
    same = (y[:, None] == y[None]).all(-1)
    assert bool((between[same] == 0).all())
    assert bool((between >= 0).all())


def test_results_do_not_depend_on_history():
    x0, x1, _ = data()
    y = torch.randn(120, 3)
    coupling = ConditionalOTCoupling("continuous", target_ratio=0.05)
    first = coupling(x0, x1, y1=y)
    coupling(100 * x0, 100 * x1, y1=y)
    again = coupling(x0, x1, y1=y)
    assert first.info == again.info
    assert torch.equal(first.source, again.source)


def test_unreachable_targets_warn_with_the_reachable_end():
    x0, x1, _ = data(n=6)
    y = torch.randn(6, 3)
    with pytest.warns(mbot.ConvergenceWarning, match=r"steps of 0\.03333, and cannot be 0"):
        info = ConditionalOTCoupling("continuous", target_ratio=0.001)(x0, x1, y1=y).info
    assert info["ratio"] == pytest.approx(1 / 30)
    with pytest.warns(mbot.ConvergenceWarning, match=r"at most r\(0\)"):
        info = ConditionalOTCoupling("continuous", target_ratio=0.99)(x0, x1, y1=y).info
    assert info["weight"] == 0


def test_all_conditions_equal_is_plain_ot():
    x0, x1, _ = data(n=30)
    pairs = ConditionalOTCoupling("continuous", target_ratio=0.05)(x0, x1, y1=torch.ones(30, 2))
    assert torch.equal(pairs.source, mbot.OTCoupling()(x0, x1).source)


def test_integer_and_half_conditions_are_converted_not_changed():
    x0, x1, y = data(n=40)
    vectors = torch.nn.functional.one_hot(y) + 1
    for kind in (vectors, vectors.half(), vectors.numpy(), vectors.tolist()):
        pairs = ConditionalOTCoupling("continuous", weight=2.0)(x0, x1, y1=kind)
        assert len(pairs) == 40


def test_the_same_object_as_y0_and_y1_is_not_normalised_in_place():
    """The official code divides labels by their norm in place, twice when y0 is y1."""
    x0, x1, _ = data(n=40)
    y = torch.randn(40, 3) * 10
    copy = y.clone()
    ConditionalOTCoupling("continuous", weight=2.0)(x0, x1, y, y)
    assert torch.equal(y, copy)


@pytest.mark.parametrize(
    ("kwargs", "y", "error", "says"),
    [
        ({}, None, ValueError, "needs y1"),
        ({}, torch.tensor([0.0, 1.0, torch.nan, 1.0]), ValueError, "NaN"),
        ({"condition": "continuous"}, torch.zeros(4, 2), ValueError, "4 rows of y0 are zero"),
        ({"condition": "continuous"}, torch.tensor([1.0, 2.0, 3.0, 4.0]), ValueError, "sign of scalar conditions"),
        ({"condition": "continuous"}, torch.full((4, 2), torch.inf), ValueError, "finite"),
        ({"condition": "continuous"}, ["a", "b", "c", "d"], TypeError, "must be numeric"),
    ],
)
def test_bad_conditions(kwargs, y, error, says):
    x0, x1, _ = data(n=4)
    with pytest.raises(error, match=says):
        ConditionalOTCoupling(**kwargs)(x0, x1, y1=y)


def test_mixed_kinds_of_labels_are_refused():
    x0, x1, _ = data(n=4)
    with pytest.raises(ValueError, match="one kind"):
        ConditionalOTCoupling()(x0, x1, ["0", "1", "2", "3"], torch.arange(4))
    with pytest.raises(ValueError, match="equal features"):
        ConditionalOTCoupling("continuous", weight=1.0)(x0, x1, torch.ones(4, 2), torch.ones(4, 3))


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"condition": "both"}, "condition must be one of"),
        ({"condition": "continuous", "condition_cost": "l1"}, "condition_cost must be one of"),
        ({"condition": "continuous", "weight": -1.0}, "weight must be a finite number >= 0"),
        ({"condition": "continuous", "weight": 1.0, "target_ratio": 0.1}, "not both"),
        ({"condition": "continuous", "target_ratio": 1.5}, r"\(0, 1\)"),
        ({"condition": "continuous", "target_ratio": 0.0}, "target_ratio must be"),
        ({"condition": "discrete", "weight": 1e6}, "matched exactly"),
    ],
)
def test_bad_settings(kwargs, says):
    with pytest.raises(ValueError, match=says):
        ConditionalOTCoupling(**kwargs)
