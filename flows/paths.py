"""Probability paths between a paired noise x0 and sample x1: where a point is at time t, and how fast it moves there.

A path is a frozen dataclass with one method, ``sample(x0, x1, t, noise) -> (xt, ut)``; `AffinePath` has it for paths
that weigh x0, x1 and noise by functions of the time. Adding one means a new class here and a line in
``flows/__init__.py``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from mbot import Coupling, EntropicOT, IndependentCoupling, OTCoupling, checks

_FLOOR = 1e-8  # under t (1 - t) in the bridge's velocity, as in the reference implementation


def beside(values: Tensor, x: Tensor) -> Tensor:
    """One number a sample ``(B,)`` as ``(B, 1, …)``, to stand beside samples ``(B, d…)``; the dtype stays."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


def _noise(noise: Tensor | None, path: Path) -> Tensor:
    if noise is None:
        raise ValueError(f"noise is needed by {path}: standard normal of the samples' shape")
    return noise


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

    def default_coupling(self) -> Coupling:
        """The coupling that the path's theory requires; independent pairs unless a path overrides this."""
        return IndependentCoupling()

    def check_coupling(self, coupling: Coupling) -> None:  # noqa: B027  # most paths take any coupling
        """Refuse a coupling that contradicts the path, with a ValueError; any is taken unless a path overrides this."""


class Weights(NamedTuple):
    """Weights of an affine path at a time, and their derivatives (in units of `AffinePath.speed`).

    Attributes:
        x0: weight of the source sample, the literature's sigma(t).
        x1: weight of the target sample, its alpha(t).
        x0_rate: derivative of the weight of x0.
        x1_rate: derivative of the weight of x1.
    """

    x0: Tensor
    x1: Tensor
    x0_rate: Tensor | float
    x1_rate: Tensor | float


@dataclass(frozen=True)
class AffinePath(Path):
    """``xt = x0_weight(t) x0 + x1_weight(t) x1 + std(t) noise``, with the derivative of each as velocity.

    A subclass says what the weights are (`weights`), and the standard deviation of the noise where it has some (`std`).
    """

    speed: ClassVar[float] = 1.0
    """Factor of the derivatives of the weights."""
    convex: ClassVar[bool] = False
    """Whether the weights of x0 and x1 add up to 1; a pair of equal samples then stays exactly there."""

    @abstractmethod
    def weights(self, t: Tensor) -> Weights:
        """Weights of x0 and x1 at times of any shape."""

    def std(self, t: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Standard deviation of the noise at times of any shape, and its derivative divided by itself."""
        return 0.0, 0.0

    def sample(self, x0: Tensor, x1: Tensor, t: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Path.sample`."""
        at = self.weights(beside(t, x0).to(x0.dtype))
        xt = x0 + at.x1 * (x1 - x0) if self.convex else at.x0 * x0 + at.x1 * x1
        ut = self.speed * (at.x1_rate * x1 + at.x0_rate * x0)
        if not self.needs_noise:
            return xt, ut
        # Near t = 0 and 1, the noise of a bridge needs more digits of the time than half precision has.
        std, growth = self.std(beside(t.to(torch.promote_types(t.dtype, torch.float32)), x0))
        offset = std * _noise(noise, self)
        drift = 0.0 if isinstance(growth, float) else (growth * offset).to(x0.dtype)
        return xt + offset.to(x0.dtype), ut + drift


@dataclass(frozen=True)
class _EvenNoise(AffinePath):
    """A path with noise of the standard deviation ``sigma`` at all times."""

    sigma: float = 0.0

    def __post_init__(self) -> None:
        checks.store(self, sigma=checks.positive(self.sigma, "sigma", allow_zero=True))

    @property
    def needs_noise(self) -> bool:
        """Whether there is any."""
        return self.sigma > 0

    def std(self, t: Tensor) -> tuple[float, float]:
        """``sigma`` at all times."""
        return self.sigma, 0.0


@dataclass(frozen=True)
class LinearPath(_EvenNoise):
    """Straight lines: ``xt = (1 - t) x0 + t x1 + sigma * noise`` with velocity ``x1 - x0`` (I-CFM, arXiv 2302.00482).

    Args:
        sigma: standard deviation around the line, >= 0; 0 in rectified flow and in C²OT.
    """

    convex: ClassVar[bool] = True

    def weights(self, t: Tensor) -> Weights:
        """``1 - t`` and ``t``."""
        return Weights(1 - t, t, -1.0, 1.0)


@dataclass(frozen=True)
class SchrodingerBridgePath(AffinePath):
    """Brownian bridges of the Schrödinger bridge (SB-CFM; Tong et al. 2024, arXiv 2302.00482).

    ``xt = (1 - t) x0 + t x1 + sigma sqrt(t (1 - t)) noise`` with velocity
    ``(1 - 2t) / (2 t (1 - t)) (xt - mean) + x1 - x0``. The bridge belongs with entropic pairs of squared distances at
    the regularisation ``2 sigma²`` (``sigma²`` of the cost ``"dot"``, which has the same plans), which
    `flows.FlowMatching`, `flows.Trainer` and the command line take unless they are given a coupling. Entropic pairs of
    another regularisation or of other costs and independent pairs (an infinite regularisation) contradict it; exact
    pairs, the limit of a small ``sigma``, and conditional ones are taken. See `mbot.Coupling.entropic_reg`.

    The velocity's noise term has an infinite limit at t = 0 and t = 1 (and a loss whose variance grows with
    ``log 1/t``); ``t (1 - t)`` is floored as in the reference, so that the velocity stays finite there.

    Args:
        sigma: diffusion of the bridge, > 0.
    """

    sigma: float = 1.0
    convex: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.store(self, sigma=checks.positive(self.sigma, "sigma"))

    @property
    def needs_noise(self) -> bool:
        """Always."""
        return True

    def default_coupling(self) -> Coupling:
        """Entropic transport with ``reg = 2 sigma²``."""
        # Drawing pairs from the plan disturbs the marginals by far more than this tolerance.
        return OTCoupling(EntropicOT(reg=2 * self.sigma**2, tol=1e-3))

    def check_coupling(self, coupling: Coupling) -> None:
        """Refuse independent pairs, and entropic ones of another regularisation than ``2 sigma²`` or of other costs."""
        wanted, reg = 2 * self.sigma**2, coupling.entropic_reg
        if reg is not None and not math.isclose(reg, wanted, rel_tol=1e-6):
            has = "is of other costs" if math.isnan(reg) else f"has reg = {reg:g} for these"
            raise ValueError(
                f"{self} is made of entropic pairs of reg = 2 sigma² = {wanted:g} for squared distances; {coupling} "
                f"{has}. Give no coupling for the path's own, or the sigma that belongs to the coupling"
            )

    def weights(self, t: Tensor) -> Weights:
        """``1 - t`` and ``t``."""
        return Weights(1 - t, t, -1.0, 1.0)

    def std(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``sigma sqrt(t (1 - t))``."""
        variance = t * (1 - t)
        return self.sigma * variance.sqrt(), (1 - 2 * t) / (2 * variance + _FLOOR)


@dataclass(frozen=True)
class TargetPath(AffinePath):
    """From the noise to a small Gaussian around the sample (FM; Lipman et al. 2023, arXiv 2210.02747, Eq. 20-23).

    ``xt = (1 - (1 - sigma) t) x0 + t x1`` with velocity ``x1 - (1 - sigma) x0``, which is the paper's
    ``(x1 - (1 - sigma) xt) / (1 - (1 - sigma) t)``. ``x0`` is the paper's standard normal noise, so the path works
    with any coupling of it.

    Args:
        sigma: standard deviation left around x1 at t = 1, in [0, 1).
    """

    sigma: float = 0.0

    def __post_init__(self) -> None:
        checks.store(self, sigma=checks.positive(self.sigma, "sigma", allow_zero=True))
        if self.sigma >= 1:
            raise ValueError(f"sigma must lie in [0, 1): it is what is left of unit noise; got {self.sigma!r}")

    def weights(self, t: Tensor) -> Weights:
        """``1 - (1 - sigma) t`` and ``t``."""
        return Weights(1 - (1 - self.sigma) * t, t, self.sigma - 1, 1.0)


@dataclass(frozen=True)
class VariancePreservingPath(_EvenNoise):
    """Quarter circles that keep the variance (VP; Albergo and Vanden-Eijnden 2023, arXiv 2209.15571).

    ``xt = cos(πt/2) x0 + sin(πt/2) x1 + sigma * noise`` with velocity ``π/2 (cos(πt/2) x1 - sin(πt/2) x0)``.

    Args:
        sigma: standard deviation around the arc, >= 0.
    """

    speed: ClassVar[float] = math.pi / 2

    def weights(self, t: Tensor) -> Weights:
        """``cos(πt/2)`` and ``sin(πt/2)``."""
        angle = t * (math.pi / 2)
        x0, x1 = angle.cos(), angle.sin()
        return Weights(x0, x1, -x1, x0)


def check_path(path: object) -> Path:
    """A path, or a TypeError."""
    return checks.instance(path, "path", Path, "a flows path such as LinearPath()")
