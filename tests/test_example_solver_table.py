"""examples/solver_table.py: every solver with every gradient, in a process of its own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_every_solver_is_trained_with_every_gradient(tmp_path):
    command = [sys.executable, EXAMPLES / "solver_table.py", "--quick"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
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
