"""What every pooling promises, whatever it computes: mini-batch consistency in all its forms.

The promises are `setenc.testing.POOLING_CHECKS`, which anybody's pooling can be held to. Ours join by being in
``setenc.__all__`` and having a line here; a missing line fails `test_everything_has_a_case`.
"""

import copy
import inspect
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import setenc
from setenc import testing

POOLERS = {
    "DeepSetsPooling": [lambda r=r: setenc.DeepSetsPooling(3, 8, r, norm=r == "mean") for r in ("mean", "sum", "max")],
    "DSMILPooling": [lambda: setenc.DSMILPooling(3, 8)],
    "InstancePooling": [lambda k=k: setenc.InstancePooling(3, 8, k) for k in (1, 3, 30)],
    "JointPooling": [
        lambda: setenc.JointPooling(setenc.SlotPooling(3, 8, 4, num_heads=2), setenc.InstancePooling(3, 8, 2)),
        lambda: setenc.JointPooling(*(setenc.DeepSetsPooling(3, 8, r) for r in ("mean", "max", "sum"))),
    ],
    "GatedAttentionPooling": [lambda: setenc.GatedAttentionPooling(3, 8)],
    "SlotPooling": [
        lambda a=a, h=h, s=s, r=r: setenc.SlotPooling(
            3, 8, 4, num_heads=h, activation=a, slots=s, residual=r, slot_norm=h == 4, output_norm=h == 2
        )
        for a, (h, s, r) in itertools.product(
            ("sigmoid", "softmax", "slot-sigmoid", "slot-softmax", "slot-exp"),
            ((2, "random", True), (4, "learned", False)),
        )
    ]
    + [
        lambda a=a: setenc.SlotPooling(3, 8, 16, num_heads=8, activation=a, slots="learned")
        for a in ("softmax", "slot-softmax")
    ],
}


def build(make):
    torch.manual_seed(0)
    return make()


def name(make):
    return " ".join(map(str, (type(make()).__name__, *(make.__defaults__ or ()))))


every_pooler = pytest.mark.parametrize("make", [m for cases in POOLERS.values() for m in cases], ids=name)
every_check = pytest.mark.parametrize("check", testing.POOLING_CHECKS, ids=lambda check: check.__name__)


def test_everything_has_a_case():
    objects = {n: getattr(setenc, n) for n in setenc.__all__}
    poolings = {n for n, o in objects.items() if inspect.isclass(o) and issubclass(o, setenc.Pooling)}
    assert poolings - {"Pooling"} == set(POOLERS)


@every_pooler
@every_check
def test_every_pooling_keeps_every_promise(make, check, device):
    pooling = build(make).to(device)
    before = copy.deepcopy(pooling.state_dict())
    check(pooling)
    assert all(torch.equal(value, before[key]) for key, value in pooling.state_dict().items())


@every_pooler
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_partition_order_and_merge_tree(make, data):
    pooling = build(make).double().eval()
    n = data.draw(st.integers(1, 12))
    x = 10 * torch.randn(2, n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    order = data.draw(st.permutations(range(n)))
    owner = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)))
    state = pooling.init_state(2)
    for again in range(pooling.num_passes):
        state = pooling.next_pass(state) if again else state
        states = [pooling.update(state.empty(), x[:, order][:, owner == k]) for k in range(4)]
        while len(states) > 1:
            i, j = data.draw(st.permutations(range(len(states))))[:2]
            merged = states[i].merge(states[j])
            states = [s for k, s in enumerate(states) if k not in (i, j)] + [merged]
        state = states[0]
    torch.testing.assert_close(pooling.readout(state), pooling(x), rtol=1e-12, atol=1e-12)


@every_pooler
def test_settings_print_and_modules_pickle(make):
    pooling = build(make).eval()
    x = torch.randn(2, 5, 3)
    assert "in_dim=3, dim=8" in repr(pooling)
    assert torch.equal(copy.deepcopy(pooling)(x), pooling(x))


# --- the checks find what they are there for -----------------------------------------------------------------------


class Broken(setenc.DeepSetsPooling):
    """A mean, with one promise broken."""

    def __init__(self, fault):
        super().__init__(3, 8)
        self.fault = fault

    def absorb(self, state, features, mask, weights, **options):
        if self.fault == "mixes" and features.shape[1]:
            features = features - features.mean(1, keepdim=True)
        if self.fault == "mask":
            mask = None
        if self.fault == "weights" and weights is not None:
            weights = weights.sign()
        if self.fault == "writes" and not options and features.shape[1]:
            state.total.detach().add_(1)
        if self.fault == "accepts":
            features = features.nan_to_num(0.0)
        return super().absorb(state, features, mask, weights, **options)

    def readout(self, state):
        out = super().readout(state)
        if self.fault == "order":
            out = out + torch.arange(len(out)).to(out)[:, None, None]
        if self.fault == "empty":
            out = torch.where(state.count[:, None, None] == 0, torch.nan, out)
        return out.float() if self.fault == "dtype" else out

    def _part(self, features, slots, offset, peak, onto):
        values = features.detach() if self.fault == "gradient" else features
        return super()._part(values, slots, offset, peak, onto)


@pytest.mark.parametrize(
    "fault", ["mixes", "mask", "weights", "writes", "accepts", "order", "empty", "dtype", "gradient"]
)
def test_a_broken_pooling_is_found(fault):
    testing.check_pooling(Broken(None))
    with pytest.raises(AssertionError, match=r"(?s)must|broken") as caught:
        testing.check_pooling(Broken(fault))
    assert "nput" in str(caught.value)


def test_only_poolings_are_checked():
    with pytest.raises(TypeError, match="pooling must be a setenc Pooling; got Linear"):
        testing.check_pooling(torch.nn.Linear(2, 2))
    pooling = setenc.DeepSetsPooling(2, 2)
    with pytest.raises(ValueError, match="DeepSetsPooling is complete"):
        pooling.next_pass(pooling.init_state(1))


def test_the_example_in_contributing_runs():
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text().split("## A pooling")[1]
    exec(text.split("```python\n")[1].split("```")[0], {})
