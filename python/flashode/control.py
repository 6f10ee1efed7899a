"""Step-size control as pure functions of floats; ``csrc/kernels/control.h`` is the twin."""

from __future__ import annotations

import math
from dataclasses import dataclass

ELEMENTARY = (1.0, 0.0, 0.0)


@dataclass(frozen=True)
class Controller:
    """Bounds and constants of step-size control (Hairer, Nørsett, Wanner I, II.4).

    ``order`` is the method's order; all sizes are positive and in units of ``t``. ``betas`` are the
    exponents, in units of ``1/order``, of the error ratios of this step and the two accepted before it
    (Söderlind, *Digital filters in adaptive time-stepping*, ACM TOMS 29, 2003); ``ELEMENTARY``, the
    default, looks at this step alone. ``predictive`` adds `predicted_step`.
    """

    order: int
    safety: float = 0.9
    ifactor: float = 10.0
    dfactor: float = 0.2
    min_step: float = 0.0
    max_step: float = math.inf
    betas: tuple[float, float, float] = ELEMENTARY
    predictive: bool = False


def first_guess(d0: float, d1: float) -> float:
    """Length of the Euler step that probes the field (Hairer I, II.4, steps a and b).

    ``d0`` and ``d1`` are the norms of ``y0`` and ``f0`` scaled by the tolerance.
    """
    return 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1


def initial_step(h0: float, d1: float, d2: float, order: int) -> float:
    """First step from the probe (Hairer I, II.4, steps e and f); ``d2 = norm(f1 - f0) / h0``."""
    if not math.isfinite(d2):
        # The probe left the domain of the field: start no longer than the probe.
        return h0
    if d1 <= 1e-15 and d2 <= 1e-15:
        h1 = max(1e-6, h0 * 1e-3)
    else:
        # parity: torchdiffeq takes 1/order here, Hairer 1/(order + 1).
        h1 = (0.01 / max(d1, d2)) ** (1.0 / order)
    return min(100 * h0, h1)


def accept(error_ratio: float, dt: float, control: Controller) -> bool:
    """A step stands when its error is within tolerance, or when it may not be made smaller."""
    if not math.isfinite(error_ratio):
        return False
    return error_ratio <= 1 or dt <= control.min_step


def next_step(error_ratio: float, dt: float, control: Controller, past=(1.0, 1.0)) -> float:
    """Size of the next trial: ``dt * safety * error_ratio**(-1/order)`` within bounds, times powers of
    the ratios of the last two accepted steps, ``past``, where the controller remembers them."""
    if error_ratio == 0:
        factor = control.ifactor
    elif not math.isfinite(error_ratio):
        factor = control.dfactor
    elif control.betas == ELEMENTARY or error_ratio > 1:
        # An accepted step never shrinks the next one. What was refused is no part of the history that a
        # filter smooths.
        least = 1.0 if error_ratio < 1 else control.dfactor
        factor = min(control.ifactor, max(control.safety / error_ratio ** (1.0 / control.order), least))
    else:
        b1, b2, b3 = control.betas
        filtered = error_ratio**b1 * past[0] ** b2 * past[1] ** b3
        factor = control.safety / filtered ** (1.0 / control.order)
        factor = min(control.ifactor, max(factor, control.dfactor))
    return clamp_step(dt * factor, control)


def predicted_step(error_ratio: float, dt: float, control: Controller, past_ratio: float, past_dt: float):
    """Most that the next step may be if the error goes on to grow as it did from the last accepted step to
    this one (Gustafsson; Hairer and Wanner II, IV.8): stiff problems grow harder over many steps, and where
    stages cost an iteration each, a refused step is dear."""
    if not error_ratio > 0:
        return math.inf
    growth = (max(past_ratio, 0.01) / error_ratio) ** (1.0 / control.order) * dt / past_dt
    factor = control.safety / error_ratio ** (1.0 / control.order) * growth
    return clamp_step(dt * max(factor, control.dfactor), control)


def remember(error_ratio: float, control: Controller, past):
    """The history after an accepted step. Ratios that ask for more than ``ifactor`` count as one that asks
    for it: a step that was shortened to land on a time has next to no error, and says nothing."""
    least = (control.safety / control.ifactor) ** control.order
    return max(error_ratio, least), past[0]


def clamp_step(dt: float, control: Controller) -> float:
    return min(max(dt, control.min_step), control.max_step)
