"""Gradients of a solve by a second solve, backwards in time: the continuous adjoint.

With ``a(t) = dL/dy(t)``, the adjoint obeys ``da/dt = -a^T df/dy`` and accumulates
``dL/dp = -int a^T df/dp dt`` on the way back from the last output to the first (Chen, Rubanova,
Bettencourt, Duvenaud, *Neural Ordinary Differential Equations*, 2018, appendix B). The state is
rebuilt backwards along with it, so nothing of the forward solve is kept but its outputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from . import arguments
from .arguments import CALLBACKS
from .engines import ENGINES, choose
from .errors import ArgumentError, ArgumentTypeError
from .problem import Problem
from .solution import Solution, finish


@dataclass(frozen=True)
class AdjointSpec:
    """How to solve backwards: the keyword arguments of the inner solves."""

    rtol: object
    atol: object
    method: str
    options: dict
    seminorm: bool
    engine: str


def solve_with_adjoint(
    problem: Problem, spec: AdjointSpec, params: tuple, engine: str
) -> tuple[Solution, torch.Tensor | None]:
    """Solves ``problem`` with gradients to its state, its times and ``params`` by `spec`."""
    # The engine works on values alone; autograd sees one node with these inputs.
    values = replace(problem, y0=problem.y0.detach(), t=problem.t.detach())
    record = {}
    ys, event_t = _Adjoint.apply(values, spec, engine, record, problem.y0, problem.t, *params)
    solution = record["solution"]
    solution.ys = problem.unflatten(ys, batch=1)
    return solution, (event_t if problem.event_fn is not None else None)


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, problem, spec, engine, record, y0, t, *params):
        outcome = ENGINES[engine].solve(problem)
        record["solution"] = finish(problem, outcome, engine, throw=True)
        ctx.problem, ctx.spec = problem, spec
        event_t = problem.t.new_tensor(problem.direction * outcome.event_t)
        times = problem.t if problem.event_fn is None else torch.stack([problem.t[0], event_t])
        ctx.save_for_backward(times, outcome.ys, *params)
        ctx.mark_non_differentiable(event_t)
        return outcome.ys, event_t

    @staticmethod
    def backward(ctx, grad_ys, _):
        with torch.no_grad():
            grads = _Adjoint.gradients(ctx, grad_ys)
        if torch.is_grad_enabled():
            grads = _FirstOnly.apply(torch.zeros((), requires_grad=True), *grads)
        return None, None, None, None, *grads

    @staticmethod
    def gradients(ctx, grad_ys):
        """To the state, the times and the parameters."""
        problem, spec = ctx.problem, ctx.spec
        t, ys, *params = ctx.saved_tensors
        _require_finite_gradients(t, grad_ys)
        needs_t = ctx.needs_input_grad[5]
        field = _AugmentedField(problem, params, needs_t)
        grad_t = torch.zeros_like(t)
        vjp_t = torch.zeros((), dtype=ys.dtype, device=ys.device)
        adj_y, adj_params = grad_ys[-1], [torch.zeros_like(p) for p in params]
        for i in range(len(t) - 1, 0, -1):
            if needs_t:
                # Moving output i alone moves it along the field; moving every time does not.
                value = problem.func(t[i].to(ys.device, problem.time_dtype), problem.unflatten(ys[i].clone()))
                moved = (problem.slope(value) * grad_ys[i].conj()).real.sum()
                grad_t[i] = moved
                vjp_t = vjp_t - moved
            back = t[i - 1 : i + 1].flip(0)
            vjp_t, adj_y, adj_params = _solve_back(field, spec, back, vjp_t, ys[i], adj_y, adj_params)
            adj_y = adj_y + grad_ys[i - 1]
        if needs_t:
            grad_t[0] = vjp_t.real
            if problem.event_fn is not None:
                grad_t[1:] = 0  # the event found its own time
        return adj_y, grad_t if needs_t else None, *adj_params


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


class _FirstOnly(torch.autograd.Function):
    """Passes gradients on, and refuses to be differentiated.

    Without it a second derivative would be taken for zero: these gradients have no graph.
    """

    @staticmethod
    def forward(ctx, anchor, *grads):
        return tuple(None if g is None else g.clone() for g in grads)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "odeint_adjoint gives first derivatives only; for second ones (create_graph=True, gradient "
            "penalties) use odeint, which differentiates the solver's own steps"
        )


class _AugmentedField:
    """The slope of ``(vjp_t, y, adj_y, *adj_params)``, with y and adj_y split like the state."""

    def __init__(self, problem: Problem, params, needs_t: bool):
        self.p, self.params, self.needs_t = problem, list(params), needs_t
        self.members = 1 if problem.shapes is None else len(problem.shapes)
        for name in CALLBACKS:
            callback = getattr(problem.func, name + "_adjoint", None)
            if callback is not None:
                setattr(self, name, callback)

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
        with torch.enable_grad():
            t = t.detach().requires_grad_(self.needs_t)
            ys = [y.detach().requires_grad_() for y in ys]
            value = self.p.func(t, ys[0] if self.p.shapes is None else tuple(ys))
            slopes = self.split(self.p.slope(value))
            inputs = [*ys, *self.params] + ([t] if self.needs_t else [])
            # A member of the slope that depends on none of the inputs has no graph.
            reached = [(s, -a) for s, a in zip(slopes, adj_ys) if s.requires_grad]
            grads = [None] * len(inputs)
            if reached:
                outputs, cotangents = zip(*reached)
                grads = torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)
        grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs)]
        vjp_t = grads.pop().to(vjp_t.dtype) if self.needs_t else torch.zeros_like(vjp_t)
        return (vjp_t, *(s.detach() for s in slopes), *grads)


def _solve_back(field: _AugmentedField, spec: AdjointSpec, t, vjp_t, y, adj_y, adj_params):
    """The augmented state carried from ``t[0]`` back to ``t[1]``."""
    state = (vjp_t, *field.split(y), *field.split(adj_y), *adj_params)
    rtol, atol = (_spread(tol, field, len(adj_params)) for tol in (spec.rtol, spec.atol))
    problem = Problem.from_call(field, state, t, rtol, atol, spec.method, spec.options, None)
    if spec.seminorm:
        problem = replace(problem, counted=1 + 2 * field.members)
    engine = choose(problem, spec.engine)
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
    least = min(torch.as_tensor(part).min().item() for part in tol)
    return (least, *tol, *tol, *([least] * params))


def make_spec(
    problem: Problem,
    func_options,
    rtol,
    atol,
    method,
    adjoint_rtol,
    adjoint_atol,
    adjoint_method,
    adjoint_options,
    engine,
) -> AdjointSpec:
    """Defaults of the backward solve, as torchdiffeq has them: those of the forward solve, but for
    the norm, which covers all parts of the augmented state."""
    if (
        adjoint_method is not None
        and adjoint_method != method
        and func_options is not None
        and adjoint_options is None
    ):
        raise ArgumentError(
            "If `adjoint_method != method` then we cannot infer `adjoint_options` from `options`. So as "
            "`options` has been passed then `adjoint_options` must be passed as well."
        )
    if adjoint_options is None:
        adjoint_options = {k: v for k, v in (func_options or {}).items() if k != "norm"}
    options = dict(adjoint_options)
    norm = options.pop("norm", None)
    if isinstance(norm, str) and norm != "seminorm":
        raise ArgumentError(f"adjoint_options['norm'] must be callable or 'seminorm', got {norm!r}")
    seminorm = norm == "seminorm"
    check_backward(adjoint_rtol, adjoint_atol, method if adjoint_method is None else adjoint_method, options)
    if problem.norm is not None and (norm is None or seminorm):
        norm = _norm_around(problem, counts_params=not seminorm)
        seminorm = False
    if callable(norm):
        options["norm"] = norm
    return AdjointSpec(
        rtol=rtol if adjoint_rtol is None else adjoint_rtol,
        atol=atol if adjoint_atol is None else adjoint_atol,
        method=method if adjoint_method is None else adjoint_method,
        options=options,
        seminorm=seminorm,
        engine=engine,
    )


def check_backward(rtol, atol, method, options):
    """Refuses now what would otherwise fail in the backward pass, far from the call at fault."""
    chosen = arguments.method_named(method, "adjoint_method")
    for name, value in (("adjoint_rtol", rtol), ("adjoint_atol", atol)):
        for part in value if isinstance(value, (tuple, list)) else [value]:
            if part is not None:
                arguments.check_tolerance(name, part)
    if chosen.adaptive:
        known = {k: v for k, v in options.items() if k in arguments.ADAPTIVE_OPTIONS}
        arguments.adaptive_fields(known, chosen, 0.0, 1.0)


def _norm_around(problem: Problem, counts_params: bool):
    """The augmented state's norm where the caller measures the state by a norm of their own."""
    members = 1 if problem.shapes is None else len(problem.shapes)

    def norm(augmented):
        t, rest = augmented[0], augmented[1:]
        parts = [abs(t).item()]
        for part in (rest[:members], rest[members : 2 * members]):
            parts.append(float(abs(problem.norm(part[0] if problem.shapes is None else tuple(part)))))
        if counts_params:
            parts += [p.abs().square().mean().sqrt().item() for p in rest[2 * members :] if p.numel()]
        return max(parts)

    return norm


def collect_params(func, adjoint_params) -> tuple[torch.Tensor, ...]:
    """The tensors that get a gradient, each once.

    Raises ArgumentError when ``func`` is not a Module and no parameters are given.
    """
    if adjoint_params is None:
        if not isinstance(func, torch.nn.Module):
            raise ArgumentError(
                "func must be an instance of nn.Module to specify the adjoint parameters; alternatively they "
                "can be specified explicitly via the `adjoint_params` argument. If there are no parameters "
                "then it is allowable to set `adjoint_params=()`."
            )
        adjoint_params = _module_params(func)
    elif isinstance(adjoint_params, torch.Tensor):
        adjoint_params = (adjoint_params,)
    elif not isinstance(adjoint_params, Iterable):
        raise ArgumentTypeError(f"adjoint_params must be Tensors, got {type(adjoint_params).__name__}")
    unique = {}
    for i, p in enumerate(adjoint_params):
        if not isinstance(p, torch.Tensor):
            raise ArgumentTypeError(f"adjoint_params[{i}] must be a Tensor, got {type(p).__name__}")
        if p.requires_grad:
            unique.setdefault(id(p), p)
    return tuple(unique.values())


def _module_params(module):
    # The parameters of a DataParallel replica are plain attributes.
    if getattr(module, "_is_replica", False):

        def tensors(m):
            return [(k, v) for k, v in m.__dict__.items() if torch.is_tensor(v) and v.requires_grad]

        return [p for _, p in module._named_members(get_members_fn=tensors)]
    return list(module.parameters())
