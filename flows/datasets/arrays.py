"""Arrays from NumPy's files and tables of text, and time series of cell populations."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from flows.datasets.images import ImageData
from mbot import checks


def load_arrays(path: str | Path, *, x: str = "auto", y: str | None = "auto") -> TensorDataset | ImageData:
    """Samples, and conditions where there are some, from a ``.npy``, ``.npz``, ``.csv`` or ``.tsv`` file.

    Integer and text conditions ``(N,)`` become int64 labels (texts in alphabetical order), others float32 vectors.
    Images of bytes, ``(N, H, W)``, ``(N, H, W, C)`` or ``(N, C, H, W)`` with 1 or 3 channels, become `ImageData`; all
    else becomes float32.

    Args:
        path: the file. Pickled objects are refused. A table of text has a line of names first; without one, all its
            columns are samples.
        x: key of the samples in an ``.npz`` file, or names of columns of a table, with commas between them. ``"auto"``:
            ``"x"`` (or ``"x_train"``), or all columns of the table but ``y``.
        y: key or column of the conditions; None to leave them. ``"auto"``: ``"y"`` (or ``"y_train"``) where an ``.npz``
            file has it, and no column of a table.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, no such key, no numbers, NaN, or unequal lengths.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no array file at {path}")
    if path.suffix.lower() in (".csv", ".tsv"):
        samples, conditions = _table(path, x, y)
    else:
        samples, conditions = _arrays(path, x, y)
    if samples.dtype.kind not in "buif" or samples.ndim < 2 or not len(samples):
        raise ValueError(f"samples must be numbers of shape (N, d…); got {samples.dtype} of shape {samples.shape}")
    if conditions is not None and len(conditions) != len(samples):
        raise ValueError(f"{path} holds {len(samples)} samples and {len(conditions)} conditions")
    if conditions is not None and conditions.dtype.kind in "US":
        conditions = np.unique(conditions, return_inverse=True)[1].reshape(conditions.shape)
    given = None if conditions is None else torch.from_numpy(conditions)
    if given is not None:
        if not given.is_floating_point() and given.ndim != 1:
            raise ValueError(
                f"integer conditions are labels of shape (N,); {path} holds {given.dtype} of shape "
                f"{tuple(given.shape)}. Save vectors as floating point"
            )
        given = given.float() if given.is_floating_point() else given.long()
    if samples.dtype == np.uint8 and (samples.ndim == 3 or (samples.ndim == 4 and {1, 3} & {*samples.shape[1::2]})):
        return ImageData(_channels_first(samples), given)
    tensor = torch.from_numpy(np.ascontiguousarray(samples)).float()
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"the samples of {path} must be finite; some are NaN or infinite")
    return TensorDataset(tensor) if given is None else TensorDataset(tensor, given)


def _arrays(path: Path, x: str, y: str | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Samples and conditions of NumPy's files."""
    try:
        loaded = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(
            f"{path} is no .npy or .npz file of plain arrays (pickled objects are not loaded). Tables are read from "
            ".csv and .tsv files; save other kinds by numpy.savez(path, x=samples, y=labels)"
        ) from error
    if isinstance(loaded, np.ndarray):
        return loaded, None
    keys = loaded.files
    names = ["x" if x == "auto" else x, "y" if y == "auto" else y]
    found, labels = (next((key for key in (name, f"{name}_train") if key in keys), None) for name in names)
    for key, given, flag in ((found, x, "--samples-key"), (labels, None if y == "auto" else y, "--labels-key")):
        if key is None and given is not None:
            what = "x" if given == "auto" else given
            raise ValueError(f"{path} holds the keys {keys}, not {what!r}; say which one it is: {flag} KEY")
    try:
        return loaded[found], None if y is None or labels is None else loaded[labels]
    except ValueError as error:
        raise ValueError(f"{path} holds pickled objects, which are not loaded: save plain numbers") from error


def _table(path: Path, x: str, y: str | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Samples ``(N, d)`` and conditions ``(N,)`` of a table of text, by the names of its columns."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [
                line for line in csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",") if line
            ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no table of text in UTF-8 ({error})") from error
    if not lines:
        raise ValueError(f"{path} is empty")
    named = any(_number(word) is None for word in lines[0])
    names = [word.strip() for word in lines[0]] if named else [str(i) for i in range(len(lines[0]))]
    ragged = next((i for i, line in enumerate(lines) if len(line) != len(names)), None)
    if ragged is not None:
        raise ValueError(f"{path} has {len(names)} columns; line {ragged + 1} of its rows has {len(lines[ragged])}")
    if len(lines) == named or len(set(names)) < len(names):
        raise ValueError(f"{path} must have rows below its names, which must differ; got {names}")
    columns = dict(zip(names, zip(*lines[named:], strict=True), strict=True))
    y = None if y == "auto" else y
    wanted = [name for name in names if name != y] if x == "auto" else [name.strip() for name in x.split(",")]
    unknown = [name for name in (*wanted, *(() if y is None else (y,))) if name not in names]
    if unknown:
        raise ValueError(f"{path} has the columns {names}, not {unknown} (--samples-key, --labels-key)")
    values: dict[str, list[float | None]] = {name: [_number(word) for word in columns[name]] for name in wanted}
    for name, found in values.items():
        if None in found:
            row = found.index(None)
            raise ValueError(
                f"column {name!r} of {path} holds {columns[name][row]!r}, which is no number, in row {row + 1} of the "
                f"samples: --labels-key {name} takes it as labels, --samples-key names the columns to learn"
            )
    samples = np.array(list(values.values()), np.float64).T
    if y is None:
        return samples, None
    words = [word.strip() for word in columns[y]]
    try:
        return samples, np.array([int(_without_underscores(word)) for word in words])
    except ValueError:
        numbers = [_number(word) for word in words]
        return samples, np.array(words if None in numbers else numbers)


def _number(word: str) -> float | None:
    try:
        return float(_without_underscores(word))
    except ValueError:
        return None


def _without_underscores(word: str) -> str:
    """A word that Python may read as a number; 1_2, which it would read as 12, is a name."""
    if "_" in word:
        raise ValueError(word)
    return word


def _channels_first(images: np.ndarray) -> Tensor:
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(images))


@dataclass(frozen=True, eq=False)
class CellSeries:
    """Snapshots of a cell population at several times: the same process, other cells at each time.

    Attributes:
        x: ``(N, d)`` float32 coordinates, such as principal components.
        t: ``(N,)`` int64 index of the time, 0 … T - 1.
    """

    x: Tensor
    t: Tensor

    @classmethod
    def load(cls, path: str | Path, *, dims: int | None = None, whiten: bool = False) -> CellSeries:
        """From an ``.npz`` file with ``x`` ``(N, d)`` and times ``t`` ``(N,)`` (or ``pcs`` and ``sample_labels``).

        Args:
            path: the file.
            dims: leading coordinates to keep; None for all.
            whiten: centre and scale each coordinate to unit deviation, as the published protocol does.

        Raises:
            FileNotFoundError: no such file.
            ValueError: other arrays, NaN, fewer coordinates than ``dims``, or one without deviation to whiten.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no single-cell file at {path}")
        with np.load(path, allow_pickle=False) as file:
            names = [(a, b) for a, b in (("x", "t"), ("pcs", "sample_labels")) if a in file.files and b in file.files]
            if not names:
                raise ValueError(f"{path} holds {file.files}; it must hold x (N, d) and t (N,)")
            points, times = file[names[0][0]], file[names[0][1]]
        if points.ndim != 2 or times.shape != (len(points),):
            raise ValueError(f"x must be (N, d) and t (N,); got {points.shape} and {times.shape}")
        if dims is not None and checks.count(dims, "dims") > points.shape[1]:
            raise ValueError(f"dims must be at most the {points.shape[1]} coordinates of {path}; got {dims}")
        x = torch.from_numpy(points[:, :dims].astype(np.float32))
        if not bool(x.isfinite().all()):
            raise ValueError(f"the coordinates in {path} must be finite; some are NaN or infinite")
        if whiten:
            deviation = x.std(0)
            if not bool((deviation > 0).all()):
                column = int((~(deviation > 0)).nonzero()[0])
                raise ValueError(f"coordinate {column} of {path} has no deviation: it cannot be whitened")
            x = (x - x.mean(0)) / deviation
        return cls(x, torch.from_numpy(np.unique(times, return_inverse=True)[1].reshape(-1)).long())

    @property
    def times(self) -> int:
        """Number of times."""
        return int(self.t.max()) + 1

    def at(self, time: int) -> Tensor:
        """The cells of one time, ``(n, d)``."""
        if not 0 <= time < self.times:
            raise ValueError(f"time must lie in 0 … {self.times - 1}; got {time}")
        return self.x[self.t == time]

    def leave_out(self, time: int) -> tuple[list[tuple[int, int]], Tensor]:
        """The protocol of Tong et al. (2024): train on steps between kept neighbours, predict the left-out time.

        Args:
            time: an inner time.

        Returns:
            The intervals to train on, as pairs of times (the one around ``time`` spans it), and the left-out cells.
        """
        if not 0 < time < self.times - 1:
            raise ValueError(f"an inner time can be left out, 1 … {self.times - 2}; got {time}")
        kept = [other for other in range(self.times) if other != time]
        return list(pairwise(kept)), self.at(time)
