"""Derivatives of values in the weights, and second derivatives: right, or refused."""

import pytest
import torch

import mbot
from mbot.transport import large_clouds

COSTS = ["sqeuclidean", "euclidean", "cosine", "dot"]
TIGHT = {"tol": 1e-12, "max_iter": 100_000}
REGULARISED = [
    mbot.EntropicOT(0.5, **TIGHT),
    mbot.UnbalancedOT(0.5, 2.0, **TIGHT),
    mbot.PartialOT(0.6, reg=0.5, **TIGHT),
]
TRANSPORTS = [mbot.ExactOT(), mbot.PartialOT(0.6), mbot.PartialOT(1.0), *REGULARISED]


def problem(*batch, n=6, m=7, d=3):
    x, y = torch.randn(*batch, n, d, dtype=torch.float64), torch.randn(m, d, dtype=torch.float64)
    a, b = (0.3 + torch.rand(*batch, size, dtype=torch.float64) for size in (n, m))
    return x, y, a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("how", ["points", "costs", "costs with a forbidden pair"])
@pytest.mark.parametrize("transport", TRANSPORTS, ids=str)
def test_derivatives_in_the_weights(transport, how, seed):
    """Of moving mass inside the simplex, against central differences."""
    torch.manual_seed(seed)
    x, y, a, b = problem(2)
    cost = mbot.pairwise_cost(x, y)
    if "forbidden" in how:
        cost[..., 0, 1] = torch.inf

    def value(a, b):
        return transport(x, y, a, b) if how == "points" else transport.value(cost, a, b)

    move_a, move_b = (torch.randn_like(w) for w in (a, b))
    move_a, move_b = (move - move.mean(-1, keepdim=True) for move in (move_a, move_b))
    a.requires_grad_()
    b.requires_grad_()
    grads = torch.autograd.grad(value(a, b).sum(), (a, b))
    ours = (grads[0] * move_a).sum() + (grads[1] * move_b).sum()
    with torch.no_grad():
        step = 1e-6
        ahead, back = (value(a + s * move_a, b + s * move_b).sum() for s in (step, -step))
    torch.testing.assert_close(ours, (ahead - back) / (2 * step), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transport", TRANSPORTS, ids=str)
def test_weights_broadcast_over_problems_and_one_side_may_be_uniform(transport):
    x, y, _a, _b = problem(3)
    a = torch.rand(6, dtype=torch.float64).add_(0.2)
    a = (a / a.sum()).requires_grad_()
    (shared,) = torch.autograd.grad(transport(x, y, a).sum(), a)
    one_by_one = sum(torch.autograd.grad(transport(part, y, a), a)[0] for part in x)
    torch.testing.assert_close(shared, one_by_one, rtol=1e-6, atol=1e-6)
    assert bool(shared.abs().sum() > 0)


@pytest.mark.parametrize("transport", [mbot.EntropicOT(0.5, **TIGHT), mbot.UnbalancedOT(0.5, 2.0, **TIGHT)], ids=str)
def test_the_derivative_in_a_weight_of_zero(transport):
    x, y, a, b = problem()
    a[2], a[3] = 0, a[2] + a[3]
    a.requires_grad_()
    move = torch.tensor([-1.0, 0, 1, 0, 0, 0], dtype=torch.float64)
    (grad,) = torch.autograd.grad(transport(x, y, a, b), a)
    with torch.no_grad():
        there, ahead, twice = (transport(x, y, a + s * move, b) for s in (0, 1e-6, 2e-6))
    torch.testing.assert_close((grad * move).sum(), (4 * ahead - 3 * there - twice) / 2e-6, rtol=1e-3, atol=1e-4)


def test_no_mass_depends_on_no_weight_and_entropic_partial_weights_of_zero_are_refused():
    x, y, a, b = problem()
    grads = torch.autograd.grad(mbot.PartialOT(0.0)(x, y, a.requires_grad_(), b.requires_grad_()), (a, b))
    assert all(bool((grad == 0).all()) for grad in grads)
    a, b = a.detach(), b.detach()
    a[2], a[3] = 0, a[2] + a[3]
    with pytest.raises(ValueError, match="no derivative in a weight that is 0"):
        mbot.PartialOT(0.6, reg=0.5)(x, y, a.requires_grad_(), b)


def test_sliced_values_differentiate_in_the_weights():
    x, y, a, b = problem()
    weights = a.requires_grad_(), b.requires_grad_()

    def value(a, b):
        return mbot.SlicedOT(num_projections=5)(x, y, a, b, generator=torch.Generator().manual_seed(0))

    assert torch.autograd.gradcheck(value, weights)


@pytest.mark.parametrize("cls", [mbot.MiniBatchOT, mbot.BoMbOT])
def test_losses_that_draw_by_the_weights_refuse_their_gradients(cls):
    x, y, a, b = problem()
    loss = cls(mbot.ExactOT(), num_batches=2, batch_size=3)
    with pytest.raises(ValueError, match=r"a loss that draws mini-batches by the weights .* pass a\.detach"):
        loss(x, y, a.requires_grad_(), b)
    with pytest.raises(ValueError, match=r"pass b\.detach"):
        loss(x, y, None, b.requires_grad_())
    assert loss.plan(x, y, a, b).total_mass() > 0  # a constant
    with torch.no_grad():
        assert float(loss(x, y, a, b)) > 0


@pytest.mark.parametrize("cost", ["sqeuclidean", "dot", "cosine"])
@pytest.mark.parametrize("weights", ["positive", "some zero", "one side"])
def test_tiled_values_differentiate_in_the_weights(monkeypatch, weights, cost):
    """As those from a cost matrix do."""
    x, y, a, b = problem(2)
    if weights == "some zero":
        a[0, 2], a[0, 3] = 0, a[0, 2] + a[0, 3]
        b[1, 1], b[1, 2] = 0, b[1, 1] + b[1, 2]
        x[0, 2] = 1e3 * x[0, 2]
    a, b = a.requires_grad_(), None if weights == "one side" else b.requires_grad_()
    given = [weight for weight in (a, b) if weight is not None]
    transport, found = mbot.EntropicOT(0.5, tol=1e-12), []
    for most in (1 << 27, 0):
        monkeypatch.setattr(large_clouds, "_MOST", {"cpu": most})
        values = transport(x, y, a, b, cost)
        found.append((values.detach(), *torch.autograd.grad(values.sum(), given)))
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("transport", [mbot.ExactOT(), mbot.PartialOT(0.6)], ids=str)
def test_second_derivatives_of_exact_transport(transport, cost):
    x, y, a, b = problem(2)
    x.requires_grad_()
    y.requires_grad_()
    same = torch.randn(6, 3, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda x, y: transport(x, y, a, b, cost), (x, y))
    assert torch.autograd.gradgradcheck(lambda x: transport(x, same, cost=cost), (x,))  # uniform


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize(
    "loss",
    [
        mbot.MiniBatchOT(mbot.ExactOT(), num_batches=2, batch_size=3),
        mbot.MiniBatchOT(mbot.PartialOT(0.5), num_batches=2, batch_size=3, pairing="aligned"),
        mbot.MiniBatchOT(mbot.SlicedOT(num_projections=3), num_batches=2, batch_size=3),
        mbot.BoMbOT(mbot.ExactOT(), num_batches=2, batch_size=3),
    ],
    ids=str,
)
def test_second_derivatives_of_losses(loss, cost):
    loss.cost = cost
    loss.generator = torch.Generator()
    xs = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    ys = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def value(xs, ys):
        loss.generator.manual_seed(0)
        return loss.from_batches(xs, ys)

    assert torch.autograd.gradgradcheck(value, (xs, ys))


def _refused(value, x):
    (first,) = torch.autograd.grad(value, x, create_graph=True)
    assert bool(first.detach().isfinite().all())
    with pytest.raises(RuntimeError, match="second derivatives of this transport are not available"):
        torch.autograd.grad(first.square().sum(), x)


@pytest.mark.parametrize("transport", REGULARISED, ids=str)
def test_second_derivatives_of_regularised_transport_are_refused(transport):
    x, y, a, b = problem(2)
    x.requires_grad_()
    _refused(transport(x, y, a, b).sum(), x)
    _refused(transport(x, y, a, b, lambda x, y: (x[..., :, None, :] - y).square().sum(-1)).sum(), x)
    cost = mbot.pairwise_cost(x.detach(), y).requires_grad_()
    _refused(transport.value(cost, a, b).sum(), cost)
    loss = mbot.MiniBatchOT(transport, num_batches=2, batch_size=3)
    for pairing in ("grid", "aligned"):
        loss.pairing = pairing
        _refused(loss.from_batches(x, y[:6].reshape(2, 3, 3)), x)
    grid = torch.rand(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    _refused(loss.from_cost(grid), grid)


def test_second_derivatives_of_an_entropic_outer_problem_and_of_tiles_are_refused(monkeypatch):
    xs, ys = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True), torch.randn(2, 3, 4, dtype=torch.float64)
    loss = mbot.BoMbOT(mbot.ExactOT(), num_batches=2, batch_size=3, reg=0.5)
    _refused(loss.from_batches(xs, ys), xs)
    grid = torch.rand(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    _refused(loss.from_cost(grid), grid)
    monkeypatch.setattr(large_clouds, "_MOST", {"cpu": 0})
    _refused(mbot.EntropicOT(0.5)(xs, ys).sum(), xs)


@pytest.mark.parametrize("transport", TRANSPORTS, ids=str)
def test_second_derivatives_beside_weights_are_refused(transport):
    x, y, a, b = problem()
    a.requires_grad_()
    _refused(transport(x, y, a, b), a)
    _refused(transport(x.requires_grad_(), y, a, b), x)


@pytest.mark.parametrize("large", [1e4, float("inf")])
def test_unbalanced_values_in_the_weights_of_points_without_mass(large):
    """Whatever such a point weighs has to be paid for, and goes nowhere."""
    torch.manual_seed(0)
    x, y, a, b = problem()
    cost = mbot.pairwise_cost(x, y)
    cost[1] += large
    transport = mbot.UnbalancedOT(0.3, 1.0, **TIGHT)
    a.requires_grad_()
    (grad,) = torch.autograd.grad(transport.value(cost, a, b), a)
    assert float(grad[1]) == pytest.approx(1.3)
    with torch.no_grad():
        step = 1e-6 * torch.eye(6, dtype=torch.float64)
        slopes = [(transport.value(cost, a + s, b) - transport.value(cost, a - s, b)) / 2e-6 for s in step]
    torch.testing.assert_close(grad, torch.stack(slopes), rtol=1e-4, atol=1e-6)
