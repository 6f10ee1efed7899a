"""The adaptive Heun solver and its tableau."""

from .rk_common import RKAdaptiveStepsizeODESolver, _middle, _tensors

_ADAPTIVE_HEUN_TABLEAU, _AH_C_MID = _tensors("adaptive_heun"), _middle("adaptive_heun")


class AdaptiveHeunSolver(RKAdaptiveStepsizeODESolver):
    method, order = "adaptive_heun", 2
    tableau, mid = _ADAPTIVE_HEUN_TABLEAU, _AH_C_MID
