"""Functions compiled by numba and kept on disk, one process at a time.

Numba writes the index of a function's cache before the code itself, under the name that older code may have had. A
process that reads in between runs that older code: after an update, or with other dtypes. A lock on the cache's folder
keeps processes and threads apart while one compiles, saves or loads.

Numba also looks at a function's own file alone, while the code that it keeps holds all that the function calls. Here
the code is as old as the oldest of its folder: a change in one of these files makes all of them compile again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from numba import njit

_PATIENCE = 600.0  # seconds: longer than any compilation


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``numba.njit`` with ``cache=True`` and the lock."""

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = njit(**{**options, "cache": True})(function)
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
    return FileLock(Path(folder) / "mbot.lock", timeout=_PATIENCE)


@contextmanager
def _locked(folder: str) -> Iterator[None]:
    """The lock of a folder, re-entrant; none where the folder cannot be written to, as nothing is saved there then."""
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
