"""examples/digits.py and what the classifiers share, in processes of their own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_digits_compares_four_nets_and_draws(example, tmp_path):
    done = example("digits.py", "--quick")
    assert done.returncode == 0, done.stderr
    assert "1,198 training images, 599 test images" in done.stdout
    rows = {
        row.split()[0]: row.split()[1:] for row in done.stdout.splitlines() if re.match(r"R|ODE-Net", row)
    }
    parameters = {name: int(row[1].replace(",", "")) for name, row in rows.items()}
    assert list(rows) == ["ResNet-1", "ResNet-6", "RK-Net", "ODE-Net"]
    assert 140_000 < parameters["RK-Net"] == parameters["ODE-Net"] < 150_000
    assert 500_000 < parameters["ResNet-6"] < 520_000
    assert rows["ResNet-6"][4:] == rows["RK-Net"][4:] == ["6", "0"]
    assert float(rows["ODE-Net"][4]) > 6 and float(rows["ODE-Net"][5]) > 0
    pytest.importorskip("matplotlib")
    assert (tmp_path / "out" / "digits.png").stat().st_size > 20_000


def test_digits_reads_mnist_or_says_what_is_missing(example, tmp_path):
    done = example("digits.py", "--data", "here")
    assert done.returncode == 1
    assert done.stderr.startswith(
        "digits.py: here: no such folder. MNIST is four files: train-images-idx3-ubyte"
    )
    numbers = torch.Generator().manual_seed(0)
    for part, n in (("train", 40), ("t10k", 20)):
        images = torch.randint(256, (n, 28, 28), generator=numbers, dtype=torch.uint8).numpy().tobytes()
        labels = torch.randint(10, (n,), generator=numbers, dtype=torch.uint8).numpy().tobytes()
        sizes = bytes((0, 0, 0, n))
        header = b"\0\0\x08\x03" + sizes + 2 * bytes((0, 0, 0, 28))
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(header + images)
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + sizes + labels)
    done = example("digits.py", "--quick", "--data", ".")
    assert done.returncode == 0, done.stderr
    assert "MNIST from .: 40 training images, 20 test images" in done.stdout


def test_memory_of_a_step_is_that_of_its_graph(tmp_path):
    """A direct gradient through 32 Euler steps holds their graph; backsolve does not; a thing of 1 MB weighs 1 MB."""
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1])\n"
        "from classifiers import peak_memory\n"
        "from flashode.nn import ConvField, ODEBlock, RKNet\n"
        "if __name__ == '__main__':\n"
        "    nets = {}\n"
        "    for adjoint in (None, 'backsolve'):\n"
        "        nets[adjoint] = RKNet(32, channels=16)\n"
        "        nets[adjoint].body = ODEBlock(ConvField(16), method='euler', options={'step_size': 1 / 32}, adjoint=adjoint)\n"
        "    print(*peak_memory(nets, torch.rand(64, 1, 32, 32), torch.zeros(64, dtype=torch.long)).values())\n"
    )
    (tmp_path / "memory.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "memory.py", EXAMPLES], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    direct, backsolve = map(float, done.stdout.split())
    graph = 32 * 4 * 64 * 16 * 8 * 8 * 4 / 2**20  # at least four states of every step
    assert direct > graph > 2 * backsolve > 0
