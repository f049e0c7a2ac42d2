"""Couplings and losses beside busy processes: wall time with 0, 1 and 2 of them, threads that sleep or spin.

`OMP_WAIT_POLICY` is read when torch is loaded, so each policy has a process of its own.
"""

import json
import os
import subprocess
import sys
import time
import warnings

import torch
from harness import medians, write

import mbot

BUSY = (0, 1, 2)
MOST = 2.5  # times slower that a call may get beside one busy process
POLICIES = {"sleep": {"OMP_WAIT_POLICY": "passive"}, "spin": {"OMP_WAIT_POLICY": "active"}}


def calls():
    """Name -> call: every coupling on batches of 256, larger ones where the work is, and losses of 16 x 16 problems."""
    generator = torch.Generator().manual_seed(0)
    x0, x1 = (torch.randn(2048, 3072, generator=generator) + shift for shift in (0, 0.1))
    small, other = x0[:256], x1[:256]
    y = torch.randint(0, 10, (2048,), generator=generator)
    vectors = torch.randn(256, 64, generator=generator)
    flat = x1[:1024, :64]

    def seeded():
        return torch.Generator().manual_seed(1)

    warnings.simplefilter("ignore")
    found = {
        "IndependentCoupling": lambda: mbot.IndependentCoupling()(small, other),
        "OTCoupling": lambda: mbot.OTCoupling()(small, other),
        "OTCoupling, 1024": lambda: mbot.OTCoupling()(x0[:1024], x1[:1024]),
        "OTCoupling, partial": lambda: mbot.OTCoupling(mbot.PartialOT(0.8))(small, other),
        "OTCoupling, entropic": lambda: mbot.OTCoupling(mbot.EntropicOT(100.0))(small, other, generator=seeded()),
        "BoMbCoupling": lambda: mbot.BoMbCoupling(num_batches=8)(small, other, generator=seeded()),
        "SinkhornCoupling": lambda: mbot.SinkhornCoupling(0.1)(small, other, generator=seeded()),
        "WeightedCoupling": lambda: mbot.WeightedCoupling(277.0)(small, other, generator=seeded()),
        "NearestNoiseCoupling": lambda: mbot.NearestNoiseCoupling(4)(x0[:1024], other),
        "ConditionalOTCoupling": lambda: mbot.ConditionalOTCoupling()(small, other, y1=y[:256]),
        "ConditionalOTCoupling, 2048": lambda: mbot.ConditionalOTCoupling()(x0, x1, y1=y),
        "ConditionalOTCoupling, continuous": lambda: mbot.ConditionalOTCoupling("continuous", target_ratio=0.1)(
            small, other, y1=vectors
        ),
    }  # fmt: skip
    semidiscrete = mbot.SemidiscreteCoupling(steps=20).fit(flat, generator=seeded())
    found["SemidiscreteCoupling"] = lambda: semidiscrete(x0[:256, :64], flat)
    found["DataCoupling, fit"] = lambda: mbot.DataCoupling().fit(flat[:256], generator=seeded())
    for m, d in ((16, 64), (64, 64)):
        x, z = (torch.randn(16, m, d, generator=generator).requires_grad_() for _ in range(2))
        transports = {
            "exact": mbot.ExactOT(), "entropic": mbot.EntropicOT(10.0), "unbalanced": mbot.UnbalancedOT(10.0, 100.0),
            "partial": mbot.PartialOT(0.8), "sliced": mbot.SlicedOT(num_projections=32),
        }  # fmt: skip
        for name, transport in transports.items():
            for scheme in (mbot.MiniBatchOT, mbot.BoMbOT):
                loss = scheme(transport, num_batches=16, batch_size=m)
                found[f"{scheme.__name__}, {name}, m {m}"] = lambda loss=loss, x=x, z=z: loss.from_batches(
                    x, z
                ).backward()
    return found


def measure():
    """Median wall seconds of each call, by the number of busy processes beside it."""
    found = calls()
    seconds = {}
    for busy in BUSY:
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
        time.sleep(0.5)
        try:
            seconds[busy] = medians(found, repeats=7, warmup=2 if busy == 0 else 1)
        finally:
            for other in others:
                other.kill()
                other.wait()
    return seconds


def main():
    if "--worker" in sys.argv:
        print(json.dumps(measure()))
        return
    load = os.getloadavg()[0]
    tables = {}
    for policy, environment in POLICIES.items():
        out = subprocess.run(
            [sys.executable, __file__, "--worker"], env=os.environ | environment, capture_output=True, text=True
        )
        if out.returncode:
            sys.exit(out.stderr)
        seconds = json.loads(out.stdout)
        alone, one, two = (seconds[str(busy)] for busy in BUSY)
        tables[f"Waiting threads {policy} (`OMP_WAIT_POLICY={environment['OMP_WAIT_POLICY']}`)"] = [
            {
                "call": name, "alone, s": alone[name], "one busy process, s": one[name], "two, s": two[name],
                f"one / alone (≤ {MOST})": one[name] / alone[name], "two / alone": two[name] / alone[name],
            }
            for name in alone
        ]  # fmt: skip
    write(
        "contention",
        "Couplings and losses beside busy processes",
        tables,
        "Wall seconds, medians of 7 alternating calls; couplings on batches of 256 x 3072 unless a size is given, "
        "losses forward and backward, 16 mini-batches of m points a side. Each busy process counts in a loop. Two torch"
        " threads on two cores: beside one busy process a call has two thirds of the machine, beside two a half. "
        f"The machine's load before the run was {load:.1f}.",
    )


if __name__ == "__main__":
    main()
