"""Float32 points wherever they lie: costs, values, plans, pairs and gradients as in float64 on the same points."""

import numpy as np
import ot
import pytest
import torch
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

import mbot
from mbot.cost import expansion_holds
from mbot.transport import large_clouds

COSTS = ["sqeuclidean", "euclidean", "cosine", "dot"]
FEATURES = st.sampled_from([1, 2, 4, 5, 8, 30, 100])


def exact_cost(x, y, cost="sqeuclidean"):
    """By differences, in float64."""
    x, y = x.double(), y.double()
    if cost == "dot":
        return -(x[..., :, None, :] * y[..., None, :, :]).sum(-1)
    if cost == "cosine":
        x, y = (p / p.norm(dim=-1, keepdim=True) for p in (x, y))
    squared = (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1)
    if cost == "euclidean":  # of derivative 0 where points coincide
        return torch.where(squared > 0, torch.where(squared > 0, squared, 1).sqrt(), 0)
    return squared / 2 if cost == "cosine" else squared


@st.composite
def clouds(draw, batch=False, least=2, square=False, balanced=False):
    """Two clouds of one or several groups at offsets of 1 to 1e6, with or without outliers, in float32.

    ``balanced``: as many points of a group on both sides, and no outliers.
    """
    d, n = draw(FEATURES), draw(st.integers(least, 24))
    m = n if square else draw(st.integers(least, 24))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    shape = (draw(st.integers(1, 3)),) if batch else ()
    offset = 10 ** draw(st.floats(0, 6))
    groups = draw(st.integers(1, 4))
    places = offset * torch.randn(groups, d, generator=g)
    sides = []
    for size in (n, m):
        cloud = torch.randn(*shape, size, d, generator=g)
        member = torch.arange(size) % groups if balanced else torch.randint(groups, (*shape, size), generator=g)
        cloud += places[member]
        if not balanced and draw(st.booleans()):
            cloud[..., 0, :] += 10 ** draw(st.floats(0, 6)) * torch.randn(d, generator=g)
        sides.append(cloud)
    if draw(st.booleans()):
        sides[1][..., 0, :] = sides[0][..., 0, :]
    return sides


@settings(max_examples=150, deadline=None)
@given(clouds(batch=True), st.sampled_from(COSTS))
def test_every_single_cost(pair, cost):
    x, y = pair
    costs, exact = mbot.pairwise_cost(x, y, cost), exact_cost(x, y, cost)
    assert costs.dtype == torch.float32
    wrong = (costs.double() - exact).abs()
    if cost == "dot":  # which has no small costs to protect
        sizes = x.double().norm(dim=-1)[..., :, None] * y.double().norm(dim=-1)[..., None, :]
        assert bool((wrong <= 1e-6 * sizes).all())
        return
    tenth = exact.kthvalue(max(1, exact.shape[-1] // 10), dim=-1).values[..., None]
    assert bool((wrong <= torch.maximum(1e-4 * exact, 1e-5 * tenth) + 1e-37).all())
    if cost != "cosine":
        assert bool((costs[exact == 0] == 0).all())


@settings(max_examples=60, deadline=None)
@given(clouds(batch=True), st.sampled_from(COSTS))
def test_gradients_of_costs_to_two_orders(pair, cost):
    """Of a plan-like weighting, against float64 differences."""
    x, y = pair
    assume(x.shape[-1] > 1 or cost not in ("euclidean", "cosine"))  # derivatives that are sums of signs
    plan = (-exact_cost(x, y) / exact_cost(x, y).amin(-1, keepdim=True).clamp_min(1e-3)).softmax(-1)
    if cost in ("euclidean", "cosine"):
        plan = torch.where(exact_cost(x, y) < 1e-6, 0, plan)  # no derivative there

    def first_and_second(x, cost_of):
        x = x.clone().requires_grad_()
        total = (plan.to(x.dtype) * cost_of(x)).sum()
        (first,) = torch.autograd.grad(total, x, create_graph=True)
        second = torch.zeros_like(x)
        if first.requires_grad:  # else the cost is linear
            (second,) = torch.autograd.grad((first * torch.linspace(-1, 1, first.shape[-1])).sum(), x)
        return first.detach(), second

    ours = first_and_second(x, lambda x: mbot.pairwise_cost(x, y, cost))
    exact = first_and_second(x.double(), lambda x: exact_cost(x, y, cost))
    for found, wanted in zip(ours, exact, strict=True):
        assert float((found - wanted).norm()) <= 1e-4 * float(wanted.norm()) + 1e-12


def assigned(cost):
    """Mean cost of the best assignment; `ot.emd2` stops short of it where costs have many magnitudes."""
    rows, columns = linear_sum_assignment(cost.numpy())
    return float(cost[rows, columns].mean())


@settings(max_examples=120, deadline=None)
@given(clouds(square=True), st.sampled_from(["sqeuclidean", "euclidean", "cosine"]), st.sampled_from([0.3, 1.0]))
def test_exact_values_plans_and_gradients(pair, cost, mass):
    x, y = pair
    assume(x.shape[-1] > 1 or cost != "cosine")
    exact = exact_cost(x, y, cost)
    transport = mbot.ExactOT() if mass == 1 else mbot.PartialOT(mass)
    best = float(transport.plan(exact).cost(exact))
    if mass == 1:
        best = assigned(exact)
    x.requires_grad_()
    value = transport(x, y, cost=cost)
    assert float(value.detach()) == pytest.approx(best, rel=1e-5, abs=1e-30)
    plan = transport.plan(mbot.pairwise_cost(x.detach(), y, cost))
    assert float(plan.cost(exact)) == pytest.approx(best, rel=1e-5, abs=1e-30)
    value.backward()
    wide = x.detach().double().requires_grad_()
    (plan.to_dense().double() * exact_cost(wide, y.double(), cost)).sum().backward()
    assert float((x.grad - wide.grad).norm()) <= 1e-4 * float(wide.grad.norm()) + 1e-30


@settings(max_examples=40, deadline=None)
@given(
    clouds(square=True, least=4, balanced=True), st.sampled_from(["entropic", "unbalanced", "m-OT", "BoMb-OT", "tiled"])
)
def test_values_and_gradients_of_all_transports_and_losses(pair, kind):
    """The same call on the points in float64."""
    typical = 3 * float(exact_cost(*pair).amin(-1).mean()) + 1e-3

    def tiled(x, y):
        try:
            return large_clouds.entropic_values(x, y, None, None, "sqeuclidean", typical, 20_000, 1e-6)
        except mbot.ConvergenceWarning:  # so few points are not over-relaxed, and some groups exchange next to nothing
            reject()

    def run(x, y):
        x = x.clone().requires_grad_()
        settings = {"num_batches": 3, "batch_size": 3, "generator": torch.Generator().manual_seed(0)}
        value = {
            "entropic": lambda: mbot.EntropicOT(typical)(x, y),
            "unbalanced": lambda: mbot.UnbalancedOT(typical, 10 * typical)(x, y),
            "m-OT": lambda: mbot.MiniBatchOT(mbot.ExactOT(), **settings)(x, y),
            "BoMb-OT": lambda: mbot.BoMbOT(mbot.ExactOT(), **settings)(x, y),
            "tiled": lambda: tiled(x, y),
        }[kind]()
        value.backward()
        return float(value.detach()), x.grad.double()

    if kind not in ("m-OT", "BoMb-OT"):  # in float32 their exponents have 7 digits
        most = float(exact_cost(*pair).amax())
        assume(most < 1e3 * typical)
        typical = max(typical, 0.05 * most)
    (found, slope), (wanted, exact) = run(*pair), run(*(p.double() for p in pair))
    assert found == pytest.approx(wanted, rel=2e-5, abs=1e-30)
    assert float((slope - exact).norm()) <= 2e-4 * float(exact.norm()) + 1e-30


@settings(max_examples=40, deadline=None)
@given(clouds(square=True), st.sampled_from([1, 2, 3]), st.booleans())
def test_sliced_values(pair, p, grid):
    """On one feature, where every direction gives the cost of the sorted points."""
    x, y = (side[:, :1] for side in pair)
    exact = (x.double().sort(0).values - y.double().sort(0).values).abs().pow(p).mean()
    sliced = mbot.SlicedOT(num_projections=3, p=p)
    value = sliced.grid(x[None], y[None])[0, 0] if grid else sliced(x, y)
    assert float(value) == pytest.approx(float(exact), rel=3e-5, abs=1e-30)


@settings(max_examples=60, deadline=None)
@given(
    clouds(square=True, least=4),
    st.sampled_from(
        [
            mbot.IndependentCoupling(),
            mbot.OTCoupling(),
            mbot.OTCoupling(mbot.PartialOT(0.5), refill="independent"),
            mbot.BoMbCoupling(num_batches=2),
            mbot.ConditionalOTCoupling(),
            mbot.SinkhornCoupling(0.5, cost="sqeuclidean"),
            mbot.SinkhornCoupling(0.5, cost="sqeuclidean", cells=20),
        ]
    ),
)
def test_costs_that_couplings_state(pair, coupling):
    x, y = pair
    pairs = coupling(x, y, y1=[0] * len(y), generator=torch.Generator().manual_seed(0))
    exact = exact_cost(x, y)
    if "transport_cost" in pairs.info:
        true = float(exact[pairs.source, pairs.target].mean())
        assert pairs.info["transport_cost"] == pytest.approx(true, rel=1e-5, abs=1e-30)
    if isinstance(coupling, mbot.OTCoupling | mbot.ConditionalOTCoupling) and "kept" not in pairs.info:
        assert float(exact[pairs.source, pairs.target].mean()) == pytest.approx(assigned(exact), rel=1e-5)


def test_groups_far_apart():
    x, y = torch.randn(2, 64, 8)
    x[32:] += 1e4
    assert float(mbot.ExactOT()(x, x)) == 0
    y[32:] += 1e4
    assert float(mbot.ExactOT()(x, y)) == pytest.approx(ot.emd2([], [], exact_cost(x, y).numpy()), rel=1e-5)


def test_the_careful_way_in_small_parts(monkeypatch):
    """Rows and pairs are taken some at a time; results and gradients stay."""
    x, y = torch.randn(2, 20, 8), torch.randn(30, 8)
    x[:, 10:] += 1e7
    y[15:] += 1e7
    x[0, 3] = y[4]
    x.requires_grad_()
    results = []
    for cells in (1 << 22, 70, 1):
        monkeypatch.setattr("mbot.cost._CELLS", cells)
        costs = mbot.pairwise_cost(x, y)
        (grad,) = torch.autograd.grad(((costs < 1e6) * costs).sum(), x)
        results.append((costs.detach(), grad))
        torch.testing.assert_close(costs.detach().double(), exact_cost(x.detach(), y), rtol=1e-6, atol=0)
    for costs, grad in results[1:]:
        torch.testing.assert_close(costs, results[0][0], rtol=1e-6, atol=0)
        torch.testing.assert_close(grad, results[0][1], rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "cosine"])
def test_fused_passes_are_for_points_that_are_not_too_far_apart(cost):
    x, y = torch.randn(200, 8), torch.randn(300, 8)
    assert expansion_holds(x, y, cost)
    assert expansion_holds(x * 1e-3, y * 1e3, cost)
    near = x + 1e-4 * torch.randn(200, 8) if cost != "cosine" else x
    far = [p + 1e4 * (torch.arange(len(p)) % 2)[:, None] for p in (x, y)]
    assert not expansion_holds(x, near, cost)
    assert not expansion_holds(*far, cost)
    x[0] += 1e5
    y[0] += 1e5
    assert cost == "cosine" or not expansion_holds(x, y, cost)


@pytest.mark.parametrize("d", [2, 8])
@pytest.mark.parametrize("size", [1e18, 1e20, 1e30])
def test_numbers_whose_squares_overflow(d, size):
    """Right where the costs fit into float32, else an error; never an infinite cost, which would forbid the pair."""
    x, y = torch.randn(9, d) * size, torch.randn(9, d) * size
    torch.testing.assert_close(
        mbot.pairwise_cost(x, y, "euclidean").double(), exact_cost(x, y, "euclidean"), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        mbot.pairwise_cost(x, y, "cosine").double(), exact_cost(x, y, "cosine"), rtol=1e-5, atol=1e-6
    )
    if size > 1e19:
        for cost in ("sqeuclidean", "dot"):
            with pytest.raises(
                ValueError, match=r"do not fit into torch\.float32: rescale the points or pass them in float64"
            ):
                mbot.pairwise_cost(x, y, cost)
        assert bool(mbot.pairwise_cost(x.double(), y.double()).isfinite().all())
    same = x.clone()
    assert float(mbot.pairwise_cost(same, same[:1])[0, 0]) == 0 if size < 1e19 else True


@pytest.mark.parametrize("place", [-9999.0, 1e6, 1e30, float("nan"), float("inf")])
@pytest.mark.parametrize("d", [2, 8])
@pytest.mark.parametrize(
    "transport",
    [
        mbot.ExactOT(),
        mbot.PartialOT(0.5),
        mbot.PartialOT(0.5, reg=0.1),
        mbot.EntropicOT(0.1),
        mbot.UnbalancedOT(0.1, 1.0),
        mbot.SlicedOT(num_projections=5),
        "tiled",
    ],
    ids=str,
)
def test_points_of_weight_zero_change_nothing(transport, place, d, monkeypatch):
    x, y, a = torch.rand(2, 10, d), torch.rand(30, d), torch.rand(2, 10)
    a = a / a.sum(-1, keepdim=True)
    if transport == "tiled":
        transport = mbot.EntropicOT(0.1)
        monkeypatch.setattr(large_clouds, "_MOST", {"cpu": 0})
    settings = {"generator": torch.Generator().manual_seed(0)} if isinstance(transport, mbot.SlicedOT) else {}
    x.requires_grad_()
    wanted = transport(x, y, a, **settings)
    wanted.sum().backward()
    padded = torch.cat((x.detach(), torch.full((2, 7, d), place)), 1).requires_grad_()
    if settings:
        settings["generator"].manual_seed(0)
    found = transport(padded, y, torch.cat((a, torch.zeros(2, 7)), 1), **settings)
    found.sum().backward()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(padded.grad[:, :10], x.grad, rtol=1e-4, atol=1e-6)
    assert bool((padded.grad[:, 10:] == 0).all())


def test_conditions_far_apart():
    """Equal conditions cost nothing, near ones what they cost, also beside a far group."""
    y = torch.randn(8, 6)
    y[4:] += 1e4
    found = mbot.ConditionalOTCoupling("continuous", weight=1e3, condition_cost="sqeuclidean")
    x0, x1 = torch.zeros(8, 2), torch.zeros(8, 2)
    noise = y + 0.01 * torch.randn(8, 6)
    order = np.random.default_rng(0).permutation(8)
    pairs = found(x0, x1, noise[order], y)
    assert order[pairs.source.numpy()].tolist() == list(range(8))
