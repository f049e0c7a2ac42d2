"""Averages of weights: their half-life in samples, whatever the batch."""

import pytest
import torch
from torch import nn

import flows
from flows.averaging import Averaged
from tests.flows.toy_run import trainer, weights


def remaining(scale, steps, decay=0.99, first=2000):
    """What is left of old weights in the average, some steps after they changed from 1 to 0."""
    model = nn.Linear(1, 1, bias=False).double()
    average = Averaged(model, decay, scale)
    nn.init.ones_(model.weight)
    average.update_parameters(model)
    average.n_averaged.fill_(first + 1)
    nn.init.zeros_(model.weight)
    for _ in range(steps):
        average.update_parameters(model)
    return float(average.module.weight)


@pytest.mark.parametrize("scale", [0.5, 1, 2, 8])
def test_batches_of_any_size_have_the_same_half_life_in_samples(scale):
    samples = 640  # in batches of the reference's size, of half, twice and eight times that
    assert remaining(scale, int(samples / scale)) == pytest.approx(0.99**samples, rel=1e-9)


def test_the_first_steps_count_samples_too():
    """(1 + n) / (10 + n) after n reference batches, to the power of the batch's share."""
    for scale, done in ((1.0, 5), (4.0, 5), (0.25, 8)):
        left = remaining(scale, 1, decay=0.9999, first=done - 1)
        assert left == pytest.approx(((1 + scale * done) / (10 + scale * done)) ** scale)


@pytest.mark.parametrize("settings", [{}, {"accumulate": 3}])
def test_the_trainer_counts_the_samples_of_a_step(settings):
    """Batches of 5, accumulated, against a reference of 10."""
    run = trainer(ema=0.5, ema_reference_batch=10, steps=6, **settings)
    scale = 5 * settings.get("accumulate", 1) / 10
    average, seen = [], []
    update = run.averaged.update_parameters

    def spy(model):
        update(model)
        seen.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
        average.append(nn.utils.parameters_to_vector(run.sampling_model.parameters()).detach().clone())

    run.averaged.update_parameters = spy
    run.fit()
    for step in range(1, 6):
        decay = min(0.5, (1 + scale * step) / (10 + scale * step)) ** scale
        torch.testing.assert_close(average[step], decay * average[step - 1] + (1 - decay) * seen[step])


def test_the_reference_is_compared_on_resume_and_is_that_of_the_batch_by_itself(tmp_path):
    plain, same, other = (trainer(**given) for given in ({}, {"ema_reference_batch": 5}, {"ema_reference_batch": 20}))
    for run in (plain, same, other):
        run.fit()
    assert torch.equal(weights(plain), weights(same))
    assert not torch.equal(weights(plain), weights(other))
    trainer(tmp_path, ema_reference_batch=20, steps=5).fit()
    again = trainer(tmp_path, ema_reference_batch=20)
    again.fit(resume=True)
    assert torch.equal(weights(again), weights(other))
    with pytest.raises(flows.CheckpointError, match="ema_reference_batch: saved 20, here None"):
        trainer(tmp_path).fit(resume=True)
    with pytest.raises(ValueError, match="ema_reference_batch must be at least 1; got 0"):
        trainer(ema_reference_batch=0)
    with pytest.raises(ValueError, match="ema_reference_batch is the batch that ema is meant for: give ema"):
        trainer(ema=None, ema_reference_batch=5)


class Buffered(nn.Module):
    """A model with buffers of every kind: what never changes, and what each call counts or measures."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(2, 2)
        fixed = {
            "positions": torch.arange(200), "bytes": torch.arange(256).to(torch.uint8),
            "mask": torch.full((4, 4), -torch.inf).triu(1), "nothing": torch.tensor([torch.nan, 1.0]),
        }  # fmt: skip
        moving = {"calls": torch.tensor(0), "seen": torch.tensor(False), "mean": torch.zeros(2), "low": torch.zeros(1)}
        for name, value in (fixed | moving).items():
            self.register_buffer(name, value.half() if name == "low" else value)

    def forward(self, t, x, y=None):
        if self.training:
            self.calls += 1
            self.seen.fill_(True)
            self.low += 1
            self.mean.lerp_(x.detach().mean(0), 0.1)
        return self.body(x)


def test_buffers_without_an_average_are_those_of_the_model():
    """Integers lose their fractions, half precision its small steps, and infinities become NaN, in an average."""
    model = Buffered()
    run = trainer(model=model)
    run.fit()
    averaged, own = (dict(m.named_buffers()) for m in (run.sampling_model, model))
    for name in set(own) - {"mean"}:
        torch.testing.assert_close(averaged[name], own[name], rtol=0, atol=0, equal_nan=True, msg=name)
    assert int(own["calls"]) == float(own["low"]) == run.steps
    assert bool((averaged["mean"] != own["mean"]).all())
