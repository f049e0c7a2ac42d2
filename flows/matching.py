"""Conditional flow matching (Lipman et al. 2023, arXiv 2210.02747; Tong et al. 2024, arXiv 2302.00482).

A coupling pairs noise with data, a path connects each pair, and a model regresses the path's velocity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flows.paths import LinearPath, Path
from mbot import Coupling, IndependentCoupling
from mbot.random import draw

VelocityModel = Callable[[Tensor, Tensor, Any], Tensor]
"""``model(t, x, y) -> velocity``: t ``(B,)``, x ``(B, d…)``, y the conditions or None; returns ``(B, d…)``."""


@dataclass(frozen=True, eq=False)
class FlowBatch:
    """One batch of regression targets; ``batch[i:j]`` and ``split`` cut it into training batches.

    Attributes:
        t: ``(B,)`` times, uniform in [0, 1].
        xt: ``(B, d…)`` points on the paths.
        ut: ``(B, d…)`` velocities there.
        y: conditions of the pairs (those of the target samples), or None.
        weight: ``(B,)`` weights of mean 1, or None.
        info: facts from the coupling.
    """

    t: Tensor
    xt: Tensor
    ut: Tensor
    y: Any = None
    weight: Tensor | None = None
    info: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, index: slice | Tensor) -> FlowBatch:
        y = {k: v[index] for k, v in self.y.items()} if isinstance(self.y, Mapping) else self.y
        y = y if y is None or isinstance(y, Mapping) else y[index]
        weight = None if self.weight is None else self.weight[index]
        return FlowBatch(self.t[index], self.xt[index], self.ut[index], y, weight, self.info)

    def split(self, size: int) -> Iterator[FlowBatch]:
        """Consecutive batches of ``size`` (the last may be smaller)."""
        for begin in range(0, len(self), size):
            yield self[begin : begin + size]


def _select(y: Any, index: Tensor) -> Any:
    """Conditions at an index, whatever holds them."""
    if y is None:
        return None
    if isinstance(y, Mapping):
        return {name: _select(part, index) for name, part in y.items()}
    if isinstance(y, Tensor):
        return y[index.to(y.device)]
    rows = index.cpu().numpy()
    return y[rows] if isinstance(y, np.ndarray) else [y[i] for i in rows]


def regression_loss(model: VelocityModel, batch: FlowBatch) -> Tensor:
    """Weighted mean squared error of the model's velocity, averaged over pairs and features; a scalar."""
    predicted = model(batch.t, batch.xt, batch.y)
    if predicted.shape != batch.ut.shape:
        raise ValueError(
            f"the model must return velocities of shape {tuple(batch.ut.shape)}; got {tuple(predicted.shape)}"
        )
    error = (predicted.float() - batch.ut.float()) if batch.ut.dtype.itemsize < 4 else predicted - batch.ut
    error = error.square().flatten(1).mean(1)
    return error.mean() if batch.weight is None else (batch.weight.to(error.dtype) * error).mean()


@dataclass(frozen=True)
class FlowMatching:
    """Flow matching with any coupling and any path.

    Args:
        coupling: how noise and data are paired; an `mbot` coupling.
        path: how a pair is connected.

    >>> fm = FlowMatching()
    >>> batch = fm.sample(torch.zeros(4, 2), torch.ones(4, 2), generator=torch.Generator().manual_seed(0))
    >>> batch.ut[0], len(batch)
    (tensor([1., 1.]), 4)
    """

    coupling: Coupling = field(default_factory=IndependentCoupling)
    path: Path = field(default_factory=LinearPath)

    def __post_init__(self) -> None:
        if not isinstance(self.coupling, Coupling):
            raise TypeError(f"coupling must be an mbot coupling such as OTCoupling(); got {self.coupling!r}")
        if not isinstance(self.path, Path):
            raise TypeError(f"path must be a flows path such as LinearPath(); got {self.path!r}")

    def sample(self, x0: Tensor, x1: Tensor, y: Any = None, generator: torch.Generator | None = None) -> FlowBatch:
        """Couple two batches and draw a time and a point on each pair's path.

        Args:
            x0: ``(n, d…)`` noise.
            x1: ``(m, d…)`` data.
            y: conditions of the data, one a sample; they follow their samples.
            generator: source of randomness for the coupling, the times and the path's noise.
        """
        pairs = self.coupling(x0, x1, y1=y, generator=generator)
        start, end = pairs.apply(x0, x1)
        dtype = torch.promote_types(end.dtype, torch.float32)
        t = draw(torch.rand, len(pairs), generator=generator, device=end.device, dtype=dtype)
        noise = None
        if self.path.needs_noise:
            noise = draw(torch.randn, *end.shape, generator=generator, device=end.device, dtype=end.dtype)
        xt, ut = self.path.sample(start, end, t, noise)
        return FlowBatch(t, xt, ut, _select(y, pairs.target), pairs.weight, pairs.info)

    def loss(
        self,
        model: VelocityModel,
        x0: Tensor,
        x1: Tensor,
        y: Any = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Flow-matching loss of a model on one batch: ``mean w |model(t, xt, y) - ut|^2``, a scalar.

        Args:
            model: ``model(t, x, y) -> velocity`` with t of shape ``(B,)``; y is None without conditions.
            x0: ``(n, d…)`` noise.
            x1: ``(m, d…)`` data.
            y: conditions of the data.
            generator: source of randomness.
        """
        return regression_loss(model, self.sample(x0, x1, y, generator))
