"""Extension of the reference's build: doctests in docstrings become code blocks, instead of nested quotations."""

from __future__ import annotations

import re
from typing import Any

import griffe

DOCTEST = re.compile(r"^>>> .*?(?=^[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)


class Doctests(griffe.Extension):
    """Fences every run of lines from ``>>>`` to the next empty line."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of one class, function, module or attribute."""
        if obj.docstring:
            fenced = DOCTEST.sub(lambda run: f"```pycon\n{run[0].rstrip()}\n```\n", obj.docstring.value)
            obj.docstring.value = fenced
