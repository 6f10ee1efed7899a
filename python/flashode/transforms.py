"""Forward-mode differentiation and torch.func: whether they are at work, and what they make of a Tensor."""

from __future__ import annotations

import torch
from torch._C import _functorch
from torch.autograd import forward_ad

from .errors import ArgumentError


def active() -> str | None:
    """What is at work that sees operations of torch only, or None."""
    if _functorch.maybe_current_level() is not None:
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "a level of forward-mode differentiation is active"
    return None


def is_batched(x: torch.Tensor) -> bool:
    """Whether torch.func.vmap made ``x`` of several Tensors: nothing in it can be read."""
    while _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_batchedtensor(x):
            return True
        x = _functorch.get_unwrapped(x)
    return False


def require_readable(x: torch.Tensor, reader: str):
    """Refuses a Tensor that ``reader`` has to read, where torch.func.vmap keeps it from being read."""
    if is_batched(x):
        raise ArgumentError(
            f"torch.func.vmap gives {reader} a batch, which cannot be read; give y0 a leading batch "
            "dimension instead of vmap, or use a fixed-step method with the same t for all, such as 'rk4'"
        )
