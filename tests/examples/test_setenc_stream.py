"""The stream figure's script, at a tiny budget."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_stream_ends_in_the_same_prediction(tmp_path):
    script = [sys.executable, "examples/setenc_stream.py", "--quick", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(script, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    apart = done.stdout.split("last predictions: ")[1].split()[0]
    assert float(apart) < 1e-4
    assert (tmp_path / "setenc_stream.png").stat().st_size > 10_000
