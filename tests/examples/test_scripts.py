"""The example scripts run as a user runs them, at a tiny budget."""

import json
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(*arguments):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=True, cwd=EXAMPLES.parent
    )


def test_demo(tmp_path):
    done = run(EXAMPLES / "demo.py", "--steps", 8, "--evaluate", 300, "--out", tmp_path)
    assert "| class | c2ot |" in done.stdout
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    figures = json.loads((tmp_path / "demo.json").read_text())
    assert figures["seed"] == 0
    assert [r["coupling"] for r in figures["runs"]] == ["fm", "ot", "c2ot", "wcfm"]
    assert all(r["euler1"] > 0 and r["adaptive"] > 0 and r["nfe"] > 6 for r in figures["runs"])


def test_c2ot_moons_keeps_finished_runs(tmp_path):
    script = (EXAMPLES / "c2ot_moons.py", "--steps", 8, "--evaluate", 300, "--out", tmp_path)
    run(*script, "--conditions", "x", "--couplings", "c2ot")
    first = json.loads((tmp_path / "c2ot_moons.json").read_text())["runs"]
    assert len(first) == 1
    run(*script, "--conditions", "x", "none", "--couplings", "c2ot", "fm", "--seeds", 0)
    second = json.loads((tmp_path / "c2ot_moons.json").read_text())["runs"]
    assert second[0] == first[0]
    assert {(r["condition"], r["coupling"]) for r in second} == {("x", "c2ot"), ("x", "fm"), ("none", "fm")}
    assert "| x | fm | 1 |" in (tmp_path / "c2ot_moons.md").read_text()
