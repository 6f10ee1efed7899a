"""The definition of correct: every method in plain PyTorch, for any device and dtype.

``csrc/torch/driver.cpp`` is the twin: the same functions in the same order. Nothing here is
clever; each line is a formula.
"""

from __future__ import annotations

import bisect
import math
import sys
from dataclasses import dataclass

import torch

from ..control import accept, clamp_step, first_guess, initial_step, next_step, predicted_step, remember
from ..errors import Status, StepFailure
from ..interp import weights_at
from ..problem import Problem
from ..solution import Landing, Outcome, rows_of
from ..transforms import is_batched, require_readable
from .clock import stage_time
from .element import combine, mean_square_norm, scaled_error, weighted_sum, wide
from .reference_events import solve_until_event
from .stages import Stages, Unsolved


def supports(problem: Problem) -> str | None:
    """Why this engine cannot serve a problem, or None."""
    return "SciPy's solvers have an engine of their own" if problem.method.family == "scipy" else None


def solve(problem: Problem, recording=None) -> Outcome:
    """Integrates through all output times, or until the event."""
    run = RUNS.get(problem.method.family, Run)(problem)
    run.recording = recording
    try:
        return solve_until_event(run) if problem.events else run.solve()
    except StepFailure as failure:
        return run.outcome(failure.status)


def replay(problem: Problem, shifts):
    """Takes accepted steps of a solve again: `Run.replay`. ``shifts`` are zeros that carry the
    gradients of the output times, or None."""
    run = RUNS.get(problem.method.family, Run)(problem)
    run.shifts, run.replaying = shifts, True
    return run.replay


# ---- what func is shown ----------------------------------------------------------------------


def version_of(y):
    """Equal before and after a call only where the call left ``y`` alone."""
    return object() if y.is_inference() else y._version  # inference tensors do not count


# ---- one solve -----------------------------------------------------------------------------


@dataclass
class Step:
    """An accepted step. ``shift0`` and ``shift1`` are zeros that carry the gradient of ``t0`` and
    ``t1``, or None."""

    t0: float
    t1: float
    dt: float
    y0: torch.Tensor
    y1: torch.Tensor
    k: list[torch.Tensor]
    shift0: torch.Tensor | None
    shift1: torch.Tensor | None


class Run:
    """The state of one solve."""

    def __init__(self, problem: Problem):
        self.p = problem
        self.c, self.a, self.b, self.b_err = problem.method.tableau.numbers
        rtol, atol = problem.rtol, problem.atol
        shape = problem.y0.shape
        self.rtol = rtol.reshape(shape) if isinstance(rtol, torch.Tensor) else rtol
        self.atol = atol.reshape(shape) if isinstance(atol, torch.Tensor) else atol
        self.rows, self.filled = [problem.y0], 1
        self.recording, self.replaying = None, False
        self.nfe = self.accepted = self.rejected = 0
        self.trials = 0  # steps tried since the last output
        self.past = (1.0, 1.0)  # error ratios of the last two accepted steps
        self.past_dt: float | None = None
        self.next_stop = 0
        self.accepted_times: list[float] = []
        # Where the solve stands.
        self.t0, self.y0 = problem.times[0], problem.y0
        self.dt = self.error_ratio = self.event_t = math.nan
        self.stages = None if problem.method.tableau.explicit else Stages(self)
        self.unsolved: float | None = None  # what Newton's method left in the last trial step, if it failed
        self.event_index = -1
        self.f0: torch.Tensor | None = None
        self.k: list[torch.Tensor] = []
        self.y1: torch.Tensor | None = None
        # x - x.detach() is zero and has the gradient of x, forwards as backwards.
        clock = problem.direction * problem.t.to("cpu", torch.float64)
        self.shifts = clock - clock.detach() if problem.differentiates_time else None
        self.shift0 = None if self.shifts is None else self.shifts[0]
        self.grid = None if problem.adaptive else problem.grid.tolist()
        self.grid_shifts: torch.Tensor | None = None

    def outcome(self, status: Status) -> Outcome:
        return Outcome(
            status, rows_of(self.rows, self.p), self.nfe, self.accepted, self.rejected, self.accepted_times,
            self.t0, self.dt, self.error_ratio, self.k, self.y1, self.event_t, self.event_index, self.unsolved,
        )  # fmt: skip

    def call(self, t, y, shift=None, nudge=0):
        """``func(t, y)``; ``nudge`` -1 and +1 take the last time before and the first after t."""
        p = self.p
        self.nfe += 1
        value = p.func(stage_time(p, t, shift, nudge), p.unflatten(y), *p.args)
        # A copy: func may return a buffer it reuses, or its own argument.
        return p.slope(value).clone()

    def error_norm(self, x):
        p = self.p
        require_readable(x, "step-size control")
        return p.norm_value(x) if p.norm else mean_square_norm(x, p.norm_offsets)

    def first_step(self, f0):
        """Hairer I, II.4: an Euler step of moderate length shows how fast the field changes."""
        p = self.p
        if p.first_step is not None:
            return p.first_step
        y0, f0 = self.y0.detach(), f0.detach()
        d0 = self.error_norm(scaled_error(wide(y0), y0, y0, self.rtol, self.atol))
        d1 = self.error_norm(scaled_error(wide(f0), y0, y0, self.rtol, self.atol))
        if not math.isfinite(d1):
            self.k, self.y1, self.error_ratio = [f0], y0, d1
            raise StepFailure(Status.NONFINITE_FIELD)
        h0 = first_guess(d0, d1)
        h0 = min(h0, p.end - self.t0)
        y1 = combine(y0, [f0], [p.direction * h0])
        f1 = self.call(self.t0 + h0, y1).detach()
        d2 = self.error_norm(scaled_error(wide(f1) - wide(f0), y0, y0, self.rtol, self.atol)) / h0
        return initial_step(h0, d1, d2, p.control.order)

    def in_tolerances(self, change):
        """The norm of a change of the state, relative to the tolerances."""
        y0 = self.y0.detach()
        return self.error_norm(scaled_error(change, y0, y0, self.rtol, self.atol))

    def stage_place(self, i, t1, dt, shift1):
        """The time of stage ``i``, its nudge, and the zero that carries its gradient."""
        p, c_i = self.p, self.c[i]
        at_end = c_i == 1
        shift_i = None if shift1 is None else self.shift0 + c_i * (shift1 - self.shift0)
        # parity: a stage at the end of the step sees the time just before it, so that a
        # field that jumps there is taken from the left.
        nudge = -1 if at_end and (p.adaptive or p.perturb) else 0
        return t1 if at_end else self.t0 + c_i * dt, nudge, shift_i

    def opening_slope(self):
        """The slope that a fixed step begins with, None where its method has no use for it."""
        if not self.p.method.tableau.begins_with_f0:
            return None
        return self.call(self.t0, self.y0.clone(), self.shift0, nudge=1 if self.p.perturb else 0)

    def rk_step(self, f0, t1, dt, shift1):
        """All stages from ``(t0, y0)`` to ``t1``; returns the slopes and the candidate ``y1``."""
        p = self.p
        if not p.method.tableau.explicit:
            return self.stages.step(f0, t1, dt, shift1)
        signed_dt = p.direction * dt
        if shift1 is not None:
            signed_dt = signed_dt + p.direction * (shift1 - self.shift0)
        fsal = p.method.tableau.fsal
        k, y1 = [f0], None
        for i in range(1, len(self.c)):
            coef = [a_ij * signed_dt for a_ij in self.a[i]]
            y_i = combine(self.y0, k, coef)
            version = version_of(y_i)
            t_i, nudge, shift_i = self.stage_place(i, t1, dt, shift1)
            k_i = self.call(t_i, y_i, shift_i, nudge)
            if fsal and i == len(self.c) - 1:
                y1 = y_i if version_of(y_i) == version else combine(self.y0, k, coef)
            k.append(k_i)
        if y1 is None:
            y1 = combine(self.y0, k, [b_j * signed_dt for b_j in self.b])
        return k, y1

    def landing(self, t1):
        """The end of the next step, moved back to the first stop it would reach or pass."""
        p = self.p
        stop, kind = math.inf, Landing.FREE
        while self.next_stop < len(p.stops) and p.stops[self.next_stop][0] <= self.t0:
            self.next_stop += 1
        if self.next_stop < len(p.stops):
            stop, is_jump = p.stops[self.next_stop]
            kind = Landing.JUMP if is_jump else Landing.STOP
        if p.end <= stop:
            stop, kind = p.end, Landing.END
        return (stop, kind) if t1 >= stop else (t1, Landing.FREE)

    def adaptive_step(self) -> Step:
        """Tries steps until one is accepted."""
        p = self.p
        on_step, on_accept, on_reject = p.callbacks
        while True:
            if self.trials >= p.max_num_steps:
                raise StepFailure(Status.MAX_STEPS)
            self.trials += 1
            self.dt = clamp_step(self.dt, p.control)
            t1, kind = self.landing(self.t0 + self.dt)
            if not t1 > self.t0 or self.dt < sys.float_info.min:
                raise StepFailure(Status.STEP_UNDERFLOW if self.unsolved is None else Status.NONCONVERGENCE)
            # A free step keeps its own length: t1 - t0 is rounded. No rounding lengthens a step,
            # or one of min_step would be refused, and one near the resolution of t never shrink.
            self.dt = dt = self.dt if kind == Landing.FREE else min(self.dt, t1 - self.t0)
            p.report(on_step, self.t0, self.y0, dt)
            shift1 = self.shift0
            if shift1 is not None and kind != Landing.FREE:
                shift1 = self.shifts[-1] if kind == Landing.END else torch.zeros_like(shift1)
            try:
                k, y1 = self.rk_step(self.f0, t1, dt, shift1)
            except Unsolved as failure:
                self.reject_unsolved(failure)
                continue
            self.k, self.y1, self.unsolved = k, y1, None
            error = weighted_sum(k, [p.direction * dt * e_j for e_j in self.b_err]).detach()
            ratio = scaled_error(error, self.y0.detach(), y1.detach(), self.rtol, self.atol)
            self.error_ratio = self.error_norm(ratio)
            self.dt = next_step(self.error_ratio, dt, p.control, self.past)
            if accept(self.error_ratio, dt, p.control):
                if p.control.predictive and self.past_dt is not None:
                    most = predicted_step(self.error_ratio, dt, p.control, self.past[0], self.past_dt)
                    self.dt = min(self.dt, most)
                self.past, self.past_dt = remember(self.error_ratio, p.control, self.past), dt
                p.report(on_accept, self.t0, self.y0, dt)
                step = self.commit(t1, dt, shift1, kind)
                self.f0 = self.handed_on(kind)
                return step
            self.rejected += 1
            p.report(on_reject, self.t0, self.y0, dt)
            if not math.isfinite(self.error_ratio):
                if not torch.isfinite(self.f0).all() or dt <= p.control.min_step:
                    raise StepFailure(Status.NONFINITE_FIELD)

    def stage_failure(self, failure: Unsolved) -> StepFailure:
        """The end of a solve whose stages could not be solved for."""
        self.error_ratio, self.unsolved = math.nan, failure.residual
        if failure.values is None:
            return StepFailure(Status.NONCONVERGENCE)
        self.k, self.y1 = [failure.values], self.y0
        return StepFailure(Status.NONFINITE_FIELD)

    def reject_unsolved(self, failure: Unsolved):
        """A step whose stages cannot be solved for is tried again with a quarter of its length."""
        p, dt = self.p, self.dt
        end = self.stage_failure(failure)
        if failure.values is not None:
            self.unsolved = None
        self.rejected += 1
        p.report(p.callbacks[2], self.t0, self.y0, dt)
        if dt <= p.control.min_step or not torch.isfinite(self.f0).all():
            raise end
        self.dt = dt / 4

    def fixed_step(self, t1, shift1) -> Step:
        """One step of a prescribed length."""
        p = self.p
        self.dt = t1 - self.t0
        p.report(p.callbacks[0], self.t0, self.y0, self.dt)
        try:
            self.k, self.y1 = self.rk_step(self.opening_slope(), t1, self.dt, shift1)
        except Unsolved as failure:
            raise self.stage_failure(failure) from None
        if self.is_seen_nonfinite(self.y1):
            self.error_ratio = math.nan
            raise StepFailure(Status.NONFINITE_FIELD)
        self.error_ratio = 0.0
        return self.commit(t1, self.dt, shift1, Landing.FREE)

    def commit(self, t1, dt, shift1, kind) -> Step:
        """Makes the candidate the state."""
        step = Step(self.t0, t1, dt, self.y0, self.y1, self.k, self.shift0, shift1)
        if self.recording is not None and self.recording.as_polynomials:
            self.recording.add(self.t0, t1, self.polynomial(step), self.shift0, shift1)
        elif self.recording is not None and self.recording.add(self.t0, t1, dt, kind):
            self.recording.hold(self.y0, self.k[0] if self.p.adaptive else None)
        self.t0, self.y0, self.shift0 = t1, self.y1, shift1
        self.accepted += 1
        self.accepted_times.append(t1)
        return step

    def handed_on(self, kind):
        """The slope that the next step begins with."""
        # parity: the last stage is the next step's f0, for every method.
        return (
            self.call(self.t0, self.y0.clone(), self.shift0, nudge=1) if kind == Landing.JUMP else self.k[-1]
        )

    def signed_dt(self, step: Step):
        """The length of the step on the caller's clock, with the gradient of its ends."""
        direction = self.p.direction
        if step.shift0 is None:
            return direction * step.dt
        return direction * step.dt + direction * (step.shift1 - step.shift0)

    def extended(self, step: Step):
        """The slopes of the step with those of the stages that dense output adds."""
        dense, k, signed_dt = self.p.dense, list(step.k), self.signed_dt(step)
        if len(k) == len(dense.weights):
            return k
        for c_i, a_i in zip(dense.extra_c, dense.extra_a):
            coef = [float(a_ij) * signed_dt for a_ij in a_i]
            t_i = step.t1 if c_i == 1 else step.t0 + float(c_i) * step.dt
            shift_i = None
            if step.shift0 is not None:
                shift_i = step.shift0 + float(c_i) * (step.shift1 - step.shift0)
            k.append(self.call(t_i, combine(step.y0, k, coef), shift_i))
        return k

    def polynomial(self, step: Step):
        """y over the step: its value at the start, and the coefficients of x, x^2, ..."""
        p = self.p
        step.k = self.extended(step)  # kept, because outputs in the step use them too
        coef = p.dense.matrix.T * self.signed_dt(step)
        rows = coef.tolist() if step.shift0 is None else coef
        coefficients = [weighted_sum(step.k, row).to(step.y0.dtype) for row in rows]
        # The extra stages were not seen by the error test.
        if p.dense.extra_c and self.is_seen_nonfinite(torch.stack(coefficients)):
            self.k = step.k
            raise StepFailure(Status.NONFINITE_FIELD)
        return torch.stack([step.y0, *coefficients])

    def is_seen_nonfinite(self, y):
        """Whether ``y`` is not finite, where that can be seen: a fixed-step solve on a GPU never waits
        for the device, and vmap lets nobody look."""
        return y.device.type == "cpu" and not is_batched(y) and not torch.isfinite(y).all()

    def interpolate(self, step: Step, times, shifts):
        """The solution at forward ``times`` inside a step, one row each."""
        dense, dt = self.p.dense, step.dt
        times = torch.tensor(times, dtype=torch.float64, device="cpu")
        x = (times - step.t0) / (step.t1 - step.t0)
        if step.shift0 is not None:
            # The same quotient, with the gradients of the three times in it.
            x = x + (shifts - step.shift0 - x * (step.shift1 - step.shift0)) / dt
        k = self.extended(step)
        coef = weights_at(dense, x) * self.signed_dt(step)
        rows = [combine(step.y0, k, row.tolist() if step.shift0 is None else row) for row in coef]
        # The extra stages were not seen by the error test.
        if not self.replaying and self.is_seen_nonfinite(torch.stack(rows)):
            self.k = k
            raise StepFailure(Status.NONFINITE_FIELD)
        return rows

    def emit(self, step: Step):
        """Appends every output that lies in the step: its end as computed, others in between."""
        p, begin = self.p, self.filled
        end = bisect.bisect_right(p.times, step.t1, lo=begin)
        if end == begin:
            return
        self.trials = 0
        at_end = p.times[end - 1] == step.t1
        if (
            at_end
            and step.shift0 is not None
            and not p.steps_on_times
            and (p.overshoot or end < len(p.times))
        ):
            # The value is y1; its gradient in this output time needs the slope there.
            at_end = False
        inner = end - 1 if at_end else end
        if inner > begin:
            shifts = None if self.shifts is None else self.shifts[begin:inner]
            self.rows += self.interpolate(step, p.times[begin:inner], shifts)
        if at_end:
            self.rows.append(step.y1)
        self.filled = end

    def start(self):
        """What a solve needs before its first step."""
        p = self.p
        if p.adaptive:
            self.f0 = self.call(self.t0, self.y0.clone(), self.shift0)
            self.dt = self.first_step(self.f0)
        elif p.differentiates_time:
            self.grid_shifts = p.grid - p.grid.detach()
            self.shift0 = self.grid_shifts[0]

    def advance(self) -> Step:
        """The next accepted step."""
        p, i = self.p, self.accepted + 1
        if p.adaptive:
            return self.adaptive_step()
        if i < len(self.grid):
            return self.fixed_step(self.grid[i], None if self.grid_shifts is None else self.grid_shifts[i])
        if i > p.max_num_steps:
            raise StepFailure(Status.MAX_STEPS)
        return self.fixed_step(self.t0 + p.control.max_step, self.shift0)

    def solve(self) -> Outcome:
        if len(self.p.times) > 1:
            self.start()
        while self.filled < len(self.p.times):
            self.emit(self.advance())
        return self.outcome(Status.SUCCESS)

    def replay(self, t0, t1, dt, kind, y0, f0, shift0, shift1):
        """An accepted step again, with its graph where gradients are recorded, and then its outputs too.

        ``f0`` is None where the step evaluates it itself; the shifts are None where time has no
        gradient. Returns the step's end, the slope it hands on (None for fixed steps), and its
        outputs in pieces, each with the row of its first.
        """
        p = self.p
        self.t0, self.y0, self.shift0 = t0, y0, shift0
        if f0 is None:
            f0 = self.opening_slope()
        self.k, self.y1 = self.rk_step(f0, t1, dt, shift1)
        step = self.commit(t1, dt, shift1, kind)
        f1 = self.handed_on(kind) if p.adaptive else None
        row = bisect.bisect_right(p.times, t0)
        self.rows, self.filled = [], row
        if torch.is_grad_enabled():
            self.emit(step)
        outputs = [(row, torch.stack(self.rows))] if self.rows else []
        # The graph is the caller's now.
        self.k, self.y0, self.y1, self.rows = [], None, None, []
        return step.y1, f1, outputs


# Runs with steps of their own, by family of methods; the modules that define them put them here.
RUNS: dict[str, type[Run]] = {}
