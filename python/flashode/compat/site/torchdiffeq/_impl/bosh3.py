"""The Bogacki-Shampine 3(2) solver and its tableau."""

from .rk_common import RKAdaptiveStepsizeODESolver, _middle, _tensors

_BOGACKI_SHAMPINE_TABLEAU, _BS_C_MID = _tensors("bosh3"), _middle("bosh3")


class Bosh3Solver(RKAdaptiveStepsizeODESolver):
    method, order = "bosh3", 3
    tableau, mid = _BOGACKI_SHAMPINE_TABLEAU, _BS_C_MID
