"""Models of other libraries behind ``model(t, x, y)``: their calls, outputs, times and labels."""

from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import flows
from flows.models import ResidualMLP, wrap

T, X = torch.tensor([0.25, 0.5, 1.0]), torch.arange(6.0).reshape(3, 2)
LABELS = torch.tensor([0, 2, -1])


class Recorder(nn.Module):
    """Remembers how it was called."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs
        return self.scale * X


@dataclass
class Output:
    sample: torch.Tensor
    variance: float = 0.0


@given(
    order=st.permutations(["t", "x", "y"]),
    named=st.integers(0, 3),
    conditions=st.sampled_from(["given", "none", "not in the order"]),
)
def test_every_order_is_the_call_as_written(order, named, conditions):
    """Oracle: the written call, evaluated by Python."""
    if conditions == "not in the order":
        order.remove("y")
    parts = [what if i < len(order) - named else f"the_{what}={what}" for i, what in enumerate(order)]
    y = LABELS if conditions == "given" else None
    theirs = Recorder()
    wrap(theirs, ", ".join(parts))(T, X, y)
    if y is None:
        parts = [part for part in parts if not part.endswith("=y")]
        parts = parts[:-1] if parts[-1] == "y" else parts
    place = [part for part in parts if "=" not in part]
    place = place[:-1] if y is None and place and place[-1] == "y" else place
    args, kwargs = eval(
        f"(lambda *a, **k: (a, k))({', '.join([*place, *(part for part in parts if '=' in part)])})",
        {"t": T, "x": X, "y": y},
    )
    assert len(theirs.args) == len(args)
    assert all(a is b or torch.equal(a, b) for a, b in zip(theirs.args, args, strict=True))
    assert theirs.kwargs.keys() == kwargs.keys()
    assert all(torch.equal(theirs.kwargs[key], value) for key, value in kwargs.items())


def test_a_dict_of_conditions_as_keywords():
    theirs = Recorder()
    model = wrap(theirs, "x, t, **y")
    model(T, X, {"label": LABELS, "text": T})
    assert theirs.args[0] is X
    assert theirs.kwargs.keys() == {"label", "text"}
    model(T, X)
    assert theirs.kwargs == {}
    with pytest.raises(TypeError, match=r"'\*\*y' in order takes a dict of conditions; got Tensor"):
        model(T, X, LABELS)


def test_times_are_scaled_or_appended():
    theirs = Recorder()
    wrap(theirs, "t, x", time_scale=1000)(T, X)
    assert torch.equal(theirs.args[0], 1000 * T)
    wrap(theirs, "cat")(T, X.double())
    assert torch.equal(theirs.args[0], torch.cat((X, T[:, None]), 1).double())
    with pytest.raises(ValueError, match="order='cat' has no place for conditions"):
        wrap(theirs, "cat")(T, X, LABELS)


@pytest.mark.parametrize(
    ("out", "output"),
    [
        (X, None),
        ((0, X), 1),
        ({"velocity": X}, "velocity"),
        (OrderedDict(sample=X), "sample"),
        (Output(X), "sample"),
        (torch.cat((X, X + 1), 1), lambda out: out.chunk(2, 1)[0]),
    ],
)
def test_the_velocity_is_a_part_of_the_output(out, output):
    assert torch.equal(wrap(lambda x, t: out, "x, t", output)(T, X), X)


@pytest.mark.parametrize(
    ("out", "output", "says"),
    [
        (
            Output(X),
            None,
            "returned Output, not a tensor; say which part is the velocity, output='sample' or 'variance'",
        ),
        ((X, X), None, "returned tuple, not a tensor; say which part is the velocity, output=0 or 1"),
        (None, None, "returned NoneType, not a tensor; .* output=a function of it"),
        ({"v": X}, "sample", "returned dict, which has no 'sample'"),
        (X, "sample", "returned Tensor, which has no 'sample'"),
        ((X,), 1, "returned tuple, which has no 1"),
        (None, 0, "returned NoneType, which has no 0"),
    ],
)
def test_outputs_without_a_velocity(out, output, says):
    with pytest.raises(TypeError, match=says):
        wrap(lambda x, t: out, "x, t", output)(T, X)


def test_the_models_own_class_for_no_condition():
    theirs = Recorder()
    model = wrap(theirs, "x, t, y", null_class=10)
    model(T, X, LABELS)
    assert theirs.args[2].tolist() == [0, 2, 10]
    model(T, X, {"label": LABELS, "weight": T})
    assert theirs.args[2]["label"].tolist() == [0, 2, 10]
    assert theirs.args[2]["weight"] is T
    # classifier-free guidance calls it with and without
    flows.GuidedModel(lambda t, x, y: model(t, x, y).repeat(2, 1), 2.0)(T, X, torch.tensor([1, 2, 3]))
    assert theirs.args[2].tolist() == [10, 10, 10, 1, 2, 3]


@pytest.mark.parametrize(
    "order",
    ["", "x", "t", "x, t, t", "x, t, y, y", "x t", "x, t, z", "x=t, t", "**x, t", "x, t, **labels", "1a=x, t", 3],
)
def test_orders_that_are_no_call(order):
    with pytest.raises(ValueError, match="order must be a call's arguments with t and x once"):
        wrap(Recorder(), order)


def test_other_wrong_arguments():
    with pytest.raises(TypeError, match="module must be callable; got int"):
        wrap(3)
    with pytest.raises(TypeError, match=r"output must be None.*got 1\.5"):
        wrap(Recorder(), output=1.5)
    with pytest.raises(ValueError, match="time_scale must be"):
        wrap(Recorder(), time_scale=0)
    with pytest.raises(ValueError, match="the wrapped model gets no conditions: name y in order"):
        wrap(Recorder(), "x, t")(T, X, LABELS)
    with pytest.raises(ValueError, match=r"appends the time to points \(B, d\); got x of shape \(3, 1, 2, 2\)"):
        wrap(Recorder(), "cat")(T, torch.zeros(3, 1, 2, 2))
    for order in ("x, t", "cat"):
        with pytest.raises(ValueError, match="gets no until, which average velocities need: name it in order"):
            wrap(Recorder(), order)(T, X, until=T)


@pytest.mark.parametrize("order", ["t, x, y, until=until", "x=x, t=t, y=y, until=until"])
def test_a_wrapped_model_of_average_velocities_is_the_model_inside(order):
    torch.manual_seed(0)
    inner = ResidualMLP(2, num_classes=2, width=8, depth=1, average_velocity=True)
    torch.nn.init.normal_(inner.interval.weight)
    model, y = wrap(inner, order), torch.tensor([0, 1, -1])
    torch.testing.assert_close(model(T, X, y), inner(T, X, y))
    torch.testing.assert_close(model(T, X, y, until=T + 0.1), inner(T, X, y, until=T + 0.1))
    x0, x1 = torch.randn(2, 6, 2)
    labels, objective = torch.arange(6) % 2, flows.MeanFlow(share=1.0)
    losses = [
        objective.loss(m, x0, x1, labels, generator=torch.Generator().manual_seed(3)) for m in (inner, model)
    ]  # fmt: skip
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(flows.MeanFlow.sample(model, x0, labels, 2), flows.MeanFlow.sample(inner, x0, labels, 2))


def test_the_end_of_an_interval_is_scaled_as_the_time_is():
    theirs = Recorder()
    wrap(theirs, "x, t, r=until", time_scale=10)(T, X, until=T + 0.1)
    assert torch.equal(theirs.args[1], 10 * T)
    assert torch.equal(theirs.kwargs["r"], 10 * (T + 0.1))
    wrap(theirs, "x, t, until", time_scale=10)(T, X)
    assert torch.equal(theirs.args[2], 10 * T)


class Theirs(nn.Module):
    """Our MLP under another signature."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, sample, timestep, label=None):
        return {"sample": self.inner(timestep / 10, sample, label)}


def test_it_trains_to_the_same_weights_as_the_model_inside():
    weights = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        model = ResidualMLP(2, num_classes=2, width=8, depth=1)
        if wrapped:
            model = wrap(Theirs(model), "x, t, label=y", "sample", time_scale=10)
        data = torch.utils.data.TensorDataset(torch.randn(64, 2), torch.arange(64) % 2)
        loader = flows.CoupledLoader(data, batch_size=16)
        trainer = flows.Trainer(model, loader, steps=4, progress=False, ema=0.5)
        trainer.fit()
        averaged = trainer.sampling_model
        assert averaged(T, X, torch.tensor([0, 1, -1])).shape == X.shape
        weights.append((averaged.module.inner if wrapped else averaged).state_dict())
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value)


def test_a_module_keeps_its_keys_and_its_parameters():
    plain = ResidualMLP(2, width=8, depth=1)
    model = wrap(plain, "t, x, y")
    assert model.module is plain
    assert model.module.state_dict().keys() == plain.state_dict().keys()
    assert [id(p) for p in model.parameters()] == [id(p) for p in plain.parameters()]
    assert model.eval().module.training is False
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(T, X)
    torch.testing.assert_close(out, plain(T, X))
