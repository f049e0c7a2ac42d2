"""setenc on a device: a long stream, an exact-gradient step against full backprop, and errors in half precision.

Runs on any device; `rows` hands the figures to whoever writes a result file, each when it is taken.
"""

import argparse
import resource
import statistics
import time

import torch
from gpu_bench import Bench, against, uniform
from setenc_time import D, K, encoder

import setenc

BUDGET = 120.0  # seconds after which no further row is begun
POOLINGS = {
    **{
        f"SlotPooling {activation}": (lambda a=activation: setenc.SlotPooling(D, D, K, activation=a))
        for activation in ("sigmoid", "softmax", "slot-sigmoid", "slot-softmax", "slot-exp")
    },
    "DeepSetsPooling mean": lambda: setenc.DeepSetsPooling(D, D),
    "DeepSetsPooling max": lambda: setenc.DeepSetsPooling(D, D, "max"),
    "GatedAttentionPooling": lambda: setenc.GatedAttentionPooling(D, D),
}


def rows(device, quick=False, save=lambda tables: None):
    """Tables of all figures, which ``save`` gets row by row; ``quick``: sets that a processor handles in seconds."""
    bench = Bench(device, quick, save, BUDGET)
    device = bench.device
    fits = 1_000_000 if bench.cuda else 100_000  # elements that full backprop has the memory for
    sizes = (20_000, 5_000, 2048) if quick else (1_000_000, fits, 65_536)
    bench.row("Gradient step", {}, lambda row: row.update(gradient_step(device, *sizes)))
    for n in (2**14, 2**16) if quick else (10**6, 10**8):

        def stream(row, n=n):
            row |= streaming(device, n, 4096 if quick else 65_536)
            # An element: products with 2 (d, d) and a (d, 2 d) matrix, scores and what they weigh; read once.
            operations = 2 * n * (D * D * 4 + 2 * K * D)
            against(row, row["seconds"], bench.floor(moved=4 * n * D, operations=operations, exponentials=4 * n * K))

        bench.row("Streams", {}, stream)
    for name in POOLINGS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            bench.row(
                "Errors in half precision",
                {"pooling": name, "dtype": str(dtype).removeprefix("torch.")},
                lambda row, name=name, dtype=dtype: row.update(
                    half_precision(device, name, dtype, 512 if quick else 4096)
                ),
            )
    return {heading: uniform(found) for heading, found in bench.tables.items()}


def streaming(device, n, chunk):
    """Throughput and peak memory of a stream whose elements are made on the device, chunk by chunk."""
    enc = encoder(4).to(device).eval()
    generator = torch.Generator(device).manual_seed(1)

    def run(n):
        state = enc.init_state(1)
        for start in range(0, n, chunk):
            x = torch.randn(1, min(chunk, n - start), D, device=device, generator=generator)
            state = enc.update(state, x)
        return enc.readout(state)

    with torch.no_grad():
        run(2 * chunk)
        _, seconds, peak = timed(device, lambda: run(n))
    return {
        "N": n,
        "chunk": chunk,
        "seconds": seconds,
        "elements/s": n / seconds,
        "peak memory, MiB": peak,
    }


def gradient_step(device, n, fits, chunk):
    """Exact gradient of ``n`` elements against one shot, fused, with full backprop of ``fits``, extrapolated."""
    enc = encoder(4).to(device)
    x = torch.randn(1, n, D, device=device, generator=torch.Generator(device).manual_seed(1))

    def run(n, exact):
        enc.zero_grad()
        out = setenc.encode(enc, x[:, :n], chunk_size=chunk, gradient="exact") if exact else enc(x[:, :n])
        out.square().sum().backward()

    for exact in (True, False):
        run(min(fits, 2 * chunk), exact)
    turns = 5 if device.type == "cuda" else 1
    exact, exact_peak = middle(timed(device, lambda: run(n, True)) for _ in range(turns))
    full, full_peak = middle(timed(device, lambda: run(fits, False)) for _ in range(turns))
    full *= n / fits
    return {
        "N": n,
        "chunk": chunk,
        "exact, seconds": exact,
        "exact, peak MiB": exact_peak,
        f"full, seconds from N = {fits}": full,
        f"full, peak MiB at N = {fits}": full_peak,
        "exact / full (≤ 1.45)": exact / full,
    }


def middle(runs):
    """Median seconds and largest peak of several runs."""
    _, seconds, peaks = zip(*runs, strict=True)
    return statistics.median(seconds), max(peaks)


def half_precision(device, name, dtype, n):
    """Error relative to the largest output against float64: half inputs and half modules, whole and in chunks."""
    torch.manual_seed(0)
    exact = POOLINGS[name]().double().to(device).eval()
    single, half = POOLINGS[name]().to(device).eval(), POOLINGS[name]().to(device, dtype).eval()
    single.load_state_dict(exact.state_dict())
    half.load_state_dict(exact.state_dict())
    x = torch.randn(2, n, D, device=device, generator=torch.Generator(device).manual_seed(1), dtype=torch.float64)
    rounded = x.to(dtype)
    with torch.no_grad():
        target, own = exact(rounded.double()), exact(x)
        outputs = {
            "input, chunks": in_chunks(single, rounded),
            "input, whole": single(rounded),
            "input and module, chunks": in_chunks(half, rounded),
            "input and module, whole": half(rounded),
        }
    found = {"N": n, "rounding of the input alone": error(target, own)}
    return found | {what: error(out, target) for what, out in outputs.items()}


def in_chunks(pooling, x):
    """Pooled slots, in chunks of 64."""
    state = pooling.init_state(len(x))
    for chunk in x.split(64, 1):
        state = pooling.update(state, chunk)
    return pooling.readout(state)


def error(out, target):
    """Largest error relative to the largest target."""
    return float((out.double() - target).abs().max() / target.abs().max())


def timed(device, call):
    """Result, seconds, and peak memory in MiB: the device's, or the resident memory of the whole process."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    result = call()
    if cuda:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if cuda else resident()
    return result, seconds, peak


def resident():
    """Peak resident memory of the process so far, MiB (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small sets")
    args = parser.parse_args()
    for heading, found in rows(args.device, args.quick).items():
        print(heading)
        for row in found:
            print({key: f"{value:.3g}" if isinstance(value, float) else value for key, value in row.items()})
