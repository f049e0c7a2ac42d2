"""Threads over a batch of independent problems, for solvers that release the interpreter lock."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import accumulate, pairwise

import torch


@lru_cache(maxsize=4)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    # Keyed by process: threads do not survive a fork, and data-loader workers solve transport problems too.
    return ThreadPoolExecutor(threads, thread_name_prefix="mbot")


def run_slices(solve: Callable[[int, int], None], work: Sequence[float]) -> None:
    """Call ``solve(start, stop)`` on slices of ``range(len(work))`` of about equal total ``work``, in parallel.

    Uses at most ``torch.get_num_threads()`` threads. The result must not depend on the slicing.
    """
    threads = min(torch.get_num_threads(), len(work))
    if threads <= 1:
        solve(0, len(work))
        return
    # More slices than threads, so that one hard problem does not leave the other threads idle.
    slices = min(len(work), 4 * threads)
    total = sum(work)
    bounds, done = [0], list(accumulate(work))
    for part in range(1, slices):
        goal = total * part / slices
        cut = bounds[-1]
        while cut < len(work) and done[cut] <= goal:
            cut += 1
        bounds.append(cut)
    bounds.append(len(work))
    jobs = [(lo, hi) for lo, hi in pairwise(bounds) if hi > lo]
    for future in [_pool(os.getpid(), threads).submit(solve, lo, hi) for lo, hi in jobs]:
        future.result()
