"""Norms, step-size formulas and the checked form of a call, as torchdiffeq's solver classes are given it."""

import warnings
from enum import Enum

import torch

from flashode.arguments import CALLBACKS, flat_state, forward_times, method_named
from flashode.control import Controller, first_guess, initial_step, next_step
from flashode.engines.reference import scaled_error
from flashode.errors import ArgumentError, ArgumentTypeError

from .event_handling import combine_event_functions

_all_callback_names = list(CALLBACKS)
_all_adjoint_callback_names = [name + "_adjoint" for name in CALLBACKS]


def _null_callback(*args, **kwargs):
    pass


def _handle_unused_kwargs(solver, unused_kwargs):
    if unused_kwargs:
        warnings.warn(f"{type(solver).__name__}: Unexpected arguments {unused_kwargs}")


# ---- norms -----------------------------------------------------------------------------------


def _rms_norm(tensor):
    return tensor.abs().square().mean().sqrt()


def _linf_norm(tensor):
    return tensor.abs().max()


def _zero_norm(tensor):
    return 0.0


def _mixed_norm(tensor_tuple):
    return max((_rms_norm(tensor) for tensor in tensor_tuple), default=0.0)


# ---- step-size control -----------------------------------------------------------------------


def _select_initial_step(func, t0, y0, order, rtol, atol, norm, f0=None):
    """``order`` is one below the method's."""
    f0 = func(t0, y0) if f0 is None else f0
    scale = atol + rtol * y0.abs()
    d0, d1 = (float(abs(norm(x / scale))) for x in (y0, f0))
    h0 = first_guess(d0, d1)
    f1 = func(t0 + h0, y0 + h0 * f0)
    d2 = float(abs(norm((f1 - f0) / scale))) / h0
    return torch.full_like(t0, initial_step(h0, d1, d2, order + 1))


def _compute_error_ratio(error_estimate, rtol, atol, y0, y1, norm):
    return abs(norm(scaled_error(error_estimate, y0, y1, rtol, atol)))


def _optimal_step_size(last_step, error_ratio, safety, ifactor, dfactor, order):
    control = Controller(order=order, safety=float(safety), ifactor=float(ifactor), dfactor=float(dfactor))
    return torch.full_like(last_step, next_step(float(error_ratio), float(last_step), control))


# ---- times -----------------------------------------------------------------------------------


def _decreasing(t):
    return (t[1:] < t[:-1]).all()


def _check_timelike(name, timelike, can_grad):
    forward_times(timelike, name)
    if timelike.requires_grad and not can_grad:
        raise ArgumentError(f"{name} cannot require gradient")


def _assert_increasing(name, t):
    if forward_times(t, name)[1] < 0:
        raise ArgumentError(f"{name} must be strictly increasing or decreasing")


def _flip_option(options, option_name):
    if isinstance(options.get(option_name), torch.Tensor):
        options[option_name] = -options[option_name]


class Perturb(Enum):
    """Which side of ``t`` a slope is asked for: at it, or at the representable time before or after it."""

    NONE = 0
    PREV = 1
    NEXT = 2


class _StitchGradient(torch.autograd.Function):
    """The value of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx, x1, out):
        return out.clone()

    @staticmethod
    def backward(ctx, grad_out):
        return grad_out, None


def _nextafter(x1, x2):
    return _StitchGradient.apply(x1, torch.nextafter(x1.detach(), x2.detach()))


# ---- fields ----------------------------------------------------------------------------------


def _flat_to_shape(tensor, length, shapes):
    """The members of a flat state, each with the leading dimensions ``length``."""
    sizes = [shape.numel() for shape in shapes]
    members = tensor.split([*sizes, tensor.shape[-1] - sum(sizes)], dim=-1)
    return tuple(member.reshape((*length, *shape)) for member, shape in zip(members, shapes))


def _tuple_tol(name, tol, shapes):
    """One tolerance per element of the flat state, from one per member."""
    if not isinstance(tol, (tuple, list)) and (not isinstance(tol, torch.Tensor) or tol.ndim == 0):
        return tol
    if len(tol) != len(shapes):
        raise ArgumentError(f"If using tupled {name} it must have the same length as the tuple y0")
    return torch.cat([torch.as_tensor(x).expand(shape.numel()) for x, shape in zip(tol, shapes)])


class _TupleInputOnlyFunc(torch.nn.Module):
    """``base_func`` of a tuple, called with the flat state."""

    def __init__(self, base_func, shapes):
        super().__init__()
        self.base_func, self.shapes = base_func, shapes

    def forward(self, t, y):
        return self.base_func(t, _flat_to_shape(y, (), self.shapes))


class _TupleFunc(_TupleInputOnlyFunc):
    """The same, and what it returns is made flat."""

    def forward(self, t, y):
        return torch.cat([slope.reshape(-1) for slope in super().forward(t, y)])


class _ReverseFunc(torch.nn.Module):
    """``mul * base_func`` on the negated clock."""

    def __init__(self, base_func, mul=1.0):
        super().__init__()
        self.base_func, self.mul = base_func, mul

    def forward(self, t, y):
        return self.mul * self.base_func(-t, y)


class _PerturbFunc(torch.nn.Module):
    """``base_func`` at ``t`` in the state's real dtype, or just beside it."""

    def __init__(self, base_func):
        super().__init__()
        self.base_func = base_func

    def forward(self, t, y, *, perturb=Perturb.NONE):
        if not isinstance(perturb, Perturb):
            raise ArgumentTypeError(f"perturb must be a Perturb, got {perturb!r}")
        t = (t.real if t.is_complex() else t).to(y.dtype.to_real())
        if perturb is not Perturb.NONE:
            t = _nextafter(t, t + (1 if perturb is Perturb.NEXT else -1))
        return self.base_func(t, y)


def _evaluate(func, t, y, perturb=Perturb.NONE):
    """``func(t, y)``, also where ``func`` knows nothing of ``perturb``, which few need."""
    return func(t, y) if perturb is Perturb.NONE else func(t, y, perturb=perturb)


def _field_of(func):
    """A field for flashode from one that `_check_inputs` made: without the callbacks that do nothing."""

    def field(t, y):
        return func(t, y)

    for name in _all_callback_names:
        callback = getattr(func, name, None)
        if callback not in (None, _null_callback):
            setattr(field, name, callback)
    return field


# ---- one call --------------------------------------------------------------------------------


def _check_inputs(func, y0, t, rtol, atol, method, options, event_fn, SOLVERS):
    """A call of `odeint` as solver classes take it: one tensor for the state, time going forwards.

    Returns ``(shapes, func, y0, t, rtol, atol, method, options, event_fn, t_is_reversed)``.
    """
    if event_fn is not None:
        if len(t) != 2:
            raise ArgumentError(
                f"We require len(t) == 2 when in event handling mode, but got len(t)={len(t)}."
            )
        event_fn = combine_event_functions(event_fn, t[0], y0)
    original, options = func, dict(options or {})
    method = "dopri5" if method is None else method
    if method not in SOLVERS:
        method_named(method)  # raises, unless it is a method that this table lacks
        raise ArgumentError(f'Invalid method "{method}". Must be one of {list(SOLVERS)}')
    y0, shapes, _ = flat_state(y0)
    norm = options.get("norm", _rms_norm if shapes is None else _mixed_norm)
    options["norm"] = norm if shapes is None else lambda flat: norm(_flat_to_shape(flat, (), shapes))
    if shapes is not None:
        rtol, atol = _tuple_tol("rtol", rtol, shapes), _tuple_tol("atol", atol, shapes)
        func = _TupleFunc(func, shapes)
        event_fn = None if event_fn is None else _TupleInputOnlyFunc(event_fn, shapes)
    for name, tol in (("rtol", rtol), ("atol", atol)):
        if isinstance(tol, torch.Tensor) and tol.requires_grad:
            raise ArgumentError(f"{name} cannot require gradient")
    t_is_reversed = forward_times(t, "t")[1] < 0
    if t_is_reversed:
        t = -t
        func = _ReverseFunc(func, mul=-1.0)
        event_fn = None if event_fn is None else _ReverseFunc(event_fn)
        constructor = options.get("grid_constructor")
        if constructor is not None:
            options["grid_constructor"] = lambda func, y0, t: -constructor(func, y0, -t)
        _flip_option(options, "step_t")
        _flip_option(options, "jump_t")
    if t.device != y0.device:
        warnings.warn("t is not on the same device as y0. Coercing to y0.device.")
        t = t.to(y0.device)
    func = _PerturbFunc(func)
    _take_callbacks(func, original, shapes, t_is_reversed, method, SOLVERS[method].valid_callbacks())
    return shapes, func, y0, t, rtol, atol, method, options, event_fn, t_is_reversed


def _take_callbacks(func, original, shapes, t_is_reversed, method, valid):
    """Gives the wrapped field the callbacks of the caller's, which see the caller's state and clock."""
    refused = set()
    for name in _all_callback_names:
        callback = getattr(original, name, _null_callback)
        if callback is _null_callback:
            setattr(func, name, _null_callback)
            continue
        if name not in valid:
            refused.add(name)

        def told(t0, y0, dt, callback=callback):
            y0 = y0 if shapes is None else _flat_to_shape(y0, (), shapes)
            return callback(-t0 if t_is_reversed else t0, y0, dt)

        setattr(func, name, told)
    for name in _all_adjoint_callback_names:
        if hasattr(original, name):
            setattr(func, name, getattr(original, name))
    if refused:
        warnings.warn(f"Solver '{method}' does not support callbacks {refused}")
