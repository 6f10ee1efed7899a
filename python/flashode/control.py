"""Step-size control as pure functions of floats; ``csrc/kernels/control.h`` is the twin."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Controller:
    """Bounds and constants of the elementary controller (Hairer, Nørsett, Wanner I, II.4).

    ``order`` is the method's order; all sizes are positive and in units of ``t``.
    """

    order: int
    safety: float = 0.9
    ifactor: float = 10.0
    dfactor: float = 0.2
    min_step: float = 0.0
    max_step: float = math.inf


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


def next_step(error_ratio: float, dt: float, control: Controller) -> float:
    """Size of the next trial: ``dt * safety * error_ratio**(-1/order)`` within bounds."""
    if error_ratio == 0:
        factor = control.ifactor
    elif not math.isfinite(error_ratio):
        factor = control.dfactor
    else:
        # An accepted step never shrinks the next one.
        least = 1.0 if error_ratio < 1 else control.dfactor
        factor = min(control.ifactor, max(control.safety / error_ratio ** (1.0 / control.order), least))
    return clamp_step(dt * factor, control)


def clamp_step(dt: float, control: Controller) -> float:
    return min(max(dt, control.min_step), control.max_step)
