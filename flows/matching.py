"""Conditional flow matching (Lipman et al. 2023, arXiv 2210.02747; Tong et al. 2024, arXiv 2302.00482).

A coupling pairs noise with data, a path connects each pair, and a model regresses the path's velocity.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from flows.paths import LinearPath, Path, check_path
from flows.predictions import check_prediction, from_velocity
from flows.times import TimeLaw, UniformTimes, check_times
from mbot import Coupling, Pairs, checks
from mbot.conditions import select, to_device
from mbot.eager import outside_graphs
from mbot.random import draw

TimeWeight = Callable[[Tensor], Tensor]
"""``time_weight(t) -> weight``, both ``(B,)``."""

VelocityModel = Callable[[Tensor, Tensor, Any], Tensor]
"""``model(t, x, y) -> velocity``: t ``(B,)``, x ``(B, d…)``, y the conditions or None; returns ``(B, d…)``."""


@dataclass(frozen=True, eq=False)
class CoupledBatch:
    """One training batch of pairs.

    Attributes:
        x0: ``(B, d…)`` source samples (noise).
        x1: ``(B, d…)`` their partners.
        y: conditions of x1, or None.
        y0: conditions of x0, or None.
        weight: ``(B,)`` weights of mean 1 over the OT batch, or None.
        index: ``(B,)`` positions of x1 in the data set.
        info: facts from the coupling of the whole OT batch.
    """

    x0: Tensor
    x1: Tensor
    y: Any = None
    weight: Tensor | None = None
    index: Tensor | None = None
    info: dict[str, Any] = field(default_factory=dict)
    y0: Any = None

    @classmethod
    def of(
        cls, pairs: Pairs, x0: Tensor, x1: Tensor, y: Any = None, index: Tensor | None = None, *, y0: Any = None
    ) -> CoupledBatch:
        """The samples of pairs, with the conditions of both and the positions of their x1."""
        start, end = pairs.apply(x0, x1)
        positions = None if index is None else index[pairs.target.to(index.device)]
        given = select(y, pairs.target), pairs.weight, positions, pairs.info
        return cls(start, end, *given, y0=select(y0, pairs.source))

    def __len__(self) -> int:
        return len(self.x1)

    def __getitem__(self, rows: slice) -> CoupledBatch:
        return CoupledBatch(
            self.x0[rows],
            self.x1[rows],
            select(self.y, rows),
            None if self.weight is None else self.weight[rows],
            None if self.index is None else self.index[rows],
            self.info,
            select(self.y0, rows),
        )

    def to(self, device: torch.device | str | None) -> CoupledBatch:
        """The batch on a device (None: where it is)."""
        if device is None or self.x1.device == torch.device(device):
            return self
        moved = {name: to_device(getattr(self, name), device) for name in ("x0", "x1", "y", "y0", "weight")}
        return replace(self, **moved)


@dataclass(frozen=True, eq=False)
class FlowBatch:
    """One batch of regression targets; ``batch[i:j]`` and ``split`` cut it into training batches.

    Attributes:
        t: ``(B,)`` times in [0, 1].
        xt: ``(B, d…)`` points on the paths.
        ut: ``(B, d…)`` velocities there.
        y: conditions of the pairs (those of the target samples), or None.
        weight: ``(B,)`` weights of the pairs (of mean 1) and times, or None.
        info: facts from the coupling.
        noise: ``(B, d…)`` standard normal noise of the path, or None for a path without.
        until: ``(B,)`` ends of the intervals that `flows.MeanFlow` averages over, or None.
    """

    t: Tensor
    xt: Tensor
    ut: Tensor
    y: Any = None
    weight: Tensor | None = None
    info: dict[str, Any] = field(default_factory=dict)
    noise: Tensor | None = None
    until: Tensor | None = None

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, index: slice | Tensor) -> FlowBatch:
        rows = [None if part is None else part[index] for part in (self.weight, self.noise, self.until)]
        points = self.t[index], self.xt[index], self.ut[index]
        return FlowBatch(*points, select(self.y, index), rows[0], self.info, *rows[1:])

    def split(self, size: int) -> Iterator[FlowBatch]:
        """Consecutive batches of ``size`` (the last may be smaller)."""
        for begin in range(0, len(self), checks.count(size, "size")):
            yield self[begin : begin + size]


def along_path(
    path: Path, x0: Tensor, x1: Tensor, generator: torch.Generator | None = None, times: TimeLaw | None = None
) -> FlowBatch:
    """A time and a point on the path of each pair.

    Args:
        path: how a pair is connected.
        x0: ``(B, d…)`` source samples, as paired.
        x1: ``(B, d…)`` target samples, as paired.
        generator: source of randomness for the times and the path's noise.
        times: law of the times; None for uniform ones.
    """
    times = UniformTimes() if times is None else times
    return at_times(path, x0, x1, times(len(x1), generator, x1.device, times_dtype(x1)), generator)


def times_dtype(x: Tensor) -> torch.dtype:
    """Dtype of the times beside samples: float32 or better."""
    return torch.promote_types(x.dtype, torch.float32)


def at_times(path: Path, x0: Tensor, x1: Tensor, t: Tensor, generator: torch.Generator | None = None) -> FlowBatch:
    """The point on the path of each pair at its time ``t`` ``(B,)``."""
    noise = None
    if path.needs_noise:
        noise = draw(torch.randn, *x1.shape, generator=generator, device=x1.device, dtype=x1.dtype)
    return FlowBatch(t, *path.sample(x0, x1, t, noise), noise=noise)


def regression_loss(model: VelocityModel, batch: FlowBatch) -> Tensor:
    """Weighted mean squared error of the model's velocity, averaged over pairs and features; a scalar."""
    return weighted_mean(squared_error(model(batch.t, batch.xt, batch.y), batch.ut), batch.weight)


def check_velocity(velocity: Any, x: Tensor) -> Tensor:
    """The velocities that a model returned, if there is one for each of the points ``x``."""
    if not isinstance(velocity, Tensor):
        raise TypeError(
            f"the model must return a tensor of velocities; got {type(velocity).__name__}. flows.models.wrap takes "
            "what else models return"
        )
    if velocity.shape != x.shape:
        raise ValueError(f"the model must return velocities of shape {tuple(x.shape)}; got {tuple(velocity.shape)}")
    return velocity


def squared_error(predicted: Tensor, target: Tensor) -> Tensor:
    """Squared error of each sample ``(B,)``, averaged over features, in float32 or better."""
    check_velocity(predicted, target)
    error = (predicted.float() - target.float()) if target.dtype.itemsize < 4 else predicted - target
    return error.square().flatten(1).mean(1)


def weighted_mean(error: Tensor, weight: Tensor | None) -> Tensor:
    """Mean of errors ``(B,)`` times their weights (of mean 1), or None for no weights; a scalar."""
    return error.mean() if weight is None else (weight.to(error.dtype) * error).mean()


def check_coupling(coupling: object) -> Coupling:
    """A coupling, or a TypeError."""
    return checks.instance(coupling, "coupling", Coupling, "an mbot coupling such as OTCoupling()")


@dataclass(frozen=True)
class Objective(ABC):
    """A training objective: pairs from a coupling, points on their paths at drawn times, and a loss there.

    The one place where a batch is coupled and put on a path. A subclass, a frozen dataclass, implements `batch_loss`.
    `flows.FlowMatching` describes the arguments.
    """

    coupling: Coupling = None  # type: ignore[assignment]  # never None once built
    path: Path = field(default_factory=LinearPath)
    times: TimeLaw = field(default_factory=UniformTimes)
    time_weight: TimeWeight | None = None

    _chosen = False  # whether the coupling was given: a loader may bring its own then only if it is the same

    def __post_init__(self) -> None:
        check_path(self.path)
        check_times(self.times)
        if self.time_weight is not None and not callable(self.time_weight):
            raise TypeError(f"time_weight must be a function of times (B,) or None; got {self.time_weight!r}")
        if self.coupling is None:
            object.__setattr__(self, "coupling", self.path.default_coupling())
        else:
            object.__setattr__(self, "_chosen", True)
        self.path.check_coupling(check_coupling(self.coupling))

    def settings(self) -> dict[str, str]:
        """Settings by which runs are compared, as text: all but the coupling, which the loader saves."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "coupling"}
        named = {name: getattr(value, "__qualname__", repr(value)) for name, value in values.items()}
        return {"objective": type(self).__name__, **named}

    def paired_by(self, coupling: Coupling | None) -> Self:
        """The objective with the coupling that a loader was given (None: its own).

        Raises:
            ValueError: it was built with another one, or the coupling contradicts its path.
        """
        if coupling is None or coupling == self.coupling:
            return self
        if self._chosen:
            raise ValueError(f"the loader pairs by {coupling!r}, the objective by {self.coupling!r}: give one of them")
        return replace(self, coupling=coupling)

    def couple(
        self, x0: Tensor, x1: Tensor, y: Any = None, *, y0: Any = None, generator: torch.Generator | None = None
    ) -> CoupledBatch:
        """Pair two batches; the arguments are those of `loss`."""
        return CoupledBatch.of(self.coupling(x0, x1, y0, y, generator=generator), x0, x1, y, y0=y0)

    def along(self, batch: CoupledBatch, generator: torch.Generator | None = None) -> FlowBatch:
        """A time and a point on the path of each pair of a batch."""
        x1 = batch.x1
        t, until = self._times(len(x1), generator, x1.device, times_dtype(x1))
        points = at_times(self.path, batch.x0, x1, t, generator)
        return replace(points, y=batch.y, weight=self._weight(t, batch.weight), info=batch.info, until=until)

    @outside_graphs
    def points(
        self, x0: Tensor, x1: Tensor, y: Any = None, *, y0: Any = None, generator: torch.Generator | None = None
    ) -> FlowBatch:
        """`couple`, then `along`."""
        return self.along(self.couple(x0, x1, y, y0=y0, generator=generator), generator)

    @abstractmethod
    def batch_loss(self, model: Any, batch: FlowBatch) -> Tensor:
        """Loss of a model on points of `along`, a scalar."""

    def loss(
        self,
        model: Any,
        x0: Tensor,
        x1: Tensor,
        y: Any = None,
        *,
        y0: Any = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Loss of a model on one batch, a scalar.

        Args:
            model: ``model(t, x, y)`` with t of shape ``(B,)``; y is None without conditions.
            x0: ``(n, d…)`` noise, or samples of another data set.
            x1: ``(m, d…)`` data.
            y: conditions of the data, one a sample (see `mbot.conditions`); they follow their samples.
            y0: conditions of the source samples, for couplings that read them.
            generator: source of randomness for the coupling, the times and the path's noise.
        """
        return self.batch_loss(model, self.points(x0, x1, y, y0=y0, generator=generator))

    def _times(
        self, n: int, generator: torch.Generator | None, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """Times of a batch, and the ends of its intervals where the objective has some."""
        return self.times(n, generator, device, dtype), None

    def _weight(self, t: Tensor, weight: Tensor | None) -> Tensor | None:
        """Weights of pairs times those of their times."""
        if self.time_weight is None:
            return weight
        factor = checks.instance(
            self.time_weight(t), "time_weight of the times", Tensor, "a tensor of one weight a time"
        )
        if factor.shape != t.shape:
            raise ValueError(f"time_weight must give one weight a time, {tuple(t.shape)}; got {tuple(factor.shape)}")
        if bool((checks.finite(factor, "time_weight of the times") < 0).any()):
            raise ValueError(f"time_weight must not be negative; its least weight is {float(factor.min()):g}")
        return factor if weight is None else weight * factor


class LossModule(nn.Module):
    """The loss of a model as a module of its own.

    DistributedDataParallel goes around all of it: its bookkeeping cannot run inside a derivative of the model.
    """

    def __init__(self, objective: Objective, model: nn.Module) -> None:
        super().__init__()
        self.objective, self.model = objective, model

    def forward(self, batch: FlowBatch) -> Tensor:
        """Loss on points of the objective, a scalar."""
        return self.objective.batch_loss(self.model, batch)


def check_objective(objective: object) -> Objective:
    """An objective, or a TypeError."""
    return checks.instance(objective, "objective", Objective, "one such as flows.MeanFlow()")


@dataclass(frozen=True)
class FlowMatching(Objective):
    """Flow matching with any coupling and any path.

    Args:
        coupling: how noise and data are paired; an `mbot` coupling. None for the path's own: independent pairs, or
            entropic ones for the Schrödinger bridge.
        path: how a pair is connected.
        times: law of the times that the model is trained at.
        time_weight: weight of the loss at each time, as a function of times ``(B,)``; it multiplies the weights of the
            pairs. ``lambda t: (-times.log_density(t)).exp()`` gives the loss of uniform times. None for no weights.
        prediction: what the model predicts: ``"velocity"``, ``"x1"`` or ``"noise"``, the x0 of the pair. The last two
            need an affine path without noise of its own; see `flows.as_velocity`.

    Raises:
        ValueError: a coupling that contradicts the path, see `flows.Path.check_coupling`, or a prediction that does.

    >>> fm = FlowMatching()
    >>> batch = fm.sample(torch.zeros(4, 2), torch.ones(4, 2), generator=torch.Generator().manual_seed(0))
    >>> batch.ut[0], len(batch)
    (tensor([1., 1.]), 4)
    """

    prediction: str = "velocity"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_prediction(self.prediction, self.path)

    def sample(
        self, x0: Tensor, x1: Tensor, y: Any = None, *, y0: Any = None, generator: torch.Generator | None = None
    ) -> FlowBatch:
        """Couple two batches and draw a time and a point on each pair's path; the arguments are those of `loss`."""
        return self.points(x0, x1, y, y0=y0, generator=generator)

    def batch_loss(self, model: VelocityModel, batch: FlowBatch) -> Tensor:
        """``mean w |model(t, xt, y) - ut|^2`` on points of `sample`, a scalar; of x1 or noise if they are predicted."""
        target = from_velocity(self.path, self.prediction, batch.t, batch.xt, batch.ut)
        return regression_loss(model, replace(batch, ut=target))
