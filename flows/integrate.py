"""Solving the flow's ordinary differential equation from noise to data, on torchdiffeq."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flows.matching import VelocityModel
from mbot import checks

_FIXED = ("euler", "midpoint", "heun", "rk4")
_ADAPTIVE = ("dopri5",)
_TORCHDIFFEQ = {"heun": "heun2"}


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Solution of the flow.

    Attributes:
        t: ``(T,)`` times.
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
        RuntimeError: the adaptive step size vanishes (a field that is not finite, or far too stiff).

    >>> integrate(lambda t, x, y: torch.ones_like(x), torch.zeros(1, 2), method="euler", steps=4).final
    tensor([[1., 1.]])
    """
    from torchdiffeq import odeint

    checks.choice(method, "method", _FIXED + _ADAPTIVE)
    checks.finite(checks.floating(x0, "x0"), "x0")
    if x0.ndim < 2 or x0.numel() == 0:
        raise ValueError(f"x0 must have shape (B, d…) with B >= 1; got {tuple(x0.shape)}")
    if times is not None and steps is not None:
        raise ValueError("give steps or times, not both")
    if times is None:
        if steps is None and method in _FIXED:
            raise ValueError(f"method {method!r} takes fixed steps: give steps, or a grid of times")
        times = torch.linspace(0, 1, checks.count(1 if steps is None else steps, "steps") + 1)
    times = checks.finite(checks.floating(times, "times"), "times").to(x0.device)
    step = times.diff()
    if times.ndim != 1 or len(times) < 2 or not bool((step > 0).all() | (step < 0).all()):
        raise ValueError("times must be a strictly increasing or decreasing vector of at least two times")

    evaluations = 0

    def field(t: Tensor, x: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        velocity = model(t.expand(len(x)).to(x.dtype), x, y)
        if velocity.shape != x.shape:
            raise ValueError(f"the model must return velocities of shape {tuple(x.shape)}; got {tuple(velocity.shape)}")
        return velocity

    try:
        with torch.no_grad():
            x = odeint(field, x0, times, rtol=rtol, atol=atol, method=_TORCHDIFFEQ.get(method, method))
    except AssertionError as error:  # torchdiffeq's "underflow in dt"
        raise RuntimeError(
            f"{method} could not go on ({error}): the velocity field is not finite or too stiff for rtol={rtol:g}, "
            f"atol={atol:g}. Check the model's outputs, or use a fixed-step method"
        ) from error
    return Trajectory(times, x, evaluations)
