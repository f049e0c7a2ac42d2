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
