"""Grids that are matched without a tensor of their costs: held to the path of all other transports."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mbot
from mbot import BoMbOT, ExactOT, MiniBatchOT, PartialOT
from mbot.blocks import MatchedBlock
from mbot.grid import Side
from mbot.kernels.threads import run_slices
from mbot.solvers import grid
from mbot.solvers.grid import match_grid
from mbot.testing import without_fast_paths


def fused(loss, x, y):
    """Whether the loss takes the fused path for these mini-batches."""
    return all(isinstance(block, MatchedBlock) for block in loss.scheme.solve(Side(x, "xs"), Side(y, "ys")).blocks)


def both_ways(function):
    """The function's result with the fused path, and without."""
    found = function()
    with without_fast_paths():
        return found, function()


def step(loss, x, y):
    """Value and gradients of points that may be the same tensor."""
    x = x.clone().requires_grad_()
    y = y.clone().requires_grad_()
    value = loss.from_batches(x, y)
    return value.detach(), *torch.autograd.grad(value, (x, y))


@settings(max_examples=120, deadline=None)
@given(
    k=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    m=st.sampled_from([1, 2, 3, 5, 8, 9, 16, 17, 33, 49]),
    d=st.sampled_from([1, 2, 4, 5, 7, 64]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    bomb=st.booleans(),
    mass=st.sampled_from([None, 0.3, 0.5, 0.8, 0.97]),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    offset=st.sampled_from([0.0, 1.0, 1000.0]),
    kind=st.sampled_from(["normal", "integers", "duplicates", "one place"]),
    seed=st.integers(0, 2**31),
)
def test_values_and_gradients_of_both_paths(k, m, d, dtype, bomb, mass, scale, offset, kind, seed):
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(count, m, d, generator=g, dtype=torch.float64) for count in k)
    if kind == "integers":
        x, y = x.round(), y.round()
    elif kind == "duplicates":
        y[:] = x[0, torch.randint(m, (m,), generator=g)]
    elif kind == "one place":
        x[:], y[:] = x[:1, :1], y[:1, :1]
    x, y = ((points * scale + offset * scale).to(dtype) for points in (x, y))
    inner = ExactOT() if mass is None else PartialOT(mass)
    loss = (BoMbOT if bomb else MiniBatchOT)(inner, num_batches=k, batch_size=m)
    (value, *grads), (expected, *wanted) = both_ways(lambda: step(loss, x, y))
    precise = 1e-5 if dtype == torch.float32 else 1e-8
    size = scale**2 * d
    torch.testing.assert_close(value, expected, rtol=10 * precise, atol=10 * precise * size)
    if kind != "normal":  # several plans may be the best, with gradients of their own
        return
    for found, right in zip(grads, wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=10 * precise, atol=30 * precise * scale * d**0.5)


@pytest.mark.parametrize("d", [2, 8])
@pytest.mark.parametrize("mass", [None, 0.5, 0.6])
def test_against_brute_force(d, mass):
    """All plans of three points a side: matchings of so many pairs, and mixtures with one pair more."""
    g = torch.Generator().manual_seed(d)
    x, y = torch.randn(2, 3, d, generator=g), torch.randn(3, 3, d, generator=g)
    loss = MiniBatchOT(ExactOT() if mass is None else PartialOT(mass), num_batches=(2, 3), batch_size=3)
    assert fused(loss, x, y)
    total = 0.0
    for one, other in itertools.product(x.double(), y.double()):
        cost = (one[:, None] - other).square().sum(-1)
        best = [
            min(
                float(cost[list(rows), list(cols)].sum())
                for rows in itertools.combinations(range(3), pairs)
                for cols in itertools.permutations(range(3), pairs)
            )
            for pairs in (1, 2, 3)
        ]
        total += best[2] if mass is None else np.interp(3 * mass, [1, 2, 3], best)
    assert float(loss.from_batches(x, y)) == pytest.approx(total / 3 / 6, rel=1e-5)


@pytest.mark.parametrize("d", [2, 6])
@pytest.mark.parametrize("inner", [ExactOT(), PartialOT(0.7)])
@pytest.mark.parametrize("make", [MiniBatchOT, BoMbOT])
def test_derivatives(d, inner, make):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 5, d, generator=g).double(), torch.randn(3, 5, d, generator=g).double()
    loss = make(inner, num_batches=(2, 3), batch_size=5)
    assert fused(loss, x, y)
    x.requires_grad_()
    y.requires_grad_()
    assert torch.autograd.gradcheck(loss.from_batches, (x, y))
    assert torch.autograd.gradgradcheck(loss.from_batches, (x, y))


@pytest.mark.parametrize("d", [2, 6])
@pytest.mark.parametrize("inner", [ExactOT(), PartialOT(0.7)])
@pytest.mark.parametrize("factor", [-1.0, -0.5, 0.0])
def test_gradients_of_a_loss_times_any_factor(d, inner, factor):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 5, d, generator=g).double().requires_grad_(), torch.randn(3, 5, d, generator=g).double()
    loss = MiniBatchOT(inner, num_batches=(2, 3), batch_size=5)
    assert fused(loss, x, y)
    found, expected = both_ways(lambda: torch.autograd.grad(factor * loss.from_batches(x, y), x)[0])
    torch.testing.assert_close(found, expected)
    assert torch.autograd.grad(torch.nan * loss.from_batches(x, y), x)[0].isnan().any()


def test_gradients_of_a_debiased_loss():
    g = torch.Generator().manual_seed(0)
    batches = [torch.randn(3, 5, 2, generator=g).double().requires_grad_() for _ in range(4)]
    loss = MiniBatchOT(ExactOT(), num_batches=3, batch_size=5, debiased=True)
    found, expected = both_ways(lambda: torch.autograd.grad(loss.from_batches(*batches), batches))
    torch.testing.assert_close(found, expected)


def test_a_side_without_gradient():
    x, y = torch.randn(3, 8, 16).requires_grad_(), torch.randn(3, 8, 16)
    loss = MiniBatchOT(ExactOT(), num_batches=3, batch_size=8)
    alone = torch.autograd.grad(loss.from_batches(x, y), x)[0]
    torch.testing.assert_close(alone, step(loss, x.detach(), y)[1])


def test_where_it_does_not_apply():
    x, y = torch.randn(2, 8, 16), torch.randn(2, 8, 16)
    loss = MiniBatchOT(ExactOT(), num_batches=2, batch_size=8)
    assert fused(loss, x, y)
    assert not fused(loss, x.half(), y.half())
    assert not fused(loss, x[:, :7], y)
    for other in (
        MiniBatchOT(ExactOT("network_simplex"), num_batches=2, batch_size=8),
        MiniBatchOT(PartialOT(0.7, reg=0.1), num_batches=2, batch_size=8),
        MiniBatchOT(PartialOT(0.1), num_batches=2, batch_size=8),  # less than a pair
        MiniBatchOT(ExactOT(), num_batches=2, batch_size=8, cost="euclidean"),
        MiniBatchOT(ExactOT(), num_batches=2, batch_size=8, cost=lambda x, y: torch.cdist(x, y)),
    ):
        assert not fused(other, x, y)
    with without_fast_paths():
        assert not fused(loss, x, y)
    assert fused(loss, x, y)


def test_points_that_cancel_are_left_to_the_careful_costs():
    x = torch.randn(2, 8, 16) * 1e-3
    x[:, 4:] += 1
    assert match_grid(x, x + 1e-3, 8) is None
    assert match_grid(x.double(), x.double() + 1e-3, 8) is not None


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("d", [2, 16])
def test_points_that_are_not_finite(bad, d):
    x, y = torch.randn(2, 8, d), torch.randn(2, 8, d)
    y[1, 3, 1] = bad
    assert match_grid(x, y, 8) is None
    with pytest.raises(ValueError, match="ys must be finite"):
        MiniBatchOT(ExactOT(), num_batches=2, batch_size=8).from_batches(x, y)


def test_costs_beyond_float32():
    assert match_grid(torch.randn(2, 8, 2) * 1e25, torch.randn(2, 8, 2), 8) is None


def test_the_grid_in_pieces_and_on_several_threads(monkeypatch):
    monkeypatch.setattr("mbot.kernels.threads._WORTH", 0)
    x, y = torch.randn(5, 24, 8), torch.randn(4, 24, 8)
    for pairs in (24, 17.5):
        whole, weight = match_grid(x, y, pairs), torch.rand(5, 4)
        grads = whole.gradients(x, y, weight, (True, True))
        with monkeypatch.context() as patch:
            patch.setattr(grid, "_CHUNK", 2 * 4 * 24 * 24)
            found = match_grid(x, y, pairs)
            np.testing.assert_array_equal(found.column, whole.column)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(3 if threads == 1 else 1)
            found = match_grid(x, y, pairs)
            others = found.gradients(x, y, weight, (True, True))
        finally:
            torch.set_num_threads(threads)
        np.testing.assert_array_equal(found.column, whole.column)
        torch.testing.assert_close(others, grads, rtol=0, atol=0)


def test_few_numbers_stay_on_the_calling_thread(monkeypatch):
    seen, threads = [], torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for each in (10.0, 1e6, np.inf):
            slices = []
            run_slices(lambda begin, stop, slices=slices: slices.append((begin, stop)), [1.0] * 8, each)
            seen.append(sorted(slices))
    finally:
        torch.set_num_threads(threads)
    assert seen[0] == [(0, 8)]
    assert seen[1] == seen[2]
    assert len(seen[1]) > 1


def test_plans_of_the_full_problem():
    x, y = torch.randn(40, 6), torch.randn(40, 6)
    for inner, make in itertools.product((ExactOT(), PartialOT(0.75)), (MiniBatchOT, BoMbOT)):
        generator = torch.Generator()
        loss = make(inner, num_batches=3, batch_size=8, generator=generator)

        def plan(loss=loss, generator=generator):
            generator.manual_seed(3)
            return loss.plan(x, y).to_dense()

        torch.testing.assert_close(*both_ways(plan))


def test_every_problem_counts_in_the_warning(monkeypatch):
    """Those of the fused path and the outer one."""
    monkeypatch.setattr("mbot.problem.TOLERANCE", -1.0)
    x = torch.randn(3, 8, 16)
    with pytest.warns(mbot.ConvergenceWarning, match="ExactOT: 10 of 10 problems"):
        BoMbOT(ExactOT(), num_batches=3, batch_size=8).from_batches(x, x.flip(0))
