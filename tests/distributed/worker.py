"""What one process of the distributed tests does; started by torchrun. Arguments: the task, the folder."""

import gc
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import flows
import mbot
from flows.commands.common import processes
from flows.folder_lock import FolderLock
from tests.flows.toy_run import trainer, weights


def data():
    """The same in every process."""
    g = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(50, 2, generator=g), torch.randint(0, 3, (50,), generator=g))


def sharded(folder, rank):
    """A model sharded by FSDP2 is trained as one that is not: in one go, and with a stop in the middle."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def run(name, shard, steps):
        torch.manual_seed(0)
        model = flows.models.ResidualMLP(2, num_classes=3, width=8, depth=1)
        if shard:
            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        pairs = loader("rank", mbot.OTCoupling(), batch_size=5, ot_batch_size=10)
        return flows.Trainer(
            model, pairs, steps=steps, out=folder / name, ema=None, clip=0.5, accumulate=2, checkpoint_every=3,
            progress=False,
        )  # fmt: skip

    for name, shard in (("plain", False), ("whole", True)):
        run(name, shard, 6).fit()
    run("parts", True, 3).fit()
    stopped = run("parts", True, 6)
    stopped.fit(resume=True)
    assert all(hasattr(p, "full_tensor") for p in stopped.model.parameters())
    for wrong, says in (({"ema": 0.9}, "give ema=None"), ({"ema": None, "preview": print}, "leave preview out")):
        with pytest.raises(ValueError, match=says):
            flows.Trainer(stopped.model, stopped.loader, steps=1, **wrong)


def loader(scope, coupling, **sizes):
    """The data of the comparison with one process."""
    return flows.CoupledLoader(data(), None, coupling, seed=7, coupling_scope=scope, **sizes)


def own_noise():
    """Noises fitted to these data and then shuffled, so that there is much to exchange."""
    coupling = mbot.DataCoupling(num_noises=2).fit(data().tensors[0], generator=torch.Generator().manual_seed(1))
    number = torch.randperm(100, generator=torch.Generator().manual_seed(2)).reshape(50, 2)
    return replace(coupling, assignment=replace(coupling.assignment, number=number))


def batches(folder, rank):
    """Two epochs of every kind of loader, and an error in rank 0's solve."""
    served = {}
    for scope in ("rank", "global"):
        for name, coupling in (
            ("ot", mbot.OTCoupling()),
            ("c2ot", mbot.ConditionalOTCoupling()),
            ("w", mbot.WeightedCoupling(reg=2.0)),
            ("nearest", mbot.NearestNoiseCoupling(3)),
            ("own", own_noise()),
        ):
            for drop_last in (True, False):
                one = loader(scope, coupling, batch_size=3, ot_batch_size=6, drop_last=drop_last)
                rows = [(b.x0, b.x1, b.y, b.weight, b.index) for _ in range(2) for b in one]
                served[f"{scope}-{name}-{drop_last}"] = rows
    one = loader("global", mbot.OTCoupling(), batch_size=3, ot_batch_size=6, num_workers=1)
    served["global-workers"] = [(b.x0, b.x1, b.y, b.weight, b.index) for _ in range(2) for b in one]
    one.close()
    plain = TensorDataset(torch.randn(50, 2))
    try:
        next(iter(flows.CoupledLoader(plain, None, mbot.ConditionalOTCoupling(), 3, 6, coupling_scope="global")))
    except ValueError as error:
        served["error"] = str(error)
    torch.save(served, folder / f"rank{rank}.pt")
    fit(folder, rank)


def circle(n, generator):
    """Noises of one norm: their scale is the same, whoever measures it."""
    angle = torch.rand(n, generator=generator) * 2 * torch.pi
    return torch.stack((angle.cos(), angle.sin()), 1)


def fit(folder, rank):
    """Potentials of one data set by both ranks, and data sets that differ."""
    points = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    y = torch.arange(40) % 3
    found = {}
    for name, settings in (("plain", {}), ("soft", {"reg": 0.3}), ("classes", {"conditional": True}),
                           ("stopped", {"reg": 0.3, "stop_at": 0.5})):  # fmt: skip
        coupling = mbot.SemidiscreteCoupling(steps=60, batch_size=64, tol=1e9, **settings)
        generator = torch.Generator().manual_seed(5)
        found[name] = mbot.distributed.fit(coupling, points, y, noise=circle, generator=generator).state_dict()
    for name, data, labels in (("data", points + rank, y), ("classes", points, y.roll(rank)), ("kind", [rank], y)):
        try:
            mbot.distributed.fit(coupling, data, labels)
        except (ValueError, TypeError) as error:
            found[f"bad {name}"] = str(error)
    torch.save(found, folder / f"fit{rank}.pt")


def train(folder, rank):
    """A run in two parts, and the same in one; before, a folder that another process trains in."""
    if rank == 1:
        FolderLock(folder / "taken")._acquire()
    dist.barrier()
    try:
        trainer(folder / "taken", steps=2).fit()
    except flows.CheckpointError as error:
        (folder / f"taken{rank}.txt").write_text(str(error))
    for name, steps in (("parts", (9, 16)), ("whole", (16,))):
        for count in steps:
            run = trainer(folder / name, steps=count, loader={"coupling_scope": "global"})
            run.fit(resume=True)
        torch.save(weights(run), folder / f"{name}{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with processes("cpu", 600):
        world = weakref.ref(dist.group.WORLD)
        {"batches": batches, "train": train, "sharded": sharded}[sys.argv[1]](Path(sys.argv[2]), dist.get_rank())
        dist.barrier()
    assert not [model for model in gc.get_objects() if type(model) is DistributedDataParallel]
    assert world() is None or sys.argv[1] == "sharded"  # torch keeps the meshes of sharded tensors in its caches
