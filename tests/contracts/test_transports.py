"""What every transport promises, whatever it computes."""

import dataclasses
import re
from dataclasses import dataclass

import pytest
import torch

import mbot
from mbot.testing import check_transport
from tests.contracts.cases import TRANSPORTS, VALUES_ONLY, exported, flat

every_transport = pytest.mark.parametrize("transport", flat(TRANSPORTS), ids=repr)


def clouds(*batch, n=6, m=6, d=3, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(*batch, n, d, generator=g, dtype=dtype),
        torch.randn(*batch, m, d, generator=g, dtype=dtype) + 0.5,
    )


def test_everything_has_a_case():
    assert exported(mbot.Transport) == set(TRANSPORTS)
    assert exported(mbot.transport.ValueTransport) == set(VALUES_ONLY)


@every_transport
def test_it_keeps_the_contract(transport, device):
    check_transport(transport, device=device)


def in_units(transport, scale):
    """The same transport where costs are ``scale`` times as large: regularisations are in cost units."""
    names = {"reg", "reg_marginal"} & {field.name for field in dataclasses.fields(transport)}
    return dataclasses.replace(transport, **{name: scale * getattr(transport, name) for name in names})


@every_transport
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_scale_of_the_data(transport, scale):
    """Values are in the units of the costs, plans have none."""
    x, y = clouds(2, dtype=torch.float32)
    scaled = in_units(transport, scale**2)
    # tol is met in float32 as well as it can be
    torch.testing.assert_close(scaled(scale * x, scale * y) / scale**2, transport(x, y), rtol=1e-4, atol=0)
    plans = [t.plan(mbot.pairwise_cost(c * x, c * y)).to_dense() for t, c in ((transport, 1), (scaled, scale))]
    torch.testing.assert_close(*plans, rtol=1e-3, atol=1e-5)
    if transport != scaled:
        wrong = transport(scale * x, scale * y) / scale**2
        assert not torch.allclose(wrong, transport(x, y), rtol=1e-2), "the regularisation is scaled with the costs"


@dataclass(frozen=True)
class Right(mbot.Transport):
    """Keeps every promise; each class below breaks one."""

    def _solve(self, cost, a, b):
        n, m = cost.shape[-2:]
        return mbot.Plan(self.mass(cost, a, b), (n, m))

    def mass(self, cost, a, b):
        left, right = (
            torch.full((*cost.shape[:-2], size), 1 / size, dtype=torch.float64) if weight is None else weight
            for weight, size in ((a, cost.shape[-2]), (b, cost.shape[-1]))
        )
        return (left[..., :, None] * right[..., None, :] / right.sum(-1)[..., None, None]).to(cost.dtype)


@dataclass(frozen=True)
class WrongDtype(Right):
    def mass(self, cost, a, b):
        return super().mass(cost, a, b).double()


@dataclass(frozen=True)
class Negative(Right):
    def mass(self, cost, a, b):
        return -super().mass(cost, a, b)


@dataclass(frozen=True)
class Mixing(Right):
    """A problem's plan depends on the others of its batch."""

    def mass(self, cost, a, b):
        return super().mass(cost, a, b) * (1 + cost.mean())


@dataclass(frozen=True)
class Random(Right):
    def mass(self, cost, a, b):
        return super().mass(cost, a, b) * (1 + torch.rand(()))


@dataclass(frozen=True)
class ByPosition(Right):
    def mass(self, cost, a, b):
        return super().mass(cost, a, b) * torch.arange(1, cost.shape[-1] + 1)


@dataclass(frozen=True)
class CountsTheWeightless(Right):
    def mass(self, cost, a, b):
        return super().mass(cost, a, b) / cost.shape[-1]


@dataclass(frozen=True)
class InPlace(Right):
    def mass(self, cost, a, b):
        cost += 1
        return super().mass(cost, a, b)


@dataclass(frozen=True)
class NoPenalty(Right):
    """A plan that follows the costs, with nothing that makes its value stationary in it."""

    def mass(self, cost, a, b):
        return super().mass(cost, a, b) * (-cost).exp()


@dataclass(frozen=True)
class Unconverged(Right):
    def _solve(self, cost, a, b):
        n, m = cost.shape[-2:]
        failed = torch.zeros(cost.shape[:-2], dtype=torch.bool)
        return mbot.Plan(self.mass(cost, a, b), (n, m), converged=failed)


@dataclass(frozen=True)
class WrongPotentials(mbot.ExactOT):
    def weight_slopes(self, plan, cost, a, b):
        f, g = super().weight_slopes(plan, cost, a, b)
        return f.flip(-1), g


@dataclass(frozen=True)
class DropsWeights(mbot.ExactOT):
    def __call__(self, x, y, a=None, b=None, cost="sqeuclidean"):
        a, b = (None if weight is None else weight.detach() for weight in (a, b))
        return super().__call__(x, y, a, b, cost)


@dataclass(frozen=True)
class HalfOfTheSecond(mbot.EntropicOT):
    """The plan is constant in its second derivatives, and no error says so."""

    def _differentiable(self, moved, plan, cost, a, b):
        return super()._differentiable(moved, plan, cost, a, b) if a is not None else moved + plan.penalty


@dataclass(frozen=True)
class Sparse(mbot.EntropicOT):
    """Plans as entries, which change with the costs."""

    def _solve(self, cost, a, b):
        plan = super()._solve(cost, a, b)
        row, col, mass = plan.entries()
        facts = (plan.converged, plan.error, plan.iterations, plan.potentials, plan.penalty)
        return mbot.Plan(mass, plan.size, row, col, *facts)


@dataclass(frozen=True)
class InheritsTheMass(mbot.EntropicOT):
    """Another plan than that of its parent, whose ``uniform_mass`` it has."""

    def _solve(self, cost, a, b):
        return mbot.EntropicOT(2 * self.reg, tol=self.tol)._solve(cost, a, b)

    entropic_reg = None

    def __call__(self, x, y, a=None, b=None, cost="sqeuclidean"):
        return mbot.EntropicOT(2 * self.reg, tol=self.tol)(x, y, a, b, cost)

    def weight_slopes(self, plan, cost, a, b):
        return mbot.EntropicOT(2 * self.reg, tol=self.tol).weight_slopes(plan, cost, a, b)


@dataclass(frozen=True)
class HasAnotherReg(mbot.EntropicOT):
    @property
    def entropic_reg(self):
        return 2 * self.reg


@dataclass(frozen=True)
class HasOtherMarginals(mbot.UnbalancedOT):
    @property
    def entropic_reg(self):
        return self.reg


@dataclass(frozen=True)
class Raises(Right):
    def mass(self, cost, a, b):
        if cost.shape[-1] == 7:
            raise KeyError("seven")
        return super().mass(cost, a, b)


@pytest.mark.parametrize("right", [Right(), Sparse(0.5, tol=1e-11)], ids=repr)
def test_a_transport_that_is_right_passes(right):
    check_transport(right)


def test_sparse_plans_with_a_penalty_have_no_second_derivatives():
    x, y = clouds(2)
    transport = Sparse(0.5, tol=1e-11)
    losses = [
        mbot.MiniBatchOT(transport, num_batches=2, batch_size=6, pairing=pairing) for pairing in ("grid", "aligned")
    ]
    for value in (transport, *(loss.from_batches for loss in losses)):
        points = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(value(points, y).sum(), points, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivatives of this transport"):
            torch.autograd.grad(slope.square().sum(), points)
    assert not transport.plan(mbot.pairwise_cost(x, y)).piecewise_constant
    assert mbot.ExactOT().plan(mbot.pairwise_cost(x, y)).piecewise_constant


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (WrongDtype(), "masses are torch.float64"),
        (Negative(), "masses are negative"),
        (Mixing(), "of a batch"),
        (Random(), "the same call gives another plan"),
        (ByPosition(), "renamed"),
        (CountsTheWeightless(), "weight 0"),
        (InPlace(), "changed cost in place"),
        (NoPenalty(), "gradients under the cost"),
        (Unconverged(), "not converged"),
        (Raises(), "seven"),
        (WrongPotentials(), "gradients in the weights are not those of the value"),
        (DropsWeights(), "gradients in the weights .* there are none, and no error"),
        (HalfOfTheSecond(0.5, tol=1e-11), "neither those of the value nor an error"),
        (InheritsTheMass(0.5, tol=1e-11), "uniform_mass is not the plan"),
        (HasAnotherReg(0.5, tol=1e-11), "entropic_reg is 1.0, and the plan is not the entropic one"),
        (HasOtherMarginals(0.5, 1.0, tol=1e-11), "entropic_reg is 0.5, and the plan is not the entropic one"),
        (mbot.SlicedOT(), "derived from mbot.Transport"),
        (mbot.EntropicOT(0.5, tol=0.1), "finite|gradients|another plan|of a batch|renamed|weight"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_wrong_is_told(wrong, says):
    with pytest.raises(AssertionError, match=says) as caught:
        check_transport(wrong)
    if not isinstance(wrong, mbot.SlicedOT):
        assert re.search(r"(cost|x) = .* of shape \(", str(caught.value)), "says which input"
