"""Flow matching: a coupling, a path and a model; training, sampling and measuring."""

from flows import datasets, metrics, models
from flows.integrate import Trajectory, integrate
from flows.loader import CoupledBatch, CoupledLoader
from flows.matching import FlowBatch, FlowMatching, regression_loss
from flows.paths import LinearPath, Path

__all__ = [
    "CoupledBatch",
    "CoupledLoader",
    "FlowBatch",
    "FlowMatching",
    "LinearPath",
    "Path",
    "Trajectory",
    "datasets",
    "integrate",
    "metrics",
    "models",
    "regression_loss",
]
