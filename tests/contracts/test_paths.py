"""What every path promises, whatever its curve. A path joins by being in ``flows.__all__`` and having a line here."""

import inspect
import pickle

import pytest
import torch

import flows
import mbot

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
    assert names - {"Path"} == set(PATHS)


@every_path
@pytest.mark.parametrize("shape", [(3,), (1, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shapes_and_dtypes(path, shape, dtype, device):
    x0, x1, noise = (x.to(device) for x in ends(shape=shape, dtype=dtype))
    xt, ut = path.sample(x0, x1, torch.rand(6, device=device), noise)
    assert xt.shape == ut.shape == x0.shape
    assert xt.dtype == ut.dtype == dtype
    assert xt.device.type == device.type


@every_path
@pytest.mark.parametrize("time", [0.02, 0.3, 0.5, 0.77, 0.98])
def test_the_velocity_is_the_derivative_of_the_point(path, time):
    """Central differences of the path in t, with everything else held."""
    x0, x1, noise = ends()
    t = torch.full((6,), time, dtype=torch.float64)
    h = 1e-6
    ahead, behind = (path.sample(x0, x1, t + s * h, noise)[0] for s in (1, -1))
    torch.testing.assert_close(path.sample(x0, x1, t, noise)[1], (ahead - behind) / (2 * h), rtol=1e-5, atol=1e-6)


@every_path
def test_it_leads_from_the_noise_to_the_sample(path):
    x0, x1, noise = ends()
    zero = torch.zeros_like(noise)
    start, end = (path.sample(x0, x1, torch.full((6,), t, dtype=torch.float64), zero)[0] for t in (0.0, 1.0))
    torch.testing.assert_close(start, x0)
    rest = path.sigma * x0 if isinstance(path, flows.TargetPath) else 0
    torch.testing.assert_close(end, x1 + rest)


@every_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_finite_at_both_ends(path, dtype):
    x0, x1, noise = ends(dtype=dtype)
    for t in (0.0, 1e-30, 1e-7, 1 - 1e-7, 1.0):
        for value in path.sample(x0, x1, torch.full((6,), t), noise):
            assert bool(value.isfinite().all())


@every_path
def test_rows_are_separate(path):
    x0, x1, noise = ends()
    t = torch.rand(6, dtype=torch.float64)
    xt, ut = path.sample(x0, x1, t, noise)
    for i in range(6):
        row = slice(i, i + 1)
        one = path.sample(x0[row], x1[row], t[row], noise[row])
        torch.testing.assert_close(one, (xt[row], ut[row]))


@every_path
def test_noise_is_asked_for_exactly_where_it_is_used(path):
    x0, x1, noise = ends()
    t = torch.full((6,), 0.4, dtype=torch.float64)
    if path.needs_noise:
        with pytest.raises(ValueError, match=f"noise is needed by {type(path).__name__}"):
            path.sample(x0, x1, t)
        assert not torch.equal(path.sample(x0, x1, t, noise)[0], path.sample(x0, x1, t, -noise)[0])
    else:
        assert torch.equal(path.sample(x0, x1, t)[0], path.sample(x0, x1, t, noise)[0])


@every_path
def test_settings_pickle_compare_and_print(path):
    again = pickle.loads(pickle.dumps(path))
    assert again == path
    assert repr(again) == repr(path)
    with pytest.raises(AttributeError):
        path.sigma = 2.0


@every_path
def test_it_trains_with_its_own_coupling(path):
    fm = flows.FlowMatching(path=path)
    assert fm.coupling == path.default_coupling()
    model = flows.models.ResidualMLP(3, width=8, depth=1)
    loss = fm.loss(model, torch.randn(8, 3), torch.randn(8, 3))
    loss.backward()
    assert bool(loss.isfinite())


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
