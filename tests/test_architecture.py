"""The inner arrows of the packages: which module may know which, no circles, and no private name of another module."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("mbot", "flows", "setenc")

# geometry → problem → solvers → transport → losses, couplings → distributed. A part of mbot may import itself and parts
# of a lower line; a module that is in no part fails.
ORDER = (
    {"support": ("checks", "conditions", "convergence", "eager", "numerics", "random")},
    {"cost": ("cost", "joint"), "plan": ("plan",)},
    {"kernels": ("kernels",), "envelope": ("envelope",), "minibatch": ("minibatch",), "diagnostics": ("diagnostics",)},
    {"geometry": ("geometry",)},
    {"problem": ("problem", "certify")},
    {"solvers": ("solvers",)},
    {"transport": ("transport",)},
    {"losses": ("blocks", "grid", "losses", "low_memory"), "couplings": ("couplings",)},
    {"distributed": ("distributed",)},
    {"for others": ("compat", "testing")},
)
LINE = {part: line for line, parts in enumerate(ORDER) for part in parts}
PART = {module: part for parts in ORDER for part, modules in parts.items() for module in modules}
# Who may call compiled kernels. Numbers are checked before they get there.
KNOW_KERNELS = ("kernels", "geometry", "certify", "solvers")


@cache
def modules(package):
    """Modules by name, as syntax trees."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text())
    return found


def for_types(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(tree, known, *, when_loaded=False):
    """(module, name) of what is imported from ``known`` modules; name None for a module itself.

    Args:
        tree: syntax tree.
        known: names of modules.
        when_loaded: leave out what functions import when they run.
    """
    for node in ast.iter_child_nodes(tree):
        if for_types(node) or (when_loaded and isinstance(node, ast.FunctionDef)):
            continue
        if isinstance(node, ast.ImportFrom) and node.module in known:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole, None) if whole in known else (node.module, alias.name)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if alias.name in known)
        else:
            yield from imports(node, known, when_loaded=when_loaded)


def private(tree, known):
    """Names with a leading underscore that a module takes from another one."""
    names = {}
    for module, name in imports(tree, known):
        if name is not None and name.startswith("_") and not name.startswith("__"):
            yield f"{module}.{name}"
        if name is None:
            names[module.rpartition(".")[2]] = module
    for node in ast.walk(tree):
        of_module = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names
        if of_module and node.attr.startswith("_") and not node.attr.startswith("__"):
            yield f"{names[node.value.id]}.{node.attr}"


def part_of(module):
    return PART[module.split(".")[1]]


def test_the_checks_find_what_they_look_for():
    tree = ast.parse("from mbot.cost import _unit\nfrom mbot import checks\nchecks._scalar\nchecks.__doc__")
    assert sorted(private(tree, modules("mbot"))) == ["mbot.checks._scalar", "mbot.cost._unit"]
    tree = ast.parse("def f():\n    from mbot import checks\nif TYPE_CHECKING:\n    from mbot import cost")
    assert list(imports(tree, modules("mbot"))) == [("mbot.checks", None)]
    assert list(imports(tree, modules("mbot"), when_loaded=True)) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_private_name_is_imported_across_modules(package):
    known = {name for each in PACKAGES for name in modules(each)}
    found = {name: wrong for name, tree in modules(package).items() if (wrong := sorted(private(tree, known)))}
    assert not found, "give it a public name, or keep it where it is"


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_have_no_circle(package):
    known = modules(package)
    edges = {
        name: {module for module, _ in imports(tree, known, when_loaded=True) if module not in (package, name)}
        for name, tree in known.items()
        if name != package  # what it exports is on the way while its modules load
    }
    done = set()

    def visit(module, path):
        assert module not in path, " → ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in edges[module]:
                visit(other, [*path, module])
            done.add(module)

    for module in edges:
        visit(module, [])


def test_the_parts_of_mbot_know_only_what_is_below_them():
    known = modules("mbot")
    wrong = [
        f"{name} imports {module}"
        for name, tree in known.items()
        for module, _ in imports(tree, known)
        if "mbot" not in (name, module)
        and part_of(name) != part_of(module)
        and LINE[part_of(module)] >= LINE[part_of(name)]
    ]
    assert not wrong


def test_kernels_are_called_by_few():
    known = modules("mbot")
    who = {
        name.removeprefix("mbot.")
        for name, tree in known.items()
        if any(module.startswith("mbot.kernels") for module, _ in imports(tree, known))
    }
    assert not [name for name in who if not any(name == w or name.startswith(f"{w}.") for w in KNOW_KERNELS)]


CONCRETE = {"ExactOT": "exact", "EntropicOT": "entropic", "PartialOT": "partial", "UnbalancedOT": "unbalanced",
            "SlicedOT": "sliced"}  # fmt: skip


def test_no_module_but_its_own_asks_for_a_concrete_transport():
    asked = [
        f"{name}:{node.lineno}"
        for package in PACKAGES
        for name, tree in modules(package).items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"
        for leaf in ast.walk(node.args[1])
        if isinstance(leaf, ast.Name | ast.Attribute)
        and (concrete := CONCRETE.get(leaf.id if isinstance(leaf, ast.Name) else leaf.attr))
        and name != f"mbot.transport.{concrete}"
    ]
    assert not asked


def test_flows_uses_the_support_modules_that_contributing_names():
    known = modules("mbot")
    used = {module for tree in modules("flows").values() for module, _ in imports(tree, known)} - {"mbot"}
    public = {"mbot.compat", "mbot.distributed", "mbot.testing"}  # by their own pages
    text = (ROOT / "CONTRIBUTING.md").read_text()
    listed = text[text.index("Modules of `mbot` that `flows` uses") :].split("\n\n")[0]
    named = {f"mbot.{word.removesuffix('.draw')}" for word in re.findall(r"`([a-z.]+)`", listed)} & set(known)
    assert used - public == named
