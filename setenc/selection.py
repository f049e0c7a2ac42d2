"""States that select elements instead of summing them up, and states of several poolings side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from setenc.ranks import sum_over_ranks
from setenc.state import SetState


@dataclass(eq=False)
class SelectedState(SetState):
    """The ``K`` elements with the largest scores, largest first; where scores are equal, the first seen come first.

    Args:
        total: ``(B, H, K, V)`` features of the elements, 0 where there are fewer.
        mass: ``(B, H, K)`` 1 at elements, 0 where there are fewer.
        peak: ``(B, H, K)`` scores, -inf where there are fewer.
        count: ``(B,)`` number of elements so far, or the sum of their weights.
        slots: ``(0, 0)``.
    """

    @property
    def selects(self) -> bool:
        """True."""
        return True

    def chosen(self, other: SetState) -> Tensor:
        """Entries ``(B, H, K)`` that a merge selects: the index among those of both, its own first."""
        order = (
            torch.cat((self.peak.detach(), other.peak.detach()), 2).sort(stable=True, dim=-1, descending=True).indices
        )
        return order[..., : self.peak.shape[2]]

    def merge(self, other: SetState) -> SetState:
        """The largest of both; see `SetState.merge`."""
        self._check_mergeable(other)
        chosen = self.chosen(other)

        def pick(mine: Tensor, theirs: Tensor) -> Tensor:
            index = chosen if mine.ndim == 3 else chosen[..., None].expand(*chosen.shape, mine.shape[3])
            return torch.cat((mine, theirs), 2).gather(2, index)

        total, mass, peak = (pick(getattr(self, n), getattr(other, n)) for n in ("total", "mass", "peak"))
        return self.replace(total=total, mass=mass, peak=peak, count=self.count + other.count)

    def grouped(self, index: Tensor, size: int) -> SetState:
        """Merge streams: row ``b`` goes to row ``index[b]`` of a state of ``size`` streams."""
        rows, heads, count = self.peak.shape
        # Sorted by group, then by score; the first ones of a group are taken.
        flat = self.peak.detach().transpose(1, 2).reshape(rows * count, heads)
        owner = index.repeat_interleave(count)
        order = flat.sort(stable=True, dim=0, descending=True).indices
        order = order.gather(0, owner[order].sort(stable=True, dim=0).indices)
        group = owner[order]
        begin = torch.searchsorted(group.T.contiguous(), torch.arange(size, device=index.device).expand(heads, -1)).T
        begin = begin.contiguous()
        position = torch.arange(rows * count, device=index.device)[:, None] - begin.gather(0, group)
        found = torch.full((size * count + 1, heads), rows * count, device=index.device)
        slot = torch.where(position < count, group * count + position, size * count)
        found = found.scatter(0, slot, order)[:-1]

        def pick(values: Tensor, nothing: float) -> Tensor:
            shape = values.shape[3:]
            flat = values.transpose(1, 2).reshape(rows * count, heads, *shape)
            flat = torch.cat((flat, flat.new_full((1, heads, *shape), nothing)))
            chosen = found.view(*found.shape, *[1] * len(shape)).expand(-1, -1, *shape)
            return flat.gather(0, chosen).view(size, count, heads, *shape).transpose(1, 2)

        sizes = self.count.new_zeros(size).index_add(0, index, self.count)
        return self.replace(
            total=pick(self.total, 0), mass=pick(self.mass, 0), peak=pick(self.peak, -torch.inf), count=sizes
        )

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> SetState:
        """The state of the elements of all ranks, on every rank; see `SetState.all_reduce`."""
        rank, size = dist.get_rank(group), dist.get_world_size(group)

        def gathered(values: Tensor) -> Tensor:
            # Nothing but zeros from the other ranks: the sum puts every rank's values where they belong.
            mine = torch.zeros((size, *values.shape), dtype=values.dtype, device=values.device)
            return sum_over_ranks(mine.index_copy(0, torch.tensor([rank], device=values.device), values[None]), group)

        total, mass, peak, count = (gathered(t) for t in (self.total, self.mass, self.peak, self.count))
        states = [
            self.replace(total=total[r], mass=mass[r].detach(), peak=peak[r], count=count[r].detach())
            for r in range(size)
        ]
        whole = states[0]
        for state in states[1:]:
            whole = whole.merge(state)
        return whole


class JointState(SetState):
    """The states of several poolings that see the same elements.

    >>> joint = setenc.JointPooling(setenc.SlotPooling(3, 8, 4), setenc.InstancePooling(3, 8))
    >>> [part.peak.shape[2] for part in joint.init_state(2).parts]
    [4, 1]
    """

    def __init__(self, parts: Sequence[SetState]) -> None:
        self.members = tuple(parts)

    def __getattr__(self, name: str) -> Any:
        if name in ("total", "mass", "peak"):
            raise AttributeError(f"a JointState has several {name}s: use those of its parts")
        raise AttributeError(name)

    @property
    def parts(self) -> tuple[SetState, ...]:
        """The states that this one is made of."""
        return self.members

    @property
    def count(self) -> Tensor:  # type: ignore[override]  # a field of other states
        """``(B,)`` number of elements so far, or the sum of their weights."""
        return self.members[0].count

    @property
    def slots(self) -> Tensor:  # type: ignore[override]  # likewise
        """The slots of the first part."""
        return self.members[0].slots

    @property
    def selects(self) -> bool:
        """Whether all parts do."""
        return all(part.selects for part in self.members)

    def with_parts(self, parts: Sequence[SetState]) -> SetState:
        """The state made of other ``parts``."""
        return JointState(parts)

    def reference(self) -> Any:
        """The argument ``peak`` of `Pooling.contribution`: one of each part."""
        return tuple(part.reference() for part in self.members)

    def relative_to(self, other: SetState) -> SetState:
        """This state in units of the peaks of ``other``."""
        return JointState([a.relative_to(b) for a, b in zip(self.members, other.parts, strict=True)])

    def empty(self) -> SetState:
        """The state of a stream that has seen nothing, with the slots of this one."""
        return JointState([part.empty() for part in self.members])

    def merge(self, other: SetState) -> SetState:
        """The state of both streams' elements together; see `SetState.merge`."""
        if not isinstance(other, JointState):
            raise TypeError(f"a JointState merges with a JointState; got {type(other).__name__}")
        if len(self.members) != len(other.members):
            raise ValueError(f"states must have equal parts to merge; got {len(self.members)} and {len(other.members)}")
        return JointState([a.merge(b) for a, b in zip(self.members, other.members, strict=True)])

    def grouped(self, index: Tensor, size: int) -> SetState:
        """Merge streams: row ``b`` goes to row ``index[b]`` of a state of ``size`` streams."""
        return JointState([part.grouped(index, size) for part in self.members])

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> SetState:
        """The state of the elements of all ranks, on every rank; see `SetState.all_reduce`."""
        return JointState([part.all_reduce(group) for part in self.members])

    def map(self, function: Callable[[Tensor], Tensor]) -> SetState:
        """``function`` of every tensor."""
        return JointState([part.map(function) for part in self.members])

    def __repr__(self) -> str:
        return f"JointState({list(self.members)})"


torch.serialization.add_safe_globals([SelectedState, JointState])
