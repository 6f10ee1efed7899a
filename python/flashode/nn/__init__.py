"""Models made of ordinary differential equations, as Modules: blocks, flows, latent and stochastic ones, mechanics."""

from .block import ODEBlock
from .divergence import exact_divergence, hutchinson_divergence
from .fields import ConcatConv2d, ConcatLinear, ConcatSquashConv2d, ConcatSquashLinear, ConvField, MLPField
from .flow import CNF, GatedSum
from .latent import LatentODE, ODERNNEncoder, RNNEncoder, kl_annealing
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
    "LatentODE",
    "MLPField",
    "NeuralSDE",
    "ODEBlock",
    "ODENet",
    "ODERNNEncoder",
    "RKNet",
    "RNNEncoder",
    "ResNet",
    "ResidualBlock",
    "SecondOrder",
    "Separable",
    "exact_divergence",
    "hutchinson_divergence",
    "kl_annealing",
    "sdeint",
]
