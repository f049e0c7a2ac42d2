"""Gradients of the state in a second pass over the elements, one chunk in memory at a time.

The first pass is over when backward begins. What the second one needs unchanged is kept, or compared: tensors
by their version, parameters and buffers by themselves, modules by their mode, data by the state that they make.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from setenc import checks
from setenc.chunks import Chunk, Source
from setenc.encoder import UMBC
from setenc.ragged import Ragged
from setenc.random import DRAWS, seeded
from setenc.ranks import together
from setenc.state import SetState


class Run:
    """A pass of an encoding over the elements, and what belongs to it; ``index`` counts them (see `DSMILPooling`)."""

    def __init__(self, enc: UMBC, source: Source, start: SetState, seed: int, index: int = 0) -> None:
        self.enc, self.source, self.start, self.seed, self.index = enc, source, start, seed, index
        self.device = start.count.device
        kind = self.device.type
        on = torch.is_autocast_enabled(kind)
        self.autocast = partial(torch.autocast, kind, torch.get_autocast_dtype(kind), on, cache_enabled=False)
        self.dtype = torch.get_autocast_dtype(kind) if on else enc.pooling.like.dtype

    def contribution(self, t: int, chunk: Chunk, start: SetState, peak: Any = None) -> tuple[SetState, Tensor | None]:
        """State of chunk ``t``, with random numbers that depend on ``t`` alone, and the features of its elements."""
        # An iterator may fill its buffer again before an asynchronous copy has read it.
        to = partial(_to, device=self.device, non_blocking=not self.source.reuses_memory)
        checks.batch(chunk.x, start.batch_size)
        x, mask, weights = to(chunk.x), to(chunk.mask), to(chunk.weights)
        with seeded(self.seed + t, self.device):
            x, features, mask, weights = self.enc.featurise(x, mask, weights)
            return self.enc.pool(start, x, features, mask, weights, peak), features

    def stream(self, chunks: Iterable[Chunk]) -> Iterator[tuple[int, Chunk, SetState]]:
        """Each chunk with its contribution."""
        for t, chunk in enumerate(chunks):
            yield t, chunk, self.contribution(t, chunk, self.start)[0]


def two_passes(run: Run, chunks: Iterable[Chunk], draws: int | None, group: dist.ProcessGroup | None) -> SetState:
    """The state of all chunks; backward calls the extractor again, on all of them or on ``draws`` drawn ones."""
    second = SecondPass(run, draws, group)
    state = run.start.detach()
    random = torch.Generator().manual_seed(DRAWS + run.seed + run.index)
    with torch.no_grad(), run.autocast():
        for t, chunk, part in run.stream(chunks):
            second.note(t, state, part)
            state = state.merge(part)
            if draws is not None:
                # Reservoir sampling: after chunk t, each of the t + 1 chunks is kept with the same probability.
                drawn_per_set = run.source.chunks_of_set is not None
                index = t if t < draws or drawn_per_set else int(torch.randint(t + 1, (), generator=random))
                if index < draws:
                    second.kept[index : index + 1] = [(t, chunk.clone(), part)]
    return second.attach(state)


class SecondPass:
    """The second pass of one encoding: `attach` it to the state, and backward runs it.

    Args:
        run: the encoding.
        draws: chunks of which gradients are taken, as estimates for all; None takes all chunks.
        group: process group; an error on one of its ranks is raised on all.
    """

    def __init__(self, run: Run, draws: int | None, group: dist.ProcessGroup | None) -> None:
        self.run, self.draws, self.group, self.count = run, draws, group, 0
        self.kept: list[tuple[int, Chunk, SetState]] = []
        self.body = _Body(run.enc)
        self.parameters = dict(self.body.named_parameters())
        self.buffers = dict(self.body.named_buffers())
        self.slots = [part.slots for part in run.start.parts]
        data = run.source.tensors() if draws is None else {}
        self.versions = [(name, t, _version(t)) for name, t in (*self.parameters.items(), *data.items())]
        self.modes = [(name, module, module.training) for name, module in self.body.named_modules()]
        # The origin of entries that are selected, not summed: the chunk of each, and its position there.
        self.origins = [torch.full_like(p.peak, -1).long() if p.selects else None for p in run.start.parts]
        self.entries = [None if o is None or o.shape[2] == 1 else torch.zeros_like(o) for o in self.origins]

    @property
    def leaves(self) -> list[Tensor | None]:
        """Tensors that backward gives gradients to: the slots, the elements, the parameters."""
        return [*self.slots, self.run.source.x, *self.parameters.values()]

    def note(self, t: int, state: SetState, part: SetState) -> None:
        """Chunk ``t`` of the first pass, whose ``part`` is about to be merged into ``state``."""
        self.count = t + 1
        for i, (mine, theirs) in enumerate(zip(state.parts, part.parts, strict=True)):
            origin, entry = self.origins[i], self.entries[i]
            if origin is None:
                continue
            chosen = mine.chosen(theirs)
            if entry is None:
                self.origins[i] = torch.where(chosen > 0, t, origin)
            else:
                own = torch.arange(origin.shape[2], device=origin.device).expand_as(origin)
                self.origins[i] = torch.cat((origin, torch.full_like(origin, t)), 2).gather(2, chosen)
                self.entries[i] = torch.cat((entry, own), 2).gather(2, chosen)

    def attach(self, state: SetState) -> SetState:
        """The finished ``state`` of the first pass, with this pass as its graph."""
        self.state = state.detach()
        if self.draws is not None:
            owned, device = self.run.source.chunks_of_set, self.run.device
            sizes = torch.full((state.batch_size,), self.count, device=device) if owned is None else owned.to(device)
            self.scale = (sizes / sizes.clamp(1, self.draws)).to(state.parts[0].total.dtype)
        tensors = [tensor for part in state.parts for tensor in (part.total, part.mass, part.peak)]
        found = iter(_Streamed.apply(self, len(tensors), *tensors, *self.leaves))
        parts: list[SetState] = []
        for part, slots in zip(state.parts, self.slots, strict=True):
            total, mass, peak = next(found), next(found), next(found)
            peak = peak if part.selects else peak.detach()
            parts.append(part.replace(total=total, mass=mass, peak=peak, slots=slots))
        return state.with_parts(parts)

    def __call__(self, gradients: tuple[Tensor, ...]) -> list[Tensor | None]:
        """Gradients of `leaves`, given those of the total, mass and peak of each part of the state."""
        with together(self.group, self.run.device):
            self._check_unchanged()
            return self._with_parameters(lambda parameters: self._gradients(gradients, parameters))

    def _check_unchanged(self) -> None:
        for name, tensor, version in self.versions:
            if _version(tensor) != version:
                raise RuntimeError(
                    f"{name} was changed in place between the forward and the backward of encode, which reads it again "
                    "in backward. Change it afterwards, give a copy, or use gradient='full'"
                )
        for name, module, training in self.modes:
            if module.training != training:
                was, now = ("training", "eval") if training else ("eval", "training")
                raise RuntimeError(
                    f"{name or 'the encoder'} ({type(module).__name__}) was in {was} mode in the forward of encode and "
                    f"is in {now} mode in the backward, which calls it again. Switch modes after the backward"
                )

    def _with_parameters(self, function: Callable[[list[Tensor]], Any]) -> Any:
        """``function`` of the parameters that the first pass had, with the modules holding them."""
        given: list[Tensor] = list(self.parameters.values())
        now = (*self.body.parameters(), *self.body.buffers())
        same = all(a is b for a, b in zip(now, (*given, *self.buffers.values()), strict=True))
        # Hooks of a parameter run when its whole gradient arrives, not at every chunk.
        if same and not any(p._backward_hooks for p in given):
            return function(given)
        fresh = {name: p.detach().requires_grad_(p.requires_grad) for name, p in self.parameters.items()}
        call = partial(function, list(fresh.values()))
        return torch.func.functional_call(self.body, {**fresh, **self.buffers}, (call,))

    def _gradients(self, gradients: tuple[Tensor, ...], parameters: list[Tensor]) -> list[Tensor | None]:
        leaves = self.leaves
        elements = len(self.slots)  # index of the elements among the leaves
        sums = {
            i: torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32))
            for i, leaf in enumerate(leaves)
            if leaf is not None and leaf.requires_grad
        }
        if self.draws is not None:
            gradients = tuple(g * self.scale.reshape(-1, *[1] * (g.ndim - 1)) for g in gradients)
        seen, first = self.state.empty(), True
        sizes = [torch.zeros_like(part.mass) for part in self.state.parts]
        for t, chunk, expected in self._chunks():
            part, found, features = self._chunk(t, chunk, gradients, parameters, first)
            first = first and not found
            for i, gradient in found:
                if i == elements:
                    sums[i][chunk.index] = gradient.to(sums[i].dtype)
                else:
                    sums[i] += gradient
            if expected is None:
                seen = self._joined(seen, part, t)
                sizes = [size + own for size, own in zip(sizes, self._sizes(t, part, features), strict=True)]
            else:
                own = self._sizes(t, part, features)
                checks.same_state(expected.relative_to(self.state), part, own, self.run.dtype, f"chunk {t}")
        if self.draws is None:
            checks.same_state(self.state, seen, sizes, self.run.dtype, "the set")
        return [
            sums[i].to(leaf.dtype) if leaf is not None and i in sums else None for i, leaf in enumerate(self.leaves)
        ]

    def _joined(self, seen: SetState, part: SetState, t: int) -> SetState:
        """The state of the second pass after chunk ``t``: selected entries come from where the first pass had them."""
        parts = []
        for mine, new, origin, entry in zip(seen.parts, part.parts, self.origins, self.entries, strict=True):
            count = mine.count + new.count
            if origin is None:
                total, mass = mine.total + new.total.detach(), mine.mass + new.mass.detach()
                parts.append(mine.replace(total=total, mass=mass, count=count))
            else:
                peak = new.peak.detach()
                peak = torch.where(origin == t, peak if entry is None else peak.gather(2, entry), mine.peak)
                parts.append(mine.replace(peak=peak, count=count))
        return seen.with_parts(parts)

    def _sizes(self, t: int, state: SetState, features: Tensor | None) -> list[Tensor]:
        """What rounding in chunk ``t`` is relative to, for each part of its ``state``; see `checks.same_state`."""
        if features is None or not features.numel():
            return [torch.zeros_like(part.mass) for part in state.parts]
        # A mass of 1 at least, in all chunks, loses what is below its eps.
        size = features.detach().abs().amax()
        return [
            size.to(part.mass) * (part.mass.detach() + torch.finfo(part.mass.dtype).eps if o is None else o == t)
            for part, o in zip(state.parts, self.origins, strict=True)
        ]

    def _chunks(self) -> Iterator[tuple[int, Chunk, SetState | None]]:
        if self.draws is not None:
            yield from self.kept
            return
        seen = 0
        for t, chunk in enumerate(self.run.source):
            seen = t + 1
            if seen > self.count:
                break
            yield t, chunk, None
        checks.same_chunks(self.count, seen)

    def _chunk(
        self, t: int, chunk: Chunk, gradients: Sequence[Tensor], parameters: list[Tensor], first: bool
    ) -> tuple[SetState, list[tuple[int, Tensor]], Tensor | None]:
        """Chunk ``t``: its state, its share of the gradients by the index among `leaves`, its features."""
        run, x = self.run, self.run.source.x
        with torch.enable_grad(), run.autocast():
            slots = [s.detach().requires_grad_(s.requires_grad) for s in self.slots]
            if x is not None and x.requires_grad:
                x = (chunk.x.values if isinstance(chunk.x, Ragged) else chunk.x).requires_grad_()
            parts = [part.replace(slots=s) for part, s in zip(run.start.parts, slots, strict=True)]
            start = run.start.with_parts(parts)
            state, features = run.contribution(t, chunk, start, self.state.reference())
        outputs: list[tuple[Tensor, Tensor]] = []
        for i, part in enumerate(state.parts):
            origin, entry = self.origins[i], self.entries[i]
            for output, gradient in zip((part.total, part.mass, part.peak), gradients[3 * i :], strict=False):
                if output.requires_grad:
                    routed = gradient if origin is None else _routed(gradient, origin == t, entry)
                    outputs.append((output, routed))
        inputs = [(i, v) for i, v in enumerate((*slots, x, *parameters)) if v is not None and v.requires_grad]
        if not outputs:
            return state, [], features
        if first:
            _check_no_other_leaf([output for output, _ in outputs], [value for _, value in inputs])
        found = torch.autograd.grad(
            [output for output, _ in outputs],
            [value for _, value in inputs],
            [gradient for _, gradient in outputs],
            allow_unused=True,
        )
        pairs = [(i, gradient) for (i, _), gradient in zip(inputs, found, strict=True) if gradient is not None]
        return state, pairs, features


class _Body(nn.Module):
    """The module that the second pass calls, with its parameters under their names in the encoder."""

    def __init__(self, enc: UMBC) -> None:
        super().__init__()
        self.extractor, self.pooling = enc.extractor, enc.pooling

    def forward(self, function: Callable[[], Any]) -> Any:
        """Call ``function``, while the parameters are what ``torch.func.functional_call`` makes them."""
        return function()


class _Streamed(torch.autograd.Function):
    """The state as it is, and a second pass over the elements in backward."""

    @staticmethod
    def forward(ctx: Any, second: SecondPass, count: int, *tensors: Tensor) -> Any:
        ctx.second, ctx.count = second, count
        ctx.save_for_backward(tensors[0])
        return tuple(tensor.clone() for tensor in tensors[:count])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        found = ctx.second(gradients)
        _ = ctx.saved_tensors  # an error where backward has freed its graph
        return (None, None, *[None] * ctx.count, *found)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _routed(gradient: Tensor, chosen: Tensor, entry: Tensor | None) -> Tensor:
    """Gradients of selected entries ``(B, H, K, …)``, moved to the entries of the chunk they came from."""
    shape = (*chosen.shape, *[1] * (gradient.ndim - chosen.ndim))
    gradient = gradient * chosen.view(shape)
    if entry is None:
        return gradient
    return torch.zeros_like(gradient).scatter_add_(2, entry.view(shape).expand_as(gradient), gradient)


def _check_no_other_leaf(outputs: list[Tensor], inputs: list[Tensor]) -> None:
    """Every tensor that a gradient would reach is one of ``inputs``."""
    known = {id(value) for value in inputs}
    seen = {value.grad_fn for value in inputs if value.grad_fn is not None}
    todo = [output.grad_fn for output in outputs]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise ValueError(
                f"the extractor uses a tensor of shape {tuple(leaf.shape)} that requires gradients and is not among "
                "its parameters: encode would leave its gradient out. Make it a parameter of the extractor (an "
                "nn.Parameter, an nn.ModuleList), or use gradient='full'"
            )
        todo += [following for following, _ in node.next_functions]


def _to(x: Any, device: torch.device, non_blocking: bool) -> Any:
    if isinstance(x, Ragged):
        return x if x.values.device == device else Ragged(x.values.to(device), x.offsets.to(device))
    # A copy to the CPU that nobody waits for may be read before it has arrived.
    return None if x is None else x.to(device, non_blocking=non_blocking and device.type != "cpu")
