"""What may be at work around a solve: torch.func, forward mode, compilation; and what it makes of a Tensor."""

from __future__ import annotations

import functools

import torch
from torch._C import _functorch
from torch._subclasses.fake_tensor import is_fake
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


def is_batch_of_gradients(x: torch.Tensor) -> bool:
    """Whether a backward pass is done for several gradients at once, as by ``is_grads_batched=True``."""
    return torch._C._dispatch_keys(x).has(torch._C._parse_dispatch_key("Batched"))


def require_readable(x: torch.Tensor, reader: str):
    """Refuses a Tensor that ``reader`` has to read, where torch.func.vmap keeps it from being read."""
    if is_batched(x):
        raise ArgumentError(
            f"torch.func.vmap gives {reader} a batch, which cannot be read; in place of vmap give y0 a leading batch "
            "dimension, and options={'batched': True} for steps of its own for every sample, or use a fixed-step "
            "method with the same t for all, such as 'rk4'"
        )


def has_no_values(x) -> bool:
    """Whether a Tensor is fake: shape, dtype and device alone, as torch.export and FakeTensorMode have it."""
    return type(x) not in (torch.Tensor, torch.nn.Parameter) and isinstance(x, torch.Tensor) and is_fake(x)


def records(y0) -> bool:
    """Whether operations on a state are recorded for a graph, and values are not there to be read."""
    # torch.compiler.is_compiling() would be true while another thread compiles.
    return torch.compiler.is_dynamo_compiling() or has_no_values(
        y0[0] if isinstance(y0, tuple) and y0 else y0
    )


def outside_graphs(function):
    """``function``, for which torch.compile ends one graph and begins another; with fullgraph=True it says
    what to do."""

    @functools.wraps(function)
    def called(*args, **kwargs):
        if torch.compiler.is_dynamo_compiling():
            from . import outside

            return outside.call(function, *args, **kwargs)
        return function(*args, **kwargs)

    return called
