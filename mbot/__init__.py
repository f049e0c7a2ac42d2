"""Mini-batch optimal transport on CPU and GPU, as losses and as couplings for generative training."""

from mbot import compat, distributed, testing
from mbot.convergence import ConvergenceWarning
from mbot.cost import pairwise_cost
from mbot.couplings import (
    BoMbCoupling,
    Condition,
    ConditionalOTCoupling,
    Coupling,
    DataCoupling,
    IndependentCoupling,
    NearestNoiseCoupling,
    OTCoupling,
    Pairs,
    RegCurve,
    SemidiscreteCoupling,
    SinkhornCoupling,
    WeightedCoupling,
    reg_curve,
    suggest_reg,
)
from mbot.diagnostics import condition_ratio, effective_sample_size, marginal_tilt, plan_entropy
from mbot.joint import JointCost
from mbot.losses import BoMbOT, MiniBatchLoss, MiniBatchOT
from mbot.plan import Plan
from mbot.solvers.clouds import CloudMatching, match_clouds
from mbot.transport import EntropicOT, ExactOT, PartialOT, SlicedOT, Transport, UnbalancedOT
from minibatch_transport import __version__ as __version__

__all__ = [
    "BoMbCoupling",
    "BoMbOT",
    "CloudMatching",
    "Condition",
    "ConditionalOTCoupling",
    "ConvergenceWarning",
    "Coupling",
    "DataCoupling",
    "EntropicOT",
    "ExactOT",
    "IndependentCoupling",
    "JointCost",
    "MiniBatchLoss",
    "MiniBatchOT",
    "NearestNoiseCoupling",
    "OTCoupling",
    "Pairs",
    "PartialOT",
    "Plan",
    "RegCurve",
    "SemidiscreteCoupling",
    "SinkhornCoupling",
    "SlicedOT",
    "Transport",
    "UnbalancedOT",
    "WeightedCoupling",
    "compat",
    "condition_ratio",
    "distributed",
    "effective_sample_size",
    "marginal_tilt",
    "match_clouds",
    "pairwise_cost",
    "plan_entropy",
    "reg_curve",
    "suggest_reg",
    "testing",
]
