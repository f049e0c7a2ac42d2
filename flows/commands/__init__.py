"""The commands of ``python -m flows``: each is a module with its settings and a function of its name."""

from __future__ import annotations

COMMANDS = {
    "train": "train a flow on a data set; ends with samples and a table of metrics",
    "sample": "draw samples from a trained run",
    "evaluate": "measure a trained run with few and many steps",
    "reflow": "train again on pairs of noise and a run's samples: straighter flows, smaller models",
    "distill": "train a student of a run that samples in one step",
    "export": "the model of a trained run as a safetensors file",
    "diagnose": "what a coupling does to a data set, before training",
}
"""What each does, in one line."""
