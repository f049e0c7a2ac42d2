"""Starts of flows: noise, or samples of another data set with their conditions, drawn for the targets of a batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flows.items import Collate, all_conditions, floating, has_conditions, read
from flows.seeds import derive_seed
from mbot import Coupling, checks
from mbot.conditions import Labels, check, class_codes, detached, to_device

Source = Callable[[int, torch.Generator], Any] | Tensor | Dataset[Any] | None


class Sources:
    """Source samples for OT batches; see `flows.CoupledLoader` for the arguments.

    Args:
        source: what they are drawn from.
        dataset: the targets.
        sampling: ``"independent"`` or ``"matched"``.
        groups: groups of all source samples and all targets, for ``"matched"``; None for their conditions.
        seed: of random transforms.
        collate: of items.
    """

    def __init__(
        self, source: Source, dataset: Any, sampling: str, groups: tuple[Labels, Labels] | None, seed: int,
        collate: Collate | None,
    ) -> None:  # fmt: skip
        if isinstance(source, Coupling):
            raise TypeError(f"source must say where paths start; got {source!r}: give it as coupling={source!r}")
        if isinstance(source, (str, PathLike)) or not (
            source is None or callable(source) or hasattr(source, "__getitem__")
        ):
            raise TypeError(
                "source must be None (standard normal), a callable (n, generator) -> samples or (samples, conditions), "
                f"a tensor of samples or a map-style data set; got {type(source).__name__}"
            )
        self.source, self.seed, self.collate = source, seed, collate
        self.sampling = checks.choice(sampling, "source_sampling", ("independent", "matched"))
        data: Any = None if callable(source) else source
        self.size = None if data is None else len(data)
        self.pools = None
        if sampling == "matched":
            self.pools = Pools(*self._groups(dataset, groups))
        elif groups is not None:
            raise ValueError("groups say which source samples belong to a target: give source_sampling='matched'")

    @cached_property
    def have_conditions(self) -> bool:
        """Whether they come from a data set of ``(sample, condition)``."""
        return has_conditions(self.source, derive_seed(self.seed, "look"), self.collate)

    @property
    def are_read(self) -> bool:
        """Whether they are read from a data set, whose code may draw from the global generators."""
        return self.size is not None and not isinstance(self.source, Tensor)

    def read(self, n: int, generator: torch.Generator, seed: int, targets: Tensor | None) -> tuple[Any, Any]:
        """Items of the data set and their conditions (or None), in the thread that may seed the global generators.

        Args:
            n: how many.
            generator: decides which.
            seed: of random transforms.
            targets: positions of the targets in their data set, where sources are matched to them.
        """
        x, y = read(self.source, self._rows(n, generator, targets), seed, self.collate)
        return detached(x), detached(y)

    def draw(self, n: int, like: Tensor, generator: torch.Generator, targets: Tensor | None) -> tuple[Tensor, Any]:
        """Noise, or samples of the callable or tensor that was given, and their conditions (or None).

        Args:
            n: how many.
            like: targets, for shape, dtype and device.
            generator: decides which.
            targets: as in `read`.
        """
        if self.source is None:
            return torch.randn(n, *like.shape[1:], generator=generator, device=like.device, dtype=like.dtype), None
        if callable(self.source):
            drawn = self.source(n, generator)
            return drawn if isinstance(drawn, tuple) and len(drawn) == 2 else (drawn, None)
        assert isinstance(self.source, Tensor)
        return self.source[self._rows(n, generator, targets).to(self.source.device)], None

    @staticmethod
    def fitted(drawn: tuple[Any, Any], n: int, like: Tensor) -> tuple[Tensor, Any]:
        """Source samples ``(n, d…)`` of the targets' shape, dtype and device, and their conditions (or None)."""
        (x0, y0), shape = drawn, (n, *like.shape[1:])
        if not isinstance(x0, Tensor) or x0.shape != shape:
            got = tuple(x0.shape) if isinstance(x0, Tensor) else type(x0).__name__
            raise ValueError(f"source must give samples of shape {shape}, as the data; got {got}")
        x0 = floating(x0, "source samples").detach()
        return x0.to(like.device, like.dtype), detached(to_device(y0, like.device))

    def _rows(self, n: int, generator: torch.Generator, targets: Tensor | None) -> Tensor:
        """Positions of source samples, none twice while there are enough."""
        if self.pools is not None and targets is not None:
            return self.pools.draw(targets, generator)
        assert self.size is not None
        if n <= self.size:
            return torch.randperm(self.size, generator=generator, device=generator.device)[:n].cpu()
        return torch.randint(self.size, (n,), generator=generator, device=generator.device).cpu()

    def _groups(self, dataset: Any, groups: tuple[Labels, Labels] | None) -> tuple[Labels, Labels]:
        if self.size is None:
            raise ValueError("source_sampling='matched' draws from a data set or tensor of source samples: give source")
        if groups is None:
            seed = derive_seed(self.seed, "look")
            targets_have = has_conditions(dataset, seed, self.collate)
            if not (self.have_conditions and targets_have):
                raise ValueError(
                    "source_sampling='matched' draws from the class of each target: source and dataset must be data "
                    "sets of (sample, condition); or give groups, those of all source samples and of all samples"
                )
            groups = all_conditions(self.source, seed, self.collate), all_conditions(dataset, seed, self.collate)
        check(groups[0], self.size, "groups[0]", "source")
        check(groups[1], len(dataset), "groups[1]", "dataset")
        return groups


class Pools:
    """Source samples by group, to draw from the groups of given targets.

    Args:
        groups0: group of each source sample, of any kind that `mbot.conditions` names.
        groups1: group of each target.

    Raises:
        ValueError: a target's group has no source sample.
    """

    def __init__(self, groups0: Labels, groups1: Labels) -> None:
        source, target, names = class_codes(groups0, groups1, names=("groups of the source", "groups of the targets"))
        sizes = np.bincount(source, minlength=len(names))
        lacking = [names[code] for code in np.unique(target) if not sizes[code]]
        if lacking:
            raise ValueError(f"the source has no sample of the class {', '.join(map(repr, lacking[:10]))}")
        self.target = torch.from_numpy(target)
        self.members = torch.from_numpy(source.argsort(kind="stable")).split(sizes.tolist())

    def draw(self, targets: Tensor, generator: torch.Generator) -> Tensor:
        """A source sample for each target, from its group; none twice while the group has enough."""
        wanted = self.target[targets]
        drawn = torch.empty_like(wanted)
        for code in wanted.unique().tolist():
            at, pool = (wanted == code).nonzero()[:, 0], self.members[code]
            rounds = -(-len(at) // len(pool))
            orders = [torch.randperm(len(pool), generator=generator, device=generator.device) for _ in range(rounds)]
            drawn[at] = pool[torch.cat(orders)[: len(at)].cpu()]
        return drawn
