"""Threads over a batch of independent problems, for solvers that release the interpreter lock."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch

_HOME = os.getpid()
_WORTH = 1 << 20  # numbers that one thread goes through in about half a millisecond


@lru_cache(maxsize=4)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    # Keyed by process: threads do not survive a fork, and data-loader workers solve transport problems too.
    return ThreadPoolExecutor(threads, thread_name_prefix="mbot")


@lru_cache(maxsize=1)
def _openmp() -> Callable[..., None] | None:
    """Starts a parallel region of the OpenMP library that torch has loaded; None where that is not GNU's."""
    try:
        library = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        return library.GOMP_parallel
    except (OSError, AttributeError):
        return None


def run_slices(
    solve: Callable[[int, int], None], work: Sequence[float] | np.ndarray, each: float = np.inf
) -> None:  # fmt: skip
    """Call ``solve(start, stop)`` on slices of ``range(len(work))`` of about equal total ``work``, in parallel.

    Uses at most ``torch.get_num_threads()`` threads, the calling one among them. The result must not depend on the
    slicing.

    Args:
        solve: see above.
        work: relative to each other.
        each: numbers that a unit of work goes through, about: of few in all the calling thread is done before others
            are awake.
    """
    threads = min(torch.get_num_threads(), len(work))
    if threads <= 1 or (each < np.inf and float(np.sum(work)) * each < _WORTH):
        solve(0, len(work))
        return
    # More slices than threads, so that one hard problem does not leave the other threads idle.
    done = np.cumsum(work)
    inner = np.searchsorted(done, done[-1] * np.linspace(0, 1, 4 * threads + 1)[1:-1])
    bounds = np.unique(np.concatenate(([0], inner, [len(work)]))).tolist()
    jobs = iter(list(pairwise(bounds)))  # one list iterator: the threads share it without a lock
    failures: list[BaseException] = []

    def drain(_: object = None) -> None:
        try:
            while (job := next(jobs, None)) is not None:
                solve(*job)
        except BaseException as failure:  # an OpenMP thread could not raise it
            failures.append(failure)

    # Torch's own team, where there is one: its threads spin for milliseconds after each parallel operation, so others
    # would compete with them for the cores. It does not survive a fork either.
    parallel = _openmp() if os.getpid() == _HOME else None
    if parallel is not None:
        region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(drain)
        parallel(region, None, threads, 0)
    else:
        helpers = [_pool(os.getpid(), threads).submit(drain) for _ in range(threads - 1)]
        drain()
        for helper in helpers:
            helper.result()
    if failures:
        raise failures[0]
