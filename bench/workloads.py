"""The workloads of ``compiled.py`` as data: fields small enough to be compiled, and what is solved of them.

Every random number comes from a seed of its workload. A field's class and a loss have twins of the same
names in ``diffrax_worker.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torchdiffeq
from cases import Net, Spiral, random
from torch.nn.functional import softplus

import flashode


@dataclass(frozen=True)
class Workload:
    """One solve by dopri5, with tolerances, that all contestants make.

    Attributes:
        bound: largest difference from a more accurate answer, as in `Contest`.
        compared: the outputs that are compared, from the first on; all by default.
        batched: whether samples have steps of their own.
        loss: of `LOSSES`; its value and the gradients of all parameters are the result. Without one it is
            the outputs.
        flops: the field's arithmetic operations in one call, where they are what counts.
        crowd: whether torchdiffeq, whose samples share their steps, is left out.
    """

    name: str
    field: torch.nn.Module
    y0: torch.Tensor | tuple[torch.Tensor, ...]
    t: torch.Tensor
    bound: float
    rtol: float
    atol: float
    compared: int | None = None
    batched: bool = False
    loss: str | None = None
    target: torch.Tensor | None = None
    flops: int | None = None
    crowd: bool = False


LOSSES = {
    "distance": lambda ys, target: (ys - target).abs().mean(),
    "square": lambda ys, target: ys.square().mean(),
    "likelihood": lambda ys, target: (0.5 * ys[0][-1].square().sum(-1) + ys[1][-1, :, 0]).mean(),
}


# ---- fields ----------------------------------------------------------------------------------


class VanDerPol(torch.nn.Module):
    """van der Pol's equation, mu = 5."""

    def forward(self, t, y):
        x, v = y.unbind(-1)
        return torch.stack([v, 5 * (1 - x * x) * v - x], -1)


class Lorenz(torch.nn.Module):
    def forward(self, t, y):
        a, b, c = y.unbind(-1)
        return torch.stack([10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c], -1)


class Layers(torch.nn.Module):
    """Linear layers with tanh between them."""

    def __init__(self, seed, *widths, gain=1.0):
        super().__init__()
        layers = []
        for before, after in zip(widths, widths[1:]):
            layers += [torch.nn.Linear(before, after), torch.nn.Tanh()]
        self.net = torch.nn.Sequential(*layers[:-1])
        generator = torch.Generator().manual_seed(seed)
        for layer in layers[::2]:
            torch.nn.init.normal_(layer.weight, std=gain * layer.in_features**-0.5, generator=generator)
            torch.nn.init.normal_(layer.bias, std=0.1, generator=generator)


class Deep(Layers):
    def forward(self, t, y):
        return self.net(y)


class Soft(Layers):
    """A hidden layer with softplus, the slopes bounded by tanh."""

    def forward(self, t, y):
        first, _, second = self.net
        return torch.tanh(second(softplus(first(y))))


class Flow(torch.nn.Module):
    """A continuous normalizing flow: FFJORD's layers, gated and shifted by the time, and the exact divergence."""

    def __init__(self, seed, *widths):
        super().__init__()
        pairs = list(zip(widths, widths[1:]))
        self.layers = torch.nn.ModuleList(torch.nn.Linear(before, after) for before, after in pairs)
        self.gates = torch.nn.ModuleList(torch.nn.Linear(1, after) for _, after in pairs)
        self.shifts = torch.nn.ModuleList(torch.nn.Linear(1, after, bias=False) for _, after in pairs)
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5 if p.dim() > 1 else 0.1, generator=generator)

    def velocity(self, t, z):
        for i, (layer, gate, shift) in enumerate(zip(self.layers, self.gates, self.shifts)):
            z = layer(z) * torch.sigmoid(gate(t.reshape(1))) + shift(t.reshape(1))
            z = torch.tanh(z) if i < len(self.layers) - 1 else z
        return z

    def forward(self, t, state):
        with torch.enable_grad():
            z = state[0].requires_grad_(True)
            dz = self.velocity(t, z)
            divergence = sum(
                torch.autograd.grad(dz[:, i].sum(), z, create_graph=True)[0][:, i] for i in range(z.shape[1])
            )
        return dz, -divergence[:, None]


# ---- workloads -------------------------------------------------------------------------------


def spiral(quick) -> Iterator[Workload]:
    """torchdiffeq's examples/ode_demo.py: two numbers, nothing but overhead."""
    t = torch.linspace(0, 25, 1000)[: 100 if quick else None]
    # The bound: the rounding of some 2,500 float32 evaluations; the tolerance is below it.
    yield Workload("spiral", Spiral(), torch.tensor([[2.0, 0.0]]), t, 5e-5, rtol=1e-7, atol=1e-9)


def oscillators(quick) -> Iterator[Workload]:
    """Stiff for a part of every cycle, each sample at another time."""
    cycle, period = VanDerPol(), 11.6122
    for samples in (16, 64) if quick else (256, 16_384):
        times = torch.cat([torch.zeros(1), 20 + torch.arange(samples) * period / samples]).double()
        with torch.no_grad():
            starts = flashode.odeint(cycle, torch.tensor([2.0, 0.0], dtype=torch.float64), times)[1:].float()
        yield Workload(
            f"oscillators {samples}", cycle, starts, torch.linspace(0, 10, 50), 1e-2, rtol=1e-5, atol=1e-5,
            batched=True, crowd=samples > 256,
        )  # fmt: skip


def lorenz(quick) -> Iterator[Workload]:
    """Chaos: beyond t = 10 only the numbers of steps can be compared."""
    t = torch.linspace(0, 100, 1001, dtype=torch.float64)[: 201 if quick else None]
    y0 = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    yield Workload("lorenz", Lorenz(), y0, t, 1e-4, rtol=1e-8, atol=1e-8, compared=101)


def train(quick) -> Iterator[Workload]:
    """One training iteration of ode_demo."""
    y0, t = random(5, 1, 20, 1, 2, device="cpu")[0].clamp(-2, 2), torch.linspace(0, 25, 1000)[:10]
    with torch.no_grad():
        target = torchdiffeq.odeint(Spiral(), y0.reshape(20, 2), t).reshape(10, 20, 1, 2)
    yield Workload("train", Net(), y0, t, 1e-5, rtol=1e-7, atol=1e-9, loss="distance", target=target)


def long(quick) -> Iterator[Workload]:
    """A long solve of a small network, with many outputs and with none between."""
    (y0,) = random(11, 1, 64, 4, device="cpu")
    end = 10.0 if quick else 100.0
    for outputs in (10,) if quick else (100, 2):
        yield Workload(
            f"long {outputs} outputs", Soft(12, 4, 32, 4), y0, torch.linspace(0, end, outputs), 2e-3, rtol=1e-6,
            atol=1e-6, loss="square",
        )  # fmt: skip


def flow(quick) -> Iterator[Workload]:
    """FFJORD on a toy density."""
    (z,) = random(13, 1, 10 if quick else 100, 2, device="cpu")
    y0, t = (z, torch.zeros(len(z), 1)), torch.tensor([0.0, 0.5])
    yield Workload("flow", Flow(14, 2, 64, 64, 64, 2), y0, t, 5e-3, rtol=1e-5, atol=1e-5, loss="likelihood")


def wide(quick) -> Iterator[Workload]:
    """Arithmetic, which a compiler has to do as well as a library of matrix products."""
    samples, widths = 64 if quick else 1024, (64, 256, 256, 64)
    (y0,) = random(15, 1, samples, 64, device="cpu")
    flops = 2 * samples * sum(before * after for before, after in zip(widths, widths[1:]))
    field, t = Deep(16, *widths, gain=2.0), torch.tensor([0.0, 2.0])
    yield Workload("wide", field, y0, t, 1e-3, rtol=1e-5, atol=1e-5, flops=flops)


WORKLOADS = {
    "spiral": spiral,
    "oscillators": oscillators,
    "lorenz": lorenz,
    "train": train,
    "long": long,
    "flow": flow,
    "wide": wide,
}
