"""Slot pooling of UMBC (Willette et al. 2023, arXiv 2208.12401): attention of slots over the elements of a set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from setenc import checks
from setenc.pooling.base import Parts, Pooling, full_precision, log_of_weights, normalised
from setenc.pooling.init import farthest, sample
from setenc.state import SetState

# Log-weights of elements from logits (…, K, n); each depends on one element and all slots, never on other elements.
ACTIVATIONS = {
    "sigmoid": F.logsigmoid,
    "softmax": lambda logits: logits,
    "slot-sigmoid": lambda logits: F.logsigmoid(logits) - F.logsigmoid(logits).logsumexp(-2, keepdim=True),
    "slot-softmax": lambda logits: logits.log_softmax(-2),
    "slot-exp": lambda logits: logits - logits.amax(-2, keepdim=True),
}

# Elements meet the slots before the linear maps to keys and values (q'(W f) = (W'q)'f, sum a W f = W sum a f) unless
# that takes more than this many times the multiplications: they are fewer matrix products, and larger ones.
_FOLD = 1.0

# Elements whose weights are in memory at a time where attention is not fused.
_BLOCK = 4096

# Multiplications up to which numba's one call takes less time than torch's several, on one thread. More threads gain
# little with so few, and torch's products wait for each of them, long where other programs run.
_FEW = 2**22


class SlotPooling(Pooling):
    """Weighted means of the elements' values, one for each of ``K`` slots: the pooling of UMBC.

    The weight of element ``i`` in slot ``k`` is a function of the logits ``W_ki = <q(s_k), k(x_i)> / sqrt(dim / H)``
    and is normalised by its sum over the set:

    | activation | weight before normalising |
    |---|---|
    | ``sigmoid`` | ``sigmoid(W_ki)`` |
    | ``softmax`` | ``exp(W_ki)`` |
    | ``slot-sigmoid`` | ``sigmoid(W_ki) / sum_k' sigmoid(W_k'i)`` |
    | ``slot-softmax`` | ``exp(W_ki) / sum_k' exp(W_k'i)`` |
    | ``slot-exp`` | ``exp(W_ki - max_k' W_k'i)`` |

    All run in the log domain with a running maximum: exact at any logits, no clamp. A mean is blind to the size of a
    set (``f(X) = f(X ∪ X)``); where it matters, see ``size_feature`` of `UMBC`. An empty set has the mean 0, so that
    the result is ``norm(q(s_k))`` with the residual, and ``norm(0)`` without.

    Args:
        in_dim: features of an element.
        dim: features of a slot, over all heads.
        num_slots: slots ``K``.
        num_heads: heads ``H``.
        activation: see the table.
        slots: ``"random"``: ``s = mu + softplus(rho) * N(0, 1)``, sampled once per stream in training and ``mu`` in
            eval mode; ``"learned"``: a parameter.
        residual: add the projected slots ``q(s_k)`` to the means.
        slot_dim: features of a slot before ``q``; None is ``dim``.
        slot_norm: layer-normalise the slots before ``q``.
        output_norm: layer-normalise the result.

    >>> pooling = SlotPooling(3, 32, 4, activation="slot-sigmoid")
    >>> pooling(torch.randn(2, 100, 3)).shape
    torch.Size([2, 4, 32])
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        num_slots: int,
        *,
        num_heads: int = 4,
        activation: str = "softmax",
        slots: str = "random",
        residual: bool = True,
        slot_dim: int | None = None,
        slot_norm: bool = False,
        output_norm: bool = True,
    ) -> None:
        dim, num_heads = checks.heads(dim, num_heads)
        in_dim, num_slots = checks.count(in_dim, "in_dim"), checks.count(num_slots, "num_slots")
        self.head_dim = dim // num_heads
        self.folded = num_heads * num_slots * in_dim <= _FOLD * dim * (in_dim + num_slots)
        value_dim = in_dim if self.folded else self.head_dim
        super().__init__(in_dim, dim, num_slots=num_slots, num_heads=num_heads, value_dim=value_dim)
        self.activation = checks.choice(activation, "activation", tuple(ACTIVATIONS))
        self.random_slots = checks.choice(slots, "slots", ("random", "learned")) == "random"
        self.residual = checks.flag(residual, "residual")
        size = (num_slots, dim if slot_dim is None else checks.count(slot_dim, "slot_dim"))
        if self.random_slots:
            self.slot_mean = nn.Parameter(torch.empty(size).uniform_(-0.2, 0.2))
            self.slot_raw_std = nn.Parameter(torch.empty(size).uniform_(-5, -4))
        else:
            self.slot_mean = nn.Parameter(nn.init.xavier_uniform_(torch.empty(size)))
        self.slot_norm = nn.LayerNorm(size[1]) if checks.flag(slot_norm, "slot_norm") else nn.Identity()
        self.query = nn.Linear(size[1], dim)
        self.key_value = nn.Linear(in_dim, 2 * dim)
        self.output_norm = nn.LayerNorm(dim) if checks.flag(output_norm, "output_norm") else nn.Identity()

    @property
    def like(self) -> Tensor:
        """A parameter, found without a search: every chunk needs it, several times."""
        weight: Any = self._modules["key_value"].weight  # type: ignore[union-attr]
        return weight

    def _slots(self, generator: torch.Generator | None, group: dist.ProcessGroup | None) -> Tensor:
        slots: Tensor = self.slot_mean
        if self.random_slots and self.training:
            where = slots.device if generator is None else generator.device
            noise = torch.randn(slots.shape, generator=generator, device=where).to(slots)
            if group is not None:
                dist.broadcast(noise, dist.get_global_rank(group, 0), group)
            slots = slots + F.softplus(self.slot_raw_std) * noise
        queries = self.query(self.slot_norm(slots)).to(self._dtype)
        with full_precision(queries.device):
            q = self._heads(queries)
            weight, bias = self._map(0)
            # The biases of the keys shift the logits by the same for every element.
            parts = [q, q @ bias[..., None]]
            if self.folded:
                parts.append(q @ weight)
            return torch.cat(parts, -1).flatten(0, 1)

    def _knows(self, slots: Tensor) -> bool:
        width = self.head_dim + 1 + self.in_dim * self.folded
        return slots.shape == (self.num_heads * self.num_slots, width)

    def queries(self) -> Tensor:
        """The queries ``(H, K, dim / H)`` of the slots, of their means where they are random."""
        return self._heads(self.query(self.slot_norm(self.slot_mean)))

    @torch.no_grad()
    def init_slots(
        self,
        features: Tensor | Iterable[Any],
        sharpness: float = 3.0,
        generator: torch.Generator | None = None,
        *,
        mask: Tensor | None = None,
        columns: slice | Sequence[int] | None = None,
    ) -> None:
        """Place the slots at elements far from each other, once, before training.

        New slots attend to all elements equally, get the same gradients and hardly ever separate: many slots stay one.
        Here slot ``k`` becomes the key of an element, chosen by farthest-point sampling in key space, minus the mean
        key, scaled so that its logits have the standard deviation ``sharpness``; the map from slots to queries becomes
        the identity.

        It helps where keys say where an element is (coordinates in sines and cosines, handed to the pooling beside the
        features: see ``columns``) and where the decoder reads slots one by one (`SlotQuery`, a set transformer on
        slots with ``mass_feature``). It does not where all slots become one vector at once, and where a few rare
        elements count.

        Args:
            features: what the extractor makes of a batch of sets, ``(B, n, in_dim)``, or an iterable of such chunks,
                or of pairs (chunk, mask).
            sharpness: standard deviation of a slot's logits over the elements.
            generator: of the sample of elements; None is torch's default.
            mask: ``(B, n)`` bool, True = a real element.
            columns: features that keys start from, the coordinates; key weights of the others start at 0. None keeps
                the key weights.

        Raises:
            ValueError: fewer different elements than slots, columns that there are not, a ``mask`` beside a stream, a
                pooling with ``slot_norm`` or with another ``slot_dim``.

        >>> pooling = SlotPooling(3, 32, 4)
        >>> pooling.init_slots(torch.randn(2, 100, 3))
        """
        sharpness = checks.positive(sharpness, "sharpness")
        if not isinstance(self.slot_norm, nn.Identity) or self.slot_mean.shape[1] != self.out_dim:
            raise ValueError(
                "init_slots needs a pooling without slot_norm and with slot_dim=None: slots become queries"
            )
        columns = checks.columns(columns, self.in_dim)
        elements = sample(features, self.in_dim, mask, generator).to(self.like)
        # In units of a power of two, which changes no digit, squares of keys of any size are finite.
        unit = 2.0 ** torch.frexp(elements.abs().amax())[1].to(elements.dtype)
        elements = elements / unit
        others = torch.ones(self.in_dim, dtype=torch.bool, device=elements.device)
        others[columns] = False
        self.key_value.weight[: self.out_dim, others] = 0
        keys = F.linear(elements, self.key_value.weight[: self.out_dim])
        keys = keys - keys.mean(0)
        slots = self._heads(keys[farthest(keys, self.num_slots)])
        logits = slots @ self._heads(keys).mT * self.head_dim**-0.5
        spread = logits.std(-1, correction=0, keepdim=True)
        slots = slots * (sharpness / spread.clamp_min(torch.finfo(spread.dtype).tiny))
        self.slot_mean.copy_(slots.transpose(0, 1).flatten(1) / unit)
        self.query.weight.copy_(torch.eye(self.out_dim))
        self.query.bias.zero_()

    def _heads(self, x: Tensor) -> Tensor:
        """``(…, m, dim)`` to ``(…, H, m, dim / H)``."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)

    def _map(self, which: int) -> tuple[Tensor, Tensor]:
        """Weight ``(H, dim / H, in_dim)`` and bias ``(H, dim / H)`` of the keys (0) or values (1)."""
        layer = self.key_value
        weight, bias = (t.view(2, self.num_heads, self.head_dim, -1)[which] for t in (layer.weight, layer.bias))
        return weight.to(self._dtype), bias[..., 0].to(self._dtype)

    def _checked_part(
        self, features: Tensor, slots: Tensor, offset: Tensor | None, peak: Tensor | None, onto: Parts | None
    ) -> Parts:
        if onto is not None and peak is None and self._compiles(features):
            from setenc.kernels import absorb

            weight, query_at = (None, self.head_dim + 1) if self.folded else (self.like, 0)
            parts = absorb(slots, query_at, weight, features, offset, onto, self.head_dim**-0.5)
            if parts is not None:
                return parts
        return super()._checked_part(features, slots, offset, peak, onto)

    def _compiles(self, features: Tensor) -> bool:
        """Whether these are few elements that only numbers are wanted of, by the attention of this very class."""
        each = self.num_heads * self.num_slots * self.value_dim + (0 if self.folded else self.out_dim * self.in_dim)
        return (
            2 * each * features.shape[0] * features.shape[1] <= (_FEW if torch.get_num_threads() == 1 else 0.75 * _FEW)
            and self.activation == "softmax"
            and checks.may_look(features)
            and type(self) is SlotPooling
            and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.jit.is_tracing())
            # Who records operations, or counts them, is told of each.
            and torch._C._len_torch_dispatch_stack() == 0
        )

    def _scores(self, features: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        if self.folded:
            keys = features.to(slots.dtype)
            values = keys[:, None]
            queries = slots[:, self.head_dim + 1 :].expand(features.shape[0], -1, -1)
            shift = slots[:, self.head_dim, None]
        else:
            keys, values = (t.to(slots.dtype) for t in self._project(features))
            keys = keys.flatten(0, 1)
            slots = slots.view(self.num_heads, self.num_slots, -1)
            slots = slots if features.shape[0] == 1 else slots.repeat(features.shape[0], 1, 1)
            queries, shift = slots.split([self.head_dim, 1], -1)
        with full_precision(features.device):
            scale = self.head_dim**-0.5
            # A softmax over the set does not see the shifts, and adding them takes a pass over the logits.
            seen = 0.0 if self.activation == "softmax" else scale
            logits = torch.baddbmm(shift, queries, keys.mT, beta=seen, alpha=scale)
            logits = logits.view(features.shape[0], self.num_heads, self.num_slots, features.shape[1])
            return ACTIVATIONS[self.activation](logits), values

    def _project(self, features: Tensor) -> tuple[Tensor, ...]:
        """Keys and values ``(B, H, n, dim / H)``, without their biases: those are not the elements'."""
        both = F.linear(features, self.key_value.weight)
        return both.view(*both.shape[:2], 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind()

    def readout(self, state: SetState) -> Tensor:
        """Slots ``(B, K, dim)``: means, plus ``q(s_k)`` with the residual, normalised."""
        self.check_state(state)
        means = state.mean()
        weight, bias = self._map(1)
        if self.folded:
            means = means @ weight.mT
        return self._finish(torch.where(state.mass[..., None] == 0, 0, means + bias[:, None]), state.slots)

    def _finish(self, means: Tensor, slots: Tensor) -> Tensor:
        """``(B, H, K, dim / H)`` means and the slots ``(H K, …)`` to the result ``(B, K, dim)``."""
        if self.residual:
            means = means + slots[:, : self.head_dim].view(self.num_heads, self.num_slots, -1)
        return normalised(self.output_norm, means.transpose(1, 2).flatten(2), self.like.dtype)

    def forward(
        self,
        features: Tensor,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Pooled slots ``(B, K, dim)`` of whole sets, without the ``(B, H, K, n)`` weights in memory.

        ``softmax`` is torch's fused attention; for the others see `state_of`.
        """
        features, mask, weights = checks.elements(features, mask, weights, "features")
        if self.activation != "softmax" or features.shape[0] == 0 or features.shape[1] == 0:
            return self.readout(self.state_of(features, mask, weights, generator=generator))
        offset = log_of_weights(mask, weights, self._dtype)
        features = self.prepare(features, mask)
        return self._fused(features, offset, self._slots(generator, None))

    def state_of(
        self,
        features: Tensor,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> SetState:
        """The state of whole sets, which run through in blocks that are computed again in backward."""
        features, mask, weights = checks.elements(features, mask, weights, "features")
        state = whole = self.init_state(features.shape[0], generator=generator)
        # An exported graph takes any number of elements, and so makes no blocks.
        if torch.compiler.is_compiling() or features.shape[1] <= _BLOCK:
            return self.contribution(state, features, mask, weights)
        for start in range(0, features.shape[1], _BLOCK):
            block: list[Any] = [t if t is None else t[:, start : start + _BLOCK] for t in (features, mask, weights)]
            if torch.is_grad_enabled():
                part = checkpoint(self.contribution, state, *block, use_reentrant=False, preserve_rng_state=False)
            else:
                part = self.contribution(state, *block)
            whole = whole.merge(part)
        return whole

    def _fused(self, features: Tensor, offset: Tensor | None, slots: Tensor) -> Tensor:
        keys, values = self._project(features)
        queries = (
            slots[:, : self.head_dim].view(self.num_heads, self.num_slots, -1).expand(features.shape[0], -1, -1, -1)
        )
        bias = self._map(1)[1][:, None]
        if offset is None:
            # A softmax over the set does not see the shifts.
            queries = queries.to(keys.dtype)
            means = _overflowed(F.scaled_dot_product_attention(queries, keys, values), queries, keys[:, :, :1])
            checks.finite_features(features, means)
            return self._finish(means + bias, slots)
        # Half-precision kernels would take the offset in half precision, and make NaN of a set without elements.
        with full_precision(features.device):
            q, k, v = (t.to(offset.dtype) for t in (queries, keys, values))
            empty = (offset == -torch.inf).all(-1, keepdim=True)
            logs = offset.masked_fill(empty, 0).expand(-1, -1, self.num_slots, -1)
            real = offset.argmax(-1, keepdim=True).expand(-1, self.num_heads, -1, self.head_dim)
            means = _overflowed(F.scaled_dot_product_attention(q, k, v, logs), q, k.gather(2, real)) + bias
        checks.finite_features(features, means)
        return self._finish(means.masked_fill(empty, 0), slots)

    def extra_repr(self) -> str:
        """Settings, for printing."""
        return (
            f"{super().extra_repr()}, num_heads={self.num_heads}, activation={self.activation!r}, "
            f"slots={'random' if self.random_slots else 'learned'!r}, residual={self.residual}"
        )


def _overflowed(means: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Means ``(B, H, K, d)`` by a kernel, NaN where the logits of all elements overflow: kernels make 0 of them.

    ``keys`` ``(B, H, 1, d)`` are those of one of the elements.
    """
    if checks.may_look(means) and bool(means.detach().all()):
        return means
    with torch.no_grad():
        lost = (means == 0).all(-1, keepdim=True) & ~(queries @ keys.mT).isfinite()
    return means.masked_fill(lost, torch.nan)
