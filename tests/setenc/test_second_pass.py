"""What changes between the forward and the backward of `encode`: the right gradient, or an error that says which."""

import io
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import setenc
from setenc import encode

MODES = ("full", "exact", "sampled")
every_mode = pytest.mark.parametrize("mode", MODES)
POOLINGS = {
    "slots": lambda: setenc.SlotPooling(8, 8, 3, num_heads=2),
    "learned slots": lambda: setenc.SlotPooling(8, 8, 3, num_heads=2, activation="slot-sigmoid", slots="learned"),
    "max": lambda: setenc.DeepSetsPooling(8, 8, "max"),
    "mean": lambda: setenc.DeepSetsPooling(8, 8, "mean"),
    "gated": lambda: setenc.GatedAttentionPooling(8, 8),
    "slots and instances": lambda: setenc.JointPooling(
        setenc.SlotPooling(8, 8, 3, num_heads=2), setenc.InstancePooling(8, 8, 3)
    ),
    "critical instance": lambda: setenc.DSMILPooling(8, 8),
}
every_pooling = pytest.mark.parametrize("pooling", POOLINGS.values(), ids=POOLINGS)


def network(*middle):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), *middle, nn.Linear(8, 8))


def encoder(extractor=None, pooling=POOLINGS["slots"], **options):
    extractor = network() if extractor is None else extractor
    torch.manual_seed(4)
    return setenc.UMBC(extractor, pooling(), setenc.MLPDecoder(8, 2), **options).double()


def sets(batch=3, n=12, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch, n, 2, generator=g, dtype=torch.float64).to(dtype)
    return x, torch.rand(batch, n, generator=g) < 0.8, torch.rand(batch, n, generator=g, dtype=torch.float64) + 0.2


def gradients(enc, x, mode, between=lambda: None, leaf=None, **options):
    """All gradients of a loss; ``between`` runs after the forward."""
    enc.zero_grad()
    torch.manual_seed(7)
    loss = encode(enc, x, gradient=mode, chunk_size=4, **options).sin().sum()
    between()
    loss.backward()
    found = {name: p.grad for name, p in enc.named_parameters()}
    if leaf is not None:
        found["x"], leaf.grad = leaf.grad, None
    return {name: torch.zeros(()) if g is None else g.clone() for name, g in found.items()}


def same(ours, theirs, tolerance=1e-10):
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        scale = max(float(gradient.abs().max()), 1e-3)
        assert float((ours[name] - gradient).abs().max()) <= tolerance * scale, name


# --- data ----------------------------------------------------------------------------------------------------------


@every_mode
@pytest.mark.parametrize("pooling", [POOLINGS["slots"], POOLINGS["max"]], ids=["slots", "max"])
@pytest.mark.parametrize("given", ["x", "x mask", "x weights", "x mask weights"])
@pytest.mark.parametrize("grad", [False, True])
def test_data_changed_in_place(mode, pooling, given, grad):
    enc = encoder(pooling=pooling)
    data = dict(zip(("x", "mask", "weights"), sets(), strict=True))
    data = {name: data[name] for name in given.split()}
    expected = gradients(enc, mode=mode, **data)
    for what in data:
        mine = {name: t.clone() for name, t in data.items()}
        mine["x"].requires_grad_(grad)

        def change(what=what, mine=mine):
            with torch.no_grad():
                mine[what].fill_(True) if what == "mask" else mine[what].add_(1)

        try:
            same(gradients(enc, mode=mode, between=change, **mine), expected)
        except RuntimeError as error:
            words = {"full": "modified by an inplace", "exact": f"{what} was changed in place between the forward and"}
            assert words[mode] in str(error)  # noqa: PT017 - right, or an error that says which
        else:
            # Where both are given, one of them reaches the encoder as a copy.
            assert mode != "exact" or given == "x mask weights"


@pytest.mark.parametrize("form", ["list", "ragged"])
def test_ragged_data_changed_in_place(form):
    enc = encoder()
    x, mask, _ = sets()
    parts = [s[m] for s, m in zip(x, mask, strict=True)]
    data = parts if form == "list" else setenc.Ragged.of(parts)
    expected = gradients(enc, data, "exact")

    def change():
        (data[0] if form == "list" else data.values).add_(1)

    if form == "list":  # they were packed into one tensor
        same(gradients(enc, data, "exact", change), expected)
    else:
        with pytest.raises(RuntimeError, match="x was changed in place"):
            gradients(enc, data, "exact", change)


@every_mode
def test_memory_that_numpy_changes_is_seen_by_the_state(mode):
    enc = encoder()
    array = sets()[0].numpy().copy()
    expected = gradients(enc, torch.from_numpy(array.copy()), mode)

    def change():
        array[...] += 1

    if mode == "exact":
        with pytest.raises(ValueError, match="the state of the set differs"):
            gradients(enc, torch.from_numpy(array), mode, change)
    else:
        same(gradients(enc, torch.from_numpy(array), mode, change), expected)


@every_mode
@pytest.mark.parametrize("kind", ["numpy", "torch", "tuple"])
def test_an_iterator_may_fill_one_buffer_again_and_again(mode, kind):
    enc = encoder()
    x, mask, weights = sets()
    buffer = torch.empty(3, 4, 2, dtype=torch.float64)
    shared = buffer.numpy()
    held = [torch.empty_like(t[:, :4]) for t in (x, mask, weights)]

    def chunks():
        for parts in zip(*(t.split(4, 1) for t in (x, mask, weights)), strict=True):
            if kind == "tuple":
                for ours, theirs in zip(held, parts, strict=True):
                    ours.copy_(theirs)
                yield tuple(held)
            else:
                buffer.copy_(parts[0])
                yield buffer if kind == "torch" else shared

    fresh = [p if kind == "tuple" else p[0] for p in zip(*(t.split(4, 1) for t in (x, mask, weights)), strict=True)]
    same(gradients(enc, chunks, mode), gradients(enc, lambda: iter(fresh), mode))


@every_pooling
@pytest.mark.parametrize("change", ["noise", "one element", "weight", "mask", "shuffled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_iterator_that_yields_other_data_the_second_time(pooling, change, dtype):
    enc = encoder(pooling=pooling).to(dtype)
    x, mask, weights = sets(dtype=dtype)
    weights = weights.to(dtype)
    passes = []

    def chunks():
        passes.append(None)
        data = [x.clone(), mask.clone(), weights.clone()]
        if len(passes) > enc.pooling.num_passes:
            if change == "noise":
                data[0] += torch.randn_like(x)
            elif change == "one element":
                data[0][1, 5], data[1][1, 5] = 9, True
            elif change == "weight":
                data[2][mask] *= 3
            elif change == "mask":
                data[1][1] = ~mask[1]
            else:
                order = torch.arange(12).view(3, 4).flip(0).flatten()
                data = [t[:, order] for t in data]
        return zip(*(t.split(4, 1) for t in data), strict=True)

    if change == "shuffled" and not any(part.selects for part in enc.init_state(1).parts):
        # The same elements in another order have the same state, and the same gradient.
        expected = gradients(enc, x, "exact", mask=mask, weights=weights)
        same(gradients(enc, chunks, "exact"), expected, 1e-4 if dtype == torch.float32 else 1e-10)
    else:
        with pytest.raises(ValueError, match=r"the second pass of encode must see what the first one saw"):
            gradients(enc, chunks, "exact")


def test_the_number_of_chunks_must_be_the_same():
    enc = encoder()
    x = sets()[0]
    lengths = iter([3, 2, 3, 4])
    chunks = lambda: iter([x[:, :4]] * next(lengths))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"the first saw 3, the second (2|more)"):
            gradients(enc, chunks, "exact")


@every_mode
@pytest.mark.parametrize("size", [1.0, 1e4, 1e-4])
@pytest.mark.parametrize("shift", [0.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_not_taken_for_other_data(mode, size, shift, dtype):
    """Elements that cancel in every mean, large ones, and ones far from 0: the comparison stays quiet."""
    g = torch.Generator().manual_seed(0)
    half = torch.randn(2, 3000, 2, generator=g)
    x = (size * (torch.cat((half, -half), 1) + shift)).to(dtype)
    for pooling in POOLINGS.values():
        enc = encoder(nn.Linear(2, 8, bias=False), pooling).to(dtype)
        for module in enc.pooling.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        torch.manual_seed(7)
        encode(enc, x, chunk_size=1500, gradient=mode).float().sum().backward()


@pytest.mark.parametrize("mode", ["exact", "sampled"])
@every_pooling
def test_rounding_is_that_of_the_largest_elements_wherever_they_come(mode, pooling):
    """The first chunk is 0, later ones cancel: their rounding is large beside the first and beside the sum."""
    g = torch.Generator().manual_seed(0)
    half = 1e3 * torch.randn(1, 301, 2, generator=g)
    x = torch.cat((torch.zeros(1, 50, 2), half, -half[:, torch.randperm(301, generator=g)]), 1)
    enc = encoder(nn.Linear(2, 8, bias=False), pooling).float()
    with torch.no_grad():
        for name, parameter in enc.pooling.named_parameters():
            if "slot_mean" in name or "query" in name or "bias" in name:
                parameter.mul_(1e-6)
    for _ in range(5):
        encode(enc, x, chunk_size=50, gradient=mode).sum().backward()


def test_one_large_element_does_not_hide_that_the_others_change():
    enc = encoder(nn.Linear(2, 8), POOLINGS["mean"]).float()
    x = torch.randn(1, 120, 2)
    calls = []

    def chunks():
        calls.append(None)
        large = torch.full((1, 1, 2), 1e5)
        return iter((large, *(x + 0.5 * (len(calls) > 1)).split(40, 1)))

    out = encode(enc, chunks, gradient="exact")
    with pytest.raises(ValueError, match="the state of the set differs"):
        out.sum().backward()


# --- parameters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["exact", "sampled"])
def test_chunks_whose_shares_are_subnormal_numbers_are_the_same_chunks(mode):
    """Logits 80 to 110 below the peak of the set: exponentials with few digits, or none."""
    pooling = setenc.SlotPooling(2, 4, 1, num_heads=1, residual=False, output_norm=False)
    with torch.no_grad():
        pooling.query.weight.zero_()
        pooling.query.bias.fill_(1)
        pooling.key_value.weight[:4] = torch.tensor([0.5, 0.0])  # the logit is the first feature
    enc = setenc.UMBC(None, pooling, None)
    below = torch.linspace(-110, -80, 600).repeat(40, 1) + torch.rand(40, 1, generator=torch.Generator().manual_seed(0))
    x = torch.cat((torch.zeros(40, 3), below), 1)[..., None] * torch.tensor([1.0, 0.0]) + torch.tensor([0.0, 1.0])
    found = []
    for how in ("full", mode):
        enc.zero_grad()
        generator = torch.Generator().manual_seed(0)
        encode(
            enc, x, gradient=how, chunk_size=3, num_gradient_chunks=150, generator=generator
        ).square().sum().backward()
        found.append(pooling.key_value.weight.grad.clone())
    if mode == "exact":
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("mode", ["exact", "sampled"])
@pytest.mark.parametrize("name", ["extractor.0.weight", "pooling.query.bias", "pooling.slot_mean"])
def test_parameters_changed_in_place_are_named(mode, name):
    enc = encoder()

    def change():
        with torch.no_grad():
            enc.get_parameter(name).mul_(1.5)

    with pytest.raises(RuntimeError, match=f"{name} was changed in place between the forward and the"):
        gradients(enc, sets()[0], mode, change)


class Trained(nn.Module):
    """A module whose forward encodes, as in a training script."""

    def __init__(self, enc, mode):
        super().__init__()
        self.enc, self.mode = enc, mode

    def forward(self, x):
        return encode(self.enc, x, chunk_size=4, gradient=self.mode)


@every_mode
@every_pooling
@pytest.mark.parametrize("scale", [None, 2.0])
@pytest.mark.parametrize("some", [False, True])
def test_functional_call_around_the_encoder(mode, pooling, scale, some):
    """Other parameters for one call: leaves, functions of leaves, or only some of them."""
    enc = encoder(pooling=pooling)
    model = Trained(enc, mode)
    x = sets()[0]
    torch.manual_seed(5)
    other = {name: (p + torch.randn_like(p)).detach().requires_grad_() for name, p in model.named_parameters()}
    if some:
        other = {name: p for name, p in other.items() if "extractor.0" in name or "value" in name}
    given = other if scale is None else {name: scale * p for name, p in other.items()}
    torch.manual_seed(7)
    torch.func.functional_call(model, given, (x,)).sin().sum().backward()
    ours = {name.removeprefix("enc."): p.grad for name, p in other.items()}
    plain = encoder(pooling=pooling)
    with torch.no_grad():
        for name, value in given.items():
            plain.get_parameter(name.removeprefix("enc.")).copy_(value)
    expected = gradients(plain, x, mode)
    for name, gradient in ours.items():
        wanted = expected[name] * (scale or 1)
        gradient = torch.zeros(()) if gradient is None else gradient
        assert float((gradient - wanted).abs().max()) <= 1e-10 * max(float(wanted.abs().max()), 1e-3), name
    assert all(p.grad is None for name, p in model.named_parameters() if name in other)


@every_mode
def test_functional_call_with_other_buffers(mode):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(()).double())
            self.net = network()

        def forward(self, x):
            return self.net(x * self.scale)

    enc = encoder(Scaled())
    x = sets()[0]
    expected = gradients(enc, 2 * x, mode)
    enc.zero_grad()
    torch.manual_seed(7)
    two = {"enc.extractor.scale": torch.tensor(2.0).double()}
    torch.func.functional_call(Trained(enc, mode), two, (x,)).sin().sum().backward()
    same({name: p.grad for name, p in enc.named_parameters()}, expected)


def test_transforms_of_functions_are_refused():
    enc = encoder()
    model, x = Trained(enc, "exact"), sets()[0]
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match=r"autograd\.Function with functorch"):
        torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(parameters)


@pytest.mark.parametrize("mode", ["full", "none", "exact", "sampled"])
@pytest.mark.parametrize("frozen", [False, True])
@every_pooling
def test_forward_mode_derivatives_are_right_or_refused(mode, frozen, pooling):
    enc, x = encoder(pooling=pooling).eval().requires_grad_(not frozen), sets()[0]
    direction = torch.randn_like(x)

    def run(x):
        return encode(enc, x, gradient=mode, chunk_size=5)

    with torch.no_grad():
        expected = (run(x + 1e-6 * direction) - run(x - 1e-6 * direction)) / 2e-6
    refused = pytest.raises((NotImplementedError, RuntimeError), match="autograd")
    with refused if mode in ("exact", "sampled") else nullcontext():
        found = torch.func.jvp(run, (x,), (direction,))[1]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    with refused if mode in ("exact", "sampled") else nullcontext(), forward_ad.dual_level():
        found = forward_ad.unpack_dual(run(forward_ad.make_dual(x, direction))).tangent
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@every_mode
def test_hooks_of_parameters_run_once_on_the_whole_gradient(mode):
    enc = encoder()
    x = sets()[0]
    plain = gradients(enc, x, mode)
    seen = []

    def hook(gradient):
        seen.append(None)
        return 3 * gradient

    for p in enc.parameters():
        p.register_hook(hook)
    same(gradients(enc, x, mode), {name: 3 * g for name, g in plain.items()})
    assert len(seen) == sum(p.requires_grad for p in enc.parameters())


@every_mode
def test_a_parameter_that_the_extractor_hides(mode):
    class Hidden(nn.Module):
        def __init__(self, tensor):
            super().__init__()
            self.net, self.held = network(), [tensor]

        def forward(self, x):
            return self.net(x) * self.held[0]

    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    for held in (scale, scale * 2):
        enc = encoder(Hidden(held))
        if mode == "full":
            gradients(enc, sets()[0], mode)
            assert float(scale.grad.abs()) > 0
        else:
            with pytest.raises(
                ValueError, match=r"uses a tensor of shape \(\) that requires gradients and is not among"
            ):
                gradients(enc, sets()[0], mode)


@every_mode
@pytest.mark.parametrize("kind", ["weight norm", "spectral norm in eval", "orthogonal", "tied", "checkpointed"])
def test_parametrised_tied_and_checkpointed_extractors(mode, kind):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network(nn.Dropout(0.3))

        def forward(self, x):
            return checkpoint(self.net, x, use_reentrant=False)

    net = network()
    if kind == "tied":
        net[2] = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        net.append(net[2][0])
    elif kind == "checkpointed":
        net = Checkpointed()
    else:
        change = {"weight norm": "weight_norm", "orthogonal": "orthogonal"}.get(kind, "spectral_norm")
        net[2] = getattr(parametrizations, change)(net[2])
    enc = encoder(net)
    if kind == "tied":
        enc.decoder = nn.Sequential(net[2][0], nn.Linear(8, 2)).double()
    enc.extractor.train(kind != "spectral norm in eval")
    x = sets()[0]
    expected = gradients(enc, x, "full")
    if mode == "sampled":  # of one chunk: all of it is drawn
        torch.manual_seed(7)
        expected = gradients(enc, x[:, :4], "full")
        x = x[:, :4]
    same(gradients(enc, x, mode), expected)
    assert sum(float(g.abs().max()) > 0 for g in expected.values()) > 8


def test_reentrant_checkpoints_are_refused_by_torch():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return checkpoint(self.net, x, use_reentrant=True)

    x = sets()[0].requires_grad_()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        gradients(encoder(Checkpointed()), x, "exact")


@pytest.mark.parametrize("mode", ["exact", "sampled"])
def test_an_extractor_that_is_another_function_at_every_call(mode):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls = network(), 0

        def forward(self, x):
            self.calls += 1
            return self.net(x) * (1 + 0.1 * self.calls)

    with pytest.raises(ValueError, match=r"the state of (the set|chunk \d) differs"):
        gradients(encoder(Counting(), probe=False), sets()[0], mode)
    noise = np.random.default_rng(0)

    class Noisy(Counting):
        def forward(self, x):
            return self.net(x) + torch.from_numpy(noise.normal(size=(*x.shape[:2], 8)))

    with pytest.raises(ValueError, match=r"random numbers must come from torch's default generator"):
        gradients(encoder(Noisy(), probe=False), sets()[0], mode)


# --- modes ---------------------------------------------------------------------------------------------------------


@every_mode
@pytest.mark.parametrize("kind", ["dropout", "batch norm"])
def test_switching_between_training_and_eval(mode, kind):
    middle = nn.Dropout(0.5) if kind == "dropout" else setenc.PerElement(nn.BatchNorm1d(8))
    enc = encoder(network(middle))
    if kind == "batch norm":
        enc.eval()
    expected = gradients(enc, sets()[0], mode)
    switch = enc.train if kind == "batch norm" else enc.eval
    if mode == "full":
        same(gradients(enc, sets()[0], mode, switch), expected)
    else:
        was, now = ("eval", "training") if kind == "batch norm" else ("training", "eval")
        with pytest.raises(RuntimeError, match=rf"was in {was} mode in the forward of encode and is in {now} mode"):
            gradients(enc, sets()[0], mode, switch)
    enc.decoder.train(not enc.decoder.training)  # the decoder is called once: its mode is its own
    same(gradients(enc.eval(), sets()[0], mode, enc.decoder.train), gradients(enc.eval(), sets()[0], mode))


@every_mode
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_there_is_the_value(mode, context):
    enc = encoder().eval()
    x, mask, weights = sets()
    expected = enc(x, mask, weights)
    with context():
        out = encode(enc, x.clone(), gradient=mode, chunk_size=4, mask=mask.clone(), weights=weights.clone())
    assert not out.requires_grad
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@every_mode
def test_data_made_in_inference_mode(mode):
    enc = encoder()
    with torch.inference_mode():
        x, mask, weights = sets()
    plain = (t.clone() for t in sets())
    expected = gradients(enc, next(plain), mode, mask=next(plain), weights=next(plain))
    same(gradients(enc, x, mode, mask=mask, weights=weights), expected)


@every_mode
def test_second_derivatives(mode):
    """Right where autograd has the whole graph, refused where a second pass makes the gradient."""
    enc = encoder(pooling=POOLINGS["learned slots"])
    x = sets()[0].requires_grad_()

    def slope(x):
        out = encode(enc, x, gradient=mode, chunk_size=4).sin().sum()
        return torch.autograd.grad(out, x, create_graph=True)[0]

    if mode == "full":
        found = torch.autograd.grad(slope(x).square().sum(), x)[0]
        step = torch.randn_like(x)
        values = [float(slope((x + e * step).detach().requires_grad_()).square().sum()) for e in (1e-5, -1e-5)]
        assert float((found * step).sum()) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)
    else:
        with pytest.raises(RuntimeError, match="once_differentiable"):
            slope(x).square().sum().backward()


@every_mode
def test_backward_twice(mode):
    enc = encoder()
    x = sets()[0]
    torch.manual_seed(7)
    loss = encode(enc, x, gradient=mode, chunk_size=4).sin().sum()
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in enc.named_parameters()}
    loss.backward()
    same({name: p.grad for name, p in enc.named_parameters()}, {name: 2 * g for name, g in once.items()})
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@every_mode
def test_two_encodings_in_one_loss(mode):
    enc = encoder(network(nn.Dropout(0.3)))
    x = sets()[0]
    torch.manual_seed(7)
    first, second = (encode(enc, part, gradient=mode, chunk_size=4).sin().sum() for part in (x, 2 * x))
    ours = torch.autograd.grad(first + second, list(enc.parameters()), allow_unused=True)
    torch.manual_seed(7)
    theirs = []
    for part in (x, 2 * x):
        out = encode(enc, part, gradient=mode, chunk_size=4).sin().sum()
        theirs.append(torch.autograd.grad(out, list(enc.parameters()), allow_unused=True))
    for a, b, c in zip(ours, *theirs, strict=True):
        torch.testing.assert_close(a, b + c, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", ["exact", "sampled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_autocast_and_half_parameters(mode, dtype):
    enc = encoder().float() if dtype == torch.float64 else encoder().to(dtype)
    x = sets()[0].float() if dtype == torch.float64 else sets()[0].to(dtype)
    found = []
    for each in ("full", mode):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float64):
            found.append(gradients(enc, x[:, :4], each))
    for name, gradient in found[0].items():
        error = float((found[1][name] - gradient).abs().max())
        assert error <= 0.03 * float(gradient.abs().max()) + 1e-4, name


def test_states_are_saved_between_the_passes_of_two_processes():
    """A state that went through a file merges on, and one that is on another device is refused."""
    enc = encoder().eval()
    x = sets()[0]
    state = enc.update(enc.init_state(3), x[:, :5])
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    resumed = torch.load(file, weights_only=True)
    torch.testing.assert_close(enc.readout(enc.update(resumed, x[:, 5:])), enc(x), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"equal shapes, dtypes and devices .* cpu and .* on meta"):
        state.merge(state.to("meta"))
