"""Complete checkpoints or none: a temporary file is written, synced and renamed. Files are verified before use.

What `load` would refuse is not written either.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch

FORMAT = "flows-checkpoint"
VERSION = 1
_NAME = re.compile(r"step-(\d+)\.pt")
_PARTS: dict[str, type | tuple[type, ...]] = {
    "version": int, "step": int, "model": dict, "ema": (dict, type(None)), "optimizer": dict,
    "scheduler": (dict, type(None)), "scaler": dict, "loader": dict, "generators": list, "settings": dict,
    "config": dict,
}  # fmt: skip


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or used; ``previous`` is an older one that can, or None."""

    flag = "--checkpoint"  # of the command line, that takes the older one

    def __init__(self, message: str, previous: Path | None = None) -> None:
        super().__init__(message)
        self.previous = previous


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file that appears under its name complete and synced, or not at all.

    Args:
        path: where; the folder must exist.
        write: writes the content to an open binary file.

    Raises:
        OSError: the file could not be written; nothing is left behind and an older file of that name is untouched.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    if os.name != "posix":
        return  # folders cannot be synced there
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def path_of(folder: Path, step: int) -> Path:
    """Path of the checkpoint of a step."""
    return folder / f"step-{step:08d}.pt"


def saved(folder: Path) -> list[Path]:
    """Checkpoints in a folder, oldest step first, by their names."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def save(state: dict[str, Any], folder: Path, keep: int) -> Path:
    """Write ``state`` (with its ``step``) to a folder, and remove the oldest of it and those before it beyond ``keep``.

    Those of later steps, of another attempt, stay.

    Raises:
        CheckpointError: it could not be written (a full disk, no permission); older ones are untouched.
        TypeError: it holds something else than tensors and plain values.
    """
    path, state = path_of(folder, state["step"]), plain_state(state)
    told: list[OSError] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".step-*.partial"):  # of a run that was killed while it wrote
            left.unlink(missing_ok=True)
        marked = {"format": FORMAT, "version": VERSION, **state}
        write_atomically(path, lambda file: torch.save(marked, cast(IO[bytes], _RecordingFile(file, told))))
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not told:  # not about writing
            raise
        older = last_good(folder)
        kept = f"the last good checkpoint is {older}" if older else "there is none before it"
        raise CheckpointError(
            f"checkpoint {path} could not be written ({told[0] if told else error}); {kept}. "
            "Free some space or give another folder, then resume",
            older,
        ) from error
    found = saved(folder)
    for old in found[: found.index(path) + 1][:-keep]:
        old.unlink(missing_ok=True)
    return path


def plain_state(state: dict[str, Any]) -> dict[str, Any]:
    """A state with Python's numbers in place of NumPy's, and nothing that `load` would not read.

    Raises:
        TypeError: there is something else than tensors and plain values, such as an object that a scheduler saves.
    """
    state = {name: _plain(part) for name, part in state.items()}
    for name, part in state.items():
        file = io.BytesIO()
        try:
            torch.save(_without_tensors(part), file)
            file.seek(0)
            torch.load(file, weights_only=True)
        except (pickle.PickleError, AttributeError, TypeError) as error:
            said = re.search(r"GLOBAL (\S+)", str(error))
            raise TypeError(
                f"the state of the {name} cannot be read from a checkpoint again, since it holds more than tensors and "
                f"plain values: {said[1] if said else error}"
            ) from error
    return state


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    for kind, plain in ((bool, bool), (int, int), (float, float), (str, str.__str__)):
        if isinstance(value, kind):
            return plain(value)  # of an enumeration, say
    if type(value) is dict:
        return {_plain(key): _plain(part) for key, part in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


def _without_tensors(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return None
    if isinstance(value, dict):
        return {key: _without_tensors(part) for key, part in value.items()}
    return type(value)(map(_without_tensors, value)) if type(value) in (list, tuple) else value


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU after checking that it is whole, one of ours, and holds numbers.

    Only tensors and plain values are unpickled.

    Raises:
        CheckpointError: no file, truncated, damaged, foreign, of a newer version, or with NaN among its weights; says
            which older one is good.
    """
    path = Path(path)
    try:
        return _read(path)
    except CheckpointError as error:
        previous = last_good(path.parent, before=path)
        if previous is None:
            raise
        raise CheckpointError(
            f"{error} The previous good checkpoint is {previous}: resume from it", previous
        ) from error


def latest(folder: str | Path) -> Path | None:
    """The checkpoint of the highest step in a folder, unread; None where there is none."""
    found = saved(Path(folder))
    return found[-1] if found else None


def plain_values(config: dict[str, Any]) -> dict[str, Any]:
    """Values that a checkpoint can hold beside its tensors, or a TypeError."""
    if not isinstance(config, dict):
        raise TypeError(f"config must be a dict of plain values; got {type(config).__name__}")
    try:
        json.dumps(config)
    except TypeError as error:
        raise TypeError(f"config must hold plain values (numbers, strings, lists, dicts): {error}") from error
    return config


def differences(saved: dict[str, Any], mine: dict[str, Any]) -> str:
    """Settings that are not as they were saved, as text; empty where all are."""
    return "; ".join(
        f"{key}: saved {saved.get(key)}, here {value}" for key, value in mine.items() if saved.get(key) != value
    )


def last_good(folder: Path, before: Path | None = None) -> Path | None:
    """The newest checkpoint of a folder that `load` takes, of those before ``before``; None where there is none."""
    for candidate in reversed(saved(folder)):
        if before is None or candidate.name < before.name:
            with contextlib.suppress(CheckpointError):
                _read(candidate)
                return candidate
    return None


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}.")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # every record against its checksum
        if damaged is not None:
            raise zipfile.BadZipFile(f"record {damaged} does not match its checksum")
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"checkpoint {path} is truncated or damaged ({error}).") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, KeyError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{path} is not a checkpoint of this library ({reason}).") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this library (it has no {FORMAT!r} mark).")
    version = state.get("version")
    if isinstance(version, int) and version > VERSION:
        raise CheckpointError(
            f"checkpoint {path} has version {version}, newer than the {VERSION} that this release reads."
        )
    for name, kind in _PARTS.items():
        if name not in state:
            raise CheckpointError(f"{path} is not a checkpoint of this library (no {name}).")
        if not isinstance(state[name], kind) or isinstance(state[name], bool):
            raise CheckpointError(f"{path} is not a checkpoint of this library ({name} is {state[name]!r:.40}).")
    for part in ("model", "ema"):
        weights = [(name, v) for name, v in (state[part] or {}).items() if isinstance(v, torch.Tensor)]
        meant = state.get("not_finite", [])
        bad = [name for name, v in weights if name.removeprefix("module.") not in meant and bool(v.isnan().any())]
        if bad:
            raise CheckpointError(f"checkpoint {path} holds NaN ({', '.join(bad[:3])}).")
    return state


class _RecordingFile:
    """A file for ``torch.save`` that records the system's error in ``told`` when a write fails (torch hides it)."""

    def __init__(self, file: IO[bytes], told: list[OSError]) -> None:
        self.file, self.told = file, told

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.told.append(error)
            raise

    def flush(self) -> None:
        self.file.flush()
