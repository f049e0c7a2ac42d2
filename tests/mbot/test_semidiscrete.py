"""SemidiscreteCoupling: equal cells, known answers, classes, and what is saved."""

import dataclasses
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flows
import mbot
from mbot import OTCoupling, SemidiscreteCoupling
from mbot.couplings.cells import _CELLS, balanced_cells, cells, masses
from mbot.couplings.fitted import fingerprint


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def data(n=64, d=2, seed=0):
    g = generator(seed)
    return torch.randn(n, d, generator=g) * 0.5 + 3


@pytest.fixture(scope="module")
def fitted():
    points = data()
    return points, SemidiscreteCoupling(steps=1500, batch_size=512).fit(points, generator=generator())


def test_cells_have_equal_mass(fitted):
    points, coupling = fitted
    assert coupling.potentials.chi2 < 0.01
    pairs = coupling(torch.randn(64 * 400, 2, generator=generator(1)), points)
    hits = torch.bincount(pairs.target, minlength=64) / 400
    # Sampling alone gives a relative variance of 1/400.
    assert float((hits - 1).square().mean()) < 0.02
    assert torch.equal(pairs.source, torch.arange(64 * 400))


def test_one_dimension_is_sorting():
    """Cells of sorted points are consecutive quantile intervals of the noise."""
    points = torch.tensor([[3.0], [-2.0], [10.0], [0.5]])
    coupling = SemidiscreteCoupling(steps=3000, batch_size=512).fit(points, generator=generator())
    x = torch.tensor([[-1.5], [-0.9], [-0.4], [0.4], [0.9], [1.5]])  # quartiles at -.674, 0, .674
    assert coupling(x, points).target.tolist() == [1, 1, 3, 0, 2, 2]


@pytest.mark.parametrize("unit", [1.0, 255.0, 1e4])
def test_data_of_any_unit_are_learned(unit):
    """Grey levels of 0 … 255 beside noise of 1: all noise was nearest to a few points, and fits did not converge."""
    points = unit * torch.rand(128, 16, generator=generator())
    fitted = SemidiscreteCoupling(steps=300, batch_size=256, tol=9.0).fit(points, generator=generator())
    assert fitted.potentials.chi2 < 0.1


def test_regularisation_that_falls_finds_equal_cells_in_few_steps():
    """Quartiles again, in 150 steps; in the plane a fraction of the χ² of as many steps without."""
    points = torch.tensor([[3.0], [-2.0], [10.0], [0.5]])
    coupling = SemidiscreteCoupling(steps=150, batch_size=512, reg=2.0).fit(points, generator=generator())
    x = torch.tensor([[-1.5], [-0.8], [-0.6], [-0.1], [0.1], [0.6], [0.8], [1.5]])
    assert coupling(x, points).target.tolist() == [1, 1, 3, 3, 0, 0, 2, 2]
    points = data(512)
    none, some = (
        SemidiscreteCoupling(steps=150, batch_size=512, reg=reg, tol=9.0).fit(points, generator=generator())
        for reg in (0.0, 0.3)
    )
    assert some.potentials.chi2 < 0.2 * none.potentials.chi2
    more = some.fit(points, generator=generator(1))
    assert more.potentials.chi2 < some.potentials.chi2
    assert more.potentials.steps == 300


def test_regularisation_falls_to_a_thousandth_in_half_of_the_steps():
    coupling = SemidiscreteCoupling(steps=9, reg=0.5, tol=1e9)
    regs = [coupling._reg(step) for step in range(9)]
    assert regs == pytest.approx([0.5 * 10 ** -(3 * min(1, step / 4)) for step in range(9)])
    again = coupling.fit(data(8))
    assert [again._reg(step) for step in range(9)] == pytest.approx([0.0005] * 9)
    assert dataclasses.replace(again, tol=1e-9)._reg(0) == 0.5, "cells are not equal yet"
    assert SemidiscreteCoupling()._reg(3) == 0


@pytest.mark.parametrize("codes", [None, torch.arange(20) % 3])
def test_regularised_masses_are_those_of_softmax(codes, monkeypatch):
    monkeypatch.setitem(_CELLS, "cpu", 70)
    points, x, values = data(20), torch.randn(33, 2, generator=generator(1)), torch.randn(20, generator=generator(2))
    wanted = None if codes is None else torch.randint(0, 3, (33,), generator=generator(3))
    y = points - points.mean(0)
    score = x @ y.T + values - y.square().sum(1) / 2
    if codes is not None:
        score = score.masked_fill(codes != wanted[:, None], -torch.inf)
    torch.testing.assert_close(masses(x, points, values, codes, wanted, 0.7), (score / 0.7).softmax(1).sum(0))
    torch.testing.assert_close(
        masses(x, points, values, codes, wanted, 0.0), torch.bincount(score.argmax(1), minlength=20).float()
    )


def test_a_fit_ends_where_chi2_is_small_enough_on_fresh_noise():
    points, told = data(64), []
    settings = {"steps": 800, "batch_size": 512, "reg": 0.3}
    whole = SemidiscreteCoupling(**settings).fit(points, generator=generator())
    coupling = SemidiscreteCoupling(**settings, stop_at=0.05).fit(
        points, generator=generator(), progress=lambda done, steps: told.append(done)
    )
    assert coupling.potentials.steps == told[-1] in (100, 200, 400)
    hits = torch.bincount(coupling(torch.randn(64 * 400, 2, generator=generator(5)), points).target, minlength=64) / 400
    assert float((hits - 1).square().mean()) < 0.06
    assert coupling.potentials.chi2 <= 0.05
    never = SemidiscreteCoupling(**settings, stop_at=1e-9).fit(points, generator=generator())
    assert never.potentials.steps == whole.potentials.steps == 800


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 3), st.integers(0, 1000), st.booleans())
def test_balanced_cells_take_every_point_equally_often(n, size, classes, seed, few):
    """Counts are even, and points keep the first noises of their own cells; by a loop over the noises."""
    g = generator(seed)
    points, x, values = (
        torch.randn(size, 2, generator=g),
        torch.randn(n, 2, generator=g),
        torch.randn(size, generator=g),
    )
    codes = torch.arange(size) % classes if classes > 1 else None
    wanted = None if codes is None else torch.randint(0, int(codes.max()) + 1, (n,), generator=g)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mbot.couplings.cells._EXACT", 0 if few else 4096)
        target, kept = balanced_cells(x, points, values, codes, wanted, generator(1))
    own = cells(x, points, values, codes, wanted)
    hits = torch.bincount(target, minlength=size)
    kept_here = 0
    for c in range(1 if codes is None else int(codes.max()) + 1):
        members = torch.arange(size) if codes is None else torch.nonzero(codes == c)[:, 0]
        asked = torch.arange(n) if wanted is None else torch.nonzero(wanted == c)[:, 0]
        assert set(hits[members].tolist()) <= {len(asked) // len(members), -(-len(asked) // len(members))}
        assert int(hits[members].sum()) == len(asked)
        for j in members.tolist():
            at_home = asked[own[asked] == j]
            stay = at_home[: int(hits[j])]  # as many as there is room for
            assert torch.equal(target[stay], own[stay])
            kept_here += len(stay)
    assert kept == pytest.approx(kept_here / n)


def test_balanced_pairs_are_nearly_optimal_and_each_point_comes_once(fitted):
    points, coupling = fitted
    x = torch.randn(64 * 3, 2, generator=generator(7))
    even = dataclasses.replace(coupling, balanced=True)
    pairs = even(x, points, generator=generator())
    assert torch.equal(torch.bincount(pairs.target), torch.full((64,), 3))
    assert torch.equal(pairs.source, torch.arange(192))
    assert 0.7 < pairs.info["kept"] < 0.95
    exact = OTCoupling()(x, points.repeat(3, 1)).info["transport_cost"]
    assert exact - 1e-6 < pairs.info["transport_cost"] < 1.03 * exact
    by_class = SemidiscreteCoupling(conditional=True, balanced=True, steps=5, tol=1e9).fit(points, torch.arange(64) % 5)
    pairs = by_class(x[:128], points, y1=torch.arange(64) % 5, generator=generator())
    assert torch.equal(torch.bincount(pairs.target), torch.full((64,), 2))


def test_an_epoch_serves_every_point_once(fitted):
    points, coupling = fitted
    even = dataclasses.replace(coupling, balanced=True)
    loader = flows.CoupledLoader(
        torch.utils.data.TensorDataset(points), None, even, 10, ot_batch_size=70, drop_last=False
    )
    for _ in range(2):
        assert torch.cat([batch.index for batch in loader]).sort().values.tolist() == list(range(64))


def test_it_approaches_the_optimal_assignment(fitted):
    """Against exact OT of 40 noises a data point: the pairs cost as much, without a batch."""
    points, coupling = fitted
    x = torch.randn(64 * 40, 2, generator=generator(2))
    copies = points.repeat(40, 1)
    exact = OTCoupling()(x, copies).info["transport_cost"]
    assert coupling(x, points).info["transport_cost"] == pytest.approx(exact, rel=0.02)


def test_chi2_is_that_of_the_cells():
    """One step leaves unequal cells: the unbiased estimate agrees with a count of many noises."""
    points = data(16)
    with pytest.warns(mbot.ConvergenceWarning, match="chi2 = "):
        coupling = SemidiscreteCoupling(steps=1, batch_size=4096, rate=1e-4).fit(points, generator=generator())
    hits = torch.bincount(coupling(torch.randn(200_000, 2), points).target, minlength=16) / 200_000
    assert coupling.potentials.chi2 == pytest.approx(float(16 * hits.square().sum() - 1), rel=0.1)


def test_fitting_again_goes_on():
    points = data(256)
    start = SemidiscreteCoupling(steps=150, batch_size=256, tol=100.0).fit(points, generator=generator())
    more = start.fit(points, generator=generator(1))
    assert more.potentials.steps == 300
    assert more.potentials.chi2 < start.potentials.chi2
    with pytest.raises(ValueError, match="fitted to, 256 points; got 255 points"):
        start.fit(points[:-1])


def test_classes_have_their_own_cells_and_the_noise_tells_nothing():
    g = generator()
    y = torch.randint(0, 3, (90,), generator=g)
    points = torch.randn(90, 2, generator=g) + 4 * y[:, None]
    x = torch.randn(1500, 2, generator=g)
    agnostic = SemidiscreteCoupling(steps=600, tol=1.0).fit(points, generator=g)
    by_class = SemidiscreteCoupling(conditional=True, steps=600, tol=1.0).fit(points, y, generator=g)
    skewed = flows.metrics.prior_skew(x, y[agnostic(x, points).target], generator=g)
    safe = flows.metrics.prior_skew(x, y[by_class(x, points, y1=y, generator=g).target], generator=g)
    assert skewed.score > skewed.chance + 0.3
    assert safe.score < safe.chance + 0.05
    assert by_class.potentials.chi2 < 0.2

    wanted = torch.randint(0, 3, (1500,), generator=g)
    pairs = by_class(x, points, y0=wanted, y1=y)
    assert torch.equal(y[pairs.target], wanted)
    # Hits of 1500 / 90 on average: a relative variance of 0.06 from sampling and at most 0.2 from the cells.
    hits = torch.bincount(pairs.target, minlength=90) / (1500 / 3) * torch.bincount(y)[y]
    assert float((hits - 1).square().mean()) < 0.3


def test_classes_alone_are_the_coupling_of_each_class():
    """With the same potentials, a noise of class c goes to its cell among the points of class c."""
    points, y = data(30), torch.arange(30) % 3
    coupling = SemidiscreteCoupling(conditional=True, steps=50, tol=100.0).fit(points, y, generator=generator())
    x = torch.randn(200, 2)
    for c in range(3):
        among = coupling(x, points, y0=[c] * 200, y1=y).target
        score = x @ (points - points.mean(0)).T + coupling.potentials.values
        score = score - (points - points.mean(0)).square().sum(1) / 2
        score[:, y != c] = -torch.inf
        assert torch.equal(among, score.argmax(1))
    names = [f"class {c}" for c in y.tolist()]
    assert torch.equal(coupling(x, points, y0=["class 2"] * 200, y1=names).target, among)


def test_the_noise_may_be_any_distribution():
    points = data(32)

    def uniform(n, generator=None):
        return torch.rand(n, 2, generator=generator) * 2 - 5

    coupling = SemidiscreteCoupling(steps=1500, batch_size=512).fit(points, noise=uniform, generator=generator())
    hits = torch.bincount(coupling(uniform(32 * 400), points).target, minlength=32) / 400
    assert float((hits - 1).square().mean()) < 0.03


def test_images_and_half_precision():
    points = torch.randn(20, 1, 4, 4)
    coupling = SemidiscreteCoupling(steps=200, tol=10.0).fit(points)
    assert coupling(torch.randn(7, 1, 4, 4), points).target.shape == (7,)
    assert coupling(torch.randn(7, 1, 4, 4).double(), points.double()).target.shape == (7,)
    half = SemidiscreteCoupling(steps=20, tol=1e9).fit(points.bfloat16())
    assert half(torch.randn(7, 1, 4, 4).bfloat16(), points.bfloat16()).target.shape == (7,)


def test_scores_do_not_depend_on_the_tiles(monkeypatch):
    points = data(50)
    coupling = SemidiscreteCoupling(steps=20, tol=100.0).fit(points, generator=generator())
    x = torch.randn(300, 2)
    whole = coupling(x, points).target
    monkeypatch.setitem(_CELLS, "cpu", 120)
    assert torch.equal(coupling(x, points).target, whole)


def test_saves_and_loads(fitted):
    points, coupling = fitted
    buffer = io.BytesIO()
    torch.save(coupling.state_dict(), buffer)
    buffer.seek(0)
    again = SemidiscreteCoupling.from_state_dict(torch.load(buffer, weights_only=True))
    x = torch.randn(100, 2)
    assert torch.equal(again(x, points).target, coupling(x, points).target)
    assert again == coupling == pickle.loads(pickle.dumps(coupling))
    assert again != SemidiscreteCoupling(steps=1500, batch_size=512)
    assert "64 points" in repr(again)
    empty = SemidiscreteCoupling(steps=7)
    assert SemidiscreteCoupling.from_state_dict(empty.state_dict()) == empty


def test_the_seed_decides_and_progress_is_told():
    points, told = data(20), []
    fits = [
        SemidiscreteCoupling(steps=20, tol=100.0).fit(
            points, generator=generator(3), progress=lambda done, all_: told.append((done, all_))
        )
        for _ in range(2)
    ]
    assert fits[0] == fits[1]
    assert told[:20] == [(i + 1, 20) for i in range(20)]


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: SemidiscreteCoupling(steps=0), ValueError, "steps"),
        (lambda: SemidiscreteCoupling(rate=-1.0), ValueError, "rate"),
        (lambda: SemidiscreteCoupling(reg=-1.0), ValueError, "reg must"),
        (lambda: SemidiscreteCoupling(stop_at=0.0), ValueError, "stop_at must"),
        (lambda: mbot.distributed.fit(mbot.OTCoupling(), data()), TypeError, "must be an mbot.SemidiscreteCoupling"),
        (lambda: SemidiscreteCoupling().fit(torch.zeros(0, 2)), ValueError, "data must hold"),
        (lambda: SemidiscreteCoupling().fit([1.0]), TypeError, "data must be"),
        (lambda: SemidiscreteCoupling(conditional=True).fit(data()), ValueError, "conditional=True needs y"),
        (lambda: SemidiscreteCoupling(conditional=True).fit(data(), torch.zeros(3)), ValueError, "got 3"),
        (lambda: SemidiscreteCoupling().fit(data(), noise=lambda n, generator: torch.zeros(n)), ValueError, "noise"),
        (lambda: SemidiscreteCoupling.from_state_dict({"step": 3}), ValueError, "got \\['step'\\]"),
    ],
)
def test_bad_settings(call, error, says):
    with pytest.raises(error, match=says):
        call()


def others(points):
    """Data sets of nearly the same points."""
    for i in (0, 31, 63):
        changed = points.clone()
        changed[i, 1] = torch.nextafter(changed[i, 1], torch.tensor(torch.inf))
        yield changed
    yield points.flip(0)
    yield points.flip(1)
    yield torch.cat((points[1:2], points[:1], points[2:]))
    yield torch.cat((points[1:2], points[1:]))
    yield torch.cat((points[:1].flip(1), points[1:]))
    yield points.bfloat16().float()


def test_another_data_set_of_the_same_size_is_refused(fitted):
    points, coupling = fitted
    x = torch.randn(5, 2)
    with pytest.raises(ValueError, match="fitted to, 64 points; got 63 points"):
        coupling(x, points[:-1])
    for changed in others(points):
        with pytest.raises(ValueError, match="fitted to, 64 points; got as many others"):
            coupling(x, changed)
        with pytest.raises(ValueError, match="data must be the data set that the coupling was fitted to"):
            coupling.fit(changed)
    for same in (points.clone(), points.double(), points.numpy().copy(), points.t().contiguous().t(), points - 0.0):
        assert len(coupling(x, torch.as_tensor(same).float())) == 5
    y = torch.arange(64) % 3
    by_class = SemidiscreteCoupling(conditional=True, steps=5, tol=1e9).fit(points, y)
    assert len(by_class(x, points, y1=[f"class {c}" for c in y.tolist()])) == 5  # other names, the same classes
    for labels in (torch.arange(64) % 2, torch.arange(64) // 22, torch.where(torch.arange(64) == 9, 1, y)):
        with pytest.raises(ValueError, match="other classes"):
            by_class(x, points, y1=labels)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**32), st.data())
def test_fingerprints_see_every_number_and_its_place(n, d, seed, draw):
    points = torch.randint(-2, 3, (n, d), generator=generator(seed)).float() / 2
    other = torch.randint(-2, 3, (n, d), generator=generator(draw.draw(st.integers(0, 50)))).float() / 2
    assert (fingerprint(points) == fingerprint(other)) == torch.equal(points, other)
    assert fingerprint(points) == fingerprint(points.double()) == fingerprint(points.t().contiguous().t())
    assert fingerprint(torch.where(points == 0, -0.0, points)) == fingerprint(points)
    assert fingerprint(points, torch.zeros(n, dtype=torch.int64)) != fingerprint(
        points, torch.ones(n, dtype=torch.int64)
    )


def test_fingerprints_do_not_depend_on_the_tiles(monkeypatch):
    points = data(50)
    whole = fingerprint(points)
    monkeypatch.setattr("mbot.couplings.fitted._HASHED", 7)
    assert fingerprint(points) == whole


def test_unknown_classes_are_refused():
    y = torch.arange(30) % 3
    by_class = SemidiscreteCoupling(conditional=True, steps=5, tol=1e9).fit(data(30), y)
    with pytest.raises(ValueError, match="3 is none of them"):
        by_class(torch.randn(2, 2), data(30), y0=[0, 3], y1=y)
    with pytest.raises(ValueError, match="y1"):
        by_class(torch.randn(2, 2), data(30))


def test_flow_matching_trains_on_the_whole_data_set(fitted):
    points, coupling = fitted
    batch = flows.FlowMatching(coupling).sample(torch.randn(10, 2), points, torch.arange(64))
    assert len(batch) == 10
    torch.testing.assert_close(batch.xt + (1 - batch.t)[:, None] * batch.ut, points[batch.y])
