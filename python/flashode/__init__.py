"""flashode: ordinary differential equations for PyTorch, a drop-in for torchdiffeq."""

from . import compat
from .api import explain, odeint, odeint_adjoint, odeint_dense, odeint_event, solve
from .batched import BatchSolution
from .dense import DenseOutput
from .errors import ArgumentError, ArgumentTypeError, CompileError, GradientWarning, SolveError, Status
from .events import Event
from .extension import build_config
from .gradient_check import GradientReport, GradientRow, check_gradients
from .program import CompiledField, compile
from .solution import Solution, Stats

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "BatchSolution",
    "CompileError",
    "CompiledField",
    "DenseOutput",
    "Event",
    "GradientReport",
    "GradientRow",
    "GradientWarning",
    "Solution",
    "SolveError",
    "Stats",
    "Status",
    "build_config",
    "check_gradients",
    "compat",
    "compile",
    "explain",
    "odeint",
    "odeint_adjoint",
    "odeint_dense",
    "odeint_event",
    "solve",
]
