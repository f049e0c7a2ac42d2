"""One trainer at a time in a folder: a lock that ends with its process, however that ends."""

from __future__ import annotations

import errno
import os
import socket
import sys
import threading
from pathlib import Path

import torch.distributed as dist

from flows.checkpoint import CheckpointError
from mbot import convergence
from mbot.distributed.ranks import Ranks

if sys.platform == "win32":
    import msvcrt

    def _lock(file: int) -> None:
        os.lseek(file, 1 << 30, os.SEEK_SET)  # far behind the text, which others read
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        finally:
            os.lseek(file, 0, os.SEEK_SET)

else:
    import fcntl

    def _lock(file: int) -> None:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


_NAME = ".lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_guard = threading.Lock()
_held: dict[str, int] = {}  # folder -> process; the system's locks do not tell trainers of one process apart


class FolderLock:
    """The lock of a folder, a record lock of the system on the file ``.lock`` in it; a context manager, re-entrant.

    It is gone with the process that holds it, killed ones included; forked workers do not hold it. Under
    ``torch.distributed`` all ranks enter it together, and rank 0 holds it.

    Args:
        folder: made where it does not exist; None locks nothing.
        alone: this process enters without the others.

    Raises (when entered, on every rank):
        CheckpointError: another trainer holds it; says which process.
        OSError: the folder cannot be written to.

    Warns:
        UserWarning: the file system knows no locks.
    """

    def __init__(self, folder: Path | None, *, alone: bool = False) -> None:
        self.folder, self.alone = folder, alone
        self._file: int | None = None
        self._depth = 0

    def __enter__(self) -> FolderLock:
        if self._depth == 0 and self.folder is not None:
            if not self.alone and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                Ranks().from_first(self._acquire)
            else:
                self._acquire()
        self._depth += 1
        return self

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if self._depth == 0 and self._file is not None:
            with _guard:
                _held.pop(os.path.realpath(self.folder or ""), None)
                os.ftruncate(self._file, 0)
                os.close(self._file)  # which unlocks; the file stays, as another may have opened it
            self._file = None

    def _acquire(self) -> None:
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        name = os.path.realpath(self.folder)
        with _guard:
            if _held.get(name) == os.getpid():  # checked before the file is opened, as closing it again would unlock it
                raise self._in_use("another trainer of this process")
            file = os.open(self.folder / _NAME, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                _lock(file)
                os.ftruncate(file, 0)
                os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
            except OSError as error:
                holder = os.read(file, 200).decode(errors="replace") or "another process"
                os.close(file)
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise self._in_use(holder) from None
                if error.errno not in _UNSUPPORTED:
                    raise
                convergence.warn(
                    f"{self.folder} is on a file system without locks ({error}): nothing keeps a second trainer out",
                    UserWarning,
                )
                return
            self._file, _held[name] = file, os.getpid()

    def _in_use(self, holder: str) -> CheckpointError:
        return CheckpointError(
            f"{self.folder} is in use by {holder}, which writes there: two would mix their files. Give "
            "another folder, or wait until it is done"
        )
