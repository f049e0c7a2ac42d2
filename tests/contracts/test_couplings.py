"""What every coupling promises, whatever it couples by."""

import pickle
import warnings

import pytest
import torch

import mbot
from tests.contracts.cases import CONDITIONAL, COUPLINGS, RANDOM, UNEVEN, exported, flat

every_coupling = pytest.mark.parametrize("coupling", flat(COUPLINGS), ids=repr)


def batch(n=12, m=12, shape=(3,), dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x0 = torch.randn(n, *shape, generator=g, dtype=dtype)
    x1 = torch.randn(m, *shape, generator=g, dtype=dtype) + 1
    y1 = torch.randint(0, 3, (m,), generator=g)
    return x0, x1, y1


def seeded():
    return torch.Generator().manual_seed(7)


def test_everything_has_a_case():
    assert exported(mbot.Coupling) == set(COUPLINGS)


@every_coupling
@pytest.mark.parametrize("shape", [(3,), (1, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pairs_are_indices_in_range(coupling, shape, dtype, device):
    x0, x1, y1 = (t.to(device) for t in batch(shape=shape, dtype=dtype))
    pairs = coupling(x0, x1, y1=y1)
    assert pairs.source.dtype == pairs.target.dtype == torch.int64
    assert pairs.source.device.type == pairs.target.device.type == device.type
    assert pairs.source.shape == pairs.target.shape == (len(pairs),)
    assert 0 <= int(pairs.source.min()) <= int(pairs.source.max()) < len(x0)
    if coupling not in UNEVEN:
        assert torch.equal(pairs.target, torch.arange(len(x1), device=device))
    assert 0 <= int(pairs.target.min()) <= int(pairs.target.max()) < len(x1)
    a, b = pairs.apply(x0, x1)
    assert torch.equal(a, x0[pairs.source])
    assert torch.equal(b, x1[pairs.target])
    assert isinstance(pairs.info, dict)


@every_coupling
def test_equal_sizes_use_every_sample_once(coupling):
    if coupling in UNEVEN:
        pytest.skip("leaves samples out, or draws them")
    x0, x1, y1 = batch()
    assert sorted(coupling(x0, x1, y1=y1).source.tolist()) == list(range(len(x0)))


@every_coupling
def test_weights_have_mean_one_and_no_gradient(coupling):
    x0, x1, y1 = batch()
    weight = coupling(x0.requires_grad_(), x1.requires_grad_(), y1=y1).weight
    if weight is not None:
        assert weight.shape == (len(x1),)
        assert not weight.requires_grad
        assert bool((weight >= 0).all())
        torch.testing.assert_close(weight.mean(), torch.tensor(1.0))


@every_coupling
@pytest.mark.parametrize(("n", "m"), [(12, 12), (9, 12), (12, 9)])
def test_the_generator_decides_everything_random(coupling, n, m):
    x0, x1, y1 = batch(n, m)
    if type(coupling).__name__ in CONDITIONAL and n != m:
        pytest.skip("conditional couplings need equal sizes")
    torch.manual_seed(1)
    first = coupling(x0, x1, y1=y1, generator=torch.Generator().manual_seed(7))
    torch.manual_seed(2)
    second = coupling(x0, x1, y1=y1, generator=torch.Generator().manual_seed(7))
    assert torch.equal(first.source, second.source)
    assert torch.equal(first.target, second.target)


@every_coupling
@pytest.mark.parametrize(("n", "m"), [(9, 12), (12, 9), (1, 5), (5, 1)])
def test_unequal_sizes(coupling, n, m):
    x0, x1, y1 = batch(n, m)
    if type(coupling).__name__ in CONDITIONAL:
        with pytest.raises(ValueError, match=r"equally many|hold one condition"):
            coupling(x0, x1, y1=y1)
        return
    pairs = coupling(x0, x1, y1=y1)
    if coupling not in UNEVEN:
        assert torch.equal(pairs.target, torch.arange(m))
    assert 0 <= int(pairs.target.min()) <= int(pairs.target.max()) < m
    assert 0 <= int(pairs.source.min()) <= int(pairs.source.max()) < n


@every_coupling
def test_one_sample(coupling):
    x0, x1, y1 = batch(1, 1)
    pairs = coupling(x0, x1, y1=y1)
    assert pairs.source.tolist() == pairs.target.tolist() == [0]


@every_coupling
def test_no_memory_between_calls(coupling):
    x0, x1, y1 = batch()
    before = coupling(x0, x1, y1=y1, generator=seeded())
    coupling(*batch(seed=5)[:2], y1=batch(seed=5)[2])
    after = coupling(x0, x1, y1=y1, generator=seeded())
    assert torch.equal(before.source, after.source)


@every_coupling
def test_renaming_all_samples_together_renames_the_pairs(coupling):
    """Permuting x0, x1 and y by one permutation (so that random partners stay partners) permutes the pairs."""
    if coupling in RANDOM:
        pytest.skip("draws by position")
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
def test_non_contiguous_input(coupling):
    x0, x1, y1 = batch(24, 24)
    strided = coupling(x0[::2], x1[::2], y1=y1[::2], generator=seeded())
    packed = coupling(x0[::2].contiguous(), x1[::2].contiguous(), y1=y1[::2].contiguous(), generator=seeded())
    assert torch.equal(strided.source, packed.source)


@every_coupling
def test_settings_pickle_compare_and_print(coupling):
    again = pickle.loads(pickle.dumps(coupling))
    assert again == coupling
    assert repr(again) == repr(coupling)
    with pytest.raises(AttributeError):
        coupling.anything_else = 1


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
