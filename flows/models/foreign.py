"""Other people's models as velocity models: who gets which argument where, and what of the output is the velocity."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mbot import checks
from mbot.conditions import as_tensor

_SHOWN = "'t, x, y', 'x, t, y', 'sample=x, timestep=t, class_labels=y', 'x, t, until', 'x, t, **y' or 'cat'"


class WrappedModel(nn.Module):
    """A callable of another library, called as ``model(t, x, y)``; made by `wrap`.

    Attributes:
        module: the callable itself: ``wrapped.module.state_dict()`` has its own keys.
    """

    def __init__(
        self,
        module: Callable[..., Any],
        order: str,
        output: str | int | Callable[[Any], Tensor] | None,
        time_scale: float,
        null_class: int | None,
    ) -> None:
        super().__init__()
        if not callable(module):
            raise TypeError(f"module must be callable; got {type(module).__name__}")
        if not (
            output is None or callable(output) or (isinstance(output, (str, int)) and not isinstance(output, bool))
        ):
            raise TypeError(
                "output must be None, the name or number of a part of the module's output, or a function of it; got "
                f"{output!r}"
            )
        self.module = module
        self.order, self.places = order, _places(order)
        self.output, self.time_scale = output, checks.positive(time_scale, "time_scale")
        self.null_class = None if null_class is None else checks.count(null_class, "null_class", at_least=0)

    def extra_repr(self) -> str:
        """The way to call the module."""
        module = "" if isinstance(self.module, nn.Module) else f"{_name(self.module)}, "
        output = _name(self.output) if callable(self.output) else repr(self.output)
        return f"{module}{self.order!r}, output={output}, time_scale={self.time_scale:g}, null_class={self.null_class}"

    def forward(self, t: Tensor, x: Tensor, y: Any = None, *, until: Tensor | None = None) -> Tensor:
        """Velocity at times ``t`` ``(B,)``, points ``x`` ``(B, d…)``, conditions ``y``; or its average to ``until``."""
        has = [wanted for _, wanted in self.places]
        if y is not None and not has:
            raise ValueError("order='cat' has no place for conditions: wrap a function that joins them to x")
        if y is not None and "y" not in has:
            raise ValueError(f"the wrapped model gets no conditions: name y in order, such as {_SHOWN}")
        if until is not None and "until" not in has:
            raise ValueError(
                "the wrapped model gets no until, which average velocities need: name it in order='x, t, until, y'"
            )
        end, t = (t if until is None else until) * self.time_scale, t * self.time_scale
        if not has:
            if x.ndim != 2:
                raise ValueError(f"order='cat' appends the time to points (B, d); got x of shape {tuple(x.shape)}")
            return self._velocity(self.module(torch.cat((x, t[:, None].to(x.dtype)), -1)))
        given = {"t": t, "x": x, "y": self._condition(y), "until": end}
        positional: list[Any] = []
        named: dict[str, Any] = {}
        for name, wanted in self.places:
            if wanted == "y" and y is None and name:
                continue
            if name == "**":
                if not isinstance(y, Mapping):
                    raise TypeError(f"'**y' in order takes a dict of conditions; got {type(y).__name__}")
                named |= given["y"]
            elif name:
                named[name] = given[wanted]
            else:
                positional.append(given[wanted])
        if positional and positional[-1] is None:
            positional.pop()
        return self._velocity(self.module(*positional, **named))

    def _condition(self, y: Any) -> Any:
        """Conditions with the model's own class for "no condition", where it has one."""
        if self.null_class is None or y is None:
            return y
        if isinstance(y, Mapping):
            return {key: self._condition(value) for key, value in y.items()}
        labels = as_tensor(y, "y")
        if labels.is_floating_point():
            return labels
        return torch.where(labels == -1, self.null_class, labels)

    def _velocity(self, out: Any) -> Tensor:
        if self.output is not None:
            out = _part(out, self.output)
        if isinstance(out, Tensor):
            return out
        parts = (
            list(out) if isinstance(out, Mapping) else list(range(len(out))) if isinstance(out, (tuple, list)) else []
        )
        parts = parts or list(getattr(out, "__dict__", ()))
        raise TypeError(
            f"the wrapped model returned {type(out).__name__}, not a tensor; say which part is the velocity, "
            f"output={' or '.join(map(repr, parts)) or 'a function of it'}"
        )


def wrap(
    module: Callable[..., Any],
    order: str = "x, t, y",
    output: str | int | Callable[[Any], Tensor] | None = None,
    time_scale: float = 1.0,
    *,
    null_class: int | None = None,
) -> WrappedModel:
    """Any callable as a velocity model ``model(t, x, y)``, an ``nn.Module``.

    | library | order | further |
    | --- | --- | --- |
    | diffusers ``UNet2DModel`` | ``"x, t, class_labels=y"`` | ``output="sample"``, ``time_scale=1000`` |
    | diffusers ``UNet2DConditionModel`` | ``"x, t, y"`` | the same |
    | DiT, SiT | ``"x, t, y"`` | ``null_class=`` their number of classes |
    | torchcfm's U-Net | ``"t, x, y"`` | |
    | torchcfm's MLP, of points with the time appended | ``"cat"`` | |
    | Meta's flow_matching, ``model(x, t, **extras)`` | ``"x, t, **y"`` | ``y`` is a dict |

    Args:
        module: what to call. A module's parameters are those of the result; its state dict is that of ``.module``.
        order: the arguments of the call, as it would be written: of ``t``, ``x`` and ``y``, by place or by name.
            Without conditions (``y=None``) the argument is left out. Models of average velocities get the end of the
            interval as ``until``, and the time where none is given; see `flows.MeanFlow`. ``"cat"`` hands over one
            tensor, ``x`` with the time as its last feature.
        output: what the velocity is of what the call returns: a field, a key, a number in a tuple, or a function of it,
            such as ``lambda out: out.chunk(2, 1)[0]`` for models that predict a variance too. None: all of it.
        time_scale: times are multiplied by it: 1000 for models with time steps of diffusion.
        null_class: the label that stands for "no condition" in the module, in place of our -1. See
            `flows.drop_conditions` and `flows.GuidedModel`.

    Raises:
        TypeError: something that cannot be called; (when called) an output that is no tensor.
        ValueError: an order that is no call; (when called) conditions without a place.

    >>> theirs = lambda sample, timestep, class_labels=None: {"sample": sample * timestep[:, None]}
    >>> model = wrap(theirs, "x, t, class_labels=y", output="sample", time_scale=1000)
    >>> model(torch.tensor([0.5]), torch.ones(1, 2))
    tensor([[500., 500.]])
    """
    return WrappedModel(module, order, output, time_scale, null_class)


def _places(order: str) -> tuple[tuple[str, str], ...]:
    """``(name or "" or "**", what)`` for each argument of a call as it is written; empty for ``"cat"``."""
    refused = ValueError(
        f"order must be a call's arguments with t and x once, y and until at most once, {_SHOWN}; got {order!r}"
    )
    if not isinstance(order, str):
        raise refused
    if order == "cat":
        return ()
    places: list[tuple[str, str]] = []
    for part in (part.strip() for part in order.split(",")):
        name, _, wanted = ("**", "", part[2:]) if part.startswith("**") else part.rpartition("=")
        name = name.strip()
        late = not name and any(before for before, _ in places)  # by place after one by name
        if late or not (name in ("", "**") or name.isidentifier()) or (name == "**" and wanted != "y"):
            raise refused
        places.append((name, wanted.strip()))
    wanted_ones = [wanted for _, wanted in places]
    if not {"t", "x"} <= set(wanted_ones) <= {"t", "x", "y", "until"} or len(set(wanted_ones)) < len(wanted_ones):
        raise refused
    return tuple(places)


def _name(call: Any) -> str:
    return getattr(call, "__qualname__", type(call).__name__)


def _part(out: Any, output: Any) -> Any:
    """A field, key or number of an output, or a function of it."""
    if callable(output):
        return output(out)
    try:
        return out[output] if isinstance(output, int) or isinstance(out, Mapping) else getattr(out, output)
    except (AttributeError, LookupError, TypeError) as error:
        raise TypeError(f"the wrapped model returned {type(out).__name__}, which has no {output!r}") from error
