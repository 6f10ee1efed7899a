"""Vector fields of every kind that can be compiled, for `test_fields.py`: name to a function that makes one.

Each makes ``(func, y0)`` or ``(func, y0, args)``, in float64; states have five samples unless they are of
another layout.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

SAMPLES = 5


def state(*shape, scale=0.5):
    return scale * torch.randn(shape, dtype=torch.float64)


def net(*layers) -> nn.Module:
    return nn.Sequential(*layers).double()


class Closure:
    """A field around a function, with the tensors that it reads as attributes."""

    def __init__(self, function, **tensors):
        self.function = function
        vars(self).update(tensors)

    def __call__(self, t, y, *args):
        return self.function(self, t, y, *args)


# ---- activations, between two layers -------------------------------------------------------------

ACTIVATIONS = {
    "tanh": torch.tanh, "sigmoid": torch.sigmoid, "softplus": F.softplus, "relu": F.relu, "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu, "elu": F.elu, "selu": F.selu,
    "celu": lambda x: F.celu(x, 0.7), "leaky_relu": lambda x: F.leaky_relu(x, 0.1), "hardtanh": F.hardtanh,
    "relu6": F.relu6, "mish": F.mish, "softsign": F.softsign, "logsigmoid": F.logsigmoid,
    "tanhshrink": F.tanhshrink, "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid,
    "softplus_beta": lambda x: F.softplus(x, beta=2.0, threshold=3.0), "softmax": lambda x: F.softmax(x, -1),
    "log_softmax": lambda x: F.log_softmax(x, -1), "glu": lambda x: F.glu(torch.cat([x, x.flip(-1)], -1)),
    "threshold": lambda x: F.threshold(x, 0.1, -0.2), "softmin": lambda x: F.softmin(x, -1),
    "layer_norm": lambda x: F.layer_norm(x, (7,)), "normalize": lambda x: F.normalize(x, dim=-1),
}  # fmt: skip


def with_activation(function):
    def make():
        first, last = nn.Linear(3, 7).double(), nn.Linear(7, 3).double()
        return Closure(lambda s, t, y: s.last(function(s.first(y))), first=first, last=last), state(
            SAMPLES, 3
        )

    return make


# ---- functions of numbers ------------------------------------------------------------------------

FUNCTIONS = {
    "powers": lambda y: y**2 - y**3 + 0.1 * y**4 + (y**2 + 1) ** 0.5 + (y**2 + 1) ** -1.5 + 2.0**y,
    "exponentials": lambda y: torch.exp(-y) + torch.expm1(y) + torch.exp2(y) - torch.log1p(y * y),
    "logarithms": lambda y: torch.log(y * y + 1) + torch.log2(y * y + 2) + torch.log10(y * y + 3),
    "circular": lambda y: torch.sin(y) * torch.cos(y) + torch.tan(0.3 * y),
    "inverse_circular": lambda y: torch.asin(0.2 * torch.sin(y)) + torch.acos(0.2 * torch.cos(y)) + torch.atan(y),
    "hyperbolic": lambda y: torch.sinh(0.5 * y) - torch.cosh(0.5 * y) + torch.asinh(y) + torch.atanh(0.2 * torch.sin(y)),
    "error_function": lambda y: torch.erf(y) - torch.erfc(0.5 * y),
    "roots": lambda y: torch.sqrt(y * y + 1) - torch.rsqrt(y * y + 2) + torch.reciprocal(y * y + 1),
    "pieces": lambda y: torch.where(y > 0.1, y * y, -y) + torch.clamp(y, -0.3, 0.4) + y.clamp(min=-0.1) + y.abs(),
    "comparisons": lambda y: ((y > 0) & ~(y > 1)).to(y.dtype) - ((y <= -1) | (y >= 2)).double() + (y != 0) * y,
    "steps": lambda y: torch.sign(y) * 0.1 + torch.floor(3 * y) * 0.01 + torch.ceil(y) * 0.1 + torch.round(2 * y) * 0.1,
    "remainders": lambda y: torch.remainder(y, 0.7) + torch.fmod(y, 0.6) - torch.frac(y) + torch.remainder(y, -y.flip(-1))
    + 0.1 * torch.div(y, 0.3, rounding_mode="floor") + torch.fmod(y, math.inf),
    "logic": lambda y: (
        torch.where(torch.isinf(y) | ~torch.isfinite(y), 0.0, y) + y.amin(1, keepdim=True)
        + torch.logical_xor(y > 0, y > 0.2).double() + (y > 0.5).any(1, keepdim=True).double() * y
        + torch.rsub(y, 1.0) + torch.full_like(y, 0.1).fill_(0.2) * y
    ),
    "two_arguments": lambda y: torch.maximum(y, y.flip(-1)) + torch.minimum(y, -y) + torch.atan2(y, y * y + 1)
    + torch.hypot(y, y.flip(-1)) + torch.pow(y * y + 1, y) + torch.logaddexp(y, -y),
    "integer_powers": lambda y: torch.pow(y, 5) * 0.1 + torch.float_power(y * y + 1, 2).to(y.dtype) * 0.1,
    "fused": lambda y: torch.addcmul(y, y, y.flip(-1), value=0.5) - torch.lerp(y, y.flip(-1), 0.3) + torch.sinc(y),
}  # fmt: skip

# ---- shapes --------------------------------------------------------------------------------------


def rotation(t, y):
    return torch.stack([y[:, 1], -y[:, 0]], 1)


def attention(s, t, y):
    q, k, v = s.q(y), s.k(y), s.v(y)
    return F.softmax(q @ k.transpose(1, 2) / math.sqrt(3), -1) @ v - y


def scattered(s, t, y):
    z = torch.zeros_like(y)
    z[:, 0] = y[:, 1] * y[:, 2]
    z[:, 1:] += torch.sin(y[:, :2])
    return z[:, s.order] - y.index_select(1, s.order)


SHAPES = {
    "stack": lambda: (rotation, state(SAMPLES, 2)),
    "unbind": lambda: (lambda t, y: torch.stack([-b * a for a, b in zip(y.unbind(1), y.flip(1).unbind(1))], 1), state(SAMPLES, 3)),
    "split": lambda: (lambda t, y: torch.cat([part.sum(1, keepdim=True) * part for part in y.split([1, 3], 1)], 1), state(SAMPLES, 4)),
    "chunk": lambda: (lambda t, y: torch.cat([b := y.chunk(2, -1)[1], -y.chunk(2, -1)[0] * b], -1), state(SAMPLES, 4)),
    "roll": lambda: (lambda t, y: torch.roll(y, 1, -1) - 2 * y + torch.roll(y, -1, -1), state(SAMPLES, 8)),
    "reductions": lambda: (
        lambda t, y: (y.mean(1, keepdim=True) - y.var(1, keepdim=True) + y.amax(1, keepdim=True) + y.norm(dim=1, keepdim=True)) * y
        - y.std(1, keepdim=True) + y.prod(1, keepdim=True) + torch.logsumexp(y, 1, keepdim=True), state(SAMPLES, 4)),
    "cumsum": lambda: (lambda t, y: torch.cumsum(y, 1) - 2 * y, state(SAMPLES, 5)),
    "einsum": lambda: (Closure(lambda s, t, y: torch.einsum("bij,jk,bk->bi", y[:, :, None] * y[:, None], s.w, y), w=state(3, 3).requires_grad_()), state(SAMPLES, 3)),
    "bmm": lambda: (lambda t, y: torch.bmm(y, y.transpose(1, 2)) @ y - y, state(SAMPLES, 3, 2)),
    "attention": lambda: (Closure(attention, q=nn.Linear(3, 3).double(), k=nn.Linear(3, 3).double(), v=nn.Linear(3, 3).double()), state(SAMPLES, 4, 3)),
    "particles": lambda: (Closure(lambda s, t, y: s.net(y) - y.mean(1, keepdim=True), net=net(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 2))), state(SAMPLES, 6, 2)),
    "written_in_place": lambda: (Closure(scattered, order=torch.tensor([2, 0, 1])), state(SAMPLES, 3)),
    "heat": lambda: (lambda t, y: F.pad(y[:, 2:] - 2 * y[:, 1:-1] + y[:, :-2], (1, 1), value=0.01) * 10, state(SAMPLES, 40)),
    "triangle": lambda: (Closure(lambda s, t, y: y @ torch.tril(s.w) - y, w=state(4, 4).requires_grad_()), state(SAMPLES, 4)),
    "mask": lambda: (Closure(lambda s, t, y: torch.where(s.mask, -y, y * s.w), mask=torch.tensor([True, False, True]), w=state(3).requires_grad_()), state(SAMPLES, 3)),
    "weight_norm": lambda: (Closure(lambda s, t, y: s.layer(y), layer=nn.utils.parametrizations.weight_norm(nn.Linear(3, 3).double())), state(SAMPLES, 3)),
    "constants": lambda: (lambda t, y: y @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=y.dtype) + torch.linspace(0, 1, 2, dtype=y.dtype), state(SAMPLES, 2)),
    "image": lambda: (lambda t, y: y.permute(0, 2, 3, 1).flatten(1).cos().reshape(-1, 2, 3, 2) * y, state(SAMPLES, 2, 3, 2)),
}  # fmt: skip

# ---- time, constants of samples, layouts ------------------------------------------------------------


def concat_squash(s, t, y):
    for layer, gate, shift in zip(s.layers, s.gates, s.shifts):
        y = torch.tanh(layer(y) * torch.sigmoid(gate(t.view(1, 1))) + shift(t.view(1, 1)))
    return y


def squashed(*sizes):
    pairs = list(zip(sizes, sizes[1:]))
    return Closure(
        concat_squash, layers=[nn.Linear(a, b).double() for a, b in pairs],
        gates=[nn.Linear(1, b).double() for _, b in pairs],
        shifts=[nn.Linear(1, b, bias=False).double() for _, b in pairs],
    )  # fmt: skip


def hyper(s, t, y):
    weights = s.hyper(t.reshape(1, 1)).view(2, 3, 4)
    return torch.tanh(y @ weights[0]) @ weights[1].t()


TIMED = {
    "forced": lambda: (lambda t, y: torch.sin(3 * t) * y - t**2, state(SAMPLES, 2)),
    "time_joined": lambda: (Closure(lambda s, t, y: s.net(torch.cat([t.expand(len(y), 1), y], 1)), net=net(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3))), state(SAMPLES, 3)),
    "concat_squash": lambda: (squashed(3, 16, 16, 3), state(SAMPLES, 3)),
    "hyper": lambda: (Closure(hyper, hyper=net(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 24))), state(SAMPLES, 3)),
    "periodic": lambda: (Closure(lambda s, t, y: y * torch.cos(s.w * t).sum() - y, w=state(6).requires_grad_()), state(SAMPLES, 2)),
}  # fmt: skip

LAYOUTS = {
    "one_system": lambda: (lambda t, y: torch.stack([10 * (y[1] - y[0]), y[0] * (28 - y[2]) - y[1], y[0] * y[1] - 8 / 3 * y[2]]), state(3)),
    "columns": lambda: (Closure(lambda s, t, y: torch.stack([s.rate * (y[1] - y[0]), y[0] * (2 - y[2]) - y[1], y[0] * y[1] - y[2]]), rate=state(SAMPLES).requires_grad_()), state(3, SAMPLES)),
    "one_sample": lambda: (Closure(lambda s, t, y: s.net(y), net=net(nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, 3))), state(1, 3)),
    "mixed_samples": lambda: (lambda t, y: y.mean(0) - y, state(SAMPLES, 2)),
    "elements": lambda: (lambda t, y: torch.sin(y), state(SAMPLES)),
    "scalar": lambda: (lambda t, y: -y * torch.cos(t), state()),
    "own_rates": lambda: (Closure(lambda s, t, y: s.rate * y * s.shared - torch.exp(s.rate), rate=state(SAMPLES, 1).requires_grad_(), shared=state(2).requires_grad_()), state(SAMPLES, 2)),
    "condition": lambda: (Closure(lambda s, t, y: s.net(torch.cat([y, s.given], 1)), given=state(SAMPLES, 4).requires_grad_(), net=net(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))), state(SAMPLES, 2)),
    "square_weights": lambda: (Closure(lambda s, t, y: y @ s.w, w=state(SAMPLES, SAMPLES).requires_grad_()), state(SAMPLES, SAMPLES)),
    "arguments": lambda: (lambda t, y, rate, shift: rate * y - shift, state(SAMPLES, 2), (state(SAMPLES, 1).requires_grad_(), state(2).requires_grad_())),
    "tuple": lambda: (lambda t, y: (y[1], -torch.sin(y[0]) - y[1].sum(1, keepdim=True)), (state(SAMPLES, 2), state(SAMPLES, 2))),
    "tuple_of_shapes": lambda: (lambda t, y: (-y[0] * y[1][:, None, None], y[0].square().sum((1, 2))), (state(SAMPLES, 2, 3), state(SAMPLES))),
    "tuple_of_one": lambda: (lambda t, y: (y[1] * 2, -y[0].sum() * torch.ones_like(y[1])), (state(3), state(3))),
}  # fmt: skip

# ---- derivatives inside ------------------------------------------------------------------------------


def gradient_flow(s, t, y):
    with torch.enable_grad():
        y = y if y.requires_grad else y.detach().requires_grad_()
        energy = s.net(y).sum()
        return -torch.autograd.grad(energy, y, create_graph=True)[0]


def hamiltonian(s, t, y):
    with torch.enable_grad():
        y = y if y.requires_grad else y.detach().requires_grad_()
        g = torch.autograd.grad(s.net(y).sum(), y, create_graph=True)[0]
    return torch.cat([g[:, 2:], -g[:, :2]], 1)


def exact_trace(s, t, state):
    z, _ = state
    with torch.enable_grad():
        z = z if z.requires_grad else z.detach().requires_grad_()
        dz = s.field(t, z)
        trace = sum(
            torch.autograd.grad(dz[:, i].sum(), z, create_graph=True)[0][:, i] for i in range(z.shape[1])
        )
    return dz, -trace[:, None]


def estimated_trace(s, t, state):
    z, _ = state
    with torch.enable_grad():
        z = z if z.requires_grad else z.detach().requires_grad_()
        dz = s.field(t, z)
        product = torch.autograd.grad(dz, z, s.noise, create_graph=True)[0]
    return dz, -(product * s.noise).sum(1, keepdim=True)


INSIDE = {
    "gradient_flow": lambda: (Closure(gradient_flow, net=net(nn.Linear(3, 8), nn.Softplus(), nn.Linear(8, 1))), state(SAMPLES, 3)),
    "hamiltonian": lambda: (Closure(hamiltonian, net=net(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))), state(SAMPLES, 4)),
    "exact_trace": lambda: (Closure(exact_trace, field=squashed(2, 8, 8, 2)), (state(SAMPLES, 2), state(SAMPLES, 1))),
    "estimated_trace": lambda: (Closure(estimated_trace, field=squashed(2, 8, 2), noise=torch.sign(state(SAMPLES, 2))), (state(SAMPLES, 2), state(SAMPLES, 1))),
}  # fmt: skip

FIELDS = {
    **{name: with_activation(f) for name, f in ACTIVATIONS.items()},
    **{name: (lambda f=f: (lambda t, y: 0.3 * f(y), state(SAMPLES, 3))) for name, f in FUNCTIONS.items()},
    **SHAPES, **TIMED, **LAYOUTS, **INSIDE,
}  # fmt: skip
