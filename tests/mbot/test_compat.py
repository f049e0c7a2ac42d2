"""torchcfm's plan sampler with our solvers: its interface, its laws, and its own flow matchers and tests around it."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

import mbot
from mbot.compat import OTPlanSampler

METHODS = ("exact", "sinkhorn", "unbalanced", "partial")


def clouds(n, m=None, shape=(2,), seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, *shape, generator=g), torch.randn(m or n, *shape, generator=g)


def squared(x0, x1):
    return torch.cdist(x0.flatten(1).double(), x1.flatten(1).double()).square().numpy()


@pytest.mark.parametrize("shape", [(2,), (3, 4, 4)])
def test_the_exact_map_is_the_optimal_assignment(shape):
    x0, x1 = clouds(64, shape=shape)
    pi = OTPlanSampler(method="exact").get_map(x0, x1)
    assert isinstance(pi, np.ndarray)
    assert pi.dtype == np.float64
    rows, cols = linear_sum_assignment(squared(x0, x1))
    expected = np.zeros((64, 64))
    expected[rows, cols] = 1 / 64
    np.testing.assert_array_equal(pi, expected)


@pytest.mark.parametrize("method", ["sinkhorn", "partial", "unbalanced"])
def test_regularised_maps_are_pot_s(method):
    """The reference solvers at their default tolerance, in a range where the plain kernel does not underflow."""
    import ot

    x0, x1 = clouds(20)
    M, a = squared(x0, x1), np.full(20, 1 / 20)
    reference = {
        "sinkhorn": lambda: ot.sinkhorn(a, a, M, reg=0.5),
        "partial": lambda: ot.partial.entropic_partial_wasserstein(a, a, M, reg=0.5),
        "unbalanced": lambda: ot.unbalanced.sinkhorn_knopp_unbalanced(a, a, M, reg=0.5, reg_m=0.7, reg_type="kl"),
    }[method]()
    pi = OTPlanSampler(method, reg=0.5, reg_m=0.7).get_map(x0, x1)
    np.testing.assert_allclose(pi, reference, atol=2e-4)
    scaled = OTPlanSampler(method, reg=0.5 / M.max(), reg_m=0.7 / M.max(), normalize_cost=True).get_map(x0, x1)
    np.testing.assert_allclose(scaled, pi, atol=2e-4)


@pytest.mark.parametrize("method", METHODS)
def test_samples_follow_the_map_x1_in_order(method):
    x0, x1 = clouds(6)
    sampler = OTPlanSampler(method, reg=0.5, generator=torch.Generator().manual_seed(0))
    pi = sampler.get_map(x0, x1)
    seen = np.zeros((6, 6))
    for _ in range(400):
        i, j = sampler.sample_map(pi, 6)
        assert (np.diff(j) >= 0).all()
        np.add.at(seen, (i, j), 1 / 2400)
    np.testing.assert_allclose(seen, pi / pi.sum(), atol=4 * 0.4 / 2400**0.5)


@pytest.mark.parametrize("method", ["exact", "sinkhorn"])
def test_every_target_comes_once_and_a_permutation_s_sources_too(method):
    x0, x1 = clouds(256)
    sampler = OTPlanSampler(method)
    a, b = sampler.sample_plan(x0, x1)
    assert torch.equal(b, x1)
    if method == "exact":
        assert len(a.unique(dim=0)) == 256
        cost = float((a - b).square().sum())
        rows, cols = linear_sum_assignment(squared(x0, x1))
        assert cost == pytest.approx(squared(x0, x1)[rows, cols].sum(), rel=1e-5)
        unordered = sampler.sample_plan(x0, x1, replace=False)
        assert len(unordered[1].unique(dim=0)) == 256


def test_sample_map_without_replacement_draws_no_cell_twice():
    pi = np.random.default_rng(0).permutation(np.eye(50), axis=1)
    i, j = OTPlanSampler("exact").sample_map(pi, batch_size=50, replace=False)
    again = np.zeros_like(pi)
    again[i, j] = 1
    np.testing.assert_array_equal(again, pi)
    i, j = OTPlanSampler("exact").sample_map(np.ones((8, 8)), batch_size=40, replace=False)
    assert len(set(zip(i.tolist(), j.tolist(), strict=True))) == 40
    i, j = OTPlanSampler("exact").sample_map(pi, batch_size=170)
    counts = np.bincount(j, minlength=50)
    assert set(counts) <= {3, 4}


def test_draws_follow_torch_s_seed_and_leave_its_state_alone():
    x0, x1 = clouds(40)
    sampler = OTPlanSampler("sinkhorn", reg=1.0)
    torch.manual_seed(5)
    first = sampler.sample_plan(x0, x1)[0]
    follows = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(follows, torch.rand(3))
    second = sampler.sample_plan(x0, x1)[0]
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(sampler.sample_plan(x0, x1)[0], first)
    own = OTPlanSampler("sinkhorn", reg=1.0, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(own.sample_plan(x0, x1)[0], own.sample_plan(x0, x1)[0])


def test_labels_follow_their_samples():
    x0, x1 = clouds(30)
    y1 = torch.arange(30)
    a, b, z0, z1 = OTPlanSampler("exact").sample_plan_with_labels(x0, x1, y0=np.arange(30), y1=y1, replace=True)
    assert torch.equal(x0[torch.from_numpy(z0)], a)
    assert torch.equal(x1[z1], b)
    assert OTPlanSampler("exact").sample_plan_with_labels(x0, x1)[2:] == (None, None)


@pytest.mark.parametrize(("n", "m"), [(20, 20), (12, 20), (20, 12)])
def test_sample_plan_with_scipy_keeps_x0_and_flattens(n, m):
    x0, x1 = clouds(n, m, shape=(2, 3))
    a, b = OTPlanSampler("sinkhorn").sample_plan_with_scipy(x0, x1)
    rows, cols = linear_sum_assignment(squared(x0, x1))
    assert torch.equal(a, x0.flatten(1)[rows])
    assert torch.equal(b, x1.flatten(1)[cols])


def test_trajectories_follow_the_maps():
    """Four populations that are permutations of each other: a chain stays at its point."""
    x = torch.arange(8.0)[:, None] * 3
    populations = torch.stack([x[torch.randperm(8)] + 0.01 * t for t in range(4)], 1)
    chains = OTPlanSampler("exact").sample_trajectory(populations)
    assert isinstance(chains, np.ndarray)
    assert chains.shape == (8, 4, 1)
    np.testing.assert_allclose(
        chains - chains[:, :1], np.tile(0.01 * np.arange(4)[None, :, None], (8, 1, 1)), atol=1e-5
    )
    soft = OTPlanSampler("sinkhorn", reg=0.5).sample_trajectory(torch.randn(16, 3, 2, 2))
    assert soft.shape == (16, 3, 2, 2)


def test_gradients_reach_the_samples():
    x0, x1 = (t.requires_grad_() for t in clouds(10))
    a, b = OTPlanSampler("exact").sample_plan(x0, x1)
    (a * b).sum().backward()
    assert bool((x0.grad != 0).any())
    assert bool((x1.grad != 0).any())


def test_high_dimensions_give_a_plan_where_the_plain_kernel_underflows():
    x0, x1 = clouds(32, shape=(3, 32, 32))
    for method in ("sinkhorn", "partial"):
        for reg in (0.05, 5.0):  # exp(-6000 / reg) is 0 in float64 for both
            pi = OTPlanSampler(method, reg=reg, warn=reg > 1).get_map(x0, x1)
            np.testing.assert_allclose(pi.sum(0), 1 / 32, rtol=1e-4)


@pytest.mark.parametrize("method", ["sinkhorn", "unbalanced", "partial"])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (40, 40), (30, 50)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairs_of_small_batches_are_those_of_the_map(monkeypatch, method, n, m, dtype):
    """They are drawn without a `Plan`."""
    x0, x1 = (points.to(dtype) for points in clouds(n, m))
    sampler, made = OTPlanSampler(method, reg=0.3), []
    mass = sampler.transport.uniform_mass(mbot.pairwise_cost(x0, x1))
    np.testing.assert_array_equal(mass.numpy(), sampler.get_map(x0, x1).astype(mass.numpy().dtype))
    with monkeypatch.context() as patch:
        patch.setattr(type(sampler.transport), "plan", lambda *_: made.append(1))
        pairs = sampler.sample_plan(x0, x1)
    monkeypatch.setattr(type(sampler.transport), "uniform_mass", lambda *_: None)
    for ours, theirs in zip(pairs, sampler.sample_plan(x0, x1), strict=True):
        assert len(ours) == n
        assert ours.equal(theirs)
    assert not made


def test_small_batches_that_do_not_converge_or_cost_too_much_are_left_to_the_map():
    x0, x1 = clouds(20)
    for method in ("sinkhorn", "unbalanced"):
        sampler = OTPlanSampler(method, reg=1e-3)
        assert sampler.transport.uniform_mass(mbot.pairwise_cost(x0, x1) * 1e6) is None
        assert sampler.transport.uniform_mass(torch.full((2, 2), torch.inf)) is None
        with pytest.raises(ValueError, match="NaN"):
            sampler.transport.uniform_mass(torch.tensor([[torch.nan]]))
    assert mbot.EntropicOT(0.01, max_iter=2).uniform_mass(mbot.pairwise_cost(x0, x1)) is None
    assert mbot.ExactOT().uniform_mass(mbot.pairwise_cost(x0, x1)) is None


@pytest.mark.parametrize("method", ["sinkhorn", "unbalanced"])
def test_costs_that_the_short_cut_does_not_take_are_left_to_the_plan(method):
    transport, cost = OTPlanSampler(method, reg=0.5).transport, torch.rand(3, 4)
    for other in (cost.half(), cost.bfloat16(), cost.round().long(), cost[None], cost[:0], cost[0]):
        assert transport.uniform_mass(other) is None
    mass = transport.uniform_mass(cost.clone().requires_grad_())
    assert not mass.requires_grad
    assert torch.equal(mass, transport.uniform_mass(cost))


@pytest.mark.parametrize("method", ["exact", "sinkhorn", "unbalanced"])
def test_samplers_draw_from_the_cpu_whatever_the_default_device_is(method):
    x0, x1 = clouds(8)
    expected = OTPlanSampler(method, reg=0.5).sample_plan(x0, x1)
    with torch.device("meta"):
        found = OTPlanSampler(method, reg=0.5).sample_plan(x0, x1)
    assert all(map(torch.equal, found, expected))


def test_an_empty_plan_falls_back_to_the_uniform_one_with_a_warning_that_can_be_silenced():
    x0, x1 = clouds(6)
    with pytest.warns(mbot.ConvergenceWarning, match="moves no mass"):
        pi = OTPlanSampler("unbalanced", reg=0.05, reg_m=0.05).get_map(x0, x1 + 100)
    np.testing.assert_allclose(pi, 1 / 36)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OTPlanSampler("unbalanced", reg=0.05, reg_m=0.05, warn=False).get_map(x0, x1 + 100)
        OTPlanSampler("sinkhorn", reg=1e-7, warn=False).get_map(x0, x1)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: OTPlanSampler("emd"), ValueError, "'exact', 'sinkhorn', 'unbalanced', 'partial'; got 'emd'"),
        (lambda: OTPlanSampler("sinkhorn", reg=0), ValueError, "reg must"),
        (lambda: OTPlanSampler("exact", num_threads="all"), TypeError, "num_threads"),
        (lambda: OTPlanSampler("exact").sample_map(np.zeros((3, 3)), 3), ValueError, "with mass"),
        (lambda: OTPlanSampler("exact").sample_map(np.ones(3), 3), ValueError, r"\(n, m\) array"),
        (lambda: OTPlanSampler("exact").get_map(torch.full((3, 2), torch.nan), torch.ones(3, 2)), ValueError, "finite"),
        (lambda: OTPlanSampler("exact").sample_trajectory(torch.ones(3, 2)), ValueError, "times"),
    ],
)
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call()


@pytest.mark.parametrize("method", ["exact", "sinkhorn"])
def test_torchcfm_s_matchers_run_on_it_as_they_are(method, monkeypatch):
    matching = pytest.importorskip("torchcfm.conditional_flow_matching")
    monkeypatch.setattr(matching, "OTPlanSampler", OTPlanSampler)
    makers = [lambda: matching.SchrodingerBridgeConditionalFlowMatcher(sigma=0.7, ot_method=method)]
    if method == "exact":
        makers.append(lambda: matching.ExactOptimalTransportConditionalFlowMatcher(sigma=0.0))
    x0, x1 = clouds(64, shape=(3, 2))
    y1 = torch.arange(64)
    for make in makers:
        matcher = make()
        assert isinstance(matcher.ot_sampler, OTPlanSampler)
        torch.manual_seed(3)
        t, xt, ut = matcher.sample_location_and_conditional_flow(x0, x1)
        torch.manual_seed(3)
        start, end = matcher.ot_sampler.sample_plan(x0, x1)
        assert torch.equal(t, torch.rand(64))
        if matcher.sigma == 0:
            torch.testing.assert_close(ut, end - start)
            torch.testing.assert_close(xt, start + t[:, None, None] * (end - start))
        torch.manual_seed(3)
        *_, z1 = matcher.guided_sample_location_and_conditional_flow(x0, x1, y1=y1)
        assert torch.equal(x1[z1], end)


def test_torchcfm_s_own_test_suite_passes_with_it(tmp_path):
    """Set MBT_TORCHCFM_TESTS to the ``tests`` folder of a torchcfm checkout (the wheel does not hold it)."""
    pytest.importorskip("torchcfm")
    folder = os.environ.get("MBT_TORCHCFM_TESTS")
    if not folder:
        pytest.skip("no checkout of torchcfm: set MBT_TORCHCFM_TESTS to its tests folder")
    (tmp_path / "replaced.py").write_text(
        "import torchcfm.conditional_flow_matching as matching, torchcfm.optimal_transport as transport\n"
        "from mbot.compat import OTPlanSampler\n"
        "matching.OTPlanSampler = transport.OTPlanSampler = OTPlanSampler\n"
    )
    paths = [str(Path(__file__).parents[2]), str(tmp_path), *sys.path]
    names = ("test_optimal_transport.py", "test_conditional_flow_matcher.py", "test_time_t.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "replaced", "-p", "no:cacheprovider"]
        + [str(Path(folder) / name) for name in names],
        capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ":".join(paths)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
