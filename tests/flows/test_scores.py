"""Scores and the stochastic flow, against Gaussians whose law is known at all times."""

import pytest
import torch

import flows
import mbot
from flows import (
    FlowBatch,
    FlowMatching,
    LinearPath,
    SchrodingerBridgePath,
    ScoreMatching,
    VariancePreservingPath,
    integrate_sde,
)

SIGMA = 0.8
M0, M1 = torch.tensor([1.0, -1.0]).double(), torch.tensor([-2.0, 3.0]).double()
S0 = torch.tensor([[1.0, 0.3], [0.3, 0.5]]).double()
S1 = torch.tensor([[0.4, -0.2], [-0.2, 1.5]]).double()
EYE = torch.eye(2).double()


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def law(t):
    """Mean and covariance of the bridge between independent N(M0, S0) and N(M1, S1), and their derivatives."""
    mean, cov = (1 - t) * M0 + t * M1, (1 - t) ** 2 * S0 + t**2 * S1 + SIGMA**2 * t * (1 - t) * EYE
    return mean, cov, M1 - M0, 2 * t * S1 - 2 * (1 - t) * S0 + SIGMA**2 * (1 - 2 * t) * EYE


def velocity(t, x, y=None):
    mean, cov, mean_rate, cov_rate = law(t[0])
    return mean_rate + 0.5 * torch.linalg.solve(cov, (x - mean).mT).mT @ cov_rate


def score(t, x, y=None):
    """The true score times sigma² / 2."""
    mean, cov, _, _ = law(t[0])
    return -0.5 * SIGMA**2 * torch.linalg.solve(cov, (x - mean).mT).mT


def starts(n, seed=0):
    return M0 + torch.randn(n, 2, generator=gen(seed), dtype=torch.float64) @ torch.linalg.cholesky(S0).mT


@pytest.mark.parametrize("seed", [1, 2])
def test_points_have_the_law_of_the_bridge_at_each_time(seed):
    n = 10_000
    solved = integrate_sde(velocity, score, starts(n, seed), sigma=SIGMA, steps=200, generator=gen(100 + seed))
    assert solved.x.shape == (201, n, 2)
    assert solved.nfe == 400
    for t in (0.25, 0.5, 0.75):
        x = solved.x[int((solved.t - t).abs().argmin())]
        mean, cov, _, _ = law(t)
        assert bool(((x.mean(0) - mean).abs() < 3 * (cov.diag() / n).sqrt()).all())
        spread = cov.diag()[:, None] * cov.diag() + cov**2
        assert bool(((x.T.cov() - cov).abs() < 3 * (spread / n).sqrt()).all())


def test_without_the_score_the_law_is_another():
    """The check above can fail."""
    nothing = lambda t, x, y: 0 * x
    x = integrate_sde(velocity, nothing, starts(10_000), sigma=SIGMA, steps=50, generator=gen()).x[25]
    _, cov, _, _ = law(0.5)
    assert float((x.T.cov() - cov).diag().min()) > 0.1


def test_the_generator_decides_the_points():
    a, b, c = (integrate_sde(velocity, score, starts(5), sigma=1.0, steps=3, generator=gen(s)).x for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert torch.equal(a[0], c[0])
    assert not torch.equal(a, c)
    torch.manual_seed(1)
    assert torch.equal(integrate_sde(velocity, score, starts(5), sigma=1.0, steps=3).x, a)


def test_shapes_types_and_conditions():
    seen = []

    def model(t, x, y):
        seen.append((t.shape, t.dtype, x.dtype, y))
        return torch.zeros_like(x)

    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        solved = integrate_sde(model, model, torch.zeros(4, 1, 3, 3, dtype=dtype), sigma=0.5, steps=7, y="label")
        assert (solved.x.shape, solved.x.dtype) == ((8, 4, 1, 3, 3), dtype)
        assert seen.pop() == ((4,), dtype, dtype, "label")
    x0 = torch.zeros(20_000, 1)
    x = integrate_sde(lambda t, x, y: 1 + 0 * x, lambda t, x, y: 0 * x, x0, sigma=0.5, steps=4, generator=gen())
    assert float(x.final.mean()) == pytest.approx(1, abs=0.02)
    assert float(x.final.std()) == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda x: integrate_sde(velocity, score, x, sigma=0, steps=5), ValueError, "sigma must be > 0; got 0"),
        (lambda x: integrate_sde(velocity, score, x, sigma=-1, steps=5), ValueError, "sigma must be > 0; got -1"),
        (lambda x: integrate_sde(velocity, score, x, sigma=1, steps=0), ValueError, "steps must be at least 1; got 0"),
        (lambda x: integrate_sde(velocity, score, x[0], sigma=1, steps=1), ValueError, r"x0 must have shape \(B, d…\)"),
        (lambda x: integrate_sde(velocity, score, x / 0, sigma=1, steps=1), ValueError, "x0"),
        (
            lambda x: integrate_sde(velocity, lambda t, x, y: x[:, :1], x, sigma=1, steps=1),
            ValueError,
            r"velocities of shape \(5, 2\); got \(5, 1\)",
        ),
        (
            lambda x: integrate_sde(velocity, lambda t, x, y: x / (t[:, None] - 0.5), x, sigma=1, steps=4),
            flows.IntegrationError,
            "at time 0.5",
        ),
        (lambda x: ScoreMatching(path=LinearPath()), ValueError, "scores need an affine path with noise, sigma > 0"),
        (lambda x: ScoreMatching(path=flows.TargetPath(0.1)), ValueError, "scores need an affine path with noise"),
        (lambda x: ScoreMatching(path=VariancePreservingPath(0)), ValueError, "scores need an affine path with noise"),
        (lambda x: SchrodingerBridgePath(sigma=0), ValueError, "sigma must be a finite number > 0"),
        (
            lambda x: ScoreMatching().batch_loss(lambda t, x, y: x, FlowMatching().sample(x, x)),
            ValueError,
            "the batch has no noise",
        ),
    ],
)
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call(starts(5))


NOISY = [SchrodingerBridgePath(0.7), LinearPath(0.3), VariancePreservingPath(0.4)]


@pytest.mark.parametrize("path", NOISY, ids=repr)
def test_batches_hold_the_noise_of_their_path(path):
    x0, x1 = torch.randn(2, 30, 2, dtype=torch.float64)
    objective = FlowMatching(mbot.OTCoupling(), path)
    pairs = objective.couple(x0, x1)
    batch = objective.along(pairs, gen())
    xt, ut = path.sample(pairs.x0, pairs.x1, batch.t, batch.noise)
    assert torch.equal(batch.xt, xt)
    assert torch.equal(batch.ut, ut)
    assert torch.equal(batch[3:9].noise, batch.noise[3:9])
    assert torch.equal(torch.cat([part.noise for part in batch.split(7)]), batch.noise)
    assert FlowMatching().sample(x0, x1).noise is None


@pytest.mark.parametrize("path", NOISY, ids=repr)
def test_the_loss_is_zero_at_the_score_of_a_single_pair(path):
    """A Gaussian around the point of the pair without noise."""
    x0, x1 = torch.randn(2, 1, 3, dtype=torch.float64).expand(2, 40, 3)
    objective = ScoreMatching(mbot.OTCoupling(), path)
    batch = objective.points(x0, x1, generator=gen())

    def exact(t, x, y):
        centre = path.sample(x0, x1, t, torch.zeros_like(x))[0]
        std = torch.as_tensor(path.std(t)[0], dtype=t.dtype).expand(len(t))[:, None]
        return -0.5 * path.sigma**2 * (x - centre) / std**2

    assert float(objective.batch_loss(exact, batch)) < 1e-20
    assert float(objective.batch_loss(lambda t, x, y: 1.1 * exact(t, x, y), batch)) > 1e-3


def test_the_loss_is_least_at_the_score_and_beside_the_velocity():
    """The two models that the stochastic flow of the first test takes, from one batch."""
    x0, x1 = starts(4000), M1 + starts(4000, 1) - M0
    path = SchrodingerBridgePath(SIGMA)
    joint = S0

    def truth(t, x, y):
        t = t[:, None, None]
        cov = ((1 - t) ** 2 + t**2) * joint + SIGMA**2 * t * (1 - t) * EYE
        mean = (1 - t[:, 0]) * M0 + t[:, 0] * M1
        return -0.5 * SIGMA**2 * torch.linalg.solve(cov, (x - mean)[..., None])[..., 0]

    # Independent pairs contradict the bridge's own coupling, which knows nothing of this test: hand them in as pairs.
    objective = ScoreMatching(path=path)
    batch = objective.along(flows.CoupledBatch(x0, x1), gen(2))
    best = float(objective.batch_loss(truth, batch))
    for factor in (0.8, 1.2):
        assert float(objective.batch_loss(lambda t, x, y, f=factor: f * truth(t, x, y), batch)) > best + 1e-3
    assert bool(FlowMatching(path=path).batch_loss(lambda t, x, y: x, batch).isfinite())


def test_losses_are_finite_at_both_ends():
    t = torch.tensor([0.0, 1e-30, 1.0])
    x0, x1, noise = torch.randn(3, 3, 2)
    for path in NOISY:
        batch = FlowBatch(t, *path.sample(x0, x1, t, noise), noise=noise)
        w = torch.ones((), requires_grad=True)
        loss = ScoreMatching(mbot.OTCoupling(), path).batch_loss(lambda t, x, y, w=w: w * x, batch)
        (gradient,) = torch.autograd.grad(loss, w)
        assert bool(loss.isfinite())
        assert bool(gradient.isfinite())


def test_a_score_trains_in_the_trainer_with_conditions():
    data = torch.utils.data.TensorDataset(torch.randn(48, 2), torch.arange(48) % 3)
    model = flows.models.ResidualMLP(2, num_classes=3, width=8, depth=1)
    before = model.output.weight.clone()
    loader = flows.CoupledLoader(data, batch_size=16)
    trainer = flows.Trainer(
        model, loader, steps=4, objective=ScoreMatching(), condition_dropout=0.1, progress=False, ema=None
    )
    trainer.fit()
    assert loader.coupling == SchrodingerBridgePath().default_coupling()
    assert not torch.equal(model.output.weight, before)
    y = torch.arange(4) % 3
    x = integrate_sde(model, model, torch.randn(4, 2), sigma=1.0, steps=3, y=y).final
    assert bool(x.isfinite().all())
