"""Data sets of other libraries: rows that are dicts, images of PIL, and iterables without positions."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset

import flows
import mbot
from flows import CoupledLoader
from flows.datasets.images import image_tensor


class Table:
    """Rows as dicts and columns by name, as Hugging Face's data sets serve them."""

    column_names = ("image", "label", "caption")

    def __init__(self, images, labels):
        self.images, self.labels, self.decoded = images, labels, 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        if isinstance(row, str):
            return list(self.labels) if row == "label" else None
        self.decoded += 1
        return {"image": self.images[row], "label": self.labels[row], "caption": f"a {self.labels[row]}"}

    def __getitems__(self, rows):
        return [self[row] for row in rows]


def pictures(n=12, mode="RGB", size=(3, 2)):
    rng = np.random.default_rng(0)
    shape = (n, size[1], size[0], 3) if mode == "RGB" else (n, size[1], size[0])
    pixels = rng.integers(0, 256, shape, dtype=np.uint8)
    return pixels, [Image.fromarray(p) for p in pixels]


def test_columns_by_name_and_images_as_tensors():
    pixels, images = pictures()
    labels = [i % 3 for i in range(12)]
    loader = CoupledLoader(Table(images, labels), batch_size=4, columns=("image", "label"))
    seen = []
    for batch in loader:
        assert batch.x1.shape == (4, 3, 2, 3)
        expected = torch.from_numpy(pixels[batch.index.numpy()]).permute(0, 3, 1, 2) / 127.5 - 1
        torch.testing.assert_close(batch.x1, expected)
        assert batch.y.tolist() == [labels[i] for i in batch.index]
        seen += batch.index.tolist()
    assert sorted(seen) == list(range(12))
    unlabelled = next(iter(CoupledLoader(Table(images, labels), batch_size=4, columns="image")))
    assert unlabelled.y is None
    words = next(iter(CoupledLoader(Table(images, labels), batch_size=4, columns=["image", "caption"])))
    assert words.y == [f"a {labels[i]}" for i in words.index]


def test_images_of_pil_need_no_columns_and_keep_their_channels():
    pixels, images = pictures(mode="L")
    batch = next(iter(CoupledLoader([(image, 1) for image in images], batch_size=4)))
    torch.testing.assert_close(batch.x1, torch.from_numpy(pixels[batch.index.numpy()])[:, None] / 127.5 - 1)
    batch = next(iter(CoupledLoader(images, batch_size=4)))
    assert batch.y is None
    assert batch.x1.shape == (4, 1, 2, 3)


@pytest.mark.parametrize(
    ("mode", "channels"), [("1", 1), ("L", 1), ("LA", 1), ("P", 3), ("RGB", 3), ("RGBA", 3), ("CMYK", 3), ("I;16", 1)]
)
def test_every_mode_of_pil(mode, channels):
    x = image_tensor(Image.new("RGB", (5, 4), (255, 255, 255)).convert("L" if mode == "I;16" else mode).convert(mode))
    assert x.shape == (channels, 4, 5)
    if mode != "I;16":
        assert bool((x == 1).all())
    sixteen = image_tensor(Image.fromarray(np.full((4, 5), 65535, np.uint16)))
    assert float(sixteen.min()) == 1


def test_sources_from_rows_are_matched_without_reading_their_images():
    _, images = pictures()
    source, data = Table(images, [i % 3 for i in range(12)]), Table(images, [i % 3 for i in range(12)])
    loader = CoupledLoader(
        data, source, mbot.ConditionalOTCoupling(), batch_size=6, columns=("image", "label"), source_sampling="matched"
    )
    assert source.decoded + data.decoded <= 2  # a first look
    batch = next(iter(loader))
    assert batch.y0.tolist() == batch.y.tolist()


def test_rows_whose_columns_are_not_named_or_not_there():
    _, images = pictures()
    table = Table(images, [0] * 12)
    with pytest.raises(
        TypeError, match=r"dicts with image, label, caption: name the columns .*columns=\('image', 'lab"
    ):
        next(iter(CoupledLoader(table, batch_size=4)))
    with pytest.raises(ValueError, match="no column img; they have image, label, caption"):
        next(iter(CoupledLoader(table, batch_size=4, columns=("img", "label"))))
    with pytest.raises(ValueError, match="no column y; they have image, label, caption"):
        next(iter(CoupledLoader(table, batch_size=4, columns=("image", "y"))))
    with pytest.raises(TypeError, match="of rows that are dicts; got Tensor"):
        next(iter(CoupledLoader(torch.randn(12, 2), batch_size=4, columns="x")))
    for bad in (3, ("a", "b", "c"), ("a", 1), ()):
        with pytest.raises(TypeError, match="columns must name"):
            CoupledLoader(table, batch_size=4, columns=bad)
    with pytest.raises(ValueError, match="give one of the two"):
        CoupledLoader(table, batch_size=4, columns="image", collate=list)
    with pytest.raises(ValueError, match=r"images of the data set differ in shape .*\(3, 2, 3\), \(3, 3, 2\)"):
        next(iter(CoupledLoader([*pictures(2)[1], *pictures(2, size=(2, 3))[1]], batch_size=4)))


class Numbers(IterableDataset):
    """0 … n - 1 plus noise of the global generators; optionally with a state of its own."""

    def __init__(self, n=30, resumable=True):
        self.n, self.at, self.begin, self.epochs = n, 0, 0, []
        if resumable:
            self.state_dict = lambda: {"at": self.at}
            self.load_state_dict = lambda state: setattr(self, "begin", state["at"])

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __iter__(self):
        self.at, self.begin = self.begin, 0
        while self.at < self.n:
            self.at += 1
            yield torch.full((2,), float(self.at - 1)) + torch.rand(()) / 2, self.at % 2


class Live(IterableDataset):
    """A stream that hands out the very dict that it goes on changing, and takes over the one it is given."""

    def __init__(self):
        self.state = {"at": 0}

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state

    def __iter__(self):
        while self.state["at"] < 30:
            self.state["at"] += 1
            yield torch.full((2,), float(self.state["at"] - 1)), self.state["at"] % 2
        self.state["at"] = 0


def streamed(stream=None, buffer=12, **settings):
    coupling = settings.pop("coupling", mbot.OTCoupling())
    return CoupledLoader(stream or Numbers(), None, coupling, 3, 6, shuffle_buffer=buffer, seed=3, **settings)


def take(loader, n):
    return [loader.next_batch() for _ in range(n)]


def numbers(batches):
    return [int(v) for b in batches for v in b.x1[:, 0]]


def equal(a, b):
    return all(torch.equal(p.x0, q.x0) and torch.equal(p.x1, q.x1) and torch.equal(p.y, q.y)
               for p, q in zip(a, b, strict=True))  # fmt: skip


def test_a_stream_is_served_whole_and_shuffled_stretch_by_stretch():
    loader = streamed()
    assert len(loader) == 4
    first, second, third = (take(loader, 4) for _ in range(3))
    assert sorted(numbers(first)) == list(range(12))
    assert numbers(first) != list(range(12))
    assert sorted(numbers(second)) == list(range(12, 24))
    assert sorted(numbers(third)) == [*range(6), *range(24, 30)]  # the second pass begins
    assert loader.batches.stream.iterable.epochs == [1]
    assert all(len(b) == 3 and b.y.tolist() == [(int(v) + 1) % 2 for v in b.x1[:, 0]] for b in first)
    assert sorted(torch.cat([b.index for b in second]).tolist()) == list(range(12, 24))
    assert len(list(loader)) == 4
    assert loader.epoch == 4
    assert numbers(take(streamed(shuffle=False, coupling=mbot.IndependentCoupling()), 4)) == list(range(12))


def test_a_second_loader_repeats_it_whatever_is_read_ahead_and_drawn_outside():
    a = take(streamed(), 9)
    torch.rand(5)
    assert equal(a, take(streamed(prefetch=7), 9))
    assert equal(a, take(streamed(Numbers(resumable=False)), 9))


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 6, 9, 11, 12])
def test_it_goes_on_by_the_state_of_the_iterable_to_the_same_batches(stop):
    loader = streamed()
    take(loader, stop)
    state = loader.state_dict()
    rest = take(loader, 8)
    again = streamed()
    again.load_state_dict(state)
    assert equal(take(again, 8), rest)


@pytest.mark.parametrize("stop", [0, 1, 4, 7])
def test_a_stream_that_hands_out_its_live_state_goes_on_all_the_same(stop):
    first = streamed(Live())
    take(first, stop)
    state = first.state_dict()
    rest = take(first, 9)
    for _ in range(2):  # the same state serves twice
        again = streamed(Live())
        again.load_state_dict(state)
        assert equal(take(again, 9), rest)


def test_work_that_ran_ahead_is_not_lost():
    loader = streamed(Numbers(resumable=False), prefetch=5)
    a = take(loader, 3)
    loader.close()
    assert equal(a + take(loader, 6), take(streamed(), 9))


def test_a_trainer_resumes_a_stream_to_the_same_bits(tmp_path):
    def run(out, steps=10):
        torch.manual_seed(0)
        model = flows.models.ResidualMLP(2, num_classes=2, width=8, depth=1)
        return flows.Trainer(model, streamed(), steps=steps, out=out, checkpoint_every=5, progress=False, ema=None)

    whole = run(tmp_path / "whole")
    whole.fit()
    first = run(tmp_path / "parts", steps=5)
    first.fit()
    second = run(tmp_path / "parts")
    second.fit(resume=True)
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_a_stream_cannot_do():
    plain = streamed(Numbers(resumable=False))
    take(plain, 2)
    with pytest.raises(ValueError, match=r"a state of its own: give it state_dict\(\) and load_state_dict\(\)"):
        streamed(Numbers(resumable=False)).load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="a stream has no epochs to go to"):
        plain.set_epoch(2)
    with pytest.raises(ValueError, match="read by one thread"):
        streamed(num_workers=1)
    with pytest.raises(ValueError, match="needs the classes of all samples"):
        streamed(source_sampling="matched")
    with pytest.raises(ValueError, match="fitted to a whole data set; a stream is never whole"):
        streamed(coupling=mbot.DataCoupling())
    with pytest.raises(ValueError, match="ended before shuffle_buffer=36 items were read"):
        take(streamed(buffer=31), 1)
    with pytest.raises(TypeError, match="can be read again and again; got generator"):
        streamed(torch.zeros(2) for _ in range(100))
    with pytest.raises(TypeError, match=r"got int\. Wrap tensors"):
        streamed(3)


def test_rows_of_a_stream_are_dicts_too():
    class Rows:
        def __iter__(self):
            for i, image in enumerate(pictures(20)[1]):
                yield {"image": image, "label": i}

    batch = streamed(Rows(), columns=("image", "label")).next_batch()
    expected = torch.from_numpy(pictures(20)[0][batch.y.numpy()]).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(batch.x1, expected)
