"""Slots placed by data: the elements that are farthest from each other, as sparse Gaussian processes choose points."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from setenc import checks

_CANDIDATES = 4096  # elements among which slots are chosen: a uniform sample of those given


def sample(
    features: Tensor | Iterable[Any], in_dim: int, mask: Tensor | None, generator: torch.Generator | None
) -> Tensor:
    """At most `_CANDIDATES` elements ``(n, in_dim)``, drawn uniformly from a batch or a stream of features."""
    kept: Tensor | None = None
    keys: Tensor | None = None
    checks.generator(generator)
    features = checks.as_tensor(features)
    if mask is not None and not isinstance(features, Tensor):
        raise ValueError("mask belongs to one batch; in a stream give pairs (chunk, mask)")
    if not isinstance(features, Iterable):
        raise TypeError(
            f"features must be a tensor (B, n, in_dim), or an iterable of such; got {type(features).__name__}"
        )
    for x, own in [(features, mask)] if isinstance(features, Tensor) else map(_with_mask, features):
        x, own, _ = checks.elements(x, own, None, "features")
        x = checks.features(x, in_dim).detach()
        rows = x.flatten(0, 1) if own is None else x[own]
        # The elements with the largest random keys, whatever the chunks: a sample of the whole stream.
        where = "cpu" if generator is None else generator.device
        key = torch.rand(len(rows), generator=generator, device=where, dtype=torch.float64)
        rows, key = (rows, key) if kept is None or keys is None else (torch.cat((kept, rows)), torch.cat((keys, key)))
        chosen = key.topk(min(_CANDIDATES, len(key))).indices
        kept, keys = rows[chosen.to(rows.device)], key[chosen]
    if kept is None or len(kept) == 0:
        raise ValueError("features must hold at least one element")
    return checks.finite_features(kept)


def _with_mask(chunk: Any) -> Sequence[Any]:
    if isinstance(chunk, tuple) and len(chunk) != 2:
        raise ValueError(f"a chunk must be a tensor or a pair (chunk, mask); got a tuple of {len(chunk)}")
    return chunk if isinstance(chunk, tuple) else (chunk, None)


def farthest(points: Tensor, count: int) -> Tensor:
    """Index ``(count,)`` of points ``(n, d)`` that are far from each other: each next one is farthest from the chosen.

    Raises:
        ValueError: fewer than ``count`` points differ.
    """
    chosen = [0]
    distance = (points - points[0]).square().sum(1)
    while len(chosen) < count:
        index = int(distance.argmax())
        if not float(distance[index]) > 0:
            raise ValueError(f"{count} slots need {count} different keys among the elements; got {len(chosen)}")
        chosen.append(index)
        distance = torch.minimum(distance, (points - points[index]).square().sum(1))
    return torch.tensor(chosen, device=points.device)
