"""The U-Net of the image experiments: the ADM kind (Dhariwal and Nichol 2021, arXiv 2105.05233)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flows.models.condition import condition_embedding, interval_length, refuse_conditions, refuse_until
from flows.models.parts import check_input, time_features
from mbot import checks

PRESETS: dict[str, dict[str, Any]] = {
    # scikit-learn's 8 × 8 digits, on two cores
    "digits": {
        "in_channels": 1, "image_size": 8, "channels": 32, "multipliers": (1, 2), "blocks": 1, "attention": (4,),
    },
    # torchcfm's example of 28 × 28 digits, with attention where it is cheap
    "mnist": {
        "in_channels": 1, "image_size": 28, "channels": 32, "multipliers": (1, 2, 2), "blocks": 1, "attention": (7,),
    },
    # OT-CFM on CIFAR-10 (arXiv 2302.00482): 35,746,307 parameters
    "cifar10-otcfm": {
        "in_channels": 3, "image_size": 32, "channels": 128, "multipliers": (1, 2, 2, 2), "blocks": 2,
        "attention": (16,), "dropout": 0.1,
    },
    # C²OT on CIFAR-10 (arXiv 2503.10636): 83,351,043 parameters with 10 classes
    "cifar10-c2ot": {
        "in_channels": 3, "image_size": 32, "channels": 192, "multipliers": (1, 2, 2, 2), "blocks": 2,
        "attention": (16, 8),
    },
    # C²OT on ImageNet-32: conditions are 1024 text features
    "imagenet32-c2ot": {
        "in_channels": 3, "image_size": 32, "channels": 256, "multipliers": (1, 2, 2, 2), "blocks": 3,
        "attention": (4,),
    },
}  # fmt: skip
"""Sizes of the papers' models, by name; see `UNet.preset`."""

_LEAST_FEATURES = 16  # of the time: sinusoids of fewer frequencies do not tell times apart


class UNet(nn.Module):
    """Velocity model for images: residual blocks at several resolutions, self-attention at some, skips across.

    Args:
        in_channels: of the images, ``(B, in_channels, H, W)``.
        image_size: H = W that ``attention`` refers to, and of samples that start from noise; other sizes run too.
        channels: at full resolution. Some resolution needs at least two, or normalisation cancels the time.
        multipliers: channels at each resolution (halved from one to the next), relative to ``channels``.
        blocks: residual blocks at a resolution.
        attention: resolutions (in pixels) that have self-attention; the middle always has it.
        heads: channels of an attention head.
        dropout: inside residual blocks.
        num_classes: labels ``(B,)`` as conditions.
        condition_dim: vectors ``(B, condition_dim)`` as conditions; excludes ``num_classes``. "No condition" is label
            -1, or a vector of NaN.
        average_velocity: take ``until`` too, for `flows.MeanFlow`. Given the weights of a velocity model
            (``load_state_dict(..., strict=False)``), the model without ``until`` is that model.

    >>> model = UNet.preset("digits", num_classes=10)
    >>> model(torch.rand(2), torch.randn(2, 1, 8, 8), torch.tensor([3, -1])).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        *,
        image_size: int,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 2,
        attention: Sequence[int] = (16,),
        heads: int = 64,
        dropout: float = 0.0,
        num_classes: int = 0,
        condition_dim: int = 0,
        average_velocity: bool = False,
    ) -> None:
        super().__init__()
        multipliers, attention = tuple(multipliers), tuple(attention)
        for value, name in ((in_channels, "in_channels"), (image_size, "image_size"), (channels, "channels"),
                            (blocks, "blocks"), (heads, "heads"), (len(multipliers), "the number of multipliers"),
                            *((multiplier, "a multiplier") for multiplier in multipliers)):  # fmt: skip
            checks.count(value, name)
        if checks.positive(dropout, "dropout", allow_zero=True) > 1:
            raise ValueError(f"dropout must lie in [0, 1]; got {dropout!r}")
        groups = _groups([multiplier * channels for multiplier in multipliers])
        sizes = [max(1, image_size >> level) for level in range(len(multipliers))]
        absent = sorted(set(attention) - set(sizes))
        if absent:
            raise ValueError(f"attention must name resolutions of this model, {sizes}; got {absent}")
        embedding = 4 * channels
        self.features = max(channels, _LEAST_FEATURES)
        self.sample_shape = (in_channels, image_size, image_size)
        self.time = nn.Sequential(nn.Linear(self.features, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.condition = condition_embedding(embedding, num_classes, condition_dim)

        def stage(wide: int, narrow: int, size: int) -> nn.ModuleList:
            layers: list[nn.Module] = [_Residual(wide, narrow, embedding, dropout, groups)]
            if size in attention:
                layers.append(_Attention(narrow, heads, groups))
            return nn.ModuleList(layers)

        self.enter = nn.Conv2d(in_channels, channels, 3, padding=1)
        width, skips = channels, [channels]
        self.down = nn.ModuleList()
        for level, (multiplier, size) in enumerate(zip(multipliers, sizes, strict=True)):
            for _ in range(blocks):
                self.down.append(stage(width, multiplier * channels, size))
                width = multiplier * channels
                skips.append(width)
            if level + 1 < len(multipliers):
                self.down.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                skips.append(width)
        self.middle = nn.ModuleList(
            [_Residual(width, width, embedding, dropout, groups), _Attention(width, heads, groups),
             _Residual(width, width, embedding, dropout, groups)]
        )  # fmt: skip
        self.up = nn.ModuleList()
        for level in reversed(range(len(multipliers))):
            for _ in range(blocks + 1):
                self.up.append(stage(width + skips.pop(), multipliers[level] * channels, sizes[level]))
                width = multipliers[level] * channels
            if level:
                self.up.append(nn.Conv2d(width, width, 3, padding=1))
        self.leave = nn.Sequential(
            _norm(width, groups), nn.SiLU(), _zeroed(nn.Conv2d(width, in_channels, 3, padding=1))
        )
        self.interval = None
        if average_velocity:
            last = _zeroed(nn.Linear(embedding, embedding))
            self.interval = nn.Sequential(nn.Linear(self.features, embedding), nn.SiLU(), last)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> UNet:
        """A model of a paper's size (`PRESETS`), with changes such as ``num_classes``."""
        return cls(**{**PRESETS[checks.choice(name, "name", tuple(PRESETS))], **changes})

    def forward(self, t: Tensor, x: Tensor, y: Any = None, *, until: Tensor | None = None) -> Tensor:
        """Velocity at times ``t`` ``(B,)``, images ``x`` ``(B, C, H, W)``, conditions ``y``; its mean to ``until``."""
        channels = self.enter.in_channels
        check_input(t, x, self.enter.weight, x.ndim == 4 and x.shape[1] == channels, f"(B, {channels}, H, W)")
        embedding = self.time(time_features(t, self.features).to(x.dtype))
        if self.interval is None:
            refuse_until(until)
        else:
            embedding = embedding + self.interval(time_features(interval_length(t, until), self.features).to(x.dtype))
        if self.condition is None:
            refuse_conditions(y)
        else:
            embedding = embedding + self.condition(y)
        hidden = self.enter(x)
        skips = [hidden]
        for layer in self.down:
            hidden = layer(hidden) if isinstance(layer, nn.Conv2d) else _apply(layer, hidden, embedding)
            skips.append(hidden)
        hidden = _apply(self.middle, hidden, embedding)
        for layer in self.up:
            if isinstance(layer, nn.Conv2d):
                hidden = layer(F.interpolate(hidden, size=skips[-1].shape[-2:], mode="nearest"))
            else:
                hidden = _apply(layer, torch.cat((hidden, skips.pop()), 1), embedding)
        return self.leave(hidden)


def _apply(layers: Any, x: Tensor, embedding: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x, embedding)
    return x


def _groups(widths: list[int]) -> int:
    """Most groups of a normalisation: 32 as usual, fewer where every stage would have one channel a group.

    A group of one channel takes out whatever is constant over its pixels, the embedding of time and condition included.
    """
    if max(widths) == 1:
        raise ValueError(
            "some resolution needs at least 2 channels, or normalisation cancels time and condition; got "
            f"{widths}. Raise channels or a multiplier"
        )
    groups = 32
    while all(math.gcd(groups, width) == width for width in widths):
        groups //= 2
    return groups


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(groups, channels), channels)


def _zeroed(layer: nn.Module) -> nn.Module:
    """A layer that starts as zero, so that its block starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class _Residual(nn.Module):
    def __init__(self, channels: int, out: int, embedding: int, dropout: float, groups: int) -> None:
        super().__init__()
        self.first = nn.Sequential(_norm(channels, groups), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.embed = nn.Sequential(nn.SiLU(), nn.Linear(embedding, out))
        self.second = nn.Sequential(
            _norm(out, groups), nn.SiLU(), nn.Dropout(dropout), _zeroed(nn.Conv2d(out, out, 3, padding=1))
        )
        self.skip = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        hidden = self.first(x) + self.embed(embedding)[:, :, None, None]
        return self.skip(x) + self.second(hidden)


class _Attention(nn.Module):
    def __init__(self, channels: int, head: int, groups: int) -> None:
        super().__init__()
        head = min(head, channels)
        if channels % head:
            raise ValueError(f"heads={head} channels a head must divide the {channels} channels of a resolution")
        self.heads = channels // head
        self.norm = _norm(channels, groups)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.out = _zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        flat = self.norm(x).reshape(batch, channels, height * width)
        parts = self.qkv(flat).reshape(batch, 3, self.heads, channels // self.heads, height * width)
        q, k, v = parts.transpose(-1, -2).unbind(1)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(batch, channels, height * width)
        return x + self.out(mixed).reshape(x.shape)
