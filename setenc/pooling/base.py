"""Base of the poolings: log-weights and values of single elements, accumulated in a `SetState`, then read out."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from setenc import checks
from setenc.ragged import Ragged
from setenc.state import SetState

# What a state holds of its elements: total (B, H, K, V), mass and peak (B, H, K).
Parts = tuple[Tensor, Tensor, Tensor]

# Elements of a block of a ragged batch: each set pads its last block.
_BLOCK = 64

# Weights (elements times slots times heads) that a processor's cache holds; without gradients more are taken in turn.
_CACHED = 2**17


class Pooling(nn.Module):
    """Base class. A concrete pooling says what an element contributes (`_part`) and how a state is read (`readout`).

    What it says of an element may depend on that element, the slots and the parameters, never on other elements.

    Empty sets are defined: every weighted mean and sum, and every maximum, over no elements is 0.

    Args:
        in_dim: features of an element.
        out_dim: features of a slot after `readout`.
        num_slots: slots ``K``.
        num_heads: heads ``H`` of the state.
        value_dim: values ``V`` of a head.
    """

    state_class = SetState
    """What the elements become."""

    num_passes = 1
    """Times that a stream has to be seen; see `next_pass`."""

    counts_multiplicities: bool | None = True
    """Whether an element of weight 2 counts as two, or a weight > 0 only says that it is there; None: some slots do."""

    def __init__(self, in_dim: int, out_dim: int, *, num_slots: int, num_heads: int, value_dim: int) -> None:
        super().__init__()
        self.in_dim = checks.count(in_dim, "in_dim")
        self.out_dim = checks.count(out_dim, "dim")
        self.num_slots = checks.count(num_slots, "num_slots")
        self.num_heads, self.value_dim = num_heads, value_dim

    @property
    def has_masses(self) -> bool:
        """Whether the state holds the weight that each slot gave in all."""
        return self.value_dim > 0

    def _slots(self, generator: torch.Generator | None, group: dist.ProcessGroup | None) -> Tensor:
        """The slots ``(H K, h)`` of a new stream."""
        return self.like.new_empty(0, 0)

    def _scores(self, features: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Log-weights ``(B, H, K, n)``, which may be overwritten, and values ``(B, H, n, V)`` of the elements.

        Values that all heads share are ``(B, 1, n, V)``. Both in the state's dtype.
        """
        raise NotImplementedError(f"{type(self).__name__} gives its elements no attention")

    def _part(
        self, features: Tensor, slots: Tensor, offset: Tensor | None, peak: Tensor | None, onto: Parts | None
    ) -> Parts:
        """``(total, mass, peak)`` of features ``(B, n, in_dim)``, n > 0, added to what is in ``onto``, if anything.

        ``offset`` ``(B, 1, 1, n)`` holds the logarithms of the elements' weights, -inf at padding. Where ``peak`` is
        given the result is relative to it.
        """
        log_weights, values = self._scores(features, slots)
        with full_precision(features.device):
            return accumulate(log_weights, values, offset, peak, onto)

    def _checked_part(
        self, features: Tensor, slots: Tensor, offset: Tensor | None, peak: Tensor | None, onto: Parts | None
    ) -> Parts:
        """`_part` of features that are found to be finite."""
        parts = self._part(features, slots, offset, peak, onto)
        checks.finite_features(features, parts[0] if self.has_masses else parts[2])
        return parts

    def attention(
        self, state: SetState, features: Tensor, mask: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """Shares ``(B, H, K, n)`` of these elements in the means of ``state``: read in a second pass over the stream.

        Over all elements that the state has seen they sum to 1. Arguments as in `update`.
        """
        features, mask, weights = checks.elements(features, mask, weights, "features")
        self.check_state(state)
        checks.batch(features, state.batch_size)
        log_weights, _ = self._scores(checks.finite_features(self.prepare(features, mask)), state.slots)
        offset = log_of_weights(mask, weights, log_weights.dtype)
        if offset is not None:
            log_weights = log_weights + offset
        mass = torch.where(state.mass != 0, state.mass, 1)
        return (log_weights - _finite(state.peak)[..., None]).exp() / mass[..., None]

    def ragged_contribution(
        self, state: SetState, features: Tensor, ragged: Ragged, weights: Tensor | None, peak: Tensor | None = None
    ) -> SetState:
        """The state of a ragged batch alone, from the features ``(T, in_dim)`` of all its elements.

        Sets are cut into small blocks, each block is pooled, and the blocks of a set are merged.
        """
        index, mask, owner = ragged.blocks(_BLOCK)
        if weights is not None:
            weights = checks.packed_weights(weights, features)[index].where(mask, 0)
        # Slots that are one for each set go with its blocks.
        blocks = state.replace(slots=state.slots[owner]) if self.slots_of_sets(state) else state
        parts = self.contribution(blocks, features[index], mask, weights, None if peak is None else peak[owner])
        return parts.grouped(owner, len(ragged)).replace(slots=state.slots)

    def slots_of_sets(self, state: SetState) -> bool:
        """Whether the slots are ``(B, h)``, those of each set, and not shared by all."""
        return False

    def readout(self, state: SetState) -> Tensor:
        """Pooled slots ``(B, K, out_dim)`` of what the state has seen so far; the state stays as it is."""
        raise NotImplementedError

    @property
    def like(self) -> Tensor:
        """A parameter: its dtype is that of results, its device that of states."""
        return next(self.parameters())

    @property
    def _dtype(self) -> torch.dtype:
        """Of the state: float32 or better, also for half parameters and under autocast."""
        return torch.promote_types(self.like.dtype, torch.float32)

    def init_state(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> SetState:
        """The state of ``batch_size`` streams that have seen nothing. Random slots are sampled once, by this call.

        Args:
            batch_size: sets ``B`` that stream side by side; they share their slots.
            generator: for random slots; None is torch's default.
            group: process group whose ranks work on the same sets: all get the slots of its first rank.
        """
        batch_size = checks.count(batch_size, "batch_size", at_least=0)
        checks.generator(generator)
        shape = (batch_size, self.num_heads, self.num_slots)
        like, dtype = self.like, self._dtype
        return self.state_class(
            like.new_zeros(*shape, self.value_dim, dtype=dtype),
            like.new_zeros(shape, dtype=dtype),
            like.new_full(shape, -torch.inf, dtype=dtype),
            set_sizes(like.new_zeros(batch_size, 0), None, None),
            self._slots(generator, group),
        )

    def check_state(self, state: Any) -> None:
        """Hold a state to be one that this pooling makes: of its kind, its sizes and its dtype.

        Raises:
            TypeError: no state.
            ValueError: the state of another pooling.
        """
        if not isinstance(state, SetState):
            raise TypeError(f"state must be a setenc.SetState, from init_state; got {type(state).__name__}")
        # Every chunk comes by here.
        sizes, total = (self.num_heads, self.num_slots, self.value_dim), getattr(state, "total", None)
        right = total is not None and total.shape[1:] == sizes and total.dtype == self._dtype
        if not (right and type(state) is self.state_class and self._knows(state.slots)):
            found = "" if total is None else f" of {tuple(total.shape[1:])}, {total.dtype}"
            raise ValueError(
                f"the state must be one that this {type(self).__name__} made: a {self.state_class.__name__} of heads, "
                f"slots and values {sizes}, {self._dtype}; got a {type(state).__name__}{found}, with slots of "
                f"{tuple(state.slots.shape)}"
            )

    def _knows(self, slots: Tensor) -> bool:
        """Whether slots of this shape come from `_slots`."""
        return slots.numel() == 0

    def next_pass(self, state: SetState) -> SetState:
        """The state with which a pooling of several passes sees the same elements again.

        Raises:
            ValueError: the state is complete.
        """
        raise ValueError(f"a state of {type(self).__name__} is complete: there is no further pass over the elements")

    def contribution(
        self,
        state: SetState,
        features: Tensor,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        peak: Tensor | None = None,
    ) -> SetState:
        """The state of these elements alone, with the slots of ``state``; arguments as in `update`.

        Relative to a given ``peak`` ``(B, H, K)`` contributions simply add up.
        """
        checked = checks.elements(features, mask, weights, "features")
        self.check_state(state)
        return self.absorb(state, *checked, peak=peak, alone=True)

    def update(
        self, state: SetState, features: Tensor, mask: Tensor | None = None, weights: Tensor | None = None
    ) -> SetState:
        """The state after these elements too.

        Args:
            state: of the stream so far; it stays as it is.
            features: ``(B, n, in_dim)``, any n.
            mask: ``(B, n)`` bool, True = a real element; what stands in padding, NaN included, has no effect.
            weights: ``(B, n)`` multiplicities >= 0; an element of weight 2 counts as two equal elements.

        Raises:
            ValueError: wrong shapes, negative weights, features of real elements that are not finite.
        """
        features, mask, weights = checks.elements(features, mask, weights, "features")
        self.check_state(state)
        checks.batch(features, state.batch_size)
        return self.absorb(state, features, mask, weights)

    def absorb(
        self,
        state: SetState,
        features: Tensor,
        mask: Tensor | None,
        weights: Tensor | None,
        *,
        peak: Tensor | None = None,
        alone: bool = False,
    ) -> SetState:
        """`update`, or `contribution` where ``alone``, with mask and weights that are checked already."""
        features = self.prepare(features, mask)
        sets, size = features.shape[:2]
        if size == 0:
            return state.empty() if alone else state
        offset = log_of_weights(mask, weights, state.total.dtype)
        parts = None if alone else (state.total, state.mass, state.peak)
        pieces: Iterable[tuple[Tensor, Tensor | None]] = [(features, offset)]
        if checks.may_look(features) and not torch.is_grad_enabled():
            block = max(_CACHED // (sets * self.num_heads * self.num_slots or 1), 256)
            if block < size:
                logs = [None] * -(-size // block) if offset is None else offset.split(block, -1)
                pieces = zip(features.split(block, 1), logs, strict=True)
        for some, log_weights in pieces:
            parts = self._checked_part(some, state.slots, log_weights, peak, parts)
        if alone or mask is not None or weights is not None:
            count = set_sizes(features, mask, weights)
            count = count if alone else state.count + count
        else:
            count = state.count + size
        total, mass, peak = cast(Parts, parts)
        return state.replace(total=total, mass=mass, peak=peak, count=count)

    def forward(
        self,
        features: Tensor,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Pooled slots ``(B, K, out_dim)`` of whole sets; arguments as in `update` and `init_state`."""
        return self.readout(self.state_of(features, mask, weights, generator=generator))

    def state_of(
        self,
        features: Tensor,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> SetState:
        """The state of whole sets; arguments as in `forward`."""
        features, mask, weights = checks.elements(features, mask, weights, "features")
        state = self.absorb(self.init_state(features.shape[0], generator=generator), features, mask, weights)
        for _ in range(self.num_passes - 1):
            state = self.absorb(self.next_pass(state), features, mask, weights)
        return state

    def prepare(self, features: Tensor, mask: Tensor | None) -> Tensor:
        """Checked features, 0 at padding, in the parameters' dtype where they come in less precision."""
        checks.features(features, self.in_dim)
        if mask is not None:
            features = features.masked_fill(~mask[..., None], 0)
        return checks.precision(features, self.like.dtype, "features")

    def extra_repr(self) -> str:
        """Settings, for printing."""
        return f"in_dim={self.in_dim}, dim={self.out_dim}, num_slots={self.num_slots}"


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off: the state is kept in float32 or better."""
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def accumulate(
    log_weights: Tensor, values: Tensor, offset: Tensor | None, peak: Tensor | None, onto: Parts | None
) -> Parts:
    """`Pooling._part` of log-weights ``(B, H, K, n)``, overwritten, and values ``(B, H or 1, n, V)``.

    The peak is a constant in backward: results do not depend on it.
    """
    if offset is not None:
        log_weights = log_weights + offset
    if peak is None:
        peak = log_weights.detach().amax(-1)
        if onto is not None:
            peak = torch.maximum(peak, onto[2])
        peak = peak if offset is None else found(peak, offset)
    shift = peak if offset is None else _finite(peak)
    # In place where autograd does not need the logarithms: allocating costs more than the exponentials.
    in_place = not (log_weights.requires_grad and torch.is_grad_enabled())
    weights = log_weights.sub_(shift[..., None]) if in_place else log_weights - shift[..., None]
    weights = weights.exp_()
    # One product for each head, or one for all where they share the values.
    rows = weights.flatten(0, 1) if values.shape[1] > 1 else weights.flatten(1, 2)
    values = values.flatten(0, 1)
    mass = weights.sum(-1)
    if onto is None:
        return (rows @ values).view(*peak.shape, values.shape[-1]), mass, peak
    scale = (onto[2] - shift).exp_()
    total = (onto[0] * scale[..., None]).view(*rows.shape[:2], values.shape[-1]).baddbmm(rows, values)
    return total.view(*peak.shape, values.shape[-1]), torch.addcmul(mass, onto[1], scale), peak


def found(peak: Tensor, offset: Tensor | None) -> Tensor:
    """The ``peak`` ``(B, H, K)`` of elements with these logarithms of weights, NaN where none of them reaches it.

    -inf says that there is no element, and must not come from an overflow below all numbers.
    """
    if checks.may_look(peak) and bool(peak.numel() == 0 or peak.detach().amin() > -torch.inf):
        return peak
    nothing = peak == -torch.inf
    return torch.where(nothing if offset is None else nothing & (offset.amax(-1) != -torch.inf), torch.nan, peak)


def normalised(norm: nn.Module, pooled: Tensor, dtype: torch.dtype) -> Tensor:
    """``norm`` of slots ``(…, d)``, in ``dtype``, at any size: a layer norm does not see a scale, its squares overflow.

    Raises:
        ValueError: slots that are not finite, or without a norm too large for ``dtype``.
    """
    if isinstance(norm, nn.Identity):
        return checks.finite(pooled.to(dtype))
    limit = min(1e15, torch.finfo(dtype).max)
    look = checks.may_look(pooled) and pooled.numel() > 0
    if not look or not float(pooled.detach().abs().amax()) <= limit:
        size = checks.finite(pooled).detach().abs().amax(-1, keepdim=True)
        pooled = pooled / torch.where(size > limit, size, 1)
    return norm(pooled.to(dtype))


def _finite(peak: Tensor) -> Tensor:
    """-inf, of sets without elements so far, made finite: nothing is subtracted from itself at infinity."""
    return peak.clamp_min(torch.finfo(peak.dtype).min)


def log_of_weights(mask: Tensor | None, weights: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Logarithms ``(B, 1, 1, n)`` of the elements' weights, -inf at padding; None where all are 1."""
    if weights is not None:
        some = weights != 0
        # In the better dtype of both: a weight may be too small or too large for the state, its logarithm is not.
        weights = weights.to(torch.promote_types(weights.dtype, dtype))
        offset = torch.where(some, torch.where(some, weights, 1).log(), -torch.inf).to(dtype)
    elif mask is not None:
        offset = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)
    else:
        return None
    return offset[:, None, None, :]


def set_sizes(x: Tensor, mask: Tensor | None, weights: Tensor | None) -> Tensor:
    """Number of elements ``(B,)`` of each set, or the sum of their weights."""
    dtype = torch.float64 if x.device.type != "mps" else torch.float32
    if weights is not None:
        return weights.sum(1, dtype=dtype)
    if mask is not None:
        return mask.sum(1, dtype=dtype)
    return torch.full(x.shape[:1], x.shape[1], dtype=dtype, device=x.device)
