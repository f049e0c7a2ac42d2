"""Models: published sizes, conditions that can be absent, transforms and the compiler."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call, grad, jvp, vmap

import flows
from flows.models import DIT_PRESETS, PRESETS, DiT, ResidualMLP, UNet, parameter_count

MODELS = {
    "mlp": (lambda: ResidualMLP(4, width=16, depth=1), (4,), None),
    "mlp-labels": (lambda: ResidualMLP(4, width=16, depth=1, num_classes=3), (4,), torch.tensor([0, 2, -1])),
    "mlp-vectors": (
        lambda: ResidualMLP(4, width=16, depth=1, condition_dim=2),
        (4,),
        torch.tensor([[0.5, 1.0], [2.0, 0.0], [torch.nan, torch.nan]]),
    ),
    "unet": (lambda: UNet.preset("digits"), (1, 8, 8), None),
    "unet-labels": (lambda: UNet.preset("digits", num_classes=3), (1, 8, 8), torch.tensor([0, 2, -1])),
    "unet-vectors": (lambda: UNet.preset("digits", condition_dim=2), (1, 8, 8), torch.tensor([[0.5, 1.0]] * 3)),
}
SMALL = {"patch_size": 2, "width": 16, "depth": 1, "heads": 2}
MODELS |= {
    "dit": (lambda: DiT(1, **SMALL), (1, 4, 8), None),
    "dit-labels": (lambda: DiT(2, **SMALL, num_classes=3), (2, 4, 4), torch.tensor([0, 2, -1])),
    "dit-vectors": (lambda: DiT(1, **SMALL, condition_dim=2), (1, 4, 4), torch.tensor([[0.5, 1.0]] * 3)),
}


@pytest.fixture(params=MODELS)
def case(request):
    """A model that is not zero anywhere, times, points and conditions."""
    build, shape, y = MODELS[request.param]
    torch.manual_seed(0)
    model = build()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval(), torch.rand(3), torch.randn(3, *shape), y


def test_shapes_and_gradients(case):
    model, t, x, y = case
    out = model(t, x, y)
    assert out.shape == x.shape
    out.square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_rows_are_separate(case):
    model, t, x, y = case
    out = model(t, x, y)
    for i in range(3):
        one = model(t[i : i + 1], x[i : i + 1], None if y is None else y[i : i + 1])
        torch.testing.assert_close(one[0], out[i], rtol=1e-4, atol=1e-5)


def test_function_transforms(case):
    """jvp against a finite difference, and per-sample gradients against single ones."""
    model, t, x, y = case
    model, t, x = model.double(), t.double(), x.double()
    direction = torch.randn_like(x)
    _, tangent = jvp(lambda z: model(t, z, y), (x,), (direction,))
    h = 1e-5
    torch.testing.assert_close(
        tangent, (model(t, x + h * direction, y) - model(t, x - h * direction, y)) / (2 * h), rtol=1e-3, atol=1e-5
    )
    parameters = dict(model.named_parameters())

    def loss(weights, t, x, y):
        y = None if y is None else y[None]
        return functional_call(model, weights, (t[None], x[None], y)).square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0, None if y is None else 0))(parameters, t, x, y)
    single = grad(loss)(parameters, t[1], x[1], None if y is None else y[1])
    for name in parameters:
        torch.testing.assert_close(per_sample[name][1], single[name], rtol=1e-5, atol=1e-7)


def test_the_compiler_takes_it_whole(case):
    model, t, x, y = case
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(t, x, y), model(t, x, y))


def test_without_a_condition_the_condition_layer_has_no_say():
    for model, y, other in (
        (ResidualMLP(2, num_classes=3), torch.tensor([-1]), torch.tensor([1])),
        (ResidualMLP(2, condition_dim=2), torch.tensor([[torch.nan, torch.nan]]), torch.ones(1, 2)),
        (UNet.preset("digits", num_classes=3), torch.tensor([-1]), torch.tensor([1])),
        (DiT(1, **SMALL, num_classes=3), torch.tensor([-1]), torch.tensor([1])),
        (DiT(1, **SMALL, condition_dim=2), torch.tensor([[torch.nan, torch.nan]]), torch.ones(1, 2)),
    ):
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
        t, x = torch.rand(1), torch.randn(1, *((2,) if isinstance(model, ResidualMLP) else (1, 8, 8)))
        before, given = model(t, x, y), model(t, x, other)
        for p in model.condition.parameters():
            torch.nn.init.normal_(p)
        assert torch.equal(model(t, x, y), before)
        assert not torch.equal(model(t, x, other), given)


@pytest.mark.parametrize(
    ("name", "conditions", "count"),
    [
        # Counted with torchcfm 1.0.7's UNetModelWrapper at the same settings.
        ("mnist", {"attention": (28,)}, 1_075_361),
        ("mnist", {"attention": (28,), "num_classes": 10}, 1_076_641),
        ("cifar10-otcfm", {}, 35_746_307),
        ("cifar10-c2ot", {"num_classes": 10}, 83_351_043),
        ("imagenet32-c2ot", {}, 188_707_587),
    ],
)
def test_presets_have_the_papers_sizes(name, conditions, count):
    with torch.device("meta"):
        assert parameter_count(UNet.preset(name, **conditions)) == count


@pytest.mark.parametrize(
    ("name", "published", "count"),
    [
        # Of the paper, in millions, for 1000 classes on latents of 32 × 32 × 4. Theirs have a class more (no condition)
        # and four more channels out (variances): 32,865,056 and 130,282,528 with these, by the sums of their layers.
        ("dit-s-2", 33, 32_865_056 - 384 - 16 * 385),
        ("dit-b-2", 130, 130_315_808 - 768 - 16 * 769),
    ],
)
def test_transformers_have_the_papers_sizes(name, published, count):
    with torch.device("meta"):
        assert parameter_count(DiT.preset(name, num_classes=1000)) == count
    assert round(count / 1e6) == published


def test_a_new_transformer_is_zero_and_its_blocks_are_identities():
    model = DiT(3, **SMALL, num_classes=2)
    t, x, y = torch.rand(2), torch.randn(2, 3, 4, 6), torch.tensor([0, 1])
    assert not model(t, x, y).any()
    hidden, embedding = torch.randn(2, 6, 16), torch.randn(2, 16)
    assert torch.equal(model.blocks[0](hidden, embedding), hidden)
    # the one layer that starts at zero hears every later one after a step
    model(t, x, y).sum().backward()
    assert model.leave.bias.grad.any()


def test_patches_are_where_they_were():
    """With blocks that are identities and a modulation that is constant, a patch depends on itself alone."""
    torch.manual_seed(0)
    model = DiT(2, **SMALL)
    torch.nn.init.normal_(model.leave.weight)
    x = torch.randn(1, 2, 6, 4)
    changed = x.clone()
    changed[0, 1, 3, 2] += 1.0  # of the patch of rows 2-3 and columns 2-3
    t = torch.rand(1)
    different = (model(t, x) != model(t, changed)).any(1)[0]
    inside = torch.zeros(6, 4, dtype=torch.bool)
    inside[2:4, 2:4] = True
    assert torch.equal(different, inside)


def test_positions_tell_every_place():
    """Oracle: sines and cosines of row and column at DiT's frequencies, one place at a time."""
    from flows.models.dit import positions

    features = positions(3, 5, 8)
    for row, column in itertools.product(range(3), range(5)):
        waves = [f(at / 10_000 ** (i / 2)) for at in (row, column) for f in (math.cos, math.sin) for i in range(2)]
        torch.testing.assert_close(features[5 * row + column], torch.tensor(waves), rtol=1e-5, atol=1e-6)
    assert len(features.unique(dim=0)) == 15


def test_presets_run():
    assert DiT.preset("dit", in_channels=3)(torch.rand(2), torch.randn(2, 3, 8, 6)).shape == (2, 3, 8, 6)
    assert list(DIT_PRESETS) == ["dit", "dit-s-2", "dit-b-2"]
    for name in ("digits", "mnist"):
        size = PRESETS[name]["image_size"]
        assert UNet.preset(name)(torch.rand(2), torch.randn(2, 1, size, size)).shape == (2, 1, size, size)
    assert UNet(2, image_size=9, channels=8, multipliers=(1, 2, 2), attention=())(
        torch.rand(1), torch.randn(1, 2, 9, 13)
    ).shape == (1, 2, 9, 13)


@settings(max_examples=30, deadline=None)
@given(
    channels=st.integers(1, 6),
    multipliers=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    blocks=st.integers(1, 2),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    attend=st.booleans(),
    classes=st.integers(0, 3),
)
def test_every_unet_hears_the_time_and_the_condition(channels, multipliers, blocks, size, attend, classes):
    """Normalisation in groups of one channel cancels what is constant over the pixels."""
    options = {"multipliers": multipliers, "blocks": blocks, "attention": (8,) if attend else (), "heads": 1}
    if max(multipliers) * channels == 1:
        with pytest.raises(ValueError, match="needs at least 2 channels"):
            UNet(2, image_size=8, channels=channels, num_classes=classes, **options)
        return
    torch.manual_seed(0)
    model = UNet(2, image_size=8, channels=channels, num_classes=classes, **options).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = torch.randn(1, 2, *size, dtype=torch.float64).expand(3, -1, -1, -1)
    y = torch.tensor([0, 0, classes - 1]) if classes else None
    out = model(torch.tensor([0.2, 0.6, 0.6], dtype=torch.float64), x, y).detach()
    assert out.shape == x.shape
    if min(size) > 3:  # a few pixels are all constant after normalisation
        assert float((out[0] - out[1]).abs().max()) > 1e-11
        assert classes < 2 or float((out[1] - out[2]).abs().max()) > 1e-11


def test_bad_models_and_conditions():
    for options, says in (
        ({"multipliers": ()}, "number of multipliers must be at least 1"),
        ({"multipliers": (0, 1)}, "multiplier must be at least 1"),
        ({"num_classes": -1}, "num_classes must be at least 0"),
    ):
        with pytest.raises(ValueError, match=says):
            UNet(3, **{"image_size": 8, "attention": (), **options})
    for options, says in (({"width": 0}, "width must be"), ({"depth": -1}, "depth must be at least 0")):
        with pytest.raises(ValueError, match=says):
            ResidualMLP(2, **options)
    with pytest.raises(ValueError, match=r"resolutions of this model, \[32, 16, 8, 4\]; got \[5\]"):
        UNet(3, image_size=32, attention=(5,))
    with pytest.raises(ValueError, match="name must be one of"):
        UNet.preset("huge")
    for options, says in (
        ({"width": 18}, "width must be a multiple of 4 .* and of heads=2; got 18"),
        ({"heads": 3}, "of heads=3; got 16"),
        ({"depth": 0}, "depth must be at least 1"),
    ):
        with pytest.raises(ValueError, match=says):
            DiT(3, **{**SMALL, **options})
    with pytest.raises(ValueError, match="multiples of patch_size=2; got 4 × 5"):
        DiT(3, **SMALL)(torch.rand(1), torch.randn(1, 3, 4, 5))
    with pytest.raises(ValueError, match="built without conditions"):
        DiT(3, **SMALL)(torch.rand(1), torch.randn(1, 3, 4, 4), torch.tensor([1]))
    for model in (UNet.preset("digits"), DiT.preset("dit", depth=1)):
        for x in (torch.randn(2, 8, 8), torch.randn(2, 3, 8, 8), torch.randn(2, 2)):
            with pytest.raises(ValueError, match=r"x must have shape \(B, 1, H, W\); got"):
                model(torch.rand(len(x)), x)
    mlp, x = ResidualMLP(2), torch.randn(2, 2)
    for wrong in (torch.randn(2, 3), torch.randn(2), torch.randn(2, 1, 1)):
        with pytest.raises(ValueError, match=r"x must have shape \(B, d…\) of 2 features; got"):
            mlp(torch.rand(2), wrong)
    for wrong in (0.5, torch.tensor(0.5), torch.rand(3), torch.rand(2, 1)):
        with pytest.raises(ValueError, match=r"t must be a tensor of one time a sample, \(2,\); got"):
            mlp(wrong, x)
    with pytest.raises(TypeError, match=r"one dtype; got torch\.float64 and torch\.float32"):
        mlp(torch.rand(2), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert mlp(torch.rand(2), x.bfloat16()).shape == x.shape
    with pytest.raises(TypeError, match=r"until must be a tensor of times \(2,\); got float"):
        ResidualMLP(2, average_velocity=True)(torch.rand(2), x, until=0.7)
    labels = UNet.preset("digits", num_classes=3)
    with pytest.raises(ValueError, match="integer labels"):
        labels(torch.rand(2), torch.randn(2, 1, 8, 8), torch.rand(2))
    with pytest.raises(TypeError, match="y must be numeric; it holds 'a'"):
        labels(torch.rand(2), torch.randn(2, 1, 8, 8), ["a", "b"])
    with pytest.raises(TypeError, match=r"y must hold one condition a sample; got 1\. For one class: torch.full"):
        labels(torch.rand(2), torch.randn(2, 1, 8, 8), 1)
    with pytest.raises(ValueError, match="condition_dim=2"):
        ResidualMLP(2, condition_dim=2)(torch.rand(2), torch.randn(2, 2), torch.rand(2, 3))


def linear(t, x, y):
    """A field that tells the two calls apart: label + 1, and 10 without."""
    return torch.where(y < 0, 10.0, y + 1.0)[:, None] + 0 * x


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, -2.0, 0.5])
def test_guidance_is_the_formula(scale):
    y = torch.tensor([0, 4, 7])
    out = flows.GuidedModel(linear, scale)(torch.rand(3), torch.randn(3, 2), y)
    expected = 10 + scale * (y + 1.0 - 10)
    torch.testing.assert_close(out, expected[:, None].expand(3, 2))


def test_guidance_takes_a_scale_for_each_sample_and_integrates():
    y, scale = torch.tensor([0, 4, 7]), torch.tensor([0.0, 2.0, -1.0])
    guided = flows.GuidedModel(linear, scale)
    x0 = torch.randn(3, 2)
    solved = flows.integrate(guided, x0, y=y, method="euler", steps=2)
    torch.testing.assert_close(solved.final, x0 + (10 + scale * (y - 9.0))[:, None])


def test_guidance_calls_once_where_one_field_is_enough():
    sizes = []

    def counted(t, x, y):
        sizes.append(len(x))
        return linear(t, x, y)

    for scale in (0, 1, 2):
        flows.GuidedModel(counted, scale)(torch.rand(3), torch.randn(3, 2), torch.tensor([0, 1, 2]))
    assert sizes == [3, 3, 6]


def test_bad_guidance():
    x, t = torch.zeros(3, 2), torch.zeros(3)
    with pytest.raises(ValueError, match="pass y"):
        flows.GuidedModel(linear, 2.0)(t, x)
    with pytest.raises(ValueError, match="each of the 3 samples; got 2"):
        flows.GuidedModel(linear, torch.ones(2))(t, x, torch.tensor([0, 1, 2]))
    for bad in (torch.ones(2, 2), float("nan"), "strong"):
        with pytest.raises((ValueError, TypeError), match="scale must be"):
            flows.GuidedModel(linear, bad)
