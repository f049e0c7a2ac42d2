"""What is lost in less than float64: every solver in float32, TF32 (CUDA) and bfloat16 against float64.

TF32 means float32 tensors under ``torch.set_float32_matmul_precision("high")``, which mbot lifts for its own products.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import mbot
import setenc
from mbot.random import draw

PRECISIONS = {"float32": torch.float32, "float32, TF32 allowed": torch.float32, "bfloat16": torch.bfloat16}
TITLE = "Errors of float32, TF32 and bfloat16 against float64"
NOTES = """
Two Gaussian clouds of n points in 16 dimensions, means 1 apart, drawn in float64 and rounded. `own` errors are against
float64 on the same rounded points (what the solver loses), `whole` errors against float64 on the unrounded ones (what
the user loses; for bfloat16 the rounding of the points dominates, and no solver can undo it). Values and gradients are
relative; plans and marginals are L1 distances between masses of total 1 (or the plan's). reg is in mean costs.
Solvers compute in float32 at least, whatever the points come in, and sum in float64 where it is free, so that bfloat16
has the own errors of float32. TF32 rows are made on CUDA only. setenc's networks follow the process's TF32 setting, as
any network does; bfloat16 there is autocast, with states kept in float32.
Gradients come back in the points' type, which is all of the own error of bfloat16's; where rounded points are matched
otherwise (m-POT), the gradient of these points is another one.
"""


@contextmanager
def allowing_tf32(on: bool):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if on else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def modes(device: torch.device) -> dict[str, torch.dtype]:
    return {name: dtype for name, dtype in PRECISIONS.items() if "TF32" not in name or device.type == "cuda"}


def clouds(n: int, device: torch.device, d: int = 16, offset: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))
    return (x + offset).to(device), (y + d**-0.5 + offset).to(device)


def solvers(scale: float) -> dict[str, mbot.Transport]:
    return {
        "ExactOT": mbot.ExactOT(),
        "EntropicOT, reg 0.05": mbot.EntropicOT(0.05 * scale, tol=1e-7),
        "EntropicOT, reg 0.005": mbot.EntropicOT(0.005 * scale, tol=1e-7),
        "PartialOT, mass 0.8": mbot.PartialOT(0.8),
        "PartialOT, mass 0.8, reg 0.05": mbot.PartialOT(0.8, reg=0.05 * scale, tol=1e-7),
        "UnbalancedOT, reg 0.05, marginals 1": mbot.UnbalancedOT(0.05 * scale, scale, tol=1e-7),
    }


def relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


def costs(device: torch.device, quick: bool) -> list[dict]:
    """Largest error of a cost, relative to the largest cost."""
    rows = []
    for offset in (0.0, 100.0):
        for name in ("sqeuclidean", "euclidean", "cosine", "dot"):
            for mode, dtype in modes(device).items():
                x, y = (p.to(dtype) for p in clouds(64 if quick else 512, device, 64, offset))
                exact = mbot.pairwise_cost(x.double(), y.double(), name)
                with allowing_tf32("TF32" in mode):
                    ours = mbot.pairwise_cost(x, y, name).double()
                    row = {"cost": name, "offset of the clouds": offset, "precision": mode}
                    row["own"] = float((ours - exact).abs().amax() / exact.abs().amax())
                    plain = x.float() @ y.float().T
                    row["one unguarded product"] = relative(plain, x.double() @ y.double().T)
                rows.append(row)
    return rows


def transports(device: torch.device, quick: bool) -> list[dict]:
    n = 32 if quick else 128
    x, y = clouds(n, device)
    scale = float(mbot.pairwise_cost(x, y).mean())
    rows = []
    for name, solver in solvers(scale).items():
        whole = solver(x, y)
        for mode, dtype in {"float64": torch.float64, **modes(device)}.items():
            a, b = x.to(dtype), y.to(dtype)
            exact_cost = mbot.pairwise_cost(a.double(), b.double())
            exact, plan = solver.plan(exact_cost), solver.value(exact_cost)
            with allowing_tf32("TF32" in mode), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", mbot.ConvergenceWarning)
                cost = mbot.pairwise_cost(a, b)
                ours, value = solver.plan(cost), solver(a, b)
            marginals = [(m.double() - 1 / n).abs().sum() for m in (ours.row_mass(), ours.col_mass())]
            balanced = isinstance(solver, mbot.ExactOT | mbot.EntropicOT)
            rows.append(
                {
                    "solver": name,
                    "precision": mode,
                    "value, own": relative(value, plan),
                    "value, whole": relative(value, whole),
                    "plan, own": float((ours.to_dense().double() - exact.to_dense()).abs().sum()),
                    "marginals": float(max(marginals)) if balanced else "-",
                    "converged": not any(issubclass(w.category, mbot.ConvergenceWarning) for w in caught),
                }
            )
    return rows


def sliced(x: torch.Tensor, y: torch.Tensor, directions: int) -> torch.Tensor:
    """SlicedOT in float64 along the directions that it draws in float32."""
    theta = draw(
        torch.randn, directions, x.shape[1], generator=torch.Generator().manual_seed(1), device=x.device,
        dtype=torch.float32,
    )  # fmt: skip
    theta = torch.nn.functional.normalize(theta.double(), dim=-1)
    return ((theta @ x.double().T).sort(-1).values - (theta @ y.double().T).sort(-1).values).square().mean()


def losses(device: torch.device, quick: bool) -> list[dict]:
    """Values and gradients of losses; mini-batches are given, so that nothing is drawn."""
    k, m = (3, 8) if quick else (8, 32)
    x, y = clouds(k * m, device)
    x, y = x.reshape(k, m, -1), y.reshape(k, m, -1)
    scale = float(mbot.pairwise_cost(x, y).mean())
    sizes = {"num_batches": k, "batch_size": m}
    table = {
        "m-OT": mbot.MiniBatchOT(mbot.ExactOT(), **sizes),
        "m-POT, mass 0.8": mbot.MiniBatchOT(mbot.PartialOT(0.8), **sizes),
        "BoMb-OT": mbot.BoMbOT(mbot.ExactOT(), **sizes),
        "e-BoMb over EntropicOT, reg 0.05": mbot.BoMbOT(mbot.EntropicOT(0.05 * scale), reg=0.01 * scale, **sizes),
    }

    def gradient(loss, a, b):
        a = a.detach().requires_grad_()
        value = loss.from_batches(a, b)
        value.backward()
        return value.detach(), a.grad

    rows = []
    for name, loss in table.items():
        whole = gradient(loss, x, y)
        for mode, dtype in modes(device).items():
            a, b = x.to(dtype), y.to(dtype)
            own = gradient(loss, a.double(), b.double())
            with allowing_tf32("TF32" in mode):
                ours = gradient(loss, a, b)
            rows.append({"loss": name, "precision": mode} | _errors(ours, own, whole))
    for mode, dtype in modes(device).items():
        a, b = (p.flatten(0, 1).to(dtype) for p in (x, y))
        with allowing_tf32("TF32" in mode):
            ours = mbot.SlicedOT(64)(a, b, generator=torch.Generator().manual_seed(1))
        rows.append(
            {
                "loss": "SlicedOT, 64 directions",
                "precision": mode,
                "value, own": relative(ours, sliced(a, b, 64)),
                "value, whole": relative(ours, sliced(x.flatten(0, 1), y.flatten(0, 1), 64)),
                "gradient, own": "-",
                "gradient, whole": "-",
            }
        )
    return rows


def _errors(ours, own, whole) -> dict:
    return {
        f"{what}, {against}": relative(ours[i], exact[i])
        for i, what in enumerate(("value", "gradient"))
        for against, exact in (("own", own), ("whole", whole))
    }


def couplings(device: torch.device, quick: bool) -> list[dict]:
    """The entropic coupling of points: the marginals' error that it reports, and how far its entropy is off."""
    x, y = clouds(64 if quick else 512, device)
    rows = []
    for reg in (0.5, 0.05):
        for cells in (1 << 24, 1 << 14):
            coupling = mbot.SinkhornCoupling(reg, cells=cells, tol=1e-4)
            exact = coupling(x, y, generator=torch.Generator().manual_seed(0))
            for mode, dtype in {"float64": torch.float64, **modes(device)}.items():
                with allowing_tf32("TF32" in mode):
                    pairs = coupling(x.to(dtype), y.to(dtype), generator=torch.Generator().manual_seed(0))
                rows.append(
                    {
                        "coupling": f"SinkhornCoupling, reg {reg}, costs {'held' if cells > 1 << 20 else 'in tiles'}",
                        "precision": mode,
                        "marginals": pairs.info["error"],
                        "entropy off by": abs(pairs.info["plan_entropy"] - exact.info["plan_entropy"]),
                        "pairs that differ": float((pairs.source != exact.source).double().mean()),
                    }
                )
    return rows


def encoders(device: torch.device, quick: bool) -> list[dict]:
    """Setenc's output and parameter gradient, exact mode; bfloat16 is autocast around the whole encoder."""
    x = torch.randn(2, 500 if quick else 10_000, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, rows = x.to(device), []
    for name, pooling in {
        "SlotPooling, softmax": setenc.SlotPooling(32, 32, 8, slots="learned"),
        "SlotPooling, slot-sigmoid": setenc.SlotPooling(32, 32, 8, activation="slot-sigmoid", slots="learned"),
        "DeepSetsPooling, mean": setenc.DeepSetsPooling(32, 32, "mean"),
        "GatedAttentionPooling": setenc.GatedAttentionPooling(32, 32),
    }.items():
        torch.manual_seed(0)
        extractor = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 32))
        enc = setenc.UMBC(extractor, pooling, setenc.MLPDecoder(32, 4)).to(device)
        whole = _encoded(copy.deepcopy(enc).double(), x)
        for mode, dtype in modes(device).items():
            with (
                allowing_tf32("TF32" in mode),
                torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16),
            ):
                ours = _encoded(copy.deepcopy(enc), x.float())
            errors = [relative(a, b) for a, b in zip(ours, whole, strict=True)]
            rows.append({"pooling": name, "precision": mode, "output": errors[0], "gradient": errors[1]})
    return rows


def _encoded(enc: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out = setenc.encode(enc, x, chunk_size=1000, gradient="exact")
    out.float().square().sum().backward() if out.dtype == torch.bfloat16 else out.square().sum().backward()
    return out.detach(), torch.cat([p.grad.flatten() for p in enc.parameters() if p.grad is not None])


def rows(
    device: str | torch.device = "cpu",
    quick: bool = False,
    save: Callable[[dict[str, list[dict]]], Any] = lambda tables: None,
) -> dict[str, list[dict]]:
    """All tables; ``save`` gets those at hand after each."""
    tables = {}
    for heading, make in {
        "Ground costs (largest error over largest cost)": costs,
        "Losses": losses,
        "Set encoders": encoders,
        "Transports": transports,
        "Couplings": couplings,
    }.items():
        tables[heading] = make(torch.device(device), quick)
        save(tables)
    return tables


if __name__ == "__main__":
    from harness import write

    torch.set_num_threads(1)
    write("precision", TITLE, rows(), NOTES)
