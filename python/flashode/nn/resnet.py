"""Networks that classify images: of residual blocks, and of one ODE in their place."""

from __future__ import annotations

from torch import nn

from ..arguments import require_whole
from .block import ODEBlock
from .fields import ConvField, group_norm


class ResidualBlock(nn.Module):
    """``y + field(y)``, where ``field`` is a `ConvField` without time: a step of Euler's method, of length 1.

    Args:
        channels: of the image, which has shape (B, channels, H, W) before and after.
        norm, activation: as for `ConvField`.
    """

    def __init__(self, channels, norm="group", activation="relu"):
        super().__init__()
        self.field = ConvField(channels, norm, activation, time=False)

    def forward(self, y):
        return y + self.field(None, y)


class _Classifier(nn.Sequential):
    """Images (B, in_channels, H, W) to scores (B, classes): ``stem``, ``body`` and ``head``.

    The stem's two strided convolutions shrink an image to a quarter of its height and width; the head takes means
    over what is left of it.
    """

    def __init__(self, body, channels, in_channels, classes):
        super().__init__()
        require_whole("in_channels", in_channels)
        require_whole("classes", classes)
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, channels, 4, stride=2, padding=1),
            group_norm(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 4, stride=2, padding=1),
        )
        self.body = body
        self.head = nn.Sequential(
            group_norm(channels),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, classes),
        )


class ResNet(_Classifier):
    """A classifier of images whose body is a row of residual blocks (He et al. 2016).

    Args:
        blocks: how many; ``body`` is an `nn.Sequential` of them.
        channels: of the body; 64 gives 0.14 million parameters with one block, and 0.07 million for each further one.
        in_channels: of the images, 1 or 3 for most.
        classes: how many.
    """

    def __init__(self, blocks=6, *, channels=64, in_channels=1, classes=10):
        require_whole("blocks", blocks)
        body = nn.Sequential(*(ResidualBlock(channels) for _ in range(blocks)))
        super().__init__(body, channels, in_channels, classes)


class RKNet(_Classifier):
    """`ResNet` with an ODE in place of its blocks, solved in fixed steps; gradients go back through the steps.

    Args:
        steps: how many, from time 0 to 1; ``body`` is an `ODEBlock`.
        method: with fixed steps, of `flashode.odeint`; ``"euler"`` makes the steps residual blocks with shared weights.
        channels, in_channels, classes: as for `ResNet`.

    Raises:
        ArgumentError, ArgumentTypeError: ``steps`` or another size is no whole number above 0.
    """

    def __init__(self, steps=6, *, method="euler", channels=64, in_channels=1, classes=10):
        require_whole("steps", steps)
        body = ODEBlock(ConvField(channels), method=method, options={"step_size": 1 / steps})
        super().__init__(body, channels, in_channels, classes)


class ODENet(_Classifier):
    """`ResNet` with an ODE in place of its blocks, solved adaptively from time 0 to 1 (Chen et al. 2018, section 3).

    Args:
        method, rtol, atol, adjoint: as for `ODEBlock`, which ``body`` is. ``"backsolve"`` needs memory for one
            evaluation of the field, however many steps there are.
        channels, in_channels, classes: as for `ResNet`.
    """

    def __init__(
        self, *, method="dopri5", rtol=1e-3, atol=1e-3, adjoint="backsolve", channels=64, in_channels=1, classes=10
    ):  # fmt: skip
        body = ODEBlock(ConvField(channels), method=method, rtol=rtol, atol=atol, adjoint=adjoint)
        super().__init__(body, channels, in_channels, classes)
