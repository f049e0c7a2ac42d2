"""`make bench-gpu`: the driver runs without a card at tiny sizes, outlives its sections, says when there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def modules(monkeypatch):
    """The scripts' folder, as it is on the path when a script runs."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu
    import run

    return gpu, run


def test_every_section_ends_up_in_the_tables(modules, tmp_path):
    gpu, _ = modules
    assert gpu.main(["--device", "cpu", "--quick", "--seconds", "100000", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu-cpu.json").read_text())
    for name in gpu.SECTIONS:
        assert found["sections"][name]["status"] == "done", found["sections"][name]
        assert "failed" not in json.dumps(found["sections"][name]["tables"])
    tables = found["sections"]["precision"]["tables"]
    assert {row["precision"] for row in tables["Transports"]} == {"float64", "float32", "bfloat16"}
    assert all(row["value, own"] < 1e-6 for row in tables["Transports"])
    text = (tmp_path / "gpu-cpu.md").read_text()
    assert "| EntropicOT, reg 0.05 | float32 |" in text
    assert not list(tmp_path.glob(".section*"))


def test_a_section_that_overruns_or_fails_is_reported(modules, tmp_path):
    gpu, _ = modules
    late = gpu.guarded("precision", "precision", "cpu", True, 0, tmp_path)
    assert late["status"] == "stopped after its 0 s"
    assert (
        gpu.guarded("new", "not_there_yet", "cpu", True, 1, tmp_path)["status"]
        == "not there: benchmarks/not_there_yet.py"
    )
    wrong = gpu.guarded("precision", "precision", "nowhere", True, 100_000, tmp_path)
    assert wrong["status"] == "failed (exit code 2)"
    assert "invalid choice" in wrong["error"]
    assert "## precision: failed" in gpu.markdown(gpu.facts("cpu"), {"precision": wrong})


def test_a_section_that_overruns_keeps_the_tables_it_has(modules, tmp_path, monkeypatch):
    """The section never ends, and the clock says that its time is over once it has saved a table."""
    gpu, _ = modules
    slow = tmp_path / "slow_section.py"
    slow.write_text(
        "import sys\n\ndef rows(save):\n    save({'first': [{'a': 1}]})\n    print('saved', flush=True)\n"
        "    sys.stdin.read()\n"
    )

    def run(command, timeout, env, **given):
        with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "saved\n"
            process.kill()
        raise subprocess.TimeoutExpired(command, timeout, stderr=b"late")

    monkeypatch.setattr(gpu, "HERE", tmp_path)
    monkeypatch.setattr(gpu, "environment", lambda: {**os.environ, "PYTHONPATH": str(tmp_path)})
    monkeypatch.setattr(gpu.subprocess, "run", run)
    driver = (BENCHMARKS / "gpu.py").read_text().replace('("precision", 0.2)', '("slow_section", 0.2)')
    (tmp_path / "gpu.py").write_text(driver)
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "gpu.py"))
    late = gpu.guarded("precision", "slow_section", "cpu", True, 12, tmp_path)
    assert late["status"] == "stopped after its 12 s"
    assert late["tables"] == {"first": [{"a": 1}]}
    assert late["error"] == "late"


def test_without_a_card_it_says_so(modules, monkeypatch, capsys):
    gpu, _ = modules
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_make_bench_leaves_out_what_needs_a_card(modules):
    names = modules[1].scripts()
    assert "mbot_losses" in names
    assert not [name for name in names if "gpu" in name]
    assert "run" not in names
    assert sys.path[0] == str(BENCHMARKS)
