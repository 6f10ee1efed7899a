"""examples/solvers.py as a user runs it: the orders that it measures, and its picture."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "solvers.py"


def test_solvers_measures_orders_one_and_four(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--quick"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(Lotka-Volterra|pendulum) +(euler|rk4) +(\d) +([\d.]+)", done.stdout, re.M)
    assert len(rows) == 4
    for _, _, order, measured in rows:
        assert float(measured) == pytest.approx(int(order), abs=0.25)
    assert re.search(r"^compiled +[\d.]+", done.stdout, re.M)
    read = pytest.importorskip("matplotlib.image").imread
    image = read(tmp_path / "out" / "solvers.png")
    assert image.shape[0] > 500 and (image[..., :3].min(-1) < 0.3).mean() > 0.005
