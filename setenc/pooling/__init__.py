"""Poolings: one file a kind, all over the same state."""

from setenc.pooling.base import Pooling
from setenc.pooling.deep_sets import DeepSetsPooling
from setenc.pooling.gated import GatedAttentionPooling
from setenc.pooling.instances import DSMILPooling, InstancePooling
from setenc.pooling.joint import JointPooling
from setenc.pooling.slots import SlotPooling

__all__ = [
    "DSMILPooling",
    "DeepSetsPooling",
    "GatedAttentionPooling",
    "InstancePooling",
    "JointPooling",
    "Pooling",
    "SlotPooling",
]
