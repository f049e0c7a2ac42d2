"""Checks of user input, with their error messages.

Each function returns its input in the form the caller computes with, or raises a ``TypeError`` (wrong kind of object)
or a ``ValueError`` (wrong shape, size or value) that says what was given and what is allowed.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

LARGEST_COST = 1e300  # of float64 costs; float32 has no larger ones


def floating(tensor: Any, name: str) -> Tensor:
    """A real floating-point tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(
            f"{name} must be a floating-point tensor; got {tensor.dtype}. Convert it, for example {name}.float()"
        )
    return tensor


def finite(tensor: Tensor, name: str) -> Tensor:
    """No NaN and no infinity."""
    if math.isfinite(tensor.detach().sum()):  # NaN and infinity spread to a sum, which takes one pass
        return tensor
    good = torch.isfinite(tensor)
    if not bool(good.all()):
        bad = int(tensor.numel() - good.sum())
        raise ValueError(f"{name} must be finite; {bad} of its {tensor.numel()} entries are NaN or infinite")
    return tensor


def together(x: Tensor, y: Tensor, x_name: str, y_name: str) -> None:
    """Two tensors of one dtype on one device."""
    if x.dtype != y.dtype:
        raise TypeError(
            f"{x_name} and {y_name} must have the same dtype; got {x.dtype} and {y.dtype}. Convert one of them"
        )
    if x.device != y.device:
        raise ValueError(
            f"{x_name} and {y_name} must be on the same device; got {x.device} and {y.device}. Move one of them"
        )


def clouds(x: Any, y: Any, x_name: str = "x", y_name: str = "y", *, feature_ndim: int = 1) -> tuple[Tensor, Tensor]:
    """Any number of point clouds ``(…, n, d)`` and ``(…, m, d)``, finite, with at least one point each."""
    x, y = floating(x, x_name), floating(y, y_name)
    together(x, y, x_name, y_name)
    if feature_ndim < 1:
        raise ValueError(f"feature_ndim must be at least 1; got {feature_ndim}")
    for tensor, name in ((x, x_name), (y, y_name)):
        if tensor.ndim < feature_ndim + 1:
            raise ValueError(
                f"{name} must have shape (…, points, features), at least {feature_ndim + 1} axes; got "
                f"{tuple(tensor.shape)}. For scalar points use {name}[:, None]"
            )
    if x.shape[-feature_ndim:] != y.shape[-feature_ndim:]:
        raise ValueError(
            f"{x_name} and {y_name} must have equal features; got {tuple(x.shape[-feature_ndim:])} and "
            f"{tuple(y.shape[-feature_ndim:])} (shapes {tuple(x.shape)} and {tuple(y.shape)})"
        )
    x, y = x.flatten(-feature_ndim), y.flatten(-feature_ndim)
    for tensor, name in ((x, x_name), (y, y_name)):
        if 0 in tensor.shape[-2:]:
            raise ValueError(f"{name} must hold at least one point with one feature; got shape {tuple(tensor.shape)}")
    axes = zip(reversed(x.shape[:-2]), reversed(y.shape[:-2]), strict=False)
    if not all(p == q or p == 1 or q == 1 for p, q in axes):
        raise ValueError(
            f"the batch axes of {x_name} and {y_name} must match; got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    return finite(x, x_name), finite(y, y_name)


def samples(x: Any, y: Any, x_name: str = "x0", y_name: str = "x1") -> tuple[Tensor, Tensor]:
    """Two batches of samples ``(n, d…)``, ``(m, d…)`` (vectors, images, …), flattened to ``(n, d)``, ``(m, d)``."""
    for tensor, name in ((x, x_name), (y, y_name)):
        if isinstance(tensor, Tensor) and tensor.ndim < 2:
            raise ValueError(
                f"{name} must have shape (samples, features…); got {tuple(tensor.shape)}. "
                f"For scalars use {name}[:, None]"
            )
    floating(x, x_name)
    floating(y, y_name)
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(
            f"{x_name} and {y_name} must have equal features; got {tuple(x.shape[1:])} and {tuple(y.shape[1:])} "
            f"(shapes {tuple(x.shape)} and {tuple(y.shape)})"
        )
    for tensor, name in ((x, x_name), (y, y_name)):
        if tensor.numel() == 0:
            raise ValueError(f"{name} must hold at least one sample with one feature; got shape {tuple(tensor.shape)}")
    together(x, y, x_name, y_name)
    return finite(x.flatten(1), x_name), finite(y.flatten(1), y_name)


def cost_matrix(cost: Any) -> Tensor:
    """A batch of cost matrices ``(…, n, m)`` in float32 or better; ``+inf`` marks a forbidden pair."""
    cost = floating(cost, "cost")
    if cost.ndim < 2 or cost.shape[-1] == 0 or cost.shape[-2] == 0:
        raise ValueError(f"cost must have shape (…, n, m) with n, m >= 1; got {tuple(cost.shape)}")
    if cost.numel() == 0:
        return cost
    extremes = cost.detach().aminmax()
    least, most = extremes if cost.device.type == "cpu" else torch.stack(extremes).tolist()  # a device answers once
    cost_range(cost, float(least), float(most))
    return cost.float() if cost.dtype in (torch.float16, torch.bfloat16) else cost


def cost_range(cost: Tensor, least: float, most: float) -> None:
    """Costs in a range that solvers can compute in, given their least and most: no NaN, no -inf, no overflow."""
    if not least > -math.inf:  # NaN if there is one
        raise ValueError("cost must not hold NaN or -inf (+inf is allowed and forbids the pair)")
    if cost.dtype == torch.float64 and max(-least, most) > LARGEST_COST:
        finite_most = cost.detach().nan_to_num(posinf=0).abs().amax() if most == math.inf else max(-least, most)
        if finite_most > LARGEST_COST:  # sums of costs would overflow, and searches for a shortest path never end
            raise ValueError(
                f"cost must be at most {LARGEST_COST:g} in magnitude, +inf apart; its largest is {float(finite_most):g}"
            )


def weights(weight: Any, size: int, like: Tensor, name: str) -> Tensor | None:
    """Point weights ``(…, size)``: non-negative, finite, of positive total; in float64. None means uniform."""
    if weight is None:
        return None
    weight = floating(weight, name)
    if weight.device != like.device:
        raise ValueError(f"{name} must be on the cost's device {like.device}; got {weight.device}")
    if weight.ndim == 0 or weight.shape[-1] != size:
        raise ValueError(f"{name} must have shape (…, {size}), one weight a point; got {tuple(weight.shape)}")
    weight = finite(weight.detach(), name).double()
    if bool((weight < 0).any()):
        raise ValueError(f"{name} must be non-negative; its smallest entry is {float(weight.min()):.4g}")
    if bool((weight.sum(-1) <= 0).any()):
        raise ValueError(f"{name} must have a positive total in every problem")
    try:
        return weight.expand(*like.shape[:-2], size)
    except RuntimeError:
        raise ValueError(
            f"{name} of shape {tuple(weight.shape)} does not fit the cost's batch axes {tuple(like.shape[:-2])}"
        ) from None


def constant_weights(weight: Any, name: str, where: str) -> None:
    """Weights that require no gradients, for methods that have none in the weights."""
    if torch.is_grad_enabled() and isinstance(weight, Tensor) and weight.requires_grad:
        raise ValueError(f"{where} has no gradients in the weights; pass {name}.detach()")


def equal_totals(a: Tensor, b: Tensor) -> Tensor:
    """``b`` rescaled (in float64) to ``a``'s total, after a check that the two totals agree up to float32 rounding."""
    total_a, total_b = a.sum(-1, keepdim=True), b.sum(-1, keepdim=True)
    gap = ((total_a - total_b).abs() / total_a).amax()
    if float(gap) > 1e-4:
        raise ValueError(
            f"a and b must have equal totals (balanced transport); got {float(total_a.flatten()[0]):.6g} and "
            f"{float(total_b.flatten()[0]):.6g}, a relative difference of {float(gap):.2g}. "
            "Normalise them, or use PartialOT or UnbalancedOT"
        )
    return b * (total_a / total_b)


def store(settings: Any, **values: Any) -> None:
    """Replace settings of a frozen dataclass by their checked values: plain numbers compare and pickle well."""
    for name, value in values.items():
        object.__setattr__(settings, name, value)


def _scalar(value: Any) -> Any:
    """The Python object in a NumPy or torch scalar that is a constant; anything else as it is."""
    single = isinstance(value, np.ndarray | np.generic | Tensor) and value.ndim == 0
    return value.item() if single and not getattr(value, "requires_grad", False) else value


def number(value: Any, name: str) -> float:
    """A finite number, as a float; NumPy and torch scalars are numbers, booleans and strings are not."""
    found = _number(value, name)
    if not math.isfinite(found):
        raise ValueError(f"{name} must be a finite number; got {value!r}")
    return found


def _number(value: Any, name: str) -> float:
    scalar = _scalar(value)
    if isinstance(scalar, bool) or not isinstance(scalar, Real):
        raise TypeError(f"{name} must be a number; got {value!r}")
    try:
        return float(scalar)
    except OverflowError:  # an int above 1.8e308
        return math.inf


def positive(value: Any, name: str, *, allow_zero: bool = False) -> float:
    """A finite number above 0 (or at least 0); see `number`."""
    found = _number(value, name)
    if not 0 <= found < math.inf or (found == 0 and not allow_zero):
        raise ValueError(f"{name} must be a finite number {'>=' if allow_zero else '>'} 0; got {value!r}")
    return found


def count(value: Any, name: str, *, at_least: int = 1) -> int:
    """A whole number of at least ``at_least``, as an int; NumPy and torch scalars are numbers, booleans are not."""
    scalar = _scalar(value)
    if isinstance(scalar, bool) or not isinstance(scalar, Integral):
        raise TypeError(f"{name} must be an int; got {value!r}")
    if scalar < at_least:
        raise ValueError(f"{name} must be at least {at_least}; got {value!r}")
    return int(scalar)


def both_sides(value: Any, name: str) -> tuple[int, int]:
    """A count for both sides, or a pair of counts for source and target."""
    if not isinstance(value, tuple):
        return (count(value, name),) * 2
    if len(value) != 2:
        raise ValueError(f"{name} must be one number or a pair (source, target); got {value!r}")
    return count(value[0], f"{name}[0]"), count(value[1], f"{name}[1]")


def flag(value: Any, name: str) -> bool:
    """True or False, of Python, NumPy or torch."""
    scalar = _scalar(value)
    if not isinstance(scalar, bool):
        raise TypeError(f"{name} must be True or False; got {value!r}")
    return scalar


def choice(value: Any, name: str, allowed: tuple[str, ...]) -> str:
    """One of a few words."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
    return str(value)


def instance(value: Any, name: str, kind: type, such_as: str) -> Any:
    """An object of a class, which an error describes by an example."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {such_as}; got {value!r}")
    return value
