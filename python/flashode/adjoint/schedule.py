"""In what order to reverse the steps of a solve when only few of its states can be held.

The schedule is *revolve*, which recomputes the fewest steps possible (Griewank & Walther,
Algorithm 799, ACM TOMS 26, 2000). With ``s`` states and no step taken more than ``r`` times, up to
``comb(s + r, s)`` steps can be reversed: states in number the logarithm of the steps suffice for
recomputation to cost a logarithm, too.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from math import comb


def reversal(steps: int, slots: int, held: Sequence[int]) -> Iterator[tuple[int, int, bool]]:
    """What to do to reverse steps ``steps - 1`` to 0, never holding more than ``slots`` states.

    ``held`` are the steps whose initial states are held at first, ascending from 0.

    Yields ``(start, stop, reverse)``: advance from the state held at step ``start`` to step ``stop``;
    then reverse that step, or else hold its state. A step that is reversed from its own state needs
    that state no more.
    """
    held, end = list(held), steps
    while end > 0:
        while end - held[-1] > 1 and len(held) < slots:
            start = held[-1]
            held.append(start + split(end - start, slots - len(held) + 1))
            yield start, held[-1], False
        end -= 1
        yield held[-1], end, True
        if held[-1] == end:
            held.pop()


def thinned(steps: int, slots: int, held: Sequence[int]) -> list[int]:
    """Those of the held states to keep: the ones nearest to where the schedule would hold states.

    The others would take the places of states that spare more.
    """
    kept = [held[0]]
    while len(kept) < slots and kept[-1] < held[-1]:
        start, free = kept[-1], slots - len(kept) + 1
        i = bisect_left(held, start + split(steps - start, free))

        def cost(h):
            return fewest(h - start, free) + fewest(steps - h, free - 1)

        best = min((h for h in held[i - 1 : i + 1] if h > start), key=cost)
        if cost(best) >= fewest(steps - start, free):
            break
        kept.append(best)
    return kept


def split(steps: int, slots: int) -> int:
    """After how many of at least two steps to hold the next state, when ``slots`` of at least two
    are there for these steps, one of them taken by their initial state."""
    r = _repeats(steps, slots)
    # Any number is optimal that neither wastes a repeat on the first part nor costs the second one
    # more. The least leaves most of the states that a solve holds in their places.
    return max(1, comb(slots + r - 2, slots), steps - comb(slots + r - 1, slots - 1))


def fewest(steps: int, slots: int) -> int:
    """Steps to recompute in reversing ``steps`` from their initial state."""
    r = _repeats(steps, slots)
    return r * steps - comb(slots + r, slots + 1)


def _repeats(steps: int, slots: int) -> int:
    """How often a step has to be recomputed at most."""
    r = 0
    while comb(slots + r, slots) < steps:
        r += 1
    return r
