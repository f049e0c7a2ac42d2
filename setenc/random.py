"""Random numbers that a second call draws again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# On the CPU the lower 32 bits of a seed count. Chunk t of an encoding has noise of the encoding's seed plus t; far from
# these are the seeds of the drawn chunks, so that noise tells nothing about the draw, and those of other ranks.
DRAWS = 2**31
RANKS = 0x9E3779B1  # 2^32 by the golden ratio: its multiples lie far apart


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Default generators that start from ``seed``, and afterwards are where they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
