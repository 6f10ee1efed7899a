"""Data for the examples and tests of models: densities in the plane, motions, and images; nothing is downloaded."""

from .files import CITYSCAPES_CLASSES, VOID, cifar10, cityscapes, mnist
from .images import SCENE_CLASSES, SHAPES, Labelled, digits, scenes, shapes
from .motion import Spirals, linear_spiral, lotka_volterra, pendulum, spiral_trajectories

__all__ = [
    "CITYSCAPES_CLASSES",
    "Labelled",
    "SCENE_CLASSES",
    "SHAPES",
    "Spirals",
    "VOID",
    "cifar10",
    "cityscapes",
    "digits",
    "linear_spiral",
    "lotka_volterra",
    "mnist",
    "pendulum",
    "scenes",
    "shapes",
    "spiral_trajectories",
]
