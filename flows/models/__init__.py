"""Velocity models with the signature ``model(t, x, y)``."""

from flows.models.mlp import ResidualMLP

__all__ = ["ResidualMLP"]
