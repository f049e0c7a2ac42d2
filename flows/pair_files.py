"""Pairs on disk: a folder that is written batch by batch.

``x1.npy`` holds the ends, ``y.pt`` conditions, ``pairs.json`` settings and progress. Noise is not stored, it is drawn
again from the seed; start points of another kind are in ``x0.npy``.
"""

from __future__ import annotations

import json
import math
import os
import pickle
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from flows.checkpoint import differences, write_atomically
from flows.seeds import SeededNoise


def read(folder: Path) -> tuple[Tensor | SeededNoise, Tensor, Any, dict[str, Any]]:
    """Start points, ends (mapped into memory), conditions and settings of a finished folder.

    Raises:
        ValueError: as `flows.PairedDataset.load` says.
    """
    state = _state(folder)
    if state is None:
        raise ValueError(f"{folder} holds no pairs (no pairs.json): flows.generate_pairs(…, out=…) makes some")
    made, n = state["settings"], state["settings"]["n"]
    if state["done"] < n:
        raise ValueError(
            f"{folder} holds {state['done']} of {n} pairs: make the others by the same call of generate_pairs"
        )
    shape = tuple(made["shape"])
    x0: Tensor | SeededNoise = SeededNoise(made["seed"], range(n), shape, getattr(torch, made["dtype"]))
    try:
        x1 = torch.from_numpy(np.load(folder / "x1.npy", mmap_mode="c"))
        y = torch.load(folder / "y.pt", weights_only=True) if made["conditions"] else None
        if made["start"] != "noise":
            x0 = torch.from_numpy(np.load(folder / "x0.npy", mmap_mode="c"))
        if x1.shape != (n, *shape):
            raise ValueError(f"x1 has shape {tuple(x1.shape)} instead of {(n, *shape)}")
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"the pairs in {folder} are damaged: {error}") from error
    if isinstance(x0, SeededNoise):
        _check_noise(x0, state["noise"], folder)
    return x0, x1, y, made


def _state(folder: Path) -> dict[str, Any] | None:
    file = folder / "pairs.json"
    if not file.is_file():
        return None
    try:
        state = json.loads(file.read_text())
        if state["format"] != "flows-pairs" or state["version"] != 1:
            raise ValueError(f"format {state['format']!r}, version {state['version']!r}")
        missing = [
            name for name in ("n", "shape", "dtype", "seed", "conditions", "start") if name not in state["settings"]
        ]
        if missing:
            raise ValueError(f"settings without {', '.join(missing)}")
        return {"settings": state["settings"], "done": int(state["done"]), "noise": state["noise"]}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{file} does not describe pairs of this library: {error}") from error


def _write_state(folder: Path, made: dict[str, Any], start: Any, done: int) -> None:
    noise = start.at(torch.tensor([0])).flatten()[:8].tolist() if isinstance(start, SeededNoise) else []
    state = {"format": "flows-pairs", "version": 1, "settings": made, "done": done, "noise": noise}
    text = json.dumps(state, indent=1).encode()
    write_atomically(folder / "pairs.json", lambda file: file.write(text))


def _check_noise(start: SeededNoise, first: list[float], folder: Path) -> None:
    """Refuse to draw noise again that comes out otherwise."""
    again = start.at(torch.tensor([0])).flatten()[:8].tolist()
    if not np.allclose(again, first[: len(again)], atol=1e-5):
        raise ValueError(
            f"the noise of the pairs in {folder} comes out otherwise here (torch {torch.__version__}): make them anew"
        )


def begin(folder: Path, made: dict[str, Any], start: Any, given: Any) -> int:
    """Pairs that the folder holds already, of the same settings; 0 after its files are set up."""
    state = _state(folder)
    if state is not None:
        differ = differences(state["settings"], made)
        if differ:
            raise ValueError(f"{folder} holds pairs of other settings; they differ in {differ}. Give another folder")
        if isinstance(start, SeededNoise):
            _check_noise(start, state["noise"], folder)
        kept = {"x1.npy": True, "x0.npy": made["start"] != "noise", "y.pt": given is not None}
        lost = [name for name, wanted in kept.items() if wanted and not (folder / name).is_file()]
        if lost:
            raise ValueError(f"the pairs in {folder} are damaged: there is no {', '.join(lost)}. Make them anew")
        with open(folder / "x1.npy", "rb") as ends:
            if os.fstat(ends.fileno()).st_size < _offset(ends, made, state["done"]):
                raise ValueError(f"the pairs in {folder} are damaged: x1.npy is truncated. Make them anew")
        return state["done"]
    with open(folder / "x1.npy", "wb") as file:
        descr = np.lib.format.dtype_to_descr(np.dtype(made["dtype"]))
        header = {"descr": descr, "fortran_order": False, "shape": (made["n"], *made["shape"])}
        np.lib.format.write_array_header_1_0(file, header)
    if not isinstance(start, SeededNoise):
        write_atomically(folder / "x0.npy", lambda file: np.save(file, start.numpy()))
    if given is not None:
        write_atomically(folder / "y.pt", lambda file: torch.save(given, file))
    _write_state(folder, made, start, 0)
    return 0


def append(folder: Path, made: dict[str, Any], start: Any, done: int, ends: Tensor) -> None:
    """Write a batch behind the ``done`` pairs before it, and then that it is there."""
    with open(folder / "x1.npy", "r+b") as file:
        file.seek(_offset(file, made, done))
        file.write(ends.contiguous().numpy().tobytes())
        file.flush()
        os.fsync(file.fileno())
    _write_state(folder, made, start, done + len(ends))


def _offset(file: IO[bytes], made: dict[str, Any], rows: int) -> int:
    """The position of a row in an array file."""
    np.lib.format.read_magic(file)
    np.lib.format.read_array_header_1_0(file)
    return file.tell() + rows * math.prod(made["shape"]) * np.dtype(made["dtype"]).itemsize
