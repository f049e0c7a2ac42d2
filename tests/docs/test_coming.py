"""The diffs of the page on other libraries: both sides run and give the same value."""

import re
from pathlib import Path

import pytest
import torch

PAGE = (Path(__file__).parents[2] / "docs" / "coming.md").read_text()
DIFFS = re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL)
# Relative differences allowed: torchcfm draws its pairs (2000 of them), geomloss stops early, setenc sums in chunks.
CASES = {"torchcfm": 0.05, "ot": 1e-9, "geomloss": 1e-4, "torch": 1e-5}


def side(diff, sign):
    """The code before (``-``) or after (``+``)."""
    return "\n".join(line[1:] for line in diff.splitlines() if not line or line[0] in (" ", sign))


def test_every_section_has_a_diff():
    assert len(DIFFS) == len(CASES) == PAGE.count("\n## ")
    assert all({line[:1] for line in diff.splitlines()} <= {"", " ", "-", "+"} for diff in DIFFS)


@pytest.mark.parametrize(("diff", "library"), list(zip(DIFFS, CASES, strict=False)), ids=list(CASES))
def test_both_sides_of_a_diff_give_one_value(diff, library):
    pytest.importorskip(library, reason=f"{library} is not installed")
    values = []
    for sign in "-+":
        found = {}
        exec(compile(side(diff, sign), f"docs/coming.md {sign}", "exec"), found)
        values.append(float(torch.as_tensor(found["value"]).detach()))
    assert values[0] == pytest.approx(values[1], rel=CASES[library])
    assert values[0] != 0


def test_new_code_runs_where_the_other_library_is_not_installed():
    for diff in DIFFS:
        found = {}
        exec(compile(side(diff, "+"), "docs/coming.md", "exec"), found)
        assert float(torch.as_tensor(found["value"]).detach()) > 0
