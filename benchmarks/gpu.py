"""Everything that is measured on a CUDA card, in under nine minutes: `make bench-gpu`.

Each section is a function ``rows`` of a module beside this one and runs in a process of its own with a time budget: a
section that fails or overruns is reported, and the others go on. Results: ``results/gpu-CARD.json`` and ``.md``.

    python benchmarks/gpu.py                        all sections, on the card
    python benchmarks/gpu.py --only precision       some of them
    python benchmarks/gpu.py --device cpu --quick   the driver itself, at tiny sizes
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TOTAL = 520.0  # seconds for all sections together
# Section: module, and its share of the time. A section may use what those before it left over.
SECTIONS = {
    "mbot": ("gpu_mbot", 0.5),
    "setenc": ("setenc_gpu", 0.3),
    "precision": ("precision", 0.2),
}
NOTES = """
One card, one process a section. How a figure is taken is said in the module that takes it (`benchmarks/gpu_mbot.py`,
`benchmarks/setenc_gpu.py`, `benchmarks/precision.py`). CPU results are the reference of every parity test
(`pytest -m gpu`); those of the CPU alone are in the other files here.
"""


def run_section(module: str, device: str, quick: bool, save: Callable[[Any], Any]) -> dict[str, list[dict[str, Any]]]:
    """Tables of a section: heading -> rows. ``save`` keeps those at hand, in case the section overruns."""
    import torch

    if device == "cpu":
        torch.set_num_threads(1)
    found = import_module(module)
    given = {"device": device, "quick": quick, "save": save}
    wanted = inspect.signature(found.rows).parameters
    tables = found.rows(**{name: value for name, value in given.items() if name in wanted})
    return tables if isinstance(tables, dict) else {getattr(found, "TITLE", module): tables}


def guarded(name: str, module: str, device: str, quick: bool, budget: float, out: Path) -> dict[str, Any]:
    """Run a section in a process: its tables, or why there are none."""
    if not (HERE / f"{module}.py").exists():
        return {"status": f"not there: benchmarks/{module}.py", "seconds": 0.0}
    target = out / f".section-{name}-{os.getpid()}.json"
    command = [sys.executable, __file__, "--section", name, "--device", device, "--to", str(target)]
    began = time.perf_counter()
    try:
        done = subprocess.run(
            command + ["--quick"] * quick, timeout=budget, capture_output=True, text=True, env=environment()
        )
        if done.returncode == 0:
            result = {"status": "done", "tables": json.loads(target.read_text())}
        else:
            result = {"status": f"failed (exit code {done.returncode})", "error": done.stderr[-2000:]}
    except subprocess.TimeoutExpired as late:
        said = late.stderr.decode(errors="replace") if isinstance(late.stderr, bytes) else late.stderr or ""
        result = {"status": f"stopped after its {budget:.0f} s", "error": said[-2000:]}
        if target.exists():
            result["tables"] = json.loads(target.read_text())
    finally:
        target.unlink(missing_ok=True)
    return result | {"seconds": round(time.perf_counter() - began, 1)}


def environment() -> dict[str, str]:
    """Of a section: the packages of this checkout first."""
    path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path}


def card(device: str) -> str:
    """The card's name as part of a file name."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")).strip("-")


def facts(device: str) -> dict[str, Any]:
    import torch
    from harness import machine

    known = machine()
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        known |= {
            "gpu_memory_GiB": round(properties.total_memory / 2**30, 1),
            "gpu_processors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return known


def markdown(where: dict[str, Any], sections: dict[str, dict[str, Any]]) -> str:
    from harness import _cell

    title = where["gpu"] or f"the driver on a CPU ({where['cpu']})"
    versions = ", ".join(f"{key} {value}" for key, value in where["versions"].items())
    lines = [f"# Measured on {title}", "", NOTES.strip(), ""]
    lines += [
        f"`python benchmarks/gpu.py`: host {where['cpu']}, {where['cores']} cores, {versions}; {where['date']}.",
        "",
    ]
    lines += ["| section | outcome | seconds |", "| --- | --- | --- |"]
    lines += [f"| {name} | {found['status']} | {found['seconds']:.0f} |" for name, found in sections.items()]
    for name, found in sections.items():
        for heading, rows in found.get("tables", {}).items():
            if not rows:
                continue
            columns = list(dict.fromkeys(column for row in rows for column in row))
            lines += ["", f"## {name}: {heading}", "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
            lines += ["| " + " | ".join(_cell(row.get(column, "-")) for column in columns) + " |" for row in rows]
        if "error" in found:
            lines += ["", f"## {name}: {found['status']}", "", "```", found["error"].strip(), "```"]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--only", nargs="+", choices=tuple(SECTIONS), default=tuple(SECTIONS))
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="for all sections together")
    parser.add_argument("--section", choices=tuple(SECTIONS), help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.section:

        def save(tables: Any) -> None:
            whole = given.to.with_suffix(".part")
            whole.write_text(json.dumps(tables))
            whole.replace(given.to)

        save(run_section(SECTIONS[given.section][0], given.device, given.quick, save))
        return 0
    import torch

    if given.device == "cuda" and not torch.cuda.is_available():
        print("make bench-gpu needs a CUDA device, and torch sees none here; see --device cpu --quick", file=sys.stderr)
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    end, sections = time.perf_counter() + given.seconds, {}
    shares = {name: SECTIONS[name][1] for name in given.only}
    for place, name in enumerate(given.only):
        left = end - time.perf_counter()
        later = sum(shares[other] for other in given.only[place + 1 :])
        budget = max(5.0, left * shares[name] / (shares[name] + later))
        sections[name] = guarded(name, SECTIONS[name][0], given.device, given.quick, budget, given.out)
        print(f"{name}: {sections[name]['status']}, {sections[name]['seconds']:.0f} s", flush=True)
    where = facts(given.device)
    file = given.out / f"gpu-{card(given.device)}"
    file.with_suffix(".json").write_text(json.dumps({"machine": where, "sections": sections}, indent=1) + "\n")
    file.with_suffix(".md").write_text(markdown(where, sections))
    print(f"written: {file}.json, {file}.md")
    failed = [name for name, found in sections.items() if "error" in found]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
