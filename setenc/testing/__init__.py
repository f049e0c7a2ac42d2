"""The contract of a pooling, as plain functions that raise an ``AssertionError``, without pytest.

Every check works on a copy in float64 and makes its input from fixed seeds. What fails is named with its input.
"""

from __future__ import annotations

import copy
import io
import math
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from setenc.encode import encode
from setenc.encoder import UMBC
from setenc.pooling import Pooling
from setenc.ragged import Ragged
from setenc.state import SetState
from setenc.testing.refusals import (
    bad_input_is_refused,
    huge_elements_are_right_or_refused,
    states_of_others_are_refused,
)
from setenc.testing.tools import (
    close,
    copied,
    elements,
    like,
    passes,
    same_state,
    stream,
    trained,
    true,
    updated,
)


def check_pooling(pooling: Pooling) -> None:
    """Hold a pooling to what every pooling promises; see `POOLING_CHECKS` for the single promises.

    Results do not depend on the partition, the order and the tree of merges; masks are removal, weights are
    multiplicities; empty sets are defined; states are left alone, saved and resumed; gradients of streams, and those of
    `setenc.encode` in two passes, are those of the whole set and agree with finite differences.

    Args:
        pooling: any `Pooling`; it is copied, and stays as it is.

    Raises:
        AssertionError: a promise is broken; the message names it, and holds the input.

    >>> from setenc.testing import check_pooling
    >>> check_pooling(setenc.SlotPooling(3, 8, 4))
    """
    if not isinstance(pooling, Pooling):
        raise TypeError(f"pooling must be a setenc Pooling; got {type(pooling).__name__}")
    for check in POOLING_CHECKS:
        try:
            check(pooling)
        except AssertionError:
            raise
        except Exception as error:
            frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
            found = [f.f_locals for f in frames if f.f_globals["__name__"].startswith(__name__)]
            inputs = {name: value for scope in found for name, value in scope.items() if isinstance(value, Tensor)}
            raise AssertionError(f"broken: {check.__name__}, with {error!r}. Input: {inputs}") from error


def any_partition_gives_the_same_result(pooling: Pooling) -> None:
    """Chunks of any size give what the whole set gives, to 1e-12 in float64 and 1e-5 in float32."""
    for dtype in (torch.float64, torch.float32):
        pool = copied(pooling, dtype)
        x = 3 * elements(pool, 2, 20)
        whole = pool(x)
        true(whole.shape == (2, pool.num_slots, pool.out_dim) and whole.dtype == dtype, "shape and dtype", x=x)
        for sizes in ([20], [1] * 20, [7, 7, 6], [0, 19, 0, 1, 0]):
            state = stream(pool, pool.init_state(2), x.split(sizes, 1))
            kinds = {t.dtype for part in state.parts for t in (part.total, part.mass, part.peak)}
            true(kinds == {dtype}, f"the state is {dtype}", x=x)
            true(state.count.tolist() == [20, 20], "the state counts its elements", x=x)
            close(pool.readout(state), whole, f"chunks of {sizes} elements", x=x)


def any_order_and_any_tree_of_merges_give_the_same_result(pooling: Pooling) -> None:
    """Elements in any order, spread over any states, merged in any order."""
    pool = copied(pooling)
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        size = int(torch.randint(1, 13, (), generator=g))
        x = 10 * elements(pool, 2, size, seed)
        order = torch.randperm(size, generator=g)
        owner = torch.randint(4, (size,), generator=g)

        def absorb(start: SetState, x: Tensor = x[:, order], owner: Tensor = owner, g: Any = g) -> SetState:
            states = [pool.update(start.empty(), x[:, owner == k]) for k in range(4)]
            while len(states) > 1:
                i, j = torch.randperm(len(states), generator=g)[:2].tolist()
                rest = [s for k, s in enumerate(states) if k not in (i, j)]
                states = [*rest, states[i].merge(states[j])]
            return states[0]

        out = pool.readout(passes(pool, pool.init_state(2), absorb))
        close(
            out, pool(x), "elements in another order, in states merged in another order", x=x, order=order, owner=owner
        )


def merging_is_a_commutative_monoid(pooling: Pooling) -> None:
    """``a + b = b + a``, ``(a + b) + c = a + (b + c)``, and the empty state changes nothing."""
    pool = copied(pooling)
    parts = [30 * elements(pool, 2, n, n) for n in (3, 1, 5)]

    def read(join: Callable[..., SetState]) -> Tensor:
        def absorb(start: SetState) -> SetState:
            return join(*(pool.update(start.empty(), x) for x in parts))

        return pool.readout(passes(pool, pool.init_state(2), absorb))

    whole = read(lambda a, b, c: a.merge(b).merge(c))
    for what, join in (
        ("b + a + c", lambda a, b, c: b.merge(a).merge(c)),
        ("a + (b + c)", lambda a, b, c: a.merge(b.merge(c))),
        ("c + b + a", lambda a, b, c: c.merge(b).merge(a)),
    ):
        close(read(join), whole, f"states merged as {what}", parts=parts)
    state = pool.update(pool.init_state(2), parts[0])
    for merged in (state.merge(state.empty()), state.empty().merge(state)):
        same_state(merged, state, "a state merged with an empty one", x=parts[0])


def sets_are_sets_and_independent(pooling: Pooling) -> None:
    """The order of the elements does not matter, and the sets of a batch do not see each other."""
    pool = copied(pooling)
    x = elements(pool, 3, 9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    close(pool(x[:, order]), pool(x), "elements in another order", x=x, order=order)
    close(pool(x.flip(0)), pool(x).flip(0), "sets in another order", x=x)
    close(pool(x[1:2]), pool(x)[1:2], "one set of a batch alone", x=x)


def a_mask_is_removal(pooling: Pooling) -> None:
    """Values in padding change nothing, NaN and infinity included; neither do elements of weight 0."""
    pool = copied(pooling)
    x = elements(pool, 3, 6)
    mask = torch.tensor([[1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 0]]).bool().to(x.device)
    pieces = torch.cat([pool(x[b : b + 1, mask[b]]) for b in range(3)])
    for poison in (math.nan, math.inf, -math.inf, 1e30):
        for options in ({"mask": mask}, {"weights": mask.to(x)}):
            dirty = torch.where(mask[..., None], x, poison).requires_grad_()
            inputs: dict[str, Any] = {"x": dirty, **options}
            whole = pool(dirty, **options)
            close(whole, pieces, "masked elements", **inputs)
            parts = [{k: v[:, part] for k, v in inputs.items()} for part in (slice(0, 4), slice(4, 6))]
            state = passes(pool, pool.init_state(3), partial(updated, pool, parts))
            close(pool.readout(state), whole, "masked elements in a stream", **inputs)
            true(state.count.tolist() == [3, 6, 1], "masked elements are not counted", **inputs)
            for out in (whole, pool.readout(state)):
                (gradient,) = torch.autograd.grad(out.square().sum(), dirty, retain_graph=True)
                true(bool(gradient.isfinite().all()), "gradients beside masked elements are finite", **inputs)
                true(bool((gradient[~mask] == 0).all()), "gradients of masked elements are 0", **inputs)


def weights_are_multiplicities(pooling: Pooling) -> None:
    """An element of weight 2 counts as two equal elements, one of weight 0 as none."""
    pool = copied(pooling)
    if pool.counts_multiplicities is None:
        return
    x = elements(pool, 2, 4)
    weights = torch.tensor([[1, 3, 0, 2], [2, 1, 1, 0]], device=x.device)
    times = weights if pool.counts_multiplicities else weights.sign()
    expected = torch.cat([pool(x[b].repeat_interleave(times[b], 0)[None]) for b in range(2)])
    for given in (weights, weights.to(x)):
        close(pool(x, weights=given), expected, "weights", x=x, weights=given)
    parts = [{"x": x[:, part], "weights": weights[:, part]} for part in (slice(0, 3), slice(3, 4))]
    state = passes(pool, pool.init_state(2), partial(updated, pool, parts))
    close(pool.readout(state), expected, "weights in a stream", x=x, weights=weights)
    true(state.count.tolist() == [6, 4], "weights are counted", x=x, weights=weights)


def empty_sets_are_defined(pooling: Pooling) -> None:
    """A set without elements has a finite result with finite gradients, however it comes to be empty."""
    pool = copied(pooling)
    x = elements(pool, 2, 5)
    nothing = pool.readout(stream(pool, pool.init_state(2), []))
    true(bool(nothing.isfinite().all()), "the result of an empty set is finite")
    mask = torch.zeros(2, 5, dtype=torch.bool, device=x.device)
    close(pool(x, mask), nothing, "all elements masked", x=x)
    close(pool(x[:, :0]), nothing, "no elements", x=x[:, :0])
    close(pool(x, weights=torch.zeros_like(mask).to(x)), nothing, "all weights 0", x=x)
    mask[1, 2] = True
    half = pool(x.requires_grad_(), mask)
    close(half[:1], nothing[:1], "an empty set beside another", x=x, mask=mask)
    close(half[1:], pool(x[1:, 2:3]), "a set of one element beside an empty one", x=x, mask=mask)
    gradients = torch.autograd.grad(half.square().sum(), [x, *trained(pool)], allow_unused=True)
    for gradient in gradients:
        true(gradient is None or bool(gradient.isfinite().all()), "gradients beside an empty set", x=x, mask=mask)
    true(pool(x[:0]).shape == (0, pool.num_slots, pool.out_dim), "a batch of no sets", x=x[:0])
    state = stream(pool, pool.init_state(0), [x[:0], x[:0]])
    true(pool.readout(state).shape == (0, pool.num_slots, pool.out_dim), "a stream of no sets", x=x[:0])


def states_are_left_alone(pooling: Pooling) -> None:
    """Reading and updating change no state, streams side by side do not see each other, copies continue equally."""
    pool = copied(pooling).train()
    x, y = elements(pool, 2, 6, 0), elements(pool, 2, 6, 1)
    a, b = pool.update(pool.init_state(2), x[:, :3]), pool.update(pool.init_state(2), y[:, :2])
    kept = a.clone()
    longer = pool.update(a, x[:, 3:])
    same_state(a, kept, "a state after an update", x=x)
    b = pool.update(b, y[:, 2:])
    for state, data in ((longer, x), (b, y)):
        same_state(state, pool.update(state.empty(), data), "a stream beside another one", x=data, exact=False)
    file = io.BytesIO()
    torch.save(a, file)
    for weights_only in (True, False):
        file.seek(0)
        resumed = torch.load(file, weights_only=weights_only)
        true(type(resumed) is type(a), "a saved state is loaded as one")
        resumed = resumed.to(x.device)
        same_state(pool.update(resumed, x[:, 3:]), longer, "a stream that goes on from a file", x=x)
    same_state(pool.update(copy.deepcopy(a), x[:, 3:]), longer, "a stream that goes on from a copy", x=x)
    state = stream(pool, pool.init_state(2), [x])
    true(torch.equal(pool.readout(state), pool.readout(state)), "reading twice", x=x)


def gradients_are_those_of_the_whole_set(pooling: Pooling) -> None:
    """Streamed, in one call, and by finite differences; in the elements and in every parameter."""
    pool = copied(pooling).train()
    x = elements(pool, 2, 7).requires_grad_()
    leaves = [x, *trained(pool)]

    def gradients(out: Tensor) -> Sequence[Tensor]:
        return torch.autograd.grad(out.sin().sum(), leaves, allow_unused=True, materialize_grads=True)

    whole = gradients(pool(x, generator=torch.Generator().manual_seed(3)))
    start = pool.init_state(2, generator=torch.Generator().manual_seed(3))
    streamed = gradients(pool.readout(stream(pool, start, x.split(3, 1))))
    for ours, theirs in zip(streamed, whole, strict=True):
        close(ours, theirs, "gradients of a stream", 1e-10, x=x)
    pool.eval()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    (slope,) = torch.autograd.grad(pool(x).sin().sum(), x)
    with torch.no_grad():
        ends = [pool(x + step * direction).sin().sum() for step in (1e-6, -1e-6)]
    close((slope * direction).sum(), (ends[0] - ends[1]) / 2e-6, "a finite difference", 1e-6, x=x)


def two_passes_give_the_gradients_of_one(pooling: Pooling) -> None:
    """`setenc.encode` with ``gradient="exact"`` is ``"full"`` to 1e-10; ``"sampled"`` is it on average."""
    pool = copied(pooling).train()
    torch.manual_seed(0)
    extractor = torch.nn.Sequential(torch.nn.Linear(2, pool.in_dim), torch.nn.Dropout(0.3))
    enc = UMBC(extractor, pool, torch.nn.Linear(pool.out_dim, 2), size_feature=True).to(like(pool)).train()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 11, 2, generator=g).to(like(pool))
    mask = (torch.rand(3, 11, generator=g) < 0.8).to(x.device)
    weights = (torch.rand(3, 11, generator=g) + 0.2).to(x)
    ragged = Ragged.from_mask(x, mask)

    def gradients(data: Any, mode: str, seed: int = 7, **options: Any) -> list[Tensor]:
        leaf = data.values if isinstance(data, Ragged) else data
        leaf.requires_grad_()
        state = torch.get_rng_state()
        noise = torch.Generator().manual_seed(seed)
        out = encode(enc, data, chunk_size=4, gradient=mode, generator=noise, **options)
        torch.set_rng_state(state)
        leaves = [leaf, *trained(enc)]
        found = torch.autograd.grad(out.sin().sum(), leaves, allow_unused=True, materialize_grads=True)
        return [out.detach(), *found]

    cases: list[tuple[Any, dict[str, Tensor]]] = [
        (x, {}),
        (x, {"mask": mask}),
        (x, {"weights": weights}),
        (x, {"mask": mask, "weights": weights}),
        (ragged, {"weights": weights[mask]}),
    ]
    for data, options in cases:
        full, exact = (gradients(data, mode, 7, **options) for mode in ("full", "exact"))
        for ours, theirs in zip(exact, full, strict=True):
            close(ours, theirs, "gradients of two passes", 1e-10, x=data, **options)
    enc.eval()
    full = gradients(x, "full")
    calls: list[float] = []
    hook = extractor.register_forward_pre_hook(lambda _, given: calls.append(float(given[0].flatten()[0].detach())))
    draws: dict[tuple[float, ...], list[Tensor]] = {}
    for seed in range(40 * pool.num_passes):
        calls.clear()
        found = gradients(x, "sampled", seed)
        draws.setdefault(tuple(calls[-pool.num_passes :]), found)  # the chunks that backward evaluates
    hook.remove()
    true(len(draws) == 3**pool.num_passes, "draws of one chunk among three show each of them", x=x)
    for each, theirs in zip(zip(*draws.values(), strict=True), full, strict=True):
        close(torch.stack(each).mean(0), theirs, "the mean of sampled gradients over all chunks", 1e-10, x=x)


@torch.no_grad()
def half_precision_keeps_a_float32_state(pooling: Pooling) -> None:
    """Half inputs, half parameters and autocast: sums stay in float32, results in the parameters' dtype."""
    pool = copied(pooling, torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        x = elements(pool, 2, 64).to(dtype)
        expected = pool(x.float())
        state = stream(pool, pool.init_state(2), x.split(1, 1))
        true({t.dtype for part in state.parts for t in (part.total, part.mass)} == {torch.float32}, "float32", x=x)
        close(pool.readout(state), expected, "half inputs in a stream", x=x)
        close(pool(x), expected, "half inputs", x=x)
        half = copy.deepcopy(pool).to(dtype)
        state = stream(half, half.init_state(2), x.split(1, 1))
        true({part.total.dtype for part in state.parts} == {torch.float32}, "a float32 state of half parameters", x=x)
        true(half.readout(state).dtype == half(x).dtype == dtype, "results in the parameters' dtype", x=x)
    x = elements(pool, 2, 64)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        state = stream(pool, pool.init_state(2), x.split(16, 1))
    true({part.total.dtype for part in state.parts} == {torch.float32}, "a float32 state under autocast", x=x)


def ragged_sets_equal_their_sets_one_by_one(pooling: Pooling) -> None:
    """Sets of different sizes, packed, in a list, nested; with weights; empty ones among them."""
    pool = copied(pooling)
    enc = UMBC(None, pool, None)
    sets = [elements(pool, 1, n, n)[0] for n in (3, 0, 150, 64, 1)]
    expected = torch.cat([pool(s[None]) for s in sets])
    ragged = Ragged.of(sets)
    forms: list[Any] = [sets, ragged]
    if ragged.values.device.type == "cpu":
        forms.append(torch.nested.nested_tensor(sets, layout=torch.jagged))
    for form in forms:
        close(enc(form), expected, "a ragged batch", sets=sets)
        empty = [s[:0] for s in sets]
        state = stream(enc, enc.init_state(5), [form, empty])
        close(enc.readout(state), expected, "a stream of ragged chunks", sets=sets)
    weights = torch.rand(len(ragged.values), generator=torch.Generator().manual_seed(0)).to(ragged.values)
    parts = zip(sets, weights.split([len(s) for s in sets]), strict=True)
    expected = torch.cat([pool(s[None], weights=w[None]) for s, w in parts])
    close(enc(ragged, weights=weights), expected, "weights of a ragged batch", sets=sets, weights=weights)


POOLING_CHECKS: tuple[Callable[[Pooling], None], ...] = (
    any_partition_gives_the_same_result,
    any_order_and_any_tree_of_merges_give_the_same_result,
    merging_is_a_commutative_monoid,
    sets_are_sets_and_independent,
    a_mask_is_removal,
    weights_are_multiplicities,
    empty_sets_are_defined,
    states_are_left_alone,
    gradients_are_those_of_the_whole_set,
    two_passes_give_the_gradients_of_one,
    half_precision_keeps_a_float32_state,
    ragged_sets_equal_their_sets_one_by_one,
    bad_input_is_refused,
    states_of_others_are_refused,
    huge_elements_are_right_or_refused,
)
