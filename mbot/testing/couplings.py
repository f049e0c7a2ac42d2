"""The checks of `mbot.testing.check_coupling`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mbot.couplings import Coupling, Pairs
from mbot.testing.tools import case, require

_N = 12  # samples a side


def _samples(
    n: int = _N,
    m: int = _N,
    shape: tuple[int, ...] = (3,),
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sources, targets and the targets' classes."""
    g = torch.Generator().manual_seed(seed)
    x0, x1 = (torch.randn(size, *shape, generator=g).to(device, dtype) for size in (n, m))
    return x0, x1 + 1, torch.randint(0, 3, (m,), generator=g).to(device)


def _couple(coupling: Coupling, x0: Tensor, x1: Tensor, y1: Tensor, *, seed: int = 7) -> Pairs:
    """Pairs; errors of the coupling are raised again with the input."""
    try:
        return coupling(x0, x1, y1=y1, generator=torch.Generator().manual_seed(seed))
    except Exception as error:
        raise AssertionError(case(coupling, f"it raised {error!r}", x0=x0, x1=x1, y1=y1)) from error


def _check_pairs(coupling: Coupling, pairs: Pairs, x0: Tensor, x1: Tensor, y1: Tensor) -> None:
    def promised(promise: bool, says: str) -> None:
        require(promise, case(coupling, says, x0=x0, x1=x1, y1=y1))

    for index, size, name in ((pairs.source, len(x0), "source"), (pairs.target, len(x1), "target")):
        promised(index.dtype == torch.int64 and index.device == x1.device, f"{name} is {index.dtype} on {index.device}")
        promised(index.shape == (len(pairs),) and len(pairs) > 0, f"{name} has shape {tuple(index.shape)}")
        promised(0 <= int(index.min()) <= int(index.max()) < size, f"{name} is not in [0, {size})")
    source, target = pairs.apply(x0, x1)
    good = torch.equal(source, x0[pairs.source]) and torch.equal(target, x1[pairs.target])
    promised(good, "apply does not give the samples of the indices")
    promised(isinstance(pairs.info, dict), f"info is a {type(pairs.info).__name__}")
    weight = pairs.weight
    if weight is not None:
        promised(weight.shape == (len(pairs),), f"weights have shape {tuple(weight.shape)}")
        promised(not weight.requires_grad, "weights require gradients")
        good = bool((weight >= 0).all()) and abs(float(weight.double().mean()) - 1) < 1e-4
        promised(good, f"weights are negative, or have mean {float(weight.double().mean()):.4g}, not 1")


def _pairs(coupling: Coupling, device: torch.device) -> None:
    for shape in ((3,), (1, 4, 4)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            given = _samples(shape=shape, dtype=dtype, device=device)
            x0, x1 = (samples.clone().requires_grad_() for samples in given[:2])
            _check_pairs(coupling, _couple(coupling, x0, x1, given[2]), *given)


def _unequal(coupling: Coupling, device: torch.device) -> None:
    for n, m in ((9, 12), (12, 9), (1, 5), (5, 1), (1, 1)):
        given = _samples(n, m, device=device)
        try:
            pairs = coupling(given[0], given[1], y1=given[2], generator=torch.Generator().manual_seed(7))
        except ValueError:
            require(n != m, case(coupling, "it refuses equal batches", x0=given[0], x1=given[1]))
            continue
        _check_pairs(coupling, pairs, *given)


def _repeated(coupling: Coupling, device: torch.device) -> None:
    given, other = _samples(device=device), _samples(device=device, seed=5)
    state = torch.get_rng_state()
    try:
        torch.manual_seed(1)
        first = _couple(coupling, *given)
        _couple(coupling, *other, seed=8)
        torch.manual_seed(2)
        again = _couple(coupling, *given)
    finally:
        torch.set_rng_state(state)
    says = "equal inputs and generators give other pairs: the generator must decide, and no call be remembered"
    good = torch.equal(first.source, again.source) and torch.equal(first.target, again.target)
    if first.weight is not None and again.weight is not None:
        good = good and torch.equal(first.weight, again.weight)
    require(good, case(coupling, says, x0=given[0], x1=given[1], y1=given[2]))


def _inputs(coupling: Coupling, device: torch.device) -> None:
    given = _samples(2 * _N, 2 * _N, device=device)
    before = [value.clone() for value in given]
    strided = [value[::2] for value in given]
    pairs = _couple(coupling, *strided)
    with torch.inference_mode():  # where it does not depend on the device
        _couple(coupling, *(value.cpu() for value in strided))
    for name, value, copy in zip(("x0", "x1", "y1"), given, before, strict=True):
        require(torch.equal(value, copy), case(coupling, f"it changed {name} in place", **{name: copy}))
    packed = _couple(coupling, *(value.contiguous() for value in strided))
    says = case(coupling, "contiguous copies of strided inputs give other pairs", x0=strided[0], x1=strided[1])
    require(torch.equal(packed.source, pairs.source) and torch.equal(packed.target, pairs.target), says)


def _refused(coupling: Coupling, device: torch.device) -> None:
    x0, x1, y1 = _samples(device=device)
    third = torch.tensor([3], device=device)
    wrong: dict[str, tuple[Any, Any, Any]] = {
        "no samples": (x0[:0], x1[:0], y1[:0]),
        "integers": (x0.long(), x1.long(), y1),
        "two dtypes": (x0.double(), x1, y1),
        "unequal features": (x0[:, :2], x1, y1),
        "a NaN in x0": (x0.index_fill(0, third, torch.nan), x1, y1),
        "an infinity in x1": (x0, x1.index_fill(0, third, torch.inf), y1),
        "a condition too few": (x0, x1, y1[:-1]),
    }
    for what, given in wrong.items():
        try:
            coupling(*given[:2], y1=given[2])
        except (TypeError, ValueError):
            continue
        except Exception as error:
            raise AssertionError(f"{coupling!r}: {what} raises {error!r}, not a TypeError or ValueError") from error
        raise AssertionError(f"{coupling!r}: {what} is not refused")


def _entropic_reg(coupling: Coupling, device: torch.device) -> None:
    reg = coupling.entropic_reg
    good = reg is None or reg > 0 or math.isnan(reg)
    require(good, f"{coupling!r}: entropic_reg is {reg!r}; it is None, NaN, or a regularisation > 0")


COUPLING_CHECKS = (_pairs, _unequal, _repeated, _inputs, _refused, _entropic_reg)
"""Functions of a coupling and a device."""
