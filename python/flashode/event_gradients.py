"""Gradients of an event's time and of the state there, by the implicit function theorem.

At the event ``c(t, y(t)) = 0``. Where parameters move ``y`` at a fixed time by ``dy``, and ``c`` itself
by ``dc``, the event moves by ``dt = -(dc + dc/dy dy) / (dc/dt + dc/dy f)`` and the state there by
``dy + f dt`` (Chen, Amos, Nickel, *Learning neural event functions for ordinary differential
equations*, 2021).
"""

from __future__ import annotations

import torch

from .errors import ArgumentError
from .events import Event, event_values
from .first_only import first_only
from .held import Held
from .problem import Problem
from .transforms import active


def attach(problem: Problem, events: tuple[Event, ...], index: int, event_t: torch.Tensor, ys):
    """``event_t`` and ``ys`` with all their gradients: to whatever moves the state, to the parameters of
    the event function, and to the start.

    Args:
        problem: its ``func`` is called once in a backward pass, and not here.
        index: number of the event that fired, as in `Solution.event_index`.
        event_t: 0-d Tensor; has a gradient where the last row of ``ys`` moves along.
        ys: Tensor of shape (2, *state), or a tuple of such, with gradients at a fixed time.
    """
    if not torch.is_grad_enabled():
        return event_t, ys
    if reason := active():
        raise ArgumentError(
            f"event times have gradients in backward passes only, and {reason}; use odeint, which holds the time"
        )
    members = ys if isinstance(ys, tuple) else (ys,)
    states = [member[-1] for member in members]
    value = _values(problem, events, event_t, states)[index]
    if not any(x.requires_grad for x in (event_t, value, *states)):
        return event_t, ys
    event_t, *states = _Crossing.apply(problem, events, index, event_t, value, *states)
    ys = tuple(torch.cat([m[:-1], state[None]]) for m, state in zip(members, states))
    return event_t, ys if problem.shapes is not None else ys[0]


def attach_foreign(func, y0, t, events: tuple[Event, ...], event_t, ys, args):
    """`attach` for what another library found, which knows of events as one function alone."""
    if any(event.direction or event.until is not None for event in events):
        raise ArgumentError(
            "odeint_interface is not flashode's, and does not know the direction and until of an Event; use "
            "flashode.odeint or flashode.odeint_adjoint"
        )
    problem = Problem.from_call(func, y0, t, 1e-7, 1e-9, None, None, None, args)
    with torch.no_grad():
        members = ys if isinstance(ys, tuple) else (ys,)
        start, end = (
            _values(problem, events, time, [member[row] for member in members])
            for row, time in enumerate((t[0], event_t))
        )
        # parity: the event nearest to changing the sign it had at the start.
        index = (end * start.sign()).argmin().item()
    return attach(problem, events, index, event_t, ys)


def _values(problem, events, t, states) -> torch.Tensor:
    """All that the event functions return, as one vector."""
    y = states[0] if problem.shapes is None else tuple(states)
    return torch.cat(event_values(events, t.to(states[0].device, problem.time_dtype), y))


class _Crossing(torch.autograd.Function):
    """Makes the time and the state, known at a fixed time, follow the event."""

    @staticmethod
    def forward(ctx, problem, events, index, t, value, *states):
        ctx.asked, ctx.held = (problem, events, index), Held(problem.func, *(event.fn for event in events))
        ctx.save_for_backward(value, t, *states)
        return t.clone(), *(state.clone() for state in states)

    @staticmethod
    def backward(ctx, grad_t, *grad_states):
        problem, _, _ = ctx.asked
        value, t, *states = ctx.saved_tensors
        with torch.no_grad(), ctx.held.in_place():
            slopes = _slopes(problem, t, states)
            by_t = grad_t.double().cpu() + sum(
                _products(g, f).sum().cpu() for g, f in zip(grad_states, slopes)
            )
            # A loss that leaves the event out may do so with an event that has no derivative.
            by_value = -by_t / _speed(*ctx.asked, t, states, slopes) if by_t else by_t
        grads = grad_t, by_value.to(value), *grad_states
        if torch.is_grad_enabled():
            grads = first_only(
                grads,
                (value, t, *states, grad_t, *grad_states),
                "event times and the states there have first derivatives only; for second ones of the state "
                "at a fixed time use odeint with event_fn, whose event time has no gradient",
            )
        return None, None, None, *grads


def _slopes(problem: Problem, t, states):
    """``func`` at the event, shaped as the state is."""
    t = t.to(states[0].device, problem.time_dtype)
    y = states[0].clone() if problem.shapes is None else tuple(state.clone() for state in states)
    slopes = problem.unflatten(problem.slope(problem.func(t, y, *problem.args)))
    return slopes if isinstance(slopes, tuple) else (slopes,)


def _speed(problem: Problem, events, index, t, states, slopes) -> torch.Tensor:
    """The total derivative of the event function in time."""
    with torch.enable_grad():
        t, *states = (x.detach().requires_grad_() for x in (t, *states))
        value = _values(problem, events, t, states)[index]
        if not value.requires_grad:
            raise ArgumentError(
                "the gradient of an event's time needs an event_fn that is differentiable in t or y; this one, such "
                "as a comparison, is not: return a difference in place of a bool, or use odeint with event_fn, which "
                "holds the time"
            )
        by_t, *by_states = torch.autograd.grad(value, (t, *states), allow_unused=True)
    terms = [] if by_t is None else [by_t.double().cpu().reshape(1)]
    for by_y, slope in zip(by_states, slopes):
        if by_y is not None:
            terms.append(_products(by_y, slope).cpu().reshape(-1))
    terms = torch.cat(terms)
    speed, eps = terms.sum(), torch.finfo(problem.time_dtype).eps
    if not speed.abs() > 4 * eps * terms.abs().sum():
        raise ArgumentError(
            f"event_fn has total derivative {speed.item():.3g} in time at the event, t={t.item()!r}: the solution only "
            "touches zero there (or event_fn is flat, or not finite), and the event's time has no gradient"
        )
    return speed


def _products(gradient, slope):
    """Elementwise, in double precision; gradients of complex numbers are conjugate, as torch's are."""
    wide = torch.complex128 if slope.is_complex() else torch.float64
    return (gradient.to(wide).conj() * slope.to(wide)).real
