"""The flow's ordinary differential equation from noise to data, solved by torchdiffeq."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flows.matching import VelocityModel, check_velocity, times_dtype
from mbot import checks

METHODS = ("euler", "midpoint", "heun", "rk4", "dopri5")
_ADAPTIVE = ("dopri5",)
_TORCHDIFFEQ = {"heun": "heun2"}


class IntegrationError(RuntimeError):
    """The flow cannot be followed: a velocity that is not finite, or an adaptive step size that vanishes."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Solution of the flow.

    Attributes:
        t: ``(T,)`` times; those of equal steps in float32, or in float64 for points of that dtype.
        x: ``(T, B, d…)`` points at these times; ``x[-1]`` are the samples.
        nfe: number of evaluations of the model.
    """

    t: Tensor
    x: Tensor
    nfe: int

    @property
    def final(self) -> Tensor:
        """The points at the last time, ``(B, d…)``."""
        return self.x[-1]


def integrate(
    model: VelocityModel,
    x0: Tensor,
    *,
    y: Any = None,
    method: str = "dopri5",
    steps: int | None = None,
    times: Tensor | None = None,
    rtol: float = 1e-4,
    atol: float = 1e-4,
) -> Trajectory:
    """Follow the velocity field from ``x0`` at time 0 to time 1 (or along ``times``). Gradients are not recorded.

    The state is kept in float32 or better. The model is called in the dtype of ``x0`` (times included), and the
    trajectory is returned in it.

    Args:
        model: ``model(t, x, y) -> velocity``, t of shape ``(B,)``. Put modules in eval mode yourself.
        x0: ``(B, d…)`` start points, floating point.
        y: conditions, handed to the model as they are.
        method: fixed steps ``"euler"``, ``"midpoint"``, ``"heun"``, ``"rk4"``, or adaptive ``"dopri5"``,
            whose step size is shared by the batch (RMS norm over all of it).
        steps: number of equal steps; needed by fixed-step methods unless ``times`` is given. With an adaptive method
            it sets only at how many times the solution is reported.
        times: ``(T,)`` increasing or decreasing times: the grid of a fixed-step method, the report times of an
            adaptive one. Excludes ``steps``.
        rtol: relative tolerance of adaptive methods.
        atol: absolute tolerance of adaptive methods.

    Raises:
        ValueError: unknown method, no steps for a fixed-step method, times that are not strictly monotone, or
            non-finite start points.
        IntegrationError: the velocity or the solution is not finite, or the field is too stiff for the tolerances.

    >>> integrate(lambda t, x, y: torch.ones_like(x), torch.zeros(1, 2), method="euler", steps=4).final
    tensor([[1., 1.]])
    """
    solved = trajectory(model, x0, y=y, method=method, steps=steps, times=times, rtol=rtol, atol=atol)
    return replace(solved, x=solved.x.to(x0.dtype))


def trajectory(
    model: VelocityModel,
    x0: Tensor,
    *,
    y: Any = None,
    method: str = "dopri5",
    steps: int | None = None,
    times: Tensor | None = None,
    rtol: float = 1e-4,
    atol: float = 1e-4,
) -> Trajectory:
    """`integrate` with the state as it was summed, in float32 or better, for differences of its points."""
    times = time_grid(method, steps, times, start_points(x0, "x0"))
    evaluations = 0

    def field(t: Tensor, x: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return evaluate(model, t, x.to(x0.dtype), y).to(x.dtype)

    with torch.no_grad():
        x = solve(field, x0.to(state_dtype(x0)), times, method=method, rtol=rtol, atol=atol)
    return Trajectory(times, x, evaluations)


def state_dtype(x: Tensor) -> torch.dtype:
    """Dtype of a state that sums many small steps."""
    return torch.promote_types(x.dtype, torch.float32)


def start_points(x: Any, name: str) -> Tensor:
    """Checked points ``(B, d…)`` that a flow starts from."""
    checks.finite(checks.floating(x, name), name)
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(f"{name} must have shape (B, d…) with B >= 1; got {tuple(x.shape)}")
    return x


def time_grid(method: str, steps: int | None, times: Tensor | None, x: Tensor, *, backwards: bool = False) -> Tensor:
    """Checked times of a solver: those given, or ``steps`` equal steps from 0 to 1 (``backwards``: from 1 to 0)."""
    checks.choice(method, "method", METHODS)
    if times is not None and steps is not None:
        raise ValueError("give steps or times, not both")
    if times is None:
        if steps is None and method not in _ADAPTIVE:
            raise ValueError(f"method {method!r} takes fixed steps: give steps, or a grid of times")
        ends = (1.0, 0.0) if backwards else (0.0, 1.0)
        count = checks.count(1 if steps is None else steps, "steps")
        times = torch.linspace(*ends, count + 1, dtype=times_dtype(x))
    times = checks.finite(checks.floating(times, "times"), "times").to(x.device)
    step = times.diff()
    if times.ndim != 1 or len(times) < 2 or not bool((step > 0).all() | (step < 0).all()):
        raise ValueError("times must be a strictly increasing or decreasing vector of at least two times")
    return times


def evaluate(model: VelocityModel, t: Tensor, x: Tensor, y: Any) -> Tensor:
    """The model's velocity at one time, or one a sample, ``(B, d…)``, with its shape checked.

    The model gets copies, which it may change, and so does the caller: the model may use its output's memory again.
    """
    return check_velocity(model(t.expand(len(x)).to(x.dtype, copy=True), x.clone(), y), x).clone()


def solve(
    field: Callable[[Tensor, Any], Any], state: Any, times: Tensor, *, method: str, rtol: float, atol: float
) -> Any:
    """The state at each of ``times``.

    Args:
        field: ``field(t, state) -> rate of change``, in the state's structure, shapes and dtypes.
        state: a tensor, or a tuple of tensors, at ``times[0]``.
        times: ``(T,)``, strictly monotone.
        method: one of `METHODS`.
        rtol: relative tolerance of adaptive methods.
        atol: absolute tolerance of adaptive methods.

    Returns:
        ``(T, …)`` for each tensor of the state.

    Raises:
        IntegrationError: a rate or the solution is not finite, or the adaptive step size vanishes.
    """
    from torchdiffeq import odeint

    tolerances = [checks.positive(v, name, allow_zero=True) for v, name in ((rtol, "rtol"), (atol, "atol"))]
    if not any(tolerances):
        raise ValueError("rtol and atol must not both be 0")
    running, seen = False, deque[tuple[Tensor, Any]](maxlen=2)

    def watched(t: Tensor, x: Any) -> Any:
        nonlocal running
        running = True
        rate = field(t, x)
        running = False
        seen.append((t, rate))
        return rate

    try:
        solution = odeint(watched, state, times, rtol=rtol, atol=atol, method=_TORCHDIFFEQ.get(method, method))
    except AssertionError as error:  # torchdiffeq's "underflow in dt" or "non-finite values in state"
        if running:
            raise  # the model's own
        for t, rate in seen:
            if not all(bool(part.isfinite().all()) for part in _parts(rate)):
                said = f"{method} could not go on: the velocity is not finite at time {float(t):.4g}"
                raise IntegrationError(f"{said}. Check the model's outputs") from error
        raise IntegrationError(
            f"{method} could not go on at time {float(seen[-1][0]):.4g} ({error}): the velocity field is too stiff for "
            f"rtol={rtol:g}, atol={atol:g} in {_parts(state)[0].dtype}. Raise them, use float64, or take fixed steps"
        ) from error
    for part in _parts(solution):
        if not bool(part[-1].isfinite().all()):
            first = int(part.flatten(1).isfinite().all(1).logical_not().nonzero()[0])
            raise IntegrationError(
                f"{method} could not go on: the solution is not finite from time {float(times[first]):.4g} on. Check "
                "the model's outputs, or take smaller steps"
            )
    return solution


def _parts(state: Any) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)
