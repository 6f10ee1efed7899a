"""The definition of correct for batches whose samples are solved on their own, in plain PyTorch.

``csrc/torch/batched.cpp`` is the twin: the same functions in the same order. All samples try a step at
the same time, each its own: ``func`` is called with the whole batch, and what is not moving rests at its
last accepted state. What a sample gets never depends on its batch mates, to the last bit: operations on
the state go element by element, sums are folded in an order of their own, and control is that of
`control`, one sample at a time.
"""

from __future__ import annotations

import math
import sys

import torch

from ..batched import BatchOutcome, BatchProblem, with_mates
from ..control import ELEMENTARY, accept, clamp_step, first_guess, initial_step, next_step, remember
from ..errors import Status
from .element import scaled_error, weighted_sum, wide
from .reference import version_of

RUNNING = -1  # in place of a Status

# Tensors with one entry, or row, a sample.
_OF_SAMPLES = (
    "sample", "direction", "low", "high", "t0", "t1", "size", "dt", "error_ratio", "filled", "accepted",
    "rejected", "trials", "status", "cause", "y0", "f0", "resting", "times", "shifts", "shift0", "shift1",
    "rtol", "atol",
)  # fmt: skip


def supports(problem: BatchProblem) -> str | None:
    """Why this engine cannot serve a problem: there is no such reason."""
    return None


def solve(problem: BatchProblem, f0=None) -> BatchOutcome:
    """Integrates every sample through its output times; ``f0`` is the first slope where it is known."""
    return Run(problem).solve(f0)


def stage_time(p: BatchProblem, t, low, high, nudge=0):
    """The times that func sees, rounded once and kept inside the intervals; on the forward clocks."""
    x = t.to(p.time_dtype)
    if nudge:
        x = torch.nextafter(x, torch.full_like(x, nudge * math.inf))
    return torch.minimum(torch.maximum(x, low.to(x)), high.to(x))


def sum_of_rows(x):
    """The sum of every row: the second half is added to the first until one column is left."""
    while x.shape[1] > 1:
        half = (x.shape[1] + 1) // 2
        x = torch.cat([x[:, : x.shape[1] - half] + x[:, half:], x[:, x.shape[1] - half : half]], 1)
    return x[:, 0]


def weights_at(dense, x):
    """``w_j(x)`` for every stage ``j`` at positions ``x``, by Horner's rule element by element."""
    weights = []
    for coefficients in dense.weights:
        w = torch.zeros_like(x)
        for coefficient in reversed(coefficients):
            w = (w + float(coefficient)) * x
        weights.append(w)
    return weights


class Run:
    """The state of one solve. Times, sizes of steps and counts are on the CPU, one entry a sample."""

    def __init__(self, problem: BatchProblem):
        self.p = p = problem
        self.c, self.a, self.b, self.b_err = p.method.tableau.numbers
        samples = p.samples
        self.sample = torch.arange(samples)  # its number in the caller's batch
        self.direction, self.times = p.direction, p.times
        self.low, self.high = p.time_bounds
        self.t0 = p.times[:, 0].clone()
        # The trial step runs from t0 to t1 and has this size; dt is what is to be tried next.
        self.t1, self.size, self.dt, self.error_ratio = (torch.full_like(self.t0, math.nan) for _ in range(4))
        self.filled = (p.times == p.times[:, :1]).sum(1)
        self.accepted, self.rejected, self.trials = (
            torch.zeros(samples, dtype=torch.int64) for _ in range(3)
        )
        self.status = torch.full((samples,), RUNNING)
        self.status[self.filled == p.times.shape[1]] = Status.SUCCESS
        self.status[~p.usable] = Status.NONFINITE_STATE
        self.cause = torch.full((samples,), Status.STEP_UNDERFLOW.value)  # why no step can be taken
        self.past = [(1.0, 1.0)] * samples  # error ratios of the last two accepted steps
        self.rtol, self.atol = (
            p.rows(x.reshape(p.y0.shape)) if isinstance(x, torch.Tensor) else x for x in (p.rtol, p.atol)
        )
        self.y0 = p.rows(p.y0)
        self.pieces = [(torch.zeros(samples, dtype=torch.int64), self.sample, self.y0)]
        self.replace_unfit(p.usable)
        self.f0, self.layout = None, p
        self.shifts = self.shift0 = self.shift1 = None
        if p.differentiates_time:
            # t - t.detach() is zero and has the gradient of t.
            t = p.t.to("cpu", torch.float64)
            self.shifts = (t - t.detach()).expand(samples, -1) * p.direction[:, None]
            self.shift0 = self.shifts[:, 0]
        self.nfe, self.finished = 0, []

    # ---- the layout of a batch

    def spread(self, x):
        """One entry a sample as a column on the state's device."""
        return x.to(self.p.y0.device)[:, None]

    @property
    def running(self):
        return self.status == RUNNING

    def combine(self, y0, k, coef):
        """``y0 + sum_j coef_j k_j`` with a coefficient for every row, or zero."""
        dtype = wide(y0).dtype.to_real()
        total = weighted_sum(k, [c if isinstance(c, float) else self.spread(c).to(dtype) for c in coef])
        return (wide(y0) + total).to(y0.dtype)

    def replace_unfit(self, fit):
        """Lets the field see a mate in place of a sample that meets NaN where it starts, which would reach
        the gradients of whatever the samples share. ``resting`` is what it sees of those that do not move."""
        self.y0 = with_mates(self.y0, fit)
        self.resting = self.y0.detach()

    def step_lengths(self):
        """Signed lengths of the steps, with the gradients of their ends."""
        length = self.direction * self.size
        return length if self.shift0 is None else length + self.direction * (self.shift1 - self.shift0)

    # ---- the solve

    def outcome(self) -> BatchOutcome:
        p = self.p
        self.set_aside(torch.ones_like(self.running))
        fields = {name: torch.cat([part[name] for part in self.finished]) for name in self.finished[0]}
        order = torch.argsort(fields.pop("sample"))
        rows, samples, values = (torch.cat(parts) for parts in zip(*self.pieces))
        where = rows.to(values.device), samples.to(values.device)
        ys = torch.full((p.times.shape[1], p.samples, self.y0.shape[1]), math.nan).to(values)
        ys = p.flat(ys.index_put(where, values))
        return BatchOutcome(ys=ys, nfe=self.nfe, **{name: x[order] for name, x in fields.items()})

    def call(self, t, y, moving, shift=None, nudge=0):
        """``func(t, y)`` where samples move; the others rest."""
        p, layout = self.p, self.layout
        time = stage_time(p, torch.where(moving, t, self.t0), self.low, self.high, nudge)
        time = self.direction.to(time) * time
        if shift is not None:
            time = time + (self.direction * shift).to(time)
        self.nfe += 1
        time = time.reshape(layout.time_shape).to(p.y0.device)
        value = p.func(time, layout.unflatten(layout.flat(y)), *p.args)
        # A copy: func may return a buffer it reuses, or its own argument.
        return layout.rows(layout.slope(value)).clone()

    def error_norms(self, x):
        """Of each sample the largest root mean square over its members, summed in float64."""
        squares, columns = x.abs().double().square(), self.p.columns
        norms = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for begin, end in zip(columns, columns[1:]):
            if end > begin:  # maximum keeps NaN
                norms = norms.maximum((sum_of_rows(squares[:, begin:end]) / (end - begin)).sqrt())
        return norms.cpu()

    def causes(self, k, y1):
        """Why errors are not finite: a Status for every sample."""
        finite_k = torch.stack([torch.isfinite(k_j).all(1) for k_j in k]).all(0)
        of_state = torch.where(
            torch.isfinite(y1).all(1), Status.NONFINITE_ERROR.value, Status.NONFINITE_STATE.value
        )
        return torch.where(finite_k, of_state, Status.NONFINITE_FIELD.value).cpu()

    def first_step(self):
        """Hairer I, II.4: an Euler step of moderate length shows how fast the field changes."""
        p, control, y0, f0 = self.p, self.p.control, self.y0.detach(), self.f0.detach()
        if p.first_step is not None:
            self.dt[self.running] = p.first_step
            return
        d0 = self.error_norms(scaled_error(wide(y0), y0, y0, self.rtol, self.atol))
        d1 = self.error_norms(scaled_error(wide(f0), y0, y0, self.rtol, self.atol))
        lost = self.running & ~torch.isfinite(d1)
        self.error_ratio = torch.where(self.running, d1, self.error_ratio)
        self.status = torch.where(lost, self.causes([f0], y0), self.status)
        moving, h0 = self.running, torch.zeros_like(self.t0)
        if not moving.any():
            return
        for b in moving.nonzero().reshape(-1).tolist():
            h0[b] = min(first_guess(d0[b].item(), d1[b].item()), (self.times[b, -1] - self.t0[b]).item())
        y1 = torch.where(self.spread(moving), self.combine(y0, [f0], [self.direction * h0]), self.resting)
        f1 = self.call(self.t0 + h0, y1, moving).detach()
        d2 = self.error_norms(scaled_error(wide(f1) - wide(f0), y0, y0, self.rtol, self.atol)) / h0
        for b in moving.nonzero().reshape(-1).tolist():
            self.dt[b] = initial_step(h0[b].item(), d1[b].item(), d2[b].item(), control.order)

    def begin_trials(self):
        """The ends of the next steps, moved back to the last times; samples that can take none are done."""
        p, running = self.p, self.running
        spent = running & (self.trials >= p.max_num_steps)
        self.status[spent] = Status.MAX_STEPS
        running = running & ~spent
        self.trials += running
        dt, last = self.dt, self.times[:, -1]
        t1 = self.t0 + dt
        lands = t1 >= last
        t1 = torch.where(lands, last, t1)
        stuck = running & (~(t1 > self.t0) | (dt < sys.float_info.min))
        self.status = torch.where(stuck, self.cause, self.status)
        # A free step keeps its own length: t1 - t0 is rounded, and no rounding lengthens a step.
        dt = torch.where(lands, torch.minimum(dt, t1 - self.t0), dt)
        self.dt, self.t1 = (torch.where(running, x, y) for x, y in ((dt, self.dt), (t1, self.t1)))
        self.size = self.dt.clone()
        if self.shifts is not None:
            self.shift1 = torch.where(lands, self.shifts[:, -1], self.shift0)

    def rk_step(self, moving):
        """All stages from ``(t0, y0)`` to ``t1``; returns the slopes and the candidates ``y1``."""
        length, mask = torch.where(moving, self.step_lengths(), 0.0), self.spread(moving)
        fsal = self.p.method.tableau.fsal
        k, y1 = [self.f0], None

        def stage(row):
            y_i = self.combine(self.y0, k, [w * length if w else 0.0 for w in row])
            return torch.where(mask, y_i, self.resting)

        for i in range(1, len(self.c)):
            c_i = self.c[i]
            at_end = c_i == 1
            t_i = self.t1 if at_end else self.t0 + c_i * self.size
            shift_i = None
            if self.shift0 is not None:
                shift_i = torch.where(moving, self.shift0 + c_i * (self.shift1 - self.shift0), self.shift0)
            y_i = stage(self.a[i])
            version = version_of(y_i)
            # parity: a stage at the end of the step sees the time just before it.
            k_i = self.call(t_i, y_i, moving, shift_i, -1 if at_end else 0)
            if fsal and i == len(self.c) - 1:
                y1 = y_i if version_of(y_i) == version else stage(self.a[i])
            k.append(k_i)
        return k, stage(self.b) if y1 is None else y1

    def judge(self, k, y1):
        """Whether each trial stands, and how long the next one is; fails samples that cannot go on."""
        control, running = self.p.control, self.running
        length, dtype = self.direction * self.size, wide(y1).dtype.to_real()
        error = weighted_sum(
            k, [self.spread(e * length).to(dtype) if e else 0.0 for e in self.b_err]
        ).detach()
        ratio = scaled_error(error, self.y0.detach(), y1.detach(), self.rtol, self.atol)
        ratios, dt, accepted = self.error_norms(ratio), self.dt.tolist(), [False] * len(running)
        for b, (runs, norm, size) in enumerate(zip(running.tolist(), ratios.tolist(), self.size.tolist())):
            if not runs:
                continue
            dt[b] = next_step(norm, size, control, self.past[b])
            accepted[b] = accept(norm, size, control)
            if accepted[b] and control.betas != ELEMENTARY:
                self.past[b] = remember(norm, control, self.past[b])
        self.error_ratio = torch.where(running, ratios, self.error_ratio)
        self.dt, accepted = torch.tensor(dt, dtype=torch.float64), torch.tensor(accepted, dtype=torch.bool)
        self.rejected += running & ~accepted
        refused = running & ~torch.isfinite(self.error_ratio)
        self.cause[running] = Status.STEP_UNDERFLOW
        if refused.any():
            self.cause = torch.where(refused, self.causes(k, y1), self.cause)
            lost = ~torch.isfinite(self.f0).all(1).cpu() | (self.size <= control.min_step)
            self.status = torch.where(refused & lost, self.cause, self.status)
        return accepted, refused

    def extend(self, k, emitting):
        """The slopes of the steps with those of the stages that dense output adds."""
        dense, k, length = self.p.dense, list(k), self.step_lengths()
        for c_i, a_i in zip(dense.extra_c, dense.extra_a):
            t_i = self.t1 if c_i == 1 else self.t0 + float(c_i) * self.size
            shift_i = None
            if self.shift0 is not None:
                shift_i = self.shift0 + float(c_i) * (self.shift1 - self.shift0)
                shift_i = torch.where(emitting, shift_i, self.shift0)
            y_i = self.combine(self.y0, k, [float(a) * length if a else 0.0 for a in a_i])
            k.append(self.call(t_i, torch.where(self.spread(emitting), y_i, self.resting), emitting, shift_i))
        return k

    def emit(self, k, y1, accepted):
        """Every output that lies in an accepted step: ends as computed, others in between."""
        p = self.p
        count = ((self.times <= self.t1[:, None]).sum(1) - self.filled) * accepted
        row = torch.repeat_interleave(torch.arange(len(count)), count)
        output = torch.arange(len(row)) - (count.cumsum(0) - count)[row] + self.filled[row]
        self.trials[count > 0] = 0
        self.filled += count
        at_end = self.times[row, output] == self.t1[row]
        if self.shifts is not None:
            # The values are y1; their gradients in the output times need the slope there.
            at_end &= output == self.times.shape[1] - 1
        self.write(output[at_end], row[at_end], y1)
        row, output = row[~at_end], output[~at_end]
        if len(row) == 0:
            return
        if p.dense.extra_c:
            emitting = torch.zeros_like(accepted)
            emitting[row] = True
            k = self.extend(k, emitting)
        x = (self.times[row, output] - self.t0[row]) / (self.t1 - self.t0)[row]
        length = self.step_lengths()[row]
        if self.shifts is not None:
            stretch = (self.shift1 - self.shift0)[row]
            x = x + (self.shifts[row, output] - self.shift0[row] - x * stretch) / self.size[row]
        coef, device = [w * length for w in weights_at(p.dense, x)], self.y0.device
        values = self.combine(self.y0[row.to(device)], [k_j[row.to(device)] for k_j in k], coef)
        if p.dense.extra_c:  # their stages were not seen by the error test
            lost = ~torch.isfinite(values).all(1).cpu()
            self.status[row[lost]] = Status.NONFINITE_FIELD
            self.filled.scatter_reduce_(0, row[lost], output[lost], "amin")
        self.write(output, row, values, gathered=True)

    def write(self, output, row, values, gathered=False):
        self.pieces.append((output, self.sample[row], values if gathered else values[row.to(values.device)]))

    def commit(self, k, y1, accepted):
        """Makes the candidates of accepted steps the states."""
        mask = self.spread(accepted)
        self.y0 = torch.where(mask, y1, self.y0)
        # parity: the last stage is the next step's f0, for every method.
        self.f0 = torch.where(mask, k[-1], self.f0)
        self.resting = self.y0.detach()
        self.t0 = torch.where(accepted, self.t1, self.t0)
        if self.shift0 is not None:
            self.shift0 = torch.where(accepted, self.shift1, self.shift0)
        self.accepted += accepted
        self.status[self.running & (self.t0 == self.times[:, -1])] = Status.SUCCESS

    def set_aside(self, rows):
        """Keeps what is to be known of samples that leave the batch."""
        t = {"t": self.t0, "dt": self.dt}
        names = ("sample", "status", "accepted", "rejected", "filled", "error_ratio")
        kept = t | {name: getattr(self, name) for name in names}
        self.finished.append({name: x[rows] for name, x in kept.items()})

    def compact(self):
        """Drops finished samples once they are half of those that func is called with."""
        running = self.running
        if not self.p.compact or 2 * int(running.sum()) > len(running):
            return
        self.set_aside(~running)
        for name in _OF_SAMPLES:
            x = getattr(self, name)
            if isinstance(x, torch.Tensor):
                setattr(self, name, x[running.to(x.device)])
        self.layout = self.p.of_samples(len(self.sample))
        self.past = [past for past, stays in zip(self.past, running.tolist()) if stays]

    def start(self, f0):
        """The first slopes and the sizes of the first steps; what starts where slopes are not finite fails."""
        self.f0 = self.call(self.t0, self.y0.clone(), self.running, self.shift0) if f0 is None else f0
        self.nfe = max(self.nfe, 1)
        fit = torch.isfinite(self.f0).all(1).cpu()
        if self.f0.requires_grad and not fit.all():
            self.status[self.running & ~fit] = Status.NONFINITE_FIELD
            self.replace_unfit(fit)
            self.f0 = self.call(self.t0, self.y0.clone(), self.running, self.shift0)
        self.first_step()

    def repeat_start(self):
        """The outputs at the first times, where those repeat."""
        count = self.filled - 1
        row = torch.repeat_interleave(self.sample, count)
        if len(row) == 0:
            return
        output = torch.arange(len(row)) - (count.cumsum(0) - count)[row] + 1
        values = self.p.rows(self.p.y0)[row.to(self.y0.device)]
        if self.shifts is not None:
            after = self.direction[row] * (self.shifts[row, output] - self.shift0[row])
            values = self.combine(values, [self.f0[row.to(values.device)]], [after])
        self.write(output, row, values, gathered=True)

    def solve(self, f0=None) -> BatchOutcome:
        if self.running.any() or (self.shifts is not None and (self.filled > 1).any()):
            self.start(f0)
        self.repeat_start()
        self.dt = torch.tensor(
            [clamp_step(dt, self.p.control) for dt in self.dt.tolist()], dtype=torch.float64
        )
        self.begin_trials()
        while self.running.any():
            self.compact()
            k, y1 = self.rk_step(self.running)
            moving = self.running
            accepted, refused = self.judge(k, y1)
            if y1.requires_grad and refused.any():
                # A trial that met NaN must leave the graph: it would pass NaN to whatever samples share.
                k, y1 = self.rk_step(moving & ~refused)
            self.emit(k, y1, accepted)
            self.commit(k, y1, accepted)
            self.begin_trials()
        return self.outcome()
