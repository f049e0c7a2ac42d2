"""What the first call of each kind compiles: CPU seconds of a process with an empty cache, and of the next process."""

import os
import subprocess
import sys
import tempfile
import time

import torch
from harness import write

import mbot
import setenc


def calls():
    """Name -> the call; float32 points, 4 mini-batches of 64."""
    x = torch.randn(4, 64, 8, generator=torch.Generator().manual_seed(0))
    y, weight = x.flip(1) + 1, torch.linspace(1, 2, 64)
    cost = mbot.pairwise_cost(x, y)

    def grid(transport):
        return mbot.BoMbOT(transport, num_batches=4, batch_size=64).from_batches(x, y)

    @torch.no_grad()
    def stream():
        pool = setenc.SlotPooling(8, 32, num_slots=16)
        state = pool.update(pool.init_state(1), x[:1, :8])
        return pool.update(state, x[:1, 8:16])

    return {
        "exact plans": lambda: mbot.ExactOT().plan(cost),
        "exact plans, weights": lambda: mbot.ExactOT().plan(cost, weight / weight.sum()),
        "partial plans": lambda: mbot.PartialOT(0.8).plan(cost),
        "entropic plans": lambda: mbot.EntropicOT(1.0).plan(cost),
        "exact grid loss": lambda: grid(mbot.ExactOT()),
        "partial grid loss": lambda: grid(mbot.PartialOT(0.8)),
        "C2OT": lambda: mbot.ConditionalOTCoupling()(x[0], y[0], y1=torch.arange(64) % 3),
        "slot pooling, stream": stream,
    }


def seconds(name):
    """CPU seconds of the call in a process that has empty memory and an empty cache, and in the next one."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        environment = {"NUMBA_CACHE_DIR": folder, "OMP_NUM_THREADS": "1"}
        for _ in range(2):
            command = [sys.executable, __file__, name]
            found.append(float(subprocess.check_output(command, env=os.environ | environment, text=True)))
    return found


if __name__ == "__main__":
    if sys.argv[1:]:
        call = calls()[sys.argv[1]]
        start = time.process_time()
        call()
        sys.exit(print(time.process_time() - start))
    rows = [
        dict(zip(("call", "empty cache, s", "next process, s"), (name, *seconds(name)), strict=True))
        for name in calls()
    ]
    write(
        "first_call",
        "The first call",
        {"First calls": rows},
        "CPU seconds of one thread, each call in a process of its own, without imports. `docs/questions.md` has a "
        "script that makes these calls while an image is built.",
    )
