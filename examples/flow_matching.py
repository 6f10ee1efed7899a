"""Flow matching learns a field that carries a normal distribution to eight Gaussians, without solving while it trains.

Problem. With z from a standard normal distribution and x from the data, both drawn anew in every step, the point
(1 - t) z + t x moves straight, at the speed x - z. A network v(t, y) is fitted to that speed by least squares, at
random t: its minimum is the mean speed of all lines through y at t, and the flow of that field,

    dy/dt = v(t, y),    y(0) from the normal distribution,

has the data's distribution at t = 1 (Lipman et al. 2023, Flow matching for generative modeling, arXiv:2210.02747).
Only sampling solves it: with dopri5, and with 10 steps of the midpoint rule, by a compiled field, the field
called from Python, and torchdiffeq, if that is installed.

Right answer. Samples that cannot be told from new data: 98.9 % of them within three standard deviations of one of the
Gaussians, an eighth in each, and an energy distance (Szekely, Rizzo 2013) to new data like the one that two sets of
data have. All that solve by one method have to agree, for they solve one equation from one start.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass

import torch
from torch import nn

import flashode
from flashode import datasets
from flashode.nn import MLPField
from pictures import COLOURS, INK, PALE, save_picture
from training import Training, parser, prepare, table

try:
    import torchdiffeq
except ImportError:
    torchdiffeq = None

NOISE = 0.2
BATCH, STEPS, SAMPLES = 1024, 8000, 2000
SOLVERS = {
    "dopri5": {"method": "dopri5", "rtol": 1e-4, "atol": 1e-4},
    "midpoint": {"method": "midpoint", "options": {"step_size": 0.1}},
}
TIMES = torch.tensor([0.0, 1.0])
SHOWN = torch.linspace(0, 1, 5)


def train(args, steps) -> nn.Module:
    field = MLPField(2, (128, 128, 128), activation="silu")
    adam = torch.optim.Adam(field.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    training = Training(args, "matching", steps, field=field, adam=adam, schedule=schedule)
    for _ in training:
        x, t = datasets.eight_gaussians(BATCH, noise=NOISE), torch.rand(BATCH, 1)
        z = torch.randn_like(x)
        adam.zero_grad()
        loss = nn.functional.mse_loss(field(t, (1 - t) * z + t * x), x - z)
        loss.backward()
        adam.step()
        schedule.step()
        training.show(loss=loss.item())
    return field


# ---- how good samples are ---------------------------------------------------------------------------


def near_centres(samples) -> torch.Tensor:
    """Part of the samples within three standard deviations of each of the eight Gaussians."""
    angle = torch.arange(8) * (math.pi / 4)
    centres = 2 * torch.stack([angle.cos(), angle.sin()], -1)
    return (torch.cdist(samples, centres) < 3 * NOISE).float().mean(0)


def energy_distance(x, y) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'|, which is zero for one distribution, by unbiased means."""
    within = sum(torch.cdist(each, each).sum().item() / (len(each) * (len(each) - 1)) for each in (x, y))
    return 2 * torch.cdist(x, y).mean().item() - within


# ---- sampling -----------------------------------------------------------------------------------------


@dataclass
class Sampled:
    """What one way to solve gave."""

    solver: str
    by: str
    calls: int
    ms: float
    samples: torch.Tensor


class Counted(nn.Module):
    """A field that counts its calls."""

    def __init__(self, field):
        super().__init__()
        self.field, self.calls = field, 0

    def forward(self, t, y):
        self.calls += 1
        return self.field(t, y)


@torch.no_grad()
def sample(field, z, turns) -> list[Sampled]:
    """Samples by every solver and everybody, who solve in turns; medians of milliseconds of processor time."""
    contestants = {
        "compiled": (flashode.odeint, flashode.compile(field)),
        "called from Python": (flashode.odeint, field),
    }
    if torchdiffeq:
        contestants["torchdiffeq"] = (torchdiffeq.odeint, field)
    found = []
    for name, solver in SOLVERS.items():
        seconds, samples = {by: [] for by in contestants}, {}
        for turn in range(turns + 1):  # the first is not counted: programs are made
            for by, (odeint, func) in contestants.items():
                began = time.process_time()
                samples[by] = odeint(func, z, TIMES, **solver)[-1]
                seconds[by] += [time.process_time() - began] if turn else []
        for by, (odeint, _) in contestants.items():
            counted = Counted(field)
            odeint(counted, z, TIMES, **solver)
            found.append(Sampled(name, by, counted.calls, 1e3 * statistics.median(seconds[by]), samples[by]))
    return found


def report(found, data, others):
    rows = []
    for each in found:
        near, reference = near_centres(each.samples), found[0].samples
        rows.append([
            each.solver, each.by, each.calls, each.ms, 100 * near.sum().item(), 100 * near.min().item(),
            energy_distance(each.samples, data), (each.samples - reference).abs().max().item(),
        ])  # fmt: skip
    near = near_centres(others)
    rows.append(
        [
            "(data)",
            "",
            "",
            "",
            100 * near.sum().item(),
            100 * near.min().item(),
            energy_distance(others, data),
            "",
        ]
    )
    table(
        [
            "solver",
            "field",
            "calls",
            "ms",
            "% in a mode",
            "% in the rarest",
            "energy distance",
            "off the first",
        ],
        rows,
    )


# ---- picture -----------------------------------------------------------------------------------------


@torch.no_grad()
def draw(figure, field, z, data):
    """The points at five times, the paths of some of them, and the data."""
    ys = flashode.odeint(field, z, SHOWN, rtol=1e-4, atol=1e-4)
    paths = flashode.odeint(field, z[:160], torch.linspace(0, 1, 60), rtol=1e-4, atol=1e-4)
    axes = figure.subplots(1, len(SHOWN) + 2)
    dots = {"s": 2.5, "linewidths": 0, "alpha": 0.5}
    for ax, t, y in zip(axes, SHOWN, ys):
        ax.scatter(*y.T, color=COLOURS[0], **dots)
        ax.set_title(f"t = {t:g}")
    axes[-2].plot(*paths.permute(2, 0, 1), color=INK, lw=0.4, alpha=0.5)
    axes[-2].scatter(*paths[-1].T, s=5, color=COLOURS[1], linewidths=0, zorder=3)
    axes[-2].set_title("paths")
    axes[-1].scatter(*data.T, color=INK, **dots)
    axes[-1].set_title("data")
    for ax in axes:
        ax.set(xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[], aspect="equal")
        ax.spines[:].set_color(PALE)


# ---- command line ---------------------------------------------------------------------------------


def main():
    args = parser(__doc__, "flow_matching.png").parse_args()
    prepare(args)
    torch.set_num_threads(1)  # tensors this small only lose by being shared out
    field = train(args, 200 if args.quick else STEPS)
    z = torch.randn(SAMPLES, 2)
    data, others = (datasets.eight_gaussians(SAMPLES, noise=NOISE) for _ in range(2))
    report(sample(field, z, 2 if args.quick else 9), data, others)
    save_picture(args, lambda figure: draw(figure, field, z, data), (14, 2.3))


if __name__ == "__main__":
    main()
