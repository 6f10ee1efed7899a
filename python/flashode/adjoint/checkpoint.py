"""The discrete adjoint: every accepted step is taken again with its graph, last first, and pulled back.

The gradients are those of direct mode, which keeps the graphs of all steps. Here states are kept, and
the graph of one step at a time.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field, replace

import torch

from ..engines import ENGINES
from ..problem import Problem
from ..solution import Landing
from .schedule import reversal, thinned
from .spec import Record


@dataclass
class Recording:
    """The accepted steps of a solve: numbers of all of them, and the states that some began with.

    Attributes:
        engine: that took them.
        adaptive: steps begin with the slope that the one before hands on.
        limit: states that may be held; None for all.
        steps: ``(t0, t1, dt, landing)`` of each.
        stride: the states of steps 0, stride, 2 * stride, ... are held.
        held: ``(y0, f0)`` by step, but for step 0, which begins with the first output; f0 is None
            where the step evaluates it itself.
    """

    engine: str
    adaptive: bool
    limit: int | None
    steps: list[tuple[float, float, float, Landing]] = field(default_factory=list)
    stride: int = 1
    held: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=dict)
    event_t: float = math.nan

    def add(self, t0, t1, dt, landing, y0, f0):
        """Called by an engine for every step it accepts."""
        number = len(self.steps)
        self.steps.append((t0, t1, dt, landing))
        if number == 0 or number % self.stride:
            return
        if len(self.held) + 1 == self.limit:
            # How many steps are to come is not known: make room by holding every other state.
            self.stride *= 2
            self.held = {step: state for step, state in self.held.items() if step % self.stride == 0}
        if number % self.stride == 0:
            self.held[number] = _value(y0), (_value(f0) if self.adaptive else None)


def _value(x: torch.Tensor) -> torch.Tensor:
    """Without the gradient that the field may have asked for; else the very tensor, whose reference
    count tells the engine not to write into it."""
    return x.detach() if x.requires_grad else x


def gradients(record: Record, grad_ys: torch.Tensor, needs_time: bool):
    """To the state, to the times (None unless asked for), to the parameters, and to the grid of fixed
    steps (None unless asked for)."""
    recording: Recording = record.steps
    # The states are let go one by one, which saved tensors could not be. A second pass through a graph
    # that was retained finds none, and recomputes them.
    held, recording.held = recording.held, {}
    states = {0: (record.ys[0], None), **held}
    del held
    sweep = _Sweep(record, grad_ys, needs_time)
    steps = len(recording.steps)
    slots = recording.limit or max(1, steps)
    kept = thinned(steps, slots, list(states))
    for step in set(states) - set(kept):
        del states[step]
    for start, stop, reverse in reversal(steps, slots, kept):
        state = states.pop(start) if start == stop else sweep.advance(states[start], start, stop)
        if reverse:
            sweep.reverse(state, stop)
        else:
            states[stop] = state
    return sweep.results()


class _Sweep:
    """The way back through the steps, and the gradients gathered on it."""

    def __init__(self, record: Record, grad_ys, needs_time: bool):
        self.problem, self.grad_ys, self.params = record.problem, grad_ys, record.params
        self.recording: Recording = record.steps
        # Cotangents of the state between two steps, and of the slope that one hands to the next.
        self.adj_y = self.adj_f = None
        self.later_y: torch.Tensor | None = None  # the state that the step just reversed began with
        self.shifts = self.points = None
        if needs_time:
            # Zeros that carry the gradients of the output times, and of the ends of the steps.
            self.shifts = self.points = torch.zeros(len(record.t), dtype=torch.float64).requires_grad_()
            if not self.problem.adaptive:
                self.points = torch.zeros_like(self.problem.grid).requires_grad_()
            self.moved_by = _moved_by(self.problem, self.recording.steps)
        self.inputs = [*self.params, *([self.shifts, self.points] if needs_time else [])]
        self.totals = [torch.zeros_like(x) for x in self.inputs]
        self.take_step = ENGINES[self.recording.engine].replay(_with_outputs(record), self.shifts)

    def advance(self, state, start: int, stop: int):
        """The state that step ``stop`` begins with, from that of step ``start``."""
        for number in range(start, stop):
            y1, f1, _ = self.take_step(*self.recording.steps[number], *state, None, None)
            state = y1, (f1 if self.recording.adaptive else None)
        return state

    def reverse(self, state, number: int):
        """Pulls the cotangents back through one step."""
        y0, f0 = (None if x is None else x.detach().requires_grad_() for x in state)
        with torch.enable_grad():
            ends = self.shift(number), self.shift(number + 1)
            y1, f1, outputs = self.take_step(*self.recording.steps[number], y0, f0, *ends)
        self.compare(y1, number)
        self.later_y = state[0]
        pairs = [(y1, self.adj_y), (f1, self.adj_f)]
        pairs += [(values, self.grad_ys[row : row + len(values)]) for row, values in outputs]
        outputs, cotangents = zip(*((x, adj) for x, adj in pairs if adj is not None and x.requires_grad))
        inputs = [y0, *([] if f0 is None else [f0]), *self.inputs]
        self.adj_y, *grads = torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)
        self.adj_f = None if f0 is None else grads.pop(0)
        for total, grad in zip(self.totals, grads):
            if grad is not None:
                total += grad

    def shift(self, point: int):
        """The zero that carries the gradient of the time at which step number ``point`` begins."""
        if self.points is None:
            return None
        index = self.moved_by[point]
        return torch.zeros((), dtype=torch.float64) if index is None else self.points[index]

    def compare(self, y1, number: int):
        """Warns, once, of a field that does not repeat itself. On a GPU to look would be to wait."""
        if self.later_y is None or y1.device.type != "cpu" or torch.equal(y1, self.later_y):
            return
        off, size = (x.detach().abs().max().item() for x in (y1 - self.later_y, y1))
        if off > torch.finfo(y1.dtype).eps ** 0.5 * size:
            t = self.problem.direction * self.recording.steps[number][0]
            warnings.warn(
                f"func is not the same function in the backward pass: the step from t={t!r} ends {off:.3g} "
                "away from where it did, and gradients with adjoint='checkpoint' are wrong. Draw random "
                "numbers (dropout, noise) once a solve, outside func, or use odeint."
            )
            self.later_y = None

    def results(self):
        problem, grad_ys = self.problem, self.grad_ys
        adj_y = grad_ys[0] if self.adj_y is None else self.adj_y + grad_ys[0]
        adj_params = self.totals[: len(self.params)]
        if self.shifts is None:
            return adj_y, None, adj_params, None
        of_times, of_points = self.totals[len(self.params) :]
        grad_t = (problem.direction * of_times).to(problem.t)
        if problem.event_fn is not None:
            grad_t = torch.stack([grad_t.sum(), torch.zeros_like(grad_t[0])])  # it moves with the start
        return adj_y, grad_t, adj_params, None if problem.adaptive else of_points


def _moved_by(problem: Problem, steps):
    """Which time each end of a step moves with, which grid point for fixed steps; None: with none."""
    if not problem.adaptive:
        return [0] * (len(steps) + 1) if problem.event_fn is not None else range(len(steps) + 1)
    moved_by = [0]
    for *_, landing in steps:
        moved_by.append({Landing.FREE: moved_by[-1], Landing.END: -1}.get(landing))
    return moved_by


def _with_outputs(record: Record) -> Problem:
    """The problem with the event, if there is one, as an output like any other."""
    problem = record.problem
    if problem.event_fn is None:
        return problem
    # The step in which it lies was taken to its end: its stages may see times past the event.
    times = [problem.times[0], record.steps.event_t]
    return replace(problem, event_fn=None, overshoot=True, t=record.t, times=times)
