"""The public functions and `SOLVERS`, the table that programs list, extend and take solvers from."""

import flashode
from flashode.methods import METHODS

from .adaptive_heun import AdaptiveHeunSolver
from .bosh3 import Bosh3Solver
from .dopri5 import Dopri5Solver
from .dopri8 import Dopri8Solver
from .fehlberg2 import Fehlberg2
from .fixed_adams import AdamsBashforth, AdamsBashforthMoulton
from .fixed_grid import RK4, Euler, Heun2, Heun3, Midpoint
from .misc import _check_inputs, _flat_to_shape
from .scipy_wrapper import ScipyWrapperODESolver
from .solvers import _WholeSolver
from .tsit5 import Tsit5Solver

_CLASSES = {
    "dopri8": Dopri8Solver,
    "dopri5": Dopri5Solver,
    "tsit5": Tsit5Solver,
    "bosh3": Bosh3Solver,
    "fehlberg2": Fehlberg2,
    "adaptive_heun": AdaptiveHeunSolver,
    "euler": Euler,
    "midpoint": Midpoint,
    "heun2": Heun2,
    "heun3": Heun3,
    "rk4": RK4,
    "explicit_adams": AdamsBashforth,
    "implicit_adams": AdamsBashforthMoulton,
    "fixed_adams": AdamsBashforthMoulton,
    "scipy_solver": ScipyWrapperODESolver,
}
SOLVERS = {name: solver for name, solver in _CLASSES.items() if name in METHODS}
# Programs go through the table with states of their own: what takes pairs alone is left out.
_OTHERS = [name for name, m in METHODS.items() if name not in SOLVERS and m.family != "symplectic"]
SOLVERS |= {name: type(name, (_WholeSolver,), {"method": name}) for name in _OTHERS}

# What a program may replace in a class of ours, to change or to watch its solves.
_HOOKS = ("__init__", "integrate", "integrate_until_event", "_before_integrate", "_step_func", "_adaptive_step",
          "_advance", "_advance_until_event", "_interp_fit", "tableau", "mid", "order")  # fmt: skip


def _hooks(solver):
    return [getattr(solver, name, None) for name in _HOOKS]


_OURS = {name: (solver, _hooks(solver)) for name, solver in SOLVERS.items()}


def _is_ours(method) -> bool:
    """Whether flashode serves a call: not where the program put a solver of its own into `SOLVERS`, or
    replaced a part of one of ours. What is unknown here gets flashode's error."""
    name = "dopri5" if method is None else method
    if not isinstance(name, str) or name not in SOLVERS:
        return True
    solver, hooks = _OURS.get(name, (None, None))
    return SOLVERS[name] is solver and all(a is b for a, b in zip(_hooks(solver), hooks))


def odeint(func, y0, t, *, rtol=1e-7, atol=1e-9, method=None, options=None, event_fn=None):
    """`flashode.odeint`; a method that the program registered in `SOLVERS` is taken from there."""
    if _is_ours(method):
        return flashode.odeint(
            func, y0, t, rtol=rtol, atol=atol, method=method, options=options, event_fn=event_fn
        )
    shapes, func, y0, t, rtol, atol, method, options, event_fn, reverse = _check_inputs(
        func, y0, t, rtol, atol, method, options, event_fn, SOLVERS
    )
    solver = SOLVERS[method](func=func, y0=y0, rtol=rtol, atol=atol, **options)
    if event_fn is None:
        solution = solver.integrate(t)
    else:
        event_t, solution = solver.integrate_until_event(t[0], event_fn)
        event_t = -event_t.to(t) if reverse else event_t.to(t)
    if shapes is not None:
        solution = _flat_to_shape(solution, (len(t),), shapes)
    return solution if event_fn is None else (event_t, solution)


def odeint_dense(func, y0, t0, t1, *, rtol=1e-7, atol=1e-9, method=None, options=None):
    """`flashode.odeint_dense`."""
    return flashode.odeint_dense(func, y0, t0, t1, rtol=rtol, atol=atol, method=method, options=options)


def odeint_event(func, y0, t0, *, event_fn, reverse_time=False, odeint_interface=odeint, **kwargs):
    """`flashode.odeint_event`."""
    return flashode.odeint_event(
        func,
        y0,
        t0,
        event_fn=event_fn,
        reverse_time=reverse_time,
        odeint_interface=odeint_interface,
        **kwargs,
    )
