"""Samples solved on their own: each as if it were alone, whatever else is in the batch."""

import math
import pickle
import warnings

import pytest
import torch
from problems import EXPLICIT

from flashode import (
    ArgumentError,
    ArgumentTypeError,
    SolveError,
    Status,
    explain,
    odeint,
    odeint_adjoint,
    solve,
)

ADAPTIVE = [name for name, method in EXPLICIT.items() if method.adaptive]
BATCHED = {"batched": True}

by_method = pytest.mark.parametrize("method", ADAPTIVE)


def oscillator(t, y):
    """van der Pol's, mu = 2. Additions and products only: torch gives them the same bits in every batch."""
    x, v = y[..., 0], y[..., 1]
    return torch.stack([v, 2 * (1 - x * x) * v - x], -1)


def decay(t, y):
    return -y


def times(*values, **like):
    return torch.tensor(values, **({"dtype": torch.float64} | like))


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


def start(samples, dtype=torch.float64, device="cpu", width=2):
    generator = torch.Generator().manual_seed(samples)
    return 2 * torch.randn(samples, width, generator=generator, dtype=torch.float64).to(device, dtype)


# ---- each as if it were alone --------------------------------------------------------------


@by_method
@pytest.mark.parametrize("direction", [1, -1])
def test_a_sample_takes_the_steps_of_a_solve_of_its_own(engine, device, method, direction):
    y0 = start(5, device=device) / 2
    t = direction * torch.linspace(0, 2.5, 7, dtype=torch.float64)
    call = {"method": method, "rtol": 1e-3, "atol": 1e-4, "engine": engine}
    batch = solve(oscillator, y0, t, options=BATCHED, **call)
    for b in range(5):
        alone = solve(oscillator, y0[b], t, **call)
        counts = batch.stats.accepted[b].item(), batch.stats.rejected[b].item()
        assert counts == (alone.stats.accepted, alone.stats.rejected)
        torch.testing.assert_close(batch.ys[:, b], alone.ys, rtol=0, atol=1e-10)
    assert len(set(batch.stats.accepted.tolist())) > 1  # or nothing was shown


@pytest.mark.parametrize(
    "options",
    [{"first_step": 0.01}, {"max_step": 0.05}, {"min_step": 0.05}, {"safety": 0.5, "ifactor": 2.0, "dfactor": 0.5},
     {"controller": "pi"}, {"controller": "pid"}],
    ids=lambda options: "+".join(options),
)  # fmt: skip
def test_step_size_control_is_that_of_a_solve_of_its_own(engine, options):
    y0, t = start(4) / 3, times(0.0, 1.1, 4.0)
    batch = solve(oscillator, y0, t, rtol=1e-5, atol=1e-6, options=options | BATCHED, engine=engine)
    for b in range(4):
        alone = solve(oscillator, y0[b], t, rtol=1e-5, atol=1e-6, options=options, engine=engine)
        counts = batch.stats.accepted[b].item(), batch.stats.rejected[b].item()
        assert counts == (alone.stats.accepted, alone.stats.rejected)
        torch.testing.assert_close(batch.ys[:, b], alone.ys, rtol=0, atol=1e-12)


@by_method
def test_engines_agree(native, method):
    y0, t = start(33), torch.linspace(0, 3, 11, dtype=torch.float64)
    ours, theirs = (
        solve(oscillator, y0, t, rtol=1e-4, atol=1e-4, method=method, options=BATCHED, engine=engine)
        for engine in ("native", "reference")
    )
    torch.testing.assert_close(ours.ys, theirs.ys, rtol=0, atol=1e-11)
    assert torch.equal(ours.stats.accepted, theirs.stats.accepted)
    assert torch.equal(ours.stats.rejected, theirs.stats.rejected)
    assert ours.stats.nfe == theirs.stats.nfe


@by_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_engines_show_func_the_same_times(native, method, dtype):
    """To the last bit: a stage at the end of a step sees the time just before it."""
    t = torch.stack([times(0.0, 0.7, 2.0), times(1.0, 0.3, 0.1), times(0.0, 0.1, 0.1)])
    seen = {}
    for engine in ("native", "reference"):
        at = seen[engine] = []

        def func(t, y):
            at.append(t[:, 0].tolist())
            return torch.zeros_like(y)  # no error: steps grow alike on both

        odeint(func, start(3, dtype), t, method=method, options=BATCHED | {"first_step": 0.1}, engine=engine)
    assert seen["native"] == seen["reference"]
    assert any(math.nextafter(0.1, 0) == x[0] for x in seen["native"]) or dtype == torch.float32


def cubic(t, y):
    """Stiffer the larger the numbers are; 2.0 * t keeps time in it."""
    return -y * y * y + 0.5 * t


@pytest.mark.parametrize("width", [1, 2, 17, 1030])  # short rows, long ones, more than one block of a sum
@pytest.mark.parametrize("method, dtype", [("dopri5", torch.float32), ("dopri8", torch.float64)])
def test_batch_mates_change_no_bit(engine, device, width, method, dtype):
    many = 4096 if width == 2 else 33
    y0 = start(many, dtype, device, width)
    y0[1] *= 20  # hard
    y0[2, 0] = math.nan
    t = torch.linspace(0, 1, 6, dtype=dtype)
    call = {
        "rtol": 1e-4,
        "atol": 1e-5,
        "method": method,
        "options": BATCHED,
        "engine": engine,
        "throw": False,
    }
    batch = solve(cubic, y0, t, **call)
    assert batch.status[2] == Status.NONFINITE_STATE and batch.succeeded.sum() == many - 1
    assert batch.stats.accepted[1] > batch.stats.accepted[0]
    for rows in (slice(0, 1), slice(1, 2), slice(many - 1, many), slice(0, 33)):
        few = solve(cubic, y0[rows], t, **call)
        assert torch.equal(few.ys.nan_to_num(), batch.ys[:, rows].nan_to_num())
        assert torch.equal(few.stats.accepted, batch.stats.accepted[rows])
        assert torch.equal(few.stats.rejected, batch.stats.rejected[rows])


def test_the_size_of_batch_mates_does_not_floor_a_tolerance(engine):
    y0 = torch.tensor([[1e-3], [100.0]], dtype=torch.bfloat16)
    call = {"rtol": 1e-3, "atol": 1e-6, "options": BATCHED, "engine": engine}
    with pytest.warns(UserWarning, match="of the sample's largest number"):
        batch = odeint(lambda t, y: -0.5 * y, y0, times(0.0, 0.5, 2.0), **call)
        alone = odeint(lambda t, y: -0.5 * y, y0[:1], times(0.0, 0.5, 2.0), **call)
    assert torch.equal(batch[:, :1], alone)
    torch.testing.assert_close(batch[-1].float(), y0.float() / math.e, rtol=0.02, atol=0)


def test_threads_change_no_bit(native):
    y0, t = start(5000, torch.float32), times(0.0, 0.5)
    call = {"rtol": 1e-4, "atol": 1e-4, "options": BATCHED, "engine": native}
    alone = odeint(oscillator, y0, t, **call)
    torch.set_num_threads(3)
    try:
        assert torch.equal(odeint(oscillator, y0, t, **call), alone)
    finally:
        torch.set_num_threads(1)


def test_the_native_engine_gives_one_sample_the_bits_of_a_plain_solve(native):
    for width in (2, 20, 1500):
        y0, t = start(1, width=width), times(0.0, 0.4, 1.0)
        batch = odeint(cubic, y0, t, rtol=1e-5, atol=1e-6, options=BATCHED, engine=native)
        assert torch.equal(batch, odeint(cubic, y0, t, rtol=1e-5, atol=1e-6, engine=native))


def test_an_easy_crowd_does_not_loosen_the_tolerance_of_a_hard_sample():
    t = times(0.0, 5.0)
    y0 = torch.cat([times(2.0, 0.0)[None], torch.zeros(999, 2, dtype=torch.float64)])
    exact = odeint(oscillator, y0[:1], t, rtol=1e-11, atol=1e-11)
    shared, own = (
        (odeint(oscillator, y0, t, rtol=1e-6, atol=1e-6, options=options)[-1, 0] - exact[-1, 0]).abs().max()
        for options in ({}, BATCHED)
    )
    assert own < 5e-6 < 10 * own < shared


# ---- times ---------------------------------------------------------------------------------


def test_every_sample_has_its_own_times(engine):
    """Other spans, other directions, repeated times, in one call."""
    t = torch.stack([
        times(0.0, 0.5, 1.0, 2.0), times(1.0, 0.5, 0.5, -1.0), times(3.0, 3.0, 3.0, 3.0),
        times(0.0, 0.0, 1e-3, 1e-3), times(-1.0, 5.0, 5.0, 5.0),
    ])  # fmt: skip
    y0 = start(5)[:, :1]
    ys = odeint(decay, y0, t, rtol=1e-8, atol=1e-9, options=BATCHED, engine=engine)
    exact = y0[:, 0] * torch.exp(t[:, :1] - t).T
    torch.testing.assert_close(ys[..., 0], exact, rtol=1e-6, atol=1e-8)
    assert torch.equal(ys[:, 2], y0[2].expand(4, 1)) and torch.equal(ys[1, 3], y0[3])
    assert torch.equal(ys[1, 1], ys[2, 1]) and torch.equal(ys[1, 4], ys[3, 4])


@pytest.mark.parametrize("t", [times(1.0), times(2.0, 2.0), times(2.0, 2.0)[None].expand(3, 2)])
def test_nothing_to_integrate_calls_nothing(engine, t):
    calls = []
    y0 = start(3)
    ys = odeint(lambda t, y: calls.append(1) or -y, y0, t, options=BATCHED, engine=engine)
    assert torch.equal(ys, y0.expand(t.shape[-1], 3, 2)) and not calls


@pytest.mark.parametrize("shape", [(0,), (0, 2), (4, 0), (4,), (2, 3, 1)])
def test_batches_of_any_shape(engine, shape):
    y0 = torch.rand(shape, dtype=torch.float64)
    ys = odeint(decay, y0, times(0.0, 1.0), options=BATCHED, engine=engine)
    torch.testing.assert_close(ys, torch.stack([y0, y0 / math.e]), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "t, text",
    [(times(0.0, 1.0, 0.5), r"t\[1\] = 1.0 and t\[2\] = 0.5"),
     (torch.stack([times(0.0, 1.0, 2.0), times(0.0, -1.0, -0.5)]), r"t\[1, 1\] = -1.0 and t\[1, 2\] = -0.5"),
     (torch.stack([times(0.0, 1.0), times(0.0, math.nan)]), r"t\[1, 1\] = nan"),
     (torch.zeros(3, 2), r"shape \(T,\), shared by all samples, or \(2, T\); got shape \(3, 2\)"),
     (torch.zeros(0), "t is empty"), (torch.zeros(2, 1, 1), "shape")],
)  # fmt: skip
def test_what_is_wrong_with_times_is_named(t, text):
    with pytest.raises(ArgumentError, match=text):
        odeint(decay, start(2), t, options=BATCHED)


# ---- what func sees ------------------------------------------------------------------------


@by_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_func_sees_the_whole_batch_and_times_inside_the_intervals(engine, device, method, dtype):
    seen = []

    def func(t, y):
        seen.append((t.clone(), y.clone()))
        return -y * (1 + t)

    t = torch.stack([times(0.0, 0.3, 1.0), times(1.0, 0.9, 0.1), times(2.0, 2.0, 2.0)])
    solution = solve(func, start(3, dtype, device), t, rtol=1e-4, atol=1e-4, method=method, options=BATCHED,
                     engine=engine)  # fmt: skip
    low, high = t.min(1, keepdim=True).values, t.max(1, keepdim=True).values
    assert solution.stats.nfe == len(seen) > 5
    for time, y in seen:
        assert time.shape == (3, 1) and time.dtype == dtype and y.shape == (3, 2) and y.device == time.device
        assert ((low <= time.cpu().double()) & (time.cpu().double() <= high)).all()
    assert all(torch.equal(y[2], seen[0][1][2]) for _, y in seen)


def test_finished_samples_rest_at_their_last_state_and_are_dropped_where_that_is_allowed(engine):
    end = torch.linspace(0.1, 5, 40, dtype=torch.float64)
    t = torch.stack([torch.zeros_like(end), end / 2, end], 1)
    y0, rows = start(40), []

    def func(t, y):
        rows.append((t[:, 0].clone(), y.clone()))
        return oscillator(t, y)

    call = {"rtol": 1e-5, "atol": 1e-6, "engine": engine}
    full = solve(func, y0, t, options=BATCHED, **call)
    assert all(len(y) == 40 for _, y in rows)
    last_t, last_y = rows[-1]
    assert torch.equal(last_y[0], full.ys[-1, 0]) and last_t[0] <= end[0]
    rows.clear()
    compact = solve(func, y0, t, options=BATCHED | {"compact": True}, **call)
    sizes = [len(y) for _, y in rows]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 40 and sizes[-1] <= 2
    assert torch.equal(compact.ys, full.ys) and compact.stats.nfe == full.stats.nfe
    assert torch.equal(compact.stats.accepted, full.stats.accepted)


@pytest.mark.parametrize("compact", [False, True])
def test_tuples_have_one_clock_a_sample_for_all_members(engine, compact):
    """The norm is the largest over the members; times broadcast against the first."""
    a, b = start(6), start(6, width=20).reshape(6, 4, 5) / 20
    t = torch.stack([torch.zeros(6), torch.arange(1.0, 7.0)], 1).double()

    def func(t, y):
        return oscillator(t, y[0]), -y[1] * (1 + t[..., None]) + y[0][:, :1, None]

    call = {"rtol": 1e-6, "atol": 1e-6, "engine": engine}
    batch = solve(func, (a, b), t, options=BATCHED | {"compact": compact}, **call)
    for i in range(6):
        alone = solve(lambda t, y: tuple(x[0] for x in func(t[None, None], (y[0][None], y[1][None]))),
                      (a[i], b[i]), t[i], **call)  # fmt: skip
        assert batch.stats.accepted[i] == alone.stats.accepted
        for ours, theirs in zip(batch.ys, alone.ys):
            torch.testing.assert_close(ours[:, i], theirs, rtol=0, atol=1e-11)


def test_func_cannot_disturb_the_solve(engine):
    y0, t = start(5), torch.linspace(0, 2, 5, dtype=torch.float64)
    buffer, kept = torch.empty_like(y0), []

    def reuses(t, y):
        return buffer.copy_(oscillator(t, y))

    def writes(t, y):
        k = oscillator(t, y)
        y.zero_(), t.zero_()
        return k

    def keeps(t, y):
        kept.append((t, y, t.clone(), y.clone()))
        return oscillator(t, y)

    for method in ("dopri5", "fehlberg45"):
        call = {"rtol": 1e-5, "atol": 1e-6, "method": method, "options": BATCHED, "engine": engine}
        clean, before = odeint(oscillator, y0, t, **call), y0.clone()
        for func in (reuses, writes, keeps):
            assert torch.equal(odeint(func, y0, t, **call), clean)
        assert torch.equal(y0, before)
    assert all(torch.equal(t, t_then) and torch.equal(y, y_then) for t, y, t_then, y_then in kept)


# ---- tolerances ----------------------------------------------------------------------------


def test_every_sample_has_its_own_tolerance(engine):
    y0, t = start(1).expand(3, 2), times(0.0, 4.0)
    each = times(1e-3, 1e-5, 1e-7)
    for tolerance in (each, each[:, None], each[:, None].expand(3, 2)):
        batch = solve(oscillator, y0, t, rtol=tolerance, atol=tolerance, options=BATCHED, engine=engine)
        for b in range(3):
            tol = each[b].item()
            alone = solve(oscillator, y0[:1], t, rtol=tol, atol=tol, options=BATCHED, engine=engine)
            assert torch.equal(batch.ys[:, b], alone.ys[:, 0])
            assert batch.stats.accepted[b] == alone.stats.accepted[0]
    with pytest.raises(ArgumentError, match="neither one entry for each of 3 samples"):
        odeint(oscillator, y0, t, rtol=torch.ones(4), options=BATCHED)


def test_members_have_their_own_tolerances(engine):
    y0, t = (start(3), start(3)), times(0.0, 4.0)

    def func(t, y):
        return oscillator(t, y[0]), oscillator(t, y[1])

    loose = solve(func, y0, t, rtol=(1e-3, 1e9), atol=(1e-3, 1e9), options=BATCHED, engine=engine)
    alone = solve(oscillator, y0[0], t, rtol=1e-3, atol=1e-3, options=BATCHED, engine=engine)
    assert torch.equal(loose.stats.accepted, alone.stats.accepted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex128])
def test_dtypes(engine, device, dtype):
    if engine == "native" and dtype.is_complex:
        with pytest.raises(ArgumentError, match="no kernels for torch.complex128"):
            odeint(decay, torch.ones(2, 1, dtype=dtype), times(0.0, 1.0), options=BATCHED, engine=engine)
        return
    y0 = torch.tensor([[1.0], [-3.0]]).to(device, dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*cannot meet these tolerances.*")
        ys = odeint(decay, y0, times(0.0, 0.5, 1.0), options=BATCHED, engine=engine)
    exact = y0.to(torch.complex128) * torch.exp(-times(0.0, 0.5, 1.0)).to(device)[:, None, None]
    assert ys.dtype == dtype
    bound = 4 * torch.finfo(dtype).eps + 1e-6
    torch.testing.assert_close(ys.to(torch.complex128), exact, rtol=bound, atol=bound)


# ---- failures ------------------------------------------------------------------------------


def faulty(t, y):
    """Sample by sample: harmless, a pole at t = 1, NaN beyond y = 2, NaN from the start, stiff."""
    a, pole, leaves, nowhere, stiff = y.unbind()
    return torch.stack([
        -a, pole * pole, torch.where(leaves < 2, 1.0, math.nan), nowhere * math.nan, -1e6 * (stiff - 1),
    ])  # fmt: skip


def faulty_start():
    return torch.tensor([1.0, 1.0, 1.0, 1.0, 5.0, math.nan], dtype=torch.float64)[:, None]


def faulty_batch(t, y):
    return torch.cat([faulty(t, y[:5]), -y[5:]])


FAULTS = [Status.SUCCESS, Status.STEP_UNDERFLOW, Status.NONFINITE_FIELD, Status.NONFINITE_FIELD,
          Status.MAX_STEPS, Status.NONFINITE_STATE]  # fmt: skip


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "fehlberg45"])
def test_samples_that_fail_are_flagged_and_the_others_finish(engine, method):
    t = torch.linspace(0, 3.03, 13, dtype=torch.float64)
    options = BATCHED | {"max_num_steps": 600}
    batch = solve(faulty_batch, faulty_start(), t, method=method, options=options, engine=engine, throw=False)
    status = [Status(s) for s in batch.status.tolist()]
    # A solution that runs into a pole may overflow before the step underflows.
    assert status[1] in (Status.STEP_UNDERFLOW, Status.NONFINITE_FIELD, Status.NONFINITE_STATE)
    assert [*status[:1], *status[2:]] == [*FAULTS[:1], *FAULTS[2:]]
    assert batch.succeeded.tolist() == [True, False, False, False, False, False]
    alone = odeint(decay, faulty_start()[:1], t, method=method, options=options, engine=engine)
    assert torch.equal(batch.ys[:, :1], alone)
    reached = torch.isfinite(batch.ys[..., 0]).sum(0).tolist()
    assert reached == [13, 4, 4, 1, 1, 0]  # those before t = 1, and the first
    assert "1 of 6 samples solved" in repr(batch)


def test_samples_that_failed_rest_where_they_were(engine):
    seen = []

    def func(t, y):
        seen.append((t[:, 0].tolist(), y[:, 0].tolist()))
        return torch.stack([-y[0], y[1] * math.nan])

    solve(
        func,
        torch.ones(2, 1, dtype=torch.float64),
        times(0.0, 2.0),
        options=BATCHED,
        engine=engine,
        throw=False,
    )
    assert len(seen) > 10 and all(y[1] == 1 for _, y in seen)


def test_the_limit_of_steps_is_that_between_two_outputs(engine):
    options = BATCHED | {"max_step": 0.1, "max_num_steps": 15}
    ends = [times(0.0, 2.0), torch.linspace(0, 2, 5, dtype=torch.float64)]
    few, many = (
        solve(decay, start(2), t, options=options, engine=engine, throw=False, rtol=1e-3) for t in ends
    )
    assert (few.status == Status.MAX_STEPS).all() and few.stats.accepted.tolist() == [15, 15]
    assert many.succeeded.all()


def test_a_failed_sample_raises_what_failed_and_where(engine):
    t = times(0.0, 3.0)
    with pytest.raises(
        SolveError, match=r"5 of 6 samples failed: sample 1: .* sample 5: non-finite.*throw=False"
    ) as e:
        odeint(faulty_batch, faulty_start(), t, options=BATCHED | {"max_num_steps": 600}, engine=engine)
    assert e.value.index == (1,) and 0.9 < e.value.t < 1.1 and e.value.accepted > 0
    assert pickle.loads(pickle.dumps(e.value)).reason == e.value.reason
    many = torch.full((20, 1), math.nan)
    with pytest.raises(SolveError, match=r"20 of 20 samples failed.*and 12 more") as e:
        odeint(decay, many, torch.tensor([0.0, 1.0]), options=BATCHED, engine=engine)
    assert e.value.nfe == 0


# ---- gradients -----------------------------------------------------------------------------


def pendulum(t, y, w):
    return torch.stack([y[..., 1], -w * torch.sin(y[..., 0]) * (1 + 0.1 * t.squeeze(-1))], -1)


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "dopri8", "fehlberg45"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared t", "t of each"])
def test_gradients_of_the_discrete_solve(method, shared):
    """To the state, the arguments and the times; steps stay the same, as finite differences need it."""
    t = torch.stack([times(0.0, 0.13, 0.6), times(0.5, 0.3, 0.0), times(0.2, 0.25, 0.4)])
    t = t[0] if shared else t
    options = BATCHED | {"first_step": 0.27, "min_step": 0.27}

    def func(y0, w, t):
        return odeint(pendulum, y0, t, method=method, options=options, args=(w,))

    inputs = [start(3) / 2, scalar(1.5), t]
    assert torch.autograd.gradcheck(func, [x.clone().requires_grad_() for x in inputs], atol=1e-5)


def test_gradients_are_those_of_solves_of_their_own():
    y0, t = start(3) / 2, torch.linspace(0, 2, 5, dtype=torch.float64)
    weight = torch.randn(5, 3, 2, dtype=torch.float64)

    def gradients(run):
        y, w = y0.clone().requires_grad_(), scalar(1.5).requires_grad_()
        return torch.autograd.grad((run(y, w) * weight).sum(), (y, w))

    call = {"rtol": 1e-5, "atol": 1e-6}
    batch = gradients(lambda y, w: odeint(pendulum, y, t, options=BATCHED, args=(w,), **call))
    alone = gradients(lambda y, w: torch.stack(
        [odeint(lambda t, y: pendulum(t, y, w), y[b], t, **call) for b in range(3)], 1))  # fmt: skip
    for ours, theirs in zip(batch, alone):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_repeated_times_have_the_gradient_of_their_own():
    """y' = y: the derivative of every output in its time is the output itself, and minus that in the first."""
    t = torch.stack([times(0.0, 0.0, 0.5, 1.0, 1.0), times(2.0, 2.0, 2.0, 2.0, 2.0)]).requires_grad_()
    ys = odeint(
        lambda t, y: y, torch.ones(2, 1, dtype=torch.float64), t, rtol=1e-9, atol=1e-9, options=BATCHED
    )
    for row in range(5):
        for b in range(2):
            (grad,) = torch.autograd.grad(ys[row, b, 0], t, retain_graph=True)
            expected = torch.zeros(2, 5, dtype=torch.float64)
            expected[b, row] += ys[row, b, 0].detach()
            expected[b, 0] -= ys[row, b, 0].detach()
            torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-6)


def test_mates_that_fail_or_meet_nan_leave_gradients_alone():
    """A trial beyond the domain that is refused, a NaN from the start, a field that is NaN there."""

    def func(t, y, w):
        return -w * torch.sqrt(y)  # its domain ends at zero

    y0 = times(1.0, 0.3, math.nan, -1.0)[:, None]
    t, options = times(0.0, 1.0), BATCHED | {"first_step": 5.0}
    far = torch.stack([t, 2 * t, t, t])  # sample 1 stops at zero, where trials beyond are refused

    def gradients(rows):
        y, w = y0[rows].clone().requires_grad_(), scalar(1.0).requires_grad_()
        solution = solve(func, y, far[rows], rtol=1e-5, atol=1e-5, options=options, args=(w,), throw=False)
        assert solution.succeeded[0]
        return torch.autograd.grad(solution.ys[-1, 0].sum(), (y, w))

    for ours, alone in zip(gradients(slice(0, 4)), gradients(slice(0, 1))):
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours.reshape(-1)[:1], alone.reshape(-1)[:1])


def test_what_records_gradients_goes_to_the_reference_engine_without_another_call(native):
    y0, t, w = start(3), times(0.0, 1.0), scalar(1.5).requires_grad_()
    calls = []

    def func(t, y):
        calls.append(1)
        return -w * y

    solution = solve(func, y0, t, options=BATCHED)
    assert solution.stats.engine == "reference" and solution.ys.requires_grad
    assert solution.stats.nfe == len(calls)
    with torch.no_grad():
        plain = solve(func, y0, t, options=BATCHED)
    assert plain.stats.engine == "native" and plain.stats.nfe == solution.stats.nfe
    torch.testing.assert_close(plain.ys, solution.ys.detach())
    for call in ({"y0": y0}, {"y0": y0.clone().requires_grad_()}):
        with pytest.raises(ArgumentError, match="recorded by the reference engine"):
            odeint(func, t=t, options=BATCHED, engine="native", **call)
    assert "declines: gradients per sample" in explain(func, y0.clone().requires_grad_(), t, options=BATCHED)
    late = iter([1.0] * 5 + [w] * 99)
    with pytest.raises(ArgumentError, match="began to carry gradients"):
        odeint(lambda t, y: -next(late) * y, y0, t, options=BATCHED)


# ---- what it refuses -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, text",
    [({"method": "rk4"}, "adaptive explicit methods"),
     ({"event_fn": lambda t, y: y.sum()}, "no events"),
     ({"options": BATCHED | {"norm": torch.norm}}, r"options\['norm'\] cannot be used"),
     ({"options": BATCHED | {"overshoot": True}}, r"options\['overshoot'\] cannot be used"),
     ({"options": BATCHED | {"step_t": times(0.5)}}, r"options\['step_t'\] cannot be used"),
     ({"options": BATCHED | {"jump_t": times(0.5)}}, r"options\['jump_t'\] cannot be used"),
     ({"options": {"compact": True}}, r"needs options\['batched'\]"),
     ({"y0": torch.tensor(1.0)}, "leading batch dimension"),
     ({"y0": (torch.ones(2), torch.ones(3))}, "same leading dimension, member 0 has 2 samples and member 1 has 3"),
     ({"rtol": 0.0, "atol": 0.0}, "both 0")],
)  # fmt: skip
def test_what_cannot_be_served_is_refused(call, text):
    with pytest.raises(ArgumentError, match=text):
        odeint(
            **(
                {"func": decay, "y0": torch.ones(2, 1), "t": torch.tensor([0.0, 1.0]), "options": BATCHED}
                | call
            )
        )


def test_flags_callbacks_and_the_adjoint_are_answered():
    call = {"y0": torch.ones(2, 1), "t": torch.tensor([0.0, 1.0])}
    with pytest.raises(ArgumentTypeError, match=r"options\['batched'\] must be True or False"):
        odeint(decay, options={"batched": "yes"}, **call)
    with pytest.raises(ArgumentError, match="odeint_adjoint has no options"):
        odeint_adjoint(decay, options=BATCHED, adjoint_params=(), **call)
    with pytest.raises(ArgumentError, match="odeint_adjoint has no options"):
        odeint_adjoint(decay, adjoint_options=BATCHED, adjoint_params=(), **call)
    assert torch.equal(odeint(decay, options={"batched": False}, **call), odeint(decay, **call))

    class Field(torch.nn.Module):
        def forward(self, t, y):
            return -y

        def callback_step(self, t0, y0, dt):
            raise AssertionError("not called")

    with pytest.warns(UserWarning, match="does not support callbacks {'callback_step'}"):
        odeint(Field(), options=BATCHED, **call)


def test_finished_samples_of_a_structure_can_be_dropped():
    """What func returns is compared with what it was shown, which may be fewer samples than y0 has."""
    y0, t = torch.rand(3, 2, dtype=torch.float64), times(0, 1) * times(1, 30, 30)[:, None]
    options = BATCHED | {"compact": True}
    widths = []

    def field(t, state):
        widths.append(len(state["y"]))
        return {"y": -state["y"]}

    solution = solve(field, {"y": y0}, t, options=options)
    assert torch.equal(solution.ys["y"], odeint(decay, y0, t, options=BATCHED))
    y0, t = torch.rand(4, 2, dtype=torch.float64), times(0, 1) * times(1, 1, 1, 30)[:, None]
    solve(field, {"y": y0}, t, options=options)
    assert widths[0] == 3 and widths[-1] == 1
    with pytest.raises(ArgumentError, match="never broadcast"):
        solve(lambda t, state: {"y": -state["y"][:1]}, {"y": y0}, t, options=options)


@pytest.mark.parametrize("shape", [(0, 2), (2, 0)])
def test_a_batch_of_nothing_has_a_graph(shape):
    y0 = torch.zeros(shape, requires_grad=True)
    odeint(decay, y0, torch.tensor([0.0, 1.0]), options=BATCHED).sum().backward()
    assert y0.grad.shape == shape


def test_solutions_are_compared_as_objects():
    """Tensors have no one answer to ``==``."""
    y0, t = torch.ones(2, 1), torch.tensor([0.0, 1.0])
    for options in (None, BATCHED):
        one, other = (solve(decay, y0, t, options=options) for _ in range(2))
        assert one == one and one != other and other in [one, other]
