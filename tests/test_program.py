"""Whole solves in C++ against the reference engine: fields written by hand, called as generated ones are."""

import ctypes
import functools
import math
import shutil
import signal
import subprocess
import warnings
from pathlib import Path

import pytest
import torch

import flashode
from flashode import extension
from flashode.batched import BatchProblem
from flashode.errors import Status
from flashode.methods import METHODS
from flashode.problem import Problem
from flashode.program.call import Call, load
from flashode.program.tables import method_source

F32, F64 = torch.float32, torch.float64
HEADERS = Path(__file__).parent.parent / "csrc/compiled"
FLAGS = "-std=c++17 -O1 -march=native -ffp-contract=fast -fno-math-errno -fno-trapping-math -fopenmp -shared -fPIC"
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

# Planar fields, one of which an input chooses; every sample has its own mu.
FIELD = """
struct Field {
  using Real = %s;
  static constexpr int lanes = %d, width = 2, own = 1, prepared = 1, scratch = 0;
  static constexpr bool timed = true;
  static void prepare(const Real* const* inputs, Real* prepared) { prepared[0] = inputs[0][0]; }
  template <class V, class Time>
  static void slope(const Real* prepared, const V* own, Time t, const V* y, V* f, V*) {
    const V x = y[0], v = y[1], mu = own[0];
    switch (int(prepared[0])) {
      case 0: f[0] = v, f[1] = mu * (Real(1) - x * x) * v - x; return;
      case 1: f[0] = Real(-0.1) * x + mu * v, f[1] = Real(-0.1) * v - mu * x; return;
      case 2: f[0] = v * t, f[1] = mu * (t * t) - x; return;
      case 3: f[0] = Real(1) + Real(0) * square_root(Real(1.5) - x), f[1] = -v; return;
      case 4: f[0] = Real(-1e5) * (x - v), f[1] = mu - v; return;
      default: f[0] = zero<V>() + Real(1), f[1] = select(t + zero<V>() < Real(0.5), mu, -mu);
    }
  }
};
"""
ENTRIES = """
extern "C" int flashode_solve(Call* call) { return solve<Field, Method>(*call); }
extern "C" int flashode_evaluate(Call* call) { return evaluate<Field>(*call); }
%s
extern "C" void flashode_release(void* recording) { release<Field>(recording); }
extern "C" int64_t flashode_call_size() { return sizeof(Call); }
"""
BATCH_ENTRIES = """
extern "C" int flashode_solve_batch(Call* call) { return solve_batch<Field, Method>(*call); }
extern "C" int flashode_evaluate_batch(Call* call) { return evaluate_batch<Field>(*call); }
"""
KINDS = ["vdp", "rotation", "timed", "nan", "stiff", "jumping"]


def field(kind, mu):
    """The same in PyTorch."""

    def func(t, y):
        x, v = (member.squeeze(-1) for member in y) if isinstance(y, tuple) else y.unbind(-1)
        t = t.reshape(-1) if t.ndim else t
        slopes = {
            "vdp": lambda: (v, mu * (1 - x * x) * v - x),
            "rotation": lambda: (-0.1 * x + mu * v, -0.1 * v - mu * x),
            "timed": lambda: (v * t, mu * (t * t) - x),
            "nan": lambda: (1 + 0 * (1.5 - x).sqrt(), -v),
            "stiff": lambda: (-1e5 * (x - v), mu - v),
            "jumping": lambda: (torch.ones_like(x), torch.where(t < 0.5, mu, -mu)),
        }[kind]()
        return tuple(s.unsqueeze(-1) for s in slopes) if isinstance(y, tuple) else torch.stack(slopes, -1)

    return func


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """Compiles the field with a method once: ``program("dopri5", F64, lanes)``."""
    folder = tmp_path_factory.mktemp("programs")

    @functools.cache
    def compiled(method, dtype, lanes, cubic=False):
        method = METHODS[method]
        text = FIELD % ("float" if dtype == F32 else "double", lanes)
        text += method_source(method, method.cubic if cubic else method.dense)
        text += ENTRIES % (BATCH_ENTRIES if method.adaptive else "")
        path = folder / f"{method.name}_{dtype}_{lanes}_{cubic}.cpp"
        path.write_text(f'#include "program.h"\nusing namespace flashode;\nnamespace {{\n{text}}}\n')
        command = ["g++", *FLAGS.split(), f"-I{HEADERS}", path, "-o", path.with_suffix(".so")]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:3000]
        return load(str(path.with_suffix(".so")))

    return compiled


class Solved:
    """What a program made of a problem; counts and statuses as ints, or as Tensors of own clocks."""

    def __init__(self, library, problem, kind, mu, entry="solve", threads=1, records=0):
        self.problem, self.kept = problem, []
        self.batched = isinstance(problem, BatchProblem)
        p, y0 = problem, problem.y0
        shapes = [y0.shape] if p.shapes is None else p.shapes
        samples, width = shapes[0][0], [math.prod(shape[1:]) for shape in shapes]
        members = [0, *torch.tensor(width).cumsum(0).tolist()]
        times = torch.as_tensor(p.times, dtype=F64).contiguous()
        rows = 1 if entry == "evaluate" else times.shape[-1]
        ys = torch.full((rows, *y0.shape), 123.0, dtype=y0.dtype)
        y_end = torch.full_like(y0, 123.0)
        results = {name: torch.full((samples,), -7) for name in ("status", "accepted", "rejected", "filled")}
        results |= {name: torch.full((samples,), -7.0, dtype=F64) for name in ("t", "dt", "error_ratio")}
        control, low, high = p.control, *p.time_bounds
        call = self.call = Call(
            samples=samples, row=y0.numel(), y0=self.at(y0), ys=self.at(ys), y_end=self.at(y_end),
            offset=self.whole([begin + i for begin, w in zip(p.offsets, width) for i in range(w)]),
            stride=self.whole([w for w in width for _ in range(w)]),
            member_count=len(width), members=self.whole(members),
            safety=control.safety, ifactor=control.ifactor, dfactor=control.dfactor,
            min_step=control.min_step, max_step=control.max_step, betas=(ctypes.c_double * 3)(*control.betas),
            first_step=math.nan if p.first_step is None else p.first_step, max_num_steps=p.max_num_steps,
            times=self.at(times), outputs=times.shape[-1], times_stride=times.shape[-1] if self.batched else 0,
            direction=self.real(p.direction), low=self.real(low), high=self.real(high),
            end=math.nan if self.batched else p.end, perturb=p.perturb,
            stops=self.real([time for time, _ in p.stops]), stop_count=len(p.stops),
            stop_jumps=self.at(torch.tensor([jump for _, jump in p.stops], dtype=torch.uint8)),
            inputs=self.whole([self.at(torch.tensor([KINDS.index(kind)], dtype=y0.dtype))]),
            own=self.whole([self.at(mu.to(y0.dtype))]), own_offset=self.whole([0]), own_stride=self.whole([1]),
            threads=threads, records=records,
            **{name: self.at(x) for name, x in results.items()},
        )  # fmt: skip
        for name in ("rtol", "atol"):
            tolerance = getattr(p, name)
            if isinstance(tolerance, torch.Tensor):
                setattr(call, f"each_{name}", self.at(tolerance.to(y0.dtype)))
            else:
                setattr(call, name, tolerance)
        if p.grid is not None:
            call.grid, call.grid_points = self.real(p.grid), len(p.grid)
        run = getattr(library, f"flashode_{entry}" + "_batch" * self.batched)
        extension.C.Entry(ctypes.cast(run, ctypes.c_void_p).value)(ctypes.addressof(call))
        self.ys, self.y_end, self.nfe = p.unflatten(ys, batch=1), y_end, call.nfe
        if entry == "solve" and not self.batched:
            ends = ctypes.cast(call.accepted_times, ctypes.POINTER(ctypes.c_double))
            self.accepted_times = [ends[i] for i in range(results["accepted"][0])]
        library.flashode_release.argtypes = [ctypes.c_void_p]
        if call.recording:
            library.flashode_release(call.recording)
        for name, x in results.items():
            setattr(self, name, x if self.batched else x[0].item())

    def at(self, x):
        x = x.contiguous()
        self.kept.append(x)
        return x.data_ptr()

    def real(self, values):
        return self.at(torch.as_tensor(values, dtype=F64).detach().reshape(-1).clone())

    def whole(self, values):
        return self.at(torch.tensor(list(values)))


def start(samples, dtype=F64):
    generator = torch.Generator().manual_seed(samples)
    y0, mu = (torch.rand(*shape, generator=generator, dtype=F64) for shape in ((samples, 2), (samples,)))
    return (3 * y0 - 1.5).to(dtype), (1 + mu).to(dtype)


def both(library, kind, y0, mu, t, method="dopri5", rtol=1e-6, atol=1e-8, options=None, **how):
    """The solve by the program, and by the reference engine."""
    func, options = field(kind, mu), options or {}
    kind_of_problem = BatchProblem if options.get("batched") else Problem
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tolerances that float32 cannot meet
        problem = kind_of_problem.from_call(func, y0, t, rtol, atol, method, options, None)
        theirs = flashode.solve(
            func, y0, t, rtol=rtol, atol=atol, method=method, options=options, engine="reference", throw=False
        )
    return Solved(library, problem, kind, mu, **how), theirs


def assert_same(ours, theirs, rtol=1e-10, atol=1e-12):
    torch.testing.assert_close(ours.ys, theirs.ys, rtol=rtol, atol=atol, equal_nan=True)
    if ours.batched:
        for name, mine in (("status", ours.status), ("accepted", ours.accepted), ("rejected", ours.rejected)):
            assert mine.tolist() == getattr(theirs if name == "status" else theirs.stats, name).tolist(), name
    else:
        assert ours.status == theirs.status
        assert (ours.accepted, ours.rejected) == (theirs.stats.accepted, theirs.stats.rejected)
        ends = ours.problem.direction * torch.tensor(ours.accepted_times)
        torch.testing.assert_close(ends, torch.tensor(theirs.stats.accepted_times))
    assert ours.nfe == theirs.stats.nfe


T = torch.tensor([0.2, 0.5, 0.500001, 1.1, 2.0], dtype=F64)
REPEATED = torch.tensor([0.2, 0.2, 0.5, 0.5, 1.1, 2.0, 2.0], dtype=F64)
BACKWARDS = torch.tensor([2.0, 1.1, 0.2], dtype=F64)
TIMES = {"forwards": T, "backwards": BACKWARDS, "ends": T[[0, -1]], "one time": T[:1]}
each_method = pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "tsit5", "adaptive_heun"])


# ---- one clock -------------------------------------------------------------------------------


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("kind", ["vdp", "rotation", "timed"])
def test_a_program_takes_the_steps_of_the_reference_engine(program, kind, times):
    assert_same(*both(program("dopri5", F64, 4), kind, *start(7), TIMES[times]))


@each_method
def test_so_does_every_method_with_error_control(program, method):
    assert_same(*both(program(method, F64, 4), "timed", *start(3), T, method))


@pytest.mark.parametrize("method, cubic", [("euler", False), ("rk4", False), ("rk4", True)])
@pytest.mark.parametrize("options", [{}, dict(step_size=0.07), dict(step_size=0.07, perturb=True)], ids=str)
def test_steps_of_a_grid(program, method, cubic, options):
    options = options | (dict(interp="cubic") if cubic else {})
    assert_same(*both(program(method, F64, 4, cubic), "timed", *start(5), T[1:], method, options=options))


@pytest.mark.parametrize("samples", [1, 3, 16, 33])
def test_lanes_without_a_sample_count_for_nothing(program, samples):
    assert_same(*both(program("dopri5", F64, 4), "vdp", *start(samples), T))


def test_a_single_system_without_lanes(program):
    library = program("dopri5", F64, 1)
    assert_same(*both(library, "vdp", *start(1), T))
    assert_same(*both(library, "vdp", *start(3), T, options=dict(batched=True)))


def test_float32_to_its_rounding(program):
    y0, mu = start(33, F32)
    ours, theirs = both(program("dopri5", F32, 16), "rotation", y0, mu, T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.ys, theirs.ys, rtol=1e-4, atol=1e-4)
    assert ours.status == Status.SUCCESS and abs(ours.accepted - theirs.stats.accepted) <= 1


@pytest.mark.parametrize(
    "options",
    [
        dict(first_step=0.3),
        dict(max_step=0.05),
        dict(min_step=0.2),
        dict(safety=0.7, ifactor=3.0, dfactor=0.5),
        dict(step_t=torch.tensor([0.4, 0.9]), max_step=0.3),
        dict(overshoot=True),
        dict(controller="pid"),
    ],
    ids=lambda options: " ".join(options),
)  # fmt: skip
def test_options_of_step_size_control(program, options):
    assert_same(*both(program("dopri5", F64, 4), "vdp", *start(3), T, options=options))


def test_the_field_is_taken_from_both_sides_of_a_jump(program):
    ours, theirs = both(
        program("dopri5", F64, 4), "jumping", *start(3), T, options=dict(jump_t=torch.tensor([0.5]))
    )
    assert_same(ours, theirs)
    assert 0.5 in ours.accepted_times


@pytest.mark.parametrize("options", [{}, dict(batched=True)], ids=["one clock", "own clocks"])
def test_a_jump_at_the_last_time_is_not_met(program, options):
    ours, theirs = both(program("dopri5", F64, 4), "jumping", *start(3), T[:2], options=options)
    assert_same(ours, theirs)
    assert torch.as_tensor(ours.rejected).max() == 0


def test_tolerances_of_every_element(program):
    y0, mu = start(5)
    rtol, atol = 10 ** -(4 + 4 * torch.rand_like(y0)), 10 ** -(4 + 4 * torch.rand_like(y0))
    assert_same(*both(program("dopri5", F64, 4), "vdp", y0, mu, T, rtol=rtol, atol=atol))
    assert_same(
        *both(program("dopri5", F64, 4), "vdp", y0, mu, T, rtol=rtol, atol=atol, options=dict(batched=True))
    )


@pytest.mark.parametrize("options", [{}, dict(batched=True)], ids=["one clock", "own clocks"])
def test_members_of_a_tuple_have_norms_of_their_own(program, options):
    y0, mu = start(6)
    assert_same(
        *both(program("dopri5", F64, 4), "vdp", (y0[:, :1], 1e-3 * y0[:, 1:]), mu, T, options=options)
    )


def test_threads_change_no_bit(program):
    library, (y0, mu) = program("dopri5", F64, 4), start(20001)
    problem = Problem.from_call(field("vdp", mu), y0, T, 1e-6, 1e-8, "dopri5", {}, None)
    one, many = (Solved(library, problem, "vdp", mu, threads=threads, records=1) for threads in (1, 3))
    assert one.ys.equal(many.ys) and one.accepted_times == many.accepted_times


# ---- what goes wrong -------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, dict(batched=True)], ids=["one clock", "own clocks"])
@pytest.mark.parametrize(
    "kind, more",
    [("nan", dict(min_step=1e-3)), ("stiff", dict(max_num_steps=30)), ("vdp", dict(first_step=1e-30))],
)
def test_failures_end_a_solve_where_the_reference_engine_does(program, kind, more, options):
    y0, mu = start(6)
    y0[:, 0] = torch.linspace(-0.9, 0.9, 6)
    ours, theirs = both(program("dopri5", F64, 4), kind, y0, mu, T, options=options | more)
    assert_same(ours, theirs)
    failed = torch.as_tensor(ours.status) != Status.SUCCESS
    assert failed.any() and ours.y_end.isfinite().all()
    assert torch.as_tensor(ours.t)[failed].max() < 2


@pytest.mark.parametrize("options", [{}, dict(batched=True)], ids=["one clock", "own clocks"])
def test_steps_are_counted_from_one_output_to_the_next(program, options):
    y0, mu = start(3)
    ours, theirs = both(
        program("dopri5", F64, 4), "vdp", y0, mu, T, options=options | dict(max_num_steps=25, max_step=0.05)
    )
    assert_same(ours, theirs)
    assert torch.as_tensor(ours.status).max() == Status.SUCCESS
    assert torch.as_tensor(ours.accepted).min() > 25


def test_a_field_that_starts_with_nan(program):
    y0, mu = start(3)
    y0[1, 0] = 2.0
    for options in ({}, dict(batched=True, min_step=1e-3)):
        assert_same(*both(program("dopri5", F64, 4), "nan", y0, mu, T, options=options))


def test_a_state_of_nan_has_no_mates_to_harm(program):
    y0, mu = start(6)
    y0[0, 1] = y0[5, 0] = math.nan
    ours, theirs = both(program("dopri5", F64, 4), "vdp", y0, mu, T, options=dict(batched=True))
    assert_same(ours, theirs)
    assert ours.status.tolist() == [4, 0, 0, 0, 0, 4]


def test_fixed_steps_end_where_the_state_is_not_finite(program):
    y0, mu = start(3)
    y0[:, 0] = 1.0
    assert_same(*both(program("rk4", F64, 4), "nan", y0, mu, T[1:], "rk4", options=dict(step_size=0.1)))


@pytest.mark.parametrize("options", [{}, dict(batched=True)], ids=["one clock", "own clocks"])
def test_a_signal_stops_a_long_solve(program, options):
    library, (y0, mu) = program("dopri5", F64, 4), start(3)
    options = options | dict(max_step=1e-7, max_num_steps=10**9)
    kind = BatchProblem if options.get("batched") else Problem
    problem = kind.from_call(field("vdp", mu), y0, T, 1e-6, 1e-8, "dopri5", options, None)

    def handler(*_):
        raise ZeroDivisionError("of the handler")

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(ZeroDivisionError, match="of the handler"):
            Solved(library, problem, "vdp", mu)
    finally:
        signal.signal(signal.SIGALRM, before)


# ---- clocks of their own ---------------------------------------------------------------------


@pytest.mark.parametrize("times", [*TIMES, "repeated"])
@pytest.mark.parametrize("kind", ["vdp", "timed"])
def test_samples_take_the_steps_of_the_reference_engine(program, kind, times):
    t = TIMES.get(times, REPEATED)
    ours, theirs = both(program("dopri5", F64, 4), kind, *start(7), t, options=dict(batched=True))
    assert_same(ours, theirs)


@each_method
def test_samples_have_times_of_their_own(program, method):
    y0, mu = start(9)
    t = torch.stack([REPEATED + 0.1 * b if b % 2 else (REPEATED + 0.1 * b).flip(0) for b in range(9)])
    ours, theirs = both(program(method, F64, 4), "timed", y0, mu, t, method, options=dict(batched=True))
    assert_same(ours, theirs)


@pytest.mark.parametrize("options", [dict(first_step=0.3), dict(min_step=0.3), dict(max_step=0.04), dict(controller="pid", first_step=1.5)], ids=lambda options: " ".join(options))  # fmt: skip
def test_options_of_samples(program, options):
    ours, theirs = both(program("dopri5", F64, 4), "vdp", *start(5), T, options=dict(batched=True) | options)
    assert_same(ours, theirs)


def test_a_sample_gets_the_same_bits_whatever_its_mates(program):
    library, (y0, mu) = program("dopri5", F64, 4), start(33)

    def solved(samples, **how):
        problem = BatchProblem.from_call(field("vdp", mu[samples]), y0[samples], T, 1e-6, 1e-8, "dopri5", dict(batched=True), None)  # fmt: skip
        return Solved(library, problem, "vdp", mu[samples], **how)

    every = solved(slice(None), threads=2, records=1)
    for samples in (slice(5, 8), slice(32, 33)):
        assert solved(samples).ys.equal(every.ys[:, samples])


# ---- single evaluations ----------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, dict(batched=True)], ids=["one clock", "own clocks"])
def test_a_program_evaluates_its_field(program, options):
    y0, mu = start(7)
    t = torch.rand(7, 1, dtype=F64) if options else T[:1]
    kind = BatchProblem if options else Problem
    problem = kind.from_call(field("timed", mu), y0, t, 1e-6, 1e-8, "dopri5", options, None)
    ours = Solved(program("dopri5", F64, 4), problem, "timed", mu, entry="evaluate")
    torch.testing.assert_close(ours.ys[0], field("timed", mu)(t if options else t[0], y0))
