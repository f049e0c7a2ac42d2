"""Long documents as bags of tokens, with any number of labels each (Willette et al. 2023, arXiv 2208.12401)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from setenc import checks
from setenc.decoders import SetTransformerDecoder
from setenc.encode import encode
from setenc.encoder import UMBC
from setenc.pooling import Pooling, SlotPooling


class TokenBagClassifier(nn.Module):
    """Token embeddings, slots over the whole document, a set transformer over the slots, a logit for each label.

    The paper's decoder is BERT on the slots and its embedding is BERT's: hand any in.

    Args:
        num_tokens: size of the vocabulary.
        num_labels: labels.
        width: features of a slot.
        num_slots: slots of the pooling.
        embedding: ``(B, n)`` int64 -> ``(B, n, embedding_dim)``; None is a new ``nn.Embedding``.
        embedding_dim: its features; None is ``width``.
        pooling: another pooling than slot-sigmoid attention of one head without residual.
        decoder: ``(B, K, width)`` -> ``(B, 1, num_labels)``; None is two `SAB`, a `PMA` and a linear map.

    >>> model = TokenBagClassifier(100, 5, width=16, num_slots=8)
    >>> model(torch.randint(100, (3, 40))).shape
    torch.Size([3, 5])
    """

    def __init__(
        self,
        num_tokens: int,
        num_labels: int,
        *,
        width: int = 128,
        num_slots: int = 256,
        embedding: nn.Module | None = None,
        embedding_dim: int | None = None,
        pooling: Pooling | None = None,
        decoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        features = embedding_dim or width
        extractor = nn.Sequential(
            embedding or nn.Embedding(num_tokens, features),
            nn.LayerNorm(features),
            *(layer for _ in range(2) for layer in (nn.Linear(features, features), nn.ReLU())),
        )
        self.enc = UMBC(
            extractor,
            pooling
            or SlotPooling(
                features, width, num_slots, num_heads=1, activation="slot-sigmoid", residual=False, slot_norm=True
            ),
            decoder or SetTransformerDecoder(width, 2, out_dim=num_labels, num_outputs=1),
        )

    def forward(self, tokens: Any, **options: Any) -> Tensor:
        """Logits ``(B, num_labels)`` of documents ``(B, N)``; ``options`` (mask, gradient, …) go to `encode`."""
        return encode(self.enc, tokens, **options)[:, 0]

    def loss(self, tokens: Any, labels: Tensor, **options: Any) -> Tensor:
        """Binary cross-entropy with ``labels`` ``(B, num_labels)``, the mean over documents and labels."""
        logits = self(tokens, **options)
        return F.binary_cross_entropy_with_logits(logits, checks.binary_labels(labels, logits))


def micro_f1(logits: Tensor, labels: Tensor) -> Tensor:
    """Micro-averaged F1 of labels with probability above 1/2; 1 where there is nothing to find and nothing found.

    >>> micro_f1(torch.tensor([[3.0, -1.0], [2.0, 1.0]]), torch.tensor([[1, 1], [1, 0]]))
    tensor(0.6667)
    """
    labels = checks.binary_labels(labels, logits)
    if checks.may_look(logits) and bool(logits.isnan().any()):
        raise ValueError("logits must not be NaN, which is neither above nor below 0")
    found, true = logits > 0, labels > 0
    hits, total = (found & true).sum(), found.sum() + true.sum()
    return 2 * hits / total if total else hits + 1.0
