"""A residual multi-layer perceptron for points in low dimension."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from flows.models.condition import condition_embedding, interval_length, refuse_conditions, refuse_until
from flows.models.parts import check_input
from mbot import checks


class ResidualMLP(nn.Module):
    """Velocity model of the C²OT toy: projections of point, time and condition, summed, then residual GELU blocks.

    Args:
        dim: features of a point; ``(B, d…)`` inputs are flattened and restored.
        condition_dim: features of a condition ``(B, condition_dim)`` (a vector ``(B,)`` counts as one feature);
            0 for none.
        num_classes: classes of a label condition ``(B,)`` int64, embedded; excludes ``condition_dim``. "No
            condition" is label -1, or a vector of NaN.
        width: hidden features.
        depth: residual blocks.
        expansion: width of a block's inner layer relative to ``width``.
        average_velocity: take ``until`` too, for `flows.MeanFlow`. Given the weights of a velocity model
            (``load_state_dict(..., strict=False)``), the model without ``until`` is that model.

    >>> ResidualMLP(2, num_classes=3)(torch.rand(5), torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1])).shape
    torch.Size([5, 2])
    """

    def __init__(
        self,
        dim: int,
        *,
        condition_dim: int = 0,
        num_classes: int = 0,
        width: int = 128,
        depth: int = 3,
        expansion: int = 4,
        average_velocity: bool = False,
    ) -> None:
        super().__init__()
        for value, name, least in (
            (dim, "dim", 1),
            (width, "width", 1),
            (depth, "depth", 0),
            (expansion, "expansion", 1),
        ):
            checks.count(value, name, at_least=least)
        self.inputs = nn.Linear(dim, width)
        self.time = nn.Linear(1, width)
        self.condition = condition_embedding(width, num_classes, condition_dim)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, expansion * width), nn.GELU(), nn.Linear(expansion * width, width))
            for _ in range(depth)
        )
        self.output = nn.Linear(width, dim)
        self.interval = nn.Linear(1, width, bias=False) if average_velocity else None

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of a sample, for what starts from noise: ``(dim,)``."""
        return (self.inputs.in_features,)

    def forward(self, t: Tensor, x: Tensor, y: Any = None, *, until: Tensor | None = None) -> Tensor:
        """Velocity at times ``t`` ``(B,)``, points ``x`` ``(B, d…)``, conditions ``y``; or its average to ``until``."""
        dim = self.inputs.in_features
        check_input(t, x, self.inputs.weight, x.ndim > 1 and x.shape[1:].numel() == dim, f"(B, d…) of {dim} features")
        hidden = self.inputs(x.flatten(1)) + self.time(t[:, None].to(x.dtype))
        if self.interval is None:
            refuse_until(until)
        else:
            hidden = hidden + self.interval(interval_length(t, until)[:, None].to(x.dtype))
        if self.condition is None:
            refuse_conditions(y)
        else:
            hidden = hidden + self.condition(y)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.output(hidden).reshape(x.shape)


def parameter_count(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


__all__ = ["ResidualMLP", "parameter_count"]
