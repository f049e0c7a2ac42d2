"""Flow matching: a coupling, a path and a model; training, sampling and measuring."""

from flows import waiting as waiting  # isort: skip  # before torch is loaded
from flows import datasets, metrics, models, testing
from flows.checkpoint import CheckpointError
from flows.diagnosis import Diagnosis, diagnose, plot_diagnosis
from flows.distillation import Distillation, distill
from flows.export import load_model
from flows.guidance import GuidedModel, drop_conditions, null_condition
from flows.integrate import IntegrationError, Trajectory, integrate
from flows.interrupt import Interrupted, NonFiniteLoss
from flows.likelihood import log_likelihood
from flows.loader import CoupledBatch, CoupledLoader, WorkerDied
from flows.logs import TrainResult
from flows.lr_schedule import warmup_schedule
from flows.matching import FlowBatch, FlowMatching, Objective, along_path, regression_loss
from flows.mean_flow import MeanFlow
from flows.pairs import PairedDataset, generate_pairs
from flows.paths import AffinePath, LinearPath, Path, SchrodingerBridgePath, TargetPath, VariancePreservingPath
from flows.predictions import as_velocity
from flows.reflow import AnnealingReflow
from flows.scores import ScoreMatching, integrate_sde
from flows.step_times import bellman_schedule, straighten
from flows.times import LogitNormalTimes, PowerTimes, ShiftedTimes, TimeLaw, UniformTimes
from flows.trainer import Trainer
from minibatch_transport import __version__ as __version__

__all__ = [
    "AffinePath",
    "AnnealingReflow",
    "CheckpointError",
    "CoupledBatch",
    "CoupledLoader",
    "Diagnosis",
    "Distillation",
    "FlowBatch",
    "FlowMatching",
    "GuidedModel",
    "IntegrationError",
    "Interrupted",
    "LinearPath",
    "LogitNormalTimes",
    "MeanFlow",
    "NonFiniteLoss",
    "Objective",
    "PairedDataset",
    "Path",
    "PowerTimes",
    "SchrodingerBridgePath",
    "ScoreMatching",
    "ShiftedTimes",
    "TargetPath",
    "TimeLaw",
    "TrainResult",
    "Trainer",
    "Trajectory",
    "UniformTimes",
    "VariancePreservingPath",
    "WorkerDied",
    "along_path",
    "as_velocity",
    "bellman_schedule",
    "datasets",
    "diagnose",
    "distill",
    "drop_conditions",
    "generate_pairs",
    "integrate",
    "integrate_sde",
    "load_model",
    "log_likelihood",
    "metrics",
    "models",
    "null_condition",
    "plot_diagnosis",
    "regression_loss",
    "straighten",
    "testing",
    "warmup_schedule",
]
