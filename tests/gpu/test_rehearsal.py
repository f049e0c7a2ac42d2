"""The tests of the CUDA paths, on a device that is only pretended (`tests/pretended_cuda.py`): no card is needed.

They find operations that mix devices, hidden waits, and tests that no card could pass. The whole rehearsal, minutes:
``TRITON_INTERPRET=1 python -m pytest -p tests.pretended_cuda -m gpu``.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a card is here: the tests themselves run")


def rehearse(*arguments, interpret):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.pretended_cuda", "-m", "gpu", *arguments],
        cwd=ROOT,
        env={
            **os.environ,
            "TRITON_INTERPRET": str(int(interpret)),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels():
    rehearse("tests/gpu", "-k", "not (entropic_values_of_points and (dtype1 or dtype2 or 200))", interpret=True)


def test_everything_else():
    # These are minutes of the whole rehearsal, on operations that the others have too.
    slow = "two_passes_give_the_gradients or half_precision or JointPooling or DSMIL"
    long = "keeps_the_contract and (1e-11 or BoMb or DataCoupling)"
    chosen = f"not ({slow} or ({long}))"
    rehearse("tests/setenc", "tests/mbot", "tests/contracts", "tests/flows", "-k", chosen, interpret=False)
