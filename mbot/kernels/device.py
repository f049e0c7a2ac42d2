"""Whether Triton's kernels can be used, found out once a process."""

from __future__ import annotations

import importlib
from functools import lru_cache
from types import ModuleType

import torch

from mbot import convergence


@lru_cache
def triton_module(name: str) -> ModuleType | None:
    """``mbot.kernels.name``, or None where Triton is not installed or cannot launch a kernel.

    The first launch on a machine builds a launcher, which needs a C compiler, and compiles for the card, which Triton
    must know. Where that fails, a warning says so once, and everything works without the kernels.
    """
    if torch.version.hip is not None:
        return None  # the kernels' shapes are made for NVIDIA's cards
    try:
        module = importlib.import_module(f"mbot.kernels.{name}")
    except ImportError:
        return None
    try:
        module.probe()
    except Exception as error:  # whatever Triton, the compiler or the driver raise
        convergence.warn(
            f"Triton is installed but cannot launch a kernel ({type(error).__name__}: {str(error)[:200]}); transport "
            "problems are solved without it, exact ones on the CPU",
            RuntimeWarning,
        )
        return None
    return module
