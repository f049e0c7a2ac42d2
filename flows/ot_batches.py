"""OT batches by number: samples, noise and pairs, each a function of the seed and the number alone."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from flows.items import floating, read
from flows.matching import CoupledBatch, check_coupling
from flows.pairs import PairedDataset
from flows.seeds import derive_seed, generator_at
from flows.sources import Source, Sources
from flows.streams import as_stream
from mbot import Coupling, IndependentCoupling, checks
from mbot.conditions import Labels, detached, select, to_device
from mbot.convergence import warn
from mbot.distributed import GlobalCoupling


class Fetched(NamedTuple):
    """Samples of one OT batch of this process, with their conditions and positions in the data set.

    ``x`` is None where the coupling chooses among the whole data set; ``source`` is None where no data set is read for
    it, and else samples and conditions.
    """

    number: int
    x: Tensor | None
    y: Any
    rows: Tensor
    source: tuple[Any, Any] | None


class OTBatches:
    """OT batches of a data set, by number: number ``e * per_epoch + i`` is the i-th of epoch e.

    See `flows.CoupledLoader` for the arguments. Under ``torch.distributed`` an OT batch is ``world × ot_batch_size``
    samples; training step s of rank r takes rows ``(s * world + r) * batch_size`` and on, which is the rows that one
    process with ``world`` times the batch sizes would train on at step s.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        source: Source,
        coupling: Coupling | None,
        batch_size: int,
        ot_batch_size: int,
        *,
        seed: int,
        shuffle: bool,
        drop_last: bool,
        collate: Callable[[list[Any]], Any] | None,
        scope: str,
        timeout: float,
        source_sampling: str = "independent",
        groups: tuple[Labels, Labels] | None = None,
        sources_per_target: int | None = None,
        shuffle_buffer: int = 4096,
    ) -> None:
        coupling = check_coupling(IndependentCoupling() if coupling is None else coupling)
        self.collate = collate
        self.pairs = dataset if isinstance(dataset, PairedDataset) else None  # which bring their starts
        if self.pairs is not None and (source is not None or collate is not None):
            raise ValueError("pairs are served as they are, with the starts they hold: leave source and collate out")
        self.batch_size = batch_size = checks.count(batch_size, "batch_size")
        self.ot_batch_size = ot_batch_size = checks.count(ot_batch_size, "ot_batch_size")
        self.scope = checks.choice(scope, "coupling_scope", ("rank", "global"))
        self.seed = checks.count(seed, "seed", at_least=0)
        self.shuffle, self.drop_last = checks.flag(shuffle, "shuffle"), checks.flag(drop_last, "drop_last")
        if ot_batch_size % batch_size:
            lower = max(1, ot_batch_size // batch_size) * batch_size
            raise ValueError(
                f"ot_batch_size must be a multiple of batch_size={batch_size}; got {ot_batch_size} "
                f"(nearest: {lower} or {lower + batch_size})"
            )
        distributed = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        # A group of its own: the background thread must not mix its collectives with those of the training step.
        self.group = None
        timeout = checks.positive(timeout, "timeout")
        if self.scope == "global" and self.world > 1:
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self.stream = as_stream(dataset, shuffle_buffer, self.world * ot_batch_size, self.seed)
        served: Any = dataset if self.stream is None else self.stream
        self.dataset = served
        if self.stream is not None and source_sampling != "independent":
            raise ValueError("source_sampling='matched' needs the classes of all samples, which a stream does not tell")
        self.size = len(self.dataset)
        self.full, rest = divmod(self.size, self.world * ot_batch_size)
        self.rest = 0 if drop_last else rest // self.world
        if not self.full and not self.rest and self.pairs is not None:
            wanted = f"{ot_batch_size}" + (f" for each of {self.world} processes" if self.world > 1 else "")
            raise ValueError(
                f"{self.size} pairs are fewer than a batch of {wanted}: lower the batch size, or make more"
            )
        if not self.full and not self.rest:
            raise ValueError(
                f"the data set has {self.size} samples, fewer than one OT batch of {self.world * ot_batch_size}"
                + (f" ({self.world} processes × {ot_batch_size})" if self.world > 1 else "")
                + "; lower ot_batch_size or batch_size, or pass drop_last=False"
            )
        if sources_per_target is not None:
            sources_per_target = checks.count(sources_per_target, "sources_per_target")
        self.sources_per_target = sources_per_target
        self.sources = Sources(source, dataset, source_sampling, groups, self.seed, collate)
        self.use_coupling(coupling)

    def use_coupling(self, coupling: Coupling) -> None:
        """Pair with this coupling from now on."""
        if self.pairs is not None and coupling != IndependentCoupling():
            raise ValueError(
                f"pairs are served as they are, which is IndependentCoupling() (the default); got {coupling!r}"
            )
        self.coupling = coupling
        if self.stream is not None and coupling.needs_data_set:
            raise ValueError(f"{coupling!r} is fitted to a whole data set; a stream is never whole")
        matched = self.sources.sampling == "matched"
        if matched and coupling.needs_data_set:
            raise ValueError(f"source_sampling='matched' draws for the targets of a batch; {coupling!r} chooses them")
        own = coupling.sources_per_target
        self.times = self.sources_per_target or own or 1
        if self.pairs is not None and self.times > 1:
            raise ValueError(f"a pair has one start: leave sources_per_target out; got {self.times}")
        if coupling.needs_data_set and self.times > 1:
            raise ValueError(f"sources_per_target={self.times} are drawn for each target; {coupling!r} chooses targets")
        as_drawn = matched and self.times == own
        self.may_ignore = coupling.ignores_conditions and not as_drawn
        if self.may_ignore and (self.sources.have_conditions or matched):
            self._say_ignored("groups" if matched and not self.sources.have_conditions else "conditions")
        if coupling.brings_noise and self.sources.source is not None:
            raise ValueError(f"{coupling!r} brings noises of its own: leave source out")
        self.whole = self.load_whole() if coupling.needs_data_set else None  # that chooses among all points
        own_noise: Any = coupling
        self.held = -1, own_noise  # the last epoch that noises were exchanged for
        if coupling.brings_noise and self.whole is not None:
            own_noise.check_data_set(*self.whole)

    def _say_ignored(self, what: str) -> None:
        warn(
            f"the source has {what}, which {type(self.coupling).__name__} ignores: it pairs any class with any. "
            "ConditionalOTCoupling pairs within classes",
            UserWarning,
        )

    @property
    def per_epoch(self) -> int:
        """OT batches in an epoch."""
        return self.full + (self.rest > 0)

    def steps_in(self, number: int) -> int:
        """Training batches that OT batch ``number`` is cut into."""
        if number % self.per_epoch < self.full:
            return self.ot_batch_size // self.batch_size
        return -(-self.rest // self.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        """Training batches in an epoch."""
        return self.full * (self.ot_batch_size // self.batch_size) + -(-self.rest // self.batch_size)

    def locate(self, epoch: int, batch: int) -> tuple[int, int]:
        """The OT batch that holds training batch ``batch`` of an epoch, and its position inside it."""
        inside, step = divmod(batch, self.ot_batch_size // self.batch_size)
        return epoch * self.per_epoch + inside, step

    def settings(self) -> dict[str, Any]:
        """Settings that must be unchanged for a saved position to be valid."""
        return {
            "samples": self.size,
            "batch_size": self.batch_size,
            "ot_batch_size": self.ot_batch_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
            "coupling": repr(self.coupling),
            "coupling_scope": self.scope,
            "processes": self.world,
            "source_samples": self.sources.size,
            "source_sampling": self.sources.sampling,
            "sources_per_target": self.times,
            "pairs": None if self.pairs is None else self.pairs.identity,
        }

    def fetch(self, number: int) -> Fetched:
        """This process's samples of an OT batch: all that code of the data sets makes, for one thread at a time."""
        index, x, y, source = self._rows(number), None, None, None
        if self.pairs is not None:
            x0, x, y = self.pairs.rows(index)
            return Fetched(number, x.detach(), detached(y), index, (x0.detach(), None))
        if self.whole is None:
            epoch = number // self.per_epoch
            dataset = self.dataset if self.stream is None else self.stream.stretch(epoch)
            x, y = self._samples(dataset, index, derive_seed(self.seed, "fetch", number, self.rank))
            index = index if self.stream is None else index + epoch * self.size
        if self.sources.are_read:
            n, part, targets = self._share(number, len(index))
            generator = generator_at(self.seed, "noise", number, part)
            source = self.sources.read(n, generator, derive_seed(self.seed, "source", number, part), targets)
        return Fetched(number, x, y, index, source)

    def _samples(self, dataset: Any, index: Tensor, seed: int) -> tuple[Tensor, Any]:
        """Collated samples and conditions."""
        x, y = read(dataset, index, seed, self.collate)
        if not isinstance(x, Tensor):
            raise TypeError(
                "an item of the data set must be a sample or (sample, condition); a batch of them came out as "
                f"{type(x).__name__}. Pass collate, a function of the list of items"
            )
        return floating(x, "samples").detach(), detached(y)  # a worker cannot send what has a history

    def couple(self, fetched: Fetched, device: torch.device) -> CoupledBatch:
        """Noise for fetched samples, and their pairs."""
        number, samples, y, index, _ = fetched
        if samples is None:
            return self._couple_whole(fetched, device)
        x1, y = to_device(samples, device), to_device(y, device)
        x0, y0 = self._source(fetched, x1)
        labels0 = None if self.coupling.ignores_conditions else y0
        together = self.scope == "global"
        generator = generator_at(self.seed, "coupling", number, 0 if together else self.rank, device=device)
        if together and self.world > 1:
            whole = GlobalCoupling(self.coupling, self.group, source="shared")
            pairs = whole(x0, x1, labels0, y, generator=generator, place=self._positions(len(x1))).here()
        else:
            pairs = self.coupling(x0, x1, labels0, y, generator=generator)
        return CoupledBatch.of(pairs, x0, x1, y, index, y0=y0)

    def load_whole(self) -> tuple[Tensor, Any]:
        """The data set as one batch."""
        return self._samples(self.dataset, torch.arange(self.size), derive_seed(self.seed, "fetch"))

    def _couple_whole(self, fetched: Fetched, device: torch.device) -> CoupledBatch:
        """Fresh noise with its points of the whole data set; each process alone, as the potentials are global."""
        if self.whole is None:
            raise RuntimeError("the data set was not loaded")
        if self.whole[0].device != device:
            self.whole = self.whole[0].to(device), to_device(self.whole[1], device)
        data, labels = self.whole
        if self.coupling.brings_noise:
            return self._with_own_noise(fetched, data, labels)
        x0, y0 = self._source(fetched, data)
        generator = generator_at(self.seed, "coupling", fetched.number, self.rank, device=device)
        labels0 = None if self.coupling.ignores_conditions else y0
        pairs = self.coupling(x0, data, labels0, labels, generator=generator)
        return CoupledBatch.of(pairs, x0, data, labels, torch.arange(len(data)), y0=y0)

    def _with_own_noise(self, fetched: Fetched, data: Tensor, labels: Any) -> CoupledBatch:
        """Points with their noises; ``info["held"]`` is what these came from, with its epoch."""
        epoch, rows = fetched.number // self.per_epoch, fetched.rows.to(data.device)
        self.held = epoch, self._at_epoch(epoch, data, labels)
        x0 = self.held[1].noises(rows, epoch).to(data.dtype)
        x1 = data[rows]
        cost = float((x0.double() - x1.double()).square().flatten(1).sum(1).mean())
        info = {"transport_cost": cost, "held": self.held}
        return CoupledBatch(x0, x1, select(labels, rows), index=fetched.rows, info=info)

    def _at_epoch(self, epoch: int, data: Tensor, labels: Any) -> Any:
        """The coupling with the noises of an epoch, which follow from those of the epoch before and its OT batches.

        Batches of one epoch share no point, so what one exchanges does not matter to the others, and every process
        finds by itself what all of them exchange.
        """
        held, coupling = self.held
        if held > epoch:
            held, coupling = -1, self.coupling
        if coupling.refresh:  # the noises before do not matter
            held = max(held, epoch - epoch % coupling.refresh - 1)
        for number in range(held + 1, epoch + 1):
            coupling = coupling.at_epoch(number, data, labels, *self._groups(number))
        return coupling

    def _groups(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Positions that an epoch serves, and which are coupled together."""
        rows, groups = [], []
        for number in range(epoch * self.per_epoch, (epoch + 1) * self.per_epoch):
            own = self._rows(number, every_rank=True)
            share = self.batch_size if len(own) == self.world * self.ot_batch_size else self.rest
            rank = torch.arange(len(own)) // share % self.world
            rows.append(own)
            groups.append(number * self.world + rank * (self.scope == "rank"))
        return torch.cat(rows), torch.cat(groups)

    def _share(self, number: int, n: int) -> tuple[int, int, Tensor | None]:
        """Number of sources that this process draws for its n targets, which part they are, and of which targets.

        One global coupling is of sources that one process would draw: every process draws all of them.
        """
        together = self.scope == "global" and self.whole is None
        targets = None
        if self.sources.sampling == "matched":
            targets = self._rows(number, together).repeat_interleave(self.times)
        n = n * self.times
        return (n * self.world, 0, targets) if together else (n, self.rank, targets)

    def _source(self, fetched: Fetched, like: Tensor) -> tuple[Tensor, Any]:
        """Source samples of an OT batch and their conditions, where the targets are."""
        n, part, targets = self._share(fetched.number, len(fetched.rows))
        if fetched.source is not None:
            return self.sources.fitted(fetched.source, n, like)
        generator = generator_at(self.seed, "noise", fetched.number, part, device=like.device)
        x0, y0 = self.sources.fitted(self.sources.draw(n, like, generator, targets), n, like)
        if y0 is not None and self.may_ignore:
            self._say_ignored("conditions")
        return x0, y0

    def _rows(self, number: int, every_rank: bool = False) -> Tensor:
        """Positions in the data set of this process's part of an OT batch, or of all of it."""
        epoch, inside = divmod(number, self.per_epoch)
        order = _order(self.size, self.seed, epoch) if self.shuffle else torch.arange(self.size)
        begin = inside * self.world * self.ot_batch_size
        if inside < self.full:
            rows = order[begin : begin + self.world * self.ot_batch_size].clone()  # the order is kept
            if every_rank:
                return rows
            return rows.reshape(-1, self.world, self.batch_size)[:, self.rank].flatten()
        rows = order[begin:][: self.world * self.rest].clone()
        return rows if every_rank else rows.reshape(self.world, self.rest)[self.rank]

    def _positions(self, size: int) -> Tensor:
        """Positions of this process's rows in the whole OT batch, in the order that a single process would have."""
        positions = torch.arange(size * self.world)
        if size != self.ot_batch_size:
            return positions.reshape(self.world, size)[self.rank]
        return positions.reshape(-1, self.world, self.batch_size)[:, self.rank].flatten()


@lru_cache(maxsize=2)
def _order(size: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(size, generator=generator_at(seed, "order", epoch))
