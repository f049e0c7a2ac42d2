"""Models on several processes: wrapped in DistributedDataParallel, or sharded already by FSDP2's ``fully_shard``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters of a model are spread over processes."""
    return any(hasattr(p, "full_tensor") for p in model.parameters())


def check_sharded(model: nn.Module, ema: float | None, preview: Any) -> None:
    """Refuse what needs a whole model on one process, where it is sharded."""
    if not is_sharded(model):
        return
    if ema is not None:
        raise ValueError("ema needs a copy of the model, which torch refuses of sharded modules: give ema=None")
    if preview is not None:
        raise ValueError("preview runs on one process, and a sharded model on all: leave preview out")


def parallel(model: nn.Module, device: torch.device, world: int) -> nn.Module:
    """The model to call, whose gradients are averaged over the processes; a sharded one is that already."""
    if world == 1 or is_sharded(model):
        return model
    return nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def whole(x: Tensor) -> Tensor:
    """A tensor that may be spread over processes, on each of them; a collective where it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def states(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """State dicts of whole tensors; of sharded models by a collective, and on rank 0 only."""
    if not is_sharded(model):
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True))


def load_states(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Take over what `states` gave, on every process."""
    if not is_sharded(model):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"],
        options=StateDictOptions(full_state_dict=True),
    )  # fmt: skip
