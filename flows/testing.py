"""The contract of a path: `check_path` raises an AssertionError with the input that fails."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flows.matching import FlowMatching
from flows.paths import Path
from mbot.testing.tools import check_settings, require

_ROWS = 5


def check_path(path: Path, *, device: torch.device | str = "cpu") -> None:
    """Check that a path keeps the promises that couplings, the trainer and the solvers count on.

    Points and velocities have the samples' shape, dtype and device; rows do not mix and inputs stay as they are; the
    path starts at x0 and ends at x1 (but for a fixed share of x0 below 1) where the noise is zero; its velocity is the
    time derivative of its point (central differences in float64); everything is finite up to both ends; noise is asked
    for exactly where it is used; settings are frozen, compare, pickle and print; and the path trains with its own
    coupling.

    Args:
        path: the path, at the settings to check.
        device: where the samples are.

    Raises:
        AssertionError: a promise that is not kept, with the input that shows it.

    >>> check_path(flows.LinearPath(sigma=0.1))
    """
    require(isinstance(path, Path), f"a path is derived from flows.Path; got {type(path).__name__}")
    device = torch.device(device)
    check_settings(path)
    for check in (_shapes, _inputs_stay, _rows, _noise, _ends, _derivative, _finite, _training):
        check(path, device)


def _samples(device: torch.device, shape: tuple[int, ...] = (3,), dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x0, x1 and noise."""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(_ROWS, *shape, generator=g, dtype=torch.float64).to(device, dtype) for _ in range(3)]


def _at(path: Path, time: float | Tensor, x0: Tensor, x1: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """The path at one time, or at one a row; its errors are raised again with the input."""
    t = time if isinstance(time, Tensor) else torch.full((len(x0),), time, dtype=torch.float64, device=x0.device)
    try:
        point, velocity = path.sample(x0, x1, t, noise)
    except Exception as error:
        raise AssertionError(_case(path, f"sample raised {error!r}", t, (x0, x1, noise))) from error
    return point, velocity


def _case(path: Path, says: str, t: Tensor, inputs: Any, row: int = 0) -> str:
    """A sentence with the input of one row; inputs are x0, x1 and noise (or None)."""
    x0, x1, noise = inputs
    given = {"t": t, "x0": x0, "x1": x1} | ({} if noise is None else {"noise": noise})
    values = ", ".join(f"{name} = {value[row].flatten()[:8].tolist()}" for name, value in given.items())
    return f"{path!r}: {says}, at {values} ({x0.dtype} of shape {tuple(x0.shape)}, on {x0.device})"


def _equal(
    path: Path, says: str, got: Tensor, want: Tensor, t: Tensor, inputs: Any, *, rtol: float = 0.0, atol: float = 0.0
) -> None:
    """Rows that are close; the error names the first that is not."""
    miss = (got - want).abs().flatten(1)
    good = (miss <= atol + rtol * want.abs().flatten(1)).all(1)  # NaN is not
    if not bool(good.all()):
        row = int((~good).nonzero()[0])
        values = f"{says}: got {got[row].flatten()[:8].tolist()}, wanted {want[row].flatten()[:8].tolist()}"
        raise AssertionError(_case(path, values, t, inputs, row))


def _shapes(path: Path, device: torch.device) -> None:
    for shape in ((3,), (1, 4, 4)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            inputs = _samples(device, shape, dtype)
            t = torch.linspace(0.1, 0.9, _ROWS, device=device)
            for name, value in zip(("point", "velocity"), _at(path, t, *inputs), strict=True):
                got = f"{value.dtype} of shape {tuple(value.shape)}, on {value.device}"
                same = value.shape == inputs[0].shape and value.dtype == dtype and value.device == inputs[0].device
                require(same, _case(path, f"the {name} is {got}", t, inputs))


def _inputs_stay(path: Path, device: torch.device) -> None:
    inputs, t = _samples(device), torch.linspace(0.1, 0.9, _ROWS, dtype=torch.float64, device=device)
    before = [value.clone() for value in (*inputs, t)]
    first = _at(path, t, *inputs)
    for name, old, new in zip(("x0", "x1", "noise", "t"), before, (*inputs, t), strict=True):
        require(torch.equal(old, new), _case(path, f"sample changed {name} in place", before[3], before[:3]))
    for name, a, b in zip(("point", "velocity"), first, _at(path, t, *inputs), strict=True):
        _equal(path, f"a second call gives another {name}", b, a, t, inputs)


def _rows(path: Path, device: torch.device) -> None:
    inputs, t = _samples(device), torch.linspace(0.1, 0.9, _ROWS, dtype=torch.float64, device=device)
    whole = _at(path, t, *inputs)
    parts = [_at(path, t[i : i + 1], *(value[i : i + 1] for value in inputs)) for i in range(_ROWS)]
    for name, got, single in zip(("point", "velocity"), whole, zip(*parts, strict=True), strict=True):
        says = f"the {name} of a row depends on the others"
        _equal(path, says, got, torch.cat(single), t, inputs, rtol=1e-9, atol=1e-9)


def _noise(path: Path, device: torch.device) -> None:
    x0, x1, noise = _samples(device)
    t = torch.full((_ROWS,), 0.4, dtype=torch.float64, device=device)
    with_noise, mirrored = (_at(path, t, x0, x1, value) for value in (noise, -noise))
    used = any(not torch.equal(a, b) for a, b in zip(with_noise, mirrored, strict=True))
    says = f"needs_noise is {path.needs_noise}, but noise {'changes' if used else 'does not change'} the result"
    require(path.needs_noise == used, _case(path, says, t, (x0, x1, noise)))
    if not used:
        for name, got, want in zip(("point", "velocity"), _at(path, t, x0, x1, None), with_noise, strict=True):
            _equal(path, f"the {name} without noise differs", got, want, t, (x0, x1, None))
        return
    try:
        path.sample(x0, x1, t)
    except ValueError:
        return
    except Exception as error:
        says = f"without its noise it raises {error!r}, not a ValueError that says so"
        raise AssertionError(_case(path, says, t, (x0, x1, None))) from error
    raise AssertionError(_case(path, "it needs noise and does without", t, (x0, x1, None)))


def _ends(path: Path, device: torch.device) -> None:
    x0, x1, noise = _samples(device)
    inputs = (x0, x1, torch.zeros_like(noise))
    zero, one = (torch.full((_ROWS,), t, dtype=torch.float64, device=device) for t in (0.0, 1.0))
    _equal(path, "it does not start at x0", _at(path, zero, *inputs)[0], x0, zero, inputs, atol=1e-9)
    end = _at(path, one, *inputs)[0]
    left = float(((end - x1) * x0).sum() / x0.square().sum())
    left = left if abs(left) < 1 else 0.0
    _equal(path, "it does not end at x1", end, x1 + left * x0, one, inputs, atol=1e-9)


def _derivative(path: Path, device: torch.device) -> None:
    inputs, step = _samples(device), 1e-6
    for time in (0.02, 0.3, 0.5, 0.77, 0.98):
        t = torch.full((_ROWS,), time, dtype=torch.float64, device=device)
        ahead, behind = (_at(path, t + sign * step, *inputs)[0] for sign in (1, -1))
        says = "the velocity is not the derivative of the point"
        slope = (ahead - behind) / (2 * step)
        _equal(path, says, _at(path, t, *inputs)[1], slope, t, inputs, rtol=1e-5, atol=1e-6)


def _finite(path: Path, device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs = _samples(device, dtype=dtype)
        for time in (0.0, 1e-30, 1e-7, 1 - 1e-7, 1.0):
            t = torch.full((_ROWS,), time, device=device)
            for name, value in zip(("point", "velocity"), _at(path, t, *inputs), strict=True):
                require(bool(value.isfinite().all()), _case(path, f"the {name} is not finite", t, inputs))


def _training(path: Path, device: torch.device) -> None:
    x0, x1, _ = _samples(device, dtype=torch.float32)
    slope = torch.ones((), device=device, requires_grad=True)
    matching = FlowMatching(path=path)
    loss = matching.loss(lambda t, x, y: slope * x, x0, x1, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(loss, slope)
    good = bool(loss.isfinite()) and bool(gradient.isfinite())
    says = f"with {matching.coupling!r} the loss is {float(loss.detach())}, its gradient {float(gradient)}"
    require(good, f"{path!r}: {says}")
