"""Matching on the costs' own device: its plain-torch stages, and the plans built on them, against the CPU path.

The Triton kernels of the same stages run in `test_triton_interpreter.py`, and on a GPU in `tests/gpu`.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

import mbot
from mbot import ExactOT, PartialOT
from mbot.kernels import device, device_matching
from mbot.kernels.device_matching import Reference, match
from mbot.problem import Problems
from mbot.solvers.matching import match as match_problems


def costs(kind, *shape, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    made = {
        "real": lambda: torch.randn(*shape, generator=g, dtype=torch.float64),
        "positive": lambda: torch.rand(*shape, generator=g, dtype=torch.float64) + 3,
        "ties": lambda: torch.randint(-2, 3, shape, generator=g).double(),
        "constant": lambda: torch.full(shape, 2.5, dtype=torch.float64),
        "zero": lambda: torch.zeros(shape, dtype=torch.float64),
    }
    return made[kind]().to(dtype)


def cheapest(cost, cardinality):
    """The least cost of a matching with so many pairs, by scipy on a matrix with dummy rows and columns."""
    n, far = len(cost), 1e3 * (1 + np.abs(cost).max())
    q = n - cardinality
    full = np.full((n + q, n + q), far)
    full[:n, :n], full[n:, n:] = cost, 1e3 * far
    row, col = linear_sum_assignment(full)
    real = (row < n) & (col < n)
    assert real.sum() == cardinality
    return cost[row[real], col[real]].sum()


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 12),
    share=st.floats(0, 1),
    kind=st.sampled_from(["real", "positive", "ties", "constant", "zero"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_any_matching_is_the_cheapest_of_its_size_and_certified(n, share, kind, dtype, seed):
    cost = costs(kind, 2, n, n, seed=seed, dtype=dtype)
    cardinality = max(1, round(share * n))
    columns, f, g = match(cost, cardinality, cardinality < n, kernels=Reference)
    slack = cost.double() - f[:, :, None] - g[:, None, :]
    assert float(slack.min()) > -1e-9
    for extra, column in enumerate(columns):
        for p in range(2):
            matched = column[p] >= 0
            cols = column[p][matched]
            assert int(matched.sum()) == cardinality + extra == len(cols.unique())
            value = float(cost[p].double()[matched, cols].sum())
            assert value == pytest.approx(cheapest(cost[p].double().numpy(), cardinality + extra), rel=1e-9, abs=1e-9)
            assert float(slack[p][matched, cols].max()) < 1e-9
            assert bool((f[p] <= f[p][~matched].min() + 1e-9 if not matched.all() else matched).all())


def test_a_start_leaves_few_rows():
    """What the exact stage has left to do is what it costs."""
    g = torch.Generator().manual_seed(0)
    cost = mbot.pairwise_cost(torch.randn(4, 128, 8, generator=g), torch.randn(4, 128, 8, generator=g))
    problems = device_matching.problems_of(cost, 128)
    _, want = Reference.scan(problems, Reference.start(problems))
    assert all(len(row.unique()) >= 118 for row in want)


@pytest.mark.parametrize("cardinality", [1, 30, 102, 127, 128])
@pytest.mark.parametrize("kind", ["real", "ties", "constant"])
def test_first_pairs_are_tight_and_leave_few_dummies(cardinality, kind):
    """Dummies are copies of each other: unless they share out what they want, all but one are left."""
    cost = costs(kind, 3, 128, 128, dtype=torch.float32)
    problems = device_matching.problems_of(cost, cardinality)
    price = Reference.start(problems)
    if cardinality < 128:
        price = device_matching._equal_outside(problems, price, Reference)
    least, want = Reference.scan(problems, price)
    row_of, col_of = device_matching._first_pairs(problems, price, want)
    full = Reference._full(problems)
    for p in range(3):
        rows = (col_of[p] >= 0).nonzero()[:, 0]
        cols = col_of[p, rows].long()
        assert row_of[p, cols].tolist() == rows.tolist()
        assert int((row_of[p] >= 0).sum()) == len(rows)
        assert torch.equal(full[p, rows, cols] - price[p, cols], least[p, rows])
    if kind == "real":
        assert int((col_of < 0).sum(1).max()) <= 16


def test_costs_that_float32_cannot_scale_start_from_nothing():
    for scale in (1e-200, 1e200):
        cost = scale * costs("real", 1, 9, 9)
        value = float(cost[0].gather(1, match(cost, kernels=Reference)[0][0][0, :, None]).sum())
        assert value == pytest.approx(cheapest((cost[0] / scale).numpy(), 9) * scale, rel=1e-12)


@pytest.fixture
def on_device(monkeypatch):
    """Plans take the device's path, with the plain-torch stages."""
    calls = []

    def applies(cost, size):
        calls.append(cost.shape)
        return True

    monkeypatch.setattr(device_matching, "applies", applies)
    return calls


def both(transport, cost, monkeypatch):
    """The plans of the two paths."""
    device = transport.plan(cost)
    with monkeypatch.context() as patch:
        patch.setattr(device_matching, "applies", lambda *_: False)
        return device, transport.plan(cost)


@pytest.mark.parametrize("transport", [ExactOT(), PartialOT(0.5), PartialOT(0.77), PartialOT(0.03)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["real", "positive", "ties", "constant"])
def test_plans_are_those_of_the_cpu_path(on_device, monkeypatch, transport, dtype, kind):
    cost = costs(kind, 2, 3, 20, 20, dtype=dtype)
    device, cpu = both(transport, cost, monkeypatch)
    assert on_device or getattr(transport, "mass", 1) < 1 / 20  # less than a pair needs no kernel
    torch.testing.assert_close(device.cost(cost), cpu.cost(cost))
    torch.testing.assert_close(device.total_mass(), cpu.total_mass())
    assert device.mass.dtype == dtype
    assert device.row.dtype == device.col.dtype == torch.int64
    assert float(device.row_mass().max()) <= 1 / 20 + 1e-6
    assert float(device.col_mass().max()) <= 1 / 20 + 1e-6
    assert bool(device.converged.all())
    assert float(device.error.max()) < 1e-9
    assert device.error.shape == cpu.error.shape == (2, 3)
    if kind == "real":
        torch.testing.assert_close(device.to_dense(), cpu.to_dense())


def test_triton_that_cannot_launch_is_left_out_with_a_warning(monkeypatch):
    """Slim images have no C compiler for its launcher; a card may be newer than it."""

    def probe():
        raise RuntimeError("Failed to find C compiler")

    def imported(name):
        assert name == "mbot.kernels.triton_matching"
        return SimpleNamespace(probe=probe)

    monkeypatch.setattr(device, "importlib", SimpleNamespace(import_module=imported))
    device.triton_module.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=r"cannot launch a kernel \(RuntimeError: Failed to find C compiler\)"):
            assert device_matching.triton_kernels() is None
        assert device_matching.triton_kernels() is None  # and does not warn again
    finally:
        device.triton_module.cache_clear()


def test_one_point(on_device):
    plan = ExactOT().plan(torch.tensor([[[-3.0]], [[2.0]]]))
    assert plan.col.tolist() == [[0], [0]]
    assert plan.mass.tolist() == [[1], [1]]


@pytest.mark.parametrize("transport", [ExactOT(), PartialOT(0.6)], ids=repr)
def test_forbidden_pairs(on_device, monkeypatch, transport):
    cost = costs("positive", 2, 8, 8, dtype=torch.float32)
    cost[:, torch.arange(8), torch.arange(8)] = torch.inf
    device, cpu = both(transport, cost, monkeypatch)
    torch.testing.assert_close(device.cost(cost), cpu.cost(cost))
    assert float(device.to_dense().diagonal(dim1=-2, dim2=-1).sum()) == 0
    with pytest.raises(ValueError, match="every pair"):
        transport.plan(torch.full((3, 3), torch.inf))
    cost[1, 2:] = torch.inf
    with pytest.raises(ValueError, match=r"no plan avoids the forbidden pairs.* in 1 of 2 problems, the first at"):
        transport.plan(cost)


def test_other_problems_and_solvers_do_not_take_it(on_device):
    weights = torch.tensor([0.4, 0.6])
    ExactOT().plan(torch.rand(2, 2), weights)
    ExactOT().plan(torch.rand(2, 3))
    ExactOT("network_simplex").plan(torch.rand(2, 2))
    PartialOT(0.5).plan(torch.rand(2, 3))
    assert not on_device


def test_a_plan_that_is_not_certified_warns(on_device, monkeypatch):
    def lazy(problems, price, row_of, col_of):
        col_of.copy_(torch.arange(problems.size).expand_as(col_of))

    monkeypatch.setattr(Reference, "finish", staticmethod(lazy))
    cost = 1 - torch.eye(6).flip(0)
    with pytest.warns(mbot.ConvergenceWarning, match="ExactOT: 1 of 1 problems did not converge"):
        plan = ExactOT().plan(cost)
    assert not bool(plan.converged)
    assert float(plan.error) > 0.1


def test_grid_losses_and_their_gradients(on_device, monkeypatch):
    g = torch.Generator().manual_seed(3)
    x, y = (torch.randn(3, 10, 2, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for loss in (
        mbot.BoMbOT(ExactOT(), num_batches=3, batch_size=10),
        mbot.MiniBatchOT(PartialOT(0.75), num_batches=3, batch_size=10),
    ):
        values = []
        for applies in (True, False):
            monkeypatch.setattr(device_matching, "applies", lambda *_, applies=applies: applies)
            value = loss.from_batches(x, y)
            values.append((value, *torch.autograd.grad(value, (x, y))))
        torch.testing.assert_close(*values)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e20])
@pytest.mark.parametrize("offset", [0.0, -50.0])
def test_problems_of_different_sizes_leave_few_rows_each(scale, offset, monkeypatch):
    """The points that fill them up all match at once, and their costs are in the units of the others."""
    left = []

    class Counted(Reference):
        @classmethod
        def finish(cls, problems, price, row_of, col_of):
            left.append((problems.size, (col_of < 0).sum(1).tolist()))
            super().finish(problems, price, row_of, col_of)

    monkeypatch.setattr(device_matching, "applies", lambda cost, size: True)
    monkeypatch.setattr(device_matching, "Reference", Counted)
    g = torch.Generator().manual_seed(0)
    clouds = [(torch.randn(n, 8, generator=g), torch.randn(n, 8, generator=g) + 1) for n in (58, 64, 40, 61)]
    costs = [(mbot.pairwise_cost(x, y).double() + offset) * scale for x, y in clouds]
    found = match_problems(Problems.blocks(costs))
    assert float(found.error.max()) < 1e-12
    ((size, rows),) = left  # in one batch, at the first attempt
    assert size == 64
    assert max(rows) <= 6
    for cost, column in zip(costs, found.col, strict=True):
        n = len(cost)
        assert column[:n].sort().values.tolist() == list(range(n))
        expected = cost.numpy()[linear_sum_assignment(cost.numpy())].sum()
        assert float(cost[torch.arange(n), column[:n]].sum()) == pytest.approx(expected, rel=1e-12)


def test_equal_costs_in_problems_of_different_sizes(monkeypatch):
    monkeypatch.setattr(device_matching, "applies", lambda cost, size: True)
    for value in (0.0, 1e-30, -3.0, 1e25):
        found = match_problems(Problems.blocks([torch.full((n, n), value, dtype=torch.float64) for n in (1, 4, 3)]))
        assert [sorted(column[:n].tolist()) for n, column in zip((1, 4, 3), found.col, strict=True)] == [
            [0], [0, 1, 2, 3], [0, 1, 2],
        ]  # fmt: skip
        assert float(found.error.max()) < 1e-12
