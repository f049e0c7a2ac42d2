"""Few elements without gradients take one compiled call: it gives what the general way does, or leaves them to it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import setenc
from setenc import kernels
from setenc.pooling import slots

HEADS = {"folded": (2, 3), "mapped": (4, 9)}  # heads, slots


def build(kind, dtype=torch.float32, **options):
    heads, count = HEADS[kind]
    pooling = setenc.SlotPooling(12, 8, count, num_heads=heads, **options).to(dtype).eval()
    assert pooling.folded == (kind == "folded")
    return pooling


@pytest.fixture
def calls(monkeypatch):
    """Whether each call of the kernel had a result."""
    told, absorb = [], kernels.absorb

    def watched(*given):
        parts = absorb(*given)
        told.append(parts is not None)
        return parts

    monkeypatch.setattr(kernels, "absorb", watched)
    return told


def in_general(call):
    """What a call gives without the kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots, "_FEW", -1)
        return call()


def same(found, expected, **tolerance):
    for name in ("total", "mass", "peak", "count", "slots"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), msg=name, **tolerance)


def stream(pooling, chunks, **parts):
    with torch.no_grad():
        state = pooling.init_state(len(chunks[0]))
        for i, chunk in enumerate(chunks):
            state = pooling.update(state, chunk, **{name: several[i] for name, several in parts.items()})
    return state


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from(sorted(HEADS)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    sets=st.integers(1, 3),
    size=st.sampled_from([1e-3, 1.0, 1e3]),
    given_parts=st.sets(st.sampled_from(["mask", "weights"])),
    strided=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_same_state(kind, dtype, sizes, sets, size, given_parts, strided, seed):
    g = torch.Generator().manual_seed(seed)
    pooling = build(kind, dtype)
    whole = size * torch.randn(sets, sum(sizes), 12, generator=g, dtype=dtype)
    chunks = whole.split(sizes, 1) if strided else [c.contiguous() for c in whole.split(sizes, 1)]
    parts = {}
    if "mask" in given_parts:
        parts["mask"] = [torch.rand(c.shape[:2], generator=g) < 0.5 for c in chunks]
        chunks = [c.masked_fill(~m[..., None], torch.nan) for c, m in zip(chunks, parts["mask"], strict=True)]
    if "weights" in given_parts:
        parts["weights"] = [torch.randint(0, 3, c.shape[:2], generator=g) for c in chunks]
        if "mask" not in parts:
            chunks = [
                c.masked_fill((w == 0)[..., None], torch.inf) for c, w in zip(chunks, parts["weights"], strict=True)
            ]
    found, expected = stream(pooling, chunks, **parts), in_general(lambda: stream(pooling, chunks, **parts))
    # Logits of large features have rounding errors of that size.
    rounding = 20 * max(size, 1) * torch.finfo(dtype).eps
    same(found, expected, atol=rounding * max(size, 1), rtol=rounding)
    with torch.no_grad():
        torch.testing.assert_close(
            pooling.readout(found), pooling.readout(expected), atol=rounding * max(size, 1), rtol=rounding
        )


@pytest.mark.parametrize("kind", HEADS)
def test_it_is_called_and_leaves_the_given_state(kind, calls):
    pooling = build(kind)
    start = stream(pooling, [torch.randn(2, 4, 12)])
    before = start.clone()
    with torch.no_grad():
        pooling.update(start, torch.randn(2, 4, 12))
        assert calls == [True, True]
        same(start, before, atol=0, rtol=0)
        pooling.update(pooling.init_state(300), torch.randn(300, 256, 12))  # not few
    assert calls == [True, True]


@pytest.mark.parametrize("threads", [1, 2])
def test_it_is_called_whatever_the_threads(threads, calls):
    """Of few elements torch's products gain less from threads than they wait for them."""
    pooling, before = setenc.SlotPooling(128, 128, 64).eval(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        stream(pooling, [torch.randn(1, 64, 128)])
    finally:
        torch.set_num_threads(before)
    assert calls == [True]


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("change", ["in place", "data", "replaced", "parametrised"])
def test_weights_that_change_within_a_stream(kind, change, calls):
    """The next update sees them, as they are: nothing is kept."""
    pooling, chunks = build(kind), torch.randn(4, 1, 3, 12)
    layer = pooling.key_value

    def run():
        layer.weight = torch.nn.Parameter(weight.clone())
        state = stream(pooling, [chunks[0]])
        with torch.no_grad():
            if change == "in place":
                layer.weight.mul_(-2)
            elif change == "data":
                layer.weight.data.mul_(-2)
            elif change == "replaced":
                layer.weight = torch.nn.Parameter(-2 * layer.weight)
            else:
                parametrize.register_parametrization(layer, "weight", Doubled())
            state = pooling.update(state, chunks[1])
            if change == "parametrised":
                parametrize.remove_parametrizations(layer, "weight")
            return state, pooling.readout(state)

    weight = layer.weight.detach().clone()
    found = run()
    assert calls == [True, True]
    expected = in_general(run)
    same(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


def test_without_compilation(calls, monkeypatch):
    monkeypatch.setattr("numba.config.DISABLE_JIT", 1)
    stream(build("mapped"), [torch.randn(2, 4, 12)])
    assert calls == [False]


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return -2 * weight

    def right_inverse(self, weight):
        return -weight / 2


@pytest.mark.parametrize("kind", HEADS)
def test_features_that_are_not_finite(kind):
    pooling = build(kind)
    for bad in (torch.nan, torch.inf, -torch.inf):
        for n in (1, 5):
            chunk = torch.randn(1, n, 12)
            chunk[0, -1, 7] = bad
            with pytest.raises(ValueError, match=f"1 of {chunk.numel()} entries are NaN or infinite"):
                stream(pooling, [torch.randn(1, 2, 12), chunk])


@pytest.mark.parametrize("kind", HEADS)
def test_logits_that_overflow_are_left_to_the_general_way(kind, calls):
    pooling, chunks = build(kind), [torch.randn(1, 2, 12), 1e38 * torch.randn(1, 2, 12)]
    with torch.no_grad():
        pooling.query.weight.mul_(1e3)
    expected = in_general(lambda: stream(pooling, chunks))
    same(stream(pooling, chunks), expected, equal_nan=True)
    assert calls == [True, False]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_what_is_more_than_numbers_goes_the_general_way(calls):
    pooling = build("mapped").requires_grad_(False)  # constants of a trace
    state, x = stream(pooling, [torch.randn(2, 4, 12)]), torch.randn(2, 3, 12)
    calls.clear()

    def update(x=x, state=state, pooling=pooling):
        return pooling.update(state, x)

    with torch.no_grad():
        expected = in_general(update)
        # A view that stands for its negative, a state in another layout.
        negative = torch.complex(torch.zeros(2, 3, 12), -x).conj().imag
        assert negative.is_neg()
        turned = state.replace(total=state.total.mT.contiguous().mT)
        for found in (update(negative), update(state=turned)):
            same(found, expected)
        with forward_ad.dual_level():
            found = update(forward_ad.make_dual(x, torch.ones_like(x)))
            known = in_general(lambda: update(forward_ad.make_dual(x, torch.ones_like(x))))
            tangents = [forward_ad.unpack_dual(s.total).tangent for s in (found, known)]
            torch.testing.assert_close(*tangents)
            assert tangents[0].abs().sum() > 0
        torch.func.grad(lambda x: update(x).total.sum())(x)
        assert not any(calls)
        calls.clear()

        class Seen(TorchDispatchMode):
            names: list = []  # noqa: RUF012

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                self.names.append(function.overloadpacket.__name__)
                return function(*args, **(kwargs or {}))

        with Seen():
            same(update(), expected)
        assert "exp_" in Seen.names
        traced = torch.jit.trace(lambda x: update(x).total, x, check_trace=False)
        torch.testing.assert_close(traced(2 * x), update(2 * x).total)
        assert calls == [True]
        calls.clear()
        # Half precision, autocast, a class with an attention of its own.
        with torch.autocast("cpu", torch.bfloat16):
            same(update(), in_general(update), atol=0, rtol=0)
        half = build("mapped").bfloat16()
        stream(half, [x.bfloat16(), x.bfloat16()])

        class Own(setenc.SlotPooling):
            def _scores(self, features, slots):
                logits, values = super()._scores(features, slots)
                return 0 * logits, values

        own = Own(12, 8, 9).eval()
        torch.testing.assert_close(own.update(own.init_state(2), x).mass, torch.full((2, 4, 9), 3.0))
    assert not any(calls)
    update()  # in grad mode
    assert not any(calls)


def test_gradients_of_a_stream_that_starts_without_them():
    pooling, x = build("mapped", torch.float64), torch.randn(1, 6, 12, dtype=torch.float64)
    state = stream(pooling, [x[:, :3]])
    pooling.readout(pooling.update(state, x[:, 3:])).square().sum().backward()
    found = [p.grad.clone() for p in pooling.parameters() if p.grad is not None]
    pooling.zero_grad()
    state = in_general(lambda: stream(pooling, [x[:, :3]]))
    pooling.readout(pooling.update(state, x[:, 3:])).square().sum().backward()
    torch.testing.assert_close(found, [p.grad for p in pooling.parameters() if p.grad is not None])
    assert found
