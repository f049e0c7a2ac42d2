"""Flow matching: what a batch holds, what the loss is, and that it can be minimised."""

from dataclasses import dataclass

import pytest
import torch

import flows
import mbot
from flows import FlowMatching, LinearPath


def pair(n=16, shape=(2,)):
    return torch.randn(n, *shape), torch.randn(n, *shape) + 3


def test_points_lie_on_the_lines_and_velocities_are_their_slopes():
    x0, x1 = pair(shape=(3, 4, 4))
    batch = FlowMatching(mbot.OTCoupling()).sample(x0, x1)
    pairs = mbot.OTCoupling()(x0, x1)
    start, end = pairs.apply(x0, x1)
    t = batch.t.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(batch.xt, (1 - t) * start + t * end)
    torch.testing.assert_close(batch.ut, end - start)
    assert 0 <= float(batch.t.min()) <= float(batch.t.max()) <= 1
    assert batch.t.shape == (16,)


def test_sigma_adds_noise_of_its_size_and_leaves_the_velocity():
    x0, x1 = torch.zeros(20_000, 1), torch.ones(20_000, 1)
    batch = FlowMatching(path=LinearPath(sigma=0.3)).sample(x0, x1)
    residual = batch.xt[:, 0] - batch.t
    assert float(residual.std()) == pytest.approx(0.3, rel=0.03)
    assert bool((batch.ut == 1).all())


@pytest.mark.parametrize("kind", ["tensor", "numpy", "list"])
def test_conditions_follow_their_samples(kind):
    x0, x1 = pair()
    y = torch.arange(16)
    given = {"tensor": y, "numpy": y.numpy(), "list": [f"{i}" for i in range(16)]}[kind]
    batch = FlowMatching(mbot.ConditionalOTCoupling()).sample(x0, x1, given)
    got = [int(v) for v in batch.y]
    assert got == list(range(16))
    assert isinstance(batch.y, type(given))


def test_the_loss_is_the_weighted_mean_squared_error():
    x0, x1 = pair(n=64)
    fm = FlowMatching(mbot.WeightedCoupling(reg=2.0))
    batch = fm.sample(x0, x1, generator=torch.Generator().manual_seed(0))
    zero = lambda t, x, y: torch.zeros_like(x)
    expected = (batch.weight * batch.ut.square().mean(1)).mean()
    torch.testing.assert_close(fm.loss(zero, x0, x1, generator=torch.Generator().manual_seed(0)), expected)
    plain = FlowMatching().loss(zero, x0, x1)
    torch.testing.assert_close(plain, (x1 - x0).square().mean())


def test_the_generator_decides_the_whole_batch():
    x0, x1 = pair(9), pair(12)
    fm = FlowMatching(mbot.OTCoupling(), LinearPath(sigma=0.1))
    a, b = (fm.sample(x0[0], x1[1], generator=torch.Generator().manual_seed(1)) for _ in range(2))
    for name in ("t", "xt", "ut"):
        assert torch.equal(getattr(a, name), getattr(b, name))


def test_slices_and_splits_keep_rows_together():
    x0, x1 = pair()
    batch = FlowMatching(mbot.WeightedCoupling(reg=2.0)).sample(x0, x1, torch.arange(16))
    parts = list(batch.split(6))
    assert [len(part) for part in parts] == [6, 6, 4]
    for name in ("t", "xt", "ut", "y", "weight"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    mean = sum(len(p) * flows.regression_loss(lambda t, x, y: 0 * x, p) for p in parts) / 16
    torch.testing.assert_close(mean, flows.regression_loss(lambda t, x, y: 0 * x, batch))


@pytest.mark.parametrize("coupling", [mbot.IndependentCoupling(), mbot.OTCoupling(), mbot.ConditionalOTCoupling()])
def test_training_reduces_the_loss(coupling):
    g = torch.Generator().manual_seed(0)
    model = flows.models.ResidualMLP(2, num_classes=2, width=32, depth=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    fm = FlowMatching(coupling)
    losses = []
    for _ in range(120):
        x0, (x1, y) = flows.datasets.eight_gaussians(128, generator=g), flows.datasets.moons(128, generator=g)
        loss = fm.loss(model, x0, x1, y, generator=g)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_half_precision_samples_train_in_float32():
    x0, x1 = pair()
    batch = FlowMatching().sample(x0.bfloat16(), x1.bfloat16())
    assert batch.t.dtype == torch.float32
    assert batch.xt.dtype == torch.bfloat16
    assert flows.regression_loss(lambda t, x, y: 0 * x, batch).dtype == torch.float32


def test_bad_input():
    x0, x1 = pair()
    with pytest.raises(TypeError, match="mbot coupling"):
        FlowMatching("ot")
    with pytest.raises(TypeError, match="flows path"):
        FlowMatching(path="linear")
    with pytest.raises(ValueError, match="sigma"):
        LinearPath(sigma=-1)
    with pytest.raises(ValueError, match=r"velocities of shape \(16, 2\); got \(16, 1\)"):
        FlowMatching().loss(lambda t, x, y: x[:, :1], x0, x1)
    with pytest.raises(ValueError, match="noise is needed"):
        LinearPath(sigma=0.1).sample(x0, x1, torch.rand(16))
    with pytest.raises(ValueError, match="one condition"):
        FlowMatching().sample(x0, x1, torch.arange(3))


def test_models_refuse_conditions_they_were_not_built_for():
    t, x = torch.rand(4), torch.randn(4, 2)
    with pytest.raises(ValueError, match="pass y"):
        flows.models.ResidualMLP(2, condition_dim=1)(t, x)
    with pytest.raises(ValueError, match="without conditions"):
        flows.models.ResidualMLP(2)(t, x, torch.ones(4))
    with pytest.raises(ValueError, match="not both"):
        flows.models.ResidualMLP(2, condition_dim=1, num_classes=2)
    assert flows.models.ResidualMLP(12, condition_dim=3)(t, torch.randn(4, 3, 2, 2), torch.ones(4, 3)).shape == (
        4,
        3,
        2,
        2,
    )


def test_the_toy_model_has_the_published_size():
    """Figure 1's ConditionalNet: 2 -> 128, 1 -> 128 twice, three blocks 128-512-128, 128 -> 2."""
    model = flows.models.ResidualMLP(2, condition_dim=1)
    blocks = 3 * (128 * 512 + 512 + 512 * 128 + 128)
    assert sum(p.numel() for p in model.parameters()) == (2 * 128 + 128) + 2 * (128 + 128) + blocks + (128 * 2 + 2)


BRIDGE = flows.SchrodingerBridgePath(sigma=0.5)
ENTROPIC = BRIDGE.default_coupling()
CONTRADICTIONS = [
    mbot.IndependentCoupling(),
    mbot.OTCoupling(mbot.EntropicOT(reg=0.4)),
    mbot.SinkhornCoupling(reg=0.6, relative=False, cost="sqeuclidean"),
    mbot.SinkhornCoupling(reg=0.5, relative=False),  # of inner products: 1 of squared distances
    mbot.OTCoupling(mbot.EntropicOT(reg=0.5), cost="dot"),
    mbot.OTCoupling(mbot.EntropicOT(reg=0.5), cost="euclidean"),
]
AGREEING = [
    mbot.OTCoupling(),
    mbot.ConditionalOTCoupling(),
    mbot.OTCoupling(mbot.EntropicOT(reg=0.5)),
    mbot.OTCoupling(mbot.EntropicOT(reg=0.25), cost="dot"),
    mbot.SinkhornCoupling(reg=0.5, relative=False, cost="sqeuclidean"),
    mbot.SinkhornCoupling(reg=0.25, relative=False),
    mbot.SinkhornCoupling(reg=0.6),  # of the costs' scale: not known before the data are
]


def trained(path, coupling=None, loader=None, **settings):
    g = torch.Generator().manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(32, 2, generator=g), torch.arange(32) % 2)
    loader = loader or flows.CoupledLoader(data, None, coupling, batch_size=16)
    torch.manual_seed(0)
    model = flows.models.ResidualMLP(2, num_classes=2, width=8, depth=1)
    return flows.Trainer(model, loader, steps=3, path=path, progress=False, **settings)


def test_a_bridge_gets_its_entropic_pairs_wherever_it_is_used():
    assert FlowMatching(path=BRIDGE).coupling == ENTROPIC
    trainer = trained(BRIDGE)
    assert trainer.loader.coupling == trainer.objective.coupling == ENTROPIC
    trainer.fit()
    by_hand = trained(BRIDGE, ENTROPIC)
    by_hand.fit()
    for a, b in zip(trainer.model.parameters(), by_hand.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("coupling", CONTRADICTIONS, ids=repr)
def test_a_coupling_that_contradicts_the_bridge_is_refused_everywhere(coupling):
    says = r"entropic pairs of reg = 2 sigma² = 0\.5 for squared distances; .*(has reg|is of other costs)"
    for build in (lambda: FlowMatching(coupling, BRIDGE), lambda: trained(BRIDGE, coupling)):
        with pytest.raises(ValueError, match=says):
            build()


@pytest.mark.parametrize("coupling", AGREEING, ids=repr)
def test_couplings_that_go_with_the_bridge_are_kept(coupling):
    assert FlowMatching(coupling, BRIDGE).coupling == coupling
    assert trained(BRIDGE, coupling).loader.coupling == coupling


def test_inner_products_at_half_the_regularisation_have_the_plans_of_squared_distances():
    x, y = pair()
    wanted = mbot.EntropicOT(BRIDGE.default_coupling().entropic_reg, tol=1e-5)
    half = mbot.EntropicOT(0.25, tol=1e-5)
    assert mbot.OTCoupling(half, cost="dot").entropic_reg == wanted.reg == 0.5
    plans = [t.plan(mbot.pairwise_cost(x, y, cost)) for t, cost in ((wanted, "sqeuclidean"), (half, "dot"))]
    torch.testing.assert_close(plans[0].to_dense(), plans[1].to_dense(), rtol=1e-3, atol=1e-6)


def test_a_coupling_of_one_s_own_says_which_regularisation_it_has():
    @dataclass(frozen=True)
    class Own(mbot.IndependentCoupling):
        entropic_reg: float | None = None

    for coupling in (Own(), Own(0.5)):
        assert FlowMatching(coupling, BRIDGE).coupling == coupling
    with pytest.raises(ValueError, match=r"has reg = 0\.6"):
        FlowMatching(Own(0.6), BRIDGE)


def test_a_loader_and_an_objective_of_two_couplings_are_a_contradiction():
    """Also if the objective's is the one that its path would take."""
    for given in (mbot.IndependentCoupling(), mbot.BoMbCoupling(num_batches=2)):
        with pytest.raises(ValueError, match="give one of them"):
            trained(None, mbot.OTCoupling(), objective=FlowMatching(given))
        assert trained(None, given, objective=FlowMatching(given)).objective.coupling == given
        assert trained(None, objective=FlowMatching(given)).loader.coupling == given
    assert trained(None, mbot.OTCoupling(), objective=FlowMatching()).objective.coupling == mbot.OTCoupling()


def test_a_loader_without_a_coupling_follows_the_path_of_each_trainer():
    loader = trained(None).loader
    assert loader.coupling == mbot.IndependentCoupling()
    first = next(iter(loader))
    assert trained(BRIDGE, loader=loader).loader.coupling == ENTROPIC
    loader.set_epoch(0)
    assert not torch.equal(next(iter(loader)).x0, first.x0)
    trained(LinearPath(), loader=loader)
    loader.set_epoch(0)
    assert torch.equal(next(iter(loader)).x0, first.x0)


def test_coupling_and_placing_are_the_two_halves_of_a_sample():
    x0, x1 = pair()
    y = torch.arange(16)
    for fm in (FlowMatching(mbot.WeightedCoupling(reg=2.0), LinearPath(sigma=0.1)), FlowMatching(path=BRIDGE)):
        whole = fm.sample(x0, x1, y, generator=torch.Generator().manual_seed(0))
        g = torch.Generator().manual_seed(0)
        halves = fm.along(fm.couple(x0, x1, y, generator=g), g)
        for name in ("t", "xt", "ut", "y", "weight"):
            a, b = getattr(whole, name), getattr(halves, name)
            assert a is b is None or torch.equal(a, b)


def test_batches_are_cut_into_parts_of_at_least_one_sample():
    batch = flows.FlowMatching().sample(torch.zeros(4, 2), torch.ones(4, 2))
    assert [len(part) for part in batch.split(3)] == [3, 1]
    for size in (0, -2):
        with pytest.raises(ValueError, match="size must be at least 1"):
            list(batch.split(size))


@pytest.mark.gpu
def test_a_batch_goes_to_a_device_and_back():
    """A copy to the CPU is complete when it is there: one that nobody waits for holds what the memory held before."""
    x0, x1 = pair(4096, (64,))
    y = {"class": torch.arange(4096), "text": [str(i) for i in range(4096)]}
    pairs = mbot.WeightedCoupling(5.0)(x0[:64], x1[:64])
    for batch in (
        flows.matching.CoupledBatch.of(mbot.IndependentCoupling()(x0, x1), x0, x1, y),
        flows.matching.CoupledBatch.of(pairs, x0[:64], x1[:64]),
    ):
        there = batch.to("cuda")
        assert there.x0.is_cuda
        assert there.x1.is_cuda
        back = there.to("cpu")
        torch.testing.assert_close((back.x0, back.x1, back.weight), (batch.x0, batch.x1, batch.weight))
        assert batch.y is None or (torch.equal(back.y["class"], batch.y["class"]) and back.y["text"] == batch.y["text"])
