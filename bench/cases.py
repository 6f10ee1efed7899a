"""The cases: what is computed, by whom, and what the right answer is.

Every random number comes from a seed of its case. flashode is used by its public names only.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import flashode
import torch
import torchdiffeq


@dataclass
class Contest:
    """One thing that several contestants compute.

    Attributes:
        contestants: ``run(func)`` by name, each returning a Tensor or a sequence of them; the
            speed of each is told relative to the first, or to the first yardstick if ``func`` is None.
        truth: computes the right answer; not timed.
        bound: largest difference from the truth at which a contestant is timed, relative to the
            largest entry of the truth.
        func: the vector field, whose calls are counted; None if there is none.
        at: arguments ``(t, y)`` for timing ``func`` on its own; the cost of a solver per call of
            ``func`` is what it takes beyond that.
        moved: bytes that a perfect implementation moves, from the number of calls of ``func``.
        yardsticks: ``run()`` by name; timed among the contestants, not compared.
        grad: whether gradients are recorded.
        within: context in which everything runs.
    """

    name: str
    contestants: dict[str, Callable]
    truth: Callable
    bound: float
    func: Callable | None = None
    at: tuple | None = None
    moved: Callable[[int], int] | None = None
    yardsticks: dict[str, Callable] = field(default_factory=dict)
    grad: bool = False
    within: Callable = contextlib.nullcontext


def size(n: int) -> str:
    """``N=1e7`` for a power of ten."""
    return f"N=1e{len(str(n)) - 1}"


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
    func = Spiral().to(device)
    yield Contest(
        "spiral",
        contestants={
            "torchdiffeq": lambda f: torchdiffeq.odeint(f, y0, t),
            "native": lambda f: flashode.odeint(f, y0, t, engine="native"),
            "reference": lambda f: flashode.odeint(f, y0, t, engine="reference"),
        },
        truth=lambda: torchdiffeq.odeint(exact, y0.double(), t.double(), rtol=1e-10, atol=1e-12),
        bound=2e-5,  # the rounding of some 2,500 float32 evaluations: the tolerance is below it
        func=func,
        at=(t[0], y0),
    )


def large(device, quick) -> Iterator[Contest]:
    """A state far larger than the caches under a cheap field: nothing but memory traffic."""
    n = 10**6 if quick else 10**7
    (y0,) = random(2, 1, n, device=device)
    t = torch.tensor([0.0, 1.0], device=device)
    call = {"rtol": 1e-4, "atol": 1e-5, "options": {"first_step": 0.3}}

    def moved(nfe):
        # A trial step of dopri5 reads y0 6 times and slopes 20 times and writes 6 states; its
        # error estimate reads y0, y1 and 6 slopes. Around the steps: y0 in, y0 and y1 out.
        return 4 * n * (40 * ((nfe - 1) // 6) + 6)

    yield Contest(
        f"large {size(n)}",
        contestants={
            "torchdiffeq": lambda f: torchdiffeq.odeint(f, y0, t, **call),
            "native": lambda f: flashode.odeint(f, y0, t, engine="native", **call),
        },
        truth=lambda: torch.stack([y0.double(), y0.double() * torch.tensor(-1.0, dtype=torch.float64).exp()]),
        bound=1e-4,  # rtol
        func=lambda t, y: -y,
        at=(t[0], y0),
        moved=moved,
    )


def steps(device, quick) -> Iterator[Contest]:
    """The same few steps on states from 2 to 10,000 numbers."""
    t = torch.tensor([0.0, 10.0], device=device)
    for n in (2, 100) if quick else (2, 100, 1000, 10_000):
        (y0,) = random(3, 1, n, device=device)
        yield Contest(
            f"steps N={n}",
            contestants={
                "torchdiffeq": lambda f: torchdiffeq.odeint(f, y0, t, rtol=1e-5, atol=1e-7),
                "native": lambda f: flashode.odeint(f, y0, t, rtol=1e-5, atol=1e-7, engine="native"),
            },
            truth=lambda: torch.stack([y0.double(), y0.double() * torch.tensor(-10.0, dtype=torch.float64).exp()]),
            bound=1e-5,
            func=lambda t, y: -y,
            at=(t[0], y0),
        )


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


def train(device, quick) -> Iterator[Contest]:
    """One training iteration of ode_demo: solve, loss, gradients."""
    y0 = random(5, 1, 20, 1, 2, device=device)[0].clamp(-2, 2)
    t = torch.linspace(0, 25, 1000, device=device)[:10]
    with torch.no_grad():
        target = torchdiffeq.odeint(lambda t, y: y**3 @ torch.tensor([[-0.1, 2.0], [-2.0, -0.1]]).to(y), y0, t)

    def iteration(odeint, func, dtype=torch.float32, **call):
        func.zero_grad()
        loss = (odeint(func, y0.to(dtype), t.to(dtype), **call) - target).abs().mean()
        loss.backward()
        return [loss.detach(), *(p.grad for p in func.parameters())]

    exact = Net().double().to(device)
    for name in ("direct", "adjoint"):
        suffix = "" if name == "direct" else "_adjoint"
        theirs, ours = (getattr(library, "odeint" + suffix) for library in (torchdiffeq, flashode))
        yield Contest(
            f"train {name}",
            contestants={
                "torchdiffeq": lambda f: iteration(theirs, f),
                "native": lambda f: iteration(ours, f, engine="native"),
            },
            truth=lambda: iteration(torchdiffeq.odeint, exact, torch.float64, rtol=1e-10, atol=1e-12),
            bound=1e-5,
            func=Net().to(device),
            grad=True,
        )


# ---- kernels -------------------------------------------------------------------------------


@contextlib.contextmanager
def warm_allocator():
    """Lets the C allocator keep what it is given back, so that a large result is memory in use before.

    By default glibc returns every block above 32 MiB to the system and each new result costs a page
    fault per 4 KiB, several times the kernel's own time. A solve writes to buffers that it has
    used before; so must the kernel here. (CUDA: torch's caching allocator does this anyway.)
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc: page faults are then part of the figure
        yield
        return
    mmap_max, trim_threshold = -4, -1
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    yield
    mallopt(mmap_max, 65536)
    mallopt(trim_threshold, 128 * 1024)


def stage(device, quick) -> Iterator[Contest]:
    """Bandwidth of the fused kernels against a copy that moves as many bytes.

    `combine` of s slopes reads s + 1 arrays and writes one; `error_norm` of 6 slopes reads 8. Each
    is measured beside `copy_` of (s + 2) / 2 arrays into (s + 2) / 2, so that both fit the
    same cache, or none. Called one by one through the dispatcher, which is some 5 us of each
    figure (the driver calls the kernels directly) and shows at N=1e5.
    """
    rtol, atol = torch.tensor(1e-3, dtype=torch.float64), torch.tensor(1e-3, dtype=torch.float64)
    for n in (10**5,) if quick else (10**7, 10**6, 10**5):
        y0, y1, *slopes = random(6, 8, n, device=device)
        coef = torch.linspace(-1, 1, 6, dtype=torch.float64)

        def contest(name, words, run, truth, bound):
            source, target = random(7, 1, words * n // 2, device=device)[0], torch.empty(words * n // 2, device=device)
            return Contest(
                f"{name} {size(n)}",
                contestants={name.split()[0]: run},
                truth=truth,
                bound=bound,
                yardsticks={"copy_": lambda: target.copy_(source)},
                moved=lambda nfe: 4 * n * words,
                within=warm_allocator if str(device) == "cpu" else contextlib.nullcontext,
            )

        def weighted_sum(k, weights):
            total = weights[0] * k[0]
            for weight, k_j in zip(weights[1:], k[1:]):
                total = total + weight * k_j
            return total

        for s in range(1, 7):
            k, c = slopes[:s], coef[:s].clone()
            yield contest(
                f"combine s={s}", s + 2,
                lambda _: torch.ops.flashode.combine(y0, k, c),
                lambda: y0 + weighted_sum(k, c.tolist()),
                0.0,  # the same operations in the same order: the same bits
            )  # fmt: skip

        def norm():
            a, b, *k = (x.double() for x in (y0, y1, *slopes))
            scaled = weighted_sum(k, coef.tolist()) / (1e-3 + 1e-3 * torch.maximum(a.abs(), b.abs()))
            return scaled.square().mean().sqrt()

        yield contest(
            "error_norm s=6", 8,
            lambda _: torch.ops.flashode.error_norm(y0, y1, slopes, coef, rtol, atol, [0, n]),
            norm,
            1e-6,
        )  # fmt: skip


# In this order whichever are asked for: `stage` comes last because malloc never quite forgets.
CASES = {"spiral": spiral, "steps": steps, "train": train, "large": large, "stage": stage}
