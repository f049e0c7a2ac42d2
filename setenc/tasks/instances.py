"""Multiple-instance learning: a label for a bag of instances, of which few or one may matter (Camelyon16's pattern).

The model and loss of Willette et al. 2023 (arXiv 2208.12401): slots over the bag and a maximum over the instances.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from setenc.decoders import SetTransformerDecoder
from setenc.encode import encode
from setenc.encoder import UMBC
from setenc.pooling import DeepSetsPooling, Pooling, SlotPooling


def rare_instance_bags(
    batch_size: int,
    num_instances: int,
    *,
    dim: int = 16,
    num_positive: int = 1,
    shift: float = 4.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Bags ``(B, N, d)`` of normal instances and labels ``(B,)``: positive bags hold a few shifted ones.

    >>> x, y = rare_instance_bags(4, 100)
    >>> x.shape, y.shape
    (torch.Size([4, 100, 16]), torch.Size([4]))
    """
    x = torch.randn(batch_size, num_instances, dim, generator=generator)
    labels = torch.rand(batch_size, generator=generator) < 0.5
    chosen = torch.rand(batch_size, num_instances, generator=generator).argsort(1) < num_positive
    x[..., 0] += shift * (labels[:, None] & chosen)
    return x, labels.float()


class BagClassifier(nn.Module):
    """A bag's logit from slots over all instances, and the largest logit of a single instance beside it.

    Both come from the same features, streamed: no instance is kept, whatever the size of the bag. The features are
    computed once for each of the two.

    Args:
        in_dim: features of an instance.
        width: features of the slots.
        num_slots: slots of the pooling.
        extractor: of instance features, ``(B, n, …)`` -> ``(B, n, in_dim)``; None is dropout of the given ones.
        dropout: of the features and around the decoder.
        pooling: another pooling than softmax attention, from ``in_dim`` to ``width`` features.

    >>> model = BagClassifier(16, width=8, num_slots=4)
    >>> model.loss(*rare_instance_bags(4, 100)).shape
    torch.Size([])
    """

    def __init__(
        self,
        in_dim: int,
        *,
        width: int = 128,
        num_slots: int = 64,
        extractor: nn.Module | None = None,
        dropout: float = 0.5,
        pooling: Pooling | None = None,
    ) -> None:
        super().__init__()
        extractor = nn.Dropout(dropout) if extractor is None else extractor
        decoder = nn.Sequential(
            nn.Dropout(dropout),
            SetTransformerDecoder(width, 0, num_heads=1, num_outputs=1, norm=True),
            nn.Dropout(dropout),
            nn.Linear(width, 1),
        )
        self.bag = UMBC(extractor, pooling or SlotPooling(in_dim, width, num_slots, num_heads=1), decoder)
        self.instance = UMBC(extractor, DeepSetsPooling(in_dim, 1, "max"), None)

    def forward(self, x: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Logits ``(B,)`` of the bag and of its most suspicious instance; ``options`` go to `encode`."""
        bag, instance = (encode(enc, x, **options)[:, 0, 0] for enc in (self.bag, self.instance))
        return bag, instance

    def score(self, x: Any, **options: Any) -> Tensor:
        """Probabilities ``(B,)``: the mean of both."""
        return torch.stack(self(x, **options)).sigmoid().mean(0)

    def loss(self, x: Any, labels: Tensor, **options: Any) -> Tensor:
        """The mean of the two binary cross-entropies with ``labels`` ``(B,)``."""
        logits = torch.stack(self(x, **options))
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits).expand_as(logits))
