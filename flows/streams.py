"""Iterable data sets, read in stretches: each is held in memory, shuffled, and served as one epoch."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from os import PathLike
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from flows.seeds import derive_seed, seeded
from mbot import checks


def as_stream(dataset: Any, buffer: int, multiple: int, seed: int) -> Stream | None:
    """An iterable data set as a stream; None for a map-style one.

    Args:
        dataset: either.
        buffer: items of a stretch, at least.
        multiple: their number is a multiple of it.
        seed: see `Stream`.

    Raises:
        TypeError: neither, an iterator, which can be read once, a DataLoader of batches, or a path.
    """
    if isinstance(dataset, DataLoader) and dataset.batch_sampler is not None:
        raise TypeError("dataset must hold single samples; got a DataLoader, which serves batches: give its .dataset")
    if isinstance(dataset, (str, PathLike)):
        raise TypeError(
            f"dataset must hold samples; got the path {str(dataset)!r}: read it by flows.datasets.load_arrays or "
            "flows.datasets.ImageFolder"
        )
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset):
        return None
    if isinstance(dataset, Iterator) or not hasattr(dataset, "__iter__"):
        raise TypeError(
            "dataset must be map-style (with __len__ and __getitem__) or an iterable that can be read again and again; "
            f"got {type(dataset).__name__}. Wrap tensors in torch.utils.data.TensorDataset"
        )
    return Stream(dataset, -(-checks.count(buffer, "shuffle_buffer") // multiple) * multiple, seed)


class Stream:
    """The items of an iterable, in stretches of ``size``; after its end it begins again.

    Stretches are read in order and kept until `forget`. Where the iterable has ``state_dict`` and ``load_state_dict``,
    a stream goes on from its own `state`. States are copied: an iterable may hand out the one that it goes on changing.

    Args:
        iterable: an object that can be iterated again and again; where it has ``set_epoch``, it is told each pass.
        size: items of a stretch.
        seed: of the global generators while items are read (random transforms).
    """

    def __init__(self, iterable: Any, size: int, seed: int) -> None:
        self.iterable, self.size, self.seed = iterable, size, seed
        self.resumable = hasattr(iterable, "state_dict") and hasattr(iterable, "load_state_dict")
        self.passes, self._next = 0, 0
        self._iterator: Iterator[Any] | None = None
        self._stretches: dict[int, list[Any]] = {}
        self._states: dict[int, Any] = {0: self._now()}

    def __len__(self) -> int:
        return self.size

    def stretch(self, number: int) -> list[Any]:
        """The items of a stretch; those before it are read first."""
        while self._next <= number:
            with seeded(derive_seed(self.seed, "stretch", self._next)):
                self._stretches[self._next] = [self._item() for _ in range(self.size)]
            self._next += 1
            self._states[self._next] = self._now()
        if number not in self._stretches:
            raise ValueError(
                f"a stream goes forward only: stretch {number} is gone. Build the loader anew, and resume from a state"
            )
        return self._stretches[number]

    def forget(self, before: int) -> None:
        """Free the stretches before one."""
        for kept in (self._stretches, self._states):
            for number in [number for number in kept if number < before]:
                del kept[number]

    def state(self, number: int) -> dict[str, Any]:
        """The beginning of a stretch; ``stream`` is the iterable's own state, or None."""
        passes, stream = self._states[number]
        return {"passes": passes, "stream": copy.deepcopy(stream)}

    def load_state(self, number: int, state: dict[str, Any]) -> None:
        """Go to the beginning of a stretch.

        Raises:
            ValueError: the iterable has no state of its own.
        """
        if not self.resumable or state["stream"] is None:
            raise ValueError(
                "an iterable data set goes on only by a state of its own: give it state_dict() and load_state_dict(), "
                "as those of Hugging Face datasets and of torchdata have"
            )
        self.passes, self._next, self._iterator = int(state["passes"]), number, None
        self._tell_pass()
        self.iterable.load_state_dict(copy.deepcopy(state["stream"]))
        self._stretches, self._states = {}, {number: (self.passes, copy.deepcopy(state["stream"]))}

    def _now(self) -> tuple[int, Any]:
        return self.passes, copy.deepcopy(self.iterable.state_dict()) if self.resumable else None

    def _tell_pass(self) -> None:
        if hasattr(self.iterable, "set_epoch"):
            self.iterable.set_epoch(self.passes)

    def _item(self) -> Any:
        """The next item, of the next pass where one ends."""
        if self._iterator is None:
            self._iterator = iter(self.iterable)
        for item in self._iterator:
            return item
        if self._next == 0 and self.passes == 0:
            raise ValueError(
                f"the stream ended before shuffle_buffer={self.size} items were read, and a stretch would hold some "
                "twice: lower shuffle_buffer, or make a map-style data set of it, such as a list"
            )
        self.passes += 1
        self._tell_pass()
        self._iterator = iter(self.iterable)
        for item in self._iterator:
            return item
        raise ValueError("the stream cannot be read a second time: its iterable gave nothing")
