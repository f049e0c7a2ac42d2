"""Velocity models with the signature ``model(t, x, y)``."""

from flows.models.condition import ConditionEmbedding
from flows.models.dit import DIT_PRESETS, DiT
from flows.models.foreign import WrappedModel, wrap
from flows.models.mlp import ResidualMLP, parameter_count
from flows.models.unet import PRESETS, UNet

__all__ = [
    "DIT_PRESETS",
    "PRESETS",
    "ConditionEmbedding",
    "DiT",
    "ResidualMLP",
    "UNet",
    "WrappedModel",
    "parameter_count",
    "wrap",
]
