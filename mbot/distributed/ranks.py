"""The ranks of a process group and their collectives: each is a call that all ranks make together.

Collectives run where the group's backend does: NCCL's on the current CUDA device, all others' on the CPU.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class Ranks:
    """A process group of ``torch.distributed``.

    A collective that a rank does not join, because it died or hangs, ends with an error on the others after the
    group's timeout (``timeout=`` of ``init_process_group`` and ``new_group``); with gloo at once if it died.

    Args:
        group: the group, or None for the default one.

    Raises:
        ValueError: ``torch.distributed`` is not initialised, or this process is not in the group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError("this needs torch.distributed: call torch.distributed.init_process_group first")
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("this process is not in the group")
        nccl = dist.get_backend(group) == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
        self.root = 0 if group is None else dist.get_global_rank(group, 0)

    def from_all(self, local: Callable[[], Any]) -> list[Any]:
        """The results of ``local`` on each rank; an error on one is raised on all."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, _outcome(local), self.group)
        return [_result(outcome, rank) for rank, outcome in enumerate(found)]

    def from_first(self, local: Callable[[], Any]) -> Any:
        """The result of ``local`` on rank 0, the only rank that calls it; its error is raised on all."""
        box: list[Any] = [_outcome(local) if self.rank == 0 else None]
        dist.broadcast_object_list(box, self.root, self.group)
        return _result(box[0], 0)

    def gather(self, values: Tensor, sizes: Sequence[int]) -> Tensor:
        """Rows of all ranks ``(sum of sizes, …)`` on every rank, from this rank's ``(sizes[rank], …)``."""
        mine = self._packed(values, sizes)
        parts = [torch.empty_like(mine) for _ in sizes]
        dist.all_gather(parts, mine, self.group)
        return _unpacked(parts, sizes, values)

    def gather_first(self, values: Tensor, sizes: Sequence[int]) -> Tensor | None:
        """`gather` to rank 0; None elsewhere."""
        mine = self._packed(values, sizes)
        parts = [torch.empty_like(mine) for _ in sizes] if self.rank == 0 else None
        dist.gather(mine, parts, self.root, self.group)
        return None if parts is None else _unpacked(parts, sizes, values)

    def exchange(self, values: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Send ``send[q]`` consecutive rows to each rank q. Returns ``receive[p]`` rows of each p, in order."""
        mine = _bytes(values).to(self.device)
        theirs = mine.new_empty((sum(receive), mine.shape[1]))
        dist.all_to_all_single(theirs, mine, list(receive), list(send), self.group)
        return _unpacked([theirs], [len(theirs)], values)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def broadcast(self, values: Tensor) -> Tensor:
        """Rank 0's values."""
        box = values.detach().to(self.device, copy=True).contiguous()
        dist.broadcast(box, self.root, self.group)
        return box.to(values.device)

    def max(self, values: Tensor) -> Tensor:
        """Largest over the ranks."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Tensor, how: Any) -> Tensor:
        exact = torch.float32 if values.is_floating_point() and values.dtype.itemsize < 4 else values.dtype
        total = values.detach().to(self.device, exact, copy=True).contiguous()
        dist.all_reduce(total, how, self.group)
        return total.to(values.device, values.dtype)

    def _packed(self, values: Tensor, sizes: Sequence[int]) -> Tensor:
        """Rows as bytes, filled up to the largest number of rows: collectives want equal shapes and few dtypes."""
        mine = _bytes(values).to(self.device)
        return torch.nn.functional.pad(mine, (0, 0, 0, max(sizes) - len(mine)))


def _bytes(values: Tensor) -> Tensor:
    rows = values.detach().reshape(len(values), -1 if values.numel() else values.shape[1:].numel()).contiguous()
    return rows.view(torch.uint8)


def _unpacked(parts: Sequence[Tensor], sizes: Sequence[int], like: Tensor) -> Tensor:
    rows = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
    return rows.view(like.dtype).reshape(-1, *like.shape[1:]).to(like.device)


def _outcome(local: Callable[[], Any]) -> tuple[Exception | None, Any]:
    """The result or error of a function, in a form that can be sent."""
    try:
        return None, local()
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return RuntimeError(f"{type(error).__name__}: {error}"), None
        return error, None


def _result(outcome: tuple[Exception | None, Any], rank: int) -> Any:
    error, value = outcome
    if error is not None:
        error.add_note(f"(raised on rank {rank}, and so on all)")
        raise error
    return value


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: Ranks, sizes: list[int]) -> Tensor:
        ctx.ranks, ctx.sizes = ranks, sizes
        return ranks.gather(values, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.ranks.sum(grad).split(ctx.sizes)[ctx.ranks.rank], None, None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.sum(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.sum(grad), None


def gathered(values: Tensor, ranks: Ranks, sizes: list[int]) -> Tensor:
    """`Ranks.gather` with gradients: backward adds those of all ranks, and must run on all or none of them."""
    return _Gathered.apply(values, ranks, sizes)


def summed(values: Tensor, ranks: Ranks) -> Tensor:
    """`Ranks.sum` with gradients: backward adds those of all ranks, and must run on all or none of them."""
    return _Summed.apply(values, ranks)
