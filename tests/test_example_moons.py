"""The example moons.py as a user runs it."""

import re

import pytest


def test_moons_are_told_apart(example, tmp_path):
    pytest.importorskip("matplotlib")
    done = example("moons.py", "--quick")
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"test accuracy: ([\d.]+) %", done.stdout)[1]) > 99.5
    assert re.search(r"^an epoch, flashode, compiled +[\d.]+ +[\d.]+$", done.stdout, re.M)
    assert (tmp_path / "out" / "moons.png").stat().st_size > 20_000
