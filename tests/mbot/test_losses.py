"""Mini-batch losses: the papers' toys, limits, orderings, laws of large numbers, gradients, low memory."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import combinations, product

import numpy as np
import pytest
import torch
from geomloss import SamplesLoss
from hypothesis import given, settings
from hypothesis import strategies as st

import mbot
from mbot import (
    BoMbOT,
    EntropicOT,
    ExactOT,
    MiniBatchOT,
    PartialOT,
    SlicedOT,
    UnbalancedOT,
    pairwise_cost,
)
from mbot.testing import without_fast_paths

INNER = {
    "exact": ExactOT(),
    "partial": PartialOT(0.7),
    "entropic partial": PartialOT(0.7, reg=0.3, tol=1e-12),
    "entropic": EntropicOT(0.3, tol=1e-12),
    "unbalanced": UnbalancedOT(0.3, 1.0, tol=1e-12),
    "sliced": SlicedOT(12),
}
every_inner = pytest.mark.parametrize("inner", INNER.values(), ids=INNER)


@pytest.fixture(autouse=True, params=["fused", "general"])
def path(request):
    """Both paths of grids of exact transports."""
    with nullcontext() if request.param == "fused" else without_fast_paths():
        yield


def batches(k=3, k2=3, m=4, m2=4, d=2, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(k, m, d, generator=g, dtype=dtype),
        torch.randn(k2, m2, d, generator=g, dtype=dtype) + 0.5,
    )


def loss(kind, inner, k=3, m=4, **kwargs):
    kwargs.setdefault("generator", torch.Generator().manual_seed(5))
    make = {"m-OT": MiniBatchOT, "BoMb": BoMbOT}.get(kind)
    if kind == "aligned":
        return MiniBatchOT(inner, num_batches=k, batch_size=m, pairing="aligned", **kwargs)
    if kind == "e-BoMb":
        return BoMbOT(inner, num_batches=k, batch_size=m, reg=0.5, **kwargs)
    return make(inner, num_batches=k, batch_size=m, **kwargs)


# --- exact toys (mbot.md section 6) --------------------------------------------------------------------------------

X3 = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
Y3 = X3 + torch.tensor([1.0, 0.0], dtype=torch.float64)
XS, YS = torch.stack((X3[1:], X3[:2])), torch.stack((Y3[1:], Y3[:2]))


@pytest.mark.parametrize(("cost", "mot"), [("sqeuclidean", 1.5), ("euclidean", (1 + 2**0.5) / 2)])
def test_bomb_figure_values(cost, mot):
    settings_ = {"num_batches": 2, "batch_size": 2, "cost": cost}
    assert float(MiniBatchOT(ExactOT(), **settings_).from_batches(XS, YS)) == pytest.approx(mot, abs=1e-12)
    assert float(BoMbOT(ExactOT(), **settings_).from_batches(XS, YS)) == pytest.approx(1, abs=1e-12)
    aligned = MiniBatchOT(ExactOT(), pairing="aligned", **settings_)
    assert float(aligned.from_batches(XS, YS)) == pytest.approx(1, abs=1e-12)
    assert float(ExactOT()(X3, Y3, cost=cost)) == pytest.approx(1, abs=1e-12)


class Replay:
    """Draws the figure's batches: stands in for `draw_batches`."""

    def __init__(self, *indices):
        self.indices = [torch.tensor(i) for i in indices]

    def __call__(self, *args, **kwargs):
        return self.indices.pop(0)


def test_bomb_figure_plans(monkeypatch):
    drawn = [[[1, 2], [0, 1]]] * 2
    monkeypatch.setattr("mbot.losses.draw_batches", Replay(*drawn))
    plan = MiniBatchOT(ExactOT(), num_batches=2, batch_size=2).plan(X3, Y3)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    expected[0, 0] = expected[2, 2] = 0.125
    expected[1, 1] = 0.25
    for i, j in ((0, 1), (1, 2), (1, 0), (2, 1)):
        expected[i, j] = 0.125
    torch.testing.assert_close(plan.to_dense(), expected, rtol=0, atol=1e-12)
    cells = plan.row * 3 + plan.col
    assert len(cells.unique()) == len(cells), "repeated indices are accumulated"
    monkeypatch.setattr("mbot.losses.draw_batches", Replay(*drawn))
    plan = BoMbOT(ExactOT(), num_batches=2, batch_size=2).plan(X3, Y3)
    torch.testing.assert_close(
        plan.to_dense(), torch.diag(torch.tensor([0.25, 0.5, 0.25]).double()), rtol=0, atol=1e-12
    )


def test_m_pot_figure_through_the_loss():
    x = torch.tensor([[0.0, i] for i in (1, 2, 3)], dtype=torch.float64)
    y = torch.tensor([[1.0, i] for i in (3, 4, 5)], dtype=torch.float64)
    for mass, value in ((1, 5), (2 / 3, 4 / 3), (1 / 2, 5 / 6), (1 / 3, 1 / 3)):
        one = MiniBatchOT(PartialOT(mass), num_batches=1, batch_size=3).from_batches(x[None], y[None])
        assert float(one) == pytest.approx(value, abs=1e-12)


def test_m_pot_keeps_only_right_pairs_where_m_ot_makes_wrong_ones(monkeypatch):
    """mbot.md 6.3: n = 4, m = 2, k = 2, s = 1/2."""
    x = torch.tensor([[0.0, i] for i in range(1, 5)], dtype=torch.float64)
    y = x + torch.tensor([1.0, 0.0], dtype=torch.float64)
    drawn = ([[0, 1], [2, 3]], [[1, 2], [0, 3]])  # X1 = {1,2}, X2 = {3,4}; Y1 = {2,3}, Y2 = {1,4}
    monkeypatch.setattr("mbot.losses.draw_batches", Replay(*drawn))
    full = MiniBatchOT(ExactOT(), num_batches=2, batch_size=2, pairing="aligned").plan(x, y).to_dense()
    assert int((full.diagonal() > 0).sum()) == 1
    monkeypatch.setattr("mbot.losses.draw_batches", Replay(*drawn))
    kept = MiniBatchOT(PartialOT(0.5), num_batches=2, batch_size=2, pairing="aligned").plan(x, y).to_dense()
    expected = torch.zeros(4, 4, dtype=torch.float64)
    expected[1, 1] = expected[3, 3] = 0.25
    torch.testing.assert_close(kept, expected, rtol=0, atol=1e-12)


# --- limits and orderings ------------------------------------------------------------------------------------------


@every_inner
def test_one_batch_of_everything_is_the_transport_itself(inner):
    x, y = torch.randn(6, 2, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    expected = float(inner(x, y)) if not isinstance(inner, SlicedOT) else None
    for kind in ("m-OT", "aligned", "BoMb", "e-BoMb"):
        value = float(loss(kind, inner, k=1, m=6)(x, y))
        if expected is None:
            expected = float(inner(x, y, generator=seed_after_draw()))
        assert value == pytest.approx(expected, rel=1e-9, abs=1e-12)


def seed_after_draw():
    """The generator as the loss leaves it after drawing two batches of 6 of 6 points."""
    g = torch.Generator().manual_seed(5)
    for _ in range(2):
        torch.rand(1, 6, generator=g)
    return g


def test_the_outer_cost_is_the_whole_inner_value():
    """The authors' code takes <C, P>: a callable transport does, and over unbalanced transport it is another number."""
    inner, (xs, ys) = INNER["unbalanced"], batches()

    def transported(x, y):
        cost = pairwise_cost(x, y)
        return inner.plan(cost).cost(cost)

    settings_ = {"num_batches": 3, "batch_size": 4}
    whole = float(BoMbOT(inner, **settings_).from_batches(xs, ys))
    part = float(BoMbOT(transported, **settings_).from_batches(xs, ys))
    values, transports = inner(xs[:, None], ys[None]), transported(xs[:, None], ys[None])
    assert whole == pytest.approx(float(ExactOT().value(values)), rel=1e-9)
    assert part == pytest.approx(float(ExactOT().value(transports)), rel=1e-9)
    assert abs(whole - part) > 0.1 * whole


def test_batches_of_one_point_give_the_mean_cost():
    xs, ys = batches(k=5, k2=7, m=1, m2=1)
    mean = pairwise_cost(xs[:, 0], ys[:, 0]).mean()
    assert float(MiniBatchOT(ExactOT(), num_batches=5, batch_size=1).from_batches(xs, ys)) == pytest.approx(float(mean))


@every_inner
def test_outer_regularisation_goes_from_bomb_to_the_grid(inner):
    xs, ys = batches()
    g = lambda: torch.Generator().manual_seed(0)
    kwargs = {"num_batches": 3, "batch_size": 4}
    exact = float(BoMbOT(inner, generator=g(), **kwargs).from_batches(xs, ys))
    grid = float(MiniBatchOT(inner, generator=g(), **kwargs).from_batches(xs, ys))
    small = float(BoMbOT(inner, reg=1e-4, generator=g(), **kwargs).from_batches(xs, ys))
    large = float(BoMbOT(inner, reg=1e5, generator=g(), **kwargs).from_batches(xs, ys))
    assert small == pytest.approx(exact, abs=1e-3)
    assert large == pytest.approx(grid, rel=1e-4)
    middle = float(BoMbOT(inner, reg=0.1, generator=g(), **kwargs).from_batches(xs, ys))
    assert exact - 1e-9 <= middle <= grid + 1e-9


@settings(max_examples=25, deadline=None)
@given(k=st.integers(1, 5), k2=st.integers(1, 5), m=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_bomb_is_below_every_other_coupling_of_the_batches(k, k2, m, seed):
    xs, ys = batches(k, k2, m, m, seed=seed)
    kwargs = {"num_batches": (k, k2), "batch_size": m}
    bomb = BoMbOT(ExactOT(), **kwargs)
    value = float(bomb.from_batches(xs, ys))
    grid = MiniBatchOT(ExactOT(), **kwargs)
    assert value <= float(grid.from_batches(xs, ys)) + 1e-12
    inner = ExactOT()(xs[:, None], ys[None])
    entropic = EntropicOT(0.3, tol=1e-10).plan(inner)
    transport = float(entropic.cost(inner))
    assert value <= transport + 1e-9 <= float(inner.mean()) + 1e-8
    if k == k2:
        assert value <= float(inner.diagonal().mean()) + 1e-12
        aligned = MiniBatchOT(ExactOT(), pairing="aligned", **kwargs)
        assert float(aligned.from_batches(xs, ys)) == pytest.approx(float(inner.diagonal().mean()), rel=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_complete_estimator_is_a_coupling_and_an_upper_bound(weighted):
    """All pairs of m-subsets (n = 5, m = 3): the averaged plan has the marginals a and b, so U >= OT."""
    n, m = 5, 3
    x, y = torch.randn(n, 2, dtype=torch.float64), torch.randn(n, 2, dtype=torch.float64)
    a = b = torch.full((n,), 1 / n, dtype=torch.float64)
    if weighted:
        a, b = torch.rand(n, dtype=torch.float64) + 0.1, torch.rand(n, dtype=torch.float64) + 0.1
        a, b = a / a.sum(), b / b.sum()
    subsets = [torch.tensor(s) for s in combinations(range(n), m)]
    total, value, count = torch.zeros(n, n, dtype=torch.float64), 0.0, len(subsets) ** 2
    for rows, cols in product(subsets, subsets):
        # rule (P^W, w^W): renormalised weights inside, batch totals outside
        u, v = a[rows].sum() * n / m, b[cols].sum() * n / m
        plan = ExactOT().plan(pairwise_cost(x[rows], y[cols]), a[rows] / a[rows].sum(), b[cols] / b[cols].sum())
        total[rows[:, None], cols] += u * v * plan.to_dense() / count
        value += float(u * v * plan.cost(pairwise_cost(x[rows], y[cols])) / count)
    torch.testing.assert_close(total.sum(1), a, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(total.sum(0), b, rtol=1e-9, atol=1e-12)
    assert value >= float(ExactOT()(x, y, a, b)) - 1e-12
    g = torch.Generator().manual_seed(0)
    incomplete = MiniBatchOT(ExactOT(), num_batches=30, batch_size=m, generator=g)
    drawn = [float(incomplete(x, y, a if weighted else None, b if weighted else None)) for _ in range(25)]
    standard_error = np.std(drawn) / 5
    assert abs(np.mean(drawn) - value) < 4 * standard_error + 1e-3


@pytest.mark.parametrize("replacement", [False, True])
def test_point_weights_are_the_marginals_on_average(replacement):
    n = 8
    a = torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 7], dtype=torch.float64) / 28
    x = torch.randn(n, 2, dtype=torch.float64)
    g = torch.Generator().manual_seed(1)
    estimator = MiniBatchOT(
        ExactOT(), num_batches=300, batch_size=3, pairing="aligned", replacement=replacement, generator=g
    )
    mean = torch.stack([estimator.plan(x, x, a, a).row_mass() for _ in range(20)]).mean(0)
    torch.testing.assert_close(mean, a, rtol=0, atol=0.01)
    assert float(mean[0]) == 0


def test_marginal_error_falls_like_one_over_root_k():
    n, ks = 200, [8, 32, 128, 512]
    x, y = torch.randn(n, 2), torch.randn(n, 2)
    errors = []
    for k in ks:
        g = torch.Generator().manual_seed(k)
        estimator = MiniBatchOT(ExactOT(), num_batches=k, batch_size=10, pairing="aligned", generator=g)
        repeats = [float((estimator.plan(x, y).row_mass() - 1 / n).square().mean().sqrt()) for _ in range(6)]
        errors.append(np.mean(repeats))
    slope = np.polyfit(np.log(ks), np.log(errors), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.06)


# --- debiased ------------------------------------------------------------------------------------------------------


def test_the_debiased_loss_is_zero_on_average_for_equal_measures_and_the_plain_one_is_not():
    x = torch.randn(60, 2, dtype=torch.float64)
    kwargs = {"num_batches": 4, "batch_size": 6}
    plain = MiniBatchOT(ExactOT(), generator=torch.Generator().manual_seed(0), **kwargs)
    debiased = MiniBatchOT(ExactOT(), debiased=True, generator=torch.Generator().manual_seed(0), **kwargs)
    drawn = [float(debiased(x, x)) for _ in range(300)]
    assert abs(np.mean(drawn)) < 4 * np.std(drawn) / 300**0.5
    assert float(plain(x, x)) > 0.3


def test_the_debiased_loss_changes_sign_on_the_circle():
    """Eight points on the circle against the same turned by an angle, m = 2: some angles give negative values."""
    angle = torch.arange(8, dtype=torch.float64) * torch.pi / 4
    circle = torch.stack((angle.cos(), angle.sin()), 1)
    subsets = torch.tensor(list(combinations(range(8), 2)))

    def mean_cost(x, y):
        return ExactOT()(x[subsets][:, None], y[subsets][None], cost="euclidean").mean()

    values = []
    for turn in (0.0, torch.pi / 8, torch.pi / 4):
        rotation = torch.tensor([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]], dtype=torch.float64)
        turned = circle @ rotation.T
        values.append(float(mean_cost(circle, turned) - (mean_cost(circle, circle) + mean_cost(turned, turned)) / 2))
    assert values[0] == pytest.approx(0, abs=1e-12)
    assert values[2] == pytest.approx(0, abs=1e-12)  # the same set of points
    assert values[1] != pytest.approx(0, abs=1e-4)


def test_forward_changes_no_setting_not_even_meanwhile():
    """So calls may overlap: here the inner transport calls the loss itself, and threads share one."""
    seen, x, y = [], torch.randn(12, 2), torch.randn(12, 2)

    def transport(p, q):
        seen.append((debiased.num_batches, debiased.batch_size))
        if len(seen) < 9:
            debiased(x, y)
        return (p.mean(-2) - q.mean(-2)).square().sum(-1)

    debiased = MiniBatchOT(transport, num_batches=(2, 3), batch_size=(4, 5), debiased=True)
    debiased(x, y)
    assert set(seen) == {((2, 3), (4, 5))}
    shared = MiniBatchOT(ExactOT(), num_batches=(2, 3), batch_size=(12, 12), debiased=True)  # batches of all points
    expected = float(shared(x, y))
    with ThreadPoolExecutor(4) as threads:
        for value in threads.map(lambda _: float(shared(x, y)), range(40)):
            assert value == pytest.approx(expected, rel=1e-5)


def test_another_solver_of_the_grid():
    """The seam that `mbot.distributed.spread` uses: a scheme and two sides in, a grid out."""
    xs, ys = batches()
    plain = MiniBatchOT(ExactOT(), num_batches=3, batch_size=4, pairing="aligned")
    schemes = []

    def doubled(scheme, x, y):
        schemes.append((scheme, x, y))
        return scheme.solve(dataclasses.replace(x, points=2 * x.points), dataclasses.replace(y, points=2 * y.points))

    other = plain.solved_by(doubled)
    torch.testing.assert_close(other.from_batches(xs, ys), 4 * plain.from_batches(xs, ys))
    torch.testing.assert_close(plain.from_batches(xs, ys), other.from_batches(xs, ys) / 4)  # stays as it is
    (scheme, x, y), *_ = schemes
    assert scheme.aligned
    assert scheme.transport == ExactOT()
    assert x.index is None
    assert y.sizes == [4, 4, 4]
    other(torch.randn(9, 2), torch.randn(9, 2))
    assert schemes[-1][1].index.shape == (3, 4)


def test_from_cost_solves_the_aligned_problems_alone():
    cost = torch.rand(3, 3, 4, 4, dtype=torch.float64)
    aligned = MiniBatchOT(ExactOT(), num_batches=3, batch_size=4, pairing="aligned")
    expected = aligned.from_cost(cost)
    cost[0, 1] = torch.inf  # this problem has no plan, and does not count
    torch.testing.assert_close(aligned.from_cost(cost), expected)
    torch.testing.assert_close(expected, ExactOT().value(cost.diagonal().movedim(-1, 0)).mean())


def test_debiased_from_batches_needs_second_batches():
    xs, ys = batches()
    debiased = MiniBatchOT(ExactOT(), num_batches=3, batch_size=4, debiased=True)
    with pytest.raises(ValueError, match="second, independently drawn"):
        debiased.from_batches(xs, ys)
    xs2, ys2 = batches(seed=9)
    plain = MiniBatchOT(ExactOT(), num_batches=3, batch_size=4)
    expected = plain.from_batches(xs, ys) - (plain.from_batches(xs, xs2) + plain.from_batches(ys, ys2)) / 2
    torch.testing.assert_close(debiased.from_batches(xs, ys, xs2, ys2), expected)
    for refused in (lambda: debiased.from_cost(torch.rand(2, 2, 3, 3)), lambda: debiased.plan(xs[0], ys[0])):
        with pytest.raises(ValueError, match="debiased"):
            refused()


# --- forms agree ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inner", [t for n, t in INNER.items() if n != "sliced"], ids=[n for n in INNER if n != "sliced"]
)
@pytest.mark.parametrize("kind", ["m-OT", "aligned", "BoMb", "e-BoMb"])
def test_from_cost_is_from_batches(inner, kind):
    xs, ys = batches()
    xs.requires_grad_()
    by_points = loss(kind, inner).from_batches(xs, ys)
    by_cost = loss(kind, inner).from_cost(pairwise_cost(xs[:, None], ys[None]))
    torch.testing.assert_close(by_points, by_cost)
    (g1,), (g2,) = torch.autograd.grad(by_points, xs), torch.autograd.grad(by_cost, xs)
    torch.testing.assert_close(g1, g2)


@pytest.mark.parametrize("kind", ["m-OT", "aligned", "BoMb", "e-BoMb"])
def test_the_plan_prices_the_loss(kind):
    """<C, plan> of the full problem is the transport part of the loss on the same draw."""
    x, y = torch.randn(30, 2, dtype=torch.float64), torch.randn(40, 2, dtype=torch.float64)
    value = float(loss(kind, ExactOT(), k=4, m=5)(x, y))
    plan = loss(kind, ExactOT(), k=4, m=5).plan(x, y)
    assert plan.is_sparse
    assert plan.size == (30, 40)
    assert float(plan.total_mass()) == pytest.approx(1, rel=1e-12)
    transport = float(plan.cost(pairwise_cost(x, y)))
    if kind == "e-BoMb":
        assert transport <= value + 1e-12
    else:
        assert transport == pytest.approx(value, rel=1e-12)


def test_a_callable_cost_a_small_chunk_and_images_change_nothing(monkeypatch):
    xs, ys = batches(k=5, k2=4)
    for kind in ("m-OT", "BoMb"):
        expected = loss(kind, ExactOT()).from_batches(xs, ys)
        called = loss(kind, ExactOT(), cost=lambda x, y: pairwise_cost(x, y)).from_batches(xs, ys)
        torch.testing.assert_close(called, expected)
        with monkeypatch.context() as patch:
            patch.setattr("mbot.grid._CHUNK", 100)
            leaf = xs.clone().requires_grad_()
            chunked = loss(kind, ExactOT()).from_batches(leaf, ys)
            torch.testing.assert_close(chunked, expected)
            chunked.backward()
        whole = xs.clone().requires_grad_()
        loss(kind, ExactOT()).from_batches(whole, ys).backward()
        torch.testing.assert_close(leaf.grad, whole.grad)
        images = loss(kind, ExactOT()).from_batches(xs.reshape(5, 4, 1, 2), ys.reshape(4, 4, 1, 2))
        torch.testing.assert_close(images, expected)


@every_inner
@pytest.mark.parametrize("kind", ["m-OT", "BoMb", "e-BoMb"])
def test_unequal_numbers_and_sizes(inner, kind):
    xs, ys = batches(k=4, k2=2, m=5, m2=3)
    value = loss(kind, inner, k=(4, 2), m=(5, 3)).from_batches(xs, ys)
    assert value.shape == ()
    assert bool(torch.isfinite(value))


def test_a_ragged_last_batch_counts_by_its_size():
    x, y = torch.randn(11, 2, dtype=torch.float64), torch.randn(11, 2, dtype=torch.float64)
    xs, ys = x.split(4), y.split(4)
    share = torch.tensor([4, 4, 3], dtype=torch.float64) / 11
    inner = torch.stack([torch.stack([ExactOT()(p, q) for q in ys]) for p in xs])
    grid = MiniBatchOT(ExactOT(), num_batches=3, batch_size=4).from_batches(xs, ys)
    torch.testing.assert_close(grid, share @ inner @ share)
    bomb = BoMbOT(ExactOT(), num_batches=3, batch_size=4).from_batches(xs, ys)
    torch.testing.assert_close(bomb, ExactOT().value(inner, share, share))
    aligned = MiniBatchOT(ExactOT(), num_batches=3, batch_size=4, pairing="aligned").from_batches(xs, ys)
    torch.testing.assert_close(aligned, share @ inner.diagonal())


@pytest.mark.parametrize("kind", ["m-OT", "aligned", "BoMb"])
def test_geomloss_plugs_in_as_the_inner_loss(kind):
    xs, ys = batches(dtype=torch.float32)
    xs.requires_grad_()
    sinkhorn = SamplesLoss("sinkhorn", p=2, blur=0.3, diameter=10.0)  # one schedule for batches and singles
    value = loss(kind, sinkhorn).from_batches(xs, ys)
    inner = torch.stack([torch.stack([sinkhorn(p, q) for q in ys]) for p in xs])
    expected = {"m-OT": inner.mean(), "aligned": inner.diagonal().mean(), "BoMb": ExactOT().value(inner)}[kind]
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(value, xs)[0], torch.autograd.grad(expected, xs)[0], rtol=1e-4, atol=1e-6
    )


def test_a_callable_on_single_clouds_plugs_in_too():
    xs, ys = batches()
    distance = lambda x, y: (x.mean(0) - y.mean(0)).square().sum()
    inner = (xs.mean(1)[:, None] - ys.mean(1)[None]).square().sum(-1)
    torch.testing.assert_close(loss("m-OT", distance).from_batches(xs, ys), inner.mean())
    torch.testing.assert_close(loss("BoMb", distance).from_batches(xs, ys), ExactOT().value(inner))


# --- gradients -----------------------------------------------------------------------------------------------------


@every_inner
@pytest.mark.parametrize("kind", ["m-OT", "aligned", "BoMb", "e-BoMb"])
def test_gradients_against_finite_differences(inner, kind):
    xs, ys = batches()

    def value(xs, ys):
        return loss(kind, inner, generator=torch.Generator().manual_seed(0)).from_batches(xs, ys)

    # Along random directions: entry by entry would solve each grid a hundred times.
    points = (xs.requires_grad_(), ys.requires_grad_())
    for _ in range(3):
        assert torch.autograd.gradcheck(value, points, eps=1e-6, atol=1e-5, fast_mode=True)


@pytest.mark.parametrize("cost", ["euclidean", "cosine", "dot"])
def test_gradients_of_other_costs(cost):
    xs, ys = batches(d=3)
    for kind in ("m-OT", "BoMb"):
        assert torch.autograd.gradcheck(
            lambda xs, ys, kind=kind: loss(kind, ExactOT(), cost=cost).from_batches(xs, ys),
            (xs.requires_grad_(), ys.requires_grad_()),
        )


@pytest.mark.parametrize(
    "inner", [mbot.EntropicOT(1.0), mbot.UnbalancedOT(1.0, 2.0), mbot.PartialOT(0.6, reg=1.0)], ids=str
)
def test_a_dense_grid_keeps_its_plans_alone_for_backward(inner):
    kept = {}
    xs, ys = torch.randn(3, 5, 6, requires_grad=True), torch.randn(2, 7, 6)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        mbot.MiniBatchOT(inner, num_batches=(3, 2), batch_size=(5, 7)).from_batches(xs, ys)
    assert [part.shape for part in kept.values() if part.numel() >= 3 * 5 * 2 * 7] == [(3, 2, 5, 7)]


@pytest.mark.parametrize("inner", [ExactOT(), EntropicOT(0.3, tol=1e-12)], ids=["exact", "entropic"])
@pytest.mark.parametrize("kind", ["m-OT", "aligned", "BoMb", "e-BoMb"])
@pytest.mark.parametrize("norm", ["batch norm", "dropout", "plain"])
def test_backward_by_pair_is_backward(inner, kind, norm):
    middle = {"batch norm": torch.nn.BatchNorm1d(8), "dropout": torch.nn.Dropout(0.5), "plain": torch.nn.Identity()}
    net = torch.nn.Sequential(torch.nn.Linear(2, 8), middle[norm], torch.nn.ReLU(), torch.nn.Linear(8, 3)).double()
    net.train()
    xs, ys = batches(k=3, k2=3, m=6, m2=6)
    start = {name: value.clone() for name, value in net.state_dict().items()}
    torch.manual_seed(3)
    one_shot = loss(kind, inner).from_batches([net(x) for x in xs], [net(y) for y in ys])
    (2.5 * one_shot).backward()
    gradients = [p.grad.clone() for p in net.parameters()]
    after = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    net.load_state_dict(start)
    net.zero_grad()
    torch.manual_seed(3)
    calls = []
    value = loss(kind, inner).backward_by_pair(lambda x: calls.append(1) or net(x), xs, ys, weight=2.5)
    torch.testing.assert_close(value, one_shot.detach(), rtol=1e-12, atol=1e-12)
    for p, expected in zip(net.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-10, atol=1e-12)
    for name, buffer in net.state_dict().items():
        torch.testing.assert_close(buffer, after[name], rtol=1e-12, atol=1e-12)
    assert len(calls) == 2 * (3 + 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_backward_by_pair_under_autocast_and_with_frozen_parts():
    net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    net[0].requires_grad_(False)
    xs, ys = batches(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss("BoMb", ExactOT()).backward_by_pair(net, xs, ys)
    assert value.dtype == torch.float32
    assert net[0].weight.grad is None
    assert bool(torch.isfinite(net[2].weight.grad).all())


# --- drawing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [20, 5000])
def test_batches_without_replacement_hold_distinct_points_uniformly(size):
    g = torch.Generator().manual_seed(0)
    index = mbot.minibatch.draw_batches(size, 400, 10, generator=g, device=torch.device("cpu"))
    assert index.shape == (400, 10)
    assert all(len(row.unique()) == 10 for row in index)
    share = torch.histc(index.float(), 10, 0, size) / index.numel()
    torch.testing.assert_close(share, torch.full((10,), 0.1), rtol=0, atol=0.02)


def test_disjoint_batches_share_no_point():
    estimator = MiniBatchOT(ExactOT(), num_batches=4, batch_size=5, disjoint=True)
    x = torch.randn(20, 2)
    plan = estimator.plan(x, x)
    torch.testing.assert_close(plan.row_mass(), torch.full((20,), 0.05))
    with pytest.raises(ValueError, match="4 disjoint batches of 5"):
        estimator(x[:19], x)


def test_with_replacement_a_batch_may_be_larger_than_the_cloud():
    x = torch.randn(3, 2)
    assert bool(torch.isfinite(MiniBatchOT(ExactOT(), num_batches=2, batch_size=8, replacement=True)(x, x)))
    with pytest.raises(ValueError, match="a batch of 8 cannot be drawn without replacement from the 3 points of x"):
        MiniBatchOT(ExactOT(), num_batches=2, batch_size=8)(x, x)


def test_the_generator_decides_the_draw():
    x, y = torch.randn(50, 2), torch.randn(50, 2)
    values = [float(loss("BoMb", SlicedOT(5), generator=torch.Generator().manual_seed(4))(x, y)) for _ in range(2)]
    assert values[0] == values[1]


def test_the_barycentric_map_flags_points_that_no_batch_drew():
    x = torch.randn(100, 2)
    plan = MiniBatchOT(ExactOT(), num_batches=2, batch_size=5, generator=torch.Generator().manual_seed(0)).plan(x, x)
    mapped, reached = plan.barycentric_map(x)
    assert 5 <= int(reached.sum()) <= 10
    assert bool((mapped[~reached] == 0).all())


def mot(**kwargs):
    return MiniBatchOT(ExactOT(), **{"num_batches": 1, "batch_size": 1, **kwargs})


def given(xs, ys, kind="m-OT"):
    return loss(kind, ExactOT()).from_batches(torch.randn(*xs), torch.randn(*ys))


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: MiniBatchOT("exact", num_batches=1, batch_size=1), TypeError, "callable"),
        (lambda: mot(num_batches=0), ValueError, "num_batches must be at least 1"),
        (lambda: mot(batch_size=2.5), TypeError, "batch_size must be an int"),
        (lambda: mot(num_batches=(1, 2, 3)), ValueError, "a pair"),
        (lambda: mot(pairing="all"), ValueError, "pairing must be"),
        (lambda: mot(num_batches=(2, 3), pairing="aligned"), ValueError, "equally many"),
        (lambda: mot(cost="l2"), ValueError, "cost must be one of"),
        (lambda: mot(replacement=True, disjoint=True), ValueError, "not both"),
        (lambda: BoMbOT(ExactOT(), num_batches=1, batch_size=1, reg=-1), ValueError, "reg must be"),
        (lambda: given((4, 2), (4, 2)), ValueError, "batches, points"),
        (lambda: loss("m-OT", ExactOT()).from_batches([], []), ValueError, "at least one mini-batch"),
        (lambda: given((2, 4, 2), (2, 4, 3)), ValueError, "features"),
        (lambda: given((2, 4, 2), (3, 4, 2), "aligned"), ValueError, "as many"),
        (lambda: mot().from_cost(torch.randn(4, 4)), ValueError, r"\(k, k', m, m'\)"),
        (lambda: mot().from_cost(torch.randn(0, 2, 4, 4)), ValueError, r"k, k' >= 1; got \(0, 2, 4, 4\)"),
        (lambda: mot().from_batches(torch.randn(0, 4, 2), torch.randn(2, 4, 2)), ValueError, "at least one mini-batch"),
        (lambda: loss("m-OT", SlicedOT(2)).plan(torch.randn(9, 2), torch.randn(9, 2)), TypeError, "values alone"),
        (lambda: mot()(torch.full((9, 2), torch.nan), torch.randn(9, 2)), ValueError, "finite"),
    ],
)
def test_bad_input(make, error, says):
    with pytest.raises(error, match=says):
        make()


@pytest.mark.parametrize("loss", [mbot.MiniBatchOT, mbot.BoMbOT])
def test_a_transport_is_an_object_not_its_class(loss):
    """A class is callable, and failed at the first batch inside its own ``__init__``."""
    with pytest.raises(TypeError, match=r"transport such as ExactOT\(\), .*; got the class ExactOT"):
        loss(mbot.ExactOT, num_batches=2, batch_size=4)
