"""match_clouds: exact where it says so, never worse than what it is given, the same on any number of threads."""

from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

import mbot
from mbot import match_clouds
from mbot.solvers import clouds


@pytest.fixture
def small(monkeypatch):
    """Sizes at which a few hundred points go through every stage."""
    monkeypatch.setattr(clouds, "_LEAF", 8)
    monkeypatch.setattr(clouds, "_BLOCKS", (8, 16, 32))
    monkeypatch.setattr(clouds, "_SAMPLE", (64, 16))
    monkeypatch.setattr(clouds, "_STEP", 16)
    monkeypatch.setattr(clouds, "_WORK", 1 << 10)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pair(n, d, seed=0, m=None, dtype=torch.float32):
    g = seeded(seed)
    y = torch.randn(m or n, d, generator=g, dtype=dtype) * 0.5
    corners = 2 * torch.randn(3, d, generator=g, dtype=dtype)
    return torch.randn(n, d, generator=g, dtype=dtype), y + corners[torch.randint(0, 3, (len(y),), generator=g)]


def distance(x, y, source):
    if source.ndim == 2:
        y = y[:, None]
    return float((x[source].double() - y.double()).square().sum(-1).mean())


def optimum(x, y):
    times = len(x) // len(y)
    cost = torch.cdist(x.double(), y.double().repeat(times, 1), compute_mode="donot_use_mm_for_euclid_dist").square()
    rows, cols = linear_sum_assignment(cost.numpy())
    return float(cost[rows, cols].mean())


def is_matching(found, x, y):
    times = len(x) // len(y)
    assert found.source.dtype == torch.int64
    assert found.source.shape == ((len(y),) if times == 1 else (len(y), times))
    assert torch.equal(found.source.flatten().sort().values, torch.arange(len(x)))
    assert found.cost == pytest.approx(distance(x, y, found.source), rel=1e-12, abs=1e-300)
    assert all(b <= a for a, b in zip(found.costs, found.costs[1:], strict=False))
    if found.bound is not None:
        assert found.bound <= found.cost * (1 + 1e-12) + 1e-300
    return True


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 3), st.integers(0, 99), st.sampled_from([0.0, 100.0, 1e6]))
def test_small_clouds_are_matched_exactly(n, d, times, seed, away):
    x, y = pair(times * n, d, seed, m=n)
    y = y + away
    found = match_clouds(x, y, certificate=True, generator=seeded())
    assert is_matching(found, x, y)
    assert found.converged
    assert found.cost == pytest.approx(optimum(x, y), rel=1e-5, abs=1e-6)
    assert found.bound == pytest.approx(found.cost, rel=1e-4, abs=1e-4)


@pytest.mark.usefixtures("small")
@settings(deadline=None, max_examples=30)
@given(st.integers(33, 300), st.sampled_from([1, 2, 5, 16]), st.integers(1, 2), st.integers(0, 99))
def test_larger_clouds_are_matched_nearly(n, d, times, seed):
    """Any number of points, primes too; beside the optimum and a certificate that holds."""
    x, y = pair(times * n, d, seed, m=n)
    found = match_clouds(x, y, certificate=True, generator=seeded(seed))
    assert is_matching(found, x, y)
    best = optimum(x, y)
    assert best * (1 - 1e-6) <= found.cost <= 1.12 * best + 1e-3
    assert found.bound <= best * (1 + 1e-9)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([0.0, 3e5]),
    st.integers(0, 999),
)
def test_certificates_hold_in_exact_arithmetic(n, d, dtype, away, seed):
    """Beside the least cost of all permutations as a fraction; far apart, where float32 costs have few digits, too."""
    x, y = pair(n, d, seed, dtype=dtype)
    y = y + away
    if seed % 3 == 0:  # the optimum is nothing at all
        y = x[torch.randperm(n, generator=seeded(seed))].clone()
    found = match_clouds(x, y, certificate=True, generator=seeded(seed))
    exact = [[[Fraction(float(v)) for v in point] for point in points] for points in (x, y)]
    cost = [[sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) for q in exact[1]] for p in exact[0]]
    least = min(sum(cost[i][j] for j, i in enumerate(order)) for order in permutations(range(n))) / n
    scale = sum(v * v for points in exact for point in points for v in point) / n
    assert Fraction(found.bound) <= least + scale * Fraction(2) ** -50
    mine = sum(cost[i][j] for j, i in enumerate(found.source.tolist())) / n
    assert mine <= least * (1 + Fraction(1, 10**5)) + scale * Fraction(1, 10**6)
    assert abs(Fraction(found.cost) - mine) <= scale * Fraction(2) ** -50


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("d", [2, 16])
def test_sweeps_approach_the_optimum(d):
    x, y = pair(512, d)
    found = match_clouds(x, y, tol=1e-4, certificate=True, generator=seeded())
    assert found.sweeps > 6
    best = optimum(x, y)
    assert found.cost - best < 0.5 * (found.costs[0] - best)
    assert found.cost < 1.02 * best
    assert found.bound > 0.6 * found.cost
    few = match_clouds(x, y, time_limit=0, generator=seeded())
    assert not few.converged
    assert few.sweeps == 0
    assert few.costs[0] == found.costs[0]


@pytest.mark.usefixtures("small")
def test_the_seed_decides_whatever_the_threads():
    x, y = pair(700, 7)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(match_clouds(x, y, generator=seeded(4)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0].source, other.source) and found[0].costs == other.costs for other in found[1:])
    assert not torch.equal(found[0].source, match_clouds(x, y, generator=seeded(5)).source)
    torch.manual_seed(1)
    first = match_clouds(x, y).source
    torch.manual_seed(1)
    assert torch.equal(first, match_clouds(x, y).source)


@pytest.mark.usefixtures("small")
@settings(deadline=None, max_examples=15)
@given(st.integers(0, 99), st.booleans(), st.sampled_from([1, 2]))
def test_never_worse_than_a_given_start(seed, good, times):
    x, y = pair(200 * times, 3, seed, m=200)
    source = torch.randperm(200 * times, generator=seeded(seed)).reshape(200, times)
    if good:
        source = match_clouds(x, y, tol=0, generator=seeded(seed + 1)).source.reshape(200, times)
    start = source if times > 1 else source[:, 0]
    found = match_clouds(x, y, start=start, time_limit=0, generator=seeded())
    assert is_matching(found, x, y)
    assert found.cost <= distance(x, y, start) * (1 + 1e-14)
    assert match_clouds(x, y, start=start.numpy(), generator=seeded()).cost <= found.cost


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("times", [1, 2])
def test_classes_are_matched_apart(times):
    sizes = torch.tensor([1, 7, 40, 150])
    y1 = torch.repeat_interleave(torch.arange(4), sizes)[torch.randperm(198, generator=seeded())]
    y0 = y1.repeat(times)[torch.randperm(198 * times, generator=seeded(1))]
    x, y = pair(198 * times, 3, m=198)
    names = np.array(["a", "b", "c", "d"])
    found = match_clouds(x, y, labels=(names[y0], names[y1].tolist()), certificate=True, generator=seeded())
    assert is_matching(found, x, y)
    of = y0[found.source]
    assert torch.equal(of, y1 if times == 1 else y1[:, None].expand(-1, 2))
    for c in range(3):  # the last is too large to be exact
        inside = found.source[y1 == c].flatten()
        best = optimum(x[inside], y[y1 == c])
        apart = (x[found.source[y1 == c]] - (y[y1 == c] if times == 1 else y[y1 == c][:, None])).square().sum(-1)
        assert float(apart.double().mean()) == pytest.approx(best, rel=1e-5) or sizes[c] * times > 32
    with pytest.raises(ValueError, match=r"each class must hold .* points of x for one of y; got .*class 0: "):
        match_clouds(x, y, labels=(y0.flip(0) * 0, y1))
    with pytest.raises(ValueError, match=r"labels\[1\] must hold one condition"):
        match_clouds(x, y, labels=(y0, y1[:-1]))
    wrong = torch.arange(198 * times).reshape(198, times)
    with pytest.raises(ValueError, match="start must match equal classes"):
        match_clouds(x, y, labels=(y0, y1), start=wrong if times > 1 else wrong[:, 0])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("n", [1, 2, 3, 97, 200])
def test_duplicates_and_constant_columns(n):
    same = torch.ones(n, 3)
    found = match_clouds(same, same, certificate=True)
    assert is_matching(found, same, same)
    assert found.cost == found.bound == 0
    x = torch.stack((torch.arange(float(n)) % 2, torch.zeros(n)), 1)
    found = match_clouds(x, x[torch.randperm(n, generator=seeded())], certificate=True)
    assert found.cost == 0
    moved = match_clouds(x, x + 5)
    assert moved.cost == pytest.approx(50)


@pytest.mark.usefixtures("small")
def test_dtypes_shapes_and_files(tmp_path):
    x, y = pair(150, 12)
    wanted = match_clouds(x, y, generator=seeded()).source
    for points in (x.numpy(), x.reshape(150, 3, 4), x.reshape(150, 2, 6).numpy()):
        assert torch.equal(match_clouds(points, y, generator=seeded()).source, wanted)
    for name, points in (("x", x), ("y", y)):
        np.save(tmp_path / f"{name}.npy", points.numpy())
    mapped = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in "xy"]
    assert torch.equal(match_clouds(*mapped, generator=seeded()).source, wanted)
    far = [points.double() + 1e9 for points in (x, y)]  # float64 keeps what float32 could not
    assert match_clouds(*far, generator=seeded()).cost == pytest.approx(distance(x, y, wanted), rel=0.05)
    assert match_clouds(x.double(), y).cost == pytest.approx(distance(x, y, wanted), rel=0.05)
    apart = match_clouds(far[0], y.double(), generator=seeded(), certificate=True).source
    assert distance(x, y, apart) == pytest.approx(distance(x, y, wanted), rel=0.05)
    half = [points.bfloat16() for points in (x, y)]
    assert is_matching(match_clouds(*half), half[0].float(), half[1].float())


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("unit", [1e-25, 1e-15, 1e12, 1e18, 1e140])
def test_units_do_not_matter(unit, dtype):
    """Products of such coordinates are beyond float32's range; no kernel sees them."""
    if dtype == torch.float32 and unit > 1e38:
        unit = 1e17
    x, y = (unit * points for points in pair(150, 5, dtype=torch.float64))
    x[3] *= 30  # one far off
    x, y = x.to(dtype), y.to(dtype)
    found = match_clouds(x, y, certificate=True, generator=seeded())
    plain = [points.double() / unit for points in (x, y)]
    assert distance(*plain, found.source) <= 1.1 * optimum(*plain)
    assert found.cost == pytest.approx(distance(*plain, found.source) * unit**2, rel=1e-6)
    assert 0.8 * found.cost < found.bound <= found.cost * (1 + 1e-9)


@pytest.mark.parametrize(
    ("x", "y", "options", "error", "says"),
    [
        (torch.zeros(0, 2), torch.zeros(1, 2), {}, ValueError, "x must have shape"),
        (torch.zeros(3), torch.zeros(3), {}, ValueError, "x must have shape"),
        (torch.zeros(3, 2).long(), torch.zeros(3, 2), {}, TypeError, "x must be a floating-point tensor"),
        ([[1.0]], torch.zeros(1, 1), {}, TypeError, "got list"),
        (torch.zeros(3, 2), torch.full((3, 2), torch.nan), {}, ValueError, "y must be finite; 3 of its 3 points"),
        (torch.tensor([[torch.inf], [0.0]]), torch.zeros(2, 1), {}, ValueError, "x must be finite; 1 of its 2"),
        (torch.zeros(3, 2), torch.zeros(3, 4), {}, ValueError, "equal features"),
        (
            torch.full((3, 2), 1e200, dtype=torch.float64),
            torch.zeros(3, 2),
            {},
            ValueError,
            "beyond the range of float64",
        ),
        (torch.zeros(5, 2), torch.zeros(3, 2), {}, ValueError, "equally many points for each of the 3"),
        (torch.zeros(2, 2), torch.zeros(3, 2), {}, ValueError, "equally many points"),
        (torch.zeros(3, 2), torch.zeros(3, 2), {"tol": -1.0}, ValueError, "tol"),
        (torch.zeros(3, 2), torch.zeros(3, 2), {"time_limit": -1.0}, ValueError, "time_limit"),
        (torch.zeros(3, 2), torch.zeros(3, 2), {"start": torch.zeros(3)}, ValueError, "integers of shape"),
        (torch.zeros(3, 2), torch.zeros(3, 2), {"start": torch.zeros(3).long()}, ValueError, "each point of x once"),
        (torch.zeros(6, 2), torch.zeros(3, 2), {"start": torch.arange(6)}, ValueError, r"shape \(3, 2\)"),
    ],
)
def test_bad_input(x, y, options, error, says):
    with pytest.raises(error, match=says):
        match_clouds(x, y, **options)


def test_better_than_mini_batches():
    """The point of it: a whole cloud at once costs less than the batches that it is cut into."""
    x, y = pair(5000, 8)
    found, best = match_clouds(x, y, generator=seeded()), float(mbot.OTCoupling()(x, y).info["transport_cost"])
    parts = zip(x.split(500), y.split(500), strict=True)
    batches = [float(mbot.OTCoupling()(a, b).info["transport_cost"]) for a, b in parts]
    assert best <= found.cost * (1 + 1e-6)
    assert found.cost - best < 0.1 * (sum(batches) / len(batches) - best)
    assert "5000 points" in repr(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [1, 2, 8])
@pytest.mark.parametrize("apart", [30.0, 1e3, 1e4])
def test_small_clouds_in_groups_far_apart_are_matched_exactly(apart, d, dtype):
    """Scores about the mean cancel there in float32."""
    g = torch.Generator().manual_seed(0)
    shift = apart * (torch.arange(240) % 3)[:, None]
    x, y = (torch.randn(240, d, generator=g, dtype=dtype) + shift for _ in range(2))
    cost = torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist").square().numpy()
    best = cost[linear_sum_assignment(cost)].mean()
    found = mbot.match_clouds(x, y, certificate=True)
    assert found.cost == pytest.approx(best, rel=1e-4)
    assert found.bound <= best * (1 + 1e-9)
    classes = torch.arange(240) % 2
    within = mbot.match_clouds(x, y, labels=(classes, classes))
    assert torch.equal(classes[within.source], classes)
    labelled = cost + np.where(classes[:, None] != classes, 1e12, 0)
    assert within.cost == pytest.approx(labelled[linear_sum_assignment(labelled)].mean(), rel=1e-4)


def test_labels_in_dicts_and_numbers_of_other_kinds():
    x, y = torch.randn(60, 2), torch.randn(60, 2) + 1
    one, two = torch.arange(60) % 3, torch.arange(60) % 2
    both = mbot.match_clouds(x, y, labels=(one * 2 + two,) * 2)
    assert torch.equal(mbot.match_clouds(x, y, labels=({"a": one, "b": two},) * 2).source, both.source)
    with pytest.raises(ValueError, match="equal keys"):
        mbot.match_clouds(x, y, labels=({"a": one}, {"b": one}))
    plain = mbot.match_clouds(x.half().float(), y.half().float())
    for kind in (np.float16, ">f4", ">f8", np.longdouble):
        given = (points.half().float().numpy().astype(kind) for points in (x, y))
        assert torch.equal(mbot.match_clouds(*given).source, plain.source)


@pytest.mark.parametrize("coupling", [mbot.DataCoupling, mbot.SemidiscreteCoupling])
def test_couplings_of_data_sets_take_classes_in_dicts(coupling):
    settings = {} if coupling is mbot.DataCoupling else {"steps": 20, "batch_size": 64, "tol": 1e9}
    x, classes = torch.randn(60, 2), torch.arange(60) % 3
    learned = coupling(conditional=True, **settings)
    one, other = (learned.fit(x, y, generator=torch.Generator().manual_seed(0)) for y in ({"a": classes}, classes))
    assert one == other
    with pytest.raises(ValueError, match="one condition for each of the 60 samples of the data set; got 59"):
        learned.fit(x, {"a": classes[:59]})


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("missing", [None, float("nan")])
def test_errors_of_labels_name_what_was_given(side, missing):
    """Not the arguments of a coupling, nor a setting that there is none of."""
    labels = [["a", "b"], ["a", "b"]]
    labels[side] = ["a", missing]
    with pytest.raises(ValueError, match=rf"^labels\[{side}\] must hold a label for each sample; 1 are None or NaN, "
                       "the first at index 1$"):  # fmt: skip
        mbot.match_clouds(torch.randn(2, 2), torch.randn(2, 2), labels=tuple(labels))
    labels[side] = [1, 2]
    with pytest.raises(ValueError, match=r"labels\[[01]\] and labels\[[01]\] must hold labels of one kind"):
        mbot.match_clouds(torch.randn(2, 2), torch.randn(2, 2), labels=tuple(labels))
