"""Flow matching: a coupling, a path and a model; training, sampling and measuring."""

from flows import datasets, metrics, models
from flows.diagnosis import Diagnosis, diagnose, plot_diagnosis
from flows.integrate import Trajectory, integrate
from flows.matching import FlowBatch, FlowMatching, regression_loss
from flows.paths import LinearPath, Path

__all__ = [
    "Diagnosis",
    "FlowBatch",
    "FlowMatching",
    "LinearPath",
    "Path",
    "Trajectory",
    "datasets",
    "diagnose",
    "integrate",
    "metrics",
    "models",
    "plot_diagnosis",
    "regression_loss",
]
