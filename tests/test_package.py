"""The distribution: arrows between packages, cheap imports, names that the design fixes."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {"mbot": {"mbot"}, "flows": {"flows", "mbot"}, "setenc": {"setenc"}}


def imported_packages(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", ALLOWED)
def test_dependencies_between_packages_point_one_way(package):
    for path in (ROOT / package).rglob("*.py"):
        wrong = {name for name in imported_packages(path) if name in ALLOWED and name not in ALLOWED[package]}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


@pytest.mark.parametrize("package", ALLOWED)
def test_an_import_pulls_in_nothing_heavy(package):
    """Solvers, plotting and notebook libraries load when they are used."""
    heavy = ["ot", "scipy.optimize", "sklearn", "numba", "torchdiffeq", "geomloss", "matplotlib", "IPython", "pandas"]
    code = f"import torch, sys; before = set(sys.modules); import {package}; print(*(set(sys.modules) - before))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.split()
    assert [name for name in heavy if name in loaded] == []


@pytest.mark.parametrize("package", ALLOWED)
def test_typed_and_exported(package):
    assert (ROOT / package / "py.typed").exists()
    module = __import__(package)
    assert all(hasattr(module, name) for name in module.__all__)
    assert sorted(module.__all__) == list(module.__all__), "keep __all__ sorted"


def test_every_module_has_a_docstring():
    for package in ALLOWED:
        for path in (ROOT / package).rglob("*.py"):
            assert ast.get_docstring(ast.parse(path.read_text())), path


def prints(source):
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def test_nothing_prints_but_the_command_line():
    assert prints("x = 1\nprint(x)") == [2]
    found = {path.relative_to(ROOT) for package in ALLOWED for path in (ROOT / package).rglob("*.py")
             if prints(path.read_text())}  # fmt: skip
    found = {path for path in found if path.parent != Path("flows/commands")}
    assert found == {Path("flows/__main__.py")}
