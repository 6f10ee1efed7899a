"""The Dormand-Prince 5(4) solver and its tableau."""

from .rk_common import RKAdaptiveStepsizeODESolver, _middle, _tensors

_DORMAND_PRINCE_SHAMPINE_TABLEAU, DPS_C_MID = _tensors("dopri5"), _middle("dopri5")


class Dopri5Solver(RKAdaptiveStepsizeODESolver):
    method, order = "dopri5", 5
    tableau, mid = _DORMAND_PRINCE_SHAMPINE_TABLEAU, DPS_C_MID
