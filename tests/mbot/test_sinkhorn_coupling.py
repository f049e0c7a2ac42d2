"""SinkhornCoupling: potentials held or streamed, against the dense entropic solver."""

import math
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mbot
from mbot import EntropicOT, OTCoupling, SinkhornCoupling, pairwise_cost
from mbot.geometry import Dense, Points
from mbot.solvers.marginals import Balanced
from mbot.solvers.sinkhorn import solve


def clouds(n, m, d=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(m, d, generator=g) * 0.7 + 2


def plan_of(found, cost, eps):
    return (found.phi[0, :, None] + found.psi[0] - cost.double() / eps).exp()


def by_rounds(geometry, eps, spread, **settings):
    uniform = (torch.full((1, size), -math.log(size), dtype=torch.float64) for size in geometry.shape[1:])
    return solve(geometry, *uniform, Balanced(), Balanced(), reg=eps, spread=spread, **settings)


@pytest.mark.parametrize("kind", ["dense", "points"])
@pytest.mark.parametrize(("n", "m"), [(60, 60), (40, 70)])
@pytest.mark.parametrize("eps", [0.3, 1.0])
def test_potentials_are_those_of_the_dense_solver(kind, n, m, eps):
    x, y = (t.double() for t in clouds(n, m))
    cost = pairwise_cost(x, y)
    geometry = Dense(cost[None]) if kind == "dense" else Points(x, y, "sqeuclidean", 150)
    found = by_rounds(geometry, eps, float(cost.max()), max_iter=2000, tol=1e-8)
    assert found.converged
    expected = EntropicOT(eps, tol=1e-11).plan(cost).to_dense()
    torch.testing.assert_close(plan_of(found, cost, eps), expected, atol=1e-8, rtol=1e-5)


def test_a_kernel_that_underflows_is_passed_by():
    """A target so far off that its whole column of the row-centred kernel is 0 in float32."""
    x, y = clouds(50, 50)
    y[0] += 300
    cost = pairwise_cost(x, y)
    found = by_rounds(Dense(cost[None]), 1.0, 1.0, max_iter=500, tol=1e-4)
    assert found.converged
    torch.testing.assert_close(plan_of(found, cost, 1.0).sum(0)[0], torch.tensor(1 / 50).double(), rtol=1e-2, atol=0)


def test_tiles_give_the_result_of_the_whole():
    x0, x1 = clouds(300, 300)
    whole = SinkhornCoupling(0.1)(x0, x1, generator=torch.Generator().manual_seed(0))
    for cells in (300 * 7, 300, 1):
        tiled = SinkhornCoupling(0.1, cells=cells)(x0, x1, generator=torch.Generator().manual_seed(0))
        assert tiled.info["plan_entropy"] == pytest.approx(whole.info["plan_entropy"], abs=1e-3)
        assert float((tiled.source == whole.source).float().mean()) > 0.98


def test_nothing_larger_than_the_allowance_is_made(monkeypatch):
    largest = 0
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, torch.Tensor) and t.ndim == 2 and min(t.shape) > 2:
                    largest = max(largest, t.numel())
            return out

    monkeypatch.setattr("mbot.couplings.sinkhorn._PROBE", 50)
    x0, x1 = clouds(800, 800)
    with Watch():
        SinkhornCoupling(1.0, cells=10_000)(x0, x1)
    assert 0 < largest <= 10_000


def test_pairs_follow_the_plan():
    x0, x1 = clouds(6, 6)
    coupling = SinkhornCoupling(1.0, relative=False, cost="sqeuclidean", tol=1e-6)
    expected = 6 * EntropicOT(1.0).plan(pairwise_cost(x0, x1)).to_dense()
    g, seen = torch.Generator().manual_seed(0), torch.zeros(6, 6)
    for _ in range(500):
        source = coupling(x0, x1, generator=g).source
        seen[source, torch.arange(6)] += 1 / 500
    torch.testing.assert_close(seen, expected, atol=4 / 500**0.5, rtol=0)


def test_the_dot_cost_is_the_squared_distance_at_half_the_regularisation():
    x0, x1 = clouds(100, 100)
    dot = SinkhornCoupling(0.5, relative=False, tol=1e-6)
    squared = SinkhornCoupling(1.0, relative=False, cost="sqeuclidean", tol=1e-6)
    one, two = (c(x0, x1, generator=torch.Generator().manual_seed(0)) for c in (dot, squared))
    assert one.info["plan_entropy"] == pytest.approx(two.info["plan_entropy"], abs=1e-4)
    assert torch.equal(one.source, two.source)


def test_entropy_is_that_of_the_plan():
    x0, x1 = clouds(90, 50)
    info = SinkhornCoupling(0.3, relative=False, cost="sqeuclidean", tol=1e-7)(x0, x1).info
    expected = mbot.plan_entropy(EntropicOT(0.3).plan(pairwise_cost(x0, x1)))
    assert info["plan_entropy"] == pytest.approx(float(expected), abs=1e-4)


def test_relative_regularisation_ignores_scale_and_offset():
    x0, x1 = clouds(200, 200)
    base = SinkhornCoupling(0.1)(x0, x1).info
    moved = SinkhornCoupling(0.1)(7 * x0 + 50, 7 * x1 - 20).info
    assert moved["plan_entropy"] == pytest.approx(base["plan_entropy"], abs=1e-3)
    assert moved["reg"] == pytest.approx(49 * base["reg"], rel=1e-3)
    centred = [x.double() - x.double().mean(0) for x in (x0, x1)]
    assert base["reg"] == pytest.approx(0.1 * float((centred[0] @ centred[1].T).std()), rel=1e-4)


def test_small_and_large_regularisation_are_optimal_and_independent():
    x0, x1 = clouds(256, 256, d=8)
    exact = OTCoupling()(x0, x1).info["transport_cost"]
    sharp = SinkhornCoupling(0.01)(x0, x1)
    assert float((x0[sharp.source] - x1).square().sum(1).mean()) == pytest.approx(exact, rel=0.03)
    assert sharp.info["plan_entropy"] < 0.1
    assert SinkhornCoupling(100.0)(x0, x1).info["plan_entropy"] > 0.99


def test_a_warm_start_reaches_the_same_plan_sooner():
    x0, x1 = clouds(400, 400)
    cold = SinkhornCoupling(0.1)
    first = cold(x0, x1)
    fresh = torch.randn(400, 2)
    warm = cold.resume(first.info)
    a, b = (c(fresh, x1, generator=torch.Generator().manual_seed(0)) for c in (cold, warm))
    assert b.info["iterations"] <= a.info["iterations"]
    assert b.info["plan_entropy"] == pytest.approx(a.info["plan_entropy"], abs=5e-3)
    # other data and another size
    other = warm(*clouds(300, 200, seed=3))
    assert other.info["converged"]
    assert warm == cold
    assert "potentials" not in repr(warm)
    again = pickle.loads(pickle.dumps(warm))
    assert again(fresh, x1).info["iterations"] == b.info["iterations"]


def test_callable_costs_and_image_shapes():
    x0, x1 = torch.randn(30, 1, 4, 4), torch.randn(30, 1, 4, 4)

    def cost(x, y):
        return (x[..., :, None, :] - y[..., None, :, :]).abs().sum(-1)

    for cells in (100, 1 << 20):
        info = SinkhornCoupling(0.2, cost=cost, cells=cells)(x0, x1).info
        assert info["converged"]
        assert info["transport_cost"] > 0


def test_equal_samples_and_one_sample():
    assert SinkhornCoupling(0.1)(torch.zeros(5, 2), torch.ones(5, 2)).info["plan_entropy"] == pytest.approx(1)
    assert SinkhornCoupling(0.1)(torch.zeros(1, 2), torch.ones(3, 2)).source.tolist() == [0, 0, 0]


def test_too_few_iterations_warn_with_the_knobs():
    x0, x1 = clouds(200, 200)
    with pytest.warns(mbot.ConvergenceWarning, match=r"max_iter \(now 2\)"):
        pairs = SinkhornCoupling(1e-3, max_iter=2)(x0, x1)
    assert not pairs.info["converged"]
    assert len(pairs) == 200


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: SinkhornCoupling(0), ValueError, "reg must"),
        (lambda: SinkhornCoupling(1.0, cost="l2"), ValueError, "cost must"),
        (lambda: SinkhornCoupling(1.0, cells=0), ValueError, "cells"),
        (lambda: SinkhornCoupling(1.0, start=torch.zeros(3)), TypeError, "potentials of a previous call"),
        (lambda: SinkhornCoupling(1.0).resume({"weight": 1}), ValueError, "must come from a SinkhornCoupling"),
        (
            lambda: SinkhornCoupling(1.0).resume(SinkhornCoupling(1.0)(*clouds(9, 9)).info)(*clouds(9, 9, d=3)),
            ValueError,
            "are for 2 features; got 3",
        ),
    ],
)
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call()


@pytest.mark.parametrize(("n", "m"), [(24, 24), (30, 45)])
@pytest.mark.parametrize("reg", [0.5, 2.0])
def test_transport_sampler_and_coupling_give_one_plan(n, m, reg):
    """The compiled kernel, the driver on a matrix, and the driver on tiles, each by the call that reaches it."""
    x, y = (t.double() for t in clouds(n, m))
    cost = pairwise_cost(x, y)
    plan = EntropicOT(reg, tol=1e-10).plan(cost).to_dense()
    sampled = torch.from_numpy(mbot.compat.OTPlanSampler("sinkhorn", reg=reg).get_map(x, y))
    torch.testing.assert_close(sampled, EntropicOT(reg, tol=1e-3).plan(cost).to_dense())  # its tolerance
    assert float((sampled - plan).abs().sum()) < 0.05
    for cells in (1 << 24, 500):
        coupling = SinkhornCoupling(reg, relative=False, cost="sqeuclidean", tol=1e-8, max_iter=5000, cells=cells)
        info = coupling(x, y).info
        assert info["error"] <= 1e-8
        psi = info["potentials"].psi
        coupled = (psi - cost / reg).softmax(1) / n
        torch.testing.assert_close(coupled, plan, rtol=1e-4, atol=1e-8)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 9),
    m=st.integers(1, 9),
    power=st.floats(4, 30),
    relative=st.booleans(),
    cost=st.sampled_from(["dot", "sqeuclidean", "euclidean"]),
    cells=st.sampled_from([1 << 20, 5]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_costs_that_are_huge_against_reg(n, m, power, relative, cost, cells, dtype, seed):
    """Finite potentials, and an error that the pairs' probabilities hold, from cold and warm starts."""
    x, y = clouds(n, m, seed=seed)
    coupling = SinkhornCoupling(10**-power, relative=relative, cost=cost, cells=cells, max_iter=50)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mbot.ConvergenceWarning)
        first = coupling(x.to(dtype), y.to(dtype)).info
        second = coupling.resume(first)(x.to(dtype), y.to(dtype)).info
    for info in (first, second):
        numbers = [info[name] for name in ("plan_entropy", "reg", "error", "transport_cost")]
        assert all(math.isfinite(number) for number in numbers)
        assert bool(info["potentials"].psi.isfinite().all())
        found = info["potentials"]
        costs = pairwise_cost((x.to(dtype) - found.centres[0]), found.points, cost).double()
        if dtype == torch.float64:  # the costs of float32 tiles are rounded by many regs
            cols = (found.psi - costs / info["reg"]).softmax(1).mean(0)
            assert float((cols - 1 / m).abs().sum()) <= 2 * max(info["error"], coupling.tol)
