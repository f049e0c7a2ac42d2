"""Compiled functions are kept on disk: no process may run what another one left there, or has not finished writing."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numba
import numpy as np
from numba.core import caching

from minibatch_transport import _lock, compiled

ROOT = Path(__file__).parents[2]
MODULE = """
from minibatch_transport import compiled
@compiled(nogil=True)
def one_more(x):
    return x + {version}
"""
# Writes the index, tells of it, and writes the code when the other process is about to ask for it.
SLOW = """
import time
from pathlib import Path
import numba.core.caching as caching, kept
write = caching.IndexDataCacheFile._save_data
def late(self, name, data):
    Path("index").touch()
    while not Path("asked").exists():
        time.sleep(0.01)
    time.sleep(1)
    write(self, name, data)
caching.IndexDataCacheFile._save_data = late
kept.one_more(0)
"""
ASKS = """
from pathlib import Path
import kept
Path("asked").touch()
print(kept.one_more(0))
"""


def run(code, folder):
    """A process with the module `minibatch_transport` alone, as torch takes seconds to load."""
    path = os.pathsep.join([str(ROOT), str(folder)])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("NUMBA_CACHE_DIR", None)
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    )


def test_a_process_never_runs_the_code_of_an_older_version(tmp_path):
    """It would with numba's own decorator, between the index and the code of a newer version."""
    module = tmp_path / "kept.py"
    module.write_text(MODULE.format(version=1))
    assert run("import kept; print(kept.one_more(0))", tmp_path).communicate()[0] == "1\n"
    module.write_text(MODULE.format(version=2))
    os.utime(module, (time.time() + 10,) * 2)  # another stamp, whatever the file system's resolution
    writer = run(SLOW, tmp_path)
    while not (tmp_path / "index").exists():
        assert writer.poll() is None
        time.sleep(0.01)
    assert run(ASKS, tmp_path).communicate()[0] == "2\n"
    assert writer.wait() == 0


def test_code_is_compiled_again_when_what_it_calls_has_changed(tmp_path):
    """The function's own file stays as it is; numba would run the sum of the old summand."""
    called, caller = tmp_path / "called.py", tmp_path / "caller.py"
    caller.write_text(
        "from minibatch_transport import compiled\nfrom called import inner\n"
        "@compiled(nogil=True)\ndef outer(x):\n    return inner(x) * 10\n"
    )
    for version in (1, 2):
        called.write_text(MODULE.format(version=version).replace("one_more", "inner"))
        os.utime(called, (time.time() + 10 * version,) * 2)
        assert run("import caller; print(caller.outer(0))", tmp_path).communicate()[0] == f"{10 * version}\n"


def test_a_folder_that_cannot_be_written_to(monkeypatch):
    """Nothing is saved there, so nothing needs a lock."""
    function = compiled(nogil=True)(lambda x: x * 2)
    monkeypatch.setattr(Path, "mkdir", lambda self, **options: (_ for _ in ()).throw(PermissionError("read-only")))
    assert function(np.float32(3)) == 6


def test_without_compilation(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    (tmp_path / "kept.py").write_text(MODULE.format(version=1))
    assert run("import kept; print(kept.one_more(0))", tmp_path).communicate()[0] == "1\n"


def test_the_lock_is_held_while_numba_reads_and_writes(monkeypatch, tmp_path):
    """Of functions that others call, too."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    inner = compiled(nogil=True)(lambda x: x + 1)
    outer = compiled(nogil=True)(lambda x: inner(x) + 1)
    seen = []
    for name in ("save", "load"):
        whole = getattr(caching.IndexDataCacheFile, name)

        def watched(self, *given, whole=whole, name=name):
            seen.append((name, _lock(self._cache_path).is_locked))
            return whole(self, *given)

        monkeypatch.setattr(caching.IndexDataCacheFile, name, watched)
    assert outer(1) == 3
    assert outer(1.0) == 3
    assert [name for name, held in seen if held].count("save") == 4
    assert all(held for _, held in seen)
