"""What every transport promises, whatever it computes."""

import pickle

import pytest
import torch

import mbot
from tests.contracts.cases import TRANSPORTS, VALUES_ONLY, exported, flat

every_transport = pytest.mark.parametrize("transport", flat(TRANSPORTS), ids=repr)


def clouds(*batch, n=6, m=6, d=3, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(*batch, n, d, generator=g, dtype=dtype),
        torch.randn(*batch, m, d, generator=g, dtype=dtype) + 0.5,
    )


def test_everything_has_a_case():
    assert exported(mbot.Transport) == set(TRANSPORTS)
    assert exported(mbot.transport.ValueTransport) == set(VALUES_ONLY)


@every_transport
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "m"), [(6, 6), (5, 7), (1, 1), (1, 4), (4, 1)])
def test_plan_has_the_cost_s_shape_dtype_and_device(transport, n, m, dtype, device):
    cost = torch.rand(2, 3, n, m, dtype=dtype, device=device)
    plan = transport.plan(cost)
    assert plan.size == (n, m)
    assert plan.batch_shape == (2, 3)
    assert plan.mass.dtype == dtype
    assert plan.mass.device.type == device.type
    assert not plan.mass.requires_grad
    assert bool((plan.mass >= 0).all())
    for fact, kind in ((plan.converged, torch.bool), (plan.error, torch.float64), (plan.iterations, torch.int64)):
        assert fact.shape == (2, 3)
        assert fact.dtype == kind
    assert bool(plan.converged.all())
    if plan.is_sparse:
        assert plan.row.dtype == plan.col.dtype == torch.int64
        assert 0 <= int(plan.row.min()) <= int(plan.row.max()) < n
        assert 0 <= int(plan.col.min()) <= int(plan.col.max()) < m
    dense = plan.to_dense()
    assert dense.shape == cost.shape
    torch.testing.assert_close(plan.row_mass(), dense.sum(-1))
    torch.testing.assert_close(plan.col_mass(), dense.sum(-2))
    torch.testing.assert_close(plan.total_mass(), dense.sum((-2, -1)))
    torch.testing.assert_close(plan.cost(cost), (dense * cost).sum((-2, -1)))


@every_transport
def test_a_batch_equals_its_problems_one_by_one(transport):
    x, y = clouds(2, 3)
    cost = mbot.pairwise_cost(x, y)
    together = transport.plan(cost).to_dense()
    values = transport(x, y)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(together[i, j], transport.plan(cost[i, j]).to_dense())
            torch.testing.assert_close(values[i, j], transport(x[i, j], y[i, j]))


@every_transport
@pytest.mark.parametrize("shape", [(2, 0, 3, 3), (0, 3, 3), (0, 2, 3, 4)])
def test_no_problems_have_no_plans(transport, shape):
    *batch, n, m = shape
    x, y = torch.zeros(*batch, n, 2, requires_grad=True), torch.zeros(*batch, m, 2)
    cost = mbot.pairwise_cost(x, y)
    for weights in ((), (torch.full((n,), 1 / n), torch.full((m,), 1 / m))):
        plan = transport.plan(cost, *weights)
        assert plan.to_dense().shape == shape
        assert plan.row_mass().shape == (*batch, n)
        assert plan.col_mass().shape == (*batch, m)
        assert [p.shape for p in plan.potentials] == [(*batch, n), (*batch, m)]
        assert plan.barycentric_map(y)[0].shape == x.shape
        assert plan.converged.shape == plan.error.shape == plan.cost(cost).shape == tuple(batch)
        for values in (transport(x, y, *weights), transport.value(cost, *weights)):
            assert values.shape == tuple(batch)
            (gradient,) = torch.autograd.grad(values.sum(), x, retain_graph=True)
            assert gradient.shape == x.shape


@every_transport
def test_the_same_call_gives_the_same_plan(transport):
    cost = torch.rand(3, 8, 8)
    assert torch.equal(transport.plan(cost).to_dense(), transport.plan(cost).to_dense())


@every_transport
@pytest.mark.parametrize(("n", "m"), [(6, 6), (5, 7)])
def test_permuting_the_points_permutes_the_plan(transport, n, m):
    x, y = clouds(n=n, m=m)
    cost = mbot.pairwise_cost(x, y)
    p, q = torch.randperm(n), torch.randperm(m)
    permuted = transport.plan(cost[p][:, q])
    torch.testing.assert_close(permuted.to_dense(), transport.plan(cost).to_dense()[p][:, q])
    torch.testing.assert_close(transport(x[p], y[q]), transport(x, y))


@every_transport
@pytest.mark.parametrize("share", [True, False])
def test_weight_zero_is_removal(transport, share):
    x, y = clouds(2, n=6, m=6)
    keep_x, keep_y = torch.tensor([0, 2, 3, 5]), torch.tensor([1, 2, 4, 5])
    a, b = torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    if share:
        a[keep_x], b[keep_y] = 0.25, 0.25
    else:
        a[keep_x] = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
        b[keep_y] = torch.tensor([0.4, 0.1, 0.25, 0.25], dtype=torch.float64)
    cost = mbot.pairwise_cost(x, y)
    full = transport.plan(cost, a, b).to_dense()
    part = transport.plan(cost[:, keep_x][:, :, keep_y], a[keep_x], b[keep_y]).to_dense()
    torch.testing.assert_close(full[:, keep_x][:, :, keep_y], part)
    torch.testing.assert_close(full.sum((-2, -1)), part.sum((-2, -1)))
    torch.testing.assert_close(transport(x, y, a, b), transport(x[:, keep_x], y[:, keep_y], a[keep_x], b[keep_y]))


@every_transport
def test_inputs_are_left_alone(transport):
    x, y = clouds(2)
    cost = mbot.pairwise_cost(x, y)
    a = torch.tensor([0.5, 0.5, 1, 0, 1, 1], dtype=torch.float64) / 4
    copies = [t.clone() for t in (x, y, cost, a)]
    transport.plan(cost, a)
    transport(x, y, a)
    for tensor, copy in zip((x, y, cost, a), copies, strict=True):
        assert torch.equal(tensor, copy)


@every_transport
def test_settings_pickle_compare_and_print(transport):
    again = pickle.loads(pickle.dumps(transport))
    assert again == transport
    assert hash(again) == hash(transport)
    assert repr(again) == repr(transport)
    assert type(transport).__name__ in repr(transport)
    with pytest.raises(AttributeError):
        transport.anything_else = 1


@every_transport
@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "cosine", "dot"])
def test_gradients_flow_through_the_cost_and_match_finite_differences(transport, cost):
    x, y = clouds(2, n=5, m=5)
    x.requires_grad_()
    y.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: transport(x, y, cost=cost), (x, y), eps=1e-6, atol=1e-6)


@every_transport
def test_a_callable_cost_and_a_named_one_agree(transport):
    x, y = clouds(2)
    x.requires_grad_()
    named = transport(x, y, cost="sqeuclidean")
    called = transport(x, y, cost=lambda x, y: (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1))
    torch.testing.assert_close(named, called)
    torch.testing.assert_close(torch.autograd.grad(named.sum(), x)[0], torch.autograd.grad(called.sum(), x)[0])


@every_transport
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(transport, dtype):
    x, y = clouds(2, dtype=torch.float32)
    x, y = x.to(dtype), y.to(dtype)
    value = transport(x, y)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, transport(x.float(), y.float()))


@every_transport
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_scale_of_the_data(transport, scale):
    """Exact plans do not depend on units; a regularised one is scaled with them."""
    x, y = clouds(2, dtype=torch.float32)
    if isinstance(transport, mbot.ExactOT):
        torch.testing.assert_close(transport(scale * x, scale * y) / scale**2, transport(x, y), rtol=1e-4, atol=0)
