"""Two trainers never write to one folder; a process that died, however, is never in the way."""

import errno
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from flows import CheckpointError, checkpoint, folder_lock
from flows.__main__ import main
from flows.folder_lock import FolderLock
from tests.flows.toy_run import trainer

ROOT = Path(__file__).parents[2]

HOLDER = """
import os, sys, time
from pathlib import Path
from flows.folder_lock import FolderLock
with FolderLock(Path(sys.argv[1])):
    child = os.fork()  # a data worker inherits the open file, but not the lock
    if child:
        print(child, flush=True)
    time.sleep(3600)  # it is killed
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock, and has a child."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True, cwd=ROOT) as run:
        child = int(run.stdout.readline())
        yield run
        run.kill()
        os.kill(child, signal.SIGKILL)


def test_another_process_is_named_and_in_the_way_until_it_dies(holder, tmp_path):
    run = trainer(tmp_path, steps=2)
    for write in (run.fit, run.save):
        with pytest.raises(CheckpointError, match=rf"in use by process {holder.pid} on .*Give another folder"):
            write()
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert run.fit(resume=True).step == 2  # its child is still there


def test_two_trainers_of_one_process(tmp_path):
    first, second = trainer(tmp_path, steps=4), trainer(tmp_path, steps=4)

    def meanwhile(model, step):
        with pytest.raises(CheckpointError, match="in use by another trainer of this process"):
            second.fit()

    first.preview, first.every["preview"] = meanwhile, 2
    first.fit()
    (tmp_path.parent / "link").symlink_to(tmp_path)
    with first.lock, first.lock, pytest.raises(CheckpointError, match="another trainer"):
        trainer(tmp_path.parent / "link", steps=4).fit()
    assert second.fit(resume=True).step == 4


def test_a_run_that_ends_by_an_error_frees_the_folder(tmp_path):
    def broken(model, step):
        raise KeyError("preview")

    with pytest.raises(KeyError):
        trainer(tmp_path, steps=4, preview=broken, preview_every=1).fit()
    assert trainer(tmp_path, steps=4).fit(resume=True).step == 4
    assert (tmp_path / ".lock").read_text() == ""


def test_a_run_without_a_folder_locks_nothing():
    lock = FolderLock(None)
    with lock, lock:
        assert trainer(steps=2).fit().step == 2


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", unsupported)
    with pytest.warns(UserWarning, match="a file system without locks"):
        assert trainer(tmp_path, steps=2).fit().step == 2


def test_the_command_line_leaves_the_settings_of_a_running_run_alone(holder, tmp_path, capsys):
    arguments = ["train", "--data", "moons", "--out", str(tmp_path), "--steps", "2", "--batch-size", "8",
                 "--ot-batch-size", "8", "--evaluate", "0", "--no-progress"]  # fmt: skip
    assert main(arguments) == 3
    assert f"in use by process {holder.pid}" in capsys.readouterr().err
    assert not (tmp_path / "config.toml").exists()
    holder.kill()
    holder.wait()
    assert main(arguments) == 0
    assert checkpoint.latest(tmp_path / "checkpoints") is not None


def test_where_there_is_no_fcntl_the_lock_is_that_of_windows(tmp_path, monkeypatch):
    """Its byte lies behind the text, so that the holder's name can be read."""
    held = []

    def locking(file, mode, count):
        where = os.path.realpath(f"/proc/self/fd/{file}"), os.lseek(file, 0, os.SEEK_CUR)
        if where in held:
            raise PermissionError(errno.EACCES, "locked")
        held.append(where)

    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setattr(sys, "platform", "win32")
    spec = importlib.util.spec_from_file_location("lock_on_windows", folder_lock.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "platform", "linux")
    with module.FolderLock(tmp_path):
        assert held == [(str(tmp_path / ".lock"), 2**30)]
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
        module._held.clear()  # as in another process
        with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()} on "), module.FolderLock(tmp_path):
            pass
