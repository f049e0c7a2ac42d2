"""Poolings of bags of which a few instances matter: the most suspicious ones, and attention that starts from the worst.

Instances are elements, bags are sets, as multiple-instance learning calls them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from setenc import checks
from setenc.pooling.base import Parts, Pooling, full_precision
from setenc.ragged import Ragged
from setenc.selection import SelectedState
from setenc.state import SetState

_TWICE = "a bag is seen twice: take state = pooling.next_pass(state), and stream it again"


class InstancePooling(Pooling):
    """The ``k`` instances with the largest scores, largest first: a slot of each holds its score and its features.

    The score is a linear function of an instance, ``w' x``; feature 0 of slot ``k`` is the ``k``-th largest score, the
    others are a linear projection of that instance. The largest score is the instance logit of max pooling. Beside
    other slots see `JointPooling`. Slots without an instance, in smaller bags, are 0.

    A weight > 0 says that an instance is there; it does not multiply it.

    Args:
        in_dim: features of an instance.
        dim: features of a slot, at least 2.
        num_instances: instances ``k``.

    >>> pooling = InstancePooling(3, 8, num_instances=2)
    >>> pooling(torch.randn(2, 50, 3)).shape
    torch.Size([2, 2, 8])
    """

    state_class = SelectedState

    def __init__(self, in_dim: int, dim: int, num_instances: int = 1) -> None:
        dim = checks.count(dim, "dim", at_least=2)
        count = checks.count(num_instances, "num_instances")
        super().__init__(in_dim, dim, num_slots=count, num_heads=1, value_dim=checks.count(in_dim, "in_dim"))
        self.counts_multiplicities = count == 1  # the largest of two equal ones is the same
        self.score = nn.Linear(self.in_dim, 1)
        self.value = nn.Linear(self.in_dim, dim - 1)

    @property
    def has_masses(self) -> bool:
        """False: instances are selected."""
        return False

    def scores(self, features: Tensor) -> Tensor:
        """Scores ``(B, n)`` of features ``(B, n, in_dim)``."""
        return self.score(features)[..., 0]

    def _part(
        self, features: Tensor, slots: Tensor, offset: Tensor | None, peak: Tensor | None, onto: Parts | None
    ) -> Parts:
        features = features.to(self._dtype)
        with full_precision(features.device):
            score, bias = (t.to(self._dtype) for t in self.score.parameters())
            scores = (features @ score[0] + bias)[:, None]
            # An instance whose score or weight is not finite becomes NaN and comes first; -inf says that there is none.
            scores = scores + 0 * scores.detach()
            if offset is not None:
                offset = offset[:, 0]
                scores = scores + torch.where(offset == -torch.inf, offset, 0 * offset)
        order = scores.detach().sort(stable=True, dim=-1, descending=True).indices[..., : self.num_slots]
        peak = scores.gather(2, order)
        total = features.gather(1, order[:, 0, :, None].expand(-1, -1, self.in_dim))[:, None]
        missing = self.num_slots - peak.shape[2]
        if missing:
            peak = nn.functional.pad(peak, (0, missing), value=-torch.inf)
            total = nn.functional.pad(total, (0, 0, 0, missing))
        there = peak.detach() != -torch.inf
        parts = torch.where(there[..., None], total, 0), there.to(peak.dtype), peak
        if onto is None:
            return parts
        count = peak.new_zeros(len(peak))
        old, new = (SelectedState(*each, count, slots) for each in (onto, parts))
        whole = old.merge(new)
        return whole.total, whole.mass, whole.peak

    def readout(self, state: SetState) -> Tensor:
        """``(B, k, dim)``: the score, then the projected features, of each selected instance."""
        self.check_state(state)
        there = state.mass[:, 0, :, None] > 0
        score = state.peak[:, 0, :, None]
        score = torch.where(score == -torch.inf, 0, score).to(self.like.dtype)
        value = self.value(state.total[:, 0].to(self.like.dtype))
        return checks.finite(torch.cat((score, torch.where(there, value, 0)), -1))


class DSMILPooling(Pooling):
    """Attention from the critical instance: the instance with the largest score is the query, all are keys.

    The critical instance ``m`` is that of `InstancePooling`; the bag is ``sum_i a_i W x_i`` with
    ``a = softmax_i(<q(x_i), q(x_m)> / sqrt(dim))``. Slot 0 of the result is the bag, slot 1 the critical instance: its
    score, then its features. (DSMIL: Li, Li and Eliceiri 2021, arXiv 2011.08939.)

    The critical instance must be known before attention from it can start, so a bag is seen twice: stream it, take
    ``state = pooling.next_pass(state)``, and stream it again. `setenc.encode` and calls on whole bags do so themselves.

    Args:
        in_dim: features of an instance.
        dim: features of a slot, at least 2.

    >>> pooling = DSMILPooling(3, 8)
    >>> x = torch.randn(2, 50, 3)
    >>> state = pooling.init_state(2)
    >>> for chunk in x.split(10, 1):
    ...     state = pooling.update(state, chunk)
    >>> state = pooling.next_pass(state)
    >>> for chunk in x.split(10, 1):
    ...     state = pooling.update(state, chunk)
    >>> torch.allclose(pooling.readout(state), pooling(x), atol=1e-5)
    True
    """

    num_passes = 2

    def __init__(self, in_dim: int, dim: int) -> None:
        dim = checks.count(dim, "dim", at_least=2)
        super().__init__(in_dim, dim, num_slots=2, num_heads=1, value_dim=checks.count(in_dim, "in_dim"))
        self.critical = InstancePooling(self.in_dim, dim)
        self.query = nn.Linear(self.in_dim, dim)
        self.value = nn.Linear(self.in_dim, dim)

    @property
    def has_masses(self) -> bool:
        """False: the two slots have no weights to compare."""
        return False

    def init_state(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> SetState:
        """The state of the first pass, which finds the critical instances; see `Pooling.init_state`."""
        return self.critical.init_state(batch_size, generator=generator, group=group)

    def next_pass(self, state: SetState) -> SetState:
        """The state of the second pass, with the critical instances as queries."""
        self.check_state(state)
        if not isinstance(state, SelectedState):
            raise ValueError("the state is that of the second pass already; there is no third one")
        instance = state.total[:, 0, 0]
        with full_precision(instance.device):
            weight, bias = (t.to(self._dtype) for t in self.query.parameters())
            asks = (instance @ weight.T + bias) @ weight  # <q(x), q(x_m)>, but for what all instances share
        shape = (state.batch_size, 1, 1)
        zero = instance.detach().new_zeros(shape)
        # The query, the score and the features of the critical instance, and whether there is one.
        score = torch.where(state.peak[:, 0] == -torch.inf, 0, state.peak[:, 0])
        slots = torch.cat((asks, score, instance, state.mass[:, 0]), 1)
        slots = checks.finite(slots) if checks.may_look(slots) else slots
        return SetState(
            instance.detach().new_zeros(*shape, self.value_dim), zero, zero - torch.inf, 0 * state.count, slots
        )

    def check_state(self, state: Any) -> None:
        """`Pooling.check_state`, of either pass."""
        if type(state) is not SetState:
            self.critical.check_state(state)
        elif state.slots.shape[1:] != (2 * self.in_dim + 2,) or state.total.dtype != self._dtype:
            raise ValueError(
                f"the state must be one that this DSMILPooling made, of {self.in_dim} features in {self._dtype}; got "
                f"one of {tuple(state.total.shape)} in {state.total.dtype} with slots {tuple(state.slots.shape)}"
            )

    def attention(
        self, state: SetState, features: Tensor, mask: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """`Pooling.attention` in the bag, of a state of the second pass."""
        if isinstance(state, SelectedState):
            raise ValueError(_TWICE)
        return super().attention(state, features, mask, weights)

    def slots_of_sets(self, state: SetState) -> bool:
        """In the second pass."""
        return not isinstance(state, SelectedState)

    def absorb(
        self, state: SetState, features: Tensor, mask: Tensor | None, weights: Tensor | None, **options: Any
    ) -> SetState:
        """`Pooling.absorb` of whichever pass the state is in."""
        if isinstance(state, SelectedState):
            return self.critical.absorb(state, features, mask, weights, **options)
        return super().absorb(state, features, mask, weights, **options)

    def ragged_contribution(
        self, state: SetState, features: Tensor, ragged: Ragged, weights: Tensor | None, peak: Tensor | None = None
    ) -> SetState:
        """`Pooling.ragged_contribution` of whichever pass the state is in."""
        if isinstance(state, SelectedState):
            return self.critical.ragged_contribution(state, features, ragged, weights, peak)
        return super().ragged_contribution(state, features, ragged, weights, peak)

    def _scores(self, features: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        features = features.to(slots.dtype)
        with full_precision(features.device):
            logits = (features @ slots[:, : self.in_dim, None]).mT * self.out_dim**-0.5
        return logits[:, None], features[:, None]

    def readout(self, state: SetState) -> Tensor:
        """``(B, 2, dim)``: the bag, and the critical instance with its score as feature 0.

        Raises:
            ValueError: a state of the first pass.
        """
        self.check_state(state)
        if isinstance(state, SelectedState):
            raise ValueError(_TWICE)
        _, score, instance, there = state.slots.split([self.in_dim, 1, self.in_dim, 1], 1)
        means = state.mean()[:, 0, 0].to(self.like.dtype)
        bag = torch.where(state.mass[:, 0] != 0, self.value(means), 0)
        value = torch.where(there > 0, self.critical.value(instance.to(means.dtype)), 0)
        worst = torch.cat((score.to(means.dtype), value), 1)
        return checks.finite(torch.stack((bag, worst), 1))
