"""The joint cost of domain adaptation against its formula, pair by pair, with its gradients and limits."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import mbot


def by_pairs(g, p, h, logits, features, labels):
    """The formula, one pair at a time."""
    log_q = logits.log_softmax(-1)
    return torch.stack([
        torch.stack([features * (a - b).square().sum() - labels * (s * t).sum() for b, t in zip(h, log_q, strict=True)])
        for a, s in zip(g, p, strict=True)
    ])  # fmt: skip


@given(
    n=st.integers(1, 5), m=st.integers(1, 5), d=st.integers(1, 6), classes=st.integers(2, 4),
    features=st.floats(0, 2), labels=st.floats(0, 2), soft=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_it_is_the_formula(n, m, d, classes, features, labels, soft, seed):
    torch.manual_seed(seed)
    g, h, logits = torch.randn(n, d), torch.randn(m, d), 3 * torch.randn(m, classes)
    y = torch.rand(n, classes).softmax(-1) if soft else torch.randint(classes, (n,))
    joint = mbot.JointCost(classes, features, labels)
    got = mbot.pairwise_cost(joint.source(g, y), joint.target(h, logits), joint)
    share = y if soft else F.one_hot(y, classes).float()
    torch.testing.assert_close(got, by_pairs(g, share, h, logits, features, labels), rtol=1e-4, atol=1e-5)
    again = mbot.pairwise_cost(joint.source(g, y), joint.target(h, logits.log_softmax(-1)), joint)
    torch.testing.assert_close(again, got, rtol=1e-4, atol=1e-5)  # log-probabilities are logits


@pytest.mark.parametrize("transport", [mbot.ExactOT(), mbot.PartialOT(0.7), mbot.UnbalancedOT(0.5, 1.0, tol=1e-10)])
def test_gradients_of_a_loss_reach_features_and_logits_of_both_sides(transport):
    torch.manual_seed(0)
    joint = mbot.JointCost(3, features=0.3, labels=0.7)
    labels = torch.tensor([0, 1, 2, 1])
    given = [torch.randn(4, 2), torch.randn(4, 2), torch.randn(4, 3)]
    given = [x.double().requires_grad_() for x in given]

    def value(g, h, logits):
        return transport(joint.source(g, labels), joint.target(h, logits), cost=joint)

    assert torch.autograd.gradcheck(value, given, atol=1e-4, rtol=1e-3)
    loss = mbot.MiniBatchOT(transport, num_batches=2, batch_size=2, cost=joint, generator=torch.Generator())
    loss(joint.source(given[0], labels), joint.target(*given[1:])).backward()
    assert all(bool((x.grad != 0).any()) and bool(x.grad.isfinite().all()) for x in given)


def test_a_batch_of_clouds_is_its_clouds_one_by_one():
    joint = mbot.JointCost(3, 0.1, 2.0)
    x = joint.source(torch.randn(2, 5, 4), torch.randint(3, (2, 5)))
    y = joint.target(torch.randn(2, 6, 4), torch.randn(2, 6, 3))
    costs = mbot.pairwise_cost(x[:, None], y[None], joint)
    for i, j in torch.cartesian_prod(torch.arange(2), torch.arange(2)):
        torch.testing.assert_close(costs[i, j], mbot.pairwise_cost(x[i], y[j], joint))


def test_confident_predictions_cost_no_infinity():
    joint = mbot.JointCost(2)
    x, y = joint.source(torch.zeros(1, 1), torch.tensor([1])), joint.target(torch.zeros(1, 1), torch.tensor([[1e4, 0]]))
    assert float(joint(x, y)) == pytest.approx(1e4)


def test_it_is_a_setting():
    joint = mbot.JointCost(10, features=0.1, labels=0.5, distance="euclidean")
    assert pickle.loads(pickle.dumps(joint)) == joint
    assert repr(joint) == "JointCost(num_classes=10, features=0.1, labels=0.5, distance='euclidean')"


def test_what_does_not_fit():
    joint = mbot.JointCost(3)
    g = torch.randn(4, 2)
    for bad, says in (
        (lambda: joint.source(g, torch.zeros(3, dtype=torch.long)), r"one integer a row, \(4,\); got \(3,\)"),
        (lambda: joint.source(g, torch.rand(4, 2)), r"labels must have shape \(4, 3\), as num_classes=3; got \(4, 2\)"),
        (lambda: joint.target(g, torch.rand(4)), r"logits must have shape \(4, 3\)"),
        (lambda: mbot.pairwise_cost(torch.rand(4, 3), torch.rand(4, 3), joint), "features and 3 classes, as source"),
        (lambda: mbot.JointCost(1), "num_classes must be at least 2"),
        (lambda: mbot.JointCost(3, features=-1.0), "features must be"),
        (lambda: mbot.JointCost(3, distance="far"), "cost must be one of"),
    ):
        with pytest.raises(ValueError, match=says):
            bad()
