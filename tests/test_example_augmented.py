"""The example augmented.py as a user runs it."""

import re

import pytest


def test_one_more_dimension_makes_maps_that_no_flow_can(example, tmp_path):
    pytest.importorskip("matplotlib")
    done = example("augmented.py", "--quick")
    assert done.returncode == 0, done.stderr
    figures = {
        name: [float(x.replace(",", "")) for x in re.search(rf"^{name} +(.*)$", done.stdout, re.M)[1].split()]
        for name in ("ODE", "ANODE", "ResNet")
    }
    _, flip, annulus, _, _, calls = figures.pop("ODE")
    assert flip == pytest.approx(1, abs=0.05) and annulus > 0.02
    for _, other_flip, other_annulus, accuracy, *_ in figures.values():
        assert other_flip < 0.05 and other_annulus < annulus / 2 and accuracy > 99
    assert figures["ANODE"][-1] < calls
    compiled, called = (
        float(re.search(rf"^a step, flashode{name} +([\d.]+)", done.stdout, re.M)[1])
        for name in (", compiled", "")
    )
    assert compiled < called
    assert (tmp_path / "out" / "augmented.png").stat().st_size > 20_000
