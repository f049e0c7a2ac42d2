"""Solvers of checked problems. Only they know the compiled kernels."""

from contextvars import ContextVar

# Compiled short cuts past a reference that stays in plain torch; see `mbot.testing.without_fast_paths`.
fast_paths: ContextVar[bool] = ContextVar("fast_paths", default=True)
