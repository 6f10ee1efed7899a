"""Adams methods, which are served whole: they have no step of one past only."""

from .solvers import _WholeSolver


def _dot_product(x, y):
    return sum(xi * yi for xi, yi in zip(x, y))


class AdamsBashforthMoulton(_WholeSolver):
    method = "implicit_adams"


class AdamsBashforth(_WholeSolver):
    method = "explicit_adams"
