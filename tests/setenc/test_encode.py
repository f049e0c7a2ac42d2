"""Gradients of full sets: exact in two passes whatever the model, sampled without bias, streams of chunks."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import setenc
from setenc import encode
from setenc.random import DRAWS, RANKS

POOLINGS = {
    **{
        f"{activation} {slots}": (
            lambda activation=activation, slots=slots: setenc.SlotPooling(
                8, 8, 3, num_heads=2, activation=activation, slots=slots, slot_norm=True
            )
        )
        for activation, slots in [
            ("softmax", "random"),
            ("sigmoid", "learned"),
            ("slot-sigmoid", "random"),
            ("slot-softmax", "learned"),
            ("slot-exp", "random"),
        ]
    },
    "many slots": lambda: setenc.SlotPooling(8, 8, 12, num_heads=8, activation="slot-softmax"),
    **{reduce: lambda reduce=reduce: setenc.DeepSetsPooling(8, 8, reduce, norm=True) for reduce in ("mean", "sum")},
    "max": lambda: setenc.DeepSetsPooling(8, 8, "max"),
    "gated": lambda: setenc.GatedAttentionPooling(8, 8),
    "slots and instances": lambda: setenc.JointPooling(
        setenc.SlotPooling(8, 8, 3, num_heads=2), setenc.InstancePooling(8, 8, 3)
    ),
    "critical instance": lambda: setenc.DSMILPooling(8, 8),
}
every_pooling = pytest.mark.parametrize("pooling", POOLINGS.values(), ids=POOLINGS)


def encoder(pooling=POOLINGS["softmax random"], dropout=0.3, size_feature=True):
    torch.manual_seed(4)
    extractor = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 8))
    decoder = nn.Sequential(setenc.SAB(8, 2), nn.Dropout(dropout), nn.Linear(8, 2))
    return setenc.UMBC(extractor, pooling(), decoder, size_feature=size_feature).double().train()


def sets(batch=3, n=11, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n, 2, generator=g, dtype=torch.float64)
    mask = torch.rand(batch, n, generator=g) < 0.8
    weights = torch.rand(batch, n, generator=g, dtype=torch.float64) + 0.2
    return x, mask, weights


def gradients(enc, x, *, seed=7, loss=lambda out: out.sin().sum(), **options):
    """Loss and all gradients, of the parameters and of the input if it asks for them."""
    enc.zero_grad()
    torch.manual_seed(seed)
    value = loss(encode(enc, x, **options))
    value.backward()
    found = {name: p.grad for name, p in enc.named_parameters()}
    if isinstance(x, torch.Tensor) and x.requires_grad:
        found["x"], x.grad = x.grad, None
    return value.detach(), {k: v.clone() for k, v in found.items() if v is not None}


def same(a, b, tolerance=1e-10):
    assert torch.equal(a[0], b[0]) or torch.allclose(a[0], b[0], rtol=1e-12, atol=1e-13)
    # A gradient that is identically zero may be missing on one side.
    for name in a[1] | b[1]:
        first, second = (side.get(name, torch.zeros(())) for side in (a[1], b[1]))
        scale = max(float(first.abs().max()), float(second.abs().max()), 1e-3)
        assert float((first - second).abs().max()) <= tolerance * scale, name


# --- exact ---------------------------------------------------------------------------------------------------------


@every_pooling
@pytest.mark.parametrize("extra", ["plain", "mask", "weights", "both", "ragged"])
def test_exact_is_full_for_every_parameter_and_the_input(pooling, extra):
    """Dropout, random slots, residual, size feature, and a last chunk of another size are on throughout."""
    enc = encoder(pooling)
    x, mask, weights = sets()
    options = {"chunk_size": 4}
    if extra in ("mask", "both"):
        options["mask"] = mask
    if extra in ("weights", "both"):
        options["weights"] = weights
    if extra == "ragged":
        x = setenc.Ragged(x[mask].requires_grad_(), F.pad(mask.sum(1).cumsum(0), (1, 0)))
        options["weights"] = weights[mask]
        leaf = x.values
    else:
        leaf = x.requires_grad_()
    results = []
    for mode in ("full", "exact"):
        value, found = gradients(enc, x, gradient=mode, **options)
        found["x"] = leaf.grad if extra == "ragged" else found["x"]
        leaf.grad = None
        results.append((value, found))
    same(*results)
    assert all(float(g.abs().max()) > 0 for k, g in results[1][1].items() if "key_value.bias" not in k)


@every_pooling
def test_exact_is_plain_backprop_of_the_whole_set(pooling):
    """Against ``enc(x)``, which shares no code with the driver: fused attention, one shot."""
    enc = encoder(pooling, dropout=0.0)
    x, mask, weights = sets()
    x.requires_grad_()
    torch.manual_seed(7)
    torch.randint(2**48, ())  # the driver's seed, so that the slots are the same sample
    enc.zero_grad()
    value = enc(x, mask, weights).sin().sum()
    value.backward()
    plain = {name: p.grad.clone() for name, p in enc.named_parameters() if p.grad is not None}
    plain["x"], x.grad = x.grad, None
    for mode in ("full", "exact"):
        same((value.detach(), plain), gradients(enc, x, chunk_size=4, gradient=mode, mask=mask, weights=weights))


@pytest.mark.parametrize("size", [1, 3, 11, 50, None])
def test_any_chunk_size(size):
    enc = encoder(dropout=0.0)
    x, mask, _ = sets()
    reference = gradients(enc, x, chunk_size=11, mask=mask)
    for mode in ("full", "exact"):
        same(reference, gradients(enc, x, chunk_size=size, gradient=mode, mask=mask))


def test_shared_frozen_and_unused_parameters():
    enc = encoder()
    enc.decoder = nn.Sequential(setenc.SAB(8, 2).double(), enc.extractor[3])
    enc.extractor[0].weight.requires_grad_(False)
    enc.pooling.query.bias.requires_grad_(False)
    x, mask, _ = sets()
    reference = gradients(enc, x, chunk_size=4, mask=mask)
    exact = gradients(enc, x, chunk_size=4, mask=mask, gradient="exact")
    same(reference, exact)
    assert "extractor.0.weight" not in exact[1]
    assert "pooling.query.bias" not in exact[1]
    for p in (*enc.extractor.parameters(), *enc.pooling.parameters()):
        p.requires_grad_(False)
    same(*(gradients(enc, x, chunk_size=4, gradient=mode) for mode in ("full", "exact")))


def test_ties_of_a_maximum_go_to_the_first_element():
    enc = setenc.UMBC(None, setenc.DeepSetsPooling(2, 4, "max"), None).double()
    x = torch.randn(1, 2, 2, dtype=torch.float64).repeat(1, 5, 1).requires_grad_()
    for mode, size in itertools.product(("full", "exact"), (1, 3, 10)):
        _, found = gradients(enc, x, chunk_size=size, gradient=mode)
        assert bool((found["x"][:, 2:] == 0).all())
        assert bool((found["x"][:, :2] != 0).any())


def test_gradients_flow_to_what_made_the_input_and_only_once():
    enc = encoder(dropout=0.0)
    x, _, _ = sets()
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    found = []
    for mode in ("full", "exact"):
        torch.manual_seed(3)
        out = encode(enc, x * scale, chunk_size=4, gradient=mode).sin().sum()
        found.append(torch.autograd.grad(out, [scale, *enc.extractor.parameters()]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    out = encode(enc, x.requires_grad_(), chunk_size=4, gradient="exact").sum()
    (first,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_a_compiled_extractor_and_clipping():
    enc = encoder(dropout=0.0)
    x, _, _ = sets(n=12)
    reference = gradients(enc, x, chunk_size=4)
    enc.extractor = torch.compile(enc.extractor, backend="aot_eager")
    value, found = gradients(enc, x, chunk_size=4, gradient="exact")
    same(reference, (value, {k.replace("_orig_mod.", ""): v for k, v in found.items()}))
    norm = nn.utils.clip_grad_norm_(enc.parameters(), 0.1)
    expected = torch.stack([g.norm() for g in reference[1].values()]).norm()
    torch.testing.assert_close(norm, expected)


def test_gradient_scaler_and_autocast():
    enc = encoder(dropout=0.0).float()
    x, mask, _ = sets()
    x = x.float()
    plain = gradients(enc, x, chunk_size=4, gradient="exact", mask=mask)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimiser = torch.optim.SGD(enc.parameters(), lr=0.0)
    enc.zero_grad()
    torch.manual_seed(7)
    scaler.scale(encode(enc, x, chunk_size=4, gradient="exact", mask=mask).sin().sum()).backward()
    scaler.unscale_(optimiser)
    for name, p in enc.named_parameters():
        torch.testing.assert_close(p.grad, plain[1][name], rtol=1e-5, atol=1e-6)
    found = {}
    for mode in ("full", "exact"):
        enc.zero_grad()
        torch.manual_seed(7)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = encode(enc, x, chunk_size=4, gradient=mode, mask=mask).float().sin().sum()
        loss.backward()
        found[mode] = {name: p.grad.clone() for name, p in enc.named_parameters()}
    for name, gradient in found["full"].items():
        assert float(gradient.abs().max()) > 0 or "key_value" in name, name
        error = (found["exact"][name] - gradient).abs().max()
        assert float(error) <= 0.03 * float(gradient.abs().max()) + 1e-4, name


# --- sampled -------------------------------------------------------------------------------------------------------


def outcomes(enc, x, count, **options):
    """Gradients of every distinct draw, until ``count`` of them came up; the slots stay the same."""
    seen = {}
    enc.pooling.eval()
    for seed in range(80 * count):
        noise = torch.Generator().manual_seed(seed)
        found = gradients(enc, x, gradient="sampled", generator=noise, **options)
        seen.setdefault(round(float(found[1]["pooling.key_value.weight"][0, 0]), 11), []).append(found)
        if len(seen) == count and min(map(len, seen.values())) > 2:
            return seen
    raise AssertionError(f"{len(seen)} distinct draws, not {count}")


@pytest.mark.parametrize(("draws", "count"), [(1, 3), (2, 3), (3, 1), (9, 1)])
def test_sampled_is_unbiased_over_all_choices_of_chunks(draws, count):
    """The last chunk is shorter, the residual is on: where the official correction is off by N / n."""
    enc = encoder(dropout=0.0)
    x, _, _ = sets()
    x.requires_grad_()
    seen = outcomes(enc, x, count, chunk_size=4, num_gradient_chunks=draws)
    full = gradients(enc, x, chunk_size=4)
    means = {}
    for value, found in (runs[0] for runs in seen.values()):
        torch.testing.assert_close(value, full[0], rtol=1e-12, atol=0)
        for name, gradient in found.items():
            means[name] = means.get(name, 0) + gradient / count
            if name.startswith("decoder") or "output_norm" in name or name == "size_vector":
                torch.testing.assert_close(gradient, full[1][name], rtol=1e-10, atol=1e-12)
    same(full, (full[0], means))
    assert count == 1 or not torch.allclose(found["pooling.key_value.weight"], full[1]["pooling.key_value.weight"])


@pytest.mark.parametrize("form", ["mask", "ragged"])
def test_sampled_draws_for_each_set_among_its_own_chunks(form):
    enc = encoder(dropout=0.0)
    x, _, weights = sets(batch=2, n=12)
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[0, 1:11], mask[1, 3:9:2] = True, True  # 10 and 3 elements: 3 and 1 chunks of 4; then of 2: 5 and 2
    full = gradients(enc, x, chunk_size=4, mask=mask, weights=weights)
    for size, count in ((4, 3), (2, 10)):
        if form == "mask":
            seen = outcomes(enc, x, count, chunk_size=size, mask=mask, weights=weights)
        else:
            ragged = setenc.Ragged.from_mask(x, mask)
            seen = outcomes(enc, ragged, count, chunk_size=size, weights=weights[mask])
        full = gradients(enc, x, chunk_size=4, mask=mask, weights=weights)
        means = {}
        for _, found in (runs[0] for runs in seen.values()):
            for name, gradient in found.items():
                means[name] = means.get(name, 0) + gradient / count
        same(full, (full[0], means))


@pytest.mark.parametrize("name", [name for name in POOLINGS if "instance" not in name])
def test_sampled_is_unbiased_for_every_pooling(name):
    pooling = POOLINGS[name]
    enc = encoder(pooling, dropout=0.0).eval()
    x, _, _ = sets(n=6)
    full = gradients(enc, x, chunk_size=2)
    draws = [gradients(enc, x, chunk_size=2, gradient="sampled", seed=seed)[1] for seed in range(24)]
    some = next(k for k in ("pooling.key_value.weight", "pooling.value.weight") if k in draws[0])
    distinct = {round(float(d[some][0, 0]), 11): d for d in draws}
    assert len(distinct) == 3
    means = {name: sum(d[name] for d in distinct.values()) / 3 for name in draws[0]}
    same(full, (full[0], means))


def test_draws_are_uniform():
    enc = encoder(dropout=0.0)
    x, _, _ = sets(n=10)
    x.requires_grad_()
    hits = torch.zeros(5)
    for seed in range(400):
        _, found = gradients(enc, x, seed=seed, chunk_size=2, gradient="sampled", num_gradient_chunks=2)
        chosen = found["x"].abs().sum((0, 2)).unflatten(0, (5, 2)).sum(1) > 0
        assert int(chosen.sum()) == 2
        hits += chosen
    # Binomial(400, 2/5): standard deviation 9.8
    assert float((hits - 160).abs().max()) < 45


@pytest.mark.parametrize("form", ["tensor", "ragged"])
def test_noise_does_not_tell_which_chunks_are_drawn(form):
    """Averages over the draws are unbiased whatever the noise in the extractor."""

    class Noise(nn.Module):
        def forward(self, x):
            noise.append(torch.rand(x.shape[:2]).flatten()[:2])
            return x

    enc = setenc.UMBC(Noise(), setenc.DeepSetsPooling(2, 2), None, probe=False)
    x = torch.randn(1, 2, 2, requires_grad=True)
    first, drawn = [], []
    for seed in range(400):
        noise = []
        torch.manual_seed(seed)
        data = x if form == "tensor" else setenc.Ragged(x[0], torch.tensor([0, 2]))
        (found,) = torch.autograd.grad(encode(enc, data, chunk_size=1, gradient="sampled").sum(), x)
        drawn.append(bool(found[0, 0].any()))
        first.append(float(noise[0][0]))
    first, drawn = torch.tensor(first), torch.tensor(drawn)
    # Uniform numbers, 200 on each side: their means are 0.029 apart, one standard deviation.
    assert abs(float(first[drawn].mean() - first[~drawn].mean())) < 0.12


def test_seeds_of_ranks_chunks_and_draws_are_different_streams():
    seeds = [5 + rank * RANKS + chunk for rank in range(64) for chunk in range(64)]
    seeds += [DRAWS + seed for seed in seeds]
    numbers = {int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed))) for seed in seeds}
    assert len(numbers) == len(seeds)


def test_the_same_seed_gives_the_same_draw_and_every_mode_the_same_value():
    enc = encoder()
    x, _, _ = sets()
    a, b = (gradients(enc, x, chunk_size=2, gradient="sampled", seed=5) for _ in range(2))
    same(a, b, tolerance=0)
    values = []
    for mode in ("full", "exact", "sampled", "none"):
        torch.manual_seed(5)
        out = encode(enc, x, chunk_size=2, gradient=mode)
        assert out.requires_grad == (mode != "none")
        values.append(out.detach())
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=1e-12, atol=1e-12)
    g = [encode(enc, x, chunk_size=2, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert not torch.equal(*g), "decoder dropout draws from torch's default generator"
    enc.decoder.eval()
    g = [encode(enc, x, chunk_size=2, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*g)


# --- streams -------------------------------------------------------------------------------------------------------


class Reader:
    """Chunks on request, counted."""

    def __init__(self, chunks):
        self.chunks, self.passes = chunks, 0

    def __call__(self):
        self.passes += 1
        return iter(self.chunks)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", ["full", "exact", "sampled", "none"])
def test_chunks_from_iterators(mode, tmp_path):
    enc = encoder(dropout=0.0)
    x, mask, weights = sets()
    parts = list(zip(*(t.split([4, 4, 3], 1) for t in (x, mask, weights)), strict=True))

    def run(data, **options):
        if mode == "none":
            torch.manual_seed(7)
            return encode(enc, data, gradient=mode, **options), {}
        return gradients(enc, data, gradient=mode, **options)

    reader = Reader([p[0] for p in parts])
    plain = run(x, chunk_size=4)
    same(run(reader), plain)
    assert reader.passes == (2 if mode == "exact" else 1)
    same(run(Reader([x]), chunk_size=4), plain)
    file = np.memmap(tmp_path / "x", dtype=np.float64, mode="w+", shape=x.shape)
    file[:] = x.numpy()
    file = np.memmap(tmp_path / "x", dtype=np.float64, mode="r", shape=x.shape)
    same(run(lambda: (file[:, i : i + 4] for i in (0, 4, 8))), plain)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x.transpose(0, 1)),
        batch_size=4,
        collate_fn=lambda batch: torch.stack([element for (element,) in batch], 1),
        generator=torch.Generator(),  # else it draws from the default one, before the slots do
    )
    same(run(lambda: iter(loader), chunk_size=4), plain)
    if mode != "sampled":  # there a mask gives each set its own draw
        full = run(x, chunk_size=4, mask=mask, weights=weights)
        same(run(Reader(parts)), full)
        same(run(Reader([p[0] for p in parts]), mask=mask, weights=weights), full)
        same(run(Reader([(x, mask, weights)]), chunk_size=4), full)


def test_sampled_from_an_iterator_with_masks_is_unbiased():
    enc = encoder(dropout=0.0)
    x, mask, weights = sets()
    parts = list(zip(*(t.split([4, 4, 3], 1) for t in (x, mask, weights)), strict=True))
    seen = outcomes(enc, lambda: iter(parts), 3)
    full = gradients(enc, x, mask=mask, weights=weights)
    means = {name: sum(runs[0][1][name] for runs in seen.values()) / 3 for name in full[1]}
    same(full, (full[0], means))


def test_empty_sets_and_empty_chunks():
    enc = encoder(dropout=0.0)
    x, mask, _ = sets()
    mask[1] = False
    for mode in ("full", "exact", "sampled"):
        for data, options in [(x[:, :0], {}), (x, {"mask": mask}), (lambda: iter([x[:, :0], x, x[:, :0]]), {})]:
            value, found = gradients(enc, data, gradient=mode, chunk_size=4, **options)
            assert bool(value.isfinite())
            assert all(bool(g.isfinite().all()) for g in found.values())


def test_bad_input_is_refused():
    enc = encoder()
    x, mask, weights = sets()
    for options, error in [
        ({"gradient": "half"}, "gradient must be one of 'full', 'exact', 'sampled', 'none'"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"num_gradient_chunks": 0}, "num_gradient_chunks must be at least 1"),
        ({"mask": mask[:, :3]}, "mask must have shape"),
        ({"weights": weights.requires_grad_()}, "weights must not require gradients"),
    ]:
        with pytest.raises(ValueError, match=error):
            encode(enc, x, **options)
    with pytest.raises(TypeError, match="callable that returns a fresh iterator"):
        encode(enc, iter([x]))
    with pytest.raises(TypeError, match=r"enc must be a setenc\.UMBC"):
        encode(lambda x: x, x)
    with pytest.raises(ValueError, match="must be at least one"):
        encode(enc, lambda: iter([]))
    with pytest.raises(ValueError, match="a chunk from an iterator must not require gradients"):
        encode(enc, lambda: iter([x.clone().requires_grad_()]))
    with pytest.raises(ValueError, match="state's 3 sets"):
        encode(enc, lambda: iter([x, x[:2]]))
    spent = iter([x, x])
    out = encode(enc, lambda: spent, gradient="exact")
    with pytest.raises(ValueError, match="the first saw 2, the second 0"):
        out.sum().backward()


def test_memory_of_exact_and_sampled_is_that_of_one_chunk():
    """What autograd keeps alive between forward and backward, counted by torch, does not grow with the set."""
    enc = encoder(dropout=0.0)
    held = {}
    for mode, n in itertools.product(("full", "exact", "sampled"), (64, 512)):
        x = torch.randn(1, n, 2, dtype=torch.float64)
        sizes = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            encode(enc, x, chunk_size=32, gradient=mode)
        held[mode, n] = sum(sizes)
    assert held["exact", 512] == held["exact", 64]
    assert held["sampled", 512] == held["sampled", 64]
    assert held["full", 512] > 4 * held["full", 64]
