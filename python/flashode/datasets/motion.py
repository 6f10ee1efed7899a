"""Motions: Lotka and Volterra's animals, a pendulum, and spirals in the plane."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .. import ArgumentError, ArgumentTypeError, odeint
from ..arguments import check_times, kind_of, require_generator, require_number, require_whole


def lotka_volterra(t, y0=(1.0, 2.0)) -> torch.Tensor:
    """Prey and predators, ``x' = x - x y``, ``y' = x y - y`` (Lotka 1925, Volterra 1926).

    Solutions are closed curves: ``x - log x + y - log y`` is conserved.

    Args:
        t: Tensor (T,) of times, strictly increasing or decreasing; ``y0`` is the state at the first.
        y0: prey and predators, two numbers or a Tensor (..., 2).

    Returns:
        Tensor (T, ..., 2) of the dtype of ``t``, solved to 9 digits, in float32 to what it has.
    """

    def field(t, state):
        prey, predators = state.unbind(-1)
        met = prey * predators
        return torch.stack([prey - met, met - predators], -1)

    return _motion(field, y0, t)


def pendulum(t, y0=(1.0, 0.0)) -> torch.Tensor:
    """A pendulum without friction, ``theta' = -p``, ``p' = sin theta``.

    The energy ``p**2 / 2 - cos theta`` is conserved. ``p`` is counted against the angle.

    Args:
        t: Tensor (T,) of times, strictly increasing or decreasing; ``y0`` is the state at the first.
        y0: angle and momentum, two numbers or a Tensor (..., 2).

    Returns:
        Tensor (T, ..., 2) of the dtype of ``t``, solved to 9 digits, in float32 to what it has.
    """

    def field(t, state):
        angle, momentum = state.unbind(-1)
        return torch.stack([-momentum, torch.sin(angle)], -1)

    return _motion(field, y0, t)


def linear_spiral(t, A=((-0.1, -1.0), (1.0, -0.1)), y0=(2.0, 0.0)) -> torch.Tensor:
    """Solutions ``exp(A (t - t[0])) y0`` of ``y' = A y``, in closed form.

    Args:
        t: Tensor (T,) of times, in any order; ``y0`` is the state at the first.
        A: D x D numbers.
        y0: D numbers, or a Tensor (..., D).

    Returns:
        Tensor (T, ..., D) of the dtype of ``t``.
    """
    check_times(t, "t")
    A, y0 = _numbers("A", A, t), _numbers("y0", y0, t)
    if A.ndim != 2 or A.shape[0] != A.shape[1] or y0.shape[-1:] != A.shape[:1]:
        raise ArgumentError(
            f"A must be a D x D matrix and y0 of shape (..., D), got shapes {tuple(A.shape)} and {tuple(y0.shape)}"
        )
    flows = torch.matrix_exp((t - t[0])[:, None, None] * A)
    return torch.einsum("tij,...j->t...i", flows, y0)


class Spirals(NamedTuple):
    """Spirals as they were observed, and as they are.

    Attributes:
        times: (n, points), ascending in every row.
        values: (n, points, 2), the positions at ``times`` with their noise.
        clockwise: (n,), bool.
        grid: (2 points,), evenly spaced, from 0 to twice the ``duration`` of the observations.
        curves: (n, 2 points, 2), the positions at the times of ``grid``, without noise.
    """

    times: torch.Tensor
    values: torch.Tensor
    clockwise: torch.Tensor
    grid: torch.Tensor
    curves: torch.Tensor


def spiral_trajectories(
    n, points=100, *, noise=0.05, duration=2 * math.pi, generator=None, dtype=torch.float32
) -> Spirals:
    """Spirals from random starts, half of them clockwise, each observed at random times of its own.

    The set-up of Chen et al. 2018 (Neural Ordinary Differential Equations, section 5.1): what is later than
    ``duration`` is not observed, and is there for extrapolations to be compared with. Spirals are
    Archimedes': a point at unit angular speed on a radius that grows linearly, from a random angle
    and a random radius of 0.5 to 1, by 0.1 a unit of time.

    Args:
        n: how many spirals; of an odd number, one more is counter-clockwise.
        points: observations of each, at times drawn evenly from 0 to ``duration``.
        noise: standard deviation of the Gaussian noise of every coordinate.
        duration: how long each is observed; a turn takes 2 pi.
        generator: of the starts, the times and the noise.
        dtype: of all tensors but ``clockwise``.
    """
    require_whole("n", n)
    require_whole("points", points)
    require_number("noise", noise, "a standard deviation", zero=True)
    require_number("duration", duration, "a length of time")
    require_generator(generator)
    if dtype not in (torch.float32, torch.float64):
        raise ArgumentTypeError(f"dtype must be torch.float32 or torch.float64, got {dtype!r}")
    random = {"generator": generator, "dtype": dtype}
    angle = 2 * math.pi * torch.rand(n, 1, **random)
    radius = 0.5 + 0.5 * torch.rand(n, 1, **random)
    clockwise = (torch.arange(n) < n // 2)[torch.randperm(n, generator=generator)]
    turn = torch.where(clockwise, -1, 1)[:, None]

    def positions(t):
        return (radius + 0.1 * t)[..., None] * torch.stack(
            [torch.cos(angle + turn * t), torch.sin(angle + turn * t)], -1
        )

    times = duration * torch.rand(n, points, **random).sort(1).values
    values = positions(times)
    values = values + noise * torch.randn(values.shape, **random)
    grid = torch.linspace(0, 2 * duration, 2 * points, dtype=dtype)
    return Spirals(times, values, clockwise, grid, positions(grid))


def _motion(field, y0, t):
    check_times(t, "t")
    y0 = _numbers("y0", y0, t)
    if y0.shape[-1:] != (2,):
        raise ArgumentError(f"y0 must be two numbers or of shape (..., 2), got shape {tuple(y0.shape)}")
    tolerance = 1e-9 if t.dtype == torch.float64 else 1e-6
    return odeint(field, y0, t, method="dopri8", rtol=tolerance, atol=tolerance)


def _numbers(name, value, t) -> torch.Tensor:
    """A Tensor of the dtype and on the device of ``t``."""
    try:
        numbers = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):  # as torch has it of words, ragged lists, and others
        raise ArgumentTypeError(
            f"{name} must be numbers, nested evenly, or a Tensor, got {kind_of(value)}"
        ) from None
    if numbers.is_complex():
        raise ArgumentTypeError(f"{name} must be real, got {numbers.dtype}")
    return numbers.to(t)
