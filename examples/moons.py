"""Classifies two half moons by carrying them along a learned flow until a line separates them.

Problem. Points of two half circles that reach into each other, with Gaussian noise of standard deviation 0.05:
1,024 to learn from, 1,024 to be tested on. No line separates them. The model is

    dy/dt = net(t, y),  0 <= t <= 1,        then one linear layer, the sign of which is the class.

The flow of an ODE bends the plane without tearing or folding it, and the moons can be drawn apart like that.

Right answer. Every point of the test, 100 %, or all but one: the half circles are ten times the noise apart.

The same epochs are then timed three times: with the field compiled, called by the C++ engine, and by torchdiffeq.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

import flashode
from flashode.datasets import moons
from flashode.nn import MLPField, ODEBlock
from pictures import COLOURS, INK, save_picture
from training import Training, parser, prepare, race, table

try:
    import torchdiffeq
except ImportError:
    torchdiffeq = None

POINTS, BATCH, NOISE = 1024, 128, 0.05
EPOCHS, TOLERANCE = 60, 1e-3
SHADES = "#d9e6f2", "#f7dfe2"


class Classifier(nn.Module):
    """Points (N, 2) to scores (N,), positive for class 1: a flow, and a linear layer."""

    def __init__(self):
        super().__init__()
        field = flashode.compile(MLPField(2, (32, 32)))
        self.flow = ODEBlock(field, rtol=TOLERANCE, atol=TOLERANCE)
        self.read = nn.Linear(2, 1)
        nn.init.zeros_(
            self.read.weight
        )  # the flow is not to be drawn apart along any line before it has begun

    def forward(self, points):
        return self.read(self.flow(points))[:, 0]


def train_epoch(model, adam, points, labels):
    """One pass over shuffled batches; returns the mean loss."""
    losses = []
    for rows in torch.randperm(len(points)).split(BATCH):
        adam.zero_grad()
        loss = binary_cross_entropy_with_logits(model(points[rows]), labels[rows].float())
        loss.backward()
        adam.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def accuracy(model, points, labels):
    """Per cent of the points that get their label."""
    return 100 * ((model(points) > 0) == labels).float().mean().item()


def compare(model, points, labels, turns):
    """Prints what an epoch of further training takes with the field compiled, called, and solved by torchdiffeq."""
    called, by_torchdiffeq = copy.deepcopy(model), copy.deepcopy(model)
    called.flow.field = called.flow.field.func
    models = {"flashode, compiled": copy.deepcopy(model), "flashode": called}
    if torchdiffeq is not None:
        by_torchdiffeq.flow = Torchdiffeq(by_torchdiffeq.flow.field.func)
        models["torchdiffeq"] = by_torchdiffeq

    def epoch_of(model):
        adam = torch.optim.Adam(model.parameters(), 1e-4)
        return lambda: train_epoch(model, adam, points, labels)

    race({f"an epoch, {name}": epoch_of(model) for name, model in models.items()}, turns)


class Torchdiffeq(nn.Module):
    """The flow as torchdiffeq solves it."""

    def __init__(self, field):
        super().__init__()
        self.field = field

    def forward(self, y):
        t = torch.tensor([0.0, 1.0])
        return torchdiffeq.odeint(self.field, y, t, rtol=TOLERANCE, atol=TOLERANCE)[-1]


def draw(figure, model, points, labels):
    """The classes of the plane, and the paths along which points are carried."""
    plane, paths = figure.subplots(1, 2)
    x, y = torch.linspace(-1.6, 2.6, 211), torch.linspace(-1.1, 1.6, 136)
    with torch.no_grad():
        grid = torch.cartesian_prod(x, y)
        chance = model(grid).sigmoid().reshape(len(x), len(y)).T
        some, classes = points[:80], labels[:80]
        carried = model.flow.path(some, torch.linspace(0, 1, 60))
    plane.contourf(x, y, chance, levels=[0, 0.5, 1], colors=SHADES)
    plane.contour(x, y, chance, levels=[0.5], colors=INK, linewidths=1.5)
    for label, colour in enumerate(COLOURS[:2]):
        mine = labels == label
        plane.scatter(*points[mine].T, s=9, color=colour, linewidths=0)
        for path in carried[:, classes == label].transpose(0, 1):
            paths.plot(*path.T, color=colour, lw=0.7, alpha=0.6)
        paths.scatter(
            *carried[0, classes == label].T, s=12, facecolors="white", edgecolors=colour, lw=0.8, zorder=3
        )
        paths.scatter(*carried[-1, classes == label].T, s=14, color=colour, linewidths=0, zorder=3)
    plane.set(title="Test points, and the class of every point", xlabel="x", ylabel="y", aspect="equal")
    draw_line(paths, model.read)
    paths.set(title="Paths from t = 0 (open) to t = 1 (filled)", xlabel="x", ylabel="y")


def draw_line(axes, layer):
    """Where a linear layer is zero, across what the axes show."""
    (a, b), c = layer.weight.detach()[0].tolist(), layer.bias.item()
    axes.autoscale(False)
    if abs(b) > abs(a):
        axes.axline((0, -c / b), slope=-a / b, color=INK, lw=1.5)
    else:
        axes.axline((-c / a, 0), (-c / a - b / a, 1), color=INK, lw=1.5)


def main():
    args = parser(__doc__, "moons.png").parse_args()
    prepare(args)
    torch.set_num_threads(1)  # tensors this small only lose by being shared out
    points, labels = moons(POINTS, noise=NOISE)
    test_points, test_labels = moons(POINTS, noise=NOISE)
    model = Classifier()
    adam = torch.optim.AdamW(model.parameters(), 0.02, weight_decay=0.1)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, EPOCHS)
    training = Training(args, "moons", EPOCHS, model=model, adam=adam, falling=falling)
    for _ in training:
        loss = train_epoch(model, adam, points, labels)
        falling.step()
        training.show(
            loss=loss, accuracy=accuracy(model, test_points, test_labels), nfe=model.flow.nfe_forward
        )
    history = training.history
    shown = [0, 1, 4, 9, 14, 19, 29, 59]
    table(
        ["epoch", "loss", "test accuracy %", "nfe forward"],
        [
            [i + 1, history["loss"][i], history["accuracy"][i], int(history["nfe"][i])]
            for i in shown
            if i < training.steps
        ],
    )
    print(f"\ntest accuracy: {history['accuracy'][-1]:.2f} %")
    compare(model, points, labels, 1 if args.quick else 5)
    save_picture(args, lambda figure: draw(figure, model, test_points, test_labels), (11, 4.6))


if __name__ == "__main__":
    main()
