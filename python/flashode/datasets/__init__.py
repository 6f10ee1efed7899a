"""Data for the examples and tests of models: densities in the plane, motions, and images; nothing is downloaded."""

from .files import CITYSCAPES_CLASSES, VOID, cifar10, cityscapes, mnist
from .images import SCENE_CLASSES, SHAPES, Labelled, digits, scenes, shapes

__all__ = [
    "CITYSCAPES_CLASSES",
    "Labelled",
    "SCENE_CLASSES",
    "SHAPES",
    "VOID",
    "cifar10",
    "cityscapes",
    "digits",
    "mnist",
    "scenes",
    "shapes",
]
