"""The solution as a function of time: its values, slopes and gradients; copies of it and of a Solution."""

import copy
import gc
import math
import weakref

import pytest
import torch
from problems import (
    EXPLICIT,
    Counted,
    Net,
    Spiral,
    growth,
    growth_solution,
    pickled,
    saved,
    twisted,
    twisted_solution,
)

import flashode
from flashode.augmented import Path
from flashode.dense import dense_output
from flashode.problem import Problem
from flashode.solution import Outcome

pytestmark = [
    pytest.mark.filterwarnings("ignore:rtol is 1000"),
    # torch compiles its forward-mode formulas at the first use, by means that it has deprecated.
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]
F64 = torch.float64
BACKWARD = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
CASES = [(m, {}) for m in EXPLICIT] + [(m, {"interp": "cubic"}) for m in ("euler", "rk4", "fehlberg5")]
CASE = pytest.mark.parametrize(
    "method, more", CASES, ids=["-".join((m, *more.values())) for m, more in CASES]
)


def steps_of(method, size=0.13, **more):
    return {} if EXPLICIT[method].adaptive else {"step_size": size, **more}


def held_steps(method, size=0.19, **more):
    """Steps of one size, so that a difference quotient does not see step-size control."""
    return (
        {"first_step": size, "max_step": size} if EXPLICIT[method].adaptive else {"step_size": size, **more}
    )


def field(t, y):
    return torch.stack([y[1] * torch.cos(t), -y[0] + 0.2 * t])


def interval(backward, n=7):
    t = torch.linspace(-0.3, 1.7, n, dtype=F64)
    return t.flip(0) if backward else t


Y0 = torch.tensor([1.0, 0.5], dtype=F64)


@BACKWARD
@CASE
def test_it_agrees_with_outputs_and_with_the_ends_of_steps(method, more, backward, engine):
    t = interval(backward)
    solution = flashode.solve(
        field, Y0, t, method=method, options=steps_of(method, **more), rtol=1e-5, atol=1e-7,
        engine=engine, dense=True,
    )  # fmt: skip
    sol, ends = solution.sol, torch.tensor(solution.stats.accepted_times, dtype=F64)
    assert (sol.t0, sol.t1) == (t[0].item(), t[-1].item())
    torch.testing.assert_close(sol(t), solution.ys, rtol=1e-12, atol=1e-12)
    assert torch.equal(sol(t[0]), Y0) and torch.equal(sol(t[-1]), solution.ys[-1])
    # A solve with outputs at all its steps' ends has the computed states there.
    if not EXPLICIT[method].adaptive:
        options = {"grid_constructor": lambda f, y, t: torch.cat([t[:1], ends]), **more}
        through = torch.cat([t[:1], ends])
        ys = flashode.odeint(field, Y0, through, method=method, options=options, engine=engine)
        assert torch.equal(sol(through), ys)


@BACKWARD
@pytest.mark.parametrize("method", list(EXPLICIT))
def test_it_solves_the_equation(method, backward, engine):
    """Against the known solution, everywhere, and its slope against the field."""
    t = torch.tensor([1.3, 0.2] if backward else [0.2, 1.3], dtype=F64)
    adaptive, order = EXPLICIT[method].adaptive, EXPLICIT[method].order
    tol = 1e-5 if order == 2 else 1e-9
    sol = flashode.odeint_dense(
        twisted, twisted_solution(t[0]), *t, method=method, options=steps_of(method, 0.005), rtol=tol, atol=tol,
        engine=engine,
    )  # fmt: skip
    times = 0.2 + 1.1 * torch.rand(41, dtype=F64)
    off = (sol(times) - twisted_solution(times[:, None]).reshape(41, 2)).abs().max()
    assert off < {1: 0.1, 2: 1e-2}.get(order, 1e-6 if adaptive else 3e-4)  # a chord is of second order
    slopes = torch.stack([twisted(a, sol(a)) for a in times])
    assert (sol.derivative(times) - slopes).abs().max() < (0.1 if adaptive else 0.2)


@pytest.mark.parametrize("method", ["tsit5", "dopri5", "dopri8", "fehlberg45", "bosh3"])
def test_slopes_are_continuous_where_the_interpolant_has_them(method, engine):
    solution = flashode.solve(
        field, Y0, interval(False, 2), method=method, rtol=1e-6, atol=1e-8, engine=engine, dense=True
    )
    ends = torch.tensor(solution.stats.accepted_times, dtype=F64)
    slopes = torch.stack([field(a, solution.sol(a)) for a in ends])
    torch.testing.assert_close(solution.sol.derivative(ends), slopes, rtol=1e-9, atol=1e-10)
    just_before = solution.sol.derivative(torch.nextafter(ends, ends - 1))
    torch.testing.assert_close(just_before, slopes, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (33,), (2, 3), (2, 0, 3)])
@pytest.mark.parametrize("state", [(), (1,), (0,), (3, 2)])
def test_times_of_any_shape_for_states_of_any_shape(shape, state, engine):
    y0 = torch.rand(state, dtype=F64)
    sol = flashode.odeint_dense(growth, y0, 0.0, 2.0, engine=engine)
    t = 2 * torch.rand(shape, dtype=F64)
    assert sol(t).shape == sol.derivative(t).shape == (*shape, *state)
    one_by_one = [sol(a.item()) for a in t.reshape(-1)]
    if one_by_one:
        assert torch.equal(sol(t), torch.stack(one_by_one).reshape((*shape, *state)))


def test_unsorted_and_repeated_times(engine):
    sol = flashode.odeint_dense(growth, torch.ones(2, dtype=F64), 0.0, 2.0, engine=engine)
    t = torch.tensor([1.5, 0.3, 1.5, 0.0, 2.0, 0.3], dtype=F64)
    y = sol(t)
    torch.testing.assert_close(y[:, 0], growth_solution(t), rtol=1e-6, atol=1e-6)
    assert torch.equal(y[0], y[2]) and torch.equal(y[1], y[5])


def test_numbers_and_other_dtypes_of_time(engine):
    sol = flashode.odeint_dense(growth, torch.ones(2, dtype=F64), 0, 2, engine=engine)
    for one in (1, 1.0, torch.tensor(1), torch.tensor(1.0), torch.ones((), dtype=torch.bfloat16)):
        assert torch.equal(sol(one), sol(torch.tensor(1.0, dtype=F64)))


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "rk4"])
@pytest.mark.parametrize("times_on", ["cpu", "the state's"])
def test_times_may_be_on_another_device_than_the_state(method, times_on, engine, device):
    y0 = torch.rand(33, dtype=F64, device=device, requires_grad=True)
    times_on = "cpu" if times_on == "cpu" else device
    options = steps_of(method, interp="cubic")
    sol = flashode.odeint_dense(growth, y0, 0.0, 2.0, method=method, options=options, engine=engine)
    t = torch.tensor([[0.0, 1.5], [2.0, 0.3]], dtype=F64, device=times_on, requires_grad=True)
    y = sol(t)
    assert y.device == sol.derivative(t).device == y0.device
    torch.testing.assert_close(y, growth_solution(t).to(device)[..., None] * y0, rtol=1e-4, atol=1e-4)
    g_t, g_y = torch.autograd.grad(y.sum(), (t, y0))
    assert g_t.device == t.device and g_y.device == y0.device
    torch.testing.assert_close(g_t.to(device), sol.derivative(t).sum(-1), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(g_y, growth_solution(t).sum().to(device).expand(33), rtol=1e-4, atol=1e-4)


@BACKWARD
def test_times_outside_are_refused(backward, engine):
    ends = (2.0, 0.25) if backward else (0.25, 2.0)
    sol = flashode.odeint_dense(growth, torch.ones(2, dtype=F64), *ends, engine=engine)
    interval = f"{ends[0]} to {ends[1]}"
    for t in (0.2, 2.001, math.nan, math.inf):
        with pytest.raises(
            flashode.ArgumentError, match=f"t = {t} is outside the solved interval, {interval}"
        ):
            sol(t)
        with pytest.raises(flashode.ArgumentError, match=interval):
            sol.derivative(torch.tensor([1.0, t]))
    with pytest.raises(flashode.ArgumentError, match="and so are 1 other of 3 times"):
        sol(torch.tensor([3.0, 1.0, 4.0]))
    for t in ("1", None, [1.0], torch.tensor(1j), torch.tensor(True)):
        with pytest.raises(flashode.ArgumentTypeError, match="t must"):
            sol(t)


def test_rounding_at_the_ends_is_let_pass(engine):
    """0.7 in float32 is below 0.7, and 1.1 above."""
    y0 = torch.ones(1, dtype=F64)
    sol = flashode.odeint_dense(growth, y0, 1.1, 0.7, engine=engine)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(sol(torch.tensor(0.7, dtype=dtype)), sol(0.7))
        assert torch.equal(sol(torch.tensor(1.1, dtype=dtype)), y0)
    in_float32 = flashode.solve(growth, y0, torch.tensor([0.1, 0.7]), dense=True, engine=engine).sol
    assert torch.equal(in_float32(0.1), y0)
    t = torch.tensor(0.7, requires_grad=True)  # outside by a rounding: its gradient is the slope there still
    (g,) = torch.autograd.grad(sol(t).sum(), t)
    torch.testing.assert_close(g, sol.derivative(0.7)[0].float())


def test_an_interval_of_no_length(engine):
    field = Counted(growth)
    y0 = torch.rand(3, dtype=F64)
    one = flashode.solve(field, y0, torch.tensor([0.5], dtype=F64), dense=True, engine=engine).sol
    for sol in (one, flashode.odeint_dense(field, y0, 0.5, torch.tensor(0.5, dtype=F64), engine=engine)):
        assert (sol.t0, sol.t1) == (0.5, 0.5)
        assert torch.equal(sol(torch.full((2, 3), 0.5)), y0.expand(2, 3, 3))
        with pytest.raises(flashode.ArgumentError, match="no step"):
            sol.derivative(0.5)
        with pytest.raises(flashode.ArgumentError, match="outside"):
            sol(0.6)
    assert field.nfe == 0


def test_ends_that_are_no_times(engine):
    y0 = torch.ones(1)
    for t1 in ("1", None, torch.zeros(2), 1j):
        with pytest.raises(
            flashode.ArgumentTypeError, match="t1 must be a number or a Tensor of one element"
        ):
            flashode.odeint_dense(growth, y0, 0.0, t1, engine=engine)
    for t1 in (math.nan, math.inf):
        with pytest.raises(flashode.ArgumentError, match="finite"):
            flashode.odeint_dense(growth, y0, 0.0, t1, engine=engine)
    with pytest.raises(flashode.ArgumentTypeError, match="floating point"):
        flashode.odeint_dense(growth, y0, torch.tensor(0), torch.tensor(1), engine=engine)


def test_the_same_values_as_torchdiffeq(engine):
    impl = pytest.importorskip("torchdiffeq._impl.odeint")
    y0, ends = (
        torch.tensor([[1.0, 0.3]], dtype=F64),
        (torch.tensor(0.0, dtype=F64), torch.tensor(2.0, dtype=F64)),
    )
    theirs = impl.odeint_dense(Spiral(dtype=F64), y0, *ends, rtol=1e-9, atol=1e-9)
    ours = flashode.odeint_dense(
        Spiral(dtype=F64), y0, *ends, rtol=1e-9, atol=1e-9, options={"overshoot": True}, engine=engine
    )
    for t in 2 * torch.rand(20, dtype=F64):
        torch.testing.assert_close(ours(t), theirs(t), rtol=1e-12, atol=1e-12)


# Each method in one direction of time: a gradcheck takes hundreds of solves.
@pytest.mark.parametrize("method, more, backward", [(*case, i % 2 == 1) for i, case in enumerate(CASES)])
def test_first_derivatives(method, more, backward, engine):
    """To the times asked for, the state, the ends of the interval, parameters and args, inside of
    steps and at the ends of the interval."""
    a = torch.tensor([[0.3, -1.0], [0.8, 0.1]], dtype=F64, requires_grad=True)
    b = torch.tensor(0.4, dtype=F64, requires_grad=True)
    ends = torch.tensor([1.0, 0.1] if backward else [0.1, 1.0], dtype=F64, requires_grad=True)
    t = torch.tensor([[0.93, 0.2], [0.52, 0.31]], dtype=F64, requires_grad=True)

    def function(t, y0, t0, t1, a, b):
        sol = flashode.odeint_dense(
            lambda t, y, b: torch.sin(a @ y) * torch.cos(2 * t) + b * t, y0, t0, t1, rtol=1e3, atol=1e3,
            method=method, options=held_steps(method, **more), args=(b,), engine=engine,
        )  # fmt: skip
        return sol(t), sol.derivative(t)

    y0 = torch.tensor([0.7, -0.4], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (t, y0, *ends.unbind(), a, b))


@pytest.mark.parametrize("method, more", [("dopri5", {}), ("bosh3", {}), ("rk4", {"interp": "cubic"})])
def test_second_derivatives(method, more, engine):
    a = torch.tensor([[0.3, -1.0], [0.8, 0.1]], dtype=F64, requires_grad=True)
    y0 = torch.tensor([0.7, -0.4], dtype=F64, requires_grad=True)
    t0, t1, t = torch.tensor([0.1, 1.0, 0.83], dtype=F64, requires_grad=True).unbind()

    def function(t, y0, t0, t1, a):
        sol = flashode.odeint_dense(
            lambda t, y: torch.sin(a @ y) + t * y, y0, t0, t1, rtol=1e3, atol=1e3,
            method=method, options=held_steps(method, 0.27, **more), engine=engine,
        )  # fmt: skip
        return sol(t), sol.derivative(t)

    assert torch.autograd.gradgradcheck(function, (t, y0, t0, t1, a))


def test_derivatives_by_time_alone(engine):
    """After a solve without gradients too, and with the right values at the ends of steps."""
    t = interval(False)
    with torch.no_grad():
        solution = flashode.solve(Spiral(dtype=F64), Y0, t, dense=True, engine=engine)
    ends = torch.tensor([t[0], *solution.stats.accepted_times], dtype=F64, requires_grad=True)
    y = solution.sol(ends)
    (g,) = torch.autograd.grad(y.sum(), ends)
    torch.testing.assert_close(g, solution.sol.derivative(ends.detach()).sum(-1), rtol=1e-12, atol=1e-12)
    assert not solution.sol(ends.detach()).requires_grad
    second = torch.autograd.functional.jacobian(lambda t: solution.sol.derivative(t)[0], t[2])
    quotient = (solution.sol.derivative(t[2] + 1e-6) - solution.sol.derivative(t[2] - 1e-6))[0] / 2e-6
    torch.testing.assert_close(second, quotient, rtol=1e-4, atol=1e-5)


@BACKWARD
def test_gradients_are_those_of_outputs(backward, engine):
    """A loss of sol(t) has the gradients of the same loss of odeint at t, where these are outputs."""
    t = interval(backward)
    results = []
    for through_sol in (False, True):
        net, y0, at = Net(dtype=F64), Y0.clone().requires_grad_(), t.clone().requires_grad_()
        asked = at if not through_sol else at[[0, -1]]
        solution = flashode.solve(net, y0, asked, rtol=1e-6, atol=1e-6, dense=through_sol, engine=engine)
        ys = solution.sol(at) if through_sol else solution.ys
        weights = torch.cos(torch.arange(ys.numel(), dtype=F64)).reshape(ys.shape)
        results.append(torch.autograd.grad((ys * weights).sum(), [y0, at, *net.parameters()]))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_gradients_through_step_t_and_jump_t(engine):
    """Steps that end on given times do not move with the interval."""
    options = {"first_step": 0.3, "max_step": 0.3, "step_t": [0.45], "jump_t": [0.7]}
    t0, t1 = torch.tensor([0.1, 1.0], dtype=F64, requires_grad=True).unbind()
    t = torch.tensor([0.2, 0.44, 0.5, 0.69, 0.71, 0.99], dtype=F64, requires_grad=True)

    def function(t, t0, t1):
        return flashode.odeint_dense(field, Y0, t0, t1, rtol=1e3, atol=1e3, options=options, engine=engine)(t)

    assert torch.autograd.gradcheck(function, (t, t0, t1))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128]
)
def test_dtypes(dtype):
    """What it returns is of the state's dtype, as exact as that allows."""
    y0 = torch.tensor([1.0, 0.5], dtype=dtype)
    t = torch.linspace(0, 2, 5)
    solution = flashode.solve(growth, y0, t, rtol=0.05, atol=0.05, dense=True)
    y = solution.sol(t)
    assert y.dtype == solution.sol.derivative(t).dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y, solution.ys, rtol=8 * eps, atol=8 * eps)
    assert torch.equal(y[-1], solution.ys[-1])
    assert torch.equal(solution.sol(solution.stats.accepted_times[-1]), solution.ys[-1])


def test_complex_states_have_gradients():
    w = torch.tensor(0.3 + 1.1j, dtype=torch.complex128, requires_grad=True)
    t = torch.tensor([0.35, 0.8], dtype=F64, requires_grad=True)
    options = {"first_step": 0.25, "max_step": 0.25}

    def function(t, w):
        y0 = torch.ones(2, dtype=torch.complex128)
        return flashode.odeint_dense(
            lambda t, y: w * y * t, y0, 0.0, 1.0, rtol=1e3, atol=1e3, options=options
        )(t)

    assert torch.autograd.gradcheck(function, (t, w))


def test_tuples_of_mixed_dtypes(engine):
    dtypes = (torch.float32,) * 2 if engine == "native" else (torch.float32, F64)
    y0 = (torch.ones(2, 1, dtype=dtypes[0]), torch.ones((), dtype=dtypes[1]))
    t = torch.linspace(0, 1, 4)
    solution = flashode.solve(lambda t, y: (-y[0], -2 * y[1]), y0, t, dense=True, engine=engine)
    at = torch.rand(3, 2)
    for values in (solution.sol(at), solution.sol.derivative(at)):
        assert isinstance(values, tuple) and [v.dtype for v in values] == list(dtypes)
        assert [v.shape for v in values] == [(3, 2, 2, 1), (3, 2)]
    torch.testing.assert_close(
        solution.sol(at)[1].double(), torch.exp(-2 * at.double()), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        solution.sol.derivative(at)[1].double(), -2 * torch.exp(-2 * at.double()), rtol=1e-4, atol=1e-4
    )


def test_calls_of_the_field(engine):
    """Only interpolants with stages of their own make more of them: once a step, outputs included."""
    t = interval(False, 12)
    for method, extra, options in [
        ("dopri5", 0, {}), ("tsit5", 0, {}), ("bosh3", 0, {}), ("dopri8", 3, {}),
        ("rk4", 0, {"step_size": 0.1}), ("rk4", 1, {"step_size": 0.1, "interp": "cubic"}),
    ]:  # fmt: skip
        counted = Counted(field)
        arguments = {"method": method, "options": options, "engine": engine}
        bare = flashode.solve(field, Y0, interval(False, 2), **arguments)
        dense = flashode.solve(counted, Y0, t, dense=True, **arguments)
        assert dense.stats.accepted == bare.stats.accepted
        assert counted.nfe == dense.stats.nfe == bare.stats.nfe + extra * dense.stats.accepted


def test_it_never_changes_the_solve(engine):
    t = interval(False)
    plain, dense = (
        flashode.solve(field, Y0, t, method="dopri8", dense=dense, engine=engine) for dense in (False, True)
    )
    assert torch.equal(plain.ys, dense.ys) and plain.stats.accepted_times == dense.stats.accepted_times


def test_without_dense_there_is_no_sol():
    solution = flashode.solve(growth, torch.ones(1), torch.tensor([0.0, 1.0]))
    with pytest.raises(AttributeError, match="pass dense=True to solve"):
        solution.sol
    assert not hasattr(solution, "sol")


def test_overshooting_steps_are_cut_off(engine):
    solution = flashode.solve(
        growth, Y0, torch.tensor([0.0, 1.0]), options={"overshoot": True}, dense=True, engine=engine
    )
    assert solution.stats.accepted_times[-1] > 1 and solution.sol.t1 == 1
    torch.testing.assert_close(solution.sol(1.0), solution.ys[-1], rtol=1e-14, atol=1e-14)
    with pytest.raises(flashode.ArgumentError, match="0.0 to 1.0"):
        solution.sol(1.001)


@BACKWARD
def test_it_ends_at_the_event(backward):
    t = torch.tensor([0.0, -1.0 if backward else 1.0], dtype=F64)
    solution = flashode.solve(
        lambda t, y: torch.ones_like(y), torch.zeros(1, dtype=F64), t, dense=True,
        event_fn=lambda t, y: y.abs() - 2.5,
    )  # fmt: skip
    sol = solution.sol
    assert abs(abs(sol.t1) - 2.5) < 1e-6 and sol.t0 == 0
    torch.testing.assert_close(sol(sol.t1), solution.ys[-1], rtol=1e-12, atol=1e-12)
    with pytest.raises(flashode.ArgumentError, match="outside"):
        sol(1.1 * sol.t1)
    fired = flashode.solve(growth, torch.zeros(1), t, dense=True, event_fn=lambda t, y: y)
    assert fired.sol.t0 == fired.sol.t1 == 0 and fired.sol(0.0) == 0


def test_gradients_at_the_event():
    """At the event's own time, which moves with the solution, sol has the gradients of ys."""
    w = torch.tensor(1.3, dtype=F64, requires_grad=True)
    y0 = torch.tensor([0.2, 0.1], dtype=F64, requires_grad=True)
    solution = flashode.solve(
        lambda t, y: w * torch.stack([torch.cos(t) + y[1], -y[0]]), y0, torch.tensor([0.0, 1.0], dtype=F64),
        event_fn=lambda t, y: y[0] - 0.7, dense=True,
    )  # fmt: skip
    ours, theirs = (
        torch.autograd.grad(y[1], (w, y0), retain_graph=True)
        for y in (solution.sol(solution.event_t), solution.ys[1])
    )
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_solves_that_meet_no_event(method):
    """They are covered up to ``until``, or up to the step at which they failed."""
    y0, t, options = torch.ones(1, dtype=F64), torch.tensor([0.0, 1.0], dtype=F64), steps_of(method)
    never = flashode.Event(lambda t, y: y + 1, until=3.0)
    ended = flashode.solve(growth, y0, t, event_fn=never, method=method, options=options, dense=True)
    assert ended.sol.t1 == 3 and torch.equal(ended.sol(3.0), ended.ys[-1])
    failed = flashode.solve(
        lambda t, y: torch.where(t < 1.5, growth(t, y), math.nan), y0, t, event_fn=never, method=method,
        options=options, dense=True, throw=False,
    )  # fmt: skip
    assert (
        not failed.status.ok and failed.sol.t1 == failed.stats.accepted_times[-1] and 1 < failed.sol.t1 < 1.6
    )
    assert failed.sol(failed.sol.t1).isfinite()


def test_a_failed_solve_is_covered_as_far_as_it_came(engine):
    blows_up = flashode.solve(
        lambda t, y: y * y, torch.ones(1, dtype=F64), torch.tensor([0.0, 0.5, 2.0], dtype=F64),
        throw=False, dense=True, engine=engine,
    )  # fmt: skip
    sol = blows_up.sol
    assert not blows_up.status.ok and sol.t1 == blows_up.stats.accepted_times[-1] and abs(sol.t1 - 1) < 1e-3
    torch.testing.assert_close(sol(0.5), blows_up.ys[1], rtol=1e-12, atol=1e-12)
    assert sol(sol.t1).isfinite().all()
    with pytest.raises(flashode.ArgumentError, match="outside"):
        sol(1.5)
    never = flashode.solve(
        lambda t, y: y * math.nan,
        torch.ones(1),
        torch.tensor([0.0, 1.0]),
        throw=False,
        dense=True,
        engine=engine,
    )
    assert never.sol.t1 == 0 and never.sol(0.0) == 1


def test_a_field_that_only_the_interpolant_finds_not_finite(engine):
    """The stages that dopri8 adds lie at times of their own; the error test never sees them."""
    seen = Counted(growth)
    t = torch.tensor([0.0, 1.0], dtype=F64)
    flashode.solve(seen, torch.ones(1, dtype=F64), t, method="dopri8", dense=True, engine=engine)
    plain = Counted(growth)
    flashode.solve(plain, torch.ones(1, dtype=F64), t, method="dopri8", engine=engine)
    fatal = next(a for a in seen.times if a not in plain.times)
    for requires_grad in (False, True):
        with pytest.raises(flashode.SolveError, match="func returned non-finite values"):
            flashode.solve(
                lambda t, y: growth(t, y) * (math.nan if t == fatal else 1),
                torch.ones(1, dtype=F64, requires_grad=requires_grad), t, method="dopri8", dense=True, engine=engine,
            )  # fmt: skip


def test_it_is_as_exact_under_autocast(engine):
    sol = flashode.odeint_dense(growth, torch.rand(3), 0.0, 1.0, engine=engine)
    t = torch.rand(5)
    expected = sol(t)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sol(t), expected)


def test_forward_mode():
    def value(y0, t):
        return flashode.odeint_dense(growth, y0, 0.0, 1.0)(t)

    y0, t = torch.ones(2, dtype=F64), torch.tensor(0.6, dtype=F64)
    _, by_t = torch.func.jvp(lambda t: value(y0, t), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(by_t, growth(t, value(y0, t)), rtol=1e-4, atol=1e-5)
    _, by_y = torch.func.jvp(lambda y0: value(y0, t), (y0,), (torch.ones_like(y0),))
    torch.testing.assert_close(by_y, value(y0, t), rtol=1e-5, atol=1e-6)


def test_torch_func():
    sol = flashode.odeint_dense(growth, torch.ones(2, dtype=F64), 0.0, 1.0)
    t = torch.tensor(0.6, dtype=F64)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(jacobian(sol)(t), sol.derivative(t))
    with pytest.raises(flashode.ArgumentError, match="vmap hides the times; call sol with the Tensor of all"):
        torch.func.vmap(sol)(t.expand(3))


@BACKWARD
def test_whatever_records_its_steps_is_served(backward):
    """Engines hand over one polynomial a step; here, y = t^2 from t = 1 on, in two of them."""
    direction = -1.0 if backward else 1.0
    t = direction * torch.tensor([1.0, 2.0, 4.0], dtype=F64)
    problem = Problem.from_call(lambda t, y: 2 * t, t[0] ** 2, t, 1e-3, 1e-3, None, None, None)
    path = Path()
    for t0, t1 in ((1.0, 2.5), (2.5, 4.0)):
        h = t1 - t0
        path.add(t0, t1, torch.tensor([t0 * t0, 2 * t0 * h, h * h, 0.0], dtype=F64))
    sol = dense_output(problem, path, Outcome(flashode.Status.SUCCESS, t * t))
    at = direction * (1 + 3 * torch.rand(5, dtype=F64))
    torch.testing.assert_close(sol(at), at * at)
    torch.testing.assert_close(sol.derivative(at), 2 * at)
    torch.testing.assert_close(sol.derivative(t[-1]), 2 * t[-1])
    assert repr(sol) == f"DenseOutput(t = {t[0]:g} … {t[-1]:g}, state (); 2 polynomials of degree 3)"


def test_one_step_after_another_without_reference_cycles(engine):
    gc.collect()
    gc.disable()
    try:
        y0 = torch.rand(5, dtype=F64, requires_grad=True)
        sol = flashode.odeint_dense(growth, y0, 0.0, 1.0, engine=engine)
        (y := sol(0.3)).sum().backward()
        ghosts = weakref.ref(sol), weakref.ref(y)
        del sol, y
        assert [ghost() for ghost in ghosts] == [None, None]
    finally:
        gc.enable()


# ---- copies ---------------------------------------------------------------------------------


COPY = pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])


@COPY
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_copies_of_a_solution_hold_its_values_without_graphs(duplicate, dense, grad, engine):
    y0 = (torch.rand(3), torch.rand(()))
    t = torch.linspace(0, 1, 4, requires_grad=grad)
    net = Net(width=3)
    with torch.set_grad_enabled(grad):
        solution = flashode.solve(lambda t, y: (net(t, y[0]), -y[1]), y0, t, dense=dense, engine=engine)
    twin = duplicate(solution)
    assert repr(twin) == repr(solution) and twin.stats == solution.stats and twin.status is solution.status
    assert torch.equal(twin.ts, solution.ts)
    for a, b in zip(twin.ys, solution.ys):
        assert torch.equal(a, b) and not a.requires_grad and b.requires_grad == grad
        assert a.data_ptr() != b.data_ptr()
    if dense:
        at = torch.rand(5)
        assert repr(twin.sol) == repr(solution.sol)
        for a, b in zip(
            (*twin.sol(at), *twin.sol.derivative(at)), (*solution.sol(at), *solution.sol.derivative(at))
        ):
            assert torch.equal(a, b) and not a.requires_grad
        assert duplicate(solution.sol)(0.5)[0].shape == (3,)
    else:
        assert not hasattr(twin, "sol")


def test_a_shallow_copy_keeps_the_graph():
    y0 = torch.ones(2, requires_grad=True)
    solution = flashode.solve(growth, y0, torch.tensor([0.0, 1.0]), dense=True)
    twin = copy.copy(solution)
    assert twin.ys is solution.ys and twin.sol is solution.sol and twin.ys.requires_grad


def _solve_in_another_process(queue):
    y0 = torch.ones(2, requires_grad=True)
    queue.put(flashode.solve(growth, y0, torch.tensor([0.0, 1.0]), dense=True))
    queue.get()  # stays until it has arrived: memory is shared, not copied


def test_a_solution_from_another_process():
    context = torch.multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_solve_in_another_process, args=(queue,))
    process.start()
    solution = queue.get(timeout=60)
    expected = flashode.solve(growth, torch.ones(2), torch.tensor([0.0, 1.0]), dense=True)
    assert torch.equal(solution.ys, expected.ys) and torch.equal(solution.sol(0.5), expected.sol(0.5))
    queue.put(None)
    process.join(60)
    assert process.exitcode == 0


@COPY
def test_copies_of_a_failure(duplicate):
    with pytest.raises(flashode.SolveError) as caught:
        flashode.odeint(lambda t, y: y * math.nan, torch.ones(1), torch.tensor([0.0, 1.0]))
    twin = duplicate(caught.value)
    assert str(twin) == str(caught.value) and repr(vars(twin)) == repr(vars(caught.value))


@COPY
@pytest.mark.parametrize("solve", [flashode.odeint, flashode.odeint_adjoint])
def test_copies_of_a_field_after_a_solve(duplicate, solve, engine):
    """A solve leaves nothing in a Module: it is copied as before, and its copy solves alike."""
    net, y0, t = Net(), torch.rand(3, 2), torch.tensor([0.0, 1.0])
    before = set(vars(net))
    ys = solve(net, y0, t, engine=engine)
    ys.sum().backward()
    assert set(vars(net)) == before
    twin = duplicate(net)
    again = solve(twin, y0, t, engine=engine)
    assert torch.equal(again, ys)
