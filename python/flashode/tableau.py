"""Runge-Kutta tableaus: exact numbers, checked when they are built.

The letters are Hairer's (Hairer, Nørsett, Wanner, *Solving Ordinary Differential Equations I*,
II.1): nodes ``c``, matrix ``a``, weights ``b``; ``b_err = b - b_hat`` weighs the embedded error.
Other projects write: torchdiffeq ``alpha beta c_sol c_error``, diffrax ``c a_lower b_sol b_error``,
scipy ``C A B E``.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

Row = tuple[Fraction, ...]


def row(*entries) -> Row:
    """Exact numbers from ints, Fractions, or text such as ``"2/3"`` and ``"0.161"``."""
    return tuple(Fraction(entry) for entry in entries)


def close(x: Fraction, y: Fraction, weights: Row) -> bool:
    # Published tables are rationals rounded to double precision or better.
    return abs(x - y) <= Fraction(1, 10**15) * (1 + sum(abs(w) for w in weights))


@dataclass(frozen=True, eq=False)  # one object per method: compared and hashed as such
class Tableau:
    """A Runge-Kutta method with ``s`` stages.

    ``a`` has ``s`` rows: row ``i`` has ``i`` entries where the stage is explicit, ``i + 1`` where it is
    diagonally implicit, and ``s`` where all stages are solved for at once. ``b_err`` is None for methods
    without an embedded error estimate. Raises ValueError when the table contradicts itself.
    """

    c: Row
    a: tuple[Row, ...]
    b: Row
    b_err: Row | None = None

    def __post_init__(self):
        s = len(self.c)
        if len(self.a) != s or len(self.b) != s:
            raise ValueError(f"tableau: {s} nodes, {len(self.a)} rows and {len(self.b)} weights")
        for i, (c_i, a_i) in enumerate(zip(self.c, self.a)):
            if len(a_i) not in (i, i + 1, s):
                raise ValueError(f"tableau: row {i} has {len(a_i)} entries, expected {i}, {i + 1} or {s}")
            if not close(sum(a_i), c_i, a_i):
                raise ValueError(f"tableau: row {i} sums to {float(sum(a_i))}, its node is {c_i}")
        if not close(sum(self.b), Fraction(1), self.b):
            raise ValueError(f"tableau: the weights sum to {float(sum(self.b))}")
        if self.b_err is not None:
            if len(self.b_err) != s:
                raise ValueError(f"tableau: {len(self.b_err)} error weights for {s} stages")
            if not close(sum(self.b_err), Fraction(0), self.b_err):
                raise ValueError(f"tableau: error weights sum to {float(sum(self.b_err))}")

    @property
    def stages(self) -> int:
        return len(self.c)

    @cached_property
    def explicit(self) -> bool:
        return all(len(a_i) == i for i, a_i in enumerate(self.a))

    @cached_property
    def coupled(self) -> bool:
        """Some stage depends on later ones: all are solved for at once."""
        return any(len(a_i) > i + 1 for i, a_i in enumerate(self.a))

    @cached_property
    def reaches_beyond(self) -> bool:
        """A stage lies past the end of the step."""
        return max(self.c) > 1

    @property
    def begins_with_f0(self) -> bool:
        """The first stage is the slope at the start of the step."""
        return not self.a[0]

    @cached_property
    def numbers(self) -> tuple[list, list, list, list]:
        """``c a b b_err`` as floats."""
        rows = (self.c, self.b, self.b_err or ())
        c, b, b_err = ([float(x) for x in r] for r in rows)
        return c, [[float(x) for x in a_i] for a_i in self.a], b, b_err

    @cached_property
    def fsal(self) -> bool:
        """First same as last: the last stage is evaluated at the step's own result."""
        padded = (*self.a[-1], *row(0) * (self.stages - len(self.a[-1])))
        return self.c[-1] == 1 and padded == self.b
