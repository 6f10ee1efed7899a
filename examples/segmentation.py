"""Labels every pixel of street scenes by a UNet whose contracting path is residual blocks, or four ODEs.

Problem. Synthetic street scenes of 64x64 pixels: sky, buildings, trees, pavement, road, cars and people; or
Cityscapes, with --data DIR, as published or as pairs of images. Two UNets, alike but for the contracting path:
  ResNet-UNet     as in ResNet-18, two residual blocks on each of four levels;
  NeuralODE-UNet  one ODE on each level, solved by Euler's method with dt = 0.5: two steps with the same weights.

Right answer. The ODEs are about as good: published on Cityscapes are a Dice coefficient of 0.836 against 0.851, and
an IoU of 0.719 against 0.742. Both are averages over the classes: with A the pixels that a model gives to a class and
B those that have it, Dice is 2 |A and B| / (|A| + |B|) and IoU |A and B| / |A or B|, over all test images together.
Figures of the synthetic scenes compare the two nets, and are not to be compared with those of photographs.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy, interpolate

import flashode
from classifiers import peak_memory
from flashode.datasets import CITYSCAPES_CLASSES, SCENE_CLASSES, VOID, cityscapes, scenes
from flashode.nn import ConvField, ODEBlock, ResidualBlock
from pictures import INK, colours_of, save_picture
from training import Training, parser, prepare, table

WIDTHS = (16, 32, 64, 128)
COLOURS = {"ResNet-UNet": INK, "NeuralODE-UNet": "#d1495b"}


# ---- models ----------------------------------------------------------------------------------


def residual_level(channels):
    return nn.Sequential(ResidualBlock(channels), ResidualBlock(channels))


def ode_level(channels):
    return ODEBlock(ConvField(channels), method="euler", options={"step_size": 0.5})


class UNet(nn.Module):
    """Images (B, 3, H, W) to scores (B, classes, H, W); H and W are multiples of 8 (Ronneberger et al. 2015).

    Args:
        level: makes the body of a level of the contracting path, by its number of channels.
        classes: how many.
    """

    def __init__(self, level, classes):
        super().__init__()
        before = (3, *WIDTHS)
        self.entries = nn.ModuleList(
            nn.Conv2d(m, n, 3, padding=1, stride=1 if i == 0 else 2)
            for i, (m, n) in enumerate(zip(before, WIDTHS))
        )
        self.levels = nn.ModuleList(level(channels) for channels in WIDTHS)
        self.merges = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(m + n, m, 3, padding=1),
                nn.GroupNorm(8, m),
                nn.ReLU(),
                nn.Conv2d(m, m, 3, padding=1),
            )
            for m, n in zip(WIDTHS, WIDTHS[1:])
        )
        self.scores = nn.Sequential(nn.GroupNorm(8, WIDTHS[0]), nn.ReLU(), nn.Conv2d(WIDTHS[0], classes, 1))

    def forward(self, images):
        y, passed = images, []
        for entry, level in zip(self.entries, self.levels):
            y = level(entry(y))
            passed.append(y)
        for merge, fine in reversed(list(zip(self.merges, passed))):
            y = merge(torch.cat([fine, interpolate(y, fine.shape[2:], mode="nearest")], 1))
        return self.scores(y)


# ---- training --------------------------------------------------------------------------------


@dataclass
class Segmented:
    """A trained UNet, the Dice coefficient and IoU of every class, and what it cost."""

    name: str
    net: nn.Module
    dice: torch.Tensor
    iou: torch.Tensor
    seconds: float
    memory: float
    losses: list[float]

    @property
    def row(self):
        parameters = sum(p.numel() for p in self.net.parameters())
        dice, iou = (each.nanmean().item() for each in (self.dice, self.iou))
        return [self.name, dice, iou, parameters, self.seconds, self.memory]


def fit(args, name, net, train, test, classes, steps, batch, memory) -> Segmented:
    torch.manual_seed(args.seed)  # the same batches for both
    adam = torch.optim.Adam(net.parameters(), 3e-3)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    training = Training(args, name, steps, net=net, adam=adam, falling=falling)
    for _ in training:
        rows = torch.randint(len(train.labels), (batch,))
        adam.zero_grad()
        loss = cross_entropy(net(train.images[rows]), train.labels[rows], ignore_index=VOID)
        loss.backward()
        adam.step()
        falling.step()
        training.show(loss=loss.item())
    dice, iou = overlaps(net, test, classes)
    return Segmented(name, net, dice, iou, training.seconds, memory, training.history["loss"])


@torch.no_grad()
def overlaps(net, test, classes):
    """Dice coefficient and IoU of every class, (classes,); NaN where a class is neither there nor given."""
    both, given, there = torch.zeros(3, classes, dtype=torch.float64)
    for images, labels in zip(test.images.split(50), test.labels.split(50)):
        counted = labels != VOID
        answers, labels = net(images).argmax(1)[counted], labels[counted]
        both += torch.bincount(labels[answers == labels], minlength=classes)
        given += torch.bincount(answers, minlength=classes)
        there += torch.bincount(labels, minlength=classes)
    return 2 * both / (given + there), both / (given + there - both)


def load(args):
    if args.data is None:
        made = torch.Generator().manual_seed(args.seed)
        train, test = (scenes(n, generator=made) for n in ((40, 20) if args.quick else (1000, 200)))
        what, names = "SYNTHETIC street scenes, not Cityscapes (give --data DIR for that)", SCENE_CLASSES
    else:
        try:
            train, test = (cityscapes(args.data, split) for split in ("train", "val"))
        except (ImportError, flashode.ArgumentError) as error:
            sys.exit(f"segmentation.py: {error}")
        what, names = f"Cityscapes from {args.data}", CITYSCAPES_CLASSES
    print(f"{what}: {len(train.labels):,} scenes to train on, {len(test.labels):,} to test on", flush=True)
    return train, test, names


def main():
    args = parse()
    prepare(args)
    torch.set_num_threads(1 if args.data is None else torch.get_num_threads())
    train, test, names = load(args)
    nets = {}
    for name, level in (("ResNet-UNet", residual_level), ("NeuralODE-UNet", ode_level)):
        torch.manual_seed(args.seed)
        nets[name] = UNet(level, len(names))
    batch = 4 if args.quick else 8
    steps = 3 if args.quick else 250 if args.data is None else 14 * len(train.labels) // batch
    memory = peak_memory(
        nets, train.images[:batch], train.labels[:batch].where(train.labels[:batch] != VOID, 0)
    )
    fits = [
        fit(args, name, net, train, test, len(names), steps, batch, memory[name])
        for name, net in nets.items()
    ]
    table(["model", "Dice", "IoU", "parameters", "s", "MB a step"], [each.row for each in fits])
    print()
    columns = [each.tolist() for one in fits for each in (one.dice, one.iou)]
    headings = ["class", *(f"{one.name} {figure}" for one in fits for figure in ("Dice", "IoU"))]
    table(headings, [list(row) for row in zip(names, *columns)])
    save_picture(args, lambda figure: draw(figure, fits, test, names), (11, 6.2))


# ---- picture ---------------------------------------------------------------------------------


def draw(figure, fits, test, names):
    """Test scenes, their labels and both answers, and the IoU of every class."""
    left, right = figure.subfigures(1, 2, width_ratios=[1.7, 1])
    shown = test.images[:4]
    with torch.no_grad():
        rows = {"scene": shown.permute(0, 2, 3, 1), "labels": test.labels[:4]}
        rows |= {one.name: one.net(shown).argmax(1) for one in fits}
    panels = left.subplots(len(rows), 4, squeeze=False)
    palette = colours_of(len(names))
    for line, (title, pictures) in zip(panels, rows.items()):
        for axes, picture in zip(line, pictures):
            painted = picture if picture.ndim == 3 else palette(picture.clamp(max=len(names) - 1).numpy())
            axes.imshow(painted)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        line[0].set_ylabel(title)
    bars, losses = right.subplots(2, 1, height_ratios=[1.6, 1])
    places = range(len(names))
    for i, one in enumerate(fits):
        label = f"{one.name}, mean {one.iou.nanmean():.3f}"
        bars.barh([k + 0.38 * (i - 0.5) for k in places], one.iou, 0.36, color=COLOURS[one.name], label=label)
        losses.plot(one.losses, color=COLOURS[one.name], lw=0.9, alpha=0.8)
    bars.set(title="IoU by class", xlim=(0, 1), yticks=places, yticklabels=names)
    for k, tick in enumerate(bars.get_yticklabels()):
        tick.set_bbox({"facecolor": palette(k), "edgecolor": "none", "boxstyle": "round,pad=0.2"})
    bars.invert_yaxis()
    bars.legend(loc="upper center", bbox_to_anchor=(0.4, -0.08))
    losses.set(title="Training loss", xlabel="step", yscale="log")


def parse():
    made = parser(__doc__, "segmentation.png")
    made.add_argument("--data", type=Path, metavar="DIR", help="folder of Cityscapes (synthetic scenes)")
    return made.parse_args()


if __name__ == "__main__":
    main()
