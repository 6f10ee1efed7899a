"""examples/poisson.py as a user runs it: losses like the report's in as many steps, and Laplacians that are right."""

import re
import runpy
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "poisson.py"


def test_poisson_comes_down_to_the_reports_losses(example, tmp_path):
    done = example("poisson.py", "--quick")
    assert done.returncode == 0, done.stderr
    equation, boundary, distance = map(
        float, re.search(r"^here +60 +(\S+) +(\S+) +(\S+)", done.stdout, re.M).groups()
    )
    assert equation < 0.15 and boundary < 0.102908 and distance < 0.1
    assert float(re.search(r"autograd's: (\S+);", done.stdout)[1]) < 1e-5
    read = pytest.importorskip("matplotlib.image").imread
    image = read(tmp_path / "out" / "poisson.png")
    assert image.shape[0] > 500 and (image[..., :3].min(-1) < 0.3).mean() > 0.005


def test_the_reports_rate_is_held_where_it_is_asked_for(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    rate = runpy.run_path(str(SCRIPT))["rate"]
    assert {rate(step, 100, 0.1) for step in range(60)} == {0.1}
    assert rate(0, 100, None) == 0.02 > rate(59, 100, None) > 0
    assert rate(60, 100, 0.1) == rate(60, 100, None) == 0.005


def test_finite_differences_are_the_double_sine_series(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    x, u = runpy.run_path(str(SCRIPT))["finite_differences"](cells=100)
    # sin(x) on [0, 1] in sines of n pi x.
    n = torch.arange(1, 400, dtype=torch.float64) * torch.pi
    b = 2 * n * torch.cos(n) * torch.sin(torch.ones_like(n)) / (1 - n**2)
    waves = torch.sin(x[:, None] * n)
    exact = -2 * torch.pi * waves @ (torch.outer(b, b) / (n[:, None] ** 2 + n**2)) @ waves.T
    torch.testing.assert_close(u, exact, rtol=0, atol=2e-5)
