"""Log-likelihood of samples under a flow, by the instantaneous change of variables (Chen et al. 2018, FFJORD 2019)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flows.matching import VelocityModel
from mbot import checks
from mbot.random import draw

_FIXED = ("euler", "midpoint", "heun", "rk4")


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
    generator: torch.Generator | None = None,
) -> Tensor:
    """``log p(x1)`` in nats, for standard normal noise at time 0: ``log N(x0) - ∫ div v dt`` along the flow.

    Args:
        model: ``model(t, x, y) -> velocity``, in eval mode, differentiable in x, with rows that do not interact.
        x1: ``(B, d…)`` samples.
        y: conditions.
        trace: ``"exact"`` takes d backward passes a field evaluation; ``"hutchinson"`` estimates the divergence with
            fixed random signs (unbiased; Grathwohl et al., arXiv 1810.01367); ``"auto"`` is exact up to d = 16.
        probes: sign vectors of the estimate, averaged.
        method: solver, see `flows.integrate`.
        steps: steps of a fixed-step method.
        rtol: relative tolerance of dopri5.
        atol: absolute tolerance of dopri5.
        generator: source of the signs.

    Returns:
        ``(B,)``, float32 or better. Divide by ``d log 2`` and change the sign for bits a dimension.

    >>> still = lambda t, x, y: 0 * x
    >>> log_likelihood(still, torch.zeros(1, 2))  # the normal density itself: -log 2π
    tensor([-1.8379])
    """
    from torchdiffeq import odeint

    checks.choice(trace, "trace", ("auto", "exact", "hutchinson"))
    checks.choice(method, "method", (*_FIXED, "dopri5"))
    x1 = checks.finite(checks.floating(x1, "x1"), "x1").detach()
    if x1.ndim < 2 or x1.numel() == 0:
        raise ValueError(f"x1 must have shape (B, d…) with B >= 1; got {tuple(x1.shape)}")
    if method in _FIXED and steps is None:
        raise ValueError(f"method {method!r} takes fixed steps: give steps")
    dim = x1[0].numel()
    exact = trace == "exact" or (trace == "auto" and dim <= 16)
    if exact:
        vectors = torch.eye(dim, dtype=x1.dtype, device=x1.device).reshape(dim, 1, *x1.shape[1:]).expand(-1, *x1.shape)
    else:
        size = (checks.count(probes, "probes"), *x1.shape)
        vectors = draw(torch.rand, *size, generator=generator, device=x1.device, dtype=x1.dtype).lt(0.5).to(x1) * 2 - 1

    def field(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = state[0].detach().requires_grad_()
            velocity = model(t.expand(len(x)).to(x.dtype), x, y)
            total = torch.zeros(len(x), dtype=velocity.dtype, device=x.device)
            if velocity.requires_grad:  # a constant field has no divergence
                for i, v in enumerate(vectors):
                    (pulled,) = torch.autograd.grad(
                        velocity, x, v, retain_graph=i + 1 < len(vectors), allow_unused=True
                    )
                    total = total if pulled is None else total + (pulled * v).flatten(1).sum(1)
        return velocity.detach(), total.detach() if exact else total.detach() / len(vectors)

    times = torch.tensor([1.0, 0.0], device=x1.device)
    if steps is not None:
        times = torch.linspace(1, 0, checks.count(steps, "steps") + 1, device=x1.device)
    start = (x1, torch.zeros(len(x1), dtype=x1.dtype, device=x1.device))
    with torch.no_grad():
        solver = {"heun": "heun2"}.get(method, method)
        x, change = odeint(field, start, times, rtol=rtol, atol=atol, method=solver)
    x0 = x[-1].flatten(1).to(torch.promote_types(x1.dtype, torch.float32))
    normal = -0.5 * x0.square().sum(1) - 0.5 * dim * math.log(2 * math.pi)
    return normal + change[-1].to(normal.dtype)
