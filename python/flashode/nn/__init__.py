"""Models made of ordinary differential equations, as Modules: blocks, flows, latent and stochastic ones, mechanics."""

from .block import ODEBlock
from .divergence import exact_divergence, hutchinson_divergence
from .fields import ConcatConv2d, ConcatLinear, ConcatSquashConv2d, ConcatSquashLinear, ConvField, MLPField
from .flow import CNF, GatedSum
from .mechanics import Hamiltonian, SecondOrder, Separable
from .resnet import ODENet, ResidualBlock, ResNet, RKNet
from .sde import NeuralSDE, sdeint

__all__ = [
    "CNF",
    "ConcatConv2d",
    "ConcatLinear",
    "ConcatSquashConv2d",
    "ConcatSquashLinear",
    "ConvField",
    "GatedSum",
    "Hamiltonian",
    "MLPField",
    "NeuralSDE",
    "ODEBlock",
    "ODENet",
    "RKNet",
    "ResNet",
    "ResidualBlock",
    "SecondOrder",
    "Separable",
    "exact_divergence",
    "hutchinson_divergence",
    "sdeint",
]
