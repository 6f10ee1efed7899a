"""Points in the plane lie where their names say, as often as they should, and come again from the same generator."""

import math

import pytest
import torch

from flashode import ArgumentError, ArgumentTypeError, datasets

N = 20_000
DENSITIES = ("checkerboard", "eight_gaussians", "pinwheel")
CLASSES = ("annulus", "circles", "moons", "two_spirals")


def points_of(name, n=N, **kwargs):
    made = getattr(datasets, name)(n, **kwargs)
    return made if isinstance(made, torch.Tensor) else made[0]


@pytest.mark.parametrize("name", [*DENSITIES, *CLASSES])
def test_points_are_pairs_in_single_precision_of_the_size_of_a_normal(name):
    points = points_of(name)
    assert points.shape == (N, 2) and points.dtype == torch.float32
    assert points.abs().max() < 6 and 0.5 < points.square().sum(1).mean().sqrt() < 3


@pytest.mark.parametrize("name", [*DENSITIES, *CLASSES, "flip_1d"])
def test_the_same_generator_gives_the_same_points(name):
    one, same, other = (
        points_of(name, 50, noise=0.1, generator=torch.Generator().manual_seed(s)) for s in (3, 3, 4)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)
    torch.manual_seed(3)
    assert torch.equal(one, points_of(name, 50, noise=0.1))  # and torch's own serves where none is given


@pytest.mark.parametrize("name", CLASSES)
def test_classes_take_turns(name):
    points, labels = getattr(datasets, name)(7)
    assert labels.tolist() == [0, 1, 0, 1, 0, 1, 0] and labels.dtype == torch.int64 and len(points) == 7


def test_moons_without_noise_are_half_circles():
    points, labels = datasets.moons(N, noise=0.0)
    upper, lower = points[labels == 0], points[labels == 1] - torch.tensor([1.0, 0.5])
    for half, sign in ((upper, 1), (lower, -1)):
        torch.testing.assert_close(half.norm(dim=1), torch.ones(N // 2))
        assert (sign * half[:, 1] >= -1e-6).all()
        assert half[:, 0].mean().abs() < 0.03 and abs(sign * half[:, 1].mean() - 2 / math.pi) < 0.01


def test_circles_have_radius_one_and_two():
    points, labels = datasets.circles(N, noise=0.0)
    torch.testing.assert_close(points.norm(dim=1), 1.0 + labels)
    assert points.mean(0).abs().max() < 0.05
    noisy, _ = datasets.circles(N, noise=0.1)
    spread = noisy.norm(dim=1) - 1.0 - labels
    assert abs(spread.std() - 0.1) < 0.005


def test_a_pinwheel_has_five_arms():
    points = datasets.pinwheel(N, noise=0.01)
    turn = torch.tensor(2 * math.pi / 5)
    radius = points.norm(dim=1) / 2
    angle = torch.atan2(points[:, 1], points[:, 0]) - 0.25 * radius.exp()
    arm = torch.remainder(angle / turn + 0.5, 5).floor()  # unwound
    assert arm.long().bincount().tolist() == pytest.approx([N / 5] * 5, rel=0.06)
    assert (angle / turn - (angle / turn).round()).abs().median() < 0.01
    assert abs(radius.mean() - 1) < 0.01 and abs(radius.std() - 0.3) < 0.01


def test_eight_gaussians_are_equal_and_round():
    points = datasets.eight_gaussians(N, noise=0.2)
    angle = torch.arange(8) * math.pi / 4
    centres = 2 * torch.stack([angle.cos(), angle.sin()], -1)
    away, nearest = torch.cdist(points, centres).min(1)
    assert nearest.bincount().tolist() == pytest.approx([N / 8] * 8, rel=0.08)
    assert abs(away.square().mean() - 2 * 0.2**2) < 0.002
    assert (away < 0.6).float().mean() == pytest.approx(1 - math.exp(-4.5), abs=3e-3)


def test_a_checkerboard_fills_its_dark_squares_alone():
    points = datasets.checkerboard(N)
    square = (points + 2).floor().long()
    assert square.min() == 0 and square.max() == 3
    assert (square.sum(1) % 2 == 0).all()
    counts = (4 * square[:, 0] + square[:, 1]).bincount(minlength=16)
    assert counts[counts > 0].tolist() == pytest.approx([N / 8] * 8, rel=0.08)
    inside = points - points.floor()
    assert abs(inside.mean() - 0.5) < 0.01 and abs(inside.var() - 1 / 12) < 0.003


def test_two_spirals_are_one_another_turned_round():
    points, labels = datasets.two_spirals(N, noise=0.0)
    radius = points.norm(dim=1)
    expected = 1.5 * math.pi * radius + math.pi * labels
    distance = points - radius[:, None] * torch.stack([expected.cos(), expected.sin()], -1)
    assert distance.abs().max() < 1e-5 and radius.max() <= 2.0001
    assert abs((radius < 1).float().mean() - 0.25) < 0.02


def test_an_annulus_is_a_disc_in_a_ring_each_filled_evenly():
    points, labels = datasets.annulus(N)
    radius = points.norm(dim=1)
    assert (radius[labels == 0] <= 0.5 + 1e-6).all()
    assert (radius[labels == 1] >= 1 - 1e-6).all() and (radius <= 1.5 + 1e-6).all()
    assert abs((radius[labels == 0] < 0.25).float().mean() - 0.25) < 0.02
    assert abs((radius[labels == 1] ** 2).mean() - (1 + 2.25) / 2) < 0.01


def test_the_flip_sends_one_to_minus_one():
    points, targets = datasets.flip_1d(4)
    assert points.tolist() == [[-1.0], [1.0], [-1.0], [1.0]] and torch.equal(targets, -points)
    noisy, targets = datasets.flip_1d(N, noise=0.1)
    assert abs((noisy + targets).std() - 0.1) < 0.005 and targets.abs().eq(1).all()


# ---- images --------------------------------------------------------------------------------------


def test_points_of_an_image_are_as_dense_as_it_is_dark():
    image = torch.tensor([[0.0, 1.0, 1.0, 0.5], [1.0, 1.0, 0.5, 1.0]])
    points = datasets.image_points(image, N)
    assert points.shape == (N, 2) and points.dtype == torch.float32
    assert points.abs().amax(0).tolist() == pytest.approx([2.0, 1.0], abs=0.01)
    column, row = (points[:, 0] + 2).floor().long(), (1 - points[:, 1]).floor().long()
    counts = (4 * row + column).bincount(minlength=8) / N
    assert counts.tolist() == pytest.approx([0.5, 0, 0, 0.25, 0, 0, 0.25, 0], abs=0.02)
    inside = (points - points.floor())[column == 0]
    assert inside.mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.02)


def test_a_threshold_counts_dark_pixels_alike():
    image = torch.tensor([[0, 100, 200, 255]], dtype=torch.uint8)
    points = datasets.image_points(image[None], N, threshold=0.5)
    counts = (points[:, 0] + 2).floor().long().bincount(minlength=4) / N
    assert counts.tolist() == pytest.approx([0.5, 0.5, 0, 0], abs=0.02)


def test_an_image_can_be_a_file(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pixels = torch.full((6, 3), 255, dtype=torch.uint8)
    pixels[0, 2] = 0
    image.fromarray(pixels.numpy()).convert("RGB").save(tmp_path / "corner.png")
    seeded = torch.Generator().manual_seed(1)
    points = datasets.image_points(tmp_path / "corner.png", 100, generator=seeded)
    assert torch.equal(points, datasets.image_points(pixels, 100, generator=seeded.manual_seed(1)))
    assert (points[:, 0] > 1 / 3).all() and (points[:, 1] > 4 / 3).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: datasets.moons(0), ArgumentError, "n must be at least 1, got 0"),
        (lambda: datasets.pinwheel(-3), ArgumentError, "n must be at least 1, got -3"),
        (lambda: datasets.annulus(10.0), ArgumentTypeError, r"n must be an int, .* got float 10\.0"),
        (lambda: datasets.moons(True), ArgumentTypeError, "n must be an int, .* got bool True"),
        (lambda: datasets.two_spirals("5" * 1000), ArgumentTypeError, r"n must be an int, .* got str '5{12}\.\.\."),
        (lambda: datasets.checkerboard(10**30), ArgumentError, r"n must be at least 1 and below 2\*\*63, got 10"),
        (lambda: datasets.moons(3, noise=10**400), ArgumentError, "noise must be finite and not negative"),
        (lambda: datasets.image_points(torch.zeros(2, 2), 5, threshold="a"), ArgumentError, "threshold must be"),
        (lambda: datasets.circles(3, noise=-1), ArgumentError, "noise must be finite and not negative, got -1"),
        (lambda: datasets.pinwheel(3, noise="0"), ArgumentTypeError, "noise must be a number"),
        (lambda: datasets.image_points(torch.zeros(3, 4, 4), 5), ArgumentError, r"grey, .* got shape \(3, 4, 4\)"),
        (lambda: datasets.image_points(torch.zeros(0, 4), 5), ArgumentError, r"got shape \(0, 4\)"),
        (lambda: datasets.image_points(torch.full((2, 2), 7.0), 5), ArgumentError, "got values from 7.0 to 7.0"),
        (lambda: datasets.image_points(torch.full((2, 2), math.nan), 5), ArgumentError, "between 0 .black. and 1"),
        (lambda: datasets.image_points(torch.zeros(2, 2).long(), 5), ArgumentTypeError, "got torch.int64"),
        (lambda: datasets.image_points([[0.0]], 5), ArgumentTypeError, "a path or a Tensor, got list"),
        (lambda: datasets.image_points(torch.ones(2, 2), 5), ArgumentError, "no dark pixel"),
        (lambda: datasets.image_points(torch.zeros(2, 2), 5, threshold=2), ArgumentError, "threshold must be between"),
        (lambda: datasets.image_points("nowhere.png", 5), OSError, "nowhere.png"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("generator", [0, True, "0", torch.Generator])
@pytest.mark.parametrize(
    "draw",
    [datasets.moons, datasets.circles, datasets.pinwheel, datasets.eight_gaussians, datasets.checkerboard,
     datasets.two_spirals, datasets.annulus, datasets.flip_1d, datasets.shapes, datasets.scenes,
     datasets.spiral_trajectories, lambda n, generator: datasets.image_points(torch.zeros(2, 2), n, generator=generator)],
)  # fmt: skip
def test_a_number_is_no_generator(draw, generator):
    with pytest.raises(ArgumentTypeError, match=r"generator must be a torch.Generator .*; a seeded one is"):
        draw(3, generator=generator)
