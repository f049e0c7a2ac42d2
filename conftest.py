"""Shared by the tests and the doctests."""

import importlib.util
import os

import pytest
import torch

import flows
import mbot
import setenc

# pytest imports every module for its doctests; numba kernels compile once and are cached on disk.
collect_ignore = ["examples", "benchmarks", "docs"]
# Modules that cannot be imported without Triton, and have no doctests.
collect_ignore += ["mbot/kernels/triton_matching.py", "mbot/kernels/triton_streaming.py", "tests/mbot/interpreted.py"]
# Adapters of packages that may not be there.
if importlib.util.find_spec("torch_geometric") is None:
    collect_ignore += ["setenc/pyg.py"]


@pytest.fixture(autouse=True)
def doctest_names(doctest_namespace):
    """Names that every docstring example may use."""
    doctest_namespace.update(torch=torch, mbot=mbot, flows=flows, setenc=setenc)


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same default generator."""
    torch.manual_seed(0)


def pytest_generate_tests(metafunc):
    """``device``: each device that is there."""
    if "device" in metafunc.fixturenames:
        cuda = [pytest.param(torch.device("cuda"), marks=pytest.mark.gpu, id="cuda")]
        there = cuda if torch.cuda.is_available() else []
        metafunc.parametrize("device", [pytest.param(torch.device("cpu"), id="cpu"), *there])


def pytest_collection_modifyitems(config, items):
    """Without a card, one test that needs it is left in each file, and is skipped with the number of all."""
    needy = {}
    for item in items if not torch.cuda.is_available() else []:
        if item.get_closest_marker("gpu"):
            needy.setdefault(item.path, []).append(item)
    for first, *others in needy.values():
        first.add_marker(pytest.mark.skip(reason=f"no CUDA device, for this test and {len(others)} others here"))
        config.hook.pytest_deselected(items=others)
    gone = {item for _, *others in needy.values() for item in others}
    items[:] = [item for item in items if item not in gone]


@pytest.fixture(scope="session")
def data_root():
    """Folder of real data sets, from the environment; tests that want it skip without it."""
    root = os.environ.get("MBT_DATA_ROOT")
    if not root or not os.path.isdir(root):
        pytest.skip("no real data: set MBT_DATA_ROOT to a folder that holds it")
    return root
