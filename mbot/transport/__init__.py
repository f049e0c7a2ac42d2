"""Transports: one file a kind; each solves a whole batch ``(…, n, m)`` in one call."""

from mbot.transport.base import Transport, ValueTransport
from mbot.transport.entropic import EntropicOT
from mbot.transport.exact import ExactOT
from mbot.transport.partial import PartialOT
from mbot.transport.sliced import SlicedOT
from mbot.transport.unbalanced import UnbalancedOT

__all__ = ["EntropicOT", "ExactOT", "PartialOT", "SlicedOT", "Transport", "UnbalancedOT", "ValueTransport"]
