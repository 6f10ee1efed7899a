"""SciPy's solvers, which are served whole."""

from .solvers import _WholeSolver


class ScipyWrapperODESolver(_WholeSolver):
    method = "scipy_solver"
