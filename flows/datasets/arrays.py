"""Arrays from ``.npy`` and ``.npz`` files, and time series of cell populations."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from flows.datasets.images import ImageData


def load_arrays(path: str | Path, *, x: str = "x", y: str | None = "y") -> TensorDataset | ImageData:
    """Samples, and conditions where there are some, from a ``.npy`` or ``.npz`` file.

    Integer conditions ``(N,)`` become int64 labels, others float32 vectors. Images of bytes, ``(N, H, W)``,
    ``(N, H, W, C)`` or ``(N, C, H, W)`` with 1 or 3 channels, become `ImageData`; all else becomes float32.

    Args:
        path: the file. Pickled objects are refused.
        x: key of the samples in an ``.npz`` file (``"x_train"`` is found too).
        y: key of the conditions; None to leave them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such key, no numbers, NaN, or unequal lengths.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no array file at {path}")
    try:
        loaded = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{path} is not a plain .npy or .npz file ({error})") from error
    if isinstance(loaded, np.ndarray):
        samples, conditions = loaded, None
    else:
        keys = loaded.files
        found = next((key for key in (x, f"{x}_train") if key in keys), None)
        if found is None:
            raise ValueError(f"{path} holds {keys}, not {x!r}; say which key holds the samples")
        labels = None if y is None else next((key for key in (y, f"{y}_train") if key in keys), None)
        samples, conditions = loaded[found], None if labels is None else loaded[labels]
    if samples.dtype.kind not in "buif" or samples.ndim < 2 or not len(samples):
        raise ValueError(f"samples must be numbers of shape (N, d…); got {samples.dtype} of shape {samples.shape}")
    if conditions is not None and len(conditions) != len(samples):
        raise ValueError(f"{path} holds {len(samples)} samples and {len(conditions)} conditions")
    given = None if conditions is None else torch.from_numpy(conditions)
    if given is not None:
        if not given.is_floating_point() and given.ndim != 1:
            raise ValueError(
                f"integer conditions are labels of shape (N,); {path} holds {conditions.dtype} of shape "  # type: ignore[union-attr]
                f"{tuple(given.shape)}. Save vectors as floating point"
            )
        given = given.float() if given.is_floating_point() else given.long()
    if samples.dtype == np.uint8 and samples.ndim in (3, 4):
        return ImageData(_channels_first(samples), given)
    tensor = torch.from_numpy(np.ascontiguousarray(samples)).float()
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"the samples of {path} must be finite; some are NaN or infinite")
    return TensorDataset(tensor) if given is None else TensorDataset(tensor, given)


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
            dims: leading coordinates to keep.
            whiten: centre and scale each coordinate to unit deviation, as the published protocol does.
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
        x = torch.from_numpy(points[:, :dims].astype(np.float32))
        if not bool(x.isfinite().all()):
            raise ValueError(f"the coordinates in {path} must be finite; some are NaN or infinite")
        if whiten:
            x = (x - x.mean(0)) / x.std(0)
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
