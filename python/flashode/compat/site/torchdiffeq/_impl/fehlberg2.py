"""The Fehlberg 1(2) solver and its tableau."""

from .rk_common import RKAdaptiveStepsizeODESolver, _middle, _tensors

_FEHLBERG2_TABLEAU, _FE_C_MID = _tensors("fehlberg2"), _middle("fehlberg2")


class Fehlberg2(RKAdaptiveStepsizeODESolver):
    method, order = "fehlberg2", 2
    tableau, mid = _FEHLBERG2_TABLEAU, _FE_C_MID
