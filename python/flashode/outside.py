"""What torch.compile is not to trace; imported where it is at work only, for this loads it."""

import torch


@torch.compiler.disable(
    reason="flashode: this solve reads values that a graph cannot hold. Within fullgraph=True only odeint with a "
    "fixed-step method on the times t themselves can be traced: no step_size, grid_constructor, event_fn, "
    "callbacks or engine='native'. Otherwise leave out fullgraph=True, and compile the field alone: "
    "odeint(torch.compile(func), y0, t)"
)
def call(function, *args, **kwargs):
    """``function`` as it is, between two graphs."""
    return function(*args, **kwargs)
