"""Collectives of a process group: differentiable sums, and errors that are raised on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        values = values.detach().clone()
        dist.all_reduce(values, dist.ReduceOp.SUM, group)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone()
        dist.all_reduce(gradient, dist.ReduceOp.SUM, ctx.group)
        return gradient, None


def sum_over_ranks(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum on every rank; backward adds the ranks' gradients."""
    # A rank without elements takes part in the backward of the others.
    return _SumOverRanks.apply(values if values.requires_grad else values.detach().requires_grad_(), group)


def first_rank_at(peak: Tensor, mine: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The common ``peak``, with its gradient on the first rank that holds it."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    first = torch.where(mine.detach() == peak, rank, size)
    dist.all_reduce(first, dist.ReduceOp.MIN, group)
    chosen = torch.where((first == rank) & (peak > -torch.inf), mine, 0)
    return torch.where(peak > -torch.inf, sum_over_ranks(chosen, group), peak)


@contextmanager
def together(
    group: dist.ProcessGroup | None, device: torch.device, facts: dict[str, int] | None = None
) -> Iterator[None]:
    """An error inside is raised on every rank, and so is a difference between the ranks in ``facts`` at the end.

    Otherwise the ranks without an error would wait for the failed one without end.

    Raises:
        RuntimeError: another rank has an error; its own one is raised there.
        ValueError: the ranks differ.
    """
    error = None
    try:
        yield
    except Exception as caught:
        if group is None:
            raise
        error = caught
    if group is None:
        return
    facts = facts or {}
    rank = dist.get_rank(group)
    extremes = torch.tensor(
        [-1 if error is None else rank, *facts.values(), *(-v for v in facts.values())], device=device
    )
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group)
    failed, *bounds = extremes.tolist()
    if error is not None:
        raise error
    if failed >= 0:
        raise RuntimeError(f"encode failed on rank {failed} of the group; the error of that rank says why")
    for (name, mine), high, low in zip(facts.items(), bounds[: len(facts)], bounds[len(facts) :], strict=True):
        if high != -low:
            raise ValueError(
                f"all ranks must have the same {name}; it ranges from {-low} to {high}, and is {mine} on this rank"
            )
