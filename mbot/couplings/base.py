"""Couplings: rules that pair sources with targets. A coupling returns indices and weights, never samples."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mbot import checks
from mbot.conditions import Labels, check
from mbot.convergence import one_warning, warn
from mbot.cost import Cost
from mbot.eager import outside_graphs
from mbot.numerics import full_float32, rows_of
from mbot.random import draw


@dataclass(frozen=True, eq=False)
class Pairs:
    """Matched samples: pair ``i`` is ``x0[source[i]]`` with ``x1[target[i]]``.

    Attributes:
        source: ``(k,)`` int64 indices into x0.
        target: ``(k,)`` int64 indices into x1; ``arange(k)`` in couplings that keep x1's order.
        weight: ``(k,)`` weights of the pairs with mean 1, or None for equal weights.
        info: facts about the coupling (adaptive weight, ratio, effective sample size, …).
    """

    source: Tensor
    target: Tensor
    weight: Tensor | None = None
    info: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.source)

    def apply(self, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
        """The paired samples ``x0[source], x1[target]``, differentiable in both."""
        return rows_of(x0, self.source.to(x0.device)), rows_of(x1, self.target.to(x1.device))


@dataclass(frozen=True)
class Coupling(ABC):
    """A rule that pairs a batch of source samples (noise) with a batch of target samples (data).

    Settings are immutable and calls leave no state: equal inputs and generator states give equal pairs.
    A subclass implements ``_pair``; one that never reads conditions sets ``ignores_conditions``.
    """

    ignores_conditions = False

    @outside_graphs
    def __call__(
        self,
        x0: Tensor,
        x1: Tensor,
        y0: Labels | None = None,
        y1: Labels | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Pairs:
        """Pair two batches.

        Args:
            x0: ``(n, d…)`` source samples (vectors, images, …), floating point.
            x1: ``(m, d…)`` target samples, same features, dtype and device.
            y0: conditions of the source, one a sample; used by conditional couplings only. What conditions may be is
                written in `mbot.conditions`.
            y1: conditions of the target, likewise.
            generator: source of randomness, on any device (None: torch's default generator).

        Returns:
            The pairs, on the device of ``x1``.

        Raises:
            TypeError: not floating-point tensors, or two dtypes.
            ValueError: empty batches, unequal features, non-finite samples, wrong numbers of conditions, two devices.

        Warns:
            UserWarning: conditions of the source that the coupling ignores.
        """
        x0, x1 = checks.samples(x0, x1)
        check(y0, len(x0), "y0", "x0")
        check(y1, len(x1), "y1", "x1")
        if y0 is not None and self.ignores_conditions:
            tell_ignored(self)
        with torch.no_grad(), full_float32(), one_warning():
            return self._pair(x0, x1, y0, y1, generator)

    @property
    def needs_data_set(self) -> bool:
        """Whether x1 must be a whole data set, the same in every call, and not a batch of it."""
        return False

    @property
    def sources_per_target(self) -> int | None:
        """Number of sources that each target chooses among, its own rows; None where any target may get any source."""
        return None

    @property
    def brings_noise(self) -> bool:
        """Whether the points of its data set have noises of their own, see `mbot.DataCoupling`."""
        return False

    @property
    def entropic_reg(self) -> float | None:
        """Regularisation of the entropic plan of squared Euclidean costs that the pairs are drawn from.

        ``inf`` for independent pairs, NaN for an entropic plan of other costs; None where no regularisation is known
        before the samples are, and for pairs of any other kind.
        """
        return None

    @abstractmethod
    def _pair(
        self, x0: Tensor, x1: Tensor, y0: Labels | None, y1: Labels | None, generator: torch.Generator | None
    ) -> Pairs:
        """Pair checked samples ``(n, d)`` and ``(m, d)``."""


def tell_ignored(coupling: Coupling) -> None:
    """Warn that a coupling does not look at the conditions of the source."""
    warn(
        f"{type(coupling).__name__} ignores the conditions of the source (y0) and pairs any class with any; "
        "ConditionalOTCoupling pairs within classes",
        UserWarning,
    )


def squared_reg(reg: float, cost: Cost) -> float:
    """Regularisation at which squared Euclidean costs have the entropic plans of ``cost`` at ``reg``; NaN for others.

    ``|x - y|² = |x|² + |y|² - 2 <x, y>``, and norms change no plan. A callable counts as the squared distance.
    """
    if not isinstance(cost, str):
        return reg
    return {"sqeuclidean": reg, "dot": 2 * reg}.get(cost, math.nan)


def in_order(x0: Tensor, x1: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Row i with row i; for unequal sizes every x1 once, with sources drawn as evenly as possible."""
    n, m = len(x0), len(x1)
    target = torch.arange(m, device=x1.device)
    if n == m:
        return target, target
    rounds = [draw(torch.randperm, n, generator=generator, device=x1.device) for _ in range(-(-m // n))]
    return torch.cat(rounds)[:m], target
