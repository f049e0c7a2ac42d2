"""Conditions and intervals of time, which models add to their embedding of the time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mbot import checks
from mbot.conditions import as_tensor


class ConditionEmbedding(nn.Module):
    """Class labels by a table, vectors by a linear map; "no condition" (label -1, a vector of NaN) as zero.

    Args:
        out_dim: features of the embedding.
        num_classes: labels ``(B,)`` of integers 0 … num_classes - 1, or -1.
        condition_dim: features of a vector condition ``(B, condition_dim)``; ``(B,)`` counts as one feature. Exactly
            one of the two.

    >>> ConditionEmbedding(4, num_classes=2)(torch.tensor([1, -1]))[1].tolist()
    [0.0, 0.0, 0.0, 0.0]
    """

    def __init__(self, out_dim: int, *, num_classes: int = 0, condition_dim: int = 0) -> None:
        super().__init__()
        if bool(num_classes) == bool(condition_dim):
            raise ValueError("give condition_dim (vector conditions) or num_classes (labels), not both")
        self.num_classes, self.condition_dim = num_classes, condition_dim
        self.embed: nn.Module = nn.Embedding(num_classes, out_dim) if num_classes else nn.Linear(condition_dim, out_dim)

    def forward(self, y: Any) -> Tensor:
        """``(B, out_dim)``."""
        if y is None:
            raise ValueError("this model was built with conditions: pass y")
        weight = next(self.embed.parameters())
        y = as_tensor(y, "y").to(weight.device)
        if self.num_classes:
            if y.ndim != 1 or y.is_floating_point():
                raise ValueError(
                    f"this model was built with num_classes={self.num_classes}: y must hold integer labels of shape "
                    f"(B,); got {y.dtype} of shape {tuple(y.shape)}"
                )
            return self._table(y.long())
        vectors = y.reshape(len(y), -1)
        if vectors.shape[1] != self.condition_dim:
            raise ValueError(
                f"this model was built with condition_dim={self.condition_dim}; got conditions {tuple(y.shape)}"
            )
        absent = vectors.isnan().all(1, keepdim=True)
        return torch.where(absent, 0, self.embed(torch.where(absent, 0, vectors).to(weight.dtype)))

    def _table(self, labels: Tensor) -> Tensor:
        absent = labels == -1
        try:
            return torch.where(absent.unsqueeze(-1), 0, self.embed(labels.masked_fill(absent, 0)))
        except IndexError as error:  # a GPU says so by an assertion of its own
            raise ValueError(
                f"labels must lie in 0 … {self.num_classes - 1} for num_classes={self.num_classes}, or be -1 for no "
                f"condition; got {int(labels.min())} … {int(labels.max())}"
            ) from error


def condition_embedding(out_dim: int, num_classes: int, condition_dim: int) -> ConditionEmbedding | None:
    """The embedding of a model's conditions, or None for a model without."""
    num_classes = checks.count(num_classes, "num_classes", at_least=0)
    condition_dim = checks.count(condition_dim, "condition_dim", at_least=0)
    if not num_classes and not condition_dim:
        return None
    return ConditionEmbedding(out_dim, num_classes=num_classes, condition_dim=condition_dim)


def interval_length(t: Tensor, until: Tensor | None) -> Tensor:
    """Time from ``t`` to ``until``, both ``(B,)``; 0 where ``until`` is None: the velocity at ``t``."""
    if until is None:
        return torch.zeros_like(t)
    if not isinstance(until, Tensor):
        raise TypeError(f"until must be a tensor of times {tuple(t.shape)}; got {type(until).__name__}")
    if until.shape != t.shape:
        raise ValueError(f"until must hold one time a sample, {tuple(t.shape)}; got {tuple(until.shape)}")
    if t.device.type == "cpu" and not torch.compiler.is_compiling() and bool((until < t).any()):
        row = int((until < t).nonzero()[0])  # a GPU is not waited for
        raise ValueError(f"until must not be before t; got t = {float(t[row]):g}, until = {float(until[row]):g}")
    return until - t


def refuse_until(until: Any) -> None:
    """A model of velocities takes no ``until``."""
    if until is not None:
        raise ValueError("this model was built for velocities; build it with average_velocity=True to pass until")


def refuse_conditions(y: Any) -> None:
    """A model without conditions takes none."""
    if y is not None:
        raise ValueError("this model was built without conditions; build it with condition_dim or num_classes")
