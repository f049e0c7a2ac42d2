"""A small run with everything that has state: noise, dropout, coupling, averaging, schedule."""

import os
import sys

import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import flows
import mbot

STEPS = 24


class Net(nn.Module):
    """A model with dropout, so that torch's default generator matters."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 2))
        self.label = nn.Embedding(4, 16)

    def forward(self, t, x, y=None):
        hidden = self.body[0](torch.cat((x, t[:, None], t[:, None] ** 2), 1)) + self.label(y + 1)
        return self.body[3](self.body[2](self.body[1](hidden)))


def trainer(out=None, *, steps=STEPS, seed=3, loader=None, model=None, **settings):
    """A trainer of the toy; the same for the same arguments."""
    g = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(60, 2, generator=g), torch.randint(0, 3, (60,), generator=g))
    coupling = mbot.ConditionalOTCoupling()
    loader = loader or {}
    if model is None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    settings = {"clip": 1.0, "ema": 0.99, "checkpoint_every": 5 if out else None, "log_every": 2, **settings}
    return flows.Trainer(
        model,
        flows.CoupledLoader(data, None, coupling, **{"batch_size": 5, "ot_batch_size": 15, "seed": seed, **loader}),
        steps=steps,
        path=flows.LinearPath(sigma=0.05),
        optimizer=optimizer,
        scheduler=flows.warmup_schedule(optimizer, warmup=4, steps=2 * STEPS),
        out=out,
        seed=seed,
        condition_dropout=0.1,
        progress=False,
        **settings,
    )


class Fragile(Dataset):
    """Sixty samples, of which the last kills the process that reads it while FRAGILE is set."""

    def __len__(self):
        return 60

    def __getitem__(self, i):
        if i == 59 and os.environ.get("FRAGILE"):
            os._exit(3)
        return torch.full((2,), float(i)), i % 3


def fragile_run(out):
    """A run over `Fragile` in a worker process."""
    run = trainer(out, loader={"num_workers": 1, "shuffle": False, "prefetch": 1}, checkpoint_every=1)
    run.loader.batches.dataset = Fragile()
    return run


def weights(trained):
    """Everything that training changes, in one vector."""
    model = [p.detach().flatten() for p in trained.model.parameters()]
    mean = [p.detach().flatten() for p in trained.sampling_model.parameters()]
    return torch.cat(model + mean)


if __name__ == "__main__":
    fragile_run(sys.argv[1]).fit()
