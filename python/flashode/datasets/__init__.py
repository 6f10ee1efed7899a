"""Data for the examples and tests of models: densities in the plane, motions, and images; nothing is downloaded."""

from .files import CITYSCAPES_CLASSES, VOID, cifar10, cityscapes, mnist
from .images import SCENE_CLASSES, SHAPES, Labelled, digits, scenes, shapes
from .motion import Spirals, linear_spiral, lotka_volterra, pendulum, spiral_trajectories
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
    "CITYSCAPES_CLASSES",
    "Labelled",
    "SCENE_CLASSES",
    "SHAPES",
    "Spirals",
    "VOID",
    "annulus",
    "checkerboard",
    "cifar10",
    "circles",
    "cityscapes",
    "digits",
    "eight_gaussians",
    "flip_1d",
    "image_points",
    "linear_spiral",
    "lotka_volterra",
    "mnist",
    "moons",
    "pendulum",
    "pinwheel",
    "scenes",
    "shapes",
    "spiral_trajectories",
    "two_spirals",
]
