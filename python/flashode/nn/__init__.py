"""Models made of ordinary differential equations, as Modules: blocks, flows, latent and stochastic ones, mechanics."""

from .mechanics import Hamiltonian, SecondOrder, Separable
from .sde import NeuralSDE, sdeint

__all__ = ["Hamiltonian", "NeuralSDE", "SecondOrder", "Separable", "sdeint"]
