"""`make bench-gpu`: the driver runs without a card at tiny sizes, outlives its sections, says when there is none."""

import json
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


def test_a_section_ends_up_in_the_tables_and_a_missing_one_is_reported(modules, tmp_path, monkeypatch, capsys):
    gpu, _ = modules
    monkeypatch.setitem(gpu.SECTIONS, "setenc", ("not_written_yet", 0.3))
    assert gpu.main(["--device", "cpu", "--quick", "--only", "setenc", "precision", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu-cpu.json").read_text())
    assert found["sections"]["precision"]["status"] == "done", found["sections"]["precision"]
    assert found["sections"]["setenc"]["status"] == "not there: benchmarks/not_written_yet.py"
    tables = found["sections"]["precision"]["tables"]
    assert {row["precision"] for row in tables["Transports"]} == {"float64", "float32", "bfloat16"}
    assert all(row["value, own"] < 1e-6 for row in tables["Transports"])
    text = (tmp_path / "gpu-cpu.md").read_text()
    assert "| EntropicOT, reg 0.05 | float32 |" in text
    assert not list(tmp_path.glob(".section*"))


def test_a_section_that_overruns_or_fails_is_reported(modules, tmp_path):
    gpu, _ = modules
    late = gpu.guarded("precision", "precision", "cpu", True, 0.1, tmp_path)
    assert late["status"].startswith("stopped after")
    wrong = gpu.guarded("precision", "precision", "nowhere", True, 60, tmp_path)
    assert wrong["status"] == "failed (exit code 2)"
    assert "invalid choice" in wrong["error"]
    assert "## precision: failed" in gpu.markdown(gpu.facts("cpu"), {"precision": wrong})


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
