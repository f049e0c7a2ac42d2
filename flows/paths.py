"""Probability paths between a paired noise x0 and sample x1: where a point is at time t, and how fast it moves there.

A path is a frozen dataclass with one method, ``sample(x0, x1, t, noise) -> (xt, ut)``; adding one means a new class
here and a line in ``flows/__init__.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from mbot import checks


def _like(t: Tensor, x: Tensor) -> Tensor:
    """Times ``(B,)`` as ``(B, 1, …)`` beside ``(B, d…)``."""
    return t.reshape(-1, *([1] * (x.ndim - 1))).to(x.dtype)


@dataclass(frozen=True)
class Path(ABC):
    """A conditional probability path ``p_t(x | x0, x1)`` with its conditional velocity."""

    @abstractmethod
    def sample(self, x0: Tensor, x1: Tensor, t: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Point and velocity at time ``t``.

        Args:
            x0: ``(B, d…)`` source samples (t = 0).
            x1: ``(B, d…)`` target samples (t = 1).
            t: ``(B,)`` times in [0, 1].
            noise: ``(B, d…)`` standard normal, needed where `needs_noise`.

        Returns:
            ``xt`` and ``ut``, both ``(B, d…)``.
        """

    @property
    def needs_noise(self) -> bool:
        """Whether ``sample`` uses its ``noise``."""
        return False


@dataclass(frozen=True)
class LinearPath(Path):
    """Straight lines: ``xt = (1 - t) x0 + t x1 + sigma * noise`` with velocity ``x1 - x0`` (I-CFM, arXiv 2302.00482).

    Args:
        sigma: standard deviation around the line, >= 0; 0 in rectified flow and in C²OT.
    """

    sigma: float = 0.0

    def __post_init__(self) -> None:
        checks.positive(self.sigma, "sigma", allow_zero=True)

    @property
    def needs_noise(self) -> bool:
        """Whether there is any."""
        return self.sigma > 0

    def sample(self, x0: Tensor, x1: Tensor, t: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Path.sample`."""
        xt = x0 + _like(t, x0) * (x1 - x0)
        if self.needs_noise:
            if noise is None:
                raise ValueError("noise is needed: sigma > 0")
            xt = xt + self.sigma * noise
        return xt, x1 - x0
