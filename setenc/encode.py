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

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad

from setenc import checks
from setenc.chunks import Chunk, source_of
from setenc.encoder import UMBC
from setenc.ragged import Ragged
from setenc.random import RANKS
from setenc.ranks import together
from setenc.second_pass import Run, two_passes
from setenc.state import SetState

_MODES = ("full", "exact", "sampled", "none")


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

    The value is that of ``enc(x)`` in every mode, and with one seed every mode draws the same slots and dropout masks
    (``sampled`` other masks of padded and ragged sets, whose chunks it takes in another order).

    | gradient | ``backward`` gives | memory | evaluations of an element |
    |---|---|---|---|
    | ``full`` | ordinary backprop | grows with the set | 1 forward, 1 backward |
    | ``exact`` | the same | one chunk | 2 forward, 1 backward |
    | ``sampled`` | an unbiased estimate | the drawn chunks | 1 forward, and the drawn chunks once more |
    | ``none`` | nothing | one chunk | 1 forward |

    Sampling draws the same chunks for all sets of a batch; of padded and ragged sets each set draws among its own
    chunks, and is scaled by its own number of them.

    Gradients are those of first order. ``exact`` reads the elements again in backward, ``sampled`` the chunks that it
    kept, and both call the extractor again. What must be the same then is compared, and a difference is an error that
    says which: tensors and parameters changed in place, modules switched between training and eval, other data from a
    callable, an extractor that is another function at the second call, tensors that require gradients and are not
    among its parameters. Iterators may fill one buffer again and again.

    Args:
        enc: a `UMBC`, or a module that wraps its forward (DistributedDataParallel).
        x_or_chunks: ``(B, N, …)``, a ragged batch (see `Ragged`), or a callable that returns a fresh iterator over the
            same chunks each time it is called: tensors or arrays ``(B, n, …)``, or tuples ``(chunk, mask)`` or
            ``(chunk, mask, weights)``, on any device. A set need never be in memory at once; ``sampled`` and ``none``
            iterate once, and every mode once more for each further pass of the pooling (`DSMILPooling`).
        chunk_size: elements of a set in a chunk; None is the whole set, or the chunks as they come.
        gradient: see the table.
        num_gradient_chunks: chunks that ``sampled`` draws.
        mask: ``(B, N)`` bool, True = a real element.
        weights: ``(B, N)`` multiplicities >= 0 (``(T,)`` with a ragged batch), constants in backward.
        generator: of all random numbers: slots, dropout in the extractor, drawn chunks; None is torch's default.
        group: process group over whose ranks the elements of the sets are spread, a part on each. Every rank gets the
            output for the whole sets; averaged over the ranks, as DistributedDataParallel does, the gradients of
            parameters are those of the average loss.

    Raises:
        TypeError: what ``x_or_chunks`` cannot be.
        ValueError: wrong settings or shapes; an extractor that mixes elements. In backward: data or an extractor that
            differ between the passes.
        RuntimeError: in backward, tensors or modes that were changed since the forward. With ``group``, an error on
            another rank: what fails on one rank is an error on all.

    >>> enc = setenc.UMBC(None, setenc.SlotPooling(2, 16, 4), setenc.MLPDecoder(16, 1))
    >>> x = torch.randn(3, 1000, 2)
    >>> setenc.encode(enc, x, chunk_size=100, gradient="exact").square().mean().backward()
    >>> setenc.encode(enc, lambda: iter(x.split(100, 1)), gradient="sampled").shape
    torch.Size([3, 4, 1])
    """
    checks.choice(gradient, "gradient", _MODES)
    num_gradient_chunks = checks.count(num_gradient_chunks, "num_gradient_chunks")
    if chunk_size is not None:
        chunk_size = checks.count(chunk_size, "chunk_size")
    if not isinstance(enc, nn.Module):
        raise TypeError(f"enc must be a setenc.UMBC, or a module that wraps one; got {type(enc).__name__}")
    if not isinstance(enc, UMBC) and not any(isinstance(part, UMBC) for part in enc.modules()):
        raise TypeError(
            f"enc must be a setenc.UMBC, or a module that wraps one; got {type(enc).__name__}. A pooling alone becomes "
            "one as setenc.UMBC(None, pooling, None)"
        )
    checks.generator(generator)
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
    """The state of the whole sets, with the graph that the gradient mode needs."""
    device = enc.pooling.like.device
    where = "cpu" if generator is None else generator.device
    seed = int(torch.randint(2**48, (), generator=generator, device=where))
    facts = {"batch size": 0, "training mode": enc.pooling.training, "gradient": _MODES.index(gradient)}
    with together(group, device, facts):
        source = source_of(*data, chunk_size, draws, seed)
        chunks: Iterator[Chunk] = iter(source)
        first = next(chunks, None)
        if first is None:
            raise ValueError(
                "the chunks must be at least one; the iterator ended at once. Return a fresh one each time"
            )
        facts["batch size"] = len(first.x)
    state = enc.init_state(facts["batch size"], generator=generator, group=group)
    own = seed if group is None else seed + dist.get_rank(group) * RANKS
    chunks = chain((first,), chunks)
    counts: list[Tensor] = []
    for index in range(enc.pooling.num_passes):
        if index:
            # Chunks are drawn anew: what one draw estimates goes into what the next one does.
            state = enc.next_pass(state)
            source = source_of(*data, chunk_size, draws, seed + index)
            chunks = iter(source)
        with together(group, device):
            state = _local(Run(enc, source, state, own, index), gradient, chunks, draws, group)
            counts.append(state.count)
            checks.same_counts(counts[0], state.count)
        state = state if group is None else state.all_reduce(group)
    return state


def _local(
    run: Run, gradient: str, chunks: Iterable[Chunk], draws: int | None, group: dist.ProcessGroup | None
) -> SetState:
    """The state of this process's elements."""
    if gradient in ("exact", "sampled"):
        return two_passes(run, chunks, draws, group)
    source = run.source.x
    # Forward-mode derivatives need no requires_grad.
    attached = source is not None and (source.requires_grad or forward_ad._current_level >= 0)
    # The graph may hold on to a chunk.
    copied = run.source.reuses_memory and torch.is_grad_enabled()
    state = run.start
    for t, chunk in enumerate(chunks):
        if attached:
            chunk = chunk._replace(x=_attached(chunk, source))
        part, _ = run.contribution(t, chunk.clone() if copied else chunk, run.start)
        state = state.merge(part)
    return run.enc.reached(state)


def _attached(chunk: Chunk, source: Any) -> Any:
    """The elements of a chunk, in the graph of the tensor that they come from."""
    x = source[chunk.index]
    return Ragged(x, chunk.x.offsets) if isinstance(chunk.x, Ragged) else x
