"""The Prince-Dormand 8(7) solver and its tableau."""

from .rk_common import RKAdaptiveStepsizeODESolver, _middle, _tensors

_DOPRI8_TABLEAU, _C_mid = _tensors("dopri8"), _middle("dopri8")


class Dopri8Solver(RKAdaptiveStepsizeODESolver):
    method, order = "dopri8", 8
    tableau, mid = _DOPRI8_TABLEAU, _C_mid
