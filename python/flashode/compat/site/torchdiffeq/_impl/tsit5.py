"""The Tsitouras 5(4) solver and its tableau."""

from .rk_common import RKAdaptiveStepsizeODESolver, _middle, _tensors

_TSITOURAS_TABLEAU, _TS_C_MID = _tensors("tsit5"), _middle("tsit5")


class Tsit5Solver(RKAdaptiveStepsizeODESolver):
    method, order = "tsit5", 5
    tableau, mid = _TSITOURAS_TABLEAU, _TS_C_MID
