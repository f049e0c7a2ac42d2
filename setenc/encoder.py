"""UMBC: an element-wise extractor, a pooling that streams, and any decoder (Willette et al. 2023, arXiv 2208.12401).

``f(X) = decoder(readout(sum over elements))``: since the decoder sees the finished slots only, any network there keeps
the whole mini-batch consistent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from setenc import checks
from setenc.pooling import Pooling
from setenc.pooling.base import set_sizes
from setenc.probe import probe
from setenc.ragged import Ragged, is_ragged
from setenc.state import SetState


class UMBC(nn.Module):
    """A set encoder whose result does not depend on how the set is cut into chunks, nor on the order.

    Means of elements do not tell how many there are. Where that matters give ``size_feature=True``: a learned vector
    times ``log(1 + N)``, N the number of elements (or the sum of their weights), is added to every slot. Nor do they
    tell how many elements a slot attends to. Where proportions matter (clusters, shares of a population, how sure a
    slot can be) give ``mass_feature=True``: the logarithms of the mean weight that the slot gave in each head, mapped
    linearly, are added to the slot.

    The extractor must treat every element alone. The first chunk is used to test that (see ``probe``). BatchNorm
    is allowed where it uses its running statistics: call ``.eval()`` on it after the model's ``.train()``.

    Args:
        extractor: maps elements ``(B, n, …)`` to features ``(B, n, in_dim)``, each independently; None is the identity.
            `PerElement` makes one from a module for batches ``(N, …)``, such as an image network.
        pooling: a `Pooling` over these features.
        decoder: any module on slots ``(B, K, dim)``; None is the identity.
        size_feature: tell the decoder the size of the set.
        mass_feature: tell the decoder the share of the set that each slot attends to; not for poolings that select.
        probe: test once in training and once in eval mode, on the first elements seen, that the extractor does not
            mix elements (a GPU is waited for); False trusts it.

    >>> enc = UMBC(torch.nn.Linear(2, 16), setenc.SlotPooling(16, 32, 4), setenc.MLPDecoder(32, 5)).eval()
    >>> x = torch.randn(3, 100, 2)
    >>> state = enc.init_state(3)
    >>> for chunk in x.split(7, dim=1):
    ...     state = enc.update(state, chunk)
    >>> torch.allclose(enc.readout(state), enc(x), atol=1e-5)
    True
    """

    def __init__(
        self,
        extractor: nn.Module | None,
        pooling: Pooling,
        decoder: nn.Module | None,
        *,
        size_feature: bool = False,
        mass_feature: bool = False,
        probe: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(pooling, Pooling):
            raise TypeError(f"pooling must be a setenc Pooling; got {type(pooling).__name__}")
        self.extractor = checks.module(extractor, "extractor")
        self.pooling = pooling
        self.decoder = checks.module(decoder, "decoder")
        size_feature, mass_feature = (
            checks.flag(size_feature, "size_feature"),
            checks.flag(mass_feature, "mass_feature"),
        )
        self.size_vector = nn.Parameter(torch.randn(pooling.out_dim) / 10) if size_feature else None
        if mass_feature and not pooling.has_masses:
            raise ValueError(f"mass_feature needs slots that weigh elements; {type(pooling).__name__} has none")
        self.mass_map = nn.Linear(pooling.num_heads, pooling.out_dim) if mass_feature else None
        if self.mass_map is not None:
            # Small, beside slots of size 1: log masses are of size 1 too, and at first say less than the slots do.
            nn.init.normal_(self.mass_map.weight, std=0.1)
            nn.init.zeros_(self.mass_map.bias)
        # Modes, training or not, in which the extractor has still to be tested.
        self._to_probe = {True, False} if checks.flag(probe, "probe") and extractor is not None else set()

    def forward(
        self, x: Any, mask: Tensor | None = None, weights: Tensor | None = None, *,
        state: Callable[[UMBC], SetState] | None = None,
    ) -> Any:  # fmt: skip
        """The decoder's output for whole sets.

        Args:
            x: ``(B, N, …)`` elements, or sets of different sizes as for `Ragged`.
            mask: ``(B, N)`` bool, True = a real element; what stands in padding, NaN included, has no effect.
            weights: ``(B, N)`` multiplicities >= 0 (``(T,)`` with a ragged batch).
            state: how to come to the state instead; `setenc.encode` drives the encoder by it, and so passes through
                whatever wraps this forward (DistributedDataParallel).

        Raises:
            ValueError: wrong shapes, negative weights, non-finite elements, BatchNorm in training.
        """
        if state is not None:
            return self.readout(state(self))
        if is_ragged(x):
            x = Ragged.of(x)
            parts = self.featurise(x, mask, weights)
            whole = self._passes(len(x), lambda start: start.merge(self.pool(start, *parts)))
            return self.readout(self.reached(whole))
        x, mask, weights = checks.elements(x, mask, weights)
        if x.shape[1] == 0:
            return self.readout(self.reached(self._passes(x.shape[0], lambda start: start)))
        features = self._features(x, mask)
        if self.mass_map is not None:
            return self.readout(self.pooling.state_of(features, mask, weights))
        return self._decode(self.pooling(features, mask, weights), set_sizes(x, mask, weights))

    def _passes(self, batch_size: int, absorb: Callable[[SetState], SetState]) -> SetState:
        """The state after every pass that the pooling makes over its elements."""
        state = absorb(self.init_state(batch_size))
        for _ in range(self.pooling.num_passes - 1):
            state = absorb(self.next_pass(state))
        return state

    def next_pass(self, state: SetState) -> SetState:
        """The state with which a pooling of several passes sees the same elements again; see `DSMILPooling`."""
        return self.pooling.next_pass(state)

    def init_state(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> SetState:
        """The state of new streams. It samples random slots. See `Pooling.init_state`."""
        return self.pooling.init_state(batch_size, generator=generator, group=group)

    def update(
        self, state: SetState, chunk: Any, mask: Tensor | None = None, weights: Tensor | None = None
    ) -> SetState:
        """The state after a chunk ``(B, n, …)`` of the streams too: any chunks, of any size, in any order.

        A ragged chunk (see `Ragged`) holds any number of elements of each of the ``B`` streams. Arguments as in
        `forward`, arrays included; the given state stays as it is.
        """
        self.pooling.check_state(state)
        if is_ragged(chunk):
            chunk = Ragged.of(chunk)
            checks.batch(chunk, state.batch_size)
            return state.merge(self.contribution(state, chunk, mask, weights))
        checks.batch(chunk, state.batch_size)
        _, features, mask, weights = self.featurise(chunk, mask, weights)
        return state if features is None else self.pooling.absorb(state, features, mask, weights)

    def contribution(
        self,
        state: SetState,
        chunk: Tensor | Ragged,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        peak: Tensor | None = None,
    ) -> SetState:
        """The state of a chunk alone; see `Pooling.contribution`."""
        return self.pool(state, *self.featurise(chunk, mask, weights), peak)

    def featurise(
        self, chunk: Tensor | Ragged, mask: Tensor | None = None, weights: Tensor | None = None
    ) -> tuple[Tensor | Ragged, Tensor | None, Tensor | None, Tensor | None]:
        """The first half of `contribution`: the chunk, its features (None without elements), mask and weights."""
        if isinstance(chunk, Ragged):
            checks.no_mask(mask)
            if len(chunk.values) == 0:
                return chunk, None, None, None
            if weights is not None:
                weights = checks.packed_weights(weights, chunk.values)
                mask = (weights != 0)[None]
            return chunk, self._features(chunk.values[None], mask)[0], None, weights
        chunk, mask, weights = checks.elements(chunk, mask, weights)
        return chunk, self._features(chunk, mask) if chunk.shape[1] else None, mask, weights

    def pool(
        self,
        state: SetState,
        chunk: Tensor | Ragged,
        features: Tensor | None,
        mask: Tensor | None,
        weights: Tensor | None,
        peak: Any = None,
    ) -> SetState:
        """The second half of `contribution`: the state of these features alone."""
        if features is None:
            return state.empty()
        if isinstance(chunk, Ragged):
            return self.pooling.ragged_contribution(state, features, chunk, weights, peak)
        return self.pooling.absorb(state, features, mask, weights, peak=peak, alone=True)

    def reached(self, state: SetState) -> SetState:
        """The same state, in the graph of the extractor's and the pooling's parameters even if it saw no element.

        DistributedDataParallel waits for a gradient of every parameter on every rank, be it 0.
        """
        part = state.parts[0]
        if not torch.is_grad_enabled() or any(p.total.requires_grad or p.peak.requires_grad for p in state.parts):
            return state
        name = "peak" if part.selects else "total"
        value = getattr(part, name)
        for module in (self.extractor, self.pooling):
            for parameter in module.parameters():
                if parameter.requires_grad:
                    value = value + parameter.flatten()[:0].abs().sum().to(value)  # 0, of which the gradient is 0
        return state.with_parts((part.replace(**{name: value}), *state.parts[1:]))

    def readout(self, state: SetState) -> Any:
        """The decoder's output for what the state has seen so far, at any time; the state stays as it is."""
        pooled = self.pooling.readout(state)
        if self.mass_map is not None:
            pooled = pooled + self.mass_map(state.log_mean_weight().mT.to(pooled.dtype))
        return self._decode(pooled, state.count)

    def attention(
        self, state: SetState, chunk: Tensor, mask: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """Shares ``(B, H, K, n)`` of elements that the state has seen; see `Pooling.attention`.

        Each head and slot gives the elements of a set shares that sum to 1, so ``.mean((1, 2))``, ``(B, n)``, is how
        much each counts on the whole.
        """
        chunk, mask, weights = checks.elements(chunk, mask, weights)
        return self.pooling.attention(state, self._features(chunk, mask), mask, weights)

    def _features(self, x: Tensor, mask: Tensor | None) -> Tensor:
        extractor, pooling = self.extractor, self.pooling
        checks.no_batch_norm(extractor)
        if mask is not None:
            x = _filled(x, mask)
        if x.dtype != pooling.like.dtype:
            parameter = next(extractor.parameters(), None)
            x = x if parameter is None else checks.precision(x, parameter.dtype, "x")
        try:
            mode = extractor.training
            if mode in self._to_probe and not torch.compiler.is_compiling() and probe(extractor, x):
                self._to_probe.discard(mode)
            features = extractor(x)
        except Exception as error:
            error.add_note(
                f"setenc: the extractor was given a chunk of sets (B, n, …) = {tuple(x.shape)}. A module that takes a "
                "batch (N, …) of single elements, such as an image network, goes into setenc.PerElement."
            )
            raise
        return checks.features(features, pooling.in_dim, x.shape[:2])

    def _decode(self, pooled: Tensor, size: Tensor) -> Any:
        if self.size_vector is not None:
            pooled = pooled + size.log1p().to(pooled.dtype)[:, None, None] * self.size_vector
        return self.decoder(pooled)


def _filled(x: Tensor, mask: Tensor) -> Tensor:
    """Padding replaced by a real element, of which an extractor has finite features and derivatives."""
    elements, real = x.detach().flatten(0, 1), mask.flatten()
    if real.shape[0] == 0:
        return x
    first = elements.index_select(0, real.int().argmax(keepdim=True))[0]
    fill = torch.where(real.any(), first, torch.zeros_like(first))
    return torch.where(mask.reshape(*mask.shape, *[1] * (x.ndim - 2)), x, fill)
