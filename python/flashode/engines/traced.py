"""Fixed steps on the times themselves, as operations that torch.compile and torch.export record.

A graph has no values to look at: not the times, which need not even be ordered, nor whether the state
is finite. What shapes, dtypes and devices tell is checked as always. Steps and stages are unrolled, by
the formulas of ``engines/reference.py``.
"""

from __future__ import annotations

import itertools
import math

import torch

from .. import arguments
from ..control import Controller
from ..methods import METHODS
from ..options import flag
from ..problem import Problem
from .element import combine

# Read here: torch.compile does not trace cached properties.
_NUMBERS = {
    name: method.tableau.numbers[:3] for name, method in METHODS.items() if method.family == "explicit"
}


def serves(func, method, options, event_fn, engine) -> bool:
    """Whether a call of `odeint` needs no values; if not, it is for an engine, which says what is wrong
    with it, if anything is."""
    chosen = METHODS.get(method) if isinstance(method, str) else None
    return (
        chosen is not None
        and chosen.family == "explicit"
        and not chosen.adaptive
        and event_fn is None
        and engine in ("auto", "reference")
        and set(options or {}) <= {"interp", "perturb"}
        and (options or {}).get("interp", "linear") in ("linear", "cubic")
        and all(getattr(func, name, None) is None for name in arguments.CALLBACKS)
    )


def odeint(func, y0, t, method, options, args):
    """`api.odeint` of a call that `serves`."""
    arguments.require_tuple(args)
    y0, shapes, dtypes = arguments.flat_state(y0)
    arguments.check_times(t, "t")
    chosen = METHODS[method]
    problem = Problem(
        func=func, y0=y0, shapes=shapes, dtypes=dtypes, t=t, times=[], direction=1.0, method=chosen,
        dense=chosen.dense, control=Controller(chosen.order), rtol=0.0, atol=0.0,
        perturb=flag(options or {}, "perturb"), args=args,
    )  # fmt: skip
    return problem.unflatten(solve(problem), batch=1)


def solve(p: Problem) -> torch.Tensor:
    """The state at all times; the clock is the caller's own, in float64."""
    clock = p.t.to(p.y0.device, torch.float64)
    rows, bounds = [p.y0], _time_bounds(p, clock)
    for t0, t1 in itertools.pairwise(clock.unbind()):
        rows.append(_step(p, t0, t1, rows[-1], bounds))
    return torch.stack(rows)


def _step(p: Problem, t0, t1, y0, bounds):
    """`reference.Run.fixed_step` and `rk_step`."""
    c, a, b = _NUMBERS[p.method.name]
    dt, k = t1 - t0, []
    for i in range(len(c)):
        at_end = c[i] == 1
        t_i = t0 if i == 0 else t1 if at_end else t0 + c[i] * dt
        nudge = 0 if not p.perturb else 1 if i == 0 else -1 if at_end else 0
        t_i = _seen_time(p, t_i, nudge, dt, bounds)
        y_i = combine(y0, k, [a_ij and a_ij * dt for a_ij in a[i]])
        k.append(p.slope(p.func(t_i, p.unflatten(y_i), *p.args)).clone())
    return combine(y0, k, [b_j and b_j * dt for b_j in b])


def _time_bounds(p: Problem, clock):
    """Least and greatest time that func may see, or None where rounding cannot leave the interval."""
    dtype = p.y0.real.dtype  # of time; dtype.to_real() cannot be traced
    if torch.promote_types(p.t.dtype, dtype) == dtype:
        return None
    ends = clock[0].detach(), clock[-1].detach()
    low, high = torch.minimum(*ends), torch.maximum(*ends)
    return _round_up(low, dtype), -_round_up(-high, dtype)


def _round_up(x, dtype):
    rounded = x.to(dtype)
    return torch.where(rounded >= x, rounded, torch.nextafter(rounded, torch.full_like(rounded, math.inf)))


def _seen_time(p: Problem, t, nudge, dt, bounds):
    """`clock.stage_time`."""
    dtype = p.y0.real.dtype
    if not nudge and bounds is None:
        return t.to(dtype)
    x = t.detach().to(dtype)
    if nudge:
        x = torch.nextafter(x, torch.copysign(torch.full_like(x, math.inf), nudge * dt.detach()))
    if bounds is not None:
        low, high = bounds
        x = torch.where(low <= high, torch.minimum(torch.maximum(x, low), high), x)
    return x + (t - t.detach()).to(dtype)  # a zero that carries the gradient
