"""Float32 products in full precision, and sums that are equal on each run, whatever the settings of the process.

``torch.set_float32_matmul_precision("high")``, which training scripts use for their networks, lets float32 products be
computed with 10 bits (TF32), "medium" on some CPUs with 7. A squared distance ``|x|^2 + |y|^2 - 2 <x, y>`` cancels, and
would keep few of them; a Sinkhorn loop would not meet its tolerance. So the setting is raised while mbot computes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_lock = threading.Lock()
_depth = 0
_restore: Callable[[], None] | None = None  # restores the setting of the process; None if it was not changed


class full_float32:
    """Float32 products in float32 inside, whatever the process allows; the setting comes back at the end.

    The setting belongs to the process: products of other threads, such as a network's during a background coupling,
    are in float32 meanwhile too. Overlapping uses count as one.
    """

    __slots__ = ()

    def __enter__(self) -> None:
        global _depth, _restore
        with _lock:
            if _depth == 0:
                _restore = _raise_precision()
            _depth += 1

    def __exit__(self, *_: object) -> None:
        global _depth
        with _lock:
            _depth -= 1
            if _depth == 0 and _restore is not None:
                _restore()


def _raise_precision() -> Callable[[], None] | None:
    """Set float32 products to full precision. Returns a function that restores the setting, or None if it was set."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # set a backend at a time (torch 2.9 and later), where the one setting has no answer
        return _raise_by_backend()
    if before == "highest":
        return None
    torch.set_float32_matmul_precision("highest")
    return lambda: torch.set_float32_matmul_precision(before)


def _raise_by_backend() -> Callable[[], None]:
    backends: Any = torch.backends
    modules = [backends.cuda.matmul, backends.mkldnn.matmul]
    before = [module.fp32_precision for module in modules]
    inherited = backends.fp32_precision
    for module in modules:
        module.fp32_precision = "ieee"

    def restore() -> None:
        for module, value in zip(modules, before, strict=True):
            module.fp32_precision = "none" if value == inherited else value

    return restore


def no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Autocast switched off inside, on the device of ``x``."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class _Product(torch.autograd.Function):
    """``x @ y`` in full float32, also in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        with full_float32():
            return x @ y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, y = ctx.saved_tensors
        left = product(grad, y.mT).sum_to_size(x.shape) if ctx.needs_input_grad[0] else None
        right = product(x.mT, grad).sum_to_size(y.shape) if ctx.needs_input_grad[1] else None
        return left, right


def product(x: Tensor, y: Tensor) -> Tensor:
    """Matrix product ``(…, n, d) @ (…, d, m)`` in full float32 (or better), forward and backward."""
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad) and _reduced():
        return _Product.apply(x, y)
    with full_float32():
        return x @ y


def _reduced() -> bool:
    """Whether the process allows float32 products in less precision, `full_float32` apart."""
    if _depth:
        return _restore is not None
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:
        return True


def rows_of(x: Tensor, index: Tensor) -> Tensor:
    """``x[index]`` for an index of integers of any shape.

    On the CPU rows are copied whole, which is faster than indexing, that copies number by number.
    """
    if x.device.type != "cpu" or index.ndim == 0 or index.dtype not in (torch.int64, torch.int32):
        return x[index]  # on a device its gradients are sums in a fixed order
    return x.index_select(0, index.flatten()).unflatten(0, index.shape) if index.ndim != 1 else x.index_select(0, index)


def _must_repeat(x: Tensor) -> bool:
    return x.is_cuda and x.is_floating_point() and torch.are_deterministic_algorithms_enabled()


def running_sum(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """``x.cumsum(dim)``, in log n steps where ``torch.use_deterministic_algorithms`` refuses it (floats on CUDA).

    >>> running_sum(torch.tensor([1.0, 2.0, 4.0]), 0)
    tensor([1., 3., 7.])
    """
    if not _must_repeat(x):
        return x.cumsum(dim, dtype=dtype)
    return _doubling(x if dtype is None else x.to(dtype), dim)


def _doubling(x: Tensor, dim: int) -> Tensor:
    """The running sum, by adding the entries 1, 2, 4, … positions before; differentiable, equal on each run."""
    size, reach = x.shape[dim], 1
    while reach < size:
        head, tail = x.narrow(dim, 0, reach), x.narrow(dim, reach, size - reach)
        x = torch.cat((head, tail + x.narrow(dim, 0, size - reach)), dim)
        reach *= 2
    return x


def kth_smallest(x: Tensor, k: int) -> Tensor:
    """The ``k``-th smallest entries of ``(…, n)``, k from 1; ``kthvalue`` is refused on CUDA where runs must repeat."""
    return x.sort().values[..., k - 1] if _must_repeat(x) else x.kthvalue(k).values
