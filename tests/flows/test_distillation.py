"""One-step students: the terms by hand, gradients against differences, what a trained one makes, what is refused."""

import math

import pytest
import torch
from torch import nn

import flows
from flows.distillation import Distillation


def net(seed=0, classes=0, width=8):
    torch.manual_seed(seed)
    return flows.models.ResidualMLP(2, width=width, depth=1, num_classes=classes)


def made(n=24, model=None, **settings):
    model = net(1) if model is None else model
    return flows.generate_pairs(model, n, **{"shape": (2,), "method": "euler", "steps": 4, **settings})


class Square(nn.Module):
    """A field that depends on everything."""

    def forward(self, t, x, y=None):
        return x**2 * t[:, None] + (0 if y is None else y[:, None])


def batch(n=6, labelled=True):
    g = torch.Generator().manual_seed(3)
    x0, x1 = (torch.randn(n, 2, generator=g, dtype=torch.float64) for _ in range(2))
    return flows.CoupledBatch(x0, x1, torch.arange(n) % 3 if labelled else None, torch.rand(n, generator=g).double())


@pytest.mark.parametrize("terms", [(1.0, 1.0), (0.5, 2.0), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
def test_the_loss_by_hand(terms, fresh, labelled):
    student, pairs = net(classes=3 if labelled else 0).double(), batch(labelled=labelled)
    objective = Distillation(teacher=Square(), regression=terms[0], guided=terms[1], fresh_noise=fresh)
    flow = objective.along(pairs, torch.Generator().manual_seed(0))
    assert bool(((flow.t >= 0.2) & (flow.t <= 0.8)).all())
    if not fresh:
        assert torch.equal(flow.noise, pairs.x0)
    total = 0.0
    for i in range(len(pairs)):
        y = None if pairs.y is None else pairs.y[i : i + 1]
        x0, x1, z, t = pairs.x0[i : i + 1], pairs.x1[i : i + 1], flow.noise[i : i + 1], flow.t[i : i + 1]
        begin = torch.zeros(1, dtype=torch.float64)
        regression = (student(begin, x0, y) - (x1 - x0)).square().mean()
        own = student(begin, z, y)
        xt = z + t * own
        end = xt + (1 - t) * Square()(t, xt, y)
        guided = (own - (end - z)).square().mean()
        total += pairs.weight[i] * (terms[0] * regression + terms[1] * guided)
    loss = objective.batch_loss(student, flow)
    assert float(loss.detach()) == pytest.approx(float(total.detach()) / len(pairs), rel=1e-9)
    alone = objective.loss(student, pairs.x0, pairs.x1, pairs.y, generator=torch.Generator().manual_seed(0))
    assert math.isfinite(float(alone.detach()))


def test_gradients_do_not_go_through_the_target():
    """Against differences of the loss whose target stays."""
    student, teacher = net().double(), net(1).double()
    objective = Distillation(teacher=teacher, regression=0)
    flow = objective.along(batch(labelled=False), torch.Generator().manual_seed(0))
    objective.batch_loss(student, flow).backward()
    assert all(p.grad is None for p in teacher.parameters())
    zero = torch.zeros(6, dtype=torch.float64)
    target = objective.target(flow.noise, student(zero, flow.noise).detach(), flow.t)

    def loss():
        error = (student(zero, flow.noise) - target).square().mean(1)
        return float((flow.weight * error).mean())

    bias, step = student.inputs.bias, 1e-6
    for k in range(3):
        with torch.no_grad():
            bias[k] += step
            above = loss()
            bias[k] -= 2 * step
            below = loss()
            bias[k] += step
        assert float(bias.grad[k]) == pytest.approx((above - below) / (2 * step), rel=1e-4, abs=1e-9)


def test_the_loss_is_zero_for_a_straight_flow_and_its_own_step():
    """A constant velocity: its step at t = 0 is what both terms ask for."""

    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.by = nn.Parameter(torch.tensor([1.0, -2.0]))

        def forward(self, t, x, y=None):
            return self.by.expand_as(x)

    x0 = torch.randn(16, 2)
    loss = Distillation(teacher=Shift()).loss(Shift(), x0, x0 + torch.tensor([1.0, -2.0]))
    assert float(loss.detach()) == pytest.approx(0, abs=1e-10)


def test_a_student_of_either_term_makes_the_teachers_samples_in_one_step():
    """The teacher's field is straight: x0 goes to -x0 / 2 + 1."""

    class Line(nn.Module):
        def forward(self, t, x, y=None):
            t = t[:, None]
            x0 = (x - t) / (1 - 1.5 * t)
            return 1 - 1.5 * x0

    x0 = torch.randn(128, 2, generator=torch.Generator().manual_seed(0))
    fresh = torch.randn(100, 2, generator=torch.Generator().manual_seed(1))
    for regression, guided in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        student = net(width=16)
        optimizer = torch.optim.Adam(student.parameters(), lr=2e-2)
        model = flows.distill(
            student, Line(), flows.PairedDataset(x0, 1 - x0 / 2), steps=120, regression=regression, guided=guided,
            span=(0.1, 0.4), batch_size=64, optimizer=optimizer, ema=0.9, progress=False,
        )  # fmt: skip
        got = flows.integrate(model, fresh, method="euler", steps=1).final
        assert float((got - (1 - fresh / 2)).square().mean()) < 0.02, (regression, guided)
        assert not model.training


def run(out=None, steps=8, resume=False, teacher=None, **settings):
    student, teacher = net(classes=3), net(1, 3) if teacher is None else teacher
    pairs = made(24, net(1, 3), y=torch.arange(24) % 3)
    if out is not None:
        settings = {"out": out, "checkpoint_every": 3, **settings}
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    teacher.train()
    flows.distill(student, teacher, pairs, steps=steps, batch_size=8, seed=4, optimizer=optimizer, ema=0.9,
                  resume=resume, progress=False, **settings)  # fmt: skip
    assert teacher.training
    return torch.cat([p.detach().flatten() for p in student.parameters()])


def test_a_resumed_student_is_the_same(tmp_path):
    run(tmp_path, steps=5)
    assert torch.equal(run(tmp_path, resume=True), run())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"guided": 2.0}, "differs in guided"),
        ({"regression": 0.0}, "differs in regression"),
        ({"span": (0.2, 0.7)}, "differs in span"),
        ({"teacher": net(5, 3), "made_by": net(1, 3)}, "differs in teacher: saved ResidualMLP"),
    ],
)
def test_another_distillation_is_not_gone_on_with(change, says, tmp_path):
    run(tmp_path, steps=3)
    with pytest.raises(flows.CheckpointError, match=says):
        run(tmp_path, resume=True, **change)


def test_start_points_of_another_kind_are_what_the_guided_term_starts_from(monkeypatch):
    seen = []
    monkeypatch.setattr(flows.Trainer, "fit", lambda self, resume: seen.append(self.objective))
    own = flows.PairedDataset(torch.rand(24, 2), torch.rand(24, 2))  # where these start is not known
    for pairs, fresh in ((made(), True), (made(x0=torch.rand(24, 2)), False), (own, False)):
        flows.distill(net(), net(1), pairs, steps=1, batch_size=8, progress=False)
        assert seen[-1].fresh_noise == fresh


@pytest.mark.parametrize("pairs", [made(), flows.AnnealingReflow(made(), 3)], ids=["plain", "annealed"])
def test_pairs_of_another_model_are_refused(pairs):
    settings = {"steps": 1, "batch_size": 8, "progress": False}
    for models in ((net(2),), (flows.GuidedModel(net(1), 2.0),)):
        with pytest.raises(ValueError, match=r"pairs were made by ResidualMLP \w+, but teacher is .* as made_by"):
            flows.distill(net(), *models, pairs, **settings)
    with pytest.raises(ValueError, match="but made_by is"):
        flows.distill(net(), net(1), pairs, made_by=net(2), **settings)
    flows.distill(net(), net(2), pairs, made_by=net(1), **settings)
    flows.distill(net(), None, pairs, guided=0, **settings)
    shape = flows.models.ResidualMLP(3, width=4, depth=1)
    with pytest.raises((ValueError, RuntimeError), match="shape"):
        flows.distill(shape, None, pairs, guided=0, **settings)


@pytest.mark.parametrize(
    ("settings", "kind", "says"),
    [
        ({"regression": 0, "guided": 0}, ValueError, "must not both be 0"),
        ({"regression": -1}, ValueError, "regression must be"),
        ({"guided": math.inf}, ValueError, "guided must be"),
        ({"span": (0.5, 1.0)}, ValueError, "0 <= first <= last < 1"),
        ({"span": (0.6, 0.5)}, ValueError, "0 <= first <= last < 1"),
        ({"span": (0.5,)}, ValueError, "span must be two times"),
        ({"span": 0.5}, ValueError, "span must be two times"),
        ({"teacher": None}, TypeError, "needs a teacher"),
        ({"path": flows.SchrodingerBridgePath()}, ValueError, "one straight step"),
        ({"path": flows.LinearPath(sigma=0.1)}, ValueError, "one straight step"),
    ],
)
def test_settings_out_of_range(settings, kind, says):
    with pytest.raises(kind, match=says):
        Distillation(**{"teacher": Square(), **settings})


def test_a_teacher_of_other_velocities_is_told():
    """One that would broadcast."""
    pairs = flows.PairedDataset(*torch.randn(2, 24, 2))
    with pytest.raises(ValueError, match=r"must return velocities of shape \(8, 2\); got \(8, 1\)"):
        flows.distill(net(), lambda t, x, y: x[:, :1], pairs, steps=1, batch_size=8, progress=False)


def test_a_student_that_is_its_teacher_is_refused():
    """It would be its own moving target, or its teacher be gone afterwards."""
    model = net()
    wrapped = nn.Module()
    wrapped.inner = model
    wrapped.forward = model.forward
    for student, teacher in ((model, model), (model, wrapped), (wrapped, flows.GuidedModel(model, 2.0))):
        with pytest.raises(ValueError, match=r"shares weights with its teacher.*copy\.deepcopy"):
            flows.distill(student, teacher, flows.PairedDataset(*torch.randn(2, 24, 2)), steps=1)
    with pytest.raises(TypeError, match=r"student must be a torch\.nn\.Module .*; got function"):
        flows.distill(lambda t, x, y: x, model, made(), steps=1)


def test_what_is_no_pairs():
    data = torch.utils.data.TensorDataset(torch.randn(8, 2))
    with pytest.raises(TypeError, match=r"must be a flows\.PairedDataset"):
        flows.distill(net(), net(1), data, steps=1)
    student = nn.Linear(2, 2)
    student.forward = lambda t, x, y: x[:, :1] * student.weight[0, 0]
    with pytest.raises(ValueError, match=r"must return velocities of shape \(16, 2\); got \(16, 1\)"):
        flows.distill(student, net(1), made(), steps=1, batch_size=8, progress=False)
