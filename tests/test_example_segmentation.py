"""examples/segmentation.py: on synthetic scenes and on pairs of images, and its two figures of overlap."""

import re
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_segmentation_compares_two_paths_and_draws(example, tmp_path):
    done = example("segmentation.py", "--quick")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("SYNTHETIC street scenes, not Cityscapes")
    rows = re.findall(r"^(\w+-UNet) +(\d) +([\d.]+) +([\d.]+)", done.stdout, re.M)
    nets = "ResNet-UNet", "NeuralODE-UNet"
    assert [row[:2] for row in rows] == [(net, seed) for seed in "01" for net in nets]
    for *_, dice, iou in rows:
        assert 0 < float(iou) < float(dice) < 1
    pytest.importorskip("matplotlib")
    assert (tmp_path / "out" / "segmentation.png").stat().st_size > 20_000


def test_segmentation_reads_pairs_of_images(example, tmp_path):
    Image = pytest.importorskip("PIL.Image")
    for split, n in (("train", 6), ("val", 5)):
        (tmp_path / split).mkdir()
        for i in range(n):
            both = Image.new("RGB", (64, 32), (90, 90, 90))
            both.paste((128, 64, 128), (32, 0, 64, 16 + i))  # road
            both.paste((111, 74, 0), (32, 28, 64, 32))  # what counts for nothing
            both.paste((0, 0, 142), (40, 4, 50, 9))  # a car
            both.save(tmp_path / split / f"{i}.png")
    done = example("segmentation.py", "--quick", "--data", ".")
    assert done.returncode == 0, done.stderr
    assert "Cityscapes from .: 6 scenes to train on, 5 to test on" in done.stdout


def test_segmentation_ends_with_one_line_without_its_files(example, tmp_path):
    done = example("segmentation.py", "--data", str(tmp_path))
    assert done.returncode == 1
    assert re.match(r"segmentation.py: .*: no images of train found. Cityscapes is .*\n$", done.stderr)


@pytest.fixture
def segmentation(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import segmentation

    return segmentation


def test_overlaps_are_those_of_their_definitions(segmentation):
    from flashode.datasets import VOID, Labelled

    answers = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    labels = torch.tensor([[0, 0, 0, 1], [1, 1, VOID, VOID]])
    # Of class 0 there are 3 pixels, given 3, both 2; of class 1 there are 3, given 3, both 2; of class 2 there are none.
    scores = torch.nn.functional.one_hot(answers, 3).movedim(-1, 0).float()[None]
    dice, iou = segmentation.overlaps(lambda images: images, Labelled(scores, labels[None]), 3)
    torch.testing.assert_close(dice[:2], torch.tensor([2 / 3, 2 / 3], dtype=torch.float64))
    torch.testing.assert_close(iou[:2], torch.tensor([2 / 4, 2 / 4], dtype=torch.float64))
    assert dice[2].isnan() and iou[2].isnan()


def test_a_level_of_an_ode_is_two_residual_blocks_of_half_the_length_with_the_same_weights(segmentation):
    torch.manual_seed(0)
    level, y = segmentation.ode_level(8), torch.randn(2, 8, 8, 8)
    half = y + 0.5 * level.field(torch.tensor(0.0), y)
    torch.testing.assert_close(level(y), half + 0.5 * level.field(torch.tensor(0.5), half))
    assert segmentation.UNet(segmentation.ode_level, 5)(torch.randn(1, 3, 32, 48)).shape == (1, 5, 32, 48)


def test_the_loss_is_that_of_its_definition_and_sees_nothing_of_void(segmentation):
    from flashode.datasets import VOID

    labels = torch.tensor([[0, 0, 1, VOID]])[:, None]
    given = torch.tensor([[0.7, 0.6, 0.2, 0.9], [0.3, 0.4, 0.8, 0.1]])
    scores = given.log()[None, :, None]
    entropy = -torch.tensor([0.7, 0.6, 0.8]).log().mean()
    dice = torch.tensor([(2 * 1.3 + 1) / (1.5 + 2 + 1), (2 * 0.8 + 1) / (1.5 + 1 + 1)]).mean()
    torch.testing.assert_close(segmentation.loss_of(scores, labels), entropy + 1 - dice)
    scores[..., 3] = 7 * torch.randn(1, 2, 1)
    torch.testing.assert_close(segmentation.loss_of(scores, labels), entropy + 1 - dice)


def test_learning_rates_are_compared_on_scenes_held_out(example):
    done = example("segmentation.py", "--quick", "--rates", "1e-3", "0.01")
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^ *(0.\d+) +([\d.]+) +([\d.]+)$", done.stdout, re.M)
    assert [rate for rate, *_ in rows] == ["0.001", "0.01"] and "Dice" not in done.stdout
