"""The continuous adjoint.

With ``a(t) = dL/dy(t)``, the adjoint obeys ``da/dt = -a^T df/dy`` and accumulates
``dL/dp = -int a^T df/dp dt`` on the way back from the last output to the first (Chen, Rubanova,
Bettencourt, Duvenaud, *Neural Ordinary Differential Equations*, 2018, appendix B). The state is
rebuilt backwards along with it, so nothing of the forward solve is kept but its outputs.
"""

from __future__ import annotations

import torch

from . import restart
from .spec import Record


def gradients(record: Record, grad_ys: torch.Tensor, needs_t: bool):
    """To the state, to the times (None unless asked for) and to the parameters."""
    grad_t = None
    if needs_t:
        grad_t = _moved(record, grad_ys)
    vjp_t, adj_y, adj_params = restart.sweep(record, grad_ys, grad_t)
    if needs_t:
        grad_t[0] = vjp_t
        if record.problem.event_fn is not None:
            grad_t[1:] = 0  # the event found its own time
    return adj_y, grad_t, adj_params


def _moved(record: Record, grad_ys):
    """What moving each output alone along the field changes, but for the first."""
    problem, grad_t = record.problem, torch.zeros_like(record.t)
    for i in range(1, len(record.t)):
        t_i = record.t[i].to(record.ys.device, problem.time_dtype)
        slope = problem.slope(problem.func(t_i, problem.unflatten(record.ys[i].clone()), *problem.args))
        grad_t[i] = (slope * grad_ys[i].conj()).real.sum()
    return grad_t
