"""Classifies handwritten digits by residual networks, and by one ODE in place of their blocks.

Problem. Images of digits, 8x8 pixels, that come with scikit-learn: 1,198 to train on, 599 to test on; or MNIST, with
--data DIR, the folder of its four files. Four nets with the same stem and the same head:
  ResNet-1  one residual block;
  ResNet-6  six of them;
  RK-Net    one field, solved by 6 steps of Euler's method, gradients through the steps;
  ODE-Net   the same field, solved by dopri5, gradients by the adjoint equation, in memory that does not grow with
            the number of steps.

Right answer. The ODEs do as well as six blocks, with less than a third of their parameters: published are errors of
0.4 to 0.6 % on MNIST, with 0.15 to 0.21 million parameters against 0.51 to 0.6 million. On 599 test images one error
is 0.17 %, and figures that differ by less than 1 % say nothing about which net is better.

At the end one step of ODE-Net is timed beside the same step by torchdiffeq, where that is installed.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

import flashode
from classifiers import COLOURS, Trained, compare, draw_losses, draw_wrong, peak_memory, small_stem
from flashode.datasets import digits, mnist
from flashode.nn import ODENet, ResNet, RKNet
from pictures import save_picture
from training import parser, prepare, race, table

CHANNELS = 64


def main():
    args = parse()
    prepare(args)
    torch.set_num_threads(1 if args.data is None else torch.get_num_threads())
    train, test = load(args)
    nets = {}
    for name, make in MODELS.items():
        torch.manual_seed(args.seed)
        nets[name] = make() if args.data else small_stem(make(), CHANNELS)
    batch = 32 if args.quick else 128
    steps = 5 if args.quick else 200 if args.data is None else 5 * len(train.labels) // 128
    trained = compare(args, nets, train, test, steps, batch)
    table(Trained.HEADINGS, [each.row for each in trained])
    nets["ODE-Net"].body.adjoint = None
    direct = peak_memory({"direct": nets["ODE-Net"]}, train.images[:batch], train.labels[:batch])["direct"]
    print(f"\na step of ODE-Net with gradients through the graph of its steps: {direct:.1f} MB")
    race_steps(nets["ODE-Net"], train, turns=1 if args.quick else 11)
    save_picture(args, lambda figure: draw(figure, trained, test), (11, 5.6))


MODELS = {
    "ResNet-1": lambda: ResNet(1, channels=CHANNELS),
    "ResNet-6": lambda: ResNet(6, channels=CHANNELS),
    "RK-Net": lambda: RKNet(6, channels=CHANNELS),
    "ODE-Net": lambda: ODENet(channels=CHANNELS),
}


def load(args):
    try:
        train, test = digits() if args.data is None else mnist(args.data)
    except (ImportError, flashode.ArgumentError) as error:
        sys.exit(f"digits.py: {error}")
    what = "scikit-learn's digits" if args.data is None else f"MNIST from {args.data}"
    print(f"{what}: {len(train.labels):,} training images, {len(test.labels):,} test images", flush=True)
    return train, test


def race_steps(net, train, turns):
    """Forward and backward pass of 32 images, in turns: the body's solve by flashode and by torchdiffeq."""
    try:
        import torchdiffeq
    except ImportError:
        return
    y, t = net.stem(train.images[:32]).detach(), torch.tensor([0.0, 1.0])

    def step_by(package):
        end = package.odeint_adjoint(net.body.field, y, t, rtol=1e-3, atol=1e-3, method="dopri5")[-1]
        cross_entropy(net.head(end), train.labels[:32]).backward()

    packages = {"flashode": flashode, "torchdiffeq": torchdiffeq}
    race({f"32 images, ODE-Net, {name}": partial(step_by, each) for name, each in packages.items()}, turns)


def draw(figure, trained, test):
    """Losses, errors against parameters, and the digits that ODE-Net gets wrong."""
    grid = figure.add_gridspec(2, 10, height_ratios=[3, 1])
    draw_losses(figure.add_subplot(grid[0, :5]), trained)
    axes = figure.add_subplot(grid[0, 5:])
    for each, colour, place in zip(trained, COLOURS, (14, 14, 14, -14)):
        axes.scatter(each.parameters, each.error, s=10 * each.memory, color=colour, alpha=0.75, linewidths=0)
        axes.annotate(
            each.name, (each.parameters, each.error), (0, place), textcoords="offset points", ha="center"
        )
    top = max(each.error for each in trained)
    axes.set(xlim=(0, 600_000), ylim=(0, 1.35 * top + 0.1), xlabel="parameters", ylabel="test error, %")
    axes.set(title="Test error; areas are the memory of a step")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:.1f} M")
    row = [grid[1, column] for column in range(10)]
    draw_wrong(figure, row, trained[-1].net, test, lambda label, answer: f"{label} taken for {answer}")
    figure.supxlabel("what ODE-Net gets wrong", fontsize=10)


def parse():
    made = parser(__doc__, "digits.png")
    made.add_argument(
        "--data", type=Path, metavar="DIR", help="folder of MNIST's files (scikit-learn's digits)"
    )
    return made.parse_args()


if __name__ == "__main__":
    main()
