"""What is released: one version, the lower bounds, the announced end of names, and what lies in wheel and sdist."""

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import warnings
import zipfile
from pathlib import Path

import pytest

import flows
import mbot
import minibatch_transport
import setenc

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION = minibatch_transport.__version__
PACKAGES = ("mbot", "flows", "setenc")


def numbers(version):
    return tuple(int(part) for part in re.findall(r"\d+", version))


def test_the_version_is_written_once():
    assert {mbot.__version__, flows.__version__, setenc.__version__} == {VERSION}
    assert re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M)[1] == VERSION
    assert re.search(r"^## (\d\S*?):? ", (ROOT / "CHANGELOG.md").read_text() + " ", re.M)[1] == VERSION
    assert f"version = {{{VERSION}}}" in (ROOT / "README.md").read_text()
    written = [p for p in ROOT.glob("*/__init__.py") if re.search(r"^__version__ *=", p.read_text(), re.M)]
    assert written == []


def test_the_lower_bounds_agree():
    bounds = {name.lower(): bound for name, bound in (line.split(">=") for line in PROJECT["dependencies"])}
    lowest = dict(
        line.lower().split("==") for line in (ROOT / "constraints-lowest.txt").read_text().splitlines() if "==" in line
    )
    recipe = dict(re.findall(r"^    - ([\w-]+) >=(\S+)$", (ROOT / "conda/meta.yaml").read_text(), re.M))
    recipe["torch"] = recipe.pop("pytorch")
    assert set(lowest) == set(bounds) - {"torch"}
    assert set(bounds) <= set(recipe)
    for name, bound in bounds.items():
        assert recipe[name] == bound
        if name in lowest:
            assert numbers(lowest[name])[: len(numbers(bound))] == numbers(bound), name
    assert recipe["python"] == PROJECT["requires-python"].removeprefix(">=")


def retired():
    """File, line and version of every announced removal."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if (
                    isinstance(node, ast.Call)
                    and getattr(node.func, "attr", getattr(node.func, "id", "")) == "warn_deprecated"
                ):
                    removal = next(k.value for k in node.keywords if k.arg == "removal")
                    yield f"{path.name}:{node.lineno}", ast.literal_eval(removal)


def test_what_was_announced_is_removed_in_its_version():
    overdue = [where for where, removal in retired() if numbers(removal) <= numbers(VERSION)]
    assert overdue == []


def test_a_deprecated_name_is_told_at_the_users_line():
    inside = {"__name__": "mbot.somewhere", "warn_deprecated": minibatch_transport.warn_deprecated}
    exec("def old():\n    warn_deprecated('old()', 'new()', removal='9.0.0')", inside)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for _ in range(2):
            inside["old"]()  # once a line
        inside["old"]()
    assert [(w.category, Path(w.filename).name) for w in told] == [(FutureWarning, "test_distribution.py")] * 2
    assert str(told[0].message) == "old() is deprecated and goes in version 9.0.0: use new()"
    assert told[1].lineno == told[0].lineno + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(FutureWarning):
            inside["old"]()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Wheel and sdist, of a copy of the tree that also holds what a clone collects."""
    setuptools = pytest.importorskip("setuptools", reason="builds need setuptools (extra test)")
    if numbers(setuptools.__version__) < (77,):
        pytest.skip(f"builds need setuptools 77; here is {setuptools.__version__}")
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("out")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tree)
    for name in (*PACKAGES, "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.nb?"))
    for stray in ("runs/x.npz", "docs/images/x.png", "examples/x.py", "benchmarks/x.json", ".venv/lib/x.py",
                  "flows/__pycache__/x.pyc", "mbot/kernels/__pycache__/x.nbi", "build/x.txt"):  # fmt: skip
        (tree / stray).parent.mkdir(parents=True, exist_ok=True)
        (tree / stray).write_text("x")
    code = "import sys; from setuptools import build_meta as b; o = sys.argv[1]; b.build_sdist(o); b.build_wheel(o)"
    done = subprocess.run([sys.executable, "-c", code, out], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    return wheel, zipfile.ZipFile(wheel).namelist(), sdist, inside


def test_the_wheel_holds_the_packages_and_nothing_else(built):
    wheel, names, _, _ = built
    assert wheel.name == f"minibatch_transport-{VERSION}-py3-none-any.whl"
    tops = {name.split("/")[0] for name in names}
    assert tops == {*PACKAGES, "minibatch_transport.py", f"minibatch_transport-{VERSION}.dist-info"}
    wanted = {path.relative_to(ROOT).as_posix() for p in PACKAGES for path in (ROOT / p).rglob("*.py")}
    wanted |= {f"{package}/py.typed" for package in PACKAGES}
    assert {name for name in names if name.split("/")[0] in PACKAGES} == wanted
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_is_small_and_holds_what_a_build_needs(built):
    _, names, sdist, inside = built
    assert sdist.stat().st_size < 1 << 20
    meant = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "constraints.txt", "pyproject.toml"}
    assert meant <= inside
    assert set(names) - {n for n in names if "dist-info" in n} <= inside
    made = {"PKG-INFO", "setup.cfg", "MANIFEST.in", "minibatch_transport.egg-info"}
    strange = {name.split("/")[0] for name in inside} - {"", *PACKAGES, "minibatch_transport.py", *made, *meant}
    assert strange == set()
