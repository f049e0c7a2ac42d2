"""Rows of the costs of a large entropic coupling, a part of them on each rank."""

from __future__ import annotations

import torch
from torch import Tensor

from mbot.couplings.streaming import Layout, Rows
from mbot.distributed.ranks import Ranks
from mbot.numerics import running_sum


class SpreadRows(Rows):
    """Rows of a cost spread over ranks; see `mbot.couplings.streaming.Rows`."""

    def __init__(self, ranks: Ranks, sizes: list[int]) -> None:
        self.ranks, self.sizes = ranks, sizes
        self.first = sum(sizes[: ranks.rank])

    def here(self, values: Tensor) -> Tensor:
        """See `Rows`."""
        return values[self.first : self.first + self.sizes[self.ranks.rank]]

    def gather(self, values: Tensor) -> Tensor:
        """See `Rows`."""
        return self.ranks.gather(values, self.sizes)

    def sum(self, values: Tensor) -> Tensor:
        """See `Rows`."""
        return self.ranks.sum(values)

    def agreed(self, values: Tensor) -> Tensor:
        """See `Rows`."""
        return self.ranks.broadcast(values)

    def mean(self, x: Tensor) -> Tensor:
        """See `Rows`."""
        return (self.ranks.sum(x.sum(0, dtype=torch.float64)) / sum(self.sizes)).to(x.dtype)

    def thinned(self, x: Tensor, most: int) -> Tensor:
        """See `Rows`."""
        step = -(-sum(self.sizes) // most)
        ends = [sum(self.sizes[: rank + 1]) for rank in range(len(self.sizes))]
        counts = [-(-end // step) - -(-(end - size) // step) for end, size in zip(ends, self.sizes, strict=True)]
        return self.ranks.gather(x[-self.first % step :: step], counts)

    def spread(self, layout: Layout) -> Layout:
        """See `Rows`."""
        return SpreadLayout(layout, self)

    def split(self, layout: Layout, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Rows`."""
        assert isinstance(layout, SpreadLayout)
        sums = self.ranks.gather(layout.columns[None], [1] * self.ranks.size)
        share = sums.softmax(0)
        ends = running_sum(share, 0)
        ends[-1] = 1
        holder = (uniform >= ends[:-1]).sum(0)
        share_here = share[self.ranks.rank]
        before = ends[self.ranks.rank] - share_here
        inside = ((uniform - before) / torch.where(share_here > 0, share_here, 1)).clamp(0, 1)
        return holder == self.ranks.rank, inside, share_here


class SpreadLayout:
    """The costs of all rows, from the layout of the rows here."""

    def __init__(self, inner: Layout, rows: SpreadRows) -> None:
        self.inner, self.rows = inner, rows
        self.columns = torch.empty(0)  # log-sums of the rows here, from the last pass over the columns
        self.col_tiles = inner.col_tiles
        self.set = inner.set

    @property
    def size(self) -> tuple[int, int]:
        """Numbers of rows and columns."""
        return sum(self.rows.sizes), self.inner.size[1]

    def soft_rows(self, phi: Tensor, psi: Tensor) -> Tensor:
        """See `Layout`."""
        return self.rows.gather(self.inner.soft_rows(self.rows.here(phi), psi))

    def soft_cols(self, phi: Tensor, psi: Tensor) -> Tensor:
        """See `Layout`."""
        self.columns = self.inner.soft_cols(self.rows.here(phi), psi)
        top = self.rows.ranks.max(self.columns)
        return self.rows.sum((self.columns - top).exp()).log() + top
