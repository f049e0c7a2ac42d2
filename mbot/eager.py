"""Calls that ``torch.compile`` keeps out of its graphs: solvers are loops over numbers, not graphs of tensors."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def outside_graphs(function: Function) -> Function:
    """The function, which breaks the graph that calls it and runs as without ``torch.compile``, gradients included.

    ``torch.compiler.disable`` does that, but imports the compiler; it is used only once the compiler is loaded.
    """
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling() and "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    # Compiled frames are kept by code object, a few at most: each function has its own.
    own: Any = call
    own.__code__ = own.__code__.replace(co_name=function.__name__)
    return own
