"""Names on the command line: the couplings, paths, time laws, data sets and models that the packages export.

A new one is known once exported (in ``mbot.__all__``, ``flows.__all__`` or ``flows.datasets.__all__``). Its name is
that of its class or function, in lower case with dashes; where papers use another name, `_KNOWN_AS` holds it. Settings
without a flag of their own are written ``coupling.num_batches=4``.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any

import mbot
from flows import datasets, models, paths, times
from flows.matching import FlowMatching
from flows.mean_flow import MeanFlow

_KNOWN_AS = {
    "IndependentCoupling": "fm",
    "ConditionalOTCoupling": "c2ot",
    "WeightedCoupling": "wcfm",
    "BoMbCoupling": "bomb",
    "DataCoupling": "whole-data",
    "ImageFolder": "folder",
    "load_arrays": "arrays",
}
GROUPS = ("coupling", "path", "times", "objective")
"""What has settings without a flag of their own."""
DATA_ARGUMENTS = ("n", "root", "path", "size")
"""Arguments without a default that a data set may have: number of points, folder, file, pixels a side."""


def _name(exported: str, suffix: str) -> str:
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", exported.removesuffix(suffix)).replace("_", "-")
    return _KNOWN_AS.get(exported, words.lower())


def classes(module: Any, base: type, suffix: str) -> dict[str, Any]:
    """The concrete classes of a kind that a module exports, by name.

    >>> list(classes(mbot, mbot.Coupling, "Coupling"))[:2]
    ['bomb', 'c2ot']
    """
    found = {name: getattr(module, name) for name in module.__all__}
    kinds = {n: k for n, k in found.items() if inspect.isclass(k) and issubclass(k, base) and not inspect.isabstract(k)}
    return {_name(name, suffix): kind for name, kind in kinds.items()}


def couplings() -> dict[str, Any]:
    """Coupling classes by name."""
    return classes(mbot, mbot.Coupling, "Coupling")


def path_classes() -> dict[str, Any]:
    """Path classes by name."""
    import flows

    return classes(flows, paths.Path, "Path")


def time_laws() -> dict[str, Any]:
    """Time laws by name."""
    import flows

    return classes(flows, times.TimeLaw, "Times")


def objectives() -> dict[str, Any]:
    """Objectives that a run's samples can be drawn with, by name."""
    return {"flow-matching": FlowMatching, "mean-flow": MeanFlow}


def data_sets() -> dict[str, Callable[..., Any]]:
    """Functions and classes that make a data set, by name: those that need nothing but `DATA_ARGUMENTS`.

    >>> list(data_sets())[:4]
    ['folder', 'checkerboard', 'cifar10', 'digits']
    """
    found = {}
    for name in datasets.__all__:
        make = getattr(datasets, name)
        needed = [p.name for p in inspect.signature(make).parameters.values() if p.default is p.empty]
        if set(needed) <= set(DATA_ARGUMENTS):
            found[_name(name, "")] = make
    return found


def model_names() -> list[str]:
    """The MLP, the U-Nets' presets and those of the transformers."""
    return ["mlp", *models.PRESETS, *models.DIT_PRESETS]


def settings_of(group: str, texts: Iterable[str]) -> dict[str, Any]:
    """Values of the settings written for a group.

    Values are Python's literals, or transports, conditions and time laws with literal settings; all else is a string.

    >>> settings_of("coupling", ["coupling.num_batches=4", "coupling.cost=euclidean", "path.sigma=1"])
    {'num_batches': 4, 'cost': 'euclidean'}
    """
    found = {}
    for text in texts:
        match = re.fullmatch(r"(\w+)\.(\w+)=(.*)", text, re.DOTALL)
        if match is None:
            raise ValueError(f"a setting is written group.name=value, such as coupling.num_batches=4; got {text!r}")
        if match[1] not in GROUPS:
            raise ValueError(f"settings belong to {', '.join(GROUPS)}; got {text!r}")
        if match[1] == group:
            found[match[2]] = _value(match[3])
    return found


def make(kind: Any, flag: str, settings: dict[str, Any]) -> Any:
    """An object of a settings class.

    Raises:
        ValueError: settings that it does not have, or does not get; names those it has.
    """
    group = flag.removeprefix("--").split()[0]
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
    unknown = sorted(set(settings) - set(fields))
    if unknown:
        have = ", ".join(fields) or "none"
        raise ValueError(f"{flag} has no setting {', '.join(unknown)}; it has {have}")
    missing = dataclasses.MISSING
    needed = [n for n, f in fields.items() if f.default is missing and f.default_factory is missing]
    absent = [name for name in needed if name not in settings]
    if absent:
        say = " ".join(f"{group}.{name}=…" for name in absent)
        raise ValueError(f"{flag} needs {', '.join(absent)}: give --settings {say}")
    return kind(**settings)


def _value(text: str) -> Any:
    try:
        node = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError):
        return text
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        kind = getattr(mbot, node.func.id, getattr(times, node.func.id, None))
        if inspect.isclass(kind) and issubclass(kind, (mbot.Transport, mbot.Condition, times.TimeLaw)):
            given = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
            return kind(*map(ast.literal_eval, node.args), **given)
    try:
        return ast.literal_eval(node)
    except ValueError:
        return text
