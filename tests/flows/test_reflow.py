"""Annealing reflow: the noise it serves, what its two ends equal, and that a resumed run is the same."""

import math
from itertools import pairwise

import pytest
import torch
from torch.utils.data import TensorDataset

import flows
from tests.flows.toy_run import weights

SCHEDULES = ["linear", "cosine", "exp"]


def made(n=24, shape=(2,)):
    g = torch.Generator().manual_seed(0)
    return flows.PairedDataset(torch.randn(n, *shape, generator=g), torch.randn(n, *shape, generator=g))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [1, 2, 7, 100])
def test_fresh_noise_falls_from_all_to_none(schedule, warmup):
    annealing = flows.AnnealingReflow(made(), warmup, schedule)
    betas = [annealing.beta(step) for step in range(warmup + 3)]
    assert betas[0] == 1
    assert betas[warmup:] == [0] * 3
    assert all(a > b for a, b in pairwise(betas[: warmup + 1]))


def test_schedules_by_their_formulas():
    s = 0.3
    for schedule, beta in (
        ("linear", 0.7),
        ("cosine", math.cos(math.pi * s / 2) ** 2),
        ("exp", (math.exp(5 * (1 - s)) - 1) / (math.exp(5) - 1)),
    ):
        assert flows.AnnealingReflow(made(), 10, schedule).beta(3) == pytest.approx(beta)


@pytest.mark.parametrize("step", [0, 3, 7])
def test_served_noise_is_standard_normal_and_keeps_its_share_of_the_pairs(step):
    n = 20_000
    x0 = torch.randn(n, 2, generator=torch.Generator().manual_seed(1))
    annealing = flows.AnnealingReflow(flows.PairedDataset(x0, torch.zeros(n, 2)), 10)
    batch = flows.CoupledBatch(x0, torch.zeros(n, 2))
    served = annealing.anneal(batch, step, torch.Generator().manual_seed(2))
    x, bound = served.x0.double(), 5 / n**0.5
    assert float(x.mean(0).abs().max()) < bound
    assert float((x.T.cov() - torch.eye(2)).abs().max()) < 2 * bound
    beta = annealing.beta(step)
    assert served.info["beta"] == beta
    assert float((x * x0.double()).mean()) == pytest.approx(math.sqrt(1 - beta**2), abs=2 * bound)
    assert torch.equal(served.x1, batch.x1)
    assert torch.equal(batch.x0, x0)


def test_the_loader_counts_the_batches():
    annealing = flows.AnnealingReflow(made(), 8)
    loader = flows.CoupledLoader(annealing, batch_size=4, ot_batch_size=12)
    assert [loader.next_batch().info["beta"] for _ in range(10)] == [annealing.beta(step) for step in range(10)]


def test_without_warm_up_it_is_plain_reflow():
    plain = flows.CoupledLoader(made(), batch_size=4, seed=2)
    annealed = flows.CoupledLoader(flows.AnnealingReflow(made(), 3), batch_size=4, seed=2)
    for step in range(9):
        a, b = plain.next_batch(), annealed.next_batch()
        assert torch.equal(a.x1, b.x1)
        assert torch.equal(a.x0, b.x0) == (step >= 3)


def test_at_the_start_it_is_training_on_independent_pairs():
    """Noise that owes nothing to the pair's, so the batches are those of a loader with that noise as its source."""
    pairs = made()
    others = flows.PairedDataset(made(30).x0[:24].flip(0), pairs.x1)
    for one, other in zip(*(flows.CoupledLoader(flows.AnnealingReflow(p, 10**9), batch_size=24, seed=2)
                            for p in (pairs, others)), strict=True):  # fmt: skip
        assert one.info["beta"] == 1
        assert torch.equal(one.x0, other.x0)
        assert torch.equal(one.x1, other.x1)
        assert not bool(torch.isin(one.x0, pairs.x0).any())


def test_flips_mirror_both_members_of_a_pair():
    pairs = made(400, (1, 2, 3))
    batch = next(iter(flows.CoupledLoader(flows.AnnealingReflow(pairs, 0, flip=True), batch_size=400)))
    x0, x1 = pairs.x0[batch.index], pairs.x1[batch.index]
    mirrored = (batch.x0 != x0).flatten(1).any(1)
    assert 150 < int(mirrored.sum()) < 250
    assert torch.equal(batch.x0[mirrored], x0[mirrored].flip(-1))
    assert torch.equal(batch.x1[mirrored], x1[mirrored].flip(-1))
    assert torch.equal(batch.x1[~mirrored], x1[~mirrored])


def trainer(out=None, dataset=None, **settings):
    torch.manual_seed(0)
    model = flows.models.ResidualMLP(2, width=8, depth=1)
    dataset = flows.AnnealingReflow(made(), 9) if dataset is None else dataset
    loader = flows.CoupledLoader(dataset, batch_size=4, ot_batch_size=8, seed=1)
    settings = {"steps": 12, "checkpoint_every": 5 if out else None, "ema": 0.9, **settings}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    return flows.Trainer(model, loader, out=out, optimizer=optimizer, progress=False, **settings)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_is_the_same(accumulate, tmp_path):
    whole = trainer(accumulate=accumulate)
    whole.fit()
    trainer(tmp_path, accumulate=accumulate, steps=5).fit()
    rest = trainer(tmp_path, accumulate=accumulate)
    rest.fit(resume=True)
    assert rest.step == 12
    assert torch.equal(weights(rest), weights(whole))


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (lambda: flows.AnnealingReflow(made(), 8), "differ in annealing: saved AnnealingReflow"),
        (lambda: flows.AnnealingReflow(made(), 9, "exp"), "differ in annealing"),
        (made, "differ in annealing: saved .*here None"),
        (lambda: flows.AnnealingReflow(made(28)[:24], 9), "differ in pairs"),
    ],
)
def test_a_run_of_other_settings_is_not_gone_on_with(other, says, tmp_path):
    trainer(tmp_path, steps=5).fit()
    with pytest.raises(flows.CheckpointError, match=says):
        trainer(tmp_path, other()).fit(resume=True)


def test_a_model_learns_the_pairs():
    """Reflow on pairs of a linear map: one Euler step of the student is the map."""
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    x0 = torch.randn(256, 2, generator=torch.Generator().manual_seed(0))
    pairs = flows.PairedDataset(x0, 0.5 * x0 @ turn + 1)

    model = flows.models.ResidualMLP(2, width=32, depth=1)
    loader = flows.CoupledLoader(flows.AnnealingReflow(pairs, 60), batch_size=64)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    flows.Trainer(model, loader, steps=200, optimizer=optimizer, ema=0.99, progress=False).fit()
    fresh = torch.randn(200, 2, generator=torch.Generator().manual_seed(5))
    got = flows.integrate(model.eval(), fresh, method="euler", steps=1).final
    error = (got - (0.5 * fresh @ turn + 1)).square().mean()
    assert float(error) < 0.05


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        ((TensorDataset(torch.zeros(4, 2)), 3), TypeError, "must be a flows.PairedDataset; got TensorDataset"),
        ((made(), -1), ValueError, "warmup_steps must be at least 0"),
        ((made(), 2.5), TypeError, "warmup_steps"),
        ((made(), 3, "slow"), ValueError, "schedule must be one of .*linear"),
    ],
)
def test_bad_input(arguments, kind, says):
    with pytest.raises(kind, match=says):
        flows.AnnealingReflow(*arguments)
    with pytest.raises(ValueError, match=r"flip mirrors images .*; these pairs have samples of shape \(2,\)"):
        flows.AnnealingReflow(made(), 3, flip=True)


def eight(n, generator=None):
    return flows.datasets.eight_gaussians(n, generator=generator)


@pytest.mark.parametrize("step", [0, 3, 7, 10])
def test_start_points_of_another_kind_are_replaced_by_fresh_ones(step):
    """A share β of them, so that all are of that kind at every step."""
    n = 20_000
    pairs = flows.PairedDataset(eight(n, torch.Generator().manual_seed(1)), torch.zeros(n, 2))
    annealing = flows.AnnealingReflow(pairs, 10, source=eight)
    served = annealing.anneal(flows.CoupledBatch(pairs.x0, pairs.x1), step, torch.Generator().manual_seed(2))
    kept = (served.x0 == pairs.x0).all(1).float().mean()
    assert float(kept) == pytest.approx(1 - annealing.beta(step), abs=0.02)
    assert float(served.x0.mean(0).abs().max()) < 5 * 3.6 / n**0.5
    assert float((served.x0.norm(dim=1) - 5).abs().quantile(0.99)) == pytest.approx(
        float((pairs.x0.norm(dim=1) - 5).abs().quantile(0.99)), abs=0.06
    )


def test_a_source_of_the_wrong_kind_is_told():
    with pytest.raises(TypeError, match=r"source must be a function of \(n, generator\)"):
        flows.AnnealingReflow(made(), 10, source=torch.randn(4, 2))
    annealing = flows.AnnealingReflow(made(), 10, source=lambda n, generator: torch.randn(n, 3))
    with pytest.raises(ValueError, match=r"shape \(24, 2\); got \(24, 3\)"):
        annealing.anneal(flows.CoupledBatch(made().x0, made().x1), 0)
    annealing = flows.AnnealingReflow(made(), 10, source=lambda n, generator: (torch.randn(n, 2), None))
    with pytest.raises(ValueError, match=r"shape \(24, 2\); got tuple"):
        annealing.anneal(flows.CoupledBatch(made().x0, made().x1), 0)
