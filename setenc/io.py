"""Readers of sets that stay on disk: callables that `setenc.encode` takes, with a fresh iterator at every call.

Chunks are ``(1, n, …)`` tensors, one set at a time. They are read in a thread, at most ``prefetch`` chunks
ahead; 0 reads in the caller's thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import torch
from torch import Tensor

from setenc import checks

# Rows [begin, end) of a set, as an array (n, …).
Read = Callable[[int, int], Any]


class Chunks:
    """A set on disk: call it for a fresh iterator over its chunks ``(1, n, …)``, as `setenc.encode` does.

    Args:
        open_set: opens the set, for one iteration: a context manager of a function that reads rows.
        shape: of the whole set, ``(N, …)``.
        chunk_size: elements of a chunk.
        dtype: of the chunks.
        prefetch: chunks that a thread reads ahead; 0 is no thread.
    """

    def __init__(
        self,
        open_set: Callable[[], AbstractContextManager[Read]],
        shape: Sequence[int],
        chunk_size: int,
        dtype: torch.dtype,
        prefetch: int,
    ) -> None:
        self.shape = tuple(shape)
        self.chunk_size = checks.count(chunk_size, "chunk_size")
        self.prefetch = checks.count(prefetch, "prefetch", at_least=0)
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype; got {dtype!r}")
        self._open, self.dtype = open_set, dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"Chunks(shape={self.shape}, chunk_size={self.chunk_size}, dtype={self.dtype})"

    def __call__(self) -> Iterator[Tensor]:
        """A fresh iterator."""
        return _ahead(self._read, self.prefetch) if self.prefetch else self._read()

    def _read(self) -> Iterator[Tensor]:
        with self._open() as read:
            # A set without elements is one chunk without elements.
            for begin in range(0, max(len(self), 1), self.chunk_size):
                end = min(begin + self.chunk_size, len(self))
                rows = np.asarray(read(begin, end))
                if rows.shape != (end - begin, *self.shape[1:]):
                    raise ValueError(
                        f"the set has changed since it was opened: rows {begin} to {end} must be "
                        f"{(end - begin, *self.shape[1:])}; they are {rows.shape}"
                    )
                yield torch.tensor(_native(rows), dtype=self.dtype)[None]


def _native(rows: np.ndarray) -> np.ndarray:
    """In one piece, in the machine's byte order and a dtype that torch has."""
    dtype = np.dtype(np.float64) if rows.dtype == np.longdouble else rows.dtype.newbyteorder("=")
    return np.ascontiguousarray(rows, dtype)


def h5_chunks(
    path: str | Path,
    key: str = "features",
    *,
    coordinates: str | None = None,
    chunk_size: int = 4096,
    dtype: torch.dtype = torch.float32,
    prefetch: int = 2,
) -> Chunks:
    """The rows of a data set ``(N, d)`` in an HDF5 file, the layout of slide features: one bag a file.

    ``setenc.encode(model, h5_chunks("slide.h5", coordinates="coords"), gradient="exact")`` trains on the whole slide.

    Args:
        path: the file.
        key: its data set of features; groups are separated by ``/``.
        coordinates: data set ``(N, c)`` that is set behind the features, as ``(N, d + c)``; None leaves it out.
        chunk_size: elements of a chunk.
        dtype: of the chunks.
        prefetch: chunks that a thread reads ahead.

    Raises:
        ImportError: h5py is missing (extra ``h5``).
        FileNotFoundError: no such file.
        KeyError: no such data set; the message lists those that are there.
        ValueError: no HDF5 file, a data set of another shape, or (while reading) one that changed since.
    """
    h5py = _package("h5py")
    path = _file(path)
    keys = [key] if coordinates is None else [key, coordinates]
    if not all(isinstance(name, str) for name in keys):
        raise TypeError(f"key and coordinates must be names of data sets; got {keys}")
    if not h5py.is_hdf5(path):
        raise ValueError(f"{path} is no HDF5 file")
    with h5py.File(path, "r") as file:
        shapes = [_h5_shape(h5py, file, name, path) for name in keys]
    if len({shape[0] for shape in shapes}) > 1:
        rows = ", ".join(f"{name}: {shape[0]}" for name, shape in zip(keys, shapes, strict=True))
        raise ValueError(f"features and coordinates must have as many rows; got {rows}")

    size, width = shapes[0][0], sum(shape[1] for shape in shapes)
    return Chunks(partial(_h5_rows, h5py, path, keys, size), (size, width), chunk_size, dtype, prefetch)


@contextmanager
def _h5_rows(h5py: Any, path: Path, keys: Sequence[str], size: int) -> Iterator[Read]:
    """Rows of data sets of a file, side by side."""
    with h5py.File(path, "r") as file:
        sets = [file[key] for key in keys]
        if any(len(found) != size for found in sets):
            sizes = ", ".join(str(len(found)) for found in sets)
            raise ValueError(f"the file has changed since it was opened: {size} rows then, {sizes} now")
        yield lambda begin, end: np.concatenate([found[begin:end] for found in sets], 1)


def _h5_shape(h5py: Any, file: Any, key: str, path: Path) -> tuple[int, int]:
    found = file.get(key)
    if not isinstance(found, h5py.Dataset):
        there: list[str] = []
        file.visititems(lambda name, item: there.append(name) if isinstance(item, h5py.Dataset) else None)
        raise KeyError(f"{path} has no data set {key!r}; it has {', '.join(sorted(there)) or 'none'}")
    if len(found.shape) != 2 or found.dtype.kind not in "fiu":
        raise ValueError(f"{key!r} in {path} must be numbers of shape (N, d); got {found.dtype} {found.shape}")
    return found.shape


def memmap_chunks(
    array: str | Path | np.ndarray,
    *,
    chunk_size: int = 4096,
    dtype: torch.dtype = torch.float32,
    prefetch: int = 2,
) -> Chunks:
    """The rows of an array ``(N, …)`` that is mapped into memory: elements may be vectors, images, anything.

    Args:
        array: a ``.npy`` file, an ``np.memmap``, or any array.
        chunk_size: elements of a chunk.
        dtype: of the chunks.
        prefetch: chunks that a thread reads ahead.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an array without rows of features, or one that holds no numbers.

    >>> chunks = memmap_chunks(np.arange(10.0).reshape(5, 2), chunk_size=2)
    >>> [chunk.shape for chunk in chunks()]
    [torch.Size([1, 2, 2]), torch.Size([1, 2, 2]), torch.Size([1, 1, 2])]
    """
    if isinstance(array, str | Path):
        path = _file(array)
        if path.suffix != ".npy":
            raise ValueError(
                f"a file must be .npy; got {path}. For a raw file give np.memmap(path, dtype, 'r', shape=…)"
            )
        array = np.load(path, mmap_mode="r")
    if not isinstance(array, np.ndarray):
        raise TypeError(f"array must be a path or a numpy array; got {type(array).__name__}")
    if array.ndim < 2 or array.dtype.kind not in "fiub":
        raise ValueError(f"array must be numbers of shape (N, …), one row an element; got {array.dtype} {array.shape}")
    rows = array
    return Chunks(lambda: nullcontext(lambda b, e: rows[b:e]), rows.shape, chunk_size, dtype, prefetch)


class AnnDataChunks(Mapping[Any, Chunks]):
    """The cells of each condition of an annotated data matrix as a set: ``chunks[condition]`` is a `Chunks`.

    ``sets = AnnDataChunks("cells.h5ad", by="perturbation", obsm="X_pca")`` and ``setenc.encode(model, sets["drug"])``.

    A file is opened in backed mode: cells are read, and made dense, chunk by chunk.
    Cells without a condition (NaN) belong to no set.

    Args:
        data: an ``.h5ad`` file, or an ``anndata.AnnData``.
        by: column of ``obs`` with the conditions.
        layer: layer to read; None is ``X``.
        obsm: read this entry of ``obsm`` instead, such as ``"X_pca"``.
        chunk_size: cells of a chunk.
        dtype: of the chunks.
        prefetch: chunks that a thread reads ahead.

    Raises:
        ImportError: anndata is missing (extra ``anndata``).
        FileNotFoundError: no such file.
        KeyError: no such column, layer, entry or condition; the message lists those that are there.
    """

    def __init__(
        self,
        data: Any,
        by: str,
        *,
        layer: str | None = None,
        obsm: str | None = None,
        chunk_size: int = 4096,
        dtype: torch.dtype = torch.float32,
        prefetch: int = 2,
    ) -> None:
        anndata = _package("anndata")
        if isinstance(data, str | Path):
            data = anndata.read_h5ad(_file(data), backed="r")
        if not isinstance(data, anndata.AnnData):
            raise TypeError(f"data must be a path or an anndata.AnnData; got {type(data).__name__}")
        if layer is not None and obsm is not None:
            raise ValueError("give layer or obsm, not both")
        _known(by, data.obs.columns, "column of obs")
        if obsm is not None:
            self._matrix = data.obsm[_known(obsm, data.obsm.keys(), "entry of obsm")]
        elif layer is not None:
            self._matrix = data.layers[_known(layer, data.layers.keys(), "layer")]
        else:
            self._matrix = data.X
        if self._matrix is None:
            raise ValueError("the data have no X: name a layer or an entry of obsm")
        if hasattr(self._matrix, "to_numpy"):  # a data frame, whose brackets take columns
            self._matrix = self._matrix.to_numpy()
        if self._matrix.dtype.kind not in "fiub":
            raise ValueError(f"the cells must be numbers; got {self._matrix.dtype}")
        column = data.obs[by]
        present = column.notna().to_numpy()
        values = column.to_numpy()
        self._rows = {c: np.flatnonzero(present & (values == c)) for c in column[present].unique().tolist()}
        self._options = (chunk_size, dtype, prefetch)
        self.by = by

    def __getitem__(self, condition: Any) -> Chunks:
        rows = self._rows[_known(condition, self._rows, f"condition of {self.by!r}")]
        matrix = self._matrix

        def read(begin: int, end: int) -> Any:
            part = matrix[rows[begin:end]]
            return part.toarray() if hasattr(part, "toarray") else part

        return Chunks(lambda: nullcontext(read), (len(rows), *matrix.shape[1:]), *self._options)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def _known(name: Any, names: Any, what: str) -> Any:
    if not isinstance(name, Hashable) or name not in names:
        raise KeyError(f"there is no {what} {name!r}; there are {', '.join(map(repr, names)) or 'none'}")
    return name


def _file(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    return path


def _package(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise ImportError(f"this reader needs {name}: pip install {name}") from error


def _ahead(make: Callable[[], Iterator[Tensor]], depth: int) -> Iterator[Tensor]:
    """Items of ``make``, made in a thread at most ``depth`` items ahead; the iterator raises the thread's errors."""
    done = object()
    queue: Queue[Any] = Queue(depth)
    stop = threading.Event()

    def work() -> None:
        last: Any = done
        try:
            made: Any = make()
            with closing(made) as items:
                for item in items:
                    queue.put((item, None))
                    if stop.is_set():
                        return
        except BaseException as error:
            last = error
        queue.put((done, last))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = queue.get()
            if item is done:
                if error is not done:
                    raise error
                return
            yield item
    finally:
        stop.set()
        while thread.is_alive():
            while not queue.empty():
                queue.get()
            thread.join(0.01)
