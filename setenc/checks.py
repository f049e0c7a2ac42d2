"""Checks of user input, with their error messages.

Each function returns its input in the form the caller computes with, or raises a ``TypeError`` (wrong kind of object)
or a ``ValueError`` (wrong shape, size or value) that says what was given and what is allowed.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from setenc.state import SetState


def count(value: Any, name: str, *, at_least: int = 1) -> int:
    """A whole number of at least ``at_least``; an integer of numpy or torch is one too."""
    if torch.compiler.is_compiling():
        return value  # a symbol of a traced graph: it has no value yet
    try:
        if _is_bool(value):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int; got {value!r}") from None
    if number < at_least:
        raise ValueError(f"{name} must be at least {at_least}; got {number}")
    return number


def positive(value: Any, name: str) -> float:
    """A finite positive number; a scalar of numpy or torch is one too."""
    if isinstance(value, Tensor) and value.ndim == 0:
        value = value.item()
    if _is_bool(value) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number; got {value!r}")
    number = float(value)
    if not 0 < number < float("inf"):
        raise ValueError(f"{name} must be a finite number > 0; got {value!r}")
    return number


def flag(value: Any, name: str) -> bool:
    """True or False, also numpy's."""
    if not _is_bool(value):
        raise TypeError(f"{name} must be True or False; got {value!r}")
    return bool(value)


def _is_bool(value: Any) -> bool:
    """Whether ``value`` is a bool of Python, numpy or torch, which does not count as a number."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def choice(value: Any, name: str, allowed: tuple[str, ...]) -> str:
    """One of a few words."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
    return value


def heads(dim: Any, num_heads: Any) -> tuple[int, int]:
    """A width that splits evenly into heads, and their number."""
    dim, num_heads = count(dim, "dim"), count(num_heads, "num_heads")
    if dim % num_heads:
        raise ValueError(f"dim must be a multiple of num_heads; got dim={dim} and num_heads={num_heads}")
    return dim, num_heads


def module(value: Any, name: str) -> nn.Module:
    """A torch module; None is the identity."""
    if value is None:
        return nn.Identity()
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be an nn.Module or None; got {type(value).__name__}")
    return value


def as_tensor(x: Any) -> Any:
    """NumPy's arrays as tensors, copied where torch would warn that they are read-only (a memory map)."""
    if isinstance(x, Tensor) or not hasattr(x, "__array_interface__"):
        return x
    return torch.as_tensor(x if x.flags.writeable else x.copy())


def elements(x: Any, mask: Any, weights: Any, name: str = "x") -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A batch of sets ``(B, n, …)`` with the mask ``(B, n)`` and the weights ``(B, n)`` of its elements, or arrays.

    Elements of weight 0 are masked: like padding they may hold anything.
    """
    x, mask, weights = as_tensor(x), as_tensor(mask), as_tensor(weights)
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
    if weights is not None:
        weights, positive = element_weights(weights, x, mask)
        if not positive:
            # Where values are not checked, negative weights and NaN stay and make the state NaN.
            mask = weights.detach() != 0 if mask is None else mask & (weights.detach() != 0)
    return x, mask, weights


def generator(value: Any) -> torch.Generator | None:
    """A generator of random numbers, or None for torch's default."""
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None; got {value!r}")
    return value


def columns(value: Any, in_dim: int) -> list[int]:
    """A choice among ``in_dim`` features: None is all, else a slice, or indices or a mask of them."""
    if value is None or isinstance(value, slice):
        chosen = list(range(in_dim))[slice(None) if value is None else value]
    else:
        try:
            chosen = torch.arange(in_dim)[value if isinstance(value, Tensor) else torch.as_tensor(value)].tolist()
        except (IndexError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"columns must be a slice or indices below {in_dim}, the features; got {value!r}"
            ) from error
    if not isinstance(chosen, list) or not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"columns must name at least one of the {in_dim} features, each once; got {value!r}")
    return chosen


def batch(x: Any, batch_size: int) -> None:
    """As many sets as the state has streams."""
    if not hasattr(x, "__len__"):
        raise TypeError(f"a chunk must be a torch.Tensor (B, n, …) or a ragged batch; got {type(x).__name__}")
    sets = x.shape[0] if isinstance(x, Tensor) and x.ndim else len(x)
    if sets != batch_size:
        given = f", of shape {tuple(x.shape)}. The first axis counts sets: (B, n, …)" if isinstance(x, Tensor) else ""
        raise ValueError(f"a chunk must hold one part of each of the state's {batch_size} sets; got {sets}{given}")


def element_weights(weights: Any, x: Tensor, mask: Tensor | None) -> tuple[Tensor, bool]:
    """Weights ``(B, n)``, finite and not negative, 0 at padding; and whether all are known to be positive."""
    if not isinstance(weights, Tensor) or weights.is_complex():
        raise TypeError(f"weights must be a real tensor (B, n); got {type(weights).__name__}")
    if weights.shape != x.shape[:2]:
        raise ValueError(f"weights must have shape (B, n) = {tuple(x.shape[:2])}; got {tuple(weights.shape)}")
    weights = weights.to(x.device)
    if weights.requires_grad and torch.is_grad_enabled():
        zero = weights.detach() == 0
        if bool((zero if mask is None else zero & mask).any()):
            raise ValueError(
                "weights that require gradients must be > 0 at real elements: an element of weight 0 is left out, and "
                "has no derivative here. Mask it out, or detach the weights"
            )
    if mask is not None:
        weights = weights.masked_fill(~mask, 0)
    if not may_look(weights):
        return weights, False
    low, high = (float(v) for v in weights.detach().aminmax()) if weights.numel() else (0.0, 0.0)
    if not (low >= 0 and high < float("inf")):
        raise ValueError(f"weights must be finite and not negative; they range from {low:g} to {high:g}")
    return weights, low > 0


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


def same_counts(first: Tensor, second: Tensor) -> None:
    """Every pass of a pooling over a user's chunks sees as many elements, or the same sum of weights."""
    if second is not first and not torch.allclose(first, second, rtol=1e-9, atol=0):
        raise ValueError(
            f"every pass over the chunks must see the same elements; the first saw {first.tolist()[:8]} of each set, a "
            f"later one {second.tolist()[:8]}. The callable must return a fresh iterator over all of them each time"
        )


def same_state(first: SetState, second: SetState, sizes: Sequence[Tensor], dtype: torch.dtype, what: str) -> None:
    """Both passes over the same elements give the same state, up to rounding in the extractor's ``dtype``.

    ``sizes`` ``(B, H, K)`` of each part are what rounding is relative to: features, times the mass of sums.
    """
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 1e-2)
    close = True
    for a, b, size in zip(first.parts, second.parts, sizes, strict=True):
        if a.selects:
            gap = torch.where(a.peak == b.peak, 0, (a.peak - b.peak).abs())
            near = (gap <= tolerance * (size + a.peak.abs())).all() & (a.count - b.count <= tolerance * a.count).all()
            near = near & (b.count - a.count <= tolerance * a.count).all()
        else:
            # Masses are in units of the whole set's peak, so that a sum of 1 at least loses what is below its eps: far
            # below, exponentials of the same logits are subnormal numbers with few digits, or zero.
            mass = a.mass + torch.finfo(a.mass.dtype).eps
            near = ((a.mass - b.mass).abs_() <= tolerance * mass).all()
            limit = (a.total.abs() + size[..., None]).mul_(tolerance)
            near = near & ((a.total - b.total).abs_() <= limit).all()
        close = close and bool(near)
    if not close:
        raise ValueError(
            f"the second pass of encode must see what the first one saw; the state of {what} differs. Either the "
            "chunks differ (the callable must return the same data each time: no shuffling, no fresh augmentation), "
            "or the extractor does (it must be the same function of an element in both passes; random numbers must "
            "come from torch's default generator)"
        )


def packed_weights(weights: Any, values: Tensor) -> Tensor:
    """Weights ``(T,)`` of the elements of a ragged batch."""
    weights = as_tensor(weights)
    if not isinstance(weights, Tensor) or weights.shape != values.shape[:1]:
        given = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"weights of a ragged batch must be packed like its elements, ({len(values)},); got {given}")
    return element_weights(weights[None], values[None], None)[0][0]


def no_mask(mask: Any) -> None:
    """A ragged batch holds real elements only."""
    if mask is not None:
        raise ValueError("a ragged batch has no padding: leave mask away")


def may_look(x: Tensor) -> bool:
    """Whether values are checked as they stream. On an accelerator a check would wait for the device.

    Values that are not finite, and negative weights, then become NaN in the state; `finite` finds it at the read-out.
    """
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def finite_features(features: Tensor, witness: Tensor | None = None) -> Tensor:
    """Features of the real elements without NaN and infinity.

    ``witness`` is computed from them and is not finite if they are not; where it is smaller, it is checked instead.
    """
    if not may_look(features):
        return features
    # One pass decides the usual case: a finite sum.
    seen = features if witness is None or witness.numel() > features.numel() else witness
    if not math.isfinite(seen.detach().sum().item()):
        bad = int((~features.detach().isfinite()).sum())
        if bad:
            raise ValueError(
                f"the features of the elements must be finite; {bad} of {features.numel()} entries are NaN or "
                "infinite. Mask padding out (mask: True = real), and look at the input and the extractor"
            )
    return features


def finite_targets(targets: Tensor) -> Tensor:
    """Targets of a query without NaN and infinity, of which an attention kernel may make zeros."""
    if may_look(targets) and not bool(targets.detach().isfinite().all()):
        raise ValueError("targets must be finite; they hold NaN or infinity")
    return targets


def finite(pooled: Tensor) -> Tensor:
    """The read-out of a state, in the dtype of the result, which must be finite."""
    if not torch.compiler.is_compiling() and not bool(pooled.detach().isfinite().all()):
        raise ValueError(
            "the pooled slots must be finite; they hold NaN or infinity. An element had features or a weight that are "
            "not finite, or a negative weight, or values overflowed"
        )
    return pooled


def features(x: Any, in_dim: int, sets: Sequence[int] | None = None) -> Tensor:
    """Features ``(B, n, in_dim)`` that an extractor made of ``(B, n, …)`` elements."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"features must be a floating-point tensor; got {given}. Convert them, or give an extractor")
    shape = x.shape
    if len(shape) != 3 or shape[2] != in_dim or (sets is not None and shape[:2] != sets):
        wanted = ("B, n" if sets is None else ", ".join(map(str, sets))) + f", {in_dim}"
        raise ValueError(
            f"features must have shape (B, n, in_dim) = ({wanted}); got {tuple(shape)}. The extractor maps each "
            "element to in_dim features, and the pooling is built with that in_dim. A module for batches (N, …) of "
            "single elements, such as an image network, goes into setenc.PerElement"
        )
    return x


def slots(x: Any, like: Tensor, name: str = "slots", number: int | None = None) -> Tensor:
    """Slots ``(B, K, dim)``, ``number`` of them, for a module whose weight ``(…, dim)`` is given, in its dtype."""
    x = as_tensor(x)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor; got {getattr(x, 'dtype', type(x).__name__)}")
    if x.ndim != 3 or x.shape[2] != like.shape[-1] or x.shape[1] != (number or x.shape[1]):
        wanted = f"(B, {number or 'K'}, {like.shape[-1]})"
        raise ValueError(f"{name} must have shape (B, K, dim) = {wanted}; got {tuple(x.shape)}")
    return precision(x, like.dtype, name)


def binary_labels(labels: Any, logits: Tensor) -> Tensor:
    """Labels of as many ``logits``, 0 and 1 or probabilities between them, in their dtype; bools and arrays too."""
    labels = as_tensor(labels)
    if not isinstance(labels, Tensor) or labels.is_complex():
        raise TypeError(f"labels must be a real tensor; got {type(labels).__name__}")
    if labels.shape != logits.shape:
        raise ValueError(f"labels must have the shape of the logits, {tuple(logits.shape)}; got {tuple(labels.shape)}")
    labels = labels.to(logits)
    if may_look(labels) and not bool(((labels >= 0) & (labels <= 1)).all()):
        raise ValueError(f"labels must lie in [0, 1]; got {labels.flatten().tolist()[:8]}")
    return labels


def stream_part(value: Any, name: str) -> Any:
    """The mask or the weights ``(B, N)`` of a stream, of which each chunk takes its columns; None stays."""
    value = as_tensor(value)
    if value is not None and (not isinstance(value, Tensor) or value.ndim != 2):
        given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} of a stream must be a tensor (B, N) for all its elements; got {given}")
    return value


def stream_length(value: Tensor | None, length: int, name: str) -> None:
    """A stream has as many elements as its mask or its weights say."""
    if value is not None and value.shape[1] != length:
        raise ValueError(f"{name} must be for the {length} elements of the stream; got {tuple(value.shape)}")


def precision(x: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Input in the parameters' dtype where it comes in half precision; autocast decides for itself."""
    if x.dtype == dtype or not x.is_floating_point() or torch.is_autocast_enabled(x.device.type):
        return x
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"{name} is {x.dtype} and the module is {dtype}: convert one of them")
    return x.to(dtype)


def no_batch_norm(extractor: nn.Module) -> None:
    """Batch normalisation by the statistics of a chunk mixes its elements; by running statistics it does not."""
    for module in extractor.modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            name = next(name for name, each in extractor.named_modules() if each is module)
            why = "is in training mode" if module.training else "keeps no running statistics"
            raise ValueError(
                f"the BatchNorm {name or 'extractor'!r} {why}, and so mixes the elements of a chunk: the encoding "
                "would depend on how the set is cut. Call .eval() on it after the model's .train() (it then uses its "
                "running statistics), or use LayerNorm, or GroupNorm inside an element"
            )
