"""The adjoint method: flashode's, and for solvers that a program put into `SOLVERS` one that calls those."""

import torch

import flashode
from flashode.adjoint.spec import collect_params
from flashode.events import Inquiry

from .misc import (
    _all_adjoint_callback_names,
    _all_callback_names,
    _check_inputs,
    _flat_to_shape,
    _mixed_norm,
    _rms_norm,
)
from .odeint import SOLVERS, _is_ours, odeint


def odeint_adjoint(
    func, y0, t, *, rtol=1e-7, atol=1e-9, method=None, options=None, event_fn=None,
    adjoint_rtol=None, adjoint_atol=None, adjoint_method=None, adjoint_options=None, adjoint_params=None,
):  # fmt: skip
    """`flashode.odeint_adjoint`; a method that the program put into `SOLVERS` is taken from there.

    parity: ``grad_fn.adjoint_options`` is the options of the backward solve, and may be changed until then.
    """
    forward = dict(rtol=rtol, atol=atol, method=method, options=options, event_fn=event_fn)
    backward = dict(
        adjoint_rtol=adjoint_rtol, adjoint_atol=adjoint_atol, adjoint_method=adjoint_method,
        adjoint_options=adjoint_options, adjoint_params=adjoint_params,
    )  # fmt: skip
    if not (_is_ours(method) and _is_ours(method if adjoint_method is None else adjoint_method)):
        return _by_registered_solver(func, y0, t, forward, backward)
    finds_event = event_fn is not None and isinstance(t, torch.Tensor) and t.shape == (2,)
    solve = _until_event if finds_event and not isinstance(event_fn, Inquiry) else flashode.odeint_adjoint
    result = solve(func, y0, t, **forward, **backward)
    _show_options(result if event_fn is None else result[1], y0, options, adjoint_options)
    return result


def _until_event(func, y0, t, **kwargs):
    """The state as at a fixed time, as torchdiffeq has it, and the event's time with its gradient.

    parity: programs call ``event_t.backward()``. torchdiffeq's own is zero there, which would mislead.
    """
    result = None

    def interface(*args, **kwargs):
        nonlocal result
        result = flashode.odeint_adjoint(*args, **kwargs)
        return result

    event_t, _ = flashode.odeint_event(
        func, y0, t[0], reverse_time=bool(t[0] > t[1]), odeint_interface=interface, **kwargs
    )
    return event_t, result[1]


# ---- the options of a backward solve, in view ------------------------------------------------


class _ShownOptions(dict):
    """What a backward solve is going to use; a norm that is put here takes effect."""

    def __init__(self, options, taken, shapes):
        super().__init__(options)
        self.taken, self.shapes = taken, shapes

    def __setitem__(self, name, value):
        super().__setitem__(name, value)
        if name == "norm" and self.shapes is not None:
            members = len(self.shapes)

            def norm(parts):
                flat = [torch.cat([x.reshape(-1) for x in parts[i : i + members]]) for i in (1, 1 + members)]
                return value((parts[0], *flat, *parts[1 + 2 * members :]))

            self.taken[name] = norm
        else:
            self.taken[name] = value


def _show_options(solution, y0, options, adjoint_options):
    if not isinstance(solution, (torch.Tensor, tuple)):  # a structure that torchdiffeq knows nothing of
        return
    node = (solution[0] if isinstance(solution, tuple) else solution).grad_fn
    while node is not None and not hasattr(
        node, "spec"
    ):  # a member of a tuple is a view of the flat solution
        node = node.next_functions[0][0] if node.next_functions else None
    if node is None:
        return
    shapes = None if isinstance(y0, torch.Tensor) else [member.shape for member in y0]
    shown = _inherited(options, adjoint_options)
    norm = (options or {}).get("norm", _rms_norm if shapes is None else _mixed_norm)
    handle_adjoint_norm_(
        shown, shapes, norm if shapes is None else lambda flat: norm(_flat_to_shape(flat, (), shapes))
    )
    node.adjoint_options = _ShownOptions(shown, node.spec.options, shapes)


def _inherited(options, adjoint_options) -> dict:
    if adjoint_options is not None:
        return dict(adjoint_options)
    return {name: value for name, value in (options or {}).items() if name != "norm"}


def handle_adjoint_norm_(adjoint_options, shapes, state_norm):
    """Puts the norm of the augmented state ``(t, y, adj_y, *adj_params)``, both y flat, into the options."""
    given = adjoint_options.get("norm")
    if callable(given):
        if shapes is not None:

            def norm(parts):
                t, y, adj_y, *adj_params = parts
                return given(
                    (t, *_flat_to_shape(y, (), shapes), *_flat_to_shape(adj_y, (), shapes), *adj_params)
                )

            adjoint_options["norm"] = norm
        return

    def norm(parts):
        t, y, adj_y, *adj_params = parts
        counted = [] if given == "seminorm" else adj_params
        return max(t.abs(), state_norm(y), state_norm(adj_y), _mixed_norm(counted))

    adjoint_options["norm"] = norm


# ---- by solvers that the program registered --------------------------------------------------


def find_parameters(module):
    """The parameters of a module, also of a replica that DataParallel made."""
    return list(collect_params(module, None))


def _by_registered_solver(func, y0, t, forward, backward):
    params = tuple(p for p in collect_params(func, backward["adjoint_params"]) if p.requires_grad)
    adjoint_options = _inherited(forward["options"], backward["adjoint_options"])
    shapes, func, y0, t, rtol, atol, method, options, event_fn, reverse = _check_inputs(
        func, y0, t, **forward, SOLVERS=SOLVERS
    )
    handle_adjoint_norm_(adjoint_options, shapes, options["norm"])
    adjoint_rtol, adjoint_atol, adjoint_method = (
        default if backward[name] is None else backward[name]
        for name, default in (
            ("adjoint_rtol", forward["rtol"]), ("adjoint_atol", forward["atol"]), ("adjoint_method", method),
        )
    )  # fmt: skip
    ans = OdeintAdjointMethod.apply(
        shapes, func, y0, t, rtol, atol, method, options, event_fn,
        adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options, t.requires_grad, *params,
    )  # fmt: skip
    solution = ans if event_fn is None else ans[1]
    if shapes is not None:
        solution = _flat_to_shape(solution, (len(t),), shapes)
    return solution if event_fn is None else (-ans[0] if reverse else ans[0], solution)


class OdeintAdjointMethod(torch.autograd.Function):
    """The continuous adjoint (Pontryagin 1962; Chen et al. 2018), solved from each output to the one before
    it by `odeint`, and so by any solver in `SOLVERS`. Its arguments are those that `_check_inputs` returns."""

    @staticmethod
    def forward(ctx, shapes, func, y0, t, rtol, atol, method, options, event_fn, adjoint_rtol, adjoint_atol,
                adjoint_method, adjoint_options, t_requires_grad, *adjoint_params):  # fmt: skip
        ctx.func, ctx.t_requires_grad, ctx.adjoint_options = func, t_requires_grad, adjoint_options
        ctx.adjoint_rtol, ctx.adjoint_atol, ctx.adjoint_method = adjoint_rtol, adjoint_atol, adjoint_method
        ctx.event_mode = event_fn is not None
        with torch.no_grad():
            ans = odeint(func, y0, t, rtol=rtol, atol=atol, method=method, options=options, event_fn=event_fn)
        if event_fn is None:
            ctx.save_for_backward(t, ans, *adjoint_params)
        else:
            event_t, ys = ans
            ctx.save_for_backward(torch.stack([t[0], event_t]), ys, *adjoint_params)
            ctx.mark_non_differentiable(event_t)
        return ans

    @staticmethod
    @torch.no_grad()
    def backward(ctx, *grads):
        grad_ys = grads[-1]
        t, ys, *params = ctx.saved_tensors
        adjoint = _augmented_dynamics(ctx.func, params, ctx.t_requires_grad)
        grad_t = torch.zeros_like(t)
        vjp_t, adj_y, adj_params = ys.new_zeros(()), grad_ys[-1], [torch.zeros_like(p) for p in params]
        for i in range(len(t) - 1, 0, -1):
            if ctx.t_requires_grad:
                # An output that is moved alone goes along the field.
                grad_t[i] = (ctx.func(t[i], ys[i]) * grad_ys[i]).sum()
                vjp_t = vjp_t - grad_t[i].to(vjp_t)
            augmented = odeint(
                adjoint, (vjp_t, ys[i], adj_y, *adj_params), t[i - 1 : i + 1].flip(0),
                rtol=ctx.adjoint_rtol, atol=ctx.adjoint_atol, method=ctx.adjoint_method,
                options=ctx.adjoint_options,
            )  # fmt: skip
            vjp_t, _, adj_y, *adj_params = (part[-1] for part in augmented)
            adj_y = adj_y + grad_ys[i - 1]
        if ctx.event_mode:
            grad_t = torch.zeros_like(t)  # the end is where the event is, whatever t says
        grad_t[0] = vjp_t
        return None, None, adj_y, grad_t if ctx.t_requires_grad else None, *[None] * 10, *adj_params


def _augmented_dynamics(func, params, t_requires_grad):
    """The field of ``(vjp_t, y, adj_y, *adj_params)``."""

    def field(t, augmented):
        _, y, adj_y, *_ = augmented
        with torch.enable_grad():
            t = t.detach().requires_grad_(t_requires_grad)
            y = y.detach().requires_grad_()
            slope = func(t, y)
            inputs = [y, *params, *([t] if t_requires_grad else [])]
            grads = (
                torch.autograd.grad(slope, inputs, -adj_y, allow_unused=True) if slope.requires_grad else ()
            )
        grads = [
            torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads or [None] * len(inputs))
        ]
        vjp_t = grads.pop() if t_requires_grad else torch.zeros_like(t)
        return (vjp_t, slope.detach(), *grads)

    for name, adjoint_name in zip(_all_callback_names, _all_adjoint_callback_names):
        callback = getattr(func, adjoint_name, None)
        if callback is not None:
            setattr(field, name, callback)
    return field
