"""Data to train on; two-dimensional families and scikit-learn's digits need no files."""

from flows.datasets.arrays import CellSeries, load_arrays
from flows.datasets.images import ImageData, ImageFolder, cifar10, digits, fashion_mnist, mnist, save_grid
from flows.datasets.planar import checkerboard, eight_gaussians, moons

__all__ = [
    "CellSeries",
    "ImageData",
    "ImageFolder",
    "checkerboard",
    "cifar10",
    "digits",
    "eight_gaussians",
    "fashion_mnist",
    "load_arrays",
    "mnist",
    "moons",
    "save_grid",
]
