"""Modules for batches of single items, as extractors of sets of such items."""

from __future__ import annotations

from typing import Any

from torch import nn

from setenc import checks


class PerElement(nn.Module):
    """Apply a module for batches ``(N, …)`` of single elements to sets ``(B, n, …)`` of them.

    Convolutions, ``nn.Flatten`` and whole image networks expect one batch dimension; sets have two. ``(B, n, …)``
    becomes ``(B n, …)``, and the result ``(B, n, …)`` again.

    >>> cnn = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 8))
    >>> enc = setenc.UMBC(setenc.PerElement(cnn), setenc.SlotPooling(8, 16, 4), None)
    >>> enc(torch.rand(2, 10, 1, 8, 8)).shape
    torch.Size([2, 4, 16])
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = checks.module(module, "module")

    def forward(self, x: Any) -> Any:
        """``(B, n, …)`` to ``(B, n, …)``."""
        return self.module(x.flatten(0, 1)).unflatten(0, x.shape[:2])
