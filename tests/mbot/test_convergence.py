"""Warnings of solvers that stop early: at the caller's line, once a batch, with right counts."""

import inspect
import warnings

import pytest
import torch
from torch import nn

import flows
import mbot
from mbot import convergence

SLOW = mbot.EntropicOT(0.01, max_iter=1)
LOSS = {"num_batches": 3, "batch_size": 6}


def here():
    """Line of the caller."""
    return inspect.currentframe().f_back.f_lineno


def caught(call):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return [w for w in found if issubclass(w.category, mbot.ConvergenceWarning)]


class Model(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, x, y):
        return self.loss(x, y)


X, Y = torch.randn(2, 20, 2, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.0, 1.0])[:, None, None]
XS, YS = [X[:6], X[6:11], X[11:17]], [Y[:6], Y[6:13]]
POINTS = torch.utils.data.TensorDataset(X)
FIELD = flows.models.ResidualMLP(2, width=4, depth=1)


def loader(workers):
    """Batches of two OT problems that do not converge."""
    return flows.CoupledLoader(POINTS, None, mbot.OTCoupling(SLOW), 5, 10, workers)


CALLS = {
    "plan": (lambda: SLOW.plan(mbot.pairwise_cost(X, Y)), here()),
    "points": (lambda: SLOW(X, Y), here()),
    "value": (lambda: SLOW.value(mbot.pairwise_cost(X, Y)), here()),
    "partial": (lambda: mbot.PartialOT(0.7, reg=0.01, max_iter=1)(X, Y), here()),
    "unbalanced": (lambda: mbot.UnbalancedOT(0.01, 1.0, max_iter=1)(X, Y), here()),
    "loss": (lambda: mbot.MiniBatchOT(SLOW, **LOSS)(X, Y), here()),
    "debiased": (lambda: mbot.MiniBatchOT(SLOW, debiased=True, **LOSS)(X, Y), here()),
    "aligned": (lambda: mbot.MiniBatchOT(SLOW, pairing="aligned", **LOSS).from_batches(XS[:2], YS), here()),
    "unequal sizes": (lambda: mbot.BoMbOT(SLOW, **LOSS).from_batches(XS, YS), here()),
    "loss's plan": (lambda: mbot.BoMbOT(SLOW, **LOSS).plan(X, Y), here()),
    "a cost": (lambda: mbot.BoMbOT(SLOW, **LOSS).from_cost(torch.rand(2, 2, 4, 4)), here()),
    "low memory": (lambda: mbot.BoMbOT(SLOW, **LOSS).backward_by_pair(lambda x: x, XS, YS), here()),
    "coupling": (lambda: mbot.OTCoupling(SLOW)(X, Y), here()),
    "BoMb": (lambda: mbot.BoMbCoupling(SLOW, num_batches=3)(X, Y), here()),
    "large": (lambda: mbot.SinkhornCoupling(0.001, max_iter=1)(X, Y), here()),
    "data set": (lambda: mbot.SemidiscreteCoupling(steps=1).fit(X), here()),
    "C2OT": (lambda: mbot.ConditionalOTCoupling("continuous", target_ratio=0.99)(X, Y, y1=Y), here()),
    "sampler": (lambda: mbot.compat.OTPlanSampler("unbalanced", reg=1e-3, reg_m=1e-3).sample_plan(X, 99 + Y), here()),
    "diagnosis": (lambda: flows.diagnose(mbot.OTCoupling(SLOW), X, Y), here()),
    "loader": (lambda: [*loader(0)], here()),
    "loader with workers": (lambda: [*loader(1)], here()),
    "trainer": (lambda: flows.Trainer(FIELD, loader(0), steps=9, progress=False).fit(), here()),
    "flow matching": (lambda: flows.FlowMatching(mbot.OTCoupling(SLOW)).sample(X, Y), here()),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_it_points_at_the_caller_and_comes_once(name):
    call, line = CALLS[name]
    found = caught(call)
    assert len(found) == 1, [str(w.message) for w in found]
    assert (found[0].filename, found[0].lineno) == (__file__, line)


def test_through_a_module_it_points_at_the_line_that_calls_the_loss():
    found = caught(lambda: Model(mbot.MiniBatchOT(SLOW, **LOSS))(X, Y))
    assert [(w.filename, w.lineno) for w in found] == [(__file__, inspect.getsourcelines(Model.forward)[1] + 1)]


def test_problems_are_counted_over_all_blocks():
    (found,) = caught(lambda: mbot.MiniBatchOT(SLOW, **LOSS).from_batches(XS, YS))
    assert " of 6 problems" in str(found.message)
    both = [mbot.pairwise_cost(X, Y)[None], torch.zeros(3, 4, 4)]  # of constant costs the first iterate is the plan

    def call():
        with convergence.one_warning():
            for cost in both:
                SLOW.plan(cost)

    (found,) = caught(call)
    assert "1 of 4 problems" in str(found.message)
    worst = float(found.message.args[0].split("worst error ")[1].split(")")[0])
    (alone,) = caught(lambda: SLOW.plan(both[0]))
    assert f"{worst:.3g}" in str(alone.message)


def test_an_error_ends_the_count():
    def call():
        with convergence.one_warning():
            SLOW.plan(mbot.pairwise_cost(X, Y))
            raise KeyError

    with pytest.raises(KeyError):
        call()
    assert len(caught(lambda: SLOW.plan(mbot.pairwise_cost(X, Y)))) == 1


def test_a_nan_is_the_worst_error():
    def call():
        with convergence.one_warning():
            convergence.count_unconverged("Any", 1, 1, 0.5, "")
            convergence.count_unconverged("Any", 1, 1, float("nan"), "")
            convergence.count_unconverged("Any", 1, 1, 0.1, "")

    (found,) = caught(call)
    assert "3 of 3 problems did not converge (worst error nan)" in str(found.message)


def test_the_filter_that_shows_a_warning_once_a_line_works():
    cost = mbot.pairwise_cost(X, Y)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        for _ in range(3):
            SLOW.plan(cost)
    assert len(found) == 1
