"""The engine of method="scipy_solver": SciPy's solvers of initial value problems, driven step by step.

`scipy.integrate.solve_ivp` runs the same solvers in a loop that nothing bounds. SciPy works in float64 or
complex128, whatever the state's dtype; ``func`` is shown tensors of the state's own dtype and device.
"""

from __future__ import annotations

import bisect
import math
import warnings

import numpy as np
import torch

from ..errors import ArgumentError, GradientWarning, Status, StepFailure
from ..problem import Problem
from ..solution import Outcome, rows_of
from .clock import stage_time

# The degree of a solver's dense output, at most.
_DEGREE = {"RK23": 3, "RK45": 4, "DOP853": 7, "Radau": 3, "BDF": 5, "LSODA": 12}
_REAL_ONLY = ("Radau", "LSODA")
_ONE_RTOL = ("Radau", "BDF")

# Calls of func that one step may take, beside one for every element and Jacobian: rejected trials are a
# few dozen until the step is too short, but nothing in SciPy counts them.
_CALLS_A_STEP = 10_000


def supports(problem: Problem) -> str | None:
    """Why this engine cannot serve a problem, or None."""
    if problem.method.family != "scipy":
        return "it is for method='scipy_solver' alone"
    return None


def solve(problem: Problem, recording=None) -> Outcome:
    """Integrates through all output times."""
    run = Run(problem, recording)
    try:
        with torch.no_grad(), np.errstate(all="ignore"):  # what is not finite is looked for, and named
            run.solve()
        return run.outcome(Status.SUCCESS)
    except StepFailure as failure:
        return run.outcome(failure.status)


def solver_class(name: str):
    """One of SciPy's solvers."""
    try:
        from scipy import integrate
    except ImportError as error:
        raise ArgumentError(
            f"method='scipy_solver' needs SciPy, which cannot be imported ({error}): pip install scipy"
        ) from error
    return getattr(integrate, name)


class Run:
    """The state of one solve."""

    def __init__(self, problem: Problem, recording):
        p = self.p = problem
        self.recording = recording
        self.check()
        self.watches = torch.is_grad_enabled()  # for a gradient that will be missed
        if self.watches and (p.y0.requires_grad or p.t.requires_grad):
            self.warn("y0 or t requires")
        self.rows = [p.y0.detach()]
        self.trials = 0  # steps since the last output
        self.nfe = self.nfe_before = 0  # calls, and calls before the step
        self.accepted_times: list[float] = []
        # Where the solve stands.
        self.t, self.dt, self.y1, self.message = p.times[0], math.nan, p.y0.detach(), ""
        self.bad_slope: torch.Tensor | None = None  # that func returned in the step, not finite

    def check(self):
        """Refuses what SciPy would, in words of its own."""
        p = self.p
        if p.y0.is_complex() and p.solver in _REAL_ONLY and len(p.times) > 1:
            raise ArgumentError(
                f"options['solver'] = {p.solver!r} takes no complex states; take 'RK45', 'RK23', 'DOP853' or 'BDF'"
            )
        if isinstance(p.rtol, torch.Tensor) and p.solver in _ONE_RTOL:
            raise ArgumentError(
                f"options['solver'] = {p.solver!r} takes one rtol for all elements, got one for each; atol may differ"
            )

    def warn(self, what):
        warnings.warn(
            f"method='scipy_solver': {what} gradients, and SciPy's solvers carry none: the solution has no graph. "
            "Use odeint_adjoint, whose adjoint='backsolve' gives them, or torch.no_grad() where none are wanted",
            GradientWarning,
            stacklevel=2,
        )
        self.watches = False

    def outcome(self, status: Status) -> Outcome:
        return Outcome(
            status, rows_of(self.rows, self.p), self.nfe, len(self.accepted_times), 0, self.accepted_times, self.t, self.dt,
            k=[] if self.bad_slope is None else [self.bad_slope], y1=self.y1, message=self.message,
        )  # fmt: skip

    def call(self, t, y):
        """``func`` as SciPy calls it: an array in, a new array out."""
        p = self.p
        self.nfe += 1
        if self.nfe - self.nfe_before > _CALLS_A_STEP + 10 * len(y):
            raise StepFailure(Status.MAX_STEPS)
        try:
            with torch.set_grad_enabled(self.watches):
                value = p.func(stage_time(p, p.direction * t), p.unflatten(self.to_state(y)), *p.args)
                slope = p.slope(value)
        except Exception:
            self.bad_slope = None  # what ends the solve is the field's own error
            raise
        if self.watches and slope.requires_grad:
            self.warn("what func returned requires")
        self.watches = False
        if not torch.isfinite(slope).all():
            self.bad_slope = slope.detach()
            if self.nfe == 1:  # SciPy would look for the first step's length for ever
                raise StepFailure(Status.NONFINITE_FIELD)
        return to_array(slope)

    def to_state(self, y):
        """An array of SciPy's as a tensor like y0, which shares nothing with it."""
        return torch.tensor(y, device="cpu").reshape(self.p.y0.shape).to(self.p.y0.device, self.p.y0.dtype)

    def start(self):
        """The solver that is asked for, at the start."""
        p, options = self.p, {}
        begin, end = (p.direction * t for t in (p.times[0], p.times[-1]))
        if p.first_step is not None:
            options["first_step"] = min(p.first_step, abs(end - begin))
        if p.solver == "LSODA":
            options["min_step"] = p.control.min_step
        rtol, atol = (x.cpu().numpy() if isinstance(x, torch.Tensor) else x for x in (p.rtol, p.atol))
        return solver_class(p.solver)(
            self.call,
            begin,
            to_array(p.y0),
            end,
            rtol=rtol,
            atol=atol,
            max_step=p.control.max_step,
            **options,
        )

    def attempt(self, act):
        """The result of ``act``; SciPy's linear algebra refuses what is not finite."""
        try:
            return act()
        except ValueError:
            if self.bad_slope is None:
                raise
        raise StepFailure(Status.NONFINITE_FIELD)

    def solve(self):
        p = self.p
        if len(p.times) == 1:
            return
        solver = self.attempt(self.start)
        while len(self.rows) < len(p.times):
            if self.trials >= p.max_num_steps:
                raise StepFailure(Status.MAX_STEPS)
            self.trials += 1
            self.nfe_before = self.nfe
            self.message = self.attempt(solver.step) or ""
            if solver.status == "failed":
                self.dt = float(getattr(solver, "h_abs", self.dt))
                raise StepFailure(Status.STEP_UNDERFLOW)
            y0, self.dt, self.y1 = self.y1, float(solver.step_size), self.to_state(solver.y)
            if not np.isfinite(solver.y).all():  # LSODA goes on with them
                raise StepFailure(Status.NONFINITE_STATE)
            if self.dt == 0:  # LSODA goes on with that too
                self.message = "the steps have become shorter than the resolution of t"
                raise StepFailure(Status.STEP_UNDERFLOW)
            p.report(p.callbacks[1], self.t, y0, self.dt)
            self.emit(solver)
            t1 = p.direction * float(solver.t)
            if self.recording is not None:
                self.recording.add(self.t, t1, self.polynomial(solver.dense_output(), y0))
            self.t, self.bad_slope = t1, None
            self.accepted_times.append(self.t)

    def emit(self, solver):
        """Appends every output that lies in the step: its end as computed, others in between."""
        p, begin, t1 = self.p, len(self.rows), self.p.direction * solver.t
        end = bisect.bisect_right(p.times, t1, lo=begin)
        if end == begin:
            return
        self.trials = 0
        at_end = p.times[end - 1] == t1
        if inner := p.times[begin : end - 1 if at_end else end]:
            values = solver.dense_output()(p.direction * np.array(inner)).T
            if not np.isfinite(values).all():  # DOP853 makes further calls
                raise StepFailure(Status.NONFINITE_FIELD)
            self.rows += [self.to_state(value) for value in values]
        if at_end:
            self.rows.append(self.y1)

    def polynomial(self, dense, y0):
        """y over the step: its value at the start, and the coefficients of x, x^2, ..., all that SciPy's dense
        output can have, from its values at Chebyshev's points."""
        degree = _DEGREE[self.p.solver]
        x = (1 - np.cos(np.pi * np.arange(1, degree + 1) / degree)) / 2
        moved = dense(dense.t_old + x * (dense.t - dense.t_old)).T - to_array(y0)
        coefficients = np.linalg.solve(x[:, None] ** np.arange(1, degree + 1), moved)
        return torch.stack([y0, *(self.to_state(c) for c in coefficients)])


def to_array(x: torch.Tensor) -> np.ndarray:
    """A tensor as a flat array of double precision, which shares nothing with it."""
    dtype = torch.complex128 if x.is_complex() else torch.float64
    return x.detach().resolve_conj().resolve_neg().to("cpu", dtype, copy=True).reshape(-1).numpy()
