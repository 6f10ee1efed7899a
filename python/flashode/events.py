"""Events: what they are, which of several have fired, and when one did."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .arguments import kind_of, real_number, require_dense
from .errors import ArgumentError, ArgumentTypeError
from .transforms import require_readable

# The least positive number: a zero that counts as not having been crossed yet.
_BARELY = 5e-324


@dataclass(frozen=True, eq=False)
class Event:
    """An event function with the direction in which it counts, and an end to the wait for it.

    ``event_fn=`` takes one wherever it takes a callable, and a tuple or list of both.

    Args:
        fn: callable ``fn(t, y)``, an ``nn.Module`` for example, that returns a Tensor of any shape.
            The event is where one of its elements changes sign; a boolean one does so where it
            switches, and False lies below True.
        direction: 0 for a change of sign either way, +1 for one from negative to positive, -1 for
            one from positive to negative, as the solve proceeds: towards smaller ``t`` where the
            solve runs that way.
        until: time at which a solve without event ends, in units of ``t``: a number, or a Tensor
            of one element. ``func`` is not called beyond it. Of several events the first one's
            ``until`` to be reached counts. None: such a solve fails at its step limit.

    At the start, an event with ``direction=0`` that is zero has fired; with a direction it is about
    to leave from the side that it is crossed from, so that a ball thrown up from the ground flies
    until it is back.

    Raises:
        ArgumentError, ArgumentTypeError: an argument is none of these.

    Example:
        >>> ground = Event(lambda t, y: y[0], direction=-1, until=10.0)
        >>> fall = lambda t, y: torch.stack([y[1], torch.full_like(y[1], -9.81)])
        >>> t, _ = odeint_event(fall, torch.tensor([0.0, 9.81]), 0.0, event_fn=ground)
        >>> round(t.item(), 4)
        2.0
    """

    fn: Callable
    direction: int = 0
    until: float | None = None

    def __post_init__(self):
        if not callable(self.fn):
            raise ArgumentTypeError(f"event_fn must be callable as event_fn(t, y), got {kind_of(self.fn)}")
        direction = real_number(self.direction)
        if direction not in (-1, 0, 1):
            raise ArgumentError(
                f"direction must be 0, +1 (from negative to positive) or -1, got {kind_of(self.direction)}"
            )
        object.__setattr__(self, "direction", int(direction))
        if self.until is None:
            return
        if isinstance(self.until, torch.Tensor) and self.until.requires_grad:
            raise ArgumentError("until has no gradient; give until.detach()")
        until = real_number(self.until)
        if until is None:
            raise ArgumentTypeError(
                f"until must be a number or a Tensor of one element, got {kind_of(self.until)}"
            )
        if not math.isfinite(until):
            raise ArgumentError(f"until must be finite, or None for no end, got {until}")
        object.__setattr__(self, "until", until)


class Inquiry:
    """Events in the place of an ``event_fn``, for a caller who has to know what became of them.

    A callable like any other to whoever does not know this class. Whoever does solves with ``events``
    and leaves in ``answer`` the problem and the number of the event that fired, -1 for none.
    """

    def __init__(self, events: tuple[Event, ...]):
        self.events, self.answer = events, None

    def __call__(self, t, y):
        return torch.cat(event_values(self.events, t, y))


def events_of(event_fn) -> tuple[Event, ...]:
    """What a caller gives as ``event_fn``, as events; none for None."""
    if event_fn is None:
        return ()
    if isinstance(event_fn, Inquiry):
        return event_fn.events
    given = event_fn if isinstance(event_fn, (tuple, list)) else (event_fn,)
    if not given:
        raise ArgumentError(f"event_fn is an empty {type(event_fn).__name__}; give at least one event")
    return tuple(e if isinstance(e, Event) else Event(e) for e in given)


def end_of(events: tuple[Event, ...], begin: float, direction: float) -> float:
    """The forward time at which a solve without event ends; inf where there is none."""
    end = math.inf
    for event in events:
        if event.until is None:
            continue
        if direction * event.until < begin:
            raise ArgumentError(
                f"until={event.until!r} lies on the wrong side of the start, t[0]={direction * begin!r}, of a "
                f"solve towards {'greater' if direction > 0 else 'smaller'} t"
            )
        end = min(end, direction * event.until)
    return end


def event_values(events: tuple[Event, ...], t: torch.Tensor, y) -> list[torch.Tensor]:
    """What each event function returns at ``(t, y)``: real vectors where t is, differentiable."""
    return [_checked(event.fn(t, y)).reshape(-1).to(t.device) for event in events]


def _checked(values) -> torch.Tensor:
    if not isinstance(values, torch.Tensor):
        raise ArgumentTypeError(f"event_fn must return a Tensor, got {kind_of(values)}")
    require_dense("what event_fn returned", values)
    require_readable(values, "the search for events")
    if values.numel() == 0 or values.is_complex():
        raise ArgumentError(
            f"event_fn must return a sign or several, got {values.dtype} of shape {tuple(values.shape)}"
        )
    if values.dtype == torch.bool:
        return 2.0 * values - 1  # a switch: False lies below zero
    return values.to(torch.promote_types(values.dtype, torch.float32))


class Watch:
    """Tells which events have fired, from what they return at one point of a solve after the other.

    ``parts``, from `event_values`, are those of the start, at time ``t`` of the caller's clock.
    """

    def __init__(self, events: tuple[Event, ...], t: float, parts: list[torch.Tensor]):
        self.sizes = [len(part) for part in parts]
        values = self.values(t, parts)
        directions = torch.cat([values.new_full((n,), e.direction) for e, n in zip(events, self.sizes)])
        sign = torch.sign(values)
        self.side = torch.where(directions == 0, sign, -directions)  # the sign before the event
        self.beyond = (directions != 0) & (sign == directions)  # has yet to reach that side
        self.leaving = (directions != 0) & (sign == 0)  # is about to
        self.all_near = not (self.beyond | self.leaving).any()

    def values(self, t: float, parts: list[torch.Tensor]) -> torch.Tensor:
        """One number for every element, on the CPU. Raises ArgumentError where one is NaN, or where an
        event function returns another number of them than at the start."""
        values = torch.cat(parts).detach().cpu().double()
        if [len(part) for part in parts] == self.sizes and not values.isnan().any():
            return values
        for i, (part, size) in enumerate(zip(parts, self.sizes)):
            which = f": event {i}" if len(parts) > 1 else ""
            if len(part) != size:
                raise ArgumentError(
                    f"event_fn{which} returned {size} values at the start and {len(part)} at t={t!r}; their number "
                    "must stay the same"
                )
            if part.isnan().any():
                raise ArgumentError(f"event_fn{which} returned NaN at t={t!r}")

    def distances(self, values: torch.Tensor) -> torch.Tensor:
        """Positive for every element until it fires."""
        signed = self.side * values
        if self.all_near:
            return signed
        signed = torch.where(self.leaving & (signed == 0), _BARELY, signed)
        return torch.where(self.beyond, math.inf, signed)

    def passed(self, values: torch.Tensor) -> float:
        """Goes on from a point at which none has fired; the least distance there."""
        if not self.all_near:
            near = self.side * values > 0
            self.beyond &= ~near
            self.leaving &= ~near
            self.all_near = not (self.beyond | self.leaving).any()
        return self.distances(values).min().item()


def crossing(distance: Callable[[float], float], a, d_a, b, d_b, tol: float) -> float:
    """The time at which ``distance``, ``d_a > 0`` at ``a`` and ``d_b <= 0`` at ``b``, becomes zero.

    The result lies within ``tol`` of a change of sign; where that is below the resolution of
    time, at one. The ITP method (Oliveira and Takahashi, *An enhancement of the bisection method
    average performance preserving minmax optimality*, ACM TOMS 47, 2020): superlinear
    where ``distance`` is smooth, the midpoint where it is but a sign, and never more than one
    evaluation behind bisection, or two with rounding.
    """
    tol = max(tol, 2 * math.ulp(max(abs(a), abs(b))))
    if b - a <= tol:
        return _chord(a, d_a, b, d_b)
    k1, radius = 0.2 / (b - a), tol * 2.0 ** math.ceil(math.log2((b - a) / tol))
    while b - a > tol:
        middle, chord = a + 0.5 * (b - a), _chord(a, d_a, b, d_b)
        towards = math.copysign(1.0, middle - chord)
        # Truncation: past the chord's zero, so that both ends of the bracket move.
        shift = k1 * (b - a) ** 2
        t = chord + towards * shift if shift <= abs(middle - chord) else middle
        # Projection: where bisection would be in as many evaluations.
        spare = max(0.0, radius - 0.5 * (b - a))
        if abs(t - middle) > spare:
            t = middle - towards * spare
        if not a < t < b:
            t = middle
        d_t = distance(t)
        if d_t > 0:
            a, d_a = t, d_t
        else:
            b, d_b = t, d_t
        radius *= 0.5
    return _chord(a, d_a, b, d_b)


def _chord(a, d_a, b, d_b) -> float:
    """Where the chord through two points of opposite sign is zero; the middle where it tells nothing."""
    share = d_a / (d_a - d_b)
    return a + (share if 0 < share <= 1 else 0.5) * (b - a)
