"""Shared parts of `mbot`, `flows` and `setenc`: the version, the warning for a retired name, numba's decorator."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from filelock import FileLock

__version__ = "0.2.0"

_OURS = {"minibatch_transport", "mbot", "flows", "setenc"}
_PATIENCE = 600.0  # seconds: longer than any compilation


def warn_deprecated(old: str, instead: str, *, removal: str) -> None:
    """Warn, at the user's own line, that a name or a setting goes.

    The rule (RELEASING.md): what is public works with this warning through a minor version, and is removed in the next.

    Args:
        old: what was used, such as ``"MiniBatchOT(debias=…)"``.
        instead: what to write, such as ``"debiased=…"``.
        removal: the version without it.

    >>> with warnings.catch_warnings(record=True) as told:
    ...     warn_deprecated("f(size=…)", "f(n=…)", removal="0.4.0")
    >>> str(told[0].message)
    'f(size=…) is deprecated and goes in version 0.4.0: use f(n=…)'
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
        frame = frame.f_back
    warnings.warn_explicit(
        f"{old} is deprecated and goes in version {removal}: use {instead}",
        FutureWarning,  # Python shows it without being asked
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``numba.njit`` with ``cache=True`` and a lock.

    Numba writes the index of a function's cache before the code itself, under the name that older code may have had. A
    process that reads in between runs that older code: after an update, or with other dtypes. A lock on the cache's
    folder keeps processes and threads apart while one compiles, saves or loads.

    Numba also looks at a function's own file alone, while the code that it keeps holds all that the function calls.
    Here the code is as old as the oldest of its folder: a change in one of these files makes all of them compile again.
    """
    from numba import njit

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = njit(**{**options, "cache": True})(function)
        if dispatcher is function:  # with NUMBA_DISABLE_JIT=1
            return function
        kept = dispatcher._cache._cache_file
        kept._source_stamp = kept._source_stamp, _stamps(str(Path(function.__code__.co_filename).parent))
        compile_or_load = dispatcher.compile

        def alone(signature: Any) -> Any:
            with _locked(dispatcher.stats.cache_path):
                return compile_or_load(signature)

        dispatcher.compile = alone  # called for each new signature, by compiled callers too
        return dispatcher

    return decorate


@cache
def _stamps(folder: str) -> tuple[tuple[str, int, int], ...]:
    """Names, times and sizes of the Python files in a folder."""
    states = ((path.name, path.stat()) for path in sorted(Path(folder).glob("*.py")))
    return tuple((name, state.st_mtime_ns, state.st_size) for name, state in states)


@cache
def _lock(folder: str) -> FileLock:
    from filelock import FileLock

    return FileLock(Path(folder) / "mbot.lock", timeout=_PATIENCE)


@contextmanager
def _locked(folder: str) -> Iterator[None]:
    """The lock of a folder, re-entrant; none where the folder cannot be written to, as nothing is saved there then."""
    from filelock import Timeout

    lock, held = _lock(folder), True
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError, Timeout):
        held = False
    try:
        yield
    finally:
        if held:
            lock.release()
