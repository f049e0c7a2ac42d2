"""Extractors: each element by itself, found by a probe where not; images; padding; batch normalisation; settings."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import setenc


def encoder(extractor, in_dim=8, **options):
    torch.manual_seed(2)
    return setenc.UMBC(extractor, setenc.SlotPooling(in_dim, 16, 4), nn.Linear(16, 5), **options).double().eval()


def stream(enc, chunks, masks=None):
    state = enc.init_state(len(chunks[0]))
    for i, chunk in enumerate(chunks):
        state = enc.update(state, chunk, None if masks is None else masks[i])
    return enc.readout(state)


class Apply(nn.Module):
    """A function of features, after a linear map."""

    def __init__(self, function, **modules):
        super().__init__()
        torch.manual_seed(1)
        self.linear, self.function = nn.Linear(2, 8), function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.function(self, self.linear(x))


attention = lambda: nn.MultiheadAttention(8, 2, batch_first=True)
MIXING = {
    "minus the mean": lambda: Apply(lambda self, h: h - h.mean(1, keepdim=True)),
    "minus the mean of all sets": lambda: Apply(lambda self, h: h - h.mean((0, 1), keepdim=True)),
    "instance norm": lambda: Apply(lambda self, h: self.norm(h.mT).mT, norm=nn.InstanceNorm1d(8)),
    "group norm": lambda: Apply(lambda self, h: self.norm(h.mT).mT, norm=nn.GroupNorm(2, 8)),
    "attention": lambda: Apply(lambda self, h: h + self.att(h, h, h)[0], att=attention()),
    "transformer": lambda: Apply(
        lambda self, h: self.block(h), block=nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    ),
    "recurrent": lambda: Apply(lambda self, h: self.rnn(h)[0], rnn=nn.GRU(8, 8, batch_first=True)),
    "convolution over elements": lambda: Apply(lambda self, h: self.conv(h.mT).mT, conv=nn.Conv1d(8, 8, 3, padding=1)),
    "softmax over elements": lambda: Apply(lambda self, h: h.softmax(1)),
    "sorted": lambda: Apply(lambda self, h: h.sort(1).values),
    "place in the chunk": lambda: Apply(lambda self, h: h + torch.arange(h.shape[1])[:, None] / 10),
    "size of the chunk": lambda: Apply(lambda self, h: h / h.shape[1]),
    "elements as channels": lambda: Apply(lambda self, h: self.norm(h), norm=nn.LayerNorm((6, 8))),
}
SINGLE = {
    "perceptron": lambda: nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 8)),
    "layer norm": lambda: nn.Sequential(nn.Linear(2, 8), nn.LayerNorm(8)),
    "batch norm": lambda: nn.Sequential(nn.Linear(2, 8), setenc.PerElement(nn.BatchNorm1d(8))),
    "group norm inside an element": lambda: nn.Sequential(nn.Linear(2, 8), setenc.PerElement(nn.GroupNorm(2, 8))),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(2, 8)),
    "attention inside an element": lambda: nn.Sequential(
        setenc.PerElement(nn.Sequential(nn.Unflatten(1, (2, 1)), nn.Linear(1, 8), setenc.SAB(8, 2), nn.Flatten())),
        nn.Linear(16, 8),
    ),
    "large values": lambda: Apply(lambda self, h: 1e6 * h),
    "small values": lambda: Apply(lambda self, h: 1e-9 * h),
    "constant": lambda: Apply(lambda self, h: 0 * h),
}


@pytest.mark.parametrize("kind", MIXING)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extractors_that_mix_elements_are_refused(kind, training, dtype):
    x = torch.randn(3, 6, 2, dtype=dtype)
    ragged = list(x.double().to(dtype))
    calls = (
        lambda enc: enc(x),
        lambda enc: enc.update(enc.init_state(3), x),
        lambda enc: enc(ragged),
        lambda enc: setenc.encode(enc, x, chunk_size=6, gradient="exact"),
    )
    for call in calls if kind != "elements as channels" else calls[:2]:
        enc = encoder(MIXING[kind]()).to(dtype).train(training)
        with pytest.raises((ValueError, RuntimeError), match=r"mixes the elements|normalized_shape") as caught:
            call(enc)
        if kind == "elements as channels":
            assert "chunks of any size" in "".join(caught.value.__notes__)
    enc = encoder(MIXING[kind](), probe=False).to(dtype).train(training)
    assert enc(x).shape == (3, 4, 5)


@pytest.mark.parametrize("kind", MIXING)
def test_mixtures_are_found_beneath_dropout(kind):
    """The noise of dropout depends on the shape: the other elements are replaced instead of cut off."""
    if kind in ("place in the chunk", "size of the chunk"):
        enc = encoder(nn.Sequential(MIXING[kind](), nn.Dropout(0.2))).train()
        enc(torch.randn(3, 6, 2, dtype=torch.float64))  # not to be seen in training mode
        enc.eval()
    else:
        enc = encoder(nn.Sequential(MIXING[kind](), nn.Dropout(0.2))).train()
    with pytest.raises((ValueError, RuntimeError), match=r"mixes the elements|normalized_shape"):
        enc(torch.randn(3, 6, 2, dtype=torch.float64))


@pytest.mark.parametrize("kind", SINGLE)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_extractors_of_single_elements_pass(kind, training, dropout, dtype):
    if kind == "spectral norm" and dtype == torch.bfloat16:
        dtype = torch.float32
    enc = encoder(nn.Sequential(SINGLE[kind](), nn.Dropout(dropout))).to(dtype).train(training)
    for module in enc.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    x = 3 * torch.randn(3, 50, 2).to(dtype)
    mask = torch.rand(3, 50) < 0.7
    enc(x, mask)
    enc(list(x))
    enc(x[:1, :1])
    assert training not in enc._to_probe


def test_the_probe_looks_once_a_mode_and_leaves_everything_as_it_was():
    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.calls = nn.Linear(2, 8), 0
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            self.seen += 1
            return nn.functional.dropout(self.linear(x), 0.3, self.training)

    enc = encoder(Counted())
    x = torch.randn(2, 20, 2, dtype=torch.float64)
    enc(x[:1, :1])  # one element tells nothing
    assert enc.extractor.calls == 1
    enc(torch.ones_like(x))  # neither do equal ones
    assert enc.extractor.calls == 2
    counts = []
    for mode in (False, True, False, True):
        enc.train(mode)
        before = enc.extractor.calls
        enc(x)
        counts.append(enc.extractor.calls - before)
    assert counts[0] > 1
    assert counts[1] > 1
    assert counts[2:] == [1, 1]
    assert float(enc.extractor.seen) == 6
    draws = []
    for probe in (True, False):
        other = encoder(Counted(), probe=probe).train()
        torch.manual_seed(5)
        other(x)
        draws.append(float(torch.rand(())))
    assert draws[0] == draws[1]
    assert encoder(Counted(), probe=False)(x).shape == (2, 4, 5)


# --- batch normalisation -------------------------------------------------------------------------------------------


def normalised(**options):
    return nn.Sequential(nn.Linear(2, 8), setenc.PerElement(nn.BatchNorm1d(8, **options)))


@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_with_its_running_statistics_is_allowed_in_a_training_model(training):
    enc = encoder(normalised()).train(training)
    x = 2 + torch.randn(3, 7, 2, dtype=torch.float64)
    if training:
        for call in (lambda: enc(x), lambda: stream(enc, [x]), lambda: enc(list(x))):
            with pytest.raises(ValueError, match=r"BatchNorm '1\.module' is in training mode.*\.eval\(\) on it after"):
                call()
        enc.extractor[1].eval()
        assert enc.extractor.training
    enc.pooling.eval()
    torch.testing.assert_close(stream(enc, x.split(3, 1)), enc(x), rtol=1e-12, atol=1e-12)
    results = []
    for mode in ("full", "exact"):
        enc.zero_grad()
        setenc.encode(enc, x, chunk_size=3, gradient=mode).sin().sum().backward()
        results.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in enc.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_batch_norm_without_running_statistics_is_refused_in_eval_too():
    with pytest.raises(ValueError, match=r"BatchNorm '1\.module' keeps no running statistics"):
        encoder(normalised(track_running_stats=False))(torch.randn(3, 7, 2, dtype=torch.float64))


# --- images --------------------------------------------------------------------------------------------------------


def cnn():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 8))


@pytest.mark.parametrize("mode", ["full", "exact", "sampled"])
def test_image_networks_for_batches_encode_sets_of_images(mode):
    enc = encoder(setenc.PerElement(cnn()))
    x = torch.randn(2, 7, 3, 6, 6, dtype=torch.float64)
    mask = torch.rand(2, 7) < 0.7
    one_by_one = torch.stack([enc.extractor.module(s) for s in x])
    plain = setenc.UMBC(None, enc.pooling, enc.decoder)
    torch.testing.assert_close(enc(x, mask), plain(one_by_one, mask), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(stream(enc, x.split(3, 1), mask.split(3, 1)), enc(x, mask), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(enc(list(x)), enc(x), rtol=1e-12, atol=1e-12)
    setenc.encode(enc, x, chunk_size=3, gradient=mode, mask=mask).sum().backward()
    assert float(enc.extractor.module[0].weight.grad.abs().max()) > 0
    assert stream(enc, [x[:, :0]]).shape == (2, 4, 5)


@pytest.mark.parametrize(
    "extractor", [cnn, lambda: nn.Flatten(), lambda: nn.Conv2d(3, 8, 3), lambda: nn.Sequential(nn.Flatten(), cnn())]
)
def test_image_networks_without_the_adapter_say_what_is_missing(extractor):
    x = torch.randn(2, 7, 3, 6, 6, dtype=torch.float64)
    for call in (lambda enc: enc(x), lambda enc: setenc.encode(enc, x, chunk_size=3, gradient="exact")):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            call(encoder(extractor()))
        assert "setenc.PerElement" in str(caught.value) + "".join(getattr(caught.value, "__notes__", []))


# --- padding -------------------------------------------------------------------------------------------------------


class Logarithm(nn.Module):
    """Infinite at 0, and with it the gradients of the map behind it: what stands in padding must never get here."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 8)

    def forward(self, x):
        return self.linear(x.log())


@pytest.mark.parametrize("poison", [0.0, -1.0, torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("how", ["mask", "weights", "both"])
@pytest.mark.parametrize("mode", ["call", "full", "exact", "sampled", "ragged"])
def test_masked_and_weightless_elements_change_nothing(poison, how, mode):
    enc = encoder(Logarithm())
    real = torch.tensor([[1, 1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1]]).bool()
    clean = torch.rand(3, 7, 2, dtype=torch.float64) + 0.5
    weights = torch.rand(3, 7, dtype=torch.float64) + 0.5
    dirty = torch.where(real[..., None], clean, poison).requires_grad_()
    options = {}
    if how != "weights":
        options["mask"] = real
    if how != "mask":
        options["weights"] = torch.where(real, weights, 0)

    def run(x, **options):
        enc.zero_grad()
        torch.manual_seed(3)
        if mode == "ragged":
            packed = {k: v.flatten() for k, v in options.items()}
            out = enc(setenc.Ragged(x.flatten(0, 1), torch.arange(4) * 7), **packed)
        elif mode == "call":
            out = enc(x, **options)
        else:
            out = setenc.encode(enc, x, chunk_size=7, gradient=mode, **options)
        out.sin().sum().backward()
        return out.detach(), [p.grad.clone() for p in enc.parameters() if p.grad is not None]

    if mode == "ragged":
        if how != "weights":
            return
        expected = run(clean, **options)
    else:
        expected = run(torch.where(real[..., None], clean, 1.0), **options)
    value, found = run(dirty, **options)
    torch.testing.assert_close(value, expected[0], rtol=1e-12, atol=1e-12)
    for a, b in zip(found, expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert bool((dirty.grad[~real] == 0).all())
    assert bool(dirty.grad.isfinite().all())
    one_by_one = [enc(clean[b : b + 1, real[b]]) for b in range(3)]
    if how == "mask":
        torch.testing.assert_close(value, torch.cat(one_by_one), rtol=1e-12, atol=1e-12)


def test_a_batch_that_is_all_padding():
    enc = encoder(nn.Linear(2, 8))
    x = torch.full((2, 5, 2), torch.nan, dtype=torch.float64)
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    empty = enc.readout(enc.init_state(2))
    for out in (enc(x, nothing), enc(x, weights=torch.zeros(2, 5)), enc(x[:, :0]), enc([s[:0] for s in x])):
        torch.testing.assert_close(out, empty)
        enc.zero_grad()
        out.sum().backward()
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in enc.parameters())
    enc.zero_grad()
    enc(x[:, :0]).sum().backward()
    assert all(p.grad is not None for p in enc.extractor.parameters()), "every rank has a gradient of every parameter"


def test_a_batch_of_no_sets():
    enc = encoder(nn.Linear(2, 8))
    x = torch.randn(0, 5, 2, dtype=torch.float64)
    mask, weights = torch.ones(0, 5, dtype=torch.bool), torch.ones(0, 5)
    ragged = setenc.Ragged(torch.randn(0, 2, dtype=torch.float64), torch.zeros(1, dtype=torch.int64))
    for out in (enc(x), enc(x, mask), enc(x, mask, weights), enc(x[:, :0]), enc(ragged)):
        assert out.shape == (0, 4, 5)
    for mode in ("full", "exact", "sampled", "none"):
        for data in (x, ragged, lambda: iter([x, x])):
            out = setenc.encode(enc, data, chunk_size=2, gradient=mode)
            assert out.shape == (0, 4, 5)
            if mode != "none":
                out.sum().backward()


# --- gradients in the weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pooling",
    [
        lambda: setenc.SlotPooling(2, 8, 3, num_heads=2),
        lambda: setenc.SlotPooling(2, 8, 3, num_heads=2, activation="slot-sigmoid"),
        lambda: setenc.DeepSetsPooling(2, 8, "mean"),
        lambda: setenc.DeepSetsPooling(2, 8, "sum"),
        lambda: setenc.GatedAttentionPooling(2, 8),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_in_the_weights_are_right_or_refused(pooling, masked):
    torch.manual_seed(3)
    enc = setenc.UMBC(None, pooling(), None, size_feature=True).double().eval()
    x, weights = torch.randn(2, 5, 2, dtype=torch.float64), torch.rand(2, 5, dtype=torch.float64) + 0.1
    mask = torch.rand(2, 5) < 0.6 if masked else None
    weights.requires_grad_()
    assert torch.autograd.gradcheck(lambda w: enc(x, mask, w), (weights,))
    assert torch.autograd.gradcheck(lambda w: enc.readout(enc.update(enc.init_state(2), x, mask, w)), (weights,))
    with pytest.raises(ValueError, match="weights that require gradients must be > 0"):
        enc(x, mask, weights * 0)
    with pytest.raises(ValueError, match="weights must not require gradients"):
        setenc.encode(enc, x, weights=weights)
    with torch.no_grad():
        enc(x, mask, weights * 0)


# --- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [int, np.int64, np.uint8, torch.tensor, lambda v: torch.tensor(v, dtype=torch.uint8)])
def test_whole_numbers_of_any_library_are_settings(whole):
    pooling = setenc.SlotPooling(whole(3), whole(8), whole(4), num_heads=whole(2), slot_dim=whole(5))
    decoder = setenc.SetTransformerDecoder(whole(8), whole(1), num_heads=whole(2), out_dim=whole(5))
    enc = setenc.UMBC(None, pooling, decoder, size_feature=np.True_)
    assert enc(torch.randn(2, 6, 3)).shape == (2, 4, 5)
    assert isinstance(pooling.in_dim, int)
    x = torch.randn(2, 6, 3)
    out = setenc.encode(enc, x, chunk_size=whole(2), gradient="sampled", num_gradient_chunks=whole(2))
    assert out.shape == (2, 4, 5)
    assert enc.init_state(whole(2)).batch_size == 2
    for other in (
        setenc.DeepSetsPooling(whole(3), whole(8), norm=np.False_),
        setenc.GatedAttentionPooling(whole(3), whole(8), hidden_dim=whole(4)),
    ):
        assert other(x).shape == (2, 1, 8)
    assert (
        setenc.MLPDecoder(whole(8), whole(2), hidden_dim=whole(4), num_layers=whole(2))(torch.ones(2, 8)).shape[1] == 2
    )
    assert setenc.FSPoolDecoder(whole(8), whole(2), num_pieces=whole(3))(torch.ones(2, 4, 8)).shape == (2, 2)
    diem = setenc.DIEMDecoder(
        whole(8), whole(2), num_heads=whole(2), num_steps=whole(1), prior_strength=np.float32(0.5)
    )
    assert diem(torch.randn(2, 4, 8)).shape == (2, 2, 8)
    assert setenc.DIEMDecoder(8, prior_strength=torch.tensor(0.5)).prior_strength == 0.5


@pytest.mark.parametrize("bad", [True, np.True_, torch.tensor(True), "4", 4.0, np.float64(4), None, torch.ones(2)])
def test_what_is_no_whole_number_is_refused_at_construction(bad):
    makers = [
        lambda: setenc.SlotPooling(bad, 8, 4),
        lambda: setenc.SlotPooling(3, bad, 4),
        lambda: setenc.SlotPooling(3, 8, bad),
        lambda: setenc.SlotPooling(3, 8, 4, num_heads=bad),
        lambda: setenc.DeepSetsPooling(bad, 8),
        lambda: setenc.GatedAttentionPooling(3, bad),
        lambda: setenc.SetTransformerDecoder(8, bad),
        lambda: setenc.ISAB(8, bad),
        lambda: setenc.PMA(bad, 2),
        lambda: setenc.MLPDecoder(8, num_layers=bad),
        lambda: setenc.FSPoolDecoder(8, num_pieces=bad),
        lambda: setenc.DIEMDecoder(8, num_steps=bad),
        lambda: setenc.DeepSetsPooling(3, 8).init_state(bad),
        lambda: setenc.encode(encoder(None, in_dim=2), torch.randn(1, 2, 2), num_gradient_chunks=bad),
    ]
    for make in makers:
        with pytest.raises(TypeError, match="must be an int; got"):
            make()
    for make in (
        lambda: setenc.MLPDecoder(8, hidden_dim=0),
        lambda: setenc.MLPDecoder(8, 0),
        lambda: setenc.DIEMDecoder(8, out_dim=0),
        lambda: setenc.FSPoolDecoder(8, num_pieces=0),
    ):
        with pytest.raises(ValueError, match="must be at least 1; got 0"):
            make()


@pytest.mark.parametrize("bad", ["no", 1, None, torch.tensor(1)])
def test_flags_are_true_or_false(bad):
    for make in (
        lambda: setenc.SlotPooling(3, 8, 4, residual=bad),
        lambda: setenc.SlotPooling(3, 8, 4, slot_norm=bad),
        lambda: setenc.SlotPooling(3, 8, 4, output_norm=bad),
        lambda: setenc.DeepSetsPooling(3, 8, norm=bad),
        lambda: setenc.SAB(8, norm=bad),
        lambda: setenc.UMBC(None, setenc.DeepSetsPooling(3, 8), None, size_feature=bad),
        lambda: setenc.UMBC(None, setenc.DeepSetsPooling(3, 8), None, probe=bad),
    ):
        with pytest.raises(TypeError, match="must be True or False; got"):
            make()
    for strength in (True, "0.5", None, np.True_):
        with pytest.raises(TypeError, match="prior_strength must be a number"):
            setenc.DIEMDecoder(8, prior_strength=strength)
    for choice in (["softmax"], 1, None):
        with pytest.raises(ValueError, match="activation must be one of"):
            setenc.SlotPooling(3, 8, 4, activation=choice)


# --- graphs --------------------------------------------------------------------------------------------------------

POOLINGS = {
    "softmax": lambda: setenc.SlotPooling(8, 8, 4, num_heads=2),
    "slot-sigmoid": lambda: setenc.SlotPooling(8, 8, 4, num_heads=2, activation="slot-sigmoid"),
    "many slots": lambda: setenc.SlotPooling(8, 8, 16, num_heads=8, activation="slot-softmax"),
    "mean": lambda: setenc.DeepSetsPooling(8, 8, "mean"),
    "max": lambda: setenc.DeepSetsPooling(8, 8, "max"),
    "gated": lambda: setenc.GatedAttentionPooling(8, 8),
}


@pytest.mark.parametrize("name", POOLINGS)
def test_export_with_a_set_size_that_is_open(name, tmp_path):
    torch.manual_seed(1)
    network, decoder = SINGLE["perceptron"](), setenc.SetTransformerDecoder(8, 1)
    enc = setenc.UMBC(network, POOLINGS[name](), decoder, size_feature=True).eval()
    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("size", max=100_000)}
    variants = {"softmax": ("x", "x mask", "x mask weights"), "max": ("x", "x mask")}.get(name, ("x mask",))
    for names in map(str.split, variants):

        def data(batch, size, names=names):
            given = {"x": torch.randn(batch, size, 2), "mask": torch.rand(batch, size) < 0.7}
            return tuple({**given, "weights": torch.rand(batch, size)}[name] for name in names)

        strict = name == "softmax" and names == ["x", "mask"]
        program = torch.export.export(enc, data(3, 10), dynamic_shapes=dict.fromkeys(names, sizes), strict=strict)
        if strict:
            torch.export.save(program, tmp_path / "encoder.pt2")
            program = torch.export.load(tmp_path / "encoder.pt2")
        for batch, size in ((2, 2), (5, 37), (2, 5000)):
            given = data(batch, size)
            torch.testing.assert_close(program.module()(*given), enc(*given), rtol=1e-5, atol=1e-5)


def test_compiled_as_a_whole():
    torch.manual_seed(1)
    enc = setenc.UMBC(SINGLE["perceptron"](), POOLINGS["slot-sigmoid"](), setenc.SAB(8), size_feature=True).eval()
    torch._dynamo.reset()
    compiled = torch.compile(enc, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in (3, 17, 500):
        x, mask = torch.randn(2, size, 2), torch.rand(2, size) < 0.7
        torch.testing.assert_close(compiled(x, mask), enc(x, mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", ["group", "frozen batch"])
def test_a_bag_of_images_end_to_end_in_the_memory_of_one_chunk(norm):
    """Gradients of the whole bag through the image network; what autograd keeps does not grow with the bag."""
    middle = nn.GroupNorm(2, 4) if norm == "group" else nn.BatchNorm2d(4)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), middle, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 8)
    )
    enc = encoder(setenc.PerElement(network)).train()
    middle.train(norm == "group")
    enc.pooling.eval()
    images = torch.rand(1, 60, 1, 8, 8, dtype=torch.float64)

    def chunks():
        return iter(images.split(10, 1))

    found, held = {}, {}
    for mode in ("full", "exact"):
        for size in (20, 60):
            saved = []
            enc.zero_grad()
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t
            ):
                out = setenc.encode(enc, images[:, :size] if size < 60 else chunks, chunk_size=10, gradient=mode)
            out.sin().sum().backward()
            held[mode, size] = sum(saved)
        found[mode] = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in enc.parameters()]
    for a, b in zip(found["exact"], found["full"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert held["exact", 60] == held["exact", 20]
    assert held["full", 60] > 2.5 * held["full", 20]
    assert float(found["exact"][-1].abs().max()) > 0
