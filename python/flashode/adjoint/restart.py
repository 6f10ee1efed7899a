"""The backward solve as torchdiffeq makes it: one solve of the augmented state for every interval
between outputs, each begun afresh."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..engines import ENGINES, choose
from ..problem import Problem
from ..progress import counted
from ..solution import finish
from ..vjp import vector_jacobian_products
from .reached import warn_unlisted
from .spec import AdjointSpec, Record, take_callbacks


def sweep(record: Record, grad_ys, moved):
    """From the last output back to the first: ``vjp_t`` (0 unless asked for), to the state and to
    the parameters. ``moved`` is the gradient of every output in its own time, or None."""
    problem, t, ys = record.problem, record.t, record.ys
    field = _AugmentedField(problem, record.params)
    vjp_t = torch.zeros((), dtype=ys.dtype, device=ys.device)
    adj_y, adj_params = grad_ys[-1], [torch.zeros_like(p) for p in record.params]
    with counted(len(t) - 1, record.spec.progress, f"{problem.method.name} backward") as solved_one:
        for i in range(len(t) - 1, 0, -1):
            if moved is not None:
                vjp_t = vjp_t - moved[i]  # moving every time does not move the outputs
            back = t[i - 1 : i + 1].flip(0)
            vjp_t, adj_y, adj_params = _solve_back(field, record.spec, back, vjp_t, ys[i], adj_y, adj_params)
            adj_y = adj_y + grad_ys[i - 1]
            solved_one()
    return vjp_t.real, adj_y, adj_params


class _AugmentedField:
    """The slope of ``(vjp_t, y, adj_y, *adj_params)``, with y and adj_y split like the state."""

    def __init__(self, problem: Problem, params):
        self.p, self.params = problem, list(params)
        self.members = 1 if problem.shapes is None else len(problem.shapes)
        self.examined = False
        take_callbacks(self, problem.func)

    def split(self, flat):
        """A flat state as a tuple of members, also where the caller's state is one tensor."""
        members = self.p.unflatten(flat)
        return members if isinstance(members, tuple) else (members,)

    def join(self, members):
        """The inverse of `split`."""
        return members[0] if self.p.shapes is None else torch.cat([m.reshape(-1) for m in members])

    def take_apart(self, augmented):
        """``vjp_t``, members of y, members of adj_y, adj_params."""
        m = self.members
        return augmented[0], augmented[1 : 1 + m], augmented[1 + m : 1 + 2 * m], augmented[1 + 2 * m :]

    def __call__(self, t, augmented):
        vjp_t, ys, adj_ys, _ = self.take_apart(augmented)
        # An implicit method differentiates this field, in turn, to solve for its stages.
        with_graph = any(x.requires_grad for x in augmented)
        with torch.enable_grad():
            # parity: vjp_t takes part in step-size control whether or not anyone wants it.
            t = t.detach().requires_grad_()
            ys = [y if with_graph and y.requires_grad else y.detach().requires_grad_() for y in ys]
            value = self.p.func(t, ys[0] if self.p.shapes is None else tuple(ys), *self.p.args)
            slopes = self.split(self.p.slope(value))
            inputs = [*ys, *self.params, t]
            if not self.examined:
                warn_unlisted(self.p.func, value, inputs)
                self.examined = True
            # A member of the slope that depends on none of the inputs has no graph.
            reached = [(s, -a) for s, a in zip(slopes, adj_ys) if s.requires_grad]
            grads = [None] * len(inputs)
            if reached:
                outputs, cotangents = zip(*reached)
                grads = vector_jacobian_products(outputs, inputs, cotangents, create_graph=with_graph)
        grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs)]
        slopes = slopes if with_graph else [s.detach() for s in slopes]
        return (grads.pop().to(vjp_t.dtype), *slopes, *grads)


def _solve_back(field: _AugmentedField, spec: AdjointSpec, t, vjp_t, y, adj_y, adj_params):
    """The augmented state carried from ``t[0]`` back to ``t[1]``."""
    state = (vjp_t, *field.split(y), *field.split(adj_y), *adj_params)
    rtol, atol = (_spread(tol, field, len(adj_params)) for tol in (spec.rtol, spec.atol))
    problem = Problem.from_call(field, state, t, rtol, atol, spec.method, spec.options, None)
    if spec.seminorm and problem.norm is None:
        problem = replace(problem, counted=1 + 2 * field.members)
    # A parameter of another dtype than the state's makes a tuple that the native engine leaves to the other.
    engine = choose(problem, "reference" if spec.engine == "reference" else "auto")
    solution = finish(problem, ENGINES[engine].solve(problem), engine, throw=True)
    vjp_t, _, adj_ys, adj_params = field.take_apart([member[-1] for member in solution.ys])
    return vjp_t, field.join(adj_ys), list(adj_params)


def _spread(tol, field: _AugmentedField, params: int):
    """A tolerance of the state as one of the augmented state; the least of it where it has no part."""
    per_member = isinstance(tol, (tuple, list)) or (isinstance(tol, torch.Tensor) and tol.numel() > 1)
    if not per_member:
        return tol
    if isinstance(tol, torch.Tensor):
        tol = (
            field.split(tol.expand(field.p.y0.shape))
            if field.p.shapes is None or tol.numel() == field.p.y0.numel()
            else tuple(tol)
        )
    if len(tol) != field.members:
        return tol  # given for the augmented state itself
    least = min(part.min().item() if isinstance(part, torch.Tensor) else part for part in tol)
    return (least, *tol, *tol, *([least] * params))
