"""Log-likelihood of samples under a flow, by the instantaneous change of variables (Chen et al. 2018, FFJORD 2019)."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from flows.integrate import evaluate, solve, start_points, state_dtype, time_grid
from flows.matching import VelocityModel
from mbot import checks
from mbot.random import draw


def log_likelihood(
    model: VelocityModel,
    x1: Tensor,
    *,
    y: Any = None,
    trace: str = "auto",
    probes: int = 1,
    method: str = "dopri5",
    steps: int | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    differentiable: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``log p(x1)`` in nats, for standard normal noise at time 0: ``log N(x0) - ∫ div v dt`` along the flow.

    By default nothing is recorded: the result carries no graph, and the call may stand inside ``torch.no_grad`` or
    ``torch.inference_mode``. With ``differentiable=True`` every evaluation of the solver is recorded with its
    divergence, so that the result has gradients in ``x1``, ``y`` and the model's parameters; memory grows with the
    number of evaluations.

    Args:
        model: ``model(t, x, y) -> velocity``, in eval mode, differentiable in x, with rows that do not interact. It is
            called in the dtype of ``x1``.
        x1: ``(B, d…)`` samples.
        y: conditions.
        trace: ``"exact"`` takes d backward passes a field evaluation; ``"hutchinson"`` estimates the divergence with
            fixed random signs (unbiased; Grathwohl et al., arXiv 1810.01367); ``"auto"`` is exact up to d = 16.
        probes: sign vectors of the estimate, averaged.
        method: solver, see `flows.integrate`.
        steps: steps of a fixed-step method.
        rtol: relative tolerance of dopri5.
        atol: absolute tolerance of dopri5.
        differentiable: record the computation for gradients.
        generator: source of the signs.

    Returns:
        ``(B,)``, float32 or better. Divide by ``d log 2`` and change the sign for bits a dimension.

    Raises:
        RuntimeError: the velocity changes with x but carries no gradient in it, as under ``torch.no_grad``.
        ValueError: settings out of range, or ``differentiable`` where gradients are switched off.
        IntegrationError: the velocity or its divergence is not finite, or the field is too stiff for the tolerances.

    >>> still = lambda t, x, y: 0 * x
    >>> log_likelihood(still, torch.zeros(1, 2))  # the normal density itself: -log 2π
    tensor([-1.8379])
    """
    checks.choice(trace, "trace", ("auto", "exact", "hutchinson"))
    start_points(x1, "x1")
    times = time_grid(method, steps, None, x1, backwards=True)
    if differentiable and not torch.is_grad_enabled():
        raise ValueError("differentiable=True records nothing under torch.no_grad or torch.inference_mode: leave them")
    # Inside inference mode nothing is differentiated, enable_grad or not: it is left, with copies of what it made.
    with torch.inference_mode(False), contextlib.nullcontext() if differentiable else torch.no_grad():
        x1, y, times = (_outside_inference(value) for value in (x1, y, times))
        x1 = x1 if differentiable else x1.detach()
        vectors, count = _probes(x1, trace, checks.count(probes, "probes"), generator)

        def field(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            velocity, trace = _with_trace(model, t, state[0].to(x1.dtype), y, vectors, differentiable)
            return velocity.to(state[0].dtype), trace.to(state[1].dtype) / count

        start = x1.to(state_dtype(x1))
        x, change = solve(field, (start, start.new_zeros(len(start))), times, method=method, rtol=rtol, atol=atol)
        x0 = x[-1].flatten(1)
        normal = -0.5 * x0.square().sum(1) - 0.5 * x0.shape[1] * math.log(2 * math.pi)
        return normal + change[-1]


def _probes(x: Tensor, trace: str, probes: int, generator: torch.Generator | None) -> tuple[Tensor, int]:
    """Vectors ``v`` ``(k, B, d…)`` and a count, so that ``sum_k v_k · J v_k / count`` is (or estimates) the trace."""
    dim = x[0].numel()
    if trace == "exact" or (trace == "auto" and dim <= 16):
        return torch.eye(dim, dtype=x.dtype, device=x.device).reshape(dim, 1, *x.shape[1:]).expand(-1, *x.shape), 1
    coins = draw(torch.rand, probes, *x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return coins.lt(0.5).to(x) * 2 - 1, probes


def _with_trace(
    model: VelocityModel, t: Tensor, x: Tensor, y: Any, vectors: Tensor, record: bool
) -> tuple[Tensor, Tensor]:
    """Velocity ``(B, d…)`` and ``sum_k v_k · J v_k`` ``(B,)``."""
    with torch.enable_grad():
        x = x if record and x.requires_grad else x.detach().requires_grad_()
        velocity = evaluate(model, t, x, y)
        total = torch.zeros(len(x), dtype=state_dtype(x), device=x.device)
        product = None
        for i, v in enumerate(vectors if velocity.requires_grad else ()):
            keep = record or i + 1 < len(vectors)
            (product,) = torch.autograd.grad(velocity, x, v, retain_graph=keep, create_graph=record, allow_unused=True)
            if product is None:
                break
            total = total + (product * v).to(total.dtype).flatten(1).sum(1)
        if product is None and not _is_constant(model, t, x.detach(), y, velocity):
            raise RuntimeError(
                "the model's velocity changes with x but carries no gradient with respect to x, so that its divergence "
                "cannot be found: the model runs under torch.no_grad or inference_mode, or detaches x. Call it with "
                "gradients (log_likelihood switches them on and records nothing)"
            )
    return (velocity, total) if record else (velocity.detach(), total.detach())


def _is_constant(model: VelocityModel, t: Tensor, x: Tensor, y: Any, velocity: Tensor) -> bool:
    """Whether the velocity is the same at other points."""
    with torch.no_grad():
        return torch.equal(evaluate(model, t, 0.37 * x + 1.23, y), velocity)


def _outside_inference(value: Any) -> Any:
    """Tensors made in inference mode copied to where autograd can use them, in dicts and sequences too."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, dict):
        return {key: _outside_inference(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_outside_inference(part) for part in value)
    return value
