"""Learning-rate schedules of the papers."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mbot import checks


def warmup_schedule(optimizer: Optimizer, *, warmup: int = 0, steps: int | None = None) -> LambdaLR:
    """Linear warm-up, then constant (``steps=None``) or linear decay to 0 at ``steps``: the papers' schedules.

    Args:
        optimizer: its learning rates are the peak.
        warmup: steps of warm-up.
        steps: length of the run for linear decay.
    """
    checks.count(warmup, "warmup", at_least=0)
    if steps is not None:
        checks.count(steps, "steps")

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / (warmup + 1))
        return rise if steps is None else min(rise, max(0.0, (steps - step) / max(1, steps - warmup)))

    return LambdaLR(optimizer, factor)
