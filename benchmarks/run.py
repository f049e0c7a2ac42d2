"""Run every benchmark, one process each: `make bench`. Name scripts to run only these."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
HELPERS = {"run", "harness", "gpu_mbot"}

if __name__ == "__main__":
    wanted = sys.argv[1:] or sorted(path.stem for path in HERE.glob("*.py") if path.stem not in HELPERS)
    failed = [name for name in wanted if subprocess.run([sys.executable, HERE / f"{name}.py"]).returncode]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
