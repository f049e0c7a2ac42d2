"""Annealing reflow (SlimFlow; Zhu et al., ECCV 2024, arXiv 2407.12718): a teacher's pairs, with fresh noise at first.

A student that cannot start from its teacher's weights begins with plain flow matching and ends with plain reflow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flows.matching import CoupledBatch
from flows.pairs import PairedDataset
from mbot import checks
from mbot.random import draw

SCHEDULES = ("linear", "cosine", "exp")
_RATE = 5.0  # of "exp"


class AnnealingReflow(Dataset[Any]):
    """Pairs whose noise anneals from independent of the sample to the pair's own; for `flows.CoupledLoader`.

    A pair is served as ``(x0', x1)`` with ``x0' = sqrt(1 - β²) x0 + β ξ``, ξ fresh standard normal noise. β falls from
    1 (plain flow matching) to 0 (plain reflow) over the first ``warmup_steps`` batches; x0' stays standard normal. As
    β and ξ follow from the loader's position and seed, a resumed run is the same. With ``Trainer(accumulate=k)`` an
    optimiser step takes k batches.

    Flows that start elsewhere have no such sum. With their ``source``, each x0 is replaced by a fresh one with
    probability β, so that x0' keeps its distribution there too.

    Args:
        pairs: whose x0 are standard normal, or from ``source``.
        warmup_steps: batches after which β is 0; 0 for plain reflow.
        schedule: β at the share s of the warm-up: ``"linear"`` 1 - s, ``"cosine"`` (1 + cos πs) / 2, ``"exp"``
            (e^(-5s) - e^-5) / (1 - e^-5).
        source: ``source(n, generator)`` draws ``(n, d…)`` start points of another kind; None for standard normal ones.
        flip: mirror a random half of the pairs, both members alike, along the last axis. Right for a teacher that
            treats mirrored images alike; during the whole training.

    >>> annealing = AnnealingReflow(PairedDataset(torch.randn(8, 2), torch.randn(8, 2)), warmup_steps=4)
    >>> [annealing.beta(step) for step in range(6)]
    [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """

    def __init__(
        self,
        pairs: PairedDataset,
        warmup_steps: int,
        schedule: str = "linear",
        *,
        source: Callable[[int, torch.Generator | None], Tensor] | None = None,
        flip: bool = False,
    ) -> None:
        if not isinstance(pairs, PairedDataset):
            raise TypeError(f"pairs must be a flows.PairedDataset; got {type(pairs).__name__}")
        self.pairs = pairs
        self.warmup_steps = checks.count(warmup_steps, "warmup_steps", at_least=0)
        self.schedule = checks.choice(schedule, "schedule", SCHEDULES)
        if source is not None and not callable(source):
            raise TypeError(f"source must be a function of (n, generator) or None; got {type(source).__name__}")
        self.source, self.flip = source, bool(flip)
        if self.flip and len(pairs.shape) != 3:
            raise ValueError(f"flip mirrors images (C, H, W); these pairs have samples of shape {pairs.shape}")

    def __repr__(self) -> str:
        own = "" if self.source is None else f", source={getattr(self.source, '__qualname__', repr(self.source))}"
        return f"AnnealingReflow(warmup_steps={self.warmup_steps}, schedule={self.schedule!r}{own}, flip={self.flip})"

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, row: int) -> Any:
        """A pair as it was made."""
        return self.pairs[row]

    def beta(self, step: int) -> float:
        """Share of fresh noise after ``step`` batches."""
        if step >= self.warmup_steps:
            return 0.0
        s = step / self.warmup_steps
        if self.schedule == "linear":
            return 1 - s
        if self.schedule == "cosine":
            return (1 + math.cos(math.pi * s)) / 2
        return (math.exp(-_RATE * s) - math.exp(-_RATE)) / (1 - math.exp(-_RATE))

    def anneal(self, batch: CoupledBatch, step: int, generator: torch.Generator | None = None) -> CoupledBatch:
        """The batch of pairs that is served at a step.

        Args:
            batch: pairs as they were made.
            step: batches served before.
            generator: source of the fresh noise and the flips.
        """
        x0, x1, beta = batch.x0, batch.x1, self.beta(step)
        if beta and self.source is None:
            fresh = draw(torch.randn, *x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
            x0 = math.sqrt(1 - beta**2) * x0 + beta * fresh
        elif beta and self.source is not None:
            drawn = self.source(len(x0), generator)
            if not isinstance(drawn, Tensor) or drawn.shape != x0.shape:
                got = tuple(drawn.shape) if isinstance(drawn, Tensor) else type(drawn).__name__
                raise ValueError(f"source must give points of shape {tuple(x0.shape)}; got {got}")
            fresh = drawn.to(x0)
            replaced = draw(torch.rand, len(x0), *[1] * (x0.ndim - 1), generator=generator, device=x0.device) < beta
            x0 = torch.where(replaced, fresh, x0)
        if self.flip:
            mirrored = draw(torch.rand, len(x0), 1, 1, 1, generator=generator, device=x0.device) < 0.5
            x0, x1 = torch.where(mirrored, x0.flip(-1), x0), torch.where(mirrored, x1.flip(-1), x1)
        return replace(batch, x0=x0, x1=x1, info={**batch.info, "beta": beta})
