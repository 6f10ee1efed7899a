"""Models made of ordinary differential equations, as Modules: blocks, flows, latent and stochastic ones, mechanics."""

from .latent import LatentODE, ODERNNEncoder, RNNEncoder, kl_annealing

__all__ = [
    "LatentODE",
    "ODERNNEncoder",
    "RNNEncoder",
    "kl_annealing",
]
