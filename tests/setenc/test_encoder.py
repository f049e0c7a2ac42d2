"""UMBC: streams against whole sets, images and tokens as elements, sizes, BatchNorm, ragged batches, decoders."""

import copy

import pytest
import torch
from torch import nn

import setenc


def encoder(extractor=None, **options):
    torch.manual_seed(2)
    extractor = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 8)) if extractor is None else extractor
    pooling = setenc.SlotPooling(8, 16, 4)
    return setenc.UMBC(extractor, pooling, setenc.SetTransformerDecoder(16, out_dim=5), **options).double().eval()


def stream(enc, chunks, masks=None, batch=3):
    state = enc.init_state(batch)
    for i, chunk in enumerate(chunks):
        state = enc.update(state, chunk, None if masks is None else masks[i])
    return enc.readout(state)


def test_predictions_at_any_time_are_those_of_the_elements_so_far():
    enc = encoder()
    x = torch.randn(3, 30, 2, dtype=torch.float64)
    state, seen = enc.init_state(3), 0
    for chunk in x.split([1, 9, 15, 5], 1):
        state, seen = enc.update(state, chunk), seen + chunk.shape[1]
        torch.testing.assert_close(enc.readout(state), enc(x[:, :seen]), rtol=1e-12, atol=1e-12)


def test_padded_sets_of_lengths_1_to_999_in_100_chunks():
    """Official test list, 7b: many chunks hold nothing of the short sets."""
    enc = encoder().float()
    sizes = torch.randint(1, 1000, (8,))
    x = torch.randn(8, 1000, 2)
    mask = torch.arange(1000) < sizes[:, None]
    x[~mask] = torch.nan
    expected = torch.cat([enc(x[b : b + 1, : sizes[b]]) for b in range(8)])
    torch.testing.assert_close(enc(x, mask), expected, rtol=1e-5, atol=1e-5)
    out = stream(enc, x.split(10, 1), mask.split(10, 1), batch=8)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(enc(setenc.Ragged.from_mask(x, mask)), expected, rtol=1e-5, atol=1e-5)


def test_elements_may_be_images_or_tokens():
    images = encoder(nn.Sequential(nn.Flatten(2), nn.Linear(3 * 4 * 4, 8)))
    x = torch.randn(3, 10, 3, 4, 4, dtype=torch.float64)
    mask = torch.rand(3, 10) < 0.7
    torch.testing.assert_close(stream(images, x.split(4, 1), mask.split(4, 1)), images(x, mask))
    tokens = encoder(nn.Embedding(100, 8))
    x = torch.randint(100, (3, 10))
    x[~mask] = -1
    torch.testing.assert_close(stream(tokens, x.split(4, 1), mask.split(4, 1)), tokens(x, mask))
    torch.testing.assert_close(tokens([s[m] for s, m in zip(x, mask, strict=True)]), tokens(x, mask))


def test_only_the_size_feature_tells_a_set_from_twice_that_set():
    x = torch.randn(3, 7, 2, dtype=torch.float64)
    twice = torch.cat((x, x), 1)
    blind, seeing = encoder(), encoder(size_feature=True)
    torch.testing.assert_close(blind(twice), blind(x))
    assert not torch.allclose(seeing(twice), seeing(x), atol=1e-3)
    torch.testing.assert_close(stream(seeing, twice.split(5, 1)), seeing(twice))
    torch.testing.assert_close(seeing(x, weights=torch.full((3, 7), 2)), seeing(twice))
    mask = torch.arange(14).expand(3, -1) < 7
    torch.testing.assert_close(seeing(twice, mask), seeing(x))
    torch.testing.assert_close(seeing(list(twice)), seeing(twice))


def test_parts_are_checked():
    with pytest.raises(TypeError, match="pooling must be a setenc Pooling"):
        setenc.UMBC(None, nn.Linear(2, 2), None)
    with pytest.raises(TypeError, match=r"decoder must be an nn\.Module"):
        setenc.UMBC(None, setenc.DeepSetsPooling(2, 2), lambda x: x)
    enc = encoder()
    with pytest.raises(ValueError, match="in_dim"):
        encoder(nn.Linear(2, 7))(torch.randn(1, 3, 2, dtype=torch.float64))
    shorter = encoder(nn.Sequential(nn.Linear(2, 8), nn.Unflatten(1, (-1, 2)), nn.Flatten(2), nn.Linear(16, 8)))
    with pytest.raises(ValueError, match=r"shape \(B, n, in_dim\) = \(1, 4, 8\); got \(1, 2, 8\)"):
        shorter(torch.randn(1, 4, 2, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"float32.*float64"):
        enc(torch.randn(1, 3, 2))
    with pytest.raises(ValueError, match="leave mask away"):
        enc([torch.randn(3, 2, dtype=torch.float64)], torch.ones(1, 3, dtype=torch.bool))


def test_compiled_extractor():
    enc = encoder()
    x = torch.randn(3, 12, 2, dtype=torch.float64)
    expected = enc(x)
    seen = []

    def backend(graph, _):
        seen.append(graph)
        return graph

    enc.extractor = torch.compile(enc.extractor, backend=backend, fullgraph=True)
    torch.testing.assert_close(stream(enc, x.split(4, 1)), expected)
    assert len(seen) == 1, "chunks of one size compile once"


# --- ragged --------------------------------------------------------------------------------------------------------


def test_ragged_forms_and_checks():
    sets = [torch.randn(n, 2) for n in (3, 0, 2)]
    ragged = setenc.Ragged.of(sets)
    assert len(ragged) == 3
    assert ragged.sizes.tolist() == [3, 0, 2]
    nested = setenc.Ragged.of(torch.nested.nested_tensor(sets, layout=torch.jagged))
    assert torch.equal(nested.values, ragged.values)
    assert torch.equal(nested.offsets, ragged.offsets)
    for offsets in ([0, 3, 4], [1, 5], [0, 4, 3, 5]):
        with pytest.raises(ValueError, match="rise from 0"):
            setenc.Ragged(ragged.values, torch.tensor(offsets))
    with pytest.raises(TypeError, match="int64"):
        setenc.Ragged(ragged.values, torch.tensor([0.0, 5.0]))
    with pytest.raises(ValueError, match="equal features"):
        setenc.Ragged.of([torch.randn(2, 2), torch.randn(2, 3)])
    with pytest.raises(TypeError, match="non-empty list"):
        setenc.Ragged.of([])


def test_ragged_windows_of_nested_tensors():
    """Sets that are windows of longer ones, and those that differ in another dimension."""
    x = torch.randn(3, 10, 2, requires_grad=True)
    starts, sizes = [0, 2, 1], [3, 8, 9]
    nested = torch.nested.narrow(x, 1, torch.tensor(starts), torch.tensor(sizes), layout=torch.jagged)
    expected = torch.cat([x[b, s : s + n] for b, (s, n) in enumerate(zip(starts, sizes, strict=True))])
    ragged = setenc.Ragged.of(nested)
    assert ragged.sizes.tolist() == sizes
    assert torch.equal(ragged.values, expected)
    assert torch.equal(torch.autograd.grad(ragged.values.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])
    turned = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(2, 4)], layout=torch.jagged).transpose(1, 2)
    with pytest.raises(ValueError, match="differ in their first dimension"):
        setenc.Ragged.of(turned)


def test_the_gradient_of_equal_maxima_of_a_ragged_set_goes_to_the_first():
    enc = setenc.UMBC(None, setenc.DeepSetsPooling(2, 4, "max"), None)
    x = torch.ones(5, 70, 2, requires_grad=True)
    expected = torch.autograd.grad(enc(x).sum(), x)
    assert expected[0][:, 1:].abs().sum() == 0
    found = torch.autograd.grad(enc(setenc.Ragged(x.flatten(0, 1), torch.arange(0, 351, 70))).sum(), x)
    torch.testing.assert_close(found, expected)


def test_copies_of_a_state_keep_its_gradients():
    enc = encoder()
    state = enc.update(enc.init_state(3), torch.randn(3, 5, 2, dtype=torch.float64))
    for made in (copy.copy(state), copy.deepcopy(state)):
        assert torch.equal(enc.readout(made), enc.readout(state))
        assert made.total.requires_grad


def test_windows_cut_each_set_into_its_own_chunks():
    ragged = setenc.Ragged.of([torch.arange(5), torch.arange(10, 12), torch.arange(0)])
    rows, offsets = ragged.window(torch.tensor([1, 0, 0]), 2)
    assert ragged.values[rows].tolist() == [2, 3, 10, 11]
    assert offsets.tolist() == [0, 2, 4, 4]
    rows, offsets = ragged.window(torch.tensor([2, 1, 5]), 2)
    assert ragged.values[rows].tolist() == [4]
    assert offsets.tolist() == [0, 1, 1, 1]


# --- decoders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True])
def test_attention_blocks_follow_their_formula(norm):
    """Section 9.1 of the notes: Q' = fc(Q), h = Q' + softmax(Q' K' / sqrt(d / H)) V, h + relu(fc(h))."""
    block = setenc.SAB(8, 2, norm=norm).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    mab = block.attend
    q, (k, v) = mab.query(x), mab.key_value(x).chunk(2, -1)
    heads = [(q[..., s] @ k[..., s].mT / 2).softmax(-1) @ v[..., s] for s in (slice(0, 4), slice(4, 8))]
    h = mab.norms[0](q + torch.cat(heads, -1))
    torch.testing.assert_close(block(x), mab.norms[1](h + mab.feed(h).relu()))


@pytest.mark.parametrize("block", [lambda: setenc.SAB(8, 2), lambda: setenc.ISAB(8, 3, 2), lambda: setenc.PMA(8, 2, 2)])
def test_attention_blocks_take_masks(block):
    block = block().double()
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    short = block(x[:1, mask[0]])
    masked = block(x, mask)[:1]
    torch.testing.assert_close(masked if short.shape[1] == 2 else masked[:, mask[0]], short)


def test_shapes_of_decoders():
    slots = torch.randn(3, 6, 8)
    assert setenc.SetTransformerDecoder(8)(slots).shape == (3, 6, 8)
    assert setenc.SetTransformerDecoder(8, 1, out_dim=5, num_outputs=1, norm=True)(slots).shape == (3, 1, 5)
    assert setenc.MLPDecoder(8)(slots).shape == (3, 6, 8)
    assert setenc.MLPDecoder(8, 2, hidden_dim=32, num_layers=1)(slots).shape == (3, 6, 2)
    assert setenc.FSPoolDecoder(8, 2)(slots).shape == (3, 2)
    assert setenc.DIEMDecoder(8, 3, out_dim=2, num_heads=2)(slots).shape == (3, 3, 2)


def test_fspool_with_equal_weights_is_a_sum_and_with_the_first_rank_a_maximum():
    pool = setenc.FSPoolDecoder(8)
    pool.output = nn.Identity()
    slots = torch.randn(3, 6, 8)
    with torch.no_grad():
        pool.weight.fill_(1)
        torch.testing.assert_close(pool(slots), slots.sum(1))
        pool.weight.zero_()[:, 0] = 1
        torch.testing.assert_close(pool(slots), slots.amax(1))
        pool.weight.copy_(torch.arange(21.0).expand(8, -1))
        torch.testing.assert_close(pool.rank_weights(6)[:, 0], torch.linspace(0, 20, 6))
    assert pool(slots[:, :1]).shape == (3, 8)
    torch.testing.assert_close(pool(slots[:, torch.randperm(6)]), pool(slots))


def test_diem_fits_well_separated_components():
    """With a weak prior near the truth the EM steps give each cluster's share, mean and variance."""
    decoder = setenc.DIEMDecoder(2, 2, num_steps=5, prior_strength=1e-6).double()
    centres = torch.tensor([[-5.0, 0.0], [5.0, 1.0]], dtype=torch.float64)
    x = torch.cat((centres[0] + 0.1 * torch.randn(30, 2), centres[1] + 0.1 * torch.randn(10, 2))).double()
    with torch.no_grad():
        decoder.prior_mean.copy_(centres[None] + 0.5)
    share, mean, variance = decoder.mixture(x[None, None])
    torch.testing.assert_close(share[0, 0], torch.tensor([0.75, 0.25], dtype=torch.float64), rtol=1e-4, atol=0)
    for j, part in enumerate((x[:30], x[30:])):
        torch.testing.assert_close(mean[0, 0, j], part.mean(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(variance[0, 0, j], part.var(0, correction=0), rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="prior_strength must be a finite number > 0"):
        setenc.DIEMDecoder(2, prior_strength=0.0)
