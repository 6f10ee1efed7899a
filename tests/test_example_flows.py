"""The examples of flows as a user runs them, briefly; and the true densities that they are measured by."""

import argparse
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def text_of(example, tmp_path):
    """What an example prints, which draws too."""

    def run(name):
        done = example(f"{name}.py", "--quick")
        assert done.returncode == 0, done.stderr
        read = pytest.importorskip("matplotlib.image").imread
        assert read(tmp_path / "out" / f"{name}.png").shape[1] > 500
        return done.stdout

    return run


def test_flows_learn_four_densities(text_of):
    text = text_of("flows")
    for name in ("circles", "moons", "eight_gaussians", "image"):
        learned, trips = (line.split()[1:] for line in re.findall(rf"^{name} .*$", text, re.M))
        nll, least, distance, energy, calls, _ = map(float, learned)
        assert least < nll < 4 and abs(nll - least - distance) < 0.01
        assert calls >= 14 and energy > 0
        for largest, median, most in zip(trips[::2], trips[1::2], (1e-2, 1e-3, 1e-4, 1e-6)):
            assert 0 < float(median) < float(largest) < most
    rows = re.findall(r"^(compiled|called from Python|torchdiffeq) +[\d.]+ +([\d.]+) +([\d.]+)$", text, re.M)
    times = {name: float(ratio) for name, ratio, _ in rows}
    assert times["compiled"] == 1 and times["called from Python"] > 1
    losses = [float(loss) for *_, loss in rows]
    assert max(losses) - min(losses) < 2e-3


def test_flow_matching_is_sampled_alike_by_all(text_of):
    text = text_of("flow_matching")
    rows = re.findall(
        r"^(dopri5|midpoint) +(\S.*?) +(\d+) +([\d.]+) +([\d.]+) +([\d.]+) +(\S+) +(\S+)$", text, re.M
    )
    assert {(solver, by) for solver, by, *_ in rows} >= {
        (solver, by) for solver in ("dopri5", "midpoint") for by in ("compiled", "called from Python")
    }
    for _, _, calls, _, near, _, distance, off in rows:
        assert int(calls) >= 20 and float(near) > 40 and float(distance) < 0.1 and float(off) < 0.1


@pytest.fixture(scope="module")
def flows():
    sys.path.insert(0, str(EXAMPLES))
    try:
        return runpy.run_path(str(EXAMPLES / "flows.py"))
    finally:
        sys.path.remove(str(EXAMPLES))


def test_costs_of_paths_are_in_the_loss_unless_they_are_free(flows):
    found = torch.tensor([-1.0, -3.0]), torch.tensor([10.0, 30.0]), torch.tensor([100.0, 300.0])
    recipe, free = (
        flows["recipe_of"]("image", argparse.Namespace(free=free, quick=False)) for free in (False, True)
    )
    assert recipe.loss(*found).item() == pytest.approx(2 + 20 * recipe.kinetic + 200 * recipe.jacobian)
    assert recipe.kinetic > 0 and recipe.jacobian > 0 and free.loss(*found) == 2


@pytest.mark.parametrize("name", ["circles", "moons", "eight_gaussians", "image"])
def test_true_densities_are_those_of_the_data(flows, name):
    draw, log_prob = flows["problems"]()[name]
    side = torch.linspace(-3, 3, 481)[:-1] + 0.00625
    cells = torch.cartesian_prod(side, side)
    density = log_prob(cells).exp() * 0.0125**2
    assert abs(density.sum() - 1) < 5e-3
    points = draw(20_000)
    for statistic in (
        lambda x: x[:, 0],
        lambda x: x[:, 1],
        lambda x: x.square().sum(1),
        lambda x: x.abs().prod(1),
    ):
        drawn = statistic(points)
        expected = (density * statistic(cells)).sum()
        assert abs(drawn.mean() - expected) < 5 * drawn.std() / len(points) ** 0.5 + 0.01
