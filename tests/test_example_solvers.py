"""examples/solvers.py as a user runs it: the orders that it measures, and its picture."""

import re

import pytest


def test_solvers_measures_orders_one_and_four(example, tmp_path):
    done = example("solvers.py", "--quick")
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(Lotka-Volterra|pendulum) +(euler|rk4) +(\d) +([\d.]+)", done.stdout, re.M)
    assert len(rows) == 4
    for _, _, order, measured in rows:
        assert float(measured) == pytest.approx(int(order), abs=0.25)
    assert re.search(r"^compiled +[\d.]+", done.stdout, re.M)
    read = pytest.importorskip("matplotlib.image").imread
    image = read(tmp_path / "out" / "solvers.png")
    assert image.shape[0] > 500 and (image[..., :3].min(-1) < 0.3).mean() > 0.005
