"""Waiting for a coupling: CoupledLoader against coupling inside the training step.

CIFAR-shaped data, training batches of 128, OT batches of 5 × 128, a model that takes 100 ms during which the CPU is
free (as with a GPU; here the step sleeps). The wait is the time that the step spends on getting its batch.
"""

from __future__ import annotations

import time

import torch
from harness import write
from torch.utils.data import TensorDataset

import flows
import mbot

STEPS, BATCH, OT_BATCH, MODEL = 60, 128, 640, 0.1


def wait_of(next_batch) -> float:
    """Mean seconds a step waits, after one OT batch of warm-up."""
    waits = []
    for step in range(STEPS + OT_BATCH // BATCH):
        began = time.perf_counter()
        next_batch()
        waited = time.perf_counter() - began
        if step >= OT_BATCH // BATCH:
            waits.append(waited)
        time.sleep(MODEL)
    return sum(waits) / len(waits)


def inline(data: TensorDataset, coupling: mbot.Coupling, seed: int):
    """The same coupling, solved when a training batch needs it, at the training batch's or the OT batch's size."""
    generator = torch.Generator().manual_seed(seed)
    ready: list[torch.Tensor] = []

    def next_batch() -> torch.Tensor:
        if not ready:
            rows = torch.randint(len(data), (OT_BATCH,), generator=generator)
            x1, y1 = data[rows]
            x0 = torch.randn(x1.shape, generator=generator)
            pairs = coupling(x0, x1, y1=y1, generator=generator)
            ready.extend(torch.stack(pairs.apply(x0, x1), 1).split(BATCH))
        return ready.pop()

    return next_batch


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(12_800, 3, 32, 32, generator=generator), torch.arange(12_800) % 10)
    rows = []
    for name, coupling in (("OT", mbot.OTCoupling()), ("C²OT, 10 classes", mbot.ConditionalOTCoupling())):
        found = {"in the step": wait_of(inline(data, coupling, 0))}
        for workers in (0, 1, 2):
            loader = flows.CoupledLoader(data, None, coupling, BATCH, OT_BATCH, num_workers=workers)
            found["background thread" if not workers else f"{workers} worker processes"] = wait_of(loader.next_batch)
            loader.close()
        for where, seconds in found.items():
            rows.append(
                {
                    "coupling": name,
                    "solved": where,
                    "wait, ms a step": 1000 * seconds,
                    "share of a step": seconds / MODEL,
                }
            )
    notes = f"{__doc__.split(chr(10), 2)[2].strip()} Mean over {STEPS} steps."
    write("flows_loader", "Waiting for the coupling", {"Wait": rows}, notes)
