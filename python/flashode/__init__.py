"""flashode: ordinary differential equations for PyTorch, a drop-in for torchdiffeq."""

from .api import explain, odeint, odeint_adjoint, solve
from .errors import ArgumentError, ArgumentTypeError, SolveError, Status
from .extension import build_config
from .solution import Solution, Stats

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "Solution",
    "SolveError",
    "Stats",
    "Status",
    "build_config",
    "explain",
    "odeint",
    "odeint_adjoint",
    "solve",
]
