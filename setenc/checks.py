"""Checks of user input: every error text of the package is written here, once.

Each function returns its input in the form the caller computes with, or raises a ``TypeError`` (wrong kind of object)
or a ``ValueError`` (wrong shape, size or value) that says what was given and what is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def count(value: Any, name: str, *, at_least: int = 1) -> int:
    """A whole number of at least ``at_least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int; got {value!r}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}; got {value}")
    return value


def positive(value: Any, name: str) -> float:
    """A finite positive number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number; got {value!r}")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a finite number > 0; got {value!r}")
    return float(value)


def choice(value: Any, name: str, allowed: tuple[str, ...]) -> str:
    """One of a few words."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
    return str(value)


def heads(dim: int, num_heads: int) -> None:
    """A width that splits evenly into heads."""
    count(dim, "dim")
    count(num_heads, "num_heads")
    if dim % num_heads:
        raise ValueError(f"dim must be a multiple of num_heads; got dim={dim} and num_heads={num_heads}")


def module(value: Any, name: str) -> nn.Module:
    """A torch module; None is the identity."""
    if value is None:
        return nn.Identity()
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be an nn.Module or None; got {type(value).__name__}")
    return value


def elements(x: Any, mask: Any, weights: Any, name: str = "x") -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A batch of sets ``(B, n, …)`` with the mask ``(B, n)`` and the weights ``(B, n)`` of its elements."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor (B, n, …); got {type(x).__name__}")
    if x.ndim < 2:
        raise ValueError(f"{name} must have shape (B, n, …), a batch of sets; got {tuple(x.shape)}. Add x[None]")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a bool tensor, True at real elements; got {given}")
        if mask.shape != x.shape[:2]:
            raise ValueError(f"mask must have shape (B, n) = {tuple(x.shape[:2])}; got {tuple(mask.shape)}")
        mask = mask.to(x.device)
    return x, mask, None if weights is None else element_weights(weights, x, mask)


def batch(x: Any, batch_size: int) -> None:
    """As many sets as the state has streams."""
    sets = x.shape[0] if isinstance(x, Tensor) and x.ndim else len(x)
    if sets != batch_size:
        raise ValueError(f"a chunk must hold one part of each of the state's {batch_size} sets; got {sets}")


def element_weights(weights: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    """Weights ``(B, n)``, finite and not negative at real elements; 0 at padding, whatever stood there."""
    if not isinstance(weights, Tensor) or weights.is_complex():
        raise TypeError(f"weights must be a real tensor (B, n); got {type(weights).__name__}")
    if weights.shape != x.shape[:2]:
        raise ValueError(f"weights must have shape (B, n) = {tuple(x.shape[:2])}; got {tuple(weights.shape)}")
    weights = weights.to(x.device)
    if mask is not None:
        weights = weights.masked_fill(~mask, 0)
    if looks(weights):
        low, high = (float(v) for v in weights.detach().aminmax()) if weights.numel() else (0.0, 0.0)
        if not (low >= 0 and high < float("inf")):
            raise ValueError(f"weights must be finite and not negative; they range from {low:g} to {high:g}")
    return weights


def constant(x: Any, name: str) -> None:
    """The driver's backward passes gradients on to the parameters and to a whole tensor of elements only."""
    if isinstance(x, Tensor) and x.requires_grad:
        raise ValueError(f"{name} must not require gradients in encode. Detach it, or give the whole set as one tensor")


def same_chunks(first: int, second: int) -> None:
    """Both passes over a user's chunks see as many."""
    if first != second:
        raise ValueError(
            f"the chunks must be the same in both passes; the first saw {first}, the second "
            f"{'more' if second > first else second}. The callable must return a fresh iterator each time"
        )


def packed_weights(weights: Any, values: Tensor) -> Tensor:
    """Weights ``(T,)`` of the elements of a ragged batch."""
    if not isinstance(weights, Tensor) or weights.shape != values.shape[:1]:
        given = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"weights of a ragged batch must be packed like its elements, ({len(values)},); got {given}")
    return element_weights(weights[None], values[None], None)[0]


def no_mask(mask: Any) -> None:
    """A ragged batch holds real elements only."""
    if mask is not None:
        raise ValueError("a ragged batch has no padding: leave mask away")


def looks(x: Tensor) -> bool:
    """Whether values may be looked at as they stream: on an accelerator that would wait for the device.

    What is not finite (or a negative weight) there becomes NaN in the state, never goes away, and `finite` finds it.
    """
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def finite_features(features: Tensor, witness: Tensor | None = None) -> Tensor:
    """Features of the real elements without NaN and infinity.

    ``witness`` is what became of them, and is not finite if they are not: it is looked at instead where it is smaller.
    """
    # One pass decides the usual case: a finite sum.
    seen = features if witness is None or witness.numel() > features.numel() else witness
    if looks(features) and not math.isfinite(seen.detach().sum().item()):
        bad = int((~features.detach().isfinite()).sum())
        if bad:
            raise ValueError(
                f"the features of the elements must be finite; {bad} of {features.numel()} entries are NaN or "
                "infinite. Mask padding out (mask: True = real), and look at the input and the extractor"
            )
    return features


def finite(pooled: Tensor) -> Tensor:
    """What is read from a state."""
    if not torch.compiler.is_compiling() and not bool(pooled.detach().isfinite().all()):
        raise ValueError(
            "the pooled slots must be finite; they hold NaN or infinity. An element had features or a weight that are "
            "not finite, or a negative weight, or values overflowed"
        )
    return pooled


def features(x: Any, in_dim: int, sets: Sequence[int] | None = None) -> Tensor:
    """What an extractor made of ``(B, n, …)`` elements: ``(B, n, in_dim)``."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"features must be a floating-point tensor; got {given}. Convert them, or give an extractor")
    shape = x.shape
    if len(shape) != 3 or shape[2] != in_dim or (sets is not None and shape[:2] != sets):
        wanted = ("B, n" if sets is None else ", ".join(map(str, sets))) + f", {in_dim}"
        raise ValueError(
            f"features must have shape (B, n, in_dim) = ({wanted}); got {tuple(shape)}. The extractor maps each "
            "element to in_dim features, and the pooling is built with that in_dim"
        )
    return x


def precision(x: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Input in the parameters' dtype where it comes in half precision; autocast decides for itself."""
    if x.dtype == dtype or not x.is_floating_point() or torch.is_autocast_enabled(x.device.type):
        return x
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"{name} is {x.dtype} and the module is {dtype}: convert one of them")
    return x.to(dtype)


def no_batch_norm(extractor: nn.Module) -> None:
    """Batch normalisation in training mode mixes elements: the result would depend on the chunks."""
    if any(isinstance(module, _BatchNorm) and module.training for module in extractor.modules()):
        raise ValueError(
            "the extractor holds a BatchNorm in training mode, which mixes the elements of a chunk: the encoding would "
            "depend on how the set is cut. Use LayerNorm, GroupNorm or InstanceNorm inside an element, or .eval() it"
        )
