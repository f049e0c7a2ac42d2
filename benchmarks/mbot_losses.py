"""Grid losses, forward and backward, against the double loop over `ot.emd` that users write today."""

import numpy as np
import ot
import torch
from harness import medians, write

import mbot
from mbot.kernels.assignment import assign

K = 16


def loop(x, y):
    """BoMb-OT as the papers' codes do it: one POT call a pair, copied back, then one for the outer problem."""
    k, m = x.shape[:2]
    weights, outer = np.full(m, 1 / m), np.full(k, 1 / k)
    values = []
    for i in range(k):
        for j in range(k):
            cost = torch.cdist(x[i], y[j]) ** 2
            plan = ot.emd(weights, weights, cost.detach().cpu().numpy().astype(np.float64), numItermax=10_000_000)
            values.append((torch.from_numpy(plan).to(cost) * cost).sum())
    values = torch.stack(values).reshape(k, k)
    gamma = ot.emd(outer, outer, values.detach().cpu().numpy().astype(np.float64))
    return (torch.from_numpy(gamma).to(values) * values).sum()


def step(loss, x, y):
    x.grad = y.grad = None
    value = loss(x, y)
    value.backward()
    return value.detach()


if __name__ == "__main__":
    rows = []
    for d in (2, 64):
        for m in (16, 64, 128):
            generator = torch.Generator().manual_seed(m + d)
            x = torch.randn(K, m, d, generator=generator).requires_grad_()
            y = (torch.randn(K, m, d, generator=generator) + 1).requires_grad_()
            ours = mbot.BoMbOT(mbot.ExactOT(), num_batches=K, batch_size=m)
            grid = mbot.MiniBatchOT(mbot.ExactOT(), num_batches=K, batch_size=m)
            cost = mbot.pairwise_cost(x.detach()[:, None], y.detach()[None]).contiguous().numpy()
            sizes = np.full(K * K, m)
            reference = step(loop, x, y)
            seconds = medians(
                {
                    "loop": lambda x=x, y=y: step(loop, x, y),
                    "BoMb-OT": lambda x=x, y=y, ours=ours: step(ours.from_batches, x, y),
                    "m-OT": lambda x=x, y=y, grid=grid: step(grid.from_batches, x, y),
                    "kernel": lambda cost=cost, sizes=sizes: assign(cost.reshape(-1), sizes),
                    "costs": lambda x=x, y=y: mbot.pairwise_cost(x.detach().flatten(0, 1), y.detach().flatten(0, 1)),
                },
                repeats=5 if m > 16 else 9,
            )
            rows.append(
                {
                    "d": d,
                    "m": m,
                    "loop over ot.emd, s": seconds["loop"],
                    "BoMbOT, s": seconds["BoMb-OT"],
                    "times faster": seconds["loop"] / seconds["BoMb-OT"],
                    "of it: assignment kernel": seconds["kernel"],
                    "of it: costs": seconds["costs"],
                    "MiniBatchOT, s": seconds["m-OT"],
                    "relative difference of the values": float((step(ours.from_batches, x, y) / reference - 1).abs()),
                }
            )
    write(
        "mbot_losses",
        "Grid losses against a double loop over ot.emd",
        {f"k = {K}: {K * K} inner problems, forward and backward": rows},
        "BoMb-OT with squared Euclidean cost, float32 points that need gradients. The loop computes each cost, solves "
        "it with `ot.emd` and copies the plan back. `MiniBatchOT` (m-OT on the grid) solves the same inner problems, "
        "but its backward passes through all of them instead of the k matched ones. Both make one cost matrix at a "
        "time inside the compiled call; the columns *of it* are what assignment and costs take in calls of their own. "
        "Wall seconds; `compare.md` has CPU seconds of one thread, also of the code before.",
    )
