"""Feeding a trainer: large couplings solved in the background, cut into training batches.

One OT batch of ``b`` samples is coupled once and served as ``b / b_n`` training batches (the oversampling of Cheng and
Schwing 2025, arXiv 2503.10636). Everything random in OT batch ``g`` is a function of the seed and of ``g``: the batches
do not depend on the number of workers, and a run can resume at any of them.
"""

from __future__ import annotations

import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import count, pairwise
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from flows.checkpoint import differences
from flows.items import Columns
from flows.matching import CoupledBatch
from flows.ot_batches import Fetched, OTBatches
from flows.reflow import AnnealingReflow
from flows.seeds import generator_at
from flows.sources import Source
from mbot import Coupling, checks, convergence
from mbot.conditions import Labels


class CoupledLoader:
    """Batches of coupled noise and data from any data set, coupled ahead of the training step.

    Iterating yields the `CoupledBatch`es of one epoch (the rest of it after an interruption or `load_state_dict`);
    iterate again for the next. Each sample appears at most once an epoch. No gradients reach what samples were made of.

    With ``num_workers=0`` samples are fetched in the calling thread and coupled in a background thread (mbot's solvers
    release the interpreter lock); with workers, processes fetch and couple. With a ``device`` other than the CPU,
    data are copied there once, noise is drawn there, and the background thread couples there. The batches are the same
    for every ``num_workers`` and ``prefetch``; noise drawn on another kind of device differs.

    A coupling that needs the whole data set (`mbot.SemidiscreteCoupling`, fitted to just these samples) pairs each
    noise with one of its points: these come equally often on average, not once an epoch. The data set is loaded once.
    One that brings noises of its own (`mbot.DataCoupling`, likewise) gives each sample its noise, once an epoch; each
    process exchanges noises for all, so all hold the same on equal processors.

    Pairs of a model (`flows.PairedDataset`, or `flows.AnnealingReflow` over one) are served as they are, each once an
    epoch; source, coupling and collate are left out.

    An iterable data set is read in stretches of ``shuffle_buffer`` samples, each an epoch, in the calling thread and by
    every process alike (do not split it). It goes on from a saved state by a state of its own, ``state_dict()`` and
    ``load_state_dict()``, which those of Hugging Face datasets and torchdata have; others are refused then.

    Args:
        dataset: map-style or iterable; an item is a sample, ``(sample, condition)``, or a dict with ``columns``.
            Samples are arrays or tensors of floating point and one shape, or images of PIL, which become tensors in
            [-1, 1]; conditions are numbers, strings, arrays, or dicts of them.
        source: where flows start: None for standard normal noise of the data's shape, a callable
            ``source(n, generator)`` that returns ``(n, d…)`` or that and conditions, a tensor ``(N, d…)``, or a
            map-style data set of samples or ``(sample, condition)``.
        coupling: how noise and data are paired; None leaves it to the path that a `flows.Trainer` is given, and is
            independent pairs until then.
        batch_size: pairs in a training batch (of one process).
        ot_batch_size: pairs coupled at once, a multiple of ``batch_size``; None for ``batch_size``.
        num_workers: worker processes; 0 for a background thread.
        seed: of order, noise, couplings and of the global generators while a sample is fetched (random transforms).
        shuffle: a fresh order each epoch.
        drop_last: leave out the rest of an epoch that does not fill an OT batch; otherwise it is coupled by itself.
        prefetch: OT batches prepared ahead (by each worker).
        device: where batches are wanted; None for the CPU.
        collate: turns a list of items into samples or ``(samples, conditions)``; None for torch's default.
        columns: of data sets whose items are dicts: the names of samples, or of samples and conditions, such as
            ``("image", "label")``; of ``source`` as well. Excludes ``collate``.
        shuffle_buffer: samples of a stretch of an iterable data set, rounded up to whole OT batches.
        coupling_scope: under ``torch.distributed``: ``"rank"`` couples each process's batch by itself, ``"global"``
            is one coupling of the samples of all processes (see `mbot.distributed.GlobalCoupling`), and each gets the
            partners of its samples.
        source_sampling: which source samples an OT batch gets. ``"independent"``: any, each as often as any other.
            ``"matched"``: for each target one of its class, so that rare classes never lack sources and class counts
            agree; classes then come as often as among the targets, and within a class each source as often as any
            other. Neither takes a sample twice in an OT batch while there are enough.
        groups: with ``"matched"``: groups of all source samples and of all samples, used instead of conditions
            (control cells of the same cell line, say). Without them conditions are read once from the two data sets.
        sources_per_target: source samples drawn for each target of an OT batch, of which its partner is one. None for
            as many as the coupling chooses among: k of `mbot.NearestNoiseCoupling`, else 1. Transport of more sources
            than targets takes its share of each, and a pair's source is drawn from its column.
        timeout: seconds that a process waits for the others in a global coupling; if one is lost, an error follows.
        multiprocessing_context: start method of the workers (None: the platform's).

    Raises:
        TypeError: an unsuitable data set, source or coupling; samples that are not floating point.
        ValueError: sizes that do not fit: ``ot_batch_size`` no multiple of ``batch_size``, fewer samples than one OT
            batch.
        WorkerDied: (iterating) a worker process died; the position is kept.

    >>> data = torch.utils.data.TensorDataset(torch.randn(64, 2))
    >>> loader = CoupledLoader(data, None, mbot.OTCoupling(), batch_size=8, ot_batch_size=32)
    >>> len(loader), sum(len(batch) for batch in loader)
    (8, 64)
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        source: Source = None,
        coupling: Coupling | None = None,
        batch_size: int = 128,
        ot_batch_size: int | None = None,
        num_workers: int = 0,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        prefetch: int = 2,
        device: torch.device | str | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        columns: str | Sequence[str] | None = None,
        shuffle_buffer: int = 4096,
        coupling_scope: str = "rank",
        source_sampling: str = "independent",
        groups: tuple[Labels, Labels] | None = None,
        sources_per_target: int | None = None,
        timeout: float = 1800.0,
        multiprocessing_context: str | None = None,
    ) -> None:
        self.num_workers = checks.count(num_workers, "num_workers", at_least=0)
        self.prefetch = checks.count(prefetch, "prefetch")
        self.device = torch.device("cpu" if device is None else device)
        self.annealing = dataset if isinstance(dataset, AnnealingReflow) else None
        self.batches = OTBatches(
            dataset if self.annealing is None else self.annealing.pairs,
            source,
            coupling,
            batch_size,
            batch_size if ot_batch_size is None else ot_batch_size,
            seed=seed,
            shuffle=shuffle,
            drop_last=drop_last,
            collate=collate if columns is None else Columns.named(columns, collate),
            shuffle_buffer=checks.count(shuffle_buffer, "shuffle_buffer"),
            scope=coupling_scope,
            timeout=timeout,
            source_sampling=source_sampling,
            groups=groups,
            sources_per_target=sources_per_target,
        )
        self.stream = self.batches.stream
        if self.stream is not None and num_workers:
            raise ValueError("an iterable data set is read by one thread: leave num_workers out")
        self.given_coupling = coupling
        self.multiprocessing_context = multiprocessing_context
        self.epoch = 0
        self.wait_seconds = 0.0
        self._batch = 0
        self._served: tuple[int, list[CoupledBatch]] | None = None
        self._stream: Generator[CoupledBatch, None, None] | None = None
        self._next_number = -1
        self._told: set[str] = set()
        self._held = self.batches.held

    @property
    def coupling(self) -> Coupling:
        """The coupling that pairs the batches."""
        return self.batches.coupling

    def use_coupling(self, coupling: Coupling) -> None:
        """Pair with this coupling from the next OT batch on."""
        if coupling != self.coupling:
            self.close()
            self.batches.use_coupling(coupling)
            self._held = self.batches.held

    @property
    def batch_size(self) -> int:
        """Pairs in a training batch."""
        return self.batches.batch_size

    def __len__(self) -> int:
        """Training batches in an epoch."""
        return self.batches.steps_per_epoch

    def __iter__(self) -> Iterator[CoupledBatch]:
        epoch = self.epoch
        while self.epoch == epoch:
            yield self.next_batch()

    def next_batch(self) -> CoupledBatch:
        """The next training batch, going on to the next epoch where one ends."""
        began = time.perf_counter()
        number, inside = self.batches.locate(self.epoch, self._batch)
        if self._served is None or self._served[0] != number:
            self._served = (number, self._cut(self._take(number), number))
        batch = self._served[1][inside]
        if self.annealing is not None:
            step = self.epoch * len(self) + self._batch
            generator = generator_at(self.batches.seed, "anneal", step, self.batches.rank, device=batch.x1.device)
            batch = self.annealing.anneal(batch, step, generator)
        self._batch += 1
        if self._batch == len(self):
            self.epoch, self._batch = self.epoch + 1, 0
            if self.stream is not None:
                self.stream.forget(self.epoch)
        self.wait_seconds += time.perf_counter() - began
        return batch

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch."""
        if self.stream is not None:
            raise ValueError("a stream has no epochs to go to; load_state_dict goes on from a state")
        self.epoch, self._batch = checks.count(epoch, "epoch", at_least=0), 0
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Position and settings, and the noises of a coupling that brings its own; all else follows from the seed."""
        state = {"epoch": self.epoch, "batch": self._batch, "settings": self._settings()}
        if self.coupling.brings_noise:
            state["noises"] = {"epoch": self._held[0], "coupling": self._held[1].state_dict()}
        if self.stream is not None:
            state["stream"] = self.stream.state(self.epoch)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            ValueError: the state belongs to other settings (data size, batch sizes, seed, coupling, processes); or an
                iterable data set has no state of its own.
        """
        differ = differences({"pairs": None, "annealing": "None"} | state["settings"], self._settings())
        if differ:
            raise ValueError(f"this loader cannot go on from that state; they differ in {differ}")
        self.close()
        if self.stream is not None:
            self.stream.load_state(int(state["epoch"]), state["stream"])
        self.epoch, self._batch = int(state["epoch"]), int(state["batch"])
        if self.coupling.brings_noise:
            noises: Any = state["noises"]
            coupling: Any = self.coupling
            self._held = int(noises["epoch"]), coupling.load_state_dict(noises["coupling"])

    def _settings(self) -> dict[str, Any]:
        return {**self.batches.settings(), "annealing": repr(self.annealing)}

    def close(self) -> None:
        """Stop the background work; iterating starts it again at the same batch."""
        stream, self._stream, self._served = self._stream, None, None
        if stream is not None:
            stream.close()

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or one in another process, does background work of its own, from the same batch on."""
        return {**self.__dict__, "_stream": None, "_served": None}

    def __del__(self) -> None:
        if getattr(self, "_stream", None) is not None:
            self.close()

    def _take(self, number: int) -> CoupledBatch:
        """OT batch ``number`` of this process, from the running stream where it is the next one there."""
        if self._stream is None or self._next_number != number:
            self.close()
            self.batches.held = self._held  # the stream before may have run ahead
            self._stream = _run(
                self.batches, number, self.device, self.num_workers, self.prefetch, self.multiprocessing_context
            )
            self._next_number = number
        try:
            batch = next(self._stream)
        except BaseException as error:
            self.close()
            if self.num_workers and _is_death(error):
                raise WorkerDied(error) from error
            raise
        self._next_number = number + 1
        self._held = batch.info.pop("held", self._held)
        convergence.tell(batch.info.get("warnings", []), self._told)
        return batch

    def _cut(self, batch: CoupledBatch, number: int) -> list[CoupledBatch]:
        """An OT batch as its training batches; fewer pairs than samples (partial transport) make smaller ones."""
        steps = self.batches.steps_in(number)
        if len(batch) < steps:
            raise ValueError(
                f"{self.coupling!r} kept {len(batch)} pairs of an OT batch that feeds {steps} training steps; keep "
                "more mass, or raise batch_size"
            )
        if -(-len(batch) // self.batch_size) == steps:
            bounds = [min(step * self.batch_size, len(batch)) for step in range(steps + 1)]
        else:
            bounds = [step * len(batch) // steps for step in range(steps + 1)]
        return [batch[begin:end] for begin, end in pairwise(bounds)]


class WorkerDied(RuntimeError):
    """A worker process of a loader died; the loader keeps its position."""

    def __init__(self, reason: BaseException) -> None:
        super().__init__(
            f"a data worker died ({reason}). Often it ran out of memory: lower num_workers, prefetch or ot_batch_size, "
            "or use num_workers=0. Nothing is lost: the loader keeps its position, and training goes on from its last "
            "checkpoint"
        )


def _is_death(error: BaseException) -> bool:
    """Whether an error is how torch, or a broken pipe, tells of a worker's death."""
    said = isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")
    return said or isinstance(error, (ConnectionError, EOFError))


def _unregister_workers(workers: Any) -> None:
    """Report a worker's death when a batch is requested, not from a signal handler in the middle of a step.

    torch watches registered workers from a handler of SIGCHLD, which could interrupt an optimiser step or the writing
    of a checkpoint. Requesting a batch checks the workers too.
    """
    if getattr(workers, "_worker_pids_set", False):
        torch.utils.data._utils.signal_handling._remove_worker_pids(id(workers))
        workers._worker_pids_set = False


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; workers ignore it, so that the current step can be finished."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _couple(batches: OTBatches, fetched: Fetched, device: torch.device) -> CoupledBatch:
    """A coupled OT batch, with its solvers' warnings in ``info``: they are written where the batch is taken."""
    with convergence.deferred() as kept:
        batch = batches.couple(fetched, device)
    return replace(batch, info={**batch.info, "warnings": kept}) if kept else batch


class _Work(Dataset[Any]):
    """Item ``g`` is OT batch ``g``, coupled or only fetched: what a worker process computes."""

    def __init__(self, batches: OTBatches, couple: bool) -> None:
        self.batches, self.couple = batches, couple

    def __getitem__(self, number: int) -> CoupledBatch | Fetched:
        fetched = self.batches.fetch(number)
        return _couple(self.batches, fetched, torch.device("cpu")) if self.couple else fetched


class _From(Sampler[int]):
    """Numbers from ``first`` on, without end."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __iter__(self) -> Iterator[int]:
        return count(self.first)


def _run(
    batches: OTBatches, first: int, device: torch.device, num_workers: int, prefetch: int, context: str | None
) -> Generator[CoupledBatch, None, None]:
    """Coupled OT batches from number ``first`` on, prepared ahead.

    Holds no reference to the loader that iterates it, so that dropping the loader stops the workers at once.
    """
    in_workers = device.type == "cpu" and batches.scope == "rank" and not batches.coupling.brings_noise
    work = _Work(batches, couple=in_workers)
    fetched: Any
    if num_workers:
        fetched = iter(
            DataLoader(
                work,
                batch_size=None,
                sampler=_From(first),
                num_workers=num_workers,
                prefetch_factor=prefetch,
                multiprocessing_context=context,
                pin_memory=device.type == "cuda",
                worker_init_fn=_ignore_interrupts,
                generator=torch.Generator(),  # the default one belongs to the training loop
            )
        )
        _unregister_workers(fetched)
    else:
        fetched = map(batches.fetch, count(first))
    ahead: deque[Future[CoupledBatch]] = deque()
    pool = None if num_workers and in_workers else ThreadPoolExecutor(1, thread_name_prefix="flows-coupling")
    ending = sys.is_finalizing  # when the interpreter ends, modules are gone already, and so is the pool's own
    try:
        if pool is None:
            yield from fetched
        while pool is not None:
            while len(ahead) < prefetch:
                ahead.append(pool.submit(_couple, batches, next(fetched), device))
            yield ahead.popleft().result()
    finally:
        if pool is not None and not ending():
            # A collective that one process has begun must be finished by all, and noises be exchanged by one thread.
            together = batches.scope == "global" or batches.coupling.brings_noise
            pool.shutdown(wait=together, cancel_futures=not together)
        if num_workers:
            # At once, not when the last traceback is dropped: torch watches registered workers by a signal handler.
            fetched._shutdown_workers()
