"""The explicit fixed-step solvers, one class each."""

from flashode.methods import METHODS

from .rk_common import _increment
from .solvers import FixedGridODESolver


class _Explicit(FixedGridODESolver):
    method: str

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.order = METHODS[cls.method].order

    def _step_func(self, func, t0, dt, t1, y0):
        table = METHODS[self.method].tableau.numbers[:3]
        return _increment(func, t0, dt, t1, y0, None, self.perturb, *table)


class Euler(_Explicit):
    method = "euler"


class Midpoint(_Explicit):
    method = "midpoint"


class Heun2(_Explicit):
    method = "heun2"


class Heun3(_Explicit):
    method = "heun3"


class RK4(_Explicit):
    method = "rk4"
