"""Two maps that no flow can make, and how one more dimension makes them (Dupont et al. 2019, arXiv:1904.01681).

A1. -1 -> 1 and 1 -> -1 on the line, by the flow alone. Paths of an ODE cannot cross: the best that a flow of the line
can do is to bring both to 0, with a mean squared error of 1.
A2. The disc to -1 and the ring around it to 1, by a flow of the plane and a linear layer. A flow does not tear the
ring: some of it, or of the disc, stays on the wrong side of every line, or close to it.

Three models of either: a plain ODE; the ODE with one zero appended to its state (ANODE), which turns the line over in
the plane, and lifts the disc out of the ring; and a ResNet of five blocks, whose steps may jump across each other.

Right answer. The plain ODE stays at 1 in A1, and above the others in A2, where it takes more and more calls of its
field. The others' losses vanish, and the calls of the ANODE soon stay as they are.

A training step of the ANODE of A2 is then timed with its field compiled, called by the C++ engine, and by torchdiffeq.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.functional import mse_loss

import flashode
from flashode.datasets import annulus, flip_1d
from flashode.nn import MLPField, ODEBlock
from pictures import save_picture
from training import Training, parser, prepare, race, table

try:
    import torchdiffeq
except ImportError:
    torchdiffeq = None

POINTS, BATCH, HIDDEN, BLOCKS = 4096, 128, (32, 32), 5
MODELS = ("ODE", "ANODE", "ResNet")
COLOURS = dict(zip(MODELS, ("#d1495b", "#1f6fb4", "#8a93a6")))
CLASSES = ("#e8963a", "#1f6fb4")


class Residual(nn.Module):
    """``y + field(y)``."""

    def __init__(self, field):
        super().__init__()
        self.field = field

    def forward(self, y):
        return y + self.field(None, y)


def made(name, dim, keep_augmented):
    """A model of states of ``dim`` features, before anything reads them."""
    if name == "ResNet":
        return nn.Sequential(*(Residual(MLPField(dim, HIDDEN, time=None)) for _ in range(BLOCKS)))
    augment = int(name == "ANODE")
    field = flashode.compile(MLPField(dim + augment, HIDDEN))
    return ODEBlock(field, augment=augment, keep_augmented=keep_augmented)


def classifier(name):
    """Points of the plane to scores, positive for the ring."""
    return nn.Sequential(made(name, 2, True), nn.Linear(3 if name == "ANODE" else 2, 1), nn.Flatten(0))


def train(args, name, model, flow, points, targets, epochs, rate):
    """Adam on the mean squared error, with a learning rate that falls along a cosine; returns losses and calls of the
    field by epoch."""
    adam = torch.optim.Adam(model.parameters(), rate)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, epochs)
    training = Training(args, name, epochs, model=model, adam=adam, falling=falling)
    for _ in training:
        losses, calls = [], []
        for rows in torch.randperm(len(points)).split(BATCH):
            adam.zero_grad()
            loss = mse_loss(model(points[rows]), targets[rows])
            loss.backward()
            adam.step()
            losses.append(loss.item())
            calls.append(flow.nfe_forward if isinstance(flow, ODEBlock) else BLOCKS)
        falling.step()
        training.show(loss=sum(losses) / len(losses), nfe=sum(calls) / len(calls))
    return training.history


def compare(model, points, targets, turns):
    """Prints what a step of further training takes with the field compiled, called, and solved by torchdiffeq."""
    field = model[0].field.func
    called = nn.Sequential(ODEBlock(field, augment=1, keep_augmented=True), *model[1:])
    models = {"flashode, compiled": model, "flashode": called}
    if torchdiffeq is not None:
        models["torchdiffeq"] = nn.Sequential(Torchdiffeq(field), *model[1:])

    def step_of(model):
        model = copy.deepcopy(model)
        adam = torch.optim.Adam(model.parameters(), 1e-4)

        def step():
            adam.zero_grad()
            mse_loss(model(points), targets).backward()
            adam.step()

        return step

    race({f"a step, {name}": step_of(model) for name, model in models.items()}, turns)


class Torchdiffeq(nn.Module):
    """The flow with one more zero in its state, as torchdiffeq solves it."""

    def __init__(self, field):
        super().__init__()
        self.field = field

    def forward(self, y):
        y = torch.cat([y, torch.zeros_like(y[:, :1])], 1)
        return torchdiffeq.odeint(self.field, y, torch.tensor([0.0, 1.0]), rtol=1e-3, atol=1e-3)[-1]


def states(flow, points, times):
    """The states that points pass through, (T, N, dim): at times, or after the blocks of a ResNet."""
    if isinstance(flow, ODEBlock):
        return flow.path(points, times)
    path = [points]
    for block in flow:
        path.append(block(path[-1]))
    return torch.stack(path)


def draw_flip(axes, flow, name, points):
    times = torch.linspace(0, 1, 50 if isinstance(flow, ODEBlock) else BLOCKS + 1)
    path = states(flow, points, times)[..., 0]
    for colour, mine in zip(CLASSES, (points[:, 0] < 0, points[:, 0] > 0)):
        axes.plot(
            times, path[:, mine], color=colour, lw=0.8, alpha=0.7, marker="." if name == "ResNet" else ""
        )
    for y in (-1, 1):
        axes.axhline(y, color="#d3d7e0", lw=0.8, zorder=0)
    axes.set(title=f"A1: {name}", xlabel="t", ylabel="y")


def draw_classes(axes, flow, name, points, labels):
    last = states(flow, points, torch.tensor([0.0, 1.0]))[-1]
    for colour, label in zip(CLASSES, (0, 1)):
        axes.scatter(*last[labels == label].T, s=5, color=colour, linewidths=0, alpha=0.8)
    axes.set_title(f"A2: {name}, t = 1")


def draw_curves(axes, histories, figure, **labels):
    for name in histories:
        axes.plot(histories[name][figure], color=COLOURS[name], lw=1.6, label=name)
    axes.set(xlabel="epoch", **labels)
    axes.legend(fontsize=9)


@torch.no_grad()
def draw(figure, flips, flip_histories, flip_points, classifiers, histories, points, labels):
    """Paths of A1 and what A2's points become; losses, and calls of the field."""
    grid = figure.add_gridspec(2, 4)
    for column, name in enumerate(MODELS):
        draw_flip(figure.add_subplot(grid[0, column]), flips[name], name, flip_points[:40])
    draw_curves(figure.add_subplot(grid[0, 3]), flip_histories, "loss", title="A1: loss", ylim=(-0.1, None))
    for column, name in enumerate(MODELS[:2]):
        place = {"projection": "3d"} if name == "ANODE" else {}
        axes = figure.add_subplot(grid[1, column], **place)
        draw_classes(axes, classifiers[name][0], name, points, labels)
    calls = {name: histories[name] for name in MODELS[:2]}
    draw_curves(figure.add_subplot(grid[1, 2]), calls, "nfe", title="A2: calls of the field, forward")
    draw_curves(figure.add_subplot(grid[1, 3]), histories, "loss", title="A2: loss", yscale="log")


def main():
    args = parser(__doc__, "augmented.png").parse_args()
    prepare(args)
    torch.set_num_threads(1)  # tensors this small only lose by being shared out
    epochs = 20 if args.quick else 40
    flip_points, flipped = flip_1d(BATCH, noise=0.1)
    points, labels = annulus(POINTS)
    test_points, test_labels = annulus(POINTS)
    flips, classifiers, flip_histories, histories, rows = {}, {}, {}, {}, []
    for name in MODELS:
        flow = flips[name] = made(name, 1, False)
        flip_histories[name] = train(args, f"A1, {name}", flow, flow, flip_points, flipped, 5 * epochs, 0.02)
        model = classifiers[name] = classifier(name)
        targets = 2.0 * labels - 1
        history = histories[name] = train(
            args, f"A2, {name}", model, model[0], points, targets, epochs, 0.003
        )
        with torch.no_grad():
            right = 100 * ((model(test_points) > 0) == test_labels).float().mean().item()
        losses, calls = (flip_histories[name]["loss"][-1], history["loss"][-1]), history["nfe"]
        rows.append([name, sum(p.numel() for p in model.parameters()), *losses, right, calls[0], calls[-1]])
    table(["model", "parameters", "A1 loss", "A2 loss", "test accuracy %", "nfe, first epoch", "last"], rows)
    compare(classifiers["ANODE"], points[:BATCH], targets[:BATCH], 3 if args.quick else 101)
    trained = flips, flip_histories, flip_points, classifiers, histories
    save_picture(args, lambda figure: draw(figure, *trained, test_points, test_labels), (14, 6.4))


if __name__ == "__main__":
    main()
