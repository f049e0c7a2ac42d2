"""Euler at 4, 6 and 8 steps on trained fields: equal steps, Bellman steps (BOSS stage 1), both straightened (stage 2).

Fields: 8 gaussians from a normal, moons given their class, and scikit-learn's digits given their class (an MLP), all
with independent pairs, whose fields bend most. The error is the root mean squared distance, a feature, to the end
points of 1,000 Euler steps from the same noise.
"""

from __future__ import annotations

import copy

import torch
from harness import write
from torch import nn
from torch.utils.data import TensorDataset

import flows
from flows.step_times import jump_costs, path_cost


def trained(dataset, dim: int, classes: int, steps: int) -> nn.Module:
    """A field by plain flow matching."""
    torch.manual_seed(0)
    model = flows.models.ResidualMLP(dim, num_classes=classes)
    loader = flows.CoupledLoader(dataset, None, None, 256)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    flows.Trainer(model, loader, steps=steps, optimizer=optimizer, ema=None, progress=False).fit()
    return model.eval()


def rms(model: nn.Module, x0, y, times, goal) -> float:
    """Error of Euler steps at some times."""
    end = flows.integrate(model, x0, y=y, method="euler", times=times).final
    return float((end - goal).square().mean().sqrt())


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    eight = TensorDataset(flows.datasets.eight_gaussians(20_000, generator=generator))
    moons = TensorDataset(*flows.datasets.moons(20_000, generator=generator))
    digits = flows.datasets.digits()
    fields = {
        "8 gaussians": (eight, (2,), 0, 3000),
        "moons given class": (moons, (2,), 2, 3000),
        "digits given class": (digits, (1, 8, 8), 10, 1500),
    }
    rows = []
    for name, (dataset, shape, classes, steps) in fields.items():
        model = trained(dataset, torch.Size(shape).numel(), classes, steps)
        x0 = torch.randn(1000, *shape, generator=generator)
        y = torch.arange(1000) % classes if classes else None
        goal = flows.integrate(model, x0, y=y, method="euler", steps=1000).final
        fresh = torch.randn(100, *shape, generator=generator)
        given = torch.arange(100) % classes if classes else None
        cost = jump_costs(model, fresh, y=given)
        for count in (4, 6, 8):
            placed = flows.bellman_schedule(model, fresh, steps=count, y=given)
            equal = torch.linspace(0, 1, count + 1)
            row = {
                "field": name,
                "steps": count,
                "objective, equal": path_cost(cost, equal),
                "Bellman": path_cost(cost, placed),
                "error, equal": rms(model, x0, y, equal, goal),
                "error, Bellman": rms(model, x0, y, placed, goal),
            }
            for label, times in (("equal", equal), ("Bellman", placed)):
                tuned = copy.deepcopy(model)
                noise = torch.randn(1024, *shape, generator=generator)
                labels = torch.arange(1024) % classes if classes else None
                flows.straighten(
                    tuned, noise, times, iterations=600, batch_size=64, conditions=labels, lr=5e-4, generator=generator
                )
                row[f"straightened, {label}"] = rms(tuned, x0, y, times, goal)
            row["Bellman times"] = " ".join(f"{t:.2f}" for t in placed[1:-1].tolist())
            rows.append(row)
    write("flows_schedule", "Few Euler steps on trained fields", {"Steps": rows}, __doc__.split("\n", 2)[2])
