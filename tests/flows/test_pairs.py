"""Pairs made by a model: what is in them, what is stored, what a stopped call goes on with, what is refused."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import flows
import mbot
from flows.interrupt import Signals
from flows.pairs import fingerprint
from flows.seeds import SeededNoise


def net(seed=0, classes=0):
    torch.manual_seed(seed)
    return flows.models.ResidualMLP(2, width=8, depth=1, num_classes=classes)


def damage(folder, name, change):
    (folder / name).write_bytes(change((folder / name).read_bytes()))


FIXED = {"shape": (2,), "method": "euler", "steps": 3, "batch_size": 4}


def test_an_end_is_the_models_solution_of_its_start():
    model, y = net(classes=3), torch.arange(10) % 3
    pairs = flows.generate_pairs(model, 10, y=y, **FIXED)
    assert torch.equal(pairs.y, y)
    for row in range(10):
        x0, x1, label = pairs[row]
        solved = flows.integrate(model.eval(), x0[None], y=label[None], method="euler", steps=3).final[0]
        torch.testing.assert_close(solved, x1)


def test_noise_of_a_position_depends_on_the_seed_and_it_alone():
    model = net()
    few = flows.generate_pairs(model, 5, **FIXED)
    many = flows.generate_pairs(model, 11, **{**FIXED, "batch_size": 3})
    assert torch.equal(few.x0, many.x0[:5])
    torch.testing.assert_close(few.x1, many.x1[:5])
    assert torch.equal(few.x0, SeededNoise(0, range(5), (2,)).at(torch.arange(5)))
    other = flows.generate_pairs(model, 5, seed=1, **FIXED)
    assert not bool((few.x0 == other.x0).any())


def test_noise_is_standard_normal():
    x = SeededNoise(3, range(4000), (2, 3)).at(torch.arange(4000)).flatten(1).double()
    assert float(x.mean(0).abs().max()) < 4 / 4000**0.5
    assert float((x.T.cov() - torch.eye(6)).abs().max()) < 5 / 4000**0.5
    assert float((x[1:] * x[:-1]).mean().abs()) < 4 / (6 * 4000) ** 0.5


@pytest.mark.parametrize("method", ["dopri5", "heun"])
@pytest.mark.parametrize("conditional", [False, True])
def test_pairs_on_disk_are_those_in_memory(method, conditional, tmp_path):
    model, settings = net(classes=3 if conditional else 0), {**FIXED, "method": method, "seed": 5}
    settings["y"] = (lambda rows: rows % 3) if conditional else None
    held = flows.generate_pairs(model, 10, **settings)
    stored = flows.generate_pairs(model, 10, out=tmp_path / "pairs", **settings)
    again = flows.PairedDataset.load(tmp_path / "pairs")
    for one in (stored, again):
        assert torch.equal(one.x0, held.x0)
        assert torch.equal(one.x1, held.x1)
        assert one.identity == held.identity
        assert (one.y is None) if not conditional else torch.equal(one.y, torch.arange(10) % 3)
    assert not (tmp_path / "pairs" / "x0.npy").exists()
    assert np.load(tmp_path / "pairs" / "x1.npy").shape == (10, 2)


class Killed(Exception):
    pass


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_killed_call_goes_on_where_it_was(kept, tmp_path):
    model, left = net(), [3 * kept]

    def dies(module, arguments):
        left[0] -= 1
        if left[0] < 0:
            raise Killed

    hook = model.register_forward_pre_hook(dies)
    with pytest.raises(Killed):
        flows.generate_pairs(model, 10, out=tmp_path, **FIXED)
    hook.remove()
    with pytest.raises(ValueError, match=rf"holds {4 * kept} of 10 pairs: make the others by the same call"):
        flows.PairedDataset.load(tmp_path)
    rest = flows.generate_pairs(model, 10, out=tmp_path, **FIXED)
    whole = flows.generate_pairs(model, 10, **FIXED)
    assert torch.equal(rest.x1, whole.x1)
    assert torch.equal(rest.x0, whole.x0)


@pytest.mark.parametrize("kept", [0, 4, 8])
def test_a_half_written_batch_is_written_again(kept, tmp_path):
    """With an adaptive solver, whose step sizes are those of the batch."""
    model, settings = net(), {**FIXED, "method": "dopri5", "out": tmp_path}
    whole = flows.generate_pairs(model, 10, **settings).x1.clone()
    damage(tmp_path, "pairs.json", lambda b: b.replace(b'"done": 10', b'"done": %d' % kept))
    damage(tmp_path, "x1.npy", lambda b: b[: len(b) - (10 - kept) * 8] + b"x" * 12)
    assert torch.equal(flows.generate_pairs(model, 10, **settings).x1, whole)


def test_a_signal_keeps_the_finished_batches(tmp_path, monkeypatch):
    model = net()
    monkeypatch.setattr(Signals, "__enter__", lambda self: self._note(15, None) or self)
    with pytest.raises(flows.Interrupted, match="4 of 10 pairs are kept"):
        flows.generate_pairs(model, 10, out=tmp_path, **FIXED)
    monkeypatch.undo()
    assert torch.equal(
        flows.generate_pairs(model, 10, out=tmp_path, **FIXED).x1, flows.generate_pairs(model, 10, **FIXED).x1
    )


OTHER = [
    {"n": 11}, {"seed": 1}, {"method": "heun"}, {"steps": 4}, {"batch_size": 5}, {"shape": (2, 1)}, {"model": net(1)},
    {"y": 3, "model": net(0, 4)}, {"x0": torch.ones(10, 2)}, {"model": net().double()},
    {"model": nn.Module()},
]  # fmt: skip


@pytest.mark.parametrize("change", OTHER, ids=[next(iter(change)) + str(i) for i, change in enumerate(OTHER)])
def test_a_folder_of_other_settings_is_refused(change, tmp_path):
    settings = {"model": net(), "n": 10, "out": tmp_path, **FIXED}
    before = flows.generate_pairs(**settings).x1.clone()
    with pytest.raises(ValueError, match=r"holds pairs of other settings; they differ in .*Give another folder"):
        flows.generate_pairs(**{**settings, **change})
    assert torch.equal(flows.PairedDataset.load(tmp_path).x1, before)


def test_start_points_of_another_kind_are_stored(tmp_path):
    start = torch.rand(10, 2, dtype=torch.float64)
    pairs = flows.generate_pairs(net(), 10, x0=start, out=tmp_path, method="euler", steps=2)
    assert torch.equal(pairs.x0, start.float())
    assert pairs.x0.dtype == pairs.x1.dtype == torch.float32
    assert pairs.shape == (2,)


@pytest.mark.parametrize("wrap", [False, True])
def test_modes_of_modules_are_put_back(wrap):
    model = nn.Module()
    model.body, model.drop = net(classes=2), nn.Dropout(0.5)
    model.forward = lambda t, x, y: model.drop(model.body(t, x, y))
    model.body.eval()
    field = flows.GuidedModel(model, 2.0) if wrap else model
    a, b = (flows.generate_pairs(field, 6, y=1, **FIXED) for _ in range(2))
    assert torch.equal(a.x1, b.x1)  # no dropout
    assert (model.training, model.body.training, model.drop.training) == (True, False, True)
    assert not a.x1.requires_grad

    def fails(t, x, y):
        raise KeyError

    model.forward = fails
    with pytest.raises(KeyError):
        flows.generate_pairs(field, 6, y=1, **FIXED)
    assert model.drop.training


@pytest.mark.parametrize(
    ("dtype", "result"),
    [(torch.float32, torch.float32), (torch.float64, torch.float64), (torch.bfloat16, torch.float32)],
)
def test_dtypes(dtype, result, tmp_path):
    pairs = flows.generate_pairs(net().to(dtype), 5, out=tmp_path, **FIXED)
    assert pairs.x0.dtype == pairs.x1.dtype == result
    torch.testing.assert_close(pairs.x0.float(), SeededNoise(0, range(5), (2,)).at(torch.arange(5)))


@pytest.mark.parametrize(
    ("y", "stored"),
    [
        (2, [2] * 4),
        (torch.tensor(2), [2] * 4),
        (torch.tensor([[0.5, 1.0]]), [[0.5, 1.0]] * 4),
        (np.arange(4), [0, 1, 2, 3]),
        (["a", "b", "c", "d"], ["a", "b", "c", "d"]),
        (lambda rows: rows + 1, [1, 2, 3, 4]),
        ({"one": torch.arange(4), "two": ("a", "b", "c", "d")}, {"one": [0, 1, 2, 3], "two": ["a", "b", "c", "d"]}),
    ],
)
def test_kinds_of_conditions(y, stored, tmp_path):
    seen = []

    def model(t, x, y):
        seen.append(y)
        return torch.zeros_like(x)

    def plain(y):
        if isinstance(y, dict):
            return {key: plain(value) for key, value in y.items()}
        return y.tolist() if isinstance(y, torch.Tensor) else list(y)

    pairs = flows.generate_pairs(model, 4, y=y, out=tmp_path, **{**FIXED, "batch_size": 3})
    assert plain(pairs.y) == stored
    first = seen[0]
    assert len(first["one"] if isinstance(first, dict) else first) == 3
    assert plain(pairs[1:3].rows(torch.tensor([1]))[2]) == plain(mbot.conditions.select(pairs.y, slice(2, 3)))


def test_slices():
    pairs = flows.generate_pairs(net(), 10, **FIXED)
    pairs = flows.PairedDataset(pairs.x0, pairs.x1, torch.arange(10), info=pairs.info)
    loaded = flows.PairedDataset(SeededNoise(0, range(10), (2,)), pairs.x1, torch.arange(10), info=pairs.info)
    part = loaded[2:9:2][1:]
    assert len(part) == 3
    assert torch.equal(part.x0, pairs.x0[4:9:2])
    assert torch.equal(part.x1, pairs.x1[4:9:2])
    assert part.y.tolist() == [4, 6, 8]
    assert part[-1][2] == 8
    assert part.identity != loaded.identity != loaded[:9].identity
    assert pairs[1:].identity == loaded[1:].identity
    with pytest.raises(IndexError):
        part[3]


def test_fingerprints_tell_models_apart():
    one, two = net(0), net(1)
    assert fingerprint(one) == fingerprint(net(0)) != fingerprint(two)
    assert len({fingerprint(one), fingerprint(flows.GuidedModel(one, 2)), fingerprint(flows.GuidedModel(one, 3))}) == 3
    with torch.no_grad():
        one.output.bias[0] += 1e-7
    assert fingerprint(one) != fingerprint(net(0))
    compiled = nn.Module()
    compiled._orig_mod = two  # as torch.compile keeps it
    assert fingerprint(compiled) == fingerprint(two)


def test_fingerprints_tell_apart_how_a_model_is_called():
    """The same weights with other time steps, orders or predictions make other pairs."""
    inner, wrap, line = net(), flows.models.wrap, flows.LinearPath()
    models = [
        wrap(inner, "t, x, y"), wrap(inner, "t, x, y", time_scale=1000), wrap(inner, "t, x, y", output=torch.neg),
        wrap(inner, "t, x, y", null_class=3), wrap(torch.sin), wrap(torch.cos), flows.as_velocity(inner, "x1", line),
        flows.as_velocity(inner, "noise", line), flows.as_velocity(inner, "x1", flows.VariancePreservingPath()),
        flows.GuidedModel(inner, 2.0), flows.GuidedModel(inner, 2.0, null=torch.zeros_like),
    ]  # fmt: skip
    found = {fingerprint(model) for model in models}
    assert len(found) == len(models)
    assert fingerprint(wrap(net(), "t, x, y", time_scale=1000)) in found


def test_shape_of_the_model():
    sizes = {"in_channels": 2, "image_size": 4, "channels": 8, "multipliers": (1,), "blocks": 1, "attention": ()}
    for model, shape in ((flows.models.ResidualMLP(3), (3,)), (flows.models.UNet(**sizes), (2, 4, 4))):
        assert flows.generate_pairs(model, 2, **{**FIXED, "shape": None}).shape == shape
    assert flows.generate_pairs(flows.models.ResidualMLP(3), 2, **{**FIXED, "shape": 3}).shape == (3,)


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"n": 0}, ValueError, "n must be at least 1; got 0"),
        ({"n": 2.5}, TypeError, "n must be"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"y": torch.arange(9)}, ValueError, "one condition for each of the 10 samples of the n=10 pairs; got 9"),
        ({"y": lambda rows: rows[:3]}, ValueError, "one condition for each of the 10 samples of .*; got 3"),
        ({"y": "cat"}, TypeError, "y must be a tensor, array, sequence"),
        ({"shape": None}, ValueError, r"function does not tell the shape of a sample \(sample_shape\): give shape"),
        ({"shape": ()}, ValueError, "at least one size"),
        ({"shape": 2.0}, TypeError, "shape must be an int; got 2.0"),
        ({"y": lambda rows: None}, TypeError, "y must return a condition for each of its positions"),
        ({"model": 3}, TypeError, r"model must be called as model\(t, x, y\); got int"),
        ({"model": lambda t, x, y: x.numpy()}, TypeError, "must return a tensor of velocities; got ndarray"),
        ({"model": net(), "shape": (3,)}, ValueError, r"x must have shape \(B, d…\) of 2 features; got \(4, 3\)"),
        ({"shape": (2, 0)}, ValueError, "a size in shape must be at least 1"),
        ({"x0": torch.ones(9, 2)}, ValueError, r"x0 must have shape \(n, 2\) with n=10; got \(9, 2\)"),
        ({"x0": torch.ones(10, 3)}, ValueError, r"x0 must have shape \(n, 2\) with n=10; got \(10, 3\)"),
        ({"x0": torch.ones(10, 2, dtype=torch.int64)}, TypeError, "x0 must"),
        ({"x0": torch.full((10, 2), torch.nan)}, ValueError, "x0 .*finite"),
        ({"steps": None}, ValueError, "takes fixed steps: give steps"),
        ({"method": "newton"}, ValueError, "method must be"),
        ({"model": lambda t, x, y: x[:, :1]}, ValueError, r"must return velocities of shape \(4, 2\); got \(4, 1\)"),
        ({"model": lambda t, x, y: x / 0}, flows.IntegrationError, "not finite"),
    ],
)
def test_bad_input(change, kind, says):
    def still(t, x, y):
        return torch.zeros_like(x)

    with pytest.raises(kind, match=says):
        flows.generate_pairs(**{"model": still, "n": 10, **FIXED, **change})


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        ((torch.zeros(3, 2), torch.zeros(4, 2)), ValueError, r"the same shape; got \(3, 2\) and \(4, 2\)"),
        ((torch.zeros(4, 3), torch.zeros(4, 2)), ValueError, r"the same shape; got \(4, 3\) and \(4, 2\)"),
        ((torch.zeros(0, 2), torch.zeros(0, 2)), ValueError, "n >= 1"),
        ((torch.zeros(4), torch.zeros(4)), ValueError, r"\(n, d…\)"),
        ((torch.zeros(4, 2), torch.zeros(4, 2).long()), TypeError, "x1 must"),
        ((torch.zeros(4, 2), torch.zeros(4, 2), [1, 2, 3]), ValueError, "each of the 4 samples of x1; got 3"),
        ((SeededNoise(0, range(4), (3,)), torch.zeros(4, 2)), ValueError, "the same shape"),
        (
            (torch.zeros(4, 2).double(), torch.zeros(4, 2)),
            TypeError,
            "the same dtype; got torch.float64 and torch.float32",
        ),
        ((SeededNoise(0, range(4), (2,), torch.float64), torch.zeros(4, 2)), TypeError, "the same dtype"),
    ],
)
def test_pairs_that_do_not_fit(arguments, kind, says):
    with pytest.raises(kind, match=says):
        flows.PairedDataset(*arguments)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("pairs.json", lambda b: b[:30], "does not describe pairs of this library"),
        ("pairs.json", lambda b: b.replace(b'"version": 1', b'"version": 2'), "version 2"),
        ("pairs.json", lambda b: b.replace(b"flows-pairs", b"other"), "format 'other'"),
        ("pairs.json", lambda b: b"[1]", "does not describe"),
        ("pairs.json", lambda b: b.replace(b'"seed"', b'"sed"'), "does not describe .*: settings without seed"),
        ("pairs.json", lambda b: b.replace(b'"noise": [\n  ', b'"noise": [\n  9, '), "comes out otherwise here"),
        ("x1.npy", lambda b: b[:-4], "are damaged"),
        ("x1.npy", lambda b: b"x" + b, "are damaged"),
        ("y.pt", lambda b: b[:40], "are damaged"),
    ],
)
def test_damaged_folders(name, change, says, tmp_path):
    flows.generate_pairs(net(classes=3), 10, y=1, out=tmp_path, **FIXED)
    damage(tmp_path, name, change)
    with pytest.raises(ValueError, match=says):
        flows.PairedDataset.load(tmp_path)
    with pytest.raises(ValueError, match="holds no pairs"):
        flows.PairedDataset.load(tmp_path / "elsewhere")


def test_a_truncated_folder_is_not_gone_on_with(tmp_path):
    settings = {"model": net(), "n": 10, "out": tmp_path, **FIXED}
    flows.generate_pairs(**settings)
    damage(tmp_path, "pairs.json", lambda b: b.replace(b'"done": 10', b'"done": 8'))
    damage(tmp_path, "x1.npy", lambda b: b[: -4 * 8])
    with pytest.raises(ValueError, match=r"x1\.npy is truncated"):
        flows.generate_pairs(**settings)


@pytest.mark.parametrize("name", ["x0.npy", "x1.npy", "y.pt"])
def test_a_folder_that_lost_a_file_is_not_gone_on_with(name, tmp_path):
    settings = {"model": net(classes=3), "n": 10, "y": 1, "x0": torch.randn(10, 2), "out": tmp_path, **FIXED}
    flows.generate_pairs(**settings)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=rf"are damaged: there is no {name}\. Make them anew"):
        flows.generate_pairs(**settings)


@pytest.mark.parametrize("kind", ["dict", "Series", "DataFrame"])
def test_a_pair_has_its_condition_whatever_holds_them(kind):
    y = {"a": torch.arange(4), "b": list("wxyz")}
    if kind != "dict":
        y = getattr(pytest.importorskip("pandas"), kind)([5, 6, 7, 8], index=[9, 8, 7, 6])
    got = flows.PairedDataset(torch.zeros(4, 2), torch.zeros(4, 2), y)[2][2]
    if kind == "dict":
        assert got == {"a": torch.tensor(2), "b": "y"}
    else:
        assert int(got if kind == "Series" else got.iloc[0]) == 7


def test_the_identity_sees_what_differs():
    """Pairs of a user's own by all their numbers, made ones by their settings and some rows."""
    x0, x1 = torch.randn(8, 2), torch.randn(8, 2)

    def identity(x0=x0, x1=x1, y=None, **info):
        return flows.PairedDataset(x0, x1, y, info=info).identity

    changed = x1.clone()
    changed[5, 1] += 1e-6
    rows = [torch.full((2000,), 1.0 + k) for k in range(8)]
    near = [*rows[:-1], rows[-1] + 1e-4]  # equal in torch's abbreviated text
    all_of_them = [identity(), identity(x1=changed), identity(x0=x1), identity(by="me"), identity(x1=changed, by="me"),
                   identity(y=torch.arange(8)), identity(y=rows), identity(y=near), identity(teacher="f"),
                   identity(x1=changed, teacher="f"), identity(y=torch.arange(8), teacher="f")]  # fmt: skip
    assert len(set(all_of_them)) == len(all_of_them)
    assert identity(by="me") == identity(by="me")


def test_the_identity_sees_every_entry_of_arrays_and_tables():
    """NumPy and pandas abbreviate the text of what is long."""
    pd = pytest.importorskip("pandas")
    x = torch.zeros(3000, 2)
    one = np.zeros(3000)
    other = one.copy()
    other[1500] = 1e-12
    words = np.array(["a"] * 3000, object), np.array(["a"] * 1500 + ["b"] + ["a"] * 1499, object)
    kinds = [(one, other), (pd.Series(one), pd.Series(other)), (pd.DataFrame({"c": one}), pd.DataFrame({"c": other})),
             (words[0], words[1]), ({"y": one}, {"y": other})]  # fmt: skip
    for first, second in kinds:
        assert flows.PairedDataset(x, x, first).identity != flows.PairedDataset(x, x, second).identity
        assert flows.PairedDataset(x, x, first).identity == flows.PairedDataset(x, x, first).identity


def test_pairs_keep_what_they_were_made_from(tmp_path):
    """A buffer that is drawn into again must not change the pairs."""
    for k, y in enumerate((torch.arange(6), np.arange(6), {"a": torch.arange(6.0)})):
        for out in (None, tmp_path / str(k)):
            x0, labels = torch.randn(6, 2), copy.deepcopy(y)
            ones = lambda t, x, y: torch.ones_like(x)
            pairs = flows.generate_pairs(ones, 6, x0=x0, y=labels, method="euler", steps=1, out=out)
            x0.fill_(100)
            given = labels["a"] if isinstance(labels, dict) else labels
            given[:] = 0
            kept = pairs.y["a"] if isinstance(labels, dict) else pairs.y
            torch.testing.assert_close(pairs.x1, pairs.x0 + 1)
            assert kept.tolist() == list(range(6))


# Served by a loader


def made(n=20):
    g = torch.Generator().manual_seed(0)
    return flows.PairedDataset(torch.randn(n, 2, generator=g), torch.randn(n, 2, generator=g), torch.arange(n) % 3)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_loader_serves_pairs_as_they_are(workers, on_disk, tmp_path):
    pairs = made()
    if on_disk:
        pairs = flows.generate_pairs(net(classes=3), 20, y=torch.arange(20) % 3, out=tmp_path, **FIXED)
    loader = flows.CoupledLoader(pairs, batch_size=4, ot_batch_size=8, num_workers=workers, drop_last=False)
    orders = []
    for _ in range(2):
        batches = list(loader)
        index = torch.cat([b.index for b in batches])
        assert torch.equal(index.sort().values, torch.arange(20))
        orders.append(index.tolist())
        assert torch.equal(torch.cat([b.x0 for b in batches]), pairs.x0[index])
        assert torch.equal(torch.cat([b.x1 for b in batches]), pairs.x1[index])
        assert torch.equal(torch.cat([b.y for b in batches]), pairs.y[index])
        assert all(b.weight is None and b.y0 is None for b in batches)
    assert orders[0] != orders[1] != list(range(20))
    loader.close()


@pytest.mark.parametrize("stop", [0, 3, 5, 8])
def test_a_loader_of_pairs_goes_on_exactly(stop):
    loader, rest = (flows.CoupledLoader(made(), batch_size=4, seed=3) for _ in range(2))
    for _ in range(stop):
        loader.next_batch()
    rest.load_state_dict(loader.state_dict())
    for _ in range(7):
        a, b = loader.next_batch(), rest.next_batch()
        assert torch.equal(a.x0, b.x0)
        assert torch.equal(a.x1, b.x1)
    other = flows.CoupledLoader(flows.PairedDataset(made().x0, made().x1 + 1), batch_size=4, seed=3)
    with pytest.raises(ValueError, match="differ in pairs: saved"):
        other.load_state_dict(loader.state_dict())


def test_states_of_loaders_from_before_there_were_pairs_are_read():
    loader = flows.CoupledLoader(TensorDataset(torch.randn(8, 2)), batch_size=4)
    state = loader.state_dict()
    for new in ("pairs", "annealing"):
        del state["settings"][new]
    loader.load_state_dict(state)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"coupling": mbot.OTCoupling()}, r"pairs are served as they are, .*; got OTCoupling"),
        ({"coupling": mbot.WeightedCoupling(1.0)}, "pairs are served as they are"),
        ({"source": torch.randn(20, 2)}, "leave source and collate out"),
        ({"collate": list}, "leave source and collate out"),
        ({"sources_per_target": 2}, "a pair has one start"),
        ({"source_sampling": "matched"}, "draws from a data set or tensor of source samples"),
        ({"groups": (torch.zeros(20), torch.zeros(20))}, "give source_sampling='matched'"),
    ],
)
@pytest.mark.parametrize("annealed", [False, True])
def test_what_does_not_go_with_pairs(settings, says, annealed):
    pairs = flows.AnnealingReflow(made(), 5) if annealed else made()
    with pytest.raises(ValueError, match=says):
        flows.CoupledLoader(pairs, batch_size=4, **settings)


def test_fewer_pairs_than_a_batch_are_told():
    with pytest.raises(ValueError, match="20 pairs are fewer than a batch of 32: lower the batch size, or make more"):
        flows.CoupledLoader(made(), batch_size=32)
    assert len(next(iter(flows.CoupledLoader(made(), batch_size=32, drop_last=False)))) == 20


def test_a_path_with_a_coupling_of_its_own_does_not_go_with_pairs():
    loader = flows.CoupledLoader(made(), batch_size=4)
    with pytest.raises(ValueError, match="pairs are served as they are"):
        flows.Trainer(net(classes=3), loader, steps=1, path=flows.SchrodingerBridgePath(), progress=False)
    flows.CoupledLoader(made(), None, mbot.IndependentCoupling(), batch_size=4)
