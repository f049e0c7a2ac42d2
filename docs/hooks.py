"""Hooks of the documentation's build: pages made from files that live elsewhere, links between them, and formulas.

The gallery, the notebooks, the result tables and the scripts are shown as they are in the repository, never copied. A
link in any page means what it means in the repository, and leads to the page that shows that file.
"""

from __future__ import annotations

import ast
import base64
import json
import posixpath
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^(`{3,}|~{3,}).*?^\1[ \t]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
MATH = re.compile(r"\$\$(.+?)\$\$|(?<![\w$\\])\$(?=\S)([^$\n]+?)(?<=\S)\$(?![\w$])|`[^`\n]+`", re.DOTALL)

MEASURED = "measured.md"  # made from the README
SHOWN = (
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "RELEASING.md",
    "examples/README.md",
    "examples/*.py",
    "examples/notebooks/*.ipynb",
    "examples/results/*.md",
    "benchmarks/*.py",
    "benchmarks/results/*.md",
    "benchmarks/results/*.png",
)


@cache
def sources() -> dict[str, str]:
    """Page of the site -> file of the repository, in the same folder, for all pages that are not in ``docs``."""
    files = [path.relative_to(ROOT) for pattern in SHOWN for path in sorted(ROOT.glob(pattern))]
    pages = [path if path.suffix == ".png" else path.with_suffix(".md") for path in files]
    return {MEASURED: "README.md"} | {p.as_posix(): f.as_posix() for p, f in zip(pages, files, strict=True)}


def on_config(config: Any) -> Any:
    """Fill the parts of the navigation that name a folder of the repository."""
    sources.cache_clear()
    config.nav = _filled(config.nav)
    return config


def _filled(nav: Any) -> Any:
    """The navigation with ``folder/`` replaced by the pages that show what is in it."""
    if isinstance(nav, list):
        return [_filled(part) for part in nav]
    if isinstance(nav, dict):
        return {title: _filled(part) for title, part in nav.items()}
    if nav.endswith("/"):
        return [page for page, file in sources().items() if file.startswith(nav) and page.endswith(".md")]
    return nav


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages and the pictures that they show."""
    for page, source in sources().items():
        path = ROOT / source
        if page == MEASURED:
            files.append(File.generated(config, page, content=_measured(path.read_text())))
        elif path.suffix == ".ipynb":
            for name, content in _notebook(page, json.loads(path.read_text())):
                files.append(File.generated(config, name, content=content))
        elif path.suffix == ".py":
            files.append(File.generated(config, page, content=_script(source, path.read_text())))
        else:
            files.append(File.generated(config, page, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links to the pages that show their files, and turn formulas into MathML, outside of code."""
    here = page.file.src_uri
    source = sources().get(here, f"docs/{here}")
    return _outside_code(markdown, lambda text: MATH.sub(_formula, _linked(text, source, here)))


def _outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """Apply ``change`` to the parts of a page that are not fenced code."""
    parts, at = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [change(markdown[at : fence.start()]), fence.group()]
        at = fence.end()
    return "".join([*parts, change(markdown[at:])])


def _linked(text: str, source: str, here: str) -> str:
    """Links of the file ``source``, shown as the page ``here``."""
    pages = {file: page for page, file in sources().items() if file != "README.md"}

    def replace(found: re.Match[str]) -> str:
        target, _, anchor = found[2].partition("#")
        if "://" in found[2] or not target:
            return found[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if file.startswith("docs/"):
            page = file.removeprefix("docs/")
        elif file in ("examples/results", "benchmarks/results"):
            page = MEASURED
        elif file in pages:
            page = pages[file]
        elif source.endswith(".ipynb") and target.endswith(".png"):
            return found[0]  # a picture among its outputs
        else:
            raise PluginError(f"{source}: no page shows {file}, which it links to")
        link = posixpath.relpath(page, posixpath.dirname(here) or ".")
        return f"{found[1]}{link}{'#' if anchor else ''}{anchor}{found[3]}"

    return LINK.sub(replace, text)


def _formula(found: re.Match[str]) -> str:
    """MathML, which browsers show without scripts or fonts from elsewhere; code in backticks stays."""
    block, inline = found.groups()
    if block is not None:
        return f'\n<div class="formula">{convert(" ".join(block.split()), display="block")}</div>\n'
    return found[0] if inline is None else convert(inline)


def _measured(readme: str) -> str:
    """The README's list of everything that is measured, with links to the scripts."""
    section = readme.split("## What is measured\n")[1].split("\n`make bench`")[0]
    section = re.sub(r"`((?:examples|benchmarks)/\w+\.py)`", r"[`\1`](\1)", section)
    return f"# What is measured\n{section}\n"


def _script(source: str, code: str) -> str:
    """A script as a page: what it says about itself is its title."""
    title = (ast.get_docstring(ast.parse(code)) or source).splitlines()[0].rstrip(".").split(": ")[0]
    return f"# {title}\n\n`{source}`\n\n````python\n{code}````\n"


def _notebook(page: str, notebook: dict[str, Any]) -> Iterator[tuple[str, str | bytes]]:
    """A notebook as a page, and its pictures."""
    parts: list[str] = []
    pictures = 0
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        printed = ""
        for output in cell.get("outputs", []):
            printed += "".join(output.get("text", ()))
            if picture := output.get("data", {}).get("image/png"):
                pictures += 1
                name = f"{Path(page).stem}_{pictures}.png"
                yield f"{posixpath.dirname(page)}/{name}", base64.b64decode(picture)
                parts.append(f"![Figure {pictures} of this notebook]({name})")
        if printed:
            parts.append(f"```text\n{printed.rstrip()}\n```")
    yield page, "\n\n".join(parts) + "\n"
