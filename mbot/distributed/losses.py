"""Mini-batch losses whose grid of problems is spread over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mbot import checks
from mbot.distributed.ranks import Ranks, gathered, summed
from mbot.grid import Grid, Scheme, Side, batch_weights
from mbot.losses import MiniBatchLoss
from mbot.plan import Plan
from mbot.transport import ValueTransport


def spread(loss: MiniBatchLoss, group: dist.ProcessGroup | None = None) -> MiniBatchLoss:
    """The same loss, with the grid of its k · k' problems spread over the ranks of a process group.

    ``from_batches(xs, ys)`` takes the mini-batches of this rank, any number, at least one; together they are those of
    the loss. A rank solves its xs against the ys of all. ``loss(x, y)`` takes the whole clouds on every rank, with a
    generator of one seed, and cuts the grid in blocks. ``backward_by_pair`` works likewise; ``plan`` does not.

    The value is the single process's, on every rank. **Gradients** are meant to be averaged over the ranks, as
    ``DistributedDataParallel`` does: backward gives each rank its own share times the number of ranks, and the average
    is exactly the gradient of one process. If you do not average gradients over the ranks, divide them by the number of
    ranks and sum.

    Args:
        loss: `MiniBatchOT` or `BoMbOT`; it stays as it is.
        group: the process group, or None for the default one.

    Raises:
        ValueError: ``torch.distributed`` is not initialised; when called, mini-batches of different kinds or (for
            ``loss(x, y)``) different ones drawn on different ranks, `SlicedOT` without a generator.
    """
    if not isinstance(loss, MiniBatchLoss):
        raise TypeError(f"loss must be an mbot.MiniBatchOT or mbot.BoMbOT; got {type(loss).__name__}")
    if isinstance(loss.transport, ValueTransport) and loss.generator is None:
        raise ValueError(
            f"{loss.transport!r} draws: give the loss a generator=, of the same seed on every rank, so that all agree"
        )
    return loss.solved_by(partial(_solve_spread, Ranks(group)))


@dataclass(frozen=True)
class SpreadGrid(Grid):
    """All values and weights of a grid, and the part of it that this rank solved."""

    ranks: Ranks
    part: Grid | None  # none with fewer problems than ranks
    nothing: Tensor  # 0, with a graph that gives the points gradients of 0
    where: tuple[slice, slice]  # where the part's values are among all

    def total(self, weight: Tensor) -> Tensor:
        """See `Grid.total`: of all ranks."""
        # Backward's exchange takes every rank, those too whose part has no gradients.
        mine = self.nothing if self.part is None else self.part.total(weight[self.where])
        if not mine.requires_grad:
            mine = mine.detach().requires_grad_(torch.is_grad_enabled())
        return summed(mine, self.ranks)

    def scatter(self, weight: Tensor, rows: Tensor, cols: Tensor, n: int, m: int) -> Plan:
        """Not spread."""
        raise ValueError("the plan is not spread over ranks: call plan of the loss that was given to spread")


def _solve_spread(ranks: Ranks, scheme: Scheme, x: Side, y: Side) -> SpreadGrid:
    """Solve the grid of the mini-batches of all ranks. Mini-batches with an index come from clouds on every rank."""
    drawn, aligned = x.index is not None, scheme.aligned
    found = ranks.from_all(partial(_checked, x, y, aligned))
    sizes_x, sizes_y = _all_sizes(found, drawn)
    draws = isinstance(scheme.transport, ValueTransport)
    if draws and (len(set(sizes_x)) > 1 or len(set(sizes_y)) > 1):
        raise ValueError(f"a spread loss over {scheme.transport!r} needs mini-batches of one size a side")
    left, right = list(x.points), list(y.points)
    at, across = _block_of(ranks, found, drawn, aligned)
    if drawn:
        left, right = left[at], right[at if aligned else across]
    elif not aligned:
        right = _gather_batches(ranks, right, [one.sizes_y for one in found], any(one.gradient for one in found))
    part = None
    if left and right:
        inside = x.weights_inside(at), y.weights_inside(at if aligned else across)
        part = scheme.solve(Side(left, x.name, inside=inside[0]), Side(right, y.name, inside=inside[1]))
    elif draws:  # draw as the other ranks do, so that the generators stay equal
        scheme.solve(Side(x.points[:1], x.name), Side(y.points[:1], y.name))
    exact = torch.promote_types(x.points[0].dtype, torch.float32)
    values = x.points[0].new_zeros((len(sizes_x), 1 if aligned else len(sizes_y)), dtype=exact)
    if part is not None:
        values[at, across] = part.values
    weights = batch_weights(sizes_x, sizes_y, x.factor, y.factor, values, aligned)
    nothing = 0 * (x.points[0].to(exact).sum() + y.points[0].to(exact).sum())
    return SpreadGrid(ranks.sum(values), *weights, [], ranks, part, nothing, (at, across))


class _Batches(NamedTuple):
    """Facts that the ranks exchange about their mini-batches."""

    kind: tuple[Any, ...]
    sizes_x: list[int]
    sizes_y: list[int]
    gradient: bool  # whether the ys have any
    drawn: tuple[Tensor, Tensor] | None


def _checked(x: Side, y: Side, aligned: bool) -> _Batches:
    left, right = list(x.batches()), list(y.batches())
    if aligned and len(left) != len(right):
        raise ValueError(
            f"pairing='aligned' needs as many batches of xs as of ys on each rank; got {len(left)} and {len(right)}"
        )
    for one, other in [(batch, right[0]) for batch in left] + [(left[0], batch) for batch in right]:
        checks.samples(one, other, x.name, y.name)
    gradient = torch.is_grad_enabled() and any(batch.requires_grad for batch in right)
    kind = (left[0].dtype, tuple(left[0].shape[1:]))
    drawn = None if x.index is None or y.index is None else (x.index.cpu(), y.index.cpu())
    return _Batches(kind, x.sizes, y.sizes, gradient, drawn)


def _all_sizes(found: list[_Batches], drawn: bool) -> tuple[list[int], list[int]]:
    """Sizes of the mini-batches of both sides of the whole grid."""
    first = found[0]
    if any(one.kind != first.kind for one in found):
        raise ValueError(f"the ranks must pass mini-batches of one kind; got {[one.kind for one in found]}")
    if not drawn:
        return [size for one in found for size in one.sizes_x], [size for one in found for size in one.sizes_y]
    assert first.drawn is not None
    for one in found[1:]:
        assert one.drawn is not None
        if not all(map(torch.equal, one.drawn, first.drawn)):
            raise ValueError(
                "the ranks drew different mini-batches: give the loss a generator= of the same seed on every rank"
            )
    return first.sizes_x, first.sizes_y


def _block_of(ranks: Ranks, found: list[_Batches], drawn: bool, aligned: bool) -> tuple[slice, slice]:
    """This rank's block of the grid: its own rows; of drawn batches a share of the rows (and columns, if few rows)."""
    if not drawn:
        begin = sum(len(one.sizes_x) for one in found[: ranks.rank])
        total = sum(len(one.sizes_y) for one in found)
        return slice(begin, begin + len(found[ranks.rank].sizes_x)), slice(0, 1 if aligned else total)
    k, k2 = len(found[0].sizes_x), 1 if aligned else len(found[0].sizes_y)
    high = min(ranks.size, k)
    wide = min(ranks.size // high, k2)
    i, j = divmod(ranks.rank, wide)
    if i >= high:
        return slice(0), slice(0)
    return slice(i * k // high, (i + 1) * k // high), slice(j * k2 // wide, (j + 1) * k2 // wide)


def _gather_batches(ranks: Ranks, mine: list[Tensor], sizes: list[list[int]], grad: bool) -> list[Tensor]:
    """The mini-batches of all ranks, with gradients if those of any have them."""
    rows = torch.cat([batch.flatten(1) for batch in mine])
    if grad and not rows.requires_grad:
        rows = rows.detach().requires_grad_()
    everything = gathered(rows, ranks, [sum(part) for part in sizes])
    parts = everything.split([size for part in sizes for size in part])
    return [part.reshape(-1, *mine[0].shape[1:]) for part in parts]
