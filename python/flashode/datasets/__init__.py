"""Data for the examples and tests of models: densities in the plane, motions, and images; nothing is downloaded."""

from .planar import (
    annulus,
    checkerboard,
    circles,
    eight_gaussians,
    flip_1d,
    image_points,
    moons,
    pinwheel,
    two_spirals,
)

__all__ = [
    "annulus",
    "checkerboard",
    "circles",
    "eight_gaussians",
    "flip_1d",
    "image_points",
    "moons",
    "pinwheel",
    "two_spirals",
]
