"""Gradients of the time of an event and of the state there: to the state, the times, and all parameters."""

import functools
import gc
import math
import weakref

import pytest
import torch
import torchdiffeq
from problems import BACKWARD, FORWARD, START, Counted, G, f64, fall, height, landing

import flashode
from flashode import ArgumentError, Event, odeint_event, solve

F64 = torch.float64
ADJOINTS = ["backsolve", "interpolated", "checkpoint"]


class Drag(torch.nn.Module):
    """A ball in a wind that depends on time; tuple states too."""

    def __init__(self, dtype=F64):
        super().__init__()
        self.g = torch.nn.Parameter(torch.tensor(G, dtype=dtype))

    def forward(self, t, y):
        x, v = y if isinstance(y, tuple) else y.unbind()
        slope = v, -self.g - 0.2 * v - 0.01 * v**2 + 0.3 * t
        return slope if isinstance(y, tuple) else torch.stack(slope)


class Surface(torch.nn.Module):
    """A moving ground."""

    def __init__(self, dtype=F64):
        super().__init__()
        self.h = torch.nn.Parameter(torch.tensor(0.3, dtype=dtype))

    def forward(self, t, y):
        return y[0] - self.h * (1 + 0.1 * t)


INTERFACES = {
    "direct": flashode.odeint,
    **{name: functools.partial(flashode.odeint_adjoint, adjoint=name) for name in ADJOINTS},
    "lambda": lambda *args, **more: flashode.odeint(*args, **more),
    "torchdiffeq": torchdiffeq.odeint,
    "torchdiffeq's adjoint": torchdiffeq.odeint_adjoint,
}


class Throw:
    """A ball and a ground with everything in it that takes gradients, and a loss of the time and the state."""

    def __init__(self, dtype=F64, split=False):
        self.field, self.surface, self.split = Drag(dtype), Surface(dtype), split
        self.t0 = torch.tensor(0.2, dtype=dtype, requires_grad=True)
        self.y0 = torch.tensor([2.0, 1.0], dtype=dtype, requires_grad=True)
        self.inputs = [self.t0, self.y0, self.field.g, self.surface.h]

    def loss(self, interface=flashode.odeint, reverse_time=False, event=None, **more):
        y0 = tuple(self.y0.unbind()) if self.split else self.y0
        event_t, ys = odeint_event(
            self.field, y0, self.t0, event_fn=event or self.surface, reverse_time=reverse_time,
            odeint_interface=interface, **{"rtol": 1e-10, "atol": 1e-12, **more},
        )  # fmt: skip
        x, v = ys if self.split else ys.unbind(1)
        assert x.shape == (2,)
        return 1.7 * event_t + 1.3 * x[-1] - 0.4 * v[-1] + 0.1 * (x[0] - v[0])

    def grads(self, *args, **more):
        return torch.autograd.grad(self.loss(*args, **more), self.inputs)


@functools.cache
@torch.no_grad()
def differences(reverse_time=False):
    """Central differences of `Throw.loss` in every input."""
    throw, found = Throw(), []
    for x in throw.inputs:
        flat, grad = x.view(-1), torch.zeros_like(x)
        for i in range(len(flat)):
            value, losses = flat[i].item(), []
            for moved in (value - 1e-5, value + 1e-5):
                flat[i] = moved
                losses.append(throw.loss(reverse_time=reverse_time).item())
            flat[i] = value
            grad.view(-1)[i] = (losses[1] - losses[0]) / 2e-5
        found.append(grad)
    return found


@pytest.mark.parametrize("reverse_time", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("split", [False, True], ids=["tensor", "tuple"])
def test_gradients_are_the_limits_of_differences(reverse_time, split):
    """To the start, the state, and the parameters of the field and of the event."""
    throw, expected = Throw(split=split), differences(reverse_time)
    for interface in INTERFACES.values():
        if split and interface is torchdiffeq.odeint_adjoint:
            continue  # fails on tuples with 0-d members
        for ours, theirs in zip(throw.grads(interface, reverse_time), expected):
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("library", [torchdiffeq, flashode], ids=["theirs", "ours"])
def test_gradients_agree_with_torchdiffeq(library):
    """But for the event's own parameters, to which torchdiffeq gives none."""
    throw = Throw()
    arguments = {"event_fn": throw.surface, "rtol": 1e-10, "atol": 1e-12}
    event_t, ys = torchdiffeq.odeint_event(throw.field, throw.y0, throw.t0, **arguments)
    loss = 1.7 * event_t + 1.3 * ys[-1, 0] - 0.4 * ys[-1, 1] + 0.1 * (ys[0, 0] - ys[0, 1])
    expected = torch.autograd.grad(loss, throw.inputs, allow_unused=True)
    assert expected[3] is None
    for ours, theirs in zip(throw.grads(library.odeint), expected[:3]):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method, options", [("dopri8", {}), ("rk4", {"step_size": 0.01, "interp": "cubic"})])
@pytest.mark.parametrize("name", ["direct", "backsolve", "checkpoint"])
def test_gradients_of_other_methods(name, method, options):
    grads = Throw().grads(INTERFACES[name], method=method, options=options, rtol=1e-8, atol=1e-9)
    for ours, theirs in zip(grads, differences()):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["direct", *ADJOINTS])
def test_gradients_in_single_precision(name):
    grads = Throw(torch.float32).grads(INTERFACES[name], rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(grads, differences()):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["direct", *ADJOINTS])
def test_several_events_with_directions_and_an_end(name):
    throw = Throw()
    expected = throw.grads()
    events = (
        lambda t, y: torch.stack([y[0] - 50, y[0] + 50]) > 0,
        Event(throw.surface, direction=-1, until=9.0),
        Event(lambda t, y: y[1], direction=1),
    )
    for ours, theirs in zip(throw.grads(INTERFACES[name], event=events), expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


def test_solve_gives_the_same_gradients():
    throw = Throw()
    t = torch.stack([throw.t0, throw.t0 + 1])
    solution = solve(throw.field, throw.y0, t, event_fn=throw.surface, rtol=1e-10, atol=1e-12)
    ys = solution.ys
    assert torch.equal(solution.ts[1], solution.event_t)
    for event_t in (solution.event_t, solution.ts[1]):
        loss = 1.7 * event_t + 1.3 * ys[-1, 0] - 0.4 * ys[-1, 1] + 0.1 * (ys[0, 0] - ys[0, 1])
        grads = torch.autograd.grad(loss, throw.inputs, retain_graph=True)
        for ours, theirs in zip(grads, throw.grads()):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("t", [FORWARD, BACKWARD], ids=["forward", "backward"])
@pytest.mark.parametrize("method, options", [("dopri5", {}), ("rk4", {"step_size": 0.01, "interp": "cubic"})])
def test_odeint_holds_the_time_in_every_mode(method, options, t):
    """parity: the state at the event has the gradient that it has at a fixed time, to the start too."""
    interfaces = [torchdiffeq.odeint, flashode.odeint]
    modes = [mode for mode in ADJOINTS if method == "dopri5" or mode != "interpolated"]
    interfaces += [functools.partial(flashode.odeint_adjoint, adjoint=mode) for mode in modes]
    found = []
    for interface in interfaces:
        throw = Throw()
        times = (0.2 + t).requires_grad_()
        event_t, ys = interface(
            throw.field, throw.y0, times, event_fn=lambda t, y: y[0] - 0.3, method=method, options=options
        )
        assert not event_t.requires_grad
        found.append(torch.autograd.grad(ys[-1].sum(), [times, throw.y0, throw.field.g]))
    for grads in found[1:]:
        for ours, theirs in zip(grads, found[0]):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["direct", *ADJOINTS])
def test_an_event_at_the_start_moves_with_what_makes_it_one(name):
    """c = y - a is zero at the start, and has fired; its time is t0 + (a - y0) / f to first order."""
    t0, y0, a = (f64(x)[0].requires_grad_() for x in (0.5, 2.0, 2.0))
    interface = functools.partial(INTERFACES[name], **{} if name == "direct" else {"adjoint_params": ()})
    event_t, ys = odeint_event(
        lambda t, y: 4 + 0 * y, y0, t0, event_fn=lambda t, y: y - a, odeint_interface=interface
    )
    assert event_t.item() == 0.5
    grads = torch.autograd.grad(event_t + 10 * ys[-1] + 100 * ys[0], (t0, y0, a))
    assert [g.item() for g in grads] == [1.0, 100 - 0.25, 10 + 0.25]


def test_structures_and_dense_output():
    """A dict as the state, and the solution as a function of time up to the event."""
    height = f64(2)[0].requires_grad_()

    def field(t, y):
        return {"x": y["v"], "v": torch.full_like(y["v"], -G)}

    y0 = {"x": height, "v": f64(5)[0]}
    solution = solve(field, y0, FORWARD, event_fn=[Event(lambda t, y: y["x"], direction=-1)], dense=True)
    torch.testing.assert_close(solution.event_t, landing(height, 5.0)[0], rtol=1e-8, atol=0)
    ours, theirs = (torch.autograd.grad(x, height)[0] for x in (solution.event_t, landing(height, 5.0)[0]))
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=0)
    t = solution.event_t.detach()
    torch.testing.assert_close(solution.sol(t)["v"], solution.ys["v"][-1], rtol=1e-12, atol=0)
    with pytest.raises(ArgumentError, match="outside the solved interval"):
        solution.sol(t + 0.1)


def test_without_event_the_time_is_a_constant():
    throw = Throw()
    event_t, ys = odeint_event(
        throw.field, throw.y0, throw.t0, event_fn=Event(throw.surface, until=0.4), rtol=1e-10, atol=1e-12
    )
    assert event_t.item() == 0.4 and not event_t.requires_grad
    t = torch.stack([throw.t0, event_t])
    plain = flashode.odeint(throw.field, throw.y0, t, rtol=1e-10, atol=1e-12)
    inputs = throw.inputs[:3]
    for ours, theirs in zip(*(torch.autograd.grad(y[-1].sum(), inputs) for y in (ys, plain))):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_until_in_the_adjoint_modes(adjoint, method):
    """The state at ``until``, where the last step lands, and at an event before it."""
    if adjoint == "interpolated" and method == "rk4":
        pytest.skip("interpolated needs dense output of the method's order")
    options = {"step_size": 0.03, "interp": "cubic"} if method == "rk4" else {}
    for until in (0.37, 5.0):
        found = []
        for more in ({}, {"adjoint": adjoint}):
            throw = Throw()
            event = Event(throw.surface, direction=-1, until=until)
            solver = flashode.odeint_adjoint if more else flashode.odeint
            t = torch.stack([throw.t0, throw.t0 + 1])
            _, ys = solver(
                throw.field, throw.y0, t, event_fn=event, method=method, options=options, rtol=1e-9, **more
            )
            found.append(torch.autograd.grad(ys[-1].sum(), throw.inputs[:3]))
        for ours, theirs in zip(*found):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_an_event_at_the_very_end_of_a_step():
    """The step moves with the start; the event does not."""
    grads = []
    for solver, more in ((flashode.odeint, {}), (flashode.odeint_adjoint, {"adjoint": "checkpoint"})):
        throw, t = Throw(), f64(0, 1, requires_grad=True)
        event_t, ys = solver(
            throw.field, throw.y0, t, event_fn=lambda t, y: t - 0.5, method="rk4",
            options={"step_size": 0.125, "interp": "cubic"}, **more,
        )  # fmt: skip
        assert event_t == 0.5
        grads.append(torch.autograd.grad(ys[-1].sum(), (t, throw.y0)))
    plain = flashode.odeint(throw.field, throw.y0, torch.stack([t[0], event_t]))
    grads.append(torch.autograd.grad(plain[-1].sum(), (t, throw.y0)))
    for other, tolerance in zip(grads[1:], (1e-12, 1e-3)):
        for ours, theirs in zip(grads[0], other):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0)


def test_complex_states():
    """y' = i w y turns: y c is imaginary at (pi / 2 - arg(y0 c)) / w."""
    w, c = f64(1.3)[0].requires_grad_(), 0.6 + 0.8j
    y0 = torch.ones((), dtype=torch.complex128, requires_grad=True)
    event_t, ys = odeint_event(
        lambda t, y: 1j * w * y, y0, 0.0, event_fn=lambda t, y: (y * c).real, rtol=1e-10, atol=1e-12
    )
    assert event_t.dtype == F64
    expected = (math.pi / 2 - math.atan2(0.8, 0.6)) / w.detach()
    torch.testing.assert_close(event_t.detach(), expected, rtol=1e-9, atol=0)
    by_w, by_y = torch.autograd.grad(event_t, (w, y0), retain_graph=True)
    torch.testing.assert_close(by_w, -expected / w.detach(), rtol=1e-8, atol=0)
    torch.testing.assert_close(by_y, -1j / w.detach().to(y0), rtol=1e-8, atol=1e-8)
    # The state at the event is i |y0| / c, however fast it turns.
    by_w, by_y = torch.autograd.grad(ys[-1].real, (w, y0))
    torch.testing.assert_close(by_w, torch.zeros_like(w), rtol=0, atol=1e-8)
    torch.testing.assert_close(by_y.detach(), torch.full_like(y0, 0.8).detach(), rtol=0, atol=1e-8)


def test_the_backward_pass_calls_the_field_once():
    field = Counted(fall)
    y0 = START.clone().requires_grad_()
    event_t, ys = odeint_event(field, y0, 0.0, event_fn=height)
    forward = field.nfe
    assert forward == solve(fall, START, FORWARD, event_fn=height).stats.nfe
    (event_t + ys.sum()).backward()
    assert field.nfe == forward + 1


def test_a_second_backward_pass_and_none():
    throw = Throw()
    loss = throw.loss()
    first, second = (torch.autograd.grad(loss, throw.inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    with torch.no_grad():
        assert not throw.loss().requires_grad


def test_second_derivatives_are_refused():
    throw = Throw()
    grads = torch.autograd.grad(throw.loss(), throw.inputs, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(grads, throw.grads()))
    with pytest.raises(RuntimeError, match="event times and the states there have first derivatives only"):
        sum(g.square().sum() for g in grads).backward()
    (grad, *_) = torch.autograd.grad(throw.loss(), throw.inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="event times and the states there have first derivatives only"):
        torch.autograd.grad(grad.sum(), throw.inputs[0], allow_unused=True)


def test_an_event_without_derivative_is_refused_where_a_gradient_is_asked_for():
    y0 = START.clone().requires_grad_()
    event_t, ys = odeint_event(fall, y0, 0.0, event_fn=lambda t, y: y[0] > 0)
    assert abs(event_t.item() - landing(2.0, 5.0)[0]) < 1e-8
    with pytest.raises(
        ArgumentError, match="differentiable in t or y.*return a difference in place of a bool"
    ):
        event_t.backward()
    # The loss may leave the event out.
    assert torch.autograd.grad(ys[0].sum(), y0)[0].tolist() == [1, 1]


def test_an_event_that_is_only_touched_is_refused_where_a_gradient_is_asked_for():
    """At rest on the ground, y = y' = 0: nothing tells where the event would move to."""
    y0 = torch.zeros(2, dtype=F64, requires_grad=True)
    event_t, _ = odeint_event(fall, y0, 0.0, event_fn=height)
    with pytest.raises(ArgumentError, match=r"total derivative 0 in time at the event, t=0.0.*touches zero"):
        event_t.backward()


def test_an_event_of_time_alone():
    y0, a = START.clone().requires_grad_(), f64(0.7)[0].requires_grad_()
    event_t, ys = odeint_event(fall, y0, 0.0, event_fn=lambda t, y: t * t - a)
    by_y, by_a = torch.autograd.grad(event_t, (y0, a), retain_graph=True, materialize_grads=True)
    assert by_y.tolist() == [0, 0] and abs(by_a.item() - 0.5 / 0.7**0.5) < 1e-8
    (by_a,) = torch.autograd.grad(ys[-1, 0], a)
    assert abs(by_a.item() - (5 - G * 0.7**0.5) * 0.5 / 0.7**0.5) < 1e-7


def test_nothing_is_kept_alive():
    gc.collect()
    gc.disable()
    try:
        for interface in ("direct", *ADJOINTS):
            throw = Throw()
            loss = throw.loss(INTERFACES[interface], rtol=1e-4, atol=1e-6)
            loss.backward()
            kept = [weakref.ref(x) for x in (throw.y0, throw.field)]
            del throw, loss
            assert not any(ref() is not None for ref in kept), interface
    finally:
        gc.enable()
