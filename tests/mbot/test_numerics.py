"""The process's settings: TF32 products do not reach mbot, and sums repeat where they must."""

import threading

import pytest
import torch

import mbot
from mbot.numerics import _doubling, full_float32, kth_smallest, product, rows_of, running_sum


@pytest.fixture(params=["high", "medium", "backend", "all backends"])
def reduced(request):
    """Each way to allow float32 products in less precision."""
    if "backend" in request.param:
        if not hasattr(torch.backends, "fp32_precision"):
            pytest.skip("torch before 2.9 has the one setting only")
        where = torch.backends.cuda.matmul if request.param == "backend" else torch.backends
        where.fp32_precision = "tf32"
    else:
        torch.set_float32_matmul_precision(request.param)
    yield _setting()
    torch.set_float32_matmul_precision("highest")
    for where in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, torch.backends):
        if hasattr(where, "fp32_precision"):
            where.fp32_precision = "none"


def _setting():
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision


FULL = ("highest", ("ieee", "ieee"))


def test_the_setting_is_lifted_inside_and_comes_back(reduced):
    assert _setting() == reduced
    assert reduced not in FULL
    with full_float32():
        assert _setting() in FULL
        with full_float32():
            assert _setting() in FULL
        assert _setting() in FULL
    assert _setting() == reduced
    with pytest.raises(KeyError), full_float32():
        raise KeyError
    assert _setting() == reduced


def test_uses_in_two_threads_count_as_one(reduced):
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with full_float32():
            inside.set()
            leave.wait()

    other = threading.Thread(target=hold)
    other.start()
    inside.wait()
    with full_float32():
        pass
    assert _setting() in FULL  # the other thread is still inside
    leave.set()
    other.join()
    assert _setting() == reduced


def seen_by(call):
    """The settings that a callable cost sees, forward."""
    seen = []

    def cost(x, y):
        seen.append(_setting())
        return mbot.pairwise_cost(x, y)

    call(cost)
    return seen


@pytest.mark.parametrize(
    "call",
    [
        lambda cost: mbot.ExactOT()(torch.randn(4, 2), torch.randn(4, 2), cost=cost),
        lambda cost: mbot.BoMbOT(mbot.EntropicOT(1.0), num_batches=2, batch_size=4, cost=cost)(
            torch.randn(8, 5), torch.randn(8, 5)
        ),
        lambda cost: mbot.OTCoupling(cost=cost)(torch.randn(8, 5), torch.randn(8, 5)),
        lambda cost: mbot.SinkhornCoupling(1.0, cost=cost)(torch.randn(8, 5), torch.randn(8, 5)),
        lambda cost: mbot.WeightedCoupling(1.0, cost=cost)(torch.randn(8, 5), torch.randn(8, 5)),
    ],
)
def test_costs_are_made_in_full_precision(call, reduced):
    seen = seen_by(call)
    assert seen
    assert set(seen) <= set(FULL)
    assert _setting() == reduced


def test_products_in_backward_are_in_full_precision_and_differentiate_twice(reduced):
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    y = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert "_Product" in type(product(x, y).grad_fn).__name__
    assert torch.autograd.gradcheck(product, (x, y))
    assert torch.autograd.gradgradcheck(product, (x, y))
    assert _setting() == reduced


def test_nothing_is_wrapped_where_there_is_nothing_to_lift():
    x = torch.randn(3, 5, requires_grad=True)
    with full_float32():
        assert "_Product" not in type(product(x, x.mT).grad_fn).__name__


@pytest.mark.gpu
@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "cosine", "dot"])
def test_tf32_does_not_reach_costs_nor_gradients(cost, reduced):
    """Float32 rounding is 6e-8 and TF32's 5e-4: errors stay within 100 float32 roundings of the largest cost."""
    torch.manual_seed(0)
    x, y = (torch.randn(512, 256, device="cuda") for _ in range(2))
    weight = torch.rand(512, 512, device="cuda")
    grads = {}
    for dtype in (torch.float32, torch.float64):
        points = x.detach().to(dtype).clone().requires_grad_()
        costs = mbot.pairwise_cost(points, y.to(dtype), cost)
        (costs * weight.to(dtype)).sum().backward()
        grads[dtype] = costs.detach().double(), points.grad.double()
    for ours, exact in zip(*grads.values(), strict=True):
        assert float((ours - exact).abs().max()) < 100 * 2**-24 * float(exact.abs().max())


@pytest.mark.gpu
def test_sinkhorn_meets_its_tolerance_under_tf32(reduced):
    x, y = (torch.randn(300, 64, device="cuda") for _ in range(2))
    plan = mbot.EntropicOT(reg=5.0, tol=1e-5).plan(mbot.pairwise_cost(x, y))
    assert float((plan.row_mass() - 1 / 300).abs().sum()) < 3e-5
    torch.testing.assert_close(
        mbot.SlicedOT()(x, y, generator=torch.Generator().manual_seed(0)),
        mbot.SlicedOT()(x.cpu(), y.cpu(), generator=torch.Generator().manual_seed(0)).cuda(), rtol=1e-5, atol=0,
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(1,), (2,), (7,), (3, 64), (2, 5, 3)])
@pytest.mark.parametrize("dim", [0, -1])
def test_the_running_sum_in_steps_is_the_running_sum(shape, dim):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(_doubling(x, dim), x.cumsum(dim), rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(lambda x: _doubling(x, dim), (x,))


def test_running_sum_and_kth_smallest_on_any_device(device):
    x = torch.randn(1000, device=device)
    torch.use_deterministic_algorithms(True)
    try:
        total, third = running_sum(x, 0, dtype=torch.float64), kth_smallest(x.view(2, 500), 3)
    finally:
        torch.use_deterministic_algorithms(False)
    assert total.dtype == torch.float64
    torch.testing.assert_close(total.cpu(), x.cpu().double().cumsum(0))
    assert third.tolist() == [sorted(half)[2] for half in x.view(2, 500).tolist()]


@pytest.mark.parametrize("shape", [(7,), (7, 3), (7, 2, 3, 4)])
@pytest.mark.parametrize("index", [torch.tensor([3, 3, 0]), torch.tensor([[1, 6], [2, 1]]), torch.tensor(4)])
def test_rows_are_those_of_indexing(shape, index):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for part in (x, x.flip(0)[::1], x.movedim(0, -1).contiguous().movedim(-1, 0), x > 0, x[:, ...].int()):
        assert rows_of(part, index).equal(part[index])
    assert torch.autograd.gradcheck(lambda x: rows_of(x, index), x.requires_grad_())
