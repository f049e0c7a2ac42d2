"""What every coupling promises, whatever it couples by."""

import warnings
from dataclasses import dataclass

import pytest
import torch

import mbot
from mbot.random import draw
from mbot.testing import check_coupling
from tests.contracts.cases import CONDITIONAL, COUPLINGS, RANDOM, UNEVEN, exported, flat

every_coupling = pytest.mark.parametrize("coupling", flat(COUPLINGS), ids=repr)
every_sample_once = pytest.mark.parametrize("coupling", [c for c in flat(COUPLINGS) if c not in UNEVEN], ids=repr)
drawn_by_value = pytest.mark.parametrize("coupling", [c for c in flat(COUPLINGS) if c not in RANDOM], ids=repr)
WEIGHTED = {"WeightedCoupling"}


def batch(n=12, m=12, shape=(3,), dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x0 = torch.randn(n, *shape, generator=g, dtype=dtype)
    x1 = torch.randn(m, *shape, generator=g, dtype=dtype) + 1
    y1 = torch.randint(0, 3, (m,), generator=g)
    return x0, x1, y1


def test_everything_has_a_case():
    assert exported(mbot.Coupling) == set(COUPLINGS)


@every_coupling
def test_it_keeps_the_contract(coupling, device):
    check_coupling(coupling, device=device)


@every_sample_once
@pytest.mark.parametrize(("n", "m"), [(12, 12), (9, 12), (12, 9), (1, 5), (5, 1), (1, 1)])
def test_x1_keeps_its_order_and_equal_batches_use_every_sample_once(coupling, n, m, device):
    x0, x1, y1 = (t.to(device) for t in batch(n, m))
    if type(coupling).__name__ in CONDITIONAL and n != m:
        with pytest.raises(ValueError, match=r"equally many|hold one condition"):
            coupling(x0, x1, y1=y1)
        return
    pairs = coupling(x0, x1, y1=y1)
    assert torch.equal(pairs.target, torch.arange(m, device=device))
    if n == m:
        assert sorted(pairs.source.tolist()) == list(range(n))


@every_coupling
def test_weights_have_mean_one_and_no_gradient(coupling):
    x0, x1, y1 = batch()
    weight = coupling(x0.requires_grad_(), x1.requires_grad_(), y1=y1).weight
    assert (weight is not None) == (type(coupling).__name__ in WEIGHTED)
    if type(coupling).__name__ in WEIGHTED:
        assert weight.shape == (len(x1),)
        assert not weight.requires_grad
        assert bool((weight >= 0).all())
        assert float(weight.max()) > 1.01, "not all alike"
        torch.testing.assert_close(weight.mean(), torch.tensor(1.0))


@drawn_by_value
def test_renaming_all_samples_together_renames_the_pairs(coupling):
    """Permuting x0, x1 and y by one permutation (so that random partners stay partners) permutes the pairs."""
    x0, x1, y1 = batch()
    p = torch.randperm(len(x0))
    pairs = coupling(x0, x1, y1=y1)
    renamed = coupling(x0[p], x1[p], y1=y1[p])
    assert torch.equal(p[renamed.source], pairs.source[p])


@every_coupling
def test_inputs_are_left_alone_also_in_inference_mode(coupling):
    x0, x1, y1 = batch()
    labels = y1.float()
    copies = [t.clone() for t in (x0, x1, labels)]
    with torch.inference_mode():
        coupling(x0, x1, y1=labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of couplings that ignore y0
        coupling(x0, x1, y0=labels, y1=labels)
    for tensor, copy in zip((x0, x1, labels), copies, strict=True):
        assert torch.equal(tensor, copy)


@every_coupling
@pytest.mark.parametrize(
    ("bad", "error", "says"),
    [
        (lambda x0, x1, y: (x0[:0], x1[:0], y[:0]), ValueError, "at least one sample"),
        (lambda x0, x1, y: (x0[:0], x1, y), ValueError, "at least one sample"),
        (lambda x0, x1, y: (x0.long(), x1.long(), y), TypeError, "floating-point"),
        (lambda x0, x1, y: (x0.numpy(), x1, y), TypeError, "torch.Tensor"),
        (lambda x0, x1, y: (x0.double(), x1, y), TypeError, "same dtype"),
        (lambda x0, x1, y: (x0[:, :2], x1, y), ValueError, "equal features"),
        (lambda x0, x1, y: (x0[:, 0], x1[:, 0], y), ValueError, "samples, features"),
        (lambda x0, x1, y: (x0.index_fill(0, torch.tensor([3]), torch.nan), x1, y), ValueError, "finite"),
        (lambda x0, x1, y: (x0, x1.index_fill(0, torch.tensor([3]), torch.inf), y), ValueError, "finite"),
        (lambda x0, x1, y: (x0.to("meta"), x1, y), ValueError, "same device"),
        (lambda x0, x1, y: (x0, x1, y[:-1]), ValueError, "one condition for each of the 12 samples"),
        (lambda x0, x1, y: (x0, x1, 3), TypeError, "y1 must be"),
    ],
)
def test_bad_input_is_refused_with_a_reason(coupling, bad, error, says):
    x0, x1, y1 = bad(*batch())
    with pytest.raises(error, match=says):
        coupling(x0, x1, y1=y1)


@dataclass(frozen=True)
class Right(mbot.Coupling):
    """Random pairs with equal weights: keeps every promise. Each class below breaks one."""

    def _pair(self, x0, x1, y0, y1, generator):
        size = len(x1)
        source = draw(torch.randint, len(x0), (size,), generator=generator, device=x1.device)
        return mbot.Pairs(source, torch.arange(size, device=x1.device), torch.ones(size, device=x1.device))


def changed(**parts):
    """A coupling whose pairs have other parts: functions of the right pairs and the samples."""

    @dataclass(frozen=True)
    class Wrong(Right):
        def _pair(self, x0, x1, y0, y1, generator):
            pairs = super()._pair(x0, x1, y0, y1, generator)
            given = {name: getattr(pairs, name) for name in ("source", "target", "weight", "info")}
            return mbot.Pairs(**{**given, **{name: part(pairs, x0, x1) for name, part in parts.items()}})

    Wrong.__qualname__ = "Wrong"
    globals()["Wrong"] = Wrong  # pickles by name
    return Wrong()


def in_place(pairs, x0, x1):
    x0 += 1
    return pairs.source


def test_a_coupling_that_is_right_passes():
    check_coupling(Right())


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"source": lambda p, x0, x1: p.source.int()}, "source is torch.int32"),
        ({"source": lambda p, x0, x1: p.source + len(x0)}, "source is not in"),
        ({"target": lambda p, x0, x1: p.target[:-1]}, "shape"),
        ({"source": lambda p, x0, x1: p.source[:0], "target": lambda p, x0, x1: p.target[:0]}, "shape"),
        ({"weight": lambda p, x0, x1: p.weight * 2}, "mean 2"),
        (
            {"weight": lambda p, x0, x1: p.weight * torch.tensor([-1.0, 3.0]).repeat(6)},
            "negative|mean",
        ),
        ({"weight": lambda p, x0, x1: p.weight.requires_grad_()}, "require gradients"),
        ({"weight": lambda p, x0, x1: p.weight[:1]}, "weights have shape"),
        ({"info": lambda p, x0, x1: None}, "info is a NoneType"),
        ({"source": lambda p, x0, x1: torch.randint(len(x0), (len(x1),))}, "the generator must decide"),
        ({"source": in_place}, "changed x0 in place"),
        ({"source": lambda p, x0, x1: {}[len(x0)]}, "raised KeyError"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_is_told(parts, says):
    with pytest.raises(AssertionError, match=says) as caught:
        check_coupling(changed(**parts))
    assert "x0 = " in str(caught.value) or "x0 in place" in str(caught.value)


@pytest.mark.parametrize("reg", [0.0, -1.0])
def test_a_wrong_regularisation_is_told(reg):
    @dataclass(frozen=True)
    class Wrong(Right):
        entropic_reg = reg

    Wrong.__qualname__ = "Wrong"
    globals()["Wrong"] = Wrong  # pickles by name
    with pytest.raises(AssertionError, match="entropic_reg is"):
        check_coupling(Wrong())


def test_what_is_no_coupling_is_told():
    with pytest.raises(AssertionError, match=r"derived from mbot\.Coupling"):
        check_coupling(lambda x0, x1: None)
