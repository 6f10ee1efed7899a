"""Points in the plane: densities to be learned, and classes to be told apart; and the flip of the line.

All are of about the size of a standard normal distribution, two or three across from the origin.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from .. import ArgumentError, ArgumentTypeError
from ..arguments import real_number, require_generator, require_number, require_whole


def moons(n, *, noise=0.1, generator=None):
    """Two half circles of radius 1, each reaching into the other, around (0, 0) above and (1, 0.5) below.

    Args:
        n: number of points.
        noise: standard deviation of the Gaussian noise on both coordinates.
        generator: `torch.Generator` to draw from; the same state gives the same points. torch's own by default.

    Returns:
        Points, float32 of shape (n, 2), and labels, int64 of shape (n,), 0 and 1 in turns: any two
        neighbours are of different classes.

    Raises:
        ArgumentError, ArgumentTypeError: ``n`` is not a positive int, or ``noise`` is negative.
    """
    labels = _labels(n, generator)
    angle = math.pi * torch.rand(n, generator=generator)
    upper = torch.stack([angle.cos(), angle.sin()], -1)
    lower = torch.tensor([1.0, 0.5]) - upper
    return _blurred(torch.where(labels[:, None] == 0, upper, lower), noise, generator), labels


def circles(n, *, noise=0.1, generator=None):
    """Two concentric circles, of radius 1 (label 0) and 2 (label 1). Arguments and returns as `moons`."""
    labels = _labels(n, generator)
    return _blurred((1.0 + labels)[:, None] * _directions(n, generator), noise, generator), labels


def pinwheel(n, *, noise=0.2, generator=None):
    """Five arms, each a Gaussian stretched along its radius and then wound up.

    Args:
        n, generator: as for `moons`.
        noise: standard deviation across an arm; along it is 0.6.

    Returns:
        Points, float32 of shape (n, 2).

    Raises:
        As `moons`.
    """
    _require_draw(n, generator)
    require_number("noise", noise, "a standard deviation", zero=True)
    along, across = torch.randn(2, n, generator=generator)
    along, across = 2 + 0.6 * along, noise * across
    arm = torch.randint(5, (n,), generator=generator) * (2 * math.pi / 5)
    angle = arm + 0.25 * (along / 2).exp()
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([along * cos - across * sin, along * sin + across * cos], -1)


def eight_gaussians(n, *, noise=0.2, generator=None):
    """Eight equal Gaussians around points of the circle of radius 2, the first at (2, 0).

    Args:
        n, generator: as for `moons`.
        noise: standard deviation of each.

    Returns:
        Points, float32 of shape (n, 2).

    Raises:
        As `moons`.
    """
    _require_draw(n, generator)
    angle = torch.randint(8, (n,), generator=generator) * (math.pi / 4)
    return _blurred(2 * torch.stack([angle.cos(), angle.sin()], -1), noise, generator)


def checkerboard(n, *, noise=0.0, generator=None):
    """Uniform on the dark squares of a board of 4 x 4 unit squares around the origin; that at (-2, -2) is dark.

    Arguments, returns and errors as `eight_gaussians`.
    """
    _require_draw(n, generator)
    column, pair = torch.randint(4, (n,), generator=generator), torch.randint(2, (n,), generator=generator)
    square = torch.stack([column, 2 * pair + column % 2], -1)
    return _blurred(square - 2 + torch.rand(n, 2, generator=generator), noise, generator)


def two_spirals(n, *, noise=0.05, generator=None):
    """Two Archimedean spirals from the origin out to radius 2, one and a half turns, one opposite to the other.

    Arguments, returns and errors as `moons`.
    """
    labels = _labels(n, generator)
    part = torch.rand(n, generator=generator).sqrt()  # of the way out; so that points are spread evenly
    angle = 3 * math.pi * part + math.pi * labels
    return _blurred(
        (2 * part)[:, None] * torch.stack([angle.cos(), angle.sin()], -1), noise, generator
    ), labels


def annulus(n, *, noise=0.0, generator=None):
    """A disc of radius 0.5 (label 0) inside of a ring from radius 1 to 1.5 (label 1), each filled evenly.

    No homeomorphism of the plane makes the two linearly separable (Dupont et al. 2019, Augmented neural ODEs,
    arXiv:1904.01681). Arguments, returns and errors as `moons`.
    """
    labels = _labels(n, generator)
    inner, outer = labels * 1.0, 0.5 + labels
    radius = (inner**2 + (outer**2 - inner**2) * torch.rand(n, generator=generator)).sqrt()
    return _blurred(radius[:, None] * _directions(n, generator), noise, generator), labels


def flip_1d(n, *, noise=0.0, generator=None):
    """Points of the line around -1 and 1 in turns, and where they are to go: 1 and -1.

    No flow of the line does that, as its paths would cross (Dupont et al. 2019, arXiv:1904.01681).

    Args:
        n, generator: as for `moons`.
        noise: standard deviation of the noise on the points; the targets have none.

    Returns:
        Points and targets, each float32 of shape (n, 1).

    Raises:
        As `moons`.
    """
    points = (2.0 * _labels(n, generator) - 1)[:, None]
    return _blurred(points, noise, generator), -points


def image_points(image, n, *, threshold=None, generator=None):
    """Points of the density that a grey image shows: as dense as it is dark, even inside of a pixel.

    Args:
        image: path of a picture (read by Pillow, colours are made grey); or Tensor of shape (H, W) or (1, H, W),
            uint8 from 0 (black) to 255 or floating point from 0 to 1.
        n: number of points.
        threshold: between 0 and 1; pixels darker than it count alike, and others not at all. None: all
            pixels, in proportion to their darkness.
        generator: as for `moons`.

    Returns:
        Points, float32 of shape (n, 2), x to the right and y upwards. The longer side of the image reaches
        from -2 to 2, the centre is the origin.

    Raises:
        ArgumentError, ArgumentTypeError: of ``image``, ``n`` or ``threshold``; nothing in the image is dark.
        OSError: the file cannot be read.
    """
    _require_draw(n, generator)
    weight = 1 - _grey(image)
    if threshold is not None:
        number = real_number(threshold)
        if number is None or not 0 < number < 1:
            raise ArgumentError(f"threshold must be between 0 (black) and 1 (white), got {threshold!r}")
        weight = (weight > 1 - threshold).double()
    if not weight.sum() > 0:
        raise ArgumentError("image has no dark pixel to put points into; is it inverted? Give 1 - image")
    height, width = weight.shape
    # By inversion: torch.multinomial has a limit of 2^24 pixels.
    filled = weight.flatten().cumsum(0)
    drawn = filled[-1] * torch.rand(n, dtype=torch.float64, generator=generator)
    pixel = torch.searchsorted(filled, drawn, right=True).clamp(max=len(filled) - 1)
    inside = torch.rand(n, 2, dtype=torch.float64, generator=generator)
    x = pixel % width + inside[:, 0] - width / 2
    y = height / 2 - pixel // width - inside[:, 1]
    return (torch.stack([x, y], -1) * (4 / max(height, width))).float()


def _grey(image) -> torch.Tensor:
    """Brightness from 0 to 1 of every pixel, float64 of shape (H, W)."""
    if isinstance(image, (str, Path)):
        from PIL import Image

        with Image.open(image) as opened:
            grey = opened.convert("L")
            image = torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).view(
                grey.height, grey.width
            )
    if not isinstance(image, torch.Tensor):
        raise ArgumentTypeError(f"image must be a path or a Tensor, got {type(image).__name__}")
    shape = tuple(image.shape)
    if len(shape) == 3 and shape[0] == 1:
        image = image[0]
    if image.ndim != 2 or image.numel() == 0:
        raise ArgumentError(f"image must be grey, of shape (H, W) or (1, H, W), got shape {shape}")
    if image.dtype == torch.uint8:
        return image.cpu().double() / 255
    if not image.is_floating_point():
        raise ArgumentTypeError(f"image must be uint8 or floating point, got {image.dtype}")
    image = image.detach().cpu().double()
    if not bool(((image >= 0) & (image <= 1)).all()):  # not so for nan either
        low, high = image.min().item(), image.max().item()
        raise ArgumentError(f"image must be between 0 (black) and 1 (white), got values from {low} to {high}")
    return image


def _labels(n, generator) -> torch.Tensor:
    _require_draw(n, generator)
    return torch.arange(n) % 2


def _directions(n, generator) -> torch.Tensor:
    angle = 2 * math.pi * torch.rand(n, generator=generator)
    return torch.stack([angle.cos(), angle.sin()], -1)


def _blurred(points, noise, generator) -> torch.Tensor:
    require_number("noise", noise, "a standard deviation", zero=True)
    return points + noise * torch.randn(points.shape, generator=generator) if noise else points


def _require_draw(n, generator):
    require_whole("n", n)
    require_generator(generator)
