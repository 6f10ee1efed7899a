"""Problems with known solutions, time-dependent ones first; fields that count their calls."""

import io
import json
import math
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch

from flashode.methods import METHODS

# The methods that evaluate their stages one after the other; the other families have tests of their own.
EXPLICIT = {name: method for name, method in METHODS.items() if method.family == "explicit"}


class Counted:
    """A field that remembers how often, and at which times, it was called."""

    def __init__(self, f):
        self.f, self.times = f, []

    @property
    def nfe(self):
        return len(self.times)

    def __call__(self, t, y):
        self.times.append(float(t))
        return self.f(t, y)


def growth(t, y):
    """y' = y cos t, y = y0 exp(sin t - sin t0)."""
    return y * torch.cos(t)


def growth_solution(t):
    """From y(0) = 1."""
    return torch.exp(torch.sin(t))


def twisted(t, y):
    """y1' = 2 t y1 ln y2, y2' = -2 t y2 ln y1: nonlinear, coupled, and time matters."""
    a, b = y[..., 0], y[..., 1]
    return torch.stack([2 * t * a * torch.log(b), -2 * t * b * torch.log(a)], -1)


def twisted_solution(t):
    """From y(0) = (1, e)."""
    return torch.exp(torch.stack([torch.sin(t**2), torch.cos(t**2)], -1))


def twisted_start(**like):
    return torch.tensor([1.0, math.e], **like)


SPIRAL = [[-0.1, 2.0], [-2.0, -0.1]]


class Spiral(torch.nn.Module):
    """y' = y^3 A, as in torchdiffeq's demonstration."""

    def __init__(self, **like):
        super().__init__()
        self.A = torch.nn.Parameter(torch.tensor(SPIRAL, **like))

    def forward(self, t, y):
        return (y**3) @ self.A


class Net(torch.nn.Module):
    """A small network that depends on time."""

    def __init__(self, width=2, hidden=8, **like):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        shapes = [(width + 1, hidden), (hidden, width)]
        self.w = torch.nn.ParameterList(
            torch.nn.Parameter(torch.randn(s, generator=generator).to(**like) * 0.7) for s in shapes
        )

    def forward(self, t, y):
        column = t.expand(*y.shape[:-1], 1).to(y)
        return torch.tanh(torch.cat([y, column], -1) @ self.w[0]) @ self.w[1]


@dataclass
class Detest:
    """A problem of Hull, Enright, Fellen and Sedgwick (1972) with its value at the end."""

    name: str
    t: torch.Tensor
    y0: torch.Tensor
    y_end: torch.Tensor
    equations: list[str]

    def field(self):
        names = {"sin": torch.sin, "cos": torch.cos, "sqrt": torch.sqrt}
        f = eval("lambda t, y: [" + ", ".join(self.equations) + "]", names)
        return Counted(lambda t, y: torch.stack([torch.as_tensor(v, dtype=y.dtype) for v in f(t, y)]))


def detest():
    problems = json.loads((Path(__file__).parent / "data/detest.json").read_text())["problems"]
    return {
        p["name"]: Detest(
            p["name"],
            torch.tensor([p["t0"], p["t_end"]], dtype=torch.float64),
            torch.tensor(p["y0"], dtype=torch.float64),
            torch.tensor(p["y_end"], dtype=torch.float64),
            p["equations"],
        )
        for p in problems
    }


# ---- copies --------------------------------------------------------------------------------


def pickled(x):
    return pickle.loads(pickle.dumps(x))


def saved(x):
    """As torch saves and loads it."""
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


# ---- a ball thrown up ----------------------------------------------------------------------

G = 9.81


def f64(*values, **more):
    return torch.tensor(values, dtype=torch.float64, **more)


FORWARD, BACKWARD = f64(0, 1), f64(0, -1)
START = f64(2, 5)  # height and velocity of a ball thrown up


def fall(t, y):
    return torch.stack([y[1], torch.full_like(y[1], -G)])


def height(t, y):
    return y[0]


def landing(h, v, g=G):
    """When a ball of height h and velocity v is at height 0, and its velocity there."""
    root = (v * v + 2 * g * h) ** 0.5
    return (v + root) / g, -root
