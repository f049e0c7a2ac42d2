"""A model of what the distributed schemes cost up to 1024 ranks and 1e9 points, and how far it holds for 1 to 3 here.

The table and the picture are a model, not a measurement: bytes and numbers of collectives are those that the code
issues (checked call by call in processes here, and in the tests), times follow from the `Cluster` below.
`python benchmarks/scale_model.py --model` leaves out the processes.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

import mbot
import setenc
from mbot.distributed import GlobalCoupling, spread

GB = 1e9


@dataclass(frozen=True)
class Cluster:
    """What the model assumes: round figures for nodes of 8 cards of the H100 class, at about half of their peaks."""

    flops: float = 30e12  # float32 products without TF32, a second
    exponentials: float = 2e12  # and logarithms, a second
    memory: float = 80 * GB
    node: int = 8  # ranks on one node
    near: tuple[float, float] = (5e-6, 300 * GB)  # latency in seconds, bytes a second and direction, inside a node
    far: tuple[float, float] = (15e-6, 50 * GB)  # between nodes, a card
    assignment: float = 0.5  # seconds of one exact problem with n = 4096 (one CPU core, measured), growing with n^2.5
    small: float = 50e-6  # seconds of one exact problem with m = 128, in a batch on a card
    rate: float = 1.0  # speed of a rank's own work, where ranks share processors

    def collective(self, kind: str, size: float, ranks: int) -> float:
        """Seconds of one collective; ring or tree, whichever is faster, limited by the slowest link."""
        if ranks == 1:
            return 0.0
        latency, bandwidth = self.near if ranks <= self.node else self.far
        hops, share = math.ceil(math.log2(ranks)), (ranks - 1) / ranks
        if kind == "all_reduce":
            ring = 2 * (ranks - 1) * latency + 2 * share * size / bandwidth
            return min(ring, 2 * hops * (latency + size / bandwidth))
        if kind == "broadcast":
            return hops * latency + size / bandwidth
        return (ranks - 1) * latency + share * size / bandwidth  # all_gather, gather, all_to_all


@dataclass
class Call:
    """One call of a scheme: a rank's work, its memory, and the collectives by kind and bytes.

    Bytes are the whole result of all_gather and gather, the operand of all_reduce and broadcast, and what a rank sends
    in all_to_all.
    """

    flops: float = 0.0
    exponentials: float = 0.0
    serial: float = 0.0  # seconds
    memory: float = 0.0
    collectives: Counter = field(default_factory=Counter)

    def add(self, kind: str, size: float, times: int = 1) -> Call:
        """The call with some collectives more."""
        self.collectives[kind, size] += times
        return self

    def seconds(self, on: Cluster, ranks: int) -> tuple[float, float]:
        """Work and communication, one after the other: nothing is assumed to overlap."""
        work = (self.flops / on.flops + self.exponentials / on.exponentials) / on.rate + self.serial
        return work, sum(times * on.collective(kind, size, ranks) for (kind, size), times in self.collectives.items())


def sinkhorn(
    n: int, ranks: int, d: int = 64, iterations: int = 100, relaxed: int = 1, on: Cluster | None = None
) -> Call:
    """`GlobalCoupling(SinkhornCoupling)` of n points a side, costs made in tiles; ``relaxed`` passes at the end."""
    passes = 2 * iterations + relaxed + 1
    block = math.ceil(n / ranks) * ranks
    probe = math.ceil(math.ceil(n / math.ceil(n / 1024)) / ranks) * ranks
    call = Call(
        flops=2 * d * n * n / ranks * passes,
        exponentials=n * n / ranks * passes,
        memory=4 * n * d * (1 + 2 / ranks) + 8 * 8 * n,
    )
    call.add("all_gather", 4 * n * d)  # the targets
    call.add("all_reduce", 8 * d)  # the sources' mean
    call.add("all_gather", 4 * probe * d)  # some sources, for the spread of the costs
    call.add("all_gather", 8 * n, iterations + 1)  # log-sums of the rows; at the end their masses
    call.add("all_reduce", 8 * n, 2 * (iterations + relaxed) + 1)  # largest and sum of the columns; the sources drawn
    call.add("broadcast", 8 * n)  # random numbers
    call.add("all_to_all", 8 * block).add("all_to_all", 16 * block)  # who holds the source of a column
    return call.add("all_reduce", 8, 2)  # entropy, mean cost


def exact(n: int, ranks: int, d: int = 64, on: Cluster | None = None) -> Call:
    """`GlobalCoupling(OTCoupling())`: gathered to rank 0, solved there, the pairs sent back."""
    call = Call(serial=(on or Cluster()).assignment * (n / 4096) ** 2.5, memory=4 * n * n + 8 * n * d)
    return call.add("gather", 4 * n * d, 2).add("broadcast", 16 * n)


def bomb(n: int, ranks: int, d: int = 64, m: int = 128, on: Cluster | None = None) -> Call:
    """``spread(BoMbOT(ExactOT()))`` of n points a side in mini-batches of m: value and gradients."""
    on, k = on or Cluster(), max(1, n // m)
    call = Call(
        flops=6 * d * (k * m) ** 2 / ranks,
        serial=on.small * k * k / ranks + on.assignment * (k / 4096) ** 2.5,  # the outer problem on every rank
        memory=4 * n * d * (2 + 2 / ranks) + 8 * k * k,
    )
    call.add("all_gather", 4 * k * m * d)  # the targets' mini-batches
    call.add("all_reduce", 4 * k * k)  # values of the inner problems
    call.add("all_reduce", 4, 2)  # the loss, and its gradient
    return call.add("all_reduce", 4 * k * m * d)  # gradients of the targets


def encode(
    n: int, ranks: int, d: int = 64, slots: int = 32, heads: int = 4, parameters: float = 1e5, on: Cluster | None = None
) -> Call:
    """``setenc.encode(gradient="exact", group=…)`` of one set of n elements: two forward passes and one backward."""
    call = Call(
        flops=4 * 2 * parameters * n / ranks,
        exponentials=3 * slots * heads * n / ranks,
        memory=GB,  # a chunk's activations; elements are streamed
    )
    call.add("all_reduce", 2 * 4 * slots * (d + heads))  # the slots agree
    call.add("all_reduce", 4 * slots * heads)  # peaks
    call.add("all_reduce", 4 * slots * (d + heads), 2)  # totals and masses; their gradients
    call.add("all_reduce", 56).add("all_reduce", 8, 2)  # what the ranks were given; whether any failed, in each pass
    return call.add("all_reduce", 8)  # how many


SCHEMES: dict[str, Callable[..., Call]] = {
    "exact coupling": exact,
    "Sinkhorn coupling, 100 iterations": sinkhorn,
    "BoMb-OT, m = 128, with gradients": bomb,
    "set encoding, exact gradients": encode,
}
POINTS = (10_000, 100_000, 1_000_000, 10_000_000, 100_000_000, 1_000_000_000)
RANKS = (1, 8, 64, 1024)


def cell(scheme: str, n: int, ranks: int, on: Cluster) -> str:
    call = SCHEMES[scheme](n, ranks, on=on)
    if call.memory > on.memory:
        return f"- ({call.memory / GB:,.0f} GB)"
    work, talk = call.seconds(on, ranks)
    if work + talk > 86_400 * 30:
        return "more than a month"
    return f"{work + talk:.2g} s, {talk / (work + talk):.0%}"


def table(on: Cluster) -> list[dict[str, str]]:
    return [
        {"scheme": scheme, "points a side": f"{n:.0e}"} | {f"{p} ranks": cell(scheme, n, p, on) for p in RANKS}
        for scheme in SCHEMES
        for n in POINTS
    ]


def picture(on: Cluster, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ranks = [2**i for i in range(11)]
    figure, axes = plt.subplots(1, len(SCHEMES), figsize=(13.5, 3.6), sharex=True)
    for ax, (scheme, cost) in zip(axes, SCHEMES.items(), strict=True):
        for colour, n in enumerate(POINTS):
            known = [(p, *cost(n, p, on=on).seconds(on, p)) for p in ranks if cost(n, p).memory <= on.memory]
            if known:
                ax.plot([k[0] for k in known], [k[1] + k[2] for k in known], color=f"C{colour}", label=f"{n:.0e}")
                shown = [(k[0], k[2]) for k in known if k[2] > 0]
                ax.plot(*zip(*shown, strict=True), ":", color=f"C{colour}", lw=1) if shown else None
        ax.set(xscale="log", yscale="log", xlabel="ranks", title=scheme)
        ax.title.set_fontsize(9)
        ax.grid(alpha=0.3)
        ax.legend(frameon=False, fontsize=7, title="points a side", title_fontsize=7)
    axes[0].set_ylabel("seconds a call (model)\ndotted: communication")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


# -- the model against processes here ----------------------------------------------------------------------------------

SIZES = {"n": 1536, "d": 64, "m": 128}


@dataclass
class Recorder:
    """Counts the tensors handed to collectives, in the model's units."""

    ranks: int
    seen: Counter = field(default_factory=Counter)

    def __enter__(self) -> Recorder:
        names = ("all_gather", "all_reduce", "broadcast", "gather", "all_to_all_single")
        self.before = {name: getattr(dist, name) for name in names}

        def recorded(name: str) -> Callable[..., object]:
            def call(*args: object, **kwargs: object) -> object:
                tensor = args[0] if name in ("all_reduce", "broadcast", "gather") else args[1]
                factor = self.ranks if "gather" in name else 1
                self.seen[name.removesuffix("_single"), factor * tensor.numel() * tensor.element_size()] += 1
                return self.before[name](*args, **kwargs)

            return call

        for name in self.before:
            setattr(dist, name, recorded(name))
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self.before.items():
            setattr(dist, name, function)


def calls(ranks: int) -> dict[str, Callable[[], Call]]:
    """Each scheme at `SIZES` on this rank's share: runs once, and returns what the model says of it."""
    n, d, m = SIZES.values()
    share, k = n // ranks, n // m // ranks
    x, y = (torch.randn(share, d, generator=torch.Generator().manual_seed(seed)) for seed in range(2))

    def run_sinkhorn() -> Call:
        coupling = mbot.SinkhornCoupling(0.5, cells=1 << 16, max_iter=12, tol=1e-30)  # over-relaxed from the 4th on
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            info = GlobalCoupling(coupling)(x, y).info
        return sinkhorn(n, ranks, d, info["iterations"], relaxed=1)

    def run_exact() -> Call:
        GlobalCoupling(mbot.OTCoupling())(x, y)
        return exact(n, ranks, d)

    def run_bomb() -> Call:
        loss = spread(mbot.BoMbOT(mbot.ExactOT(), num_batches=k, batch_size=m))
        loss.from_batches(*(p.reshape(k, m, d).clone().requires_grad_() for p in (x, y))).backward()
        return bomb(n, ranks, d, m)

    def run_encode() -> Call:
        torch.manual_seed(0)  # parameters are the same on every rank
        pooling = setenc.SlotPooling(d, d, 32, num_heads=4, slots="learned")
        enc = setenc.UMBC(None, pooling, setenc.MLPDecoder(d, 1))
        setenc.encode(enc, x[None], chunk_size=256, gradient="exact", group=dist.group.WORLD).sum().backward()
        return encode(n, ranks, d)

    return dict(zip(SCHEMES, (run_exact, run_sinkhorn, run_bomb, run_encode), strict=True))


def compared(ranks: int) -> list[tuple[str, Counter, Counter]]:
    """Collectives of each scheme as the model has them, and as they were issued (object headers apart)."""
    found = []
    for scheme, run in calls(ranks).items():
        with Recorder(ranks) as recorder:
            call = run()
        said = Counter({key: times for key, times in call.collectives.items() if key != ("broadcast", 16 * SIZES["n"])})
        found.append((scheme, said, recorder.seen))
    return found


def worker(rank: int, world: int, folder: str) -> None:
    """Measure collectives and schemes; rank 0 writes them down."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{world}", rank=rank, world_size=world)
    small, large = (_seconds(partial(dist.all_reduce, torch.zeros(size)), 10) for size in (2, 1 << 20))
    times = {}
    for scheme, run in calls(world).items():
        run()
        times[scheme] = _seconds(run, 3)
    equal = [said == seen for _, said, seen in compared(world)]
    if rank == 0:
        torch.save((small, large, times, equal), f"{folder}/{world}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _seconds(run: Callable[[], object], repeats: int) -> float:
    """The least of some runs that all ranks begin together."""
    best = math.inf
    for _ in range(repeats):
        dist.barrier()
        began = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - began)
    return best


def measured(worlds: tuple[int, ...] = (1, 2, 3)) -> list[dict[str, object]]:
    """Processes on this machine against the model, with its latency, bandwidth and speed taken here."""
    rows, alone = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for world in worlds:
            torch.multiprocessing.spawn(worker, (world, folder), nprocs=world)
            small, large, times, equal = torch.load(f"{folder}/{world}.pt")
            alone = alone or times
            hops = 2 * max(1, world - 1)
            here = Cluster(near=(small / hops, 4 * 2**20 / max(large - small, 1e-9) * hops / max(world, 2)))
            crowd = max(1.0, world / (os.cpu_count() or 1))
            for (scheme, seconds), same in zip(times.items(), equal, strict=True):
                _, talk = SCHEMES[scheme](SIZES["n"], world, on=here).seconds(here, world)
                talk *= 0.13 if scheme.startswith("Sinkhorn") else 1  # 12 iterations and one pass, not 100
                # Of an exact coupling the others wait for rank 0.
                share = 1 if scheme == "exact coupling" else crowd / world
                rows.append(
                    {
                        "scheme": scheme.split(",")[0],
                        "processes": world,
                        "collectives as in the model": same,
                        "measured, s": seconds,
                        "model, s": alone[scheme] * share + talk,
                        "of which communication, s": talk,
                    }
                )
    return rows


TITLE = "The distributed schemes up to 1024 ranks and 1e9 points: a model, not a measurement"
NOTES = """
**A model.** Seconds of one call, and the share of them that is communication; a dash where a rank would need more than
its 80 GB (with what it would need). Bytes and numbers of collectives are those of the code; the formulas are in
`docs/scale.md`. Assumed, of nodes with 8 cards of the H100 class at about half of their peaks: 30 Tflop/s in float32
(no TF32), 2e12 exponentials a second, 300 GB/s and 5 us inside a node, 50 GB/s and 15 us between nodes, nothing
overlapped, float32 points in d = 64. Exact problems: 0.5 s for n = 4096 on a CPU core, growing with n^2.5, and 50 us
for m = 128 in a batch. Set encoder: 1e5 parameters, 32 slots, elements streamed.

![seconds a call](scale_model.png)
"""

AGAINST = """
**Against processes here.** The last table runs each scheme with 1536 points a side in d = 64 over gloo. The number
and the bytes of every collective must be the model's (that is exact, and tested). Seconds: the model takes latency,
bandwidth and the speed of one process from this machine, and divides the work by the processes that have a core of
their own. Three processes on fewer cores, and a few milliseconds of Python in each call, show.
"""


if __name__ == "__main__":
    from harness import RESULTS, write

    torch.set_num_threads(1)
    RESULTS.mkdir(exist_ok=True)
    picture(Cluster(), RESULTS / "scale_model.png")
    tables, notes = {"Model": table(Cluster())}, NOTES
    if "--model" not in sys.argv:
        tables["Processes on this machine"] = measured()
        notes += AGAINST
    write("scale_model", TITLE, tables, notes)
