"""method="scipy_solver": every solver of SciPy's, with this library's arguments, limits and errors."""

import builtins
import contextlib
import math

import pytest
import torch
from problems import Counted, Net, Spiral, growth, growth_solution, twisted, twisted_solution, twisted_start

import flashode
from flashode.errors import ArgumentError, ArgumentTypeError, GradientWarning, SolveError, Status
from flashode.options import SCIPY_SOLVERS

scipy_integrate = pytest.importorskip("scipy.integrate", reason="the method is SciPy's")

F64 = {"dtype": torch.float64}
SOLVER = pytest.mark.parametrize("solver", SCIPY_SOLVERS)
METHOD = {"method": "scipy_solver"}
BACKWARD = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])


def run(field, y0, t, solver="LSODA", **more):
    options = {"solver": solver, **more.pop("options", {})}
    return flashode.solve(field, y0, t, options=options, **METHOD, **more)


# ---- values ----------------------------------------------------------------------------------


@SOLVER
@BACKWARD
def test_the_solution_is_right(solver, backward):
    t = torch.linspace(0, 1.5, 33, **F64)
    t = t.flip(0) if backward else t
    exact = twisted_solution(t)
    solution = run(twisted, exact[0], t, solver, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(solution.ys, exact, rtol=1e-5, atol=1e-6)
    stats = solution.stats
    assert solution.status == Status.SUCCESS and stats.engine == "scipy" and not solution.ys.requires_grad
    assert len(stats.accepted_times) == stats.accepted and stats.accepted_times[-1] == t[-1]


@SOLVER
@BACKWARD
def test_it_is_torchdiffeqs(solver, backward):
    """The same steps, of one driver of SciPy's and another; LSODA's but nearly, which torchdiffeq shows
    times rounded to float32. DOP853 makes no calls for outputs at the ends of steps."""
    torchdiffeq = pytest.importorskip("torchdiffeq", reason="the comparison needs torchdiffeq")
    y0, t = torch.rand(3, 2, **F64), torch.linspace(0, 1.5, 7, **F64)
    t = t.flip(0) if backward else t
    theirs, ours = Counted(growth), Counted(growth)
    extra = {"min_step": 0.0} if solver == "LSODA" else {}
    with (
        pytest.warns(UserWarning) if solver != "LSODA" else contextlib.nullcontext()
    ):  # of a min_step that it gives to all
        a = torchdiffeq.odeint(
            theirs, y0, t, options={"solver": solver, **extra}, rtol=1e-6, atol=1e-7, **METHOD
        )
    solution = run(ours, y0, t, solver, options=extra, rtol=1e-6, atol=1e-7)
    tol = 1e-5 if solver == "LSODA" else 1e-13
    torch.testing.assert_close(solution.ys, a, rtol=tol, atol=tol)
    assert solution.stats.nfe == ours.nfe
    assert abs(ours.nfe - theirs.nfe) <= 15 if solver == "LSODA" else theirs.nfe - 3 <= ours.nfe <= theirs.nfe


@SOLVER
def test_outputs_do_not_change_the_steps(solver):
    y0, ends = torch.rand(3, **F64), torch.tensor([0.0, 1.5], **F64)
    few = run(growth, y0, ends, solver)
    many = run(growth, y0, torch.linspace(0, 1.5, 40, **F64), solver)
    assert few.stats.accepted_times == many.stats.accepted_times
    assert torch.equal(few.ys[-1], many.ys[-1])


@SOLVER
@BACKWARD
def test_the_solution_between_its_outputs(solver, backward):
    """SciPy's dense output, step by step: at the outputs what they are, elsewhere to tolerance."""
    t, inner = torch.linspace(0, 1.5, 16, **F64), torch.linspace(0, 1.5, 101, **F64)
    solution = run(
        growth, torch.ones(2, **F64), t.flip(0) if backward else t, solver, rtol=1e-7, atol=1e-8, dense=True
    )
    exact = torch.exp(torch.sin(inner) - torch.sin(solution.ts[0]))[:, None].expand(-1, 2)
    torch.testing.assert_close(solution.sol(solution.ts), solution.ys, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(solution.sol(inner), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        solution.sol.derivative(inner), growth(inner[:, None], exact), rtol=2e-3, atol=2e-3
    )


@SOLVER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_states_are_solved_in_float64(solver, dtype):
    """The field sees the state's dtype, SciPy only float64."""
    seen, y0, t = set(), torch.ones(2, dtype=dtype), torch.linspace(0, 1, 5)

    def field(t, y):
        seen.update((t.dtype, y.dtype))
        return growth(t, y)

    with (
        pytest.warns(UserWarning, match="cannot meet")
        if dtype == torch.bfloat16
        else contextlib.nullcontext()
    ):
        ys = run(field, y0, t, solver, rtol=1e-3, atol=1e-3).ys
    assert seen == {dtype} and ys.dtype == dtype
    assert (ys - growth_solution(t)[:, None]).abs().max() < (0.1 if dtype == torch.bfloat16 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@SOLVER
def test_complex_states(solver, dtype):
    y0, t = torch.tensor([1.0 + 1j, 2.0], dtype=dtype), torch.linspace(0, 1, 5, **F64)
    if solver in ("Radau", "LSODA"):
        with pytest.raises(ArgumentError, match=f"'{solver}' takes no complex states; take 'RK45'"):
            run(lambda t, y: 1j * y, y0, t, solver)
        return
    ys = run(lambda t, y: 1j * y, y0.conj(), t, solver, rtol=1e-6, atol=1e-7).ys
    assert ys.dtype == dtype
    torch.testing.assert_close(ys, (y0.conj() * torch.exp(1j * t[:, None])).to(dtype), rtol=1e-3, atol=1e-3)


@SOLVER
def test_tuples_keep_shapes_and_dtypes(solver):
    y0 = (torch.ones(2, 3, **F64), torch.ones((), dtype=torch.float32), torch.ones(0))
    t = torch.linspace(0, 1, 4, **F64)
    ys = run(lambda t, state: [growth(t, y) for y in state], y0, t, solver, rtol=1e-5, atol=1e-6).ys
    assert [y.shape for y in ys] == [(4, 2, 3), (4,), (4, 0)]
    assert [y.dtype for y in ys] == [torch.float64, torch.float32, torch.float32]
    assert (ys[0] - growth_solution(t)[:, None, None]).abs().max() < 1e-3


@SOLVER
@pytest.mark.parametrize("size", [0, 1, 33])
def test_sizes_and_single_times(solver, size):
    y0 = torch.rand(size, **F64)
    assert run(growth, y0, torch.linspace(0, 1, 3, **F64), solver).ys.shape == (3, size)
    calls = Counted(growth)
    assert torch.equal(run(calls, y0, torch.zeros(1), solver).ys, y0[None]) and calls.nfe == 0


@SOLVER
def test_the_field_may_write_into_its_argument_and_return_one_buffer(solver):
    y0, t = torch.rand(3, **F64), torch.linspace(0, 1, 5, **F64)
    buffer, keep = torch.empty_like(y0), y0.clone()

    def careless(t, y):
        buffer.copy_(growth(t, y))
        y.zero_()
        return buffer

    assert torch.equal(run(careless, y0, t, solver).ys, run(growth, y0, t, solver).ys)
    assert torch.equal(y0, keep)


# ---- tolerances and options ------------------------------------------------------------------


@SOLVER
def test_tolerances_for_each_element(solver):
    """A huge atol takes an element out of step control; only some solvers take several rtol."""
    y0, t = torch.ones(2, **F64), torch.tensor([0.0, 2.0], **F64)
    field = lambda t, y: torch.stack([torch.cos(t) * y[0], torch.cos(40 * t) * 10])  # noqa: E731
    loose = torch.tensor([1e-6, 1e6], **F64)
    free, bound = (run(field, y0, t, solver, rtol=1e-6, atol=atol).stats.nfe for atol in (loose, 1e-6))
    assert free < bound
    if solver in ("Radau", "BDF"):
        with pytest.raises(ArgumentError, match=f"'{solver}' takes one rtol for all elements"):
            run(field, y0, t, solver, rtol=loose, atol=1e-6)
    else:
        assert run(field, y0, t, solver, rtol=loose, atol=loose).stats.nfe < bound


@SOLVER
def test_step_sizes(solver):
    y0, t = torch.ones(1, **F64), torch.tensor([0.0, 2.0], **F64)
    assert run(growth, y0, t, solver, options={"max_step": 0.02}).stats.accepted >= 100
    first = run(growth, y0, t, solver, options={"first_step": 1e-7}).stats.accepted_times[0]
    assert first <= 1.01e-7
    run(growth, y0, t, solver, options={"first_step": 50.0})  # SciPy refuses one beyond the end
    if solver != "LSODA":
        with pytest.warns(UserWarning, match=f"min_step.*{solver} takes none"):
            run(growth, y0, t, solver, options={"min_step": 0.1})


def test_lsoda_is_given_the_least_step(monkeypatch):
    """What it makes of it is its own affair: with SciPy 1.17, nothing."""
    given, lsoda = {}, scipy_integrate.LSODA
    monkeypatch.setattr(scipy_integrate, "LSODA", lambda *args, **kw: given.update(kw) or lsoda(*args, **kw))
    run(
        growth,
        torch.ones(1, **F64),
        torch.tensor([0.0, 2.0], **F64),
        options={"min_step": 0.1, "max_step": 0.5},
    )
    assert given["min_step"] == 0.1 and given["max_step"] == 0.5 and "first_step" not in given


@pytest.mark.parametrize(
    "options, error, match",
    [({"solver": "RK54"}, ArgumentError, "'LSODA'.*got str 'RK54'.*Did you mean \"RK45\""),
     ({"solver": None}, ArgumentError, "must be one of"), ({"solver": 3}, ArgumentError, "must be one of"),
     ({"max_step": 0}, ArgumentError, "greater than 0"), ({"first_step": "x"}, ArgumentTypeError, "a number"),
     ({"max_num_steps": 0}, ArgumentError, "at least 1")],
)  # fmt: skip
def test_bad_options_are_named(options, error, match):
    with pytest.raises(error, match=match):
        flashode.odeint(growth, torch.ones(1), torch.linspace(0, 1, 3), options=options, **METHOD)


def test_options_of_other_methods_draw_a_warning():
    with pytest.warns(UserWarning, match="scipy_solver: Unexpected arguments {'step_size': 0.1}"):
        flashode.odeint(growth, torch.ones(1), torch.linspace(0, 1, 3), options={"step_size": 0.1}, **METHOD)
    with pytest.warns(UserWarning, match="dopri5: Unexpected arguments {'solver': 'RK45'}"):
        flashode.odeint(growth, torch.ones(1), torch.linspace(0, 1, 3), options={"solver": "RK45"})


def test_events_are_refused_and_callbacks_but_one():
    with pytest.raises(ArgumentError, match="locates no events"):
        flashode.odeint(
            growth, torch.ones(1), torch.tensor([0.0, 1.0]), event_fn=lambda t, y: y[0] - 2, **METHOD
        )
    field = Counted(growth)
    field.callback_step = lambda t, y, dt: None
    with pytest.warns(UserWarning, match="'scipy_solver' does not support callbacks {'callback_step'}"):
        flashode.odeint(field, torch.ones(1), torch.tensor([0.0, 1.0]), **METHOD)


@SOLVER
@BACKWARD
def test_accepted_steps_are_reported(solver, backward):
    steps, field, t = [], Counted(growth), torch.tensor([0.0, 1.5], **F64)
    field.callback_accept_step = lambda t0, y0, dt: steps.append((t0.item(), y0.sum().item(), dt.item()))
    stats = run(field, torch.ones(2, **F64), t.flip(0) if backward else t, solver).stats
    sign = -1 if backward else 1
    assert [t0 + sign * dt for t0, _, dt in steps] == pytest.approx(stats.accepted_times, abs=1e-12)
    assert steps[0][:2] == (1.5 if backward else 0.0, 2.0)


# ---- engines ---------------------------------------------------------------------------------


def test_the_engine_serves_this_method_and_no_other():
    y0, t = torch.ones(1), torch.tensor([0.0, 1.0])
    text = flashode.explain(growth, y0, t, **METHOD)
    assert text.startswith("scipy_solver on the scipy engine")
    assert "reference: declines: SciPy's solvers have an engine of their own" in text
    assert "scipy: declines: it is for method='scipy_solver' alone" in flashode.explain(growth, y0, t)
    with pytest.raises(ArgumentError, match="the reference engine cannot serve this call"):
        flashode.odeint(growth, y0, t, engine="reference", **METHOD)
    with pytest.raises(ArgumentError, match="the scipy engine cannot serve this call"):
        flashode.odeint(growth, y0, t, engine="scipy")
    flashode.odeint(growth, y0, t, engine="scipy", **METHOD)


def test_without_scipy_the_error_says_what_to_do(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "scipy":
            raise ModuleNotFoundError("No module named 'scipy'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ArgumentError, match="needs SciPy.*pip install scipy"):
        flashode.odeint(growth, torch.ones(1), torch.tensor([0.0, 1.0]), **METHOD)
    assert flashode.odeint(growth, torch.ones(1), torch.tensor([0.0, 1.0])).shape == (2, 1)


# ---- failures --------------------------------------------------------------------------------


@SOLVER
def test_a_field_that_is_not_finite_is_named(solver):
    y0, t = torch.ones(3, **F64), torch.linspace(0, 1, 5, **F64)

    def field(t, y):
        return y * torch.stack([t, torch.sqrt(0.6 - t), t])

    solution = run(field, y0, t, solver, throw=False)
    assert solution.status == Status.NONFINITE_FIELD
    assert torch.isfinite(solution.ys[:3]).all() and torch.isnan(solution.ys[3:]).all()
    with pytest.raises(
        SolveError, match=r"func returned non-finite values \(nan at element \[1\]\)"
    ) as raised:
        run(field, y0, t, solver)
    assert 0.5 < raised.value.t <= 0.6 and raised.value.index == (1,)


@SOLVER
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_field_that_is_never_finite_does_not_hang(solver, value):
    calls = Counted(lambda t, y: y * value)
    with pytest.raises(SolveError, match="func returned non-finite values") as raised:
        run(calls, torch.ones(2, **F64), torch.tensor([0.0, 1.0]), solver)
    assert raised.value.t == 0 and calls.nfe == 1


@SOLVER
def test_a_singularity_ends_the_solve(solver):
    """y' = 10 y^2 has none beyond t = 0.1."""
    y0, t = torch.ones(1, **F64), torch.tensor([0.0, 1.0], **F64)
    with pytest.raises(SolveError) as raised:
        run(lambda t, y: 10 * y**2, y0, t, solver, rtol=1e-5, options={"max_num_steps": 5000})
    assert raised.value.reason in (Status.STEP_UNDERFLOW, Status.MAX_STEPS, Status.NONFINITE_FIELD)
    assert abs(raised.value.t - 0.1) < 1e-4


def test_scipys_message_is_passed_on():
    y0, t = torch.ones(1, **F64), torch.tensor([0.0, 1.0], **F64)
    with pytest.raises(
        SolveError, match="underflow in dt .*Required step size is less than spacing"
    ) as raised:
        run(lambda t, y: 10 * y**2, y0, t, "RK45")
    assert raised.value.reason == Status.STEP_UNDERFLOW


@SOLVER
def test_the_number_of_steps_is_limited_between_outputs(solver):
    y0, t = torch.ones(1, **F64), torch.linspace(0, 3, 4, **F64)
    fast = lambda t, y: -50 * torch.sin(50 * t) + 0 * y  # noqa: E731
    with pytest.raises(SolveError, match="max_num_steps exceeded") as raised:
        run(fast, y0, t, solver, rtol=1e-9, options={"max_num_steps": 7})
    assert raised.value.reason == Status.MAX_STEPS and raised.value.accepted == 7
    needed = run(growth, y0, t[[0, -1]], solver).stats.accepted
    run(growth, y0, torch.linspace(0, 3, 300, **F64), solver, options={"max_num_steps": needed // 2})


@SOLVER
def test_errors_of_the_field_pass_through(solver):
    def field(t, y):
        if t > 0.5:
            raise ValueError("mine")
        return -y

    with pytest.raises(ValueError, match="^mine$"):
        run(field, torch.ones(2, **F64), torch.tensor([0.0, 1.0]), solver)
    with pytest.raises(ArgumentError, match="func returned shape"):
        run(lambda t, y: y[:1], torch.ones(2, **F64), torch.tensor([0.0, 1.0]), solver)


# ---- gradients -------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["y0", "t", "parameters"])
def test_missing_gradients_draw_a_warning(what):
    y0, t, net = torch.rand(2, **F64), torch.linspace(0, 1, 3, **F64), Spiral(**F64)
    net.requires_grad_(what == "parameters")
    {"y0": y0, "t": t}.get(what, torch.zeros(())).requires_grad_()
    with pytest.warns(GradientWarning, match="odeint_adjoint, whose adjoint='backsolve'") as caught:
        assert not flashode.odeint(net, y0, t, **METHOD).requires_grad
    assert len(caught) == 1
    with torch.no_grad():
        flashode.odeint(net, y0, t, **METHOD)


@pytest.mark.parametrize(
    "forward, backward",
    [("scipy_solver", None), ("scipy_solver", "dopri5"), ("dopri5", "scipy_solver"), ("scipy_solver", "rk4")],
)
def test_the_backward_solve_gives_the_gradients(forward, backward):
    t = torch.linspace(0, 1, 5, **F64).requires_grad_()
    y0 = twisted_start(**F64).requires_grad_()
    net = Net(**F64)
    tol = dict(rtol=1e-9, atol=1e-10)
    options = (
        {"step_size": 0.02} if backward == "rk4" else {"solver": "RK45"} if "scipy" in f"{backward}" else {}
    )
    ys = flashode.odeint_adjoint(
        net, y0, t, method=forward, adjoint_method=backward, adjoint_options=options, **tol
    )
    exact = flashode.odeint(net, y0, t, **tol)
    inputs = [y0, t, *net.parameters()]
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (ys, exact))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@SOLVER
@BACKWARD
def test_gradients_along_its_dense_output(solver, backward):
    """adjoint="interpolated": as exact as the polynomials that the steps were recorded as."""
    t = torch.tensor([0.0, 0.4, 1.0], **F64)
    t = t.flip(0) if backward else t
    grads = []
    for solve, more in (
        (flashode.odeint, {}),
        (flashode.odeint_adjoint,
         dict(METHOD, options={"solver": solver}, adjoint="interpolated", adjoint_method="dopri5", adjoint_options={})),
    ):  # fmt: skip
        net, y0 = Net(**F64), twisted_start(**F64).requires_grad_()
        ys = solve(net, y0, t, rtol=1e-8, atol=1e-8, **more)
        grads.append(torch.autograd.grad(ys.square().sum(), [y0, *net.parameters()]))
    for a, b in zip(*grads):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


def test_backward_passes_that_need_steps_are_refused():
    y0, t = twisted_start(**F64), torch.linspace(0, 1, 3, **F64)
    with pytest.raises(ArgumentError, match="they are SciPy's: use adjoint='backsolve'"):
        flashode.odeint_adjoint(Net(**F64), y0, t, adjoint="checkpoint", **METHOD)
    for forward in ("dopri5", "scipy_solver"):
        with pytest.raises(ArgumentError, match="not by 'scipy_solver': give adjoint_method='dopri5'"):
            flashode.odeint_adjoint(
                Net(**F64), y0, t, adjoint="interpolated", method=forward, adjoint_method="scipy_solver"
            )
    with pytest.raises(ArgumentError, match="SciPy's norm is fixed"):
        flashode.odeint_adjoint(Net(**F64), y0, t, adjoint_options={"norm": "seminorm"}, **METHOD)


def test_arguments_of_the_field_get_gradients():
    w = torch.tensor(0.7, **F64).requires_grad_()
    ys = flashode.odeint_adjoint(
        lambda t, y, w: -w * y, torch.ones(1, **F64), torch.tensor([0.0, 1.0], **F64), args=(w,),
        adjoint_params=(), rtol=1e-8, atol=1e-9, **METHOD,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(ys[-1].sum(), w)
    assert abs(grad + math.exp(-0.7)) < 1e-6


def test_a_single_time_is_the_start_whatever_the_solver_takes():
    y0 = torch.ones(2, dtype=torch.complex64)
    y = flashode.odeint(lambda t, y: 1j * y, y0, torch.tensor([0.5]), method="scipy_solver")
    assert torch.equal(y, y0[None])
