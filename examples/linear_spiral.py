"""Learns the matrix of a linear spiral in fifteen epochs, and that of a noisy one that is damped hard.

Problem 1. 100 points of dz/dt = A z, A = [[-0.1, -1], [1, -0.1]], z(0) = (1, 1), 0 <= t <= 10. The field is one
linear layer, four numbers. Adam with a learning rate of 0.1; an epoch is ten steps, each on 32 pieces of the
trajectory, ten points long.

Right answer. A, and the spiral by epoch 15.

Problem 2. dz/dt = [[-1, -1], [1, -0.5]] z, at rest long before t = 10, with Gaussian noise of standard deviation
0.03. The field is a linear layer, or a network with 32 hidden units that is not told that the law is linear.

Right answer. The distance to the points that the true solution has, the noise: no more can be learned from them.

Pieces find the law from any start. Steps on the whole trajectory from the first one on do not: where a guess turns
at a wrong rate, a little better is no better on average over time, and most fits end up in a wrong law. Problem 2
has them in its last third, to take out the noise of the pieces' first points.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

import flashode
from flashode.nn import MLPField
from pictures import INK, save_picture
from training import Training, parser, prepare, race, table

try:
    import torchdiffeq
except ImportError:
    torchdiffeq = None

SPIRAL = torch.tensor([[-0.1, -1.0], [1.0, -0.1]])
DAMPED = torch.tensor([[-1.0, -1.0], [1.0, -0.5]])
TIMES = torch.linspace(0, 10, 100)
NOISE = 0.03
STEPS, PIECES = 10, 32  # in an epoch, in a step
PIECE_TIMES = TIMES[:11]
SHOWN = (1, 2, 5, 6, 7, 10, 11, 15)
ORANGE, BLUE, RED = "#e8963a", "#1f6fb4", "#d1495b"


class Linear(nn.Module):
    """dz/dt = A z."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Linear(2, 2, bias=False)

    def forward(self, t, z):
        return self.matrix(z)


def spiral(matrix):
    """The solution at `TIMES` in closed form, (100, 2)."""
    return torch.matrix_exp(TIMES[:, None, None] * matrix) @ torch.ones(2)


def solved(field, start, times, odeint=flashode.odeint):
    return odeint(field, start, times, rtol=1e-4, atol=1e-5)


def error_of_pieces(field, points, odeint=flashode.odeint):
    """Mean squared error of random pieces, each predicted from its first point."""
    rows = torch.arange(len(PIECE_TIMES))[:, None]
    pieces = points[rows + torch.randint(len(points) - len(rows), (PIECES,))]
    return (solved(field, pieces[0], PIECE_TIMES, odeint) - pieces).square().mean()


def error(field, points, odeint=flashode.odeint):
    """Mean squared error of the whole solution from (1, 1)."""
    return (solved(field, torch.ones(2), TIMES, odeint) - points).square().mean()


def epoch(field, adam, step_error, points):
    for _ in range(STEPS):
        adam.zero_grad()
        step_error(field, points).backward()
        adam.step()


class Fit:
    """A field in training, and its solution after every epoch so far.

    Attributes:
        solutions: (epochs, 100, 2).
        errors: the mean squared distances of the solutions to the points.
    """

    def __init__(self, field, points):
        self.field, self.points = flashode.compile(field), points
        self.solutions, self.errors = torch.empty(0, *points.shape), []

    def train(self, args, name, step_error, epochs, rate, last_rate):
        """Adam, with a learning rate that falls from ``rate`` to ``last_rate``."""
        adam = torch.optim.Adam(self.field.parameters(), rate)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, epochs, last_rate)
        kept = nn.Module()  # what a checkpoint is to have beside
        kept.register_buffer("solutions", torch.zeros(epochs, *self.points.shape))
        training = Training(args, name, epochs, field=self.field, adam=adam, falling=falling, kept=kept)
        for number in training:
            epoch(self.field, adam, step_error, self.points)
            falling.step()
            with torch.no_grad():
                kept.solutions[number] = solved(self.field, torch.ones(2), TIMES)
            training.show(mse=(kept.solutions[number] - self.points).square().mean())
        self.solutions = torch.cat([self.solutions, kept.solutions])
        self.errors += training.history["mse"]
        return self


def report(spiral_fit, linear, network, noisy, truth):
    print("problem 1, a linear layer\n")
    table(["epoch", "mse"], [[i + 1, x] for i, x in enumerate(spiral_fit.errors)])
    learned = spiral_fit.field.matrix.weight.detach()
    rows = ", ".join(f"[{a:.4f}, {b:.4f}]" for a, b in learned)
    print(f"\nlearned A: [{rows}], worst error {(learned - SPIRAL).abs().max():.4f}")
    print(
        f"\nproblem 2, {len(linear.errors)} epochs; true solution to the points: {rms(truth - noisy):.4f}\n"
    )
    rows = []
    for name, each in (("linear layer", linear), ("network", network)):
        last = each.solutions[-1]
        rows.append([name, each.errors[0] ** 0.5, rms(last - noisy), rms(last - truth)])
    table(["field", "rms to the points after 1 epoch", "at last", "rms to the true solution"], rows)


def rms(difference) -> float:
    return difference.square().mean().sqrt().item()


def compare(field, points, turns):
    """Prints what an epoch of problem 1 takes with the field compiled, called, and solved by torchdiffeq."""

    def epoch_of(field, odeint=flashode.odeint):
        adam = torch.optim.Adam(field.parameters(), 1e-4)
        return lambda: epoch(field, adam, lambda f, x: error_of_pieces(f, x, odeint), points)

    runs = {
        "an epoch, flashode, compiled": epoch_of(flashode.compile(copy.deepcopy(field))),
        "an epoch, flashode": epoch_of(copy.deepcopy(field)),
    }
    if torchdiffeq is not None:
        runs["an epoch, torchdiffeq"] = epoch_of(copy.deepcopy(field), torchdiffeq.odeint)
    race(runs, turns)


def draw(figure, spiral_fit, linear, network, noisy, truth):
    """Problem 1 after some of its epochs; problem 2 in the plane, in time, and its errors."""
    above, below = figure.subfigures(2, 1, height_ratios=[1, 1.9])
    points = spiral(SPIRAL)
    for axes, number in zip(above.subplots(1, len(SHOWN), sharex=True, sharey=True), SHOWN):
        axes.scatter(*points.T, s=7, color=ORANGE, linewidths=0)
        axes.scatter(*spiral_fit.solutions[number - 1].T, s=4, color=BLUE, linewidths=0)
        axes.set(title=f"epoch {number}", aspect="equal", xlim=(-1.6, 1.6), ylim=(-1.6, 1.6))
    plane, time, loss = below.subplots(1, 3)
    fits = (("linear layer", linear, BLUE, "-"), ("network", network, RED, (0, (4, 2.5))))
    plane.scatter(*noisy.T, s=9, color=ORANGE, linewidths=0, label="data")
    time.scatter(TIMES, noisy[:, 0], s=9, color=ORANGE, linewidths=0)
    time.scatter(TIMES, noisy[:, 1], s=9, facecolors="white", edgecolors=ORANGE, linewidths=0.8)
    for name, each, colour, style in fits:
        plane.plot(*each.solutions[-1].T, color=colour, ls=style, lw=1.6, label=name)
        time.plot(TIMES, each.solutions[-1], color=colour, ls=style, lw=1.6)
        loss.plot(range(1, len(each.errors) + 1), each.errors, color=colour, lw=1.6, label=name)
    loss.axhline(rms(truth - noisy) ** 2, color=INK, lw=0.8, ls="--", label="true solution")
    plane.set(title="Damped and noisy", xlabel="x", ylabel="y", aspect="equal")
    time.set(title="x (filled) and y (open) against time", xlabel="t")
    loss.set(title="Mean squared error", xlabel="epoch", yscale="log")
    plane.legend(fontsize=9)
    loss.legend(fontsize=9)


def main():
    args = parser(__doc__, "linear_spiral.png").parse_args()
    prepare(args)
    torch.set_num_threads(1)  # tensors this small only lose by being shared out
    points, truth = spiral(SPIRAL), spiral(DAMPED)
    noisy = truth + NOISE * torch.randn_like(truth)
    first, last = (20, 10) if args.quick else (40, 20)
    spiral_fit = Fit(Linear(), points).train(args, "spiral", error_of_pieces, 15, 0.1, 0.1)
    linear, network = Fit(Linear(), noisy), Fit(MLPField(2, (32,), time=None), noisy)
    for name, each, rate in (("linear layer", linear, 0.1), ("network", network, 0.02)):
        each.train(args, f"damped, {name}", error_of_pieces, first, rate, rate / 10)
        each.train(args, f"damped, {name}, whole", error, last, rate / 10, rate / 200)
    report(spiral_fit, linear, network, noisy, truth)
    compare(spiral_fit.field.func, points, 1 if args.quick else 5)
    save_picture(args, lambda figure: draw(figure, spiral_fit, linear, network, noisy, truth), (12.5, 5.8))


if __name__ == "__main__":
    main()
