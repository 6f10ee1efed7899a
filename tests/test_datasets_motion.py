"""Motions against their conserved quantities and closed forms, and spirals against what they are said to be."""

import math

import pytest
import torch

import flashode
from flashode.datasets import linear_spiral, lotka_volterra, pendulum, spiral_trajectories

F64 = torch.float64


def test_animals_keep_to_their_closed_curves():
    ys = lotka_volterra(torch.linspace(0, 20, 201, dtype=F64))
    assert ys.shape == (201, 2) and ys[0].tolist() == [1, 2]
    conserved = (ys - ys.log()).sum(-1)
    torch.testing.assert_close(conserved, conserved[0].expand(201), rtol=0, atol=1e-7)
    assert ys[:, 0].min() < 0.5 and ys[:, 0].max() > 1.9  # they do move


def test_prey_grow_alone_and_predators_die_alone():
    t = torch.linspace(0, 2, 5, dtype=F64)
    ys = lotka_volterra(t, [[1.0, 0.0], [0.0, 1.0]])
    expected = torch.stack([torch.stack([t.exp(), 0 * t], -1), torch.stack([0 * t, (-t).exp()], -1)], 1)
    torch.testing.assert_close(ys, expected, rtol=1e-8, atol=1e-8)


def test_a_pendulum_keeps_its_energy_and_has_the_period_of_its_amplitude():
    amplitude = 2.0
    mean, other = 1.0, math.cos(amplitude / 2)  # the period by the arithmetic-geometric mean
    for _ in range(8):
        mean, other = (mean + other) / 2, math.sqrt(mean * other)
    ys = pendulum(torch.linspace(0, 2 * math.pi / mean, 101, dtype=F64), (amplitude, 0.0))
    energy = ys[:, 1] ** 2 / 2 - ys[:, 0].cos()
    torch.testing.assert_close(energy, energy[0].expand(101), rtol=0, atol=1e-7)
    torch.testing.assert_close(ys[-1], ys[0], rtol=0, atol=1e-7)
    torch.testing.assert_close(ys[50], -ys[0], rtol=0, atol=1e-7)
    assert ys[1, 1] > 0  # p' = sin theta: the momentum is counted against the angle


def test_a_linear_spiral_solves_its_equation():
    t = torch.linspace(1, 5, 9, dtype=F64)
    A, y0 = torch.tensor([[-0.3, 2.0], [-1.0, 0.1]], dtype=F64), torch.randn(4, 2, dtype=F64)
    solved = flashode.odeint(lambda t, y: y @ A.T, y0, t, method="dopri8", rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(linear_spiral(t, A, y0), solved, rtol=1e-8, atol=1e-8)
    turn = linear_spiral(torch.tensor([0, 2 * math.pi], dtype=F64))
    expected = turn[0] * math.exp(-0.2 * math.pi)
    torch.testing.assert_close(turn[1], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("solve", [lotka_volterra, pendulum])
def test_motions_have_the_dtype_of_their_times(solve):
    assert solve(torch.linspace(0, 1, 3)).dtype == torch.float32
    assert solve(torch.linspace(0, 1, 3), torch.ones(5, 2, dtype=F64)).shape == (3, 5, 2)


def turns(xy):
    """Angles by which points move on around the origin, positive where counter-clockwise."""
    a, b = xy[:, :-1], xy[:, 1:]
    return torch.atan2(a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0], (a * b).sum(-1))


def test_half_of_the_spirals_are_clockwise_and_all_grow():
    spirals = spiral_trajectories(50, 40, dtype=F64)
    assert spirals.clockwise.sum() == 25
    step = spirals.grid[1]
    direction = torch.where(spirals.clockwise, -1.0, 1.0).to(F64)[:, None]
    torch.testing.assert_close(turns(spirals.curves), (direction * step).expand(50, 79))
    radii = spirals.curves.norm(dim=-1)
    assert 0.5 <= radii[:, 0].min() < 0.6 < 0.9 < radii[:, 0].max() <= 1
    torch.testing.assert_close(radii.diff(dim=1), (0.1 * step).expand(50, 79))


def test_spirals_are_observed_at_times_of_their_own_within_the_duration():
    spirals = spiral_trajectories(20, 100, duration=3.0)
    assert spirals.times.shape == (20, 100) and spirals.values.shape == (20, 100, 2)
    assert (spirals.times.diff(dim=1) >= 0).all()
    assert spirals.times.min() >= 0 and spirals.times.max() <= 3 and spirals.times[:, -1].min() > 2.5
    assert len(spirals.times.flatten().unique()) > 1900
    assert spirals.grid.shape == (200,) and spirals.grid[-1] == 6


def test_observations_are_the_curves_with_noise():
    """Between neighbours on a fine grid the curves are straight."""
    spirals = spiral_trajectories(30, 2000, noise=0.1, dtype=F64)
    place = spirals.times / spirals.grid[1]
    left = place.long()
    rows = torch.arange(30)[:, None]
    share = (place - left)[..., None]
    clean = (1 - share) * spirals.curves[rows, left] + share * spirals.curves[rows, left + 1]
    residuals = spirals.values - clean
    assert abs(residuals.std() - 0.1) < 0.001 and abs(residuals.mean()) < 0.001
    assert abs(torch.corrcoef(residuals.reshape(-1, 2).T)[0, 1]) < 0.02


def test_a_generator_makes_the_same_spirals_again():
    made = [spiral_trajectories(4, 5, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert all(torch.equal(a, b) for a, b in zip(made[0], made[1]))
    assert not torch.equal(made[0].values, made[2].values)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spiral_trajectories(0), "n must be at least 1, got 0"),
        (lambda: spiral_trajectories(3, noise=-1.0), "noise must be finite and not negative"),
        (lambda: spiral_trajectories(3, noise=math.nan), "noise must be finite and not negative"),
        (lambda: spiral_trajectories(3, duration=0.0), "duration must be finite and positive"),
        (lambda: pendulum(torch.arange(3.0), (1.0, 2.0, 3.0)), r"y0 must be two numbers .* got shape \(3,\)"),
        (lambda: lotka_volterra(torch.arange(3.0), 1.0), r"y0 must be two numbers .* got shape \(\)"),
        (lambda: linear_spiral(torch.arange(3.0), torch.ones(2, 3)), r"A must be a D x D matrix"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(flashode.ArgumentError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spiral_trajectories(True), "n must be an int, a whole number of 1 or more, got bool True"),
        (lambda: spiral_trajectories(3, points=2.5), "points must be an int, .* got float 2.5"),
        (lambda: spiral_trajectories(3, noise="a"), "noise must be a number, a standard deviation, got str 'a'"),
        (lambda: spiral_trajectories(3, dtype=torch.int64), "dtype must be torch.float32 or torch.float64"),
        (lambda: lotka_volterra(3), "t must be a torch.Tensor, got int 3"),
        (lambda: pendulum([0.0, 1.0]), "t must be a torch.Tensor, got list"),
        (lambda: linear_spiral(torch.arange(3)), "`t` must be a floating point Tensor but is a torch.int64"),
        (lambda: pendulum(torch.arange(3.0), None), "y0 must be numbers, nested evenly, .* got None"),
        (lambda: linear_spiral(torch.arange(3.0), [[1.0], [1.0, 2.0]]), "A must be numbers, .* got list"),
        (lambda: lotka_volterra(torch.arange(3.0), torch.ones(2) * 1j), "y0 must be real"),
    ],
)  # fmt: skip
def test_what_is_of_another_type_is_refused(call, message):
    with pytest.raises(flashode.ArgumentTypeError, match=message):
        call()
