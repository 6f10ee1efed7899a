"""Models made of ordinary differential equations, as Modules: blocks, flows, latent and stochastic ones, mechanics."""

from .mechanics import Hamiltonian, SecondOrder, Separable

__all__ = ["Hamiltonian", "SecondOrder", "Separable"]
