"""Peak memory of forward and backward against the size of the set: each figure is a process of its own."""

import resource
import subprocess
import sys
import time

SIZES = (1_000, 10_000, 100_000, 1_000_000)
STREAM = (1_000_000, 10_000_000, 100_000_000)
SCHEMES = ("setenc exact", "setenc sampled", "setenc full", "one shot, fused attention", "official pooler")
LIMIT = {"official pooler": 300_000}  # 7.8 GB at 1e6


def chunks(n, size):
    """The set, made chunk by chunk, never in memory at once."""
    import torch
    from setenc_time import D

    def make():
        generator = torch.Generator().manual_seed(1)
        for begin in range(0, n, size):
            yield torch.randn(1, min(size, n - begin), D, generator=generator)

    return make


def run(scheme, n):
    import torch
    from setenc_time import CHUNK, Official, OneShot, encoder

    import setenc

    torch.set_num_threads(1)
    enc = encoder(4)
    call = {"one shot, fused attention": OneShot(enc), "official pooler": Official(enc)}.get(scheme)

    def loss(n):
        if call is not None:
            return call(torch.cat(list(chunks(n, CHUNK)()), 1)).square().sum()
        mode = scheme.split()[1]
        return setenc.encode(enc, chunks(n, CHUNK), gradient=mode).square().sum()

    loss(2 * CHUNK).backward()  # libraries and buffers of one chunk
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loss(n).backward()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(before / 1024, after / 1024)


def stream(n):
    """Forward of a set that arrives in chunks: the state's update and its readout, without gradients."""
    import torch
    from setenc_time import CHUNK, encoder

    torch.set_num_threads(1)
    enc = encoder(4).eval()
    with torch.no_grad():
        state = enc.init_state(1)
        for chunk in chunks(n, CHUNK)():
            state = enc.update(state, chunk)
        enc.readout(state)
    print(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def picture(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6.4, 4.2))
    for row in rows:
        points = [(n, row[f"N = {n:.0e}"]) for n in SIZES if isinstance(row[f"N = {n:.0e}"], float)]
        ax.plot(*zip(*points, strict=True), marker="o", ms=4, label=row["peak resident memory, MiB"])
    ax.set(xscale="log", yscale="log", xlabel="elements of the set", ylabel="peak memory of the process, MiB")
    ax.legend(frameon=False, fontsize=9)
    ax.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def measure(scheme, n):
    command = [sys.executable, __file__, scheme, str(n)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[1])


if __name__ == "__main__":
    if len(sys.argv) > 2:
        size = int(sys.argv[2])
        stream(size) if sys.argv[1] == "stream" else run(sys.argv[1], size)
        sys.exit()
    from harness import RESULTS, write

    rows = []
    for scheme in SCHEMES:
        peaks = {n: measure(scheme, n) if n <= LIMIT.get(scheme, n) else "-" for n in SIZES}
        known = [v for v in peaks.values() if isinstance(v, float)]
        rows.append(
            {"peak resident memory, MiB": scheme}
            | {f"N = {n:.0e}": v for n, v in peaks.items()}
            | {"largest / smallest": max(known) / min(known)}
        )
    streamed = []
    for n in STREAM:
        start = time.perf_counter()
        peak = measure("stream", n)
        streamed.append({"elements": n, "peak resident memory, MiB": peak, "seconds": time.perf_counter() - start})
    RESULTS.mkdir(exist_ok=True)
    picture(rows, RESULTS / "setenc_memory.png")
    write(
        "setenc_memory",
        "Peak memory of a full-set gradient",
        {
            "Forward and backward of one set, d = 128, 64 slots, 4 heads, extractor of two layers": rows,
            "Forward of a stream, the same encoder": streamed,
        },
        """Peak resident memory of a fresh process, libraries included, on one thread. Target: `exact` and `sampled`
flat (largest / smallest ≤ 1.1), `full` linear. setenc takes the set from an iterator, in chunks of 2048, so that it is
never in memory at once; the peers hold it (128 floats an element) beside their activations. The plot is in
`setenc_memory.png`. The stream's seconds include making it and starting the process.""",
    )
