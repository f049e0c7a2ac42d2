"""Flow matching: a coupling, a path and a model; training, sampling and measuring."""

from flows import datasets, metrics, models
from flows.integrate import Trajectory, integrate
from flows.loader import CoupledBatch, CoupledLoader
from flows.matching import FlowBatch, FlowMatching, along_path, regression_loss
from flows.paths import LinearPath, Path, SchrodingerBridgePath, TargetPath, VariancePreservingPath

__all__ = [
    "CoupledBatch",
    "CoupledLoader",
    "FlowBatch",
    "FlowMatching",
    "LinearPath",
    "Path",
    "SchrodingerBridgePath",
    "TargetPath",
    "Trajectory",
    "VariancePreservingPath",
    "along_path",
    "datasets",
    "integrate",
    "metrics",
    "models",
    "regression_loss",
]
