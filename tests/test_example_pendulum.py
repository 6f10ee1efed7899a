"""examples/pendulum.py as a user runs it: energy bounded by leapfrog, and a learned one of the true shape."""

import re

import pytest


def test_pendulum_keeps_its_energy_and_learns_it(example, tmp_path):
    done = example("pendulum.py", "--quick")
    assert done.returncode == 0, done.stderr
    halves = dict(
        (name, (float(first), float(second)))
        for name, first, second in re.findall(
            r"^(leapfrog|rk4|euler) +[\d.]+ +([\d.e-]+) +([\d.e-]+)$", done.stdout, re.M
        )
    )
    assert (
        halves["leapfrog"][1] == pytest.approx(halves["leapfrog"][0], rel=0.01)
        and halves["leapfrog"][1] < 0.005
    )
    assert halves["rk4"][1] > 1.9 * halves["rk4"][0] and halves["euler"][1] > 1
    later = {
        name: float(error)
        for name, error in re.findall(r"^(plain network|learned energy) +\S+ +\S+ +(\S+)", done.stdout, re.M)
    }
    assert later["learned energy"] < later["plain network"]
    kinetic, potential = map(float, done.stdout.split("kinetic  potential")[1].split()[:2])
    assert kinetic < 0.1 and potential < 0.1
    read = pytest.importorskip("matplotlib.image").imread
    image = read(tmp_path / "out" / "pendulum.png")
    assert image.shape[0] > 500 and (image[..., :3].min(-1) < 0.3).mean() > 0.005
