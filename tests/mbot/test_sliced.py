"""Sliced transport against one-dimensional solvers and POT."""

import ot
import pytest
import torch

import mbot
from mbot import SlicedOT


def clouds(*batch, n=20, m=20, d=3, dtype=torch.float64):
    return torch.randn(*batch, n, d, dtype=dtype), torch.randn(*batch, m, d, dtype=dtype) + 1


def directions(transport, d, generator, dtype=torch.float64):
    drawn = torch.randn(transport.num_projections, d, generator=generator, dtype=dtype)
    return drawn / drawn.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
@pytest.mark.parametrize(("n", "m", "weighted"), [(20, 20, False), (15, 22, False), (20, 20, True), (9, 14, True)])
def test_mean_of_one_dimensional_transport_costs(p, n, m, weighted):
    x, y = clouds(2, n=n, m=m)
    a = torch.rand(2, n, dtype=torch.float64) + 0.1 if weighted else None
    b = torch.rand(2, m, dtype=torch.float64) + 0.1 if weighted else None
    transport = SlicedOT(num_projections=7, p=p)
    value = transport(x, y, a, b, generator=torch.Generator().manual_seed(3))
    theta = directions(transport, 3, torch.Generator().manual_seed(3))
    for i in range(2):
        wa = None if a is None else (a[i] / a[i].sum()).numpy()
        wb = None if b is None else (b[i] / b[i].sum()).numpy()
        expected = [ot.wasserstein_1d((x[i] @ t).numpy(), (y[i] @ t).numpy(), wa, wb, p=p) for t in theta]
        assert float(value[i]) == pytest.approx(sum(expected) / 7, rel=1e-9)


def test_pot_s_sliced_distance_is_the_root():
    x, y = clouds()
    transport = SlicedOT(num_projections=50)
    theta = directions(transport, 3, torch.Generator().manual_seed(1))
    expected = ot.sliced_wasserstein_distance(x.numpy(), y.numpy(), projections=theta.T.numpy())
    value = transport(x, y, generator=torch.Generator().manual_seed(1))
    assert float(value) ** 0.5 == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("p", [1.5, 2])
@pytest.mark.parametrize("m", [20, 13])
def test_the_grid_is_all_pairs(p, m):
    x, y = clouds(4, n=20)[0], clouds(3, n=1, m=m)[1]
    transport = SlicedOT(num_projections=9, p=p)
    grid = transport.grid(x, y, generator=torch.Generator().manual_seed(0))
    pairs = transport(x[:, None], y[None], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(grid, pairs)
    assert grid.shape == (4, 3)


@pytest.mark.parametrize("p", [1.5, 2])
@pytest.mark.parametrize("m", [5, 4])
def test_gradients(p, m):
    x, y = clouds(n=5, m=m)
    a = torch.rand(5, dtype=torch.float64) + 0.1
    for weight in (None, a):
        assert torch.autograd.gradcheck(
            lambda x, y, weight=weight: SlicedOT(4, p=p)(x, y, weight, generator=torch.Generator().manual_seed(0)),
            (x.requires_grad_(), y.requires_grad_()),
        )


def test_no_clouds_have_no_values():
    x = torch.zeros(2, 0, 3, 2, requires_grad=True)
    values = SlicedOT()(x, torch.zeros(2, 0, 4, 2))
    assert values.shape == (2, 0)
    assert torch.autograd.grad(values.sum(), x)[0].shape == x.shape


def test_zero_weight_is_removal_and_equal_clouds_cost_nothing():
    x, y = clouds()
    a = torch.ones(20, dtype=torch.float64)
    a[5:] = 0
    g = lambda: torch.Generator().manual_seed(0)
    torch.testing.assert_close(SlicedOT(8)(x, y, a, generator=g()), SlicedOT(8)(x[:5], y, generator=g()))
    assert float(SlicedOT(8)(x, x[torch.randperm(20)])) == pytest.approx(0, abs=1e-20)


def test_half_precision_and_bad_input():
    x, y = clouds(dtype=torch.float32)
    assert SlicedOT(4)(x.bfloat16(), y.bfloat16()).dtype == torch.float32
    assert not isinstance(SlicedOT(4), mbot.Transport), "a transport has plans"
    assert not hasattr(SlicedOT(4), "plan")
    with pytest.raises(ValueError, match="leave cost at its default"):
        SlicedOT(4)(x, y, cost="euclidean")
    with pytest.raises(ValueError, match="p must be at least 1"):
        SlicedOT(4, p=0.5)
    with pytest.raises(ValueError, match="num_projections"):
        SlicedOT(0)
    with pytest.raises(ValueError, match="equal features"):
        SlicedOT(4)(x, y[:, :2])
    with pytest.raises(ValueError, match="non-negative"):
        SlicedOT(4)(x, y, -torch.ones(20))
    assert SlicedOT(5) == SlicedOT(5)
    assert mbot.SlicedOT in type(SlicedOT(5)).__mro__
