"""Pairs of noise and samples made by a model: the data of reflow and distillation (Liu et al. 2022, arXiv 2209.03003).

A start point is solved to its sample once; a student then trains on these fixed pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flows import pair_files
from flows.folder_lock import FolderLock
from flows.guidance import GuidedModel
from flows.integrate import integrate
from flows.interrupt import Interrupted, Signals
from flows.matching import VelocityModel, check_velocity
from flows.seeds import SeededNoise
from mbot import checks
from mbot import conditions as labels


class PairedDataset(Dataset[Any]):
    """A map-style data set of pairs ``(x0, x1)``, or ``(x0, x1, y)`` with conditions.

    `flows.CoupledLoader` serves such pairs as they are: row i of x0 with row i of x1. A slice is such a data set too.

    Args:
        x0: ``(n, d…)`` start points; generated pairs may hold `SeededNoise`, which is drawn again where it is read.
        x1: ``(n, d…)`` their ends.
        y: conditions, one a pair, see `mbot.conditions`.
        info: how they were made, as plain values; `generate_pairs` fills it in.

    Raises:
        TypeError: x0 or x1 that are no tensors of floating point, or of two dtypes.
        ValueError: none at all, or different numbers or shapes.

    >>> pairs = PairedDataset(torch.zeros(4, 2), torch.ones(4, 2), torch.arange(4))
    >>> len(pairs), pairs[3], len(pairs[:2])
    (4, (tensor([0., 0.]), tensor([1., 1.]), tensor(3)), 2)
    """

    def __init__(
        self, x0: Tensor | SeededNoise, x1: Tensor, y: Any = None, *, info: Mapping[str, Any] | None = None
    ) -> None:
        self._x0 = x0 if isinstance(x0, SeededNoise) else checks.floating(x0, "x0")
        self.x1 = checks.floating(x1, "x1")
        if x1.ndim < 2 or not len(x1):
            raise ValueError(f"x1 must have shape (n, d…) with n >= 1; got {tuple(x1.shape)}")
        shape = (len(x0), *x0.shape) if isinstance(x0, SeededNoise) else x0.shape
        if tuple(shape) != tuple(x1.shape):
            raise ValueError(f"x0 and x1 must have the same shape; got {tuple(shape)} and {tuple(x1.shape)}")
        if self._x0.dtype != x1.dtype:
            raise TypeError(f"x0 and x1 must have the same dtype; got {self._x0.dtype} and {x1.dtype}")
        labels.check(y, len(x1), "y", "x1")
        self.y, self.info = y, dict(info or {})
        self._positions = range(len(x1))

    @classmethod
    def load(cls, path: str | Path) -> PairedDataset:
        """The pairs of a folder that `generate_pairs` wrote; x1 stays on disk until it is read.

        Raises:
            ValueError: no pairs there, unfinished or damaged ones, or noise that this release of torch draws
                otherwise.
        """
        x0, x1, y, info = pair_files.read(Path(path))
        return cls(x0, x1, y, info=info)

    def __len__(self) -> int:
        return len(self.x1)

    def __getitem__(self, row: int | slice) -> Any:
        if isinstance(row, slice):
            cut = PairedDataset(self._x0[row], self.x1[row], labels.select(self.y, row), info=self.info)
            cut._positions = self._positions[row]
            return cut
        x0, x1, y = self.rows(torch.tensor([range(len(self))[row]]))
        return (x0[0], x1[0]) if y is None else (x0[0], x1[0], _first(y))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a sample."""
        return tuple(self.x1.shape[1:])

    @property
    def x0(self) -> Tensor:
        """All start points, ``(n, d…)``."""
        return self._x0.at(torch.arange(len(self))) if isinstance(self._x0, SeededNoise) else self._x0

    @property
    def teacher(self) -> str | None:
        """`fingerprint` of the model that made the pairs; None where that is not known."""
        return self.info.get("teacher")

    @cached_property
    def identity(self) -> str:
        """A digest by which a resumed run knows its pairs again."""
        if self.teacher is None:
            return digest(self.info, self.x0, self.x1, self.y)
        some = torch.linspace(0, len(self) - 1, min(64, len(self)), dtype=torch.float64).long()
        return digest(self.info, self._positions, *self.rows(some))

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Start points, ends and conditions (or None) at some positions."""
        x0 = self._x0.at(index) if isinstance(self._x0, SeededNoise) else self._x0[index]
        return x0, self.x1[index], labels.select(self.y, index)


def generate_pairs(
    model: VelocityModel,
    n: int,
    *,
    y: Any = None,
    shape: int | tuple[int, ...] | None = None,
    x0: Tensor | None = None,
    method: str = "dopri5",
    steps: int | None = None,
    rtol: float = 1e-4,
    atol: float = 1e-4,
    seed: int = 0,
    out: str | Path | None = None,
    batch_size: int = 512,
    progress: bool = False,
) -> PairedDataset:
    """Pairs of start points and the samples that a model makes of them.

    The noise of pair i depends on the seed and i alone. Its end depends on the batch too: by rounding with fixed steps,
    and with ``dopri5`` within the tolerance, as a batch shares its step size. Batches begin at multiples of
    ``batch_size``, so a call that is stopped and repeated ends with the pairs of one that was not.

    Args:
        model: ``model(t, x, y) -> velocity``, a module or a callable such as `flows.GuidedModel`. Modules run in eval
            mode, on their device, and are put back as they were; half precision is integrated in float32.
        n: number of pairs.
        y: conditions: one a pair (see `mbot.conditions`), one for all (a number, or a tensor ``(1, …)``), or a function
            of the positions ``(n,)`` that returns one for each.
        shape: of a sample; None for the model's ``sample_shape`` where it has one, or that of ``x0``.
        x0: ``(n, d…)`` start points, which are stored; None for standard normal noise.
        method: as for `flows.integrate`.
        steps: of a fixed-step method.
        rtol: relative tolerance of ``dopri5``.
        atol: absolute tolerance of ``dopri5``.
        seed: of the noise.
        out: folder that pairs are written to, batch by batch; the same call goes on where an earlier one was stopped.
            None keeps them in memory. Of several processes, one writes, and the others load what is done.
        batch_size: pairs solved at once.
        progress: show a bar.

    Returns:
        Pairs in float32, or in float64 for a model of that dtype.

    Raises:
        ValueError: settings out of range, conditions or start points of another number, or a folder with pairs of
            other settings or another model.
        CheckpointError: another process writes to the folder.
        IntegrationError: the velocity or the solution is not finite.
        Interrupted: a signal came while pairs were written; finished batches are kept.

    >>> pairs = generate_pairs(lambda t, x, y: torch.ones_like(x), 3, shape=(2,), method="euler", steps=1)
    >>> torch.equal(pairs.x1, pairs.x0 + 1)
    True
    """
    n, batch_size = checks.count(n, "n"), checks.count(batch_size, "batch_size")
    seed = checks.count(seed, "seed", at_least=0)
    device, dtype = _place(model)
    start = _start(model, n, shape, x0, seed, torch.promote_types(dtype, torch.float32))
    given = _conditions(y, n)
    made = {
        "n": n, "shape": list(start.shape if isinstance(start, SeededNoise) else start.shape[1:]),
        "dtype": str(start.dtype).removeprefix("torch."), "seed": seed, "method": method, "steps": steps,
        "rtol": float(rtol), "atol": float(atol), "batch_size": batch_size, "teacher": fingerprint(model),
        "conditions": None if given is None else digest(given),
        "start": "noise" if isinstance(start, SeededNoise) else digest(start),
    }  # fmt: skip

    def field(t: Tensor, x: Tensor, y: Any) -> Tensor:
        return check_velocity(model(t.to(dtype), x.to(dtype), y), x).to(x.dtype)

    def solve(begin: int) -> Tensor:
        rows = torch.arange(begin, min(begin + batch_size, n))
        at = (start.at(rows) if isinstance(start, SeededNoise) else start[rows]).to(device)
        which = labels.to_device(labels.select(given, rows), device)
        solved = integrate(field, at, y=which, method=method, steps=steps, rtol=rtol, atol=atol)
        return solved.final.cpu()

    with eval_mode(model), _bar(n, progress) as bar:
        if out is None:
            ends = []
            for begin in range(0, n, batch_size):
                ends.append(solve(begin))
                bar.update(len(ends[-1]))
            every = torch.arange(n)
            held = start.at(every) if isinstance(start, SeededNoise) else start
            return PairedDataset(held, torch.cat(ends), given, info=made)
        folder = Path(out)
        with FolderLock(folder, alone=True), Signals() as signals:
            done = pair_files.begin(folder, made, start, given)
            bar.update(done)
            for begin in range(done, n, batch_size):
                ends_here = solve(begin)
                pair_files.append(folder, made, start, begin, ends_here)
                bar.update(len(ends_here))
                if signals.received is not None and begin + batch_size < n:
                    kept = f"{begin + len(ends_here)} of {n} pairs are kept in {folder}"
                    raise Interrupted(f"stopped by a signal; {kept}", None)
    return PairedDataset.load(folder)


def fingerprint(model: Any) -> str:
    """Name and digest of a model's weights (and guidance scale); of a plain function its name."""
    if isinstance(model, GuidedModel):
        by = digest(torch.as_tensor(model.scale), getattr(model.null, "__qualname__", ""))[:8]
        return f"guided by {by}: {fingerprint(model.model)}"
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    name = getattr(model, "__qualname__", type(model).__name__)
    if not isinstance(model, torch.nn.Module):
        return name
    return f"{name} {digest(model.state_dict(), model.extra_repr())}"  # wrappers say there how they call their model


def digest(*parts: Any) -> str:
    """A hash of tensors and arrays (bit by bit), dicts and sequences of them, and plain values."""
    hashed = blake2b(digest_size=12)

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            hashed.update(f"{part.dtype}{tuple(part.shape)}".encode())
            hashed.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif hasattr(part, "iloc"):
            add(part.to_numpy())
        elif isinstance(part, np.ndarray) and part.dtype != object:
            hashed.update(f"{part.dtype.str}{part.shape}".encode() + part.tobytes())
        elif isinstance(part, np.ndarray):
            add(part.tolist())
        elif isinstance(part, Mapping):
            for key, value in part.items():
                hashed.update(f"{key!r}:".encode())
                add(value)
        elif isinstance(part, (list, tuple)):
            hashed.update(f"{len(part)}:".encode())
            for value in part:
                add(value)
        else:
            hashed.update(f"{part!r};".encode())

    for part in parts:
        add(part)
    return hashed.hexdigest()


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """The modules of a model in eval mode; they are put back as they were."""
    modes = {module: module.training for module in module_of(model).modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def module_of(model: Any) -> torch.nn.Module:
    """The module behind a model; an empty one behind a plain function."""
    while isinstance(model, GuidedModel):
        model = model.model
    return model if isinstance(model, torch.nn.Module) else torch.nn.Module()


def _bar(n: int, progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=n, unit="pair", dynamic_ncols=True, disable=not progress)


def _place(model: Any) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a model's weights."""
    if not callable(model):
        raise TypeError(f"model must be called as model(t, x, y); got {type(model).__name__}")
    module = module_of(model)
    first = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0, dtype=torch.float32))
    return first.device, first.dtype


def _start(
    model: Any, n: int, shape: int | tuple[int, ...] | None, x0: Tensor | None, seed: int, dtype: torch.dtype
) -> Tensor | SeededNoise:
    shape = shape if shape is None or isinstance(shape, (tuple, list)) else (checks.count(shape, "shape"),)
    if x0 is not None:
        x0 = checks.finite(checks.floating(x0, "x0"), "x0").detach().to("cpu", dtype, copy=True)  # theirs may change
        if len(x0) != n or x0.ndim < 2 or (shape is not None and x0.shape[1:] != tuple(shape)):
            wanted = "(n, d…)" if shape is None else f"(n, {', '.join(map(str, shape))})"
            raise ValueError(f"x0 must have shape {wanted} with n={n}; got {tuple(x0.shape)}")
        return x0
    shape = getattr(module_of(model), "sample_shape", None) if shape is None else shape
    if shape is None:
        raise ValueError(f"{type(model).__name__} does not tell the shape of a sample (sample_shape): give shape")
    sizes = tuple(checks.count(size, "a size in shape") for size in shape)
    if not sizes:
        raise ValueError("shape must hold at least one size, that of a sample; got ()")
    return SeededNoise(seed, range(n), sizes, dtype)


def _conditions(y: Any, n: int) -> Any:
    """One condition a pair, in tensors, lists, or dicts of them."""
    if y is None:
        return None
    if callable(y):
        y = y(torch.arange(n))
        if y is None:
            raise TypeError("y must return a condition for each of its positions; it returned None")
    elif isinstance(y, (int, float)) or (isinstance(y, Tensor) and y.ndim == 0):
        y = torch.as_tensor(y).expand(n)
    elif isinstance(y, Tensor) and len(y) == 1:
        y = y.expand(n, *y.shape[1:])
    labels.check(y, n, "y", f"the n={n} pairs")
    return _plain_conditions(y)


def _first(y: Any) -> Any:
    """The first condition of some."""
    if isinstance(y, Mapping):
        return {key: _first(value) for key, value in y.items()}
    return y.iloc[0] if hasattr(y, "iloc") else y[0]


def _plain_conditions(y: Any) -> Any:
    if isinstance(y, Mapping):
        return {str(key): _plain_conditions(value) for key, value in y.items()}
    if isinstance(y, Tensor):
        return y.detach().to("cpu", copy=True).contiguous()
    y = y.to_numpy() if hasattr(y, "to_numpy") else y
    if isinstance(y, np.ndarray) and y.dtype.kind in "biuf":
        return torch.from_numpy(np.array(y, y.dtype.newbyteorder("="), order="C"))
    return [value.item() if isinstance(value, np.generic) else value for value in y]
