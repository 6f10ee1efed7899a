"""The private modules, as far as public code imports them."""

from .adjoint import odeint_adjoint
from .odeint import odeint, odeint_dense, odeint_event

__all__ = ["odeint", "odeint_adjoint", "odeint_dense", "odeint_event"]
