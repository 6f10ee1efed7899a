"""The public functions: results, status and statistics, choice of engine, life without the extension."""

import logging
import math
import subprocess
import sys

import pytest
import torch
from problems import EXPLICIT, Counted, growth, growth_solution, twisted, twisted_solution, twisted_start

import flashode
from flashode import Status

ADAPTIVE = [name for name, m in EXPLICIT.items() if m.adaptive]


def run_python(code, *flags):
    return subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, timeout=120)


# ---- landing -------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", list(EXPLICIT))
@pytest.mark.filterwarnings("ignore:.*cannot meet these tolerances")
def test_the_field_is_never_called_outside_the_interval(method, dtype, backward, engine):
    """Also when rounding the time to the state's dtype would leave it by half a unit."""
    ends = (0.1, 1.7)
    t = torch.linspace(*(reversed(ends) if backward else ends), 5, dtype=torch.float64)
    field = Counted(growth)
    options = {} if EXPLICIT[method].adaptive else {"step_size": 0.07, "interp": "cubic"}
    flashode.odeint(
        field,
        torch.ones(2, dtype=dtype),
        t,
        method=method,
        rtol=1e-3,
        atol=1e-4,
        options=options,
        engine=engine,
    )
    assert ends[0] <= min(field.times) and max(field.times) <= ends[1]


@pytest.mark.parametrize(
    "method, tolerance", [("dopri8", 1e-12), ("dopri5", 1e-10), ("tsit5", 1e-10), ("fehlberg45", 1e-10)]
)
def test_the_final_value_has_the_accuracy_asked_for(method, tolerance, engine):
    """torchdiffeq's dopri8 interpolates it by a quartic, and misses by thousands of tolerances."""
    y0, t = twisted_start(dtype=torch.float64), torch.tensor([0.0, 1.5], dtype=torch.float64)
    ys = flashode.odeint(twisted, y0, t, rtol=tolerance, atol=tolerance, method=method, engine=engine)
    exact = twisted_solution(t)[-1]
    error = ((ys[-1] - exact).abs() / (tolerance + tolerance * exact.abs())).max().item()
    assert error < 30


@pytest.mark.parametrize("method, tolerance", [("dopri8", 1e-11), ("dopri5", 1e-9), ("tsit5", 1e-9), ("fehlberg45", 1e-9), ("bosh3", 1e-6)])  # fmt: skip
def test_outputs_between_steps_are_as_accurate_as_the_steps(method, tolerance, engine):
    y0, t = twisted_start(dtype=torch.float64), torch.linspace(0, 1.5, 500, dtype=torch.float64)
    ys = flashode.odeint(twisted, y0, t, rtol=tolerance, atol=tolerance, method=method, engine=engine)
    exact = twisted_solution(t)
    errors = ((ys - exact).abs() / (tolerance + tolerance * exact.abs())).amax(1)
    assert errors.max() < 300


@pytest.mark.parametrize("method", ADAPTIVE)
def test_outputs_in_between_never_change_the_steps(method, engine):
    y0 = twisted_start(dtype=torch.float64)
    few, many = (torch.linspace(0, 1.5, n, dtype=torch.float64) for n in (2, 77))
    a = flashode.solve(twisted, y0, few, method=method, rtol=1e-5, atol=1e-5, engine=engine)
    b = flashode.solve(twisted, y0, many, method=method, rtol=1e-5, atol=1e-5, engine=engine)
    assert a.stats.accepted_times == b.stats.accepted_times
    assert torch.equal(a.ys[-1], b.ys[-1])
    assert a.stats.accepted_times[-1] == 1.5
    if method != "dopri8":
        assert a.stats.nfe == b.stats.nfe


def test_dopri8_pays_three_calls_for_a_step_that_holds_outputs(engine):
    y0 = twisted_start(dtype=torch.float64)
    ends = torch.tensor([0.0, 1.5], dtype=torch.float64)
    plain = flashode.solve(twisted, y0, ends, method="dopri8", engine=engine)
    inside = torch.tensor([0.0, 0.7, 0.7001, 1.5], dtype=torch.float64)
    assert (
        flashode.solve(twisted, y0, inside, method="dopri8", engine=engine).stats.nfe == plain.stats.nfe + 3
    )


def test_calls_are_two_to_start_and_six_for_every_trial_step(engine):
    field = Counted(twisted)
    stats = flashode.solve(field, twisted_start(), torch.linspace(0, 1.5, 20), engine=engine).stats
    assert field.nfe == stats.nfe == 2 + 6 * (stats.accepted + stats.rejected)
    stats = flashode.solve(
        field, twisted_start(), torch.tensor([0.0, 1.5]), options={"first_step": 0.01}, engine=engine
    ).stats
    assert stats.nfe == 1 + 6 * (stats.accepted + stats.rejected)


def test_one_time_needs_no_call(engine):
    field = Counted(growth)
    ys = flashode.odeint(field, torch.ones(2), torch.tensor([0.5]), engine=engine)
    assert torch.equal(ys, torch.ones(1, 2)) and field.nfe == 0


# ---- results -------------------------------------------------------------------------------


def test_solution_tells_what_happened(engine):
    t = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    solution = flashode.solve(growth, torch.ones(2, 3), t, engine=engine)
    assert solution.status is Status.SUCCESS and solution.status.ok
    assert torch.equal(solution.ts, t) and solution.ys.shape == (3, 2, 3)
    stats = solution.stats
    assert (stats.engine, stats.method) == (engine, "dopri5")
    assert len(stats.accepted_times) == stats.accepted and stats.accepted_times[-1] == 2.0
    text = repr(solution)
    for part in (
        "success",
        "dopri5",
        engine,
        "(3, 2, 3) float32",
        f"{stats.nfe} calls of func",
        "\N{HORIZONTAL ELLIPSIS} 2",
    ):
        assert part in text


def test_accepted_times_are_on_the_callers_clock(engine):
    times = flashode.solve(
        growth, torch.ones(2), torch.tensor([2.0, 0.0]), engine=engine
    ).stats.accepted_times
    assert times == sorted(times, reverse=True) and times[-1] == 0.0 and times[0] < 2.0


def test_a_failed_solve_can_be_returned(engine):
    def pole(t, y):
        return y * y

    t = torch.tensor([0.0, 0.5, 0.9, 2.0], dtype=torch.float64)
    solution = flashode.solve(pole, torch.ones(1, dtype=torch.float64), t, engine=engine, throw=False)
    assert solution.status in (Status.STEP_UNDERFLOW, Status.NONFINITE_FIELD, Status.NONFINITE_STATE)
    torch.testing.assert_close(solution.ys[:3, 0], 1 / (1 - t[:3]), rtol=1e-5, atol=1e-6)
    assert solution.ys[3].isnan().all()
    with pytest.raises(flashode.SolveError) as caught:
        flashode.odeint(pole, torch.ones(1, dtype=torch.float64), t, engine=engine)
    error = caught.value
    assert error.reason == solution.status and 0.99 < error.t < 1.01 and error.nfe == solution.stats.nfe


@pytest.mark.parametrize(
    "error", [StopIteration, KeyboardInterrupt, RuntimeError, GeneratorExit], ids=lambda e: e.__name__
)
def test_exceptions_of_the_field_pass_through(error, engine):
    """Unchanged, whatever they are; the next solve starts clean."""

    def field(t, y):
        if t > 0.5:
            raise error("mine")
        return -y

    t = torch.tensor([0.0, 1.0])
    with pytest.raises(error, match="mine"):
        flashode.odeint(field, torch.ones(2), t, engine=engine)
    ys = flashode.odeint(lambda t, y: -y, torch.ones(2), t, engine=engine)
    torch.testing.assert_close(ys[-1], torch.full((2,), -1.0).exp())


def test_results_do_not_alias_the_callers_tensors(engine):
    y0 = torch.ones(3)
    for t in (torch.tensor([0.0]), torch.tensor([0.0, 1.0])):
        ys = flashode.odeint(growth, y0, t, engine=engine)
        ys.zero_()
        assert torch.equal(y0, torch.ones(3))


@pytest.mark.parametrize("method", ["dopri5", "rk4", "bosh3"])
def test_complex_states(method):
    """exp(i t), on the reference engine, which `explain` says."""
    y0 = torch.ones(2, dtype=torch.complex128)
    t = torch.linspace(0, 2, 9, dtype=torch.float64)
    options = {"step_size": 0.01} if method == "rk4" else {}
    ys = flashode.odeint(lambda t, y: 1j * y, y0, t, method=method, options=options)
    torch.testing.assert_close(ys[:, 0], torch.exp(1j * t), rtol=1e-5, atol=1e-5)
    assert "no kernels for torch.complex128" in flashode.explain(growth, y0, t)


# ---- events --------------------------------------------------------------------------------


def test_an_event_ends_the_solve():
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    event_t, ys = flashode.odeint(
        lambda t, y: -y, torch.ones(1, dtype=torch.float64), t, event_fn=lambda t, y: y - 0.25
    )
    torch.testing.assert_close(event_t, torch.tensor(math.log(4), dtype=torch.float64), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(ys[-1], torch.tensor([0.25], dtype=torch.float64), rtol=1e-6, atol=1e-7)


def test_an_event_that_never_fires_ends_at_the_step_limit():
    with pytest.raises(flashode.SolveError, match="max_num_steps exceeded"):
        flashode.odeint(
            lambda t, y: -y, torch.ones(1), torch.tensor([0.0, 1.0]),
            event_fn=lambda t, y: y + 1, options={"max_num_steps": 50},
        )  # fmt: skip


def test_an_event_that_is_zero_at_the_start_has_fired():
    for method, options in (("dopri5", {}), ("rk4", {"step_size": 0.1})):
        event_t, ys = flashode.odeint(
            lambda t, y: torch.ones_like(y), torch.zeros(1), torch.tensor([0.5, 1.0]),
            event_fn=lambda t, y: y, method=method, options=options,
        )  # fmt: skip
        assert event_t == 0.5 and torch.equal(ys, torch.zeros(2, 1))


# ---- engines -------------------------------------------------------------------------------


def test_auto_takes_the_native_engine(native):
    y0, t = torch.ones(2), torch.tensor([0.0, 1.0])
    assert flashode.solve(growth, y0, t).stats.engine == "native"
    text = flashode.explain(growth, y0, t)
    assert text.splitlines()[0] == "dopri5 on the native engine"
    assert "reference: can serve" in text


@pytest.mark.parametrize(
    "y0, extra, reason",
    [
        (torch.ones(2, dtype=torch.complex64), {}, "complex64"),
        ((torch.ones(2), torch.ones(2).double()), {}, "different dtypes"),
        (torch.ones(2), {"event_fn": lambda t, y: y - 9}, "events"),
        (torch.ones(2).as_subclass(type("Mine", (torch.Tensor,), {})), {}, "subclass"),
    ],
    ids=["complex", "mixed", "event", "subclass"],
)
def test_a_named_engine_that_cannot_serve_says_why(y0, extra, reason, native):
    t = torch.tensor([0.0, 1.0])
    with pytest.raises(flashode.ArgumentError, match=reason):
        flashode.solve(growth, y0, t, engine="native", **extra)
    assert reason in flashode.explain(growth, y0, t, **extra)


def test_an_unknown_engine_is_refused():
    with pytest.raises(flashode.ArgumentError, match="engine must be one of"):
        flashode.odeint(growth, torch.ones(2), torch.tensor([0.0, 1.0]), engine="warp")


def test_build_config_and_info_say_what_was_built(native):
    config = flashode.build_config()
    assert config["extension"] and config["torch"] == torch.__version__ and "cpu" in config["devices"]
    assert config["why_not"] or any(d.startswith("cuda") for d in config["devices"])
    text = subprocess.run([sys.executable, "-m", "flashode.info"], capture_output=True, text=True).stdout
    assert all(key in text for key in config)


WITHOUT_EXTENSION = """
import logging, sys, warnings
logging.basicConfig(format="%(message)s")
sys.modules["flashode._C"] = None
import torch, flashode
y = flashode.solve(lambda t, y: -y, torch.ones(1), torch.tensor([0.0, 1.0]))
print(y.stats.engine, round(y.ys[-1].item(), 4), flashode.build_config()["extension"])
try:
    flashode.odeint(lambda t, y: -y, torch.ones(1), torch.tensor([0.0, 1.0]), engine="native")
except ValueError as error:
    print(error)
"""


def test_everything_works_without_the_extension():
    """One clear log line; the reference engine serves; asking for the native one says why not."""
    result = run_python(WITHOUT_EXTENSION)
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert first == "reference 0.3679 False"
    assert "extension is not available" in second
    assert len(result.stderr.splitlines()) == 1 and "reference engine" in result.stderr


def test_import_starts_nothing():
    """No GPU is touched, nothing is compiled and no warning is printed."""
    code = "import torch, flashode; print(torch.cuda.is_initialized())"
    result = run_python(code, "-W", "error")
    assert result.stdout.strip() == "False" and result.returncode == 0
    if flashode.build_config()["extension"]:
        assert result.stderr == ""


def test_the_log_is_quiet_by_default(native, caplog):
    with caplog.at_level(logging.DEBUG):
        flashode.odeint(growth, torch.ones(2), torch.tensor([0.0, 1.0]))
    assert not caplog.records


def test_growth_over_a_long_interval(engine):
    t = torch.linspace(0, 20, 41, dtype=torch.float64)
    ys = flashode.odeint(growth, torch.ones((), dtype=torch.float64), t, method="tsit5", engine=engine)
    torch.testing.assert_close(ys, growth_solution(t), rtol=1e-5, atol=1e-6)
