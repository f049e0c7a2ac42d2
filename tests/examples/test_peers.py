"""Examples around other libraries, where these are installed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("script", ["with_torchcfm", "with_flow_matching"])
def test_training_loop_of(script):
    pytest.importorskip(script.removeprefix("with_"))
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{script}.py"), "--quick"],
        capture_output=True, text=True, check=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": ":".join([str(ROOT), *sys.path])},
    )  # fmt: skip
    first, last = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", done.stdout).groups())
    assert last < first


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("with_lightning", ["log-likelihood", "resumed to the same weights: True"]),
        ("with_accelerate", ["loss ", "resumed to the same losses: True"]),
        ("with_diffusers", ["diffusion_pytorch_model.safetensors", "loaded as it was: True", "guided samples (20, 1,"]),
    ],
)
def test_short_example_of(script, says, tmp_path):
    path = ROOT / "examples" / f"{script}.py"
    assert len(path.read_text().splitlines()) <= 60
    package = script.removeprefix("with_")
    pytest.importorskip(package, reason=f"{package} is not installed")
    done = subprocess.run(
        [sys.executable, str(path), "--quick"], capture_output=True, text=True, check=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ":".join([str(ROOT), *sys.path])},
    )  # fmt: skip
    assert [line for line in says if line not in done.stdout] == []
