"""Gradients that cannot be differentiated again, and say so."""

from __future__ import annotations

import torch


def first_only(grads, message: str):
    """Passes gradients on; differentiating them raises a RuntimeError with ``message``.

    Without it a second derivative would be taken for zero: these gradients have no graph.
    """
    return _FirstOnly.apply(torch.zeros((), device="cpu", requires_grad=True), message, *grads)


class _FirstOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, message, *grads):
        ctx.message = message
        return tuple(None if g is None else g.clone() for g in grads)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(ctx.message)
