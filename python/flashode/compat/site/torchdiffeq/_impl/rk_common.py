"""Runge-Kutta steps from a tableau of tensors, and the base class of adaptive Runge-Kutta solvers."""

import collections
from dataclasses import replace
from fractions import Fraction

import torch

from flashode.engines.element import weighted_sum
from flashode.engines.reference import Run
from flashode.errors import StepFailure
from flashode.interp import weights_at
from flashode.methods import METHODS, Method
from flashode.options import MAX_NUM_STEPS
from flashode.problem import Problem
from flashode.solution import finish
from flashode.tableau import Tableau

from .event_handling import find_event
from .interp import _interp_evaluate, _interp_fit
from .misc import Perturb, _all_callback_names, _evaluate, _field_of, _rms_norm
from .solvers import AdaptiveStepsizeEventODESolver

# ``alpha`` are the nodes and ``beta`` the rows of the stages after the first.
_ButcherTableau = collections.namedtuple("_ButcherTableau", "alpha, beta, c_sol, c_error")

# ``t0`` to ``t1`` is the last step, ``y1`` and ``f1`` belong to its end, ``dt`` is what to try next.
_RungeKuttaState = collections.namedtuple("_RungeKuttaState", "y1, f1, t0, t1, dt, interp_coeff")


def _tensors(name) -> _ButcherTableau:
    """A method of flashode in torchdiffeq's form."""
    c, a, b, b_err = METHODS[name].tableau.numbers
    vector = [torch.tensor(x, dtype=torch.float64) for x in (c[1:], b, b_err)]
    return _ButcherTableau(
        vector[0], [torch.tensor(row, dtype=torch.float64) for row in a[1:]], vector[1], vector[2]
    )


def _middle(name) -> torch.Tensor:
    """The weights with which the slopes of a step give the state in its middle."""
    method = METHODS[name]
    return weights_at(method.dense_overshoot or method.dense, torch.tensor([0.5], dtype=torch.float64))[0]


# ---- one step --------------------------------------------------------------------------------


def _stages(func, t0, dt, t1, y0, f0, c, a, at_end):
    """The slopes of an explicit step; ``at_end`` is the side from which ``t1`` is seen."""
    k = [f0]
    for c_i, a_i in zip(c[1:], a[1:]):
        total = weighted_sum(k, [a_ij * dt for a_ij in a_i])
        y_i = y0 if total is None else y0 + total
        k.append(_evaluate(func, t1, y_i, at_end) if c_i == 1 else _evaluate(func, t0 + c_i * dt, y_i))
    return k


def _runge_kutta_step(func, y0, f0, t0, dt, t1, tableau):
    """One step of a `_ButcherTableau`: ``y1``, the last slope, the error estimate and all slopes, last."""
    t0, dt, t1 = (x.to(y0.dtype.to_real()) for x in (t0, dt, t1))
    c, a = [0.0, *tableau.alpha.tolist()], [[], *(row.tolist() for row in tableau.beta)]
    k = _stages(func, t0, dt, t1, y0, f0, c, a, Perturb.PREV)
    y1 = y0 + weighted_sum(k, [b_j * dt for b_j in tableau.c_sol.tolist()])
    y1_error = weighted_sum(k, [e_j * dt for e_j in tableau.c_error.tolist()])
    return y1, k[-1], y1_error, torch.stack(k, dim=-1)


def _increment(func, t0, dt, t1, y0, f0, perturb, c, a, b):
    """``y1 - y0`` of an explicit step, and the first slope."""
    if f0 is None:
        f0 = _evaluate(func, t0, y0, Perturb.NEXT if perturb else Perturb.NONE)
    k = _stages(func, t0, dt, t1, y0, f0, c, a, Perturb.PREV if perturb else Perturb.NONE)
    return weighted_sum(k, [b_j * dt for b_j in b]), f0


def rk4_step_func(func, t0, dt, t1, y0, f0=None, perturb=False):
    """Kutta's classical rule of order 4."""
    c, a, b = (0, 0.5, 0.5, 1), ((), (0.5,), (0, 0.5), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)
    return _increment(func, t0, dt, t1, y0, f0, perturb, c, a, b)[0]


def rk4_alt_step_func(func, t0, dt, t1, y0, f0=None, perturb=False):
    """Kutta's 3/8 rule, the method ``"rk4"``."""
    return _increment(func, t0, dt, t1, y0, f0, perturb, *METHODS["rk4"].tableau.numbers[:3])[0]


def rk3_step_func(func, t0, dt, t1, y0, butcher_tableu=None, f0=None, perturb=False):
    """One explicit step of rows ``[c_i, a_i1, …]`` and a last row ``[0, b_1, …]``."""
    *rows, (_, *b) = butcher_tableu
    c, a = [row[0] for row in rows], [row[1 : 1 + i] for i, row in enumerate(rows)]
    return _increment(func, t0, dt, t1, y0, f0, perturb, c, a, b)[0]


rk2_step_func = rk3_step_func


# ---- adaptive steps --------------------------------------------------------------------------


class _AsGiven(Tableau):
    """A table of a subclass, which may be rounded: nothing is checked."""

    def __post_init__(self):
        pass


_OPTIONS = (
    "min_step", "max_step", "first_step", "step_t", "jump_t", "safety", "ifactor", "dfactor", "max_num_steps", "norm",
)  # fmt: skip


def _exact(tensor):
    return tuple(Fraction(x) for x in tensor.tolist())


class RKAdaptiveStepsizeODESolver(AdaptiveStepsizeEventODESolver):
    """An adaptive explicit Runge-Kutta solver: a subclass gives ``order``, ``tableau`` and ``mid``.

    Steps are taken one by one by the reference engine, past the output times as torchdiffeq's are.
    ``rk_state`` is where the solve stands. A subclass may override `_before_integrate`, `_adaptive_step`,
    `_interp_fit`, `_advance`, or `integrate`. The formulas inside a step cannot be replaced.
    """

    order: int
    tableau: _ButcherTableau
    mid: torch.Tensor

    def __init__(
        self, func, y0, rtol, atol, min_step=0, max_step=float("inf"), first_step=None, step_t=None, jump_t=None,
        safety=0.9, ifactor=10.0, dfactor=0.2, max_num_steps=MAX_NUM_STEPS, dtype=torch.float64, norm=_rms_norm,
        **kwargs,
    ):  # fmt: skip
        super().__init__(dtype=torch.promote_types(dtype, y0.dtype.to_real()), y0=y0, norm=norm, **kwargs)
        self.func, self.step_t, self.jump_t = func, step_t, jump_t
        self.rtol, self.atol = rtol, atol
        self.min_step, self.max_step, self.first_step = float(min_step), float(max_step), first_step
        self.safety, self.ifactor, self.dfactor = float(safety), float(ifactor), float(dfactor)
        self.max_num_steps = int(max_num_steps)

    @classmethod
    def valid_callbacks(cls):
        return set(_all_callback_names)

    def _before_integrate(self, t):
        self._run = Run(self._problem(t))
        self._guarded(self._run.start)
        t0, dt = self._time(self._run.t0), self._time(self._run.dt, fixed=True)
        self.rk_state = _RungeKuttaState(self.y0, self._run.f0, t0, t0, dt, [self.y0] * 5)

    def _problem(self, t) -> Problem:
        c, b, b_err = (_exact(getattr(self.tableau, name)) for name in ("alpha", "c_sol", "c_error"))
        a = tuple(_exact(row) for row in self.tableau.beta)
        table = _AsGiven((Fraction(0), *c), ((), *a), b, b_err)
        options = {name: getattr(self, name) for name in _OPTIONS if getattr(self, name) is not None}
        # Checked as a call of any adaptive method is; then the subclass's own table takes its place.
        checked = Problem.from_call(
            _field_of(self.func),
            self.y0,
            t,
            self.rtol,
            self.atol,
            "dopri5",
            {**options, "overshoot": True},
            None,
        )
        method = Method(type(self).__name__, self.order, table, dense=None)
        return replace(checked, method=method, control=replace(checked.control, order=self.order))

    def _adaptive_step(self, rk_state):
        """The next accepted step from the end of the last one."""
        run = self._run
        run.t0, run.y0, run.f0, run.dt = rk_state.t1.item(), rk_state.y1, rk_state.f1, rk_state.dt.item()
        step = self._guarded(run.adaptive_step)
        interp_coeff = self._interp_fit(
            step.y0, step.y1, torch.stack(step.k, dim=-1), self._time(step.dt, True)
        )
        t0, t1, dt = self._time(step.t0), self._time(step.t1), self._time(run.dt, fixed=True)
        return _RungeKuttaState(step.y1, run.f0, t0, t1, dt, interp_coeff)

    def _interp_fit(self, y0, y1, k, dt):
        """The polynomial of a step, for `_interp_evaluate`; ``k`` has the slopes in its last dimension."""
        dt, mid = dt.to(y0.dtype), self.mid.to(y0)
        return _interp_fit(y0, y1, y0 + dt * (k * mid).sum(-1), k[..., 0], k[..., -1], dt)

    def _advance(self, next_t):
        self._run.trials = 0
        while next_t > self.rk_state.t1:
            self.rk_state = self._adaptive_step(self.rk_state)
        return self._state_at(next_t)

    def _state_at(self, t):
        return _interp_evaluate(self.rk_state.interp_coeff, self.rk_state.t0, self.rk_state.t1, t)

    def _advance_until_event(self, event_fn):
        sign0 = torch.sign(event_fn(self.rk_state.t1, self.rk_state.y1))
        if sign0 == 0:
            return self.rk_state.t1, self.rk_state.y1
        while torch.sign(event_fn(self.rk_state.t1, self.rk_state.y1)) == sign0:
            self.rk_state = self._adaptive_step(self.rk_state)
        t0, t1 = self.rk_state.t0, self.rk_state.t1
        return find_event(self._state_at, sign0, t0, t1, event_fn, self.atol)

    def _time(self, value, fixed=False):
        """A time of the run as a tensor; all but lengths move with ``t[0]``, and carry its gradient."""
        tensor = torch.tensor(value, dtype=self.dtype, device=self.y0.device)
        return tensor if fixed or self._run.shift0 is None else tensor + self._run.shift0.to(tensor)

    def _guarded(self, action):
        """Does one thing that may find no further step; that is then the caller's `SolveError`."""
        try:
            return action()
        except StepFailure as failure:
            outcome = self._run.outcome(failure.status)
        finish(self._run.p, outcome, "reference", throw=True)
