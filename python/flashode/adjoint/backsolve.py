"""The continuous adjoint, solved backwards in time.

With ``a(t) = dL/dy(t)``, the adjoint obeys ``da/dt = -a^T df/dy`` and accumulates
``dL/dp = -int a^T df/dp dt`` on the way back from the last output to the first (Chen, Rubanova,
Bettencourt, Duvenaud, *Neural Ordinary Differential Equations*, 2018, appendix B). The state is
rebuilt backwards along with it, so nothing of the forward solve is kept but its outputs; or it is
read off the forward solve's dense output, where that was kept (``interpolated``).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import torch

from ..arguments import method_named
from ..augmented import Augmented, Gradients
from ..engines import ENGINES, SWEEPS, choose
from ..errors import GradientWarning
from ..options import even_grid
from ..problem import Problem
from ..progress import shown
from ..solution import backward_failure
from . import restart
from .once import first_time
from .reached import warn_unlisted
from .spec import Record, take_callbacks

# How far the rebuilt state may part from the stored one, in tolerances: both are solutions to tolerance,
# and where the gradients are right they part by less than a thousand (DETEST at 1e-6, networks); with
# loose tolerances a third of the state's own size is reached before that.
_DRIFT, _DRIFT_OF_STATE = 1e4, 0.3


def gradients(record: Record, grad_ys: torch.Tensor, needs_t: bool):
    """To the state, to the times (None unless asked for) and to the parameters."""
    if len(record.t) > 1 and record.t[0] == record.t[-1]:  # the event fired at the start
        grad_t = torch.zeros_like(record.t) if needs_t else None
        return grad_ys.sum(0), grad_t, [torch.zeros_like(p) for p in record.params]
    grad_t = _moved(record, grad_ys) if needs_t else None
    if record.steps is None and (record.spec.restart or _only_restart_serves(record)):
        vjp_t, adj_y, adj_params = restart.sweep(record, grad_ys, grad_t)
    else:
        augmented = _augmented(record, grad_ys, needs_t)
        with shown(augmented.problem, record.spec.progress, "backward") as watched:
            result = SWEEPS[_sweeper(record, augmented.problem)](replace(augmented, problem=watched))
        if not result.status.ok:
            raise backward_failure(augmented.problem, result)
        _warn_of_drift(augmented.problem, result)
        vjp_t, adj_y, adj_params = result.vjp_t, result.adj_y, result.adj_params
        if needs_t:
            vjp_t = vjp_t - grad_t.sum()  # moving every time does not move the outputs
    if needs_t:
        grad_t[0] = vjp_t
    return adj_y, grad_t, adj_params


def _moved(record: Record, grad_ys):
    """What moving each output alone along the field changes, but for the first."""
    problem, grad_t = record.problem, torch.zeros_like(record.t)
    for i in range(1, len(record.t)):
        t_i = record.t[i].to(record.ys.device, problem.time_dtype)
        slope = problem.slope(problem.func(t_i, problem.unflatten(record.ys[i].clone()), *problem.args))
        grad_t[i] = (slope * grad_ys[i].conj()).real.sum()
    return grad_t


def _only_restart_serves(record: Record) -> bool:
    """What is defined interval by interval: torchdiffeq's own steps, a grid of the caller's for
    each interval, tolerances for parts of the augmented state; and methods that the sweep, which
    transposes Runge-Kutta steps, has no steps of."""
    spec, shapes = record.spec, record.problem.shapes
    members = 1 if shapes is None else len(shapes)
    return (
        method_named(spec.method).family != "explicit"
        or bool(spec.options.get("overshoot"))
        or spec.options.get("grid_constructor") is not None
        or any(isinstance(tol, (tuple, list)) and len(tol) != members for tol in (spec.rtol, spec.atol))
    )


def _sweeper(record: Record, problem: Problem) -> str:
    """The engine of the forward solve, or another where it does not serve the backward method."""
    return record.engine if ENGINES[record.engine].supports(problem) is None else choose(problem, "auto")


class _Backwards:
    """The caller's field with the callbacks of the backward solve."""

    def __init__(self, func):
        self.func = func
        take_callbacks(self, func)

    def __call__(self, t, y, *args):
        return self.func(t, y, *args)


def _augmented(record: Record, grad_ys, needs_t: bool) -> Augmented:
    forward, spec, ys = record.problem, record.spec, record.ys
    options = {name: value for name, value in spec.options.items() if name != "overshoot"}
    y, t = forward.unflatten(ys[-1]), record.t.flip(0)
    problem = Problem.from_call(
        _Backwards(forward.func), y, t, spec.rtol, spec.atol, spec.method, options, None, forward.args
    )
    problem = replace(problem, func=forward.func)
    if not problem.adaptive and not problem.steps_on_times:
        problem = replace(problem, grid=_grid_through(problem))
    first_step = problem.first_step
    if first_step is None and problem.method is forward.method and math.isfinite(record.dt):
        first_step = record.dt  # step-size control goes on where the forward solve left it
    rows = grad_ys.reshape(len(grad_ys), -1)
    return Augmented(
        problem=problem,
        ys=ys,
        grad_ys=grad_ys.contiguous(),
        jumps=(rows != 0).any(1).flip(0).tolist(),
        params=record.params,
        needs_t=needs_t,
        seminorm=spec.seminorm and problem.norm is None,  # a norm of the caller's is given every part
        path=record.steps,
        first_step=first_step,
        examine=lambda value, y, t: warn_unlisted(forward.func, value, (y, t, *record.params)),
    )


def _grid_through(problem: Problem) -> torch.Tensor:
    """Steps of the given size from every output to the next."""
    clock = torch.tensor(problem.times, dtype=torch.float64, device="cpu")
    step_size = problem.control.max_step
    grids = [even_grid(clock[i : i + 2], problem.times[i : i + 2], step_size) for i in range(len(clock) - 1)]
    return torch.cat([clock[:1], *(grid[1:] for grid in grids)])


def _warn_of_drift(problem: Problem, result: Gradients):
    rtol = problem.rtol.max().item() if isinstance(problem.rtol, torch.Tensor) else problem.rtol
    small = result.drift <= _DRIFT and result.drift * rtol <= _DRIFT_OF_STATE
    if not small and first_time(problem.func, "drift"):
        warnings.warn(
            f"odeint_adjoint: at t={problem.direction * result.drift_t:g} the state rebuilt backwards is "
            f"{result.drift:.1e} tolerances away from the one the forward solve stored; the problem cannot be "
            "solved backwards this far, and the gradients may be wrong. Use adjoint='checkpoint', or odeint",
            GradientWarning,
        )
