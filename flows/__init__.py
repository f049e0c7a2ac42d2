"""Flow matching: a coupling, a path and a model; training, sampling and measuring."""

from flows import datasets, metrics, models
from flows.checkpoint import CheckpointError
from flows.conditions import drop_conditions, null_condition
from flows.guidance import GuidedModel
from flows.integrate import Trajectory, integrate
from flows.interrupt import Interrupted
from flows.loader import CoupledBatch, CoupledLoader
from flows.matching import FlowBatch, FlowMatching, along_path, regression_loss
from flows.paths import LinearPath, Path, SchrodingerBridgePath, TargetPath, VariancePreservingPath
from flows.rates import warmup_schedule
from flows.trainer import NonFiniteLoss, Trainer, TrainResult

__all__ = [
    "CheckpointError",
    "CoupledBatch",
    "CoupledLoader",
    "FlowBatch",
    "FlowMatching",
    "GuidedModel",
    "Interrupted",
    "LinearPath",
    "NonFiniteLoss",
    "Path",
    "SchrodingerBridgePath",
    "TargetPath",
    "TrainResult",
    "Trainer",
    "Trajectory",
    "VariancePreservingPath",
    "along_path",
    "datasets",
    "drop_conditions",
    "integrate",
    "metrics",
    "models",
    "null_condition",
    "regression_loss",
    "warmup_schedule",
]
