"""Bijections of two whole clouds: `mbot.match_clouds` beside exact, mini-batch, Sinkhorn, semidiscrete and BSP-OT.

Each row runs in a process of its own: CPU seconds and peak memory are that row's.

    python benchmarks/couplings_data_set.py --sizes 16384 100000 1000000 --mnist data

Tables are kept from run to run and replaced one by one, so sizes may be run apart.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import RESULTS, write

import mbot

EXACT_UP_TO = 20_000  # n² costs
BSP_PLANS = {16_384: 16, 100_000: 4}  # others: not run


def clouds(n: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal noise against a mixture of 20 normals."""
    g = torch.Generator().manual_seed(d)
    centres = 2 * torch.randn(20, d, generator=g) / d**0.25
    y = torch.empty(n, d)
    for part in y.split(65536):  # in place: the clouds are all that is held
        part.normal_(generator=g).mul_(0.5).add_(centres[torch.randint(0, 20, (len(part),), generator=g)])
    return torch.randn(n, d, generator=g), y


def mnist(folder: str, n: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal noise against leading principal components of images, in one common scale."""
    import flows

    data = flows.datasets.mnist(folder)
    images = data.rows(torch.arange(len(data)))[0].flatten(1)
    images = images - images.mean(0)
    codes = images @ torch.linalg.eigh(images.T @ images).eigenvectors.flip(1)[:, :d]
    g = torch.Generator().manual_seed(0)
    y = (codes / codes.std())[torch.randperm(len(codes), generator=g)[:n]].clone()
    return torch.randn(len(y), d, generator=g), y


def mini_batches(x: torch.Tensor, y: torch.Tensor, size: int) -> dict[str, Any]:
    parts = [(len(a), mbot.OTCoupling()(a, b)) for a, b in zip(x.split(size), y.split(size), strict=True)]
    return {"cost": sum(n * float(pairs.info["transport_cost"]) for n, pairs in parts) / len(x)}


def exact(x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
    return {"cost": float(mbot.OTCoupling()(x, y).info["transport_cost"])}


def whole(x: torch.Tensor, y: torch.Tensor, **options: Any) -> dict[str, Any]:
    found = mbot.match_clouds(x, y, generator=torch.Generator().manual_seed(0), **options)
    bound = {} if found.bound is None else {"bound / cost": found.bound / found.cost}
    return {"cost": found.cost, "sweeps": found.sweeps} | bound


def sinkhorn(x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
    pairs = mbot.SinkhornCoupling(0.1, max_iter=100)(x, y)
    start, end = pairs.apply(x, y)
    return {"cost": float((start - end).double().square().sum(1).mean())}


def semidiscrete(x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
    coupling = mbot.SemidiscreteCoupling(steps=1000).fit(y, generator=torch.Generator().manual_seed(0))
    return {"cost": float(coupling(x, y).info["transport_cost"]), "chi2": coupling.potentials.chi2}


def bsp(x: torch.Tensor, y: torch.Tensor, plans: int) -> dict[str, Any]:
    from ot.bsp import compute_bspot_bijection

    perm = np.asarray(compute_bspot_bijection(x.double().numpy(), y.double().numpy(), n_plans=plans)[1]).astype(int)
    return {"cost": float((x - y[torch.from_numpy(perm)]).double().square().sum(1).mean())}


def methods(n: int, d: int) -> dict[str, Callable[..., dict[str, Any]]]:
    """What is run at a size, by name; what takes minutes in 64 features alone."""
    found: dict[str, Callable[..., dict[str, Any]]] = {
        "mini-batches of 1024": lambda x, y: mini_batches(x, y, 1024),
        "mini-batches of 4096": lambda x, y: mini_batches(x, y, 4096),
        "match_clouds, hierarchy alone": lambda x, y: whole(x, y, time_limit=0),
        "match_clouds": whole,
        "match_clouds, tol 3e-3": lambda x, y: whole(x, y, tol=3e-3),
    }
    if n <= EXACT_UP_TO:
        found["match_clouds, certified"] = lambda x, y: whole(x, y, certificate=True)
        found["exact"] = exact
    if n <= EXACT_UP_TO and d == 64:
        found["Sinkhorn, reg 0.1, 100 rounds"] = sinkhorn
        found["semidiscrete, 1000 steps"] = semidiscrete
    if n in BSP_PLANS and d == 64:
        found[f"BSP-OT (POT), {BSP_PLANS[n]} plans"] = lambda x, y: bsp(x, y, BSP_PLANS[n])
    return found


def one(name: str, n: int, d: int, folder: str | None) -> None:
    """One row, printed as JSON: the process is this row's alone."""
    warnings.simplefilter("ignore", mbot.ConvergenceWarning)
    x, y = clouds(n, d) if folder is None else mnist(folder, n, d)
    small = clouds(4200, d)
    call = methods(n, d)[name]
    if not name.startswith("BSP"):
        for warm_up in (whole, exact):  # kernels are compiled once
            warm_up(*small)
    start = time.process_time()
    found = call(x, y)
    found["seconds"] = time.process_time() - start
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    found["peak MB"] = round(int(peak.split()[1]) * 1024 / 1e6)
    print(json.dumps(found))


def table(n: int, d: int, folder: str | None) -> list[dict[str, Any]]:
    """The rows of one pair of clouds."""
    x, y = clouds(n, d) if folder is None else mnist(folder, n, d)
    means = [points.mean(0, dtype=torch.float64) for points in (x, y)]
    lengths = [points.square().sum(1, dtype=torch.float64).mean() for points in (x, y)]
    found: dict[str, dict[str, Any]] = {"independent": {"cost": float(sum(lengths) - 2 * means[0] @ means[1])}}
    del x, y
    for name in methods(n, d):
        given = ["--one", name, "--sizes", str(n), "--dims", str(d), *(() if folder is None else ("--mnist", folder))]
        done = subprocess.run([sys.executable, __file__, *given], capture_output=True, text=True)
        if done.returncode:
            print(f"{name}, n = {n}, d = {d} failed: {done.stderr[-500:]}", file=sys.stderr)
            continue
        found[name] = json.loads(done.stdout.splitlines()[-1])
        print(n, d, name, found[name], flush=True)
    least = found.get("exact", {}).get("cost")
    rows = []
    for name, row in found.items():
        more = "; ".join(f"{key} {row[key]:.3g}" for key in ("sweeps", "bound / cost", "chi2") if key in row)
        rows.append({
            "method": name, "cost": row["cost"], "cost / exact": f"{row['cost'] / least:.4f}" if least else "-",
            "cost / mini-batches of 4096": f"{row['cost'] / found['mini-batches of 4096']['cost']:.4f}",
            "CPU seconds": row.get("seconds", "-"), "peak MB": row.get("peak MB", "-"), "": more,
        })  # fmt: skip
    return rows


def threads(n: int, d: int, rounds: int = 3) -> list[dict[str, Any]]:
    """One and two threads in turn, the best of each: wall seconds, and CPU seconds of all threads.

    Where other work takes the cores, the wall tells little: half of the CPU seconds of two threads is what free cores
    would take.
    """
    x, y = clouds(n, d)
    wall, spent = {1: np.inf, 2: np.inf}, {1: np.inf, 2: np.inf}
    for _ in range(rounds):
        for count in wall:
            torch.set_num_threads(count)
            start, before = time.perf_counter(), time.process_time()
            whole(x, y)
            wall[count] = min(wall[count], time.perf_counter() - start)
            spent[count] = min(spent[count], time.process_time() - before)
    torch.set_num_threads(1)
    return [
        {
            "n": n,
            "d": d,
            "threads": count,
            "wall s": wall[count],
            "CPU s": spent[count],
            "CPU s / threads": spent[count] / count,
        }
        for count in wall
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[16_384])
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 8, 64], help="above 16,384 points the last alone")
    parser.add_argument("--mnist", metavar="FOLDER", help="with the idx files of MNIST: its 64 components too")
    parser.add_argument("--threads", type=int, help="points to compare one and two threads on; 0: not at all",
                        default=20_000)  # fmt: skip
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.one:
        one(args.one, args.sizes[0], args.dims[0], args.mnist)
        return
    os.environ.update(OMP_NUM_THREADS="1", NUMBA_NUM_THREADS="1")
    kept = RESULTS / "couplings_data_set.json"
    tables: dict[str, Any] = json.loads(kept.read_text())["tables"] if kept.exists() else {}
    for n in args.sizes:
        dims = args.dims if n <= EXACT_UP_TO else args.dims[-1:]
        for d, folder in [(d, None) for d in dims] + ([(64, args.mnist)] if args.mnist and n <= 60_000 else []):
            name = f"d = {d}" if folder is None else f"MNIST in {d} components"
            tables[f"n = {n:,}, {name}"] = table(n, d, folder)
            keep(tables)
    if args.threads:
        tables["Threads"] = threads(args.threads, args.dims[-1])
        keep(tables)


def keep(tables: dict[str, Any]) -> None:
    """Write what there is: a long run that is stopped has not run in vain."""
    write(
        "couplings_data_set",
        "Bijections of whole clouds",
        tables,
        "Normal noise against a mixture of 20 normals, float32, squared distances; every row in a process of its own, "
        "on one thread: CPU seconds (other work ran on the machine) and the whole process's peak memory, of which "
        "torch, numba and the libraries take some 400 MB. `match_clouds` with its default settings; its hierarchy "
        "alone; and with the certificate, an O(n²) pass. Mini-batches are independent slices, each solved exactly and "
        "forgotten: what mini-batch OT trains on. Sinkhorn draws a source for each target, so a source may be used "
        "twice; semidiscrete pairs noises with data points whose cells are equal up to chi2: neither is a bijection, "
        "and their costs may lie below the exact one's. BSP-OT is the installed POT's, where it runs in reasonable "
        "time. On one thread each, but for the last table: of it CPU seconds over threads are what free cores would "
        "take, as the machine was busy. Tables of other sizes than asked for are kept from earlier runs.",
    )


if __name__ == "__main__":
    main()
