"""Values that are not finite never reach a checkpoint, and no error offers a checkpoint that holds them."""

import math

import pytest
import torch

import flows
from flows import checkpoint
from tests.flows.toy_run import STEPS, Net, trainer, weights


class Spoiled(torch.autograd.Function):
    """The identity, with a gradient that is multiplied by a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


class Sick(Net):
    """Gradients are spoiled from one call on; the loss stays what it is."""

    def __init__(self, factor=math.nan, begin=8, end=math.inf):
        super().__init__()
        self.calls, self.factor, self.begin, self.end = 0, factor, begin, end

    def forward(self, t, x, y=None):
        self.calls += 1
        ill = self.begin <= self.calls < self.end
        return Spoiled.apply(super().forward(t, x, y), self.factor if ill else 1.0)


def all_finite(path):
    state = checkpoint.load(path)
    return all(bool(v.isfinite().all()) for part in ("model", "ema") for v in (state[part] or {}).values())


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("factor", [math.nan, math.inf, 1e38])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("ema", [None, 0.99])
def test_a_finite_loss_with_a_gradient_that_is_none(clip, factor, precision, ema, tmp_path):
    run = trainer(tmp_path, model=Sick(factor), clip=clip, precision=precision, ema=ema, checkpoint_every=1)
    with pytest.raises(
        flows.NonFiniteLoss, match=r"step 8: the loss is \d.*gradient norm (nan|inf).*step-00000007\.pt"
    ):
        run.fit()
    assert bool(weights(run).isfinite().all())
    kept = checkpoint.saved(tmp_path / "checkpoints")
    assert [path.name for path in kept] == [f"step-0000000{step}.pt" for step in (5, 6, 7)]
    assert all(map(all_finite, kept))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_spoiled_part_of_an_accumulated_step(accumulate, tmp_path):
    run = trainer(tmp_path, model=Sick(begin=7, end=8), clip=None, accumulate=accumulate, checkpoint_every=1)
    with pytest.raises(flows.NonFiniteLoss, match=f"step {-(-7 // accumulate)}: "):
        run.fit()
    assert all(map(all_finite, checkpoint.saved(tmp_path / "checkpoints")))


@pytest.mark.parametrize("last", [True, False])
def test_a_step_that_throws_the_weights_away(last, tmp_path):
    """A finite gradient and an infinite step: the checkpoint due after it is not written."""
    run = trainer(tmp_path, clip=None, checkpoint_every=1, steps=6 if last else STEPS, ema=0.5)
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=1e-3)
    run.scheduler = None
    take = run.loader.next_batch

    def next_batch():
        if run.step == 5:
            run.optimizer.param_groups[0]["lr"] = 3e38
            run.optimizer.param_groups[0]["weight_decay"] = 3e38
        return take()

    run.loader.next_batch = next_batch
    with pytest.raises(
        flows.NonFiniteLoss, match=r"after step 6 weights are not finite.*body\.0\.weight.*step-00000005"
    ):
        run.fit()
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step-00000005.pt"
    assert all(map(all_finite, checkpoint.saved(tmp_path / "checkpoints")))
    with pytest.raises(flows.NonFiniteLoss, match="weights are not finite"):
        run.save()
    run.optimizer.param_groups[0].update(lr=1e-3, weight_decay=0.0)
    run.load(checkpoint.latest(tmp_path / "checkpoints"))  # the same trainer goes on from the good one
    run.loader.next_batch = take
    assert run.fit().step == run.steps


def test_a_last_step_that_throws_the_weights_away_without_a_folder():
    run = trainer(clip=None, steps=1)
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=3e38, weight_decay=3e38)
    run.scheduler = None
    with pytest.raises(flows.NonFiniteLoss, match=r"after step 1 weights are not finite.*no good checkpoint"):
        run.fit()


def spoil(path, part="model"):
    """A checkpoint as an older release would have left it."""
    state = torch.load(path, weights_only=True)
    name = next(name for name in state[part] if name.endswith("label.weight"))
    state[part][name][0] = math.nan
    torch.save(state, path)


@pytest.mark.parametrize("part", ["model", "ema"])
def test_a_checkpoint_that_holds_nan_is_not_believed(part, tmp_path):
    trainer(tmp_path, steps=15).fit()
    newest, middle, oldest = reversed(checkpoint.saved(tmp_path / "checkpoints"))
    spoil(newest, part)
    with pytest.raises(flows.CheckpointError, match=rf"NaN \(.*label\.weight\).*previous good .*{middle.name}") as stop:
        trainer(tmp_path).fit(resume=True)
    assert stop.value.previous == middle
    spoil(middle, part)
    with pytest.raises(flows.CheckpointError, match=rf"previous good checkpoint is .*{oldest.name}"):
        trainer(tmp_path).fit(resume=newest)
    assert checkpoint.last_good(tmp_path / "checkpoints") == oldest
    # and an error that offers the last good one skips them
    sick = trainer(tmp_path, model=Sick(begin=1))
    with pytest.raises(flows.NonFiniteLoss, match=rf"last good checkpoint is .*{oldest.name}"):
        sick.fit(resume=oldest)
    spoil(oldest, part)
    assert checkpoint.last_good(tmp_path / "checkpoints") is None
    with pytest.raises(flows.NonFiniteLoss, match="There is no good checkpoint"):
        trainer(tmp_path, model=Sick(begin=1)).fit()


def test_half_precision_gives_up_when_no_scale_helps(tmp_path):
    """The scaler skips steps that overflow; a gradient that is never finite would be skipped for ever."""
    run = trainer(tmp_path, model=Sick(begin=1), precision="fp16", steps=200, checkpoint_every=200)
    with pytest.raises(flows.NonFiniteLoss, match=r"gradient overflows at every loss scale down to 0.00012"):
        run.fit()
    assert run.step < 60
    assert checkpoint.latest(tmp_path / "checkpoints") is None
    some = trainer(tmp_path, model=Sick(begin=3, end=6), precision="fp16", clip=None)
    some.fit()
    assert all_finite(checkpoint.latest(tmp_path / "checkpoints"))
    assert bool(weights(some).isfinite().all())


def test_weights_of_half_precision_are_not_averaged_in_it():
    """``a + (1 - .9999) (w - a)`` is ``a`` where numbers have eight bits."""
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match=rf"ema.*{dtype}.*precision='bf16'.*ema=None"):
            trainer(model=Net().to(dtype))
        trainer(model=Net().to(dtype), ema=None)


MISSING = ["version", "step", "model", "ema", "optimizer", "scheduler", "scaler", "loader", "generators", "settings",
           "config"]  # fmt: skip


@pytest.mark.parametrize("name", MISSING)
def test_checkpoints_without_a_part_are_refused(name, tmp_path):
    run = trainer(tmp_path, steps=10)
    run.fit()
    first, last = checkpoint.saved(tmp_path / "checkpoints")
    state = torch.load(last, weights_only=True)
    del state[name]
    torch.save(state, last)
    with pytest.raises(flows.CheckpointError, match=rf"not a checkpoint of this library \(no {name}.*{first.name}"):
        trainer(tmp_path).fit(resume=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [("version", "1"), ("version", None), ("version", True), ("settings", None), ("settings", [1]), ("step", "7"),
     ("model", None), ("loader", 3), ("generators", {})],
)  # fmt: skip
def test_checkpoints_with_a_part_of_another_kind_are_refused(name, value, tmp_path):
    run = trainer(tmp_path, steps=5)
    run.fit()
    last = checkpoint.latest(tmp_path / "checkpoints")
    torch.save({**torch.load(last, weights_only=True), name: value}, last)
    with pytest.raises(flows.CheckpointError, match=rf"not a checkpoint of this library \({name} is "):
        trainer(tmp_path).fit(resume=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [("optimizer", {}), ("optimizer", {"state": 3, "param_groups": 4}), ("loader", {}), ("generators", []),
     ("generators", [None]), ("model", {}), ("ema", {}), ("ema", None), ("scheduler", None), ("scaler", {"scale": 1})],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused(name, value, tmp_path):
    run = trainer(tmp_path, steps=5, precision="fp16")
    run.fit()
    last = checkpoint.latest(tmp_path / "checkpoints")
    torch.save({**torch.load(last, weights_only=True), name: value}, last)
    with pytest.raises(flows.CheckpointError, match="belongs to another model or loader"):
        trainer(tmp_path, precision="fp16").fit(resume=True)


class Nothing(Net):
    """A model with a "no condition" and a mask of its own, and a measure that may fail."""

    def __init__(self, fails_at=math.inf):
        super().__init__()
        self.calls, self.fails_at = 0, fails_at
        self.register_buffer("nothing", torch.tensor([math.nan, 1.0]))
        self.register_buffer("mask", torch.full((3, 3), -math.inf).triu(1))
        self.register_buffer("scale", torch.ones(2))

    def forward(self, t, x, y=None):
        self.calls += 1
        self.scale *= math.inf if self.calls == self.fails_at else 1
        return super().forward(t, x, y)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_buffers_that_are_not_finite_from_the_start_are_kept(ema, tmp_path):
    trainer(tmp_path, model=Nothing(), ema=ema, steps=5).fit()
    again = trainer(tmp_path, model=Nothing(), ema=ema)
    assert again.fit(resume=True).step == STEPS
    for model in (again.model, again.sampling_model):
        assert model.nothing.isnan().tolist() == [True, False]
        assert torch.equal(model.mask, Nothing().mask)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_buffers_that_become_infinite_are_not_saved(ema, tmp_path):
    run = trainer(tmp_path, model=Nothing(8), ema=ema, checkpoint_every=1)
    with pytest.raises(flows.NonFiniteLoss, match=r"after step 8 weights are not finite \(scale.*step-00000007\.pt"):
        run.fit()
