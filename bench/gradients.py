"""Memory and accuracy of every way to a gradient, in tables and a picture: ``python bench/gradients.py``.

Memory is the peak of the process, resident, over one forward and backward pass on one thread, above
its peak over one plain pass of the field forward and backward; each figure comes from a process of its
own. On a GPU it is what torch has allocated there. Errors are relative to the gradient of a far more accurate direct solve.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import multiprocessing
import os
import re
import resource
import timeit
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torchdiffeq

import flashode

MODES = ("direct", "checkpoint", "interpolated", "backsolve")
THEIRS = ("torchdiffeq direct", "torchdiffeq adjoint")
PICTURE = Path(__file__).resolve().parent.parent / "docs" / "gradients.png"
MB = 2**20


def integrate(contestant, func, y0, t, **call):
    if contestant == "torchdiffeq direct":
        return torchdiffeq.odeint(func, y0, t, **call)
    if contestant == "torchdiffeq adjoint":
        return torchdiffeq.odeint_adjoint(func, y0, t, **call)
    if contestant == "direct":
        return flashode.odeint(func, y0, t, **call)
    return flashode.odeint_adjoint(func, y0, t, adjoint=contestant, **call)


# ---- memory ----------------------------------------------------------------------------------


class MLP(torch.nn.Module):
    """A field with one hidden layer that turns the state, so that steps are as long at all times."""

    def __init__(self, width, hidden):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(width, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, width)
        )

    def forward(self, t, y):
        return self.net(y) + 3 * (y.roll(1, -1) - y.roll(-1, -1))


@dataclass(frozen=True)
class Case:
    """A solve whose memory is measured, of a field with about ``2 * width * hidden`` parameters."""

    batch: int = 256
    width: int = 16
    hidden: int = 128
    span: float = 2.0
    outputs: int = 2
    rtol: float = 1e-4
    device: str = "cpu"

    def make(self):
        torch.manual_seed(0)
        field, y0 = MLP(self.width, self.hidden), torch.randn(self.batch, self.width)
        t = torch.linspace(0, self.span, self.outputs)
        return field.to(self.device), y0.to(self.device), t.to(self.device)

    @property
    def tolerances(self):
        return {"rtol": self.rtol, "atol": self.rtol / 100}

    @property
    def parameters(self) -> int:
        return 2 * self.width * self.hidden + self.width + self.hidden

    def steps(self) -> int:
        field, y0, t = self.make()
        with torch.no_grad():
            return flashode.solve(field, y0, t, **self.tolerances).stats.accepted


def peak(run, device) -> int:
    """The most bytes held while ``run()`` runs; where that cannot be reset, since the process began."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device)
    getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not os.access(reset, os.W_OK):
        run()
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reset.write_text("5")
    run()
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1])


def iterate(contestant, case: Case):
    """The field, ``iteration(y0, t)`` and its arguments; it has run once, small, which makes .grad."""
    torch.set_num_threads(1)
    field, y0, t = case.make()

    def iteration(y0, t):
        integrate(contestant, field, y0, t, **case.tolerances).square().mean().backward()

    iteration(y0[:1], t[[0, -1]] / 100)
    return field, iteration, y0, t


def measure_bytes(contestant, case: Case) -> int:
    """Of one forward and backward pass, in a process that has done nothing else."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # what is freed goes back to the system, and is not counted again
        mmap_threshold, trim_threshold = -3, -1
        mallopt(mmap_threshold, 65536)
        mallopt(trim_threshold, 65536)
    field, iteration, y0, t = iterate(contestant, case)
    plain = peak(lambda: field(t[0], y0).square().mean().backward(), case.device)
    return max(0, peak(lambda: iteration(y0, t), case.device) - plain)


def measure_seconds(contestant, case: Case) -> float:
    """The less of two runs; the allocator is as it comes, because memory given back costs time."""
    _, iteration, y0, t = iterate(contestant, case)
    if case.device != "cpu":  # the copy of a number waits for all that was queued before it
        return min(timeit.repeat(lambda: (iteration(y0, t), y0.sum().item()), number=1, repeat=2))
    return min(timeit.repeat(lambda: iteration(y0, t), number=1, repeat=2))


def sweeps(quick, device) -> dict[str, list[tuple[int, Case]]]:
    """Cases by what grows in them, each with its number of that."""
    spans = (1, 8) if quick else (1, 2, 4, 8, 16, 32)
    outputs = (2, 64) if quick else (2, 4, 8, 16, 32, 64, 128, 256)
    hidden = (64, 2048) if quick else (64, 256, 1024, 4096, 16384)
    by_span = [Case(span=span, device=device) for span in spans]
    by_outputs = [Case(outputs=number, device=device) for number in outputs]
    by_hidden = [Case(batch=8, width=128, hidden=number, device=device) for number in hidden]
    return {
        "accepted steps": [(case.steps(), case) for case in by_span],
        "outputs": [(case.outputs, case) for case in by_outputs],
        "parameters": [(case.parameters, case) for case in by_hidden],
    }


def measure_sweep(pool, contestants, what, cases):
    """Rows of ``(x, bytes of each contestant)``, printed as they come."""
    print(f"\npeak memory in MB against {what}")
    print(line(what, contestants))
    rows = []
    for x, case in cases:
        sizes = [pool.apply(measure_bytes, (contestant, case)) for contestant in contestants]
        rows.append((x, sizes))
        print(line(f"{x:,}", [f"{size / MB:.1f}" for size in sizes]), flush=True)
    return rows


def measure_large(pool, contestants, quick, device):
    """A field of 10 million parameters, where buffers of their size are what counts."""
    case = Case(batch=32, width=1120, hidden=4464, span=0.5, rtol=1e-3, device=device)
    if quick:
        case = replace(case, width=112, hidden=446)
    print(f"\n{case.parameters:,} parameters, batch of {case.batch}, {case.steps()} accepted steps")
    print(line("", ["parameter sizes", "seconds"]))
    for contestant in contestants:
        size, seconds = (pool.apply(f, (contestant, case)) for f in (measure_bytes, measure_seconds))
        print(line(contestant, [f"{size / (4 * case.parameters):.1f}", f"{seconds:.2f}"]), flush=True)


# ---- accuracy --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Oscillator:
    """A problem in two variables with one parameter, differentiated by its start and by that."""

    name: str
    slope: object
    span: float

    def gradients(self, integrate, **call):
        p = torch.ones((), dtype=torch.float64, requires_grad=True)
        y0 = torch.tensor([2.0, 0.0], dtype=torch.float64, requires_grad=True)
        t = torch.tensor([0.0, self.span], dtype=torch.float64)
        field = Parametric(self.slope, p)
        return torch.autograd.grad(integrate(field, y0, t, **call)[-1].sum(), [y0, field.p])


class Parametric(torch.nn.Module):
    def __init__(self, slope, p):
        super().__init__()
        self.slope, self.p = slope, torch.nn.Parameter(p)

    def forward(self, t, y):
        return torch.stack(self.slope(*y, self.p))


OSCILLATORS = (
    Oscillator("pendulum to t = 5", lambda a, b, p: [b, -p * torch.sin(a)], 5.0),
    Oscillator("van der Pol, mu = 1, to t = 20", lambda a, b, p: [b, p * (1 - a * a) * b - a], 20.0),
)


def measure_errors(problem, contestants, tolerances):
    """Rows of ``(rtol, error of each contestant)``, NaN for a solve that fails, printed as they come.

    The error is the larger of that to the start and that to the parameter, relative to its norm.
    """
    print(f"\nrelative error of the gradient against rtol, atol = rtol / 100: {problem.name}")
    print(line("rtol", contestants))
    truth = problem.gradients(flashode.odeint, method="dopri8", rtol=1e-12, atol=1e-13)

    def error(contestant, rtol):
        def solve(*args, **call):
            return integrate(contestant, *args, **call)

        try:
            grads = problem.gradients(solve, rtol=rtol, atol=rtol / 100)
        except AssertionError:  # torchdiffeq's, and a flashode.SolveError
            return math.nan
        return max(((g - exact).norm() / exact.norm()).item() for g, exact in zip(grads, truth))

    rows = []
    for rtol in tolerances:
        errors = [error(contestant, rtol) for contestant in contestants]
        rows.append((rtol, errors))
        print(line(f"{rtol:.0e}", ["fails" if math.isnan(e) else f"{e:.1e}" for e in errors]), flush=True)
    return rows


def measure_relaxation(contestants, tolerances):
    """dy(5)/dp of y' = -p (y - cos t), y(0) = 0, p = 50: stiff, and solved by an explicit method."""

    class Relaxation(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.p = torch.nn.Parameter(torch.tensor(50.0, dtype=torch.float64))

        def forward(self, t, y):
            return -self.p * (y - torch.cos(t))

    def derivative(contestant, **call):
        field, y0 = Relaxation(), torch.zeros(1, dtype=torch.float64)
        t = torch.tensor([0.0, 5.0], dtype=torch.float64)
        return torch.autograd.grad(integrate(contestant, field, y0, t, **call)[-1].sum(), field.p)[0].item()

    exact = derivative("direct", method="dopri8", rtol=1e-12, atol=1e-13)
    print(f"\ndy(5)/dp of y' = -p (y - cos t), p = 50, which is {exact:.6f}, against rtol = atol")
    print(line("rtol", contestants))
    for rtol in tolerances:
        found = [derivative(contestant, rtol=rtol, atol=rtol) for contestant in contestants]
        print(line(f"{rtol:.0e}", [f"{x:.3g}" for x in found]), flush=True)


# ---- tables and picture ----------------------------------------------------------------------


def line(first, cells) -> str:
    return f"{first:<20}" + "".join(f"{cell:>20}" for cell in cells)


INK = "#2b2b33"
STYLE = {
    "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "legend.frameon": False,
}  # fmt: skip
LINES = {
    "torchdiffeq direct": {"color": "#9aa0ab", "ls": "--", "marker": "s"},
    "torchdiffeq adjoint": {"color": "#5f6570", "ls": "--", "marker": "D"},
    "direct": {"color": "#1f6fb4", "marker": "o"},
    "backsolve": {"color": "#d1495b", "marker": "^"},
    "checkpoint": {"color": "#2a9d5c", "marker": "v"},
    "interpolated": {"color": "#c98a1b", "marker": "P"},
}


def draw(contestants, memory, errors, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    figure = plt.figure(figsize=(12, 8), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    grid, axes = figure.add_gridspec(2, 6), None
    for i, (what, rows) in enumerate(memory.items()):
        axes = figure.add_subplot(grid[0, 2 * i : 2 * i + 2], sharey=axes)
        # A figure below a page's worth is noise, and a logarithm has no zero.
        draw_lines(axes, contestants, [(x, [max(0.1, size / MB) for size in sizes]) for x, sizes in rows])
        axes.set(title=f"Memory against {what}", xlabel=what, ylabel="peak memory, MB")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:,.0f}")
            axis.set_minor_formatter(plt.NullFormatter())
    for i, (name, rows) in enumerate(errors.items()):
        axes = figure.add_subplot(grid[1, 3 * i : 3 * i + 3])
        draw_lines(axes, contestants, rows)
        axes.invert_xaxis()
        mark_failures(axes, contestants, rows)
        axes.set(title=f"Error (× fails): {name}", xlabel="rtol", ylabel="relative error of the gradient")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(contestants))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=130)


def draw_lines(axes, contestants, rows):
    for number, contestant in enumerate(contestants):
        x, y = zip(*((x, values[number]) for x, values in rows))
        axes.loglog(x, y, label=contestant, lw=1.7, ms=5, **LINES[contestant])
    axes.grid(color="#e6e8ee", lw=0.7)


def mark_failures(axes, contestants, rows):
    """A cross for each above the plot: a missing point would be overlooked."""
    for number, contestant in enumerate(contestants):
        failed = [x for x, values in rows if math.isnan(values[number])]
        style = {"color": LINES[contestant]["color"], "marker": "x", "mew": 2, "ls": "", "in_layout": False}
        axes.plot(failed, [1.0 - 0.04 * number] * len(failed), transform=axes.get_xaxis_transform(), **style)


# ---- command line ----------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--modes", nargs="+", choices=tuple(LINES)[2:], default=MODES, help=f"of ours ({' '.join(MODES)})")
    add("--quick", action="store_true", help="few points, ours alone: does it run?")
    add("--out", type=Path, default=PICTURE, metavar="PNG", help="picture (docs/gradients.png)")
    add("--device", default="cpu", help="for the figures of memory and time")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", flashode.GradientWarning)  # the table says by how much
    contestants = [*(() if args.quick else THEIRS), *args.modes]
    # Every measurement is a fork of a server that has imported everything and run nothing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flashode", "torchdiffeq"])
    with context.Pool(1, maxtasksperchild=1) as pool:
        memory = {
            what: measure_sweep(pool, contestants, what, cases)
            for what, cases in sweeps(args.quick, args.device).items()
        }
        measure_large(pool, contestants, args.quick, args.device)
    tolerances = [10.0**-digits for digits in (range(3, 6) if args.quick else range(3, 11))]
    errors = {problem.name: measure_errors(problem, contestants, tolerances) for problem in OSCILLATORS}
    measure_relaxation(contestants, tolerances[:4])
    draw(contestants, memory, errors, args.out)
    print(f"\npicture: {args.out}")


if __name__ == "__main__":
    main()
