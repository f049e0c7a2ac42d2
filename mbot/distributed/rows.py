"""Rows of the costs of a large entropic coupling, a part of them on each rank."""

from __future__ import annotations

import torch
from torch import Tensor

from mbot.distributed.ranks import Ranks
from mbot.numerics import running_sum
from mbot.transport.streaming import Layout, Rows


class SpreadRows(Rows):
    """Rows of a cost spread over ranks; see `mbot.transport.streaming.Rows`."""

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
        # Each rank decides for a block of the columns, so that nothing grows with the ranks.
        size, m = self.ranks.size, len(uniform)
        block = -(-m // size)
        even, fill = [block] * size, (0, block * size - m)
        sums = self.ranks.exchange(torch.nn.functional.pad(layout.columns, fill), even, even).reshape(size, block)
        uniform = torch.nn.functional.pad(uniform, fill).reshape(size, block)[self.ranks.rank]
        share = sums.softmax(0)
        ends = running_sum(share, 0)
        ends[-1] = 1
        holder = (uniform >= ends[:-1]).sum(0)
        inside = ((uniform - (ends - share)) / torch.where(share > 0, share, 1)).clamp(0, 1)
        elsewhere = torch.arange(size, device=holder.device)[:, None] != holder
        answers = torch.stack((inside.masked_fill(elsewhere, -1), share), -1).flatten(0, 1)
        inside, share = self.ranks.exchange(answers, even, even)[:m].unbind(-1)
        return inside >= 0, inside.clamp_min(0), share


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
