"""Sliced W2, MMD, consistency and Fréchet distance against closed forms and other implementations."""

import math
import sys

import numpy as np
import ot
import pytest
import scipy.linalg
import torch

import flows
import mbot
from flows import metrics


def gaussians(n=2000, shift=0.0, scale=1.0, d=3, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale + shift


def test_sliced_distance_of_a_shift_is_the_shift_over_root_d():
    x = gaussians(300)
    moved = x + torch.tensor([3.0, 0.0, 4.0])
    value = metrics.sliced_wasserstein2(x, moved, num_projections=20_000, generator=torch.Generator().manual_seed(0))
    assert value == pytest.approx(5 / math.sqrt(3), rel=0.02)
    assert metrics.sliced_wasserstein2(x, x[torch.randperm(300)]) == pytest.approx(0, abs=1e-7)


def test_the_earth_movers_distance_against_pot():
    x, y = gaussians(40), gaussians(25, shift=0.7, seed=1)
    expected = ot.emd2([], [], ot.dist(x.numpy(), y.numpy(), metric="euclidean"))
    assert metrics.wasserstein1(x, y) == pytest.approx(expected, rel=1e-9)


def test_mmd_against_a_double_loop_and_at_zero():
    x, y = gaussians(30), gaussians(20, shift=0.5, seed=1)
    k = lambda a, b: np.mean([np.exp(-((a - b) ** 2).sum() / (2 * (1.7 * s) ** 2)) for s in (0.25, 0.5, 1, 2, 4)])
    a, b = x.numpy(), y.numpy()
    xx = np.mean([k(a[i], a[j]) for i in range(30) for j in range(30) if i != j])
    yy = np.mean([k(b[i], b[j]) for i in range(20) for j in range(20) if i != j])
    xy = np.mean([k(p, q) for p in a for q in b])
    assert metrics.squared_mmd(x, y, bandwidth=1.7) == pytest.approx(xx + yy - 2 * xy, rel=1e-9)
    assert abs(metrics.squared_mmd(gaussians(1000, seed=2), gaussians(1000, seed=3))) < 3e-3
    assert metrics.squared_mmd(gaussians(1000, shift=1.0, seed=2), gaussians(1000, seed=3)) > 0.1


def test_frechet_distance_against_scipy_and_the_closed_form():
    x, y = gaussians(400, d=6), gaussians(300, shift=0.3, scale=1.4, d=6, seed=1) @ gaussians(6, d=6, seed=2)
    s, t = np.cov(x.numpy().T), np.cov(y.numpy().T)
    cross = scipy.linalg.sqrtm(s @ t).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + t - 2 * cross)
    assert metrics.frechet_distance(x, y) == pytest.approx(float(expected), rel=1e-8)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet_distance(x, 2 * x - x.mean(0)) == pytest.approx(float(np.trace(s)), rel=1e-9)
    flat = torch.cat((x, x), 1)  # a covariance without full rank
    assert metrics.frechet_distance(flat, flat + 1) == pytest.approx(12, rel=1e-6)


def test_consistency_by_a_classifier_that_reads_the_first_pixel():
    x = torch.tensor([0.0, 1.0, 2.0, 1.0])[:, None]
    classifier = lambda z: torch.nn.functional.one_hot(z[:, 0].long(), 3) * 20.0
    right = metrics.condition_consistency(classifier, x, torch.tensor([0, 1, 2, 0]), batch_size=3)
    assert right.accuracy == 0.75
    assert right.cross_entropy == pytest.approx(5.0, rel=1e-3)
    with pytest.raises(ValueError, match="one integer label for each of the 4"):
        metrics.condition_consistency(classifier, x, torch.zeros(3).long())


def test_fid_with_an_extractor_of_ones_own_needs_nothing_else(monkeypatch):
    x, y = torch.randn(60, 3, 4, 4), torch.randn(50, 3, 4, 4) + 1
    pooled = lambda z: z.mean((2, 3))
    assert metrics.fid(x, y, extractor=pooled, batch_size=7) == pytest.approx(
        metrics.frechet_distance(pooled(x), pooled(y)), rel=1e-5
    )
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ImportError, match="needs pip install torchmetrics torch-fidelity"):
        metrics.fid(x, y)


def test_bad_input():
    one = torch.zeros(1, 2)
    for measure in (metrics.squared_mmd, metrics.frechet_distance):
        with pytest.raises(ValueError, match="at least two"):
            measure(one, torch.zeros(3, 2))
    with pytest.raises(ValueError, match="give a bandwidth"):
        metrics.squared_mmd(torch.rand(3, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="finite"):
        metrics.frechet_distance(torch.full((3, 2), torch.nan), torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"logits must be finite; 6 of its 6"):
        metrics.condition_consistency(lambda x: x * torch.nan, torch.ones(3, 2), torch.zeros(3).long())
    with pytest.raises(ValueError, match="condition must be finite"):
        metrics.prior_skew(torch.randn(20, 2), torch.rand(20, 2).index_fill(0, torch.tensor([3]), torch.inf))


def test_inference_mode_changes_no_measure():
    g = lambda: torch.Generator().manual_seed(0)
    x, y = gaussians(60), gaussians(50, shift=0.4, seed=1)
    labels = torch.arange(60) % 2
    model = flows.models.ResidualMLP(3, width=8, depth=1).double()
    measures = {
        "squared W2": lambda: metrics.squared_wasserstein2(x + 0, y + 0),
        "W1": lambda: metrics.wasserstein1(x + 0, y + 0),
        "sliced": lambda: metrics.sliced_wasserstein2(x + 0, y + 0, generator=g()),
        "MMD": lambda: metrics.squared_mmd(x + 0, y + 0),
        "Fréchet": lambda: metrics.frechet_distance(x + 0, y + 0),
        "skew": lambda: metrics.prior_skew(x + 0, labels + 0, generator=g()),
        "energy": lambda: metrics.path_energy(model, x + 0, steps=5),
        "straightness": lambda: metrics.straightness(model, x + 0, steps=5),
        "consistency": lambda: metrics.condition_consistency(lambda z: z, x + 0, labels + 0),
        "step times": lambda: flows.bellman_schedule(model, x + 0, steps=3, grid=8).tolist(),
        "diagnosis": lambda: {
            k: v for k, v in flows.diagnose(mbot.OTCoupling(), x[:50] + 0, y + 0,
                                            generator=g()).as_dict().items() if k != "seconds"},
    }  # fmt: skip
    for name, measure in measures.items():
        want = measure()
        with torch.inference_mode():
            assert measure() == want, name


def test_noise_of_half_precision_and_labels_of_any_integers():
    noise, y = torch.randn(64, 2), torch.arange(64) % 2
    for dtype in (torch.bfloat16, torch.float16):
        for given in (y, y.float()):
            score, _, _ = metrics.prior_skew(noise.to(dtype), given, generator=torch.Generator().manual_seed(0))
            wanted, _, _ = metrics.prior_skew(
                noise.to(dtype).float(), given, generator=torch.Generator().manual_seed(0)
            )
            assert score == wanted
    x = torch.randn(64, 3)
    wanted = metrics.condition_consistency(lambda x: x, x, y)
    for dtype in (torch.int32, torch.uint8, torch.bool):
        assert metrics.condition_consistency(lambda x: x, x, y.to(dtype)) == wanted
