"""Helpers of the checks in `mbot.testing` and `flows.testing`."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import torch
from torch import Tensor


def require(promise: bool, says: str) -> None:
    """An assertion that ``python -O`` keeps."""
    if not promise:
        raise AssertionError(says)


def close(got: Tensor, want: Tensor, says: str) -> None:
    """`torch.testing.assert_close`, with a sentence before its own."""
    try:
        torch.testing.assert_close(got, want)
    except AssertionError as error:
        raise AssertionError(f"{says}: {error}") from None


def case(settings: Any, says: str, **inputs: Tensor | None) -> str:
    """A sentence with small inputs written out, and the shapes of all."""
    given = [
        f"{name} = {value.tolist() if value.numel() <= 64 else '…'} ({value.dtype} of shape {tuple(value.shape)})"
        for name, value in inputs.items()
        if value is not None
    ]
    return f"{settings!r}: {says}, at {', '.join(given)}"


def check_settings(settings: Any) -> None:
    """Settings are a frozen dataclass that compares, pickles and prints: runs save and compare what is printed."""
    require(
        dataclasses.is_dataclass(settings), f"{settings!r} is no dataclass: its settings are not compared and saved"
    )
    again = pickle.loads(pickle.dumps(settings))
    require(again == settings, f"{settings!r} is not equal to its pickled copy {again!r}")
    require(repr(again) == repr(settings), f"{settings!r} prints as {again!r} once pickled")
    require(type(settings).__name__ in repr(settings), f"{settings!r} does not print its class")
    try:
        settings.not_a_setting = 1
    except AttributeError:  # FrozenInstanceError is one
        return
    raise AssertionError(f"{settings!r}: its settings can be changed; use @dataclass(frozen=True)")
