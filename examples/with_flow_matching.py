"""A training loop of facebookresearch/flow_matching with couplings from this library.

Needs flow_matching (``pip install flow_matching``). Its paths take pairs (x_0, x_1) and have no data coupling of their
own: any coupling goes in front, labels follow by index. Here C²OT on the moons, conditioned on the class.
"""

import argparse

import torch
from flow_matching.path import AffineProbPath
from flow_matching.path.scheduler import CondOTScheduler
from flow_matching.solver import ODESolver

import flows
import mbot


class Velocity(torch.nn.Module):
    """A small network v(x, t, label)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.SELU(), torch.nn.Linear(64, 64),
                                       torch.nn.SELU(), torch.nn.Linear(64, 2))  # fmt: skip

    def forward(self, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Velocities at points x ``(B, 2)``."""
        return self.net(torch.cat((x, t.expand(len(x))[:, None], label[:, None]), 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="60 steps")
    args = parser.parse_args()
    args.steps = 60 if args.quick else args.steps
    torch.manual_seed(args.seed)

    coupling = mbot.ConditionalOTCoupling("discrete")
    path = AffineProbPath(scheduler=CondOTScheduler())
    model = Velocity()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(args.steps):
        x_1, label = flows.datasets.moons(args.batch)
        x_0 = torch.randn(args.batch, 2)
        pairs = coupling(x_0, x_1, y1=label)
        x_0, x_1 = pairs.apply(x_0, x_1)
        label = label[pairs.target].float()
        sample = path.sample(t=torch.rand(len(x_1)), x_0=x_0, x_1=x_1)
        loss = (model(sample.x_t, sample.t, label) - sample.dx_t).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    tenth = max(1, len(losses) // 10)
    print(f"loss {sum(losses[:tenth]) / tenth:.4f} -> {sum(losses[-tenth:]) / tenth:.4f}")

    label = torch.tensor([0.0, 1.0]).repeat(50)
    samples = ODESolver(velocity_model=model).sample(x_init=torch.randn(100, 2), step_size=0.1, label=label)
    print("sample means by class", samples[::2].mean(0).tolist(), samples[1::2].mean(0).tolist())


if __name__ == "__main__":
    main()
