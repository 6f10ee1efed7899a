"""The example moons.py as a user runs it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "moons.py"


def test_moons_are_told_apart(tmp_path):
    pytest.importorskip("matplotlib")
    done = subprocess.run(
        [sys.executable, EXAMPLE, "--quick"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"test accuracy: ([\d.]+) %", done.stdout)[1]) > 99.5
    assert re.search(r"^an epoch, flashode, compiled +[\d.]+ +[\d.]+$", done.stdout, re.M)
    assert (tmp_path / "out" / "moons.png").stat().st_size > 20_000
