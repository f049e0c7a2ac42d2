"""Threads over a batch of independent problems, for solvers that release the interpreter lock."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch


@lru_cache(maxsize=4)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    # Keyed by process: threads do not survive a fork, and data-loader workers solve transport problems too.
    return ThreadPoolExecutor(threads, thread_name_prefix="mbot")


def run_slices(solve: Callable[[int, int], None], work: Sequence[float] | np.ndarray) -> None:
    """Call ``solve(start, stop)`` on slices of ``range(len(work))`` of about equal total ``work``, in parallel.

    Uses at most ``torch.get_num_threads()`` threads, the calling one among them. The result must not depend on the
    slicing.
    """
    threads = min(torch.get_num_threads(), len(work))
    if threads <= 1:
        solve(0, len(work))
        return
    # More slices than threads, so that one hard problem does not leave the other threads idle.
    done = np.cumsum(work)
    inner = np.searchsorted(done, done[-1] * np.linspace(0, 1, 4 * threads + 1)[1:-1])
    bounds = np.unique(np.concatenate(([0], inner, [len(work)]))).tolist()
    jobs = iter(list(pairwise(bounds)))  # one list iterator: the threads share it without a lock

    def drain() -> None:
        while (job := next(jobs, None)) is not None:
            solve(*job)

    helpers = [_pool(os.getpid(), threads).submit(drain) for _ in range(threads - 1)]
    try:
        drain()
    finally:
        for helper in helpers:
            helper.result()
