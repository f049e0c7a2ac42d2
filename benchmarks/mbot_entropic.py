"""Entropic transport of a batch against POT's ot.batch and geomloss, at equal marginal error."""

import sys
import time
import warnings

import geomloss
import ot
import torch
from harness import medians, write

import mbot


def marginal_error(plan):
    n, m = plan.shape[-2:]
    rows = (plan.sum(-1) - 1 / n).abs().sum(-1)
    return float((rows + (plan.sum(-2) - 1 / m).abs().sum(-1)).max())


def row(problems, n, d, share, dtype=torch.float64):
    generator = torch.Generator().manual_seed(n + d)
    x = torch.randn(problems, n, d, generator=generator, dtype=dtype)
    y = torch.randn(problems, n, d, generator=generator, dtype=dtype) + 1
    cost = mbot.pairwise_cost(x, y)
    reg = share * float(cost.mean())
    tolerance = 1e-6 if dtype == torch.float64 else 1e-4
    transport = mbot.EntropicOT(reg, tol=tolerance, max_iter=100_000)

    def pot(method, max_iter):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ot.batch.solve_batch(cost, reg=reg, max_iter=max_iter, tol=0.0, method=method, grad="detach").plan

    # POT's tolerance is another one: find the number of iterations that reaches our marginal error.
    ours = marginal_error(transport.plan(cost).to_dense())
    wanted = 2 * max(ours, tolerance)  # a peer counts where it gets within a factor of 2
    max_iter = 20
    while marginal_error(pot("log_sinkhorn", max_iter)) > wanted and max_iter < 1_000:
        max_iter = int(max_iter * 1.5)
    errors = {method: marginal_error(pot(method, max_iter)) for method in ("log_sinkhorn", "sinkhorn")}
    blur = (reg / 2) ** 0.5  # geomloss: cost |x-y|^2 / 2, eps = blur^2

    def geom(scaling):
        loss = geomloss.SamplesLoss(
            "sinkhorn", p=2, blur=blur, scaling=scaling, debias=False, potentials=True, backend="tensorized"
        )
        f, g = loss(x, y)
        return torch.exp((f[:, :, None] + g[:, None] - cost / 2) / blur**2) / n**2

    for scaling in (0.5, 0.7, 0.9, 0.95):
        errors["geomloss"] = marginal_error(geom(scaling))
        if errors["geomloss"] <= wanted:
            break
    candidates = {
        "log_sinkhorn": lambda: pot("log_sinkhorn", max_iter),
        "sinkhorn": lambda: pot("sinkhorn", max_iter),
        "geomloss": lambda: geom(scaling),
        "ours": lambda: transport.plan(cost).to_dense(),
    }
    seconds = medians(candidates, repeats=5, clock=time.process_time)
    print(problems, n, d, share, seconds, errors, ours, file=sys.stderr, flush=True)
    best = min((seconds[name] for name, error in errors.items() if error <= wanted), default=float("nan"))
    return {
        "problems": problems,
        "n": n,
        "d": d,
        "reg / mean cost": share,
        "dtype": str(dtype).removeprefix("torch."),
        "iterations": max_iter,
        "POT log_sinkhorn, s": seconds["log_sinkhorn"],
        "its error": errors["log_sinkhorn"],
        "POT sinkhorn, s": seconds["sinkhorn"],
        "error of this": errors["sinkhorn"],
        "scaling": scaling,
        "geomloss, s": seconds["geomloss"],
        "geomloss error": errors["geomloss"],
        "EntropicOT, s": seconds["ours"],
        "our error": ours,
        "best peer / EntropicOT": best / seconds["ours"],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    sizes = [(256, 16), (64, 64), (32, 128), (16, 256), (1, 1024)]
    rows = [row(b, n, d, 0.1) for d in (2, 64) for b, n in sizes]
    rows += [row(64, 64, 2, 0.01), *(row(b, n, 64, 0.01) for b, n in sizes)]
    rows += [row(b, n, 64, 0.05, torch.float32) for b, n in sizes]
    write(
        "mbot_entropic",
        "Entropic transport against POT's ot.batch and geomloss",
        {"Processor seconds (one thread) until the plans' marginals are right to the error given": rows},
        "The marginal error is the L1 error of both marginals, the worst problem counted. `EntropicOT` stops at "
        "`tol=1e-6` (float32: 1e-4); POT's `solve_batch` gets the number of iterations and geomloss the annealing "
        "`scaling` that reach the same error where they do (20 to 1135 iterations, scaling 0.95): a peer that "
        "does not is timed at that cap but left out of the last column (nan: none got there). All return dense "
        "plans. At reg 0.01 and d = 2 no peer got there within 3,000 iterations in the sizes "
        "tried either: one size is kept.",
    )
