"""Gradients that cannot be differentiated again, and say so."""

from __future__ import annotations

import torch


def first_only(grads, origins, message: str):
    """Passes gradients on; differentiating them raises a RuntimeError with ``message``.

    Without it a second derivative would be taken for zero: these gradients have no graph.

    Args:
        origins: Tensors that they depend on, or None. From these autograd has to come upon this, or it would say that
            they are not in the graph.
    """
    origins = [x for x in origins if x is not None]
    return _FirstOnly.apply(message, len(origins), *origins, *grads)


class _FirstOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, message, origins, *tensors):
        ctx.message = message
        return tuple(None if g is None else g.clone() for g in tensors[origins:])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(ctx.message)
