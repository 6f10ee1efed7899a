"""Euler's method against RK4 on the Lotka-Volterra equations and on a pendulum: phase plots, and error against step.

Problem. Predators and prey, from (1, 2), and a pendulum from several angles,

    x' = x - x y,   y' = x y - y;          theta' = -p,   p' = sin(theta).

Neither has a solution in elementary functions, but both keep a function of the state: x - ln x + y - ln y, and the
energy p^2 / 2 - cos(theta). Every true orbit is a closed curve, or a pendulum's that goes round and round.

Right answer. Euler's orbits spiral outwards, and RK4's close to within the width of a line. The error at a
fixed time falls with the first power of the step size for Euler's method and with the fourth for RK4, which
costs four calls of the field a step: so the table also says what either method needs for an error of 1e-4.

Errors are distances to a solution by `dopri8` at tolerances of 1e-13. `rk4` is Kutta's 3/8 rule, as in torchdiffeq.
"""

from __future__ import annotations

import math
import time

import torch

import flashode
from pictures import COLOURS, INK, PALE, save_picture
from training import parser, prepare, table

try:
    import torchdiffeq
except ImportError:
    torchdiffeq = None

F64 = torch.float64
METHODS = {"euler": (1, 1), "rk4": (4, 4)}  # order, calls a step


def lotka_volterra(t, state):
    x, y = state.unbind(-1)
    return torch.stack([x - x * y, x * y - y], -1)


def pendulum(t, state):
    theta, p = state.unbind(-1)
    return torch.stack([-p, torch.sin(theta)], -1)


def volterra(x, y):
    return x - torch.log(x) + y - torch.log(y)


def energy(theta, p):
    return p**2 / 2 - torch.cos(theta)


PROBLEMS = {
    "Lotka-Volterra": (lotka_volterra, volterra, torch.tensor([[1.0, 2.0]], dtype=F64)),
    "pendulum": (
        pendulum,
        energy,
        torch.tensor([[0.5, 0.0], [1.2, 0.0], [2.0, 0.0], [2.9, 0.0], [4.1, 1.7], [-4.1, -1.7]], dtype=F64),
    ),
}


def errors(field, y0, method, steps, end=10.0):
    """Largest distance to the solution at time ``end``, for every number of steps."""
    t = torch.tensor([0.0, end], dtype=F64)
    exact = flashode.odeint(field, y0, t, method="dopri8", rtol=1e-13, atol=1e-13)[-1]
    return [
        (flashode.odeint(field, y0, t, method=method, options={"step_size": end / n})[-1] - exact)
        .abs()
        .max()
        .item()
        for n in steps
    ]


def slope_of(x, y):
    """Of the straight line that fits log y against log x best."""
    x, y = (torch.tensor(values, dtype=F64).log() for values in (x, y))
    return ((x - x.mean()) * (y - y.mean())).sum().item() / (x - x.mean()).square().sum().item()


def seconds(function, repeat=5):
    function()
    best = math.inf
    for _ in range(repeat):
        begin = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - begin)
    return best


def measure(quick):
    """Error by problem and method, over a ladder of steps; prints the orders."""
    steps = [2**k for k in range(6, 10 if quick else 14)]
    found, rows = {}, []
    for problem, (field, _, y0) in PROBLEMS.items():
        y0 = y0[:3]  # not those near where the pendulum stands on its head: errors there grow hundredfold
        for method, (order, calls) in METHODS.items():
            e = errors(field, y0, method, steps)
            found[problem, method] = [10 / n for n in steps], e
            fine = [i for i in range(len(steps)) if e[i] > 1e-11][-4:]  # beyond, roundings are what is left
            slope = slope_of([10 / steps[i] for i in fine], [e[i] for i in fine])
            # On that line: how many calls an error of 1e-4 takes.
            needed = steps[fine[-1]] * (e[fine[-1]] / 1e-4) ** (1 / order) * calls
            rows.append([problem, method, order, round(slope, 3), e[2], f"{needed:,.0f}"])
    table(["problem", "method", "order", "measured", f"error, {steps[2]} steps", "calls for 1e-4"], rows)
    return found


def compare(quick):
    """Prints what a solve by RK4 costs, compiled, native, and by torchdiffeq."""
    steps = 200 if quick else 2000
    y0, t = PROBLEMS["Lotka-Volterra"][2], torch.linspace(0, 20, steps + 1, dtype=F64)
    compiled = flashode.compile(lotka_volterra)
    solves = {
        "compiled": lambda: flashode.odeint(compiled, y0, t, method="rk4"),
        "native": lambda: flashode.odeint(lotka_volterra, y0, t, method="rk4"),
    }
    if torchdiffeq is not None:
        solves["torchdiffeq"] = lambda: torchdiffeq.odeint(lotka_volterra, y0, t, method="rk4")
    taken = {name: seconds(solve) for name, solve in solves.items()}
    slowest = max(taken.values())
    print(f"\n{steps} steps of rk4")
    table(["", "ms", "times faster"], [[name, 1000 * s, slowest / s] for name, s in taken.items()])


# ---- picture ---------------------------------------------------------------------------------


def draw(figure, found):
    grid = figure.subplots(2, 3)
    plane = {"Lotka-Volterra": ((0.0, 3.6), (0.0, 3.6)), "pendulum": ((-4.2, 4.2), (-3.2, 3.2))}
    steps = {"Lotka-Volterra": (20.0, 0.1), "pendulum": (12.0, 0.1)}
    for row, (problem, (field, invariant, y0)) in zip(grid, PROBLEMS.items()):
        end, h = steps[problem]
        for axes, method, colour in zip(row, METHODS, COLOURS):
            draw_phases(axes, field, invariant, y0, method, colour, end, h, *plane[problem])
            axes.set_title(f"{problem}: {method}, step {h}")
        draw_errors(row[2], problem, found)


def draw_phases(axes, field, invariant, y0, method, colour, end, h, xlim, ylim):
    low = 1e-3 if xlim[0] == 0 else None
    x, y = (torch.linspace(low or a, b, 201, dtype=F64) for a, b in (xlim, ylim))
    levels = invariant(x[None, :], y[:, None])
    values = sorted({round(invariant(*start).item(), 6) for start in y0})
    axes.contour(x, y, levels, levels=values, colors=PALE, linewidths=3, linestyles="solid")
    t = torch.arange(0, end + h / 2, h, dtype=F64)
    path = flashode.odeint(field, y0, t, method=method)
    for number in range(len(y0)):
        axes.plot(*path[:, number].T, color=colour, lw=1.4)
    axes.plot(*y0.T, "o", color=INK, ms=4.5, mec="white", mew=0.8)
    x_name, y_name = ("prey x", "predators y") if low else (r"$\theta$", "p")
    axes.set(xlim=xlim, ylim=ylim, xlabel=x_name, ylabel=y_name)


def draw_errors(axes, problem, found):
    for (method, (order, _)), colour in zip(METHODS.items(), COLOURS):
        h, e = found[problem, method]
        axes.loglog(h, e, "o-", color=colour, ms=4, lw=1.4, label=method)
        last = max(i for i in range(len(e)) if e[i] > 1e-11)
        axes.loglog(h, [e[last] * (x / h[last]) ** order for x in h], ":", color=INK, lw=1)
        axes.annotate(f"order {order}", (h[2], e[2]), (2, -18), textcoords="offset points")
    axes.set(title="Error at t = 10", xlabel="step size", ylabel="largest error")
    axes.legend(loc="lower right")


def main():
    args = parser(__doc__, "solvers.png").parse_args()
    prepare(args)
    torch.set_num_threads(1)  # tensors this small only lose by being shared out
    found = measure(args.quick)
    compare(args.quick)
    save_picture(args, lambda figure: draw(figure, found), (13, 8))


if __name__ == "__main__":
    main()
