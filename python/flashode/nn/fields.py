"""Vector fields made of layers that are told the time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .. import ArgumentError

ACTIVATIONS = {
    "tanh": nn.Tanh, "relu": nn.ReLU, "softplus": nn.Softplus, "silu": nn.SiLU, "elu": nn.ELU, "gelu": nn.GELU,
}  # fmt: skip
TIMES = ("concat", "squash", None)


class ConcatLinear(nn.Linear):
    """A linear layer with the time as one more feature: ``linear([x, t])``, called as ``layer(t, x)``."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features + 1, out_features)

    def forward(self, t, x):
        return super().forward(torch.cat([x, t.expand(*x.shape[:-1], 1)], -1))


class ConcatSquashLinear(nn.Module):
    """A linear layer, gated and shifted by the time: ``linear(x) * sigmoid(gate(t)) + bias(t)``.

    Called as ``layer(t, x)``. Grathwohl et al. 2019, FFJORD, arXiv:1810.01367.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)
        self.gate = nn.Linear(1, out_features)
        self.bias = nn.Linear(1, out_features, bias=False)

    def forward(self, t, x):
        t = t.reshape(-1, 1) if t.ndim == 0 else t
        return self.linear(x) * torch.sigmoid(self.gate(t)) + self.bias(t)


class MLPField(nn.Module):
    """A multilayer perceptron as a field on R^dim, over the last axis.

    Args:
        dim: size of the last axis of the state, and of the slope.
        hidden: widths of the hidden layers.
        activation: between layers: a name, a Module, or a callable.
        time: how layers are told the time: ``"concat"`` (`ConcatLinear`), ``"squash"`` (`ConcatSquashLinear`), or
            None for an autonomous field.
    """

    def __init__(
        self, dim: int, hidden=(64, 64), activation: str | Callable = "tanh", time: str | None = "concat"
    ):
        super().__init__()
        if time not in TIMES:
            raise ArgumentError(f'time must be "concat", "squash" or None, got {time!r}')
        if isinstance(activation, str) and activation not in ACTIVATIONS:
            raise ArgumentError(
                f"activation must be one of {sorted(ACTIVATIONS)} or a callable, got {activation!r}"
            )
        self.dim, self.time = dim, time
        self.activation = ACTIVATIONS[activation]() if isinstance(activation, str) else activation
        layer = {"concat": ConcatLinear, "squash": ConcatSquashLinear, None: nn.Linear}[time]
        sizes = [dim, *hidden, dim]
        self.layers = nn.ModuleList(layer(a, b) for a, b in zip(sizes, sizes[1:]))

    def forward(self, t, y):
        for i, layer in enumerate(self.layers):
            y = self.activation(y) if i else y
            y = layer(y) if self.time is None else layer(t, y)
        return y
