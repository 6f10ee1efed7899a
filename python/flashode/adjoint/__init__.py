"""Gradients of a solve by a backward pass of our own in place of autograd's graph of every step.

``backsolve`` solves the continuous adjoint backwards in time, ``interpolated`` does so along the
dense output of the forward solve, and ``checkpoint`` replays the accepted steps.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..augmented import Path
from ..engines import ENGINES
from ..errors import ArgumentError
from ..first_only import first_only
from ..held import Held
from ..problem import Problem
from ..progress import shown
from ..solution import Solution, finish
from . import backsolve, checkpoint
from .apart import apart
from .spec import AdjointSpec, Record

_MODES = {"backsolve": backsolve, "interpolated": backsolve, "checkpoint": checkpoint}


def solve_with_adjoint(problem: Problem, spec: AdjointSpec, params: tuple, engine: str) -> Solution:
    """Solves ``problem`` with gradients to its state, its times and ``params`` by `spec`."""
    if engine == "compiled" and spec.mode != "backsolve":
        return _by_program(problem, spec, params)
    # The engine works on values alone; autograd sees one node with these inputs.
    grid = problem.grid
    inputs = problem.y0, problem.t, grid, *params
    values = replace(
        problem, y0=problem.y0.detach(), t=problem.t.detach(), grid=None if grid is None else grid.detach()
    )
    recording = None
    needed = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    if spec.mode == "checkpoint" and needed:
        recording = checkpoint.Recording(engine, spec.checkpoints)
    if spec.mode == "interpolated" and needed:
        recording = Path()
    result = []
    ys = _Adjoint.apply(values, spec, engine, recording, result, *inputs)
    (solution,) = result
    solution.ys = problem.unflatten(ys, batch=1)
    if problem.events and solution.stats.accepted == 0:
        solution.event_t = problem.t[0]
    return solution


def _by_program(problem: Problem, spec: AdjointSpec, params: tuple) -> Solution:
    """A solve whose program keeps its steps, and has another that goes back through them."""
    if spec.mode == "interpolated":
        raise ArgumentError(
            "adjoint='interpolated' needs dense output, which programs of compiled fields do not keep: take "
            "adjoint='checkpoint', which is exact"
        )
    if spec.checkpoints is not None:
        raise ArgumentError(
            f"checkpoints={spec.checkpoints} cannot be used with a compiled field: its program keeps all steps; solve "
            "with func itself where memory is short"
        )
    return finish(problem, ENGINES["compiled"].solve(problem, params=params), "compiled", throw=True)


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, problem, spec, engine, recording, result, y0, t, grid, *params):
        with shown(problem, spec.progress) as watched:
            outcome = ENGINES[engine].solve(watched, recording)
        solution = finish(problem, outcome, engine, throw=True)
        result.append(solution)
        ctx.problem, ctx.spec, ctx.engine = problem, spec, engine
        ctx.dt, ctx.recording, ctx.params = outcome.dt, recording, len(params)
        with torch.enable_grad():  # the graphs behind them, without their memory
            ctx.origins = [
                x.reshape(-1)[:0].clone() for x in (y0, t, grid) if x is not None and x.requires_grad
            ]
        ctx.autocast, ctx.held = _autocast(problem.y0.device.type), Held(problem.func)
        given, polynomials = [None, None, None], []
        if isinstance(recording, Path):
            polynomials = recording.release()
        elif recording is not None:
            recording.event_t = outcome.event_t
            # For second derivatives; what requires none may be written into.
            given = [x if x is not None and x.requires_grad else None for x in (y0, t, grid)]
        times = solution.ts.clone() if solution.ts.is_inference() else solution.ts  # those cannot be saved
        ctx.save_for_backward(times, outcome.ys, *given, *params, *polynomials)
        return outcome.ys

    @staticmethod
    def backward(ctx, grad_ys):
        t, ys, *saved = ctx.saved_tensors
        given, params, polynomials = saved[:3], saved[3 : 3 + ctx.params], saved[3 + ctx.params :]
        steps = ctx.recording
        if isinstance(steps, Path):
            steps = replace(steps, polynomials=polynomials)
        record = Record(ctx.problem, ctx.spec, t, ys, tuple(params), ctx.engine, ctx.dt, steps)
        mode, with_graph = _MODES[ctx.spec.mode], torch.is_grad_enabled()
        _require_finite_gradients(t, grad_ys)
        with torch.no_grad(), ctx.autocast(), ctx.held.in_place():
            if with_graph and mode is checkpoint:
                grads = checkpoint.differentiable_gradients(record, grad_ys, given)
            else:
                grads = mode.gradients(record, grad_ys, any(ctx.needs_input_grad[6:8]))
        # Only `checkpoint` differentiates the grid: to the others, t is the only time there is.
        adj_y, grad_t, adj_params, grad_grid = grads if mode is checkpoint else (*grads, None)
        if not (with_graph and mode is checkpoint):
            adj_params = apart(params, adj_params)
        grads = adj_y, grad_t, grad_grid, *adj_params
        if with_graph and mode is not checkpoint:
            grads = first_only(
                grads,
                (*ctx.origins, grad_ys, *params),
                "odeint_adjoint gives first derivatives only; for second ones (create_graph=True, gradient "
                "penalties) use odeint, which differentiates the solver's own steps",
            )
        return None, None, None, None, None, *grads


def _autocast(device_type: str):
    """Makes the context under which ``func`` ran: its dtypes must be the same in both passes."""
    enabled, cache = torch.is_autocast_enabled(device_type), torch.is_autocast_cache_enabled()
    dtype = torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype, enabled=enabled, cache_enabled=cache)


def _require_finite_gradients(t, grad_ys):
    """The backward solve starts from the gradients of the loss: nothing can be made of NaN."""
    bad = ~torch.isfinite(grad_ys)
    if bad.any():
        output = bad.reshape(len(bad), -1).any(1).nonzero()[-1].item()
        raise ArgumentError(
            f"the gradient of the loss with respect to the outputs of odeint_adjoint holds {int(bad.sum())} "
            f"non-finite values, the last at output {output} "
            f"(t={t[output].item():g}); look for the cause in the loss"
        )
