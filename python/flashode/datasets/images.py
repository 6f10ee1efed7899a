"""Small images with labels: scikit-learn's handwritten digits, drawn shapes, and street scenes labelled by pixel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch.nn.functional import interpolate

from ..arguments import kind_of, require_generator, require_whole
from ..errors import ArgumentError, ArgumentTypeError

SCENE_CLASSES = ("sky", "building", "tree", "pavement", "road", "car", "person")


class Labelled(NamedTuple):
    """Images and what is in them.

    images: float32 in [0, 1], (N, channels, H, W). labels: int64, (N,) of whole images, (N, H, W) of pixels.
    """

    images: torch.Tensor
    labels: torch.Tensor


def digits() -> tuple[Labelled, Labelled]:
    """The handwritten digits that come with scikit-learn: 1,797 images of 8x8 pixels.

    Every third one is a test image. The rows of one writer follow each other, so that a test digit's writer has
    written digits to train on too: errors here say nothing about writers never seen.

    Returns:
        Training images (1198, 1, 8, 8) with their labels 0 to 9, and test images (599, 1, 8, 8) with theirs.

    Raises:
        ImportError: scikit-learn is not installed.

    Source: Alpaydin, Kaynak 1998, Optical Recognition of Handwritten Digits, UCI.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError("flashode.datasets.digits needs scikit-learn: pip install scikit-learn") from None
    bunch = load_digits()
    images = torch.as_tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    labels = torch.as_tensor(bunch.target, dtype=torch.int64)
    test = torch.arange(len(labels)) % 3 == 2
    return Labelled(images[~test], labels[~test]), Labelled(images[test], labels[test])


SHAPES = ("disc", "ring", "half disc", "crescent", "square", "frame", "bar", "cross", "triangle", "star")


def shapes(n: int, size: int = 32, generator: torch.Generator | None = None) -> Labelled:
    """Synthetic colour images of `SHAPES`, one in each: any place, turn and size, on a mottled ground of any colour.

    Every shape has a hue that is usual for it, and that leaves doubts.

    Args:
        n: how many.
        size: pixels of a side, at least 8.
        generator: of all randomness; torch's own by default.

    Returns:
        Images (n, 3, size, size) and labels (n,), places in `SHAPES`.

    Raises:
        ArgumentError, ArgumentTypeError: an argument cannot be used.
    """
    _require_draw(n, size, 8, generator)

    def between(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, 1, 1, generator=generator)

    labels = torch.randint(len(SHAPES), (n,), generator=generator)
    middles = (torch.arange(size) + 0.5) * (2 / size) - 1
    y, x = torch.meshgrid(middles, middles, indexing="ij")
    radius, turn = between(0.4, 0.7), between(0, 2 * torch.pi)
    x, y = (x - between(-0.25, 0.25)) / radius, (y - between(-0.25, 0.25)) / radius
    u, v = turn.cos() * x + turn.sin() * y, turn.cos() * y - turn.sin() * x
    inside = _insides(u, v).gather(1, labels[:, None, None, None].expand(-1, 1, size, size))
    spots = torch.randn(n, 3, size // 4, size // 4, generator=generator)
    ground = between(0.2, 0.8, 3) + 0.1 * interpolate(spots, (size, size), mode="bilinear")
    grain = 0.05 * torch.randn(n, 3, size, size, generator=generator)
    phase = 2 * torch.pi * (labels[:, None] / len(SHAPES) + torch.arange(3) / 3)
    colour = 0.5 + 0.4 * phase.cos()[..., None, None] + between(-0.2, 0.2, 3)
    images = torch.where(inside, colour, ground) + grain
    return Labelled(images.clamp(0, 1), labels)


def _insides(u, v):
    """Which points (n, size, size) are inside each of the shapes of radius 1, as (n, shapes, size, size)."""
    r, longer, shorter = u.hypot(v), torch.maximum(u.abs(), v.abs()), torch.minimum(u.abs(), v.abs())
    edges = torch.stack([v, -0.5 * v + 0.866 * u, -0.5 * v - 0.866 * u])  # distance along three normals
    return torch.stack(
        [
            r < 0.9,
            (r < 1) & (r > 0.55),
            (r < 1) & (u > -0.1),
            (r < 1) & ((u - 0.45).hypot(v) > 0.75),
            longer < 0.75,
            (longer < 0.85) & (longer > 0.5),
            (u.abs() < 1) & (v.abs() < 0.3),
            (longer < 0.9) & (shorter < 0.28),
            edges.amax(0) < 0.55,
            r < 0.65 + 0.35 * (5 * torch.atan2(v, u)).cos(),
        ],
        1,
    )


def _require_draw(n, size, least, generator):
    require_whole("n", n)
    require_whole("size", size, least)
    require_generator(generator)


def scenes(
    n: int, size: int = 64, classes=SCENE_CLASSES, generator: torch.Generator | None = None
) -> Labelled:
    """Synthetic street scenes for segmentation: a road between houses, trees, cars and people, seen from a car.

    Shapes are simple; light, colours and textures vary so much that colour alone does not tell the classes apart.

    Args:
        n: how many.
        size: pixels of a side, at least 16.
        classes: which of `SCENE_CLASSES` to draw; ``"sky"`` is behind all of them. A label is a place in it.
        generator: of all randomness; torch's own by default.

    Returns:
        Images (n, 3, size, size) and labels (n, size, size).

    Raises:
        ArgumentError, ArgumentTypeError: an argument cannot be used.
    """
    if isinstance(classes, str) or not isinstance(classes, Iterable):
        raise ArgumentTypeError(f"classes must be several of {SCENE_CLASSES}, got {kind_of(classes)}")
    classes = tuple(classes)
    unknown = [name for name in classes if name not in SCENE_CLASSES]
    if unknown or "sky" not in classes or len(set(classes)) < len(classes):
        raise ArgumentError(
            f"classes must be different ones of {SCENE_CLASSES}, 'sky' among them, got {classes}"
        )
    _require_draw(n, size, 16, generator)
    drawn = [_Scene(size, classes, generator).draw() for _ in range(n)]
    return Labelled(torch.stack([s.image for s in drawn]), torch.stack([s.labels for s in drawn]))


class _Scene:
    """One scene; x goes to the right and y down, both from 0 to 1. What is painted later is in front."""

    COLOURS = {
        "sky": (0.62, 0.72, 0.84), "building": (0.55, 0.47, 0.42), "tree": (0.30, 0.42, 0.26),
        "pavement": (0.60, 0.57, 0.55), "road": (0.40, 0.40, 0.42), "car": (0.45, 0.35, 0.38),
        "person": (0.50, 0.38, 0.36),
    }  # fmt: skip
    # How far a thing's colour may be from that, and how strong its texture is.
    SPREAD = {"building": 0.13, "car": 0.30, "person": 0.25, "sky": 0.08}
    TEXTURE = {"tree": 0.16, "pavement": 0.07, "building": 0.05}

    def __init__(self, size, classes, generator):
        self.size, self.classes, self.generator = size, classes, generator
        middles = (torch.arange(size) + 0.5) / size
        self.y, self.x = torch.meshgrid(middles, middles, indexing="ij")
        self.image = torch.zeros(3, size, size)
        self.labels = torch.zeros(size, size, dtype=torch.int64)

    def between(self, low, high) -> float:
        return low + (high - low) * torch.rand((), generator=self.generator).item()

    def times(self, low, high) -> range:
        return range(int(self.between(low, high + 1)))

    def noise(self, cells, channels=1):
        """Smooth noise of about ``cells`` spots a side and a standard deviation of about 1."""
        coarse = torch.randn(1, channels, cells, cells, generator=self.generator)
        return interpolate(coarse, (self.size, self.size), mode="bilinear")[0]

    def paint(self, name, mask):
        """Paints a thing of a class, in a colour and a texture of its own."""
        if name not in self.classes:
            return
        spread = self.SPREAD.get(name, 0.05)
        shift = torch.tensor([self.between(-spread, spread) for _ in range(3)])
        colour = torch.tensor(self.COLOURS[name]) + shift
        texture = self.TEXTURE.get(name, 0.03) * self.noise(self.size // 4)
        self.image = torch.where(mask, colour[:, None, None] + texture, self.image)
        self.labels = torch.where(mask, self.classes.index(name), self.labels)

    def shade(self, mask, factor):
        """Darkens or brightens what is there: windows, shadows."""
        self.image = torch.where(mask, self.image * factor, self.image)

    def box(self, left, top, right, bottom):
        return (self.x >= left) & (self.x < right) & (self.y >= top) & (self.y < bottom)

    def oval(self, x, y, width, height):
        return ((self.x - x) / width).square() + ((self.y - y) / height).square() < 1

    def draw(self):
        self.horizon, self.vanishing = self.between(0.35, 0.5), self.between(0.35, 0.65)
        self.paint("sky", self.y >= 0)
        self.buildings()
        self.ground()
        self.trees()
        for depth in sorted(self.between(0.1, 0.9) for _ in self.times(1, 4)):
            self.car(depth)
        for depth in sorted(self.between(0.1, 0.7) for _ in self.times(1, 4)):
            self.person(depth)
        light = self.between(0.65, 1.2) + 0.08 * self.noise(2) + self.between(-0.25, 0.25) * (self.x - 0.5)
        grain = 0.03 * torch.randn(self.image.shape, generator=self.generator)
        self.image = (self.image * light + grain).clamp(0, 1)
        return self

    def buildings(self):
        left = self.between(-0.1, 0.1)
        while left < 1:
            width, top = self.between(0.1, 0.3), self.between(0.02, self.horizon)
            house = self.box(left, top, left + width, self.horizon + 0.06)
            self.paint("building", house)
            pitch = self.between(0.05, 0.1)
            panes = ((self.x - left) % pitch > 0.4 * pitch) & ((self.y - top) % pitch > 0.5 * pitch)
            if "building" in self.classes:
                self.shade(house & panes, self.between(0.5, 1.3))
            left += width + self.between(-0.05, 0.12)

    def ground(self):
        below = self.y >= self.horizon + 0.03
        self.paint("pavement", below)
        depth = (self.y - self.horizon) / (1 - self.horizon)
        middle = self.vanishing + (0.5 - self.vanishing) * depth
        self.half_road = self.between(0.3, 0.48)
        self.paint("road", below & ((self.x - middle).abs() < 0.04 + self.half_road * depth))

    def place(self, depth, aside):
        """Where something stands: ``depth`` from 0 at the horizon to 1, ``aside`` from -1 to 1 across the road."""
        y = self.horizon + 0.06 + (0.94 - self.horizon) * depth
        return self.vanishing + (0.5 - self.vanishing) * depth + aside * (0.04 + self.half_road * depth), y

    def trees(self):
        for _ in self.times(0, 3):
            x, y, size = self.between(0, 1), self.horizon + 0.06, self.between(0.06, 0.13)
            if abs(x - self.vanishing) < 0.15:
                continue  # not on the road
            crown = self.oval(x, y - 1.6 * size, size, 1.1 * size)
            self.paint("tree", crown | self.box(x - size / 6, y - size, x + size / 6, y))

    def car(self, depth):
        x, y = self.place(depth, self.between(-0.6, 0.6))
        half, tall = 0.05 + 0.10 * depth, 0.05 + 0.10 * depth
        body = self.box(x - half, y - tall, x + half, y)
        cabin = self.box(x - 0.7 * half, y - 1.7 * tall, x + 0.7 * half, y - tall)
        wheels = self.oval(x - 0.6 * half, y, half / 4, half / 4) | self.oval(
            x + 0.6 * half, y, half / 4, half / 4
        )
        self.paint("car", body | cabin | wheels)
        if "car" in self.classes:
            self.shade(wheels | self.box(x - 0.55 * half, y - 1.6 * tall, x + 0.55 * half, y - tall), 0.4)

    def person(self, depth):
        side = 1 if self.between(-1, 1) > 0 else -1
        x, y = self.place(depth, side * self.between(1.05, 1.5))
        tall = 0.14 + 0.22 * depth
        head = self.oval(x, y - 0.92 * tall, 0.09 * tall, 0.09 * tall)
        self.paint("person", head | self.oval(x, y - 0.45 * tall, 0.16 * tall, 0.45 * tall))
