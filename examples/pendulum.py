"""Energy of a pendulum over a thousand periods by three methods, and a pendulum's energy learned from noisy data.

Problem. The pendulum q'' = -sin(q), also written with Hamilton's equations of H(q, p) = p^2 / 2 + 1 - cos(q),

  known    from q = 1, p = 0 over 1,000 periods, by `leapfrog`, `rk4` and `euler`, with as many calls of
           the field each;
  learned  from 25 trajectories of 6 units of time, seen every 0.2 with Gaussian noise of standard deviation
           0.05, once as a plain network, (q, p)' = net(q, p), and once as two networks T(p) and V(q) for
           the energy T(p) + V(q), whose derivatives are the field (`flashode.nn.Separable`).

Right answer. Leapfrog's error in the energy is bounded by a few thousandths for ever; RK4 loses energy in
every step, and Euler's method gains it. The learned energy has the shapes p^2 / 2 and 1 - cos(q), up to
constants; its orbits close, long after the last observation, and those of the plain network drift away from
their energy.

Training. Both networks predict, from every observed point, the next five: one solve of all pieces by `rk4`
on the times of the observations, by a compiled program, and a step of Adam.
"""

from __future__ import annotations

import math

import torch
from torch import nn

import flashode
from flashode.nn import SecondOrder, Separable
from pictures import COLOURS, INK, PALE, save_picture
from training import Training, parser, prepare, table

F64 = torch.float64
START = 1.0
NOISE, SPACING, PIECE = 0.05, 0.2, 5
# Steps that make as many calls of the field in a unit of time: 2, 4 and 1 a step.
METHODS = {"leapfrog": 0.2, "rk4": 0.4, "euler": 0.1}


def potential(q):
    return 1 - torch.cos(q)


def kinetic(p):
    return p**2 / 2


def acceleration(t, y, v):
    return -torch.sin(y)


TRUTH = Separable(kinetic, potential)


def period(amplitude):
    """Of a pendulum let go at this angle: 2 pi over an arithmetic-geometric mean (Gauss)."""
    a, b = 1.0, math.cos(amplitude / 2)
    for _ in range(6):
        a, b = (a + b) / 2, math.sqrt(a * b)
    return 2 * math.pi / a


# ---- the known pendulum ----------------------------------------------------------------------


@torch.no_grad()
def known(periods):
    """Times and errors of the energy by method; prints their table."""
    y0 = torch.tensor([START], dtype=F64), torch.zeros(1, dtype=F64)
    end = period(START)
    once = torch.tensor([0.0, end], dtype=F64)
    by = {"second order": SecondOrder(acceleration), "Hamilton": TRUTH}
    ends = {
        name: flashode.odeint(field, y0, once, method="dopri8", rtol=1e-12, atol=1e-12)[0][-1].item()
        for name, field in by.items()
    }
    print(f"after a period of {end:.6f}, by its closed form, from q = 1:")
    table(["equations", "q - 1"], [[name, q - 1] for name, q in ends.items()])
    found, rows = {}, []
    for method, h in METHODS.items():
        steps = round(periods * end / h)
        every = max(1, steps // 2000)
        t = torch.arange(0, steps + 1, every, dtype=F64) * h
        q, p = flashode.odeint(by["second order"], y0, t, method=method, options={"step_size": h})
        error = (TRUTH.energy(q, p) - TRUTH.energy(*y0))[:, 0]
        found[method] = t[1:], error[1:]
        half = len(error) // 2
        rows.append([method, h, error[:half].abs().max().item(), error[half:].abs().max().item()])
    print(
        f"\nlargest error of the energy, {potential(y0[0]).item():.4f} at the start, over {periods:,} periods"
    )
    table(["method", "step", "first half", "second half"], rows)
    return found


# ---- learning --------------------------------------------------------------------------------


class Plain(nn.Module):
    """(q, p)' = net(q, p)"""

    def __init__(self, width=64):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2)
        )

    def forward(self, t, state):
        return self.net(torch.cat(state, -1)).split(1, -1)


def energy_net(width=64):
    return nn.Sequential(
        nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
    )


def observations(trajectories=25, length=31):
    """q and p of shape (length, trajectories, 1), with noise; energies from 0.1 to 1.6: beyond 2 it goes over."""
    energy = 0.1 + 1.5 * torch.rand(trajectories, 1)
    y0 = torch.arccos(1 - energy), torch.zeros(trajectories, 1)
    phase = torch.rand(trajectories, 1) * 7
    # Each from somewhere on its orbit: a clock that runs as fast as its own phase takes it there.
    y0 = flashode.odeint(lambda t, y: tuple(phase * x for x in TRUTH(t, y)), y0, torch.tensor([0.0, 1.0]))
    t = SPACING * torch.arange(length)
    path = flashode.odeint(TRUTH, tuple(x[-1] for x in y0), t)
    return tuple(x + NOISE * torch.randn(x.shape) for x in path)


def train(args, name, model, data, steps):
    """Fits a model to all pieces of the trajectories."""
    field, pieces = (
        flashode.compile(model),
        [x.unfold(0, PIECE + 1, 1).flatten(0, 2)[..., None] for x in data],
    )
    y0, targets = tuple(x[:, 0] for x in pieces), [x.transpose(0, 1) for x in pieces]
    t = SPACING * torch.arange(PIECE + 1)
    adam = torch.optim.Adam(model.parameters(), 3e-3)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps, 1e-4)
    training = Training(args, name, steps, model=model, adam=adam, falling=falling)
    for _ in training:
        adam.zero_grad()
        path = flashode.odeint(field, y0, t, method="rk4")
        loss = sum((x[1:] - target[1:]).square().mean() for x, target in zip(path, targets)) / 2
        loss.backward()
        adam.step()
        falling.step()
        training.show(rms=loss.detach().sqrt())
    return training


@torch.no_grad()
def rollout(model, end, amplitudes=(0.6, 1.2, 1.8)):
    """Orbits of a trained model from starts that it has not seen, and their true energies."""
    y0 = torch.tensor(amplitudes)[:, None], torch.zeros(len(amplitudes), 1)
    t = torch.arange(0, end + 0.05, 0.1)
    q, p = flashode.odeint(model, y0, t, rtol=1e-6, atol=1e-7)
    return t, q[..., 0], p[..., 0], TRUTH.energy(q, p)[..., 0]


def learned(args):
    """Trains both models; prints the table of their errors."""
    steps, end = (60, 20.0) if args.quick else (2000, 300.0)
    data = observations()
    models = {"plain network": Plain(), "learned energy": Separable(energy_net(), energy_net())}
    orbits, rows = {}, []
    for name, model in models.items():
        training = train(args, name, model, data, steps)
        orbits[name] = rollout(model, end)
        relative = (orbits[name][3] / orbits[name][3][0] - 1).abs()
        tail = training.history["rms"][-1]
        rows.append([name, tail, relative[:61].max().item(), relative.max().item(), training.seconds])
    print(f"\nlearned from noise of {NOISE}: relative error of the energy, largest of 3 unseen orbits")
    table(["model", "rms of pieces", "t <= 6", f"t <= {end:g}", "seconds"], rows)
    shape = shapes_of(models["learned energy"])
    print("\nlearned energy: rms distance to p^2 / 2 and 1 - cos(q), where there were data")
    table(
        ["kinetic", "potential"], [[(found - true).square().mean().sqrt().item() for _, found, true in shape]]
    )
    return data, orbits, shape


@torch.no_grad()
def shapes_of(model):
    """Learned and true kinetic and potential energy, with the same mean."""
    x = torch.linspace(-1.6, 1.6, 65)[:, None]
    pairs = ((model.H.kinetic, kinetic), (model.H.potential, potential))
    result = []
    for net, true in pairs:
        found, true = net(x), true(x)
        result.append((x, found - (found - true).mean(), true))
    return result


# ---- picture ---------------------------------------------------------------------------------


def draw(figure, errors, data, orbits, shapes):
    (a, b), (c, d) = figure.subplots(2, 2)
    for (method, (t, error)), colour in zip(errors.items(), COLOURS):
        worst = error.abs().cummax(0).values
        a.loglog(t / period(START), worst, color=colour, lw=1.6, label=f"{method}, step {METHODS[method]}")
    a.set(
        title="Known pendulum: largest error of the energy so far",
        xlabel="periods",
        ylabel="|H - H at the start|",
        ylim=(1e-5, 1e3),
    )
    a.legend(loc="lower right")
    draw_orbits(b, data, orbits)
    for (name, (t, _, _, energy)), colour in zip(orbits.items(), COLOURS[1:]):
        c.plot(t, energy, color=colour, lw=1.2, label=[name, *["_"] * (energy.shape[1] - 1)])
    for level in energy[0].tolist():
        c.axhline(level, color=INK, lw=0.8, ls=":")
    c.axvspan(0, 6, color=PALE, lw=0, zorder=0)
    c.set(title="True energy along learned orbits (grey: as long as the data)", xlabel="t", ylabel="H")
    c.legend(loc="upper right", bbox_to_anchor=(1, 0.93))
    for (x, found, true), name, colour in zip(shapes, ("kinetic T(p)", "potential V(q)"), COLOURS[2:]):
        d.plot(x, true, color=PALE, lw=5)
        d.plot(x, found, color=colour, lw=1.6, label=f"learned {name}")
    d.set(title="Learned energy (grey: the true ones)", xlabel="p, q", ylabel="energy")
    d.legend(loc="upper center")


def draw_orbits(axes, data, orbits):
    axes.plot(*(x.flatten() for x in data), ".", color=INK, ms=3, alpha=0.3, mew=0, label="data")
    for (name, (_, q, p, _)), colour in zip(orbits.items(), COLOURS[1:]):
        axes.plot(q, p, color=colour, lw=0.8, label=[name, *["_"] * (q.shape[1] - 1)])
    axes.set(
        title="Learned pendulum: three unseen orbits",
        xlabel="q",
        ylabel="p",
        xlim=(-2.6, 2.6),
        ylim=(-2.3, 2.7),
    )
    axes.legend(loc="upper center", ncols=3)


def main():
    args = parser(__doc__, "pendulum.png").parse_args()
    prepare(args)
    torch.set_num_threads(1)  # tensors this small only lose by being shared out
    errors = known(20 if args.quick else 1000)
    data, orbits, shapes = learned(args)
    save_picture(args, lambda figure: draw(figure, errors, data, orbits, shapes), (12, 9))


if __name__ == "__main__":
    main()
