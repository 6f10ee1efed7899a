"""Trains one ODE-Net by every solver and every way to its gradient: does a better solver make a better classifier?

Problem. The 1,198 training digits of scikit-learn, 8x8 pixels, and a field of two convolutions of 16 channels on 4x4
of them, from time 0 to 1. Seven solvers: six with 3 fixed steps each, two of these implicit, and an adaptive one.
Three ways to the gradient: direct, through the graph of the steps; backsolve, the adjoint equation backwards in time;
checkpoint, which takes the steps again. All trainings begin alike and see the same batches.

Right answer. It does not: a field that is trained with its solver makes up for the solver's error, and all rows have
the same test error up to chance. Implicit methods are no exception where their equations are solved to the end, and
their gradients are those of the steps that were taken: published are 1.4 to 1.6 % for them, with equations solved by
L-BFGS, against 0.52 to 0.56 % of the explicit ones. What differs is the time, 9 to 48 minutes there.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

import flashode
from classifiers import Trained, compare, small_stem
from flashode.datasets import digits
from flashode.nn import ConvField, ODEBlock, RKNet
from pictures import INK, PALE, save_picture
from training import parser, prepare, table

CHANNELS, STEPS = 16, 3
EXPLICIT = ("euler", "midpoint", "fehlberg4", "fehlberg5", "fehlberg45")
IMPLICIT = ("implicit_euler", "implicit_midpoint")
GRADIENTS = {"direct": None, "backsolve": "backsolve", "checkpoint": "checkpoint"}


def main():
    args = parser(__doc__, "solver_table.png").parse_args()
    prepare(args)
    torch.set_num_threads(1)
    try:
        train, test = digits()
    except ImportError as error:
        sys.exit(f"solver_table.py: {error}")
    rows, trained = [], {}
    for method in EXPLICIT + IMPLICIT:
        for gradient in GRADIENTS:
            nets = {f"{method}, {gradient}": net_of(method, gradient, args.seed)}
            steps, batch = (1, 16) if args.quick else (200, 64)
            try:
                [each] = compare(args, nets, train, test, steps, batch, rate=7e-3)
            except flashode.SolveError as error:  # the equations of an implicit step may have no solution
                print(f"{method}, {gradient}: {error}")
                continue
            trained[method, gradient] = each
            rows.append([method, gradient, *each.row[1:2], *each.row[3:]])
    table(["solver", "gradient", Trained.HEADINGS[1], *Trained.HEADINGS[3:]], rows)
    print()
    for name, methods in (("explicit", EXPLICIT), ("implicit", IMPLICIT)):
        errors = [each.error for (method, _), each in trained.items() if method in methods]
        mean = sum(errors) / len(errors)
        print(f"{name}: test error {min(errors):.2f} to {max(errors):.2f} %, mean {mean:.2f} %")
    save_picture(args, lambda figure: draw(figure, trained), (11, 4.2))


def net_of(method, gradient, seed):
    torch.manual_seed(seed)
    net = small_stem(RKNet(STEPS, channels=CHANNELS), CHANNELS)
    options = None if method == "fehlberg45" else {"step_size": 1 / STEPS}
    net.body = ODEBlock(ConvField(CHANNELS), method=method, options=options, adjoint=GRADIENTS[gradient])
    # Of all pixels: means over the image would leave too little of 16 channels.
    net.head = nn.Sequential(nn.Flatten(), nn.Linear(16 * CHANNELS, 10))
    return net


def draw(figure, trained):
    """Test error, seconds and memory of every solver, a mark for every way to the gradient."""
    panels = figure.subplots(1, 3, sharey=True)
    methods = EXPLICIT + IMPLICIT
    columns = (
        ("error", "Test error, %"),
        ("seconds", "Seconds of training"),
        ("memory", "Memory of a step, MB"),
    )
    for axes, (column, title) in zip(panels, columns):
        for gradient, (colour, marker, shift) in MARKS.items():
            done = [i for i, method in enumerate(methods) if (method, gradient) in trained]
            values = [getattr(trained[methods[i], gradient], column) for i in done]
            places = [i + shift for i in done]
            axes.scatter(
                values, places, s=42, color=colour, marker=marker, linewidths=0, label=gradient, zorder=2
            )
        axes.set(title=title, yticks=range(len(methods)), yticklabels=methods)
        axes.grid(axis="x", color=PALE, lw=0.7)
        axes.axhline(len(EXPLICIT) - 0.5, color=INK, lw=0.8, ls=":")
    panels[0].invert_yaxis()
    panels[1].set_xscale("log")
    panels[0].set_xlim(0, 1.3 * panels[0].get_xlim()[1])
    panels[2].set_xlim(left=0)
    panels[0].legend(loc="lower left")


MARKS = {
    "direct": ("#2b2b33", "o", -0.2),
    "backsolve": ("#1f6fb4", "s", 0),
    "checkpoint": ("#d1495b", "D", 0.2),
}


if __name__ == "__main__":
    main()
