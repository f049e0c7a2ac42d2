"""The state of a stream of set elements: everything that a pooling keeps of the elements it has seen.

A pooling gives element ``i`` a weight ``exp(l_i)`` for each slot and head and keeps, relative to the largest log-weight
``peak = max_i l_i`` seen so far,

    mass = sum_i exp(l_i - peak)        total = sum_i exp(l_i - peak) v_i

States form a commutative monoid: to merge two, rescale both to the larger peak and add (online softmax, Milakov and
Gimelshein 2018, arXiv 1805.02867). Nothing ever overflows, and the cut of a set into chunks does not matter, which is
mini-batch consistency (Bruno et al. 2021, arXiv 2103.01615; Willette et al. 2023, arXiv 2208.12401).

Max pooling is the same object without values (``V = 0``): its result is ``peak`` itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from setenc.ranks import first_rank_at, sum_over_ranks


@dataclass(eq=False)
class SetState:
    """The sums of ``B`` streams, in float32 or better: plain tensors, to be saved, copied and sent.

    ``torch.save`` and ``torch.load`` (also with ``weights_only=True``) and ``copy.deepcopy`` work mid-stream; what is
    saved is detached from the autograd graph.

    Args:
        total: ``(B, H, K, V)`` weighted sums of values in units of ``exp(peak)``.
        mass: ``(B, H, K)`` sums of weights in units of ``exp(peak)``.
        peak: ``(B, H, K)`` largest log-weight so far, -inf before the first element.
        count: ``(B,)`` number of elements so far, or the sum of their weights.
        slots: ``(H K, h)`` the slots of this stream as the pooling projects them, sampled once; ``(0, 0)`` without.

    >>> pooling = setenc.DeepSetsPooling(3, 8, "mean")
    >>> state = pooling.update(pooling.init_state(2), torch.randn(2, 5, 3))
    >>> state.merge(state).count
    tensor([10., 10.], dtype=torch.float64)
    """

    total: Tensor
    mass: Tensor
    peak: Tensor
    count: Tensor
    slots: Tensor

    @property
    def batch_size(self) -> int:
        """Number of streams ``B``."""
        return len(self.count)

    @property
    def is_maximum(self) -> bool:
        """Whether ``peak`` is the result (max pooling), and so carries gradients."""
        return self.total.shape[-1] == 0

    @property
    def selects(self) -> bool:
        """Whether elements are selected (a maximum) rather than summed up."""
        return self.is_maximum

    @property
    def parts(self) -> tuple[SetState, ...]:
        """The states that this one is made of: itself, unless a pooling joins several."""
        return (self,)

    def with_parts(self, parts: Sequence[SetState]) -> SetState:
        """The state made of other ``parts``."""
        return parts[0]

    def replace(self, **changes: Tensor) -> SetState:
        """A state with other tensors."""
        return type(self)(**{**vars(self), **changes})

    def reference(self) -> Any:
        """The argument ``peak`` of `Pooling.contribution` with which its results add up to this state."""
        return None if self.selects else self.peak

    def relative_to(self, other: SetState) -> SetState:
        """This state in units of the peak of ``other``."""
        if self.selects:
            return self
        scale = _scale(self.peak, other.peak)
        return self.replace(total=self.total * scale[..., None], mass=self.mass * scale, peak=other.peak)

    def chosen(self, other: SetState) -> Tensor:
        """Entries ``(B, H, K)`` that a merge selects: the index among those of both, its own first."""
        return (other.peak > self.peak).long()

    def mean(self) -> Tensor:
        """Weighted means of the values ``(B, H, K, V)``; 0 for a set without elements."""
        mass = self.mass[..., None]
        return torch.where(mass != 0, self.total / torch.where(mass != 0, mass, 1), self.total)

    def log_mean_weight(self) -> Tensor:
        """Logarithm ``(B, H, K)`` of the mean weight that a slot gave to the elements; 0 for a set without elements."""
        some = self.mass != 0
        logs = torch.where(some, self.mass, 1).log() + torch.where(some, self.peak.detach(), 0)
        count = torch.where(self.count > 0, self.count, 1).log().to(logs.dtype)
        return torch.where(some, logs - count[:, None, None], 0)

    def empty(self) -> SetState:
        """The state of a stream that has seen nothing, with the slots of this one: the identity of `merge`."""
        return self.replace(
            total=torch.zeros_like(self.total),
            mass=torch.zeros_like(self.mass),
            peak=torch.full_like(self.peak, -torch.inf),
            count=torch.zeros_like(self.count),
        )

    def merge(self, other: SetState) -> SetState:
        """The state of both streams' elements together; associative and commutative up to rounding.

        Both must have the same slots: start the second one as ``first.empty()``.

        Raises:
            TypeError: ``other`` is no state.
            ValueError: other shapes, dtypes, devices or slots.
        """
        self._check_mergeable(other)
        peak = larger(self.peak, other.peak)
        a, b = _scale(self.peak, peak), _scale(other.peak, peak)
        return SetState(
            self.total * a[..., None] + other.total * b[..., None],
            self.mass * a + other.mass * b,
            peak,
            self.count + other.count,
            self.slots,
        )

    def grouped(self, index: Tensor, size: int) -> SetState:
        """Merge streams: row ``b`` goes to row ``index[b]`` of a state of ``size`` streams."""
        rows = index[:, None, None].expand_as(self.peak)
        peak = self.peak.new_full((size, *self.peak.shape[1:]), -torch.inf)
        peak = peak.scatter_reduce(0, rows, self.peak.detach(), "amax")
        scale = _scale(self.peak, peak[index])
        if self.is_maximum:
            # The gradient of equal ones goes to the first, as in a merge.
            number = torch.arange(len(index), device=index.device)[:, None, None].expand_as(rows)
            none = torch.full_like(peak, len(index), dtype=torch.int64)
            first = none.scatter_reduce(0, rows, torch.where(self.peak == peak[index], number, len(index)), "amin")
            peak = torch.cat((self.peak, peak[:1])).gather(0, first).where(first < none, peak)

        def add(values: Tensor) -> Tensor:
            return values.new_zeros((size, *values.shape[1:])).index_add(0, index, values)

        return SetState(add(self.total * scale[..., None]), add(self.mass * scale), peak, add(self.count), self.slots)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> SetState:
        """The state of the elements of all ranks, on every rank.

        Differentiable: backward adds the ranks' gradients, so that averaging parameter gradients over the ranks (as
        DistributedDataParallel does) gives the gradient of the average of the ranks' losses.

        Args:
            group: the process group, or None for the default one.

        Raises:
            ValueError: ``torch.distributed`` is not initialised, or the ranks hold different slots.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError("all_reduce needs torch.distributed: call torch.distributed.init_process_group first")
        extremes = torch.cat((self.slots.detach(), -self.slots.detach()))
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group)
        high, low = extremes.chunk(2)
        if not torch.equal(high, -low):
            raise ValueError(
                "the ranks must share their slots; these differ. Start every rank with init_state(..., group=group)"
            )
        peak = self.peak.detach().clone()
        dist.all_reduce(peak, dist.ReduceOp.MAX, group)
        scale = _scale(self.peak, peak)
        parts = (self.total * scale[..., None], self.mass * scale)
        total, mass = sum_over_ranks(torch.cat([part.flatten() for part in parts]), group).split(
            [part.numel() for part in parts]
        )
        count = self.count.detach().clone()
        dist.all_reduce(count, dist.ReduceOp.SUM, group)
        if self.is_maximum:
            peak = first_rank_at(peak, self.peak, group)
        return SetState(total.view_as(self.total), mass.view_as(self.mass), peak, count, self.slots)

    def map(self, function: Callable[[Tensor], Tensor]) -> SetState:
        """``function`` of every tensor."""
        return replace(self, **{field.name: function(getattr(self, field.name)) for field in fields(self)})

    def detach(self) -> SetState:
        """Without the autograd graph."""
        return self.map(Tensor.detach)

    def clone(self) -> SetState:
        """An independent copy."""
        return self.map(Tensor.clone)

    def to(self, device: torch.device | str) -> SetState:
        """On another device."""
        return self.map(lambda tensor: tensor.to(device))

    def __copy__(self) -> SetState:
        return self.map(lambda tensor: tensor)

    def __deepcopy__(self, memo: dict[int, Any]) -> SetState:
        return self.clone()

    def __getstate__(self) -> dict[str, Tensor]:
        return vars(self.detach())

    def _check_mergeable(self, other: SetState) -> None:
        if type(other) is not type(self):
            mine = type(self).__name__
            raise TypeError(f"a {mine} merges with a {mine}; got {type(other).__name__}")
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if (mine.shape, mine.dtype, mine.device) != (theirs.shape, theirs.dtype, theirs.device):
                raise ValueError(
                    f"states must have equal shapes, dtypes and devices to merge; {field.name} is {tuple(mine.shape)} "
                    f"{mine.dtype} on {mine.device} and {tuple(theirs.shape)} {theirs.dtype} on {theirs.device}"
                )
        if self.slots is not other.slots and not torch.equal(self.slots, other.slots):
            raise ValueError(
                "states must have the same slots to merge; random slots are sampled once per stream. "
                "Start the second stream as first.empty(), or put the encoder in eval mode"
            )


torch.serialization.add_safe_globals([SetState])


def larger(first: Tensor, second: Tensor) -> Tensor:
    """The larger peak; the gradient of equal ones goes to the first. NaN stays."""
    return torch.where((first >= second) | first.isnan(), first, second)


def _scale(peak: Tensor, new: Tensor) -> Tensor:
    """``exp(peak - new)``, 1 where both are -inf. A constant in backward: results do not depend on the peak."""
    peak, new = peak.detach(), new.detach()
    return torch.where(new == -torch.inf, 0, peak - new).exp_()
