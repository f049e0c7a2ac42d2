"""One coupling over the batch of all ranks, solved by all of them where the method allows it, else on rank 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mbot import checks
from mbot.conditions import Labels, check, concatenate, select, to_device
from mbot.couplings import Coupling, Pairs, SinkhornCoupling
from mbot.couplings.base import tell_ignored
from mbot.distributed.ranks import Ranks
from mbot.distributed.shards import RankShard
from mbot.eager import outside_graphs
from mbot.numerics import full_float32


@dataclass(frozen=True, eq=False, kw_only=True)
class GlobalPairs(Pairs):
    """Pairs of the batch of all ranks, the same on every rank; ``source`` and ``target`` index that batch.

    Attributes:
        ranks: the process group.
        sizes: rows of x0 on each rank, rank after rank in the batch; None if every rank holds all of x0.
        place: ``(m,)`` the target's position in the batch, for the targets of the ranks one after the other.
        counts: targets on each rank.
    """

    ranks: Ranks
    sizes: list[int] | None = None
    place: Tensor
    counts: list[int]

    def _owner_of_target(self) -> tuple[Tensor, Tensor]:
        row_of = torch.empty_like(self.place).scatter_(0, self.place, torch.arange(len(self.place)).to(self.place))
        return _owner(row_of[self.target], self.counts)

    def here(self) -> Pairs:
        """The pairs whose targets are on this rank. ``target`` indexes its x1, ``source`` the batch of all ranks."""
        rank, row = self._owner_of_target()
        mine = rank == self.ranks.rank
        return Pairs(self.source[mine], row[mine], None if self.weight is None else self.weight[mine], self.info)

    def owner(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Rank and row of sources, for x0 that is spread over the ranks."""
        if self.sizes is None:
            raise ValueError("every rank holds all of x0: index it by the source itself")
        return _owner(source, self.sizes)

    def fetch(self, values: Tensor) -> Tensor:
        """Values of the sources of this rank's pairs (their labels, for example), sent by the ranks that hold them.

        Args:
            values: ``(n_rank, …)`` on each rank, spread as x0 is; no gradients flow back.

        Returns:
            ``(k, …)``, in the order of `here`.
        """
        if self.sizes is None:
            return values[self.here().source.to(values.device)]
        holder, row = self.owner(self.source)
        asker, _ = self._owner_of_target()
        me, size = self.ranks.rank, self.ranks.size
        order = asker.argsort(stable=True)
        sent = row[order][holder[order] == me]
        send = [int(((holder == me) & (asker == q)).sum()) for q in range(size)]
        receive = [int(((holder == p) & (asker == me)).sum()) for p in range(size)]
        arrived = self.ranks.exchange(values[sent.to(values.device)], send, receive)
        # They come in the order of their holders, and inside in that of the pairs.
        back = holder[asker == me].argsort(stable=True).argsort().to(values.device)
        return arrived[back]

    def exchange(self, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
        """The samples of this rank's pairs, sources sent by their ranks; ``x1`` keeps its gradients, ``x0`` none."""
        return self.fetch(x0), x1[self.here().target.to(x1.device)]


def _owner(index: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    ends = torch.tensor(sizes, device=index.device).cumsum(0)
    rank = torch.searchsorted(ends, index, right=True)
    return rank, index - (ends - torch.tensor(sizes, device=index.device))[rank]


@dataclass(frozen=True)
class GlobalCoupling:
    """A coupling of the batch of all ranks: the pairs that one process would make of the concatenated batch.

    `mbot.SinkhornCoupling` is solved by all: each rank holds the costs of its sources against all targets (or makes
    them tile by tile), and in each iteration the ranks gather 8 bytes a source and reduce 16 bytes a target. Its pairs
    are those of one process up to the rounding of these sums. Every other coupling is solved on rank 0: the samples are
    gathered there and the pairs sent back. Exact solvers do not split, and one solve cannot disagree with itself.

    Random numbers are rank 0's. So give every rank a generator of the same seed, used for nothing else.

    Args:
        coupling: any coupling.
        group: process group, or None for the default one.
        source: ``"sharded"``: each rank passes its own rows of x0, and the batch's are those of rank 0, then 1, …;
            ``"shared"``: every rank passes all of x0 (noise from a common seed, say), and nothing of it is sent.
    """

    coupling: Coupling
    group: dist.ProcessGroup | None = field(default=None, compare=False)
    source: str = "sharded"

    def __post_init__(self) -> None:
        if not isinstance(self.coupling, Coupling):
            raise TypeError(f"coupling must be an mbot coupling such as OTCoupling(); got {self.coupling!r}")
        checks.choice(self.source, "source", ("sharded", "shared"))

    @outside_graphs
    def __call__(
        self,
        x0: Tensor,
        x1: Tensor,
        y0: Labels | None = None,
        y1: Labels | None = None,
        *,
        generator: torch.Generator | None = None,
        place: Tensor | None = None,
    ) -> GlobalPairs:
        """Pair the batch of all ranks.

        Args:
            x0: ``(n_rank, d…)`` this rank's source samples, or all of them; see ``source``.
            x1: ``(m_rank, d…)`` this rank's target samples.
            y0: conditions of ``x0``.
            y1: conditions of ``x1``.
            generator: rank 0's is the source of randomness.
            place: ``(m_rank,)`` positions of this rank's targets in the batch; None: rank after rank.

        Raises:
            TypeError, ValueError: on every rank, what any rank's input raises in `mbot.Coupling`, or inputs of
                different kinds, or positions that are no order of the batch.
        """
        ranks = Ranks(self.group)

        def checked() -> Any:
            flat0, flat1 = checks.samples(x0, x1)
            check(y0, len(x0), "y0", "x0")
            check(y1, len(x1), "y1", "x1")
            if place is not None and (place.shape != (len(x1),) or place.dtype != torch.int64):
                raise ValueError(f"place must hold an int64 position for each of the {len(x1)} targets")
            kind = (flat1.dtype, tuple(x1.shape[1:]), y0 is None, y1 is None, place is None)
            return len(flat0), len(flat1), kind, None if place is None else place.cpu()

        sizes0, sizes1, kinds, positions = (list(part) for part in zip(*ranks.from_all(checked), strict=True))
        if any(kind != kinds[0] for kind in kinds):
            raise ValueError(f"the ranks must pass samples of one dtype and shape, and the same arguments; got {kinds}")
        shared = self.source == "shared"
        if shared and len(set(sizes0)) > 1:
            raise ValueError(f"source='shared' means that every rank passes all of x0; got {sizes0} rows")
        order = torch.arange(sum(sizes1)) if place is None else torch.cat(positions)
        if not torch.equal(order.sort().values, torch.arange(sum(sizes1))):
            raise ValueError("place of all ranks together must hold every position of the batch once")
        if y0 is not None and self.coupling.ignores_conditions:
            tell_ignored(self.coupling)
            y0 = None
        with torch.no_grad():
            if isinstance(self.coupling, SinkhornCoupling) and (not shared or len(x0) >= ranks.size):
                pairs = self._on_all(ranks, x0, x1, sizes0, sizes1, order, generator)
            else:
                pairs = self._on_first(ranks, x0, x1, y0, y1, sizes0, sizes1, order, generator)
        return GlobalPairs(
            pairs.source, pairs.target, pairs.weight, pairs.info, ranks=ranks, sizes=None if shared else sizes0,
            place=order.to(x1.device), counts=sizes1,
        )  # fmt: skip

    def _on_all(self, ranks: Ranks, x0: Tensor, x1: Tensor, sizes0: list[int], sizes1: list[int], order: Tensor,
                    generator: torch.Generator | None) -> Pairs:  # fmt: skip
        assert isinstance(self.coupling, SinkhornCoupling)
        x0, x1 = x0.flatten(1), ranks.gather(x1.flatten(1), sizes1)[order.argsort().to(x1.device)]
        if self.source == "shared":
            parts = x0.tensor_split(ranks.size)
            sizes0, x0 = [len(part) for part in parts], parts[ranks.rank]
        with full_float32():
            return self.coupling.couple(x0, x1, RankShard(ranks, sizes0), generator)

    def _on_first(self, ranks: Ranks, x0: Tensor, x1: Tensor, y0: Labels | None, y1: Labels | None,
                      sizes0: list[int], sizes1: list[int], order: Tensor,
                      generator: torch.Generator | None) -> Pairs:  # fmt: skip
        back = order.argsort()
        device = x1.device
        whole1 = ranks.gather_first(x1, sizes1)
        parts1, parts0 = _gather_labels(ranks, y1), None
        whole0: Tensor | None = x0
        if self.source == "sharded":
            whole0 = ranks.gather_first(x0, sizes0)
            parts0 = _gather_labels(ranks, y0)

        def solved() -> tuple[Any, ...]:
            assert whole0 is not None
            assert whole1 is not None
            labels1 = None if parts1 is None else to_device(select(concatenate(parts1), back), device)
            labels0 = y0 if parts0 is None else to_device(concatenate(parts0), device)
            pairs = self.coupling(whole0, whole1[back.to(device)], labels0, labels1, generator=generator)
            weight = None if pairs.weight is None else pairs.weight.cpu()
            return pairs.source.cpu(), pairs.target.cpu(), weight, pairs.info

        source, target, weight, info = ranks.from_first(solved)
        return Pairs(source.to(device), target.to(device), None if weight is None else weight.to(device), info)


def _gather_labels(ranks: Ranks, y: Labels | None) -> list[Any] | None:
    """Conditions of all ranks on the CPU of rank 0; None elsewhere, and where there are none."""
    if y is None:
        return None
    parts: list[Any] | None = [None] * ranks.size if ranks.rank == 0 else None
    dist.gather_object(to_device(y, "cpu"), parts, ranks.root, ranks.group)
    return parts
