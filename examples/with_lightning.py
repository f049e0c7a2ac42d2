"""Lightning trains on coupled batches: it saves the loader's state with its checkpoints, and resumes inside an epoch.

Needs lightning (``pip install lightning``). Moons by class, in one go and with a stop; log-likelihood and samples.
"""

import argparse
import tempfile

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

import flows
import mbot

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


class _Flow(lightning.LightningModule):  # of batches that come as pairs
    def __init__(self) -> None:
        super().__init__()
        self.model, self.matching = flows.models.ResidualMLP(2, num_classes=2, width=64), flows.FlowMatching()

    def training_step(self, batch: flows.CoupledBatch) -> torch.Tensor:
        times = torch.Generator(self.device).manual_seed(self.global_step)  # the same in a resumed run
        return flows.regression_loss(self.model, self.matching.along(batch, times))

    def validation_step(self, batch: list[torch.Tensor]) -> None:
        x, y = batch
        self.log("log-likelihood", flows.log_likelihood(self.model, x, y=y).mean())
        samples = flows.integrate(self.model, torch.randn_like(x), y=y).final
        self.log("squared W2", flows.metrics.squared_wasserstein2(samples, x))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.model.parameters(), lr=2e-3)


def train(steps: int, resume: str | None = None) -> tuple[lightning.Trainer, _Flow]:
    lightning.seed_everything(0, verbose=False)
    data, test = (TensorDataset(*flows.datasets.moons(n)) for n in (2560, 500))
    loader = flows.CoupledLoader(data, None, mbot.ConditionalOTCoupling(), batch_size=64, ot_batch_size=640)
    trainer, flow = lightning.Trainer(max_steps=steps, accelerator="cpu", **QUIET), _Flow()
    trainer.fit(flow, loader, DataLoader(test, len(test)), ckpt_path=resume)
    return trainer, flow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    steps = 90 if parser.parse_args().quick else 1500
    whole, flow = train(steps)
    with tempfile.TemporaryDirectory() as folder:
        train(steps // 2 + 3)[0].save_checkpoint(f"{folder}/half.ckpt")
        _, resumed = train(steps, f"{folder}/half.ckpt")
    print({name: round(float(value), 3) for name, value in whole.callback_metrics.items()})
    print("resumed to the same weights:", all(map(torch.equal, flow.parameters(), resumed.parameters())))


if __name__ == "__main__":
    main()
