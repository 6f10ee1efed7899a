"""The examples as a user runs them: in processes of their own, from another folder, with good and bad data."""

import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SHIPPED = EXAMPLES / "data" / "spiral.csv"


def spiral(folder, *args):
    command = [sys.executable, EXAMPLES / "spiral.py", *args]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_spiral_draws_its_picture(tmp_path):
    read = pytest.importorskip("matplotlib.image").imread
    done = spiral(tmp_path, "--quick")
    assert done.returncode == 0, done.stderr
    assert "nfe forward" in done.stdout and "true A" in done.stdout
    image = read(tmp_path / "out" / "spiral.png")
    assert image.shape[0] > 500 and image.shape[1] > 500
    # Not blank: ink, and the colour of either model, in every quarter of the picture.
    rows, columns = image.shape[0] // 2, image.shape[1] // 2
    for half in (image[:rows, :, :3], image[rows:, :, :3]):
        for quarter in (half[:, :columns], half[:, columns:]):
            assert (quarter.min(axis=-1) < 0.3).mean() > 0.005
            assert (quarter.max(axis=-1) - quarter.min(axis=-1) > 0.4).mean() > 0.001


def test_spiral_reads_data_in_other_units(tmp_path):
    pytest.importorskip("matplotlib")
    lines = SHIPPED.read_text().split()
    rows = [[float(cell) for cell in line.split(",")] for line in lines[1:]]
    text = ["y, x, note, t"] + [f"{1e4 * y},{1e4 * x},-,{100 + 7 * t}" for t, x, y in rows]
    (tmp_path / "mine.csv").write_text("\n".join(text))
    done = spiral(tmp_path, "--quick", "--data", "mine.csv", "--out", "deep/er/mine.png")
    assert done.returncode == 0, done.stderr
    assert "t from 100 to 275" in done.stdout
    assert "learned A" in done.stdout and "true A" not in done.stdout
    assert (tmp_path / "deep" / "er" / "mine.png").exists()


@pytest.mark.parametrize("method", ["rk4", "tsit5"])
def test_spiral_takes_another_method(tmp_path, method):
    done = spiral(tmp_path, "--iterations", "2", "--method", method)
    assert done.returncode == 0, done.stderr
    assert f"{method} on the" in done.stdout


GOOD = "".join(f"{i},1,2\n" for i in range(20))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "t, x, y not found", id="empty file"),
        pytest.param("t,x\n0,1\n", "y not found", id="missing column"),
        pytest.param("t,x,y\n" + GOOD + "19,1,2\n", "line 22: t must increase, got 19", id="t repeats"),
        pytest.param("t,x,y\n0,1,2\n5,1,2\n4,1,2\n", "line 4: t must increase", id="t goes back"),
        pytest.param("t,x,y\n0,1,2\n1,2,3\n", "2 rows of data; at least", id="too few rows"),
        pytest.param("t,x,y\n0,one,2\n", "line 2: t, x and y must be numbers", id="a word"),
        pytest.param("t,x,y\n" + GOOD + "20,1\n", "line 22: t, x and y must be numbers", id="a short row"),
        pytest.param("t,x,y\n0,1,2\n1,nan,2\n", "line 3: t, x and y must be finite", id="nan"),
    ],
)
def test_reading_names_what_is_wrong_with_a_csv(tmp_path, text, message):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        runpy.run_path(str(EXAMPLES / "spiral.py"))["read_csv"](path)


@pytest.mark.parametrize(
    ("name", "message"),
    [("bad.csv", "line 4: t must increase, got 4 after 5"), ("nowhere.csv", "No such file or directory")],
)
def test_spiral_ends_with_one_line_on_bad_data(tmp_path, name, message):
    (tmp_path / "bad.csv").write_text("t,x,y\n0,1,2\n5,1,2\n4,1,2\n")
    done = spiral(tmp_path, "--data", name)
    assert done.returncode != 0
    assert done.stderr == f"spiral.py: {name}: {message}\n"


def distributed(folder, *args, launcher=()):
    command = [sys.executable, *launcher, EXAMPLES / "distributed.py", *args]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_distributed_trains_in_two_processes_as_in_one(tmp_path):
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("torch was built without gloo")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    errors = []
    for processes, launcher in ((1, ()), (2, torchrun)):
        done = distributed(tmp_path, "--quick", launcher=launcher)
        assert done.returncode == 0, done.stderr
        rows = re.findall(r"^ +(\d) +(\d+) ", done.stdout, re.M)
        assert rows == [(str(rank), str(256 // processes)) for rank in range(processes)]
        assert "differs between processes by 0\n" in done.stdout
        errors.append(float(re.search(r"rms error on 1,000 other states: ([\d.]+)", done.stdout)[1]))
    assert 0 < errors[0] < 0.5 and errors[1] == pytest.approx(errors[0], rel=1e-2)


def test_distributed_refuses_a_batch_that_cannot_be_shared_out(tmp_path):
    done = distributed(tmp_path, "--batch", "0")
    assert done.returncode == 2
    assert "--batch must be a multiple of the number of processes, 1, got 0" in done.stderr


def test_shipped_data_is_what_its_script_writes():
    script = EXAMPLES / "data" / "make_spiral.py"
    written = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=True)
    assert written.stdout == SHIPPED.read_text()


def test_bouncing_ball_finds_what_moves_the_ball(tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLES / "bouncing_ball.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    *_, learned = done.stdout.splitlines()
    _, *numbers = (float(x) for x in re.findall(r"[0-9.]+", learned))
    for number, expected in zip(numbers, (9.81, 0.1, 0.8, 0.001)):
        assert abs(number - expected) < 0.02
