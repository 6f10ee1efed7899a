"""Continuous extensions: the solution between the ends of a step, linear in the step's stages."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import torch

from .tableau import Row, Tableau, close, row


@dataclass(frozen=True, eq=False)
class Dense:
    """A continuous extension: ``y(t0 + x dt) = y0 + dt * sum_j w_j(x) k_j``, ``0 <= x <= 1``.

    ``weights[j][d]`` is the coefficient of ``x**(d+1)`` in ``w_j``. Where the stages of the step
    do not suffice, ``extra_c`` and ``extra_a`` add stages that are evaluated only in steps that
    hold an output; ``weights`` then has ``s + len(extra_c)`` rows. ``order`` is that of the extension
    as a method, of stages that are exact to it.
    """

    weights: tuple[Row, ...]
    order: int
    extra_c: Row = ()
    extra_a: tuple[Row, ...] = ()

    def __post_init__(self):
        stages = len(self.weights) - len(self.extra_c)
        if len({len(w) for w in self.weights}) != 1 or len(self.extra_a) != len(self.extra_c):
            raise ValueError("dense output: ragged weights or extra stages without rows")
        for i, (c_i, a_i) in enumerate(zip(self.extra_c, self.extra_a)):
            if len(a_i) != stages + i or not close(sum(a_i), c_i, a_i):
                raise ValueError(f"dense output: extra stage {i} contradicts its node {c_i}")
        column_sums = [sum(column) for column in zip(*self.weights)]
        if not close(column_sums[0], Fraction(1), self.weights[0]) or not all(
            close(total, Fraction(0), column)
            for total, column in zip(column_sums[1:], list(zip(*self.weights))[1:])
        ):
            raise ValueError("dense output: constants are not reproduced")

    @property
    def degree(self) -> int:
        return len(self.weights[0])

    @cached_property
    def matrix(self) -> torch.Tensor:
        """``weights`` as a float64 tensor of shape (stages, degree)."""
        rows = [[float(w) for w in w_j] for w_j in self.weights]
        return torch.tensor(rows, dtype=torch.float64, device="cpu")


def _unit(j: int, s: int) -> Row:
    return tuple(Fraction(int(i == j)) for i in range(s))


def _dense(columns: list[Row], order: int, **extra) -> Dense:
    return Dense(weights=tuple(zip(*columns)), order=order, **extra)


def _mix(*terms: tuple[int, Row]) -> Row:
    return tuple(sum(m * r[j] for m, r in terms) for j in range(len(terms[0][1])))


def linear(tableau: Tableau) -> Dense:
    """The chord from ``y0`` to ``y1``."""
    return _dense([tableau.b], 1)


def quadratic(tableau: Tableau) -> Dense:
    """The parabola through ``y0``, ``f0`` and ``y1``: second order, no further evaluation."""
    f0 = _unit(0, tableau.stages)
    return _dense([f0, _mix((1, tableau.b), (-1, f0))], 2)


def hermite(tableau: Tableau) -> Dense:
    """The cubic through ``y0 f0 y1 f1``: third order. ``f0`` and ``f1`` are the first and the last stage
    where those are the slopes at the ends of the step, extra evaluations otherwise."""
    b, extra_c, extra_a = tableau.b, (), ()
    first, last = 0, tableau.stages - 1
    if not tableau.begins_with_f0:
        first, extra_c, extra_a = len(b), row(0), (row(0) * len(b),)
        b = (*b, Fraction(0))
    if not tableau.fsal:
        last, extra_c, extra_a = len(b), (*extra_c, *row(1)), (*extra_a, b)
        b = (*b, Fraction(0))
    f0, f1 = _unit(first, len(b)), _unit(last, len(b))
    columns = [f0, _mix((3, b), (-2, f0), (-1, f1)), _mix((-2, b), (1, f0), (1, f1))]
    return _dense(columns, 3, extra_c=extra_c, extra_a=extra_a)


# Where a step is no Runge-Kutta step, its outputs see it as two slopes: f0, and the mean slope (y1 - y0) / dt.
# Between its ends lies the chord, or the cubic through y0 f0 y1 f1, where f1 is evaluated for it.
CHORD = Dense(weights=(row(0), row(1)), order=1)
CUBIC = Dense(
    weights=(row(1, -2, 1), row(0, 3, -2), row(0, -1, 1)), extra_c=row(1), extra_a=(row(0, 1),), order=3
)  # fmt: skip


def quartic(tableau: Tableau, b_mid: Row) -> Dense:
    """The quartic through ``y0 f0 y1 f1`` and the midpoint ``y0 + dt * sum_j b_mid_j k_j``
    (Shampine, *Some practical Runge-Kutta formulas*, Math. Comp. 46, 1986)."""
    s, b = tableau.stages, tableau.b
    f0, f1 = _unit(0, s), _unit(s - 1, s)
    return _dense(
        [
            f0,
            _mix((-4, f0), (1, f1), (-5, b), (16, b_mid)),
            _mix((5, f0), (-3, f1), (14, b), (-32, b_mid)),
            _mix((-2, f0), (2, f1), (-8, b), (16, b_mid)),
        ],
        4,
    )


def weights_at(dense: Dense, x):
    """``w_j(x)`` for every stage ``j`` at positions ``x`` in [0, 1].

    ``x``: float64 tensor of shape (M,); returns (M, stages), differentiable in ``x``.
    """
    powers = x[:, None] ** torch.arange(1, dense.degree + 1, dtype=x.dtype, device=x.device)
    return powers @ dense.matrix.T
