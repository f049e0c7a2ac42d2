"""Losses of many mini-batches in little memory: backward with the activations of one, and the map of all their plans.

The loss needs the embeddings, not the activations behind them: embed all batches without gradients, differentiate the
loss with respect to the embeddings, then embed each batch again and pass its gradient on (gradient caching, Gao et al.
2021, arXiv 2101.06983; steps 1 to 3 of BoMb-OT's low-memory training, arXiv 2102.05912).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from mbot import checks
from mbot.grid import Side
from mbot.minibatch import rounds
from mbot.plan import Plan


def backward_by_batch(
    loss: Callable[[list[Tensor], list[Tensor]], Tensor],
    embed: Callable[[Tensor], Tensor],
    xs: Tensor | Sequence[Tensor],
    ys: Tensor | Sequence[Tensor],
    weight: float,
) -> Tensor:
    """Accumulate the gradients of ``weight * loss(embed(xs), embed(ys))``; see `MiniBatchLoss.backward_by_pair`."""
    batches = [*xs, *ys]
    states: list[list[Tensor]] = []
    features: list[Tensor] = []
    with torch.no_grad(), _frozen_buffers():
        for batch in batches:
            states.append(_random_state(batch.device))
            features.append(embed(batch).detach().requires_grad_())
    value = loss(features[: len(xs)], features[len(xs) :])
    if value.requires_grad:
        (weight * value).backward()
    for batch, state, feature in zip(batches, states, features, strict=True):
        with _restored(state, batch.device):
            again = embed(batch)
        if again.requires_grad and feature.grad is not None:
            again.backward(feature.grad.to(again.dtype))
    return value.detach()


@contextmanager
def _frozen_buffers() -> Iterator[None]:
    """Leave the buffers (running statistics) of all modules that run as they were: the second pass updates them."""
    copies: dict[int, tuple[Tensor, Tensor]] = {}

    def remember(module: nn.Module, _: object) -> None:
        for buffer in module.buffers(recurse=False):
            copies.setdefault(id(buffer), (buffer, buffer.clone()))

    hook = register_module_forward_pre_hook(remember)
    try:
        yield
    finally:
        hook.remove()
        for buffer, copy in copies.values():
            buffer.copy_(copy)


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


@contextmanager
def _restored(states: list[Tensor], device: torch.device) -> Iterator[None]:
    """Draw as in the first pass; afterwards the generators are where the first pass left them, or further."""
    after = _random_state(device)
    _set(states, device)
    try:
        yield
    finally:
        _set(after, device)


def _set(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def map_by_batches(
    plan_of: Callable[[Side, Side, int, int], Plan],
    x: Tensor,
    y: Tensor,
    num: tuple[int, int],
    size: tuple[int, int],
    visits: int,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """The barycentric map of all plans together, a block of mini-batches in memory; see `MiniBatchLoss`.

    Args:
        plan_of: the plan of mini-batches of two sides, and the sizes of the clouds.
        x: ``(n, d…)`` source points.
        y: ``(n', d…)`` target points.
        num: mini-batches of a block, of both sides.
        size: of the mini-batches.
        visits: mini-batches that each source point is in, at least.
        generator: source of randomness.
    """
    checks.count(visits, "visits")
    source, target = (points.detach() for points in checks.samples(x, y, "x", "y"))
    streams = [
        rounds(len(points), m, generator=generator, device=points.device, name=name)
        for points, m, name in zip((source, target), size, "xy", strict=True)
    ]
    sums = torch.promote_types(source.dtype, torch.float32)
    mass, arrived = source.new_zeros(len(source), dtype=sums), torch.zeros_like(source, dtype=sums)
    for _ in range(-(-visits * -(-len(source) // size[0]) // num[0])):
        rows, cols = (torch.stack([next(s) for _ in range(k)]) for s, k in zip(streams, num, strict=True))
        plan = plan_of(Side(source[rows], "xs", rows), Side(target[cols], "ys", cols), len(source), len(target))
        row, col, moved = plan.entries()
        moved = moved.to(mass)
        mass.index_add_(0, row, moved)
        arrived.index_add_(0, row, moved[:, None] * target[col])
    reached = mass > 0
    mapped = torch.where(reached[:, None], arrived / torch.where(reached, mass, 1)[:, None], source)
    return mapped.to(x.dtype).reshape(x.shape), reached
