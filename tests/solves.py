"""One solve in every mode of gradients, for tests of what may be at work around it."""

import pytest
import torch
from problems import Net

import flashode

F64 = torch.float64
T = torch.tensor([0.2, 0.5, 1.1], dtype=F64)
MODES = ["direct", "checkpoint", "backsolve", "interpolated"]
# Fixed and adaptive steps, and every backward pass that serves them.
SOLVES = [(method, mode) for method in ("rk4", "dopri5") for mode in MODES if (method, mode) != ("rk4", "interpolated")]  # fmt: skip
each_solve = pytest.mark.parametrize("method, mode", SOLVES)


def run(func, y0, t=T, mode="direct", method="dopri5", **call):
    call = dict(method=method) | (dict(rtol=1e-6, atol=1e-8) if method == "dopri5" else {}) | call
    if mode == "direct":
        return flashode.odeint(func, y0, t, **call)
    return flashode.odeint_adjoint(func, y0, t, adjoint=mode, **call)


def derivatives(ys, inputs, seed=0):
    """The gradients of a random combination of the outputs."""
    ys = ys if isinstance(ys, tuple) else (ys,)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(y.shape, dtype=F64, generator=generator).to(y) for y in ys]
    return torch.autograd.grad(ys, inputs, weights)


def same(ours, theirs, **close):
    torch.testing.assert_close(ours, theirs, **(close or dict(rtol=1e-12, atol=1e-12)))


class Block(torch.nn.Module):
    """A model that solves in its forward pass."""

    def __init__(self, mode="direct", **call):
        super().__init__()
        self.net, self.mode, self.call = Net(dtype=F64), mode, call

    def forward(self, y0, t=T):
        return run(self.net, y0, t, self.mode, **self.call)[-1]
