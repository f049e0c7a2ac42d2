"""The trainer: exact resumption whatever happened, clean stops, nothing half-written."""

import copy
import csv
import enum
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import flows
from flows import checkpoint
from tests.flows.toy_run import STEPS, Net, fragile_run, trainer, weights

ROOT = Path(__file__).parents[2]
fork = multiprocessing.get_context("fork")


def in_process(function, *arguments):
    """Start a function in a forked process (no second import of torch)."""

    def body():
        torch.set_num_threads(1)  # before anything runs in parallel there
        function(*arguments)

    process = fork.Process(target=body)
    process.start()
    return process


@pytest.fixture(scope="module")
def straight():
    """Weights of the uninterrupted run."""
    run = trainer()
    run.fit()
    return weights(run)


def test_a_seed_decides_everything(straight):
    torch.manual_seed(99)
    again = trainer(loader={"num_workers": 1})
    again.fit()
    assert torch.equal(weights(again), straight)
    other = trainer(seed=4)
    other.fit()
    assert not torch.equal(weights(other), straight)


@pytest.mark.parametrize("stop", [1, 5, 7, 23])
def test_a_resumed_run_ends_with_the_same_bits(straight, stop, tmp_path):
    first = trainer(tmp_path, steps=stop, checkpoint_every=1)
    first.fit()
    second = trainer(tmp_path, model=Net())
    result = second.fit(resume=True)
    assert torch.equal(weights(second), straight)
    assert result.step == STEPS
    with open(tmp_path / "metrics.csv") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == sorted(set(steps))
    assert steps[-1] == STEPS


def slow_run(out, resume):
    """A run that takes long enough to be killed, checkpointing at every step."""
    run = trainer(out, checkpoint_every=1)
    take = run.loader.next_batch
    run.loader.next_batch = lambda: (time.sleep(0.01), take())[1]
    run.fit(resume=resume)


def test_killed_at_random_moments_and_resumed_it_ends_with_the_same_bits(straight, tmp_path):
    moments = random.Random(0)
    log = tmp_path / "metrics.csv"  # written anew when a run begins

    def version():
        return (log.stat().st_ino, log.stat().st_mtime_ns) if log.exists() else None

    for _ in range(20):
        before = version()
        process = in_process(slow_run, tmp_path, True)
        while version() == before and process.is_alive():
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.join()
    begun = checkpoint.latest(tmp_path / "checkpoints") is not None  # else the first model is needed
    final = trainer(tmp_path, model=Net() if begun else None)
    final.fit(resume=True)
    assert torch.equal(weights(final), straight)


def waiting_run(out):
    """A run that goes on after its first checkpoint once a signal has come, however long that takes."""
    run = trainer(out, checkpoint_every=1)
    take = run.loader.next_batch
    noticed, written = os.pipe()
    os.set_blocking(written, False)
    signal.set_wakeup_fd(written)

    def next_batch():
        if run.step > 0:
            os.read(noticed, 1)
        return take()

    run.loader.next_batch = next_batch
    run.fit()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_with_its_own_code(straight, number, tmp_path):
    process = in_process(waiting_run, tmp_path)
    while checkpoint.latest(tmp_path / "checkpoints") is None and process.is_alive():
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 75
    assert checkpoint.load(checkpoint.latest(tmp_path / "checkpoints"))["step"] < STEPS
    final = trainer(tmp_path, model=Net())
    final.fit(resume=True)
    assert torch.equal(weights(final), straight)


def test_signals_are_handed_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    run = trainer(tmp_path)
    take = run.loader.next_batch
    run.loader.next_batch = lambda: (os.kill(os.getpid(), signal.SIGTERM) if run.step == 6 else None, take())[1]
    with pytest.raises(
        flows.Interrupted, match=r"stopped by a signal after step 7; saved as .*step-00000007.pt"
    ) as stop:
        run.fit()
    assert stop.value.code == 75
    assert stop.value.checkpoint == tmp_path / "checkpoints" / "step-00000007.pt"
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.parametrize("clip", [None, 1.0])
def test_nan_stops_with_a_report_and_leaves_the_last_checkpoint(clip, tmp_path):
    class Sick(Net):
        calls = 0

        def forward(self, t, x, y=None):
            Sick.calls += 1
            return super().forward(t, x, y) * (torch.nan if Sick.calls == 8 else 1)

    run = trainer(tmp_path, model=Sick(), clip=clip)
    with pytest.raises(
        flows.NonFiniteLoss, match=r"step 8: the loss is nan.*last good checkpoint is .*step-00000005.pt"
    ):
        run.fit()
    assert bool(weights(run).isfinite().all())
    assert checkpoint.saved(tmp_path / "checkpoints") == [tmp_path / "checkpoints" / "step-00000005.pt"]
    assert checkpoint.load(tmp_path / "checkpoints" / "step-00000005.pt")["step"] == 5


def finished(out, **settings):
    run = trainer(out, **settings)
    run.fit()
    return sorted((out / "checkpoints").iterdir())


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped"])
def test_a_damaged_checkpoint_is_refused_and_the_previous_one_offered(damage, straight, tmp_path):
    *_, previous, last = finished(tmp_path)
    content = bytearray(last.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 0x10
    last.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "flipped": content}[damage])
    with pytest.raises(
        flows.CheckpointError, match=f"truncated or damaged.*previous good checkpoint is .*{previous.name}"
    ) as e:
        trainer(tmp_path).fit(resume=True)
    assert e.value.previous == previous
    again = trainer(tmp_path, model=Net())
    again.fit(resume=e.value.previous)
    assert torch.equal(weights(again), straight)


def test_foreign_files_are_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(flows.CheckpointError, match=r"not a checkpoint of this library.*no 'flows-checkpoint' mark"):
        checkpoint.load(tmp_path / "other.pt")
    torch.save(Net(), tmp_path / "pickle.pt")
    with pytest.raises(flows.CheckpointError, match="not a checkpoint of this library"):
        checkpoint.load(tmp_path / "pickle.pt")
    torch.save({"format": checkpoint.FORMAT, "version": 99}, tmp_path / "new.pt")
    with pytest.raises(flows.CheckpointError, match="version 99, newer"):
        checkpoint.load(tmp_path / "new.pt")
    with pytest.raises(flows.CheckpointError, match="there is no checkpoint"):
        trainer(tmp_path).fit(resume=tmp_path / "absent.pt")


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    last = finished(tmp_path)[-1]
    with pytest.raises(flows.CheckpointError, match=r"another run; it differs in seed: saved 3, here 4"):
        trainer(seed=4).load(last)
    with pytest.raises(flows.CheckpointError, match=r"clip: saved 1.0, here None; accumulate: saved 1, here 2"):
        trainer(clip=None, accumulate=2).load(last)
    with pytest.raises(flows.CheckpointError, match="another model or loader"):
        trainer(model=flows.models.ResidualMLP(2, num_classes=3)).load(last)
    with pytest.raises(flows.CheckpointError, match="batch_size: saved 5, here 3"):
        trainer(loader={"batch_size": 3}).load(last)


class Wide(Net):
    def __init__(self):
        super().__init__()
        self.ballast = nn.Parameter(torch.zeros(50_000))


def full_disk(out, said):
    run = trainer(out, model=Wide())
    real = run.save

    def save():
        if run.step > 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        return real()

    run.save = save
    try:
        run.fit()
    except flows.CheckpointError as error:
        said.put((str(error), str(error.previous)))


def test_a_disk_that_fills_up_costs_nothing_but_the_time_since_the_last_checkpoint(tmp_path):
    said = fork.Queue()
    process = in_process(full_disk, tmp_path, said)
    message, previous = said.get(timeout=600)
    process.join()
    assert "step-00000010.pt could not be written" in message
    assert "File too large" in message
    assert previous.endswith("step-00000005.pt")
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000005.pt"]
    assert checkpoint.load(previous)["step"] == 5


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    target = tmp_path / "a"
    checkpoint.write_atomically(target, lambda f: f.write(b"old"))

    def fail(file):
        file.write(b"half")
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        checkpoint.write_atomically(target, fail)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_old_checkpoints_are_removed_and_leftovers_swept(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".step-00000001.pt.7.partial").write_bytes(b"left by a killed run")
    assert [p.name for p in finished(tmp_path, keep=2)] == ["step-00000020.pt", "step-00000024.pt"]


def test_accumulation_is_the_larger_batch():
    """Two batches of five accumulated step as one batch of ten, when nothing else is random."""

    def run(accumulate, batch_size):
        torch.manual_seed(0)
        model = flows.models.ResidualMLP(2, width=8, depth=1)
        data = TensorDataset(torch.ones(20, 2))
        loader = flows.CoupledLoader(data, torch.zeros(20, 2), None, batch_size, shuffle=False)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        settings = {"optimizer": sgd, "accumulate": accumulate, "progress": False, "ema": None}
        t = flows.Trainer(model, loader, steps=3, path=Still(), **settings)
        t.fit()
        return weights(t)

    torch.testing.assert_close(run(2, 5), run(1, 10))


class Still(flows.LinearPath):
    """A path whose points do not depend on the time that was drawn."""

    def sample(self, x0, x1, t, noise=None):
        return x1 * t.mul(0)[:, None] + x1, x1 - x0


def test_averaged_weights_are_the_recursion():
    run = trainer(steps=6, ema=0.5)
    seen = []
    take = run.loader.next_batch
    run.loader.next_batch = lambda: (seen.append([p.detach().clone() for p in run.model.parameters()]), take())[1]
    run.fit()
    seen.append([p.detach().clone() for p in run.model.parameters()])
    expected = seen[1]
    for step, now in enumerate(seen[2:], start=1):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = [decay * a + (1 - decay) * b for a, b in zip(expected, now, strict=True)]
    for a, b in zip(run.sampling_model.parameters(), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_trains(precision, tmp_path):
    run = trainer(tmp_path, precision=precision, steps=10)
    run.fit()
    assert next(run.model.parameters()).dtype == torch.float32
    assert bool(weights(run).isfinite().all())
    again = trainer(tmp_path, precision=precision, steps=12)
    assert again.fit(resume=True).step == 12


def test_previews_and_reports(straight, tmp_path):
    shown = []

    def preview(model, step):
        assert not model.training
        torch.rand(7)
        shown.append(step)

    run = trainer(tmp_path, preview=preview, preview_every=10)
    result = run.fit()
    assert shown == [10, 20, 24]
    assert torch.equal(weights(run), straight), "a preview must not disturb training"
    assert result.checkpoint == tmp_path / "checkpoints" / "step-00000024.pt"
    with open(tmp_path / "metrics.csv") as file:
        row = list(csv.DictReader(file))[-1]
    assert int(row["step"]) == 24
    assert float(row["loss"]) > 0
    assert float(row["grad_norm"]) > 0


def test_every_row_goes_to_a_callable_too(tmp_path):
    rows = []
    run = trainer(tmp_path, log_every=10, on_log=rows.append)
    run.fit()
    assert [row["step"] for row in rows] == [10, 20, 24]
    assert all(isinstance(value, (int, float)) for row in rows for value in row.values())
    with open(tmp_path / "metrics.csv") as file:
        written = list(csv.DictReader(file))
    for row, line in zip(rows, written, strict=True):
        assert list(row) == list(line)
        assert all(float(line[name]) == pytest.approx(row[name], rel=1e-5) for name in row)
    alone = []
    trainer(log_every=10, on_log=alone.append).fit()
    assert [row["loss"] for row in alone] == [row["loss"] for row in rows]
    run.steps = 30
    run.fit()
    assert [row["step"] for row in rows[3:]] == [30]
    with pytest.raises(TypeError, match="on_log must be called with a dict of each row; got str"):
        trainer(on_log="wandb")


def test_tensorboard_files_and_what_they_need(tmp_path, monkeypatch):
    with monkeypatch.context() as missing:
        missing.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(ImportError, match="pip install tensorboard"):
            trainer(tmp_path, tensorboard=True).fit()
    pytest.importorskip("tensorboard")
    with pytest.raises(ValueError, match="give the run a folder"):
        trainer(tensorboard=True).fit()
    trainer(tmp_path, tensorboard=True, steps=4).fit()
    assert [p.name.startswith("events") for p in (tmp_path / "tensorboard").iterdir()] == [True]


def test_the_rate_warms_up_and_decays():
    rates = []
    for steps in (None, 10):
        sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = flows.warmup_schedule(sgd, warmup=3, steps=steps)
        seen = []
        for _ in range(10):
            seen.append(sgd.param_groups[0]["lr"])
            sgd.step()
            schedule.step()
        rates.append(seen)
    assert rates[0] == [0.25, 0.5, 0.75] + [1.0] * 7
    assert rates[1][:3] == [0.25, 0.5, 0.75]
    assert rates[1][3:] == pytest.approx([(10 - s) / 7 for s in range(3, 10)])
    with pytest.raises(ValueError, match="steps must be at least 1; got -10"):
        flows.warmup_schedule(sgd, warmup=3, steps=-10)  # all rates would be 0


def test_dropped_conditions():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(10_000)
    dropped = flows.drop_conditions(y, 0.2, g)
    gone = dropped == -1
    assert float(gone.float().mean()) == pytest.approx(0.2, abs=0.02)
    assert torch.equal(dropped[~gone], y[~gone])
    both = flows.drop_conditions({"a": y, "v": torch.ones(10_000, 3)}, 0.5, g)
    assert torch.equal(both["v"].isnan().all(1), both["a"] == -1)
    assert flows.drop_conditions(None, 0.5) is None
    assert flows.drop_conditions(y, 0.0) is y
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        flows.drop_conditions(y, 1.5)
    with pytest.raises(TypeError, match="must be real"):
        flows.drop_conditions(torch.ones(2, dtype=torch.complex64), 0.5)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"ema": 1.0}, ValueError, "ema must lie in"),
        ({"precision": "int8"}, ValueError, "precision must be one of"),
        ({"clip": 0.0}, ValueError, "clip must be a finite number > 0"),
        ({"checkpoint_every": 5}, ValueError, "give out"),
        ({"keep": 1}, ValueError, "keep must be at least 2"),
        ({"config": {"a": object()}}, TypeError, "plain values"),
        ({"model": lambda t, x, y: x}, TypeError, "model must be a torch.nn.Module"),
    ],
)
def test_bad_settings(settings, error, says):
    with pytest.raises((error, AttributeError), match=says if "model" not in settings else "parameters"):
        trainer(**settings)
    with pytest.raises(TypeError, match="CoupledLoader"):
        flows.Trainer(Net(), [1, 2], steps=3)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        flows.Trainer(lambda t, x, y: x, trainer().loader, steps=3)


def test_a_data_worker_that_dies_costs_nothing_but_a_restart(tmp_path):
    """Sample 59 kills the worker in the first run; the second goes on, and ends where an undisturbed one does."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.flows.toy_run", str(tmp_path / "two")],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "FRAGILE": "1"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "WorkerDied: a data worker died" in done.stderr
    assert 0 < checkpoint.load(checkpoint.latest(tmp_path / "two" / "checkpoints"))["step"] < STEPS
    second, whole = fragile_run(tmp_path / "two"), fragile_run(tmp_path / "one")
    second.fit(resume=True)
    whole.fit()
    assert torch.equal(weights(second), weights(whole))


class Level(enum.IntEnum):
    LOW = 1


def test_numbers_of_numpy_go_into_checkpoints_as_numbers(tmp_path):
    """A rate out of numpy.logspace would make every checkpoint one that `checkpoint.load` refuses."""
    first = trainer(tmp_path, steps=5, config={"rate": np.float64(0.5), "level": Level.LOW, "many": (np.float64(2),)})
    first.optimizer.param_groups[0]["lr"] = np.float64(0.01)
    first.scheduler = torch.optim.lr_scheduler.StepLR(first.optimizer, np.int64(3), np.float32(0.5))
    first.fit()
    second = trainer(tmp_path, model=Net())
    second.scheduler = torch.optim.lr_scheduler.StepLR(second.optimizer, 3, 0.5)
    config = second.load(checkpoint.latest(tmp_path / "checkpoints"))
    assert config == {"rate": 0.5, "level": 1, "many": (2.0,)}
    assert [type(value) for value in config.values()] == [float, int, tuple]
    assert second.fit().step == STEPS


class Stateful(nn.Module):
    def get_extra_state(self):
        return {"numbers": np.arange(3)}

    def set_extra_state(self, state):
        pass


def test_states_that_a_checkpoint_would_not_give_back_are_refused_before_training(tmp_path):
    net = Net()
    net.more = Stateful()
    run = trainer(tmp_path, model=net)
    with pytest.raises(TypeError, match=r"the state of the model cannot be read .* plain values: numpy\..*"):
        run.fit()
    run = trainer(tmp_path)
    run.scheduler.state_dict = lambda: {"curve": Level}
    with pytest.raises(TypeError, match=r"the state of the scheduler cannot be read .*Level"):
        run.fit()
    assert run.step == 0
    run = trainer()
    run.scheduler.state_dict = lambda: {"curve": Level}
    assert run.fit().step == STEPS, "a run without a folder saves nothing"


def test_a_checkpoint_outlives_those_of_later_steps(straight, tmp_path):
    """An older step taken up again: what it writes is not the oldest because others went further."""
    trainer(tmp_path, checkpoint_every=1, keep=20).fit()
    again = trainer(tmp_path, checkpoint_every=1, keep=2, steps=12)
    result = again.fit(resume=tmp_path / "checkpoints" / "step-00000010.pt")
    kept = [p.name for p in checkpoint.saved(tmp_path / "checkpoints")]
    assert result.checkpoint.is_file()
    assert kept == [f"step-{step:08d}.pt" for step in range(11, STEPS + 1)]
    last = trainer(tmp_path, model=Net())
    last.fit(resume=result.checkpoint)
    assert torch.equal(weights(last), straight)


def test_a_new_run_does_not_begin_among_the_checkpoints_of_another(tmp_path):
    trainer(tmp_path, steps=5).fit()
    before = (tmp_path / "checkpoints" / "step-00000005.pt").read_bytes(), (tmp_path / "metrics.csv").read_bytes()
    with pytest.raises(flows.CheckpointError, match=r"holds a run already, up to step-00000005\.pt: fit\(resume=True"):
        trainer(tmp_path, steps=2).fit()
    after = (tmp_path / "checkpoints" / "step-00000005.pt").read_bytes(), (tmp_path / "metrics.csv").read_bytes()
    assert after == before
    run = trainer(tmp_path)
    run.load(tmp_path / "checkpoints" / "step-00000005.pt")
    assert run.fit().step == STEPS
    run.steps += 1
    assert run.fit().step == STEPS + 1


@pytest.mark.parametrize("done", [0, 7])
def test_a_copy_trains_as_the_original(done, straight):
    """Averages too, whose decay rises with the steps of their own trainer."""
    run = trainer(steps=max(done, 1))
    if done:
        run.fit()
    run.steps = STEPS
    state = torch.get_rng_state()
    for one in (copy.deepcopy(run), run):
        torch.set_rng_state(state)
        one.fit()
        assert torch.equal(weights(one), straight)


def test_an_optimizer_and_a_scheduler_that_train_nothing():
    """Both would run to the end: the one over another model, the other of an optimiser that was not given."""
    model, data = Net(), flows.CoupledLoader(TensorDataset(torch.randn(20, 2)), batch_size=5)
    others, own = (torch.optim.Adam(m.parameters()) for m in (Net(), model))
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(own)
    for settings, error, says in (
        ({"optimizer": others}, ValueError, "the optimizer holds no parameter of the model"),
        ({"scheduler": flows.warmup_schedule(own)}, ValueError, "the scheduler belongs to another optimizer"),
        ({"optimizer": own, "scheduler": flows.warmup_schedule(others)}, ValueError, "belongs to another optimizer"),
        ({"optimizer": 3}, TypeError, "optimizer must be a torch.optim.Optimizer"),
        ({"optimizer": own, "scheduler": plateau}, TypeError, "a metric, .* flows.warmup_schedule.*ReduceLROnPlateau"),
        ({"config": [1]}, TypeError, "config must be a dict of plain values; got list"),
    ):
        with pytest.raises(error, match=says):
            flows.Trainer(model, data, steps=3, progress=False, **settings)
    part = torch.optim.Adam(model.body[0].parameters())
    flows.Trainer(model, data, steps=3, progress=False, optimizer=part, scheduler=flows.warmup_schedule(part))
    with pytest.raises(ValueError, match=r"all are frozen \(requires_grad=False\)"):
        flows.Trainer(model.requires_grad_(False), data, steps=3, progress=False)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_preview_that_fails_leaves_the_modes_as_they_were(ema):
    def broken(model, step):
        assert not any(module.training for module in model.modules())
        raise KeyError("preview")

    run = trainer(preview=broken, preview_every=2, ema=ema)
    run.sampling_model.body[2].eval()
    modes = [module.training for module in run.sampling_model.modules()]
    run.model.train()
    with pytest.raises(KeyError):
        run.fit()
    left = [module.training for module in run.sampling_model.modules()]
    assert left == ([True] * len(modes) if ema is None else modes)
