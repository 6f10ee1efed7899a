"""The one-sweep backward solve: as right as torchdiffeq's restarts, with calls that do not grow with the outputs."""

import importlib
import math

import pytest
import torch
from problems import EXPLICIT, Counted, Net

import flashode

F64 = torch.float64
ADAPTIVE = [name for name, method in EXPLICIT.items() if method.adaptive]
FIXED = [name for name, method in EXPLICIT.items() if not method.adaptive]


class Field(torch.nn.Module):
    """A small network under a count of its calls with and without a graph."""

    def __init__(self, dtype=F64, hidden=8):
        super().__init__()
        self.net = Net(hidden=hidden, dtype=dtype)
        self.calls = {False: 0, True: 0}

    def forward(self, t, y):
        self.calls[y.requires_grad] += 1
        return self.net(t, y)


def gradients(odeint, t, *, method="dopri5", weights=None, needs_t=False, field=None, **arguments):
    """Of a fixed linear function of all outputs: to y0, the parameters and perhaps t, flat."""
    field = Field() if field is None else field
    y0 = torch.linspace(-1, 1, 6, dtype=F64).reshape(3, 2).requires_grad_()
    t = t.clone().requires_grad_(needs_t)
    ys = odeint(field, y0, t, method=method, **arguments)
    if weights is None:
        weights = torch.cos(torch.arange(len(t), dtype=F64) ** 2).reshape(-1, 1, 1)
    field.calls[True] = 0
    inputs = [y0, *field.parameters()] + ([t] if needs_t else [])
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad((ys * weights).sum(), inputs)]), field.calls[
        True
    ]


def tight(t, **arguments):
    return gradients(flashode.odeint, t, rtol=1e-11, atol=1e-13, method="dopri8", **arguments)[0]


def off_by(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("method", [name for name in ADAPTIVE if name != "fehlberg2"])  # misled: README
def test_steps_that_pass_outputs_over_keep_the_tolerance(method, backward, engine):
    """Five outputs to a step or more; the method's own error is that of a solve with two outputs."""
    rtol = 1e-5 if EXPLICIT[method].order < 4 else 1e-7
    for n in (2, 60):
        t = torch.linspace(0.1, 1.3, n, dtype=F64)
        t = t.flip(0) if backward else t
        got, _ = gradients(
            flashode.odeint_adjoint, t, method=method, rtol=rtol, atol=rtol / 10, engine=engine, needs_t=True
        )
        assert off_by(got, tight(t, needs_t=True)) < 20 * rtol, n


def test_calls_hardly_grow_with_the_number_of_outputs(engine):
    """torchdiffeq makes 12 and more for every output."""
    calls = {}
    for n in (2, 10, 100, 1000):
        t = torch.linspace(0, 1, n, dtype=F64)
        calls[n] = gradients(flashode.odeint_adjoint, t, rtol=1e-7, atol=1e-9, engine=engine)[1]
    assert calls[100] < 3.5 * calls[2]
    assert calls[1000] <= calls[100] + 14


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3"])
def test_passing_outputs_over_has_the_order_of_dense_output(method, engine):
    """One step passes 7 outputs over; what it gets wrong falls with a power of its length."""
    order = {"dopri5": 4, "dopri8": 7, "bosh3": 3}[method]
    errors = []
    for length in (0.4, 0.2):
        t = torch.linspace(0, length, 9, dtype=F64)
        weights = torch.ones(9, 1, 1, dtype=F64)
        weights[-1] = 0  # all that is left to err is the pull-back of the outputs
        got, calls = gradients(
            flashode.odeint_adjoint, t, method=method, weights=weights, rtol=0.1, atol=1e3, engine=engine,
            adjoint_options={"first_step": 1.0},
        )  # fmt: skip
        stages = len(EXPLICIT[method].tableau.c)
        assert calls == 2 * stages + len(EXPLICIT[method].dense.extra_c)
        errors.append((got - tight(t, weights=weights)).norm().item())
    # Local error: one order more, less what the shortest of the two is not asymptotic by.
    assert math.log2(errors[0] / errors[1]) > order + 0.5


def test_an_output_without_a_gradient_costs_little(engine):
    t = torch.linspace(0, 1, 101, dtype=F64)
    weights = torch.zeros(101, 1, 1, dtype=F64)
    weights[-1] = 1
    got, calls = gradients(flashode.odeint_adjoint, t, weights=weights, rtol=1e-7, atol=1e-9, engine=engine)
    ends = t[[0, -1]]
    _, fewest = gradients(
        flashode.odeint_adjoint, ends, weights=weights[[0, -1]], rtol=1e-7, atol=1e-9, engine=engine
    )
    assert off_by(got, tight(t, weights=weights)) < 1e-6
    assert calls < 1.6 * fewest


OPTIONS = {
    "plain": {},
    "seminorm": {"norm": "seminorm"},
    "callable": {"norm": lambda parts: max(part.abs().max() for part in parts)},
    "first_step": {"first_step": 0.01},
    "jump_t": {"jump_t": torch.tensor([0.33, 0.7], dtype=F64)},
    "max_step": {"max_step": 0.08, "safety": 0.8},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("needs_t", [False, True], ids=["t fixed", "t differentiated"])
def test_engines_make_the_same_calls_and_the_same_gradients(options, needs_t, native):
    for method in ("dopri5", "dopri8", "adaptive_heun"):
        t = torch.tensor([0.0, 0.05, 0.06, 0.5, 0.9, 0.91, 1.0], dtype=F64)
        (a, calls_a), (b, calls_b) = (
            gradients(
                flashode.odeint_adjoint, t, method=method, rtol=1e-5, atol=1e-6, needs_t=needs_t,
                adjoint_options=OPTIONS[options], engine=engine,
            )
            for engine in ("reference", native)
        )  # fmt: skip
        assert calls_a == calls_b
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("options", [{}, {"step_size": 0.07}], ids=["outputs", "step_size"])
def test_fixed_steps_are_those_of_torchdiffeq(method, options, engine):
    torchdiffeq = pytest.importorskip("torchdiffeq")
    if method not in importlib.import_module("torchdiffeq._impl.odeint").SOLVERS:
        pytest.skip(f"torchdiffeq 0.2.5 has no {method}")
    t = torch.linspace(0, 1, 6, dtype=F64)
    theirs, their_calls = gradients(torchdiffeq.odeint_adjoint, t, method=method, options=options)
    ours, our_calls = gradients(flashode.odeint_adjoint, t, method=method, options=options, engine=engine)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert our_calls == their_calls


def test_restart_makes_the_calls_of_torchdiffeq(engine):
    torchdiffeq = pytest.importorskip("torchdiffeq")
    t = torch.linspace(0, 1, 6, dtype=F64)
    options = {"overshoot": True}
    theirs, their_calls = gradients(torchdiffeq.odeint_adjoint, t, rtol=1e-6, atol=1e-8)
    ours, our_calls = gradients(
        flashode.odeint_adjoint, t, rtol=1e-6, atol=1e-8, options=options,
        adjoint_options={"restart": True, **options}, engine=engine,
    )  # fmt: skip
    assert our_calls == their_calls
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_restart_serves_parameters_of_another_dtype(native):
    w = torch.tensor(0.3, requires_grad=True)  # single precision beside a state in double
    y0, t = torch.ones(2, dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)
    ys = flashode.odeint_adjoint(
        lambda t, y: -w * y, y0, t, adjoint_params=(w,), adjoint_options={"restart": True}, engine=native
    )
    ys[-1].sum().backward()
    assert w.grad.item() == pytest.approx(-2 * math.exp(-0.3), rel=1e-5)


def van_der_pol(t, y):
    return torch.stack([y[1], (1 - y[0] ** 2) * y[1] - y[0]])


def test_a_state_that_cannot_be_rebuilt_backwards_draws_a_warning(engine):
    """On the way back the limit cycle repels: torchdiffeq answers (-6.2, 5.5) without a word."""
    y0 = torch.tensor([2.0, 0.0], requires_grad=True)
    t = torch.tensor([0.0, 20.0])

    def field(t, y):
        return van_der_pol(t, y)

    ys = flashode.odeint_adjoint(field, y0, t, adjoint_params=(), engine=engine)
    remedy = r"rebuilt backwards is .* tolerances away .* adjoint='checkpoint'"
    with pytest.warns(flashode.GradientWarning, match=remedy):
        ys[-1].sum().backward(retain_graph=True)
    ys[-1].sum().backward()  # once a field: a training loop is told once


def test_so_does_one_at_loose_tolerances(engine):
    """exp(-50) is nothing beside the tolerance: what is rebuilt from it is not where it began."""
    y0 = torch.ones(1, dtype=F64, requires_grad=True)
    t = torch.tensor([0.0, 1.0], dtype=F64)
    ys = flashode.odeint_adjoint(
        lambda t, y: -50 * y, y0, t, rtol=1e-3, atol=1e-3, adjoint_params=(), engine=engine
    )
    with pytest.warns(UserWarning, match="rebuilt backwards"):
        ys[-1].sum().backward()


def test_a_problem_that_can_draws_none(engine):
    """The suite makes errors of warnings."""
    for n in (2, 50):
        gradients(flashode.odeint_adjoint, torch.linspace(0, 3, n, dtype=F64), engine=engine)


def test_stored_outputs_hold_the_rebuilt_state_on_its_track(engine):
    """The same problem with outputs close enough to each other: right, though less than to tolerance."""
    y0 = torch.tensor([2.0, 0.0], dtype=F64, requires_grad=True)
    t = torch.linspace(0, 20, 201, dtype=F64)
    ys = flashode.odeint_adjoint(van_der_pol, y0, t, rtol=1e-8, atol=1e-10, adjoint_params=(), engine=engine)
    (got,) = torch.autograd.grad(ys[-1].sum(), y0)
    ys = flashode.odeint(van_der_pol, y0, t[[0, -1]], rtol=1e-11, atol=1e-12, method="dopri8")
    (truth,) = torch.autograd.grad(ys[-1].sum(), y0)
    assert off_by(got, truth) < 1e-5


def test_the_path_of_the_forward_solve_serves_where_the_state_cannot_be_rebuilt(engine):
    y0 = torch.tensor([2.0, 0.0], dtype=F64, requires_grad=True)
    t = torch.tensor([0.0, 20.0], dtype=F64)
    grads = []
    for arguments in ({"adjoint": "interpolated", "engine": engine}, {"rtol": 1e-11, "atol": 1e-12}):
        ys = flashode.odeint_adjoint(
            van_der_pol, y0, t, adjoint_params=(), **({"adjoint": "checkpoint"} | arguments)
        )
        grads.append(torch.autograd.grad(ys[-1].sum(), y0)[0])
    assert off_by(*grads) < 1e-5
    assert [round(g, 2) for g in grads[0].tolist()] == [2.61, 0.96]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "tsit5", "bosh3", "fehlberg45"])
def test_along_the_path_engines_agree_and_keep_the_tolerance(method, backward, native):
    """Also with another method on the way back, and with the adjoint alone under its norm."""
    t = torch.tensor([0.0, 0.05, 0.06, 0.5, 0.9, 0.91, 1.0], dtype=F64)
    t = t.flip(0) if backward else t
    for more in ({}, {"adjoint_method": "tsit5"}, {"adjoint_options": {"norm": "seminorm"}}):
        results = [
            gradients(
                flashode.odeint_adjoint, t, method=method, rtol=1e-6, atol=1e-7, needs_t=True,
                adjoint="interpolated", engine=engine, **more,
            )
            for engine in ("reference", native)
        ]  # fmt: skip
        (a, calls_a), (b, calls_b) = results
        assert calls_a == calls_b
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        assert off_by(a, tight(t, needs_t=True)) < 5e-5


def test_the_path_needs_dense_output():
    with pytest.raises(ValueError, match="'interpolated' needs a forward method with step-size control"):
        flashode.odeint_adjoint(
            Field(),
            torch.ones(1, 2, dtype=F64),
            torch.tensor([0.0, 1.0]),
            method="rk4",
            adjoint="interpolated",
        )


@pytest.mark.parametrize("mode", ["backsolve", "interpolated"])
def test_gradcheck(mode, engine):
    """To y0, t, a parameter and an argument; finite differences see the solve's own tolerance."""

    def function(y0, t, a, b):
        return flashode.odeint_adjoint(
            lambda t, y, c: torch.sin(y @ a) * torch.cos(t) + c["b"], y0, t, rtol=1e-10, atol=1e-12,
            adjoint_params=(a,), args=({"b": b},), adjoint=mode, engine=engine,
        )  # fmt: skip

    a = torch.tensor([[0.3, -1.0], [0.8, 0.1]], dtype=F64, requires_grad=True)
    y0 = torch.tensor([[0.7, -0.4]], dtype=F64, requires_grad=True)
    t = torch.tensor([0.1, 0.4, 0.5, 1.0], dtype=F64, requires_grad=True)
    b = torch.tensor([0.2, -0.1], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (y0, t, a, b), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mode", ["backsolve", "interpolated", "checkpoint"])
def test_a_device_gives_the_gradients_of_the_reference_on_a_cpu(mode, device, native):
    """Norms, products and integrals where the state lives; some outputs in a step, some at its end."""
    t = torch.tensor([0.0, 0.1, 0.11, 0.12, 0.6, 1.0], dtype=F64)
    grads = []
    for place, engine in ((torch.device("cpu"), "reference"), (device, native)):
        field = Net(hidden=40, dtype=F64).to(place)
        y0 = torch.linspace(-1, 1, 200, dtype=F64, device=place).reshape(100, 2).requires_grad_()
        ys = flashode.odeint_adjoint(
            field, y0, t.to(place), rtol=1e-6, atol=1e-8, adjoint=mode, engine=engine
        )
        found = torch.autograd.grad(ys.square().sum(), [y0, *field.parameters()])
        grads.append(torch.cat([g.reshape(-1).cpu() for g in found]))
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-10)


def test_parameters_of_any_layout_and_dtype(engine):
    """Single precision beside double, transposed memory, no elements, no dimensions."""

    class Mixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Parameter(torch.randn(3, 2, dtype=F64).T)
            self.b = torch.nn.Parameter(torch.tensor(0.3))
            self.c = torch.nn.Parameter(torch.ones(0, dtype=F64))
            self.unused = torch.nn.Parameter(torch.ones(5))

        def forward(self, t, y):
            return torch.tanh(y @ self.a @ self.a.T) * self.b + self.c.sum()

    torch.manual_seed(0)
    field, t = Mixed(), torch.linspace(0, 1, 12, dtype=F64)
    y0 = torch.randn(4, 2, dtype=F64, requires_grad=True)
    results = []
    for odeint, more in ((flashode.odeint_adjoint, {"engine": engine}), (flashode.odeint, {})):
        ys = odeint(field, y0, t, rtol=1e-9, atol=1e-11, **more)
        results.append(torch.autograd.grad(ys.square().sum(), [y0, *field.parameters()], allow_unused=True))
    for ours, direct in zip(*results):
        if direct is None:
            assert not ours.any()
        else:
            assert ours.dtype == direct.dtype
            torch.testing.assert_close(ours, direct, rtol=1e-5, atol=1e-6)


def test_a_field_may_keep_what_it_is_shown(engine):
    """Nothing it kept changes under its hands in the backward solve."""
    kept = []

    def field(t, y):
        if y.requires_grad:
            kept.append((y.detach(), y.detach().clone()))
        return torch.sin(y) * torch.cos(t)

    y0 = torch.linspace(-1, 1, 5, dtype=F64, requires_grad=True)
    t = torch.linspace(0, 4, 9, dtype=F64)
    ys = flashode.odeint_adjoint(field, y0, t, adjoint_params=(), engine=engine)
    ys.sum().backward()
    assert len(kept) > 40
    for now, then in kept:
        assert torch.equal(now, then)


def test_a_field_may_return_one_tensor_every_time(engine):
    constant = torch.tensor([1.0, -2.0], dtype=F64)
    w = torch.tensor(0.5, dtype=F64, requires_grad=True)

    def field(t, y):
        constant.mul_(1.0)
        return constant if t < 0.5 else constant * w + 0 * y

    y0 = torch.zeros(2, dtype=F64, requires_grad=True)
    t = torch.tensor([0.0, 0.5, 1.0], dtype=F64)
    ys = flashode.odeint_adjoint(
        field, y0, t, method="rk4", options={"step_size": 0.25}, adjoint_params=(w,), engine=engine
    )
    a, b = torch.autograd.grad(ys[-1].sum(), [y0, w])
    torch.testing.assert_close(a, torch.ones(2, dtype=F64))
    assert b.item() == pytest.approx(-0.5, abs=0.1)


def test_an_exception_of_the_field_comes_through_the_backward_solve(engine):
    class Refusal(Exception):
        pass

    class Refusing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise Refusal("no further")

    y0, t = torch.ones(2, requires_grad=True), torch.tensor([0.0, 1.0])
    ys = flashode.odeint_adjoint(lambda t, y: -Refusing.apply(y), y0, t, adjoint_params=(), engine=engine)
    with pytest.raises(Refusal, match="no further"):
        ys.sum().backward()

    def failing(t, y):
        if y.requires_grad:
            raise Refusal("not here")
        return -y

    ys = flashode.odeint_adjoint(failing, y0, t, adjoint_params=(), engine=engine)
    with pytest.raises(Refusal, match="not here"):
        ys.sum().backward()


def test_the_backward_solve_has_a_step_limit(engine):
    field = Counted(lambda t, y: torch.sin(40 * y))
    y0, t = torch.ones(1, requires_grad=True), torch.tensor([0.0, 5.0])
    ys = flashode.odeint_adjoint(
        field, y0, t, rtol=1e-3, atol=1e-4, adjoint_params=(), engine=engine,
        adjoint_options={"max_num_steps": 3},
    )  # fmt: skip
    with pytest.raises(flashode.SolveError, match="in the backward solve, max_num_steps exceeded") as caught:
        ys[-1].sum().backward()
    assert caught.value.reason == flashode.Status.MAX_STEPS


def cancelling(ys):
    """Two outputs in one step, whose gradients are each other's negative."""
    return (ys[2] - ys[1]).sum()


@pytest.mark.parametrize("adjoint", ["backsolve", "interpolated"])
def test_gradients_that_cancel_are_in_the_error_test(adjoint, engine):
    """The state rests and allows for any step; the sum of the gradients is zero and would, too."""

    def field(t, y):
        return 3 * torch.cos(10 * t) * torch.stack([y[1], -y[0]]) - y / 2

    t = torch.linspace(0, 2, 9, dtype=F64)
    y0 = torch.zeros(2, dtype=F64, requires_grad=True)
    results = []
    for odeint, more in (
        (flashode.odeint_adjoint, {"adjoint_params": (), "adjoint": adjoint, "engine": engine}),
        (flashode.odeint, {"method": "dopri8", "options": {"max_step": 0.01}}),
    ):
        ys = odeint(field, y0, t, rtol=1e-7, atol=1e-7, **more)
        results += torch.autograd.grad(cancelling(ys), y0)
    assert off_by(*results) < 1e-5


@pytest.mark.parametrize("adjoint", ["backsolve", "interpolated"])
def test_gradients_that_cancel_keep_the_tolerance(adjoint, engine):
    results = []
    for odeint, rtol, more in (
        (flashode.odeint_adjoint, 1e-7, {"adjoint": adjoint, "engine": engine}),
        (flashode.odeint, 1e-11, {"method": "dopri8"}),
    ):
        field = Field()
        y0 = torch.linspace(-1, 1, 6, dtype=F64).reshape(3, 2).requires_grad_()
        ys = odeint(field, y0, torch.linspace(0, 3, 21, dtype=F64), rtol=rtol, atol=rtol, **more)
        grads = torch.autograd.grad(cancelling(ys), [y0, *field.parameters()])
        results.append(torch.cat([g.reshape(-1) for g in grads]))
    assert off_by(*results) < 1e-5


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("belongs_to", ["before", "after"])
def test_a_step_that_passes_outputs_over_sees_its_own_side_of_a_jump(belongs_to, backward, engine):
    def field(t, y):
        before = t <= 0.5 if belongs_to == "before" else t < 0.5
        return 3 * y if before else -2 * torch.sin(4 * y)

    t = torch.linspace(0, 1, 53, dtype=F64)
    t = t.flip(0) if backward else t
    y0 = torch.tensor([0.3, 1.0], dtype=F64, requires_grad=True)
    results = []
    for odeint, tol, more in (
        (flashode.odeint_adjoint, 1e-7, {"adjoint_params": (), "engine": engine}),
        (flashode.odeint, 1e-11, {}),
    ):
        options = {"jump_t": torch.tensor([0.5], dtype=F64)}
        ys = odeint(field, y0, t, rtol=tol, atol=tol / 100, options=options, **more)
        results += torch.autograd.grad(ys.square().sum(), y0)
    assert off_by(*results) < 1e-6


def test_the_path_is_let_go_after_the_backward_pass(engine):
    y0 = torch.ones(3, dtype=F64, requires_grad=True)
    t = torch.tensor([0.0, 1.0], dtype=F64)
    ys = flashode.odeint_adjoint(
        lambda t, y: torch.sin(y), y0, t, adjoint_params=(), adjoint="interpolated", engine=engine
    )
    (first,) = torch.autograd.grad(ys[-1].sum(), y0, retain_graph=True)
    (second,) = torch.autograd.grad(ys[-1].sum(), y0)
    assert torch.equal(first, second)
    assert not ys.grad_fn.recording.polynomials
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(ys[-1].sum(), y0)


@pytest.mark.parametrize("option", [{"restart": True}, {"grid_constructor": lambda f, y0, t: t}])
def test_interpolated_refuses_what_needs_restarts(option):
    with pytest.raises(flashode.ArgumentError, match="is for adjoint='backsolve'"):
        flashode.odeint_adjoint(
            lambda t, y: -y, torch.ones(1), torch.tensor([0.0, 1.0]), adjoint_params=(),
            adjoint="interpolated", adjoint_method="rk4", adjoint_options=option,
        )  # fmt: skip
