"""The order in which few states reverse many steps: never more of them, and no more steps taken again than needed."""

import math
from functools import lru_cache

import torch

from flashode.adjoint.checkpoint import Recording
from flashode.adjoint.schedule import fewest, reversal, thinned


@lru_cache(None)
def optimum(steps, slots):
    """Steps that must be recomputed to reverse ``steps`` with ``slots`` states, by dynamic programming."""
    if steps <= 1:
        return 0
    if slots == 1:
        return steps * (steps - 1) // 2
    return min(m + optimum(steps - m, slots - 1) + optimum(m, slots) for m in range(1, steps))


def carry_out(steps, slots, held):
    """Follows the schedule; the number of recomputed steps."""
    states, recomputed, reversed_steps, most = set(held), 0, [], len(held)
    for start, stop, reverse in reversal(steps, slots, held):
        assert start in states and start <= stop
        recomputed += stop - start
        if reverse:
            reversed_steps.append(stop)
            states.discard(stop)
        else:
            states.add(stop)
        most = max(most, len(states))
    assert reversed_steps == list(range(steps))[::-1]
    assert most <= slots
    return recomputed


def test_the_schedule_recomputes_as_few_steps_as_possible():
    for steps in range(1, 41):
        for slots in range(1, 12):
            assert carry_out(steps, slots, [0]) == optimum(steps, slots) == fewest(steps, slots)
    assert carry_out(0, 3, [0]) == 0


def recorded(steps, limit):
    """The steps whose states a solve of so many steps holds at its end."""
    recording, state = Recording("native", limit), torch.zeros(())
    for _ in range(steps):
        if recording.add(0.0, 1.0, 1.0, 0):
            recording.hold(state, state)
        assert limit is None or len(recording.held) + 1 <= limit
    return [0, *recording.held]


@lru_cache(None)
def optimum_from(steps, slots, held):
    """The same when the states ``held`` are there already, each to be kept or dropped."""
    whole = optimum(steps - held[0], slots)
    if slots == 1:
        return whole
    keeping = (
        optimum(h - held[0], slots) + optimum_from(steps, slots - 1, held[i:])
        for i, h in enumerate(held)
        if i > 0
    )
    return min([whole, *keeping])


def test_the_states_that_a_solve_holds_are_used_well():
    """Little is recomputed beyond the least possible from the states held; nothing if all are."""
    for steps in (1, 2, 3, 7, 16, 33, 64, 100, 171):
        for slots in (1, 2, 3, 4, 5, 8, 13, 32, 200):
            held = recorded(steps, slots)
            recomputed = carry_out(steps, slots, thinned(steps, slots, held))
            least = optimum_from(steps, slots, tuple(held))
            assert recomputed <= 1.1 * least, (steps, slots, recomputed, least)
            if steps <= slots:
                assert recomputed == 0
    assert recorded(50, None) == list(range(50))


def test_a_logarithm_of_states_makes_recomputation_a_logarithm():
    for steps in (100, 1000, 20_000):
        slots = math.ceil(math.log2(steps))
        recomputed = carry_out(steps, slots, thinned(steps, slots, recorded(steps, slots)))
        assert recomputed < 0.5 * steps * math.log2(steps)
