"""Transports on a CUDA card: batched and large assignments, Sinkhorn without a cost matrix, grid losses.

``rows`` is called by the driver of all GPU benchmarks; run alone, this file prints the same tables. Wall-clock medians
between synchronisations, after a first call that compiles. The CPU's times are of the same host and all its threads.
"""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from gpu_bench import Bench, Row, Tables, against, busy, clouds, uniform
from gpu_peers import beside, flash_sinkhorn, linear_assignment

import mbot
from mbot.geometry import Points
from mbot.kernels import device_matching
from mbot.kernels.device_streaming import triton_kernels

BUDGET = 180.0  # seconds after which no further row is begun


def batched(bench: Bench, table: str) -> None:
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
            row |= stages(bench, cost)
            row["torch-linear-assignment, s"] = linear_assignment(bench, cost)

    cases = [(m, d, mbot.ExactOT()) for m in (64, 128, 256) for d in (2, 64)]
    cases += [(128, d, mbot.PartialOT(0.8)) for d in (2, 64)]
    if bench.quick:
        cases = [(16, 2, mbot.ExactOT()), (16, 2, mbot.PartialOT(0.8))]
    for m, d, t in cases:
        facts = {"transport": type(t).__name__, "problems": count, "m": m, "d": d}
        bench.row(table, facts, lambda row, c=(m, d, t): measure(row, *c))


def stages(bench: Bench, cost: torch.Tensor) -> Row:
    """The kernels alone, each stage of them, and their floor.

    The floor: every cost read once, and as many exponentials as the start is scheduled to take.
    """
    if not bench.cuda:
        return {}
    row: Row = {"kernels alone, s": bench.seconds(lambda: device_matching.match(cost))}
    kernels = device_matching.triton_kernels()
    problems = device_matching.problems_of(cost, cost.shape[-1])
    price = kernels.start(problems)
    row["of it: start, s"] = bench.seconds(lambda: kernels.start(problems), 1.0)
    _, want = kernels.scan(problems, price)
    row["of it: two scans, s"] = 2 * bench.seconds(lambda: kernels.scan(problems, price), 1.0)
    row_of, col_of = device_matching._first_pairs(problems, price, want.long())
    row["of it: paths, s"] = bench.seconds(
        lambda: kernels.finish(problems, price.clone(), row_of.clone(), col_of.clone()), 1.0
    )
    row["rows left to paths"] = float((col_of < 0).sum(1).double().mean())
    levels, rounds = problems.schedule()
    moved = cost.numel() * cost.element_size()
    against(row, row["kernels alone, s"], bench.floor(moved=moved, exponentials=levels * rounds * cost.numel()))
    return row


def one_problem(bench: Bench, table: str) -> None:
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
        row |= stages(bench, cost[None])

    sizes = [(64, 2)] if bench.quick else [(1024, 2), (1024, 64), (4096, 2), (4096, 64), (16_384, 64)]
    for n, d in sizes:
        bench.row(table, {"n": n, "d": d}, lambda row, c=(n, d): measure(row, *c))


def classes(bench: Bench, table: str) -> None:
    """C²OT of images, whole calls on the device, against the CPU and the official code where it is on the path."""
    n, d, count = (64, 12, 3) if bench.quick else (6400, 3072, 10)

    def measure(row: Row) -> None:
        g = torch.Generator().manual_seed(0)
        x0, x1 = (
            torch.randn(n, d, generator=g),
            torch.randn(n, d, generator=g).mul(0.5).add(torch.randn(n, 1, generator=g)),
        )
        y = torch.randint(0, count, (n,), generator=g)
        coupling = mbot.ConditionalOTCoupling()
        given = [t.to(bench.device) for t in (x0, x1, y)]

        def ours() -> mbot.Pairs:
            return coupling(given[0], given[1], y1=given[2])

        row["device, s"] = bench.seconds(ours)
        row["CPU, s"] = bench.seconds(lambda: coupling(x0, x1, y1=y), 1.0)
        cost = coupling(x0, x1, y1=y).info["transport_cost"]
        row["relative difference to the CPU"] = abs(ours().info["transport_cost"] / cost - 1)
        row["error"] = ours().info["error"]
        row["peak MB"] = bench.megabytes(ours)
        row["share of the time the GPU is busy"] = busy(bench, ours)
        pairs = n * n / count  # within the classes
        against(row, row["device, s"], bench.floor(moved=4 * (2 * n * d + pairs), operations=2 * d * pairs))
        try:
            from c2ot.ot import OTConditionalPlanSampler
        except ImportError:
            row["official, s"] = "not installed"
            return
        onehot = torch.nn.functional.one_hot(y, count).float()
        sampler = OTConditionalPlanSampler(condition_weight=1e6)
        began = time.perf_counter()  # once: it takes many seconds
        sampler.sample_plan_with_labels(x0, x1, onehot.clone(), onehot.clone())
        row["official, s"] = time.perf_counter() - began
        row["official / device"] = row["official, s"] / row["device, s"]

    bench.row(table, {"n": n, "d": d, "classes": count}, measure)


def streaming(bench: Bench, table: str) -> None:
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
        pairs = 2 * iterations * n * n  # of points, in all passes
        against(row, row["fused, s"], bench.floor(operations=2 * d * pairs, exponentials=pairs))
        if n <= 50_000 and dtype == torch.float32:
            row["tiles in torch, s"] = bench.seconds(lambda: run(tiles=True))
            exact = run(tiles=True)
            row["its largest difference, in eps"] = float((run() - exact).abs().max())
            if bench.cuda:
                with patch.object(triton_kernels(), "PRECISION", "tf32x3"):
                    row["fused in 3 x TF32, s"] = bench.seconds(run)
                    row["that one's largest difference"] = float((run() - exact).abs().max())
            beside(bench, row, x, y, eps, iterations)

    f32, bf16 = torch.float32, torch.bfloat16
    cases = [(10_000, 64, 10, f32), (50_000, 64, 10, f32), (50_000, 64, 10, bf16), (50_000, 3, 10, f32),
             (1_000_000, 3, 1, f32)]  # fmt: skip
    if bench.quick:
        cases = [(500, 8, 2, f32)]
    for n, d, k, t in cases:
        facts = {"n": n, "d": d, "iterations": k, "dtype": str(t).removeprefix("torch.")}
        bench.row(table, facts, lambda row, c=(n, d, k, t): measure(row, *c))


def searched(bench: Bench, table: str) -> None:
    """The fastest tiling that flash-sinkhorn finds: fifty compilations, so that it comes last."""
    n, d = (500, 8) if bench.quick else (50_000, 64)

    def measure(row: Row) -> None:
        x, y = clouds((n,), d, bench.device)
        row["flash-sinkhorn in TF32, tiling searched, s"] = flash_sinkhorn(
            bench, x, y, 0.1 * d, 10, tf32=True, search=True
        )

    bench.row(table, {"n": n, "d": d, "iterations": 10}, measure)


def whole_sinkhorn(bench: Bench, table: str) -> None:
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

    bench.row(table, {"what": "SinkhornCoupling(0.1)", "n": n, "d": 3}, coupling)
    for size in (n,) if bench.quick else (n, 50_000):
        facts = {"what": "EntropicOT(0.3), value and gradient", "n": size, "d": 3}
        bench.row(table, facts, lambda row, size=size: value(row, size))


def grid_losses(bench: Bench, table: str) -> None:
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
    for name in names:
        for d in (2,) if bench.quick else (2, 64):
            facts = {"loss": name, "k": k, "m": m, "d": d}
            bench.row(table, facts, lambda row, c=(name, d): measure(row, *c))


def card(bench: Bench, table: str) -> None:
    """What the floors in the other tables are computed from."""
    bench.row(table, {}, lambda row: row.update(bench.ceilings))


def rows(quick: bool = False, device: str = "cuda", save: Callable[[Tables], Any] = lambda tables: None) -> Tables:
    """All tables: heading -> rows, the targets of the project first. ``save`` is given those at hand after each row."""
    warnings.simplefilter("ignore", mbot.ConvergenceWarning)
    bench = Bench(device, quick, save, BUDGET)
    for heading, fill in {
        "The card": card,
        "Batched assignment, costs given": batched,
        "Grid losses, forward and backward": grid_losses,
        "One assignment problem, costs given": one_problem,
        "C²OT, points given": classes,
        "Streaming Sinkhorn, iterations at a fixed regularisation": streaming,
        "Streaming Sinkhorn, whole calls": whole_sinkhorn,
        "Streaming Sinkhorn, the other package's best": searched,
    }.items():
        fill(bench, heading)
    return {heading: uniform(found) for heading, found in bench.tables.items()}


if __name__ == "__main__":
    cpu = "--cpu" in sys.argv or not torch.cuda.is_available()
    print(json.dumps(rows("--quick" in sys.argv or cpu, "cpu" if cpu else "cuda"), indent=1))
