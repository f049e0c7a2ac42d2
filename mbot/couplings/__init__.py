"""Couplings for generative training: one file a kind."""

from mbot.couplings.base import Coupling, Pairs
from mbot.couplings.bomb import BoMbCoupling
from mbot.couplings.conditional import ConditionalOTCoupling
from mbot.couplings.data import DataCoupling, NoiseAssignment
from mbot.couplings.independent import IndependentCoupling
from mbot.couplings.mismatch import Condition
from mbot.couplings.nearest import NearestNoiseCoupling
from mbot.couplings.optimal import OTCoupling
from mbot.couplings.semidiscrete import DualPotentials, SemidiscreteCoupling
from mbot.couplings.sinkhorn import SinkhornCoupling
from mbot.couplings.weighted import RegCurve, WeightedCoupling, reg_curve, suggest_reg

__all__ = [
    "BoMbCoupling",
    "Condition",
    "ConditionalOTCoupling",
    "Coupling",
    "DataCoupling",
    "DualPotentials",
    "IndependentCoupling",
    "NearestNoiseCoupling",
    "NoiseAssignment",
    "OTCoupling",
    "Pairs",
    "RegCurve",
    "SemidiscreteCoupling",
    "SinkhornCoupling",
    "WeightedCoupling",
    "reg_curve",
    "suggest_reg",
]
