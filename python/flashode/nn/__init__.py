"""Models made of ordinary differential equations, as Modules: blocks, flows, latent and stochastic ones, mechanics."""

from .divergence import exact_divergence, hutchinson_divergence
from .fields import ConcatLinear, ConcatSquashLinear, MLPField
from .flow import CNF, GatedSum

__all__ = [
    "CNF",
    "ConcatLinear",
    "ConcatSquashLinear",
    "GatedSum",
    "MLPField",
    "exact_divergence",
    "hutchinson_divergence",
]
