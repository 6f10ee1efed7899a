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
    """Those of the held states to keep: the ones nearest to where the schedule wants them.

    States that lie where they are not wanted would take the places of others that are.
    """
    kept = [held[0]]
    while len(kept) < slots and kept[-1] < held[-1]:
        wanted = kept[-1] + split(steps - kept[-1], slots - len(kept) + 1)
        i = bisect_left(held, wanted)
        kept.append(min((h for h in held[i - 1 : i + 1] if h > kept[-1]), key=lambda h: abs(h - wanted)))
    return kept


def split(steps: int, slots: int) -> int:
    """After how many of at least two steps to hold the next state, when ``slots`` of at least two
    are there for these steps, one of them taken by their initial state."""
    repeats = 1
    while comb(slots + repeats, slots) < steps:
        repeats += 1
    # Any number is optimal that leaves neither part so long that it needs more repeats.
    return min(comb(slots + repeats - 1, slots), steps - comb(slots + repeats - 2, slots - 1))
