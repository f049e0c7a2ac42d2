"""Numeric settings of every public class: numbers of any library are kept as plain ones, all else is refused."""

import contextlib
import dataclasses
import inspect
import pickle
import re

import numpy as np
import pytest
import torch

import flows
import mbot
from tests.contracts.cases import COUPLINGS, TRANSPORTS, VALUES_ONLY, flat

PATHS = [flows.LinearPath(0.5), flows.SchrodingerBridgePath(), flows.TargetPath(0.5), flows.VariancePreservingPath(0.5)]
MODEL = torch.nn.Linear(2, 2)
LOADER = flows.CoupledLoader(torch.utils.data.TensorDataset(torch.randn(8, 2)), batch_size=2)


def numeric(annotation):
    words = set(re.findall(r"\w+", str(annotation)))
    return bool(words & {"int", "float"}) and not words & {"tuple", "Sequence"}


def of_dataclass(settings):
    """A setting at a time: the class without it, its name, its value here."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if numeric(field.type) and value is not None:
            yield (lambda given, name=field.name: dataclasses.replace(settings, **{name: given})), field.name, value


def of_signature(function, **given):
    for name, parameter in inspect.signature(function).parameters.items():
        value = given.get(name, parameter.default)
        if numeric(parameter.annotation) and value is not None:
            yield (lambda new, name=name: function(**{**given, name: new})), name, value


def trainer(**given):
    return flows.Trainer(MODEL, LOADER, **given)


def loss(make, **given):
    return lambda num_batches, batch_size, **more: make(
        mbot.ExactOT(), num_batches=num_batches, batch_size=batch_size, **given, **more
    )


trainer.__signature__ = inspect.signature(flows.Trainer)
SETTINGS = [
    *(("mbot", setting) for case in [*flat(TRANSPORTS), *flat(VALUES_ONLY), *flat(COUPLINGS)]
      for setting in of_dataclass(case)),
    *(("flows", setting) for path in PATHS for setting in of_dataclass(path)),
    *(("mbot", setting) for setting in of_dataclass(mbot.Condition(weight=2.0))),
    *(("mbot", (lambda n, make=make: loss(make)(n, 2), "num_batches", 3)) for make in (mbot.MiniBatchOT, mbot.BoMbOT)),
    *(("mbot", (lambda n, make=make: loss(make)(2, n), "batch_size", 3)) for make in (mbot.MiniBatchOT, mbot.BoMbOT)),
    ("mbot", (lambda n: loss(mbot.MiniBatchOT)((2, n), 3), r"num_batches\[1\]", 2)),
    ("mbot", (lambda reg: loss(mbot.BoMbOT, reg=reg)(2, 2), "reg", 0.5)),
    *(("mbot", setting) for setting in of_signature(mbot.compat.OTPlanSampler, method="unbalanced")),
    *(("flows", setting) for setting in of_signature(
        trainer, steps=2, clip=1.0, checkpoint_every=2, preview_every=2, out="nowhere")),
    *(("flows", setting) for setting in of_signature(flows.CoupledLoader, dataset=LOADER.batches.dataset, batch_size=2,
                                                     ot_batch_size=4)),
    *(("flows", setting) for setting in of_signature(flows.models.ResidualMLP, dim=2, num_classes=3)),
    *(("flows", setting) for setting in of_signature(flows.models.UNet, in_channels=1, image_size=8, channels=8,
                                                     attention=(), num_classes=3) if setting[1] != "heads"),
    ("flows", (lambda scale: flows.GuidedModel(MODEL, scale), "scale", 1.5)),
]  # fmt: skip
every_setting = pytest.mark.parametrize(
    ("make", "name", "value"), [setting for _, setting in SETTINGS],
    ids=[f"{package} {i} {setting[1]}" for i, (package, setting) in enumerate(SETTINGS)],
)  # fmt: skip


def test_the_table_holds_what_it_should():
    names = {setting[1] for _, setting in SETTINGS}
    assert {"reg", "reg_marginal", "mass", "max_iter", "tol", "num_projections", "p", "num_batches", "weight", "rate",
            "target_ratio", "iterations", "cells", "sigma", "ema", "clip", "width", "seed"} <= names  # fmt: skip


@every_setting
def test_what_is_no_number_is_refused(make, name, value):
    for wrong in (True, False, "0.5", np.True_, [1], 1j, np.ones(2), torch.tensor(True), np.str_("1")):
        with pytest.raises(TypeError, match=f"{name} must be"):
            make(wrong)
    signed = () if name == "scale" else (-1,)  # less than 0 leads away from a condition
    for wrong in (float("nan"), float("inf"), *signed):
        with pytest.raises((ValueError, TypeError), match=f"{name} must"):
            make(wrong)


@every_setting
def test_scalars_of_numpy_and_torch_are_numbers(make, name, value):
    whole = isinstance(value, int) and not isinstance(value, float)
    alike = [np.int64(value), torch.tensor(value), np.array(value)] if whole else [np.float64(value), np.array(value)]
    for given in alike:
        made = make(given)
        if dataclasses.is_dataclass(made):
            plain = make(value)
            kept = getattr(made, name)
            assert type(kept) is (int if whole and type(getattr(plain, name)) is int else float)
            assert repr(made) == repr(plain)
            if not isinstance(made, flows.GuidedModel):  # compares by identity: it holds a model
                assert made == plain == pickle.loads(pickle.dumps(made))
                assert hash(made) == hash(plain)


def test_a_setting_that_wants_gradients_is_refused():
    """Settings are constants: the gradient would be lost in silence."""
    with pytest.raises(TypeError, match="reg must be a number"):
        mbot.EntropicOT(torch.tensor(0.5, requires_grad=True))


def test_float32_scalars_keep_their_value():
    assert mbot.PartialOT(np.float32(0.25)) == mbot.PartialOT(torch.tensor(0.25)) == mbot.PartialOT(0.25)
    assert mbot.PartialOT(np.float32(0.3)).mass == float(np.float32(0.3))
    assert mbot.UnbalancedOT(1, np.int64(2)) == mbot.UnbalancedOT(1.0, 2.0)


FLAGS = [
    *((lambda given, case=case, name=field.name: dataclasses.replace(case, **{name: given}), field.name)
      for case in {type(case): case for case in flat(COUPLINGS)}.values() for field in dataclasses.fields(case)
      if isinstance(getattr(case, field.name), bool)),
    *((lambda given, make=make, name=name: make(mbot.ExactOT(), num_batches=2, batch_size=2, **{name: given}), name)
      for make in (mbot.MiniBatchOT, mbot.BoMbOT) for name, parameter in inspect.signature(make).parameters.items()
      if isinstance(parameter.default, bool)),
    *((lambda given, name=name: flows.CoupledLoader(LOADER.batches.dataset, batch_size=2, **{name: given}), name)
      for name in ("shuffle", "drop_last")),
]  # fmt: skip


@pytest.mark.parametrize(("make", "name"), FLAGS, ids=[f"{i} {name}" for i, (_, name) in enumerate(FLAGS)])
def test_switches_are_true_or_false(make, name):
    """Anything else is true or false by accident: ``balanced="no"`` was on."""
    for wrong in ("no", "", 1, 0, None, [True], 0.5, torch.ones(2, dtype=torch.bool)):
        with pytest.raises(TypeError, match=f"{name} must be True or False"):
            make(wrong)
    for right in (True, np.False_, torch.tensor(True)):
        with contextlib.suppress(ValueError):  # of another setting that it contradicts
            made = make(right)
            assert type(getattr(made, name, bool(right))) is bool


def test_the_switches_of_the_table():
    names = {name for _, name in FLAGS}
    assert {"balanced", "exchange", "conditional", "relative", "replacement", "allow_dropped", "debiased"} <= names
