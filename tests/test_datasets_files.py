"""Readers of published files, on small files written in their formats, whole and damaged."""

import gzip
import pickle
import re
import struct

import pytest
import torch

from flashode import ArgumentError, ArgumentTypeError
from flashode.datasets import CITYSCAPES_CLASSES, VOID, cifar10, cityscapes, mnist

# ---- MNIST -----------------------------------------------------------------------------------


def idx(numbers):
    dims = struct.pack(f">{numbers.dim()}I", *numbers.shape)
    return bytes((0, 0, 8, numbers.dim())) + dims + numbers.numpy().tobytes()


def random_bytes(*shape, seed=0, high=256):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


MNIST = {
    "train-images-idx3-ubyte": random_bytes(5, 28, 28, seed=1),
    "train-labels-idx1-ubyte": random_bytes(5, seed=2, high=10),
    "t10k-images-idx3-ubyte": random_bytes(3, 28, 28, seed=3),
    "t10k-labels-idx1-ubyte": random_bytes(3, seed=4, high=10),
}


def write_mnist(folder, packed=()):
    for i, (name, numbers) in enumerate(MNIST.items()):
        if i in packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(numbers)))
        else:
            (folder / name).write_bytes(idx(numbers))


@pytest.mark.parametrize("packed", [(), (0, 1, 2, 3), (0, 3)], ids=["plain", "gz", "some of each"])
def test_mnist_is_read_as_it_was_written(tmp_path, packed):
    write_mnist(tmp_path, packed)
    train, test = mnist(tmp_path)
    assert train.images.shape == (5, 1, 28, 28) and train.images.dtype == torch.float32
    written = iter(MNIST.values())
    for part in (train, test):
        assert torch.equal(part.images[:, 0] * 255, next(written).float())
        assert torch.equal(part.labels, next(written).long())


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (IMAGES, None, "no such file, nor with .gz. MNIST is four files"),
        (IMAGES, b"", "expected to begin with 00000803, found nothing"),
        (IMAGES, idx(MNIST[LABELS]), "expected to begin with 00000803, found 00000801"),
        (LABELS, b"<html>", "expected to begin with 00000801, found 3c68746d"),
        (IMAGES, idx(MNIST[IMAGES])[:9], "expected a header of 16 bytes, found 9 in all"),
        (
            IMAGES,
            idx(MNIST[IMAGES])[:-1],
            "expected 3,920 bytes of 5x28x28 numbers after the header, found 3,919",
        ),
        (IMAGES, idx(MNIST[IMAGES]) + b"x", "found 3,921"),
        (
            IMAGES,
            idx(MNIST[IMAGES])[:4] + struct.pack("<3I", 5, 28, 28) + bytes(3920),
            "struct.pack('>I', n) writes it, found sizes 5x28x28 so",
        ),
        (LABELS, struct.pack("<I", 0x801) + idx(MNIST[LABELS])[4:], "highest byte of a number first, "),
        (IMAGES, idx(random_bytes(0, 28, 28)), "of 0x28x28 numbers"),
        (IMAGES, idx(random_bytes(5, 8, 8)), "expected images of 28x28 pixels, found 8x8"),
        (LABELS, idx(MNIST[LABELS][:4]), "expected 5 labels, one for every image, found 4"),
        (LABELS, idx(MNIST[LABELS] + 10), "expected labels from 0 to 9, found"),
    ],
)
def test_a_file_of_mnist_that_is_wrong_is_named(tmp_path, name, content, message):
    write_mnist(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ArgumentError, match=f"{re.escape(str(tmp_path / name))}: .*{re.escape(message)}"):
        mnist(tmp_path)


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-9], lambda b: b"no gzip", lambda b: b[:30] + b"\xff" * 30 + b[60:]]
)
def test_a_damaged_gz_is_named(tmp_path, damage):
    write_mnist(tmp_path, packed=range(4))
    path = tmp_path / f"{IMAGES}.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ArgumentError, match=f"{re.escape(str(path))}: cannot be read"):
        mnist(tmp_path)


@pytest.mark.parametrize("read", [mnist, cifar10, cityscapes])
def test_a_missing_folder_is_named_with_what_belongs_there(tmp_path, read):
    with pytest.raises(ArgumentError, match="nowhere: no such folder. (MNIST|CIFAR-10|Cityscapes) is"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize("read", [mnist, cifar10, cityscapes])
@pytest.mark.parametrize("folder", [None, 3, True, b"here"])
def test_a_folder_is_a_path(read, folder):
    with pytest.raises(
        ArgumentTypeError, match="folder must be a path, got .* (MNIST|CIFAR-10|Cityscapes) is"
    ):
        read(folder)


@pytest.mark.parametrize("size", [None, 3, (0, 4), (4,), (1.5, 2), "ab"])
def test_a_size_is_two_numbers_of_pixels(tmp_path, size):
    with pytest.raises((ArgumentError, ArgumentTypeError), match="^size"):
        cityscapes(tmp_path, size=size)


# ---- CIFAR-10 --------------------------------------------------------------------------------


class Python2(pickle._Pickler):
    """Writes texts and bytes as Python 2 wrote its strings: the published batches are pickles of Python 2."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_string(self, text):
        content = text.encode() if isinstance(text, str) else text
        self.write(b"T" + struct.pack("<i", len(content)) + content)
        self.memoize(text)

    dispatch[bytes] = dispatch[str] = save_string


def pickled(value, path):
    with open(path, "wb") as file:
        Python2(file, protocol=2).dump(value)
    path.write_bytes(path.read_bytes().replace(b"numpy._core", b"numpy.core"))


CIFAR = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def batch(seed, rows=2):
    labels = random_bytes(rows, seed=seed, high=10).tolist()
    return {b"data": random_bytes(rows, 3072, seed=seed).numpy(), b"labels": labels, b"batch_label": b"some"}


def write_cifar(folder):
    for seed, name in enumerate(CIFAR):
        pickled(batch(seed), folder / name)


@pytest.mark.parametrize("inner", [".", "cifar-10-batches-py"])
def test_cifar10_is_read_as_it_was_written(tmp_path, inner):
    (tmp_path / inner).mkdir(exist_ok=True)
    write_cifar(tmp_path / inner)
    train, test = cifar10(tmp_path)
    assert train.images.shape == (10, 3, 32, 32) and test.images.shape == (2, 3, 32, 32)
    for seed, (images, labels) in enumerate([*zip(train.images.split(2), train.labels.split(2)), test]):
        assert torch.equal(images.flatten(1) * 255, random_bytes(2, 3072, seed=seed).float())
        assert labels.tolist() == batch(seed)[b"labels"]


class Harm:
    def __reduce__(self):
        return print, ("harm",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file. CIFAR-10 is the files"),
        (b"", "found EOFError"),
        (b"<html>", "expected a pickled batch with b'data' and b'labels', found"),
        ({b"labels": [1]}, "found KeyError"),
        ({b"data": 7, b"labels": [1]}, "found AttributeError"),
        ({**batch(0), b"more": Harm()}, "print in it, which has no place there"),
        ({**batch(0), b"labels": [1]}, "expected 2 labels, one for every image, found 1"),
        ({**batch(0), b"labels": [1, 10]}, "expected labels from 0 to 9, found 10"),
        (
            {**batch(0), b"data": random_bytes(2, 3000).numpy()},
            "expected data of Nx3072 of type u1, found 2x3000",
        ),
        ({**batch(0), b"data": torch.zeros(2, 3072).numpy()}, "found 2x3072 of type f4"),
        ({**batch(0), b"data": random_bytes(3072, 2).T.numpy()}, "expected data of Nx3072"),
    ],
)
def test_a_batch_of_cifar10_that_is_wrong_is_named_and_runs_nothing(tmp_path, capsys, content, message):
    write_cifar(tmp_path)
    path = tmp_path / "data_batch_3"
    if content is None:
        path.unlink()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        pickled(content, path)
    with pytest.raises(ArgumentError, match=f"{re.escape(str(path))}: .*{re.escape(message)}"):
        cifar10(tmp_path)
    assert "harm" not in capsys.readouterr().out


def test_a_truncated_batch_of_cifar10_is_named(tmp_path):
    write_cifar(tmp_path)
    path = tmp_path / "test_batch"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ArgumentError, match="test_batch: expected a pickled batch"):
        cifar10(tmp_path)


# ---- Cityscapes ------------------------------------------------------------------------------

COLOURS = {"road": (128, 64, 128), "sky": (70, 130, 180), "car": (0, 0, 142), None: (111, 74, 0)}
IDS = {"road": 7, "sky": 23, "car": 26, None: 5}


def label(name):
    return CITYSCAPES_CLASSES.index(name) if name else VOID


def quarters(values, side):
    """A square image of four values, one in every quarter, as a nested list of rows."""
    a, b, c, d = values
    half = side // 2
    return half * [half * [a] + half * [b]] + half * [half * [c] + half * [d]]


def image_of(rows, mode):
    Image = pytest.importorskip("PIL.Image")
    numbers = torch.tensor(rows, dtype=torch.uint8)
    height, width = numbers.shape[:2]
    return Image.frombytes(mode, (width, height), numbers.numpy().tobytes())


def write_pair(path, side=32, quality=None):
    photo = quarters([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)], side)
    painted = quarters(list(COLOURS.values()), side)
    image_of([left + right for left, right in zip(photo, painted)], "RGB").save(path, **quality or {})


def write_official(folder, split="train", city="ulm", name="ulm_0_0"):
    for kind in ("leftImg8bit", "gtFine"):
        (folder / kind / split / city).mkdir(parents=True, exist_ok=True)
    photo = quarters([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)], 32)
    image_of(photo, "RGB").save(folder / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png")
    ids = folder / "gtFine" / split / city / f"{name}_gtFine_labelIds.png"
    image_of(quarters(list(IDS.values()), 32), "L").save(ids)
    return ids


EXPECTED = torch.tensor([[label("road"), label("sky")], [label("car"), VOID]])
PHOTO = torch.tensor([[[1.0, 0], [0, 1]], [[0, 1], [0, 1]], [[0, 0], [1, 1]]])


def test_there_are_19_classes_in_the_order_of_the_dataset():
    assert len(CITYSCAPES_CLASSES) == 19
    assert (
        CITYSCAPES_CLASSES[0] == "road"
        and CITYSCAPES_CLASSES[10] == "sky"
        and CITYSCAPES_CLASSES[18] == "bicycle"
    )


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_pairs_of_cityscapes_are_split_and_their_colours_become_classes(tmp_path, kind):
    (tmp_path / "val").mkdir()
    for i in (1, 2):
        write_pair(tmp_path / "val" / f"{i}.{kind}", quality={"quality": 90} if kind == "jpg" else None)
    images, labels = cityscapes(tmp_path, "val", size=(2, 2))
    assert images.shape == (2, 3, 2, 2) and torch.equal(labels, EXPECTED.expand(2, 2, 2))
    torch.testing.assert_close(images[0], PHOTO, atol=0.06 if kind == "jpg" else 0, rtol=0)


def test_official_cityscapes_is_read_by_ids(tmp_path):
    write_official(tmp_path)
    write_official(tmp_path, city="bonn", name="bonn_0_0")
    write_official(tmp_path, split="val")
    images, labels = cityscapes(tmp_path, size=(4, 4))
    assert images.shape == (2, 3, 4, 4)
    assert torch.equal(labels[0], EXPECTED.repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert torch.equal(images[0, :, ::3, ::3], PHOTO)
    assert len(cityscapes(tmp_path, "val").images) == 1


def test_both_forms_of_cityscapes_say_the_same(tmp_path):
    write_official(tmp_path / "official")
    (tmp_path / "train").mkdir()
    write_pair(tmp_path / "train" / "1.png")
    for ours, theirs in zip(
        cityscapes(tmp_path, size=(8, 8)), cityscapes(tmp_path / "official", size=(8, 8))
    ):
        assert torch.equal(ours, theirs)


def test_what_is_wrong_with_cityscapes_is_named(tmp_path):
    with pytest.raises(ArgumentError, match="no images of train found. Cityscapes is the folders"):
        cityscapes(tmp_path)
    with pytest.raises(ArgumentError, match="split must be 'train' or 'val', got 'test'"):
        cityscapes(tmp_path, "test")
    (tmp_path / "train").mkdir()
    image_of(quarters([(0, 0, 0)] * 4, 8), "RGB").save(tmp_path / "train" / "1.png")
    with pytest.raises(ArgumentError, match=r"1.png: expected two squares side by side, found 8x8 pixels"):
        cityscapes(tmp_path)
    write_pair(tmp_path / "train" / "1.png")
    whole = (tmp_path / "train" / "1.png").read_bytes()
    for content in (whole[: len(whole) // 2], whole[:40], b"<html>"):
        (tmp_path / "train" / "1.png").write_bytes(content)
        with pytest.raises(ArgumentError, match=r"1.png: expected a PNG or JPEG image, found"):
            cityscapes(tmp_path)


def test_labels_of_official_cityscapes_must_fit_their_photo(tmp_path):
    ids = write_official(tmp_path)
    image_of(quarters([7, 7, 7, 7], 8), "L").save(ids)
    with pytest.raises(
        ArgumentError, match="expected one byte for each of 32x32 pixels, found mode L and 8x8"
    ):
        cityscapes(tmp_path)
    ids.unlink()
    with pytest.raises(
        ArgumentError, match="labelIds.png: no such file, the labels of ulm_0_0_leftImg8bit.png"
    ):
        cityscapes(tmp_path)
