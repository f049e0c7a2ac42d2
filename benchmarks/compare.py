"""This checkout against an older one, cell by cell: ``python benchmarks/compare.py --before PATH``.

Each side runs in a process of its own on one thread, with its own checkout on PYTHONPATH and the same inputs, those of
the other benchmarks. Their runs alternate, and CPU seconds are compared. ``--only WORD`` keeps cells with that word.

``--threads N`` compares this checkout on one thread with itself on N, by the clock: a quiet machine is needed.
"""

import argparse
import contextlib
import gc
import io
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import couplings_c2ot
import couplings_large
import couplings_sampler
import mbot_losses
import mbot_one_problem
import mbot_partial
import numpy as np
import ot
import setenc_time
import torch
from harness import write

import mbot

HERE = Path(__file__).parent
SHORT = 0.02  # seconds that a turn lasts at least: of what takes less it has several calls
LEAST, MOST, SPENT = 5, 25, 1.0  # turns, and seconds that they last together on each side
SLOWER = 1.05


def grid(transport, scheme, m, d, peer=False):
    """A grid loss, forward and backward, 16 mini-batches a side; the peer is the loop over `ot.emd`."""
    generator = torch.Generator().manual_seed(m + d)
    x = torch.randn(16, m, d, generator=generator).requires_grad_()
    y = (torch.randn(16, m, d, generator=generator) + 1).requires_grad_()
    mean = float(mbot.pairwise_cost(x[0].detach(), y[0].detach()).mean())
    loss = scheme(transport(mean), num_batches=16, batch_size=m)
    ours = partial(mbot_losses.step, loss.from_batches, x, y)
    return (ours, partial(mbot_losses.step, mbot_losses.loop, x, y)) if peer else (ours, None)


def exact_partial(m, d):
    x, y = mbot_partial.clouds(m, d, m, 16)
    cost, weights = mbot.pairwise_cost(x[:, None], y[None]), np.full(m, 1 / m)
    matrices = cost.reshape(-1, m, m).numpy()

    def loop():
        return [ot.partial.partial_wasserstein(weights, weights, c, m=mbot_partial.MASS) for c in matrices]

    return partial(mbot.PartialOT(mbot_partial.MASS).plan, cost), loop


def partial_grid(m, d):
    """A loss of the points, forward and backward, against the loop that has the costs already."""
    x, y = (points.requires_grad_() for points in mbot_partial.clouds(m, d, m, 16))
    loss = mbot.MiniBatchOT(mbot.PartialOT(mbot_partial.MASS), num_batches=16, batch_size=m)
    return partial(mbot_losses.step, loss.from_batches, x, y), exact_partial(m, d)[1]


def entropic_partial(m, d, tol):
    x, y = mbot_partial.clouds(m, d, m, 16)
    cost = mbot.pairwise_cost(x[:, None], y[None])
    cost = (cost / cost.mean((-2, -1), keepdim=True)).flatten(0, 1)
    return partial(mbot.PartialOT(mbot_partial.MASS, reg=0.05, tol=tol, max_iter=100_000).plan, cost), None


def entropic(problems, n, d, share, dtype):
    generator = torch.Generator().manual_seed(n + d)
    x = torch.randn(problems, n, d, generator=generator, dtype=dtype)
    cost = mbot.pairwise_cost(x, torch.randn(problems, n, d, generator=generator, dtype=dtype) + 1)
    tol = 1e-6 if dtype == torch.float64 else 1e-4
    return partial(mbot.EntropicOT(share * float(cost.mean()), tol=tol, max_iter=100_000).plan, cost), None


def draws(n):
    """How many problems of n points a call goes through: the time of a small one depends on its numbers."""
    return range(8 if n <= 256 else 3 if n <= 2048 else 1)


def each(function, inputs):
    return [function(*one) for one in inputs]


def one_problem(kind, n, d):
    costs = [(mbot.pairwise_cost(*mbot_one_problem.clouds(kind, n, d, draw)),) for draw in draws(n)]
    return partial(each, mbot.ExactOT().plan, costs), None


def densities(side, pairs):
    """Pairs of random mixtures on a square grid, problems of general weights."""
    generator = torch.Generator().manual_seed(side)
    line = torch.arange(side, dtype=torch.float64) / side
    places = torch.cartesian_prod(line, line)
    weights = torch.zeros(20, side**2, dtype=torch.float64)
    for _ in range(3):
        centre = torch.rand(20, 1, 2, generator=generator, dtype=torch.float64)
        width = 0.05 + 0.2 * torch.rand(20, 1, generator=generator, dtype=torch.float64)
        weights += (-(places - centre).square().sum(-1) / (2 * width**2)).exp()
    a, b = (weights / weights.sum(-1, keepdim=True)).chunk(2)
    cost = mbot.pairwise_cost(places, places)

    def ours():
        return [mbot.ExactOT().plan(cost, *pair) for pair in zip(a[:pairs], b[:pairs], strict=True)]

    def pot():
        both = zip(a[:pairs].numpy(), b[:pairs].numpy(), strict=True)
        return [ot.emd(*pair, cost.numpy(), numItermax=1_000_000_000) for pair in both]

    return ours, pot


def discrete(n, classes):
    x0, x1, generator = couplings_c2ot.batch(n)
    y = torch.randint(0, classes, (n,), generator=generator)
    official = None
    with contextlib.suppress(ImportError):
        from c2ot.ot import OTConditionalPlanSampler

        hot = torch.nn.functional.one_hot(y, classes).float()
        official = partial(
            OTConditionalPlanSampler(condition_weight=1e6).sample_plan_with_labels, x0, x1, hot.clone(), hot.clone()
        )
    return lambda: mbot.ConditionalOTCoupling()(x0, x1, y1=y).apply(x0, x1), official if n < 2000 else None


def adaptive(n):
    x0, x1, generator = couplings_c2ot.batch(n)
    y = torch.nn.functional.normalize(torch.randn(n, 512, generator=generator), dim=1)
    coupling = mbot.ConditionalOTCoupling("continuous", target_ratio=couplings_c2ot.TARGET)
    return lambda: coupling(x0, x1, y1=y).apply(x0, x1), None


def sampler(method, n, d, **options):
    pairs = [couplings_sampler.clouds(n, d, draw) for draw in draws(n)]
    official = None
    with contextlib.suppress(ImportError):
        from torchcfm.optimal_transport import OTPlanSampler

        official = partial(each, OTPlanSampler(method, **options).sample_plan, pairs)
    return partial(
        each, mbot.compat.OTPlanSampler(method, **options).sample_plan, pairs
    ), official if n < 1000 else None


def large(coupling, d):
    return partial(coupling, *couplings_large.clouds(d)), None


def semidiscrete(d):
    _, x1 = couplings_large.clouds(d)
    return lambda: mbot.SemidiscreteCoupling(steps=300).fit(x1, generator=torch.Generator().manual_seed(1)), None


def stream(slots, heads, chunk):
    enc = setenc_time.encoder(heads, False, slots)
    x = torch.randn(1, min(8192, chunk * 256), setenc_time.D, generator=torch.Generator().manual_seed(1))
    official = setenc_time.Official(enc)
    return (
        setenc_time.forward(lambda: setenc_time.our_stream(enc, x, chunk)),
        setenc_time.forward(lambda: setenc_time.official_stream(official, x, chunk)),
    )


def cells():
    """Heading -> name -> what makes ``(ours, peer or None)``, and least ratios wanted: to the code before, to the peer.

    The targets are those of the issue that asked for speed; every other cell may not be slower than before.
    """
    f32, f64 = torch.float32, torch.float64
    none, bomb, mean = (None, None), mbot.BoMbOT, mbot.MiniBatchOT
    exact, soft, relaxed = (
        lambda _: mbot.ExactOT(), lambda c: mbot.EntropicOT(0.1 * c), lambda c: mbot.UnbalancedOT(0.1 * c, c)
    )  # fmt: skip
    peers = {(2, 16): 30, (2, 64): 12, (64, 16): 40, (64, 64): 17, (64, 128): 18}
    gains = {16: 2.3, 64: 1.6, 128: 1.3}
    grids, others, parts = {}, {}, {}
    for d in (2, 64):
        for m in (16, 64, 128):
            grids[f"BoMb-OT, d {d}, m {m}"] = (partial(grid, exact, bomb, m, d, True), (None, peers.get((d, m))))
            grids[f"m-OT, d {d}, m {m}"] = (partial(grid, exact, mean, m, d, True), (gains[m], None))
            wanted = {16: 25, 64: 8, 128: 6}[m] if d == 2 else None
            parts[f"loss, m-POT, d {d}, m {m}"] = (partial(partial_grid, m, d), (None, wanted))
            parts[f"plans, d {d}, m {m}"] = (partial(exact_partial, m, d), none)
            for tol in (1e-3, 1e-9):
                parts[f"entropic plans, tol {tol:g}, d {d}, m {m}"] = (partial(entropic_partial, m, d, tol), none)
        for m in (16, 64):
            for name, transport in (("entropic", soft), ("unbalanced", relaxed)):
                for title, scheme in (("BoMb", bomb), ("m", mean)):
                    others[f"{name}, {title}, d {d}, m {m}"] = (partial(grid, transport, scheme, m, d), (2.0, None))
    sizes = [(256, 16), (64, 64), (32, 128), (16, 256), (1, 1024)]
    shares = [(0.1, d, f64, s) for d in (2, 64) for s in sizes] + [(0.01, 2, f64, (64, 64))]
    shares += [(share, 64, dtype, s) for share, dtype in ((0.01, f64), (0.05, f32)) for s in sizes]
    plans = {
        f"{b} x {n}, d {d}, reg {share}, {str(dtype)[6:]}": (
            partial(entropic, b, n, d, share, dtype), (2.2 if b in (256, 64, 32) and share > 0.01 else None, None)
        ) for share, d, dtype, (b, n) in shares
    }  # fmt: skip
    singles = {
        f"{kind}, n {n}, d {d}": (partial(one_problem, kind, n, d), none)
        for kind, several in {"gaussian": (256, 1024, 2048, 4096), "8 clusters": (256, 1024)}.items()
        for n in several
        for d in (2, 3072)
    } | {f"{p} pairs of densities {s} x {s}": (partial(densities, s, p), (None, 1.0)) for s, p in ((32, 10), (48, 3))}
    labels = {f"discrete, N {n}, {c} classes": (partial(discrete, n, c), (None, 8.0 if (n, c) == (1024, 10) else None))
              for n, c in ((1024, 2), (1024, 10), (6400, 10), (6400, 100), (6400, 1000))}  # fmt: skip
    labels |= {f"continuous, N {n}": (partial(adaptive, n), none) for n in (1024, 6400)}
    samples = {f"exact, n {n}, d {d}": (partial(sampler, "exact", n, d), (None, 2.5 if n < 1000 else None))
               for n in (128, 256, 1024, 4096) for d in (2, 3072)}  # fmt: skip
    for method in ("sinkhorn", "unbalanced", "partial"):
        for reg, n in ((1.0, 128), (1.0, 256), (1.0, 1024), (0.05, 256)):
            wanted = 2.4 if method != "partial" and n < 1000 and reg == 1 else None
            samples[f"{method}, reg {reg:g}, n {n}"] = (partial(sampler, method, n, 2, reg=reg), (None, wanted))
    pairings = {"exact": mbot.OTCoupling(), "BoMb, 8": mbot.BoMbCoupling(num_batches=8),
                "BoMb, 32": mbot.BoMbCoupling(num_batches=32)}  # fmt: skip
    pairings |= {f"Sinkhorn, reg {reg:g}": mbot.SinkhornCoupling(reg, max_iter=5000) for reg in (1.0, 0.1, 0.01)}
    batches = {
        f"{name}, d {d}": (partial(large, coupling, d), none) for d in (2, 64) for name, coupling in pairings.items()
    }
    batches |= {f"semidiscrete fit, d {d}": (partial(semidiscrete, d), none) for d in (2, 64)}
    streams = {f"{slots} slots, {heads} heads, chunk {c}": (
        partial(stream, slots, heads, c), (None, {1: 2.5, 8: 1.4}.get(c) if (slots, heads) == (64, 4) else None)
    ) for slots, heads in ((64, 4), (4, 4), (64, 1), (128, 1)) for c in (1, 8, 64, 1024)}  # fmt: skip
    return {
        "Exact grid losses": grids, "Entropic and unbalanced grid losses": others, "Partial": parts,
        "EntropicOT, batches": plans, "One problem": singles, "C2OT": labels, "sample_plan": samples,
        "Batches of 4096": batches, "Set encoder, streams": streams,
    }  # fmt: skip


def worker(clock):
    """Build a cell or run its turn, as asked on stdin; seconds go to stdout."""
    found, peer, repeats, repeats_of_peer = None, None, 1, 1
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    warnings.simplefilter("ignore")

    def seconds(call, times):
        with contextlib.redirect_stdout(io.StringIO()):
            start = clock()
            for _ in range(times):
                call()
            return (clock() - start) / times

    everything = cells()
    for line in sys.stdin:
        order = json.loads(line)
        if order == "turn":
            answer = {"ours": seconds(found, repeats)}
        elif order == "peer":
            answer = {"peer": seconds(peer, repeats_of_peer) if peer else None}
        else:
            found, peer = everything[order[0]][order[1]][0]()
            first = seconds(found, 1)  # compiles
            gc.collect()
            gc.freeze()  # what the compiler leaves behind is not searched again and again
            once = min(seconds(found, 1) for _ in range(2)) if first < SPENT else first
            repeats = max(1, round(SHORT / once))
            try:
                repeats_of_peer = max(1, round(SHORT / seconds(peer, 1))) if peer else 1
            except ValueError:  # torchcfm's kernel underflows
                peer = None
            answer = {"turn": once * repeats}
        answers.write(json.dumps(answer) + "\n")


class Side:
    """A process with a checkout on its path."""

    def __init__(self, checkout, threads, clock):
        rest = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p not in ("", ".")]
        path = os.pathsep.join([str(checkout), *rest])
        environment = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "PYTHONPATH": path}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", clock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | environment, cwd=checkout,
        )  # fmt: skip

    def ask(self, order):
        """Its answer to an order, see `worker`."""
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


def row(before, after, heading, name, wanted):
    length = max(side.ask([heading, name])["turn"] for side in (before, after))
    old, new, theirs = [], [], []
    for turn in range(min(MOST, max(LEAST, round(SPENT / length)))):
        for side, seconds in ((before, old), (after, new)) if turn % 2 else ((after, new), (before, old)):
            seconds.append(side.ask("turn")["ours"])
        if turn < LEAST:
            theirs.append(after.ask("peer")["peer"])
    gain = statistics.median(x / y for x, y in zip(old, new, strict=True))
    peer = None if theirs[0] is None else statistics.median(x / y for x, y in zip(theirs, new, strict=False))
    met = all(bool(found) and found >= least for found, least in zip((gain, peer), wanted, strict=True) if least)
    return {
        "cell": name, "before, s": statistics.median(old), "after, s": statistics.median(new), "times faster": gain,
        "target ": wanted[0] or "-", "peer / after": "-" if peer is None else peer, "target": wanted[1] or "-",
        "met": ("yes" if met else "no") if any(wanted) else "-", "slower": "yes" if gain < 1 / SLOWER else "-",
    }  # fmt: skip


def commit(checkout):
    return subprocess.check_output(["git", "-C", checkout, "describe", "--always", "--dirty"], text=True).strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, help="a checkout of the older code")
    parser.add_argument("--only", default="", help="cells whose heading or name contains this")
    parser.add_argument("--threads", type=int, default=1, help="compare this checkout with itself on so many threads")
    parser.add_argument("--worker", choices=("process_time", "perf_counter"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(getattr(time, arguments.worker))
        return
    here, threads = HERE.parent.resolve(), arguments.threads
    if threads > 1:
        before, after = (Side(here, some, "perf_counter") for some in (1, threads))
        tables = {}
    else:
        checkouts = [arguments.before.resolve(), here]
        tables = {"Commits": [dict(zip(("before", "after"), map(commit, checkouts), strict=True))]}
        before, after = (Side(checkout, 1, "process_time") for checkout in checkouts)
    for heading, several in cells().items():
        for name, (_, wanted) in several.items():
            if arguments.only in f"{heading}: {name}":
                found = row(before, after, heading, name, wanted)
                print(found, file=sys.stderr, flush=True)
                if threads > 1:
                    found = {
                        "cell": name, "1 thread, s": found["before, s"], f"{threads} threads, s": found["after, s"],
                        "times faster": found["times faster"],
                    }  # fmt: skip
                tables.setdefault(heading, []).append(found)
    if arguments.only:
        return
    if threads > 1:
        write(
            "threads",
            f"One thread and {threads}",
            tables,
            f"Seconds by the clock, medians of {LEAST} to {MOST} alternating turns, and of their ratios. "
            "The cells are those of [compare.md](compare.md); threads sleep while they wait "
            f"(`OMP_WAIT_POLICY=passive`); the load of one minute at the end was {os.getloadavg()[0]:.1f} on "
            f"{os.cpu_count()} cores.",
        )
        return
    write(
        "compare",
        "The library before and after",
        tables,
        f"CPU seconds of one thread, medians of {LEAST} to {MOST} alternating turns; ratios are medians of their "
        "ratios. *Target*: the least ratio wanted, over the code before and over the peer: a double loop over `ot.emd` "
        "or `partial_wasserstein`, POT's network simplex, the official C²OT call, torchcfm's sampler, the published "
        f"pooler's algorithm. *Slower*: below 1 / {SLOWER}. Inputs are those of the other benchmarks; losses are "
        "forward and backward with 16 mini-batches a side; one problem and `sample_plan` go through 8 draws of up to "
        "256 points, 3 of up to 2048, in a call; the load of one minute at the end was "
        f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores.",
    )


if __name__ == "__main__":
    main()
