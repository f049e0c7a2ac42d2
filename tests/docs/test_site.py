"""The documentation: it builds without warnings, names everything public, and its links and code hold."""

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTED = (
    "mbot",
    "mbot.compat",
    "mbot.distributed",
    "flows",
    "flows.metrics",
    "flows.models",
    "flows.datasets",
    "setenc",
    "setenc.tasks",
)
PAGES = [
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", "benchmarks/**/*.md")
    for path in sorted(ROOT.glob(pattern))
]
FENCE = re.compile(r"^(`{3,}).*?^\1[ \t]*$", re.MULTILINE | re.DOTALL)


def public(module):
    """Public names of a module: its ``__all__``, or what it defines itself."""
    own = [n for n, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__]
    names = getattr(module, "__all__", [n for n in own if not n.startswith("_")])
    return [
        n
        for n in names
        if not inspect.ismodule(getattr(module, n)) and isinstance(getattr(module, n), type | type(public))
    ]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site."""
    for package in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(package)
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", out],
        capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    return out


def test_reference_names_everything_public(site):
    pages = [site / "scale.html", *(site / "reference").glob("*.html")]
    anchors = "\n".join(re.findall(r' id="([\w.]+)"', "".join(page.read_text() for page in pages)))
    for name in DOCUMENTED:
        for member in public(importlib.import_module(name)):
            assert re.search(rf"^{name.split('.')[0]}(\.\w+)*\.{member}$", anchors, re.MULTILINE), f"{name}.{member}"


def test_gallery_tables_and_notebooks_are_pages(site):
    for folder in ("examples", "benchmarks"):
        for table in (ROOT / folder / "results").glob("*.md"):
            assert "<table>" in (site / folder / "results" / f"{table.stem}.html").read_text(), table
    for notebook in (ROOT / "examples" / "notebooks").glob("*.ipynb"):
        page = (site / "examples" / "notebooks" / f"{notebook.stem}.html").read_text()
        assert "<img" in page
        assert "$$" not in page, "a formula that was not turned into MathML"
    assert "<math" in (site / "examples" / "notebooks" / "c2ot.html").read_text()


def test_site_needs_no_other_server_and_no_link_in_it_is_dead(site):
    for page in site.rglob("*.html"):
        text = page.read_text()
        for tag in re.findall(r"<(?:script|img)[^>]*?src=[^>]+>|<link[^>]*?stylesheet[^>]*>", text):
            assert "://" not in tag, f"{page.name} loads {tag}"
        for link in re.findall(r'(?:href|src)="?([^"\s>]+)', text):
            parts = urlsplit(link)
            if parts.scheme or link.startswith(("//", "/")) or not parts.path:
                continue
            assert (page.parent / unquote(parts.path)).exists(), f"{page.relative_to(site)}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_relative_links_in_the_repository_lead_to_files(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if "://" not in target and not target.startswith("#"):
            assert (page.parent / target.split("#")[0]).exists(), target


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_code_fits_a_page(page):
    """80 columns are what the site shows beside its two menus; longer lines are wrapped in the middle of a word."""
    blocks = re.findall(r"^```\w+\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    long = [line for block in blocks for line in block.splitlines() if len(line) > 80]
    assert not long


def test_gallery_lists_every_script_and_the_readme_every_result():
    gallery, readme = (ROOT / "examples" / "README.md").read_text(), (ROOT / "README.md").read_text()
    for path in (ROOT / "examples").glob("*.py"):
        assert f"]({path.name})" in gallery or path.stem in ("common", "abc"), path.name
    for path in (ROOT / "examples" / "notebooks").glob("*.ipynb"):
        assert f"](notebooks/{path.name})" in gallery, path.name
    for path in (*ROOT.glob("examples/results/*.md"), *ROOT.glob("benchmarks/results/*.md")):
        assert f"]({path.relative_to(ROOT).as_posix()})" in readme, path.name


@pytest.mark.parametrize("page", ["training", "howto"])
def test_code_that_is_shown_without_running_uses_names_and_arguments_that_exist(page):
    """Doctests run as they are; what needs a data set or several processes is checked by name and signature."""
    blocks = [
        b for b in re.findall(r"```python\n(.*?)```", (ROOT / f"docs/{page}.md").read_text(), re.S) if ">>>" not in b
    ]
    calls = [node for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
    checked = 0
    for call in calls:
        name = ast.unparse(call.func)
        if name.split(".")[0] not in ("mbot", "flows", "setenc"):
            continue
        target = importlib.import_module(name.split(".")[0])
        for part in name.split(".")[1:]:
            target = getattr(target, part)
        inspect.signature(target).bind(*call.args, **{k.arg: k.value for k in call.keywords})
        checked += 1
    assert checked >= 1


def test_the_examples_of_contributing_run(tmp_path):
    """Parts that people write themselves, and the checks of them."""
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert sum("import check_" in example for example in examples) == len(examples) >= 3
    (tmp_path / "examples.py").write_text("\n".join(examples))
    subprocess.run([sys.executable, tmp_path / "examples.py"], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
