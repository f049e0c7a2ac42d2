"""accelerate around a plain loop on coupled batches: gradients accumulated, state saved in the middle, and resumed.

Needs accelerate (``pip install accelerate``). The loader draws each process's share by itself, so it is not prepared,
only registered: its position is saved with the model, and accelerate saves the generators that draw times.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import TensorDataset

import flows
import mbot


def train(steps: int, folder: str | None = None, resume: bool = False) -> list[float]:
    """Losses of the steps done; saves into the folder at the end, or goes on from there."""
    set_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    data = TensorDataset(*flows.datasets.moons(2560))
    loader = flows.CoupledLoader(data, None, mbot.ConditionalOTCoupling(), batch_size=64, ot_batch_size=640)
    model = flows.models.ResidualMLP(2, num_classes=2, width=64)
    model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=2e-3))
    accelerator.register_for_checkpointing(loader)
    matching = flows.FlowMatching()
    if resume:
        accelerator.load_state(folder)
    losses = []
    for _ in range(steps):
        with accelerator.accumulate(model):
            batch = loader.next_batch().to(accelerator.device)
            loss = flows.regression_loss(model, matching.along(batch))
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    if folder and not resume:
        accelerator.save_state(folder)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    steps = 90 if parser.parse_args().quick else 1500
    whole = train(steps)
    with tempfile.TemporaryDirectory() as folder:
        half = 2 * (steps // 4) + 2
        parts = train(half, str(Path(folder) / "state")) + train(steps - half, str(Path(folder) / "state"), resume=True)
    tenth = max(1, steps // 10)
    print(f"loss {sum(whole[:tenth]) / tenth:.4f} -> {sum(whole[-tenth:]) / tenth:.4f}")
    print("resumed to the same losses:", whole == parts)


if __name__ == "__main__":
    main()
