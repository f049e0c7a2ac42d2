"""Streams on an accelerator: nothing is looked at while they run, and results are the processor's."""

import pytest
import torch
from torch import nn

import setenc

POOLINGS = {
    **{
        activation: (lambda activation=activation: setenc.SlotPooling(8, 8, 3, num_heads=2, activation=activation))
        for activation in ("sigmoid", "softmax", "slot-sigmoid", "slot-softmax", "slot-exp")
    },
    "many slots": lambda: setenc.SlotPooling(8, 8, 12, num_heads=8),
    **{reduce: lambda reduce=reduce: setenc.DeepSetsPooling(8, 8, reduce) for reduce in ("mean", "sum", "max")},
    "gated": lambda: setenc.GatedAttentionPooling(8, 8),
}
every_pooling = pytest.mark.parametrize("pooling", POOLINGS.values(), ids=POOLINGS)


def encoder(pooling):
    torch.manual_seed(4)
    extractor = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8))
    return setenc.UMBC(
        extractor, pooling(), setenc.SetTransformerDecoder(8, 1, num_heads=2), size_feature=True
    ).double()


def sets():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 11, 2, generator=g, dtype=torch.float64)
    return x, torch.rand(3, 11, generator=g) < 0.8, torch.rand(3, 11, generator=g, dtype=torch.float64) + 0.2


@pytest.mark.gpu
@every_pooling
@pytest.mark.parametrize("mode", ["full", "exact", "sampled"])
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients_are_the_processor_s(pooling, mode, masked):
    found = []
    for device in ("cpu", "cuda"):
        enc = encoder(pooling).to(device)
        x, mask, weights = (t.to(device) for t in sets())
        x.requires_grad_()
        options = {"mask": mask, "weights": weights} if masked else {}
        # Slots and drawn chunks come from one generator on the processor.
        noise = torch.Generator().manual_seed(7)
        out = setenc.encode(enc, x, chunk_size=4, gradient=mode, generator=noise, **options)
        gradients = torch.autograd.grad(out.sin().sum(), [x, *enc.parameters()], allow_unused=True)
        found.append([out, *(torch.zeros(()) if g is None else g for g in gradients)])
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.gpu
@every_pooling
@torch.no_grad()
def test_a_stream_never_waits_for_the_device(pooling):
    enc = encoder(pooling).cuda()
    x, mask, weights = (t.cuda() for t in sets())
    state = enc.init_state(3)
    enc.update(state, x)  # the extractor is tested once, on the first chunk, and that waits
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for part in zip(*(t.split(4, 1) for t in (x, mask, weights)), strict=True):
            state = enc.update(enc.update(state, *part), part[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(enc.readout(state).isfinite().all())


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["exact", "sampled", "none"])
def test_chunks_of_a_card_reach_an_encoder_on_the_processor(mode):
    x, mask, weights = sets()
    found = []
    for there in (False, True):
        enc = encoder(POOLINGS["softmax"])
        chunks = [
            tuple(t.cuda() if there else t for t in part)
            for part in zip(*(t.split(4, 1) for t in (x, mask, weights)), strict=True)
        ]
        out = setenc.encode(
            enc, lambda chunks=chunks: iter(chunks), chunk_size=4, gradient=mode,
            generator=torch.Generator().manual_seed(7),
        )  # fmt: skip
        found.append(out.detach())
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.gpu
@torch.no_grad()
def test_memory_of_a_stream_on_the_device_is_flat():
    enc = encoder(POOLINGS["softmax"]).float().cuda()
    peaks = []
    for chunks in (4, 4, 64):
        torch.cuda.reset_peak_memory_stats()
        state = enc.init_state(1)
        for _ in range(chunks):
            state = enc.update(state, torch.randn(1, 10_000, 2, device="cuda"))
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[2] == peaks[1]


@pytest.mark.parametrize(
    ("pooling", "bad"),
    # A maximum takes every element whose weight is not 0.
    [
        pytest.param(make, bad, id=f"{name}-{bad}")
        for name, make in POOLINGS.items()
        for bad in ("nan", "inf", "weight")
        if (name, bad) != ("max", "weight")
    ],
)
@pytest.mark.parametrize("where", [0, 5, 10])
def test_what_is_not_looked_at_while_streaming_is_found_when_read(pooling, bad, where, monkeypatch):
    """As on an accelerator: elements that are not finite poison the state, for good."""
    monkeypatch.setattr("setenc.checks.may_look", lambda x: False)
    pooling = pooling().double().eval()
    torch.manual_seed(1)
    x, weights = torch.randn(2, 11, 8, dtype=torch.float64), torch.ones(2, 11, dtype=torch.float64)
    if bad == "weight":
        weights[1, where] = -1
    else:
        x[1, where] = float(bad)
        if bad == "inf" and getattr(pooling, "reduce", None) == "max":
            x[1, where, 0] = torch.nan
    state = pooling.init_state(2)
    for part in zip(x.split(4, 1), weights.split(4, 1), strict=True):
        state = pooling.update(state, part[0], None, part[1])
    for read in (lambda: pooling.readout(state), lambda: pooling(x, None, weights)):
        with pytest.raises(ValueError, match="pooled slots must be finite"):
            read()
