"""Encode a set chunk by chunk: the one driver of every gradient mode.

The state of a set is a sum over its elements, ``Z = sum_i s(x_i; theta)``, and the loss sees the elements through it
alone. With ``G = dL/dZ``, known once the state is complete, ``dL/dtheta = sum_chunks J_chunk' G``:

* ``exact`` streams the set twice: for the state without gradients, then for ``J_chunk' G`` of one chunk after the other
  (gradient caching, Gao et al. 2021, arXiv 2101.06983, through a state that does not grow with the set);
* ``sampled`` takes the second pass over some uniformly drawn chunks and scales their ``G`` by how many there are for
  each drawn (UMBC, Willette et al. 2023, arXiv 2208.12401). Scaling ``G`` rather than parameter gradients leaves
  whatever does not pass through the elements (the residual of the slots, the decoder) exact, so that all is unbiased.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from setenc import checks
from setenc.chunks import Chunk, Source, source_of
from setenc.encoder import UMBC
from setenc.ragged import Ragged
from setenc.state import SetState


def encode(
    enc: nn.Module,
    x_or_chunks: Any,
    *,
    chunk_size: int | None = None,
    gradient: str = "full",
    num_gradient_chunks: int = 1,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    generator: torch.Generator | None = None,
    group: dist.ProcessGroup | None = None,
) -> Any:
    """The decoder's output for sets of any size, streamed chunk by chunk, with the gradients of the full sets.

    The value is that of ``enc(x)`` in every mode, and with one seed every mode draws the same slots and dropout masks.

    | gradient | ``backward`` gives | memory | evaluations of an element |
    |---|---|---|---|
    | ``full`` | ordinary backprop | grows with the set | 1 forward, 1 backward |
    | ``exact`` | the same | one chunk | 2 forward, 1 backward |
    | ``sampled`` | an unbiased estimate | the drawn chunks | 1 forward, and the drawn chunks once more |
    | ``none`` | nothing | one chunk | 1 forward |

    Sampling draws the same chunks for all sets of a batch; of padded and ragged sets each set draws among its own
    chunks, and is scaled by its own number of them.

    Gradients are those of first order. The extractor must be the same function in both passes: no BatchNorm in
    training, no parameters changed in between (an error), none held outside ``enc.extractor``.

    Args:
        enc: a `UMBC`, or a module that wraps its forward (DistributedDataParallel).
        x_or_chunks: ``(B, N, …)``, a ragged batch (see `Ragged`), or a callable that returns a fresh iterator over the
            same chunks each time it is called: tensors or arrays ``(B, n, …)``, or tuples ``(chunk, mask)`` or
            ``(chunk, mask, weights)``, on any device. A set need never be in memory at once; ``sampled`` and ``none``
            iterate once.
        chunk_size: elements of a set in a chunk; None is the whole set, or the chunks as they come.
        gradient: see the table.
        num_gradient_chunks: chunks that ``sampled`` draws.
        mask: ``(B, N)`` bool, True = a real element.
        weights: ``(B, N)`` multiplicities >= 0 (``(T,)`` with a ragged batch), constants in backward.
        generator: of everything random here: slots, dropout in the extractor, drawn chunks; None is torch's default.
        group: process group over whose ranks the elements of the sets are spread, a part on each. Every rank gets the
            output for the whole sets; averaged over the ranks, as DistributedDataParallel does, the gradients of
            parameters are those of the average loss.

    Raises:
        TypeError: what ``x_or_chunks`` cannot be.
        ValueError: wrong settings or shapes; an iterator that differs between the passes.

    >>> enc = setenc.UMBC(None, setenc.SlotPooling(2, 16, 4), setenc.MLPDecoder(16, 1))
    >>> x = torch.randn(3, 1000, 2)
    >>> setenc.encode(enc, x, chunk_size=100, gradient="exact").square().mean().backward()
    >>> setenc.encode(enc, lambda: iter(x.split(100, 1)), gradient="sampled").shape
    torch.Size([3, 4, 1])
    """
    checks.choice(gradient, "gradient", tuple(_MODES))
    checks.count(num_gradient_chunks, "num_gradient_chunks")
    if chunk_size is not None:
        checks.count(chunk_size, "chunk_size")
    if not isinstance(enc, nn.Module):
        raise TypeError(f"enc must be a setenc.UMBC, or a module that wraps one; got {type(enc).__name__}")
    checks.constant(weights, "weights")
    draws = num_gradient_chunks if gradient == "sampled" else None
    run = partial(_state, (x_or_chunks, mask, weights), chunk_size, gradient, draws, generator, group)
    with torch.set_grad_enabled(torch.is_grad_enabled() and gradient != "none"):
        return enc(x_or_chunks, state=run)


def _state(
    data: tuple[Any, Tensor | None, Tensor | None],
    chunk_size: int | None,
    gradient: str,
    draws: int | None,
    generator: torch.Generator | None,
    group: dist.ProcessGroup | None,
    enc: UMBC,
) -> SetState:
    """The state of the whole sets, with the graph that the gradient mode asks for."""
    where = "cpu" if generator is None else generator.device
    seed = int(torch.randint(2**48, (), generator=generator, device=where))
    source = source_of(*data, chunk_size, draws, seed)
    chunks = iter(source)
    first = next(chunks, None)
    if first is None:
        raise ValueError("the chunks must be at least one; the iterator ended at once. Return a fresh one each time")
    start = enc.init_state(len(first.x), generator=generator, group=group)
    run = _Run(enc, source, start, seed if group is None else seed + dist.get_rank(group) * 2**48)
    state = _MODES[gradient](run, chain((first,), chunks), draws)
    return state if group is None else state.all_reduce(group)


class _Run:
    """One encoding: what its passes share."""

    def __init__(self, enc: UMBC, source: Source, start: SetState, seed: int) -> None:
        self.enc, self.source, self.start, self.seed = enc, source, start, seed
        self.device = start.total.device
        kind = self.device.type
        self.autocast = partial(
            torch.autocast, kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False
        )

    def contribution(self, t: int, chunk: Chunk, slots: Tensor, peak: Tensor | None = None) -> SetState:
        """Of chunk ``t``, with random numbers that depend on ``t`` alone."""
        start = replace(self.start, slots=slots)
        to = partial(_to, device=self.device)
        checks.batch(chunk.x, start.batch_size)
        with _seeded(self.seed + t, self.device):
            return self.enc.contribution(start, to(chunk.x), to(chunk.mask), to(chunk.weights), peak)

    def stream(self, chunks: Iterable[Chunk]) -> Iterator[tuple[int, Chunk, SetState]]:
        """Each chunk with its contribution."""
        for t, chunk in enumerate(chunks):
            yield t, chunk, self.contribution(t, chunk, self.start.slots)


def _full(run: _Run, chunks: Iterable[Chunk], _: Any) -> SetState:
    source = run.source.x
    if source is not None and source.requires_grad:
        chunks = (chunk._replace(x=_attached(chunk, source)) for chunk in chunks)
    state = run.start
    for _, _, part in run.stream(chunks):
        state = state.merge(part)
    return state


def _attached(chunk: Chunk, source: Tensor) -> Any:
    x = source[chunk.index]
    return Ragged(x, chunk.x.offsets) if isinstance(chunk.x, Ragged) else x


def _two_passes(run: _Run, chunks: Iterable[Chunk], draws: int | None) -> SetState:
    kept: list[tuple[int, Chunk]] = []
    state = run.start.detach()
    winner = torch.full(state.peak.shape, -1, device=run.device) if state.is_maximum else None
    random = torch.Generator().manual_seed(run.seed)
    count = 0
    with torch.no_grad(), run.autocast():
        for t, chunk, part in run.stream(chunks):
            if winner is not None:
                winner = torch.where(part.peak > state.peak, t, winner)
            state = state.merge(part)
            count = t + 1
            if draws is not None:
                # Reservoir sampling: after chunk t, each of the t + 1 chunks is kept with the same probability.
                drawn_per_set = run.source.chunks_of_set is not None
                place = t if t < draws or drawn_per_set else int(torch.randint(t + 1, (), generator=random))
                if place < draws:
                    kept[place : place + 1] = [(t, chunk)]
    second = _SecondPass(run, state.peak, winner, count)
    if draws is not None:
        second.kept = kept
        parts = run.source.chunks_of_set
        parts = torch.full((state.batch_size,), count, device=run.device) if parts is None else parts.to(run.device)
        second.scale = (parts / parts.clamp(1, draws)).to(state.total.dtype)[:, None, None]
    total, mass, peak = _Streamed.apply(second, state.total, state.mass, state.peak, *second.leaves)
    return SetState(total, mass, peak if state.is_maximum else peak.detach(), state.count, run.start.slots)


_MODES: dict[str, Callable[[_Run, Iterable[Chunk], int | None], SetState]] = {
    "full": _full,
    "exact": _two_passes,
    "sampled": _two_passes,
    "none": _full,
}


class _SecondPass:
    """Gradients of the state with respect to the elements' side, one chunk in memory at a time."""

    def __init__(self, run: _Run, peak: Tensor, winner: Tensor | None, count: int) -> None:
        self.run, self.peak, self.winner, self.count = run, peak, winner, count
        self.kept: list[tuple[int, Chunk]] | None = None
        self.scale: Tensor | None = None
        modules = (run.enc.extractor, run.enc.pooling)
        parameters = {id(p): p for module in modules for p in module.parameters()}
        self.leaves = [run.start.slots, run.source.x, *parameters.values()]

    def __call__(self, gradients: tuple[Tensor, ...]) -> list[Tensor | None]:
        """Gradients of `leaves`, given those of the state's total, mass and peak."""
        sums = {
            place: torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32))
            for place, leaf in enumerate(self.leaves)
            if leaf is not None and leaf.requires_grad
        }
        if self.scale is not None:
            gradients = tuple(g * self.scale.reshape(-1, *[1] * (g.ndim - 1)) for g in gradients)
        for t, chunk in self._chunks():
            for place, part in self._pull(t, chunk, gradients):
                if place == 1:
                    sums[place][chunk.index] = part.to(sums[place].dtype)
                else:
                    sums[place] += part
        return [
            sums[place].to(leaf.dtype) if leaf is not None and place in sums else None
            for place, leaf in enumerate(self.leaves)
        ]

    def _chunks(self) -> Iterator[tuple[int, Chunk]]:
        if self.kept is not None:
            yield from self.kept
            return
        seen = 0
        for t, chunk in enumerate(self.run.source):
            seen = t + 1
            if seen > self.count:
                break
            yield t, chunk
        checks.same_chunks(self.count, seen)

    def _pull(self, t: int, chunk: Chunk, gradients: tuple[Tensor, ...]) -> Iterator[tuple[int, Tensor]]:
        """The share of chunk ``t``: the place among `leaves`, and the gradient."""
        run, slots, x = self.run, *self.leaves[:2]
        with torch.enable_grad(), run.autocast():
            slots = slots.detach().requires_grad_(slots.requires_grad)  # type: ignore[union-attr]
            if x is not None and x.requires_grad:
                x = (chunk.x.values if isinstance(chunk.x, Ragged) else chunk.x).requires_grad_()
            part = run.contribution(t, chunk, slots, None if self.winner is not None else self.peak)
        total, mass, peak = gradients
        if self.winner is not None:
            peak = peak * (self.winner == t)
        pairs = ((part.total, total), (part.mass, mass), (part.peak, peak))
        outputs = [(output, gradient) for output, gradient in pairs if output.requires_grad]
        inputs = [(i, v) for i, v in enumerate((slots, x, *self.leaves[2:])) if v is not None and v.requires_grad]
        if outputs:
            found = torch.autograd.grad(
                [output for output, _ in outputs],
                [value for _, value in inputs],
                [gradient for _, gradient in outputs],
                allow_unused=True,
            )
            yield from ((i, gradient) for (i, _), gradient in zip(inputs, found, strict=True) if gradient is not None)


class _Streamed(torch.autograd.Function):
    """The state as it is, and a second pass over the elements in backward."""

    @staticmethod
    def forward(ctx: Any, second: _SecondPass, total: Tensor, mass: Tensor, peak: Tensor, *leaves: Tensor) -> Any:
        ctx.second = second
        ctx.save_for_backward(*(leaf for leaf in leaves if leaf is not None and leaf.requires_grad))
        return total.clone(), mass.clone(), peak.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        _ = ctx.saved_tensors  # raises if a parameter was changed in place since the forward
        return (None, None, None, None, *ctx.second(gradients))


def _to(x: Any, device: torch.device) -> Any:
    if isinstance(x, Ragged):
        return x if x.values.device == device else Ragged(x.values.to(device), x.offsets.to(device))
    return None if x is None else x.to(device, non_blocking=True)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Default generators that start from ``seed``, and afterwards are where they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
