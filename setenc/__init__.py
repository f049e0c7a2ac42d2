"""Set encoders that stream, merge and train on sets of any size: UMBC (Willette et al. 2023, arXiv 2208.12401)."""

from minibatch_transport import __version__ as __version__
from setenc import io
from setenc.decoders import (
    ISAB,
    PMA,
    SAB,
    DIEMDecoder,
    FSPoolDecoder,
    MLPDecoder,
    SetTransformerDecoder,
)
from setenc.diagnosis import SlotDiagnosis, diagnose_slots
from setenc.encode import encode
from setenc.encoder import UMBC
from setenc.per_element import PerElement
from setenc.pooling import (
    DeepSetsPooling,
    DSMILPooling,
    GatedAttentionPooling,
    InstancePooling,
    JointPooling,
    Pooling,
    SlotPooling,
)
from setenc.query import SlotQuery
from setenc.ragged import Ragged
from setenc.selection import JointState, SelectedState
from setenc.state import SetState

__all__ = [  # noqa: RUF022 - plain order, as in the other packages
    "DIEMDecoder",
    "DSMILPooling",
    "DeepSetsPooling",
    "FSPoolDecoder",
    "GatedAttentionPooling",
    "ISAB",
    "InstancePooling",
    "JointPooling",
    "JointState",
    "MLPDecoder",
    "PMA",
    "PerElement",
    "Pooling",
    "Ragged",
    "SAB",
    "SelectedState",
    "SetState",
    "SetTransformerDecoder",
    "SlotDiagnosis",
    "SlotPooling",
    "SlotQuery",
    "UMBC",
    "diagnose_slots",
    "encode",
    "io",
]
