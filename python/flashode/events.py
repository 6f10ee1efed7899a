"""Finding the time at which an event function changes sign."""

from __future__ import annotations

from collections.abc import Callable


def combine_events(values, signs):
    """One number that is positive until the first of several events fires.

    ``values`` is what the event function returned, ``signs`` the signs it had at the start; the
    least of their products crosses zero with the first event.
    """
    return (values * signs).min().item()


def bisect_event(event: Callable[[float], float], t0: float, t1: float, tol: float) -> float:
    """A time within ``tol`` of the sign change of ``event``, positive at ``t0`` and not at ``t1``."""
    while t1 - t0 > tol:
        middle = t0 + 0.5 * (t1 - t0)
        if not t0 < middle < t1:
            break
        if event(middle) > 0:
            t0 = middle
        else:
            t1 = middle
    return t0 + 0.5 * (t1 - t0)
