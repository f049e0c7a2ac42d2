"""What every path promises, whatever its curve. A path joins by being in ``flows.__all__`` and having a line here."""

import inspect
from dataclasses import dataclass

import pytest
import torch

import flows
import mbot
from flows.testing import check_path

PATHS = {
    "LinearPath": [flows.LinearPath(), flows.LinearPath(sigma=0.3)],
    "SchrodingerBridgePath": [flows.SchrodingerBridgePath(), flows.SchrodingerBridgePath(sigma=0.2)],
    "TargetPath": [flows.TargetPath(), flows.TargetPath(sigma=0.1)],
    "VariancePreservingPath": [flows.VariancePreservingPath(), flows.VariancePreservingPath(sigma=0.3)],
}

every_path = pytest.mark.parametrize("path", [case for cases in PATHS.values() for case in cases], ids=repr)


def ends(n=6, shape=(3,), dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, *shape, generator=g, dtype=torch.float64).to(dtype) for _ in range(3)]


def test_every_path_has_a_case():
    names = {
        n for n in flows.__all__ if inspect.isclass(getattr(flows, n)) and issubclass(getattr(flows, n), flows.Path)
    }
    assert names - {"Path", "AffinePath"} == set(PATHS)


@every_path
def test_it_keeps_the_contract(path, device):
    check_path(path, device=device)


@every_path
def test_where_it_ends(path):
    x0, x1, noise = ends()
    one = torch.ones(6, dtype=torch.float64)
    rest = path.sigma * x0 if isinstance(path, flows.TargetPath) else 0
    torch.testing.assert_close(path.sample(x0, x1, one, torch.zeros_like(noise))[0], x1 + rest)


@every_path
def test_a_model_trains_on_it(path):
    fm = flows.FlowMatching(path=path)
    assert fm.coupling == path.default_coupling()
    model = flows.models.ResidualMLP(3, width=8, depth=1)
    loss = fm.loss(model, torch.randn(8, 3), torch.randn(8, 3))
    loss.backward()
    assert bool(loss.isfinite())


@dataclass(frozen=True)
class Straight(flows.Path):
    """A path that is right; each path below breaks one promise of it."""

    def sample(self, x0, x1, t, noise=None):
        at = t.reshape(-1, *[1] * (x0.ndim - 1)).to(x0.dtype)
        return x0 + at * (x1 - x0), x1 - x0


@dataclass(frozen=True)
class Backwards(Straight):
    def sample(self, x0, x1, t, noise=None):
        point, velocity = super().sample(x0, x1, t)
        return point, -velocity


@dataclass(frozen=True)
class WrongEnd(Straight):
    def sample(self, x0, x1, t, noise=None):
        return super().sample(x0, 2 * x1, t)


@dataclass(frozen=True)
class WrongStart(Straight):
    def sample(self, x0, x1, t, noise=None):
        return super().sample(2 * x0, x1, t)


@dataclass(frozen=True)
class Mixing(Straight):
    def sample(self, x0, x1, t, noise=None):
        point, velocity = super().sample(x0, x1, t)
        return point + (t * (1 - t)).mean().to(x0.dtype), velocity


@dataclass(frozen=True)
class InPlace(Straight):
    def sample(self, x0, x1, t, noise=None):
        result = super().sample(x0.clone(), x1, t)
        x0.mul_(1.5)
        return result


@dataclass(frozen=True)
class Infinite(Straight):
    def sample(self, x0, x1, t, noise=None):
        point, velocity = super().sample(x0, x1, t)
        return point, velocity + torch.where(t == 0, torch.inf, 0.0).reshape(-1, *[1] * (x0.ndim - 1)).to(x0.dtype)


@dataclass(frozen=True)
class Doubling(Straight):
    def sample(self, x0, x1, t, noise=None):
        return tuple(value.double() for value in super().sample(x0, x1, t))


@dataclass(frozen=True)
class Flat(Straight):
    def sample(self, x0, x1, t, noise=None):
        return tuple(value.flatten(1) for value in super().sample(x0, x1, t))


@dataclass(frozen=True)
class Failing(Straight):
    def sample(self, x0, x1, t, noise=None):
        if x0.ndim > 2:
            raise IndexError("no images")
        return super().sample(x0, x1, t)


@dataclass(frozen=True)
class Random(Straight):
    def sample(self, x0, x1, t, noise=None):
        point, velocity = super().sample(x0, x1, t)
        return point + 0.1 * torch.randn_like(point), velocity


@dataclass(frozen=True)
class Noisy(Straight):
    """Takes noise and does not say so."""

    def sample(self, x0, x1, t, noise=None):
        point, velocity = super().sample(x0, x1, t)
        return point + 0.1 * (0 if noise is None else noise), velocity


@dataclass(frozen=True)
class Careless(Noisy):
    """Says that it needs noise and does without."""

    @property
    def needs_noise(self):
        return True


@dataclass(frozen=True)
class Boastful(Straight):
    """Says that it needs noise and takes none."""

    @property
    def needs_noise(self):
        return True


@dataclass(frozen=True)
class Forgetful(Straight):
    scale: float = 1.0

    def __reduce__(self):
        return (Forgetful, (2.0,))


BROKEN = {
    Backwards: r"the velocity is not the derivative of the point: got .*wanted .*at t = \[0.02.*x0 = \[.*x1 = \[",
    WrongEnd: r"does not end at x1: .*at t = \[1.0\]",
    WrongStart: r"does not start at x0: .*at t = \[0.0\]",
    Mixing: "the point of a row depends on the others",
    InPlace: "sample changed x0 in place",
    Infinite: r"the velocity is not finite, at t = \[0.0\]",
    Doubling: r"the point is torch.float64 .*\(torch.float32",
    Flat: r"the point is torch.float32 of shape \(5, 16\)",
    Failing: r"sample raised IndexError\('no images'\), at .*shape \(5, 1, 4, 4\)",
    Random: "a second call gives another point",
    Noisy: "needs_noise is False, but noise changes the result",
    Careless: "it needs noise and does without",
    Boastful: "needs_noise is True, but noise does not change the result",
    Forgetful: "is not equal to its pickled copy",
}


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_a_broken_promise_is_told_with_its_input(kind):
    check_path(Straight())
    with pytest.raises(AssertionError, match=BROKEN[kind]) as broken:
        check_path(kind())
    assert kind.__name__ in str(broken.value)


def test_what_is_no_path():
    with pytest.raises(AssertionError, match=r"derived from flows\.Path; got function"):
        check_path(lambda x0, x1, t: x0)


@pytest.mark.parametrize("path", [flows.SchrodingerBridgePath, flows.TargetPath, flows.VariancePreservingPath])
def test_bad_settings(path):
    with pytest.raises(ValueError, match="sigma must be a finite number"):
        path(sigma=-1.0)
    with pytest.raises(TypeError, match="sigma must be a number"):
        path(sigma="small")


def test_settings_of_one_path():
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        flows.TargetPath(sigma=1.0)
    with pytest.raises(ValueError, match="> 0"):
        flows.SchrodingerBridgePath(sigma=0)
    coupling = flows.FlowMatching(path=flows.SchrodingerBridgePath(sigma=0.5)).coupling
    assert coupling == mbot.OTCoupling(mbot.EntropicOT(reg=0.5, tol=1e-3))


def test_published_forms():
    """The formulas as the papers write them, in terms of the point itself (arXiv 2302.00482, Table 1 and Eq. 18)."""
    x0, x1, noise = ends()
    t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    at = t[:, None]
    xt, ut = flows.TargetPath(sigma=0.1).sample(x0, x1, t)
    torch.testing.assert_close(ut, (x1 - 0.9 * xt) / (1 - 0.9 * at))
    xt, ut = flows.SchrodingerBridgePath(sigma=0.7).sample(x0, x1, t, noise)
    mean = (1 - at) * x0 + at * x1
    torch.testing.assert_close(ut, (1 - 2 * at) / (2 * at * (1 - at)) * (xt - mean) + x1 - x0, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(xt - mean, 0.7 * (at * (1 - at)).sqrt() * noise)
    unit, _ = flows.VariancePreservingPath().sample(x0, x0, t)
    torch.testing.assert_close(unit, (at * torch.pi / 2).cos() * x0 + (at * torch.pi / 2).sin() * x0)
