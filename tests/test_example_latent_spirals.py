"""The latent spirals as a user runs them: a table of errors, a table of times, and a picture."""

import re

import pytest


def test_latent_spirals_are_learned_compared_and_drawn(example, tmp_path):
    read = pytest.importorskip("matplotlib.image").imread
    done = example("latent_spirals.py", "--quick")
    assert done.returncode == 0, done.stderr
    errors = re.findall(r"^ +(100|50|30) " + 4 * r" +([\d.]+)" + "$", done.stdout, re.M)
    assert [row[0] for row in errors] == ["100", "50", "30"]
    assert all(0 < float(x) < 2 for row in errors for x in row[1:])
    assert re.search(r"^latent ODE +4,526 ", done.stdout, re.M) and re.search(
        r"^latent RNN +4,549 ", done.stdout, re.M
    )
    radii = re.findall(r"^ +([\d.]+) +([\d.]+) +([\d.]+)$", done.stdout.split("by the true radius")[1], re.M)[
        :3
    ]
    assert [row[:2] for row in radii] == [("0", "1.628"), ("1.628", "1.898"), ("1.898", "2.257")]
    times = dict(
        re.findall(r"^(compiled|not compiled|torchdiffeq, one clock) +([\d.e+]+) ", done.stdout, re.M)
    )
    assert {"compiled", "not compiled"} <= set(times) and all(float(ms) > 0 for ms in times.values())
    image = read(tmp_path / "out" / "latent_spirals.png")
    assert image.shape[0] > 500 and image.shape[1] > 1000
    # Not blank: something dark in every eighth of the picture.
    for row in range(2):
        for column in range(4):
            rows = slice(row * image.shape[0] // 2, (row + 1) * image.shape[0] // 2)
            columns = slice(column * image.shape[1] // 4, (column + 1) * image.shape[1] // 4)
            assert (image[rows, columns, :3].min(axis=-1) < 0.3).mean() > 0.003
