"""Two processes under torchrun: the global coupling is the single process's, and only rank 0 writes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flows
import mbot
from flows import checkpoint
from tests.distributed.worker import circle, loader, own_noise

ROOT = Path(__file__).parents[2]


def torchrun(task, folder):
    """Run the worker in two processes."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         "-m", "tests.distributed.worker", task, str(folder)],
        capture_output=True, text=True, cwd=ROOT, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the ranks wrote."""
    folder = tmp_path_factory.mktemp("batches")
    torchrun("batches", folder)
    return folder


@pytest.fixture(scope="module")
def served(folder):
    """What each rank was served."""
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


COUPLINGS = {"ot": mbot.OTCoupling(), "c2ot": mbot.ConditionalOTCoupling(), "w": mbot.WeightedCoupling(reg=2.0),
             "nearest": mbot.NearestNoiseCoupling(3), "own": own_noise()}  # fmt: skip


@pytest.mark.parametrize("name", COUPLINGS)
def test_the_global_coupling_is_that_of_one_process_with_twice_the_batch(name, served):
    """Step by step: the rows of rank 0 and then of rank 1 are the rows of the single process."""
    alone = loader("rank", COUPLINGS[name], batch_size=6, ot_batch_size=12)
    expected = [b for _ in range(2) for b in alone]
    got = [rank[f"global-{name}-True"] for rank in served]
    assert len(expected) == len(got[0]) == len(got[1]) == 16
    for one, *two in zip(expected, *got, strict=True):
        for field, parts in zip((one.x0, one.x1, one.y, one.weight, one.index), zip(*two, strict=True), strict=True):
            if field is not None:
                torch.testing.assert_close(torch.cat(parts), field)


@pytest.mark.parametrize("scope", ["rank", "global"])
@pytest.mark.parametrize("drop_last", [True, False])
def test_no_sample_is_seen_twice_in_an_epoch(scope, drop_last, served):
    for name in COUPLINGS:
        rows = [rank[f"{scope}-{name}-{drop_last}"] for rank in served]
        half = len(rows[0]) // 2
        assert len(rows[0]) == len(rows[1])
        for epoch in (slice(0, half), slice(half, None)):
            seen = torch.cat([row[-1] for rank in rows for row in rank[epoch]])
            assert len(seen) == len(seen.unique()) == (48 if drop_last else 50)


def test_ranks_couple_apart_with_noise_of_their_own(served):
    rows = [torch.cat([row[0] for row in rank["rank-ot-True"][:2]]) for rank in served]
    assert not torch.equal(*rows)
    data = [torch.cat([row[1] for row in rank["rank-ot-True"][:2]]) for rank in served]
    for x0, x1 in zip(rows, data, strict=True):
        assert torch.equal(mbot.OTCoupling()(x0, x1).source, torch.arange(6))


def test_workers_that_fetch_for_the_one_solve_change_nothing(served):
    for rank in served:
        for a, b in zip(rank["global-workers"], rank["global-ot-True"], strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True) if x is not None)


def test_an_error_in_the_one_solve_reaches_every_rank(served):
    assert all("needs y1" in rank["error"] for rank in served)


@pytest.mark.parametrize("name", ["plain", "soft", "stopped"])
def test_potentials_of_two_ranks_are_those_of_one_process_with_their_noises(name, folder):
    one, two = (torch.load(folder / f"fit{rank}.pt")[name] for rank in range(2))
    assert torch.equal(one["potentials"]["values"], two["potentials"]["values"])
    assert one["potentials"]["chi2"] == two["potentials"]["chi2"]
    seed = int(torch.randint(2**62, (1,), generator=torch.Generator().manual_seed(5)))
    ranks = [torch.Generator().manual_seed(seed + rank) for rank in range(2)]

    def both(n, generator):
        if n == 256:  # for the scale
            return torch.stack([circle(n, ranks[rank]) for rank in range(2)])[0]
        return torch.cat([circle(n // 2, ranks[rank]) for rank in range(2)])

    coupling = mbot.SemidiscreteCoupling.from_state_dict({**one, "batch_size": 128, "potentials": None})
    points = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    alone = coupling.fit(points, noise=both).potentials
    assert alone.steps == one["potentials"]["steps"] == (60 if name != "stopped" else alone.steps)
    assert alone.fingerprint == one["potentials"]["fingerprint"]
    torch.testing.assert_close(one["potentials"]["values"], alone.values, rtol=1e-3, atol=1e-4)
    assert one["potentials"]["chi2"] == pytest.approx(alone.chi2, abs=0.02)


def test_ranks_fit_one_data_set_with_one_coupling(folder):
    for found in (torch.load(folder / f"fit{rank}.pt") for rank in range(2)):
        assert found["classes"]["potentials"]["values"].shape == (40,)
        assert "same data set, in the same order and with the same classes" in found["bad data"]
        assert "got 2 data sets" in found["bad classes"]
        assert "data must be" in found["bad kind"]


def test_training_in_two_processes_resumes_exactly_and_writes_once(tmp_path):
    torchrun("train", tmp_path)
    loaded = {name: [torch.load(tmp_path / f"{name}{rank}.pt") for rank in range(2)] for name in ("parts", "whole")}
    assert torch.equal(*loaded["whole"])
    assert torch.equal(*loaded["parts"])
    assert torch.equal(loaded["parts"][0], loaded["whole"][0])
    assert len((tmp_path / "whole" / "metrics.csv").read_text().splitlines()) == 1 + 8
    assert len(list((tmp_path / "whole" / "checkpoints").iterdir())) == 3
    for rank in range(2):
        assert "taken is in use by process" in (tmp_path / f"taken{rank}.txt").read_text()


def test_a_model_sharded_by_fsdp2_trains_and_resumes_like_one_that_is_not(tmp_path):
    """Checkpoints hold whole tensors, so that one process can read them."""
    torchrun("sharded", tmp_path)
    plain, whole, parts = (
        checkpoint.load(tmp_path / name / "checkpoints" / "step-00000006.pt") for name in ("plain", "whole", "parts")
    )
    model = flows.models.ResidualMLP(2, num_classes=3, width=8, depth=1)
    model.load_state_dict(whole["model"])
    for name, value in plain["model"].items():
        torch.testing.assert_close(whole["model"][name], value, rtol=1e-4, atol=1e-6)
        assert torch.equal(parts["model"][name], whole["model"][name])
    moments = whole["optimizer"]["state"]["output.weight"]
    assert moments["exp_avg"].shape == (2, 8)
    assert float(moments["step"]) == 6
