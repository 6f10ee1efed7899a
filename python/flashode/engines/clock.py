"""Times as a field sees them: ``csrc/kernels/clock.h`` is the twin."""

from __future__ import annotations

import math

import torch

from ..problem import Problem


def stage_time(p: Problem, t, shift=None, nudge=0):
    """The 0-d tensor that func sees, rounded once and kept inside the interval."""
    low, high = p.time_bounds
    x = torch.tensor(t, dtype=p.time_dtype, device="cpu")
    if nudge:
        x = torch.nextafter(x, torch.full_like(x, nudge * math.inf))
    x = (p.direction * x.clamp(low, high)).to(p.y0.device)
    return x if shift is None else x + (p.direction * shift).to(x)
