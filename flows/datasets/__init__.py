"""Data to train on; two-dimensional families need no download."""

from flows.datasets.planar import eight_gaussians, moons

__all__ = ["eight_gaussians", "moons"]
