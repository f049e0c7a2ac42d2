"""Two-dimensional toy distributions of the flow-matching papers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mbot import checks
from mbot.random import draw


def eight_gaussians(
    n: int,
    *,
    radius: float = 5.0,
    std: float = 0.1**0.25,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Eight Gaussians on a circle.

    Args:
        n: number of points.
        radius: of the circle.
        std: per axis. The default is what the published tables used: the official toys pass the square root of their
            ``var=0.1`` as a covariance, so that the standard deviation is ``0.1 ** 0.25 = 0.562``, not 0.316.
        generator: source of randomness.

    Returns:
        ``(n, 2)`` float32 points.
    """
    checks.count(n, "n")
    cpu = torch.device("cpu")
    angle = draw(torch.rand, n, generator=generator, device=cpu).mul(8).floor() * (math.pi / 4)
    noise = draw(torch.randn, n, 2, generator=generator, device=cpu)
    return radius * torch.stack((angle.cos(), angle.sin()), 1) + std * noise


def moons(
    n: int,
    *,
    noise: float = 0.2,
    official: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Two moons, scaled by 3 and shifted by -1 as in the C²OT and torchcfm toys.

    The noise of these toys is one uniform number in ``[0, noise]`` a point, added to both coordinates before scaling.

    Args:
        n: number of points.
        noise: width of the uniform noise, before scaling.
        official: lay the points out as the official toy does: class by class, at equal steps along each arc. The
            distribution is the same; the rows come sorted, so shuffle them before cutting batches.
        generator: source of randomness.

    Returns:
        ``(n, 2)`` float32 points, ``(n,)`` int64 classes (0: upper moon, 1: lower moon).
    """
    checks.count(n, "n")
    cpu = torch.device("cpu")
    if official:
        upper = n // 2
        angle = torch.cat((torch.linspace(0, math.pi, upper), torch.linspace(0, math.pi, n - upper)))
        label = torch.cat((torch.zeros(upper), torch.ones(n - upper))).long()
    else:
        angle = math.pi * draw(torch.rand, n, generator=generator, device=cpu)
        label = (draw(torch.rand, n, generator=generator, device=cpu) < 0.5).long()
    sign = 1 - 2 * label
    points = torch.stack((label + sign * angle.cos(), label / 2 + sign * angle.sin()), 1)
    shift = noise * draw(torch.rand, n, 1, generator=generator, device=cpu)
    return 3 * (points + shift) - 1, label


def checkerboard(n: int, *, squares: int = 4, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Points spread evenly over the dark squares of a board on ``[-4, 4]²``.

    Args:
        n: number of points.
        squares: a side; even.
        generator: source of randomness.

    Returns:
        ``(n, 2)`` float32 points, ``(n,)`` int64 columns of the board.
    """
    checks.count(n, "n")
    if checks.count(squares, "squares", at_least=2) % 2:
        raise ValueError(f"squares must be even; got {squares}")
    cpu = torch.device("cpu")
    column = draw(torch.rand, n, generator=generator, device=cpu).mul(squares).long()
    row = 2 * draw(torch.rand, n, generator=generator, device=cpu).mul(squares // 2).long() + column % 2
    inside = draw(torch.rand, n, 2, generator=generator, device=cpu)
    return (torch.stack((column, row), 1) + inside) * (8 / squares) - 4, column
