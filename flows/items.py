"""Samples and conditions of map-style data sets: read by position and collated, equal in every thread and process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from flows.datasets.images import ImageData, image_tensor
from flows.seeds import seeded
from mbot.conditions import as_tensor

Collate = Callable[[list[Any]], Any]


@dataclass(frozen=True)
class Columns:
    """A collate for rows that are dicts: the columns that hold samples and conditions.

    Args:
        sample: name of one column.
        condition: name of another, or None.
    """

    sample: str
    condition: str | None = None

    @classmethod
    def named(cls, columns: Any, collate: Collate | None = None) -> Columns:
        """From ``"image"`` or ``("image", "label")``."""
        if collate is not None:
            raise ValueError("columns name samples and conditions for torch's default collate: give one of the two")
        names = tuple(columns) if isinstance(columns, (tuple, list)) else (columns,)
        if not 1 <= len(names) <= 2 or not all(isinstance(name, str) for name in names):
            raise TypeError(f"columns must name the samples, or samples and conditions: 'image', ('image', 'label'); "
                            f"got {columns!r}")  # fmt: skip
        return cls(*names)

    def __call__(self, items: list[Any]) -> Any:
        """Samples, or ``(samples, conditions)``."""
        return _collate([self._of(item) for item in items])

    def conditions(self, dataset: Any) -> Any:
        """Of all rows; without reading their samples, where a data set serves columns."""
        if self.condition in getattr(dataset, "column_names", ()):
            return list(dataset[self.condition])
        return [self._of(dataset[row])[1] for row in range(len(dataset))]

    def _of(self, item: Any) -> Any:
        if not isinstance(item, Mapping):
            raise TypeError(f"columns={self.sample!r} … are of rows that are dicts; got {type(item).__name__}")
        missing = [name for name in (self.sample, self.condition) if name is not None and name not in item]
        if missing:
            raise ValueError(f"the rows have no column {', '.join(missing)}; they have {', '.join(map(str, item))}")
        return item[self.sample] if self.condition is None else (item[self.sample], item[self.condition])


def read(dataset: Any, index: Tensor, seed: int, collate: Collate | None = None) -> tuple[Any, Any]:
    """Collated samples and their conditions (or None); the global generators are seeded while the user's code runs."""
    rows = index.tolist()
    with seeded(seed):
        served = _served_by(dataset)
        if served in (TensorDataset, ImageData) and collate is None:
            return parts(dataset[index] if served is TensorDataset else dataset.rows(index))
        many = served is not None and "__getitems__" in vars(served)
        items = dataset.__getitems__(rows) if many else [dataset[row] for row in rows]
    if collate is not None:
        return parts(collate(items))
    with torch.no_grad():  # a worker stacks into shared memory, which autograd refuses
        return parts(_collate(items))


def parts(batch: Any) -> tuple[Any, Any]:
    """Samples and conditions (or None)."""
    x, y = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)
    return (x[0] if isinstance(x, (tuple, list)) and len(x) == 1 else x), y


def has_conditions(dataset: Any, seed: int, collate: Collate | None = None) -> bool:
    """Whether something is a data set whose items are ``(sample, condition)``; its first item is read."""
    if callable(dataset) or isinstance(dataset, Tensor) or not hasattr(dataset, "__len__"):
        return False
    return read(dataset, torch.tensor([0]), seed, collate)[1] is not None


def all_conditions(dataset: Any, seed: int, collate: Collate | None = None) -> Any:
    """The conditions of all items, read as in `read`; without their samples, where a data set keeps them apart."""
    with seeded(seed):
        return _all_conditions(dataset, collate)


def _all_conditions(dataset: Any, collate: Collate | None) -> Any:
    if isinstance(collate, Columns):
        return collate.conditions(dataset)
    served = _served_by(dataset)
    if served is TensorDataset:
        return dataset.tensors[1]
    if served is ImageData:
        return dataset.labels
    conditions = [dataset[row][1] for row in range(len(dataset))]
    return _collate_conditions(conditions) if isinstance(conditions[0], Mapping) else conditions


def floating(x: Tensor, what: str) -> Tensor:
    """Samples that are numbers to compute with."""
    if x.is_floating_point():
        return x
    raise TypeError(
        f"{what} must be floating point; got {x.dtype}. Convert them in the data set's transform (images: to float in "
        "[-1, 1])"
    )


def _served_by(dataset: Any) -> type | None:
    """The class whose method reads samples; a subclass with its own ``__getitem__`` is read item by item."""
    for kind in type(dataset).__mro__:
        if "__getitem__" in vars(kind) or "__getitems__" in vars(kind):
            return kind
    return None


def _collate(items: list[Any]) -> Any:
    """Torch's default, but for conditions that it takes apart or refuses: rows in a tuple or list, and None."""
    if isinstance(items[0], Mapping):
        raise TypeError(
            f"the rows of the data set are dicts with {', '.join(map(str, items[0]))}: name the columns of samples and "
            "conditions, columns=('image', 'label')"
        )
    if not all(isinstance(item, (tuple, list)) and len(item) == 2 for item in items):
        return _stack(items)
    x, y = zip(*items, strict=True)
    return _stack(list(x)), _collate_conditions(list(y))


def _stack(samples: list[Any]) -> Any:
    """Torch's default, and images of PIL as tensors."""
    if all(type(sample).__module__.startswith("PIL.") for sample in samples):
        samples = [image_tensor(sample) for sample in samples]
        shapes = sorted({tuple(sample.shape) for sample in samples})
        if len(shapes) > 1:
            raise ValueError(
                f"images of the data set differ in shape (channels, rows, columns): {', '.join(map(str, shapes[:3]))}; "
                "make them equal in its transform"
            )
    return default_collate(samples)


def _collate_conditions(values: list[Any]) -> Any:
    if isinstance(values[0], Mapping):
        return {key: _collate_conditions([value[key] for value in values]) for key in values[0]}
    if any(value is None for value in values):
        return values
    if isinstance(values[0], (tuple, list)):
        return as_tensor(values, "the data set's conditions")
    try:
        return default_collate(values)
    except RuntimeError as error:
        raise ValueError(f"the data set's conditions do not stack; pass collate, or pad them: {error}") from error
