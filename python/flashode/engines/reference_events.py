"""A solve that ends at an event: which step the event lies in, and where in that step."""

from __future__ import annotations

import torch

from ..errors import Status
from ..events import Watch, crossing
from ..solution import Outcome

# Where in a step the events are looked at, besides its end. One that changes sign twice between two of
# these points goes unseen.
_INNER = (0.25, 0.5, 0.75)


def solve_until_event(run) -> Outcome:
    """Steps until an event fires and finds its time on the dense output, or goes on to ``until``.

    ``run`` is a `reference.Run` that has not begun.
    """
    p = run.p
    with torch.no_grad():
        parts = run.event_values(run.t0, run.y0)
        watch = Watch(p.events, p.direction * run.t0, parts)
        least, number = watch.distances(p.direction * run.t0, parts).min(0)
    if least <= 0:
        return _fired(run, run.t0, number.item(), run.y0)
    distance = least.item()
    if run.t0 < p.end:
        run.start()
    while run.t0 < p.end:
        step = run.advance()
        bracket, distance = _examined(run, watch, step, distance)
        if bracket is not None:
            t, number = _located(run, watch, step, bracket)
            return _fired(run, t, number, _state_at(run, step, t))
    run.event_t = p.end
    run.rows.append(run.y0)
    return run.outcome(Status.NO_EVENT)


def _fired(run, t: float, number: int, y) -> Outcome:
    run.event_t, run.event_index = t, number
    run.rows.append(y)
    return run.outcome(Status.EVENT)


@torch.no_grad()
def _examined(run, watch: Watch, step, distance: float):
    """Whether an event fires in a step at whose start the nearest is at ``distance``.

    Returns the first bracket of one, ``(a, distance at a, b, distance at b)``, or None; and the distance
    at the end of the step.
    """
    direction, a, times = run.p.direction, step.t0, [step.t1]
    # Where dense output takes further calls of func, the end of the step has to do.
    if not run.p.dense.extra_c:
        times = [step.t0 + x * (step.t1 - step.t0) for x in _INNER] + times
    for t in times:
        y = step.y1 if t == step.t1 else _state_at(run, step, t)
        parts = run.event_values(t, y)
        there = watch.distances(direction * t, parts).min().item()
        if there <= 0:
            return (a, distance, t, there), distance
        a, distance = t, watch.passed(direction * t, parts)
    return None, distance


def _located(run, watch: Watch, step, bracket) -> tuple[float, int]:
    """The time of the first event in a bracket, and the number of the event."""
    p, number = run.p, None
    step.k = run.extended(step)  # once, and with a graph

    @torch.no_grad()
    def distance(t: float) -> float:
        nonlocal number
        y = step.y1 if t == step.t1 else _state_at(run, step, t)
        least, nearest = watch.distances(p.direction * t, run.event_values(t, y)).min(0)
        if least <= 0:
            number = nearest.item()
        return least.item()

    # Half the time that torchdiffeq's bisection is off at most, which ends at the middle of a bracket.
    atol = p.atol if isinstance(p.atol, float) else p.atol.min().item()
    a, d_a, b, _ = bracket
    t = crossing(distance, a, d_a, b, distance(b), 0.5 * atol)
    return t, number


def _state_at(run, step, t: float):
    """y at a forward time inside a step. The time is held where the start moves, as torchdiffeq holds
    it: its own gradient is for `event_gradients` to add."""
    shifts = None if run.shifts is None else run.shifts[-1:]
    return run.interpolate(step, [t], shifts)[0]
