"""SciPy's solvers, which are served whole."""

from .solvers import _WholeSolver


class ScipyWrapperODESolver(_WholeSolver):
    method = "scipy_solver"

    def __init__(self, func, y0, rtol=1e-7, atol=1e-9, norm=None, **options):
        super().__init__(func, y0, rtol, atol, **options)  # SciPy has a norm of its own

    @classmethod
    def valid_callbacks(cls):
        return set()
