"""The rows of one large problem, a part of them on each rank."""

from __future__ import annotations

import torch
from torch import Tensor

from mbot.distributed.ranks import Ranks
from mbot.geometry import Geometry, Shard
from mbot.numerics import running_sum


class RankShard(Shard):
    """This rank's rows of one problem; see `mbot.geometry.Shard`."""

    def __init__(self, ranks: Ranks, sizes: list[int]) -> None:
        self.ranks, self.sizes = ranks, sizes
        self.first = sum(sizes[: ranks.rank])

    def own(self, values: Tensor) -> Tensor:
        """See `Shard`."""
        return values[..., self.first : self.first + self.sizes[self.ranks.rank]]

    def gather(self, values: Tensor) -> Tensor:
        """See `Shard`."""
        return self.ranks.gather(values, self.sizes)

    def sum(self, values: Tensor) -> Tensor:
        """See `Shard`."""
        return self.ranks.sum(values)

    def broadcast(self, values: Tensor) -> Tensor:
        """See `Shard`."""
        return self.ranks.broadcast(values)

    def mean(self, x: Tensor) -> Tensor:
        """See `Shard`."""
        return (self.ranks.sum(x.sum(0, dtype=torch.float64)) / sum(self.sizes)).to(x.dtype)

    def thinned(self, x: Tensor, most: int) -> Tensor:
        """See `Shard`."""
        step = -(-sum(self.sizes) // most)
        ends = [sum(self.sizes[: rank + 1]) for rank in range(len(self.sizes))]
        counts = [-(-end // step) - -(-(end - size) // step) for end, size in zip(ends, self.sizes, strict=True)]
        return self.ranks.gather(x[-self.first % step :: step], counts)

    def geometry(self, inner: Geometry) -> Geometry:
        """See `Shard`."""
        return Sharded(inner, self)

    def split(self, geometry: Geometry, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Shard`."""
        assert isinstance(geometry, Sharded)
        # Each rank decides for a block of the columns, so that nothing grows with the ranks.
        size, m = self.ranks.size, len(uniform)
        block = -(-m // size)
        even, fill = [block] * size, (0, block * size - m)
        sums = self.ranks.exchange(torch.nn.functional.pad(geometry.columns, fill), even, even).reshape(size, block)
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


class Sharded:
    """Costs of one problem, from a geometry of the rows of each rank. Potentials are whole on every rank."""

    def __init__(self, inner: Geometry, shard: RankShard) -> None:
        self.inner, self.shard = inner, shard
        self.columns = torch.empty(0)  # log-sums over this rank's rows, from the last pass over the columns
        self.col_tiles, self.at = inner.col_tiles, inner.at

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(1, n, m)``."""
        return 1, sum(self.shard.sizes), self.inner.shape[2]

    def prepare(self, psi: Tensor) -> None:
        """See `Geometry`."""
        self.inner.prepare(psi)

    def row_sums(self, psi: Tensor) -> Tensor:
        """See `Geometry`."""
        return self.shard.gather(self.inner.row_sums(psi)[0])[None]

    def col_sums(self, phi: Tensor) -> Tensor:
        """See `Geometry`."""
        sums = self.inner.col_sums(self.shard.own(phi))
        self.columns = sums[0]
        top = self.shard.ranks.max(sums)
        return self.shard.sum((sums - top).exp()).log() + top
