"""Bijections of whole clouds of points, nearly optimal for squared distances, in O(n d) memory.

1. A hierarchy: both clouds are cut into halves that belong together, again and again, down to a few hundred points, and
   these are matched exactly.
2. Sweeps: the pairs are grouped by their midpoints ``x + y`` (segments that cross have close midpoints, and exchanging
   the ends of two pairs gains where their displacements point against each other), and each group is matched exactly
   anew. The cost never rises. Groups grow where sweeps over small ones gain little.

Exact assignment stores n² costs and ends near n = 20,000; hierarchies alone (HiRef, arXiv 2503.03025; BSP-OT) stay some
per cent above it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbot import checks
from mbot.conditions import Labels, check, class_codes
from mbot.cost import pairwise
from mbot.kernels.threads import run_slices
from mbot.problem import Problems
from mbot.solvers.matching import match

_LEAF = 512  # points that the hierarchy ends at
_BLOCKS = (512, 1024, 2048, 4096)  # pairs that a sweep matches at once
_SAMPLE = 4096, 512  # points that directions of the hierarchy and of the sweeps are found from
_STEP = 4096  # rows of points that a thread takes at a time
_DOUBT = 1e-4  # rounding of float32 scores, relative to the cost, above which a class is matched anew in float64
_WORK = 1 << 27  # costs that are solved between two checks of the time limit: eight of the largest blocks


@dataclass(frozen=True, eq=False)
class CloudMatching:
    """A bijection of two clouds, found by `match_clouds`.

    Attributes:
        source: int64; ``x[source[j]]`` belongs to ``y[j]``. ``(n,)``, or ``(n, c)`` for c sources a target.
        cost: mean squared distance of the pairs.
        bound: a lower bound of the cost of every such matching, or None without ``certificate``.
        costs: the cost at the start and after each sweep; never rising.
        converged: whether the last sweep gained less than ``tol``, or the matching is exact; else time was up.
    """

    source: Tensor
    cost: float
    bound: float | None
    costs: tuple[float, ...]
    converged: bool

    @property
    def sweeps(self) -> int:
        """Sweeps after the hierarchy."""
        return len(self.costs) - 1

    def __repr__(self) -> str:
        bound = "" if self.bound is None else f", bound={self.bound:.6g}"
        return f"CloudMatching({len(self.source)} points, cost={self.cost:.6g}{bound}, sweeps={self.sweeps})"


def match_clouds(
    x: Tensor | np.ndarray,
    y: Tensor | np.ndarray,
    *,
    labels: tuple[Labels, Labels] | None = None,
    start: Tensor | np.ndarray | None = None,
    time_limit: float | None = None,
    tol: float = 5e-3,
    certificate: bool = False,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> CloudMatching:
    """A bijection of two clouds with a small mean squared distance; exact for up to 4096 points (of a class).

    The result is a function of the points and the generator's state, whatever the number of threads, unless
    ``time_limit`` ends it.

    Args:
        x: ``(c n, d…)`` points, c of them for each of y; float32 (others are converted), in memory or memory-mapped.
        y: ``(n, d…)`` points.
        labels: classes of x and of y (see `mbot.conditions`); only equal ones are matched.
        start: a matching as in `CloudMatching.source` that the result must not be worse than.
        time_limit: seconds after which sweeps end; the hierarchy is always completed.
        tol: sweeps over groups of a size go on until two of them lower the cost by less than this share.
        certificate: compute the bound, at the price of two passes over all n² costs, made tile by tile.
        generator: source of randomness; None: torch's default.
        progress: show a bar of sweeps.

    Raises:
        TypeError: not points, or not floating-point numbers.
        ValueError: empty, not finite, or unequal features; a number of x that is no multiple of that of y; classes that
            do not have c sources a target; a start that is no matching.

    >>> x, y = torch.randn(1000, 2), torch.randn(1000, 2) + 3
    >>> found = match_clouds(x, y)
    >>> abs(found.cost - float((x[found.source] - y).square().sum(1).mean())) < 1e-3
    True
    """
    xs, ys = _points(x, "x"), _points(y, "y")
    if xs.shape[1] != ys.shape[1]:
        raise ValueError(f"x and y must have equal features; got {xs.shape[1]} and {ys.shape[1]}")
    times, rest = divmod(len(xs), len(ys))
    if rest or not times:
        raise ValueError(f"x must hold equally many points for each of the {len(ys)} of y; got {len(xs)}")
    until = np.inf
    if time_limit is not None:
        until = time.monotonic() + checks.positive(time_limit, "time_limit", allow_zero=True)
    tol = checks.positive(tol, "tol", allow_zero=True)
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device if generator else None))
    found = _Matching(xs, ys, labels, seed)
    found.begin(None if start is None else _checked(start, found, times))
    converged = found.sweep(tol, until, progress)
    source = torch.from_numpy(found.source).reshape(times, len(ys)).T.contiguous()
    return CloudMatching(
        (source if times > 1 else source[:, 0]).to(x.device if isinstance(x, Tensor) else "cpu"),
        found.costs[-1],
        found.bound() if certificate else None,
        tuple(found.costs),
        converged,
    )


class _Matching:
    """A matching that is built up. Column j of N is the target ``j % len(y)``, and ``source[j]`` its row of x."""

    def __init__(self, x: np.ndarray, y: np.ndarray, labels: tuple[Labels, Labels] | None, seed: int) -> None:
        self.given, self.seed, self.size = (x, y), seed, len(x)
        largest = max(float(max(points.max(), -points.min())) for points in (x, y))
        if largest > 1e150:
            raise ValueError(f"squared distances are beyond the range of float64: a coordinate is {largest:.3g}")
        # Float32 as it is, also from files; else about the means and in units whose products stay in range.
        self.means = [points.mean(0, dtype=np.float64) for points in (x, y)]
        self.scale, self.centres = 1.0, self.means
        if x.dtype != np.float32 or y.dtype != np.float32 or not (1e-9 < largest < 1e9 or largest == 0):
            apart = [points - mean for points, mean in zip((x, y), self.means, strict=True)]
            self.scale = max(float(np.abs(points).max()) for points in apart) or 1.0
            x, y = ((points / self.scale).astype(np.float32) for points in apart)
            self.centres = [np.zeros(x.shape[1])] * 2
        self.x, self.y = np.ascontiguousarray(x), np.ascontiguousarray(y)
        self.source, self.price = np.arange(self.size), np.zeros(self.size)
        self.costs: list[float] = []
        self.rows, self.cols = np.arange(self.size), np.arange(self.size)
        self.classes = self.class_of_row = np.zeros(self.size, np.int64)
        self.bounds = np.array([0, self.size])
        if labels is not None:
            times = self.size // len(y)
            check(labels[0], len(x), "labels[0]", "x")
            check(labels[1], len(y), "labels[1]", "y")
            code0, code1, names = class_codes(*labels, names=("labels[0]", "labels[1]"))
            counts = [np.bincount(code, minlength=len(names)) for code in (code0, code1)]
            wrong = np.flatnonzero(counts[0] != times * counts[1])
            if len(wrong):
                listed = "; ".join(f"class {names[c]!r}: {counts[0][c]} and {counts[1][c]}" for c in wrong[:10])
                raise ValueError(f"each class must hold {times} points of x for one of y; got {listed}")
            self.classes, self.class_of_row = np.tile(code1, times), code0
            self.rows, self.cols = np.argsort(code0, kind="stable"), np.argsort(self.classes, kind="stable")
            self.bounds = np.concatenate(([0], np.cumsum(counts[0][counts[0] > 0])))

    def begin(self, start: np.ndarray | None) -> None:
        """Match by the hierarchy, or in each class by ``start`` where that is better."""
        exact = np.diff(self.bounds) <= _BLOCKS[-1]
        rows, cols, bounds = self._halved(np.where(exact, _BLOCKS[-1], _LEAF))
        self._exchange(rows, cols, bounds, np.inf, fresh=True)
        for a, b in zip(self.bounds[:-1][exact], self.bounds[1:][exact], strict=True):
            self._careful(self.cols[a:b])
        if start is not None:
            apart = np.empty((2, self.size))
            for source, out in zip((self.source, start), apart, strict=True):
                self._distances(source, 1, out)
            totals = [np.bincount(self.classes, weights=part) for part in apart]
            self.source = np.where((totals[1] <= totals[0])[self.classes], start, self.source)
        self._look()

    def _careful(self, cols: np.ndarray) -> None:
        """Match a class anew by costs in float64, where float32 scores about the mean cancel: groups far apart."""
        given = self.given[0][self.source[cols]], self.given[1][cols % len(self.y)]
        x, y = (np.asarray(points, np.float64) for points in given)
        cost = ((x - y) ** 2).sum()
        if np.finfo(np.float32).eps * (((x - x.mean(0)) ** 2).sum() + ((y - y.mean(0)) ** 2).sum()) <= _DOUBT * cost:
            return
        costs = pairwise(torch.from_numpy(x), torch.from_numpy(y), "sqeuclidean")
        column = match(Problems.dense(costs[None])).col[0].numpy()
        if costs.numpy()[np.arange(len(cols)), column].sum() < cost:
            self.source[cols[column]] = self.source[cols]

    def sweep(self, tol: float, until: float, progress: bool) -> bool:
        """Exchange in ever larger groups; returns whether the last sweep gained less than the tolerance."""
        from tqdm import tqdm

        sizes = np.diff(self.bounds)
        parts = [self.cols[a:b] for a, b in zip(self.bounds, self.bounds[1:], strict=False) if b - a > _BLOCKS[-1]]
        if not parts:
            return True
        cols, bounds = np.concatenate(parts), np.concatenate(([0], np.cumsum(sizes[sizes > _BLOCKS[-1]])))
        with tqdm(disable=not progress, unit="sweep") as bar:
            for size in _BLOCKS:
                gain = np.inf
                while gain > tol * self.costs[-1]:
                    before = self.costs[-1]
                    for power in (0, 2):
                        if time.monotonic() >= until:
                            return False
                        order, blocks = self._grouped(cols, bounds, size, power)
                        self._exchange(self.source[order], order, blocks, until)
                        self._look()
                        bar.set_postfix(size=size, cost=f"{self.costs[-1]:.6g}")
                        bar.update()
                    gain = before - self.costs[-1]
        return True

    def bound(self) -> float:
        """A lower bound of the cost of every matching, from the prices: two passes over all costs."""
        lengths, left, total = [], [], 0.0
        for points, mean in zip(self.given, self.means, strict=True):
            squared, sums = np.empty(len(points)), np.zeros(len(mean))
            for a in range(0, len(points), _STEP):
                part = points[a : a + _STEP] - mean
                squared[a : a + _STEP], sums = (part**2).sum(1), sums + part.sum(0)
            lengths.append(squared)
            left.append(sums / len(points))  # what rounding left of the mean
        digits = (self.x.shape[1] + 4) * 2.0**-24  # a score's rounding, in units of the product of the lengths
        for a, b in zip(self.bounds, self.bounds[1:], strict=False):
            rows, cols = self.rows[a:b], self.cols[a:b]
            targets = cols % len(self.y)
            f, g = np.empty(b - a), np.empty(b - a)
            sides = (self.x, self.centres[0], rows), (self.y, self.centres[1], targets)
            for (one, other), price, out in ((sides, self.price[cols], f), (sides[::-1], f, g)):
                _run("least_reduced", np.ones(-(-(b - a) // 64)), (*one, *other, price), (64, out))
            total += self.scale**2 * float(f.sum() + g.sum())
            total -= digits * np.sqrt(lengths[0][rows].max()) * np.sqrt(lengths[1][targets]).sum()
        shift = self.means[0] - self.means[1]
        apart = lengths[0].mean() + lengths[1].mean() + 2 * total / self.size
        return float(apart + 2 * (left[0] - left[1]) @ shift + shift @ shift)

    def _look(self) -> None:
        """Note the cost."""
        out = np.empty(-(-self.size // _STEP))
        self._distances(self.source, _STEP, out)
        self.costs.append(float(out.sum()) / self.size)

    def _distances(self, source: np.ndarray, step: int, out: np.ndarray) -> None:
        """Sums of squared distances of ``step`` pairs each."""
        _run("squared_distances", np.full(len(out), step), (*self.given, source), (step, out))

    def _halved(self, leaf: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows and columns in nodes that belong together, down to the leaf size of their class."""
        rows, cols, bounds, seed = self.rows, self.cols, self.bounds, self.seed
        along = np.empty((2, self.size), np.float32)
        while (np.diff(bounds) > leaf).any():
            nodes, seed = _Nodes(bounds, leaf), seed + 1
            centre = np.empty((2, nodes.count, self.x.shape[1]), np.float32)
            direction = np.empty(centre.shape, np.float32)
            work = np.minimum(nodes.sizes, _SAMPLE[0]) * (nodes.cuts > 0) + 1
            _run(
                "halves", work, (self.x, self.y, rows, cols, bounds, nodes.cuts), (seed, _SAMPLE[0], centre, direction)
            )
            for side, (points, index) in enumerate(((self.x, rows), (self.y, cols))):
                _run("project", nodes.chunks, (points, index, nodes.of),
                     (_STEP, centre[side], direction[side], along[side]))  # fmt: skip
            rows, cols = nodes.cut(rows, along[0]), nodes.cut(cols, along[1])
            bounds, leaf = nodes.refined(), np.repeat(leaf, 1 + (nodes.cuts > 0))
        return rows, cols, bounds

    def _grouped(self, cols: np.ndarray, bounds: np.ndarray, size: int, power: int) -> tuple[np.ndarray, np.ndarray]:
        """Columns in groups of at most ``size`` whose pairs have close midpoints."""
        along, seed = np.empty(len(cols), np.float32), self.seed + (len(self.costs) << 32)
        while np.diff(bounds).max() > size:
            nodes, seed = _Nodes(bounds, size), seed + 1
            centre = np.empty((nodes.count, self.x.shape[1]), np.float32)
            direction = np.empty(centre.shape, np.float32)
            pairs = self.x, self.y, self.source, cols
            _run("midpoint_directions", np.minimum(nodes.sizes, _SAMPLE[1]), (*pairs, bounds),
                 (seed, power, _SAMPLE[1], centre, direction))  # fmt: skip
            _run("project_midpoints", nodes.chunks, (*pairs, nodes.of), (_STEP, centre, direction, along))
            cols, bounds = nodes.cut(cols, along), nodes.refined()
        return cols, bounds

    def _exchange(
        self, rows: np.ndarray, cols: np.ndarray, bounds: np.ndarray, until: float, fresh: bool = False
    ) -> None:
        """Match each block exactly; blocks beyond the time limit stay as they are."""
        # In few dimensions prices from other blocks cost the finish more than they save the auction.
        epsilon = 0.25 if fresh or self.x.shape[1] <= 3 else 0.01
        work = np.diff(bounds).astype(np.float64) ** 2
        groups = np.searchsorted(np.cumsum(work), np.arange(_WORK, work.sum() + _WORK, _WORK)) + 1
        first = 0
        for last in np.unique(np.minimum(groups, len(work))).tolist():
            if time.monotonic() >= until:
                return
            _run("exchange", work[first:last], (self.x, self.y, self.centres[0], rows, cols, bounds[first : last + 1]),
                 (epsilon, fresh, self.source, self.price))  # fmt: skip
            first = last


def _run(kernel: str, work: np.ndarray, before: tuple[Any, ...], after: tuple[Any, ...]) -> None:
    """A kernel of `mbot.kernels.clouds` over ranges of about equal work, in parallel."""
    from mbot.kernels import clouds

    function = getattr(clouds, kernel)
    run_slices(lambda begin, stop: function(*before, begin, stop, *after), work)


class _Nodes:
    """Ranges of an index; those above a size are to be cut in two, into whole multiples of blocks of equal size."""

    def __init__(self, bounds: np.ndarray, size: np.ndarray | int) -> None:
        self.bounds, self.sizes = bounds, np.diff(bounds)
        self.count = len(self.sizes)
        blocks = -(-self.sizes // size)
        self.cuts = np.where(blocks > 1, self.sizes * (blocks // 2) // blocks, 0)
        self.of = np.repeat(np.arange(self.count), self.sizes)
        self.chunks = np.ones(-(-len(self.of) // _STEP))

    def cut(self, index: np.ndarray, values: np.ndarray) -> np.ndarray:
        """The index with the largest values of each node first."""
        out = np.empty_like(index)
        _run("cut", self.sizes, (index, values, self.bounds, self.cuts), (out,))
        return out

    def refined(self) -> np.ndarray:
        """Bounds of the parts."""
        return np.union1d(self.bounds, self.bounds[:-1] + self.cuts)


def _points(points: Any, name: str) -> np.ndarray:
    """Points as a finite floating-point array ``(n, d)``."""
    if isinstance(points, Tensor):
        checks.floating(points, name)
        points = points.detach().cpu()
        points = (points.float() if points.dtype.itemsize < 4 else points).numpy()
    elif isinstance(points, np.ndarray) and points.dtype.kind == "f" and points.dtype not in (np.float32, np.float64):
        points = points.astype(np.float32 if points.dtype.itemsize <= 4 else np.float64)
    if not isinstance(points, np.ndarray) or points.dtype.kind != "f":
        got = points.dtype if isinstance(points, np.ndarray) else type(points).__name__
        raise TypeError(f"{name} must be a tensor or array of floating-point numbers; got {got}")
    if points.ndim < 2 or not points.size:
        raise ValueError(f"{name} must have shape (points, features…), at least one each; got {points.shape}")
    flat = np.asarray(points).reshape(len(points), -1)
    for a in range(0, len(flat), _STEP):
        if not np.isfinite(flat[a : a + _STEP].sum(dtype=np.float64)):
            bad = int((~np.isfinite(flat)).any(1).sum())
            raise ValueError(f"{name} must be finite; {bad} of its {len(flat)} points are not")
    return flat


def _checked(start: Any, found: _Matching, times: int) -> np.ndarray:
    """A given matching, as the source of each column."""
    given = np.asarray(start.cpu() if isinstance(start, Tensor) else start)
    shape = (len(found.y), times) if times > 1 else (len(found.y),)
    if given.shape != shape or given.dtype.kind not in "iu":
        raise ValueError(f"start must hold integers of shape {shape}; got {given.dtype} of shape {given.shape}")
    source = given.astype(np.int64).T.reshape(-1)
    if not np.array_equal(np.sort(source), np.arange(found.size)):
        raise ValueError("start must hold the position of each point of x once")
    if not np.array_equal(found.class_of_row[source], found.classes):
        raise ValueError("start must match equal classes")
    return source
