"""``torch.compile`` around transports, losses and couplings: nothing of them in a graph, everything as without."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import flows
import mbot
from tests.contracts.cases import COUPLINGS, TRANSPORTS, VALUES_ONLY, flat

LOSS = {"num_batches": 2, "batch_size": 6}
SAMPLER = mbot.compat.OTPlanSampler("exact")
LABELS = torch.arange(16) % 3


def gap(pairs, x, y):
    a, b = pairs.apply(x, y)
    return (a - b).square().sum()


def taken(pair):
    return (pair[0] - pair[1]).square().sum()


def of_transport(t):
    def every_call(x, y):
        cost = mbot.pairwise_cost(x, y)
        mass = t.uniform_mass(cost)
        fast = 0 if mass is None else (mass * cost).sum()
        return t(x, y) + t.value(cost) + (t.plan(cost).to_dense() * cost).sum() + fast

    return every_call


def of_loss(make, **given):
    def every_call(x, y):
        loss = make(**LOSS, **given)
        xs, ys = x[:12].reshape(2, 6, -1), y[:12].reshape(2, 6, -1)
        value = loss(x, y)
        if not given.get("debiased"):
            value = value + loss.from_batches(xs, ys)
        return value

    return every_call


def fixed(x, y):
    return (x.mean(-2) - y.mean(-2)).square().sum(-1)


CASES = {
    **{repr(t): of_transport(t) for t in flat(TRANSPORTS)},
    **{repr(t): t for t in flat(VALUES_ONLY)},
    **{repr(c): lambda x, y, c=c: gap(c(x, y, y1=LABELS), x, y) for c in flat(COUPLINGS)},
    "m-OT": of_loss(lambda **k: mbot.MiniBatchOT(mbot.ExactOT(), **k)),
    "aligned": of_loss(lambda **k: mbot.MiniBatchOT(mbot.ExactOT(), **k), pairing="aligned"),
    "debiased": of_loss(lambda **k: mbot.MiniBatchOT(mbot.ExactOT(), **k), debiased=True),
    "m-POT": of_loss(lambda **k: mbot.MiniBatchOT(mbot.PartialOT(0.7), **k)),
    "BoMb-OT": of_loss(lambda **k: mbot.BoMbOT(mbot.ExactOT(), **k)),
    "e-BoMb-OT": of_loss(lambda **k: mbot.BoMbOT(mbot.UnbalancedOT(0.5, 1.0), reg=0.5, **k)),
    "BoMb-SW": of_loss(lambda **k: mbot.BoMbOT(mbot.SlicedOT(8), **k)),
    "callable": of_loss(lambda **k: mbot.MiniBatchOT(fixed, **k)),
    "a callable cost": of_loss(lambda **k: mbot.MiniBatchOT(mbot.ExactOT(), cost=mbot.pairwise_cost, **k)),
    "from_cost": lambda x, y: mbot.BoMbOT(mbot.ExactOT(), **LOSS).from_cost(
        mbot.pairwise_cost(x.reshape(4, 1, 4, -1), y.reshape(1, 4, 4, -1))
    ),
    "sampler": lambda x, y: taken(SAMPLER.sample_plan(x, y)),
    "sampler with labels": lambda x, y: taken(SAMPLER.sample_plan_with_labels(x, y, None, LABELS)[:2]),
    "flow matching": lambda x, y: flows.FlowMatching(mbot.OTCoupling()).sample(x, y).ut.square().sum(),
}


@pytest.fixture(autouse=True)
def fresh():
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def value_and_gradients(function, seed=0):
    torch.manual_seed(seed)
    net = nn.Linear(3, 3)
    x, y = torch.randn(16, 3), torch.randn(16, 3) + 1
    torch.manual_seed(1)
    value = function(net, x, y)
    value.backward()
    return [value.detach(), *(p.grad for p in net.parameters())]


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_are_those_without(case, fresh):
    def trained(net, x, y):
        return 2 * CASES[case](net(x), y)

    for one, two in zip(
        value_and_gradients(torch.compile(trained, backend="eager")), value_and_gradients(trained), strict=True
    ):
        assert torch.equal(one, two)
    # A first call takes as long as frames that dynamo looks at: a solver is hundreds.
    assert fresh["frames"]["total"] < 40, fresh["frames"]


def test_a_backend_that_differentiates_graphs():
    def trained(net, x, y):
        x = net(x)
        pairs = mbot.OTCoupling()(x.detach(), y)
        return mbot.BoMbOT(mbot.ExactOT(), **LOSS)(x, y) + gap(pairs, x, y)

    found = value_and_gradients(torch.compile(trained, backend="aot_eager"))
    for one, two in zip(found, value_and_gradients(trained), strict=True):
        torch.testing.assert_close(one, two)


def test_many_settings_stay_outside(fresh):
    """Dynamo compiles a frame a few times, then runs it as it is: what that calls must stay out of graphs too."""
    for k in range(1, 11):

        def trained(net, x, y, k=k):
            loss = mbot.BoMbOT(mbot.EntropicOT(k / 4), num_batches=k, batch_size=2)
            return loss(net(x), y) + mbot.ExactOT()(net(x[k:]), y[k:])

        for one, two in zip(
            value_and_gradients(torch.compile(trained, backend="eager")), value_and_gradients(trained), strict=True
        ):
            assert torch.equal(one, two)
    assert fresh["frames"]["total"] < 12 * 10, fresh["frames"]


def test_the_compiler_is_not_loaded_before_it_is_used():
    code = (
        "import sys, torch, mbot; mbot.BoMbOT(mbot.ExactOT(), num_batches=2, batch_size=2)(torch.randn(4, 2), "
        "torch.randn(4, 2)); print('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
