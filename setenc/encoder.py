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
from setenc.ragged import Ragged, is_ragged
from setenc.state import SetState


class UMBC(nn.Module):
    """A set encoder whose result does not depend on how the set is cut into chunks, nor on the order.

    Means of elements do not tell how many there are. Where that matters give ``size_feature=True``: a learned vector
    times ``log(1 + N)``, N the number of elements (or the sum of their weights), is added to every slot.

    Args:
        extractor: maps elements ``(B, n, …)`` to features ``(B, n, in_dim)``, each by itself; None is the identity.
        pooling: a `Pooling` over these features.
        decoder: any module on slots ``(B, K, dim)``; None is the identity.
        size_feature: tell the decoder the size of the set.

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
    ) -> None:
        super().__init__()
        if not isinstance(pooling, Pooling):
            raise TypeError(f"pooling must be a setenc Pooling; got {type(pooling).__name__}")
        self.extractor = checks.module(extractor, "extractor")
        self.pooling = pooling
        self.decoder = checks.module(decoder, "decoder")
        self.size_vector = nn.Parameter(torch.randn(pooling.out_dim) / 10) if size_feature else None

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
            return self.readout(self.update(self.init_state(len(x)), x, mask, weights))
        x, mask, weights = checks.elements(x, mask, weights)
        pooled = self.pooling(self._features(x, mask), mask, weights)
        return self._decode(pooled, set_sizes(x, mask, weights))

    def init_state(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> SetState:
        """The state of new streams; random slots are sampled here. See `Pooling.init_state`."""
        return self.pooling.init_state(batch_size, generator=generator, group=group)

    def update(
        self, state: SetState, chunk: Any, mask: Tensor | None = None, weights: Tensor | None = None
    ) -> SetState:
        """The state after a chunk ``(B, n, …)`` of the streams too: any chunks, of any size, in any order.

        A ragged chunk (see `Ragged`) holds any number of elements of each of the ``B`` streams. Arguments as in
        `forward`; the given state stays as it is.
        """
        if is_ragged(chunk):
            chunk = Ragged.of(chunk)
            checks.batch(chunk, state.batch_size)
            return state.merge(self.contribution(state, chunk, mask, weights))
        checks.batch(chunk, state.batch_size)
        return self._absorb(state, chunk, mask, weights)

    def contribution(
        self,
        state: SetState,
        chunk: Tensor | Ragged,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        peak: Tensor | None = None,
    ) -> SetState:
        """The state of a chunk alone; see `Pooling.contribution`."""
        if isinstance(chunk, Ragged):
            checks.no_mask(mask)
            if len(chunk.values) == 0:
                return state.empty()
            features = self._features(chunk.values[None], None)[0]
            return self.pooling.ragged_contribution(state, features, chunk, weights, peak)
        return self._absorb(state, chunk, mask, weights, peak=peak, alone=True)

    def _absorb(
        self, state: SetState, chunk: Tensor, mask: Tensor | None, weights: Tensor | None, **options: Any
    ) -> SetState:
        chunk, mask, weights = checks.elements(chunk, mask, weights)
        if chunk.shape[1] == 0:
            return state.empty() if options else state
        return self.pooling.absorb(state, self._features(chunk, mask), mask, weights, **options)

    def readout(self, state: SetState) -> Any:
        """The decoder's output for what the state has seen so far, at any time; the state stays as it is."""
        return self._decode(self.pooling.readout(state), state.count)

    def attention(
        self, state: SetState, chunk: Tensor, mask: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """Shares ``(B, H, K, n)`` of elements that the state has seen; see `Pooling.attention`."""
        chunk, mask, weights = checks.elements(chunk, mask, weights)
        return self.pooling.attention(state, self._features(chunk, mask), mask, weights)

    def _features(self, x: Tensor, mask: Tensor | None) -> Tensor:
        checks.no_batch_norm(self.extractor)
        if mask is not None:
            x = x.masked_fill(~mask.reshape(*mask.shape, *[1] * (x.ndim - 2)), 0)
        if x.dtype != self.pooling._like.dtype:
            parameter = next(self.extractor.parameters(), None)
            x = x if parameter is None else checks.precision(x, parameter.dtype, "x")
        return checks.features(self.extractor(x), self.pooling.in_dim, x.shape[:2])

    def _decode(self, pooled: Tensor, size: Tensor) -> Any:
        if self.size_vector is not None:
            pooled = pooled + size.log1p().to(pooled.dtype)[:, None, None] * self.size_vector
        return self.decoder(pooled)
