"""The example scripts run as a user runs them, at a tiny budget."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script, *arguments):
    """From another folder than the script's, as a user may."""
    out = arguments[arguments.index("--out") + 1]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    return subprocess.run(
        [sys.executable, *map(str, (script, *arguments))],
        capture_output=True, text=True, check=True, cwd=out, env=environment,
    )  # fmt: skip


def test_every_script_takes_quick_and_is_run_with_it():
    """The folder itself says which there are; each is named in a test file here that runs scripts with ``--quick``."""
    tests = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    tried = " ".join(text for text in tests if "--quick" in text)
    scripts = {path.stem: path.read_text() for path in EXAMPLES.glob("*.py")}
    assert len(scripts) > 25
    for name in set(scripts) - {"common", "abc"}:  # what they share; the other name of approximate_bayes
        assert "--quick" in scripts[name] or re.search(r"\barguments\(|\bquick_flag\(", scripts[name]), name
        assert re.search(rf"\b{name}\b", tried), f"no test runs examples/{name}.py --quick"


def test_demo(tmp_path):
    done = run(EXAMPLES / "demo.py", "--quick", "--out", tmp_path)
    assert "| class | c2ot |" in done.stdout
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    figures = json.loads((tmp_path / "demo.json").read_text())
    assert figures["seed"] == 0
    assert [r["coupling"] for r in figures["runs"]] == ["fm", "ot", "c2ot", "wcfm"]
    assert all(r["euler1"] > 0 and r["adaptive"] > 0 and r["nfe"] > 6 for r in figures["runs"])


def test_latents(tmp_path):
    """Short enough to be copied."""
    path = EXAMPLES / "latents.py"
    assert len(path.read_text().splitlines()) <= 60
    done = run(path, "--quick", "--out", tmp_path)
    left, right = re.search(r"leaves ([\d.]+)% .*class of ([\d.]+)% of", done.stdout, re.DOTALL).groups()
    assert float(left) < 50
    assert float(right) > 40
    assert (tmp_path / "latents.png").stat().st_size > 1000


def test_c2ot_moons_keeps_finished_runs(tmp_path):
    script = (EXAMPLES / "c2ot_moons.py", "--quick", "--out", tmp_path)
    run(*script, "--conditions", "x", "--couplings", "c2ot")
    first = json.loads((tmp_path / "c2ot_moons.json").read_text())["runs"]
    assert len(first) == 1
    run(*script, "--conditions", "x", "none", "--couplings", "c2ot", "fm", "--seeds", 0)
    second = json.loads((tmp_path / "c2ot_moons.json").read_text())["runs"]
    assert second[0] == first[0]
    assert {(r["condition"], r["coupling"]) for r in second} == {("x", "c2ot"), ("x", "fm"), ("none", "fm")}
    assert "| x | fm | 1 |" in (tmp_path / "c2ot_moons.md").read_text()


def test_couplings_on_digits_keeps_finished_runs(tmp_path):
    script = (EXAMPLES / "couplings_on_digits.py", "--quick", "--out", tmp_path, "--couplings")
    run(*script, "fm", "--seeds", 0)
    first = json.loads((tmp_path / "couplings_on_digits.json").read_text())["runs"]
    done = run(*script, "fm", "wcfm", "--seeds", 0)
    assert json.loads((tmp_path / "couplings_on_digits.json").read_text())["runs"][0] == first[0]
    assert "| W-CFM |" in done.stdout
    assert "| OT |" not in done.stdout
    assert "MLP of 3 blocks and 128 features on 8 principal components, 4 steps" in done.stdout


def test_couplings_on_digits_train_for_as_long_each(tmp_path):
    done = run(EXAMPLES / "couplings_on_digits.py", "--quick", "--seconds", 0, "--out", tmp_path, "--couplings", "c2ot")
    (found,) = json.loads((tmp_path / "couplings_on_digits.json").read_text())["runs"]
    assert found["steps"] == 21  # the clock starts at the tenth step and is looked at every ten
    assert "0 seconds each, 21 to 21 steps" in done.stdout


def test_single_cell_leaves_each_inner_time_out(tmp_path):
    rng = np.random.default_rng(0)
    t = np.repeat(np.arange(4), 30)
    np.savez(tmp_path / "cells.npz", x=rng.normal(size=(120, 3)) + t[:, None], t=t)
    done = run(EXAMPLES / "single_cell.py", "--data", tmp_path / "cells.npz", "--quick", "--out", tmp_path)
    assert "| method | t = 1 | t = 2 | mean |" in done.stdout
    errors = json.loads((tmp_path / "single_cell_cells.json").read_text())["errors"]
    assert set(errors) == {"unmoved", "middle of OT pairs", "I-CFM", "OT-CFM", "SB-CFM"}
    assert errors["middle of OT pairs"]["1"][0] < errors["unmoved"]["1"][0]


def test_single_cell_makes_a_series_where_none_is_given(tmp_path):
    done = run(EXAMPLES / "single_cell.py", "--quick", "--out", tmp_path)
    assert "a series made here" in done.stdout
    assert "Quick setting" in done.stdout
    errors = json.loads((tmp_path / "single_cell_made.json").read_text())["errors"]
    assert all(errors["middle of OT pairs"][str(t)][0] < errors["unmoved"][str(t)][0] for t in (1, 2, 3))


def test_whole_data(tmp_path):
    script = (EXAMPLES / "whole_data.py", "--quick", "--out", tmp_path, "--samples", 50, "--components", 8)
    done = run(*script, "--methods", "FM", "whole, moving, by class")
    assert "| coupling | Euler-1 | Euler-2 | Euler-4 | adaptive |" in done.stdout
    runs = json.loads((tmp_path / "whole_data.json").read_text())["runs"]
    assert [r["method"] for r in runs] == ["FM", "whole, moving, by class"]
    assert runs[1]["cost"] < runs[0]["cost"]


def test_few_steps(tmp_path):
    """Every way to one step, at a tiny budget."""
    done = run(EXAMPLES / "few_steps.py", "--quick", "--kept", tmp_path / "kept.pt", "--out", tmp_path)
    assert "| ratio | expected | found | met |" in done.stdout
    assert (tmp_path / "few_steps_moons.png").stat().st_size > 10_000
    (rows,) = json.loads((tmp_path / "few_steps_moons.json").read_text())["runs"]
    assert len(rows) == 19
    one_step = [name for name, row in rows.items() if row["nfe"] == 1]
    assert len(one_step) == 12
    assert rows["FM reflowed twice, one step"]["seconds"] > rows["FM reflowed once, one step"]["seconds"]
    assert rows["other data"]["W2²"] < min(row["W2²"] for name, row in rows.items() if name != "other data")
    kept = torch.load(tmp_path / "kept.pt", weights_only=True)
    assert [k.split(": row ")[1] for k in kept if ": row " in k] == ["data", *list(rows)[1:]]
