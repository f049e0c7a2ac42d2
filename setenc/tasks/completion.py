"""Image completion: a conditional neural process (Garnelo et al. 2018, arXiv 1807.01613) with a set encoder.

An image is a set of pixels (row, column, colours); from some of them the model predicts all. Sizes are those of
Willette et al. 2023 (arXiv 2208.12401) on CelebA at 32 x 32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from setenc import checks
from setenc.decoders import MLPDecoder, SetTransformerDecoder
from setenc.encode import encode
from setenc.encoder import UMBC
from setenc.pooling import Pooling, SlotPooling


def pixel_sets(
    images: Tensor, num_context: int, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Images ``(B, C, H, W)`` in [0, 1] as sets.

    Returns:
        The context ``(B, num_context, 2 + C)``, random pixels of each image; the coordinates ``(B, H W, 2)`` and the
        colours ``(B, H W, C)`` of all pixels.

    >>> [t.shape for t in pixel_sets(torch.rand(3, 1, 8, 8), 20)]
    [torch.Size([3, 20, 3]), torch.Size([3, 64, 2]), torch.Size([3, 64, 1])]
    """
    batch, _, height, width = images.shape
    if not 0 < num_context <= height * width:
        raise ValueError(f"num_context must lie in [1, {height * width}], the number of pixels; got {num_context}")
    rows, columns = torch.arange(height) / height, torch.arange(width) / width
    grid = torch.cartesian_prod(rows, columns).to(images).expand(batch, -1, -1)
    colours = images.flatten(2).mT
    order = torch.rand(batch, height * width, generator=generator).argsort(1)[:, :num_context, None].to(images.device)
    elements = torch.cat((grid, colours), -1)
    return elements.gather(1, order.expand(-1, -1, elements.shape[-1])), grid, colours


class PixelEmbedding(nn.Module):
    """Sines and cosines of the two coordinates, which come first, at ``π 2^j`` beside what is given.

    >>> PixelEmbedding(3)(torch.rand(2, 5, 4)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(self, num_frequencies: int) -> None:
        super().__init__()
        self.num_frequencies = checks.count(num_frequencies, "num_frequencies", at_least=0)

    def forward(self, x: Tensor) -> Tensor:
        """``(…, 2 + C)`` to ``(…, 2 + C + 4 num_frequencies)``."""
        frequencies = math.pi * 2.0 ** torch.arange(self.num_frequencies, device=x.device, dtype=x.dtype)
        angles = (x[..., :2, None] * frequencies).flatten(-2)
        return torch.cat((x, angles.sin(), angles.cos()), -1)


class ImageCompletion(nn.Module):
    """A normal distribution of every pixel's colours, given a set of known pixels.

    Args:
        channels: colours ``C`` of a pixel.
        width: features throughout.
        num_slots: slots of the pooling.
        pooling: another pooling than softmax attention of one head without residual.
        decoder: another decoder ``(B, K, width)`` -> ``(B, 1, width)`` than two `SAB` and a `PMA`.
        num_frequencies: of a `PixelEmbedding`, which learns in fewer steps; 0 is the paper's plain coordinates.

    >>> model = ImageCompletion(1, width=16, num_slots=8)
    >>> context, grid, colours = pixel_sets(torch.rand(3, 1, 8, 8), 20)
    >>> model.loss(context, grid, colours).shape
    torch.Size([])
    """

    def __init__(
        self,
        channels: int = 3,
        *,
        width: int = 128,
        num_slots: int = 128,
        pooling: Pooling | None = None,
        decoder: nn.Module | None = None,
        num_frequencies: int = 0,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.embed = PixelEmbedding(num_frequencies)
        place = 2 + 4 * num_frequencies
        self.enc = UMBC(
            nn.Sequential(self.embed, MLPDecoder(place + channels, width, hidden_dim=width, num_layers=4)),
            pooling or SlotPooling(width, width, num_slots, num_heads=1, residual=False, slot_norm=True),
            decoder or SetTransformerDecoder(width, 2, num_heads=1, num_outputs=1, norm=True),
        )
        self.head = MLPDecoder(width + place, 2 * channels, hidden_dim=width, num_layers=5)

    def forward(self, context: Any, coordinates: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """Means and standard deviations ``(B, M, C)`` at ``coordinates`` ``(B, M, 2)``; ``options`` go to `encode`."""
        return self.predict(encode(self.enc, context, **options), coordinates)

    def predict(self, image: Tensor, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, from the encoder's output ``(B, 1, width)``: what ``enc.readout`` gives at any time."""
        image = image.expand(-1, coordinates.shape[1], -1)
        mean, raw = self.head(torch.cat((image, self.embed(coordinates)), -1)).split(self.channels, -1)
        return mean, 0.1 + 0.9 * F.softplus(raw)

    def loss(self, context: Any, coordinates: Tensor, colours: Tensor, **options: Any) -> Tensor:
        """Negative log-likelihood of ``colours`` ``(B, M, C)``, the mean over pixels and channels."""
        means, deviations = self(context, coordinates, **options)
        if colours.shape != means.shape:
            raise ValueError(f"colours must have shape (B, M, C) = {tuple(means.shape)}; got {tuple(colours.shape)}")
        return -torch.distributions.Normal(means, deviations).log_prob(colours).mean()
