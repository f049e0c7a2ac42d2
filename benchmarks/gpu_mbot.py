"""Transports on a CUDA card: batched and large assignments, Sinkhorn without a cost matrix, grid losses.

``rows`` is called by the driver of all GPU benchmarks; run alone, this file prints the same tables. Wall-clock medians
between synchronisations, after a first call that compiles. The CPU's times are of the same host and all its threads.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch

import mbot
from mbot.geometry import Points
from mbot.kernels import device_matching
from mbot.kernels.device_streaming import triton_kernels

BUDGET = 180.0  # seconds after which no further row is begun
Row = dict[str, Any]


class Bench:
    """The device, the deadline, and how times and memory are taken."""

    def __init__(self, device: str, quick: bool) -> None:
        self.device, self.quick, self.began = torch.device(device), quick, time.perf_counter()
        self.cuda = self.device.type == "cuda"

    def sync(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], Any], most: float = 3.0) -> float:
        """Median of up to 7 runs in about ``most`` seconds, at least one, after one to compile that does not count."""
        call()
        found: list[float] = []
        while len(found) < 7 and sum(found) < most:
            self.sync()
            start = time.perf_counter()
            call()
            self.sync()
            found.append(time.perf_counter() - start)
        return statistics.median(found)

    def megabytes(self, call: Callable[[], Any]) -> float | str:
        """Peak memory of the device in a call, beyond what it held before."""
        if not self.cuda:
            return "-"
        self.sync()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        self.sync()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def row(self, facts: Row, measure: Callable[[Row], None]) -> Row:
        """One row, which ``measure`` fills; a failure adds its text, and nothing is begun after the deadline."""
        row = dict(facts)
        if time.perf_counter() - self.began > BUDGET:
            return row | {"note": "skipped: out of time"}
        try:
            measure(row)
        except Exception as error:
            traceback.print_exc()
            if self.cuda:
                torch.cuda.empty_cache()
            row["note"] = f"failed: {type(error).__name__}: {str(error)[:200]}"
        return row


def clouds(shape: tuple[int, ...], d: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(math.prod(shape) + d)
    x, y = (torch.randn(*shape, d, generator=g) for _ in range(2))
    return x.to(device), (y + 1).to(device)


def batched(bench: Bench) -> list[Row]:
    """256 problems, costs given."""
    count = 8 if bench.quick else 256

    def measure(row: Row, m: int, d: int, transport: Any) -> None:
        cost = mbot.pairwise_cost(*clouds((count, m), d, bench.device))
        host = cost.cpu()
        device, cpu = transport.plan(cost), transport.plan(host)
        ours, theirs = bench.seconds(lambda: transport.plan(cost)), bench.seconds(lambda: transport.plan(host))
        values = device.cost(cost).double().cpu(), cpu.cost(host).double()
        row |= {
            "device, s": ours, "CPU path, s": theirs, "CPU / device": theirs / ours,
            "peak MB": bench.megabytes(lambda: transport.plan(cost)),
            "largest relative difference": float(((values[0] - values[1]) / values[1]).abs().max()),
            "largest gap": float(device.error.max()),
        }  # fmt: skip
        if isinstance(transport, mbot.ExactOT):
            row["kernels alone, s"] = bench.seconds(lambda: device_matching.match(cost)) if bench.cuda else "-"
            row["torch-linear-assignment, s"] = linear_assignment(bench, cost)

    cases = [(m, d, mbot.ExactOT()) for m in (64, 128, 256) for d in (2, 64)]
    cases += [(128, d, mbot.PartialOT(0.8)) for d in (2, 64)]
    if bench.quick:
        cases = [(16, 2, mbot.ExactOT()), (16, 2, mbot.PartialOT(0.8))]
    return [
        bench.row(
            {"transport": type(t).__name__, "problems": count, "m": m, "d": d},
            lambda row, c=(m, d, t): measure(row, *c),
        )
        for m, d, t in cases
    ]


def linear_assignment(bench: Bench, cost: torch.Tensor) -> float | str:
    try:
        import torch_linear_assignment as peer

        if bench.cuda and not peer._backend.has_cuda():  # would solve on the CPU
            return "built without CUDA"
        return bench.seconds(lambda: peer.batch_linear_assignment(cost))
    except ImportError:
        return "not installed"
    except Exception as error:
        return f"failed: {error}"[:120]


def one_problem(bench: Bench) -> list[Row]:
    """One large assignment, costs given."""

    def measure(row: Row, n: int, d: int) -> None:
        cost = mbot.pairwise_cost(*clouds((n,), d, bench.device))
        transport = mbot.ExactOT()
        row["device, s"] = bench.seconds(lambda: transport.plan(cost))
        plan = transport.plan(cost)
        row["gap"] = float(plan.error)
        row["peak MB"] = bench.megabytes(lambda: transport.plan(cost))
        if n <= 4096:
            host = cost.cpu()
            row["CPU path, s"] = bench.seconds(lambda: transport.plan(host))
            row["CPU / device"] = row["CPU path, s"] / row["device, s"]
            expected = float(transport.plan(host).cost(host).double())
            row["relative difference"] = abs(float(plan.cost(cost).double()) / expected - 1)

    sizes = [(64, 2)] if bench.quick else [(1024, 2), (1024, 64), (4096, 2), (4096, 64), (16_384, 64)]
    return [bench.row({"n": n, "d": d}, lambda row, c=(n, d): measure(row, *c)) for n, d in sizes]


def streaming(bench: Bench) -> list[Row]:
    """Ten iterations at a fixed regularisation, from points."""

    def measure(row: Row, n: int, d: int, iterations: int, dtype: torch.dtype) -> None:
        x, y = (points.to(dtype) for points in clouds((n,), d, bench.device))
        eps = 0.1 * d

        def run(tiles: bool = False) -> torch.Tensor:
            geometry = Points(x, y, "sqeuclidean", 1 << 24, eps)
            if tiles:
                geometry.fused = None
            psi = torch.zeros(1, n, dtype=torch.float64, device=bench.device)
            for _ in range(iterations):
                phi = -math.log(n) - geometry.row_sums(psi)
                psi = -math.log(n) - geometry.col_sums(phi)
            return psi[0]

        row |= {"fused, s": bench.seconds(run), "peak MB": bench.megabytes(run)}
        if n <= 50_000 and dtype == torch.float32:
            row["tiles in torch, s"] = bench.seconds(lambda: run(tiles=True))
            exact = run(tiles=True)
            row["its largest difference, in eps"] = float((run() - exact).abs().max())
            if bench.cuda:
                with patch.object(triton_kernels(), "PRECISION", "tf32x3"):
                    row["fused in 3 x TF32, s"] = bench.seconds(run)
                    row["that one's largest difference"] = float((run() - exact).abs().max())
            row |= peers(bench, x, y, eps, iterations)

    f32, bf16 = torch.float32, torch.bfloat16
    cases = [(10_000, 64, 10, f32), (50_000, 64, 10, f32), (50_000, 64, 10, bf16), (50_000, 3, 10, f32),
             (1_000_000, 3, 1, f32)]  # fmt: skip
    if bench.quick:
        cases = [(500, 8, 2, f32)]
    return [
        bench.row(
            {"n": n, "d": d, "iterations": k, "dtype": str(t).removeprefix("torch.")}, lambda row, c=c: measure(row, *c)
        )
        for c in cases
        for n, d, k, t in [c]
    ]


def peers(bench: Bench, x: torch.Tensor, y: torch.Tensor, eps: float, iterations: int) -> Row:
    """The packages that are installed, as many iterations each (geomloss: a schedule of about that length)."""
    found: Row = {}
    try:
        from flash_sinkhorn import SamplesLoss

        for tf32 in (True, False):
            loss = SamplesLoss(
                loss="sinkhorn", debias=False, use_epsilon_scaling=False, eps=eps, n_iters=iterations,
                blur=math.sqrt(eps), allow_tf32=tf32,
            )  # fmt: skip
            name = f"flash-sinkhorn{' (TF32, its default)' if tf32 else ''}, s"
            found[name] = bench.seconds(lambda loss=loss: loss(x, y))
    except ImportError:
        found["flash-sinkhorn, s"] = "not installed"
    except Exception as error:
        found["flash-sinkhorn, s"] = f"failed: {error}"[:120]
    try:
        import pykeops  # noqa: F401
        from geomloss import SamplesLoss as Online

        blur = math.sqrt(eps / 2)  # geomloss halves the squared distance
        online = Online(
            "sinkhorn", p=2, blur=blur, diameter=blur * 2 ** (iterations - 2), scaling=0.5, debias=False,
            backend="online",
        )  # fmt: skip
        found["geomloss + KeOps, s"] = bench.seconds(lambda: online(x, y))
    except ImportError:
        found["geomloss + KeOps, s"] = "not installed"
    except Exception as error:
        found["geomloss + KeOps, s"] = f"failed: {error}"[:120]
    return found


def whole_sinkhorn(bench: Bench) -> list[Row]:
    """The coupling, and value and gradients of the transport, to convergence."""
    n = 500 if bench.quick else 10_000

    def coupling(row: Row) -> None:
        x, y = clouds((n,), 3, bench.device)
        found = {}

        def call() -> None:
            found["pairs"] = mbot.SinkhornCoupling(0.1)(x, y)

        row |= {"seconds": bench.seconds(call), "peak MB": bench.megabytes(call),
                "iterations": found["pairs"].info["iterations"]}  # fmt: skip

    def value(row: Row, size: int) -> None:
        x, y = clouds((size,), 3, bench.device)
        x.requires_grad_()

        def call() -> None:
            x.grad = None
            mbot.EntropicOT(0.3, tol=1e-4)(x, y).backward()

        row |= {"seconds": bench.seconds(call), "peak MB": bench.megabytes(call), "iterations": "-"}

    name = "EntropicOT(0.3), value and gradient"
    return [
        bench.row({"what": "SinkhornCoupling(0.1)", "n": n, "d": 3}, coupling),
        *(
            bench.row({"what": name, "n": size, "d": 3}, lambda row, size=size: value(row, size))
            for size in ((n,) if bench.quick else (n, 50_000))
        ),
    ]


def grid_losses(bench: Bench) -> list[Row]:
    """Forward and backward against the double loop over `ot.emd`, on tensors of the device."""
    from mbot_losses import loop, step

    k, m = (4, 16) if bench.quick else (16, 128)

    def measure(row: Row, name: str, d: int) -> None:
        x, y = clouds((k, m), d, bench.device)
        x.requires_grad_()
        y.requires_grad_()
        loss = {
            "BoMbOT(ExactOT)": mbot.BoMbOT(mbot.ExactOT(), num_batches=k, batch_size=m),
            "MiniBatchOT(ExactOT)": mbot.MiniBatchOT(mbot.ExactOT(), num_batches=k, batch_size=m),
            "MiniBatchOT(PartialOT(0.8))": mbot.MiniBatchOT(mbot.PartialOT(0.8), num_batches=k, batch_size=m),
        }[name]

        def call() -> torch.Tensor:
            return step(loss.from_batches, x, y)

        row["device, s"] = bench.seconds(call)
        xs, ys = (t.detach().cpu().requires_grad_() for t in (x, y))
        row["CPU, s"] = bench.seconds(lambda: step(loss.from_batches, xs, ys))
        if name.startswith("BoMb"):
            row["loop over ot.emd, s"] = bench.seconds(lambda: step(loop, x, y))
            row["times faster"] = row["loop over ot.emd, s"] / row["device, s"]
        row["relative difference to the CPU"] = abs(float(call()) / float(step(loss.from_batches, xs, ys)) - 1)
        row["peak MB"] = bench.megabytes(call)
        row["share of the time the GPU is busy"] = busy(bench, call)

    names = ("BoMbOT(ExactOT)", "MiniBatchOT(ExactOT)", "MiniBatchOT(PartialOT(0.8))")
    return [
        bench.row({"loss": name, "k": k, "m": m, "d": d}, lambda row, c=(name, d): measure(row, *c))
        for name in names
        for d in ((2,) if bench.quick else (2, 64))
    ]


def busy(bench: Bench, call: Callable[[], Any]) -> float | str:
    """Summed kernel time over wall time, from torch's profiler."""
    if not bench.cuda:
        return "-"
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    call()
    bench.sync()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        start = time.perf_counter()
        for _ in range(5):
            call()
        bench.sync()
        wall = time.perf_counter() - start
    device = sum(
        event.self_device_time_total for event in record.key_averages() if event.device_type == DeviceType.CUDA
    )
    return device * 1e-6 / wall if device else "-"  # a machine without CUPTI records nothing


def uniform(table: list[Row]) -> list[Row]:
    """Every row with every column, as tables are written."""
    columns = list(dict.fromkeys(column for row in table for column in row))
    return [{column: row.get(column, "") for column in columns} for row in table]


def rows(
    quick: bool = False, device: str = "cuda", save: Callable[[dict[str, list[Row]]], Any] = lambda tables: None
) -> dict[str, list[Row]]:
    """All tables: heading -> rows. ``save`` is given those at hand after each."""
    warnings.simplefilter("ignore", mbot.ConvergenceWarning)
    bench = Bench(device, quick)
    tables = {}
    for heading, make in {
        "Batched assignment, costs given": batched,
        "Grid losses, forward and backward": grid_losses,
        "One assignment problem, costs given": one_problem,
        "Streaming Sinkhorn, iterations at a fixed regularisation": streaming,
        "Streaming Sinkhorn, whole calls": whole_sinkhorn,
    }.items():
        tables[heading] = uniform(make(bench))
        save(tables)
    return tables


if __name__ == "__main__":
    cpu = "--cpu" in sys.argv or not torch.cuda.is_available()
    print(json.dumps(rows("--quick" in sys.argv or cpu, "cpu" if cpu else "cuda"), indent=1))
