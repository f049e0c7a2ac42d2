"""A CUDA device that is not there, for tests on a machine without one: ``pytest -p tests.pretended_cuda -m gpu``.

Tensors on it say that they are on ``cuda:0`` and keep their numbers on the CPU. What a card would refuse is refused:
operations that mix devices, generators of the other device, ``numpy()``, copies to the CPU that do not wait, and, in
torch's mode that forbids it, waiting for the device. Code that forgot a ``.to(device)`` is found, and so are tests that
could never have passed. Triton kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), or count as not installed.
Times, memory, races and rounding are those of a CPU: a card is still needed for these.

It replaces parts of torch for the whole process, hence a process of its own (`tests/gpu/test_rehearsal.py`).
"""

import contextlib
import importlib.util
import os
import threading
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
_WAITING = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten._unique2.default)
_INDEXING = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
_COPYING = (aten._to_copy.default, aten.copy_.default)
_to = torch.Tensor.to
_Generator = torch.Generator
_sync = {"mode": "default"}
_generators: set[int] = set()  # those of the card, by their address: operations get them as generators of torch's own


def _there(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class Pretended(torch.Tensor):
    """A tensor whose numbers are in ``data_``; to C++ it is on the CPU, to Python on the card."""

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data, requires_grad=False):
        made = torch.Tensor._make_wrapper_subclass(
            cls, data.size(), strides=data.stride(), storage_offset=data.storage_offset(), dtype=data.dtype,
            layout=data.layout, device="cpu", requires_grad=requires_grad,
        )  # fmt: skip
        made.data_ = data
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})

    def to(self, *args, **kwargs):
        device, rest = kwargs.pop("device", None), []
        for argument in args:
            if isinstance(argument, torch.Tensor):
                device, kwargs = argument.device, {"dtype": argument.dtype, **kwargs}
            elif isinstance(argument, str | torch.device):
                device = argument
            elif argument is not None:
                rest.append(argument)
        if device is not None and not _there(device):
            if kwargs.pop("non_blocking", False):
                raise RuntimeError("a copy to the CPU that nobody waits for may be read before it has arrived")
            return self.cpu().to(*rest, **kwargs)
        return _to(self, *rest, **kwargs) if rest or kwargs else self

    def cpu(self, *args, **kwargs):
        return _ToCpu.apply(self)

    def cuda(self, *args, **kwargs):
        return self

    def get_device(self):
        return 0

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def __reduce_ex__(self, protocol):
        return self.data_.__reduce_ex__(protocol)  # as a file that is read on the CPU

    def __repr__(self):
        return f"Pretended({self.data_})"


class _ToCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        _waits("cpu()")
        return x.data_.detach().clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.to(CUDA)


def _waits(what):
    """An operation that waits for the device."""
    if _sync["mode"] == "error":
        raise RuntimeError(f"called a synchronizing CUDA operation: {what}")


def _run(function, args, kwargs):
    """One operation, on the numbers."""
    tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
    target, generator = kwargs.get("device"), kwargs.get("generator")
    given = any(isinstance(t, Pretended) for t in tensors)
    # To C++ a copy between types is one on the CPU; copies between devices go through the methods above.
    ends_there = given if target is None or (given and function is aten._to_copy.default) else _there(target)
    if given:
        _check(function, args, tensors)
    if generator is not None and (generator._cdata in _generators) != ends_there:
        raise RuntimeError(f"Expected a generator of the device of the numbers, and found the other's in {function}")
    numbers = {id(t.data_): t for t in tensors if isinstance(t, Pretended)}
    bare = tree_map(lambda t: t.data_ if isinstance(t, Pretended) else t, (args, kwargs))
    if _there(bare[1].get("device")):
        bare[1]["device"] = torch.device("cpu")
    out = function(*bare[0], **bare[1])

    def wrapped(t):
        if not isinstance(t, torch.Tensor) or isinstance(t, Pretended):
            return t
        return numbers[id(t)] if id(t) in numbers else Pretended(t) if ends_there else t

    return tree_map(wrapped, out)


def _check(function, args, tensors):
    """Refuse what a card refuses."""
    if function in _WAITING or (function is aten.copy_.default and not isinstance(args[0], Pretended)):
        _waits(function)
    if function in _COPYING:
        return
    for t in tensors:
        if isinstance(t, Pretended) or t.dim() == 0 or (function in _INDEXING and t is not args[0]):
            continue
        if torch._C._current_graph_task_id() != -1 and not bool(t.any()):
            continue  # zeros for a gradient that is not there, which autograd makes where it believes the tensor to be
        raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu in {function}")


class _Mode(TorchDispatchMode):
    """Sees the operations without a tensor of the card among their arguments: factories, copies to it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class _Kernel:
    """A Triton kernel, interpreted on the numbers."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            if any(isinstance(t, torch.Tensor) and not isinstance(t, Pretended) for t in args):
                raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
            with _disable_current_modes():
                self.kernel[grid](*[t.data_ if isinstance(t, Pretended) else t for t in args], **kwargs)

        return launch


class _EitherGenerator(type(_Generator)):
    def __instancecheck__(cls, other):
        return isinstance(other, _Generator)


class Generator(_Generator, metaclass=_EitherGenerator):
    """A generator of either device, on the CPU."""

    device = property(lambda self: self.there)

    def __new__(cls, device="cpu"):
        made = _Generator.__new__(cls, "cpu")
        made.there = CUDA if _there(device) else torch.device("cpu")
        (_generators.add if _there(device) else _generators.discard)(made._cdata)
        return made

    def __init__(self, device="cpu"):
        pass


def _cpu_to(self, *args, **kwargs):
    """`Tensor.to` of a tensor on the CPU."""
    if any(isinstance(a, Pretended) for a in args):
        (other,) = args
        args = (CUDA, other.dtype)
    args = [CUDA if isinstance(a, str | torch.device) and _there(a) else a for a in args]
    if _there(kwargs.get("device")):
        kwargs["device"] = CUDA
    return _to(self, *args, **kwargs)


def _maker(original):
    """`torch.tensor` and its like."""

    def make(data, *args, device=None, **kwargs):
        if isinstance(data, Pretended):
            made = data.to(**kwargs) if kwargs else data
        else:
            made = original(data, *args, **kwargs)
        return made if device is None else made.to(device)

    return make


def install():
    """Put the device there, for good."""
    nothing = {"_lazy_init", "synchronize", "reset_peak_memory_stats", "empty_cache"}
    known = {
        "is_available": True, "device_count": 1, "current_device": 0, "memory_allocated": 0, "max_memory_allocated": 0,
        "is_bf16_supported": True, "get_device_name": "a card that is not there",
        "device": contextlib.nullcontext(),
    }  # fmt: skip
    for name, value in {**dict.fromkeys(nothing), **known}.items():
        setattr(torch.cuda, name, lambda *args, value=value, **kwargs: value)
    torch.cuda.get_rng_state = lambda *args: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args: torch.set_rng_state(state)
    torch.cuda.manual_seed = torch.cuda.manual_seed_all = torch.default_generator.manual_seed
    modes = ("default", "warn", "error")
    torch.cuda.set_sync_debug_mode = lambda mode: _sync.update(mode=modes[mode] if isinstance(mode, int) else mode)
    torch.cuda.get_sync_debug_mode = lambda: modes.index(_sync["mode"])
    torch.Generator = Generator
    torch.Tensor.to = _cpu_to
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *args, **kwargs: self.to(CUDA)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    for name in ("tensor", "as_tensor", "asarray"):
        setattr(torch, name, _maker(getattr(torch, name)))
    run = threading.Thread.run

    def run_there(self):
        with _Mode():  # modes belong to a thread
            run(self)

    threading.Thread.run = run_there
    _Mode().__enter__()
    from mbot.kernels import device_matching, device_streaming

    if os.environ.get("TRITON_INTERPRET") != "1":
        device_matching.triton_kernels = device_streaming.triton_kernels = lambda: None
    elif importlib.util.find_spec("triton") is not None:
        from mbot.kernels import triton_matching, triton_streaming

        for module in (triton_matching, triton_streaming):
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                setattr(module, name, _Kernel(getattr(module, name)))


def pytest_configure(config):
    install()
