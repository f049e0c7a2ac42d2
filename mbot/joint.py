"""Costs of features and labels together, for domain adaptation: DeepJDOT (arXiv 1803.10081), JUMBOT (2103.03606)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mbot import checks
from mbot.cost import check_cost, pairwise


@dataclass(frozen=True)
class JointCost:
    """Distance of features plus cross-entropy of a source's labels under a target's predictions.

    ``C_ij = features · d(g_i, h_j) - labels · Σ_c p_ic log q_jc`` with features g and h, labels p of the source and
    predictions q of the target. Points are both in one row, made by `source` and `target`. Gradients reach features and
    logits of both sides.

    Args:
        num_classes: C.
        features: weight of the distance; α of DeepJDOT, η1 of JUMBOT and m-POT.
        labels: weight of the cross-entropy; λ, η2.
        distance: of the features, as in `mbot.pairwise_cost`.

    Raises:
        ValueError: (when called) rows of no more numbers than classes.

    >>> cost = JointCost(num_classes=2, features=0.1, labels=1.0)
    >>> x = cost.source(torch.zeros(2, 3), torch.tensor([0, 1]))
    >>> y = cost.target(torch.ones(1, 3), torch.zeros(1, 2))
    >>> cost(x, y)              # 0.1 · 3 + log 2
    tensor([[0.9931],
            [0.9931]])
    """

    num_classes: int
    features: float = 1.0
    labels: float = 1.0
    distance: str = "sqeuclidean"

    def __post_init__(self) -> None:
        checks.store(
            self,
            num_classes=checks.count(self.num_classes, "num_classes", at_least=2),
            features=checks.positive(self.features, "features", allow_zero=True),
            labels=checks.positive(self.labels, "labels", allow_zero=True),
        )
        check_cost(self.distance)

    def source(self, features: Tensor, labels: Tensor) -> Tensor:
        """Rows ``(…, n, d + C)`` of features ``(…, n, d)`` and labels: integers ``(…, n)``, or ``(…, n, C)`` shares."""
        if not labels.is_floating_point():
            if labels.shape != features.shape[:-1]:
                raise ValueError(
                    f"labels must be one integer a row, {tuple(features.shape[:-1])}; got {tuple(labels.shape)}"
                )
            labels = F.one_hot(labels.long(), self.num_classes)
        return self._rows(features, labels, "labels")

    def target(self, features: Tensor, logits: Tensor) -> Tensor:
        """Rows ``(…, m, d + C)`` of features ``(…, m, d)`` and logits (or log-probabilities) ``(…, m, C)``."""
        return self._rows(features, logits, "logits")

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Costs ``(…, n, m)`` of rows of `source` and rows of `target`."""
        classes = self.num_classes
        if min(x.shape[-1], y.shape[-1]) <= classes:
            raise ValueError(
                f"rows must hold features and {classes} classes, as source() and target() make them; got "
                f"{tuple(x.shape)} and {tuple(y.shape)}"
            )
        moved = pairwise(x[..., :-classes], y[..., :-classes], self.distance)
        predicted = pairwise(x[..., -classes:], y[..., -classes:].log_softmax(-1), "dot")
        return self.features * moved + self.labels * predicted

    def _rows(self, features: Tensor, classes: Tensor, what: str) -> Tensor:
        if classes.shape != (*features.shape[:-1], self.num_classes):
            raise ValueError(
                f"{what} must have shape {(*features.shape[:-1], self.num_classes)}, as num_classes="
                f"{self.num_classes}; got {tuple(classes.shape)}"
            )
        return torch.cat((features, classes.to(features)), -1)
