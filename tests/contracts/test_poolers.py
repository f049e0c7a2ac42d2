"""What every pooling promises, whatever it computes: mini-batch consistency in all its forms.

A pooling joins by being in ``setenc.__all__`` and having a line here; a missing line fails
`test_everything_has_a_case`. Acceptance cases: sections 2 to 5, 10 and 16 of the notes on UMBC.
"""

import copy
import inspect
import io
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import setenc

POOLERS = {
    "DeepSetsPooling": [lambda r=r: setenc.DeepSetsPooling(3, 8, r, norm=r == "mean") for r in ("mean", "sum", "max")],
    "GatedAttentionPooling": [lambda: setenc.GatedAttentionPooling(3, 8)],
    "SlotPooling": [
        lambda a=a, h=h, s=s, r=r: setenc.SlotPooling(
            3, 8, 4, num_heads=h, activation=a, slots=s, residual=r, slot_norm=h == 4, output_norm=h == 2
        )
        for a, (h, s, r) in itertools.product(
            ("sigmoid", "softmax", "slot-sigmoid", "slot-softmax", "slot-exp"),
            ((2, "random", True), (4, "learned", False)),
        )
    ]
    + [
        lambda a=a: setenc.SlotPooling(3, 8, 16, num_heads=8, activation=a, slots="learned")
        for a in ("softmax", "slot-softmax")
    ],
}


def build(make, dtype=torch.float64):
    torch.manual_seed(0)
    return make().to(dtype)


def name(make):
    return " ".join(map(str, (type(make()).__name__, *(make.__defaults__ or ()))))


every_pooler = pytest.mark.parametrize("make", [m for cases in POOLERS.values() for m in cases], ids=name)


def streamed(pooling, chunks, batch=2, state=None):
    state = pooling.init_state(batch) if state is None else state
    for chunk in chunks:
        state = pooling.update(state, chunk)
    return state


def close(a, b, dtype=torch.float64):
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_everything_has_a_case():
    objects = {n: getattr(setenc, n) for n in setenc.__all__}
    poolings = {n for n, o in objects.items() if inspect.isclass(o) and issubclass(o, setenc.Pooling)}
    assert poolings - {"Pooling"} == set(POOLERS)


@every_pooler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [[20], [1] * 20, [7, 7, 6], [0, 19, 0, 1, 0]], ids=str)
def test_any_partition_gives_the_one_shot_result(make, dtype, sizes, device):
    pooling = build(make, dtype).to(device).eval()
    x = 3 * torch.randn(2, 20, 3, dtype=dtype, device=device)
    state = streamed(pooling, x.split(sizes, 1))
    out = pooling.readout(state)
    assert out.shape == (2, pooling.num_slots, pooling.out_dim)
    assert out.dtype == state.total.dtype == state.mass.dtype == state.peak.dtype == dtype
    assert out.device.type == device.type
    close(out, pooling(x), dtype)
    assert state.count.tolist() == [20, 20]


@every_pooler
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_partition_order_and_merge_tree(make, data):
    pooling = build(make).eval()
    n = data.draw(st.integers(1, 12))
    x = 10 * torch.randn(2, n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    order = data.draw(st.permutations(range(n)))
    owner = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)))
    states = [streamed(pooling, [x[:, order][:, owner == k]]) for k in range(4)]
    while len(states) > 1:
        i, j = data.draw(st.permutations(range(len(states))))[:2]
        merged = states[i].merge(states[j])
        states = [s for k, s in enumerate(states) if k not in (i, j)] + [merged]
    close(pooling.readout(states[0]), pooling(x))


@every_pooler
def test_merge_is_a_commutative_monoid(make):
    pooling = build(make).eval()
    a, b, c = (streamed(pooling, [30 * torch.randn(2, n, 3, dtype=torch.float64)]) for n in (3, 1, 5))
    read = pooling.readout
    close(read(a.merge(b)), read(b.merge(a)))
    close(read(a.merge(b).merge(c)), read(a.merge(b.merge(c))))
    for whole in (a.merge(a.empty()), a.empty().merge(a)):
        assert all(torch.equal(getattr(whole, f), getattr(a, f)) for f in ("total", "mass", "peak", "count"))


@every_pooler
def test_the_order_of_the_elements_and_of_the_sets(make):
    pooling = build(make).eval()
    x = torch.randn(3, 9, 3, dtype=torch.float64)
    close(pooling(x[:, torch.randperm(9)]), pooling(x))
    close(pooling(x.flip(0)), pooling(x).flip(0))
    close(pooling(x[1:2]), pooling(x)[1:2])


@every_pooler
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e30])
def test_a_mask_is_removal_whatever_stands_in_the_padding(make, poison):
    pooling = build(make).eval()
    x = torch.randn(3, 6, 3, dtype=torch.float64)
    mask = torch.tensor([[1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 0]]).bool()
    dirty = torch.where(mask[..., None], x, poison).requires_grad_()
    whole = pooling(dirty, mask)
    pieces = [pooling(x[b : b + 1, mask[b]]) for b in range(3)]
    close(whole, torch.cat(pieces))
    state = pooling.init_state(3)
    for part, m in zip(dirty.split(4, 1), mask.split(4, 1), strict=True):
        state = pooling.update(state, part, m)
    close(pooling.readout(state), whole)
    assert state.count.tolist() == [3, 6, 1]
    for out in (whole, pooling.readout(state)):
        (gradient,) = torch.autograd.grad(out.square().sum(), dirty, retain_graph=True)
        assert bool(gradient.isfinite().all())
        assert bool((gradient[~mask] == 0).all())


@every_pooler
def test_weights_are_multiplicities(make):
    pooling = build(make).eval()
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    weights = torch.tensor([[1, 3, 0, 2], [2, 1, 1, 0]])
    repeated = [x[b].repeat_interleave(weights[b], 0)[None] for b in range(2)]
    expected = torch.cat([pooling(r) for r in repeated])
    for out in (pooling(x, weights=weights), pooling(x, weights=weights.double())):
        close(out, expected)
    state = pooling.init_state(2)
    for part, w in zip(x.split(3, 1), weights.split(3, 1), strict=True):
        state = pooling.update(state, part, weights=w)
    close(pooling.readout(state), expected)
    assert state.count.tolist() == [6, 4]
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 1]]).bool()
    nan_at_padding = torch.where(mask, weights.double(), torch.nan)
    close(pooling(x, mask, nan_at_padding), pooling(x, weights=weights * mask))


@every_pooler
def test_empty_sets_and_single_elements_are_defined(make):
    pooling = build(make)
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    nothing = pooling.eval().readout(pooling.init_state(2))
    assert bool(nothing.isfinite().all())
    mask = torch.zeros(2, 5, dtype=torch.bool)
    close(pooling(x, mask), nothing)
    close(pooling(x[:, :0]), nothing)
    close(pooling(x, weights=torch.zeros(2, 5)), nothing)
    mask[1, 2] = True
    half = pooling(x.requires_grad_(), mask)
    close(half[:1], nothing[:1])
    close(half[1:], pooling(x[1:, 2:3]))
    half.square().sum().backward()
    assert bool(x.grad.isfinite().all())
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in pooling.parameters())


@every_pooler
def test_a_batch_of_no_sets(make):
    pooling = build(make).eval()
    x = torch.randn(0, 5, 3, dtype=torch.float64)
    for out in (pooling(x), pooling.readout(pooling.update(streamed(pooling, [x], batch=0), x))):
        assert out.shape == (0, pooling.num_slots, pooling.out_dim)


@every_pooler
def test_reading_and_updating_leave_the_state_alone_and_streams_interleave(make):
    pooling = build(make).train()
    x, y = torch.randn(2, 2, 6, 3, dtype=torch.float64)
    a, b = pooling.init_state(2), pooling.init_state(2)
    a, b = pooling.update(a, x[:, :3]), pooling.update(b, y[:, :2])
    kept = a.clone()
    once, again = pooling.readout(a), pooling.readout(a)
    assert torch.equal(once, again)
    longer = pooling.update(a, x[:, 3:])
    assert all(torch.equal(getattr(a, f), getattr(kept, f)) for f in vars(a))
    b = pooling.update(b, y[:, 2:])
    close(pooling.readout(longer), pooling.readout(streamed(pooling, [x], state=a.empty())))
    close(pooling.readout(b), pooling.readout(streamed(pooling, [y], state=b.empty())))


@every_pooler
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "weights only"])
def test_a_stream_is_saved_and_resumed_in_training(make, how):
    pooling = build(make).train()
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    state = streamed(pooling, [x[:, :4]])
    if how == "deepcopy":
        resumed = copy.deepcopy(state)
    else:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        resumed = torch.load(file, weights_only=how == "weights only")
    assert isinstance(resumed, setenc.SetState)
    again = pooling.readout(pooling.update(resumed, x[:, 4:]))
    torch.testing.assert_close(again, pooling.readout(pooling.update(state, x[:, 4:])), rtol=0, atol=0)


@every_pooler
def test_gradients_of_the_stream_are_those_of_the_whole_set(make):
    pooling = build(make).train()
    x = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    leaves = [x, *pooling.parameters()]

    def gradients(out):
        return torch.autograd.grad(out.sin().sum(), leaves, allow_unused=True, materialize_grads=True)

    torch.manual_seed(3)
    whole = gradients(pooling(x))
    torch.manual_seed(3)
    for ours, theirs in zip(gradients(pooling.readout(streamed(pooling, x.split(3, 1)))), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    pooling.eval()
    assert torch.autograd.gradcheck(pooling, (x,))


@every_pooler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_inputs_keep_a_float32_state(make, dtype):
    pooling = build(make, torch.float32).eval()
    x = torch.randn(2, 64, 3).to(dtype)
    state = streamed(pooling, x.split(1, 1))
    assert {state.total.dtype, state.mass.dtype, state.peak.dtype} == {torch.float32}
    close(pooling.readout(state), pooling(x.float()), torch.float32)
    close(pooling(x), pooling(x.float()), torch.float32)
    half = copy.deepcopy(pooling).to(dtype)
    state = streamed(half, x.split(1, 1))
    assert state.total.dtype == torch.float32
    assert half.readout(state).dtype == half(x).dtype == dtype
    error = 8 * torch.finfo(dtype).eps * pooling(x.float()).abs().amax()
    assert float((half.readout(state).float() - pooling(x.float())).abs().amax()) < error
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = streamed(pooling, x.float().split(16, 1))
        assert state.total.dtype == torch.float32
        assert float((pooling.readout(state).float() - pooling(x.float())).abs().amax()) < 8 * 2**-7 * 3


@every_pooler
def test_ragged_sets_equal_their_sets_one_by_one(make):
    pooling = build(make).eval()
    enc = setenc.UMBC(None, pooling, None)
    sizes = [3, 0, 150, 64, 1]
    sets = [torch.randn(n, 3, dtype=torch.float64) for n in sizes]
    expected = torch.cat([pooling(s[None]) for s in sets])
    ragged = setenc.Ragged.of(sets)
    nested = torch.nested.nested_tensor(sets, layout=torch.jagged)
    for form in (sets, ragged, nested):
        close(enc(form), expected)
        close(enc.readout(enc.update(enc.update(enc.init_state(5), form), [s[:0] for s in sets])), expected)
    weights = [torch.rand(n, dtype=torch.float64) for n in sizes]
    weighted = torch.cat([pooling(s[None], weights=w[None]) for s, w in zip(sets, weights, strict=True)])
    close(enc(ragged, weights=torch.cat(weights)), weighted)


@every_pooler
def test_bad_input_is_refused(make):
    pooling = build(make).eval()
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    for bad, error in [
        ((x[0],), "shape|state's 2 sets"),
        ((x[..., :2],), "in_dim"),
        ((x, torch.ones(2, 4, dtype=torch.bool)), "mask must have shape"),
        ((x, None, torch.ones(5)), "weights must have shape"),
        ((x, None, -torch.ones(2, 5)), "not negative"),
        ((x, None, torch.full((2, 5), torch.nan)), "finite"),
        ((torch.where(x > 1, torch.nan, x),), "must be finite"),
        ((torch.where(x > 1, torch.inf, x),), "must be finite"),
    ]:
        with pytest.raises(ValueError, match=error):
            pooling(*bad)
        with pytest.raises(ValueError, match=error):
            pooling.update(pooling.init_state(2), *bad)
    with pytest.raises(TypeError, match="bool tensor"):
        pooling(x, torch.ones(2, 5))
    with pytest.raises(TypeError, match=r"float64.*float32"):
        copy.deepcopy(pooling).float()(x)
    with pytest.raises(TypeError, match="floating-point"):
        pooling(torch.ones(2, 5, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="state's 3 sets"):
        pooling.update(pooling.init_state(3), x)
    with pytest.raises(ValueError, match="equal shapes"):
        pooling.init_state(3).merge(pooling.init_state(2))
    with pytest.raises(TypeError, match="SetState"):
        pooling.init_state(3).merge(x)


@every_pooler
def test_settings_print_and_modules_pickle(make):
    pooling = build(make).eval()
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    assert "in_dim=3, dim=8" in repr(pooling)
    assert torch.equal(copy.deepcopy(pooling)(x), pooling(x))
