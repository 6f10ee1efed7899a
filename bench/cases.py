"""The cases: what is computed, by whom, and what the right answer is.

Every random number comes from a seed of its case. flashode is used by its public names only.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torchdiffeq

import flashode


@dataclass
class Contest:
    """One thing that several contestants compute.

    Attributes:
        contestants: ``run(func)`` by name, each returning a Tensor or a sequence of them. One that counts
            otherwise than by calls of ``func`` has ``stats()``, which gives ``nfe`` and ``steps``; one
            in another process has ``seconds_of(number)``, which times so many runs there.
        truth: computes the right answer; not timed.
        bound: largest difference from the truth at which a contestant is timed, relative to the
            largest entry of the truth.
        func: the vector field, whose calls are counted; None if there is none.
        at: arguments ``(t, y)`` for timing ``func`` on its own; the cost of a solver per call of
            ``func`` is what it takes beyond that.
        moved: bytes that have to be moved, from the number of calls of ``func``.
        flops: the field's arithmetic operations, from the number of calls of ``func``.
        yardsticks: ``run()`` by name; timed among the contestants, not compared. Speeds are
            relative to the first yardstick, or if there is none to the first contestant.
        grad: whether gradients are recorded.
        within: context in which everything runs.
    """

    name: str
    contestants: dict[str, Callable]
    truth: Callable
    bound: float
    func: Callable | None = None
    at: tuple | None = None
    moved: Callable[[int | None], int] | None = None
    flops: Callable[[int | None], int] | None = None
    yardsticks: dict[str, Callable] = field(default_factory=dict)
    grad: bool = False
    within: Callable = contextlib.nullcontext


def random(seed: int, count: int, *shape, device) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(device) for _ in range(count)]


# ---- solves --------------------------------------------------------------------------------


class Spiral(torch.nn.Module):
    """The field of torchdiffeq's examples/ode_demo.py."""

    def __init__(self):
        super().__init__()
        self.register_buffer("A", torch.tensor([[-0.1, 2.0], [-2.0, -0.1]]))

    def forward(self, t, y):
        return torch.mm(y**3, self.A)


def spiral(device, quick) -> Iterator[Contest]:
    """A state of two numbers: nothing but overhead."""
    y0 = torch.tensor([[2.0, 0.0]], device=device)
    t = torch.linspace(0, 25, 1000, device=device)[: 100 if quick else None]
    exact = Spiral().double().to(device)
    yield Contest(
        "spiral",
        contestants={
            "torchdiffeq": lambda f: torchdiffeq.odeint(f, y0, t),
            "native": lambda f: flashode.odeint(f, y0, t, engine="native"),
            "reference": lambda f: flashode.odeint(f, y0, t, engine="reference"),
        },
        truth=lambda: torchdiffeq.odeint(exact, y0.double(), t.double(), rtol=1e-10, atol=1e-12),
        bound=2e-5,  # the rounding of some 2,500 float32 evaluations: the tolerance is below it
        func=Spiral().to(device),
        at=(t[0], y0),
    )


def decay(name, n, end, bound, device, moved=None, **call) -> Contest:
    """``dy/dt = -y`` for ``n`` numbers, from 0 to ``end``."""
    (y0,) = random(n, 1, n, device=device)
    t = torch.tensor([0.0, end], device=device)
    return Contest(
        name,
        contestants={
            "torchdiffeq": lambda f: torchdiffeq.odeint(f, y0, t, **call),
            "native": lambda f: flashode.odeint(f, y0, t, engine="native", **call),
        },
        truth=lambda: torch.stack([y0.double(), math.exp(-end) * y0.double()]),
        bound=bound,
        func=lambda t, y: -y,
        at=(t[0], y0),
        moved=moved,
    )


class Oscillators(torch.nn.Module):
    """van der Pol's equation, mu = 2, for a batch."""

    def forward(self, t, y):
        x, v = y.unbind(-1)
        return torch.stack([v, 2 * (1 - x * x) * v - x], -1)


def with_torchode(y0, t, tolerance) -> dict[str, Callable]:
    """torchode, where it is installed: ``pip install flashode[bench]``."""
    try:
        import torchode
    except ImportError:
        print("  torchode is not installed: left out", file=sys.stderr)
        return {}
    t = t.expand(len(y0), -1).contiguous()

    def run(func):
        term = torchode.ODETerm(func)
        control = torchode.IntegralController(atol=tolerance, rtol=tolerance, term=term)
        solver = torchode.AutoDiffAdjoint(torchode.Dopri5(term=term), control)
        return solver.solve(torchode.InitialValueProblem(y0=y0, t_eval=t)).ys.transpose(0, 1)

    return {"torchode": run}


def batched(device, quick) -> Iterator[Contest]:
    """Oscillators with steps of their own (torchode's benchmark): one cycle, 200 outputs. torchdiffeq takes
    the same steps for all."""
    (y0,) = random(10, 1, 32 if quick else 256, 2, device=device)
    t, tolerance, func = torch.linspace(0, 7.63, 200, device=device), 1e-5, Oscillators()
    call = {"rtol": tolerance, "atol": tolerance}
    yield Contest(
        f"batched B={len(y0)}",
        contestants={
            "torchdiffeq": lambda f: torchdiffeq.odeint(f, y0, t, **call),
            **with_torchode(y0, t, tolerance),
            "native": lambda f: flashode.odeint(f, y0, t, options={"batched": True}, engine="native", **call),
        },
        truth=lambda: torchdiffeq.odeint(func, y0.double(), t.double(), rtol=1e-10, atol=1e-12),
        bound=2e-3,  # what the shared norm of torchdiffeq leaves some samples with
        func=func,
        at=(t[0], y0),
    )


def events(device, quick) -> Iterator[Contest]:
    """A pendulum, until friction would have taken so much of its energy."""
    y0, t = torch.tensor([2.0, 0.0], dtype=torch.float64, device=device), torch.tensor([0.0, 1.0])
    start, most = torch.cat([y0, y0.new_zeros(1)]), 20.0 if quick else 80.0

    def swing(t, y):
        return torch.stack([y[1], -torch.sin(y[0]), y[1] ** 2])  # angle, velocity, work

    def until(odeint, f, **call):
        return odeint(f, start, t.double(), event_fn=lambda t, y: y[2] - most, **call)

    tight = {"rtol": 1e-11, "atol": 1e-12}
    yield Contest(
        "events",
        contestants={
            "torchdiffeq": lambda f: until(torchdiffeq.odeint, f),
            "native": lambda f: until(flashode.odeint, f, engine="native"),
        },
        truth=lambda: until(flashode.odeint, swing, engine="reference", **tight),
        bound=1e-5,
        func=swing,
        at=(t[0], start),
    )


def large(device, quick) -> Iterator[Contest]:
    """A state far larger than the caches under a cheap field: nothing but memory traffic."""
    digits = 6 if quick else 7
    n = 10**digits

    def moved(nfe):
        # A trial step of dopri5 reads y0 6 times and slopes 20 times and writes 6 states; its
        # error estimate reads y0, y1 and 6 slopes. Around the steps: y0 in, y0 and y1 out.
        return 4 * n * (40 * ((nfe - 1) // 6) + 6)

    call = {"rtol": 1e-4, "atol": 1e-5, "options": {"first_step": 0.3}}  # three steps
    yield decay(f"large N=1e{digits}", n, 1.0, 1e-4, device, moved, **call)


def steps(device, quick) -> Iterator[Contest]:
    """What a solve costs beside its calls: one Euler step is set-up alone, then some 20 steps of dopri5."""
    yield decay("one step N=2", 2, 0.01, 1e-4, device, method="euler")
    for n in (2, 100) if quick else (2, 100, 1000, 10_000):
        yield decay(f"steps N={n}", n, 10.0, 1e-5, device, rtol=1e-5, atol=1e-7)


class Net(torch.nn.Module):
    """The network of torchdiffeq's examples/ode_demo.py."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(2, 50), torch.nn.Tanh(), torch.nn.Linear(50, 2))
        generator = torch.Generator().manual_seed(4)
        for layer in (self.net[0], self.net[2]):
            torch.nn.init.normal_(layer.weight, std=0.1, generator=generator)
            torch.nn.init.zeros_(layer.bias)

    def forward(self, t, y):
        return self.net(y**3)


def training(name, theirs, ours, exact, func, y0, t, bound, loss, **call) -> Contest:
    """Solve, loss, gradients; the truth by ``exact``, the field in double precision."""

    def iteration(odeint, func, dtype=torch.float32, **call):
        func.zero_grad()
        value = loss(odeint(func, y0.to(dtype), t.to(dtype), **call))
        value.backward()
        return [value.detach(), *(p.grad for p in func.parameters())]

    return Contest(
        name,
        contestants={
            "torchdiffeq": lambda f: iteration(theirs, f, **call),
            "native": lambda f: iteration(ours, f, engine="native", **call),
        },
        truth=lambda: iteration(torchdiffeq.odeint, exact, torch.float64, rtol=1e-10, atol=1e-12),
        bound=bound,
        func=func,
        grad=True,
    )


def checkpoint(*arguments, **call):
    return flashode.odeint_adjoint(*arguments, adjoint="checkpoint", **call)


def train(device, quick) -> Iterator[Contest]:
    """One training iteration of ode_demo, in every mode; then the same solve with 100 outputs. Of the
    direct ones, half or more is func's own."""
    y0 = random(5, 1, 20, 1, 2, device=device)[0].clamp(-2, 2)
    matrix, exact = Spiral().to(device).A, Net().double().to(device)
    ten = torch.linspace(0, 25, 1000, device=device)[:10]
    hundred = torch.linspace(0, ten[-1].item(), 100, device=device)

    def contest(name, theirs, ours, t=ten):
        with torch.no_grad():
            target = torchdiffeq.odeint(lambda t, y: y**3 @ matrix, y0, t)
        func = Net().to(device)
        return training(name, theirs, ours, exact, func, y0, t, 1e-5, lambda ys: (ys - target).abs().mean())

    yield contest("train direct", torchdiffeq.odeint, flashode.odeint)
    yield contest("train checkpoint", torchdiffeq.odeint, checkpoint)
    yield contest("train backsolve", torchdiffeq.odeint_adjoint, flashode.odeint_adjoint)
    if not quick:
        yield contest("train 100 outputs", torchdiffeq.odeint_adjoint, flashode.odeint_adjoint, hundred)


def parameters(device, quick) -> Iterator[Contest]:
    """Gradients of a network far larger than its state: what the solver does with them, and how often."""
    hidden = 50 if quick else 5000
    func = torch.nn.Sequential(torch.nn.Linear(1000, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 1000))
    generator = torch.Generator().manual_seed(6)
    for p in func.parameters():
        torch.nn.init.normal_(p, std=0.02, generator=generator)

    class Field(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(func).to(device)

        def forward(self, t, y):
            return self.net(y)

    (y0,) = random(7, 1, 32, 1000, device=device)
    yield training(
        f"parameters 1e{5 if quick else 7}",
        torchdiffeq.odeint_adjoint,
        flashode.odeint_adjoint,
        Field().double(),
        Field(),
        y0,
        torch.tensor([0.0, 1.0], device=device),
        1e-3,
        lambda ys: ys[-1].square().mean(),
        rtol=1e-4,
        atol=1e-5,
    )


# ---- kernels -------------------------------------------------------------------------------


@contextlib.contextmanager
def warm_allocator(device):
    """Lets the C allocator keep what it is given back, so that a result is memory used before.

    By default glibc returns every block above 32 MiB to the system, and each new result costs a
    page fault per 4 KiB: several times the kernel's own time. A solve writes to buffers that it
    has used before; so must the kernel here. On a GPU torch's caching allocator does this anyway.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if str(device) == "cpu" else None
    if mallopt is None:  # without glibc the page faults are part of the figures
        yield
        return
    mmap_max, trim_threshold = -4, -1
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    torch.ones(2**26)  # 256 MiB to reuse
    yield
    mallopt(trim_threshold, 128 * 1024)
    mallopt(mmap_max, 65536)


def stage(device, quick) -> Iterator[Contest]:
    """Bandwidth of the fused kernels against a copy that moves as many bytes.

    `combine` of s slopes reads s + 1 arrays and writes one; `error_norm` of 6 slopes reads 8. Each
    is measured beside a `copy_` of (s + 2) / 2 arrays' worth, so that both fit the same cache, or
    none. "speed" is the share of the copy's bandwidth. The kernels are called one at a time from
    Python, which is some 8 us of each figure and shows at N=1e5; a solve calls them from C++.
    """
    tol = torch.tensor(1e-3, dtype=torch.float64)
    coef = torch.linspace(-1, 1, 6, dtype=torch.float64)

    def weighted_sum(k, weights):
        total = weights[0] * k[0]
        for weight, k_j in zip(weights[1:], k[1:]):
            total = total + weight * k_j
        return total

    def contest(name, n, words, run, truth, bound):
        (source,) = random(words, 1, words * n // 2, device=device)
        target = torch.empty_like(source)
        return Contest(
            f"{name} N=1e{len(str(n)) - 1}",
            contestants={"kernel": run},
            truth=truth,
            bound=bound,
            moved=lambda _: 4 * n * words,
            yardsticks={"copy_": lambda: target.copy_(source)},
            within=lambda: warm_allocator(device),
        )

    def combine(n, y0, k, c):
        return contest(
            f"combine s={len(k)}", n, len(k) + 2,
            lambda _: torch.ops.flashode.combine(y0, k, c),
            lambda: y0 + weighted_sum(k, c.tolist()),
            0.0,  # the same operations in the same order: the same bits
        )  # fmt: skip

    def error_norm(n, y0, y1, k):
        def truth():
            a, b, *slopes = (x.double() for x in (y0, y1, *k))
            scaled = weighted_sum(slopes, coef.tolist()) / (1e-3 + 1e-3 * torch.maximum(a.abs(), b.abs()))
            return scaled.square().mean().sqrt()

        return contest(
            "norm s=6", n, 8,
            lambda _: torch.ops.flashode.error_norm(y0, y1, k, coef, tol, tol, [0, n]),
            truth,
            1e-6,
        )  # fmt: skip

    for n in (10**5,) if quick else (10**7, 10**6, 10**5):
        y0, y1, *k = random(n, 8, n, device=device)
        for s in range(1, 7):
            yield combine(n, y0, k[:s], coef[:s].clone())
        yield error_norm(n, y0, y1, k)


# In this order whichever are asked for: `stage` comes last because malloc never quite forgets.
CASES = {
    "spiral": spiral,
    "steps": steps,
    "batched": batched,
    "events": events,
    "train": train,
    "parameters": parameters,
    "large": large,
    "stage": stage,
}
