"""Multiple-instance learning: a label for a bag of instances, of which few or one may matter (Camelyon16's pattern).

The model and loss of Willette et al. 2023 (arXiv 2208.12401): slots over the bag and a maximum over the instances.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from setenc import checks
from setenc.decoders import SetTransformerDecoder
from setenc.encode import encode
from setenc.encoder import UMBC
from setenc.pooling import InstancePooling, JointPooling, Pooling, SlotPooling


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

    Both come from the same features, computed once and streamed: no instance is kept, whatever the size of the bag.

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
        slots = pooling or SlotPooling(in_dim, width, num_slots, num_heads=1)
        self.enc = UMBC(extractor, JointPooling(slots, InstancePooling(in_dim, width)), None)
        self.decoder = nn.Sequential(
            nn.Dropout(dropout),
            SetTransformerDecoder(width, 0, num_heads=1, num_outputs=1, norm=True),
            nn.Dropout(dropout),
            nn.Linear(width, 1),
        )

    def forward(self, x: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Logits ``(B,)`` of the bag and of its most suspicious instance; ``options`` go to `encode`."""
        slots = encode(self.enc, x, **options)
        return self.decoder(slots[:, :-1])[:, 0, 0], slots[:, -1, 0]

    def score(self, x: Any, **options: Any) -> Tensor:
        """Probabilities ``(B,)``: the mean of both."""
        return torch.stack(self(x, **options)).sigmoid().mean(0)

    def loss(self, x: Any, labels: Tensor, **options: Any) -> Tensor:
        """The mean of the two binary cross-entropies with ``labels`` ``(B,)``."""
        logits = torch.stack(self(x, **options))
        return F.binary_cross_entropy_with_logits(logits, checks.binary_labels(labels, logits[0]).expand_as(logits))


def clam_instance_loss(
    features: Tensor,
    attention: Tensor,
    labels: Tensor,
    classifiers: nn.ModuleList | list[nn.Module],
    *,
    num_instances: int = 8,
    mask: Tensor | None = None,
    others: bool = False,
) -> Tensor:
    """CLAM's loss on single instances: attention must find instances that a classifier can tell from the rest.

    For the class of each bag, the ``num_instances`` instances with the most attention are positive and those with the
    least are negative examples of that class's instance classifier, by cross-entropy (Lu et al. 2021, arXiv 2004.09666;
    its smooth top-1 loss is another choice of the same examples). Small bags give half their instances to each side.

    The instances with the most or least attention of a stream are among those of its chunks, so a stream needs no more
    than keeping those.

    Args:
        features: ``(B, n, d)`` of the instances.
        attention: ``(B, n)`` logits or shares; for one of each class ``(B, n, C)``. A constant here.
        labels: ``(B,)`` int64 classes of the bags.
        classifiers: of each class, ``(…, d)`` -> ``(…, 2)`` logits: not of this class, of this class.
        num_instances: instances of each kind, of a bag.
        mask: ``(B, n)`` bool, True = an instance.
        others: classes exclude each other: the most attended instances of the other classes are negative there.

    >>> classifiers = [torch.nn.Linear(4, 2) for _ in range(3)]
    >>> x, attention = torch.randn(5, 40, 4), torch.randn(5, 40)
    >>> clam_instance_loss(x, attention, torch.tensor([0, 1, 2, 1, 0]), classifiers).shape
    torch.Size([])
    """
    features, mask, _ = checks.elements(features, mask, None, "features")
    attention, labels = checks.as_tensor(attention), checks.as_tensor(labels)
    if not isinstance(attention, Tensor) or not isinstance(labels, Tensor):
        kinds = f"{type(attention).__name__} and {type(labels).__name__}"
        raise TypeError(f"attention and labels must be tensors; got {kinds}")
    if attention.shape[:2] != features.shape[:2] or attention.ndim not in (2, 3):
        raise ValueError(f"attention must have shape (B, n) or (B, n, C); got {tuple(attention.shape)}")
    if attention.ndim == 3 and attention.shape[2] != len(classifiers):
        raise ValueError(f"attention (B, n, C) must have C = {len(classifiers)} classes; got {tuple(attention.shape)}")
    seen = attention.detach() if mask is None else attention.detach()[mask]
    if checks.may_look(seen) and bool(seen.isnan().any()):
        raise ValueError("attention must not be NaN at an instance: NaN has no order")
    if labels.shape != features.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels must be an int64 tensor (B,); got {labels.dtype} {tuple(labels.shape)}")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(classifiers):
        raise ValueError(f"labels must lie in [0, {len(classifiers) - 1}], one for each classifier")
    count = checks.count(num_instances, "num_instances")
    attention = attention.detach()[..., None] if attention.ndim == 2 else attention.detach()
    attention = attention.expand(-1, -1, len(classifiers))
    total, examples = features.new_zeros(()), 0
    for b, label in enumerate(labels.tolist()):
        real = features[b] if mask is None else features[b][mask[b]]
        each = min(count, len(real) // 2)
        for c, classifier in enumerate(classifiers):
            if each == 0 or (c != label and not others):
                continue
            order = (attention[b] if mask is None else attention[b][mask[b]])[:, c].argsort(
                descending=True, stable=True
            )
            most, least = real[order[:each]], real[order[-each:]]
            wanted = torch.ones(each, dtype=torch.int64, device=real.device)
            logits = classifier(torch.cat((most, least)) if c == label else most)
            if logits.shape[1:] != (2,):
                raise ValueError(
                    f"classifiers must give two logits an instance; classifier {c} gave {tuple(logits.shape)}"
                )
            target = torch.cat((wanted, 0 * wanted)) if c == label else 0 * wanted
            total = total + F.cross_entropy(logits, target, reduction="sum")
            examples += len(target)
    return total / max(examples, 1)
