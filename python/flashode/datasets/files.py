"""Readers of published files of images, from a folder of the user's: MNIST, CIFAR-10, Cityscapes."""

from __future__ import annotations

import gzip
import math
import os
import pickle
import struct
import zlib
from pathlib import Path

import torch

from ..arguments import kind_of, require_whole
from ..errors import ArgumentError, ArgumentTypeError
from .images import Labelled

VOID = 255
"""Label of the pixels of Cityscapes that count for nothing: ``ignore_index`` of a loss."""

_MNIST = (
    "MNIST is four files: train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
    "t10k-labels-idx1-ubyte, with or without .gz, as Yann LeCun published them and others copy them"
)
_LITTLE_ENDIAN = (
    "expected a header with the highest byte of a number first, as struct.pack('>I', n) writes it"
)
_CIFAR10 = (
    "CIFAR-10 is the files data_batch_1 to data_batch_5 and test_batch of the archive that Alex Krizhevsky's page "
    "calls the python version, unpacked"
)
_CITYSCAPES = (
    "Cityscapes is the folders leftImg8bit and gtFine that cityscapes-dataset.com gives to registered users, or "
    "folders train and val of paired images as published with pix2pix"
)

# Names are those of the 19 classes that count, labelled 0 to 18 in this order; colours and ids are the labels' own.
_STREET = {
    4: (None, (0, 0, 0)), 5: (None, (111, 74, 0)), 6: (None, (81, 0, 81)), 7: ("road", (128, 64, 128)),
    8: ("sidewalk", (244, 35, 232)), 9: (None, (250, 170, 160)), 10: (None, (230, 150, 140)),
    11: ("building", (70, 70, 70)), 12: ("wall", (102, 102, 156)), 13: ("fence", (190, 153, 153)),
    14: (None, (180, 165, 180)), 15: (None, (150, 100, 100)), 16: (None, (150, 120, 90)),
    17: ("pole", (153, 153, 153)), 19: ("traffic light", (250, 170, 30)), 20: ("traffic sign", (220, 220, 0)),
    21: ("vegetation", (107, 142, 35)), 22: ("terrain", (152, 251, 152)), 23: ("sky", (70, 130, 180)),
    24: ("person", (220, 20, 60)), 25: ("rider", (255, 0, 0)), 26: ("car", (0, 0, 142)), 27: ("truck", (0, 0, 70)),
    28: ("bus", (0, 60, 100)), 29: (None, (0, 0, 90)), 30: (None, (0, 0, 110)), 31: ("train", (0, 80, 100)),
    32: ("motorcycle", (0, 0, 230)), 33: ("bicycle", (119, 11, 32)),
}  # fmt: skip
CITYSCAPES_CLASSES = tuple(name for name, _ in _STREET.values() if name)


def mnist(folder) -> tuple[Labelled, Labelled]:
    """MNIST's training and test images from their files, plain or with .gz; of others in this format too.

    Args:
        folder: that the four files are in.

    Returns:
        Training images (60000, 1, 28, 28) with their labels, and 10,000 test images with theirs.

    Raises:
        ArgumentError: the folder or a file is missing, or is not what it should be.

    Source: LeCun, Bottou, Bengio, Haffner 1998; the idx format is described where the files are published.
    """
    folder = _folder(folder, _MNIST)
    return _mnist_part(folder, "train"), _mnist_part(folder, "t10k")


def _mnist_part(folder, name) -> Labelled:
    pictures = _first_of(folder, f"{name}-images-idx3-ubyte", _MNIST)
    answers = _first_of(folder, f"{name}-labels-idx1-ubyte", _MNIST)
    images, labels = _read_idx(pictures, 3), _read_idx(answers, 1)
    if images.shape[1:] != (28, 28):
        raise ArgumentError(
            f"{pictures}: expected images of 28x28 pixels, found {_by(images.shape[1:])}. {_MNIST}"
        )
    return _whole(pictures, answers, images[:, None], labels)


def _first_of(folder, name, what) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise ArgumentError(f"{folder / name}: no such file, nor with .gz. {what}")


def _read_idx(path, dims) -> torch.Tensor:
    """The numbers of an idx file: two zero bytes, 8 for bytes, the number of dimensions, each of them, the bytes."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = file.read()
    except (
        OSError,
        EOFError,
        zlib.error,
    ) as error:  # OSError is also what gzip calls a file that is none of its own
        raise ArgumentError(f"{path}: cannot be read, {error}. {_MNIST}") from None
    magic, begin = bytes((0, 0, 8, dims)), 4 + 4 * dims
    if content[:4] == magic[::-1]:
        raise ArgumentError(f"{path}: {_LITTLE_ENDIAN}, found {content[:4].hex()} in front. {_MNIST}")
    if content[:4] != magic:
        raise ArgumentError(
            f"{path}: expected to begin with {magic.hex()}, found {content[:4].hex() or 'nothing'}. {_MNIST}"
        )
    if len(content) < begin:
        raise ArgumentError(
            f"{path}: expected a header of {begin} bytes, found {len(content)} in all. {_MNIST}"
        )
    shape = struct.unpack(f">{dims}I", content[4:begin])
    size, little = math.prod(shape), struct.unpack(f"<{dims}I", content[4:begin])
    if len(content) == begin + math.prod(little) != begin + size:
        raise ArgumentError(f"{path}: {_LITTLE_ENDIAN}, found sizes {_by(little)} so. {_MNIST}")
    if len(content) != begin + size or not size:
        raise ArgumentError(
            f"{path}: expected {size:,} bytes of {_by(shape)} numbers after the header, "
            f"found {len(content) - begin:,}. {_MNIST}"
        )
    return torch.frombuffer(bytearray(content[begin:]), dtype=torch.uint8).reshape(shape)


def _whole(pictures, answers, images, labels) -> Labelled:
    """Images and labels that belong together."""
    if len(images) != len(labels):
        raise ArgumentError(
            f"{answers}: expected {len(images):,} labels, one for every image, found {len(labels):,}"
        )
    if labels.max() > 9:
        raise ArgumentError(f"{answers}: expected labels from 0 to 9, found {labels.max().item()}")
    return Labelled(images.float() / 255, labels.long())


def cifar10(folder) -> tuple[Labelled, Labelled]:
    """CIFAR-10's training and test images from the pickles of its python version; nothing in them is run.

    Args:
        folder: that the six files are in, or the one above it, with cifar-10-batches-py.

    Returns:
        Training images (50000, 3, 32, 32) with their labels, and 10,000 test images with theirs.

    Raises:
        ArgumentError: the folder or a file is missing, or is not what it should be.

    Source: Krizhevsky 2009, Learning multiple layers of features from tiny images.
    """
    folder = _folder(folder, _CIFAR10)
    if (folder / "cifar-10-batches-py").is_dir():
        folder = folder / "cifar-10-batches-py"
    parts = [_cifar10_batch(folder / f"data_batch_{i}") for i in range(1, 6)]
    train = Labelled(*(torch.cat(each) for each in zip(*parts)))
    return train, _cifar10_batch(folder / "test_batch")


def _cifar10_batch(path) -> Labelled:
    if not path.is_file():
        raise ArgumentError(f"{path}: no such file. {_CIFAR10}")
    with open(path, "rb") as file:
        try:
            batch = _Unpickler(file, encoding="bytes").load()
            data, labels = batch[b"data"], batch[b"labels"]
            _, shape, kind, by_columns, content = data.state
            found = f"{_by(shape)} of type {kind.args[0].decode()}"
            images = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            labels = torch.tensor(labels)
        except Exception as error:  # a pickle that is damaged, or another, can fail in any way
            message = (
                f"{path}: expected a pickled batch with b'data' and b'labels', found {error!r}. {_CIFAR10}"
            )
            raise ArgumentError(message) from None
    rows = len(images) // 3072
    if by_columns or found != f"{rows}x3072 of type u1" or images.numel() != rows * 3072 or not rows:
        raise ArgumentError(f"{path}: expected data of Nx3072 of type u1, found {found}. {_CIFAR10}")
    return _whole(path, path, images.reshape(rows, 3, 32, 32), labels)


class _Array:
    """Stands for all that pickles name for an array: keeps what they say of it, and runs nothing."""

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Reads numbers, texts, containers and arrays, and refuses every other class and function."""

    NAMES = ("numpy.core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype")

    def find_class(self, module, name):
        if f"{module}.{name}" not in self.NAMES:
            raise pickle.UnpicklingError(f"{module}.{name} in it, which has no place there")
        return _Array


def cityscapes(folder, split: str = "train", size: tuple[int, int] = (64, 128)) -> Labelled:
    """Street scenes of Cityscapes with the 19 classes that count, `CITYSCAPES_CLASSES`, and `VOID` for the rest.

    Args:
        folder: with leftImg8bit and gtFine; or with the paired images of pix2pix, train/1.jpg and so on, a photo on
            the left and its labels on the right, whose colours go to the nearest class.
        split: ``"train"`` or ``"val"``.
        size: height and width to which images are averaged; of labels the nearest pixel is taken.

    Returns:
        Images (N, 3, *size) and labels (N, *size), in the order of their names.

    Raises:
        ArgumentError: the folder or a file is missing, or is not what it should be.
        ImportError: Pillow is not installed.

    Sources: Cordts et al. 2016; the pairs: Isola, Zhu, Zhou, Efros 2017.
    """
    if split not in ("train", "val"):
        raise ArgumentError(f"split must be 'train' or 'val', got {split!r}")
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise ArgumentTypeError(f"size must be (height, width), got {kind_of(size)}")
    for name, pixels in zip(("size[0]", "size[1]"), size):
        require_whole(name, pixels)
    folder, size = _folder(folder, _CITYSCAPES), tuple(size)
    if (folder / "leftImg8bit").is_dir():
        photos = sorted((folder / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
        read = _read_official
    else:
        photos = sorted(path for kind in ("png", "jpg") for path in (folder / split).glob(f"*.{kind}"))
        read = _read_pair
    if not photos:
        raise ArgumentError(f"{folder}: no images of {split} found. {_CITYSCAPES}")
    pairs = [read(path, size) for path in photos]
    return Labelled(*(torch.stack(each) for each in zip(*pairs)))


def _read_official(path, size):
    city = path.parent
    name = path.name.replace("_leftImg8bit.png", "_gtFine_labelIds.png")
    answers = city.parents[2] / "gtFine" / city.parent.name / city.name / name
    if not answers.is_file():
        raise ArgumentError(f"{answers}: no such file, the labels of {path.name}. {_CITYSCAPES}")
    photo, labels = _open_image(path).convert("RGB"), _open_image(answers)
    if labels.mode != "L" or labels.size != photo.size:
        raise ArgumentError(
            f"{answers}: expected one byte for each of {_by(photo.size)} pixels, "
            f"found mode {labels.mode} and {_by(labels.size)}. {_CITYSCAPES}"
        )
    return _averaged(photo, size), _classes()[_nearest_pixels(labels, size)[..., 0].long()]


def _read_pair(path, size):
    both = _open_image(path).convert("RGB")
    width, height = both.size
    if width != 2 * height:
        raise ArgumentError(
            f"{path}: expected two squares side by side, found {_by(both.size)} pixels. {_CITYSCAPES}"
        )
    photo, painted = (both.crop((left, 0, left + height, height)) for left in (0, height))
    ids, colours = list(_STREET), torch.tensor([colour for _, colour in _STREET.values()])
    pixels = _nearest_pixels(painted, size)
    nearest = torch.cdist(pixels.reshape(-1, 3).float(), colours.float()).argmin(1)
    return _averaged(photo, size), _classes()[torch.tensor(ids)[nearest]].reshape(size)


def _classes():
    """Labels by id of the files."""
    table = torch.full((256,), VOID)
    for id, (name, _) in _STREET.items():
        if name:
            table[id] = CITYSCAPES_CLASSES.index(name)
    return table


def _open_image(path):
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("flashode.datasets.cityscapes needs Pillow: pip install pillow") from None
    try:
        with open(path, "rb") as file:
            image = Image.open(file)
            image.load()
    except (OSError, SyntaxError, ValueError) as error:  # Pillow calls a damaged PNG a SyntaxError
        raise ArgumentError(f"{path}: expected a PNG or JPEG image, found {error}. {_CITYSCAPES}") from None
    return image


def _bytes(image):
    """A Pillow image as (H, W, channels)."""
    width, height = image.size
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(height, width, -1)


def _averaged(photo, size):
    from PIL.Image import Resampling

    return _bytes(photo.resize(size[::-1], Resampling.BOX)).permute(2, 0, 1).float() / 255


def _nearest_pixels(image, size):
    pixels = _bytes(image)
    rows, columns = ((torch.arange(n) + 0.5) * (m / n) for n, m in zip(size, pixels.shape))
    return pixels[rows.long()[:, None], columns.long()]


def _folder(folder, what) -> Path:
    if not isinstance(folder, (str, os.PathLike)):
        raise ArgumentTypeError(f"folder must be a path, got {kind_of(folder)}. {what}")
    folder = Path(folder)
    if not folder.is_dir():
        raise ArgumentError(f"{folder}: no such folder. {what}")
    return folder


def _by(shape) -> str:
    return "x".join(str(n) for n in shape)
