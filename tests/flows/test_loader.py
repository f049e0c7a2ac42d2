"""CoupledLoader: what it serves, that nobody can tell who computed it, and that it goes on where it stopped."""

import copy
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

import flows
import mbot
from flows import CoupledLoader
from flows.datasets import ImageData

N = 60
ROOT = Path(__file__).parents[2]


def labelled(n=N, d=2):
    g = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(n, d, generator=g), torch.arange(n) % 3)


def loader(dataset=None, coupling=None, batch_size=4, ot_batch_size=12, **kwargs):
    dataset = labelled() if dataset is None else dataset
    return CoupledLoader(
        dataset, kwargs.pop("source", None), coupling or mbot.OTCoupling(), batch_size, ot_batch_size, **kwargs
    )


def content(batch):
    return [t for t in (batch.x0, batch.x1, batch.y, batch.weight, batch.index) if t is not None]


def same(a, b):
    return all(torch.equal(s, t) for s, t in zip(content(a), content(b), strict=True))


class Items(Dataset):
    """A map-style data set whose items are drawn from the global generators, as random transforms do."""

    def __init__(self, n=24):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        noise = torch.rand(1) + random.random() + np.random.rand()
        return torch.full((3,), float(i)) + noise, {"label": i % 2, "name": f"n{i}"}


def test_a_script_that_ends_with_a_loader_says_nothing():
    code = """if True:
        import queue, torch, flows
        loader = flows.CoupledLoader(torch.utils.data.TensorDataset(torch.zeros(64, 2)), batch_size=4)
        batch = loader.next_batch()
        queue.kept = loader  # until this module is taken down, which the thread pool needs
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr == ""


def test_an_epoch_serves_every_sample_once_in_batches_of_one_size():
    batches = list(loader())
    assert [len(b) for b in batches] == [4] * 15
    assert sorted(torch.cat([b.index for b in batches]).tolist()) == list(range(N))
    data = labelled()
    for b in batches:
        assert torch.equal(b.x1, data.tensors[0][b.index])
        assert torch.equal(b.y, data.tensors[1][b.index])
        assert b.x0.shape == b.x1.shape


def test_an_ot_batch_is_one_coupling_cut_into_training_batches():
    """The three training batches together are an optimal matching of their own noise and data."""
    batches = list(loader())[:3]
    x0, x1 = torch.cat([b.x0 for b in batches]), torch.cat([b.x1 for b in batches])
    again = mbot.OTCoupling()(x0, x1)
    assert torch.equal(again.source, torch.arange(12))
    assert batches[0].info is batches[1].info


def test_epochs_differ_and_a_second_loader_repeats_them():
    a, b = loader(seed=5), loader(seed=5)
    first, second = list(a), list(a)
    assert a.epoch == 2
    assert not torch.equal(first[0].index, second[0].index)
    assert all(same(p, q) for p, q in zip(first + second, list(b) + list(b), strict=True))
    assert not torch.equal(next(iter(loader(seed=6))).index, first[0].index)


@pytest.mark.parametrize(
    "coupling", [mbot.OTCoupling(), mbot.ConditionalOTCoupling(), mbot.WeightedCoupling(reg=1.0)], ids=repr
)
@pytest.mark.parametrize("settings", [{"num_workers": 1}, {"num_workers": 2, "prefetch": 1}, {"prefetch": 5}], ids=repr)
def test_nobody_can_tell_who_computed_a_batch(coupling, settings):
    torch.manual_seed(3)
    expected = list(loader(coupling=coupling))
    torch.manual_seed(4)
    got = list(loader(coupling=coupling, **settings))
    assert all(same(p, q) for p, q in zip(expected, got, strict=True))


@pytest.mark.parametrize("workers", [1, 2])
def test_random_transforms_do_not_depend_on_workers_nor_touch_the_callers_generators(workers):
    expected = list(loader(Items(), coupling=mbot.IndependentCoupling()))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    got = list(loader(Items(), coupling=mbot.IndependentCoupling(), num_workers=workers))
    assert all(torch.equal(p.x1, q.x1) for p, q in zip(expected, got, strict=True))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()
    list(loader(Items(), coupling=mbot.IndependentCoupling()))
    assert torch.equal(before[0], torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 3, 14, 15, 20])
def test_a_saved_position_goes_on_exactly(stop, workers):
    straight = loader()
    expected = [straight.next_batch() for _ in range(31)]
    first = loader(num_workers=workers)
    for _ in range(stop):
        first.next_batch()
    state = first.state_dict()
    first.close()
    second = loader(num_workers=2 - workers)
    second.load_state_dict(state)
    assert all(same(second.next_batch(), q) for q in expected[stop:])


def test_iterating_after_a_break_serves_the_rest_of_the_epoch():
    a = loader()
    seen = [b.index for _, b in zip(range(5), a, strict=False)]
    rest = [b.index for b in a]
    assert sorted(torch.cat(seen + rest).tolist()) == list(range(N))
    a.set_epoch(0)
    assert torch.equal(next(iter(a)).index, seen[0])


def test_a_state_of_other_settings_is_refused():
    state = loader().state_dict()
    with pytest.raises(ValueError, match=r"batch_size: saved 4, here 6.*coupling: saved OTCoupling"):
        loader(batch_size=6, coupling=mbot.IndependentCoupling()).load_state_dict(state)


def test_conditions_of_several_kinds_travel():
    served = list(loader(Items(), coupling=mbot.IndependentCoupling(), batch_size=6, ot_batch_size=12))
    for batch in served:
        assert [int(n[1:]) for n in batch.y["name"]] == batch.index.tolist()
        assert batch.y["label"].tolist() == [i % 2 for i in batch.index.tolist()]


def test_several_conditions_reach_a_coupling_that_looks_at_them():
    coupling = mbot.ConditionalOTCoupling({"label": "discrete"})
    for batch in loader(Items(), coupling=coupling, batch_size=6, ot_batch_size=12):
        assert [int(n[1:]) % 2 for n in batch.y["name"]] == batch.y["label"].tolist()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fitted_semidiscrete_coupling_pairs_with_the_whole_data_set(workers):
    data = labelled()
    x, y = data.tensors
    coupling = mbot.SemidiscreteCoupling(steps=200, conditional=True, tol=1.0).fit(x, y)
    one = loader(data, coupling=coupling, num_workers=workers)
    batches = [one.next_batch() for _ in range(40)]
    for b in batches:
        assert torch.equal(b.x1, x[b.index])
        assert torch.equal(b.y, y[b.index])
    pairs = coupling(torch.cat([b.x0 for b in batches[:3]]), x, y0=torch.cat([b.y for b in batches[:3]]), y1=y)
    assert torch.equal(pairs.target, torch.cat([b.index for b in batches[:3]]))
    again = loader(data, coupling=coupling)
    again.load_state_dict({**one.state_dict(), "batch": 0, "epoch": 0})
    assert all(same(again.next_batch(), b) for b in batches)
    for other in (labelled(59), TensorDataset(x.flip(0), y), TensorDataset(x, torch.arange(60) // 20)):
        with pytest.raises(ValueError, match="must be the data set that the coupling was fitted to, 60 points"):
            next(iter(loader(other, coupling=coupling)))


class Jittered(TensorDataset):
    """Random transforms on top of a data set that the loader would otherwise index as a whole."""

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + torch.rand(1) + random.random() + np.random.rand(), y


class JitteredImages(ImageData):
    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + torch.rand(1) + random.random(), y


class Wrapped:
    """Forwards what it lacks, the batched reading of the data set inside included."""

    def __init__(self, inside):
        self.inside = inside

    def __getattr__(self, name):
        if name == "inside":
            raise AttributeError(name)
        return getattr(self.inside, name)

    def __len__(self):
        return len(self.inside)

    def __getitem__(self, i):
        x, y = self.inside[i]
        return x + torch.rand(1), y


def still(n=24):
    return torch.zeros(n, 2), torch.arange(n)


TRANSFORMED = {
    "tensors": lambda: Jittered(*still()),
    "images": lambda: JitteredImages(torch.zeros(24, 1, 2, 2, dtype=torch.uint8), torch.arange(24)),
    "subset": lambda: Subset(Jittered(*still()), range(24)),
    "wrapper": lambda: Wrapped(TensorDataset(*still())),
    "wrapped subset": lambda: Wrapped(Subset(TensorDataset(*still()), range(24))),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_a_random_transform_is_drawn_for_each_sample_whoever_fetches_it(name):
    settings = {"coupling": mbot.IndependentCoupling(), "batch_size": 12}
    torch.manual_seed(0)
    expected = list(loader(TRANSFORMED[name](), **settings))
    assert len(torch.cat([b.x1 for b in expected]).flatten(1)[:, 0].unique()) == 24
    torch.manual_seed(1)
    got = list(loader(TRANSFORMED[name](), num_workers=2, **settings))
    assert all(same(p, q) for p, q in zip(expected, got, strict=True))


def test_an_attribute_called_rows_is_the_data_set_s_own():
    class Table(Items):
        rows = 3

    assert len(list(loader(Table(), coupling=mbot.IndependentCoupling()))) == 6
    images = ImageData(torch.randint(0, 256, (24, 1, 2, 2), dtype=torch.uint8), torch.arange(24))
    for batch in loader(images):
        assert torch.equal(batch.x1, images.rows(batch.index)[0])


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ([(i, i + 1) for i in range(12)], lambda i: torch.stack((i, i + 1), 1)),
        ([[float(i), 0.5] for i in range(12)], lambda i: torch.stack((i.float(), torch.full((len(i),), 0.5)), 1)),
        ([i if i % 3 else None for i in range(12)], lambda i: [v if v % 3 else None for v in i.tolist()]),
        ([{"a": (i, i), "b": None} for i in range(12)], lambda i: {"a": torch.stack((i, i), 1), "b": [None] * len(i)}),
        ([np.int8(i) for i in range(12)], lambda i: i.to(torch.int8)),
        ([f"n{i}" for i in range(12)], lambda i: [f"n{v}" for v in i.tolist()]),
    ],
    ids=["tuples", "lists", "some missing", "dict", "int8", "strings"],
)
def test_every_kind_of_condition_follows_its_sample(conditions, expected):
    data = [(torch.tensor([float(i)]), y) for i, y in enumerate(conditions)]
    for batch in loader(data, mbot.IndependentCoupling(), 4, 12):
        wanted = expected(batch.index)
        if isinstance(wanted, list):
            assert batch.y == wanted
        else:
            torch.testing.assert_close(batch.y, wanted)


def test_missing_labels_reach_a_coupling_that_takes_them():
    data = [(torch.randn(2), None if i < 4 else f"class {i % 2}") for i in range(12)]
    batch = next(iter(loader(data, mbot.ConditionalOTCoupling(allow_dropped=True))))
    assert batch.info["dropped"] == 4
    with pytest.raises(ValueError, match="4 are None or NaN"):
        next(iter(loader(data, mbot.ConditionalOTCoupling())))


@pytest.mark.parametrize("ragged", [lambda i: torch.ones(1 + i % 2), lambda i: [1.0] * (1 + i % 2)])
def test_ragged_conditions_are_told(ragged):
    data = [(torch.zeros(2), ragged(i)) for i in range(12)]
    with pytest.raises(ValueError, match="the data set's conditions"):
        next(iter(loader(data)))


@pytest.mark.parametrize(
    "source",
    [
        torch.zeros(24, 2, dtype=torch.uint8), TensorDataset(torch.zeros(24, 2, dtype=torch.int64)),
        lambda n, g: torch.zeros(n, 2, dtype=torch.bool), [torch.zeros(2, dtype=torch.uint8)] * 24,
    ],
)  # fmt: skip
def test_source_samples_must_be_floating_point(source):
    with pytest.raises(TypeError, match="source samples must be floating point; got torch"):
        next(iter(loader(source=source)))


def test_the_last_batch_can_be_kept():
    batches = list(loader(labelled(31), drop_last=False))
    assert [len(b) for b in batches] == [4] * 6 + [4, 3]
    assert sorted(torch.cat([b.index for b in batches]).tolist()) == list(range(31))
    assert len(loader(labelled(31), drop_last=False)) == 8
    assert len(loader(labelled(31))) == 6
    small = loader(labelled(5), drop_last=False)
    state = small.state_dict()
    assert [len(b) for b in small] == [4, 1]
    small.load_state_dict(state)
    assert [len(b) for b in small] == [4, 1]


@pytest.mark.parametrize(
    "source", [torch.zeros(100, 2), torch.zeros(7, 2), TensorDataset(torch.zeros(9, 2)), lambda n, g: torch.zeros(n, 2)]
)
def test_noise_comes_from_where_it_is_told(source):
    assert all(bool((b.x0 == 0).all()) for b in loader(source=source))


def test_source_samples_are_not_repeated_while_there_are_enough():
    pool = torch.arange(24.0).reshape(12, 2)
    batches = list(loader(source=pool))[:3]
    assert len(torch.cat([b.x0 for b in batches]).unique(dim=0)) == 12


def test_images_arrays_and_dtype():
    images = [(np.full((1, 4, 4), i, dtype=np.float32), i) for i in range(12)]
    batch = next(iter(loader(images)))
    assert batch.x0.shape == (4, 1, 4, 4)
    assert batch.y.dtype == torch.int64
    doubles = TensorDataset(torch.zeros(12, 2, dtype=torch.float64))
    assert next(iter(loader(doubles))).x0.dtype == torch.float64


DYING = """
import os, torch, mbot
from flows import CoupledLoader, WorkerDied
class Dies(torch.utils.data.Dataset):
    def __len__(self):
        return 24
    def __getitem__(self, i):
        if i == 15:
            os._exit(3)
        return torch.zeros(2)
loader = CoupledLoader(Dies(), None, mbot.OTCoupling(), 2, 2, num_workers=1, shuffle=False, prefetch=2)
try:
    while True:
        loader.next_batch()
except WorkerDied as error:
    print(error)
    print("at", loader.state_dict()["batch"] <= 7)
"""


def test_a_worker_that_dies_is_explained_and_the_position_kept():
    done = subprocess.run([sys.executable, "-c", DYING], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.startswith("a data worker died (")
    assert "lower num_workers" in done.stdout
    assert done.stdout.endswith("at True\n")


def test_batches_arrive_on_the_device_they_are_wanted_on(device):
    for workers in (0, 1):
        batches = list(loader(device=device, coupling=mbot.WeightedCoupling(reg=1.0), num_workers=workers))
        assert {t.device.type for t in (batches[0].x0, batches[0].x1, batches[0].y, batches[0].weight)} == {device.type}
        assert sorted(torch.cat([b.index for b in batches]).tolist()) == list(range(N))


class Broken(Items):
    def __getitem__(self, i):
        if i == 7:
            raise KeyError("sample 7 is broken")
        return torch.zeros(2)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_the_data_set_reaches_the_caller_and_can_be_retried(workers):
    data = Broken()
    a = loader(data, num_workers=workers, shuffle=False, batch_size=2, ot_batch_size=2, prefetch=1)
    for _ in range(3):
        a.next_batch()
    with pytest.raises(KeyError, match="sample 7 is broken"):
        a.next_batch()
    data.__class__ = Items
    assert a.next_batch().index.tolist() == [6, 7]


def test_couplings_that_keep_fewer_pairs_make_smaller_batches():
    class Half(mbot.IndependentCoupling):
        def _pair(self, x0, x1, y0, y1, generator):
            kept = torch.arange(0, len(x1), 2)
            return mbot.Pairs(kept, kept)

    assert [len(b) for b in loader(coupling=Half())] == [2, 2, 2] * 5
    assert [len(b) for b in loader(coupling=Half(), ot_batch_size=20)] == [2, 2, 2, 2, 2] * 3
    with pytest.raises(ValueError, match="kept 6 pairs of an OT batch that feeds 12"):
        next(iter(loader(coupling=Half(), batch_size=1)))


def test_an_error_in_the_coupling_reaches_the_caller():
    plain = TensorDataset(torch.randn(12, 2))
    for workers in (0, 1):
        with pytest.raises(ValueError, match="needs y1"):
            list(loader(plain, coupling=mbot.ConditionalOTCoupling(), num_workers=workers))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"ot_batch_size": 10}, ValueError, r"multiple of batch_size=4; got 10 \(nearest: 8 or 12\)"),
        ({"ot_batch_size": 3}, ValueError, r"multiple of batch_size=4; got 3 \(nearest: 4"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"num_workers": -1}, ValueError, "num_workers must be at least 0"),
        ({"ot_batch_size": 64}, ValueError, "60 samples, fewer than one OT batch of 64"),
        ({"coupling": "ot"}, TypeError, "mbot coupling"),
        ({"source": 3}, TypeError, "source must be"),
        ({"dataset": iter([1])}, TypeError, "map-style"),
        ({"coupling_scope": "world"}, ValueError, "coupling_scope must be one of"),
    ],
)
def test_bad_settings(change, error, says):
    with pytest.raises(error, match=says):
        loader(**change)


@pytest.mark.parametrize(
    ("dataset", "source", "error", "says"),
    [
        (TensorDataset(torch.zeros(12, 2, dtype=torch.uint8)), None, TypeError, "floating point; got torch.uint8"),
        (TensorDataset(*[torch.zeros(12, 2)] * 3), None, TypeError, "Pass collate"),
        (labelled(), lambda n, g: torch.zeros(n, 3), ValueError, r"shape \(12, 2\), as the data; got \(12, 3\)"),
        (labelled(), lambda n, g: [1], ValueError, "got list"),
    ],
)
def test_bad_items(dataset, source, error, says):
    with pytest.raises(error, match=says):
        next(iter(loader(dataset, source=source)))


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda loader: pickle.loads(pickle.dumps(loader))])
def test_a_copy_of_a_loader_goes_on_by_itself(clone):
    data = TensorDataset(torch.arange(24.0)[:, None])
    first = CoupledLoader(data, None, mbot.OTCoupling(), 2, 4)
    for _ in range(3):
        first.next_batch()
    second = clone(first)
    for _ in range(14):
        mine, its = first.next_batch(), second.next_batch()
        assert torch.equal(mine.x0, its.x0)
        assert torch.equal(mine.x1, its.x1)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_have_no_history(workers):
    """Latents of an encoder: their graph would be gone after one step, and a worker would wait for ever to send it."""
    encoder = torch.nn.Linear(2, 2)
    latents = encoder(torch.randn(24, 2))
    rows = [(latents[i], latents[i, :1]) for i in range(24)]
    for data, source in (
        (TensorDataset(latents, latents[:, :1]), latents),
        (rows, rows),
        (TensorDataset(latents), lambda n, g: encoder(torch.randn(n, 2, generator=g))),
        (flows.PairedDataset(latents, latents, {"a": latents[:, :1]}), None),
    ):
        batch = CoupledLoader(data, source, batch_size=6, num_workers=workers).next_batch()
        parts = batch.x0, batch.x1, batch.y0, *(batch.y.values() if isinstance(batch.y, dict) else [batch.y])
        assert not any(part.requires_grad for part in parts if part is not None)
    assert encoder.weight.grad is None


def test_what_a_newcomer_gives_for_a_data_set_or_a_source(tmp_path):
    """A string has a length and items; a DataLoader iterates, over batches; a coupling is callable, as sources are."""
    data = labelled()
    for dataset in ("data.csv", tmp_path / "images"):
        with pytest.raises(TypeError, match=r"dataset must hold samples; got the path .*load_arrays or .*ImageFolder"):
            CoupledLoader(dataset, batch_size=4)
    with pytest.raises(TypeError, match=r"got a DataLoader, which serves batches: give its \.dataset"):
        CoupledLoader(torch.utils.data.DataLoader(data, batch_size=4), batch_size=4)
    singles = torch.utils.data.DataLoader(data, batch_size=None)
    assert CoupledLoader(singles, batch_size=4, shuffle_buffer=20).next_batch().x1.shape == (4, 2)
    with pytest.raises(TypeError, match=r"where paths start; got OTCoupling.*: give it as coupling=OTCoupling"):
        CoupledLoader(data, mbot.OTCoupling(), batch_size=4)
    with pytest.raises(TypeError, match=r"source must be None .*; got str"):
        CoupledLoader(data, "noise.npy", batch_size=4)
