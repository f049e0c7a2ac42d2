"""Reflow on the command line: pairs of a run, training on them, and again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flows
from flows import build, checkpoint
from flows.__main__ import main
from flows.pairs import fingerprint
from flows.settings import read_file

CPU = torch.device("cpu")
TEACHER = ["train", "--data", "moons", "--mlp-width", "16", "--mlp-depth", "1", "--batch-size", "32",
           "--ot-batch-size", "64", "--steps", "4", "--evaluate", "0", "--no-progress", "--device", "cpu"]  # fmt: skip
MORE = ["--pairs", "100", "--method", "euler", "--solver-steps", "2", "--evaluate", "0", "--no-progress", "--device",
        "cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    run = tmp_path_factory.mktemp("teacher") / "run"
    assert main([*TEACHER, "--out", str(run)]) == 0
    return run


def start(run):
    return checkpoint.load(checkpoint.latest(run / "checkpoints"))


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_reflow_and_again(teacher, tmp_path, capsys):
    out = [tmp_path / "two", tmp_path / "three"]
    assert main(["reflow", "--run", str(teacher), "--out", str(out[0]), *MORE, "--evaluate", "50"]) == 0
    table = capsys.readouterr().out
    for row in ("Euler-1", "Euler-2", "Euler-4", "adaptive"):
        assert f"| {row} |" in table
    assert json.loads((out[0] / "evaluation.json").read_text())["rows"]["Euler-1"]["NFE"] == 1
    pairs = flows.PairedDataset.load(out[0] / "pairs")
    _, _, model = build.load_run(teacher, None, CPU)
    assert pairs.teacher == fingerprint(model)
    assert (len(pairs), pairs.shape, pairs.y.tolist()) == (100, (2,), [0, 1] * 50)
    x0, x1, y = pairs.rows(torch.arange(5))
    torch.testing.assert_close(flows.integrate(model, x0, y=y, method="euler", steps=2).final, x1)
    assert read_file(out[0] / "config.toml")["coupling"] == "fm"
    assert main(["reflow", "--run", str(out[0]), "--out", str(out[1]), *MORE]) == 0
    assert flows.PairedDataset.load(out[1] / "pairs").teacher == fingerprint(build.load_run(out[0], None, CPU)[2])
    for command in (["sample", "--num", "5"], ["evaluate", "--num", "20"]):
        assert main([*command, "--run", str(out[1]), "--device", "cpu"]) == 0


@pytest.mark.parametrize("more", [[], ["--warmup-steps", "3", "--from-scratch"], ["--mlp-width", "8"]])
def test_where_the_student_starts(more, teacher, tmp_path):
    """A learning rate that moves nothing."""
    run = tmp_path / "run"
    assert main(["reflow", "--run", str(teacher), "--out", str(run), *MORE, *more, "--lr", "1e-30"]) == 0
    _, _, old = build.load_run(teacher, None, CPU)
    _, _, new = build.load_run(run, None, CPU)
    width = 8 if "--mlp-width" in more else 16
    assert new.inputs.out_features == width
    assert (width == 16 and same(old.state_dict(), new.state_dict())) == (not more)
    settings = start(run)["loader"]["settings"]
    assert ("warmup_steps=3" in settings["annealing"]) == ("--warmup-steps" in more)


@pytest.mark.parametrize("annealed", [False, True])
def test_what_is_stopped_goes_on_to_the_same_weights(annealed, teacher, tmp_path, monkeypatch, capsys):
    more = ["--warmup-steps", "3", "--from-scratch"] if annealed else []
    command = ["reflow", "--run", str(teacher), *MORE, *more, "--checkpoint-every", "2"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*command, "--out", str(whole)]) == 0

    def stops(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(flows.Trainer, "fit", stops)
    with pytest.raises(KeyboardInterrupt):
        main([*command, "--out", str(parts)])
    monkeypatch.undo()
    state = json.loads((parts / "pairs" / "pairs.json").read_text())
    (parts / "pairs" / "pairs.json").write_text(json.dumps({**state, "done": 0}))
    assert main([*command, "--out", str(parts), "--resume"]) == 0
    (parts / "checkpoints" / "step-00000004.pt").unlink()
    capsys.readouterr()
    assert main([*command, "--out", str(parts)]) == 2
    assert "holds a run already: --resume continues it" in capsys.readouterr().err
    assert main([*command, "--out", str(parts), "--resume"]) == 0
    assert same(start(whole)["model"], start(parts)["model"])
    last = parts / "checkpoints" / "step-00000004.pt"
    last.write_bytes(last.read_bytes()[:500])
    assert main([*command, "--out", str(parts), "--resume"]) == 3
    assert f"--resume-from {parts / 'checkpoints' / 'step-00000002.pt'}" in capsys.readouterr().err


def test_flows_from_data_are_reflowed_from_these_data(tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    assert main([*TEACHER, "--source-data", "eight-gaussians", "--coupling", "fm", "--out", str(run)]) == 0
    command = ["reflow", "--run", str(run), "--out", str(out), *MORE]
    assert main(command) == 0
    assert main([*command[:4], str(tmp_path / "annealed"), *MORE, "--warmup-steps", "3"]) == 0
    pairs = flows.PairedDataset.load(out / "pairs")
    assert (out / "pairs" / "x0.npy").exists()
    source = build.load_run(run, None, CPU)[1].source
    points = torch.stack([source.dataset[i][0] for i in range(len(source.dataset))])
    assert {tuple(x) for x in pairs.x0.tolist()} <= {tuple(x) for x in points.tolist()}


def test_what_is_refused(teacher, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["reflow", "--run", str(teacher), "--out", out, *MORE]) == 0
    for arguments, code, says in (
        (["--out", str(teacher)], 2, "--out must be another folder than that of --run"),
        (["--run", str(tmp_path)], 2, "has no config.toml"),
        (["--out", out + "1", "--pairs", "0"], 2, "--pairs must be at least 1"),
        (["--resume", "--pairs", "90"], 2, "holds pairs of other settings; they differ in n: saved 100, here 90"),
        (["--resume", "--guidance", "2"], 2, "they differ in teacher"),
        (["--resume", "--warmup-steps", "3"], 3, "differ in annealing"),
        (["--resume", "--lr", "5e-5"], 2, "--lr: then 0.001, now 5e-05"),
        (["--out", out + "2", "--flip"], 2, "flip mirrors images"),
        (["--out", out + "3", "--pairs", "20"], 2, "20 pairs are fewer than a batch of 32: lower --batch-size"),
        (["--out", out + "4", "--solver-steps", "0"], 2, "steps must be at least 1"),
    ):
        assert main(["reflow", "--run", str(teacher), "--out", out, *MORE, *arguments]) == code, arguments
        assert says in capsys.readouterr().err


def test_of_several_processes_one_makes_the_pairs(teacher, tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--", "flows",
         "reflow", "--run", str(teacher), "--out", str(out), *MORE, "--warmup-steps", "2"],
        cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("written:") == 1
    assert len(flows.PairedDataset.load(out / "pairs")) == 100
    assert start(out)["settings"]["processes"] == 2
