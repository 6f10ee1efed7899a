"""Every method by name, as data: its family, its table, what interpolates it, and the options it takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..interp import CHORD, CUBIC, Dense, hermite, linear, quadratic, quartic
from ..tableau import Tableau
from . import explicit as e
from . import implicit as i
from .options import OPTIONS


@dataclass(frozen=True, eq=False)
class Method:
    """A named method.

    ``order`` is that of the propagated solution, and the one step-size control uses. ``dense``
    is the continuous extension used between step ends. ``dense_overshoot`` replaces it where
    calls of ``func`` must be counted as torchdiffeq counts them. ``family`` says what takes a step:
    ``"explicit"`` Runge-Kutta methods evaluate their stages one after the other, ``"implicit"`` ones solve
    equations for them; ``"adams"`` methods use the slopes of the steps before, and their table is that of
    the first steps; ``"symplectic"`` methods move the two members of a state in turn, and their table is that
    of the second's slopes; ``"scipy"`` has steps, order and dense output of SciPy's. ``corrects`` tells the
    implicit Adams methods, which solve for the slope at the step's end.
    """

    name: str
    order: int
    tableau: Tableau | None
    dense: Dense | None
    dense_overshoot: Dense | None = None
    source: str = ""
    family: str = "explicit"
    corrects: bool = False

    @property
    def adaptive(self) -> bool:
        return self.family == "scipy" or self.tableau.b_err is not None

    @cached_property
    def cubic(self) -> Dense:
        """What ``interp="cubic"`` asks for."""
        return CUBIC if self.family in ("adams", "symplectic") else hermite(self.tableau)

    @cached_property
    def options(self) -> list[str]:
        """The names of the options that the method takes."""
        groups = {"adaptive" if self.adaptive else "fixed", self.family}
        if self.family == "scipy":
            groups = {self.family}  # step-size control is SciPy's
        return [name for name, option in OPTIONS.items() if groups.intersection(option.groups)]


def _implicit(name, order, tableau, source, dense=None) -> Method:
    return Method(name, order, tableau, dense or linear(tableau), source=source, family="implicit")


_TABLE = [
    Method("euler", 1, e.EULER, linear(e.EULER), source="Euler 1768"),
    Method("midpoint", 2, e.MIDPOINT, linear(e.MIDPOINT), source="Runge 1895"),
    Method("heun2", 2, e.HEUN2, linear(e.HEUN2), source="Heun 1900"),
    Method("heun3", 3, e.HEUN3, linear(e.HEUN3), source="Heun 1900"),
    Method("rk4", 4, e.RK38, linear(e.RK38), source="Kutta's 3/8 rule, 1901"),
    Method("fehlberg4", 4, e.FEHLBERG4, linear(e.FEHLBERG4), source="Fehlberg 1969"),
    Method("fehlberg5", 5, e.FEHLBERG5, linear(e.FEHLBERG5), source="Fehlberg 1969"),
    Method("explicit_adams", 4, e.RK38, CHORD, source="Adams, Bashforth 1883", family="adams"),
    Method("implicit_adams", 5, e.RK38, CHORD, source="Adams; Moulton 1926", family="adams", corrects=True),
    Method("fixed_adams", 5, e.RK38, CHORD, source="implicit_adams", family="adams", corrects=True),
    Method("leapfrog", 2, e.HEUN2, CHORD, source="Störmer 1907, Verlet 1967", family="symplectic"),
    Method("adaptive_heun", 2, e.ADAPTIVE_HEUN, quadratic(e.ADAPTIVE_HEUN), source="Heun 1900"),
    Method("fehlberg2", 2, e.FEHLBERG2, quadratic(e.FEHLBERG2), source="Fehlberg 1969"),
    Method("bosh3", 3, e.BOSH3, hermite(e.BOSH3), source="Bogacki, Shampine 1989"),
    Method("fehlberg45", 5, e.FEHLBERG45, e.FEHLBERG45_DENSE, source="Fehlberg 1969"),
    Method("dopri5", 5, e.DOPRI5, quartic(e.DOPRI5, e.DOPRI5_MID), source="Dormand, Prince 1980"),
    Method("tsit5", 5, e.TSIT5, e.TSIT5_DENSE, source="Tsitouras 2011"),
    Method("dopri8", 8, e.DOPRI8, e.DOPRI8_DENSE,
           dense_overshoot=quartic(e.DOPRI8, e.DOPRI8_MID), source="Prince, Dormand 1981"),
    Method("scipy_solver", 0, None, None, source="scipy.integrate", family="scipy"),
    _implicit("implicit_euler", 1, i.IMPLICIT_EULER, "Euler 1768"),
    _implicit("implicit_midpoint", 2, i.IMPLICIT_MIDPOINT, "Gauss's rule of one point"),
    _implicit("trapezoid", 2, i.TRAPEZOID, "Crank, Nicolson 1947"),
    _implicit("sdirk2", 2, i.SDIRK2, "Alexander 1977"),
    _implicit("trbdf2", 2, i.TRBDF2, "Bank et al. 1985; Hosea, Shampine 1996"),
    _implicit("gl4", 4, i.GL4, "Gauss's rule of two points; Kuntzmann 1961, Butcher 1964"),
    _implicit("gl6", 6, i.GL6, "Gauss's rule of three points; Kuntzmann 1961, Butcher 1964"),
    _implicit("radauIIA3", 3, i.RADAU_IIA3, "Ehle 1969"),
    _implicit("radauIIA5", 5, i.RADAU_IIA5, "Ehle 1969"),
    _implicit("kvaerno3", 3, i.KVAERNO3, "Kvaerno 2004", hermite(i.KVAERNO3)),
    _implicit("kvaerno5", 5, i.KVAERNO5, "Kvaerno 2004", i.KVAERNO5_DENSE),
]  # fmt: skip

METHODS = {method.name: method for method in _TABLE}
