"""The built wheel as a stranger gets it: in a fresh environment, outside the clone (``make check-dist``).

Runs the README's examples (a doctest) and the command line with nothing but the wheel and its dependencies.
"""

import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    wheel = next(Path(sys.argv[1]).resolve().glob("*.whl"))
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        venv.create(home / "env", with_pip=True)
        python = next(path for path in (home / "env/bin/python", home / "env/Scripts/python.exe") if path.exists())
        shutil.copy(ROOT / "README.md", home)

        def run(*arguments: object) -> None:
            subprocess.run([python, *map(str, arguments)], check=True, cwd=home)

        constraints = ["-c", ROOT / "constraints.txt"]
        run("-m", "pip", "install", "--quiet", *constraints, "torch")
        run("-m", "pip", "install", "--quiet", *constraints, wheel)
        run(
            "-c", "import mbot, flows, setenc; assert all('site-packages' in m.__file__ for m in (mbot, flows, setenc))"
        )
        run("-m", "doctest", "README.md")
        command = ("-m", "flows", "train", "--data", "moons", "--steps", 20, "--evaluate", 100, "--out", home / "run")
        run(*command, "--no-progress")
        run("-m", "flows", "sample", "--run", home / "run", "--num", 10)
        print(f"{wheel.name} works outside the clone")


if __name__ == "__main__":
    main()
