"""The example linear_spiral.py as a user runs it."""

import re

import pytest


def test_spirals_are_learned_to_their_noise(example, tmp_path):
    pytest.importorskip("matplotlib")
    done = example("linear_spiral.py", "--quick")
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"^ +15 +([\d.e-]+)$", done.stdout, re.M)[1]) < 1e-4
    assert float(re.search(r"worst error ([\d.]+)", done.stdout)[1]) < 0.01
    noise = float(re.search(r"true solution to the points: ([\d.]+)", done.stdout)[1])
    for field in ("linear layer", "network"):
        _, last, to_truth = re.search(rf"^{field} +(\S+) +(\S+) +(\S+)$", done.stdout, re.M).groups()
        assert float(last) < 1.1 * noise and float(to_truth) < noise / 2
    assert (tmp_path / "out" / "linear_spiral.png").stat().st_size > 20_000
