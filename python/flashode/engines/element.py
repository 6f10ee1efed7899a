"""The arithmetic of one element, in plain PyTorch: ``csrc/kernels/rk.h`` is the twin."""

from __future__ import annotations

import math

import torch


def wide(x):
    """16-bit tensors are computed in float32 and rounded once, at the end."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def combine(y0, k, coef):
    """``y0 + sum_j coef_j k_j``; the sum runs in the order of the stages, then ``y0`` is added."""
    total = weighted_sum(k, coef)
    return y0.clone() if total is None else (wide(y0) + total).to(y0.dtype)


def weighted_sum(k, coef):
    total = None
    for coef_j, k_j in zip(coef, k):
        if isinstance(coef_j, torch.Tensor) or coef_j != 0:
            term = coef_j * wide(k_j)
            total = term if total is None else total + term
    return total


def scaled_error(error, y0, y1, rtol, atol):
    """``error / (atol + rtol * max(|y0|, |y1|))``; NaN wherever ``y1`` is not finite."""
    y0, y1 = wide(y0), wide(y1)
    tolerance = atol + rtol * torch.maximum(y0.abs(), y1.abs())
    # y1 - y1 is 0 for finite values: an infinite y1 must not pass as a vanishing ratio.
    return error / tolerance + (y1 - y1)


def mean_square_norm(x, offsets):
    """Largest root mean square over the members of a flat state, summed in float64."""
    flat = x.reshape(-1).abs().double()
    members = [flat[begin:end] for begin, end in zip(offsets, offsets[1:]) if end > begin]
    norms = [m.square().mean().sqrt().item() for m in members]
    return math.nan if any(math.isnan(n) for n in norms) else max(norms, default=0.0)
