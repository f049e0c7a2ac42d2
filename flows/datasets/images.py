"""Image data: scikit-learn's digits, MNIST and CIFAR-10 from files in their standard formats, folders of images."""

from __future__ import annotations

import gzip
import io
import pickle
import re
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mbot import checks

_FOLDERS = {
    "mnist": ("mnist", "MNIST/raw", "MNIST"),
    "fashion-mnist": ("fashion-mnist", "FashionMNIST/raw", "FashionMNIST"),
}
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"}


class ImageData(Dataset[Any]):
    """Images kept as bytes, served as float32 in [-1, 1], with their conditions.

    Args:
        images: ``(N, C, H, W)`` uint8.
        labels: ``(N,)`` integers, or vectors ``(N, c)`` of floating point such as text features, or None.
        flip: mirror a random half of the images, drawn from torch's default generator.
        classes: names of integer labels.
    """

    def __init__(
        self, images: Tensor, labels: Tensor | None = None, *, flip: bool = False, classes: list[str] | None = None
    ) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(f"images must be uint8 of shape (N, C, H, W); got {images.dtype} {tuple(images.shape)}")
        vectors = labels is not None and labels.is_floating_point() and labels.ndim == 2 and len(labels) == len(images)
        if labels is not None and not vectors and labels.shape != (len(images),):
            raise ValueError(
                f"labels must be integers of shape ({len(images)},) or floating-point vectors of shape ({len(images)}, "
                f"c); got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        self.images, self.labels, self.flip = images, labels, flip
        self.classes = classes or []
        if labels is not None and not labels.is_floating_point() and not classes:
            self.classes = [str(c) for c in range(int(labels.max()) + 1)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Any:
        one = self.rows(torch.tensor([row]))
        return one[0] if isinstance(one, Tensor) else (one[0][0], one[1][0])

    def rows(self, index: Tensor) -> Any:
        """Images ``(n, C, H, W)``, with their labels ``(n,)`` or vectors ``(n, c)`` where there are some."""
        x = self.images[index].float() / 127.5 - 1
        if self.flip:
            x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x)
        return x if self.labels is None else (x, self.labels[index])


def digits() -> ImageData:
    """The 1,797 handwritten digits of scikit-learn, 8 × 8, with their labels; nothing is downloaded.

    >>> len(digits()), digits()[0][0].shape
    (1797, torch.Size([1, 8, 8]))
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(np.rint(pixels.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8))
    return ImageData(images, torch.from_numpy(labels).long())


def mnist(root: str | Path, *, train: bool = True, name: str = "mnist", download: bool = False) -> ImageData:
    """MNIST or Fashion-MNIST from its idx files, gzipped or not.

    Args:
        root: folder with the files, or with a folder such as ``mnist/`` or ``MNIST/raw/`` that holds them.
        train: the 60,000 training images, else the 10,000 test images.
        name: ``"mnist"`` or ``"fashion-mnist"``.
        download: fetch them through torchvision where they are missing.

    Raises:
        FileNotFoundError: the files are not there; says where they were looked for.
        ValueError: a file is truncated or of another format.
    """
    checks.choice(name, "name", tuple(_FOLDERS))
    stem = "train" if train else "t10k"
    places = [*(Path(root) / folder for folder in _FOLDERS[name]), Path(root)]
    if download and not any(_present(place, f"{stem}-images-idx3-ubyte") for place in places):
        _torchvision("MNIST" if name == "mnist" else "FashionMNIST", root)
    for place in places:
        images, labels = (_present(place, f"{stem}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
        if images and labels:
            pixels = _idx(images)
            return ImageData(torch.from_numpy(pixels)[:, None], torch.from_numpy(_idx(labels)).long())
    raise FileNotFoundError(
        f"no {name} under {root}: looked for {stem}-images-idx3-ubyte(.gz) and {stem}-labels-idx1-ubyte(.gz) in "
        + ", ".join(map(str, places))
    )


def fashion_mnist(root: str | Path, *, train: bool = True, download: bool = False) -> ImageData:
    """Fashion-MNIST: `mnist` of that name."""
    return mnist(root, train=train, name="fashion-mnist", download=download)


def cifar10(root: str | Path, *, train: bool = True, flip: bool = False, download: bool = False) -> ImageData:
    """CIFAR-10 from its python or binary batches, unpacked or in the archive.

    Args:
        root: folder with ``cifar-10-batches-py/``, ``cifar-10-batches-bin/``, or the archive of either.
        train: the 50,000 training images, else the 10,000 test images.
        flip: mirror at random, as the papers train.
        download: fetch it through torchvision where it is missing.

    Raises:
        FileNotFoundError: none of these is there.
        ValueError: a batch is truncated or of another format.
    """
    root = Path(root)
    forms = ("batches-py", "batches-bin", "python.tar.gz", "binary.tar.gz")
    if download and not any((root / f"cifar-10-{form}").exists() for form in forms):
        _torchvision("CIFAR10", root)
    names = [f"data_batch_{i}" for i in range(1, 6)] if train else ["test_batch"]
    for kind, suffix, archive in (("py", "", "python"), ("bin", ".bin", "binary")):
        folder, packed = root / f"cifar-10-batches-{kind}", root / f"cifar-10-{archive}.tar.gz"
        wanted = [name + suffix for name in names]
        if all((folder / name).is_file() for name in wanted):
            contents = [(folder / name).read_bytes() for name in wanted]
        elif packed.is_file():
            with tarfile.open(packed) as tar:
                members = [tar.extractfile(f"cifar-10-batches-{kind}/{name}") for name in wanted]
                contents = [member.read() for member in members if member is not None]
        else:
            continue
        parts = [(_pickled if kind == "py" else _binary)(content) for content in contents]
        images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return ImageData(
            torch.from_numpy(images.reshape(-1, 3, 32, 32)), torch.from_numpy(labels.astype(np.int64)), flip=flip
        )
    raise FileNotFoundError(
        f"no CIFAR-10 under {root}: looked for cifar-10-batches-py/, cifar-10-batches-bin/, cifar-10-python.tar.gz and "
        "cifar-10-binary.tar.gz"
    )


class ImageFolder(Dataset[Any]):
    """A folder of images, each read when it is indexed: square crops of one size, in colour, float32 in [-1, 1].

    Sub-folders with images are classes, in alphabetical order; a folder without them has no labels. Files and folders
    whose names begin with a dot are left out (caches, thumbnails, forks of other systems). Images are rotated as
    their EXIF orientation says, as viewers show them; 16 bits of grey keep their range; transparency is dropped.

    Args:
        root: the folder.
        size: pixels a side; images are scaled so that the shorter side fits, and cropped in the middle.
        flip: mirror a random half, drawn from torch's default generator.
        labels: serve the classes; False leaves them out.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
        ValueError: images beside folders of classes, whose class is unknown; (when read) pixels of unknown range.
    """

    def __init__(self, root: str | Path, size: int, *, flip: bool = False, labels: bool = True) -> None:
        self.root, self.size, self.flip, self.labels = Path(root), checks.count(size, "size"), flip, labels
        if not self.root.is_dir():
            raise FileNotFoundError(f"no folder of images at {root}")
        self.classes = sorted(p.name for p in self.root.iterdir() if p.is_dir() and p.name[0] != "." and _pictures(p))
        if self.classes and (stray := _pictures(self.root)):
            raise ValueError(
                f"{root} holds {len(stray)} images, such as {stray[0].name}, beside folders of classes such as "
                f"{self.classes[0]!r}; move them into a folder"
            )
        folders = [self.root / name for name in self.classes] or [self.root]
        self.files = [(path, label) for label, folder in enumerate(folders) for path in _pictures(folder)]
        if not self.files:
            raise FileNotFoundError(f"no image in {root} (looked for {', '.join(sorted(_SUFFIXES))})")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> Any:
        from PIL import Image, ImageOps

        path, label = self.files[row]
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            upright = _sixteen_bits(upright, path) if upright.mode[0] in "IF" else upright.convert("RGB")
            x = _tensor(ImageOps.fit(upright, (self.size, self.size))).expand(3, -1, -1)
        if self.flip and bool(torch.rand(()) < 0.5):
            x = x.flip(-1)
        return (x, label) if self.classes and self.labels else x


def image_tensor(image: Any) -> Tensor:
    """An image of PIL as ``(C, H, W)`` in [-1, 1]: one channel where it is grey, else three; transparency is dropped.

    Raises:
        ValueError: pixels of unknown range.
    """
    if image.mode[0] in "IF":
        return _tensor(_sixteen_bits(image, "an image"))
    return _tensor(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))


def _tensor(image: Any) -> Tensor:
    """Pixels of 0 to 255, in one channel or three, as a tensor in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, np.float32))
    return (pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels[None]) / 127.5 - 1


def save_grid(images: Tensor, path: str | Path, *, columns: int = 10, scale: int = 1) -> None:
    """Write images as one PNG, row after row.

    Args:
        images: ``(N, C, H, W)`` in [-1, 1] (clamped), C of 1 or 3.
        path: the PNG.
        columns: images a row.
        scale: pixels a pixel, for small images.
    """
    from PIL import Image

    from flows.checkpoint import write_atomically

    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must have shape (N, 1 or 3, H, W); got {tuple(images.shape)}")
    pixels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    pixels = pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    n, channels, height, width = pixels.shape
    rows = -(-n // columns)
    sheet = torch.zeros(channels, rows * (height + 2) + 2, columns * (width + 2) + 2, dtype=torch.uint8)
    for i, image in enumerate(pixels):
        top, left = 2 + i // columns * (height + 2), 2 + i % columns * (width + 2)
        sheet[:, top : top + height, left : left + width] = image
    array = sheet[0].numpy() if channels == 1 else sheet.permute(1, 2, 0).numpy()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: Image.fromarray(array).save(file, format="PNG"))


def _pictures(folder: Path) -> list[Path]:
    """The images of a folder, without hidden files."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES and p.name[0] != "." and p.is_file())


def _sixteen_bits(image: Any, path: Path | str) -> Any:
    """Grey of 16 bits on the scale of bytes; PIL's own conversion would cut it off at 255."""
    from PIL import Image

    pixels = np.asarray(image, np.float32)
    if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(f"{path} holds {image.mode} pixels of unknown range; save it with 8 or 16 bits a channel")
    return Image.fromarray(pixels / 257)


def _present(folder: Path, name: str) -> Path | None:
    """A file, or its gzipped form, or torchvision's name of it."""
    for candidate in (folder / name, folder / f"{name}.gz", folder / name.replace("-idx", ".idx")):
        if candidate.is_file():
            return candidate
    return None


def _idx(path: Path) -> np.ndarray:
    """An idx file of bytes (the format of MNIST's files)."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zero, kind, axes = struct.unpack(">HBB", content[:4])
        shape = struct.unpack(f">{axes}I", content[4 : 4 + 4 * axes])
        if zero or kind != 8:
            raise ValueError("not an idx file of bytes")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape).copy()
    except (ValueError, EOFError, OSError, struct.error) as error:
        raise ValueError(f"{path} is damaged or not an idx file of bytes ({error})") from error


class _Arrays(pickle.Unpickler):
    """Reads the python batches of CIFAR-10, which hold lists, bytes and arrays; refuses to call anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("numpy") and name in ("_reconstruct", "ndarray", "dtype"):
            here = "numpy._core" if hasattr(np, "_core") else "numpy.core"  # before NumPy 2
            return super().find_class(re.sub(r"^numpy\._?core", here, module), name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"a CIFAR-10 batch has no use for {module}.{name}")


def _pickled(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _Arrays(io.BytesIO(content), encoding="bytes").load()
        return np.asarray(batch[b"data"], np.uint8).reshape(-1, 3072), np.asarray(batch[b"labels"])
    except (pickle.UnpicklingError, KeyError, EOFError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"a batch of CIFAR-10 is damaged or of another format ({error!r})") from error


def _binary(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    if len(content) % 3073:
        raise ValueError(f"a binary batch of CIFAR-10 has rows of 3073 bytes; got {len(content)} bytes")
    rows = np.frombuffer(content, np.uint8).reshape(-1, 3073)
    return rows[:, 1:], rows[:, 0]


def _torchvision(name: str, root: str | Path) -> None:
    try:
        import torchvision.datasets
    except ImportError as error:
        raise ImportError(
            f"downloading {name} goes through torchvision, which is not installed: pip install torchvision, or put the "
            f"files under {root} yourself"
        ) from error
    try:
        getattr(torchvision.datasets, name)(str(root), download=True)
    except RuntimeError as error:
        raise OSError(f"{name} could not be downloaded to {root}: {error}") from error
