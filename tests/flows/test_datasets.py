"""Toy distributions against the facts of the official generators."""

import math

import pytest
import torch

from flows import datasets


def test_eight_gaussians():
    x = datasets.eight_gaussians(40_000, generator=torch.Generator().manual_seed(0))
    assert x.shape == (40_000, 2)
    assert x.dtype == torch.float32
    angle = torch.arange(8) * math.pi / 4
    centres = 5 * torch.stack((angle.cos(), angle.sin()), 1)
    nearest = torch.cdist(x, centres).argmin(1)
    share = torch.bincount(nearest, minlength=8) / 40_000
    torch.testing.assert_close(share, torch.full((8,), 0.125), rtol=0, atol=0.01)
    assert float((x - centres[nearest]).std()) == pytest.approx(0.1**0.25, rel=0.02)


def test_moons_official_layout():
    """Class by class, equal steps along each arc, one uniform number on both coordinates, then times 3 minus 1."""
    x, y = datasets.moons(1000, official=True, generator=torch.Generator().manual_seed(0))
    assert y.tolist() == [0] * 500 + [1] * 500
    clean, _ = datasets.moons(1000, noise=0.0, official=True)
    shift = x - clean
    torch.testing.assert_close(shift[:, 0], shift[:, 1], rtol=0, atol=1e-5)
    assert -1e-5 <= float(shift.min()) <= float(shift.max()) <= 0.6 + 1e-5
    assert float(shift.mean()) == pytest.approx(0.3, abs=0.02)
    torch.testing.assert_close(clean[0], torch.tensor([2.0, -1.0]))
    torch.testing.assert_close(clean[499], torch.tensor([-4.0, -1.0]))
    torch.testing.assert_close(clean[500], torch.tensor([-1.0, 0.5]))
    torch.testing.assert_close(clean[999], torch.tensor([5.0, 0.5]))


def test_both_layouts_are_one_distribution():
    a, ya = datasets.moons(20_000, official=True, generator=torch.Generator().manual_seed(0))
    b, yb = datasets.moons(20_000, generator=torch.Generator().manual_seed(1))
    assert float(yb.float().mean()) == pytest.approx(0.5, abs=0.02)
    for c in (0, 1):
        torch.testing.assert_close(a[ya == c].mean(0), b[yb == c].mean(0), rtol=0, atol=0.1)
        torch.testing.assert_close(a[ya == c].T.cov(), b[yb == c].T.cov(), rtol=0, atol=0.15)


def test_seeds_and_errors():
    for make in (datasets.eight_gaussians, lambda n, generator: datasets.moons(n, generator=generator)[0]):
        assert torch.equal(
            make(9, generator=torch.Generator().manual_seed(1)), make(9, generator=torch.Generator().manual_seed(1))
        )
        with pytest.raises(ValueError, match="n must be at least 1"):
            make(0, generator=None)


def test_checkerboard():
    x, column = datasets.checkerboard(4000, generator=torch.Generator().manual_seed(0))
    cell = ((x + 4) / 2).floor().long()
    assert torch.equal(cell[:, 0], column)
    assert bool(((cell.sum(1)) % 2 == 0).all())
    assert torch.bincount(4 * cell[:, 0] + cell[:, 1])[[0, 2, 5, 7, 8, 10, 13, 15]].min() > 400
    with pytest.raises(ValueError, match="even"):
        datasets.checkerboard(4, squares=3)
