"""Flows between two labelled data sets: conditions of both sides reach the coupling, and follow their samples."""

import random
import threading
import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

import flows
import mbot
from flows import CoupledLoader, FlowMatching, diagnose
from flows.__main__ import main
from flows.sources import Pools

SIZES0, SIZES1 = (40, 25, 15), (12, 20, 40)


def clouds(sizes, shift, seed):
    """Classes 100 units apart; a sample's first coordinate tells its class, its second its row."""
    g = torch.Generator().manual_seed(seed)
    y = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    x = torch.stack((100.0 * y, torch.arange(len(y)) / 100), 1) + torch.rand(len(y), 2, generator=g) * 0.001 + shift
    order = torch.randperm(len(y), generator=g)
    return TensorDataset(x[order], y[order])


SOURCE, DATA = clouds(SIZES0, 7.0, 0), clouds(SIZES1, 0.0, 1)


class Items(Dataset):
    """The same, item by item, with a name for each class."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        x, y = self.data[i]
        return x, "abc"[y]


class Shaken(TensorDataset):
    """Transformed at random."""

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + torch.rand(2), y


class Watched(TensorDataset):
    """Notes the threads that read it."""

    def __getitem__(self, i):
        self.readers.add(threading.get_ident())
        return super().__getitem__(i)


def loader(coupling=None, source=SOURCE, data=DATA, batch_size=6, ot_batch_size=24, **settings):
    return CoupledLoader(data, source, coupling or mbot.ConditionalOTCoupling(), batch_size, ot_batch_size, **settings)


def rows_of(x, data):
    """The position of each sample in its data set."""
    return (x[:, None] == data.tensors[0]).all(2).int().argmax(1)


def classes(x, shift=0.0):
    return ((x[:, 0] - shift) / 100).round().long()


@pytest.mark.filterwarnings("ignore:the source has conditions")
@pytest.mark.parametrize("coupling", [mbot.ConditionalOTCoupling(), "semidiscrete"])
def test_data_sets_are_read_in_one_thread(coupling):
    """While an item is made the global generators are seeded, so no two threads may make items at once."""
    if coupling == "semidiscrete":
        coupling = mbot.SemidiscreteCoupling(steps=10, batch_size=32, tol=1e9).fit(DATA.tensors[0])
    data, source = Watched(*DATA.tensors), Watched(*SOURCE.tensors)
    data.readers = source.readers = set()
    state = torch.get_rng_state()
    one = loader(coupling, source, data)
    for _ in range(20):
        one.next_batch()
    assert data.readers == {threading.get_ident()}
    assert torch.equal(torch.get_rng_state(), state)


def test_flow_matching_hands_the_conditions_of_both_sides_to_the_coupling():
    g = torch.Generator().manual_seed(0)
    y0 = torch.arange(64) % 2
    x0, y1 = 100.0 * y0[:, None] + torch.randn(64, 2, generator=g), (torch.arange(64) % 2)[torch.randperm(64)]
    x1 = 100.0 * y1[:, None] + torch.randn(64, 2, generator=g)
    fm = FlowMatching(mbot.ConditionalOTCoupling())
    batch = fm.sample(x0, x1, y1, y0=y0, generator=g)
    assert float(batch.ut.norm(dim=1).max()) < 50  # no pair crosses
    assert float(fm.sample(x0, x1, y1, generator=g).ut.norm(dim=1).max()) > 50  # the noise of its partner's class
    coupled = fm.couple(x0, x1, y1, y0=y0)
    assert torch.equal(coupled.y0, coupled.y)
    assert torch.equal(classes(coupled.x0), coupled.y0)
    assert torch.equal(coupled[3:9].y0, coupled.y0[3:9])
    model = lambda t, x, y: torch.zeros_like(x)
    assert float(fm.loss(model, x0, x1, y1, y0=y0, generator=g)) < 2500
    with pytest.raises(ValueError, match="y0 must hold one condition for each of the 64 samples"):
        fm.sample(x0, x1, y1, y0=y0[:63])


@pytest.mark.parametrize("kind", [lambda d: d, Items])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_keeps_the_conditions_of_the_source(kind, workers):
    one = loader(source=kind(SOURCE), data=kind(DATA), num_workers=workers, source_sampling="matched")
    batches = [one.next_batch() for _ in range(24)]
    one.close()
    for batch in batches:
        plain0, plain1 = (y if isinstance(y, list) else y.tolist() for y in (batch.y0, batch.y))
        assert plain0 == plain1
        assert torch.equal(classes(batch.x0, 7.0), classes(batch.x1))
        assert [("abc".index(v) if isinstance(v, str) else v) for v in plain0] == classes(batch.x0, 7.0).tolist()
    again = loader(source=kind(SOURCE), data=kind(DATA), num_workers=2 - workers, source_sampling="matched")
    again.load_state_dict({**one.state_dict(), "epoch": 0, "batch": 5})
    for batch in batches[5:9]:
        other = again.next_batch()
        assert torch.equal(batch.x0, other.x0)
        assert torch.equal(batch.x1, other.x1)
    again.close()


def test_a_callable_source_may_have_conditions():
    def source(n, generator):
        y = torch.randint(0, 3, (n,), generator=generator)
        return torch.stack((100.0 * y, torch.rand(n, generator=generator)), 1), y

    coupled = next(iter(loader(mbot.IndependentCoupling(), source)))
    assert torch.equal(classes(coupled.x0), coupled.y0)


def test_matched_sources_are_as_the_targets_ask_and_each_as_often_as_any_of_its_class():
    one = loader(source_sampling="matched", shuffle=True)
    epochs = 200
    used0, used1 = torch.zeros(len(SOURCE)), torch.zeros(len(DATA))
    for _ in range(epochs):
        for batch in one:
            index0 = rows_of(batch.x0, SOURCE)
            used0 += torch.bincount(index0, minlength=len(SOURCE))
            used1 += torch.bincount(batch.index, minlength=len(DATA))
    assert torch.equal(used1, torch.full((len(DATA),), float(epochs)))
    for c in range(3):
        mean = epochs * SIZES1[c] / SIZES0[c]
        share = used0[SOURCE.tensors[1] == c]
        assert float(share.mean()) == pytest.approx(mean, rel=1e-6)
        assert float((share - mean).abs().max()) < 5 * mean**0.5


def test_no_source_comes_twice_while_there_are_enough():
    pools = Pools(["a"] * 5 + ["b"] * 2, ["b", "a", "a", "b", "a", "b"])
    drawn = pools.draw(torch.arange(6), torch.Generator().manual_seed(0)).tolist()
    assert len({drawn[1], drawn[2], drawn[4]}) == 3
    assert {drawn[0], drawn[3], drawn[5]} == {5, 6}
    with pytest.raises(ValueError, match="the source has no sample of the class 'c'"):
        Pools(["a", "b"], ["a", "c"])


def test_groups_take_the_place_of_conditions():
    """Control cells of the same cell line, whatever was done to the others."""
    line0, line1 = torch.arange(len(SOURCE)) % 4, torch.arange(len(DATA)) % 4
    one = loader(mbot.IndependentCoupling(), source_sampling="matched", groups=(line0, line1.tolist()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in one:
            index0 = rows_of(batch.x0, SOURCE)
            assert torch.equal(line0[index0], line1[batch.index])


def test_a_coupling_that_ignores_the_labels_of_the_source_says_so_once():
    for coupling in (mbot.OTCoupling(), mbot.IndependentCoupling(), mbot.WeightedCoupling(reg=1.0)):
        with pytest.warns(UserWarning, match=f"{type(coupling).__name__} ignores") as told:
            list(loader(coupling))
        assert len(told) == 1
        assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next(iter(loader(mbot.OTCoupling(), SOURCE.tensors[0])))
        next(iter(loader(mbot.OTCoupling(), None)))
        next(iter(loader(source_sampling="matched")))
        next(iter(loader(mbot.IndependentCoupling(), source_sampling="matched")))
    x0, y0, x1 = SOURCE.tensors[0][:24], SOURCE.tensors[1][:24], DATA.tensors[0][:24]
    with pytest.warns(UserWarning, match="OTCoupling ignores the conditions of the source"):
        mbot.OTCoupling()(x0, x1, y0)


@pytest.mark.parametrize("workers", [0, 2])
def test_several_sources_for_each_target(workers):
    """Those of the nearest noise follow from the coupling; with matched sampling all are of the target's class."""
    noise = loader(mbot.NearestNoiseCoupling(5), None, num_workers=workers)
    one = loader(mbot.NearestNoiseCoupling(3), source_sampling="matched", num_workers=workers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(12):
            served, batch = noise.next_batch(), one.next_batch()
            assert served.x0.shape == served.x1.shape
            assert torch.equal(classes(batch.x0, 7.0), classes(batch.x1))
            assert torch.equal(batch.y0, batch.y)
    for each in (noise, one):
        again = loader(each.coupling, each.batches.sources.source, source_sampling=each.batches.sources.sampling)
        again.load_state_dict(each.state_dict())
        first, second = each.next_batch(), again.next_batch()
        assert torch.equal(first.x0, second.x0)
        each.close()


def test_the_number_of_sources_may_be_given():
    """Transport of four sources a target: every target once, cheaper pairs."""
    costs, data = [], TensorDataset(torch.randn(240, 4, generator=torch.Generator().manual_seed(0)))
    for times in (1, 4):
        one = loader(mbot.OTCoupling(), None, data, sources_per_target=times)
        assert one.batches.settings()["sources_per_target"] == times
        batches = list(one)
        assert sorted(torch.cat([b.index for b in batches]).tolist()) == list(range(240))
        costs.append(sum(float((b.x0 - b.x1).square().sum()) for b in batches))
    assert costs[1] < 0.9 * costs[0]
    one = loader(mbot.NearestNoiseCoupling(2), None, sources_per_target=6)
    assert one.batches.times == 6
    with pytest.warns(UserWarning, match="IndependentCoupling ignores"):  # it pairs any of them with any
        loader(mbot.IndependentCoupling(), source_sampling="matched", sources_per_target=2)
    for bad, says in ((0, "sources_per_target must"), (2, "SemidiscreteCoupling.* chooses targets")):
        with pytest.raises(ValueError, match=says):
            loader(mbot.SemidiscreteCoupling(steps=1), None, sources_per_target=bad)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"source_sampling": "both"}, ValueError, "source_sampling must be one of"),
        ({"source_sampling": "matched", "source": None}, ValueError, "give source"),
        ({"source_sampling": "matched", "source": lambda n, g: None}, ValueError, "give source"),
        ({"source_sampling": "matched", "source": SOURCE.tensors[0]}, ValueError, "or give groups"),
        ({"source_sampling": "matched", "data": TensorDataset(DATA.tensors[0])}, ValueError, "or give groups"),
        ({"groups": ([0], [0])}, ValueError, "give source_sampling='matched'"),
        ({"source_sampling": "matched", "groups": (torch.zeros(80), torch.zeros(71))}, ValueError, r"groups\[1\] must"),
        ({"source_sampling": "matched", "source": clouds((40, 40), 0.0, 0)}, ValueError, "no sample of the class 2"),
        ({"source_sampling": "matched", "coupling": mbot.SemidiscreteCoupling(steps=1)}, ValueError, "chooses them"),
    ],
)
def test_bad_settings(settings, error, says):
    with pytest.raises(error, match=says):
        loader(**settings)


def test_a_position_belongs_to_its_source():
    state = loader(source_sampling="matched").state_dict()
    with pytest.raises(ValueError, match="source_sampling: saved matched, here independent"):
        loader().load_state_dict(state)
    with pytest.raises(ValueError, match="source_samples: saved 80, here 72"):
        loader(source=DATA, source_sampling="matched").load_state_dict(state)


def test_diagnosis_counts_pairs_across_classes():
    x0, y0 = (t[:72] for t in SOURCE.tensors)
    x1, y1 = x0[torch.randperm(72, generator=torch.Generator().manual_seed(0))] - 7, y0
    y1 = classes(x1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apart = diagnose(mbot.ConditionalOTCoupling(), x0, x1, y1, y0=y0, rounds=2)
        mixed = diagnose(mbot.IndependentCoupling(), x0, x1, {"c": y1}, y0={"c": y0.tolist(), "d": y0}, rounds=2)
    assert apart.crossing == {"y": 0.0}
    assert apart.skew == {}
    assert mixed.crossing["c"] == pytest.approx(float((y0 != y1).float().mean()), abs=1e-6)
    assert "pairs join unequal c: use ConditionalOTCoupling" in mixed.advice
    assert "pairs across c" in str(mixed)
    assert diagnose(mbot.OTCoupling(), x0, x1, y1, rounds=2).crossing == {}
    with pytest.raises(ValueError, match="y0 must hold one condition for each of the 72"):
        diagnose(mbot.OTCoupling(), x0, x1, y1, y0=y0[:5])


def test_the_command_line_trains_from_one_data_set_to_another(tmp_path, capsys):
    for data, name in ((SOURCE, "source"), (DATA, "data")):
        np.savez(tmp_path / f"{name}.npz", x=data.tensors[0].numpy(), y=data.tensors[1].numpy())
    between = ["--data", "arrays", "--data-root", str(tmp_path / "data.npz"),
               "--source-data", "arrays", "--source-root", str(tmp_path / "source.npz")]  # fmt: skip
    run = ["train", *between, "--out", str(tmp_path / "run"), "--steps", "4", "--batch-size", "12",
           "--ot-batch-size", "24", "--evaluate", "30", "--no-progress", "--source-sampling", "matched"]  # fmt: skip
    assert main(run) == 0
    assert main(["sample", "--run", str(tmp_path / "run"), "--num", "30"]) == 0
    with np.load(tmp_path / "run" / "samples" / "sample.npz") as file:
        start = torch.from_numpy(file["x0"])
        assert torch.equal(classes(start, 7.0), torch.from_numpy(file["y"]))
        assert torch.equal(SOURCE.tensors[0][rows_of(start, SOURCE)], start)
    capsys.readouterr()
    assert main(["diagnose", *between, "--coupling", "ot", "--num", "60"]) == 0
    assert "pairs across y" in capsys.readouterr().out
    plain = ["train", "--data", "moons", *between[4:], "--no-source-labels", "--steps", "2", "--evaluate", "0",
             "--no-progress", "--batch-size", "8", "--ot-batch-size", "8", "--out", str(tmp_path / "b")]  # fmt: skip
    assert main(plain) == 0
    assert main(["train", "--data", "digits", *between[4:], "--out", str(tmp_path / "c")]) == 2
    assert "flows start and end in the same space" in capsys.readouterr().err
    assert main(["train", "--source-data", "arrays", "--out", str(tmp_path / "d")]) == 2
    assert "--source-data arrays is read from files: say where they are with --source-root" in capsys.readouterr().err


def test_a_trainer_learns_from_class_to_class():
    torch.manual_seed(0)
    model = flows.models.ResidualMLP(2, num_classes=3, width=16, depth=1)
    run = flows.Trainer(model, loader(source_sampling="matched"), steps=3, progress=False, ema=None)
    assert run.fit().step == 3


def test_groups_and_conditions_that_are_ignored_are_told():
    x = TensorDataset(torch.randn(24, 2))
    settings = {"batch_size": 6, "ot_batch_size": 12}
    for many, told in ((None, False), (3, True)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            CoupledLoader(x, torch.randn(60, 2), None, source_sampling="matched", sources_per_target=many,
                          groups=(torch.arange(60) % 3, torch.arange(24) % 3), **settings)  # fmt: skip
        assert any("source has groups" in str(w.message) for w in caught) == told
    drawn = lambda n, generator: (torch.randn(n, 2, generator=generator), torch.arange(n) % 3)
    one = CoupledLoader(DATA, drawn, mbot.OTCoupling(), **settings)
    with pytest.warns(UserWarning, match="source has conditions") as caught:
        next(iter(one))
    for _ in range(5):
        one.next_batch()
    assert len(caught) == 1


def test_conditions_in_dicts_are_matched():
    class InDicts(Items):
        def __getitem__(self, i):
            x, y = self.data[i]
            return x, {"class": int(y), "half": "ab"[i % 2]}

    one = loader(mbot.IndependentCoupling(), InDicts(SOURCE), InDicts(DATA), source_sampling="matched")
    for _ in range(8):
        batch = one.next_batch()
        assert torch.equal(batch.y0["class"], batch.y["class"])
        assert list(batch.y0["half"]) == list(batch.y["half"])


class Random(Dataset):
    """Samples that are drawn as they are read, as rows or as dicts."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return 12

    def __getitem__(self, i):
        x, y = torch.randn(2) + random.random(), i % 3
        return (x, y) if self.rows else {"x": x, "y": y}


@pytest.mark.parametrize("rows", [True, False])
def test_reading_all_classes_leaves_the_global_generators_alone(rows):
    before = torch.get_rng_state(), random.getstate()
    columns = None if rows else ("x", "y")
    loader(mbot.ConditionalOTCoupling(), Random(rows), Random(rows), 6, 6, source_sampling="matched", columns=columns)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
