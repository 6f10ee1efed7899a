"""Learns the dynamics behind a noisy spiral twice: as a 2x2 matrix and as a small neural network.

Problem. data/spiral.csv holds 200 observations (t, x, y), unevenly spaced over 0 <= t <= 25, of

    dy/dt = A y,    A = [[-0.1, -1], [1, -0.1]],    y(0) = (2, 0),

with Gaussian noise of standard deviation 0.03. From these rows alone,
  linear  learns the four entries of A, from a random start;
  MLP     learns dy/dt = net(y) with one hidden layer, and is not told that the law is linear.

Right answer. The matrix to within 0.01 in every entry, and for both models about the rms distance to the
rows that the true spiral has, 0.033: only the noise may remain. (data/make_spiral.py wrote the rows.)

Training. One solve of a batch, gradients by `flashode.odeint_adjoint`, a step of Adam. Most iterations
use pieces: from a random row, predict a later one. Short pieces first, longer ones as training goes on:
that finds the right law from any start, where fitting four turns at once gets stuck. The last fifth fits
the whole trajectory from an initial state that is learned too, which takes out the noise of the
pieces' first rows.

Cost is counted in calls of the field (nfe), those of the forward and of the backward solve apart.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import flashode

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

SHIPPED = Path(__file__).resolve().parent / "data" / "spiral.csv"
TRUE_A = torch.tensor([[-0.1, -1.0], [1.0, -0.1]])
TRUE_START = torch.tensor([2.0, 0.0])

MIN_ROWS = 10
DURATION = 25.0  # of any data in its own units of time; the learning rates below are for this
BATCH = 128
METHODS = ("dopri5", "tsit5", "dopri8", "bosh3", "rk4")


# ---- data ------------------------------------------------------------------------------------


@dataclass
class Trajectory:
    """Observations in units of their own, so that any data suits the same learning rates.

    t is float64 (N,) and runs from 0 to `DURATION`; y is float32 (N, 2) with a mean square of 1. In the
    units of the file, times are ``t0 + t * unit`` and states ``y * size``.
    """

    t: torch.Tensor
    y: torch.Tensor
    t0: float
    unit: float
    size: float

    def in_file(self, t, y):
        """Times and states in the units of the file, float64 on the CPU."""
        return self.t0 + t.cpu().double() * self.unit, y.cpu().double() * self.size


def read_csv(path) -> torch.Tensor:
    """Columns t, x, y of a CSV file as float64 (N, 3); raises ValueError with the line at fault."""
    rows = []
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        reader.fieldnames = names = [name.strip() for name in reader.fieldnames or ()]
        missing = [name for name in "txy" if name not in names]
        if missing:
            raise ValueError(f"line 1 must name the columns t, x and y; {', '.join(missing)} not found")
        for row in reader:
            cells = [row[name] for name in "txy"]
            try:
                values = [float(cell) for cell in cells]
            except (TypeError, ValueError):  # None is a missing cell
                raise ValueError(f"line {reader.line_num}: t, x and y must be numbers, got {cells}") from None
            if not all(map(math.isfinite, values)):
                raise ValueError(f"line {reader.line_num}: t, x and y must be finite, got {cells}")
            if rows and values[0] <= rows[-1][0]:
                raise ValueError(
                    f"line {reader.line_num}: t must increase, got {values[0]:g} after {rows[-1][0]:g}"
                )
            rows.append(values)
    if len(rows) < MIN_ROWS:
        raise ValueError(f"{len(rows)} rows of data; at least {MIN_ROWS} are needed")
    return torch.tensor(rows, dtype=torch.float64)


def load(path, device) -> Trajectory:
    rows = read_csv(path)
    t, y = rows[:, 0], rows[:, 1:]
    t0, unit = t[0].item(), (t[-1] - t[0]).item() / DURATION
    size = y.square().mean().sqrt().item() or 1.0
    return Trajectory(((t - t0) / unit).to(device), (y / size).float().to(device), t0, unit, size)


def true_rms(data) -> float:
    """Distance of the shipped rows to the true spiral, from its closed form: the noise in them."""
    t, rows = data.in_file(data.t, data.y)
    truth = torch.matrix_exp(t[:, None, None] * TRUE_A.double()) @ TRUE_START.double()
    return (rows - truth).square().mean().sqrt().item()


# ---- models ----------------------------------------------------------------------------------


class Field(nn.Module):
    """dy/dt = net(y), counting its calls."""

    def __init__(self, *layers):
        super().__init__()
        self.net = nn.Sequential(*layers)
        self.calls = 0

    def forward(self, t, y):
        self.calls += 1
        return self.net(y)


def linear_field():
    return Field(nn.Linear(2, 2, bias=False))


def mlp_field(width=32):
    return Field(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2))


# ---- training --------------------------------------------------------------------------------


def flow(field, y, spans, solver):
    """Each state of a batch carried along ``field`` for its own span of time.

    Unevenly spaced rows share no time grid, so the batch is solved on a clock s from 0 to 1:
    dy/ds = span * field(y).
    """
    spans = spans.to(y.dtype)[:, None]

    def slope(s, y):
        return spans * field(s, y)

    clock = torch.tensor([0.0, 1.0], device=y.device)
    params = tuple(field.parameters())
    return flashode.odeint_adjoint(slope, y, clock, rtol=1e-4, atol=1e-5, adjoint_params=params, **solver)[-1]


def random_pieces(data, longest):
    """First and last rows, i < j, of `BATCH` random pieces that span at most ``longest`` or one gap."""
    t = data.t.cpu()
    i = torch.randint(len(t) - 1, (BATCH,))
    reach = torch.searchsorted(t, t[i] + longest, right=True) - 1
    reach = torch.maximum(reach, i + 1)
    j = i + 1 + (torch.rand(BATCH) * (reach - i)).long()
    return i, torch.minimum(j, reach)


@dataclass
class Phase:
    """What one phase of a fit did, per iteration: losses, and averages of calls and milliseconds."""

    name: str
    losses: list[float]
    forward: float
    backward: float
    ms: float


def train(model, name, loss_at, field, start, iterations, rate, unit) -> Phase:
    """Adam on ``loss_at(progress)``, with a learning rate that falls from ``rate`` to a twentieth of it.

    ``unit`` is that of the loss, in the units of the file.
    """
    adam = torch.optim.Adam([*field.parameters(), start], rate)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, iterations, rate / 20)
    losses, forward, backward = [], 0, 0
    begin = time.perf_counter()
    with Progress(f"{model}, {name:<6}", iterations) as progress:
        for iteration in range(iterations):
            adam.zero_grad()
            before = field.calls
            loss = loss_at(iteration / iterations)
            between = field.calls
            loss.backward()
            after = field.calls
            adam.step()
            falling.step()
            losses.append(loss.item() * unit)
            forward, backward = forward + between - before, backward + after - between
            progress.advance(losses[-1], between - before, after - between)
    seconds = time.perf_counter() - begin
    return Phase(name, losses, forward / iterations, backward / iterations, 1000 * seconds / iterations)


class Progress:
    """A tqdm bar, or a line now and then where tqdm is not installed."""

    def __init__(self, name, total):
        self.name, self.total, self.done = name, total, 0
        pause = 0.1 if sys.stderr.isatty() else 2  # seconds; a log need not have it all
        self.bar = tqdm(total=total, desc=name, ncols=88, mininterval=pause) if tqdm else None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.bar is not None:
            self.bar.close()

    def advance(self, loss, forward, backward):
        self.done += 1
        text = f"loss {loss:.2e}, nfe {forward}+{backward}"
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
        elif self.done == self.total or self.done % max(1, self.total // 5) == 0:
            print(f"{self.name}: {self.done}/{self.total}, {text}", flush=True)


# ---- result ----------------------------------------------------------------------------------


@dataclass
class Fit:
    """A trained model, and its trajectory in the units of the file."""

    name: str
    law: str
    field: Field
    phases: list[Phase]
    t: torch.Tensor
    y: torch.Tensor
    stats: flashode.Stats
    rms: float  # distance to the rows


def fit_model(name, law, field, data, iterations, solver) -> Fit:
    field = field.to(data.y.device)
    start = nn.Parameter(data.y[0].clone())

    def pieces_loss(progress):
        longest = DURATION * min(0.32, 0.04 + 0.56 * progress)
        i, j = random_pieces(data, longest)
        return nn.functional.mse_loss(flow(field, data.y[i], data.t[j] - data.t[i], solver), data.y[j])

    def whole_loss(progress):
        # A member of the batch for each row: with all rows as outputs of one solve, the way back
        # would have to stop at each of them.
        return nn.functional.mse_loss(flow(field, start.expand_as(data.y), data.t, solver), data.y)

    whole = max(1, iterations // 5)
    phases = [
        train(name, "pieces", pieces_loss, field, start, iterations - whole, 0.03, data.size**2),
        train(name, "whole", whole_loss, field, start, whole, 0.001, data.size**2),
    ]
    if "options" in solver:
        solver = {**solver, "options": {"step_size": DURATION / 100}}
    times = torch.linspace(0, DURATION, 500, device=data.t.device)
    with torch.no_grad():
        at_rows = flashode.odeint(field, start, data.t, rtol=1e-6, atol=1e-7, **solver)
        solution = flashode.solve(field, start, times, rtol=1e-6, atol=1e-7, **solver)
    rms = (at_rows - data.y).square().mean().sqrt().item() * data.size
    t, y = data.in_file(times, solution.ys)
    return Fit(name, law, field, phases, t, y, solution.stats, rms)


def report(fit, data, noise):
    print(f"\n{fit.name}: {fit.law}, {sum(p.numel() for p in fit.field.parameters())} parameters")
    print("  phase    iterations   first loss   last loss   nfe forward   nfe backward   ms each")
    for phase in fit.phases:
        print(
            f"  {phase.name:<6}{len(phase.losses):>13}{phase.losses[0]:>13.2e}{phase.losses[-1]:>12.2e}"
            f"{phase.forward:>14.1f}{phase.backward:>15.1f}{phase.ms:>10.1f}"
        )
    print(f"  rms distance to the rows: {fit.rms:.4f}" + (f" (true spiral: {noise:.4f})" if noise else ""))
    stats = fit.stats
    print(f"  one accurate solve of it all: {stats.nfe} calls, {stats.method} on the {stats.engine} engine")
    if fit.name == "linear":
        learned = fit.field.net[0].weight.detach().cpu() / data.unit
        print(f"  learned A: {matrix(learned)}")
        if noise:
            print(f"     true A: {matrix(TRUE_A)}, worst error {(learned - TRUE_A).abs().max():.4f}")


def matrix(a) -> str:
    return "[" + ", ".join("[" + ", ".join(f"{x:7.4f}" for x in row) + "]" for row in a.tolist()) + "]"


def draw(fits, data, path, noise):
    """Each model's field and trajectory in the plane; both against time; the losses."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    figure = plt.figure(figsize=(11, 9.5), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[1.55, 1], hspace=0.06, wspace=0.05)
    for column, (fit, colour) in enumerate(zip(fits, COLOURS)):
        draw_plane(figure.add_subplot(grid[0, column]), fit, colour, data)
    draw_time(figure.add_subplot(grid[1, 0]), fits, data)
    draw_losses(figure.add_subplot(grid[1, 1]), fits, noise)
    figure.savefig(path, format="png", dpi=150)


INK, PALE, COLOURS = "#2b2b33", "#d3d7e0", ("#1f6fb4", "#d1495b")
STYLE = {
    "font.size": 10, "axes.titlesize": 11.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "text.color": INK,
    "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
}  # fmt: skip


def draw_plane(axes, fit, colour, data):
    _, rows = data.in_file(data.t, data.y)
    low, high = rows.amin(0), rows.amax(0)
    centre, half = (low + high) / 2, 0.57 * (high - low).max().item() or 1.0
    x, y = (torch.linspace(c - half, c + half, 41, dtype=torch.float64) for c in centre)
    points = torch.cartesian_prod(x, y) / data.size
    with torch.no_grad():
        slopes = fit.field(None, points.to(data.y)).cpu().reshape(41, 41, 2)
    u, v = slopes.transpose(0, 1).unbind(-1)
    grid = [each.numpy() for each in (x, y, u, v)]
    axes.streamplot(*grid, color=PALE, linewidth=0.9, arrowsize=0.9, density=1.2)
    axes.scatter(*rows.T, s=13, color=INK, alpha=0.55, linewidths=0, label="data", zorder=3)
    axes.plot(*fit.y.T, color=colour, lw=2, label=f"fit, rms {fit.rms:.3g}", zorder=2)
    axes.plot(*fit.y[0], "o", color=colour, ms=7, mec="white", mew=1.3, label="start", zorder=4)
    axes.set(title=f"{fit.name}: {fit.law}", xlabel="x", ylabel="y")
    axes.set(aspect="equal", xlim=(x[0], x[-1]), ylim=(y[0], y[-1]))
    legend(axes)


def draw_time(axes, fits, data):
    t, rows = data.in_file(data.t, data.y)
    dots = {"s": 13, "edgecolors": INK, "linewidths": 0.7, "alpha": 0.55}
    axes.scatter(t, rows[:, 0], facecolors=INK, label="x", **dots)
    axes.scatter(t, rows[:, 1], facecolors="white", label="y", **dots)
    for fit, colour, style in zip(fits, COLOURS, ("-", (0, (4, 2.5)))):
        axes.plot(fit.t, fit.y, color=colour, ls=style, lw=1.7, label=[fit.name, "_"])
    axes.set(title="x and y against time", xlabel="t", ylabel="x, y")
    legend(axes)


def draw_losses(axes, fits, noise):
    for fit, colour in zip(fits, COLOURS):
        losses = torch.tensor(fit.phases[0].losses + fit.phases[1].losses)
        smooth = torch.stack([losses[max(0, i - 7) : i + 8].median() for i in range(len(losses))])
        axes.plot(losses, color=colour, lw=0.7, alpha=0.3)
        axes.plot(smooth, color=colour, lw=1.7, label=fit.name)
    switch = len(fits[0].phases[0].losses)
    axes.axvline(switch, color=INK, lw=0.8, ls=":")
    top = axes.get_xaxis_transform()
    axes.text(switch, 1.0, "pieces ", ha="right", va="top", transform=top)
    axes.text(switch, 1.0, " whole", ha="left", va="top", transform=top)
    if noise:
        axes.axhline(noise**2, color=INK, lw=0.8, ls="--", zorder=0, label="true spiral")
    axes.set(title="Mean squared error", xlabel="iteration", yscale="log")
    legend(axes)


def legend(axes):
    """On the line of the title, where it hides no data."""
    spacing = {"columnspacing": 1.0, "handlelength": 1.5, "handletextpad": 0.5, "borderaxespad": 0.1}
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4, fontsize=9.5, **spacing)


# ---- command line ----------------------------------------------------------------------------


def main():
    args = parse()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # tensors this small only lose by being shared out: 100-fold on a busy machine
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        data = load(args.data, args.device)
    except OSError as error:
        sys.exit(f"spiral.py: {error.filename}: {error.strerror}")
    except (ValueError, csv.Error) as error:  # a UnicodeDecodeError is a ValueError
        sys.exit(f"spiral.py: {args.data}: {error}")
    noise = true_rms(data) if args.data.resolve() == SHIPPED else None
    last = data.t0 + DURATION * data.unit
    print(f"{args.data.name}: {len(data.t)} rows, t from {data.t0:g} to {last:g}", flush=True)
    solver = {"method": args.method}
    if args.method == "rk4":
        solver["options"] = {"step_size": 0.01}  # of the clock that runs from 0 to 1
    try:
        fits = [
            fit_model("linear", "dy/dt = A y", linear_field(), data, args.iterations, solver),
            fit_model("MLP", "dy/dt = net(y)", mlp_field(), data, args.iterations, solver),
        ]
    except flashode.SolveError as error:
        sys.exit(f"spiral.py: {args.data}: the fit diverged: {error}")
    for each in fits:
        report(each, data, noise)
    try:
        draw(fits, data, args.out, noise)
        print(f"\npicture: {args.out}")
    except ImportError:
        print("\nno picture: matplotlib is not installed (pip install matplotlib)")


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, default=SHIPPED, metavar="CSV", help="columns t, x, y (the shipped spiral)")
    add("--out", type=Path, default=Path("out/spiral.png"), metavar="PNG", help="picture (out/spiral.png)")
    add("--iterations", type=int, default=500, metavar="N", help="iterations of each model (500)")
    add("--quick", action="store_true", help="20 iterations: only to see that it runs")
    add("--method", choices=METHODS, default="dopri5", help="method of every solve (dopri5)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to solve (cpu)")
    add("--seed", type=int, default=0, metavar="N", help="of random starts and batches (0)")
    args = parser.parse_args()
    if args.quick:
        args.iterations = 20
    if args.iterations < 2:
        parser.error("--iterations must be at least 2")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    return args


if __name__ == "__main__":
    main()
