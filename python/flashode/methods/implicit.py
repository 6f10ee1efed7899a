"""Implicit Runge-Kutta methods: their tables, and what interpolates between step ends.

HW stands for Hairer and Wanner, *Solving Ordinary Differential Equations II*, 2nd edition, 1996.
"""

from __future__ import annotations

import math
from decimal import Context, Decimal
from fractions import Fraction

from ..interp import Dense, hermite
from ..tableau import Row, Tableau, row


def _root(n: int) -> Fraction:
    """The square root of ``n`` to 50 digits."""
    return Fraction(Decimal(n).sqrt(Context(prec=50)))


_HALF, _R2, _R3, _R6, _R15 = Fraction(1, 2), _root(2), _root(3), _root(6), _root(15)

# ---- fixed steps, one stage after the other --------------------------------------------------

IMPLICIT_EULER = Tableau(c=row(1), a=(row(1),), b=row(1))
IMPLICIT_MIDPOINT = Tableau(c=row("1/2"), a=(row("1/2"),), b=row(1))
TRAPEZOID = Tableau(c=row(0, 1), a=(row(), row("1/2", "1/2")), b=row("1/2", "1/2"))

# Alexander, SIAM J. Numer. Anal. 14 (1977): the two stages of order 2 that are L-stable.
_ALEXANDER = 1 - _R2 / 2
SDIRK2 = Tableau(
    c=row(_ALEXANDER, 1),
    a=(row(_ALEXANDER), row(1 - _ALEXANDER, _ALEXANDER)),
    b=row(1 - _ALEXANDER, _ALEXANDER),
)

# Bank et al., IEEE Trans. CAD 4 (1985), as the Runge-Kutta method of Hosea and Shampine, Appl. Numer.
# Math. 20 (1996): the trapezoidal rule over 2 - sqrt(2) of the step, then the backward formula of order 2.
TRBDF2 = Tableau(
    c=row(0, 2 * _ALEXANDER, 1),
    a=(row(), row(_ALEXANDER, _ALEXANDER), row(_R2 / 4, _R2 / 4, _ALEXANDER)),
    b=row(_R2 / 4, _R2 / 4, _ALEXANDER),
)

# ---- fixed steps, all stages at once: HW IV.5 ------------------------------------------------

# torchdiffeq's gl4 has the first node twice, and order 1 where the field depends on time.
GL4 = Tableau(
    c=row(_HALF - _R3 / 6, _HALF + _R3 / 6),
    a=(row("1/4", Fraction(1, 4) - _R3 / 6), row(Fraction(1, 4) + _R3 / 6, "1/4")),
    b=row("1/2", "1/2"),
)
GL6 = Tableau(
    c=row(_HALF - _R15 / 10, _HALF, _HALF + _R15 / 10),
    a=(
        row("5/36", Fraction(2, 9) - _R15 / 15, Fraction(5, 36) - _R15 / 30),
        row(Fraction(5, 36) + _R15 / 24, "2/9", Fraction(5, 36) - _R15 / 24),
        row(Fraction(5, 36) + _R15 / 30, Fraction(2, 9) + _R15 / 15, "5/36"),
    ),
    b=row("5/18", "4/9", "5/18"),
)
RADAU_IIA3 = Tableau(
    c=row("1/3", 1),
    a=(row("5/12", "-1/12"), row("3/4", "1/4")),
    b=row("3/4", "1/4"),
)
_RADAU_B = row((16 - _R6) / 36, (16 + _R6) / 36, "1/9")
RADAU_IIA5 = Tableau(
    c=row((4 - _R6) / 10, (4 + _R6) / 10, 1),
    a=(
        row((88 - 7 * _R6) / 360, (296 - 169 * _R6) / 1800, (-2 + 3 * _R6) / 225),
        row((296 + 169 * _R6) / 1800, (88 + 7 * _R6) / 360, (-2 - 3 * _R6) / 225),
        _RADAU_B,
    ),
    b=_RADAU_B,
)

# ---- adaptive: Kvaerno, BIT 44 (2004) --------------------------------------------------------

# Both pairs end with two stages at the end of the step, L-stable both: the last is the result, the one
# before it the embedded result, of one order less. Neither needs a filter in its error estimate (HW
# IV.8): the difference of two L-stable results vanishes on infinitely stiff components.


def _stiffly_accurate(c: Row, a: tuple[Row, ...]) -> Tableau:
    b, b_hat = a[-1], (*a[-2], Fraction(0))
    return Tableau(c=c, a=a, b=b, b_err=tuple(x - y for x, y in zip(b, b_hat)))


def _kvaerno3() -> Tableau:
    """All of it follows from the order conditions, 3 and embedded 2, with L-stability: ``g`` is the middle
    root of ``g^3 - 3 g^2 + 3/2 g - 1/6``."""
    g = Fraction("0.43586652150845899941601945119355684252929409293842")
    a32 = (_HALF - g) / (2 * g)
    b2 = 1 / (12 * g * (1 - 2 * g))
    b3 = _HALF - g - 2 * g * b2
    return _stiffly_accurate(
        c=row(0, 2 * g, 1, 1),
        a=(row(), row(g, g), row(1 - g - a32, a32, g), row(1 - g - b2 - b3, b2, b3, g)),
    )


KVAERNO3 = _kvaerno3()
KVAERNO5 = _stiffly_accurate(
    c=row(0, "0.52", "1.23033320996790809", "0.89576598435007587", "0.43639360985864758", 1, 1),
    a=(
        row(),
        row("0.26", "0.26"),
        row("0.13", "0.84033320996790809", "0.26"),
        row("0.22371961478320505", "0.47675532319799699", "-0.06470895363112615", "0.26"),
        row("0.16648564323248321", "0.10450018841591720", "0.03631482272098715", "-0.13090704451073998", "0.26"),
        row("0.13855640231268224", 0, "-0.04245337201752043", "0.02446657898003141", "0.61943039072480676",
            "0.26"),
        row("0.13659751177640291", 0, "-0.05496908796538376", "-0.04118626728321046", "0.62993304899016403",
            "0.06962479448202728", "0.26"),
    ),
)  # fmt: skip


def _kvaerno5_dense() -> Dense:
    """Fourth order everywhere and C1, from the seven stages alone: the Hermite cubic and a multiple ``v`` of
    ``x^2 (1 - x)^2``. The conditions of order 4 ask of ``v`` that ``sum_j v_j p(c_j)`` be a quarter of the
    third divided difference of ``p``, with no part in stage 2, the one stage that is of order 2 only; the
    divided difference over stages 1, 3, 4 and 5 does that, and keeps within 1.9 in magnitude."""
    nodes, v = [0, 2, 3, 4], [Fraction(0)] * KVAERNO5.stages
    for j in nodes:
        v[j] = Fraction(1, 4) / math.prod(KVAERNO5.c[j] - KVAERNO5.c[i] for i in nodes if i != j)
    cubic = hermite(KVAERNO5)
    return Dense(tuple((w1, w2 + v_j, w3 - 2 * v_j, v_j) for (w1, w2, w3), v_j in zip(cubic.weights, v)), 4)


KVAERNO5_DENSE = _kvaerno5_dense()
