"""The packages that the GPU benchmarks measure beside ours, each where it is installed.

None of them may stop a section: flash-sinkhorn compiles some fifty tilings of a kernel to choose among them, minutes
for each shape and precision, so it gets its own fixed tiling, and the search only at the end.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from gpu_bench import Bench, Row


def said(measure: Callable[[], float]) -> float | str:
    """Seconds, or why there are none."""
    try:
        return measure()
    except ImportError:
        return "not installed"
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"[:160]


def linear_assignment(bench: Bench, cost: torch.Tensor) -> float | str:
    """torch-linear-assignment, which says by a warning that it goes to the CPU instead (older: by a function)."""

    def measure() -> float:
        import torch_linear_assignment as peer

        older = getattr(peer, "_backend", None)
        if bench.cuda and older is not None and not older.has_cuda():
            raise RuntimeError("built without CUDA")
        with warnings.catch_warnings():
            warnings.filterwarnings("error", category=RuntimeWarning)
            return bench.seconds(lambda: peer.batch_linear_assignment(cost))

    return said(measure)


def flash_sinkhorn(
    bench: Bench, x: torch.Tensor, y: torch.Tensor, eps: float, iterations: int, *, tf32: bool, search: bool
) -> float | str:
    """flash-sinkhorn, as many iterations; it takes the columns after the rows, as ours does."""

    def measure() -> float:
        from flash_sinkhorn import SamplesLoss

        loss = SamplesLoss(
            loss="sinkhorn", backend="alternating", debias=False, potentials=True, use_epsilon_scaling=False, eps=eps,
            n_iters=iterations, blur=math.sqrt(eps), allow_tf32=tf32, autotune=search,
        )  # fmt: skip
        return bench.seconds(lambda: loss(x, y))

    return said(measure)


def keops(bench: Bench, x: torch.Tensor, y: torch.Tensor, eps: float, iterations: int) -> float | str:
    """KeOps, by geomloss, on a schedule of about that many iterations."""

    def measure() -> float:
        import pykeops  # noqa: F401
        from geomloss import SamplesLoss

        blur = math.sqrt(eps / 2)  # geomloss halves the squared distance
        online = SamplesLoss(
            "sinkhorn", p=2, blur=blur, diameter=blur * 2 ** (iterations - 2), scaling=0.5, debias=False,
            backend="online",
        )  # fmt: skip
        return bench.seconds(lambda: online(x, y))

    return said(measure)


def beside(bench: Bench, row: Row, x: torch.Tensor, y: torch.Tensor, eps: float, iterations: int) -> None:
    """The packages for one pair of clouds."""
    row["flash-sinkhorn in TF32, s"] = flash_sinkhorn(bench, x, y, eps, iterations, tf32=True, search=False)
    row["flash-sinkhorn in float32, s"] = flash_sinkhorn(bench, x, y, eps, iterations, tf32=False, search=False)
    row["geomloss + KeOps, s"] = keops(bench, x, y, eps, iterations)
