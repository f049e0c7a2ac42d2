"""DataCoupling: noises that are remade from numbers, matched over the whole data set, exchanged and refreshed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

import mbot
from mbot import DataCoupling
from mbot.random import normals_at


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def data(n=60, d=3, seed=0):
    g = seeded(seed)
    return torch.randn(n, d, generator=g) + 2, torch.randint(0, 3, (n,), generator=g)


def cost(coupling, x, turn=0):
    apart = coupling.noises(torch.arange(len(x)), turn).double() - x.double()
    return apart.square().flatten(1).sum(1)


def shuffled(coupling, seed=0):
    """As bad as independent pairs."""
    number = coupling.assignment.number
    mixed = number.flatten()[torch.randperm(number.numel(), generator=seeded(seed))].reshape(number.shape)
    return replace(coupling, assignment=replace(coupling.assignment, number=mixed))


@pytest.mark.parametrize("d", [1, 2, 7])
def test_noises_by_number_are_normal_and_independent(d):
    z = normals_at(3, torch.arange(40_000), d)
    assert z.dtype == torch.float32
    for column in z.T:
        assert kstest(column.numpy(), "norm").pvalue > 1e-3
    both = torch.cat((z[:-1], z[1:], normals_at(4, torch.arange(39_999), d)), 1).double()  # neighbours, another seed
    correlation = torch.corrcoef(both.T)
    assert float((correlation - torch.eye(3 * d)).abs().max()) < 0.025
    assert float(torch.corrcoef(both.square().T).sub(torch.eye(3 * d)).abs().max()) < 0.025


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**62), st.lists(st.integers(0, 2**40), min_size=1, max_size=20), st.integers(1, 300))
def test_a_noise_is_a_function_of_its_number(seed, numbers, d):
    together = normals_at(seed, torch.tensor(numbers), d)
    assert bool(together.isfinite().all())
    for number, noise in zip(numbers, together, strict=True):
        assert torch.equal(normals_at(seed, torch.tensor([number]), d)[0], noise)


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("conditional", [False, True])
def test_fit_gives_every_point_noises_of_the_optimal_matching(c, conditional):
    x, y = data()
    fitted = DataCoupling(c, conditional=conditional).fit(x, y, generator=seeded(1))
    number = fitted.assignment.number
    assert number.shape == (60, c)
    assert torch.equal(number.flatten().sort().values, torch.arange(60 * c))
    total = sum(cost(fitted, x, turn) for turn in range(c))
    noise = normals_at(fitted.assignment.seed, torch.arange(60 * c), 3)
    for k in range(3) if conditional else [slice(None)]:
        rows = torch.arange(60)[y == k] if conditional else torch.arange(60)
        inside = noise[number[rows].flatten().sort().values]
        best = mbot.OTCoupling()(inside, x[rows].repeat(c, 1)).info["transport_cost"]
        assert float(total[rows].mean()) / c == pytest.approx(float(best), rel=1e-5)
    if conditional:  # which noises a class gets does not depend on the data
        assert torch.equal(y[number % 60], y[:, None].expand(-1, c))


def test_the_seed_decides():
    x, _ = data()
    first, again, other = (DataCoupling().fit(x, generator=seeded(s)) for s in (1, 1, 2))
    assert first == again != other
    assert first.assignment.seed != other.assignment.seed
    assert repr(first) == repr(shuffled(first))  # what a run is compared by does not change with its state


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 99), st.integers(1, 3), st.booleans(), st.integers(1, 6))
def test_exchanges_never_raise_the_cost_and_stay_inside_their_groups(seed, c, conditional, batches):
    x, y = data()
    coupling = shuffled(DataCoupling(c).fit(x, y, generator=seeded(seed)), seed)
    coupling = replace(coupling, conditional=conditional)
    for epoch in range(3):
        rows = torch.randperm(60, generator=seeded(seed + epoch))[:50]
        groups = torch.arange(50) % batches
        after = coupling.at_epoch(epoch, x, y, rows, groups)
        for turn in range(c):
            if turn != epoch % c:
                assert torch.equal(after.noises(rows, turn), coupling.noises(rows, turn))
        old, new = (one.assignment.number[:, epoch % c] for one in (coupling, after))
        left_out = torch.ones(60, dtype=torch.bool).index_fill(0, rows, False)
        assert torch.equal(old[left_out], new[left_out])
        before, now = cost(coupling, x, epoch), cost(after, x, epoch)
        for group in range(batches):
            for k in range(3) if conditional else [None]:
                inside = rows[groups == group] if k is None else rows[(groups == group) & (y[rows] == k)]
                assert torch.equal(old[inside].sort().values, new[inside].sort().values)
                assert float(now[inside].sum()) <= float(before[inside].sum())
                if len(inside):
                    noise = coupling.noises(inside, epoch)
                    best = mbot.OTCoupling()(noise, x[inside]).info["transport_cost"]
                    assert float(now[inside].mean()) == pytest.approx(float(best), rel=1e-4)
        coupling = after


def test_noises_are_refreshed_by_the_epoch():
    x, y = data()
    first = DataCoupling(2, refresh=3, exchange=False).fit(x, y, generator=seeded(1))
    rows, groups = torch.arange(60), torch.zeros(60, dtype=torch.int64)
    held = first
    for epoch in range(7):
        held = held.at_epoch(epoch, x, y, rows, groups)
        assert held.assignment.refreshed == epoch // 3
    assert not torch.equal(held.noises(rows), first.noises(rows))
    assert float(cost(held, x).mean()) < 0.8 * float(cost(shuffled(held), x).mean())
    assert held == first.at_epoch(6, x, y, rows, groups)


def test_state_is_saved_and_restored(tmp_path):
    x, y = data()
    coupling = shuffled(DataCoupling(2, refresh=4, conditional=True).fit(x, y))
    torch.save(coupling.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = DataCoupling(2, refresh=4, conditional=True).load_state_dict(state)
    assert again == coupling
    assert torch.equal(again.noises(torch.arange(60), 1), coupling.noises(torch.arange(60), 1))
    with pytest.raises(ValueError, match="other settings"):
        DataCoupling(3).load_state_dict(state)
    empty = DataCoupling(2)
    assert empty.load_state_dict(empty.state_dict()) == empty


def test_samples_of_any_shape_and_dtype():
    x = torch.randn(20, 2, 3, 3, generator=seeded()).bfloat16()
    coupling = DataCoupling().fit(x)
    assert coupling.noises(torch.tensor([4, 2])).shape == (2, 2, 3, 3)
    coupling.check_data_set(x)
    assert torch.equal(coupling.noises(torch.tensor([4, 2])), coupling.noises(torch.tensor([2, 4])).flip(0))


def test_called_directly_it_is_exact_transport_of_small_clouds():
    x, y = data()
    x0 = torch.randn(60, 3, generator=seeded(5))
    assert torch.equal(DataCoupling()(x0, x).source, mbot.OTCoupling()(x0, x).source)
    pairs = DataCoupling(conditional=True)(x0, x, y1=y)
    assert torch.equal(pairs.source, mbot.ConditionalOTCoupling()(x0, x, y1=y).source)
    y0 = y.flip(0)
    assert torch.equal(y0[DataCoupling(conditional=True)(x0, x, y0=y0, y1=y).source], y)
    with pytest.raises(ValueError, match="each class must hold 1 points of x for one of y"):
        DataCoupling(conditional=True)(x0, x, y0=y * 0, y1=y)


def test_what_does_not_fit_is_refused():
    x, y = data()
    coupling = DataCoupling(conditional=True).fit(x, y)
    for bad in ((x[1:], y[1:]), (x.flip(0), y), (x, y * 0)):
        with pytest.raises(ValueError, match="must be the data set that the coupling was fitted to, 60 points"):
            coupling.check_data_set(*bad)
    with pytest.raises(ValueError, match="takes no other source"):
        DataCoupling().fit(x, noise=torch.randn)
    with pytest.raises(ValueError, match=r"conditional=True needs y.*got none"):
        DataCoupling(conditional=True).fit(x)
    with pytest.raises(ValueError, match=r"no noises yet.*fit\(data\)"):
        DataCoupling().noises(torch.arange(3))
    for name, bad in (("num_noises", 0), ("refresh", 0), ("tol", -1.0)):
        with pytest.raises(ValueError, match=name):
            DataCoupling(**{name: bad})


def test_noises_of_positions_in_any_container():
    coupling = DataCoupling().fit(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)))
    wanted = coupling.noises(torch.tensor([0, 5]))
    for rows in ([0, 5], (0, 5), np.array([0, 5]), torch.tensor([0, 5], dtype=torch.int32)):
        assert torch.equal(coupling.noises(rows), wanted)
    for wrong in ([0.5, 1.0], [True, False], 3, [[0, 1]]):
        with pytest.raises(TypeError, match="rows must be integers"):
            coupling.noises(wrong)
