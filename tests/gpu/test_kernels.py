"""Every CUDA path of the transports against the CPU path: values, plans, gradients, certificates, memory."""

import importlib.util
import math
import sys

import pytest
import torch

import mbot.kernels.device_streaming
from mbot import BoMbOT, EntropicOT, ExactOT, MiniBatchOT, PartialOT, SinkhornCoupling, pairwise_cost
from mbot.kernels import device_matching
from mbot.transport import large_clouds

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]

REHEARSAL = "tests.pretended_cuda" in sys.modules  # interpreted entry by entry: tiny sizes


@pytest.fixture(autouse=True)
def short_start(monkeypatch):
    """Rehearsed paths are searched from a poor start, or they would be none."""
    if REHEARSAL:
        monkeypatch.setattr(device_matching.Problems, "schedule", lambda self: (3, 1))


def sizes(*real, rehearsed):
    return pytest.mark.parametrize("n", rehearsed if REHEARSAL else real)


def cost_of(kind, batch, n, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    if kind == "ties":
        return torch.randint(-2, 3, (batch, n, n), generator=g).to(dtype)
    if kind == "uniform":
        return torch.rand(batch, n, n, generator=g, dtype=dtype)
    d = {"plane": 2, "high": 64}[kind]
    x, y = (torch.randn(batch, n, d, generator=g, dtype=dtype) for _ in range(2))
    return pairwise_cost(x, y + 1)


def assert_same(transport, cost):
    """One transport on both devices."""
    device, cpu = transport.plan(cost.cuda()), transport.plan(cost)
    assert device.mass.is_cuda
    assert device.col.is_cuda
    values = device.cost(cost.cuda().double()).cpu(), cpu.cost(cost.double())
    torch.testing.assert_close(*values, rtol=1e-9 if cost.dtype == torch.float64 else 1e-6, atol=1e-9)
    assert bool(device.converged.all())
    assert float(device.error.max()) < 1e-9
    n = cost.shape[-1]
    assert float(device.row_mass().max()) <= 1 / n * (1 + 1e-5)
    assert float(device.col_mass().max()) <= 1 / n * (1 + 1e-5)
    if float(cost.abs().max()) < 1e30:  # larger potentials may overflow float32
        f, g = (p.double() for p in device.potentials)
        slack = cost.cuda().double() - f[..., :, None] - g[..., None, :]
        assert float(slack.min()) > -1e-5 * float(cost.abs().max())
    return device, cpu


# Sizes on both sides of each block size, of the sizes that are multiples of 16, and of the two forms of the start.
@sizes(1, 2, 3, 15, 16, 17, 100, 128, 129, 256, 300, 512, 513, 1000, 1024, rehearsed=[1, 2, 17])
@pytest.mark.parametrize("kind", ["plane", "high", "uniform", "ties"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact(n, kind, dtype):
    assert device_matching.applies(torch.zeros(1, n, n, device="cuda"), n)
    assert_same(ExactOT(), cost_of(kind, 3, n, dtype))


@sizes(1, 2, 17, 64, 128, 333, 700, rehearsed=[2, 9])
@pytest.mark.parametrize("mass", [0.01, 0.5, 0.77, 0.999])
@pytest.mark.parametrize("kind", ["plane", "uniform", "ties"])
def test_partial(n, mass, kind):
    device, _ = assert_same(PartialOT(mass), cost_of(kind, 3, n, torch.float32))
    torch.testing.assert_close(device.total_mass(), torch.full((3,), mass, device="cuda"))


@sizes(1500, 4096, 9000, rehearsed=[20])
def test_one_large_problem(n):
    assert_same(ExactOT(), cost_of("high" if n > 5000 else "plane", 1, n, torch.float32))


def test_many_problems_and_batch_axes():
    n, batch = (5, (2, 3)) if REHEARSAL else (48, (20, 30))
    cost = cost_of("plane", math.prod(batch), n, torch.float32).reshape(*batch, n, n)
    device, cpu = assert_same(ExactOT(), cost)
    assert device.col.shape == (*batch, n)
    assert float((device.col.cpu() == cpu.col).float().mean()) > 0.999


def test_results_repeat():
    """A result that changed from run to run would be a race."""
    for n in (9,) if REHEARSAL else (33, 128, 600, 1024):
        cost = cost_of("plane", 40 if n > 9 else 2, n, torch.float32, seed=n).cuda()
        first = ExactOT().plan(cost)
        for _ in range(10 if n > 9 else 1):
            again = ExactOT().plan(cost)
            assert torch.equal(first.col, again.col)
            assert torch.equal(first.potentials[1], again.potentials[1])


def test_forbidden_pairs_and_extreme_costs():
    n = 8 if REHEARSAL else 40
    cost = cost_of("uniform", 2, n, torch.float32)
    cost[:, torch.arange(n), torch.arange(n)] = torch.inf
    for transport in (ExactOT(), PartialOT(0.6)):
        plan = transport.plan(cost.cuda())
        torch.testing.assert_close(plan.cost(cost.cuda()).cpu(), transport.plan(cost).cost(cost))
        with pytest.raises(ValueError, match="every pair"):
            transport.plan(torch.full((3, 3), torch.inf, device="cuda"))
    cost[1, 2:] = torch.inf
    with pytest.raises(ValueError, match="no plan avoids the forbidden pairs"):
        ExactOT().plan(cost.cuda())
    cost = cost_of("uniform", 2, n, torch.float64)
    for scale in (1e-30, 1e30, 1e200):
        assert_same(ExactOT(), cost * scale)
    assert_same(ExactOT(), (3e38 * cost).float())
    assert_same(ExactOT(), cost + 1e6)


def test_without_triton_the_cpu_solves_it(monkeypatch):
    monkeypatch.setattr(device_matching, "triton_kernels", lambda: None)
    cost = cost_of("plane", 2, 30, torch.float32).cuda()
    plan = ExactOT().plan(cost)
    assert plan.col.is_cuda
    monkeypatch.undo()
    torch.testing.assert_close(plan.cost(cost), ExactOT().plan(cost).cost(cost))


@pytest.mark.parametrize("transport", [ExactOT(), PartialOT(0.8)], ids=repr)
@pytest.mark.parametrize("loss", [BoMbOT, MiniBatchOT])
def test_grid_losses(transport, loss):
    g = torch.Generator().manual_seed(0)
    k, m = (2, 8) if REHEARSAL else (8, 64)
    x, y = torch.randn(k, m, 16, generator=g), torch.randn(k, m, 16, generator=g) + 1
    found = []
    for device in ("cpu", "cuda"):
        xs, ys = (t.to(device).requires_grad_() for t in (x, y))
        value = loss(transport, num_batches=k, batch_size=m).from_batches(xs, ys)
        found.append([t.cpu() for t in (value, *torch.autograd.grad(value, (xs, ys)))])
    for cpu, cuda in zip(*found, strict=True):
        torch.testing.assert_close(cuda, cpu, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cost", ["sqeuclidean", "dot", "cosine"])
@pytest.mark.parametrize("d", [2, 5, 64, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_entropic_values_of_points(cost, d, dtype, monkeypatch):
    """Fused kernels on the device, tiles in float64 on the CPU."""
    monkeypatch.setattr(large_clouds, "_MOST", {"cpu": 0, "cuda": 0})
    g = torch.Generator().manual_seed(d)
    if REHEARSAL and dtype == torch.bfloat16 and not (cost == "sqeuclidean" and d == 2):
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16")
    n, m = (20, 70) if REHEARSAL else (500, 700)
    x, y = torch.randn(n, d, generator=g).to(dtype), (torch.randn(m, d, generator=g) + 0.5).to(dtype)
    a = torch.rand(n, generator=g)
    a /= a.sum()
    reg = {"sqeuclidean": 0.3 * d, "dot": 0.3 * d, "cosine": 0.1}[cost]
    found = []
    for device, wide in (("cpu", True), ("cuda", False)):
        xs, ys = ((t.double() if wide else t).to(device).requires_grad_() for t in (x, y))
        value = EntropicOT(reg, tol=1e-5)(xs, ys, a.to(device), cost=cost)
        found.append([t.double().cpu() for t in (value, *torch.autograd.grad(value, (xs, ys)))])
    half = dtype != torch.float32
    for cpu, cuda in zip(*found, strict=True):
        scale = float(cpu.detach().abs().max())
        torch.testing.assert_close(cuda, cpu, rtol=0, atol=scale * (1e-2 if half else 2e-4))


@sizes(3000, 5000, 20_000, rehearsed=[70])
def test_sinkhorn_coupling_streams(n):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 3, generator=g), torch.randn(n, 3, generator=g) + 2
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    streams = SinkhornCoupling(0.3, cells=1 << (12 if REHEARSAL else 20))
    device = streams(x.cuda(), y.cuda())
    assert torch.cuda.max_memory_allocated() - before < 120 << 20
    if n <= 5000:
        cpu = streams(x, y)
        assert device.info["plan_entropy"] == pytest.approx(cpu.info["plan_entropy"], abs=1e-3)
        assert device.info["reg"] == pytest.approx(cpu.info["reg"], rel=1e-4)
        torch.testing.assert_close(
            device.info["potentials"].psi.cpu(), cpu.info["potentials"].psi, rtol=1e-3, atol=1e-2
        )


def test_products_are_never_tf32():
    """The error of tf32 would be a thousand times larger."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(1, 256, 64, generator=g), torch.randn(1, 256, 64, generator=g)
    psi = torch.zeros(1, 256)
    expected = torch.logsumexp((x.double() @ y.double().mT) / 0.01, 2)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        found = mbot.kernels.device_streaming.triton_kernels().log_sums(x.cuda(), y.cuda(), psi.cuda(), "dot", 0.01)
    finally:
        torch.set_float32_matmul_precision(before)
    assert float((found.cpu() - expected).abs().max() / expected.abs().max()) < 1e-6
