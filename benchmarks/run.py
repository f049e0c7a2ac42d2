"""Run every benchmark, one process each: `make bench`. Name scripts to run only these.

What needs a CUDA device has a target of its own, `make bench-gpu`.
"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
HELPERS = {"run", "harness", "compare"}  # compare needs another checkout


def scripts() -> list[str]:
    """What `make bench` runs."""
    names = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in HELPERS)
    return [name for name in names if "gpu" not in name.split("_")]


if __name__ == "__main__":
    wanted = sys.argv[1:] or scripts()
    failed = [name for name in wanted if subprocess.run([sys.executable, HERE / f"{name}.py"]).returncode]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
