"""The mass read-out: log of the mean weight of each slot and head, whole and streamed, with its gradients."""

import pytest
import torch
from torch import nn

import setenc

ACTIVATIONS = ("softmax", "sigmoid", "slot-sigmoid", "slot-softmax", "slot-exp")
POOLINGS = {
    **{a: (lambda a=a: setenc.SlotPooling(8, 8, 3, num_heads=2, activation=a)) for a in ACTIVATIONS},
    "many slots": lambda: setenc.SlotPooling(8, 8, 12, num_heads=8, slots="learned"),
    "mean": lambda: setenc.DeepSetsPooling(8, 8, "mean"),
    "gated": lambda: setenc.GatedAttentionPooling(8, 8),
}
every_pooling = pytest.mark.parametrize("pooling", POOLINGS.values(), ids=POOLINGS)


def encoder(pooling=POOLINGS["softmax"], decoder=None):
    torch.manual_seed(4)
    extractor = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8))
    return setenc.UMBC(extractor, pooling(), decoder or nn.Linear(8, 2), mass_feature=True).double()


def sets(batch=3, n=11):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch, n, 2, generator=g, dtype=torch.float64)
    return x, torch.rand(batch, n, generator=g) < 0.8, torch.rand(batch, n, generator=g, dtype=torch.float64) + 0.2


def close(ours, theirs, tolerance=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_it_is_the_log_of_the_mean_weight(activation, weighted):
    """Against the table of activations; a softmax over the set leaves out a constant of each slot."""
    pooling = setenc.SlotPooling(3, 8, 4, num_heads=2, activation=activation, slots="learned").double()
    x, w = torch.randn(2, 7, 3, dtype=torch.float64), torch.rand(2, 7, dtype=torch.float64) + 0.1
    w = w if weighted else torch.ones_like(w)
    q = pooling.query(pooling.slot_mean).unflatten(-1, (2, 4)).transpose(0, 1)
    bias = 0 if activation == "softmax" else pooling.key_value.bias[:8]
    keys = (x @ pooling.key_value.weight[:8].T + bias).unflatten(-1, (2, 4)).transpose(1, 2)
    logits = (q @ keys.mT) / 2
    weights = {
        "softmax": logits.exp(),
        "sigmoid": logits.sigmoid(),
        "slot-sigmoid": logits.sigmoid() / logits.sigmoid().sum(2, keepdim=True),
        "slot-softmax": logits.softmax(2),
        "slot-exp": (logits - logits.amax(2, keepdim=True)).exp(),
    }[activation]
    expected = ((weights * w[:, None, None]).sum(-1) / w.sum(1)[:, None, None]).log()
    close(pooling.state_of(x, weights=w).log_mean_weight(), expected)
    state = pooling.update(pooling.update(pooling.init_state(2), x[:, :3], None, w[:, :3]), x[:, 3:], None, w[:, 3:])
    close(state.log_mean_weight(), expected)


@every_pooling
def test_streams_merges_masks_weights_and_ragged_sets(pooling):
    enc = encoder(pooling).eval()
    x, mask, weights = sets()
    for options in ({}, {"mask": mask}, {"weights": weights}, {"mask": mask, "weights": weights}):
        expected = enc(x, **options)
        state = enc.init_state(3)
        other = state.empty()
        for i, part in enumerate((slice(0, 4), slice(4, 5), slice(5, 11))):
            own = {name: t[:, part] for name, t in options.items()}
            if i == 1:
                other = enc.update(other, x[:, part], **own)
            else:
                state = enc.update(state, x[:, part], **own)
        close(enc.readout(state.merge(other)), expected)
        close(enc.readout(other.merge(state)), expected)
        for mode in ("full", "exact", "sampled", "none"):
            close(setenc.encode(enc, x, chunk_size=4, gradient=mode, **options), expected)
    close(enc([s[m] for s, m in zip(x, mask, strict=True)]), enc(x, mask))
    twice = torch.cat((x, x), 1)
    close(enc(twice), enc(x))
    close(enc(x, weights=2 * weights), enc(x, weights=weights))


@every_pooling
def test_exact_gradients_are_those_of_the_whole_set(pooling):
    enc = encoder(pooling, nn.Sequential(setenc.SAB(8, 2), nn.Linear(8, 2))).eval()
    x, mask, weights = sets()
    x.requires_grad_()
    leaves = [x, *enc.parameters()]

    def gradients(out):
        return torch.autograd.grad(out.sin().sum(), leaves, allow_unused=True, materialize_grads=True)

    for options in ({}, {"mask": mask}, {"mask": mask, "weights": weights}):
        whole = gradients(enc(x, **options))
        for mode in ("full", "exact"):
            out = setenc.encode(enc, x, chunk_size=4, gradient=mode, **options)
            for ours, theirs in zip(gradients(out), whole, strict=True):
                close(ours, theirs, 1e-10)
    draws = {}
    for seed in range(40):
        noise = torch.Generator().manual_seed(seed)
        found = gradients(setenc.encode(enc, x, chunk_size=4, gradient="sampled", generator=noise))
        draws.setdefault(tuple((found[0] != 0).any(2).any(0).tolist()), found)
    assert len(draws) == 3
    for each, theirs in zip(zip(*draws.values(), strict=True), gradients(enc(x)), strict=True):
        close(torch.stack(each).mean(0), theirs, 1e-10)
    assert torch.autograd.gradcheck(lambda x: enc(x, mask), (x,))


@every_pooling
def test_empty_sets_are_finite(pooling):
    enc = encoder(pooling)
    x, mask, _ = sets()
    mask[1] = False
    outs = [enc(x, mask), enc(x[:, :0]), enc([x[0], x[1, :0]]), enc.readout(enc.init_state(2))]
    for out in outs:
        assert bool(out.isfinite().all())
        enc.zero_grad()
        out.sum().backward()
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in enc.parameters())
    assert not bool(enc.init_state(2).log_mean_weight().any())


def test_blocks_of_a_large_set(monkeypatch):
    enc = encoder().eval()
    x = torch.randn(2, 50, 2, dtype=torch.float64, requires_grad=True)
    expected = enc(x)
    (gradient,) = torch.autograd.grad(expected.sin().sum(), x)
    monkeypatch.setattr("setenc.pooling.slots._BLOCK", 16)
    close(enc(x), expected)
    close(torch.autograd.grad(enc(x).sin().sum(), x)[0], gradient, 1e-10)


def test_a_mean_that_forgets_and_a_mass_that_tells():
    """Two sets with the same means in every slot, and other shares: only the mass tells them apart."""
    pooling = setenc.SlotPooling(2, 2, 2, num_heads=1, slots="learned", residual=False, output_norm=False)
    with torch.no_grad():
        pooling.key_value.weight.copy_(torch.cat((torch.eye(2), torch.eye(2))))
        pooling.key_value.bias.zero_()
        pooling.query.weight.copy_(200 * torch.eye(2))
        pooling.query.bias.zero_()
        pooling.slot_mean.copy_(torch.eye(2))
    x = torch.eye(2)[torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1]])]
    blind, seeing = (setenc.UMBC(None, pooling, None, mass_feature=on) for on in (False, True))
    torch.testing.assert_close(*blind(x))
    with torch.no_grad():
        seeing.mass_map.weight.fill_(1)
    # Slot 0 saw 3 of 4 elements, then 1 of 4; slot 1 the other way round.
    gap = torch.tensor(3.0).log()
    torch.testing.assert_close(
        seeing(x)[0] - seeing(x)[1], torch.stack((gap, -gap))[:, None].expand(2, 2), atol=1e-4, rtol=0
    )


def test_poolings_that_select_have_no_mass():
    with pytest.raises(ValueError, match="mass_feature needs slots that weigh elements; DeepSetsPooling has none"):
        setenc.UMBC(None, setenc.DeepSetsPooling(2, 2, "max"), None, mass_feature=True)
