"""Several poolings side by side over the same features."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from setenc.pooling.base import Pooling
from setenc.ragged import Ragged
from setenc.selection import JointState
from setenc.state import SetState


class JointPooling(Pooling):
    """The slots of several poolings, one after the other: what the extractor makes of an element is computed once.

    For bags: slots over all instances, and the most suspicious instance beside them.

    Args:
        poolings: two or more with the same ``in_dim`` and ``dim``, of one pass each.

    >>> pooling = JointPooling(setenc.SlotPooling(3, 8, 4), setenc.InstancePooling(3, 8))
    >>> pooling(torch.randn(2, 50, 3)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(self, *poolings: Pooling) -> None:
        for pooling in poolings:
            if not isinstance(pooling, Pooling):
                raise TypeError(f"every pooling must be a setenc Pooling; got {type(pooling).__name__}")
        # Those of a joint pooling are poolings of this one: a state has parts, and they have none.
        poolings = tuple(p for each in poolings for p in (each.poolings if type(each) is JointPooling else (each,)))
        sizes = {(pooling.in_dim, pooling.out_dim) for pooling in poolings}
        if len(poolings) < 2 or len(sizes) > 1:
            raise ValueError(
                f"poolings must be two or more of one in_dim and dim; got {len(poolings)} of {sorted(sizes)}"
            )
        if any(pooling.num_passes > 1 for pooling in poolings):
            raise ValueError("poolings side by side see their elements once; one of these takes several passes")
        ((in_dim, dim),) = sizes
        count = sum(pooling.num_slots for pooling in poolings)
        super().__init__(in_dim, dim, num_slots=count, num_heads=1, value_dim=0)
        self.poolings: Any = nn.ModuleList(poolings)
        counts = {pooling.counts_multiplicities for pooling in poolings}
        self.counts_multiplicities = counts.pop() if len(counts) == 1 else None

    def init_state(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> SetState:
        """The states of all poolings; see `Pooling.init_state`."""
        return JointState([p.init_state(batch_size, generator=generator, group=group) for p in self.poolings])

    def check_state(self, state: Any) -> None:
        """`Pooling.check_state` of each part."""
        if not isinstance(state, SetState):
            raise TypeError(f"state must be a setenc.JointState, from init_state; got {type(state).__name__}")
        if not isinstance(state, JointState) or len(state.parts) != len(self.poolings):
            raise ValueError(
                f"the state must be a JointState of {len(self.poolings)} parts, one of each pooling; got a "
                f"{type(state).__name__} of {len(state.parts)}"
            )
        for pooling, part in zip(self.poolings, state.parts, strict=True):
            pooling.check_state(part)

    def absorb(
        self,
        state: SetState,
        features: Tensor,
        mask: Tensor | None,
        weights: Tensor | None,
        *,
        peak: Any = None,
        alone: bool = False,
    ) -> SetState:
        """`Pooling.absorb` of each."""
        peaks = peak or [None] * len(self.poolings)
        return JointState(
            [
                pooling.absorb(part, features, mask, weights, peak=own, alone=alone)
                for pooling, part, own in zip(self.poolings, state.parts, peaks, strict=True)
            ]
        )

    def ragged_contribution(
        self, state: SetState, features: Tensor, ragged: Ragged, weights: Tensor | None, peak: Any = None
    ) -> SetState:
        """`Pooling.ragged_contribution` of each."""
        peaks = peak or [None] * len(self.poolings)
        return JointState(
            [
                pooling.ragged_contribution(part, features, ragged, weights, own)
                for pooling, part, own in zip(self.poolings, state.parts, peaks, strict=True)
            ]
        )

    def forward(
        self,
        features: Tensor,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Pooled slots ``(B, K, dim)`` of whole sets; arguments as in `Pooling.forward`."""
        return torch.cat([p(features, mask, weights, generator=generator) for p in self.poolings], 1)

    def readout(self, state: SetState) -> Tensor:
        """The slots of all poolings ``(B, K, dim)``."""
        self.check_state(state)
        return torch.cat([p.readout(part) for p, part in zip(self.poolings, state.parts, strict=True)], 1)

    def attention(self, state: SetState, features: Tensor, *_: Any, **__: Any) -> Tensor:
        """An error: use that of one pooling, ``joint.poolings[0].attention(state.parts[0], features)``."""
        raise NotImplementedError("a JointPooling has no attention of its own: use joint.poolings[i].attention")
