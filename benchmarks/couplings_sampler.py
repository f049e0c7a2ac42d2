"""`mbot.compat.OTPlanSampler` against torchcfm's: torchcfm must be installed or on PYTHONPATH."""

import contextlib
import io
import sys
import time
import warnings

import torch
from harness import medians, write

import mbot

HEAVY = 3.0  # seconds from which torchcfm's call is timed once


def clouds(n, d, draw=0):
    generator = torch.Generator().manual_seed(n + d + 10_000 * draw)
    return torch.randn(n, d, generator=generator), torch.randn(n, d, generator=generator) * 0.5 + 1


@contextlib.contextmanager
def quiet():
    """Their sampler prints tensors, and both may warn."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def marginal_error(plan):
    """L1 distance of the row and column sums from uniform ones, the larger."""
    return max(float(abs(plan.sum(axis) - 1 / plan.shape[1 - axis]).sum()) for axis in (0, 1))


def compare(method, n, d, theirs_class, **options):
    x0, x1 = clouds(n, d)
    ours, theirs = mbot.compat.OTPlanSampler(method, **options), theirs_class(method, **options)
    failed = ""

    def call_theirs():
        nonlocal failed
        try:
            return theirs.sample_plan(x0, x1)
        except ValueError as error:
            failed = str(error)
            return None

    def describe(pair):
        if pair is None:
            return float("nan"), float("nan")
        a, b = pair
        rows = torch.cat((a, b), 1)
        return (a - b).double().square().sum(1).mean().item(), len(rows.unique(dim=0)) / n

    with quiet():
        start = time.process_time()
        their_pair = call_theirs()
        once = time.process_time() - start
        if once > HEAVY:
            ours.sample_plan(x0, x1)
            seconds = medians({"ours": lambda: ours.sample_plan(x0, x1)}, repeats=5, clock=time.process_time) | {
                "theirs": once
            }
        else:
            seconds = medians(
                {"ours": lambda: ours.sample_plan(x0, x1), "theirs": call_theirs}, repeats=5, clock=time.process_time
            )
        plans = [sampler.get_map(x0, x1) for sampler in (theirs, ours)]
        (cost, unique), (their_cost, their_unique) = describe(ours.sample_plan(x0, x1)), describe(their_pair)
    row = {
        "method": method, **options, "n": n, "d": d, "torchcfm, s": seconds["theirs"], "ours, s": seconds["ours"],
        "times faster": seconds["theirs"] / seconds["ours"], "unique, torchcfm": their_unique, "unique, ours": unique,
        "cost of the pairs, torchcfm": their_cost, "ours": cost,
        "error of the marginals, torchcfm": marginal_error(plans[0]), "error, ours": marginal_error(plans[1]),
        "torchcfm fails": failed or "-",
    }  # fmt: skip
    print(row, flush=True)
    return row


def main():
    try:
        from torchcfm.optimal_transport import OTPlanSampler as Theirs
    except ImportError:
        sys.exit(print("skipped: torchcfm is not installed"))
    exact = [compare("exact", n, d, Theirs) for n in (128, 256, 1024, 4096) for d in (2, 3072)]
    regs = [(1.0, n) for n in (128, 256, 1024)] + [(0.05, 256)]
    others = [compare(method, n, 2, Theirs, reg=reg) for method in ("sinkhorn", "unbalanced") for reg, n in regs]
    partial = [compare("partial", n, 2, Theirs, reg=reg) for reg, n in ((1.0, 256), (1.0, 1024), (0.05, 256))]
    write(
        "couplings_sampler",
        "Plan samplers: ours against torchcfm's",
        {"sample_plan, exact": exact, "sample_plan, entropic": others, "sample_plan, partial": partial},
        "Whole calls of `sample_plan` on the same float32 samples, in CPU seconds of all threads (other work ran "
        "on the machine). Medians of 5 alternating "
        f"runs; where one call of torchcfm takes over {HEAVY:g} s it ran once. Costs are of the pairs drawn: with "
        "replacement (torchcfm) they scatter about the plan's. Where torchcfm fails, its plan holds NaN (its kernel "
        "underflows) and its time is that until the failure. Entropic kernels are solved to 1e-3 here (L1 error of the "
        "marginals); torchcfm's (POT's) stop at 1e-9 or after 1000 iterations. An error of the marginals near 1 (the "
        "unbalanced plans have other marginals anyway) means that there is no plan: at the default reg of 0.05 "
        "torchcfm's kernel underflows on these samples, squared distances of up to 20, and its calls end early.",
    )


if __name__ == "__main__":
    main()
