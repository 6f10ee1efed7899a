"""Classifies small colour images by residual networks, and by an ODE in place of their blocks.

Problem. CIFAR-10, with --data DIR, the folder of its python version: 50,000 colour images of 32x32 pixels in ten
classes, flipped and turned by up to 15 degrees as they are trained on. Without --data the images are synthetic:
shapes in ten classes, in any place, turn and size, in colours that are usual for them, on mottled ground; 8,000 to
train on, 4,000 to test on. Such figures say that the program works and how the nets compare, and nothing about
photographs. Three nets with the same stem and the same head: ResNet-1 and ResNet-6, of one and six residual blocks,
and RK-Net, one field that is solved by 6 steps of Euler's method.

Right answer. RK-Net does as well as the ResNets up to chance: published are test errors of 19.2, 20.1 and 19.6 % on
CIFAR-10, with 0.15, 0.51 and 0.15 million parameters.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from torch.nn.functional import affine_grid, grid_sample

import flashode
from classifiers import COLOURS, Trained, compare, draw_losses, draw_wrong, wrong
from flashode.datasets import SHAPES, cifar10, shapes
from flashode.nn import ResNet, RKNet
from pictures import INK, save_picture
from training import parser, prepare, table

CIFAR_CLASSES = ("airplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MODELS = {
    "ResNet-1": lambda: ResNet(1, in_channels=3),
    "ResNet-6": lambda: ResNet(6, in_channels=3),
    "RK-Net": lambda: RKNet(6, in_channels=3),
}


def main():
    args = parse()
    prepare(args)
    if args.data is None:
        torch.set_num_threads(1 if args.quick else min(2, torch.get_num_threads()))
    train, test, names = load(args)
    nets = {}
    for name, make in MODELS.items():
        torch.manual_seed(args.seed)
        nets[name] = make()
    steps = 2 if args.quick else 1000 if args.data is None else 20 * len(train.labels) // 128
    batch = 16 if args.quick else 64 if args.data is None else 128
    trained = compare(args, nets, train, test, steps, batch=batch, rate=3e-3, change=turned)
    table(Trained.HEADINGS, [each.row for each in trained])
    save_picture(args, lambda figure: draw(figure, trained, test, names), (11, 5.8))


def load(args):
    if args.data is None:
        made = torch.Generator().manual_seed(args.seed)
        sizes = (100, 100) if args.quick else (8000, 4000)
        train, test = (shapes(n, generator=made) for n in sizes)
        what, names = "SYNTHETIC images of shapes, not CIFAR-10 (give --data DIR for that)", SHAPES
    else:
        try:
            train, test = cifar10(args.data)
        except flashode.ArgumentError as error:
            sys.exit(f"cifar.py: {error}")
        what, names = f"CIFAR-10 from {args.data}", CIFAR_CLASSES
    print(f"{what}: {len(train.labels):,} training images, {len(test.labels):,} test images", flush=True)
    return train, test, names


def turned(images):
    """Augmentation: every image turned by up to 15 degrees either way, and every other one flipped."""
    angle = (2 * torch.rand(len(images)) - 1) * math.radians(15)
    flip = 1 - 2 * torch.randint(2, (len(images),))
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(len(images))
    maps = torch.stack([flip * cos, -sin, zero, flip * sin, cos, zero], 1).reshape(-1, 2, 3)
    grid = affine_grid(maps, images.shape, align_corners=False)
    return grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def draw(figure, trained, test, names):
    """Losses, errors by class, and images that RK-Net gets wrong."""
    grid = figure.add_gridspec(2, 10, height_ratios=[3, 1])
    draw_losses(figure.add_subplot(grid[0, :5]), trained)
    axes = figure.add_subplot(grid[0, 5:])
    for i, (each, colour) in enumerate(zip(trained, COLOURS)):
        missed = wrong(each.net, test)
        rates = [100 * missed[test.labels == k].float().mean().item() for k in range(len(names))]
        places = [k + 0.26 * (i - 1) for k in range(len(names))]
        axes.barh(places, rates, 0.24, color=colour, label=f"{each.name}, {each.error:.1f} %")
    axes.set(title="Test error by class", xlabel="%", yticks=range(len(names)), yticklabels=names)
    axes.invert_yaxis()
    axes.set_xlim(right=1.4 * axes.get_xlim()[1])
    axes.legend(loc="upper right")
    row = [grid[1, column] for column in range(10)]
    draw_wrong(
        figure,
        row,
        trained[-1].net,
        test,
        lambda label, answer: f"{names[label]}\ntaken for\n{names[answer]}",
    )
    figure.supxlabel("what RK-Net gets wrong", fontsize=10, color=INK)


def parse():
    made = parser(__doc__, "cifar.png")
    made.add_argument("--data", type=Path, metavar="DIR", help="folder of CIFAR-10 (synthetic shapes)")
    return made.parse_args()


if __name__ == "__main__":
    main()
