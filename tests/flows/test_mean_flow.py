"""MeanFlow: the identity it trains, the derivative in its target, what it samples, and that it trains everywhere."""

import copy
import itertools
import math

import pytest
import scipy.stats
import torch
from torch import nn
from torch.utils.data import TensorDataset

import flows
import mbot
from flows import FlowBatch, FlowMatching, MeanFlow, build, checkpoint
from flows.__main__ import main
from flows.commands.common import parse
from flows.config import TrainConfig
from flows.matching import LossModule
from flows.models import DiT, ResidualMLP, UNet


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


class Gaussians:
    """Average velocity of the flow from N(0, 1) to N(mean, std²) along straight independent pairs, in closed form.

    In one dimension a sample keeps its quantile: ``X_t = m(t) + s(t) z`` with a fixed z.
    """

    def __init__(self, mean=3.0, std=0.5):
        self.mean, self.std = mean, std

    def spread(self, t):
        return ((1 - t) ** 2 + (t * self.std) ** 2).sqrt()

    def velocity(self, t, x):
        t = t[:, None]
        growth = (t * self.std**2 - (1 - t)) / self.spread(t) ** 2
        return self.mean + growth * (x - t * self.mean)

    def __call__(self, t, x, y=None, until=None):
        t, end = t[:, None], until[:, None]
        moved = end * self.mean + self.spread(end) / self.spread(t) * (x - t * self.mean)
        return (moved - x) / (end - t)


def intervals(n=64):
    """Times with ends after them, in float64."""
    ends = torch.rand(2, n, generator=gen(), dtype=torch.float64).sort(0).values
    return ends[0], ends[1]


def test_the_closed_form_solves_the_identity():
    """With the marginal velocity along which to differentiate, the known average velocity has no error left."""
    u, (t, until) = Gaussians(), intervals()
    x = 3 * torch.randn(64, 1, generator=gen(), dtype=torch.float64)
    batch = FlowBatch(t, x, u.velocity(t, x), until=until)
    assert float(MeanFlow(power=0.0).batch_loss(u, batch)) < 1e-20
    wrong = FlowBatch(t, x, u.velocity(t, x) + 0.1, until=until)
    assert float(MeanFlow(power=0.0).batch_loss(u, wrong)) > 1e-3


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_closed_form_samples_the_data_in_any_steps(steps):
    x0 = torch.randn(500, 1, generator=gen(), dtype=torch.float64)
    torch.testing.assert_close(MeanFlow.sample(Gaussians(), x0, steps=steps), 3 + 0.5 * x0)


def unet(**settings):
    model = UNet(1, image_size=4, channels=4, multipliers=(1, 2), blocks=1, attention=(2,), num_classes=3,
                 average_velocity=True, **settings)  # fmt: skip
    return restless(model)


def restless(model):
    """A model none of whose layers is zero, in float64."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.double()


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: ResidualMLP(2, num_classes=3, width=16, average_velocity=True).double(), (2,)),
        (lambda: unet(), (1, 4, 4)),
        (lambda: unet(dropout=0.3), (1, 4, 4)),
        (lambda: restless(DiT(1, width=8, depth=1, heads=2, num_classes=3, average_velocity=True)), (1, 4, 4)),
    ],
    ids=["mlp", "unet", "unet with dropout", "dit"],
)
def test_the_target_holds_the_derivative_along_the_path(build, shape):
    torch.manual_seed(0)
    model, (t, until) = build(), intervals(6)
    if isinstance(model, ResidualMLP):
        nn.init.normal_(model.interval.weight)
    x, v = (torch.randn(6, *shape, dtype=torch.float64) for _ in range(2))
    y = torch.tensor([0, 1, 2, -1, 0, 1])
    torch.manual_seed(1)  # of the dropout
    u, target = MeanFlow().regression(model, FlowBatch(t, x, v, y, until=until))

    def at(step):
        torch.manual_seed(1)
        return model(t + step, x + step * v, y, until=until)

    length = (until - t).reshape(-1, *[1] * len(shape))
    slope = (at(1e-6) - at(-1e-6)) / 2e-6
    torch.testing.assert_close(u, at(0.0))
    assert float(slope.detach().abs().max()) > 0.05
    torch.testing.assert_close(target, v + length * slope, rtol=1e-3, atol=1e-6)
    assert u.requires_grad
    assert not target.requires_grad


def test_without_intervals_it_is_flow_matching():
    x0, x1, y = torch.randn(32, 2), torch.randn(32, 2) + 3, torch.arange(32) % 3
    torch.manual_seed(0)
    model = ResidualMLP(2, num_classes=3, width=8, average_velocity=True)
    for coupling, path in ((mbot.WeightedCoupling(reg=2.0), flows.LinearPath(0.1)), (mbot.OTCoupling(), None)):
        law = flows.LogitNormalTimes(-0.4, 1.0)
        given = {"coupling": coupling, "times": law} | ({} if path is None else {"path": path})
        mean = MeanFlow(**given, share=0.0, power=0.0).loss(model, x0, x1, y, generator=gen())
        assert torch.equal(mean, FlowMatching(**given).loss(model, x0, x1, y, generator=gen()))


def test_intervals_are_sorted_pairs_of_the_law_for_their_share():
    law = flows.LogitNormalTimes(-0.4, 1.0)
    assert MeanFlow().times == law
    pairs = flows.CoupledBatch(torch.zeros(20_000, 1), torch.ones(20_000, 1))
    batch = MeanFlow(share=0.3).along(pairs, gen())
    torch.testing.assert_close(batch.xt[:, 0], batch.t)
    apart = batch.until > batch.t
    assert bool((batch.until >= batch.t).all())
    assert float(apart.float().mean()) == pytest.approx(0.3, abs=0.01)

    def cdf(t):
        return scipy.stats.norm.cdf(torch.logit(torch.as_tensor(t)).numpy(), -0.4, 1.0)

    for times, of in (
        (batch.t[~apart], cdf),
        (batch.t[apart], lambda t: 1 - (1 - cdf(t)) ** 2),  # the smaller of two
        (batch.until[apart], lambda t: cdf(t) ** 2),
    ):
        assert scipy.stats.kstest(times.numpy(), of).pvalue > 0.01
    part = batch[3:7]
    assert torch.equal(part.until, batch.until[3:7])


def test_weights_divide_by_a_power_of_the_error():
    x0, x1 = torch.randn(2, 64, 2)
    mean = MeanFlow(mbot.WeightedCoupling(reg=2.0), power=0.75, floor=0.01)
    batch = mean.points(x0, x1, generator=gen())
    zero = lambda t, x, y, until: 0 * x
    error = batch.ut.square().mean(1)  # the derivative of zero is zero
    torch.testing.assert_close(mean.batch_loss(zero, batch), (batch.weight * error / (error + 0.01) ** 0.75).mean())


def test_it_computes_in_float32_under_autocast_and_on_half_precision_samples():
    seen = []

    class Spy(ResidualMLP):
        def forward(self, t, x, y=None, *, until=None):
            out = super().forward(t, x, y, until=until)
            seen.append((t.dtype, x.dtype, out.dtype))
            return out

    torch.manual_seed(0)
    model, x0, x1 = Spy(2, width=8, average_velocity=True), torch.randn(8, 2), torch.randn(8, 2)
    plain = MeanFlow().loss(model, x0, x1, generator=gen())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(MeanFlow().loss(model, x0, x1, generator=gen()), plain)
    MeanFlow().loss(model, x0.bfloat16(), x1.bfloat16(), generator=gen()).backward()
    assert set(seen) == {(torch.float32,) * 3}


COUPLINGS = [
    mbot.IndependentCoupling(), mbot.OTCoupling(), mbot.ConditionalOTCoupling(), mbot.WeightedCoupling(reg=2.0),
    mbot.BoMbCoupling(num_batches=2), mbot.OTCoupling(mbot.EntropicOT(reg=0.5)),
    mbot.OTCoupling(mbot.PartialOT(mass=0.75)), mbot.SinkhornCoupling(reg=0.1),
]  # fmt: skip


@pytest.mark.parametrize("coupling", COUPLINGS, ids=repr)
@pytest.mark.parametrize("path", [flows.LinearPath(), flows.VariancePreservingPath(sigma=0.1)], ids=repr)
def test_any_coupling_and_path_feeds_it(coupling, path):
    torch.manual_seed(0)
    model = ResidualMLP(2, num_classes=2, width=8, depth=1, average_velocity=True)
    loss = MeanFlow(coupling, path, share=1.0).loss(
        model, torch.randn(16, 2), torch.randn(16, 2), torch.arange(16) % 2, generator=gen()
    )
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
    assert float(model.interval.weight.grad.abs().max()) > 0


def test_the_bridge_gets_its_entropic_pairs_here_too():
    path = flows.SchrodingerBridgePath(sigma=0.5)
    assert MeanFlow(path=path).coupling == path.default_coupling()
    with pytest.raises(ValueError, match="entropic pairs"):
        MeanFlow(mbot.IndependentCoupling(), path)


def test_one_step_learns_what_one_euler_step_cannot():
    """From N(0, 1) to N(3, 1/4), independent pairs: one step of the velocity at 0 collapses to the mean."""
    torch.manual_seed(0)
    model = ResidualMLP(1, width=32, depth=1, average_velocity=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    objective, g = MeanFlow(times=flows.UniformTimes(), share=0.75, power=0.0), gen()
    rate = flows.warmup_schedule(optimizer, warmup=10, steps=500)
    for _ in range(500):
        x0, x1 = torch.randn(128, 1, generator=g), 3 + 0.5 * torch.randn(128, 1, generator=g)
        optimizer.zero_grad()
        objective.loss(model, x0, x1, generator=g).backward()
        optimizer.step()
        rate.step()
    x0 = torch.randn(2000, 1, generator=g)
    one, two = (MeanFlow.sample(model, x0, steps=steps) for steps in (1, 2))
    euler = flows.integrate(model, x0, method="euler", steps=1).final
    assert float(euler.std()) < 0.15
    for x in (one, two):
        assert float(x.mean()) == pytest.approx(3, abs=0.1)
        assert 2 * euler.std() < x.std() < 0.75


def test_guidance_combines_average_velocities():
    def model(t, x, y, until):
        value = y.clamp_min(0).double() + until  # "no condition" is -1
        return value[:, None].expand_as(x)

    x0, y = torch.zeros(2, 1, dtype=torch.float64), torch.tensor([3, 1])
    for scale in (1.0, 2.0, 0.0, torch.tensor([2.0, 0.0])):
        want = 1 + torch.as_tensor(scale, dtype=torch.float64) * y  # until = 1 in both fields
        torch.testing.assert_close(MeanFlow.sample(model, x0, y, guidance=scale)[:, 0], want)
    halves = MeanFlow.sample(model, x0, y, steps=2, guidance=2.0)[:, 0]
    torch.testing.assert_close(halves, 2.0 * y.double() + 0.75)


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda **new: ResidualMLP(2, num_classes=3, width=8, **new), (2,)),
        (lambda **new: UNet.preset("digits", channels=8, num_classes=3, **new), (1, 8, 8)),
        (lambda **new: DiT(1, width=8, depth=1, heads=2, num_classes=3, **new), (1, 8, 8)),
    ],
    ids=["mlp", "unet", "dit"],
)
def test_models_of_average_velocities_begin_as_the_velocity_model(build, shape):
    torch.manual_seed(0)
    plain = build()
    torch.manual_seed(0)
    average = build(average_velocity=True)
    mine, its = plain.state_dict(), average.state_dict()
    assert {name.split(".")[0] for name in set(its) - set(mine)} == {"interval"}
    assert all(torch.equal(its[name], value) for name, value in mine.items())
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.1)
    missing, unexpected = average.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("interval") for name in missing)
    t, x, y = torch.rand(4), torch.randn(4, *shape), torch.tensor([0, 1, 2, -1])
    for until in (None, t):
        assert torch.equal(average(t, x, y, until=until), plain(t, x, y))
    with pytest.raises(ValueError, match="average_velocity=True"):
        plain(t, x, y, until=t)
    with pytest.raises(ValueError, match=r"one time a sample, \(4,\); got \(1,\)"):
        average(t, x, y, until=t[:1])
    with pytest.raises(ValueError, match=r"until must not be before t; got t = 0\.5, until = 0\.25"):
        average(t.clamp_min(0.5) * 0 + 0.5, x, y, until=torch.tensor([0.5, 0.75, 0.25, 1.0]))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: MeanFlow(share=1.5), ValueError, r"share must lie in \[0, 1\]; got 1.5"),
        (lambda: MeanFlow(share=-0.1), ValueError, "share must be a finite number >= 0"),
        (lambda: MeanFlow(power=float("nan")), ValueError, "power must be a finite number"),
        (lambda: MeanFlow(floor=0), ValueError, "floor must be a finite number > 0"),
        (lambda: MeanFlow("ot"), TypeError, "mbot coupling"),
        (lambda: MeanFlow(times="uniform"), TypeError, "time law"),
        (lambda: MeanFlow.sample(Gaussians(), torch.randn(3, 1), steps=0), ValueError, "steps must be at least 1"),
        (lambda: MeanFlow.sample(Gaussians(), torch.randn(3, 1), guidance=2.0), ValueError, "guidance needs"),
        (
            lambda: MeanFlow.sample(lambda t, x, y, until: x / 0, torch.randn(3, 1)),
            flows.IntegrationError,
            "not finite",
        ),
        (
            lambda: MeanFlow().loss(lambda t, x, y, until: x[:, :1], *torch.randn(2, 5, 2)),
            ValueError,
            r"velocities of shape \(5, 2\); got \(5, 1\)",
        ),
        (
            lambda: MeanFlow().batch_loss(Gaussians(), FlowMatching().sample(*torch.randn(2, 5, 1))),
            ValueError,
            "no intervals",
        ),
        (
            lambda: MeanFlow().batch_loss(
                Gaussians(), FlowBatch(torch.ones(2), *torch.randn(2, 2, 1), until=torch.zeros(2))
            ),
            ValueError,
            "until must not be before t",
        ),
        (
            lambda: MeanFlow().loss(ResidualMLP(2), *torch.randn(2, 5, 2)),
            ValueError,
            "build it with average_velocity=True",
        ),
        (
            lambda: MeanFlow().loss(lambda t, x, y: x, *torch.randn(2, 5, 2)),
            TypeError,
            r"a model that is called as model\(t, x, y, until=until\): .*unexpected keyword.*order='x, t, until, y'",
        ),
        (
            lambda: MeanFlow.sample(lambda t, x, y: x, torch.randn(5, 2)),
            TypeError,
            r"a model that is called as model\(t, x, y, until=until\)",
        ),
    ],
)
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call()


def run(out=None, *, objective=None, steps=12, coupling=None, **settings):
    g = gen()
    data = TensorDataset(torch.randn(48, 2, generator=g), torch.arange(48) % 3)
    torch.manual_seed(0)
    model = ResidualMLP(2, num_classes=3, width=8, depth=1, average_velocity=True)
    loader = flows.CoupledLoader(data, None, coupling, batch_size=8, ot_batch_size=16)
    objective = objective or MeanFlow(mbot.ConditionalOTCoupling(), share=0.5)
    return flows.Trainer(
        model, loader, objective=objective, steps=steps, out=out, ema=0.9, condition_dropout=0.2, clip=1.0,
        checkpoint_every=5 if out else None, progress=False, **settings,
    )  # fmt: skip


def weights(trainer):
    return torch.cat([p.detach().flatten() for m in (trainer.model, trainer.sampling_model) for p in m.parameters()])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_trains_saves_and_resumes_to_the_same_bits(precision, tmp_path):
    whole = run(precision=precision)
    whole.fit()
    assert whole.loader.coupling == mbot.ConditionalOTCoupling()
    assert not torch.equal(whole.model.interval.weight, run().model.interval.weight)
    run(tmp_path, steps=7, precision=precision).fit()
    again = run(tmp_path, precision=precision)
    again.fit(resume=True)
    assert torch.equal(weights(again), weights(whole))
    x = MeanFlow.sample(again.sampling_model.eval(), torch.randn(6, 2), torch.arange(6) % 3, guidance=1.5)
    assert bool(x.isfinite().all())


def test_a_resumed_run_keeps_its_objective(tmp_path):
    run(tmp_path, steps=5).fit()
    last = checkpoint.latest(tmp_path / "checkpoints")
    for other, says in (
        (FlowMatching(mbot.ConditionalOTCoupling()), "objective: saved MeanFlow, here FlowMatching"),
        (MeanFlow(mbot.ConditionalOTCoupling(), share=0.25), "share: saved 0.5, here 0.25"),
    ):
        with pytest.raises(flows.CheckpointError, match=says):
            run(objective=other).load(last)


def test_the_trainer_takes_one_coupling():
    ot = mbot.OTCoupling()
    assert run(objective=MeanFlow(), coupling=ot).objective.coupling == ot
    assert run(objective=MeanFlow(ot), coupling=ot).objective.coupling == ot
    assert run(objective=MeanFlow(ot)).loader.coupling == ot
    with pytest.raises(ValueError, match="give one of them"):
        run(objective=MeanFlow(ot), coupling=mbot.ConditionalOTCoupling())
    with pytest.raises(ValueError, match="entropic pairs"):
        run(objective=MeanFlow(path=flows.SchrodingerBridgePath()), coupling=mbot.IndependentCoupling())
    for extra in ({"path": flows.LinearPath()}, {"times": flows.UniformTimes()}, {"time_weight": torch.exp}):
        with pytest.raises(ValueError, match="belong to the objective"):
            run(**extra)
    with pytest.raises(TypeError, match="objective must be"):
        run(objective="mean-flow")


def test_compiled_models_train_alike():
    """Under the derivative they run as without the compiler, which remembers that."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = ResidualMLP(2, width=8, depth=1, average_velocity=True)
    x0, x1 = torch.randn(2, 16, 2)
    plain = MeanFlow().loss(model, x0, x1, generator=gen())
    compiled = torch.compile(model, backend="eager")
    assert math.isclose(MeanFlow().loss(compiled, x0, x1, generator=gen()).item(), plain.item(), rel_tol=1e-6)
    torch.compiler.reset()


def test_it_trains_in_distributed_data_parallel():
    """The wrapper goes around loss and derivative; inside the derivative it fails at its second step."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        plain = ResidualMLP(2, width=8, depth=1, average_velocity=True)
        other = copy.deepcopy(plain)
        wrapped = nn.parallel.DistributedDataParallel(LossModule(MeanFlow(share=0.5), other))
        for seed in range(3):
            batch = MeanFlow(share=0.5).points(*torch.randn(2, 16, 2), generator=gen(seed))
            for model, loss in ((plain, MeanFlow(share=0.5).batch_loss(plain, batch)), (other, wrapped(batch))):
                model.zero_grad()
                loss.backward()
            for a, b in zip(plain.parameters(), other.parameters(), strict=True):
                torch.testing.assert_close(a.grad, b.grad)
    finally:
        torch.distributed.destroy_process_group()


TINY = ["--batch-size", "16", "--ot-batch-size", "32", "--steps", "4", "--checkpoint-every", "2", "--mlp-width", "8",
        "--no-progress", "--device", "cpu"]  # fmt: skip


def test_the_command_line_trains_samples_and_measures_it(tmp_path, capsys):
    out = str(tmp_path / "run")
    planar = [*TINY, "--data", "moons", "--source-data", "eight-gaussians", "--evaluate", "50", "--out", out]
    mean = ["--objective", "mean-flow", "--settings", "objective.share=0.5", "objective.power=0.5"]
    assert main(["train", *planar, *mean, "--ema-reference-batch", "32"]) == 0
    table = capsys.readouterr().out
    assert [line.split(" | ")[:2] for line in table.splitlines() if " | " in line][1:5] == [
        ["| 1 step", "1"], ["| 2 steps", "2"], ["| 4 steps", "4"], ["| adaptive", table.split("| adaptive | ")[1][:2]]
    ]  # fmt: skip
    saved = checkpoint.load(checkpoint.latest(tmp_path / "run" / "checkpoints"))["settings"]
    assert saved["objective"] == "MeanFlow"
    assert (saved["share"], saved["power"], saved["ema_reference_batch"]) == ("0.5", "0.5", 32)
    assert saved["times"] == repr(flows.LogitNormalTimes(-0.4, 1.0))
    for extra, nfe in (([], 1), (["--steps", "4"], 4), (["--method", "euler", "--steps", "3"], 3)):
        assert main(["sample", "--run", out, "--num", "9", "--label", "1", "--guidance", "1.5", *extra]) == 0
        assert f"9 samples at {nfe} NFE" in capsys.readouterr().out
    assert main(["evaluate", "--run", out, "--num", "20"]) == 0
    assert "| 1 step | 1 |" in capsys.readouterr().out
    for change, says in (
        (["--objective", "flow-matching"], "objective: saved MeanFlow, here FlowMatching"),
        ([*mean, "--ema-reference-batch", "64"], "ema_reference_batch: saved 32, here 64"),
    ):
        assert main(["train", *planar, *change, "--resume"]) == 3
        assert says in capsys.readouterr().err


def test_a_run_samples_what_its_model_steps(tmp_path):
    out = tmp_path / "run"
    assert (
        main(["train", *TINY, "--data", "moons", "--objective", "mean-flow", "--evaluate", "0", "--out", str(out)]) == 0
    )
    _, task, model = build.load_run(out, None, torch.device("cpu"))
    y = torch.arange(6) % 2
    x, x0, nfe = build.generate(model, task, y, 6, gen(), steps=2)
    assert nfe == 2
    assert torch.equal(x, MeanFlow.sample(model, x0, y, steps=2))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--settings", "objective.share=0.5"], "--objective flow-matching has no setting share; it has none"),
        (
            ["--objective", "mean-flow", "--settings", "objective.path=3"],
            "--objective mean-flow has no setting path; it has floor, power, share",
        ),
        (["--objective", "mean-flow", "--settings", "objective.share=2"], "share must lie in [0, 1]; got 2"),
        (["--settings", "times.mean=1"], "times.mean=… belongs to a law: name it with --times"),
    ],
)
def test_wrong_settings_on_the_command_line(arguments, says, tmp_path, capsys):
    assert main(["train", *TINY, "--data", "moons", *arguments, "--out", str(tmp_path / "run")]) == 2
    assert says in capsys.readouterr().err


def test_the_law_of_the_times_is_the_objectives_own_or_that_of_the_flag():
    def law(*arguments):
        return build.build_objective(parse(TrainConfig, ["--data", "moons", *arguments], "train")).times

    assert law() == flows.UniformTimes()
    assert law("--objective", "mean-flow") == flows.LogitNormalTimes(-0.4, 1.0)
    assert law("--objective", "mean-flow", "--times", "uniform") == flows.UniformTimes()


def test_equal_steps_are_in_float64_for_float64_points():
    seen = []

    def model(t, x, y, until):
        seen.append((float(t[0]), float(until[0])))
        return torch.ones_like(x)

    MeanFlow.sample(model, torch.zeros(2, 1, dtype=torch.float64), steps=3)
    grid = torch.linspace(0, 1, 4, dtype=torch.float64).tolist()
    assert seen == list(itertools.pairwise(grid))
