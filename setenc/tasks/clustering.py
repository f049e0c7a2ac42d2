"""Amortised clustering: a set encoder reads points and predicts the Gaussian mixture that they come from.

Data and model of Willette et al. 2023 (arXiv 2208.12401), after Lee et al. 2019 (arXiv 1810.00825).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from setenc.decoders import SetTransformerDecoder
from setenc.encode import encode
from setenc.encoder import UMBC
from setenc.pooling import Pooling, SlotPooling


@dataclass(eq=False)
class MixtureSets:
    """``B`` sets of points and the diagonal Gaussian mixtures they were drawn from.

    Args:
        x: ``(B, N, d)`` points.
        labels: ``(B, N)`` components of the points.
        proportions: ``(B, K)``.
        means: ``(B, K, d)``.
        stds: ``(B, K, d)``.
    """

    x: Tensor
    labels: Tensor
    proportions: Tensor
    means: Tensor
    stds: Tensor

    def oracle_nll(self) -> Tensor:
        """Negative log-likelihood of the points under the true mixtures, the mean over points and sets: the floor."""
        return -mixture_log_likelihood(self.x, self.proportions.log(), self.means, self.stds.square()).mean()


def mixture_sets(
    batch_size: int,
    num_points: int,
    *,
    num_components: int = 4,
    dim: int = 2,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> MixtureSets:
    """Fresh sets of the paper's generator.

    Proportions are Dirichlet(1, …, 1), means uniform in [-4, 4] and standard deviations uniform in [0.1, 0.6] per
    component and axis. True mixtures have a negative log-likelihood of 1.567 on average at the defaults.

    >>> mixture_sets(3, 100).x.shape
    torch.Size([3, 100, 2])
    """

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator)

    exponential = -torch.log1p(-uniform(batch_size, num_components))
    proportions = exponential / exponential.sum(1, keepdim=True)
    means = 8 * uniform(batch_size, num_components, dim) - 4
    stds = 0.1 + 0.5 * uniform(batch_size, num_components, dim)
    labels = torch.multinomial(proportions, num_points, replacement=True, generator=generator)
    index = labels[..., None].expand(-1, -1, dim)
    noise = torch.randn(batch_size, num_points, dim, generator=generator)
    x = means.gather(1, index) + stds.gather(1, index) * noise
    return MixtureSets(*(t.to(device) for t in (x, labels, proportions, means, stds)))


def mixture_log_likelihood(x: Tensor, log_proportions: Tensor, means: Tensor, variances: Tensor) -> Tensor:
    """``log sum_k pi_k N(x; mu_k, diag v_k)`` of points ``(B, N, d)`` -> ``(B, N)``."""
    gap = (x[:, :, None] - means[:, None]).square() / variances[:, None]
    normal = -0.5 * (gap + (2 * math.pi * variances[:, None]).log()).sum(-1)
    return (log_proportions[:, None] + normal).logsumexp(-1)


class MixtureClustering(nn.Module):
    """UMBC that predicts a mixture: one slot, and so one component, each; the paper's sizes by default.

    Args:
        num_components: components ``K`` and slots.
        dim: coordinates of a point.
        width: features throughout.
        pooling: another pooling of ``num_components`` slots than softmax attention with random slots.
        decoder: another decoder ``(B, K, width)`` -> ``(B, K, 1 + 2 dim)`` than three `SAB`.

    >>> model = MixtureClustering()
    >>> sum(p.numel() for p in model.parameters())
    266501
    >>> model.loss(mixture_sets(3, 50).x).shape
    torch.Size([])
    """

    def __init__(
        self,
        num_components: int = 4,
        dim: int = 2,
        *,
        width: int = 128,
        pooling: Pooling | None = None,
        decoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.enc = UMBC(
            nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, width)),
            pooling or SlotPooling(width, width, num_components),
            decoder or SetTransformerDecoder(width, 3, out_dim=1 + 2 * dim),
        )

    def mixture(self, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-proportions ``(B, K)``, means and variances ``(B, K, d)`` from the encoder's output."""
        logits, means, raw = output.split([1, self.dim, self.dim], -1)
        return logits[..., 0].log_softmax(-1), means, F.softplus(raw).clamp_min(0.01)

    def forward(self, x: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The mixture predicted from points ``(B, N, d)``; ``options`` (gradient, chunk_size, …) go to `encode`."""
        return self.mixture(encode(self.enc, x, **options))

    def loss(self, x: Tensor, target: Tensor | None = None, **options: Any) -> Tensor:
        """Negative log-likelihood of ``target`` (None: of ``x``) under the mixture predicted from ``x``."""
        return -mixture_log_likelihood(x if target is None else target, *self(x, **options)).mean()
