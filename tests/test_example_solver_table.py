"""examples/solver_table.py: every solver with every gradient, in a process of its own."""

import re

import pytest

pytest.importorskip("sklearn")


def test_every_solver_is_trained_with_every_gradient(example, tmp_path):
    done = example("solver_table.py", "--quick")
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^(\w+) +(direct|backsolve|checkpoint) +([\d.]+)", done.stdout, re.M)
    errors = {(method, gradient): float(error) for method, gradient, error in found}
    methods = "euler midpoint fehlberg4 fehlberg5 fehlberg45 implicit_euler implicit_midpoint".split()
    gradients = ("direct", "backsolve", "checkpoint")
    assert list(errors) == [(method, gradient) for method in methods for gradient in gradients]
    # Checkpoint's gradients are direct's: after a step the nets give the same answers, but for rounding.
    for method in methods:
        assert errors[method, "checkpoint"] == pytest.approx(errors[method, "direct"], abs=1)
    assert "implicit: test error" in done.stdout
    pytest.importorskip("matplotlib")
    assert (tmp_path / "out" / "solver_table.png").stat().st_size > 20_000
