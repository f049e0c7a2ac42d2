"""Mini-batch losses whose grid of problems is spread over ranks."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mbot import checks
from mbot.distributed.ranks import Ranks, gathered, summed
from mbot.grid import Grid, _batches, _weights
from mbot.losses import MiniBatchLoss
from mbot.transport import SlicedOT


def spread(loss: MiniBatchLoss, group: dist.ProcessGroup | None = None) -> MiniBatchLoss:
    """The same loss, with the grid of its k · k' problems spread over the ranks of a process group.

    ``from_batches(xs, ys)`` takes the mini-batches of this rank, any number, at least one; together they are those of
    the loss. A rank solves its xs against the ys of all. ``loss(x, y)`` takes the whole clouds on every rank, with a
    generator of one seed, and cuts the grid in blocks. ``backward_by_pair`` works likewise; ``plan`` does not.

    The value is the single process's, on every rank. **Gradients** are meant to be averaged over the ranks, as
    ``DistributedDataParallel`` does: backward gives each rank its own share times the number of ranks, and the average
    is exactly the gradient of one process. Whoever averages nothing must divide by the number of ranks and sum.

    Args:
        loss: `MiniBatchOT` or `BoMbOT`; it stays as it is.
        group: the process group, or None for the default one.

    Raises:
        ValueError: ``torch.distributed`` is not initialised; when called, mini-batches of different kinds or (for
            ``loss(x, y)``) different ones drawn on different ranks, `SlicedOT` without a generator.
    """
    if not isinstance(loss, MiniBatchLoss):
        raise TypeError(f"loss must be an mbot.MiniBatchOT or mbot.BoMbOT; got {type(loss).__name__}")
    if isinstance(loss.transport, SlicedOT) and loss.generator is None:
        raise ValueError(
            "SlicedOT draws directions: give the loss a generator=, of the same seed on every rank, so that all agree"
        )
    spreading = copy.copy(loss)
    spreading._solver = partial(_solve_spread, Ranks(group))
    return spreading


@dataclass
class SpreadGrid(Grid):
    """All values and weights of a grid, and the blocks of it that were solved here."""

    ranks: Ranks = None  # type: ignore[assignment]
    part: Grid | None = None  # none with fewer problems than ranks
    nothing: Tensor = None  # type: ignore[assignment]  # 0, with a graph that gives the points gradients of 0
    block: tuple[slice, slice] = (slice(0), slice(0))  # where its values stand among all

    def total(self, weight: Tensor) -> Tensor:
        """See `Grid.total`: of all ranks."""
        # Backward's exchange takes every rank, those too whose part has no gradients.
        mine = self.nothing if self.part is None else self.part.total(weight[self.block])
        if not mine.requires_grad:
            mine = mine.detach().requires_grad_(torch.is_grad_enabled())
        return summed(mine, self.ranks)

    def scatter(self, weight: Tensor, n: int, m: int) -> Any:
        """Not spread."""
        raise ValueError("the plan is not spread over ranks: call plan of the loss that was given to spread")


def _solve_spread(ranks: Ranks, transport: Any, xs: Any, ys: Any, a: Any, b: Any, u: Any, v: Any, rows: Any, cols: Any,
                  *, cost: Any, generator: torch.Generator | None, aligned: bool) -> SpreadGrid:  # fmt: skip
    """`Grid.solve` of the batches of all ranks; batches with ``rows`` were drawn from clouds that every rank holds."""
    drawn = rows is not None
    found = ranks.everyones(partial(_checked, xs, ys, aligned, (rows.cpu(), cols.cpu()) if drawn else None))
    sizes_x, sizes_y = _all_sizes(found, drawn)
    if isinstance(transport, SlicedOT) and (len(set(sizes_x)) > 1 or len(set(sizes_y)) > 1):
        raise ValueError("a spread loss over SlicedOT needs mini-batches of one size a side")
    left, right = list(_batches(xs, "xs")), list(_batches(ys, "ys"))
    at, across = _block_of(ranks, found, drawn, aligned)
    inside = [None if w is None else w[part] for w, part in ((a, at), (b, at if aligned else across))]
    if drawn:
        left, right = left[at], right[at if aligned else across]
    elif not aligned:
        right = _gather_batches(ranks, right, [one.sizes_y for one in found], any(one.gradient for one in found))
    solve = partial(Grid.solve, cost=cost, generator=generator, aligned=aligned, u=None, v=None, rows=None, cols=None)
    part = None
    if left and right:
        part = solve(transport, left, right, *inside)
    elif isinstance(transport, SlicedOT):  # draw as the others do, so that the generators stay together
        solve(transport, xs[:1], ys[:1], None, None)
    exact = torch.promote_types(xs[0].dtype, torch.float32)
    values = xs[0].new_zeros((len(sizes_x), 1 if aligned else len(sizes_y)), dtype=exact)
    if part is not None:
        values[at, across] = part.values
    share_x, share_y = (torch.tensor(sizes).double() / sum(sizes) for sizes in (sizes_x, sizes_y))
    u, v, pairs = _weights(share_x, share_y, u, v, values, aligned)
    return SpreadGrid(
        ranks.sum(values), u, v, [], pairs, rows, cols, ranks=ranks, part=part, block=(at, across),
        nothing=0 * (xs[0].to(exact).sum() + ys[0].to(exact).sum()),
    )  # fmt: skip


class _Batches(NamedTuple):
    """What the ranks tell each other about their mini-batches."""

    kind: tuple[Any, ...]
    sizes_x: list[int]
    sizes_y: list[int]
    gradient: bool  # whether the ys have any
    drawn: tuple[Tensor, Tensor] | None


def _checked(xs: Any, ys: Any, aligned: bool, drawn: tuple[Tensor, Tensor] | None) -> _Batches:
    left, right = list(_batches(xs, "xs")), list(_batches(ys, "ys"))
    if aligned and len(left) != len(right):
        raise ValueError(
            f"pairing='aligned' needs as many batches of xs as of ys on each rank; got {len(left)} and {len(right)}"
        )
    for x, y in [(x, right[0]) for x in left] + [(left[0], y) for y in right]:
        checks.samples(x, y, "xs", "ys")
    gradient = torch.is_grad_enabled() and any(batch.requires_grad for batch in right)
    kind = (left[0].dtype, tuple(left[0].shape[1:]))
    return _Batches(kind, [len(x) for x in left], [len(y) for y in right], gradient, drawn)


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
    """This rank's block of the grid: its own batches; of drawn ones some rows, or columns of them if ranks abound."""
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
