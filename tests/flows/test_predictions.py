"""Affine paths and what models predict on them: the same numbers as the formulas, and as each other."""

import math

import pytest
import torch

import flows
from flows import FlowMatching, LinearPath, SchrodingerBridgePath, TargetPath, VariancePreservingPath, as_velocity
from flows.predictions import from_velocity, to_velocity

QUIET = [LinearPath(), TargetPath(), TargetPath(sigma=0.1), VariancePreservingPath()]
every_quiet_path = pytest.mark.parametrize("path", QUIET, ids=repr)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def formulas(path, x0, x1, t, noise):
    """Points and velocities as the papers write them, in the order of operations that runs so far were made with."""
    shape = (-1, *[1] * (x0.ndim - 1))
    at, wide = t.reshape(shape).to(x0.dtype), t.reshape(shape).to(torch.promote_types(t.dtype, torch.float32))
    match path:
        case LinearPath():
            xt = x0 + at * (x1 - x0)
            return (xt + path.sigma * noise if path.sigma else xt), x1 - x0
        case SchrodingerBridgePath():
            variance = wide * (1 - wide)
            offset = path.sigma * variance.sqrt() * noise
            drift = (1 - 2 * wide) / (2 * variance + 1e-8) * offset
            return x0 + at * (x1 - x0) + offset.to(x0.dtype), x1 - x0 + drift.to(x0.dtype)
        case TargetPath():
            return (1 - (1 - path.sigma) * at) * x0 + at * x1, x1 - (1 - path.sigma) * x0
        case VariancePreservingPath():
            angle = at * (math.pi / 2)
            xt = angle.cos() * x0 + angle.sin() * x1
            return (xt + path.sigma * noise if path.sigma else xt), (math.pi / 2) * (
                angle.cos() * x1 - angle.sin() * x0
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("time_dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_base_of_the_paths_changes_no_bit(dtype, time_dtype):
    for path in [*QUIET, LinearPath(0.3), VariancePreservingPath(0.3), SchrodingerBridgePath(0.2)]:
        for shape in ((3,), (1, 4, 4)):
            x0, x1, noise = torch.randn(3, 32, *shape, generator=gen(), dtype=torch.float64).to(dtype)
            x1[:4] = x0[:4]
            t = torch.rand(32, generator=gen(1), dtype=torch.float64).to(time_dtype)
            t[:3] = torch.tensor([0.0, 1.0, 1e-7])
            for got, want in zip(path.sample(x0, x1, t, noise), formulas(path, x0, x1, t, noise), strict=True):
                assert torch.equal(got, want), path
                assert got.dtype == want.dtype


def test_equal_samples_stay_where_they_are():
    x = torch.randn(100, 2)
    assert torch.equal(LinearPath().sample(x, x, torch.rand(100))[0], x)


@every_quiet_path
def test_weights_and_their_derivatives(path):
    t = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    at, ahead, behind = (path.weights(t + step) for step in (0, 1e-6, -1e-6))
    for end in ("x0", "x1"):
        slope = (getattr(ahead, end) - getattr(behind, end)) / 2e-6
        rate = torch.as_tensor(path.speed * getattr(at, f"{end}_rate"), dtype=torch.float64)
        torch.testing.assert_close(rate.expand_as(slope), slope, rtol=1e-6, atol=1e-6)


@every_quiet_path
@pytest.mark.parametrize("shape", [(3,), (1, 2, 2)])
def test_point_and_velocity_hold_both_ends(path, shape):
    x0, x1 = torch.randn(2, 50, *shape, dtype=torch.float64)
    t = torch.rand(50, dtype=torch.float64)
    t[:2] = torch.tensor([0.0, 1.0])
    xt, ut = path.sample(x0, x1, t)
    torch.testing.assert_close(from_velocity(path, "x1", t, xt, ut), x1)
    torch.testing.assert_close(from_velocity(path, "noise", t, xt, ut), x0)
    inner = (t > 0.01) & (t < 0.99)
    for prediction, end in (("x1", x1), ("noise", x0), ("velocity", ut)):
        torch.testing.assert_close(to_velocity(path, prediction, t, xt, end)[inner], ut[inner])


class Gaussians:
    """Expected x0, x1 and velocity at a point between N(0, 1) and N(2, 1/4), independent pairs."""

    def __init__(self, path):
        self.path = path

    def expect(self, t, x):
        at = self.path.weights(t[:, None])
        variance = at.x0**2 + at.x1**2 / 4
        off = (x - 2 * at.x1) / variance
        return at, at.x0 * off, 2 + at.x1 / 4 * off

    def noise(self, t, x, y=None):
        return self.expect(t, x)[1]

    def x1(self, t, x, y=None):
        return self.expect(t, x)[2]

    def velocity(self, t, x, y=None):
        at, x0, x1 = self.expect(t, x)
        return self.path.speed * (at.x0_rate * x0 + at.x1_rate * x1)


@every_quiet_path
def test_predictions_are_one_velocity_and_sample_alike(path):
    truth = Gaussians(path)
    t, x = torch.linspace(0.01, 0.999, 40, dtype=torch.float64), torch.randn(40, 1, dtype=torch.float64)
    fields = {name: as_velocity(getattr(truth, name), name, path) for name in ("velocity", "x1", "noise")}
    assert fields["velocity"] == truth.velocity
    x0 = torch.randn(50, 1, dtype=torch.float64)
    want, *others = (flows.integrate(field, x0, rtol=1e-8, atol=1e-8).final for field in fields.values())
    for name in ("x1", "noise"):
        torch.testing.assert_close(fields[name](t, x), truth.velocity(t, x))
        ends = fields[name](torch.tensor([0.0, 1.0]).double(), x[:2])
        assert bool(ends.isfinite().all())
    for other in others:
        torch.testing.assert_close(other, want, rtol=0, atol=5e-4)


@every_quiet_path
@pytest.mark.parametrize("prediction", ["velocity", "x1", "noise"])
def test_the_loss_is_least_at_the_expected_value(path, prediction):
    x0, x1 = torch.randn(4000, 1, generator=gen()), 2 + torch.randn(4000, 1, generator=gen(1)) / 2
    matching = FlowMatching(path=path, prediction=prediction)
    truth = getattr(Gaussians(path), prediction)
    batch = matching.sample(x0, x1, generator=gen(2))
    best = matching.batch_loss(truth, batch)
    for factor, shift in ((1.2, 0.0), (0.8, 0.0), (1.0, 0.2), (1.0, -0.2)):
        wrong = matching.batch_loss(lambda t, x, y, f=factor, s=shift: f * truth(t, x) + s, batch)
        assert float(wrong) > float(best) + 1e-3
    end = {"velocity": batch.ut, "x1": x1, "noise": x0}[prediction]
    torch.testing.assert_close(best, (truth(batch.t, batch.xt) - end).square().mean())


def test_a_model_of_x1_trains_and_samples_as_a_module():
    torch.manual_seed(0)
    model = flows.models.ResidualMLP(2, num_classes=2, width=16, depth=1)
    optimizer, g = torch.optim.Adam(model.parameters(), lr=1e-2), gen()
    matching = FlowMatching(prediction="x1")
    centres = torch.tensor([[-2.0, 0.0], [2.0, 1.0]])
    for _ in range(150):
        y = torch.randint(2, (64,), generator=g)
        optimizer.zero_grad()
        matching.loss(model, torch.randn(64, 2, generator=g), centres[y], y, generator=g).backward()
        optimizer.step()
    field = as_velocity(model, "x1", LinearPath()).eval()
    assert not model.training
    y = torch.arange(2)
    for sampler in (field, flows.GuidedModel(field, 1.5)):
        x = flows.integrate(sampler, torch.randn(2, 2, generator=g), y=y, method="euler", steps=10).final
        assert float((x - centres[y]).abs().max()) < (0.5 if sampler is field else 5)


@pytest.mark.parametrize("prediction", ["x1", "noise"])
@pytest.mark.parametrize("path", [LinearPath(0.1), SchrodingerBridgePath(), VariancePreservingPath(0.2)], ids=repr)
def test_noise_of_the_path_hides_the_ends(path, prediction):
    for build in (
        lambda: FlowMatching(path=path, prediction=prediction),
        lambda: as_velocity(lambda t, x, y: x, prediction, path),
    ):
        with pytest.raises(ValueError, match=r"needs an affine path without noise of its own; got .*sigma"):
            build()


def test_unknown_predictions_are_refused():
    with pytest.raises(ValueError, match="prediction must be one of 'velocity', 'x1', 'noise'; got 'x0'"):
        FlowMatching(prediction="x0")
    with pytest.raises(TypeError, match="path must be a flows path such as LinearPath"):
        flows.as_velocity(lambda t, x, y: x, "x1", None)
    with pytest.raises(TypeError, match="model must be called as"):
        flows.as_velocity(3, "x1", flows.LinearPath())
