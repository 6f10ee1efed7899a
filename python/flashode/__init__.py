"""flashode: ordinary differential equations for PyTorch, a drop-in for torchdiffeq."""

from .api import explain, odeint, solve
from .errors import ArgumentError, ArgumentTypeError, SolveError, Status
from .solution import Solution, Stats
