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
from ..progress import counted
from ..solution import Landing
from ..vjp import vector_jacobian_products
from .apart import apart
from .reached import warn_unlisted
from .schedule import reversal, thinned
from .spec import Record


@dataclass
class Recording:
    """The accepted steps of a solve: numbers of all of them, and the states that some began with.

    Attributes:
        engine: that took them.
        limit: states that may be held; None for all.
        steps: ``(t0, t1, dt, landing)`` of each.
        stride: the states of steps 0, stride, 2 * stride, ... are held.
        held: ``(y0, f0)`` by step, but for step 0, which begins with the first output; f0 is None
            where the step evaluates it itself.
    """

    engine: str
    limit: int | None
    steps: list[tuple[float, float, float, Landing]] = field(default_factory=list)
    stride: int = 1
    held: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=dict)
    event_t: float = math.nan
    as_polynomials = False

    def add(self, t0, t1, dt, landing) -> bool:
        """Called by an engine for every step it accepts; whether the step's state is to be held."""
        number = len(self.steps)
        self.steps.append((t0, t1, dt, landing))
        if number == 0 or number % self.stride:
            return False
        if len(self.held) + 1 == self.limit:
            # How many steps are to come is not known: make room by holding every other state.
            self.stride *= 2
            self.held = {step: state for step, state in self.held.items() if step % self.stride == 0}
        return number % self.stride == 0

    def hold(self, y0, f0):
        """Called for the step added last, with what it began with."""
        # The field may have asked for gradients of what it was shown.
        self.held[len(self.steps) - 1] = y0.detach(), None if f0 is None else f0.detach()

    @property
    def nbytes(self) -> int:
        """Of the states that are held."""
        return sum(x.nbytes for state in self.held.values() for x in state if x is not None)


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
    with counted(steps, record.spec.progress, f"{record.problem.method.name} backward") as reversed_one:
        for start, stop, reverse in reversal(steps, slots, kept):
            state = states.pop(start) if start == stop else sweep.replay.advance(states[start], start, stop)
            if reverse:
                sweep.reverse(state, stop)
                reversed_one()
            else:
                states[stop] = state
    return sweep.results()


def differentiable_gradients(record: Record, grad_ys: torch.Tensor, given):
    """The same with a graph, for second derivatives: all steps are taken again in one go, as direct mode
    takes them. ``given`` are the state, the times and the grid, each None unless it requires gradients."""
    y0, t, grid = given
    problem, shifts, points = record.problem, None, None
    with torch.enable_grad():
        if t is not None or grid is not None:
            # x - x.detach() is zero and has the gradient of x.
            clock = problem.direction * (record.t if t is None else t).to("cpu", torch.float64)
            shifts = points = clock - clock.detach()
            if grid is not None:
                points = grid - grid.detach()
        replay = _Replay(record, shifts, points)
        state = record.ys[0].detach() if y0 is None else y0, None
        rows = [state[0].expand(1 if record.steps.steps else len(grad_ys), *grad_ys.shape[1:])]
        for number in range(len(record.steps.steps)):
            *state, outputs = replay.step(number, *state)
            rows += [values for _, values in outputs]
        if not record.steps.steps:  # every output is the start, as of an event that fired there
            rows *= len(record.ys)
        inputs = *given, *record.params
        reached = [x for x in inputs if x is not None]
        grads = torch.autograd.grad(torch.cat(rows), reached, grad_ys, create_graph=True, allow_unused=True)
        grads = apart(reached, grads, create_graph=True)
    found = iter(grads)
    adj_y, grad_t, grad_grid, *adj_params = (None if x is None else next(found) for x in inputs)
    return adj_y, grad_t, adj_params, grad_grid


class _Replay:
    """Takes the recorded steps again. ``shifts`` and ``points`` are zeros that carry the gradients of
    the output times and of the ends of the steps, or None."""

    def __init__(self, record: Record, shifts, points):
        self.steps, self.points = record.steps.steps, points
        self.moved_by = None if points is None else _moved_by(record.problem, self.steps)
        self.take_step = ENGINES[record.steps.engine].replay(_with_outputs(record), shifts)

    def step(self, number: int, y0, f0):
        """The state at its end, the slope it hands on, and its outputs in pieces, by first row."""
        return self.take_step(*self.steps[number], y0, f0, self.shift(number), self.shift(number + 1))

    def shift(self, point: int):
        """The zero that carries the gradient of the time at which step number ``point`` begins."""
        if self.points is None:
            return None
        index = self.moved_by[point]
        return torch.zeros((), dtype=torch.float64, device="cpu") if index is None else self.points[index]

    def advance(self, state, start: int, stop: int):
        """The state that step ``stop`` begins with, from that of step ``start``; nothing is recorded."""
        for number in range(start, stop):
            state = self.take_step(*self.steps[number], *state, None, None)[:2]
        return state


class _Sweep:
    """The way back through the steps, and the gradients gathered on it."""

    def __init__(self, record: Record, grad_ys, needs_time: bool):
        self.problem, self.grad_ys, self.params = record.problem, grad_ys, record.params
        # Cotangents of the state between two steps, and of the slope that one hands to the next.
        self.adj_y = self.adj_f = None
        self.later_y: torch.Tensor | None = None  # the state that the step just reversed began with
        self.compares = grad_ys.device.type == "cpu"  # on a GPU to look would be to wait
        shifts = points = None
        if needs_time:
            shifts = points = torch.zeros(len(record.t), dtype=torch.float64, device="cpu").requires_grad_()
            if not self.problem.adaptive:
                points = torch.zeros_like(self.problem.grid).requires_grad_()
        self.needs_time = needs_time
        self.inputs = [*self.params, *([shifts, points] if needs_time else [])]
        self.totals = [torch.zeros_like(x) for x in self.inputs]
        self.replay = _Replay(record, shifts, points)
        self.examines = True

    def reverse(self, state, number: int):
        """Pulls the cotangents back through one step."""
        y0, f0 = (None if x is None else x.detach().requires_grad_() for x in state)
        with torch.enable_grad():
            y1, f1, outputs = self.replay.step(number, y0, f0)
        self.compare(y1, number)
        self.later_y = y0.detach()
        pairs = [(y1, self.adj_y), (f1, self.adj_f)]
        pairs += [(values, self.grad_ys[row : row + len(values)]) for row, values in outputs]
        outputs, cotangents = zip(*((x, adj) for x, adj in pairs if adj is not None and x.requires_grad))
        inputs = [y0, *([] if f0 is None else [f0]), *self.inputs]
        if self.examines:
            warn_unlisted(self.problem.func, outputs, inputs)
            self.examines = False
        self.adj_y, *grads = vector_jacobian_products(outputs, inputs, cotangents)
        self.adj_f = None if f0 is None else grads.pop(0)
        for total, grad in zip(self.totals, grads):
            if grad is not None:
                total += grad

    def compare(self, y1, number: int):
        """Warns, once, of a field that does not repeat itself."""
        if not self.compares or self.later_y is None or torch.equal(y1, self.later_y):
            return
        off, size = (x.detach().abs().max().item() for x in (y1 - self.later_y, y1))
        if off > torch.finfo(y1.dtype).eps ** 0.5 * size:
            t = self.problem.direction * self.replay.steps[number][0]
            warnings.warn(
                f"func is not the same function in the backward pass: the step from t={t!r} ends {off:.3g} "
                "away from where it did, and gradients with adjoint='checkpoint' are wrong. Draw random "
                "numbers (dropout, noise) once a solve, outside func, or use odeint."
            )
            self.compares = False

    def results(self):
        problem, grad_ys = self.problem, self.grad_ys
        # Without a step every output is the start: an event may have fired there.
        adj_y = grad_ys.sum(0) if self.adj_y is None else self.adj_y + grad_ys[0]
        adj_params = self.totals[: len(self.params)]
        if not self.needs_time:
            return adj_y, None, adj_params, None
        of_times, of_points = self.totals[len(self.params) :]
        grad_t = (problem.direction * of_times).to(problem.t)
        return adj_y, grad_t, adj_params, None if problem.adaptive else of_points


def _moved_by(problem: Problem, steps):
    """Which time each end of a step moves with, which grid point for fixed steps; None: with none."""
    if not problem.adaptive:
        # Without an end the grid is the start alone, and every step moves with it.
        return [0] * (len(steps) + 1) if len(problem.grid) == 1 else range(len(steps) + 1)
    moved_by = [0]
    for *_, landing in steps:
        moved_by.append({Landing.FREE: moved_by[-1], Landing.END: -1}.get(landing))
    return moved_by


def _with_outputs(record: Record) -> Problem:
    """The problem with the event, if there is one, as an output like any other."""
    problem = record.problem
    if not problem.events:
        return problem
    # The step in which it lies was taken to its end: its stages may see times past the event.
    times = [problem.times[0], record.steps.event_t]
    return replace(problem, events=(), overshoot=True, t=record.t, times=times)
