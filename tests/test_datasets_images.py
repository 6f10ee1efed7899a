"""Digits, shapes and street scenes: their sizes and ranges, labels that fit the pixels, randomness under control."""

import subprocess
import sys

import pytest
import torch

import flashode
from flashode.datasets import SCENE_CLASSES, SHAPES, digits, scenes, shapes


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_digits_are_split_the_same_way_every_time():
    pytest.importorskip("sklearn")
    (train, test), (again, _) = digits(), digits()
    assert train.images.shape == (1198, 1, 8, 8) and test.images.shape == (599, 1, 8, 8)
    assert train.images.dtype == torch.float32 and train.labels.dtype == torch.int64
    assert train.images.amin() == 0 and train.images.amax() == 1
    assert torch.equal(train.images, again.images)
    assert (test.labels.bincount(minlength=10) >= 50).all()
    # The nearest training image tells nearly every digit, so that labels belong to their images.
    nearest = torch.cdist(test.images.flatten(1), train.images.flatten(1)).argmin(1)
    assert (train.labels[nearest] == test.labels).float().mean() > 0.97


def test_digits_without_scikit_learn_say_what_to_install():
    code = (
        "import sys; sys.modules['sklearn'] = sys.modules['sklearn.datasets'] = None\n"
        "from flashode.datasets import digits\n"
        "try: digits()\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "flashode.datasets.digits needs scikit-learn: pip install scikit-learn\n", (
        done.stderr
    )


def test_every_shape_covers_a_part_of_its_image_in_one_colour():
    images, labels = shapes(2000, generator=seeded(0))
    assert images.shape == (2000, 3, 32, 32) and images.amin() >= 0 and images.amax() <= 1
    assert labels.bincount(minlength=len(SHAPES)).min() > 100
    # Whatever the shape, the place of its middle varies, and no two images are alike.
    assert torch.cdist(images[:50].flatten(1), images[:50].flatten(1)).add(torch.eye(50)).min() > 0.5


def test_shapes_are_those_of_their_labels():
    """Ring and frame are hollow, the disc turns into itself, the bar is the longest for its area."""
    from flashode.datasets.images import _insides

    side = (torch.arange(400) + 0.5) / 200 - 1
    v, u = torch.meshgrid(side, side, indexing="ij")
    inside = dict(zip(SHAPES, _insides(u[None], v[None])[0]))
    area = {name: mask.float().mean().item() * 4 for name, mask in inside.items()}
    assert area["disc"] == pytest.approx(torch.pi * 0.81, rel=1e-2)
    assert area["square"] == pytest.approx(2.25, rel=1e-2)
    assert area["frame"] == pytest.approx(4 * (0.85**2 - 0.25), rel=2e-2)
    assert area["bar"] == pytest.approx(1.2, rel=1e-2)
    assert area["triangle"] == pytest.approx(3 * 3**0.5 * 0.55**2, rel=1e-2)
    hollow = [name for name, mask in inside.items() if not mask[200, 200]]
    assert hollow == ["ring", "crescent", "frame"]
    assert torch.equal(inside["disc"], inside["disc"].T)
    turned = [name for name, mask in inside.items() if torch.equal(mask, mask.rot90())]
    assert turned == ["disc", "ring", "square", "frame", "cross"]


def test_scenes_have_every_class_and_a_generator_repeats_them():
    images, labels = scenes(40, generator=seeded(0))
    assert images.shape == (40, 3, 64, 64) and labels.shape == (40, 64, 64)
    assert images.amin() >= 0 and images.amax() <= 1 and labels.dtype == torch.int64
    share = labels.flatten().bincount(minlength=len(SCENE_CLASSES)) / labels.numel()
    assert len(share) == len(SCENE_CLASSES) and share.min() > 0.01
    again = scenes(40, generator=seeded(0))
    assert torch.equal(again.images, images) and torch.equal(again.labels, labels)
    assert not torch.equal(scenes(40, generator=seeded(1)).labels, labels)


def test_pixels_of_scenes_are_where_their_labels_say():
    images, labels = scenes(60, generator=seeded(0))
    name = {name: labels == i for i, name in enumerate(SCENE_CLASSES)}
    height = torch.arange(64)[:, None].expand(64, 64)
    rows = {key: height.expand_as(labels)[mask].float().mean() for key, mask in name.items()}
    assert rows["sky"] < rows["building"] < rows["road"] and rows["tree"] < rows["car"]
    pixels = images.permute(0, 2, 3, 1)
    red, green, blue = pixels[name["sky"]].mean(0)
    assert blue > green > red
    red, green, blue = pixels[name["tree"]].mean(0)
    assert green > red and green > blue
    # Colours of cars and people differ from one to the next far more than those of roads.
    assert pixels[name["car"]].std(0).mean() > 1.5 * pixels[name["road"]].std(0).mean()


def test_scenes_of_fewer_classes_are_labelled_by_their_places():
    labels = scenes(10, size=32, classes=("road", "sky"), generator=seeded(0)).labels
    assert labels.shape == (10, 32, 32) and set(labels.unique().tolist()) == {0, 1}
    assert (labels[:, 0] == 1).all() and (labels[:, -1, 16] == 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scenes(1, classes=("road",)), "'sky' among them, got"),
        (lambda: scenes(1, classes=("sky", "cat")), "must be different ones of"),
        (lambda: scenes(1, classes=("sky", "sky")), "must be different ones of"),
        (lambda: scenes(0), "n must be at least 1"),
        (lambda: scenes(1, size=8), "size must be at least 16, got 8"),
        (lambda: shapes(1, size=4), "size must be at least 8, got 4"),
    ],
)
def test_what_cannot_be_drawn_is_refused(call, message):
    with pytest.raises(flashode.ArgumentError, match=message):
        call()


@pytest.mark.parametrize("draw", [shapes, scenes])
@pytest.mark.parametrize("value", [1.5, True, None, "5", float("nan")])
def test_what_is_no_whole_number_is_refused(draw, value):
    for name, call in (("n", {"n": value}), ("size", {"n": 1, "size": value})):
        with pytest.raises(flashode.ArgumentTypeError, match=f"{name} must be an int"):
            draw(**call)


@pytest.mark.parametrize("classes", [None, 3, "sky"])
def test_classes_are_several_names(classes):
    with pytest.raises(flashode.ArgumentTypeError, match="classes must be several of"):
        scenes(1, classes=classes)
