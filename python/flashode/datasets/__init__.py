"""Data for the examples and tests of models: densities in the plane, motions, and images; nothing is downloaded."""

from .motion import Spirals, linear_spiral, lotka_volterra, pendulum, spiral_trajectories

__all__ = [
    "Spirals",
    "linear_spiral",
    "lotka_volterra",
    "pendulum",
    "spiral_trajectories",
]
