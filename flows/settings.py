"""Settings as files and flags: typed dataclasses to and from TOML, YAML, JSON and plain values."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, Literal


class ConfigError(ValueError):
    """Settings that do not fit together, or a file with unknown or mistyped keys."""


def read_file(path: Path) -> dict[str, Any]:
    """A TOML, YAML or JSON file as a dict of settings; dashes in names count as underscores."""
    readers: dict[str, Any] = {".toml": tomllib.loads, ".json": json.loads, ".yaml": _yaml, ".yml": _yaml}
    if path.suffix not in readers:
        raise ConfigError(f"settings are read from .toml, .yaml, .yml or .json files; got {path}")
    try:
        values = readers[path.suffix](path.read_text())
    except ConfigError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold names and values; got {type(values).__name__}")
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def _yaml(text: str) -> Any:
    try:
        import yaml  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError as error:
        raise ConfigError("a YAML file needs pyyaml: pip install pyyaml, or use TOML") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def check(config: Any) -> Any:
    """Settings whose numbers are finite and whose seed fits a generator.

    Raises:
        ConfigError: names the first that is not.
    """
    for name, value in plain(config).items():
        flag = f"--{name.replace('_', '-')}"
        if any(isinstance(v, float) and not math.isfinite(v) for v in (value if isinstance(value, list) else [value])):
            raise ConfigError(f"{flag} must be finite; got {value}")
        if name == "seed" and not 0 <= value < 2**63:
            raise ConfigError(f"{flag} must lie in 0 … 2^63 - 1; got {value}")
    return config


def typed(kind: type, values: dict[str, Any], where: str) -> dict[str, Any]:
    """Plain values as the types of a settings class; unknown names and wrong types are refused.

    Raises:
        ConfigError: names what is wrong and what there is.
    """
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ConfigError(f"{where} has unknown keys: {', '.join(unknown)}. Known: {', '.join(hints)}")
    return {name: _convert(value, hints[name], f"{name} in {where}") for name, value in values.items()}


def _convert(value: Any, hint: Any, name: str) -> Any:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in options:
            raise ConfigError(f"{name} must be one of {', '.join(map(repr, options))}; got {value!r}")
        return value
    if origin in (types.UnionType, typing.Union):
        return (
            None if value in (None, "none") else _convert(value, next(o for o in options if o is not type(None)), name)
        )
    if origin is tuple and options[-1] is Ellipsis:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{name} must be a list; got {value!r}")
        return tuple(_convert(v, options[0], name) for v in value)
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(options):
            raise ConfigError(f"{name} must be {len(options)} values; got {value!r}")
        return tuple(_convert(v, o, name) for v, o in zip(value, options, strict=True))
    if hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{name} must be of type {hint.__name__}; got {value!r}")
    return value


def plain(value: Any) -> Any:
    """Settings as numbers, strings, lists and dicts."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def to_toml(config: Any) -> str:
    """A settings object as a TOML file that `read_file` and `typed` take back to the same object."""
    values = {name: "none" if value is None else value for name, value in plain(config).items()}
    return "".join(f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in values.items())
