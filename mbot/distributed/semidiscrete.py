"""Potentials of a data set learned by all ranks together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mbot import checks
from mbot.conditions import Labels, check, class_codes
from mbot.couplings import SemidiscreteCoupling
from mbot.couplings.fitted import fingerprint
from mbot.distributed.ranks import Ranks


def fit(
    coupling: SemidiscreteCoupling,
    data: Tensor,
    y: Labels | None = None,
    *,
    noise: Callable[..., Tensor] | None = None,
    generator: torch.Generator | None = None,
    group: dist.ProcessGroup | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SemidiscreteCoupling:
    """`SemidiscreteCoupling.fit`, each step of which sees the noises of all ranks: ``batch_size`` on each.

    Every rank holds the data set and ends with the same potentials. A step sums the histograms of the cells over the
    ranks (8 bytes a data point), so that P ranks find what one process finds with P times the batch size.

    Args:
        coupling: as for its ``fit``.
        data: ``(N, d…)`` the data set, the same on every rank.
        y: ``(N,)`` its labels.
        noise: ``noise(n, generator=…)``, called on each rank with a generator of its own.
        generator: rank 0's is the source of randomness, of all ranks.
        group: process group, or None for the default one.
        progress: as for ``fit``.

    Raises:
        TypeError: not a `SemidiscreteCoupling`.
        ValueError: data or settings that differ between the ranks, and what ``fit`` raises.
    """
    if not isinstance(coupling, SemidiscreteCoupling):
        raise TypeError(f"coupling must be an mbot.SemidiscreteCoupling; got {coupling!r}")
    ranks = Ranks(group)

    def checked() -> tuple[int, str]:
        points, _ = checks.samples(data, data, "data", "data")
        check(y, len(points), "y", "data")
        codes = None if y is None else torch.from_numpy(class_codes(y, y, names=("y", "y"))[1]).to(points.device)
        return fingerprint(points, codes), repr(coupling)

    found = ranks.from_all(checked)
    if len(set(found)) > 1:
        raise ValueError(
            "every rank must pass the same data set, in the same order and with the same classes, and the same "
            f"coupling; got {len({data for data, _ in found})} data sets and {sorted({text for _, text in found})}"
        )

    def seed() -> Any:
        where = None if generator is None else generator.device
        return int(torch.randint(2**62, (1,), generator=generator, device=where))

    own = torch.Generator("cpu" if generator is None else generator.device)
    own.manual_seed(ranks.from_first(seed) + ranks.rank)
    fitted = coupling.fit(data, y, noise=noise, generator=own, progress=progress, total=ranks.sum)
    learned = fitted.potentials
    assert learned is not None
    values, point = ranks.broadcast(learned.values), ranks.broadcast(learned.point)
    return dataclasses.replace(fitted, potentials=dataclasses.replace(learned, values=values, point=point))
