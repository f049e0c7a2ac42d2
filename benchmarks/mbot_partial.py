"""Exact and entropic partial transport against POT's functions, problem by problem."""

import warnings

import numpy as np
import ot
import torch
from harness import medians, write

import mbot

MASS = 0.8
SAMPLE = 16  # problems that POT solves for its entropic figure, which is then scaled up


def clouds(m, d, seed, problems):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(problems, m, d, generator=generator, dtype=torch.float64)
    return x, torch.randn(problems, m, d, generator=generator, dtype=torch.float64) + 1


def exact(m, d):
    k = 16
    x, y = clouds(m, d, m, k)
    cost = mbot.pairwise_cost(x[:, None], y[None])
    weights = np.full(m, 1 / m)
    transport = mbot.PartialOT(MASS)

    def pot():
        return [ot.partial.partial_wasserstein(weights, weights, c, m=MASS) for c in cost.reshape(-1, m, m).numpy()]

    seconds = medians({"POT": pot, "ours": lambda: transport.plan(cost)}, repeats=5)
    theirs = np.array([(p * c).sum() for p, c in zip(pot(), cost.reshape(-1, m, m).numpy(), strict=True)])
    ours = transport.plan(cost).cost(cost).flatten().numpy()
    return {
        "d": d,
        "m": m,
        "POT partial_wasserstein, s": seconds["POT"],
        "PartialOT, s": seconds["ours"],
        "times faster": seconds["POT"] / seconds["ours"],
        "largest relative difference of the values": float(np.abs(ours / theirs - 1).max()),
    }


def entropic(m, d, stop):
    """Equal accuracy: ours stops at the distance to the limit that POT's plans have in the same problems."""
    x, y = clouds(m, d, m, 16)
    cost = mbot.pairwise_cost(x[:, None], y[None])
    cost = (cost / cost.mean((-2, -1), keepdim=True)).flatten(0, 1)
    reg, weights, sample = 0.05, np.full(m, 1 / m), slice(None, None, len(cost) // SAMPLE)

    def pot():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options = {} if stop is None else {"stopThr": stop, "numItermax": 100_000}
            return [
                ot.partial.entropic_partial_wasserstein(weights, weights, c, reg, m=MASS, **options)
                for c in cost[sample].numpy()
            ]

    reference = mbot.PartialOT(MASS, reg=reg, tol=1e-12, max_iter=100_000).plan(cost[sample]).to_dense().numpy()

    def distance(plans):
        return max(float(np.abs(p - r).sum()) for p, r in zip(plans, reference, strict=True))

    error = distance(pot())
    for tol in (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10, 1e-11):
        transport = mbot.PartialOT(MASS, reg=reg, tol=tol, max_iter=100_000)
        ours = distance(transport.plan(cost[sample]).to_dense().numpy())
        if ours <= max(error, 1e-11):
            break
    plan = transport.plan(cost)
    seconds = medians({"POT": pot, "ours": lambda: transport.plan(cost)}, repeats=5)
    theirs = seconds["POT"] * len(cost) / SAMPLE
    return {
        "d": d,
        "m": m,
        "POT stopThr": "default" if stop is None else f"{stop:g}",
        "POT, s": theirs,
        "PartialOT, s": seconds["ours"],
        "times faster": theirs / seconds["ours"],
        "POT: L1 distance to the limit": error,
        "PartialOT: L1 distance": ours,
        "tol": tol,
        "most iterations": int(plan.iterations.max()),
    }


if __name__ == "__main__":
    write(
        "mbot_partial",
        "Partial transport against POT",
        {
            f"Exact, mass {MASS}, k = 16: 256 problems": [exact(m, d) for d in (2, 64) for m in (16, 64, 128)],
            f"Entropic, mass {MASS}, reg 0.05 of the mean cost, k = 16: 256 problems": [
                entropic(m, d, stop) for stop in (None, 1e-9) for d in (2, 64) for m in (16, 64, 128)
            ],
        },
        "float64 costs. Exact: a loop of `partial_wasserstein`. Entropic: POT's `entropic_partial_wasserstein` in "
        "a loop, with its defaults (1000 iterations at most) and with `stopThr=1e-9` and 100,000; `PartialOT` at the "
        "loosest of its tolerances whose plans are at least as close to the limit (`tol=1e-12`) in the worst problem. "
        "POT solves 16 of the 256 problems; its seconds are 16 times that.",
    )
