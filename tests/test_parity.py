"""What a program written for torchdiffeq sees: the same calls, the same steps, the same answers."""

import inspect

import pytest
import torch
from problems import Counted, Net, Spiral, detest, growth, twisted, twisted_start

import flashode
from flashode.methods import METHODS

torchdiffeq = pytest.importorskip("torchdiffeq", reason="the comparison needs torchdiffeq")

SHARED_ADAPTIVE = ["dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun"]
SHARED_FIXED = ["euler", "midpoint", "heun2", "heun3", "rk4"]
DETEST = ["A3", "A5", "B2", "B4", "D3", "E2", "E4"]
BACKWARD = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])


def callbacks_of(field):
    """The same field, recording every step it is told of."""
    for name in ("callback_step", "callback_accept_step", "callback_reject_step"):
        steps = []
        setattr(field, name.removeprefix("callback_") + "s", steps)
        setattr(field, name, lambda t0, y0, dt, steps=steps: steps.append((float(t0), float(dt))))
    return field


@pytest.mark.parametrize("method", SHARED_ADAPTIVE)
@pytest.mark.parametrize("name", DETEST)
def test_overshoot_repeats_the_steps_of_torchdiffeq(method, name, engine):
    """Accepted steps, rejected ones, calls and times of calls; values at step ends to rounding."""
    problem = detest()[name]
    t = problem.t if method != "adaptive_heun" else problem.t / 4
    theirs, ours = callbacks_of(problem.field()), callbacks_of(problem.field())
    tol = dict(rtol=1e-5, atol=1e-6)
    y = torchdiffeq.odeint(theirs, problem.y0, t, method=method, **tol)
    solution = flashode.solve(
        ours, problem.y0, t, method=method, options={"overshoot": True}, engine=engine, **tol
    )
    assert ours.nfe == theirs.nfe == solution.stats.nfe
    assert solution.stats.accepted == len(theirs.accept_steps) == len(ours.accept_steps)
    assert solution.stats.rejected == len(theirs.reject_steps) == len(ours.reject_steps)
    # dopri8's error estimate is a small difference: here it is rounding, and step sizes follow it.
    rough = method == "dopri8"
    a, b = (torch.tensor(f.times, dtype=torch.float64) for f in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-4 if rough else 1e-7, atol=1e-5 if rough else 1e-9)
    if method == "dopri5":
        torch.testing.assert_close(solution.ys, y, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", SHARED_ADAPTIVE)
@pytest.mark.parametrize("name", DETEST)
def test_landing_never_costs_a_call(method, name, native):
    problem = detest()[name]
    t = problem.t if method != "adaptive_heun" else problem.t / 4
    theirs, ours = problem.field(), problem.field()
    torchdiffeq.odeint(theirs, problem.y0, t, method=method, rtol=1e-4, atol=1e-5)
    flashode.odeint(ours, problem.y0, t, method=method, rtol=1e-4, atol=1e-5, engine=native)
    assert ours.nfe <= theirs.nfe
    assert min(t) <= min(ours.times) and max(ours.times) <= max(t)


@BACKWARD
@pytest.mark.parametrize("method", SHARED_ADAPTIVE + SHARED_FIXED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_values_agree(method, dtype, backward, engine):
    field = Net(dtype=dtype)
    y0, t = torch.rand(4, 2, dtype=dtype), torch.linspace(0, 2, 9, dtype=dtype)
    t = t.flip(0) if backward else t
    options = {} if method in SHARED_ADAPTIVE else {"step_size": 0.05}
    with torch.no_grad():
        theirs = torchdiffeq.odeint(field, y0, t, method=method, rtol=1e-6, atol=1e-7, options=options)
        ours = flashode.odeint(
            field, y0, t, method=method, rtol=1e-6, atol=1e-7, options=options, engine=engine
        )
    # All interpolants but dopri5's differ on purpose; fixed steps agree to rounding.
    tol = 2e-6 if method == "dopri5" else 1e-3
    tol = tol if method in SHARED_ADAPTIVE else 1e-13 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(ours, theirs, rtol=tol, atol=tol)


@BACKWARD
@pytest.mark.parametrize("method", SHARED_FIXED)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"step_size": 0.3},
        {"step_size": 0.1, "interp": "cubic"},
        {"perturb": True},
        {"grid_constructor": lambda f, y0, t: torch.linspace(t[0].item(), t[-1].item(), 8, dtype=t.dtype)},
    ],
    ids=["grid t", "step_size", "cubic", "perturb", "grid_constructor"],
)
def test_fixed_grids_agree(method, options, backward, engine):
    y0, t = twisted_start(dtype=torch.float64), torch.tensor([0.0, 0.2, 0.55, 1.0], dtype=torch.float64)
    t = t.flip(0) if backward else t
    theirs, ours = Counted(twisted), Counted(twisted)
    a = torchdiffeq.odeint(theirs, y0, t, method=method, options=dict(options))
    b = flashode.odeint(ours, y0, t, method=method, options=dict(options), engine=engine)
    torch.testing.assert_close(b, a, rtol=1e-13, atol=1e-13)
    assert ours.nfe <= theirs.nfe


@BACKWARD
@pytest.mark.parametrize("option", ["step_t", "jump_t"])
def test_prescribed_points_agree(option, backward, engine):
    def field(t, y):
        return torch.where((t > 0.6) ^ (t > 1.3), -5.0, 1.0) * y

    y0, t = torch.ones(2, dtype=torch.float64), torch.tensor([0.0, 0.9, 2.0], dtype=torch.float64)
    t = t.flip(0) if backward else t
    points = torch.tensor([0.6, 1.3], dtype=torch.float64)
    theirs, ours = Counted(field), Counted(field)
    tol = dict(rtol=1e-8, atol=1e-9)
    a = torchdiffeq.odeint(theirs, y0, t, options={option: points, "first_step": 0.1}, **tol)
    b = flashode.odeint(ours, y0, t, options={option: points, "first_step": 0.1}, engine=engine, **tol)
    torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-7)
    assert ours.nfe <= theirs.nfe
    assert any(abs(s - 0.6) < 1e-12 for s in ours.times)


def test_jumps_keep_the_error_within_tolerance(engine):
    def field(t, y):
        return torch.where(t < 1.0, -y, 3 * y)

    y0, t = torch.ones(1, dtype=torch.float64), torch.tensor([0.0, 1.5], dtype=torch.float64)
    ys = flashode.odeint(
        field, y0, t, rtol=1e-9, atol=1e-10, options={"jump_t": torch.tensor([1.0])}, engine=engine
    )
    torch.testing.assert_close(
        ys[-1], torch.exp(torch.tensor([0.5], dtype=torch.float64)), rtol=1e-8, atol=1e-9
    )


@pytest.mark.parametrize(
    "norm", [lambda y: y.abs().max(), lambda y: 3 * y.pow(2).mean().sqrt()], ids=["max", "scaled"]
)
def test_norms_of_the_user_agree(norm, engine):
    y0, t = twisted_start(dtype=torch.float64), torch.tensor([0.0, 1.5], dtype=torch.float64)
    theirs, ours = Counted(twisted), Counted(twisted)
    options = {"norm": norm}
    a = torchdiffeq.odeint(theirs, y0, t, options=dict(options))
    b = flashode.odeint(ours, y0, t, options=options | {"overshoot": True}, engine=engine)
    assert ours.nfe == theirs.nfe
    torch.testing.assert_close(b, a, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("seminorm", [False, True])
def test_norms_and_tolerances_of_tuples_agree(seminorm, engine):
    """The norm gets the members; a huge tolerance takes one of them out of step control."""

    def field(t, state):
        return tuple(Counted.__call__(counter, t, y) for y in state)

    counters = []
    y0 = (torch.rand(3, dtype=torch.float64) + 1, torch.rand(2, 2, dtype=torch.float64) + 1)
    t = torch.tensor([0.0, 2.0], dtype=torch.float64)
    arguments = dict(rtol=[1e-6, 1e3], atol=[1e-7, 1e3])
    if seminorm:
        arguments["options"] = {"norm": lambda state: state[0].abs().max()}
    results = []
    for solve, extra in ((torchdiffeq.odeint, {}), (flashode.odeint, {"engine": engine})):
        counter = Counted(growth)
        counters.append(counter)
        options = dict(arguments.get("options", {}))
        if extra:
            options["overshoot"] = True
        results.append(solve(field, y0, t, **{**arguments, "options": options}, **extra))
    assert counters[0].nfe == counters[1].nfe
    for a, b in zip(*results):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"first_step": 0.01},
        {"safety": 0.5},
        {"ifactor": 2.0, "dfactor": 0.5},
        {"max_step": 0.05},
        {"min_step": 0.1},
        {"dtype": torch.float64},
    ],
    ids=lambda o: next(iter(o)),
)
def test_options_of_step_control_agree(options, engine):
    y0, t = twisted_start(dtype=torch.float64), torch.tensor([0.0, 0.7, 1.5], dtype=torch.float64)
    theirs, ours = Counted(twisted), Counted(twisted)
    a = torchdiffeq.odeint(theirs, y0, t, rtol=1e-6, atol=1e-6, options=dict(options))
    b = flashode.odeint(
        ours, y0, t, rtol=1e-6, atol=1e-6, options=options | {"overshoot": True}, engine=engine
    )
    assert ours.nfe == theirs.nfe
    torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


def test_callbacks_see_true_times_and_steps(engine):
    for t in (torch.tensor([0.0, 1.5]), torch.tensor([1.5, 0.0])):
        theirs, ours = callbacks_of(Counted(twisted)), callbacks_of(Counted(twisted))
        y0 = twisted_start(dtype=torch.float64)
        torchdiffeq.odeint(theirs, y0, t, rtol=1e-4, atol=1e-4)
        flashode.odeint(ours, y0, t, rtol=1e-4, atol=1e-4, options={"overshoot": True}, engine=engine)
        for name in ("steps", "accept_steps", "reject_steps"):
            a, b = (torch.tensor(getattr(f, name)) for f in (theirs, ours))
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


@BACKWARD
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_events_agree(method, backward, engine):
    """A ball thrown up; an event of two parts, the first to fire ends the solve."""

    def field(t, state):
        return torch.stack([state[1], torch.full_like(state[1], -9.81)])

    def event(t, state):
        return torch.stack([state[0], 100 - state[0]])

    y0 = torch.tensor([2.0, 5.0], dtype=torch.float64)
    t = torch.tensor([0.0, -1.0 if backward else 1.0], dtype=torch.float64)
    options = {"step_size": 0.01, "interp": "cubic"} if method == "rk4" else {}
    a_t, a = torchdiffeq.odeint(
        field, y0, t, event_fn=event, method=method, options=dict(options), atol=1e-10
    )
    with torch.no_grad():
        b_t, b = flashode.odeint(
            field, y0, t, event_fn=event, method=method, options=dict(options), atol=1e-10, engine=engine
        )
    torch.testing.assert_close(b_t, a_t, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(b, a, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["odeint", "odeint_adjoint"])
def test_signatures_are_a_superset(name):
    theirs = inspect.signature(getattr(torchdiffeq, name)).parameters
    ours = inspect.signature(getattr(flashode, name)).parameters
    for parameter in theirs.values():
        assert ours[parameter.name].kind == parameter.kind
        assert ours[parameter.name].default == parameter.default
    ours_alone = {"args", "engine", "progress"}
    more = {"odeint": ours_alone, "odeint_adjoint": ours_alone | {"adjoint", "checkpoints"}}
    assert set(ours) - set(theirs) == more[name]


def test_every_explicit_method_of_torchdiffeq_is_there():
    from torchdiffeq._impl.odeint import SOLVERS

    later = {"explicit_adams", "implicit_adams", "fixed_adams", "scipy_solver"}
    assert set(SOLVERS) - later <= set(METHODS)


def test_time_reaches_the_field_as_torchdiffeq_hands_it(engine):
    """A 0-d tensor of the state's real dtype on its device; the end of a step is nudged inside."""
    seen = {}
    for name, solve in (("theirs", torchdiffeq.odeint), ("ours", flashode.odeint)):
        times = seen[name] = []

        def field(t, y, times=times):
            assert t.shape == () and t.dtype == y.dtype and t.device == y.device
            times.append(t.item())
            return -y

        extra = {"options": {"overshoot": True}, "engine": engine} if name == "ours" else {}
        solve(field, torch.ones(2), torch.tensor([0.0, 1.0]), rtol=1e-3, atol=1e-3, **extra)
    assert len(seen["theirs"]) == len(seen["ours"])
    torch.testing.assert_close(torch.tensor(seen["ours"]), torch.tensor(seen["theirs"]), rtol=2e-6, atol=1e-7)


def test_the_demonstration_spiral_makes_no_more_calls(native):
    y0, t = torch.tensor([[2.0, 0.0]]), torch.linspace(0, 25, 1000)
    theirs, ours = Counted(Spiral()), Counted(Spiral())
    with torch.no_grad():
        a = torchdiffeq.odeint(theirs, y0, t)
        b = flashode.odeint(ours, y0, t, engine=native)
    torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3)
    assert ours.nfe <= theirs.nfe * 1.02, "float32 rounding may move single steps, not more"
