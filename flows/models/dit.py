"""A transformer over patches of images: DiT (Peebles and Xie 2023, arXiv 2212.09748), for velocities as in SiT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flows.models.condition import condition_embedding, interval_length, refuse_conditions, refuse_until
from flows.models.parts import attention, check_input, sinusoids, time_features
from mbot import checks

DIT_PRESETS: dict[str, dict[str, Any]] = {
    # small images on two cores
    "dit": {"in_channels": 1, "patch_size": 2, "width": 128, "depth": 4, "heads": 4},
    # DiT-S/2 and DiT-B/2, on latents of 4 channels: 33 and 130 million parameters
    "dit-s-2": {"in_channels": 4, "patch_size": 2, "width": 384, "depth": 12, "heads": 6},
    "dit-b-2": {"in_channels": 4, "patch_size": 2, "width": 768, "depth": 12, "heads": 12},
}
"""Sizes of transformers, by name; see `DiT.preset`."""

_TIME_FEATURES = 256


class DiT(nn.Module):
    """Velocity model for images or latents: attention over patches, modulated by time and condition (adaLN-zero).

    Positions are fixed sinusoids of row and column, so images of any size run whose sides are multiples of
    ``patch_size``. A new model is zero everywhere.

    Args:
        in_channels: of the images, ``(B, in_channels, H, W)``.
        patch_size: pixels a side of a patch.
        width: features of a patch, a multiple of 4 and of ``heads``.
        depth: transformer blocks.
        heads: attention heads of a block.
        expansion: width of a block's inner layer relative to ``width``.
        num_classes: labels ``(B,)`` as conditions.
        condition_dim: vectors ``(B, condition_dim)`` as conditions; excludes ``num_classes``. "No condition" is label
            -1, or a vector of NaN.
        average_velocity: take ``until`` too, for `flows.MeanFlow`. Given the weights of a velocity model
            (``load_state_dict(..., strict=False)``), the model without ``until`` is that model.

    >>> model = DiT.preset("dit", num_classes=10)
    >>> model(torch.rand(2), torch.randn(2, 1, 8, 8), torch.tensor([3, -1])).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        *,
        patch_size: int = 2,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        expansion: int = 4,
        num_classes: int = 0,
        condition_dim: int = 0,
        average_velocity: bool = False,
    ) -> None:
        super().__init__()
        for value, name in ((in_channels, "in_channels"), (patch_size, "patch_size"), (width, "width"),
                            (depth, "depth"), (heads, "heads"), (expansion, "expansion")):  # fmt: skip
            checks.count(value, name)
        if width % 4 or width % heads:
            raise ValueError(f"width must be a multiple of 4 (of the positions) and of heads={heads}; got {width}")
        self.patch_size, self.width = patch_size, width
        features = in_channels * patch_size**2
        self.enter = nn.Linear(features, width)
        self.time = nn.Sequential(nn.Linear(_TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.condition = condition_embedding(width, num_classes, condition_dim)
        self.blocks = nn.ModuleList(_Block(width, heads, expansion) for _ in range(depth))
        self.norm = _Modulated(width, 2)
        self.leave = nn.Linear(width, features)
        self._start()
        self.interval = None
        if average_velocity:
            last = nn.Linear(width, width)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.interval = nn.Sequential(nn.Linear(_TIME_FEATURES, width), nn.SiLU(), last)

    def _start(self) -> None:
        """DiT's initial weights: Xavier's, small embeddings, and zero for what scales a block or the output."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        for name, parameter in self.named_parameters():
            if "modulate" in name or name.startswith("leave"):
                nn.init.zeros_(parameter)
            elif name.startswith(("time", "condition")) and parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> DiT:
        """A model of a paper's size (`DIT_PRESETS`), with changes such as ``num_classes``."""
        return cls(**{**DIT_PRESETS[checks.choice(name, "name", tuple(DIT_PRESETS))], **changes})

    def forward(self, t: Tensor, x: Tensor, y: Any = None, *, until: Tensor | None = None) -> Tensor:
        """Velocity at times ``t`` ``(B,)``, images ``x`` ``(B, C, H, W)``, conditions ``y``; its mean to ``until``."""
        side, channels = self.patch_size, self.enter.in_features // self.patch_size**2
        check_input(t, x, self.enter.weight, x.ndim == 4 and x.shape[1] == channels, f"(B, {channels}, H, W)")
        batch, _, height, wide = x.shape
        if height % side or wide % side:
            raise ValueError(f"sides of images must be multiples of patch_size={side}; got {height} × {wide}")
        embedding = self.time(time_features(t, _TIME_FEATURES).to(x.dtype))
        if self.interval is None:
            refuse_until(until)
        else:
            embedding = embedding + self.interval(time_features(interval_length(t, until), _TIME_FEATURES).to(x.dtype))
        if self.condition is None:
            refuse_conditions(y)
        else:
            embedding = embedding + self.condition(y)
        grid = (height // side, wide // side)
        patches = x.reshape(batch, channels, grid[0], side, grid[1], side).permute(0, 2, 4, 1, 3, 5)
        hidden = self.enter(patches.reshape(batch, grid[0] * grid[1], -1)) + positions(*grid, self.width).to(x)
        for block in self.blocks:
            hidden = block(hidden, embedding)
        shift, scale = self.norm.parts(embedding)
        out = self.leave(self.norm(hidden, shift, scale)).reshape(batch, *grid, channels, side, side)
        return out.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


def positions(rows: int, columns: int, dim: int) -> Tensor:
    """Features ``(rows * columns, dim)`` of the places of a grid: half for the row, half for the column."""
    row = sinusoids(torch.arange(rows), dim // 2)[:, None].expand(-1, columns, -1)
    column = sinusoids(torch.arange(columns), dim // 2)[None].expand(rows, -1, -1)
    return torch.cat((row, column), -1).reshape(rows * columns, dim)


class _Modulated(nn.Module):
    """A layer normalisation without weights of its own: ``parts`` of the embedding shift, scale and gate."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.number = parts
        self.modulate = nn.Linear(width, parts * width)

    def parts(self, embedding: Tensor) -> tuple[Tensor, ...]:
        return self.modulate(F.silu(embedding))[:, None].chunk(self.number, -1)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return self.norm(x) * (1 + scale) + shift


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, expansion: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = _Modulated(width, 6)
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.inner = nn.Sequential(
            nn.Linear(width, expansion * width), nn.GELU(approximate="tanh"), nn.Linear(expansion * width, width)
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        shift, scale, gate, shift_inner, scale_inner, gate_inner = self.norm.parts(embedding)
        batch, patches, width = x.shape
        parts = self.qkv(self.norm(x, shift, scale)).reshape(batch, patches, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = attention(q, k, v).transpose(1, 2).reshape(batch, patches, width)
        x = x + gate * self.mix(mixed)
        return x + gate_inner * self.inner(self.norm(x, shift_inner, scale_inner))
