"""Time laws: how the times in [0, 1] that a flow is trained at are drawn, from noise (0) to data (1).

A law is a frozen dataclass, ``law(n, generator, device, dtype) -> (n,)``, with its log-density. No law is best for all
models: plot the loss over the time before you choose one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mbot import checks
from mbot.random import draw


@dataclass(frozen=True)
class TimeLaw(ABC):
    """A distribution of times on [0, 1]. A subclass implements ``_draw`` and ``_log_density``."""

    def __call__(
        self,
        n: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Independent times ``(n,)``.

        Args:
            n: how many.
            generator: source of randomness, on any device (None: torch's default generator).
            device: of the result; None for the generator's, or the CPU.
            dtype: of the result; None for float32. Half precision is drawn in float32 and rounded.
        """
        checks.count(n, "n", at_least=0)
        where = torch.device("cpu" if generator is None else generator.device) if device is None else device
        dtype = torch.float32 if dtype is None else dtype
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point type; got {dtype}")
        return self._draw(n, generator, torch.device(where), torch.promote_types(dtype, torch.float32)).to(dtype)

    def log_density(self, t: Tensor) -> Tensor:
        """Logarithm of the density at times of any shape; ``-inf`` outside [0, 1]."""
        t = checks.floating(t, "t")
        inside = (t >= 0) & (t <= 1)
        return torch.where(inside, self._log_density(torch.where(inside, t, 0.5)), -torch.inf)

    @abstractmethod
    def _draw(self, n: int, generator: torch.Generator | None, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Times in float32 or better."""

    @abstractmethod
    def _log_density(self, t: Tensor) -> Tensor:
        """Log-density at times in [0, 1]."""


@dataclass(frozen=True)
class UniformTimes(TimeLaw):
    """Uniform times: density 1.

    >>> UniformTimes().log_density(torch.tensor([0.5, 1.5]))
    tensor([0., -inf])
    """

    def _draw(self, n: int, generator: torch.Generator | None, device: torch.device, dtype: torch.dtype) -> Tensor:
        return draw(torch.rand, n, generator=generator, device=device, dtype=dtype)

    def _log_density(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)


@dataclass(frozen=True)
class LogitNormalTimes(TimeLaw):
    """``t = 1 / (1 + exp(-(mean + std n)))`` with standard normal n: few times near the ends (Esser et al. 2024).

    Args:
        mean: of the logit; below 0 draws towards the noise.
        std: of the logit, > 0.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        checks.store(self, mean=checks.number(self.mean, "mean"), std=checks.positive(self.std, "std"))

    def _draw(self, n: int, generator: torch.Generator | None, device: torch.device, dtype: torch.dtype) -> Tensor:
        normal = draw(torch.randn, n, generator=generator, device=device, dtype=dtype)
        return torch.sigmoid(self.mean + self.std * normal)

    def _log_density(self, t: Tensor) -> Tensor:
        score = (torch.logit(t) - self.mean) / self.std
        value = -0.5 * score.square() - math.log(self.std) - 0.5 * math.log(2 * math.pi) - torch.log(t * (1 - t))
        return torch.where((t > 0) & (t < 1), value, -torch.inf)  # the square wins at both ends


@dataclass(frozen=True)
class PowerTimes(TimeLaw):
    """Density ``(1 + a) t^a`` with ``a = 1 / (1 + alpha)``: more times near the data.

    ``alpha = 0`` gives density ``2 t``; uniform times are the limit of a large ``alpha``, and ``alpha`` near -1 leaves
    times near 1 only.

    Args:
        alpha: > -1.
    """

    alpha: float

    def __post_init__(self) -> None:
        checks.store(self, alpha=checks.number(self.alpha, "alpha"))
        if self.alpha <= -1:
            raise ValueError(f"alpha must be above -1; got {self.alpha!r}")

    @property
    def exponent(self) -> float:
        """Power a of the time in the density."""
        return 1 / (1 + self.alpha)

    def _draw(self, n: int, generator: torch.Generator | None, device: torch.device, dtype: torch.dtype) -> Tensor:
        return draw(torch.rand, n, generator=generator, device=device, dtype=dtype) ** (1 / (1 + self.exponent))

    def _log_density(self, t: Tensor) -> Tensor:
        return math.log1p(self.exponent) + self.exponent * torch.log(t)


@dataclass(frozen=True)
class ShiftedTimes(TimeLaw):
    """Times of a base law moved by ``t -> t / (shift - (shift - 1) t)``: towards the noise for shifts above 1.

    Args:
        base: law of the times before the shift.
        shift: > 0; 1 leaves them as they are.

    >>> ShiftedTimes(UniformTimes(), 3.0)(1000, torch.Generator().manual_seed(0)).mean() < 0.4
    tensor(True)
    """

    base: TimeLaw = field(default_factory=UniformTimes)
    shift: float = 1.0

    def __post_init__(self) -> None:
        check_times(self.base, "base")
        checks.store(self, shift=checks.positive(self.shift, "shift"))

    def _draw(self, n: int, generator: torch.Generator | None, device: torch.device, dtype: torch.dtype) -> Tensor:
        t = self.base(n, generator, device, dtype)
        return t / (self.shift - (self.shift - 1) * t)

    def _log_density(self, t: Tensor) -> Tensor:
        stretch = 1 + (self.shift - 1) * t
        before = (self.shift * t / stretch).clamp(0, 1)  # rounding must not leave [0, 1]
        return self.base.log_density(before) + math.log(self.shift) - 2 * torch.log(stretch)


def check_times(times: object, name: str = "times") -> TimeLaw:
    """A time law, or a TypeError."""
    return checks.instance(times, name, TimeLaw, "a time law such as flows.UniformTimes()")
