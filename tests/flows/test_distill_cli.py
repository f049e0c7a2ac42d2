"""Distillation on the command line: from a run and its pairs to a run that samples in one step."""

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

CPU = torch.device("cpu")
COMMON = ["--evaluate", "0", "--no-progress", "--device", "cpu"]
TEACHER = ["train", "--data", "moons", "--mlp-width", "16", "--mlp-depth", "1", "--batch-size", "32",
           "--ot-batch-size", "64", "--steps", "4", *COMMON]  # fmt: skip
PAIRS = ["--pairs", "100", "--method", "euler", "--solver-steps", "2", *COMMON]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A teacher and its reflow."""
    folder = tmp_path_factory.mktemp("runs")
    assert main([*TEACHER, "--out", str(folder / "teacher")]) == 0
    assert main(["reflow", "--run", str(folder / "teacher"), "--out", str(folder / "two"), *PAIRS]) == 0
    return folder


def command(runs, out, run="two"):
    return ["distill", "--run", str(runs / run), "--pairs", str(runs / "two" / "pairs"), "--out", str(out), *COMMON]


def last(run):
    return checkpoint.load(checkpoint.latest(run / "checkpoints"))


@pytest.mark.parametrize("run", ["teacher", "two"])
def test_a_student_samples_in_one_step(run, runs, tmp_path, capsys):
    """The teacher made the pairs, or was trained on them."""
    out = tmp_path / "one"
    assert main([*command(runs, out, run), "--evaluate", "40"]) == 0
    said = capsys.readouterr().out
    assert "| 1 step | 1 |" in said
    assert "Euler" not in said
    assert list(json.loads((out / "evaluation.json").read_text())["rows"]) == ["1 step", "data"]
    assert last(out)["settings"]["objective"] == "Distillation"
    assert main(["sample", "--run", str(out), "--num", "6", "--device", "cpu"]) == 0
    assert "6 samples at 1 NFE" in capsys.readouterr().out
    assert main(["evaluate", "--run", str(out), "--num", "20", "--device", "cpu"]) == 0
    assert "Euler" not in capsys.readouterr().out
    for refused, says in (
        (["sample", "--run", str(out), "--steps", "4"], "sampled in one Euler step"),
        (["sample", "--run", str(out), "--method", "dopri5"], "sampled in one Euler step"),
        (["reflow", "--run", str(out), "--out", str(tmp_path / "x"), *PAIRS], "without a flow"),
        ([*command(runs, tmp_path / "x"), "--run", str(out)], "must be a run of flow-matching"),
    ):
        assert main([*refused, "--device", "cpu"]) == 2
        assert says in capsys.readouterr().err


def test_what_is_stopped_goes_on_to_the_same_weights(runs, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*command(runs, whole), "--checkpoint-every", "2"]) == 0
    assert main([*command(runs, parts), "--checkpoint-every", "2"]) == 0
    (parts / "checkpoints" / "step-00000004.pt").unlink()
    assert main([*command(runs, parts), "--checkpoint-every", "2", "--resume"]) == 0
    a, b = last(whole)["model"], last(parts)["model"]
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert main([*command(runs, parts), "--resume", "--guided", "2"]) == 3


@pytest.mark.parametrize(
    ("more", "width", "settings"),
    [
        ([], 16, {"regression": "1.0", "guided": "1.0"}),
        (["--mlp-width", "8", "--guided", "0"], 8, {"guided": "0.0"}),
        (["--from-scratch", "--regression", "0"], 16, {"regression": "0.0"}),
    ],
)
def test_students_and_terms(more, width, settings, runs, tmp_path):
    out = tmp_path / "one"
    assert main([*command(runs, out), *more, "--lr", "1e-30"]) == 0
    _, _, student = build.load_run(out, None, CPU)
    _, _, teacher = build.load_run(runs / "two", None, CPU)
    assert student.inputs.out_features == width
    kept = not more
    assert (width == 16 and torch.equal(student.inputs.weight, teacher.inputs.weight)) == kept
    assert settings.items() <= last(out)["settings"].items()
    again = tmp_path / "again"
    assert main([*command(runs, again), "--student", str(runs / "teacher"), "--lr", "1e-30"]) == 0
    begun = build.load_run(again, None, CPU)[2]
    assert torch.equal(begun.inputs.weight, build.load_run(runs / "teacher", None, CPU)[2].inputs.weight)


@pytest.mark.parametrize("guided", ["0", "1"])
def test_several_processes_train_one_student(guided, runs, tmp_path):
    """Without noise of their own, as one process with all of the batch does."""
    out, alone = tmp_path / "two", tmp_path / "alone"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--", "flows",
         *command(runs, out), "--batch-size", "16", "--guided", guided],
        cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("written:") == 1
    assert last(out)["settings"]["processes"] == 2
    assert main([*command(runs, alone), "--batch-size", "32", "--guided", guided]) == 0
    a, b = last(out)["model"], last(alone)["model"]
    near = [torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-6) for name in a]
    assert all(near) == (guided == "0")


def test_what_is_refused(runs, tmp_path, capsys):
    out = tmp_path / "out"
    other = [*TEACHER, "--seed", "5", "--out", str(tmp_path / "other")]
    three = tmp_path / "three"
    plain = [*TEACHER, "--no-conditional", "--out", str(tmp_path / "plain")]
    assert main(other) == main(plain) == 0
    flows.generate_pairs(lambda t, x, y: x, 40, shape=(3,), y=1, out=three)
    for more, code, says in (
        (["--run", str(tmp_path / "other")], 2, "were made by another model (ResidualMLP"),
        (["--guidance", "2"], 2, "were made by another model (ResidualMLP"),
        (["--run", str(tmp_path / "plain")], 2, "takes no conditions; the pairs have some"),
        (["--pairs", str(three)], 2, "have samples of shape (3,)"),
        (["--pairs", str(tmp_path)], 2, "holds no pairs"),
        (["--batch-size", "101"], 2, "100 pairs are fewer than a batch of 101: lower --batch-size"),
        (["--student", str(tmp_path / "plain")], 2, "takes other conditions than the model of"),
        (["--regression", "0", "--guided", "0"], 2, "must not both be 0"),
        (["--regression", "-1"], 2, "regression must"),
    ):
        assert main([*command(runs, out), *more]) == code, more
        assert says in capsys.readouterr().err
    assert main(["train", "--objective", "distillation", "--out", str(out)]) == 2
    assert "python -m flows distill" in capsys.readouterr().err
    config = runs / "two" / "config.toml"
    kept = config.read_text()
    config.write_text(kept.replace("mlp_width = 16", "mlp_width = 12"))
    assert main(command(runs, out)) == 3
    assert "holds another model than" in capsys.readouterr().err
    config.write_text(kept)
