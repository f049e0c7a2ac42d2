"""Ground costs against direct evaluation, their gradients, and what they refuse."""

import pytest
import torch
from scipy.spatial.distance import cdist

import mbot
from mbot.cost import pairwise

SCIPY = {"sqeuclidean": "sqeuclidean", "euclidean": "euclidean", "cosine": "cosine"}


@pytest.mark.parametrize("cost", SCIPY)
@pytest.mark.parametrize("d", [1, 2, 4, 5, 64])
def test_agrees_with_scipy(cost, d):
    x, y = torch.randn(7, d, dtype=torch.float64), torch.randn(9, d, dtype=torch.float64) + 1
    torch.testing.assert_close(mbot.pairwise_cost(x, y, cost), torch.from_numpy(cdist(x, y, SCIPY[cost])))


def test_dot_is_the_negative_inner_product():
    x, y = torch.randn(3, 4, 5), torch.randn(3, 6, 5)
    torch.testing.assert_close(mbot.pairwise_cost(x, y, "dot"), -torch.einsum("bid,bjd->bij", x, y))


@pytest.mark.parametrize("d", [2, 16, 3072])
def test_float32_keeps_its_digits_far_from_the_origin(d):
    """An offset of 1e4 would cost the expanded square all of its digits."""
    x, y = torch.randn(50, d, dtype=torch.float64), torch.randn(60, d, dtype=torch.float64)
    exact = mbot.pairwise_cost(x, y)
    far = mbot.pairwise_cost((x + 1e4).float(), (y + 1e4).float()).double()
    # the points themselves are rounded to about 1e4 * 2^-24
    assert float((far - exact).abs().max() / exact.mean()) < 2e-3


@pytest.mark.parametrize("cost", [*SCIPY, "dot"])
@pytest.mark.parametrize("d", [2, 6])
def test_gradients(cost, d):
    x = torch.randn(2, 3, d, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 4, d, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, y: mbot.pairwise_cost(x, y, cost), (x, y))


@pytest.mark.parametrize("d", [2, 6])
def test_the_euclidean_gradient_at_coinciding_points_is_zero_not_nan(d):
    x = torch.randn(3, d, dtype=torch.float64, requires_grad=True)
    mbot.pairwise_cost(x, x.detach().clone(), "euclidean").diagonal().sum().backward()
    assert bool(torch.isfinite(x.grad).all())
    assert float(x.grad.abs().max()) < 1e-6


def test_low_dimensional_equal_points_cost_exactly_nothing():
    x = torch.randn(40, 2) * 1e3
    assert bool((mbot.pairwise_cost(x, x).diagonal() == 0).all())


def test_batch_axes_broadcast_and_images_flatten():
    x, y = torch.randn(4, 1, 3, 2), torch.randn(5, 6, 2)
    assert mbot.pairwise_cost(x, y).shape == (4, 5, 3, 6)
    images = torch.randn(7, 3, 8, 8)
    torch.testing.assert_close(
        mbot.pairwise_cost(images, images, feature_ndim=3), mbot.pairwise_cost(images.flatten(1), images.flatten(1))
    )


def test_half_precision_and_autocast_are_computed_in_float32():
    x, y = torch.randn(20, 64), torch.randn(20, 64)
    assert mbot.pairwise_cost(x.bfloat16(), y.bfloat16()).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(mbot.pairwise_cost(x, y), mbot.pairwise_cost(x, y), rtol=0, atol=0)
        inside = mbot.pairwise_cost(x, y)
    torch.testing.assert_close(inside, mbot.pairwise_cost(x, y), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("x", "y", "kwargs", "error", "says"),
    [
        (torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2), {}, TypeError, "floating-point"),
        ([[1.0]], torch.zeros(3, 1), {}, TypeError, "torch.Tensor"),
        (torch.zeros(3, 2).double(), torch.zeros(3, 2), {}, TypeError, "same dtype"),
        (torch.zeros(3), torch.zeros(3), {}, ValueError, r"x\[:, None\]"),
        (torch.zeros(3, 2), torch.zeros(3, 4), {}, ValueError, "equal features"),
        (torch.zeros(0, 2), torch.zeros(3, 2), {}, ValueError, "at least one point"),
        (torch.zeros(2, 3, 2), torch.zeros(4, 3, 2), {}, ValueError, "batch axes"),
        (torch.zeros(3, 2), torch.full((3, 2), torch.nan), {}, ValueError, "6 of its 6 entries"),
        (torch.zeros(3, 2), torch.zeros(3, 2, device="meta"), {}, ValueError, "same device"),
        (torch.zeros(3, 2), torch.zeros(3, 2), {"cost": "manhattan"}, ValueError, "'sqeuclidean', 'euclidean'"),
        (torch.zeros(3, 2), torch.zeros(3, 2), {"cost": 3}, TypeError, "callable"),
        (torch.zeros(3, 2), torch.ones(3, 2), {"cost": "cosine"}, ValueError, "3 have norm 0"),
        (torch.ones(3, 2), torch.ones(4, 2), {"cost": lambda x, y: x}, ValueError, r"must return shape \(3, 4\)"),
        (torch.ones(3, 2), torch.ones(4, 2), {"feature_ndim": 2}, ValueError, "at least 3 axes"),
    ],
)
def test_bad_input(x, y, kwargs, error, says):
    with pytest.raises(error, match=says):
        mbot.pairwise_cost(x, y, **kwargs)


def test_cosine_costs_of_close_directions_keep_their_digits():
    """``1 - cos`` of vectors far from the origin: a difference of numbers near 1, which float32 must not lose."""
    x, y = (100 + torch.randn(50, 64, dtype=torch.float64) for _ in range(2))
    exact = mbot.pairwise_cost(x, y, "cosine")
    ours = mbot.pairwise_cost(x.float(), y.float(), "cosine")
    torch.testing.assert_close(ours.double(), exact, rtol=2e-3, atol=0)
    torch.testing.assert_close(1 - torch.nn.functional.cosine_similarity(x[:, None], y, dim=-1), exact)


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1.0, 1e155, 1e300])
def test_directions_of_float64_points_of_any_length(scale):
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = mbot.pairwise_cost(x, -x, "cosine")
    torch.testing.assert_close(mbot.pairwise_cost(x * scale, -x, "cosine"), expected, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(mbot.pairwise_cost(x * scale, -x * scale, "cosine"), expected, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_among_themselves_cost_nothing_at_themselves(cost, dtype):
    """And close ones keep their digits: a few pairs are computed by differences."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 200, 16, generator=g, dtype=dtype) + 3
    y = torch.cat((x + 1e-4 * torch.randn(x.shape, generator=g, dtype=dtype), x[:, :20]), 1)
    one, two = (points.double() for points in (x, y))
    if cost == "cosine":
        one, two = (torch.nn.functional.normalize(points, dim=-1) for points in (one, two))
    exact = (one[:, :, None] - two[:, None]).square().sum(-1)
    exact = {"sqeuclidean": exact, "euclidean": exact.sqrt(), "cosine": exact / 2}[cost]
    torch.testing.assert_close(mbot.pairwise_cost(x, y, cost).double(), exact, rtol=1e-4, atol=1e-14)
    assert float(mbot.pairwise_cost(x, x, cost).diagonal(dim1=1, dim2=2).abs().max()) < 1e-14


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "cosine", "dot"])
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
@pytest.mark.parametrize("d", [2, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_batches_of_no_clouds_have_no_costs(cost, shape, d, dtype):
    x, y = torch.empty(*shape, 3, d, dtype=dtype, requires_grad=True), torch.empty(*shape, 4, d, dtype=dtype)
    found = mbot.pairwise_cost(x, y, cost)
    assert found.shape == (*shape, 3, 4)
    found.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "cosine", "dot"])
@pytest.mark.parametrize("d", [2, 6])
@pytest.mark.parametrize("m", [4, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_process_without_source_points_has_no_costs(cost, d, m, dtype):
    x = torch.empty(0, d, dtype=dtype, requires_grad=True)
    y = torch.randn(m, d, generator=torch.Generator().manual_seed(0), dtype=dtype).requires_grad_()
    found = pairwise(x, y, cost)
    assert found.shape == (0, m)
    found.sum().backward()
    assert x.grad.shape == x.shape
    assert y.grad.equal(torch.zeros_like(y))


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "cosine", "dot"])
@pytest.mark.parametrize("d", [2, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_mode_derivatives(cost, d, dtype):
    g = torch.Generator().manual_seed(d)
    x, y, step = (torch.randn(n, d, generator=g, dtype=dtype) for n in (5, 4, 5))
    _, found = torch.func.jvp(lambda x: mbot.pairwise_cost(x, y, cost), (x,), (step,))
    x.requires_grad_()
    wanted = torch.autograd.functional.jacobian(lambda x: mbot.pairwise_cost(x, y, cost), x)
    torch.testing.assert_close(found, (wanted * step).sum((-2, -1)), rtol=1e-4, atol=1e-4)
