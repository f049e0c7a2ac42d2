"""Data from files: every format is written here as its specification says and read back."""

import gzip
import io
import pickle
import struct
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

import flows
from flows.datasets import CellSeries, ImageData, ImageFolder, cifar10, digits, load_arrays, mnist, save_grid

RNG = np.random.default_rng(0)


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_mnist(folder, stem="train", n=5, compress=True):
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = RNG.integers(0, 256, (n, 28, 28), np.uint8), RNG.integers(0, 10, n, np.uint8)
    for name, array in ((f"{stem}-images-idx3-ubyte", images), (f"{stem}-labels-idx1-ubyte", labels)):
        content = idx(array)
        (folder / (name + ".gz" * compress)).write_bytes(gzip.compress(content) if compress else content)
    return images, labels


def test_digits_are_the_embedded_ones():
    data = digits()
    x, y = data.rows(torch.arange(1797))
    assert x.shape == (1797, 1, 8, 8)
    assert (float(x.min()), float(x.max())) == (-1, 1)
    assert torch.bincount(y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    loader = flows.CoupledLoader(data, None, None, 100)
    batch = next(iter(loader))
    assert torch.equal(batch.x1, x[batch.index])
    assert torch.equal(batch.y, y[batch.index])


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("place", ["", "mnist", "MNIST/raw"])
def test_mnist_files(place, compress, tmp_path):
    images, labels = write_mnist(tmp_path / place, compress=compress)
    data = mnist(tmp_path)
    assert (data.images[:, 0].numpy() == images).all()
    assert data.labels.tolist() == labels.tolist()
    x, y = data[2]
    torch.testing.assert_close(x[0], torch.from_numpy(images[2]) / 127.5 - 1)
    assert y == labels[2]
    with pytest.raises(FileNotFoundError, match="t10k-images-idx3-ubyte"):
        mnist(tmp_path, train=False)
    with pytest.raises(FileNotFoundError, match="no fashion-mnist"):
        mnist(tmp_path / "nowhere", name="fashion-mnist")


def test_damaged_idx_files_are_refused(tmp_path):
    write_mnist(tmp_path, compress=False)
    path = tmp_path / "train-images-idx3-ubyte"
    whole = path.read_bytes()
    for content in (whole[:100], b"", b"\x00\x00\x0d\x01" + whole[4:], whole + b"x"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged or not an idx file"):
            mnist(tmp_path)


@pytest.mark.parametrize("form", ["python", "binary"])
@pytest.mark.parametrize("packed", [True, False])
def test_cifar_files(form, packed, tmp_path):
    folder = f"cifar-10-batches-{'py' if form == 'python' else 'bin'}"
    images, labels = RNG.integers(0, 256, (10, 3072), np.uint8), RNG.integers(0, 10, 10)
    contents = {}
    for i in range(5):
        rows = slice(2 * i, 2 * i + 2)
        if form == "python":
            batch = {b"data": images[rows], b"labels": labels[rows].tolist(), b"batch_label": b"x"}
            contents[f"data_batch_{i + 1}"] = pickle.dumps(batch, protocol=2)
        else:
            contents[f"data_batch_{i + 1}.bin"] = np.concatenate(
                (labels[rows, None].astype(np.uint8), images[rows]), 1
            ).tobytes()
    if packed:
        with tarfile.open(tmp_path / f"cifar-10-{form}.tar.gz", "w:gz") as tar:
            for name, content in contents.items():
                member = tarfile.TarInfo(f"{folder}/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    else:
        (tmp_path / folder).mkdir()
        for name, content in contents.items():
            (tmp_path / folder / name).write_bytes(content)
    data = cifar10(tmp_path)
    assert (data.images.numpy() == images.reshape(-1, 3, 32, 32)).all()
    assert data.labels.tolist() == labels.tolist()


def test_cifar_refuses_what_is_not_there_or_not_data(tmp_path):
    with pytest.raises(FileNotFoundError, match="no CIFAR-10 under"):
        cifar10(tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for i in range(1, 6):
        (folder / f"data_batch_{i}").write_bytes(pickle.dumps({b"data": print}))
    with pytest.raises(ValueError, match="damaged or of another format"):
        cifar10(tmp_path)


def test_downloading_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ImportError, match="pip install torchvision"):
        cifar10(tmp_path, download=True)
    with pytest.raises(ImportError, match="pip install torchvision"):
        mnist(tmp_path, download=True)


def test_a_random_half_is_mirrored():
    images = torch.zeros(400, 1, 2, 2, dtype=torch.uint8)
    images[..., 0] = 255
    x = ImageData(images, flip=True).rows(torch.arange(400))
    mirrored = x[:, 0, 0, 0] < 0
    assert 150 < int(mirrored.sum()) < 250


def test_a_folder_of_images(tmp_path):
    for name, colour in (("b/1.png", (255, 0, 0)), ("a/2.jpg", (0, 255, 0)), ("a/3.PNG", (0, 0, 255))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 10), colour).save(tmp_path / name, format="PNG")
    (tmp_path / "notes.txt").write_text("not an image")
    data = ImageFolder(tmp_path, 4)
    assert data.classes == ["a", "b"]
    assert [data[i][1] for i in range(3)] == [0, 0, 1]
    torch.testing.assert_close(data[2][0], torch.tensor([1.0, -1.0, -1.0])[:, None, None].expand(3, 4, 4))
    plain = ImageFolder(tmp_path / "a", 4)
    assert plain.classes == []
    assert plain[0].shape == (3, 4, 4)
    with pytest.raises(FileNotFoundError, match="no image in"):
        ImageFolder((tmp_path / "empty").mkdir() or tmp_path / "empty", 4)
    with pytest.raises(FileNotFoundError, match="no folder"):
        ImageFolder(tmp_path / "absent", 4)


def picture(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def test_hidden_files_and_folders_are_no_data(tmp_path):
    grey = np.zeros((4, 4), np.uint8)
    for name in ("a/0.png", "b/0.png", ".ipynb_checkpoints/0.png", ".thumbs/0.png", "b/.1.png", "notes/.2.png"):
        picture(tmp_path / name, grey)
    (tmp_path / "a" / "._0.png").write_bytes(b"a fork of another system")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "._0.png").write_bytes(b"and another")
    (tmp_path / "a" / "folder.png").mkdir()
    data = ImageFolder(tmp_path, 4)
    assert data.classes == ["a", "b"]
    assert [data[i][1] for i in range(len(data))] == [0, 1]
    assert len(ImageFolder(tmp_path / "b", 4)) == 1
    picture(tmp_path / "stray.png", grey)
    with pytest.raises(ValueError, match=r"holds 1 images, such as stray.png, beside folders of classes such as 'a'"):
        ImageFolder(tmp_path, 4)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_of_grey_keep_their_range(tmp_path, suffix):
    ramp = np.linspace(0, 65535, 64).round().reshape(8, 8).astype(np.uint16)
    picture(tmp_path / f"deep.{suffix}", ramp)
    expected = torch.from_numpy(ramp.astype(np.float32)) / 65535 * 2 - 1
    torch.testing.assert_close(ImageFolder(tmp_path, 8)[0], expected.expand(3, 8, 8))
    half = ImageFolder(tmp_path, 4)[0]
    assert half.shape == (3, 4, 4)
    assert float(half.mean()) == pytest.approx(0, abs=0.01)


def test_pixels_of_unknown_range_are_refused(tmp_path):
    picture(tmp_path / "real.tiff", np.ones((4, 4), np.float32))
    with pytest.raises(ValueError, match=r"real.tiff holds F pixels of unknown range"):
        ImageFolder(tmp_path, 4)[0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright_as_exif_says(tmp_path, orientation):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4, :4] = 255  # as stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    x = ImageFolder(tmp_path, 8)[0][0]
    corner = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}[orientation]
    quarters = x.reshape(2, 4, 2, 4).mean((1, 3))
    assert quarters.argmax() == 2 * corner[0] + corner[1]
    assert float(quarters.max()) == 1


def test_arrays(tmp_path):
    points = RNG.normal(size=(6, 3))
    np.save(tmp_path / "a.npy", points)
    assert load_arrays(tmp_path / "a.npy")[1][0].dtype == torch.float32
    np.savez(tmp_path / "b.npz", x_train=points, y=np.arange(6, dtype=np.int16))
    data = load_arrays(tmp_path / "b.npz")
    assert isinstance(data, TensorDataset)
    assert data[3][1].dtype == torch.int64
    assert len(load_arrays(tmp_path / "b.npz", y=None)[0]) == 1
    np.savez(tmp_path / "c.npz", x=RNG.integers(0, 256, (6, 5, 5, 3), np.uint8), y=np.arange(6))
    assert load_arrays(tmp_path / "c.npz")[0][0].shape == (3, 5, 5)
    np.savez(tmp_path / "d.npz", x=RNG.integers(0, 256, (10, 5, 6, 4), np.uint8))
    assert load_arrays(tmp_path / "d.npz")[0][0].shape == (5, 6, 4)  # four channels: no image of five
    np.savez(tmp_path / "v.npz", x=RNG.integers(0, 256, (6, 5, 5), np.uint8), y=points)
    torch.testing.assert_close(load_arrays(tmp_path / "v.npz")[2][1], torch.from_numpy(points[2]).float())
    np.savez(tmp_path / "h.npz", x=points, y=np.ones((6, 2), np.int64))
    np.savez(tmp_path / "d.npz", x=points, y=np.arange(5))
    np.savez(tmp_path / "e.npz", z=points)
    np.save(tmp_path / "f.npy", np.full((3, 2), np.nan))
    np.save(tmp_path / "g.npy", np.array([{}], dtype=object))
    for name, says in (
        ("d.npz", "6 samples and 5"),
        ("e.npz", r"holds the keys \['z'\]"),
        ("f.npy", "finite"),
        ("g.npy", "plain"),
        ("h.npz", r"labels of shape \(N,\)"),
    ):
        with pytest.raises(ValueError, match=says):
            load_arrays(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load_arrays(tmp_path / "none.npy")


def test_tables_of_text(tmp_path):
    def table(text, name="t.csv", **keys):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return load_arrays(tmp_path / name, **keys)

    plain = "a,b,kind\n1,2.5,wolf\n-3e1, 4 ,ant\n5,6,wolf\n"
    data = table(plain, y="kind")
    assert data.tensors[0].tolist() == [[1, 2.5], [-30, 4], [5, 6]]
    assert data.tensors[1].tolist() == [1, 0, 1], "ant, wolf"
    assert table(plain, x="b, a").tensors[0].tolist() == [[2.5, 1], [4, -30], [6, 5]]
    assert table(plain.replace(",", "\t"), "t.tsv", y="kind").tensors[1].tolist() == [1, 0, 1]
    assert table("\ufeff" + plain, y="kind").tensors[0].shape == (3, 2), "a mark of spreadsheets"
    assert table('a,"b, quoted"\r\n1,"2"\r\n').tensors[0].tolist() == [[1, 2]]
    assert table("x,y\n1,2\n3,4\n").tensors[0].tolist() == [[1, 2], [3, 4]], "y is a coordinate unless it is named"
    assert table("x,y\n1,2\n3,4\n", y="y").tensors[1].dtype == torch.int64
    assert table("x,y\n1,2\n3,4.5\n", y="y").tensors[1].tolist() == [2, 4.5]
    assert table("1,2,0\n3,4,1\n", y="2").tensors[1].tolist() == [0, 1], "columns without names have numbers"
    for text, keys, says in (
        (plain, {}, "column 'kind' of .* holds 'wolf', which is no number"),
        (plain, {"y": "sort"}, r"columns \['a', 'b', 'kind'\], not \['sort'\]"),
        (plain, {"x": "a,c"}, r"not \['c'\]"),
        ("a,b\n1,2\n3\n", {}, "2 columns; line 3 of its rows has 1"),
        ("a,a\n1,2\n", {}, "must differ"),
        ("a,b\n", {}, "rows below its names"),
        ("", {}, "empty"),
        ("a,b\n1,\n", {}, "holds '', which is no number, in row 1 of the samples"),
        ("a,b\n1,nan\n", {}, "finite"),
    ):
        with pytest.raises(ValueError, match=says):
            table(text, **keys)
    (tmp_path / "t.csv").write_bytes(b"a,b\n1,\xff\n")
    with pytest.raises(ValueError, match="no table of text in UTF-8"):
        load_arrays(tmp_path / "t.csv")
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"Tables are read from \.csv and \.tsv files"):
        load_arrays(tmp_path / "t.parquet")


def test_keys_of_archives(tmp_path):
    points = RNG.normal(size=(4, 3))
    np.savez(tmp_path / "k.npz", points=points, kind=np.array(["b", "a", "b", "c"]), objects=np.array([{}] * 4))
    data = load_arrays(tmp_path / "k.npz", x="points", y="kind")
    assert data.tensors[1].tolist() == [1, 0, 1, 2]
    assert len(load_arrays(tmp_path / "k.npz", x="points").tensors) == 1
    for keys, says in (
        ({}, "not 'x'; say which one it is: --samples-key KEY"),
        ({"x": "points", "y": "labels"}, "not 'labels'; say which one it is: --labels-key KEY"),
        ({"x": "points", "y": "y"}, "not 'y'"),
        ({"x": "points", "y": "objects"}, "pickled objects"),
    ):
        with pytest.raises(ValueError, match=says):
            load_arrays(tmp_path / "k.npz", **keys)


def test_cell_series_leave_a_time_out(tmp_path):
    t = np.array([0, 0, 3, 3, 3, 7, 9, 9], dtype=np.int16)
    np.savez(tmp_path / "s.npz", x=RNG.normal(size=(8, 4)).astype(np.float32), t=t)
    series = CellSeries.load(tmp_path / "s.npz", dims=2, whiten=True)
    assert series.times == 4
    torch.testing.assert_close(series.x.std(0), torch.ones(2))
    intervals, held = series.leave_out(1)
    assert intervals == [(0, 2), (2, 3)]
    assert torch.equal(held, series.at(1))
    assert len(held) == 3
    for bad in (0, 3):
        with pytest.raises(ValueError, match="inner time"):
            series.leave_out(bad)
    np.savez(tmp_path / "w.npz", a=t)
    with pytest.raises(ValueError, match="must hold x"):
        CellSeries.load(tmp_path / "w.npz")


def test_real_files(data_root):
    """The published MNIST and time series, where they are."""
    data = mnist(data_root)
    assert len(data) == 60_000
    assert data.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    series = CellSeries.load(f"{data_root}/single_cell/emt_a549_10d.npz")
    assert [len(series.at(t)) for t in range(series.times)] == [577, 885, 788, 883]


def test_a_grid_of_images(tmp_path):
    images = torch.stack([torch.full((1, 2, 2), v) for v in (-1.0, 0.0, 1.0)])
    save_grid(images, tmp_path / "deep" / "grid.png", columns=2, scale=3)
    pixels = np.asarray(Image.open(tmp_path / "deep" / "grid.png"))
    assert pixels.shape == (18, 18)
    assert pixels[3, 3] == 0
    assert pixels[3, 12] == 128
    assert pixels[12, 3] == 255
    with pytest.raises(ValueError, match="1 or 3"):
        save_grid(torch.zeros(1, 2, 4, 4), tmp_path / "x.png")


def test_words_that_python_reads_as_numbers_are_words(tmp_path):
    """1_2 is no 12: the labels of two batches would be one class."""
    (tmp_path / "t.csv").write_text("a,kind\n1,1_2\n3,12\n5,3\n")
    assert load_arrays(tmp_path / "t.csv", y="kind").tensors[1].tolist() == [1, 0, 2]
    (tmp_path / "u.csv").write_text("a,b\n1,2\n3,1_0\n")
    with pytest.raises(ValueError, match=r"column 'b' of .* holds '1_0', which is no number"):
        load_arrays(tmp_path / "u.csv")


def test_series_that_cannot_be_cut_or_whitened(tmp_path):
    np.savez(tmp_path / "s.npz", x=np.c_[np.arange(6.0), np.ones(6)], t=np.arange(6) // 2)
    with pytest.raises(ValueError, match=r"coordinate 1 of .* has no deviation"):
        CellSeries.load(tmp_path / "s.npz", whiten=True)
    assert bool(CellSeries.load(tmp_path / "s.npz", whiten=True, dims=1).x.isfinite().all())
    for dims, says in (
        (-1, "dims must be at least 1"),
        (0, "dims must be at least 1"),
        (3, "at most the 2 coordinates"),
    ):
        with pytest.raises(ValueError, match=says):
            CellSeries.load(tmp_path / "s.npz", dims=dims)
