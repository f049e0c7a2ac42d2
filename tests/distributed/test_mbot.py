"""Couplings and losses over several processes equal those of one process; a lost process ends the others."""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

import mbot
import setenc
from mbot.distributed import GlobalCoupling, spread

MODULES = ["torch", "torch.distributed", "mbot.distributed", "mbot.kernels.assignment", "tests.distributed.test_mbot"]


def start(function, world, *args, join=True):
    """Processes forked from one that has imported everything."""
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(MODULES)
    return multiprocessing.start_processes(function, (world, *args), world, join, start_method="forkserver")


def group(rank, world, file, **options):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world, **options)


def sizes(world, total):
    """Unequal shares of the rows."""
    return [total // world + (1 if r == 0 else -1 if r == 1 else 0) for r in range(world)][:world]


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


# -- couplings ---------------------------------------------------------------------------------------------------------


# Solved on rank 0 whatever they are, so one of each form of result; and what is shared out, held and made in tiles.
SPREAD = [
    mbot.OTCoupling(),
    mbot.OTCoupling(mbot.PartialOT(mass=0.7)),
    mbot.OTCoupling(mbot.EntropicOT(reg=0.5), replacement=True),
    mbot.BoMbCoupling(num_batches=3),
    mbot.ConditionalOTCoupling(),
    mbot.WeightedCoupling(reg=1.0),
    mbot.SinkhornCoupling(reg=0.5),
    mbot.SinkhornCoupling(reg=1.0, relative=False, cost="sqeuclidean", cells=200),
]


def same_pairs(ours, theirs):
    assert torch.equal(ours.source, theirs.source)
    assert torch.equal(ours.target, theirs.target)
    assert (ours.weight is None) == (theirs.weight is None)
    if theirs.weight is not None:
        torch.testing.assert_close(ours.weight, theirs.weight)
    for key, value in theirs.info.items():
        if isinstance(value, float):
            assert ours.info[key] == pytest.approx(value, rel=1e-6, abs=1e-9), key


def one_coupling(coupling, rank, world, dtype):
    counts = sizes(world, 36)
    x0 = torch.randn(36, 2, 3, generator=seeded(0), dtype=dtype)
    x1 = torch.randn(36, 2, 3, generator=seeded(1), dtype=dtype) + 1
    y1 = torch.randint(0, 3, (36,), generator=seeded(2))
    mine0, mine1, labels = (t.split(counts)[rank] for t in (x0, x1, y1))
    alone = coupling(x0, x1, y1=y1, generator=seeded())
    everywhere = GlobalCoupling(coupling)(mine0, mine1, y1=labels, generator=seeded(5 + rank))
    same_pairs(everywhere, alone)

    # Labels of any kind, and of another on each rank.
    kinds = [labels.to(torch.int16), labels.tolist(), {"a": labels.numpy()}["a"]]
    same_pairs(GlobalCoupling(coupling)(mine0, mine1, y1=kinds[rank], generator=seeded(5 + rank)), alone)

    # Samples change places: the pairs of this rank's targets, in order.
    here = everywhere.here()
    begin = sum(counts[:rank])
    kept = (alone.target >= begin) & (alone.target < begin + counts[rank])
    assert torch.equal(here.source, alone.source[kept])
    assert torch.equal(here.target, alone.target[kept] - begin)
    a, b = everywhere.exchange(mine0, mine1)
    assert torch.equal(a, x0[alone.source[kept]])
    assert torch.equal(b, x1[alone.target[kept]])
    holder, row = everywhere.owner(alone.source)
    assert torch.equal(
        torch.tensor(counts)[:world].cumsum(0)[holder] - torch.tensor(counts)[holder] + row, alone.source
    )

    # Noise that all ranks hold, and targets interleaved.
    place = torch.randperm(36, generator=seeded(3)).split(counts)[rank]
    shared = GlobalCoupling(coupling, source="shared")
    again = shared(x0, x1[place], y1=y1[place], generator=seeded(5 + rank), place=place)
    same_pairs(again, alone)
    mine = again.here()
    assert torch.equal(place[mine.target], alone.target[torch.isin(alone.target, place)])
    assert torch.equal(again.fetch(x0), x0[mine.source])


def labelled(coupling, rank, world):
    """Sources with labels of their own, other class counts than the targets', spread or held by all."""
    x0, x1 = torch.randn(24, 2, generator=seeded(0)), torch.randn(36, 2, generator=seeded(1))
    y0, y1 = (torch.randint(0, 3, (n,), generator=seeded(n)) for n in (24, 36))
    alone = coupling(x0, x1, y0, y1, generator=seeded())
    at0, at1 = (slice(sum(sizes(world, n)[:rank]), sum(sizes(world, n)[: rank + 1])) for n in (24, 36))
    same_pairs(GlobalCoupling(coupling)(x0[at0], x1[at1], y0[at0], y1[at1], generator=seeded()), alone)
    here = GlobalCoupling(coupling, source="shared")(x0, x1[at1], y0.tolist(), y1[at1], generator=seeded()).here()
    assert torch.equal(y0[here.source], y1[at1][here.target])
    for ignoring in (mbot.OTCoupling(), mbot.SinkhornCoupling(0.5)):
        with pytest.warns(UserWarning, match=f"{type(ignoring).__name__} ignores the conditions") as told:
            GlobalCoupling(ignoring)(x0[at0], x1[at1], y0[at0], y1[at1], generator=seeded())
        assert len(told) == 1


def loaded(scope, world=1):
    """Batches between two labelled data sets, of which the source is transformed at random."""
    from tests.flows.test_labelled_sources import SOURCE, Shaken
    from tests.flows.test_labelled_sources import loader as between

    one = between(source=Shaken(*SOURCE.tensors), source_sampling="matched", batch_size=12 // world,
                  ot_batch_size=24 // world, coupling_scope=scope)  # fmt: skip
    return [one.next_batch() for _ in range(9)]


def refused(rank, world):
    """What is wrong on one rank is raised on all."""
    x = torch.randn(4, 2)
    couple = GlobalCoupling(mbot.OTCoupling())
    with pytest.raises(ValueError, match="finite") as caught:
        couple(torch.full_like(x, torch.nan) if rank == 1 else x, x)
    assert "rank 1" in caught.value.__notes__[0]
    with pytest.raises(ValueError, match="one dtype and shape"):
        couple(x[:, : 1 + rank % 2], x[:, : 1 + rank % 2])
    with pytest.raises(ValueError, match="needs y1"):
        GlobalCoupling(mbot.ConditionalOTCoupling())(x, x)
    conditional = GlobalCoupling(mbot.ConditionalOTCoupling())
    with pytest.raises(ValueError, match=r"y1 must hold one condition for each of the 4 samples of x1; got [35]"):
        conditional(x, x, y1=torch.zeros([5, 3, 4][rank]))  # as many labels as samples, on all ranks together
    with pytest.raises(TypeError, match="got str"):
        conditional(x, x, y1=["a", "b"] * 2 if rank else "abab")
    with pytest.raises(ValueError, match="class 'a': 0 in y0"):
        conditional(x, x, torch.zeros(4), ["a"] * 4 if rank else torch.zeros(4))
    with pytest.raises(ValueError, match="every position of the batch once"):
        couple(x, x, place=torch.arange(4))
    with pytest.raises(ValueError, match="passes all of x0"):
        GlobalCoupling(mbot.OTCoupling(), source="shared")(x[: 4 - rank], x)
    with pytest.raises(ValueError, match="holds all of x0"):
        GlobalCoupling(mbot.OTCoupling(), source="shared")(x, x).owner(torch.arange(2))


# -- losses ------------------------------------------------------------------------------------------------------------


def means(x, y):
    return (x.mean(-2) - y.mean(-2)).square().sum(-1)


LOSSES = {
    "m-OT": lambda: mbot.MiniBatchOT(mbot.ExactOT(), num_batches=4, batch_size=5),
    "aligned": lambda: mbot.MiniBatchOT(mbot.PartialOT(0.7), num_batches=5, batch_size=4, pairing="aligned"),
    "m-UOT": lambda: mbot.MiniBatchOT(mbot.UnbalancedOT(0.5, 1.0, tol=1e-10), num_batches=(2, 3), batch_size=(5, 4)),
    "debiased": lambda: mbot.MiniBatchOT(mbot.ExactOT(), num_batches=3, batch_size=4, debiased=True),
    "BoMb-OT": lambda: mbot.BoMbOT(mbot.ExactOT(), num_batches=4, batch_size=5),
    "e-BoMb-OT": lambda: mbot.BoMbOT(mbot.EntropicOT(0.5, tol=1e-10), num_batches=4, batch_size=4, reg=0.5),
    "BoMb-SW": lambda: mbot.BoMbOT(mbot.SlicedOT(8), num_batches=4, batch_size=4, generator=seeded()),
    "callable": lambda: mbot.BoMbOT(means, num_batches=3, batch_size=4),
}  # fmt: skip


def embedding():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def flat(net, world=1):
    """The network's gradient, averaged over the ranks as DistributedDataParallel does."""
    total = torch.cat([p.grad.flatten() for p in net.parameters()])
    if world > 1:
        dist.all_reduce(total)
    return total / world


def batches(name, world):
    """Mini-batches of all ranks: those of rank 0, then 1, …; unequal in number, and for one loss in size."""
    make, counts = LOSSES[name](), [2 + r % 2 for r in range(world)]
    sides = []
    for side in range(4 if name == "debiased" else 2):
        at = [make.batch_size[side % 2] + (r if name == "m-UOT" else 0) for r in range(world) for _ in range(counts[r])]
        sides.append([torch.randn(m, 2, generator=seeded(10 * side + i), dtype=torch.float64) + side / 2
                      for i, m in enumerate(at)])  # fmt: skip
    return sides, counts


def one_loss(name, rank, world):
    sides, counts = batches(name, world)
    begin = sum(counts[:rank])
    mine = [side[begin : begin + counts[rank]] for side in sides]
    nets = [embedding() for _ in range(4)]
    alone = LOSSES[name]().from_batches(*[[nets[0](b) for b in side] for side in sides])
    alone.backward()
    ours = spread(LOSSES[name]()).from_batches(*[[nets[1](b) for b in side] for side in mine])
    ours.backward()
    torch.testing.assert_close(ours, alone, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(flat(nets[1], world), flat(nets[0]), rtol=1e-8, atol=1e-10)

    # Through DistributedDataParallel; only the source side learns, and on one rank the targets ask for gradients too.
    wrapped = DistributedDataParallel(nets[2])
    sizes_here = [len(b) for b in mine[0]]
    targets = [[b.clone().requires_grad_(rank == 0) for b in side] for side in mine]
    LOSSES[name]().from_batches(*[[nets[3](b) for b in s] if i == 0 else [b.tile(1, 2)[:, :3] for b in s]
                                  for i, s in enumerate(sides)]).backward()  # fmt: skip
    embedded = wrapped(torch.cat(mine[0])).split(sizes_here)
    spread(LOSSES[name]()).from_batches(
        embedded, *[[b.tile(1, 2)[:, :3] for b in side] for side in targets[1:]]
    ).backward()
    torch.testing.assert_close(flat(nets[2]), flat(nets[3]), rtol=1e-8, atol=1e-10)

    # Drawn from clouds that every rank holds.
    x = torch.randn(30, 2, generator=seeded(1), dtype=torch.float64, requires_grad=True)
    y = torch.randn(25, 2, generator=seeded(2), dtype=torch.float64) + 1
    results = []
    for change in (lambda loss: loss, spread):
        loss = LOSSES[name]()
        loss.generator = seeded()
        x.grad = None
        value = change(loss)(x, y)
        value.backward()
        results.append((value.detach(), x.grad.clone(), loss.generator.get_state()))
    dist.all_reduce(results[1][1])
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(results[1][1] / world, results[0][1], rtol=1e-8, atol=1e-10)
    assert torch.equal(results[1][2], results[0][2])


def low_memory(rank, world):
    sides, counts = batches("BoMb-OT", world)
    begin = sum(counts[:rank])
    nets = [embedding(), embedding()]
    LOSSES["BoMb-OT"]().from_batches(*[[nets[0](b) for b in side] for side in sides]).backward()
    mine = [side[begin : begin + counts[rank]] for side in sides]
    spread(LOSSES["BoMb-OT"]()).backward_by_pair(nets[1], *mine)
    torch.testing.assert_close(flat(nets[1], world), flat(nets[0]), rtol=1e-8, atol=1e-10)


def refused_losses(rank, world):
    loss = spread(LOSSES["BoMb-OT"]())
    x = torch.randn(2, 4, 3)
    with pytest.raises(ValueError, match="finite"):
        loss.from_batches(x, x / (rank != 1))
    x = x.double() if rank else x
    with pytest.raises(ValueError, match="of one kind"):
        loss.from_batches(x, x)
    torch.manual_seed(rank)
    with pytest.raises(ValueError, match="generator="):
        loss(torch.randn(50, 2), torch.randn(50, 2))
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="not spread"):
        loss.plan(torch.randn(50, 2), torch.randn(50, 2))
    with pytest.raises(ValueError, match="generator="):
        spread(mbot.BoMbOT(mbot.SlicedOT(), num_batches=2, batch_size=2))


def compare(rank, world, file):
    group(rank, world, file, timeout=timedelta(seconds=600))
    for coupling in SPREAD:
        one_coupling(coupling, rank, world, torch.float64)
    one_coupling(mbot.OTCoupling(), rank, world, torch.bfloat16)
    labelled(mbot.ConditionalOTCoupling(), rank, world)
    for whole, part in zip(torch.load(f"{file}.batches", weights_only=False), loaded("global", world), strict=True):
        mine = slice(rank * len(part), (rank + 1) * len(part))
        for name in ("x0", "x1", "y", "y0", "index"):
            assert torch.equal(getattr(whole, name)[mine], getattr(part, name)), name
    resumed(rank, world)
    refused(rank, world)
    for name in LOSSES:
        one_loss(name, rank, world)
    low_memory(rank, world)
    refused_losses(rank, world)
    counted(world)
    finish()


def counted(world):
    """The cost model of docs/scale.md has every collective that is issued, and its bytes."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    import scale_model

    scale_model.SIZES.update(n=192 * world, d=8, m=32)
    for scheme, said, issued in scale_model.compared(world):
        assert said == issued, f"{scheme}: model only {said - issued}, issued only {issued - said}"


def resumed(rank, world):
    """A warm start from a previous call's potentials, which are whole on every rank."""
    x0, x1 = (torch.randn(24, 2, generator=seeded(s), dtype=torch.float64) for s in range(2))
    coupling = mbot.SinkhornCoupling(0.2)
    counts = sizes(world, 24)
    ours = GlobalCoupling(coupling)(x0.split(counts)[rank], x1.split(counts)[rank], generator=seeded())
    alone = coupling(x0, x1, generator=seeded())
    x0 = x0 + 0.01
    again = GlobalCoupling(coupling.resume(ours.info))(
        x0.split(counts)[rank], x1.split(counts)[rank], generator=seeded()
    )
    same_pairs(again, coupling.resume(alone.info)(x0, x1, generator=seeded()))
    assert again.info["iterations"] <= ours.info["iterations"]


def finish():
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # everything passed; threads of gloo may abort the interpreter's own way out


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_equal_one_process(world, tmp_path):
    torch.save(loaded("rank"), tmp_path / "rendezvous.batches")
    start(compare, world, tmp_path / "rendezvous")


def on_the_device(rank, world, file, device, backend):
    """Samples on a device, collectives where the backend has them."""
    dist.init_process_group(backend, init_method=f"file://{file}", rank=rank, world_size=world)
    x0, x1 = (torch.randn(40, 3, generator=seeded(s), dtype=torch.float64).to(device) for s in range(2))
    for coupling in (mbot.OTCoupling(), mbot.ConditionalOTCoupling(), *SPREAD[-2:]):
        labels = torch.randint(0, 3, (40,), generator=seeded(2)).to(device)
        ours = GlobalCoupling(coupling)(x0, x1, y1=labels, generator=seeded())
        same_pairs(ours, coupling(x0, x1, y1=labels, generator=seeded()))
        assert torch.equal(ours.exchange(x0, x1)[0], x0[ours.source])
        assert ours.source.device == x1.device
    for name in ("BoMb-OT", "m-UOT"):
        xs, ys = x0.reshape(4, 10, 3).clone().requires_grad_(), x1.reshape(4, 10, 3)
        grads = []
        for loss in (LOSSES[name](), spread(LOSSES[name]())):
            xs.grad = None
            loss.from_batches(xs, ys).backward()
            grads.append(xs.grad)
        torch.testing.assert_close(*grads)
    finish()


def test_one_process_alone_on_the_cpu(tmp_path):
    start(on_the_device, 1, tmp_path / "rendezvous", "cpu", "gloo")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_samples_on_a_gpu(backend, tmp_path):
    start(on_the_device, 1, tmp_path / "rendezvous", "cuda", backend)


def test_without_a_process_group():
    with pytest.raises(ValueError, match="init_process_group"):
        GlobalCoupling(mbot.OTCoupling())(torch.randn(2, 2), torch.randn(2, 2))
    with pytest.raises(ValueError, match="init_process_group"):
        spread(LOSSES["m-OT"]())
    with pytest.raises(TypeError, match="mbot coupling"):
        GlobalCoupling("ot")
    with pytest.raises(TypeError, match="MiniBatchOT"):
        spread(mbot.ExactOT())
    with pytest.raises(ValueError, match="source must be one of"):
        GlobalCoupling(mbot.OTCoupling(), source="all")


# -- a lost rank -------------------------------------------------------------------------------------------------------

TIMEOUT = 4


def work(kind, among):
    """A call that all ranks make, over and over."""
    x = torch.randn(64, 2)
    if kind == "exact":
        GlobalCoupling(mbot.OTCoupling(), among)(x, x)
    elif kind == "sinkhorn":
        GlobalCoupling(mbot.SinkhornCoupling(1.0), among)(x, x)
    elif kind == "loss":
        xs, ys = x.reshape(4, 16, 2).requires_grad_(), x.reshape(4, 16, 2)
        spread(LOSSES["BoMb-OT"](), among).from_batches(xs, ys).backward()
    else:
        enc = setenc.UMBC(None, setenc.SlotPooling(2, 4, 2, num_heads=2), setenc.MLPDecoder(4, 1))
        setenc.encode(enc, x[None], gradient="exact", chunk_size=16, group=among).sum().backward()


def losing(rank, world, folder, kind, loss):
    """The last rank is lost in the middle; the others write down with what they end."""
    torch.manual_seed(0)
    group(rank, world, folder / "rendezvous", timeout=timedelta(seconds=600))
    work(kind, None)  # what is loaded and compiled at first takes its time
    try:
        among = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
        work(kind, among)
        if rank == world - 1:
            os.kill(os.getpid(), loss)
        while True:
            work(kind, among)
    except Exception as error:
        (folder / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
        os._exit(3)


@pytest.mark.parametrize("kind", ["exact", "sinkhorn", "loss", "encode"])
def test_a_rank_that_dies_ends_the_others_with_an_error(kind, tmp_path):
    lose(tmp_path, kind, signal.SIGKILL)


def test_a_rank_that_hangs_ends_the_others_at_the_timeout(tmp_path):
    lose(tmp_path, "sinkhorn", signal.SIGSTOP)


def lose(folder, kind, loss):
    processes = start(losing, 3, folder, kind, loss, join=False).processes
    deadline = time.monotonic() + 600  # of the test; the group's timeout is far shorter
    try:
        for process in processes[:2]:
            process.join(max(0, deadline - time.monotonic()))
            assert process.exitcode == 3, f"still running, or ended otherwise: {process.exitcode}"
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert all((folder / f"{rank}.txt").read_text().startswith(("RuntimeError", "Dist")) for rank in range(2))
