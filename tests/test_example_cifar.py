"""examples/cifar.py: on synthetic images, which it says, and its augmentation."""

import re
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_cifar_says_that_its_images_are_synthetic(example, tmp_path):
    done = example("cifar.py", "--quick")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("SYNTHETIC images of shapes, not CIFAR-10")
    assert re.findall(r"^(\S+) +[\d.]+ +(\d+),", done.stdout, re.M) == [
        ("ResNet-1", "143"),
        ("ResNet-6", "514"),
        ("RK-Net", "144"),
    ]
    pytest.importorskip("matplotlib")
    assert (tmp_path / "out" / "cifar.png").stat().st_size > 20_000


def test_cifar_ends_with_one_line_without_its_files(example, tmp_path):
    done = example("cifar.py", "--data", str(tmp_path))
    assert done.returncode == 1
    assert re.match(r"cifar.py: .*data_batch_1: no such file. CIFAR-10 is the files .*\n$", done.stderr)


def test_augmentation_turns_and_flips_and_keeps_the_middle(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from cifar import turned

    torch.manual_seed(0)
    images = torch.zeros(400, 1, 33, 33)
    images[:, :, 16, 16] = images[:, :, 16, 28] = 1  # the middle, and a point 12 pixels to its right
    changed = turned(images)[:, 0]
    assert changed[:, 16, 16].min() > 0.99
    changed[:, 12:21, 12:21] = 0
    row, column = (changed.flatten(1).argmax(1) // 33 - 16).double(), changed.flatten(1).argmax(1) % 33 - 16
    flipped = column < 0
    assert 0.4 < flipped.float().mean() < 0.6
    angle = torch.atan2(row, column.abs().double()).rad2deg()
    assert 12 < angle.max() < 18 and -18 < angle.min() < -12 and angle.mean().abs() < 1.5
    assert (row.hypot(column.double()) - 12).abs().max() < 1
