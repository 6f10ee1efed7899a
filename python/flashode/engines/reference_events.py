"""A solve that ends at an event: which step the event lies in, and where in that step."""

from __future__ import annotations

import torch

from ..errors import Status
from ..events import Watch, crossing, event_values
from ..solution import Outcome
from .clock import stage_time

# Where in a step the events are looked at, besides its end. One that changes sign twice between two of
# these points goes unseen.
_INNER = (0.25, 0.5, 0.75)


def solve_until_event(run) -> Outcome:
    """Steps until an event fires and finds its time on the dense output, or goes on to ``until``.

    ``run`` is a `reference.Run`, or an engine's that is led alike, that has not begun.
    """
    p = run.p
    with torch.no_grad():
        parts = _parts(run.p, run.t0, run.y0)
        watch = Watch(p.events, p.direction * run.t0, parts)
        distance, number = watch.distances(_values(run, watch, run.t0, run.y0)).min(0)
    if distance <= 0:
        return _fired(run, run.t0, number.item(), run.y0)
    distance = distance.item()
    if run.t0 < p.end:
        run.start()
    # Slopes of zero let steps grow for ever, until no number holds their times.
    latest = torch.finfo(torch.promote_types(p.time_dtype, torch.float32)).max / 1000
    while run.t0 < p.end:
        step = run.advance()
        if step.t1 > latest:
            return run.outcome(Status.MAX_STEPS)
        bracket, distance = _examined(run, watch, step, distance)
        if bracket is not None:
            step.k = run.extended(step)  # once, and with a graph
            t, number = _located(run, watch, step, bracket)
            return _fired(run, t, number, _states_at(run, step, [t])[0])
    run.event_t = p.end
    run.rows.append(run.y0)
    return run.outcome(Status.NO_EVENT)


def _fired(run, t: float, number: int, y) -> Outcome:
    run.event_t, run.event_index = t, number
    run.rows.append(y)
    return run.outcome(Status.EVENT)


def _parts(p, t: float, y):
    """What every event function returns at a forward time."""
    return event_values(p.events, stage_time(p, t), p.unflatten(y))


def _values(run, watch: Watch, t: float, y):
    return watch.values(run.p.direction * t, _parts(run.p, t, y))


def _states_at(run, step, times):
    """y at forward times inside a step. They are held where the start moves, as torchdiffeq holds the
    event's: its own gradient is for `event_gradients` to add."""
    shifts = None if run.shifts is None else run.shifts[-1:]
    return run.interpolate(step, times, shifts)


@torch.no_grad()
def _examined(run, watch: Watch, step, distance: float):
    """Whether an event fires in a step at whose start the nearest is at ``distance``.

    Returns the first bracket of one, ``(a, distance at a, b)``, or None; and the least distance at the
    last point that was passed.
    """
    a, times, states = step.t0, [step.t1], [step.y1]
    # Where dense output takes further calls of func, the end of the step has to do.
    if not run.p.dense.extra_c:
        inner = [step.t0 + x * (step.t1 - step.t0) for x in _INNER]
        times, states = inner + times, _states_at(run, step, inner) + states
    for t, y in zip(times, states):
        values = _values(run, watch, t, y)
        if (watch.distances(values) <= 0).any():
            return (a, distance, t), distance
        a, distance = t, watch.passed(values)
    return None, distance


@torch.no_grad()
def _located(run, watch: Watch, step, bracket) -> tuple[float, int]:
    """The time of the first event in a bracket, and its number."""
    p, number = run.p, None

    def distance(t: float) -> float:
        nonlocal number
        y = step.y1 if t == step.t1 else _states_at(run, step, [t])[0]
        least, nearest = watch.distances(_values(run, watch, t, y)).min(0)
        if least <= 0:
            number = nearest.item()
        return least.item()

    # Half of atol: how far off torchdiffeq's bisection can be, which ends in the middle of a bracket.
    tol = 0.5 * (p.atol if isinstance(p.atol, float) else p.atol.min().item())
    a, distance_a, b = bracket
    t = crossing(distance, a, distance_a, b, distance(b), tol)
    return t, number
