"""Models made of ordinary differential equations, as Modules: blocks, flows, latent and stochastic ones, mechanics."""

from .block import ODEBlock
from .fields import ConcatConv2d, ConcatLinear, ConcatSquashConv2d, ConcatSquashLinear, ConvField, MLPField
from .resnet import ODENet, ResidualBlock, ResNet, RKNet

__all__ = [
    "ConcatConv2d",
    "ConcatLinear",
    "ConcatSquashConv2d",
    "ConcatSquashLinear",
    "ConvField",
    "MLPField",
    "ODEBlock",
    "ODENet",
    "RKNet",
    "ResNet",
    "ResidualBlock",
]
