"""Every autograd Function of the packages: an input that may require gradients gets them, or is refused."""

import ast
import importlib
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from mbot import ExactOT, MiniBatchOT, PartialOT
from mbot.geometry import Points
from mbot.grid import Side
from mbot.solvers.grid import match_grid
from mbot.testing import without_fast_paths

ROOT = Path(__file__).parent.parent


def functions():
    """Names of all autograd Functions of the three packages, from their source."""
    for package in ("mbot", "flows", "setenc"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef) and any("Function" in ast.unparse(base) for base in node.bases):
                    yield f"{'.'.join(path.relative_to(ROOT).with_suffix('').parts)}:{node.name}"


def points(*shape):
    return torch.randn(*shape, dtype=torch.float64)


class OneRank:
    """Ranks of a single process."""

    rank = 0

    def gather(self, values, sizes):
        return values.clone()

    def sum(self, values):
        return values.clone()


def matched():
    """Values of entries, from points and masses."""
    x, y, row, col = points(4, 3), points(5, 3), torch.tensor([0, 1, 2, 3]), torch.tensor([4, 0, 0, 2])
    mass = torch.rand(4, dtype=torch.float64)
    return [x, y, row, col, mass, (x[row] - y[col]).square().sum(1), 2, "sqeuclidean"]


def grid():
    x, y = points(2, 4, 3), points(3, 4, 3)
    return [x, y, torch.rand(2, 3, dtype=torch.float64), match_grid(x, y, 4)]


def planned():
    mass, costs = torch.rand(2, 3, 4, 5, dtype=torch.float64), points(2, 3, 4, 5)
    values = (mass * costs).sum((-2, -1))
    return [costs.transpose(1, 2).reshape(2 * 4, 3 * 5), torch.rand(2, 3, dtype=torch.float64), mass, values]


def squared():
    x, y = points(4, 3), points(5, 3)
    return [x, y, (x[:, None] - y).square().sum(-1)]


def clouds():
    x, y = points(4, 3), points(5, 3)
    phi, psi = points(1, 4) - 3, points(1, 5)
    return [x, y, points(1)[0], Points(x, y, "sqeuclidean", 100), phi[0], psi[0]]


# The inputs of each Function, and which of them are constants: made without gradients where the Function is called.
# Those that are no tensors, or of integers, need not be named. Each other one must get a gradient.
KNOWN = {
    "mbot.blocks:_MatchedTotal": (grid, ()),
    "mbot.blocks:_PlanTotal": (planned, (2, 3)),  # masses, and values known from the costs
    "mbot.envelope:_MatchedValues": (matched, (5,)),  # costs, known from the points
    "mbot.envelope:_FirstOrder": (lambda: [points(2), points(2, 3), points(2, 4), points(2, 3), points(2, 4)], (3, 4)),
    "mbot.cost:_Squared": (squared, (2,)),  # the costs, known from the points
    "mbot.numerics:_Product": (lambda: [points(4, 3), points(3, 5)], ()),
    "mbot.transport.large_clouds:_Value": (clouds, (2, 4, 5)),  # value and potentials, which are solutions
    "mbot.distributed.ranks:_Gathered": (lambda: [points(4, 3), OneRank(), [4]], ()),
    "mbot.distributed.ranks:_Summed": (lambda: [points(4, 3), OneRank()], ()),
}
# Refuses all gradients; a pass over a stream; a collective of a process group. Their own tests are named.
ELSEWHERE = {
    "mbot.envelope:_Refused": "tests/mbot/test_derivatives.py",
    "setenc.second_pass:_Streamed": "tests/setenc/test_second_pass.py",
    "setenc.ranks:_SumOverRanks": "tests/distributed/test_setenc.py",
}


def test_every_function_is_known():
    assert set(functions()) == set(KNOWN) | set(ELSEWHERE)
    assert all((ROOT / path).exists() for path in ELSEWHERE.values())


def applied(name):
    """The value of a Function, and its real inputs by position, which require gradients."""
    torch.manual_seed(0)
    inputs = KNOWN[name][0]()
    module, _, function = name.partition(":")
    real = {
        i: part.detach().requires_grad_()
        for i, part in enumerate(inputs)
        if isinstance(part, torch.Tensor) and part.is_floating_point()
    }
    apply = getattr(importlib.import_module(module), function).apply
    return apply(*(real.get(i, part) for i, part in enumerate(inputs))), real


@pytest.mark.parametrize("name", KNOWN)
def test_inputs_that_may_require_gradients_get_them(name):
    value, real = applied(name)
    found = torch.autograd.grad(value.sum(), list(real.values()), allow_unused=True)
    assert [i for i, grad in zip(real, found, strict=True) if grad is None] == list(KNOWN[name][1])


@pytest.mark.parametrize("name", KNOWN)
def test_gradients_are_linear_in_the_one_that_comes_in(name):
    """A loss may be subtracted, or cancelled by others: signs and zeros are no special case."""
    value, real = applied(name)
    wanted = [part for i, part in real.items() if i not in KNOWN[name][1]]

    def back(grad):
        return torch.autograd.grad(value, wanted, grad, retain_graph=True)

    left, right = 0.5 + torch.rand_like(value), torch.randn_like(value)
    for factor in (-1.0, 0.0, 2.5):
        for one, other, both in zip(back(left), back(right), back(factor * left + right), strict=True):
            torch.testing.assert_close(both, factor * one + other)


# Sums in place and compiled kernels, which torch cannot do for many incoming gradients at once: it says so.
SINGLY = (
    "mbot.blocks:_MatchedTotal",
    "mbot.envelope:_MatchedValues",
)


@pytest.mark.parametrize("name", KNOWN)
def test_many_incoming_gradients_at_once(name):
    """As `torch.autograd.functional.jacobian` asks for with ``vectorize=True``."""
    value, real = applied(name)
    wanted = [part for i, part in real.items() if i not in KNOWN[name][1]]
    many = torch.randn(3, *value.shape, dtype=value.dtype)
    if name in SINGLY:
        with pytest.raises(RuntimeError):
            torch.autograd.grad(value, wanted, many, is_grads_batched=True)
        return
    together = torch.autograd.grad(value, wanted, many, is_grads_batched=True, retain_graph=True)
    singly = zip(*(torch.autograd.grad(value, wanted, one, retain_graph=True) for one in many), strict=True)
    for found, expected in zip(together, singly, strict=True):
        torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("inner", [ExactOT(), PartialOT(0.6)])
@pytest.mark.parametrize("needed", [(True, True, True), (False, True, True), (False, False, True)])
def test_sums_of_a_grid_differentiate_in_points_and_weights(fast, inner, needed):
    torch.manual_seed(0)
    inputs = [points(2, 4, 3), points(3, 4, 3), 0.1 + torch.rand(2, 3, dtype=torch.float64)]
    for part, wanted in zip(inputs, needed, strict=True):
        part.requires_grad_(wanted)

    scheme = MiniBatchOT(inner, num_batches=(2, 3), batch_size=4).scheme

    def total(x, y, weight):
        with nullcontext() if fast else without_fast_paths():
            return scheme.solve(Side(x, "xs"), Side(y, "ys")).total(weight)

    assert torch.autograd.gradcheck(total, inputs)
    assert torch.autograd.gradgradcheck(total, inputs)


@pytest.mark.parametrize("name", ["inside", "factor"])
def test_weights_of_mini_batches_with_gradients_are_refused(name):
    weight = torch.full((2, 4) if name == "inside" else (2,), 0.25, requires_grad=True)
    with pytest.raises(ValueError, match="no gradients in the weights"):
        Side(torch.randn(2, 4, 3), "xs", **{name: weight})
