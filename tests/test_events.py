"""Events: when they fire and which, and where a solve without one ends."""

import functools
import math

import pytest
import torch
import torchdiffeq
from problems import BACKWARD, EXPLICIT, FORWARD, START, Counted, G, f64, fall, height, landing

import flashode
from flashode import ArgumentError, ArgumentTypeError, Event, SolveError, Status, odeint_event, solve
from flashode.events import Watch, crossing

F64 = torch.float64
ADJOINTS = ["backsolve", "interpolated", "checkpoint"]


# ---- the time ------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [FORWARD, BACKWARD], ids=["forward", "backward"])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "rk4", "euler"])
def test_events_and_calls_are_those_of_torchdiffeq(method, t):
    """A tuple state, and an event function of three outputs of which the second fires."""

    def field(t, state):
        x, v = state
        return v * torch.cos(t), -x

    def event(t, state):
        return torch.stack([state[0][0] + 50, state[0][1] - 0.3, t.abs() - 40])

    options = {} if EXPLICIT[method].adaptive else {"step_size": 0.05}
    y0 = f64(1, 0.9), f64(0.5, -0.4)
    results, calls = [], []
    for library, more in ((torchdiffeq, {}), (flashode, {"overshoot": True} if not options else {})):
        counted = Counted(field)
        results.append(
            library.odeint(
                counted,
                y0,
                t,
                event_fn=event,
                method=method,
                options={**options, **more},
                rtol=1e-6,
                atol=1e-8,
            )
        )
        calls.append(counted.times)
    (a_t, a), (b_t, b) = results
    assert len(calls[0]) == len(calls[1])
    torch.testing.assert_close(b_t, a_t, rtol=0, atol=2e-8)
    for ours, theirs in zip(b, a):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("t", [FORWARD, BACKWARD], ids=["forward", "backward"])
@pytest.mark.parametrize("method", EXPLICIT)
def test_every_method_finds_a_landing(method, t):
    """A parabola: exact but for the methods of order 1, whose steps are short."""
    adaptive = EXPLICIT[method].adaptive
    options = {"first_step": 0.1} if adaptive else {"step_size": 1e-3 if method == "euler" else 0.1}
    if not adaptive:
        options["interp"] = "cubic"
    solution = solve(fall, START, t, event_fn=height, method=method, options=options, rtol=1e-4, atol=1e-9)
    expected = landing(2.0, 5.0)[0] if t is FORWARD else -landing(2.0, -5.0)[0]
    assert solution.status == Status.EVENT
    assert abs(solution.event_t.item() - expected) < (6e-3 if method == "euler" else 1e-8)


def test_a_time_is_found_to_atol_and_better_where_the_event_is_smooth():
    for atol in (1e-3, 1e-6, 1e-9):
        for event_fn, tolerance in ((height, 1e-2 * atol), (lambda t, y: y[0] > 0, 0.5 * atol)):
            event_t, _ = flashode.odeint(fall, START, FORWARD, event_fn=event_fn, rtol=1e-10, atol=atol)
            assert abs(event_t.item() - landing(2.0, 5.0)[0]) <= tolerance + 1e-11


DISTANCES = {
    "line": lambda t: 0.3 - t,
    "cubic": lambda t: 0.3 - t**3,
    "steep": lambda t: math.exp(-40 * t) - 1e-6,
    "flat": lambda t: (0.3 - t) ** 9,
    "sign": lambda t: 1.0 if t < 0.3 else -1.0,
    "kink": lambda t: min(1e3 * (0.3 - t), 1e-3 * (0.8 - t)),
    "barely": lambda t: 5e-324 if t < 0.3 else -1.0,
    "infinite": lambda t: 1.0 if t < 0.3 else -math.inf,
    "several": lambda t: math.cos(40 * t) + 0.1,
    "zero at the end": lambda t: 1.0 - t,
    "zero from there on": lambda t: max(0.0, 0.3 - t),
}


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("tol", [1e-3, 1e-9, 0.0])
@pytest.mark.parametrize("scale, begin", [(1.0, 0.0), (1e-6, 5.0), (1e6, -3e5)])
def test_a_crossing_takes_hardly_more_evaluations_than_bisection(name, tol, scale, begin):
    calls = []

    def distance(t):
        calls.append(t)
        return DISTANCES[name]((t - begin) / scale)

    a, b, tol = begin, begin + scale, tol * scale
    t = crossing(distance, a, distance(a), b, distance(b), tol)
    resolution = 2 * math.ulp(max(abs(a), abs(b)))
    width = max(tol, resolution)
    evaluations = len(calls) - 2
    assert evaluations <= math.ceil(math.log2((b - a) / width)) + 2
    assert all(a < c < b for c in calls[2:]) and a <= t <= b
    # Around the time found the sign changes.
    below, above = (distance(min(max(t + s * width, a), b)) for s in (-1, 1))
    assert below > 0 >= above
    if name in ("line", "cubic", "zero at the end") and tol == 1e-9 * scale and scale >= 1:
        assert evaluations <= 10  # bisection takes 30


def test_a_bracket_narrower_than_the_tolerance_is_not_divided():
    assert crossing(None, 1.0, 3.0, 2.0, -1.0, 5.0) == 1.75
    assert crossing(None, 1.0, 3.0, 1.0, -1.0, 0.0) == 1.0


# ---- which, and how ------------------------------------------------------------------------


@pytest.mark.parametrize("backward", [False, True])
def test_direction_is_that_of_the_solve(backward):
    """cos(t) from t = 0 crosses zero downwards first, and next upwards; so it does towards negative t."""
    field, y0, sign = lambda t, y: torch.stack([-y[1], y[0]]), f64(1, 0), -1.0 if backward else 1.0
    t = BACKWARD if backward else FORWARD
    for direction, expected in ((0, 0.5), (-1, 0.5), (1, 1.5)):
        event = Event(height, direction=direction)
        event_t, ys = flashode.odeint(field, y0, t, event_fn=event)
        assert abs(event_t.item() - sign * expected * math.pi) < 1e-7
        assert abs(ys[-1, 0].item()) < 1e-7


def test_the_index_counts_the_outputs_of_all_events():
    events = [
        lambda t, y: torch.stack([y[0] + 50, y[0] - 100]),
        Event(lambda t, y: y[1], direction=1),
        height,
    ]
    solution = solve(fall, START, FORWARD, event_fn=events)
    assert solution.event_index == 3 and "event 3" in repr(solution)
    assert solution.ts.tolist() == [0.0, solution.event_t.item()]
    fired = [
        solve(fall, START, FORWARD, event_fn=e).event_index
        for e in (height, (height, lambda t, y: y[1]), lambda t, y: torch.stack([y[:1], y[1:]]))
    ]
    assert fired == [0, 1, 1]


def test_without_events_a_solution_has_none():
    solution = solve(fall, START, FORWARD)
    assert solution.event_t is None and solution.event_index == -1 and "event" not in repr(solution)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("method, options", [("dopri5", {}), ("dopri8", {}), ("rk4", {"step_size": 0.03})])
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_a_solve_without_event_ends_at_until(method, options, backward, dtype):
    """Exactly there, with the method's order, and without a call of the field beyond."""
    sign = -1.0 if backward else 1.0
    field, until = Counted(lambda t, y: y * torch.cos(t)), sign * 0.7
    t = torch.tensor([0.0, sign * 100.0], dtype=dtype)
    events = Event(lambda t, y: y - 50, until=until), Event(lambda t, y: y + 1, until=torch.tensor(2 * until))
    solution = solve(field, torch.ones((), dtype=dtype), t, event_fn=events, method=method, options=options)
    assert solution.status == Status.NO_EVENT and solution.status.ok and solution.event_index == -1
    assert solution.event_t == t.new_tensor(until) == solution.ts[-1]
    assert all(0 <= sign * s <= 0.7 for s in field.times)
    expected = torch.sin(torch.tensor(until)).exp().to(dtype)
    torch.testing.assert_close(solution.ys[-1], expected, rtol=1e-6, atol=0)
    assert "no_event" in repr(solution)


def test_fixed_steps_to_until_are_those_of_a_solve_to_there():
    field, event = Counted(fall), Event(lambda t, y: y[0] + 50, until=0.3)
    options = {"step_size": 0.1}
    _, ys = flashode.odeint(field, START, FORWARD, event_fn=event, method="rk4", options=options)
    plain = flashode.odeint(fall, START, f64(0, 0.3), method="rk4", options=options, engine="reference")
    assert field.nfe == 12 and torch.equal(ys, plain)


def test_an_event_at_until_has_fired():
    event = Event(lambda t, y: t - 0.5, until=0.5)
    assert solve(fall, START, FORWARD, event_fn=event).status == Status.EVENT


def test_until_may_be_the_start():
    field = Counted(fall)
    solution = solve(field, START, FORWARD, event_fn=Event(height, until=0))
    assert solution.status == Status.NO_EVENT and solution.event_t == 0 and field.nfe == 0
    assert torch.equal(solution.ys, torch.stack([START, START]))


def test_without_until_a_solve_ends_at_the_step_limit():
    def never(t, y):
        return y[0] ** 2 + 1

    with pytest.raises(SolveError, match=r"before an event.*flashode.Event\(event_fn, until=") as caught:
        flashode.odeint(fall, START, FORWARD, event_fn=never, options={"max_num_steps": 10})
    assert caught.value.reason == Status.MAX_STEPS
    options = {"max_num_steps": 10}
    failed = solve(fall, START, FORWARD, event_fn=never, options=options, throw=False)
    assert failed.status == Status.MAX_STEPS and failed.event_t is None and failed.event_index == -1
    assert failed.ts.isnan().tolist() == [False, True] and failed.ys[1].isnan().all()


@pytest.mark.parametrize("method", ["dopri5", "kvaerno3"])
@pytest.mark.parametrize(
    "y0", [torch.ones(1), f64(1.0, 2.0), torch.zeros(0)], ids=["float32", "float64", "empty"]
)
@pytest.mark.parametrize("reverse_time", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
def test_a_state_at_rest_runs_out_of_time(method, y0, reverse_time, recorded):
    """Without an error to control, steps grow until no number can hold the time."""
    field = Counted(lambda t, y: torch.zeros_like(y))
    with (
        torch.set_grad_enabled(recorded),
        pytest.raises(
            SolveError, match=r"greatest time .* before an event.*flashode.Event\(event_fn, until="
        ) as caught,
    ):
        odeint_event(
            field, y0, 0.0, event_fn=lambda t, y: y.sum() - 9, method=method, reverse_time=reverse_time
        )
    assert caught.value.reason == Status.MAX_STEPS and math.isfinite(caught.value.t) and field.nfe < 5_000


# ---- the start -----------------------------------------------------------------------------


@pytest.mark.parametrize("method, options", [("dopri5", {}), ("rk4", {"step_size": 0.05})])
def test_from_the_ground_a_ball_with_a_direction_flies(method, options):
    """A plain event that is zero at the start has fired; one with a direction waits to be crossed."""
    y0 = f64(0, 5)
    ends = [
        solve(fall, y0, FORWARD, event_fn=event, method=method, options=options).event_t.item()
        for event in (height, Event(height), Event(height, direction=-1))
    ]
    assert ends[:2] == [0, 0] and abs(ends[2] - 10 / G) < 1e-2
    # Upwards it leaves zero at once: that is the event.
    up = solve(fall, y0, FORWARD, event_fn=Event(height, direction=1), method=method, options=options)
    assert 0 <= up.event_t.item() < 1e-8


@pytest.mark.parametrize("below", [0.0, 1e-9])
def test_on_the_other_side_an_event_with_a_direction_waits(below):
    """A ball thrown up from a little below the ground lands when it comes down, not as it comes out."""
    y0 = f64(-below, 5)
    event_t, _ = flashode.odeint(fall, y0, FORWARD, event_fn=Event(height, direction=-1))
    assert abs(event_t.item() - 10 / G) < 1e-7
    if below:
        event_t, _ = flashode.odeint(fall, y0, FORWARD, event_fn=height)
        assert event_t.item() < 1e-8


def test_an_event_that_has_fired_at_the_start_needs_no_call_of_the_field():
    field = Counted(fall)
    solution = solve(field, f64(0, 5), FORWARD, event_fn=(lambda t, y: y[0] + 1, height))
    assert field.nfe == 0 and solution.event_index == 1 and solution.status == Status.EVENT


# ---- several in one step -------------------------------------------------------------------


@pytest.mark.parametrize("method, options", [("dopri5", {"first_step": 1.0}), ("rk4", {"step_size": 1.0})])
def test_the_first_of_several_in_one_step_wins(method, options):
    """Whatever their order, scale and kind."""
    times = [0.83, 0.31, 0.62, 0.32]
    scales = [1e-6, 1e6, 1.0, -1e-3]
    events = [lambda t, y, a=a, s=s: s * (y - a) for a, s in zip(times, scales)]
    events.append(lambda t, y: y < 0.35)
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 3, 4, 1]):
        chosen = [events[i] for i in order]
        solution = solve(
            lambda t, y: torch.ones_like(y),
            f64(0)[0],
            FORWARD,
            event_fn=chosen,
            method=method,
            options=options,
        )
        assert order[solution.event_index] == 1 and solution.stats.accepted == 1
        assert abs(solution.event_t.item() - 0.31) < 1e-8


def test_a_sign_change_and_back_within_a_step_is_seen_in_between():
    """y = t (1.2 - t) is above 0.3 for half of the first step, and below it at both ends."""
    field, event = lambda t, y: 1.2 - 2 * t, lambda t, y: y - 0.3
    options = {"first_step": 1.2, "max_num_steps": 50}
    solution = solve(field, f64(0)[0], FORWARD, event_fn=Event(event, until=2.0), options=options)
    assert solution.stats.accepted == 1
    assert abs(solution.event_t.item() - (0.6 - math.sqrt(0.06))) < 1e-9


def test_looking_into_steps_costs_no_calls_of_the_field():
    calls = []
    for event_fn in (None, lambda t, y: y[0] + 1e3):
        field = Counted(lambda t, y: -y * torch.cos(3 * t))
        t = f64(0, 2) if event_fn is None else FORWARD
        event = None if event_fn is None else Event(event_fn, until=2.0)
        for method in ("dopri5", "dopri8"):
            flashode.odeint(field, START, t, event_fn=event, method=method)
        calls.append(field.times)
    assert calls[0] == calls[1]


def test_the_stages_that_dense_output_adds_are_evaluated_once():
    """dopri8 takes 13 calls a step, 2 to begin with, and 3 for the step in which the event lies."""
    solution = solve(fall, START, FORWARD, event_fn=height, method="dopri8")
    assert solution.stats.nfe == 2 + 13 * (solution.stats.accepted + solution.stats.rejected) + 3


def test_watch_goes_by_elements():
    events = Event(height, direction=1), Event(height)
    watch = Watch(events, 0.0, [f64(1, -1, 0), f64(2)])
    assert watch.distances(f64(-1, 1, 1, 2)).tolist() == [math.inf, -1, -1, 2]
    assert watch.passed(f64(-1, -1, 0, 2)) == 5e-324
    assert watch.distances(f64(-1, 1, 1, 2)).tolist() == [1, -1, -1, 2]
    assert watch.distances(f64(0, -1, 0, 2)).tolist() == [0, 1, 5e-324, 2]
    assert watch.passed(f64(-1, -1, -1, 2)) == 1
    assert watch.distances(f64(0, -1, 0, 2)).tolist() == [0, 1, 0, 2]


# ---- a bouncing ball -----------------------------------------------------------------------


def bounce(y0, event_fn, kick, **more):
    """Times of five landings; the ball keeps 0.8 of its speed."""
    t, y, times = f64(0)[0], y0, []
    for _ in range(5):
        t, ys = odeint_event(fall, y, t, event_fn=event_fn, rtol=1e-10, atol=1e-12, **more)
        y = torch.stack([ys[-1, 0] + kick, -0.8 * ys[-1, 1]])
        times.append(t)
    return torch.stack(times)


def landings(h):
    flights = f64(1, *(2 * 0.8**bounces for bounces in range(1, 5)))
    return (2 * h / G).sqrt() * flights.cumsum(0)


@pytest.mark.parametrize(
    "event_fn, kick", [(height, 1e-7), (Event(height, direction=-1), 0.0)], ids=["kicked", "with a direction"]
)
def test_a_bouncing_ball(event_fn, kick):
    """The times of its landings, and their gradients through all bounces before."""
    h = f64(3)[0].requires_grad_()
    ours = bounce(torch.stack([h, torch.zeros_like(h)]), event_fn, kick)
    expected = landings(h)
    torch.testing.assert_close(ours, expected, rtol=1e-6 if kick else 1e-9, atol=1e-9)
    grads = [torch.autograd.grad(times.sum(), h)[0] for times in (ours, expected)]
    torch.testing.assert_close(*grads, rtol=1e-5 if kick else 1e-8, atol=0)


# ---- both engines --------------------------------------------------------------------------


def on_both(field, y0, t, event, **arguments):
    found = []
    for engine in ("reference", "native"):
        counted = Counted(field)
        with torch.no_grad():
            solution = solve(counted, y0, t, event_fn=event, engine=engine, throw=False, **arguments)
        assert solution.stats.nfe == counted.nfe and solution.stats.engine == engine
        found.append(solution)
    return found


@pytest.mark.parametrize("t", [FORWARD, BACKWARD], ids=["forward", "backward"])
@pytest.mark.parametrize("name", EXPLICIT)
def test_engines_find_the_same_event(name, t, native):
    """Of a tuple state, the second of three; and an end without event."""

    def field(t, state):
        x, v = state
        return v * torch.cos(t), -x

    y0 = f64(1, 0.9), f64(0.5, -0.4)
    options = {} if EXPLICIT[name].adaptive else {"step_size": 0.03}
    for until in (None, 0.1):
        until = None if until is None else until * (t[1] - t[0]).item()
        fires = Event(lambda t, s: torch.stack([s[0][0] + 50, s[0][1] - 0.3, t.abs() - 40]), until=until)
        a, b = on_both(field, y0, t, fires, method=name, options=options, rtol=1e-6, atol=1e-8, dense=True)
        assert a.status == b.status == (Status.EVENT if until is None else Status.NO_EVENT)
        assert a.event_index == b.event_index == (1 if until is None else -1)
        assert (a.stats.accepted, a.stats.rejected, a.stats.nfe) == (
            b.stats.accepted,
            b.stats.rejected,
            b.stats.nfe,
        )
        torch.testing.assert_close(b.event_t, a.event_t, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(b.ys, a.ys, rtol=1e-9, atol=1e-9)
        middle = 0.4 * a.event_t
        torch.testing.assert_close(b.sol(middle), a.sol(middle), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:.*cannot meet these tolerances")
def test_engines_agree_in_low_precision(dtype, native):
    y0 = START.to(dtype)
    a, b = on_both(fall, y0, FORWARD.to(dtype), height, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(b.event_t, a.event_t)
    torch.testing.assert_close(b.ys, a.ys, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "field, options, status",
    [
        (fall, {"max_num_steps": 3, "max_step": 0.01}, Status.MAX_STEPS),
        (lambda t, y: fall(t, y) * torch.where(t > 0.3, math.nan, 1.0), {}, Status.NONFINITE_FIELD),
        (lambda t, y: y * math.inf, {}, Status.NONFINITE_FIELD),
    ],
)
def test_engines_fail_alike(field, options, status, native):
    a, b = on_both(field, START, FORWARD, height, options=options)
    assert a.status == b.status == status
    assert b.event_t is None and b.ys[1].isnan().all() and torch.equal(b.ys[0], START)


def test_a_stage_that_only_the_interpolant_has_is_looked_at_on_both_engines(native):
    """dopri8 evaluates three more stages to find the time; this field is not finite in them alone."""

    def field(t, y):
        calls.append(t)
        return fall(t, y) * (math.nan if len(calls) > regular else 1.0)

    for engine in ("reference", "native"):
        calls, regular = [], 10**9
        call = dict(method="dopri8", options={"first_step": 2.0}, event_fn=height, engine=engine, throw=False)
        with torch.no_grad():
            found = solve(field, START, FORWARD, **call)
            regular, calls = len(calls) - 3, []
            assert found.status == Status.EVENT
            assert solve(field, START, FORWARD, **call).status == Status.NONFINITE_FIELD


def test_a_field_and_an_event_may_keep_and_write_what_they_are_shown(native):
    kept = []

    def field(t, y):
        k = fall(t, y)
        y.zero_()
        return k

    def event(t, y):
        kept.append((y, y.clone()))
        return y[0]

    a, b = on_both(field, START, FORWARD, event, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(y, copy) for y, copy in kept)
    torch.testing.assert_close(b.ys, a.ys, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_adjoint_gradients_are_those_of_the_reference(adjoint, native):
    grads = []
    for engine in ("reference", "native"):
        y0, g = START.clone().requires_grad_(), f64(G, requires_grad=True)
        interface = functools.partial(
            flashode.odeint_adjoint, adjoint=adjoint, adjoint_params=g, engine=engine
        )
        t, ys = odeint_event(
            lambda t, y: torch.stack([y[1], -g[0] + 0 * y[1]]),
            y0,
            0.0,
            event_fn=height,
            odeint_interface=interface,
        )
        grads.append(torch.autograd.grad(t + ys[-1, 1], [y0, g]))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_with_gradients_the_reference_engine_serves():
    with pytest.raises(ArgumentError, match="recorded by the reference engine"):
        solve(fall, START, FORWARD, event_fn=height, engine="native")
    with torch.no_grad():
        assert solve(fall, START, FORWARD, event_fn=height).stats.engine == "native"


# ---- odeint_event --------------------------------------------------------------------------


def test_numbers_and_tensors_are_initial_times():
    expected = landing(2.0, 5.0)[0]
    for t0 in (0, 0.0, torch.tensor(0.0), torch.zeros(1, dtype=F64)):
        event_t, ys = odeint_event(fall, START, t0, event_fn=height)
        assert event_t.shape == () and abs(event_t.item() - expected) < 1e-6 and ys.shape == (2, 2)
        assert event_t.dtype == (t0.dtype if isinstance(t0, torch.Tensor) else F64)
    far = 2.0**26 + 4  # where 1 is below the resolution of float32
    event_t, _ = odeint_event(fall, START, torch.tensor(far), event_fn=lambda t, y: t - far - 16)
    assert event_t == far + 16


def test_further_arguments_of_the_field():
    g = f64(G)[0].requires_grad_()

    def field(t, y, g):
        return torch.stack([y[1], -g + 0 * y[1]])

    for interface, more in (
        (flashode.odeint, {"args": (g,)}),
        (functools.partial(flashode.odeint, args=(g,)), {}),
        (lambda *a, **k: flashode.odeint_adjoint(*a, adjoint_params=(), args=(g,), **k), {}),
    ):
        event_t, _ = odeint_event(field, START, 0.0, event_fn=height, odeint_interface=interface, **more)
        (grad,) = torch.autograd.grad(event_t, g)
        expected = torch.autograd.grad(landing(2.0, 5.0, g)[0], g)[0]
        torch.testing.assert_close(grad, expected, rtol=1e-7, atol=0)


def test_the_signature_is_torchdiffeqs():
    import inspect

    theirs, ours = (inspect.signature(m.odeint_event).parameters for m in (torchdiffeq, flashode))
    assert list(theirs) == list(ours) and [p.kind for p in theirs.values()] == [p.kind for p in ours.values()]


BAD = {
    "event_fn a number": ({"event_fn": 3}, ArgumentTypeError, "event_fn must be callable.*int 3"),
    "event_fn None": ({"event_fn": None}, ArgumentTypeError, "event_fn must be callable.*None"),
    "no events": ({"event_fn": ()}, ArgumentError, "event_fn is an empty tuple"),
    "no events in a list": ({"event_fn": []}, ArgumentError, "event_fn is an empty list"),
    "one that is no event": ({"event_fn": (height, "y")}, ArgumentTypeError, "must be callable.*str 'y'"),
    "NaN": ({"event_fn": lambda t, y: y * math.nan}, ArgumentError, "returned NaN at t=0.0"),
    "NaN of the second": (
        {"event_fn": (height, lambda t, y: (1 - y[0]).log())},
        ArgumentError,
        "event_fn: event 1 returned NaN at t=0.0",
    ),
    "NaN later": ({"event_fn": lambda t, y: (y[0] - 1).sqrt() + 0.1}, ArgumentError, "returned NaN at t=1"),
    "a number": ({"event_fn": lambda t, y: 1.0}, ArgumentTypeError, "must return a Tensor, got float 1.0"),
    "nothing": ({"event_fn": lambda t, y: y[:0]}, ArgumentError, r"a sign or several.*shape \(0,\)"),
    "complex": ({"event_fn": lambda t, y: y * 1j}, ArgumentError, "a sign or several.*complex128"),
    "more and more": (
        {"event_fn": lambda t, y: torch.ones(1 if t == 0 else 2)},
        ArgumentError,
        "returned 1 values at the start and 2 at t=",
    ),
    "t0 two": ({"t0": f64(0, 1)}, ArgumentError, r"t0 must have one element, got shape \(2,\)"),
    "t0 int": ({"t0": torch.tensor(0)}, ArgumentTypeError, "t0 must be a number or a floating.*torch.int64"),
    "t0 text": (
        {"t0": "0"},
        ArgumentTypeError,
        "t0 must be a number or a Tensor of one element, got str '0'",
    ),
    "t0 NaN": ({"t0": math.nan}, ArgumentError, r"t must be finite.*t\[0\] = nan"),
    "interface": ({"odeint_interface": "odeint"}, ArgumentTypeError, "odeint_interface must be callable"),
    "result": ({"odeint_interface": solve}, ArgumentTypeError, "must return .event_t, ys. as odeint does"),
    "foreign direction": (
        {"odeint_interface": torchdiffeq.odeint, "event_fn": Event(height, direction=-1)},
        ArgumentError,
        "odeint_interface is not flashode's",
    ),
    "until before the start": (
        {"event_fn": Event(height, until=-0.5)},
        ArgumentError,
        r"until=-0.5 lies on the wrong side of the start, t\[0\]=0.0, of a solve towards greater t",
    ),
    "until after the start": (
        {"event_fn": Event(height, until=0.5), "reverse_time": True},
        ArgumentError,
        "until=0.5 lies on the wrong side.*towards smaller t",
    ),
    "fixed steps": ({"method": "rk4"}, ArgumentError, "Event handling for fixed step solvers.*`step_size`"),
    "too many steps": (
        {"method": "rk4", "options": {"step_size": 1e-9}, "event_fn": Event(height, until=1e3)},
        ArgumentError,
        "asks for 1e.12 steps",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_raises_an_error_that_names_it(name):
    given, error, words = BAD[name]
    with pytest.raises(error, match=words) as caught:
        odeint_event(fall, **{"y0": START, "t0": 0.0, "event_fn": height, **given})
    assert type(caught.value) is error


BAD_EVENTS = {
    "direction": ({"direction": 2}, ArgumentError, "direction must be 0, .1 .* or -1, got int 2"),
    "direction True": ({"direction": True}, ArgumentError, "direction must be .* got bool True"),
    "direction text": ({"direction": "up"}, ArgumentError, "direction must be .* got str 'up'"),
    "fn": ({"fn": 1}, ArgumentTypeError, "event_fn must be callable as event_fn.t, y., got int 1"),
    "until NaN": ({"until": math.nan}, ArgumentError, "until must be finite, or None for no end, got nan"),
    "until inf": ({"until": math.inf}, ArgumentError, "until must be finite"),
    "until two": ({"until": f64(1, 2)}, ArgumentTypeError, r"until must be a number.*shape \(2,\)"),
    "until text": ({"until": "1"}, ArgumentTypeError, "until must be a number.*str '1'"),
    "until a leaf": ({"until": f64(1, requires_grad=True)}, ArgumentError, "until has no gradient"),
}


@pytest.mark.parametrize("name", BAD_EVENTS)
def test_an_event_refuses_what_it_cannot_use(name):
    given, error, words = BAD_EVENTS[name]
    with pytest.raises(error, match=words):
        Event(**{"fn": height, **given})


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_transforms_are_refused_where_the_time_has_a_gradient():
    def run(y0):
        return odeint_event(fall, y0, 0.0, event_fn=height)[0]

    for transformed in (torch.func.grad(run), lambda y: torch.func.jvp(run, (y,), (y,))):
        with pytest.raises(ArgumentError, match="event times have gradients in backward passes only"):
            transformed(START)
