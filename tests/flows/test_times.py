"""Time laws: their distributions, and where they are taken."""

import inspect
import pickle

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flows
import mbot
from flows import build, checkpoint
from flows.__main__ import main
from flows.commands.common import parse
from flows.config import TrainConfig
from tests.flows.toy_run import trainer, weights

U = flows.UniformTimes()
# Each law with its distribution function, from elsewhere.
LAWS = {
    "uniform": (U, lambda t: t),
    "logit-normal": (flows.LogitNormalTimes(), lambda t: scipy.stats.norm.cdf(np.log(t / (1 - t)))),
    "logit-normal -.4": (
        flows.LogitNormalTimes(-0.4, 0.5),
        lambda t: scipy.stats.norm.cdf(np.log(t / (1 - t)), -0.4, 0.5),
    ),
    "power 0": (flows.PowerTimes(0.0), lambda t: t**2),
    "power 3": (flows.PowerTimes(3.0), lambda t: t**1.25),
    "power -.5": (flows.PowerTimes(-0.5), lambda t: t**3),
    "shifted": (flows.ShiftedTimes(U, 3.0), lambda t: 3 * t / (1 + 2 * t)),
    "shifted back": (flows.ShiftedTimes(U, 0.5), lambda t: 0.5 * t / (1 - 0.5 * t)),
    "shifted logit-normal": (
        flows.ShiftedTimes(flows.LogitNormalTimes(), 2.0),
        lambda t: scipy.stats.norm.cdf(np.log(2 * t / (1 - t))),  # logit of 2 t / (1 + t)
    ),
}
every_law = pytest.mark.parametrize("name", LAWS)


def test_every_law_is_here():
    kinds = {k for k in vars(flows).values() if inspect.isclass(k) and issubclass(k, flows.TimeLaw)}
    assert kinds - {flows.TimeLaw} == {type(law) for law, _ in LAWS.values()}


@every_law
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_times_follow_their_law(name, seed):
    law, cdf = LAWS[name]
    t = law(4000, torch.Generator().manual_seed(seed), dtype=torch.float64).numpy()
    assert scipy.stats.kstest(t, cdf).pvalue > 0.01


@every_law
def test_the_density_is_the_slope_of_the_distribution(name):
    law, cdf = LAWS[name]
    t = np.linspace(0.01, 0.99, 99)
    slope = (cdf(t + 1e-5) - cdf(t - 1e-5)) / 2e-5
    density = law.log_density(torch.from_numpy(t)).exp().numpy()
    np.testing.assert_allclose(density, slope, rtol=1e-5, atol=1e-8)


@every_law
def test_the_density_has_no_holes(name):
    law, _ = LAWS[name]
    t = torch.tensor([-0.1, 1.1, torch.inf])
    assert law.log_density(t).tolist() == [-torch.inf] * 3
    ends = law.log_density(torch.tensor([0.0, 1.0, 1e-30, 1e-7, 1 - 1e-7]))
    assert not bool(ends.isnan().any())
    assert law.log_density(torch.rand(2, 3, dtype=torch.float64)).shape == (2, 3)


@every_law
def test_shapes_types_generators_and_settings(name, device):
    law, _ = LAWS[name]
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        t = law(7, torch.Generator().manual_seed(3), device, dtype)
        assert (t.shape, t.dtype, t.device.type) == ((7,), dtype, device.type)
        assert bool(((t >= 0) & (t <= 1)).all())
    again = law(7, torch.Generator().manual_seed(3))
    assert again.dtype == torch.float32
    assert torch.equal(again, law(7, torch.Generator().manual_seed(3)))
    assert law(0).shape == (0,)
    copy = pickle.loads(pickle.dumps(law))
    assert (copy, repr(copy)) == (law, repr(law))
    with pytest.raises(AttributeError):
        law.shift = 2


@settings(max_examples=40, deadline=None)
@given(shift=st.floats(0.05, 20), mean=st.floats(-3, 3), std=st.floats(0.2, 3))
def test_a_shift_moves_the_times_themselves(shift, mean, std):
    base = flows.LogitNormalTimes(mean, std)
    t = base(50, torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = flows.ShiftedTimes(base, shift)(50, torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(moved, t / (shift - (shift - 1) * t))
    assert torch.equal(moved.argsort(), t.argsort())
    assert bool((moved <= t + 1e-12).all() if shift >= 1 else (moved >= t - 1e-12).all())


@pytest.mark.parametrize(
    ("build", "error", "says"),
    [
        (lambda: flows.LogitNormalTimes(std=0), ValueError, "std must be a finite number > 0"),
        (lambda: flows.LogitNormalTimes(mean=float("nan")), ValueError, "mean must be a finite number"),
        (lambda: flows.PowerTimes(-1), ValueError, "alpha must be above -1"),
        (lambda: flows.PowerTimes("2"), TypeError, "alpha must be a number"),
        (lambda: flows.ShiftedTimes(U, 0), ValueError, "shift must be a finite number > 0"),
        (lambda: flows.ShiftedTimes("uniform", 2), TypeError, "base must be a time law"),
        (lambda: U(3, dtype=torch.int64), TypeError, "dtype must be a floating-point type"),
        (lambda: U(-1), ValueError, "n must be at least 0"),
        (lambda: U.log_density(torch.tensor(1)), TypeError, "t must be a floating-point tensor"),
        (lambda: flows.FlowMatching(times="uniform"), TypeError, "times must be a time law"),
        (lambda: flows.FlowMatching(time_weight=3), TypeError, "time_weight must be a function"),
        (lambda: trainer(times="uniform"), TypeError, "times must be a time law"),
    ],
)
def test_bad_settings(build, error, says):
    with pytest.raises(error, match=says):
        build()


def test_uniform_times_are_the_ones_drawn_so_far():
    x0, x1 = torch.randn(50, 2), torch.randn(50, 2)
    got = flows.along_path(flows.LinearPath(), x0, x1, torch.Generator().manual_seed(5)).t
    assert torch.equal(got, torch.rand(50, generator=torch.Generator().manual_seed(5)))
    assert torch.equal(got, flows.FlowMatching().along(flows.CoupledBatch(x0, x1), torch.Generator().manual_seed(5)).t)


def test_flow_matching_draws_from_its_law():
    fm = flows.FlowMatching(times=flows.PowerTimes(0.0))
    batch = fm.sample(torch.zeros(4000, 1), torch.ones(4000, 1), generator=torch.Generator().manual_seed(0))
    assert scipy.stats.kstest(batch.t.numpy(), lambda t: t**2).pvalue > 0.01
    torch.testing.assert_close(batch.xt[:, 0], batch.t)


def inverse(t):
    """One over the density of ``PowerTimes(0)``, but for its pole."""
    return 1 / (2 * t.clamp_min(1e-3))


def test_time_weights_multiply_those_of_the_pairs():
    x0, x1 = torch.randn(2, 64, 2)
    g = lambda: torch.Generator().manual_seed(0)
    for coupling in (mbot.IndependentCoupling(), mbot.WeightedCoupling(reg=2.0)):
        plain = flows.FlowMatching(coupling).sample(x0, x1, generator=g())
        weighted = flows.FlowMatching(coupling, time_weight=inverse).sample(x0, x1, generator=g())
        before = 1 if plain.weight is None else plain.weight
        assert torch.equal(weighted.weight, before * inverse(plain.t))
    zero = lambda t, x, y: 0 * x
    loss = flows.FlowMatching(time_weight=lambda t: 2 + 0 * t).loss(zero, x0, x1)
    torch.testing.assert_close(loss, 2 * (x1 - x0).square().mean())
    for bad, error, says in (
        (lambda t: t[:3], ValueError, r"one weight a time, \(64,\); got \(3,\)"),
        (lambda t: t / 0, ValueError, "finite"),
        (lambda t: t - 1.5, ValueError, r"must not be negative; its least weight is -1\."),
        (lambda t: 2.0, TypeError, "must be a tensor of one weight a time; got 2.0"),
    ):
        with pytest.raises(error, match=says):
            flows.FlowMatching(time_weight=bad).sample(x0, x1)


def test_weights_undo_the_law():
    """E over the law of w f = E over uniform times of f, here the squared time."""
    law = flows.LogitNormalTimes(0.5, 1.5)
    t = law(200_000, torch.Generator().manual_seed(0), dtype=torch.float64)
    value = ((-law.log_density(t)).exp() * t**2)[(t > 0) & (t < 1)].mean()
    assert float(value) == pytest.approx(1 / 3, rel=0.03)


def test_training_takes_the_law_saves_it_and_compares_it(tmp_path):
    law = flows.LogitNormalTimes(-0.4, 1.0)
    run = trainer(tmp_path, times=law, time_weight=inverse, steps=10)
    run.fit()
    whole, plain = trainer(times=law, time_weight=inverse), trainer(steps=10)
    plain.fit()
    assert not torch.equal(weights(plain), weights(run))
    again = trainer(tmp_path, times=law, time_weight=inverse)
    again.fit(resume=True)
    whole.fit()
    assert torch.equal(weights(again), weights(whole))
    last = checkpoint.latest(tmp_path / "checkpoints")
    with pytest.raises(flows.CheckpointError, match=r"times: saved LogitNormalTimes\(.*, here UniformTimes\(\)"):
        trainer(time_weight=inverse).load(last)
    with pytest.raises(flows.CheckpointError, match="time_weight: saved inverse, here None"):
        trainer(times=law).load(last)


def test_checkpoints_from_before_time_laws_were_uniform(tmp_path):
    trainer(tmp_path, steps=5).fit()
    last = checkpoint.latest(tmp_path / "checkpoints")
    state = torch.load(last, weights_only=True)
    del state["settings"]["times"], state["settings"]["time_weight"]
    torch.save(state, last)
    trainer().load(last)
    with pytest.raises(flows.CheckpointError, match=r"times: saved UniformTimes\(\), here PowerTimes\(alpha=1.0\)"):
        trainer(times=flows.PowerTimes(1.0)).load(last)


TINY = ["--data", "moons", "--model", "mlp", "--batch-size", "16", "--ot-batch-size", "32", "--steps", "2",
        "--evaluate", "0", "--no-progress", "--device", "cpu"]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "law"),
    [
        ([], U),
        (["--times", "logit-normal"], flows.LogitNormalTimes()),
        (["--times", "logit-normal", "--settings", "times.mean=-0.4"], flows.LogitNormalTimes(-0.4)),
        (["--times", "power", "--settings", "times.alpha=1"], flows.PowerTimes(1)),
        (
            ["--times", "shifted", "--settings", "times.base=LogitNormalTimes(std=0.5)", "times.shift=3"],
            flows.ShiftedTimes(flows.LogitNormalTimes(std=0.5), 3.0),
        ),
    ],
)
def test_the_command_line_trains_with_every_law(arguments, law, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", *TINY, *arguments, "--out", str(run)]) == 0, capsys.readouterr().err
    assert checkpoint.load(checkpoint.latest(run / "checkpoints"))["settings"]["times"] == repr(law)
    assert build.build_objective(parse(TrainConfig, arguments, "train")).times == law
    more = ["--steps", "3", "--resume", "--out", str(run)]
    other = ["--times", "power", "--settings", "times.alpha=7"]
    assert main(["train", *TINY, *other, *more]) in (2, 3)
    assert "times" in capsys.readouterr().err
    assert main(["train", *TINY, *arguments, *more]) == 0, capsys.readouterr().err


def test_laws_that_lack_a_setting_are_told(tmp_path, capsys):
    assert main(["train", *TINY, "--times", "power", "--out", str(tmp_path / "run")]) == 2
    assert "--times power needs alpha: give --settings times.alpha=…" in capsys.readouterr().err
