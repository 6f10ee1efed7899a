"""Fields of neural ODEs: layers that know the time, multilayer perceptrons, and convolutions of images."""

from __future__ import annotations

import math

import torch
from torch import nn

from .. import ArgumentError, ArgumentTypeError
from ..arguments import kind_of, require_whole

_ACTIVATIONS = {
    "elu": nn.functional.elu,
    "gelu": nn.functional.gelu,
    "leaky_relu": nn.functional.leaky_relu,
    "relu": nn.functional.relu,
    "sigmoid": torch.sigmoid,
    "silu": nn.functional.silu,
    "softplus": nn.functional.softplus,
    "tanh": torch.tanh,
}


class ConcatLinear(nn.Linear):
    """A linear layer ``layer(t, x)`` that sees the time as one more feature, the last one.

    Args:
        in_features, out_features, bias: as for `torch.nn.Linear`, the time not counted.

    The time is a 0-d Tensor, or one that broadcasts against all but the last axis of x, as under
    ``options={"batched": True}``; x has shape (..., in_features).
    """

    def __init__(self, in_features, out_features, bias=True):
        require_whole("in_features", in_features)
        require_whole("out_features", out_features)
        super().__init__(in_features + 1, out_features, bias)

    def forward(self, t, x):
        return super().forward(torch.cat([x, t.expand_as(x[..., :1])], -1))


class ConcatConv2d(nn.Conv2d):
    """A convolution ``layer(t, x)`` that sees the time as one more channel, constant over the image and the last one.

    Args:
        in_channels, out_channels, kernel_size, options: as for `torch.nn.Conv2d`, the time's channel not counted.

    The time is a 0-d Tensor, or one of shape (B, 1, 1, 1); x has shape (B, in_channels, H, W).
    """

    def __init__(self, in_channels, out_channels, kernel_size, **options):
        require_whole("in_channels", in_channels)
        require_whole("out_channels", out_channels)
        super().__init__(in_channels + 1, out_channels, kernel_size, **options)

    def forward(self, t, x):
        return super().forward(torch.cat([x, t.expand_as(x[:, :1])], 1))


class ConcatSquashLinear(nn.Module):
    """A linear layer ``layer(t, x)`` whose outputs are gated and shifted by the time.

    ``(W x + b) * sigmoid(a t + c) + d t``, with vectors a, c, d: Grathwohl et al. 2019, FFJORD, appendix.

    Args:
        in_features, out_features: sizes of the last axis of x and of the result.
    """

    def __init__(self, in_features, out_features):
        super().__init__()
        require_whole("in_features", in_features)
        require_whole("out_features", out_features)
        self.linear = nn.Linear(in_features, out_features)
        self.gate = nn.Linear(1, out_features)
        self.shift = nn.Linear(1, out_features, bias=False)

    def forward(self, t, x):
        t = t if t.ndim else t[None]
        return self.linear(x) * torch.sigmoid(self.gate(t)) + self.shift(t)


class ConcatSquashConv2d(nn.Module):
    """A convolution ``layer(t, x)`` with channels gated and shifted by the time, as in `ConcatSquashLinear`.

    Args:
        in_channels, out_channels, kernel_size, options: as for `torch.nn.Conv2d`.
    """

    def __init__(self, in_channels, out_channels, kernel_size, **options):
        super().__init__()
        require_whole("in_channels", in_channels)
        require_whole("out_channels", out_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, **options)
        self.gate = nn.Linear(1, out_channels)
        self.shift = nn.Linear(1, out_channels, bias=False)

    def forward(self, t, x):
        t = t.reshape(-1, 1)  # one row, or one for every image
        return self.conv(x) * torch.sigmoid(self.gate(t))[..., None, None] + self.shift(t)[..., None, None]


_LINEAR = {"concat": ConcatLinear, "squash": ConcatSquashLinear, None: nn.Linear}


class MLPField(nn.Module):
    """A multilayer perceptron R^dim -> R^dim over the last axis of the state.

    Args:
        dim: features of the state.
        hidden: widths of the hidden layers; ``()`` makes the field linear in the state.
        activation: between the layers: ``"tanh"`` or another name, a Module, or a callable of a Tensor. A smooth one
            suits adaptive methods, which take small steps where slopes have kinks.
        time: how every layer sees the time: ``"concat"``, by `ConcatLinear`; ``"squash"``, by `ConcatSquashLinear`;
            None, not at all.

    Raises:
        ArgumentError, ArgumentTypeError: an argument cannot be used, as where there is no such activation.
    """

    def __init__(self, dim, hidden=(64, 64), activation="tanh", time="concat"):
        super().__init__()
        require_whole("dim", dim)
        if not isinstance(hidden, (tuple, list)):
            raise ArgumentTypeError(f"hidden must be a tuple of widths, got {kind_of(hidden)}")
        for i, width in enumerate(hidden):
            require_whole(f"hidden[{i}]", width)
        if not (time is None or isinstance(time, str)) or time not in _LINEAR:
            raise ArgumentError(f"time must be 'concat', 'squash' or None, got {time!r}")
        self.dim = dim
        widths = (dim, *hidden, dim)
        self.layers = nn.ModuleList(_LINEAR[time](m, n) for m, n in zip(widths, widths[1:]))
        self.activation = _activation(activation)
        self.time = time

    def forward(self, t, y):
        for i, layer in enumerate(self.layers):
            y = self.activation(y) if i else y
            y = layer(y) if self.time is None else layer(t, y)
        return y


class ConvField(nn.Module):
    """What a residual block adds to its input: norm, activation, convolution, and these three once more.

    The pre-activation order of He et al. 2016 (Identity mappings in deep residual networks), with the time as one
    more channel of both convolutions as in Chen et al. 2018. Batch norm has no place in a field: its statistics would
    be those of all times that a solver happens to ask for.

    Args:
        channels: of the image, which has shape (B, channels, H, W) before and after.
        norm: ``"group"``, with up to 32 groups, or None.
        activation: as for `MLPField`.
        time: whether the convolutions see the time.

    Raises:
        ArgumentError, ArgumentTypeError: an argument cannot be used.
    """

    def __init__(self, channels, norm="group", activation="relu", time=True):
        super().__init__()
        require_whole("channels", channels)
        if norm not in ("group", None):
            raise ArgumentError(f"norm must be 'group' or None, got {norm!r}")
        layer = ConcatConv2d if time else nn.Conv2d
        self.norms = nn.ModuleList(group_norm(channels) if norm else nn.Identity() for _ in range(2))
        self.convs = nn.ModuleList(layer(channels, channels, 3, padding=1) for _ in range(2))
        self.activation = _activation(activation)
        self.time = time

    def forward(self, t, y):
        for norm, conv in zip(self.norms, self.convs):
            y = self.activation(norm(y))
            y = conv(t, y) if self.time else conv(y)
        return y


def group_norm(channels):
    """Group normalization with as many groups, up to 32, as share out the channels evenly."""
    return nn.GroupNorm(math.gcd(32, channels), channels)


def _activation(activation):
    if isinstance(activation, type):
        raise ArgumentTypeError(f"activation is the class {activation.__name__}; give an instance of it")
    if callable(activation):
        return activation
    if not isinstance(activation, str):
        raise ArgumentTypeError(f"activation must be a name or a callable, got {type(activation).__name__}")
    if activation not in _ACTIVATIONS:
        raise ArgumentError(
            f"activation must be a callable or one of {', '.join(_ACTIVATIONS)}, got {activation!r}"
        )
    return _ACTIVATIONS[activation]
