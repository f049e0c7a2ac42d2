"""Which coupling for how many points: cost of the pairs, seconds, what becomes of the noise."""

import dataclasses
import json
import sys
import time
import warnings

import torch
from harness import RESULTS, write

import flows
import mbot

D = 64
CLASSES = 20
SIZES = (1024, 4096, 16_384, 65_536)
PICTURE = RESULTS.parents[1] / "docs/images/couplings_choice.png"


def clouds(n, d=D, seed=0):
    """Normal noise; a mixture of 20 normals, centred and of variance 1 a coordinate on average; its classes."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(CLASSES, d, generator=generator) / d**0.25
    y = torch.randint(0, CLASSES, (n,), generator=generator)
    x1 = centres[y] + 0.5 * torch.randn(n, d, generator=generator)
    x1 = x1 - x1.mean(0)
    return torch.randn(n, d, generator=generator), x1 / x1.square().mean().sqrt(), y


def timed(call):
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mbot.ConvergenceWarning)
        found = call()
    return time.process_time() - start, found


def in_batches(coupling, size):
    """Pairs of consecutive batches; `sources_per_target` noises a point."""

    def pairs(x0, x1, y):
        times, parts = coupling.sources_per_target or 1, []
        for begin in range(0, len(x1), size):
            rows = slice(begin, begin + size)
            noise = x0[times * begin : times * (begin + size)]
            pairs = coupling(noise, x1[rows], y1=None if coupling.ignores_conditions else y[rows])
            parts.append((noise[pairs.source], x1[rows][pairs.target], y[rows][pairs.target]))
        return [torch.cat(part) for part in zip(*parts, strict=True)]

    def call(x0, x1, y):
        spent, found = timed(lambda: pairs(x0, x1, y))
        return 0.0, spent, *found

    return call


FITTED = {}


def fitted(x1, **settings):
    """Seconds of the fit of a semidiscrete coupling, and the coupling; learned once."""
    key = (*x1.shape, *settings.items())
    if key not in FITTED:
        seed = torch.Generator().manual_seed(1)
        FITTED[key] = timed(lambda: mbot.SemidiscreteCoupling(**settings).fit(x1, generator=seed))
    return FITTED[key]


def semidiscrete(balanced):
    def call(x0, x1, y):
        once, coupling = fitted(x1, steps=1000)
        spent, pairs = timed(lambda: dataclasses.replace(coupling, balanced=balanced)(x0, x1))
        return once, spent, x0[pairs.source], x1[pairs.target], y[pairs.target]

    return call


def whole(by_class):
    def call(x0, x1, y):
        labels = None
        if by_class:  # the noise takes the classes of random points
            labels = (y[torch.randperm(len(y), generator=torch.Generator().manual_seed(1))], y)
        once, found = timed(
            lambda: mbot.match_clouds(x0, x1, labels=labels, generator=torch.Generator().manual_seed(1))
        )
        return once, 0.0, x0[found.source], x1, y

    return call


# name -> (what it does, largest n)
METHODS = {
    "independent": (in_batches(mbot.IndependentCoupling(), 1024), 1 << 20),
    **{f"OT, batches of {b}": (in_batches(mbot.OTCoupling(), b), 1 << 20) for b in (128, 512, 1024, 4096)},
    "OT within classes, batches of 1024": (in_batches(mbot.ConditionalOTCoupling(), 1024), 1 << 20),
    "BoMb, batches of 512": (
        lambda x0, x1, y: in_batches(mbot.BoMbCoupling(num_batches=max(2, len(x1) // 512)), len(x1))(x0, x1, y),
        16_384,
    ),
    "Sinkhorn, reg 0.1, all": (
        lambda x0, x1, y: in_batches(mbot.SinkhornCoupling(0.1), len(x1))(x0, x1, y), 16_384,
    ),
    "semidiscrete": (semidiscrete(False), 4096),
    "semidiscrete, balanced": (semidiscrete(True), 4096),
    "nearest of 4": (in_batches(mbot.NearestNoiseCoupling(4), 1024), 1 << 20),
    "nearest of 16": (in_batches(mbot.NearestNoiseCoupling(16), 1024), 1 << 20),
    "whole data": (whole(False), 1 << 20),
    "whole data, within classes": (whole(True), 1 << 20),
}  # fmt: skip


def skew(x0, y, pairs):
    """Accuracy above chance of the class, predicted from paired noise."""
    found = flows.metrics.prior_skew(x0[:pairs], y[:pairs], generator=torch.Generator().manual_seed(0))
    return found.score - found.chance


def over_sizes():
    rows = []
    for pair, _ in METHODS.values():  # whatever is compiled or loaded at first use
        pair(*clouds(512))
    whole(False)(*clouds(8192))
    for n in SIZES:
        x0, x1, y = clouds(n)
        independent = float(x0.double().square().sum(1).mean() + x1.double().square().sum(1).mean())
        for name, (pair, largest) in METHODS.items():
            if n > largest or (name.endswith("4096") and n < 4096):
                continue
            times = int(name.rpartition(" ")[2]) if name.startswith("nearest") else 1
            noise = x0 if times == 1 else torch.randn(times * n, D, generator=torch.Generator().manual_seed(2))
            once, spent, start, end, labels = pair(noise, x1, y)
            cost = float((start.double() - end).square().sum(1).mean())
            rows.append({
                "n": n, "coupling": name, "once, s": once or "-", "an epoch, s": spent,
                "cost / independent": cost / independent, "prior skew": round(skew(start, labels, 2000), 3),
                "noise² / d": float(start.double().square().mean()),
            })  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def nearest():
    rows, n = [], 8192
    for d in (2, 16, 64, 256):
        _, x1, y = clouds(n, d)
        axis = torch.linalg.eigh(x1.T.double() @ x1.double()).eigenvectors[:, -1].float()
        for k in (1, 2, 4, 16, 64):
            x0 = torch.randn(k * n, d, generator=torch.Generator().manual_seed(k))
            start = x0[mbot.NearestNoiseCoupling(k)(x0, x1).source]
            rows.append({
                "d": d, "k": k,
                "cost / independent": float((start.double() - x1).square().sum(1).mean() / (2 * d)),
                "noise² / d": float(start.double().square().mean()),
                "along x1": float((start * x1 / x1.norm(dim=1, keepdim=True)).sum(1).mean()),
                "variance, leading direction": float((start @ axis).var()),
                "prior skew": round(skew(start, y, 4000), 3),
            })  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def falling_regularisation():
    rows, n = [], 4096
    for d in (2, 64):
        x0, x1, _ = clouds(n, d)
        exact = mbot.OTCoupling()(x0, x1).info["transport_cost"]
        for steps, reg in ((300, 0.0), (300, 0.3)):
            seconds, coupling = fitted(x1, steps=steps, reg=reg)
            plain, even = (dataclasses.replace(coupling, balanced=b)(x0, x1).info for b in (False, True))
            rows.append({
                "d": d, "steps of 1024": steps, "reg": reg, "fit, s": seconds, "chi2": coupling.potentials.chi2,
                "cost / exact batch": plain["transport_cost"] / exact,
                "balanced: cost / exact": even["transport_cost"] / exact, "kept in their cells": even["kept"],
            })  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def plot():
    """The picture of the documentation, from the saved figures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = json.loads((RESULTS / "couplings_choice.json").read_text())["tables"]["Over the number of points"]
    figure, axes = plt.subplots(1, 3, figsize=(11, 4.2), layout="constrained")
    for number, name in enumerate(METHODS):
        mine = [row for row in rows if row["coupling"] == name]
        style = {"marker": "osv^Dx"[number // 10 * 3 + number % 3], "color": f"C{number % 10}", "label": name}
        style["linestyle"] = "--" if "within" in name or number > 9 else "-"
        n = [row["n"] for row in mine]
        spent = [row["an epoch, s"] + (0 if row["once, s"] == "-" else row["once, s"]) for row in mine]
        for ax, values in zip(axes, ([r["cost / independent"] for r in mine], spent, [r["prior skew"] for r in mine]),
                              strict=True):  # fmt: skip
            ax.plot(n, values, **style)
    for ax, title in zip(
        axes, ("cost / independent", "seconds, first epoch", "prior skew (accuracy above chance)"), strict=True
    ):
        ax.set(title=title, xlabel="points", xscale="log")
    axes[1].set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(PICTURE, dpi=80)


def main():
    if "--plot" not in sys.argv:
        write(
            "couplings_choice",
            "Choosing a coupling",
            {
                "Over the number of points": over_sizes(),
                "The nearest of k noises": nearest(),
                "Semidiscrete, a data set of 4096": falling_regularisation(),
            },
            f"Normal noise against a mixture of {CLASSES} normals, its classes, of variance 1 a coordinate; d = {D}, "
            "float32, one thread, processor seconds, one run each. *Once*: fit to the data; *an epoch*: n pairs, "
            "their noise not counted. Prior skew: accuracy above chance with which the class is predicted from the "
            "paired noise (2,000 pairs, 4,000 for the nearest noise; it scatters by about 0.02). *noise² / d* is 1 for "
            "normal noise. For the nearest of k: mean of the noise along its data point, and variance along the "
            "leading direction of the data; 0 and 1 for normal noise.",
        )
    plot()


if __name__ == "__main__":
    main()
