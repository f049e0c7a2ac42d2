"""Warnings of solvers that stop early: one for a batch of problems, at the user's own line."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mbot.plan import Plan

_NOT_THE_CALLER = {"mbot", "flows", "torch", "contextlib"}

# Within `one_warning`: problems that failed, problems in all and the worst error, by solver and advice.
_pending: ContextVar[dict[tuple[str, str], tuple[int, int, float]] | None] = ContextVar("pending", default=None)


# Within `deferred`: warnings that are kept.
_kept: ContextVar[list[tuple[str, type[Warning]]] | None] = ContextVar("kept", default=None)


class ConvergenceWarning(UserWarning):
    """An iterative solver stopped before its tolerance: how many problems, how far, and the setting to change."""


def warn(message: str, category: type[Warning] = ConvergenceWarning) -> None:
    """A warning at the innermost line that is not in this library (or in torch, which may have called it)."""
    kept = _kept.get()
    if kept is not None:
        kept.append((message, category))
        return
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_CALLER:
        frame = frame.f_back
    warnings.warn_explicit(
        message,
        category,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def warn_unconverged(solver: str, plan: Plan, advice: str) -> None:
    """Warn once for a whole batch of problems, if any of them did not converge."""
    if not bool(plan.converged.all()):
        failed = ~plan.converged
        count_unconverged(solver, int(failed.sum()), failed.numel(), float(plan.error[failed].max()), advice)
    elif _pending.get() is not None:
        count_unconverged(solver, 0, plan.converged.numel(), 0.0, advice)


def count_unconverged(solver: str, failed: int, problems: int, worst: float, advice: str) -> None:
    """Warn that ``failed`` of some problems did not converge; within `one_warning`, together with all others."""
    pending = _pending.get()
    if pending is not None:
        before = pending.get((solver, advice), (0, 0, 0.0))
        pending[solver, advice] = (before[0] + failed, before[1] + problems, float(np.maximum(before[2], worst)))
    elif failed:
        warn(f"{solver}: {failed} of {problems} problems did not converge (worst error {worst:.3g}). {advice}")


@contextmanager
def one_warning() -> Iterator[None]:
    """Count the problems inside that did not converge; each solver warns once, at the end of the outermost block."""
    if _pending.get() is not None:
        yield
        return
    pending: dict[tuple[str, str], tuple[int, int, float]] = {}
    token = _pending.set(pending)
    try:
        yield
    finally:
        _pending.reset(token)
    for (solver, advice), (failed, problems, worst) in pending.items():
        count_unconverged(solver, failed, problems, worst, advice)


@contextmanager
def deferred() -> Iterator[list[tuple[str, type[Warning]]]]:
    """Keep the warnings raised inside, in a thread or a worker process, for `tell` to write at the user's line."""
    kept: list[tuple[str, type[Warning]]] = []
    token = _kept.set(kept)
    try:
        yield kept
    finally:
        _kept.reset(token)


def tell(kept: list[tuple[str, type[Warning]]], seen: set[str]) -> None:
    """Write kept warnings, one a solver; ``seen`` remembers those that were written."""
    for message, category in kept:
        solver = message.partition(":")[0]
        if solver not in seen:
            seen.add(solver)
            warn(message, category)
