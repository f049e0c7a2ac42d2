"""The command line as a user meets it."""

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import flows
import flows.evaluation
import mbot
from flows import build, checkpoint, config
from flows import settings as files
from flows.__main__ import main
from flows.commands.common import parse, processes
from flows.config import TrainConfig
from flows.models import parameter_count
from flows.settings import ConfigError

ROOT = Path(__file__).parents[2]
SMALL = ["--model", "mlp", "--batch-size", "32", "--ot-batch-size", "64", "--no-progress", "--device", "cpu"]
TINY = [*SMALL, "--steps", "6", "--checkpoint-every", "2", "--evaluate", "0", "--seed", "3"]


@pytest.fixture
def quick_classifier(monkeypatch):
    """A classifier that is hardly trained: what it says of samples is not looked at."""
    train = functools.partial(flows.evaluation.train_classifier, steps=20)
    monkeypatch.setattr(flows.evaluation, "train_classifier", train)


def weights(run, step=6):
    return checkpoint.load(checkpoint.path_of(run / "checkpoints", step))["model"]


@pytest.mark.usefixtures("quick_classifier")
def test_train_sample_evaluate(tmp_path, capsys):
    run = tmp_path / "run"
    assert (
        main(["train", "--data", "digits", "--coupling", "c2ot", *TINY[:-6], "--evaluate", "60", "--out", str(run)])
        == 0
    )
    table = capsys.readouterr().out
    assert "| solver | NFE | consistency | cross-entropy | Fréchet |" in table
    assert "classifier accuracy" in table
    assert (run / "samples" / "step-00000006.png").stat().st_size > 1000
    assert json.loads((run / "evaluation.json").read_text())["rows"]["Euler-2"]["NFE"] == 2
    assert (run / "evaluation.md").read_text() in table
    assert main(["sample", "--run", str(run), "--num", "7", "--label", "4", "--guidance", "2", "--method", "euler",
                 "--steps", "3", "--device", "cpu"]) == 0  # fmt: skip
    with np.load(run / "samples" / "sample.npz") as drawn:
        assert drawn["x"].shape == (7, 1, 8, 8)
        assert (drawn["y"] == 4).all()
    assert "7 samples at 3 NFE" in capsys.readouterr().out
    assert main(["evaluate", "--run", str(run), "--num", "40", "--device", "cpu"]) == 0
    assert "| adaptive |" in capsys.readouterr().out
    assert main(["sample", "--run", str(run), "--label", "10", "--device", "cpu"]) == 2
    assert "--label must lie in 0 … 9" in capsys.readouterr().err


def test_a_resumed_run_ends_with_the_same_weights(tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["train", *TINY, "--out", str(whole)]) == 0
    assert main(["train", *TINY, "--out", str(parts), "--num-workers", "1"]) == 0
    (parts / "checkpoints" / "step-00000006.pt").unlink()
    assert main(["train", *TINY, "--out", str(parts)]) == 2
    assert "holds a run already: --resume" in capsys.readouterr().err
    assert main(["train", *TINY, "--out", str(parts), "--resume"]) == 0
    a, b = weights(whole), weights(parts)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_damaged_checkpoint_is_refused_with_the_flag_that_helps(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", *TINY, "--out", str(run)]) == 0
    last = run / "checkpoints" / "step-00000006.pt"
    last.write_bytes(last.read_bytes()[:1000])
    assert main(["train", *TINY, "--out", str(run), "--resume"]) == 3
    said = capsys.readouterr().err
    assert "truncated or damaged" in said
    previous = run / "checkpoints" / "step-00000004.pt"
    assert f"--resume-from {previous}" in said
    assert main(["sample", "--run", str(run), "--device", "cpu"]) == 3
    assert f"--checkpoint {previous}" in capsys.readouterr().err
    assert main(["train", *TINY, "--out", str(run), "--resume-from", str(previous)]) == 0


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, "0"), (signal.SIGINT, "1")], ids=["term", "ctrl-c"])
def test_a_signal_saves_and_the_exit_code_says_so(number, workers, tmp_path):
    """Ctrl-C goes to the data workers as well."""
    run = tmp_path / "run"
    more = ["--steps", "100000", "--checkpoint-every", "5", "--num-workers", workers, "--out", str(run)]
    command = [sys.executable, "-m", "flows", "train", *SMALL, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        while checkpoint.latest(run / "checkpoints") is None and process.poll() is None:
            time.sleep(0.05)
        os.killpg(process.pid, number)
        _, said = process.communicate(timeout=600)
    assert process.returncode == 75
    last = checkpoint.latest(run / "checkpoints")
    assert f"saved as {last}; run the same command with --resume to go on" in said
    assert checkpoint.load(last)["step"] > 0


def fail_behind(error, work):
    """Call work; raise an error in place of one that it raises."""
    try:
        work()
    except KeyError as behind:
        raise error from (behind if isinstance(error, ValueError) else None)


@pytest.mark.parametrize("error", [None, ValueError("caused"), OSError("in the context")])
def test_no_thread_of_the_processes_outlives_them(error, monkeypatch):
    """A wrapped model that is in a cycle, or in the frames of an error, would keep the group and its threads."""
    options = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    monkeypatch.setattr(dist, "init_process_group", functools.partial(dist.init_process_group, **options))
    monkeypatch.setenv("WORLD_SIZE", "2")
    alive = []

    def train():
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
        model.cycle = [model]
        alive.append(weakref.ref(model))
        if error is not None:
            raise KeyError

    with contextlib.suppress(ValueError, OSError), processes("cpu", 60) as first:
        assert first
        alive.append(weakref.ref(dist.group.WORLD))
        fail_behind(error, train)
    assert not dist.is_initialized()
    assert [one() for one in alive] == [None, None]


def test_torchrun_trains_and_only_the_first_process_writes(tmp_path):
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "flows", "train",
         *TINY, "--coupling-scope", "global", "--out", str(run)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("written:") == 1
    state = checkpoint.load(run / "checkpoints" / "step-00000006.pt")
    assert state["settings"]["processes"] == 2
    assert len(state["generators"]) == 2


def test_other_settings_are_not_resumed_and_leave_the_run_as_it_was(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", *TINY, "--out", str(run)]) == 0
    before = (run / "config.toml").read_text()
    for code, change, says in (
        (2, ["--lr", "0.5", "--betas", "0.5", "0.6"], "--lr: then 0.001, now 0.5; --betas: then [0.9, 0.99], now [0.5"),
        (3, ["--coupling", "ot"], "they differ in coupling: saved ConditionalOTCoupling"),
        (3, ["--mlp-width", "64"], "belongs to another model"),
    ):
        assert main(["train", *TINY, "--out", str(run), "--resume", *change]) == code
        assert says in capsys.readouterr().err
    assert (run / "config.toml").read_text() == before
    longer = [*TINY, "--steps", "8", "--num-workers", "1", "--checkpoint-every", "3"]
    assert main(["train", *longer, "--out", str(run), "--resume"]) == 0
    assert checkpoint.latest(run / "checkpoints").name == "step-00000008.pt"
    (run / "config.toml").write_text((run / "config.toml").read_text().replace("mlp_width = 128", "mlp_width = 64"))
    assert main(["sample", "--run", str(run), "--device", "cpu"]) == 3
    assert "holds another model than" in capsys.readouterr().err


def test_guidance_that_was_not_trained_for_is_refused(tmp_path, capsys):
    for name, extra, says in (
        ("plain", ["--no-conditional"], "--guidance 3 needs a model with conditions"),
        ("sure", ["--condition-dropout", "0"], "condition_dropout 0 (train with --condition-dropout 0.1)"),
    ):
        run = str(tmp_path / name)
        assert main(["train", *TINY, *extra, "--guidance", "3", "--out", run]) == 2
        assert main(["train", *TINY, *extra, "--out", run]) == 0
        for command in ("sample", "evaluate"):
            assert main([command, "--run", run, "--num", "20", "--guidance", "3", "--device", "cpu"]) == 2
            assert says in capsys.readouterr().err
    assert main(["sample", "--run", str(tmp_path / "plain"), "--label", "3", "--device", "cpu"]) == 2
    assert "has no classes" in capsys.readouterr().err


def test_a_loss_that_is_no_number_has_its_own_exit_code(tmp_path, capsys):
    wild = ["--lr", "1e30", "--warmup", "0", "--clip", "None"]
    assert main(["train", *TINY, *wild, "--out", str(tmp_path / "run")]) == 4
    said = capsys.readouterr().err
    assert "the loss is nan" in said or "the loss is inf" in said
    assert "at learning rate" in said


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('lr = 0.5\nbatch-size = 64\nema = "none"\nbetas = [0.1, 0.2]\n')
    got = parse(TrainConfig, ["--preset", "cifar10-c2ot", "--config", str(file), "--batch-size", "32"], "train")
    assert (got.lr, got.batch_size, got.ema, got.betas) == (0.5, 32, None, (0.1, 0.2))
    assert (got.ot_batch_size, got.eps, got.warmup, got.model) == (640, 1e-6, 5000, "cifar10-c2ot")


def test_resolved_settings_are_read_back(tmp_path):
    for preset in config.PRESETS:
        got = parse(TrainConfig, ["--preset", preset, "--data-root", 'a "quoted" folder', "--clip", "None"], "train")
        (tmp_path / "config.toml").write_text(files.to_toml(got))
        again = TrainConfig(**files.typed(TrainConfig, files.read_file(tmp_path / "config.toml"), "file"))
        assert again == got


def test_yaml_and_json_files(tmp_path):
    pytest.importorskip("yaml")
    (tmp_path / "a.yaml").write_text("steps: 7\nclip: null\n")
    got = parse(TrainConfig, ["--config", str(tmp_path / "a.yaml")], "train")
    assert (got.steps, got.clip) == (7, None)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("stepz = 3", "unknown keys: stepz. Known: out, config, preset"),
        ('steps = "many"', "steps in .* must be of type int; got 'many'"),
        ("steps = true", "must be of type int"),
        ('coupling = "best"', "coupling in .* must be one of 'auto', .*'c2ot', .*'fm', .*'ot', .*; got 'best'"),
        ("betas = [1]", "betas in .* must be 2 values"),
        ("steps = ", "cannot read"),
    ],
)
def test_bad_files(content, says, tmp_path, capsys):
    (tmp_path / "run.toml").write_text(content)
    with pytest.raises(ConfigError, match=says):
        parse(TrainConfig, ["--config", str(tmp_path / "run.toml")], "train")
    assert main(["train", "--config", str(tmp_path / "run.toml")]) == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    ["steps: [1, 2", "a: b: c", "\tsteps: 3", "steps: *x", "!!python/object/apply:os.system ['true']", "a: 3\n---\n",
     "? [a]\n: 3", "steps: !!binary x", "%YAML 9.9\n---\n", "steps: \x00", "[" * 1500, "\udcff"],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json", ".toml"])
def test_unparsable_files_are_told_without_a_traceback(content, suffix, tmp_path, capsys):
    pytest.importorskip("yaml")
    file = tmp_path / f"run{suffix}"
    file.write_bytes(content.encode(errors="surrogateescape"))
    assert main(["train", "--config", str(file), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: cannot read {file}: ")
    assert said.count("\n") == 1
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_bytes(file.read_bytes())
    for command in ("sample", "evaluate"):
        assert main([command, "--run", str(run)]) == 2
        assert "cannot read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [("lr", "nan", "--lr must be finite"), ("guidance", "inf", "--guidance must be finite"),
     ("clip", "-inf", "--clip must be finite"), ("seed", str(2**63), r"--seed must lie in 0 … 2^63 - 1; got 922"),
     ("seed", "-1", "--seed must lie in 0")],
)  # fmt: skip
def test_numbers_that_nothing_can_be_done_with(flag, value, says, tmp_path, capsys):
    assert main(["train", f"--{flag}={value}", "--out", str(tmp_path / "run")]) == 2
    assert says in capsys.readouterr().err
    (tmp_path / "a.json").write_text(f'{{"{flag}": {value.replace("nan", "NaN").replace("inf", "Infinity")}}}')
    assert main(["train", "--config", str(tmp_path / "a.json"), "--out", str(tmp_path / "run")]) == 2
    assert says in capsys.readouterr().err
    for command in ("sample", "evaluate", "diagnose") if flag in ("seed",) else ():
        run = [] if command == "diagnose" else ["--run", str(tmp_path)]
        assert main([command, *run, f"--{flag}={value}"]) == 2
        assert says in capsys.readouterr().err


def test_files_that_are_none(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.json").write_text("[1]")
    (tmp_path / "a.yaml").write_text("a: 1")
    for name, says in (("a.txt", "read from .toml"), ("a.json", "names and values"), ("b.toml", "cannot read")):
        with pytest.raises(ConfigError, match=says):
            files.read_file(tmp_path / name)
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ConfigError, match="pip install pyyaml, or use TOML"):
        files.read_file(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data", "mnist"], "--data mnist is read from files: say where they are with --data-root"),
        (["--data", "moons", "--model", "mnist"], "--model mnist is for images"),
        (["--device", "tpu9"], "--device tpu9 cannot be used"),
        (["--ot-batch-size", "100"], "multiple of batch_size=128"),
    ],
)
def test_settings_that_do_not_fit(arguments, says, tmp_path, capsys):
    assert main(["train", *arguments, "--out", str(tmp_path / "run")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_numbers_of_samples(tmp_path, capsys):
    run, tiny = tmp_path / "run", ["--data", "moons", "--steps", "2", "--batch-size", "8", "--ot-batch-size", "8"]
    train = ["train", *tiny, "--out", str(run)]
    assert main([*train, "--evaluate=-1"]) == 2
    assert "--evaluate must be at least 0; got -1" in capsys.readouterr().err
    assert main([*train, "--evaluate", "0"]) == 0
    for command in (["sample", "--run", str(run)], ["evaluate", "--run", str(run)], ["diagnose"]):
        for number in ("0", "-1"):
            assert main([*command, f"--num={number}"]) == 2
            assert f"--num must be at least 1; got {number}" in capsys.readouterr().err
    for name, file in (("a.v1", "a.v1.npz"), ("a.v2", "a.v2.npz"), ("b.npz", "b.npz"), ("c", "c.npz")):
        assert main(["sample", "--run", str(run), "--num", "2", "--out", str(tmp_path / name)]) == 0
        assert (tmp_path / file).is_file()
        assert (tmp_path / file.replace(".npz", ".png")).is_file()


def test_missing_data_and_runs(tmp_path, capsys):
    assert main(["train", "--data", "mnist", "--data-root", str(tmp_path)]) == 3
    assert "no mnist under" in capsys.readouterr().err
    assert main(["sample", "--run", str(tmp_path)]) == 2
    assert "has no config.toml" in capsys.readouterr().err


def test_diagnose_tells_what_a_coupling_does(capsys):
    assert main(["diagnose", "--data", "digits", "--coupling", "ot", "--num", "300"]) == 0
    said = capsys.readouterr().out
    assert "skew" in said
    assert "C²OT" in said or "ConditionalOT" in said


def test_usage(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert "diagnose" in capsys.readouterr().out
    assert main(["fly"]) == 2
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--checkpoint-every", "--coupling-scope", "Share of conditions dropped"):
        assert flag in text
    with pytest.raises(SystemExit) as stop:
        main(["train", "--stepz", "3"])
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "shape", "classes", "model"),
    [
        ([], (1, 8, 8), 10, "UNet"),
        (["--no-conditional"], (1, 8, 8), 0, "UNet"),
        (["--data", "moons"], (2,), 2, "ResidualMLP"),
        (["--data", "eight-gaussians"], (2,), 0, "ResidualMLP"),
        (["--data", "checkerboard"], (2,), 4, "ResidualMLP"),
    ],
)
def test_data_and_models_fit_each_other(arguments, shape, classes, model):
    settings = parse(TrainConfig, arguments, "train")
    task = build.load_task(settings)
    assert (task.shape, task.num_classes) == (shape, classes)
    built = build.build_model(settings, task)
    assert type(built).__name__ == model
    x, y = task.draw(3, torch.Generator().manual_seed(0))
    assert built(torch.rand(3), x, y).shape == x.shape
    assert (y is None) == (classes == 0)


def test_images_of_any_size_get_a_unet(tmp_path):
    for size, channels in ((16, 1), (64, 3)):
        images = np.zeros((4, size, size, channels), np.uint8)
        np.savez(tmp_path / "a.npz", x=images)
        settings = parse(TrainConfig, ["--data", "arrays", "--data-root", str(tmp_path / "a.npz")], "train")
        with torch.device("meta"):
            model = build.build_model(settings, build.load_task(settings))
        assert isinstance(model, flows.models.UNet)
        assert model.enter.in_channels == channels


def test_images_with_text_features_train_on_them(tmp_path):
    """What the preset imagenet32-c2ot reads: bytes and vectors."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", x=rng.integers(0, 256, (40, 8, 8), np.uint8), y=rng.normal(size=(40, 5)))
    data = ["--data", "arrays", "--data-root", str(tmp_path / "a.npz"), "--ot-batch-size", "32"]
    settings = parse(TrainConfig, ["--preset", "imagenet32-c2ot", *data], "train")
    task = build.load_task(settings)
    assert (task.shape, task.condition_dim) == ((1, 8, 8), 5)
    assert build.build_coupling(settings, task) == mbot.ConditionalOTCoupling("continuous", target_ratio=0.2)
    run = str(tmp_path / "run")
    assert main(["train", *TINY, *data, "--evaluate", "10", "--out", run]) == 0
    assert main(["sample", "--run", run, "--num", "3", "--guidance", "-1.5", "--device", "cpu"]) == 0


def test_a_folder_without_its_classes(tmp_path):
    from PIL import Image

    for i in range(32):
        (tmp_path / "data" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (8 * i, 0, 0)).save(tmp_path / "data" / "ab"[i % 2] / f"{i}.png")
    data = ["--data", "folder", "--data-root", str(tmp_path / "data"), "--image-size", "8", "--no-conditional"]
    assert main(["train", *TINY, *data, "--ot-batch-size", "32", "--out", str(tmp_path / "run")]) == 0


def test_vector_conditions_come_from_array_files(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", x=rng.normal(size=(100, 3)), y=rng.normal(size=(100, 2)))
    settings = parse(TrainConfig, ["--data", "arrays", "--data-root", str(tmp_path / "a.npz")], "train")
    task = build.load_task(settings)
    assert task.condition_dim == 2
    assert build.build_coupling(settings, task).condition == "continuous"
    assert task.conditions(5, torch.Generator().manual_seed(0)).shape == (5, 2)
    run = tmp_path / "run"
    arguments = ["--data", "arrays", "--data-root", str(tmp_path / "a.npz"), *TINY, "--out", str(run)]
    assert main(["train", *arguments]) == 0
    assert main(["evaluate", "--run", str(run), "--num", "40"]) == 0


@pytest.mark.parametrize(
    ("arguments", "coupling"),
    [
        ([], mbot.ConditionalOTCoupling()),
        (["--no-conditional"], mbot.OTCoupling()),
        (["--coupling", "fm"], mbot.IndependentCoupling()),
        (["--coupling", "ot"], mbot.OTCoupling()),
        (["--coupling", "wcfm", "--reg", "5"], mbot.WeightedCoupling(reg=5.0)),
        (["--path", "schrodinger-bridge", "--sigma", "0.5"], flows.SchrodingerBridgePath(sigma=0.5).default_coupling()),
        (["--path", "schrodinger-bridge", "--coupling", "c2ot"], mbot.ConditionalOTCoupling()),
        (["--coupling", "sinkhorn", "--reg", "0.2"], mbot.SinkhornCoupling(reg=0.2)),
        (["--coupling", "bomb", "--settings", "coupling.num_batches=4"], mbot.BoMbCoupling(num_batches=4)),
        (["--coupling", "semidiscrete", "--settings", "coupling.steps=7"], mbot.SemidiscreteCoupling(steps=7)),
        (
            ["--coupling", "ot", "--settings", "coupling.transport=PartialOT(mass=0.9)", "coupling.cost=euclidean"],
            mbot.OTCoupling(mbot.PartialOT(mass=0.9), "euclidean"),
        ),
    ],
)
def test_couplings_by_name(arguments, coupling):
    settings = parse(TrainConfig, arguments, "train")
    assert build.build_coupling(settings, build.load_task(settings)) == coupling


def test_a_contradiction_of_path_and_coupling_is_told(tmp_path, capsys):
    bridge = ["--path", "schrodinger-bridge", "--coupling", "fm"]
    assert main(["train", *TINY, *bridge, "--out", str(tmp_path / "run")]) == 2
    assert "is made of entropic pairs of reg = 2 sigma² = 2 for squared distances" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_paper_presets_have_the_papers_models():
    class Images:
        shape, num_classes, condition_dim, images = (3, 32, 32), 10, 0, True

    for preset, count in (("cifar10-c2ot", 83_351_043), ("cifar10-otcfm", 35_746_307)):
        Images.num_classes = 10 if preset == "cifar10-c2ot" else 0
        settings = parse(TrainConfig, ["--preset", preset], "train")
        with torch.device("meta"):
            assert parameter_count(build.build_model(settings, Images())) == count


def own_data(folder):
    """Small files as people have them: pictures, rows, keys of their own, a table."""
    from PIL import Image

    rng = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for i in range(9):
        Image.fromarray(rng.integers(0, 255, (10, 12, 3), dtype=np.uint8)).save(folder / "pictures" / f"{i}.png")
    points = rng.normal(size=(50, 3))
    kinds = [("wolf", "ant", "cat")[i % 3] for i in range(50)]
    np.save(folder / "rows.npy", points)
    np.savez(folder / "keys.npz", features=points, target=np.arange(50) % 3, kind=np.array(kinds))
    lines = [",".join([*(f"{v:.6f}" for v in row), kind]) for row, kind in zip(points, kinds, strict=True)]
    (folder / "table.csv").write_text("\n".join(["a,b,c,kind", *lines]) + "\n")
    return points


@pytest.mark.parametrize(
    ("file", "flags", "classes", "sizes"),
    [
        ("pictures", ["--image-size", "8"], 0, "9 samples are fewer than an OT batch of 640: --ot-batch-size 9"),
        ("rows.npy", [], 0, "50 samples are fewer than an OT batch of 640: --ot-batch-size 50 --batch-size 50"),
        ("keys.npz", ["--samples-key", "features", "--labels-key", "target", "--batch-size", "20"], 3,
         "--ot-batch-size 40 --batch-size 20"),
        ("keys.npz", ["--samples-key", "features", "--labels-key", "kind"], 3, "50 samples"),
        ("keys.npz", ["--samples-key", "features"], 0, "50 samples"),
        ("table.csv", ["--labels-key", "kind"], 3, "50 samples"),
        ("table.csv", ["--samples-key", "a,c"], 0, "50 samples"),
    ],
)  # fmt: skip
def test_small_own_data_are_trained_on_at_the_defaults(tmp_path, capsys, file, flags, classes, sizes):
    own_data(tmp_path)
    data = "folder" if file == "pictures" else "arrays"
    run = tmp_path / "run"
    command = ["train", "--data", data, "--data-root", str(tmp_path / file), *flags, "--model", "mlp", "--steps", "2",
               "--no-progress", "--device", "cpu", "--out", str(run)]  # fmt: skip
    assert main([*command, "--evaluate-samples", "10"]) == 0
    said = capsys.readouterr().out
    assert sizes in said.splitlines()[0]
    written = re.search(r"written: .* \((.*)\)", said)[1].split(", ")
    assert {"checkpoints", "config.toml", "metrics.csv", "evaluation.md"} <= set(written)
    assert all((run / name).exists() for name in written)
    _, task, _ = build.load_run(run, None, torch.device("cpu"))
    assert task.num_classes == classes
    assert main([*command, "--evaluate-samples", "0", "--resume", "--steps", "3"]) == 0, (
        "the same sizes are found again"
    )


def test_the_last_line_names_only_what_was_written(tmp_path, capsys):
    assert main(["train", *TINY, "--data", "moons", "--no-conditional", "--out", str(tmp_path / "run")]) == 0
    assert "evaluation" not in capsys.readouterr().out


@pytest.mark.usefixtures("quick_classifier")
def test_the_evaluation_shows_how_far_it_is(tmp_path, capsys):
    run = str(tmp_path / "run")
    assert main(["train", *[f for f in TINY if f != "--no-progress"][:-4], "--evaluate", "20", "--out", run]) == 0
    said = capsys.readouterr().err
    for part in ("a classifier is trained", *flows.evaluation.SOLVERS):
        assert f"measuring: {part}" in said
    assert main(["evaluate", "--run", run, "--num", "20", "--device", "cpu"]) == 0
    assert "measuring: adaptive" in capsys.readouterr().err


def test_a_download_without_torchvision_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    for data in ("mnist", "fashion-mnist", "cifar10"):
        for command in ("train", "diagnose"):
            assert main([command, "--data", data, "--data-root", str(tmp_path), "--download"]) == 2
            said = capsys.readouterr().err
            assert "pip install torchvision" in said
            assert said.count("\n") == 1


def test_a_download_that_fails_is_told_in_one_line(tmp_path, capsys, monkeypatch):
    def fails(root, download):
        raise RuntimeError("Error downloading train-images")

    datasets = types.SimpleNamespace(MNIST=fails)
    monkeypatch.setitem(sys.modules, "torchvision", types.SimpleNamespace(datasets=datasets))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    assert main(["train", "--data", "mnist", "--data-root", str(tmp_path), "--download"]) == 3
    assert "MNIST could not be downloaded" in capsys.readouterr().err


def test_data_too_few_to_be_measured_are_told_before_training(tmp_path, capsys):
    for n, pixels, code in ((1, False, 2), (2, False, 0), (3, True, 2), (4, True, 0)):
        rng = np.random.default_rng(0)
        x = rng.integers(0, 255, (n, 8, 8), dtype=np.uint8) if pixels else rng.normal(size=(n, 2)).astype(np.float32)
        np.savez(tmp_path / f"{n}.npz", x=x, y=np.arange(n) % 2)
        run = ["train", "--data", "arrays", "--data-root", str(tmp_path / f"{n}.npz"), "--model", "mlp", "--mlp-width",
               "8", "--steps", "2", "--no-progress", "--device", "cpu", "--out", str(tmp_path / f"run{n}")]  # fmt: skip
        assert main(run) == code
        if code:
            assert f"{n} samples are fewer than {n + 1}. Train with --evaluate 0" in capsys.readouterr().err
            assert not (tmp_path / f"run{n}" / "checkpoints").exists()
            assert main([*run, "--evaluate", "0"]) == 0
        else:
            assert "nan" not in (tmp_path / f"run{n}" / "evaluation.json").read_text().lower()
