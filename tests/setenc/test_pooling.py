"""Poolings against their formulas: five activations, large logits, shifts, Deep Sets, gated attention, ABMIL."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import setenc

ACTIVATIONS = ("sigmoid", "softmax", "slot-sigmoid", "slot-softmax", "slot-exp")


def slot_pooling(activation="softmax", dim=8, num_heads=2, **options):
    torch.manual_seed(1)
    options = {"residual": False, "output_norm": False, **options}
    return setenc.SlotPooling(3, dim, 4, num_heads=num_heads, activation=activation, **options).double().eval()


def reference(pooling, x):
    """Section 2 of the notes, head by head, one set at a time, weights as the table of section 3 has them."""
    d = pooling.out_dim // pooling.num_heads
    slots = pooling.slot_norm(pooling.slot_mean)
    queries, keys, values = pooling.query(slots), *pooling.key_value(x).chunk(2, -1)
    out = torch.zeros(len(x), pooling.num_slots, pooling.out_dim, dtype=x.dtype)
    for h in range(pooling.num_heads):
        part = slice(h * d, (h + 1) * d)
        w = torch.einsum("kd,bnd->bkn", queries[:, part], keys[..., part]) / math.sqrt(d)
        weights = {
            "sigmoid": lambda w: w.sigmoid(),
            "softmax": lambda w: (w - w.amax(-1, keepdim=True)).exp(),
            "slot-sigmoid": lambda w: w.sigmoid() / w.sigmoid().sum(1, keepdim=True),
            "slot-softmax": lambda w: w.softmax(1),
            "slot-exp": lambda w: (w - w.amax(1, keepdim=True)).exp(),
        }[pooling.activation](w)
        out[..., part] = (weights / weights.sum(-1, keepdim=True)) @ values[..., part]
    return pooling.output_norm(out + queries if pooling.residual else out)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "options", [{}, {"residual": True, "output_norm": True}, {"slot_norm": True, "slot_dim": 5, "slots": "learned"}]
)
@pytest.mark.parametrize("num_heads", [1, 4])
@pytest.mark.parametrize("fold", [0, 1000])
def test_activations_heads_residual_and_norms(activation, options, num_heads, fold, monkeypatch):
    """Whole and streamed, with the slots before and after the maps to keys and values."""
    monkeypatch.setattr("setenc.pooling.slots._FOLD", fold)
    pooling = slot_pooling(activation, num_heads=num_heads, **options)
    assert pooling.folded == (fold > 0)
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    expected = reference(pooling, x)
    torch.testing.assert_close(pooling(x), expected, rtol=1e-12, atol=1e-12)
    state = pooling.update(pooling.update(pooling.init_state(2), x[:, :5]), x[:, 5:])
    torch.testing.assert_close(pooling.readout(state), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_logits_of_a_thousand(activation):
    """The official clamp at 10 is off by 82 % here; the softmax of float64 is the reference."""
    pooling = slot_pooling(activation).requires_grad_(False)
    x = torch.randn(1, 200, 3, dtype=torch.float64)
    q, k = pooling.query(pooling.slot_mean), pooling.key_value(x)[..., :8]
    logits = (q.unflatten(-1, (2, 4)).transpose(0, 1) @ k[0].unflatten(-1, (2, 4)).permute(1, 2, 0)) / 2
    pooling.query.weight.mul_(1000 / logits.abs().max())
    pooling.query.bias.mul_(1000 / logits.abs().max())
    expected = reference(pooling, x)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-3)):
        single = slot_pooling(activation).requires_grad_(False).to(dtype)
        single.load_state_dict(pooling.state_dict())
        state = single.init_state(1)
        for element in x.to(dtype).split(1, 1):
            state = single.update(state, element)
        for out in (single.readout(state), single(x.to(dtype))):
            torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_softmax_is_invariant_to_a_shift_of_all_logits(shift):
    pooling = slot_pooling().requires_grad_(False)
    x = torch.randn(1, 50, 3, dtype=torch.float64)
    x[..., 0] = 1
    before = pooling(x)
    # A feature that all elements share adds up to the shift in slot 0, and to something else in the others.
    head = pooling.query(pooling.slot_mean)[0, :4]
    pooling.key_value.weight[:4, 0] += 2 * shift * head / head.square().sum()
    state = pooling.init_state(1)
    for chunk in x.split(9, 1):
        state = pooling.update(state, chunk)
    assert float(state.peak[0, 0, 0]) == pytest.approx(shift, rel=1e-2)
    torch.testing.assert_close(pooling.readout(state), before, rtol=1e-10, atol=1e-10)


def test_blocks_of_a_large_set_give_values_and_gradients(monkeypatch):
    monkeypatch.setattr("setenc.pooling.slots._BLOCK", 4)
    pooling = slot_pooling("slot-softmax")
    x = torch.randn(2, 11, 3, dtype=torch.float64, requires_grad=True)
    out = pooling(x)
    torch.testing.assert_close(out, reference(pooling, x), rtol=1e-12, atol=1e-12)
    leaves = [x, *pooling.key_value.parameters(), *pooling.query.parameters(), pooling.slot_mean]
    ours = torch.autograd.grad(out.sin().sum(), leaves)
    theirs = torch.autograd.grad(reference(pooling, x).sin().sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("activation", ["softmax", "slot-sigmoid"])
@pytest.mark.parametrize("fold", [0, 1000])
@torch.no_grad()
def test_a_large_chunk_is_taken_in_turns_without_gradients(activation, fold, monkeypatch):
    monkeypatch.setattr("setenc.pooling.slots._FOLD", fold)
    monkeypatch.setattr("setenc.pooling.base._CACHED", 1)
    pooling = slot_pooling(activation)
    x, mask = torch.randn(2, 600, 3, dtype=torch.float64), torch.rand(2, 600) < 0.5
    mask[0, :300] = False
    mask[1] = False
    weights = torch.rand(2, 600, dtype=torch.float64)
    for own in ((None, None), (mask, None), (mask, weights)):
        start = pooling.update(pooling.init_state(2), x[:, :5])
        state = pooling.update(start, x, *own)
        with torch.enable_grad():
            whole = pooling.update(start, x, *own)
        for name in ("total", "mass", "peak", "count"):
            torch.testing.assert_close(getattr(state, name), getattr(whole, name), rtol=1e-12, atol=1e-12)
    x[1, 400] = torch.inf
    with pytest.raises(ValueError, match="must be finite; 3 of"):
        pooling.update(start, x)


def test_attention_of_a_stream_without_elements_is_0():
    pooling = slot_pooling()
    x, nothing = torch.randn(2, 5, 3, dtype=torch.float64), torch.zeros(2, 5, dtype=torch.bool)
    state = pooling.update(pooling.init_state(2), x, nothing)
    assert bool((pooling.attention(state, x, nothing) == 0).all())


def test_random_slots_are_sampled_once_a_stream_in_training_only():
    pooling = slot_pooling(slots="random", num_heads=1)
    with torch.no_grad():
        pooling.query.weight.copy_(torch.eye(8))
        pooling.query.bias.zero_()
    assert torch.equal(pooling.init_state(1).slots[:, :8], pooling.slot_mean)
    pooling.train()
    a, b = pooling.init_state(1), pooling.init_state(1)
    assert not torch.equal(a.slots, b.slots)
    noise = (a.slots[:, :8] - pooling.slot_mean) / F.softplus(pooling.slot_raw_std)
    assert 0.5 < float(noise.detach().std()) < 1.5
    assert torch.equal(a.empty().slots, a.slots)
    with pytest.raises(ValueError, match="same slots"):
        a.merge(b)
    same = [pooling.init_state(1, generator=torch.Generator().manual_seed(7)).slots for _ in range(2)]
    assert torch.equal(*same)
    assert slot_pooling(slots="learned").train().init_state(1).slots is not None
    a.slots.sum().backward()
    assert pooling.slot_mean.grad is not None
    assert pooling.slot_raw_std.grad is not None


@pytest.mark.parametrize("activation", ["slot-sigmoid", "slot-softmax", "slot-exp"])
def test_one_slot_of_a_slot_normalised_activation_is_the_mean(activation):
    """Section 3 of the notes: with K = 1 every weight is 1."""
    pooling = setenc.SlotPooling(3, 8, 1, activation=activation, residual=False, output_norm=False).double()
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    torch.testing.assert_close(pooling(x)[:, 0], pooling.key_value(x)[..., 8:].mean(1))


def test_a_set_twice_and_a_single_element():
    pooling = slot_pooling()
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(pooling(torch.cat((x, x), 1)), pooling(x))
    value = pooling.key_value(x[:, :1])[..., 8:]
    torch.testing.assert_close(pooling(x[:, :1]), value.expand(-1, 4, -1))


@pytest.mark.parametrize("reduce", ["mean", "sum", "max"])
def test_deep_sets(reduce):
    pooling = setenc.DeepSetsPooling(3, 8, reduce).double()
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    values = pooling.value(x)
    expected = {"mean": values.mean(1), "sum": values.sum(1), "max": values.amax(1)}[reduce]
    torch.testing.assert_close(pooling(x)[:, 0], expected)
    assert torch.equal(pooling(x[:, :0]), torch.zeros(2, 1, 8, dtype=torch.float64))


def test_gated_attention_is_abmil():
    pooling = setenc.GatedAttentionPooling(3, 8, hidden_dim=5).double()
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    h = pooling.value(x)
    squash, gate = pooling.gate(h).chunk(2, -1)
    logits = pooling.logit(squash.tanh() * gate.sigmoid())[..., 0]
    torch.testing.assert_close(pooling.logits(x), logits)
    torch.testing.assert_close(pooling(x), logits.softmax(1)[:, None] @ h)


@pytest.mark.parametrize("make", [lambda: slot_pooling("slot-sigmoid"), lambda: setenc.GatedAttentionPooling(3, 8)])
def test_attention_is_read_in_a_second_pass(make, monkeypatch):
    monkeypatch.setattr("setenc.pooling.slots._FOLD", 0)
    pooling = make().double()
    enc = setenc.UMBC(None, pooling, None)
    x, weights = torch.randn(2, 7, 3, dtype=torch.float64), torch.rand(2, 7, dtype=torch.float64)
    mask = torch.rand(2, 7) < 0.7
    state = enc.update(enc.init_state(2), x, mask, weights)
    parts = zip(*(t.split(3, 1) for t in (x, mask, weights)), strict=True)
    shares = torch.cat([enc.attention(state, *part) for part in parts], -1)
    torch.testing.assert_close(shares.sum(-1), torch.ones_like(state.mass))
    assert bool((shares[~mask[:, None, None].expand_as(shares)] == 0).all())
    values = pooling.value(x) if make()._get_name().startswith("Gated") else pooling.key_value(x)[..., 8:]
    means = shares @ values.unflatten(-1, (pooling.num_heads, -1)).transpose(1, 2)
    torch.testing.assert_close(means.transpose(1, 2).flatten(2), pooling.readout(state))
    mean = setenc.DeepSetsPooling(3, 8).double()
    with pytest.raises(NotImplementedError, match="DeepSetsPooling gives its elements no attention"):
        mean.attention(mean.init_state(2), x)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="multiple of num_heads"):
        setenc.SlotPooling(3, 8, 4, num_heads=3)
    with pytest.raises(ValueError, match="activation must be one of 'sigmoid'"):
        setenc.SlotPooling(3, 8, 4, activation="relu")
    with pytest.raises(ValueError, match="slots must be one of"):
        setenc.SlotPooling(3, 8, 4, slots="fixed")
    with pytest.raises(ValueError, match="num_slots must be at least 1"):
        setenc.SlotPooling(3, 8, 0)
    with pytest.raises(TypeError, match="in_dim must be an int"):
        setenc.DeepSetsPooling(3.0, 8)
    with pytest.raises(ValueError, match="reduce must be one of"):
        setenc.DeepSetsPooling(3, 8, "min")


@pytest.mark.parametrize(
    "make", [lambda: setenc.SlotPooling(8, 8, 4, num_heads=2), lambda: setenc.GatedAttentionPooling(8, 8)]
)
def test_attention_of_a_memory_map_is_streamed(make, tmp_path):
    """`update` and `attention` take the arrays that `encode` takes, read-only ones too, without a warning."""
    np.save(tmp_path / "bag.npy", np.random.default_rng(0).normal(size=(1, 60, 5)).astype(np.float32))
    bag = np.load(tmp_path / "bag.npy", mmap_mode="r")
    torch.manual_seed(0)
    enc = setenc.UMBC(torch.nn.Linear(5, 8), make(), setenc.MLPDecoder(8, 1)).eval()
    chunks = [bag[:, i : i + 25] for i in range(0, 60, 25)]
    mask = np.arange(60)[None] != 7
    state = enc.init_state(1)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for i, chunk in enumerate(chunks):
            state = enc.update(state, chunk, mask[:, 25 * i : 25 * (i + 1)], np.ones(chunk.shape[:2], np.float32))
        shares = torch.cat([enc.attention(state, chunk) for chunk in chunks], -1)
        whole = torch.from_numpy(bag.copy())
        torch.testing.assert_close(enc.readout(state), enc(whole, torch.from_numpy(mask)))
    counts = shares.mean((1, 2))
    assert counts.shape == (1, 60)
    assert float(counts[0, mask[0]].sum()) == pytest.approx(1, abs=1e-5)
    with pytest.raises(TypeError, match=r"must be a torch.Tensor"):
        enc.attention(state, [[1.0]])


@pytest.mark.parametrize(
    "make",
    [
        *(lambda a=a: setenc.SlotPooling(3, 8, 4, activation=a) for a in ("softmax", "sigmoid")),
        lambda: setenc.DeepSetsPooling(3, 8, "mean"),
        lambda: setenc.DeepSetsPooling(3, 8, "max"),
        lambda: setenc.GatedAttentionPooling(3, 8),
        lambda: setenc.InstancePooling(3, 8, 2),
        lambda: setenc.DSMILPooling(3, 8),
    ],
    ids=["softmax", "sigmoid", "mean", "max", "gated", "instances", "critical instance"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_of_any_size_weigh_in_proportion(make, dtype):
    """A mean sees ratios of weights only, also of those beyond the numbers of its own dtype."""
    pooling, x = make().eval(), torch.randn(2, 6, 3)
    weights = torch.rand(2, 6, dtype=dtype) + 0.5
    expected = pooling(x, weights=weights)
    for size in (1e-36, 1e38) if dtype == torch.float32 else (1e-250, 1e-60, 1e60, 1e250):
        given = size * weights
        torch.testing.assert_close(pooling(x, weights=given), expected, rtol=1e-4, atol=1e-4)
        state = pooling.init_state(2)
        for again in range(pooling.num_passes):
            state = pooling.next_pass(state) if again else state
            for part in (slice(0, 2), slice(2, 6)):
                state = pooling.update(state, x[:, part], weights=given[:, part])
        torch.testing.assert_close(pooling.readout(state), expected, rtol=1e-4, atol=1e-4)
