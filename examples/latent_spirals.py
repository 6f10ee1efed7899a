"""Learns a law behind spirals seen at random times: a latent ODE reconstructs them, continues them, makes new ones.

    python examples/latent_spirals.py

Problem. 1,000 spirals, half of them clockwise, each observed for one turn at 100 random times of its own, with
noise of standard deviation 0.1 (Chen et al. 2018, section 5.1). A recurrent encoder reads the observations
from the last one to the first and gives a Normal over the start of a latent state in R^4; the state
follows an equation that is learned; a decoder makes positions of it. The bound of the log density (ELBO)
is all that is trained for. In every step each spiral is shown with 30 to 100 of its observations, so that
one model serves any number of them.

Right answer. A spiral is given by its start, its radius and its sense of turning. Who knows that needs
three numbers from 200 noisy ones, and is off by 0.1 sqrt(3 / 200) = 0.012 on average: no model does better
on the turn that was observed, and where it goes on to a second turn that nobody has seen, it should
still be on the spiral. New spirals, from the prior, turn one way or the other and grow.

What it is compared with. The same model with a recurrent network in place of the equation: it is given
the latent start and the time gaps, has about as many parameters, and is trained for the same bound. And the
time of a training step with the field compiled, not compiled, and with torchdiffeq, which solves a batch on
one clock: at the 6,400 times of all samples together.
"""

from __future__ import annotations

import math
import time

import torch
from torch import nn

import flashode
from flashode.datasets import spiral_trajectories
from flashode.nn import LatentODE, RNNEncoder, kl_annealing
from pictures import COLOURS, INK, PALE, save_picture
from training import Training, parser, prepare, table

try:
    import torchdiffeq
except ImportError:
    torchdiffeq = None

NOISE, LATENT, BATCH = 0.1, 4, 64
TURN = 2 * math.pi
WIDEST = 1 + 0.1 * TURN  # radius that is observed; the next turn goes out to 0.1 TURN more


# ---- models ----------------------------------------------------------------------------------


class Field(nn.Module):
    def __init__(self, hidden=32):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(LATENT, hidden), nn.Tanh(), nn.Linear(hidden, LATENT))

    def forward(self, t, z):
        return self.net(z)


def latent_ode(field, kind=LatentODE):
    decoder = nn.Sequential(nn.Linear(LATENT, 32), nn.Tanh(), nn.Linear(32, 2))
    return kind(RNNEncoder(2, LATENT, 32), field, decoder, noise=NOISE)


class LatentRNN(LatentODE):
    """The same, with a recurrent network that is given time gaps in place of the equation."""

    def __init__(self, hidden=11):
        super().__init__(RNNEncoder(2, LATENT, 32), None, nn.Linear(hidden, 2), noise=NOISE)
        self.start, self.gru = nn.Linear(LATENT, hidden), nn.GRU(1, hidden, batch_first=True)

    def decode(self, z0, times):
        times = times.expand(len(z0), -1)
        gaps = times.diff(dim=1, prepend=torch.full_like(times[:, :1], self.t0))
        states, _ = self.gru(gaps[..., None], self.start(z0)[None])
        return self.decoder(states)


class OneClock(LatentODE):
    """The same as `LatentODE`, solved by torchdiffeq: at the times of all samples, of which each takes its own."""

    def decode(self, z0, times):
        union, places = times.unique(return_inverse=True)
        union = torch.cat([union.new_tensor([self.t0]), union])
        zs = torchdiffeq.odeint(self.field, z0, union, rtol=1e-3, atol=1e-4)
        return self.decoder(zs[1 + places, torch.arange(len(z0))[:, None]])


# ---- training --------------------------------------------------------------------------------


def shown(spirals, low):
    """A mask that leaves every spiral between a share ``low`` of its observations and all of them."""
    share = low + (1 - low) * torch.rand(len(spirals.times), 1)
    mask = torch.rand(spirals.times.shape) < share
    mask[:, 0] |= ~mask.any(1)
    return mask


def train(args, name, model, spirals, steps):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    training = Training(args, name, steps, model=model, optimizer=optimizer, falling=falling)
    for step in training:
        chosen = torch.randint(len(spirals.times), (BATCH,))
        mask = shown(spirals, 0.3)[chosen]
        optimizer.zero_grad()
        elbo = model.elbo(
            spirals.times[chosen], spirals.values[chosen], mask, kl_weight=kl_annealing(step, steps // 10)
        ).mean()
        (-elbo).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        optimizer.step()
        falling.step()
        training.show(elbo=elbo.detach() / mask.sum(1).float().mean())  # of an observation
    return training


def seconds(work, repeats):
    """The median of ``repeats`` calls, after one that compiles what is to be compiled."""
    taken = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        work().backward()
        taken.append(time.perf_counter() - begin)
    return sorted(taken[1:])[repeats // 2]


def timed(spirals, batch, repeats):
    """Milliseconds of a training step, and of its solve, forward and back, in three ways."""
    field, z0 = Field(), torch.randn(batch, LATENT)
    times, values = spirals.times[:batch], spirals.values[:batch]
    ways = {"compiled": latent_ode(flashode.compile(field)), "not compiled": latent_ode(field)}
    if torchdiffeq:
        ways["torchdiffeq, one clock"] = latent_ode(field, OneClock)
    for name, model in ways.items():
        step = seconds(lambda: model.elbo(times, values).mean(), repeats)
        solve = seconds(lambda: model.decode(z0, times).sum(), repeats)
        yield [name, 1000 * step, 1000 * solve]


# ---- results ---------------------------------------------------------------------------------


def errors(model, spirals, points):
    """The rms distance to the true curves at every time of the grid, from ``points`` observations."""
    mask = torch.rand(spirals.times.shape).argsort(1) < points
    with torch.no_grad():
        found = model.reconstruct(spirals.times, spirals.values, mask, at=spirals.grid)
    return (found - spirals.curves).square().mean((0, 2))


def errors_by_radius(model, spirals):
    """Radii from and to, and the rms distance to the true curves there, on the turn that nobody saw."""
    with torch.no_grad():
        found = model.reconstruct(spirals.times, spirals.values, at=spirals.grid)
    squares, radius = (found - spirals.curves).square().mean(-1), spirals.curves.norm(dim=-1)
    bounds = [0.0, WIDEST, WIDEST + 0.27, WIDEST + 0.1 * TURN]
    for low, high in zip(bounds, bounds[1:]):
        there = (spirals.grid > TURN) & (radius >= low) & (radius < high)
        yield [low, high, squares[there].mean().sqrt().item()]


def share_of_spirals(model):
    """The share of 1,000 new curves that go round once, to a tenth of a turn, while a spiral does."""
    with torch.no_grad():
        curves = model.sample(1000, torch.linspace(0, TURN, 100))
    a, b = curves[:, :-1], curves[:, 1:]
    angles = torch.atan2(a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0], (a * b).sum(-1)).sum(1)
    return ((angles.abs() / TURN - 1).abs() < 0.1).float().mean().item()


def report(models, trained, unseen):
    rows = []
    for points in (100, 50, 30):
        squares = [errors(model, unseen, points).chunk(2) for model in models.values()]
        rows.append([points, *(half.mean().sqrt().item() for halves in squares for half in halves)])
    headings = [f"{name}, {turn} turn" for name in models for turn in ("observed", "next")]
    print("\nrms distance of 200 other spirals to the true ones, from so many observations")
    table(["observations", *headings], rows)
    print(
        f"\nof the latent ODE on the next turn, from 100, by the true radius (observed: below {WIDEST:.2f})"
    )
    table(["radius from", "to", "rms distance"], list(errors_by_radius(models["latent ODE"], unseen)))
    print()
    rows = []
    for name, model in models.items():
        parameters = sum(p.numel() for p in model.parameters())
        bound = mean_of_last(trained[name])
        rows.append([name, parameters, bound, share_of_spirals(model), trained[name].seconds])
    headings = ["parameters", "ELBO of an observation", "new ones that go round", "seconds of training"]
    table(["model", *headings], rows)


def mean_of_last(training):
    last = training.history["elbo"][-100:]
    return sum(last) / len(last)


def draw(figure, models, trained, unseen):
    """Spirals with their continuations; errors against time; new spirals; the bound in training."""
    axes = figure.subplots(2, 4)
    draw_spirals(axes[0], models["latent ODE"], unseen)
    draw_errors(axes[1, 0], models, unseen)
    draw_training(axes[1, 1], trained)
    for place, (name, model) in zip(axes[1, 2:], models.items()):
        draw_samples(place, name, model, unseen.grid)


BLUE, RED = COLOURS[:2]
PAIR = COLOURS[0], COLOURS[3]


def draw_spirals(places, model, spirals):
    """Two of either sense, from 30 observations: what was observed, and the turn that was not."""
    chosen = torch.cat([(spirals.clockwise == sense).nonzero()[:2, 0] for sense in (True, False)])
    mask = torch.rand(spirals.times.shape).argsort(1) < 30
    with torch.no_grad():
        found = model.reconstruct(spirals.times, spirals.values, mask, at=spirals.grid)
    seen = len(spirals.grid) // 2
    for axes, i in zip(places, chosen):
        axes.plot(*spirals.curves[i].T, color=PALE, lw=4, label="true")
        axes.plot(*found[i, :seen].T, color=BLUE, lw=1.6, label="reconstructed")
        axes.plot(*found[i, seen - 1 :].T, color=RED, lw=1.6, label="continued")
        axes.plot(*spirals.values[i][mask[i]].T, "o", color=INK, ms=3.5, mew=0, label="observed", zorder=4)
        axes.set(aspect="equal", xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), xticks=(-2, 0, 2), yticks=(-2, 0, 2))
        axes.set_title("clockwise" if spirals.clockwise[i] else "counter-clockwise")
    handles, labels = places[0].get_legend_handles_labels()
    places[0].figure.legend(handles, labels, loc="outside upper right", ncols=4)


def draw_errors(axes, models, spirals):
    for (name, model), colour in zip(models.items(), PAIR):
        axes.plot(spirals.grid, errors(model, spirals, 100).sqrt(), color=colour, lw=1.7, label=name)
    axes.axvline(TURN, color=INK, lw=0.8, ls=":")
    axes.axhline(NOISE, color=INK, lw=0.8, ls="--", label="noise")
    top = axes.get_xaxis_transform()
    axes.text(TURN, 1.0, "observed ", ha="right", va="top", transform=top, fontsize=8)
    axes.set(title="rms error", xlabel="t", yscale="log")
    axes.legend(fontsize=7.5, loc="lower right")


def draw_training(axes, trained):
    for (name, training), colour in zip(trained.items(), PAIR):
        bounds = torch.tensor(training.history["elbo"])
        each = max(1, len(bounds) // 200)
        medians = torch.stack([part.median() for part in bounds.split(each)])
        axes.plot(each * torch.arange(len(medians)), medians, color=colour, lw=1.7, label=name)
    axes.set(title="ELBO of an observation", xlabel="step", ylim=(-6, 2))
    axes.legend(fontsize=7.5, loc="lower right")


def draw_samples(axes, name, model, grid):
    with torch.no_grad():
        for curve, colour in zip(model.sample(4, grid), COLOURS):
            axes.plot(*curve.T, lw=1.3, color=colour)
            axes.plot(*curve[0], "o", color=colour, ms=4)
    axes.set(title=f"new, from the {name}", aspect="equal", xlim=(-2.6, 2.6), ylim=(-2.6, 2.6))
    axes.set(xticks=(-2, 0, 2), yticks=(-2, 0, 2))


# ---- command line ----------------------------------------------------------------------------


def main():
    args = parser(__doc__, "latent_spirals.png").parse_args()
    prepare(args)
    torch.set_num_threads(1)  # tensors this small only lose by being shared out
    steps, count, timings = (20, 200, (8, 1)) if args.quick else (4000, 1000, (BATCH, 3))
    spirals, unseen = (spiral_trajectories(n, noise=NOISE) for n in (count, 200))
    models = {"latent ODE": latent_ode(flashode.compile(Field())), "latent RNN": LatentRNN()}
    trained = {name: train(args, name, model, spirals, steps) for name, model in models.items()}
    report(models, trained, unseen)
    print(f"\nmilliseconds, {timings[0]} spirals at 100 times each, forward and back")
    table(["", "training step", "of that, solve and decode"], list(timed(spirals, *timings)))
    save_picture(args, lambda figure: draw(figure, models, trained, unseen), (13, 6.8))


if __name__ == "__main__":
    main()
