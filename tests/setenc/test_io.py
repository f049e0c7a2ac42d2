"""Readers: the same chunks as from memory, fresh at every call, read ahead, and clear about wrong files."""

import threading
import time

import numpy as np
import pytest
import torch
from scipy import sparse

import setenc
from setenc import io


def model(in_dim=4):
    torch.manual_seed(1)
    return setenc.UMBC(torch.nn.Linear(in_dim, 8), setenc.SlotPooling(8, 8, 3), torch.nn.Linear(8, 2)).eval()


def check_a_reader(chunks, expected):
    """A fresh iterator of ``(1, n, …)`` chunks each time, with and without a thread, and the values of ``expected``."""
    assert len(chunks) == len(expected)
    assert chunks.shape == expected.shape
    for prefetch in (0, 1, 3):
        chunks.prefetch = prefetch
        for _ in range(2):
            found = list(chunks())
            assert all(c.shape[0] == 1 and c.dtype == chunks.dtype for c in found)
            assert max(c.shape[1] for c in found) <= chunks.chunk_size
            torch.testing.assert_close(torch.cat(found, 1)[0], torch.as_tensor(expected).to(chunks.dtype))
        first = iter(chunks())
        next(first)
        del first  # given up halfway
    assert threading.active_count() < 5


def check_gradients(chunks, expected):
    enc = model(expected.shape[1])
    whole = torch.as_tensor(expected).float()[None]
    found = []
    for data, mode in ((whole, "full"), (chunks, "full"), (chunks, "exact")):
        enc.zero_grad()
        setenc.encode(enc, data, gradient=mode).sin().sum().backward()
        found.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in enc.parameters()])
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- HDF5 ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def slide(tmp_path):
    """A slide's features in the usual layout, its coordinates, and things that are not bags."""
    h5py = pytest.importorskip("h5py")
    g = np.random.default_rng(0)
    features, coords = g.normal(size=(50, 4)).astype("float32"), g.integers(0, 1000, (50, 2))
    path = tmp_path / "slide.h5"
    with h5py.File(path, "w") as file:
        file["features"], file["coords"], file["group/deep"] = features, coords, features.astype("float16")
        file["flat"], file["short"], file["names"] = features[:, 0], coords[:9], np.array([[b"a"]] * 50)
        file["nothing"] = features[:0]
    return path, features, coords


def test_h5_files(slide):
    path, features, coords = slide
    check_a_reader(io.h5_chunks(path, chunk_size=7), features)
    check_a_reader(io.h5_chunks(str(path), "group/deep", chunk_size=50, dtype=torch.float64), features.astype("f2"))
    both = np.concatenate((features, coords), 1)
    check_a_reader(io.h5_chunks(path, coordinates="coords", chunk_size=np.int64(20)), both.astype("float32"))
    check_a_reader(io.h5_chunks(path, "coords", chunk_size=16), coords)
    check_gradients(io.h5_chunks(path, chunk_size=7), features)
    assert [c.shape for c in io.h5_chunks(path, "nothing")()] == [torch.Size([1, 0, 4])]
    assert "shape=(50, 4)" in repr(io.h5_chunks(path))


def test_wrong_h5_files(slide, tmp_path):
    path, _, _ = slide
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere\.h5"):
        io.h5_chunks(tmp_path / "nowhere.h5")
    for key in ("feature", "group"):
        with pytest.raises(KeyError, match=rf"no data set '{key}'; it has coords, features, flat, group/deep"):
            io.h5_chunks(path, key)
    for key in ("flat", "names"):
        with pytest.raises(ValueError, match=rf"'{key}' in .* must be numbers of shape \(N, d\); got"):
            io.h5_chunks(path, key)
    with pytest.raises(ValueError, match="as many rows; got features: 50, short: 9"):
        io.h5_chunks(path, coordinates="short")
    for options, error in (
        ({"chunk_size": 0}, ValueError),
        ({"chunk_size": True}, TypeError),
        ({"prefetch": -1}, ValueError),
        ({"dtype": "float32"}, TypeError),
    ):
        with pytest.raises(error, match=f"{next(iter(options))} must be"):
            io.h5_chunks(path, **options)


def test_a_missing_package_names_its_extra(monkeypatch, tmp_path):
    import builtins

    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name in ("h5py", "anndata"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"needs h5py: pip install h5py"):
        io.h5_chunks(tmp_path / "x.h5")
    with pytest.raises(ImportError, match=r"needs anndata: pip install anndata"):
        io.AnnDataChunks(tmp_path / "x.h5ad", "y")


# --- arrays --------------------------------------------------------------------------------------------------------


def test_memory_maps(tmp_path):
    array = np.random.default_rng(0).normal(size=(50, 4))
    np.save(tmp_path / "x.npy", array)
    raw = np.memmap(tmp_path / "raw", "float64", "w+", shape=array.shape)
    raw[:] = array
    raw.flush()
    raw = np.memmap(tmp_path / "raw", "float64", "r", shape=array.shape)
    for source in (tmp_path / "x.npy", str(tmp_path / "x.npy"), raw, array, np.asfortranarray(array)):
        check_a_reader(io.memmap_chunks(source, chunk_size=9), array)
    check_gradients(io.memmap_chunks(raw, chunk_size=9), array)
    images = np.random.default_rng(0).integers(0, 255, (10, 3, 5, 5), dtype="uint8")
    check_a_reader(io.memmap_chunks(images, chunk_size=4), images)
    with pytest.raises(ValueError, match=r"a file must be \.npy"):
        io.memmap_chunks(tmp_path / "raw")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        io.memmap_chunks(tmp_path / "none.npy")
    for bad in (array[:, 0], np.array([["a"]]), array.astype(object)):
        with pytest.raises(ValueError, match=r"numbers of shape \(N, …\)"):
            io.memmap_chunks(bad)
    with pytest.raises(TypeError, match="path or a numpy array; got list"):
        io.memmap_chunks([1, 2])


# --- cells ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def cells():
    """Cells of three conditions, some of none, dense and sparse, in any order."""
    anndata = pytest.importorskip("anndata")
    pandas = pytest.importorskip("pandas")
    g = np.random.default_rng(0)
    x = g.poisson(0.5, (60, 4)).astype("float32")
    names = np.array(["drug", "control", "other", None], dtype=object)[g.integers(0, 4, 60)]
    obs = pandas.DataFrame({"condition": pandas.Categorical(names), "dose": g.integers(0, 2, 60)})
    obs.index = [f"cell{i}" for i in range(60)]
    data = anndata.AnnData(X=sparse.csr_matrix(x), obs=obs)
    data.layers["dense"], data.obsm["X_pca"] = x + 1, x[:, :2] * 2
    return data, x, names


@pytest.mark.filterwarnings("ignore")  # of anndata's own
@pytest.mark.parametrize("backed", [False, True])
def test_cells_of_a_condition_are_a_set(cells, backed, tmp_path):
    data, x, names = cells
    if backed:
        data.write_h5ad(tmp_path / "cells.h5ad")
        data = tmp_path / "cells.h5ad"
    sets = io.AnnDataChunks(data, "condition", chunk_size=5)
    assert set(sets) == {"drug", "control", "other"}
    assert len(sets) == 3
    for condition in sets:
        mine = names == condition
        check_a_reader(sets[condition], x[mine])
        check_a_reader(io.AnnDataChunks(data, "condition", layer="dense", chunk_size=5)[condition], x[mine] + 1)
        check_a_reader(io.AnnDataChunks(data, "condition", obsm="X_pca", chunk_size=5)[condition], x[mine][:, :2] * 2)
    check_gradients(sets["drug"], x[names == "drug"])
    assert set(io.AnnDataChunks(data, "dose")) == {0, 1}


@pytest.mark.filterwarnings("ignore")
def test_wrong_cells(cells, tmp_path):
    data, _, _ = cells
    for options, words in (
        ({"by": "batch"}, "no column of obs 'batch'; there are 'condition', 'dose'"),
        ({"by": "dose", "layer": "raw"}, "no layer 'raw'; there are 'dense'"),
        ({"by": "dose", "obsm": "X_umap"}, "no entry of obsm 'X_umap'; there are 'X_pca'"),
    ):
        with pytest.raises(KeyError, match=words):
            io.AnnDataChunks(data, **options)
    with pytest.raises(KeyError, match="no condition of 'condition' 'placebo'; there are"):
        io.AnnDataChunks(data, "condition")["placebo"]
    with pytest.raises(ValueError, match="layer or obsm, not both"):
        io.AnnDataChunks(data, "dose", layer="dense", obsm="X_pca")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        io.AnnDataChunks(tmp_path / "none.h5ad", "dose")
    with pytest.raises(TypeError, match=r"anndata\.AnnData; got dict"):
        io.AnnDataChunks({}, "dose")
    data.X = None
    with pytest.raises(ValueError, match="no X"):
        io.AnnDataChunks(data, "dose")


# --- the thread ----------------------------------------------------------------------------------------------------


def test_the_thread_is_early_by_no_more_than_it_may():
    made, fifth = [], threading.Event()

    def make():
        for i in range(20):
            made.append(i)
            if len(made) == 5:
                fifth.set()
            yield torch.tensor(i)

    items = io._ahead(make, 3)
    assert int(next(items)) == 0
    fifth.wait()
    time.sleep(0.1)  # for a thread that would not stop there
    assert made == [0, 1, 2, 3, 4], "one with the caller, three in the queue, one waiting"
    assert [int(i) for i in items] == list(range(1, 20))


def test_errors_of_the_thread_are_raised_by_the_iterator_and_files_are_closed():
    closed = []

    def make():
        try:
            yield torch.tensor(0)
            raise OSError("the disk is gone")
        finally:
            closed.append(True)

    items = io._ahead(make, 2)
    assert int(next(items)) == 0
    with pytest.raises(OSError, match="the disk is gone"):
        next(items)
    assert closed == [True]

    def endless():
        try:
            while True:
                yield torch.tensor(0)
        finally:
            closed.append(True)

    items = io._ahead(endless, 2)
    next(items)
    items.close()
    assert closed == [True, True]


# --- PyTorch Geometric ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_a_set_encoder_aggregates_graphs():
    pytest.importorskip("torch_geometric", reason="no torch_geometric")
    from torch_geometric.nn import SAGEConv

    from setenc.pyg import SetAggregation

    enc = model(4).double()
    aggregation = SetAggregation(enc)
    x, index = torch.randn(30, 4, dtype=torch.float64), torch.randint(0, 5, (30,))
    index[index == 3] = 2  # a set without elements
    expected = torch.cat([enc(x[index == b][None]) for b in range(6)]).flatten(1)
    torch.testing.assert_close(aggregation(x, index, dim_size=6), expected, rtol=1e-10, atol=1e-12)
    order = index.argsort(stable=True)
    ptr = torch.tensor([int((index < b).sum()) for b in range(7)])
    torch.testing.assert_close(aggregation(x[order], ptr=ptr), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(aggregation(x), enc(x[None]).flatten(1), rtol=1e-10, atol=1e-12)
    layer = SAGEConv(4, 7, aggr=SetAggregation(setenc.SlotPooling(4, 4, 1))).double()
    edges = torch.randint(0, 30, (2, 80))
    out = layer(x, edges)
    assert out.shape == (30, 7)
    out.sum().backward()
    assert float(layer.aggr_module.encoder.pooling.key_value.weight.grad.abs().max()) > 0
    with pytest.raises(ValueError, match=r"shape \(T, d\)"):
        aggregation(x[None], torch.zeros(1, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"setenc\.UMBC or a setenc\.Pooling"):
        SetAggregation(torch.nn.Linear(2, 2))
    assert "SlotPooling" in repr(aggregation)


def test_a_file_that_changes_between_two_passes_is_an_error(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "bag.h5"

    def write(rows):
        with h5py.File(path, "w") as file:
            file["features"] = np.zeros((rows, 3))

    for after in (4, 9):
        write(6)
        chunks = setenc.io.h5_chunks(path, chunk_size=4)
        write(after)
        with pytest.raises(ValueError, match="changed since"):
            list(chunks())
    (tmp_path / "text.h5").write_text("no HDF5")
    with pytest.raises(ValueError, match="no HDF5 file"):
        setenc.io.h5_chunks(tmp_path / "text.h5")
    with pytest.raises(TypeError, match="names of data sets"):
        setenc.io.h5_chunks(path, 3)


@pytest.mark.parametrize("dtype", [">f4", ">f8", ">u2", np.longdouble, np.float16, bool])
def test_numbers_in_any_byte_order_and_width(dtype):
    array = np.arange(6).reshape(3, 2).astype(dtype)
    (chunk,) = setenc.io.memmap_chunks(array)()
    assert torch.equal(chunk[0], torch.from_numpy(array.astype(np.float32)))


def test_an_entry_that_is_a_data_frame_or_has_more_dimensions():
    anndata = pytest.importorskip("anndata")
    pandas = pytest.importorskip("pandas")
    names = [f"cell {i}" for i in range(6)]
    data = anndata.AnnData(np.ones((6, 2)), obs=pandas.DataFrame({"drug": list("aabbba")}, index=names))
    frame = np.arange(18.0).reshape(6, 3)
    data.obsm["frame"] = pandas.DataFrame(frame, index=names, columns=["0", "1", "2"])
    data.obsm["image"] = np.arange(24.0).reshape(6, 2, 2)
    sets = setenc.io.AnnDataChunks(data, "drug", obsm="frame")
    (chunk,) = sets["a"]()
    assert torch.equal(chunk[0], torch.tensor(frame[[0, 1, 5]], dtype=torch.float32))
    images = setenc.io.AnnDataChunks(data, "drug", obsm="image")["b"]
    (chunk,) = images()
    assert images.shape == chunk[0].shape == (3, 2, 2)
    with pytest.raises(KeyError, match="column of obs"):
        setenc.io.AnnDataChunks(data, ["drug"])


def test_an_index_of_sets_covers_every_element():
    pytest.importorskip("torch_geometric", reason="no torch_geometric")
    from setenc.pyg import SetAggregation

    pool = SetAggregation(setenc.SlotPooling(3, 8, 2)).eval()
    x, index = torch.randn(6, 3), torch.tensor([0, 1, 0, 2, 1, 2])
    for wrong in (index[:4], index - 1, index.float(), index[:, None]):
        with pytest.raises(ValueError, match="index must"):
            pool(x, wrong)
    with pytest.raises(ValueError, match="index must lie in"):
        pool(x, index, dim_size=2)
