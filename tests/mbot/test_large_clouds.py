"""Entropic transport without a cost matrix, against the one with it."""

import pytest
import torch

import mbot
from mbot import EntropicOT
from mbot.transport import large_clouds


@pytest.fixture(params=[1, 100, 10_000])
def streamed(request, monkeypatch):
    """Every problem is too large for its matrix; tiles of at most so many entries."""
    monkeypatch.setattr(large_clouds, "_CELLS", request.param)

    def switch(on):
        monkeypatch.setattr(large_clouds, "_MOST", {"cpu": 0 if on else 1 << 30})

    return switch


def clouds(*batch, n=30, m=40, d=3, dtype=torch.float64):
    g = torch.Generator().manual_seed(n)
    x = torch.randn(*batch, n, d, generator=g, dtype=dtype)
    return x.requires_grad_(), (torch.randn(m, d, generator=g, dtype=dtype) * 0.5 + 1).requires_grad_()


@pytest.mark.parametrize("cost", ["sqeuclidean", "dot", "cosine"])
@pytest.mark.parametrize("weighted", [False, True])
def test_value_and_gradients_are_those_of_the_dense_solver(streamed, cost, weighted):
    x, y = clouds(2)
    weights = None, None
    if weighted:  # totals other than 1, and a point that takes no part
        a, b = torch.rand(2, 30, dtype=torch.float64), torch.rand(40, dtype=torch.float64)
        a[0, 3] = 0
        weights = 1.5 * a / a.sum(-1, keepdim=True), 1.5 * b / b.sum()
    found = []
    for on in (False, True):
        streamed(on)
        values = EntropicOT(0.4, tol=1e-9)(x, y, *weights, cost)
        found.append((values, *torch.autograd.grad(values @ values.new_tensor([1.0, 3.0]), (x, y))))
    for dense, tiled in zip(*found, strict=True):
        torch.testing.assert_close(tiled, dense, rtol=1e-7, atol=1e-8)


def test_gradients_by_finite_differences(streamed):
    streamed(True)
    x, y = clouds(n=4, m=5, d=2)
    assert torch.autograd.gradcheck(lambda p, q: EntropicOT(0.5, tol=1e-12)(p, q), (x, y), atol=1e-6)


@pytest.mark.parametrize("cost", ["sqeuclidean", "dot"])
def test_tiles_are_never_computed_in_reduced_precision(streamed, monkeypatch, cost):
    """The process may allow TF32: forward and backward lift it, and give it back."""
    streamed(True)
    seen = []
    for name in ("_sums", "transported"):
        original = getattr(large_clouds.Points, name)

        def spy(self, *args, original=original, **kwargs):
            seen.append(torch.get_float32_matmul_precision())
            return original(self, *args, **kwargs)

        monkeypatch.setattr(large_clouds.Points, name, spy)
    x, y = clouds(dtype=torch.float32)
    torch.set_float32_matmul_precision("high")
    try:
        EntropicOT(1.0, tol=1e-4)(x, y, cost=cost).backward()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(seen) > 4
    assert set(seen) == {"highest"}


def test_half_precision_points_are_computed_with_in_float32(streamed):
    x, y = (t.detach().half() for t in clouds())
    streamed(True)
    value = EntropicOT(0.5)(x, y)
    assert value.dtype == torch.float32
    streamed(False)
    torch.testing.assert_close(value, EntropicOT(0.5)(x, y), rtol=1e-5, atol=1e-6)


def test_other_costs_make_their_matrix(streamed):
    streamed(True)
    x, y = (t.detach() for t in clouds())
    expected = EntropicOT(0.5).plan(mbot.pairwise_cost(x, y, "euclidean"))
    assert float(EntropicOT(0.5)(x, y, cost="euclidean")) == pytest.approx(
        float(expected.cost(mbot.pairwise_cost(x, y, "euclidean")) + expected.penalty)
    )


def test_what_does_not_converge_warns_and_bad_input_raises(streamed):
    streamed(True)
    x, y = clouds()
    with pytest.warns(mbot.ConvergenceWarning, match="EntropicOT: 1 of 1 problems did not"):
        EntropicOT(0.01, max_iter=2)(x, y)
    with pytest.raises(ValueError, match="equal totals"):
        EntropicOT(0.5)(x, y, torch.ones(30, dtype=torch.float64), torch.ones(40, dtype=torch.float64))
    with pytest.raises(ValueError, match="finite"):
        EntropicOT(0.5)(x * torch.nan, y)


@pytest.mark.parametrize("cost", ["sqeuclidean", "dot", "cosine"])
def test_points_changed_in_place_before_the_backward_are_an_error_or_change_nothing(cost, monkeypatch):
    monkeypatch.setitem(large_clouds._MOST, "cpu", 1)
    x, y = torch.randn(20, 3).requires_grad_(), torch.randn(15, 3)
    (right,) = torch.autograd.grad(EntropicOT(1.0)(x, y, cost=cost), x)
    value = EntropicOT(1.0)(x, y, cost=cost)
    y.mul_(3)
    if cost == "dot":  # made of the points themselves, not of copies
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(value, x)
    else:
        torch.testing.assert_close(torch.autograd.grad(value, x)[0], right)
