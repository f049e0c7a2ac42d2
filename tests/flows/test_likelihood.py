"""The likelihood of a flow: closed forms, finite differences, and what cannot be right is refused."""

import math

import pytest
import torch
from torch import nn

import flows


def affine(t, x, y):
    """x1 = exp(1) x0 + 2 (e - 1) in the first coordinate, x1 = exp(-1) x0 in the others."""
    rate = torch.full_like(x, -1.0)
    rate[:, 0] = 1.0
    drift = torch.zeros_like(x)
    drift[:, 0] = 2.0
    return rate * x + drift


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
@pytest.mark.parametrize("d", [1, 3])
def test_likelihood_of_an_affine_flow_is_the_gaussians(trace, d):
    """Hutchinson is exact here too: the Jacobian is diagonal."""
    x1 = torch.randn(10, d, dtype=torch.float64)
    got = flows.log_likelihood(affine, x1, trace=trace, rtol=1e-8, atol=1e-8)
    mean, std = torch.zeros(d, dtype=torch.float64), torch.full((d,), math.exp(-1), dtype=torch.float64)
    mean[0], std[0] = 2 * (math.e - 1), math.e
    torch.testing.assert_close(got, torch.distributions.Normal(mean, std).log_prob(x1).sum(1), rtol=1e-6, atol=1e-6)


def test_hutchinson_is_unbiased_on_a_mixing_field():
    a = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 3
    x1 = torch.randn(4, 5, dtype=torch.float64)
    field = lambda t, x, y: x @ a.T
    g = torch.Generator().manual_seed(0)
    exact = flows.log_likelihood(field, x1, trace="exact")
    guess = flows.log_likelihood(field, x1, trace="hutchinson", probes=800, generator=g)
    torch.testing.assert_close(guess, exact, rtol=0.02, atol=0.05)
    torch.testing.assert_close(
        exact, flows.log_likelihood(field, x1, trace="exact", method="rk4", steps=40), rtol=1e-4, atol=1e-4
    )


def test_a_density_integrates_to_one():
    """Over a fine grid of the plane, for a model and its images' shape."""
    model = flows.models.ResidualMLP(2, width=16, depth=1).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    side = torch.linspace(-12, 12, 121)
    points = torch.cartesian_prod(side, side)
    density = flows.log_likelihood(model, points, method="rk4", steps=20).exp()
    assert float(density.sum() * (side[1] - side[0]) ** 2) == pytest.approx(1, abs=0.03)
    net = flows.models.UNet.preset("digits", num_classes=2).eval()
    out = flows.log_likelihood(net, torch.randn(2, 1, 8, 8), y=torch.tensor([0, 1]), method="euler", steps=2)
    assert out.shape == (2,)
    assert not out.requires_grad
    assert all(p.grad is None for p in net.parameters())


def test_bad_likelihood():
    x = torch.zeros(2, 2)
    for arguments, says in (
        ({"trace": "none"}, "trace must be one of"),
        ({"method": "rk4"}, "give steps"),
        ({"probes": 0, "trace": "hutchinson"}, "probes must be at least 1"),
    ):
        with pytest.raises(ValueError, match=says):
            flows.log_likelihood(affine, x, **arguments)
    with pytest.raises(ValueError, match=r"shape \(B, d…\)"):
        flows.log_likelihood(affine, torch.zeros(2))


def wave(t, x, y):
    """``3 t² x``: the divergence is ``3 t² d``, so that log p changes by -d from noise to sample."""
    return 3 * t[:, None] ** 2 * x


def wave_likelihood(x1):
    """Samples are ``e x0``."""
    d = x1.shape[1]
    return torch.distributions.Normal(0.0, 1.0).log_prob(x1.double() / math.e).sum(1) - d


class Wave(nn.Module):
    """`wave` with a learnt rate, as a module."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(3.0))

    def forward(self, t, x, y=None):
        return self.rate * t[:, None] ** 2 * x


SOLVERS = [{}, {"method": "rk4", "steps": 20}]


@pytest.mark.parametrize("solver", SOLVERS, ids=["dopri5", "rk4"])
@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_it_is_the_same_wherever_it_is_called(mode, trace, solver):
    """Validation loops run under inference_mode, where autograd records nothing."""
    x = torch.randn(5, 2)
    want = wave_likelihood(x).float()
    labels = torch.arange(5)
    model = Wave()
    with mode():
        got = flows.log_likelihood(wave, x, trace=trace, **solver)
        made_here = flows.log_likelihood(model, x * 1, y={"a": labels * 1}, trace=trace, **solver)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(made_here, want, rtol=1e-3, atol=1e-3)
    assert not got.requires_grad


@pytest.mark.parametrize("name", ["mlp", "unet", "guided"])
def test_models_under_inference_mode(name):
    net = flows.models.UNet.preset("digits", num_classes=2) if name == "unet" else None
    net = net or flows.models.ResidualMLP(3, width=8, depth=1, num_classes=2)
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    model = flows.GuidedModel(net.eval(), 2.0) if name == "guided" else net.eval()
    x, y = torch.randn(4, *((1, 8, 8) if name == "unet" else (3,))), torch.tensor([0, 1, 1, 0])
    how = {"method": "euler", "steps": 2, "trace": "hutchinson"}
    want = flows.log_likelihood(model, x, y=y, generator=torch.Generator().manual_seed(0), **how)
    with torch.inference_mode():
        got = flows.log_likelihood(model, x, y=y + 0, generator=torch.Generator().manual_seed(0), **how)
    assert torch.equal(got, want)


def detached(t, x, y):
    return wave(t, x.detach(), y)


def without_grad(t, x, y):
    with torch.no_grad():
        return wave(t, x, y)


def in_inference(t, x, y):
    with torch.inference_mode():
        return wave(t, x, y)


def through_numpy(t, x, y):
    return torch.from_numpy(wave(t, x.detach(), y).numpy())


class Frozen(nn.Module):
    """Carries gradients to its parameters and none to its input."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(3.0))

    def forward(self, t, x, y=None):
        return self.rate * t[:, None] ** 2 * x.detach()


@pytest.mark.parametrize("model", [detached, without_grad, in_inference, through_numpy, Frozen()])
@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_a_model_that_hides_its_derivative_is_refused(model, trace):
    with pytest.raises(RuntimeError, match=r"no gradient with respect to x.*no_grad"):
        flows.log_likelihood(model, torch.randn(3, 2), trace=trace)


def test_constant_fields_have_no_divergence():
    x = torch.randn(6, 2, dtype=torch.float64)
    normal = torch.distributions.Normal(0.0, 1.0)
    for model in (
        lambda t, x, y: torch.ones_like(x),
        lambda t, x, y: torch.ones_like(x) * nn.Parameter(torch.ones(())),
        lambda t, x, y: t[:, None].expand_as(x) * 2,
    ):
        torch.testing.assert_close(flows.log_likelihood(model, x), normal.log_prob(x - 1).sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS, ids=["dopri5", "rk4"])
def test_a_field_that_is_no_number_is_an_error(solver):
    with pytest.raises(flows.IntegrationError, match="not finite"):
        flows.log_likelihood(lambda t, x, y: x * torch.nan, torch.randn(3, 2), **solver)
    with pytest.raises(flows.IntegrationError, match="not finite"):  # only the divergence overflows
        flows.log_likelihood(lambda t, x, y: torch.sin(x * 1e30) * 1e30, torch.ones(3, 2), **solver)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_half_precision_run_in_float32(dtype):
    """A thousand small steps of a slow field vanish where the state has eight bits."""
    x1 = torch.ones(2, 2, dtype=dtype)
    slow = lambda t, x, y: 0.5 * x + 0.0 * t[:, None]
    got = flows.log_likelihood(slow, x1, method="euler", steps=1000)
    want = torch.distributions.Normal(0.0, 1.0).log_prob(x1.double() / math.exp(0.5)).sum(1) - 1.0
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("solver", SOLVERS, ids=["dopri5", "rk4"])
@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_gradients_on_request_are_the_derivatives(trace, solver):
    """In the samples, the conditions and the weights, against central differences."""
    g = torch.Generator().manual_seed(0)
    model = flows.models.ResidualMLP(3, condition_dim=2, width=8, depth=1).double()
    x, y = (torch.randn(4, k, generator=g, dtype=torch.float64) for k in (3, 2))
    # Adaptive steps move with the inputs by less than their tolerance.
    tight = {**solver, "rtol": 1e-9, "atol": 1e-9, "trace": trace}

    def value(x, y, **how):
        return flows.log_likelihood(model, x, y=y, generator=torch.Generator().manual_seed(1), **tight, **how).sum()

    weight = model.blocks[0][0].weight
    inputs = [x.requires_grad_(), y.requires_grad_(), weight]
    recorded = value(x, y, differentiable=True)
    torch.testing.assert_close(recorded.detach(), value(x.detach(), y.detach()))
    grads = torch.autograd.grad(recorded, inputs)
    for tensor, grad in zip(inputs, grads, strict=True):
        direction = torch.randn(tensor.shape, generator=g, dtype=torch.float64)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                tensor += sign * 1e-5 * direction
                ends.append(value(x, y))
                tensor -= sign * 1e-5 * direction
        torch.testing.assert_close((grad * direction).sum(), (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-6)


def test_gradients_on_request_of_a_known_density():
    """The score and the derivative in the rate: x1 = exp(rate / 3) x0."""
    x = torch.randn(5, 2, requires_grad=True)
    model = Wave()
    flows.log_likelihood(model, x, differentiable=True).sum().backward()
    torch.testing.assert_close(x.grad, -x.detach() / math.e**2, rtol=1e-3, atol=1e-3)
    want = float((x.detach().square() / math.e**2 - 1).sum()) / 3
    assert float(model.rate.grad) == pytest.approx(want, rel=1e-3, abs=1e-3)


def test_a_request_for_gradients_where_none_are_recorded_is_refused():
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), pytest.raises(ValueError, match="differentiable=True records nothing under"):
            flows.log_likelihood(wave, torch.zeros(2, 2), differentiable=True)
