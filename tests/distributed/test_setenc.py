"""Sets spread over processes: states merge, and gradients are those of one process that holds everything."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

import setenc

POOLINGS = (
    lambda: setenc.SlotPooling(8, 8, 3, num_heads=2),
    lambda: setenc.SlotPooling(8, 8, 3, num_heads=2, activation="slot-sigmoid", slots="learned"),
    lambda: setenc.DeepSetsPooling(8, 8, "max"),
    lambda: setenc.DeepSetsPooling(8, 8, "sum"),
    lambda: setenc.JointPooling(setenc.SlotPooling(8, 8, 3, num_heads=2), setenc.InstancePooling(8, 8, 4)),
    lambda: setenc.DSMILPooling(8, 8),
)


def encoder(make):
    torch.manual_seed(4)
    extractor = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8))
    pooling = make()
    mass = pooling.has_masses
    return setenc.UMBC(extractor, pooling, setenc.MLPDecoder(8, 2), size_feature=True, mass_feature=mass).double()


def gradients(enc, x, *, seed, average=False, **options):
    enc.zero_grad()
    x = x.clone().requires_grad_() if isinstance(x, torch.Tensor) else x
    torch.manual_seed(seed)
    loss = setenc.encode(enc, x, **options).sin().sum()
    loss.backward()
    found = {
        name.removeprefix("module."): torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in enc.named_parameters()
    }
    if average:
        for gradient in found.values():
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
    return (
        loss.detach(),
        {name: g.clone() for name, g in found.items()},
        getattr(x, "grad", None),
    )


def parallel(enc):
    # A copy: the hooks of a wrapper stay on the parameters it once wrapped.
    return DistributedDataParallel(copy.deepcopy(enc))


def same(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=1e-12)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(ours[1][name], gradient, rtol=1e-10, atol=1e-11, msg=name)


def worker(rank, world, file):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    everything = dist.group.WORLD
    x = torch.randn(2, 13, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = x.tensor_split([7] if world == 2 else [7, 7], 1)  # of three ranks, one has no element
    for make in POOLINGS:
        enc = encoder(make)
        whole = gradients(enc, x, seed=0, chunk_size=4, gradient="exact")
        for mode in ("full", "exact"):
            options = {"chunk_size": 4, "gradient": mode, "group": everything}
            split = gradients(enc, parts[rank], seed=rank, average=True, **options)
            same(split, whole)
            mine = whole[2].tensor_split([7] if world == 2 else [7, 7], 1)[rank]
            ours = torch.zeros_like(mine) if split[2] is None else split[2]
            torch.testing.assert_close(ours, world * mine, rtol=1e-10, atol=1e-11)
            same(gradients(parallel(enc), parts[rank], seed=rank, **options), whole)
            empty = [parts[rank][:, :0], lambda: iter([parts[rank][:, :0]]), [s[:0] for s in parts[rank]]][rank]
            nobody = gradients(parallel(enc), empty, seed=rank, **options)
            same(nobody, gradients(enc, x[:, :0], seed=0))
        # Ranks with sets of their own: plain data parallelism, scales applied before the reduction.
        for mode in ("full", "exact", "sampled"):
            alone = [gradients(enc, x[:, r:], seed=9, chunk_size=3, gradient=mode) for r in range(world)]
            mean = {name: sum(a[1][name] for a in alone) / world for name in alone[0][1]}
            ours = gradients(parallel(enc), x[:, rank:], seed=9, chunk_size=3, gradient=mode)
            same(ours, (alone[rank][0], mean))
    states(rank, parts, x)
    errors(rank, world, parts)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # everything passed; threads of gloo may abort the interpreter's own way out


def states(rank, parts, x):
    pooling = setenc.SlotPooling(2, 8, 3).double().train()
    torch.manual_seed(rank)
    start = pooling.init_state(2, group=dist.group.WORLD)
    mine = pooling.update(start, parts[rank]).all_reduce()
    everything = pooling.update(start.empty(), x)
    torch.testing.assert_close(pooling.readout(mine), pooling.readout(everything), rtol=1e-12, atol=1e-12)
    assert mine.count.tolist() == [13, 13]
    with pytest.raises(ValueError, match="ranks must share their slots"):
        pooling.init_state(2).all_reduce()


def errors(rank, world, parts):
    """An error of one rank, or a difference between the ranks, is an error on every rank: nobody waits for ever."""
    everything = dist.group.WORLD
    last = world - 1
    for make in POOLINGS[:2]:
        enc = encoder(make)
        x = parts[rank][:, :5] if rank == 0 else parts[0][:, 5:]
        wrong = {
            "nothing": (lambda: iter(()), "the chunks must be at least one"),
            "features": (x[..., :1], "mat1 and mat2 shapes cannot be multiplied|shape"),
            "not finite": (x * torch.nan, "must be finite"),
            "breaks off": (lambda: (1 / 0 for _ in range(2)), "division by zero"),
            "weights": (lambda x=x: iter([(x, None, -torch.ones(2, 2))]), "must have shape|not negative"),
        }
        for data, words in wrong.values():
            for mode in ("full", "exact", "sampled", "none"):
                mine = rank == last
                error = Exception if mine else RuntimeError
                with pytest.raises(error, match=words if mine else f"encode failed on rank {last} of the group"):
                    setenc.encode(enc, data if mine else x, chunk_size=2, gradient=mode, group=everything)
        with pytest.raises(ValueError, match="all ranks must have the same batch size; it ranges from 1 to 2"):
            setenc.encode(enc, x[: 1 if rank == last else 2], group=everything)
        with pytest.raises(ValueError, match="all ranks must have the same gradient"):
            setenc.encode(enc, x, gradient="exact" if rank == last else "full", group=everything)
        with pytest.raises(ValueError, match="all ranks must have the same training mode"):
            setenc.encode(encoder(make).train(rank == last), x, group=everything)
        # In backward too.
        calls = []

        def chunks(x=x, calls=calls):
            calls.append(None)
            again = rank == last and len(calls) > 1
            return iter((x + 1 if again else x).split(2, 1))

        out = setenc.encode(enc, chunks, gradient="exact", group=everything)
        words = "the state of the set differs" if rank == last else f"failed on rank {last}"
        with pytest.raises((ValueError, RuntimeError), match=words):
            out.sum().backward()


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_equal_one_process(world, tmp_path):
    multiprocessing.spawn(worker, (world, tmp_path / "rendezvous"), nprocs=world)


def test_all_reduce_without_a_process_group():
    with pytest.raises(ValueError, match="init_process_group"):
        setenc.DeepSetsPooling(2, 2).init_state(1).all_reduce()
