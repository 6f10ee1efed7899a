"""Labels every pixel of street scenes by a UNet whose contracting path is residual blocks, or four ODEs.

Problem. Synthetic street scenes of 64x64 pixels: sky, buildings, trees, pavement, road, cars and people; or
Cityscapes, with --data DIR, as published or as pairs of images. Two UNets, alike but for the contracting path:
  ResNet-UNet     as in ResNet-18, two residual blocks on each of four levels;
  NeuralODE-UNet  one ODE on each level, solved by Euler's method with dt = 0.5: two steps with the same weights.

Both are trained alike, for 14 epochs as published, by cross entropy plus one minus a soft Dice coefficient, in which
rare classes count as much as frequent ones. On synthetic scenes each net is trained with two seeds.

Right answer. The ODEs are about as good: published on Cityscapes are a Dice coefficient of 0.836 against 0.851, and
an IoU of 0.719 against 0.742. Both are averages over the classes: with A the pixels that a model gives to a class and
B those that have it, Dice is 2 |A and B| / (|A| + |B|) and IoU |A and B| / |A or B|, over all test images together.
Figures of the synthetic scenes compare the two nets, and are not to be compared with those of photographs.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy, interpolate, one_hot

import flashode
from classifiers import peak_memory
from flashode.datasets import CITYSCAPES_CLASSES, SCENE_CLASSES, VOID, Labelled, cityscapes, scenes
from flashode.nn import ConvField, ODEBlock, ResidualBlock
from pictures import INK, PALE, colours_of, save_picture
from training import Training, parser, prepare, table

WIDTHS = (16, 32, 64, 128)
EPOCHS, RATE = 14, 1e-2


# ---- models ----------------------------------------------------------------------------------


def residual_level(channels):
    return nn.Sequential(ResidualBlock(channels), ResidualBlock(channels))


def ode_level(channels):
    return ODEBlock(ConvField(channels), method="euler", options={"step_size": 0.5})


LEVELS = {"ResNet-UNet": residual_level, "NeuralODE-UNet": ode_level}
COLOURS = {"ResNet-UNet": INK, "NeuralODE-UNet": "#d1495b"}


class UNet(nn.Module):
    """Images (B, 3, H, W) to scores (B, classes, H, W); H and W are multiples of 16 (Ronneberger et al. 2015).

    The contracting path is at a half to a sixteenth of the resolution; the last merge has the image itself.

    Args:
        level: makes the body of a level of the contracting path, by its number of channels.
        classes: how many.
    """

    def __init__(self, level, classes):
        super().__init__()
        before = (3, *WIDTHS[:-1])
        self.entries = nn.ModuleList(nn.Conv2d(m, n, 3, padding=1, stride=2) for m, n in zip(before, WIDTHS))
        self.levels = nn.ModuleList(level(channels) for channels in WIDTHS)
        self.merges = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(m + n, m, 3, padding=1), channel_norm(m), nn.ReLU(), nn.Conv2d(m, m, 3, padding=1)
            )
            for m, n in zip(WIDTHS, WIDTHS[1:])
        )
        last = WIDTHS[0]
        self.scores = nn.Sequential(
            nn.Conv2d(3 + last, last, 3, padding=1),
            channel_norm(last),
            nn.ReLU(),
            nn.Conv2d(last, classes, 1),
        )

    def forward(self, images):
        y, passed = images, []
        for entry, level in zip(self.entries, self.levels):
            y = level(entry(y))
            passed.append(y)
        for merge, fine in reversed(list(zip(self.merges, passed))):
            y = merge(beside(fine, y))
        return self.scores(beside(images, y))


def channel_norm(channels):
    """Normalizes every channel by itself; of a pair in one group, the lower one may be lost to the ReLU everywhere."""
    return nn.GroupNorm(channels, channels)


def beside(fine, coarse):
    return torch.cat([fine, interpolate(coarse, fine.shape[2:], mode="nearest")], 1)


# ---- training --------------------------------------------------------------------------------


@dataclass
class Segmented:
    """A trained UNet, the Dice coefficient and IoU of every class, and what it cost."""

    name: str
    seed: int
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
        return [self.name, self.seed, dice, iou, parameters, self.seconds, self.memory]


def loss_of(scores, labels):
    """Cross entropy, plus one minus the soft Dice coefficient: probabilities in place of answers, mean over classes."""
    counted = (labels != VOID)[:, None]
    given = scores.softmax(1) * counted
    there = one_hot(labels.where(labels != VOID, 0), scores.shape[1]).movedim(-1, 1) * counted
    both, either = (part.sum((0, 2, 3)) for part in (given * there, given + there))
    dice = (2 * both + 1) / (either + 1)  # 1 where a class is neither there nor given
    return cross_entropy(scores, labels, ignore_index=VOID) + 1 - dice.mean()


def fit(args, name, net, train, steps, batch, rate) -> Training:
    """Adam on random batches; the learning rate rises over a twentieth of the steps, and falls along a cosine."""

    def course(step):
        return min(1, 20 * (step + 1) / steps) * 0.5 * (1 + math.cos(math.pi * step / steps))

    adam = torch.optim.Adam(net.parameters(), rate)
    rates = torch.optim.lr_scheduler.LambdaLR(adam, course)
    training = Training(args, name, steps, net=net, adam=adam, rates=rates)
    for _ in training:
        rows = torch.randint(len(train.labels), (batch,))
        adam.zero_grad()
        loss = loss_of(net(train.images[rows]), train.labels[rows])
        loss.backward()
        adam.step()
        rates.step()
        training.show(loss=loss.item())
    return training


def compare_nets(args, train, test, classes, steps, batch) -> list[Segmented]:
    """Both nets, with the same batches, for every seed."""
    memory = peak_memory(
        {name: UNet(level, classes) for name, level in LEVELS.items()},
        train.images[:batch],
        train.labels[:batch],
        loss_of,
    )
    fits = []
    for seed in (args.seed, args.seed + 1) if args.data is None else (args.seed,):
        for name, level in LEVELS.items():
            torch.manual_seed(seed)
            net = UNet(level, classes)
            torch.manual_seed(seed)
            done = fit(args, f"{name}, seed {seed}", net, train, steps, batch, RATE)
            overlap = overlaps(net, test, classes)
            fits.append(
                Segmented(name, seed, net, *overlap, done.seconds, memory[name], done.history["loss"])
            )
    return fits


def compare_rates(args, train, classes, steps, batch):
    """Prints the loss on a tenth of the training scenes, after a quarter of the steps on the others, by learning rate."""
    kept = len(train.labels) // 10
    rest, held = (Labelled(*(each[part] for each in train)) for part in (slice(kept, None), slice(kept)))
    rows = []
    for rate in args.rates:
        losses = []
        for name, level in LEVELS.items():
            torch.manual_seed(args.seed)
            net = UNet(level, classes)
            fit(args, f"{name}, rate {rate:g}", net, rest, max(1, steps // 4), batch, rate)
            with torch.no_grad():
                losses.append(loss_of(net(held.images), held.labels).item())
        rows.append([rate, *losses])
    table(["learning rate", *(f"loss of {name}" for name in LEVELS)], rows)


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
    if args.data is None:
        torch.set_num_threads(1 if args.quick else min(2, torch.get_num_threads()))
    train, test, names = load(args)
    batch = 4 if args.quick else 8
    steps = 3 if args.quick else EPOCHS * len(train.labels) // batch
    if args.rates:
        return compare_rates(args, train, len(names), steps, batch)
    fits = compare_nets(args, train, test, len(names), steps, batch)
    table(["model", "seed", "Dice", "IoU", "parameters", "s", "MB a step"], [each.row for each in fits])
    print()
    columns = [by_class(fits, name, figure).tolist() for name in LEVELS for figure in ("dice", "iou")]
    headings = ["class", *(f"{name} {figure}" for name in LEVELS for figure in ("Dice", "IoU"))]
    table(headings, [list(row) for row in zip(names, *columns)])
    save_picture(args, lambda figure: draw(figure, fits, test, names), (11, 6.2))


def by_class(fits, name, figure):
    """``"dice"`` or ``"iou"`` of every class, (classes,): the mean over the seeds of a net."""
    return torch.stack([getattr(one, figure) for one in fits if one.name == name]).mean(0)


# ---- picture ---------------------------------------------------------------------------------


def draw(figure, fits, test, names):
    """Test scenes, their labels and both answers of the first seed, dark where wrong; IoU of every class; losses."""
    left, right = figure.subfigures(1, 2, width_ratios=[1.7, 1])
    images, labels = test.images[:4], test.labels[:4]
    palette = colours_of(len(names))
    painted = torch.tensor(palette(labels.clamp(max=len(names) - 1).numpy()))[..., :3]
    rows = {"scene": images.permute(0, 2, 3, 1), "labels": painted}
    for one in fits[: len(LEVELS)]:
        with torch.no_grad():
            correct = one.net(images).argmax(1) == labels
        rows[one.name] = painted.where(correct[..., None] | (labels == VOID)[..., None], 0.15)
    for line, (title, pictures) in zip(left.subplots(len(rows), 4, squeeze=False), rows.items()):
        for axes, picture in zip(line, pictures):
            axes.imshow(picture)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        line[0].set_ylabel(title)
    classes, losses = right.subplots(2, 1, height_ratios=[1.6, 1])
    places = torch.arange(len(names))
    for i, one in enumerate(fits):
        colour, label = COLOURS[one.name], one.name if i < len(LEVELS) else None
        shift = 0.12 if one.name == fits[0].name else -0.12
        classes.plot(one.iou, places - shift, "o", ms=5, color=colour, alpha=0.8, label=label)
        span = max(1, len(one.losses) // 80)
        means = torch.tensor(one.losses).unfold(0, span, span).mean(1)
        losses.plot(span * torch.arange(len(means)), means, color=colour, lw=1, alpha=0.8)
    classes.set(title="IoU by class, every seed", yticks=places, yticklabels=names)
    classes.grid(axis="y", color=PALE, lw=0.6)
    for k, tick in enumerate(classes.get_yticklabels()):
        tick.set_bbox({"facecolor": palette(k), "edgecolor": "none", "boxstyle": "round,pad=0.2"})
    classes.invert_yaxis()
    classes.set_xlim(right=1)
    classes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.08), ncols=2)
    losses.set(title="Training loss", xlabel="step", yscale="log")


def parse():
    made = parser(__doc__, "segmentation.png")
    add = made.add_argument
    add("--data", type=Path, metavar="DIR", help="folder of Cityscapes (synthetic scenes)")
    add("--rates", type=float, nargs="+", metavar="R", help="only compare learning rates, on held-out scenes")
    return made.parse_args()


if __name__ == "__main__":
    main()
