"""Metrics on cases with exact answers."""

import ot
import pytest
import torch

from flows import metrics


def test_wasserstein_of_a_shift_is_the_shift():
    x = torch.randn(200, 3)
    shift = torch.tensor([1.0, 2.0, 2.0])
    assert metrics.squared_wasserstein2(x, x + shift) == pytest.approx(9, rel=1e-5)
    assert metrics.wasserstein2(x, x + shift) == pytest.approx(3, rel=1e-5)
    assert metrics.wasserstein2(x, x[torch.randperm(200)]) == 0


@pytest.mark.parametrize(("n", "m"), [(150, 150), (60, 90)])
def test_wasserstein_agrees_with_pot(n, m):
    x, y = torch.randn(n, 2, dtype=torch.float64), torch.randn(m, 2, dtype=torch.float64) + 1
    expected = ot.emd2([], [], ot.dist(x.numpy(), y.numpy()))
    assert metrics.squared_wasserstein2(x, y) == pytest.approx(expected, rel=1e-9)
    assert metrics.squared_wasserstein2(x.float(), y.float()) == pytest.approx(expected, rel=1e-5)


def test_wasserstein_is_exact_at_thousands_of_points():
    """A translation is optimal between a cloud and its shifted, shuffled copy. 10,000 points take three gigabytes."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 2, generator=g, dtype=torch.float64)
    y = x[torch.randperm(4000, generator=g)] + torch.tensor([3.0, -4.0], dtype=torch.float64)
    assert metrics.squared_wasserstein2(x, y) == pytest.approx(25, rel=1e-9)


def test_straight_paths_have_no_straightness_error_and_the_energy_of_their_displacement():
    x0 = torch.randn(50, 2)
    constant = lambda t, x, y: torch.full_like(x, 2.0)
    assert metrics.straightness(constant, x0) == pytest.approx(0, abs=1e-9)
    assert metrics.path_energy(constant, x0) == pytest.approx(8, rel=1e-5)
    assert metrics.normalized_path_energy(constant, x0, 8.0) == pytest.approx(0, abs=1e-5)


def test_a_quarter_turn_has_known_energy_and_straightness():
    """Unit speed π/2 along a quarter circle: energy (π/2)², chord² 2, so straightness (π/2)² - 2."""
    quarter = torch.pi / 2

    def rotate(t, x, y):
        return torch.stack((-x[:, 1], x[:, 0]), 1) * quarter

    x0 = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    assert metrics.path_energy(rotate, x0, steps=4000) == pytest.approx(quarter**2, rel=2e-3)
    assert metrics.straightness(rotate, x0, steps=4000) == pytest.approx(quarter**2 - 2, rel=5e-3)


def test_prior_skew_finds_what_is_there_and_nothing_else():
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(1500, 2, generator=g)
    label = (noise[:, 0] > 0).long()
    assert metrics.prior_skew(noise, label, generator=g).score > 0.9
    shuffled = label[torch.randperm(1500, generator=g)]
    blind = metrics.prior_skew(noise, shuffled, generator=g)
    assert abs(blind.score - 0.5) < 0.07
    assert blind.kind == "accuracy"
    assert metrics.prior_skew(noise, noise[:, :1] ** 2, generator=g).score > 0.8
    assert metrics.prior_skew(noise, torch.randn(1500, generator=g), generator=g).score < 0.02
    assert metrics.prior_skew(noise, ["a"] * 1500, generator=g) == (1.0, 1.0, "accuracy")


def test_prior_skew_of_images_is_linear_and_repeatable():
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(400, 1, 8, 8, generator=g)
    label = (noise.flatten(1).sum(1) > 0).long()
    a, b = (metrics.prior_skew(noise, label, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert a == b
    assert a.score > 0.85
    assert metrics.prior_skew(noise, noise.flatten(1)[:, :5].sum(1), generator=g).score > 0.7


def test_bad_input():
    with pytest.raises(ValueError, match="equal features"):
        metrics.wasserstein2(torch.zeros(3, 2), torch.zeros(3, 3))
    with pytest.raises(ValueError, match="finite"):
        metrics.wasserstein2(torch.full((3, 2), torch.nan), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="for each of the 30"):
        metrics.prior_skew(torch.randn(30, 2), torch.zeros(29))
    with pytest.raises(ValueError, match="at least 10 pairs"):
        metrics.prior_skew(torch.randn(5, 2), torch.zeros(5))
    with pytest.raises(ValueError, match="squared_w2"):
        metrics.normalized_path_energy(lambda t, x, y: x, torch.ones(1, 1), 0.0)
