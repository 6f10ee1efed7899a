"""Solves of compiled fields: the reference engine's steps, results, failures and gradients, without a call of Python."""

import copy
import ctypes
import math
import signal
import threading
import time

import pytest
import torch
from torch import nn

import flashode
from flashode import (
    ArgumentError,
    ArgumentTypeError,
    CompileError,
    SolveError,
    Status,
    odeint,
    odeint_adjoint,
    solve,
)
from flashode.program import Program, operations

F64 = torch.float64
T = torch.tensor([0.0, 0.3, 1.0, 1.7], dtype=F64)


def oscillator(t, y):
    return torch.stack([y[:, 1], 2 * (1 - y[:, 0] ** 2) * y[:, 1] - y[:, 0]], 1)


def starts(samples=5, dtype=F64):
    """So small that the oscillator can be solved in both directions of time."""
    return torch.linspace(-0.9, 0.9, 2 * samples, dtype=dtype).view(samples, 2)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 12), nn.Tanh(), nn.Linear(12, 2)).double()
        self.calls = 0

    def forward(self, t, y):
        self.calls += 1
        return self.net(torch.cat([y, t.expand(len(y), 1)], 1))


@pytest.fixture(scope="module")
def field():
    return flashode.compile(oscillator)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return flashode.compile(Net())


# ---- solves --------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [T, -T], ids=["forward", "backward"])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "tsit5", "bosh3"])
def test_steps_are_those_of_the_reference_engine(field, method, t):
    ours, theirs = (
        solve(f, starts(), t, method=method, engine=e)
        for f, e in ((field, "auto"), (oscillator, "reference"))
    )
    assert ours.stats.engine == "compiled" and ours.status == Status.SUCCESS
    for name in ("accepted", "rejected", "nfe"):
        assert getattr(ours.stats, name) == getattr(theirs.stats, name), name
    assert ours.stats.accepted_times == pytest.approx(theirs.stats.accepted_times, rel=1e-4)
    assert torch.allclose(ours.ys, theirs.ys, rtol=1e-11, atol=1e-12)


def test_samples_with_clocks_of_their_own_take_the_reference_engines_steps(field):
    t = torch.stack([T * s for s in (1.0, -1.0, 0.5, 2.0, 1.5)])
    ours, theirs = (
        solve(f, starts(), t, options={"batched": True}, engine=e)
        for f, e in ((field, "auto"), (oscillator, "reference"))
    )
    assert torch.equal(ours.stats.accepted, theirs.stats.accepted)
    assert torch.equal(ours.stats.rejected, theirs.stats.rejected) and ours.stats.nfe == theirs.stats.nfe
    assert torch.allclose(ours.ys, theirs.ys, rtol=1e-11, atol=1e-12)


def test_options_of_control_and_stops_are_the_reference_engines(net):
    options = {
        "step_t": torch.tensor([0.5], dtype=F64),
        "jump_t": torch.tensor([0.8], dtype=F64),
        "controller": "pi",
        "max_step": 0.2,
        "first_step": 0.01,
    }
    ours, theirs = (solve(net, starts(), T, options=options, engine=e) for e in ("auto", "reference"))
    assert ours.stats.accepted_times == pytest.approx(theirs.stats.accepted_times, rel=1e-4)
    assert ours.stats.nfe == theirs.stats.nfe and torch.allclose(ours.ys, theirs.ys, rtol=1e-11, atol=1e-12)


def test_calls_of_func_are_counted_out():
    for grad, calls in ((False, 4), (True, 6)):
        func = Net()
        with torch.set_grad_enabled(grad):
            odeint(flashode.compile(func), starts(), T)
        assert func.calls == calls  # as the docstring of compile says


def test_a_solve_calls_no_python(net):
    odeint(net, starts(), T)
    before = net.func.calls
    odeint(net, starts(), T)
    assert net.func.calls == before


def test_other_batch_sizes_share_a_library(field):
    def library(samples):
        odeint(field, starts(samples), T)
        return field.program(
            flashode.problem.Problem.from_call(field, starts(samples), T, 1e-7, 1e-9, None, None, None)
        )[0].library

    assert library(5).path == library(7).path != library(1).path


def test_threads_change_no_bit(field):
    y0 = starts(2000)
    solutions = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        solutions.append(odeint(field, y0, T))
    torch.set_num_threads(1)
    assert torch.equal(*solutions)


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["direct", "checkpoint", "backsolve"])
def test_gradients_are_those_of_the_reference_engine(net, how):
    y0, t = starts().requires_grad_(), T.clone().requires_grad_()

    def gradients(func, **kwargs):
        interface = odeint if how == "direct" else odeint_adjoint
        kwargs |= {} if how == "direct" else {"adjoint": how}
        ys = interface(func, y0, t, rtol=1e-9, atol=1e-11, **kwargs)
        return torch.autograd.grad((ys * torch.cos(ys.detach())).sum(), [y0, t, *net.parameters()])

    ours, theirs = gradients(net), gradients(net.func, engine="reference")
    for a, b in zip(ours, theirs):
        assert torch.allclose(
            a, b, rtol=1e-7 if how == "backsolve" else 1e-9, atol=1e-8 if how == "backsolve" else 1e-11
        )


@pytest.mark.parametrize("batched", [False, True])
def test_gradients_of_samples_and_their_times(field, batched):
    y0, t = starts().requires_grad_(), T.clone().requires_grad_()
    grads = []
    for func, name in ((field, "auto"), (oscillator, "reference")):
        ys = odeint(func, y0, t, options={"batched": batched}, engine=name)
        grads.append(torch.autograd.grad((ys**2).sum(), [y0, t]))
    for a, b in zip(*grads):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-10)


def test_only_the_asked_for_parameters_get_gradients(net):
    first, *others = net.parameters()
    ys = odeint_adjoint(net, starts(), T, adjoint="checkpoint", adjoint_params=(first,))
    net.zero_grad(set_to_none=True)
    ys.sum().backward()
    assert first.grad is not None and all(p.grad is None for p in others)


def test_training_follows_the_optimizer(net):
    target = starts().flip(0)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (odeint(net, starts(), T, rtol=1e-4, atol=1e-4)[-1] - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_what_the_backward_pass_needs_must_not_change(net):
    ys = odeint(net, starts(), T)
    with torch.no_grad():
        next(net.parameters()).mul_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ys.sum().backward()


def test_the_backward_pass_has_the_memory_of_the_solve():
    class Decay(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = nn.Parameter(torch.full((1000,), 0.5, dtype=F64))

        def forward(self, t, y):
            return -self.rate * y

    func, y0 = Decay(), torch.ones(3, 1000, dtype=F64)
    ys = odeint(flashode.compile(func), y0, T)
    func.rate.data = torch.full((1000,), math.nan, dtype=F64)  # the memory of before has no name any more
    ys[-1].sum().backward()
    assert torch.allclose(
        func.rate.grad, torch.full((1000,), -3 * 1.7 * math.exp(-0.85), dtype=F64), rtol=1e-6
    )


def test_second_derivatives_are_refused(net):
    y0 = starts().requires_grad_()
    (grad,) = torch.autograd.grad(odeint(net, y0, T).sum(), y0, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()


@pytest.mark.parametrize("solve", [odeint, odeint_adjoint])
@pytest.mark.parametrize("of", ["y0", "weight", "cotangent"])
def test_second_derivatives_are_refused_where_they_are_asked_of_one_tensor(net, solve, of):
    """Autograd goes to what it is asked for alone: what it does not come upon, it takes for zero."""
    y0, cotangent = starts().requires_grad_(), torch.ones((), dtype=F64, requires_grad=True)
    ys = solve(net, y0, T)
    (grad,) = torch.autograd.grad(ys, y0, cotangent.expand_as(ys), create_graph=True)
    asked = {"y0": y0, "weight": next(net.parameters()), "cotangent": cotangent}[of]
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(grad.sum(), asked, allow_unused=True)


@pytest.fixture
def given_back(monkeypatch, net):
    """How often the recorded steps of a solve were given back; they are, all the same."""
    addresses, held, kind = [], [], ctypes.CFUNCTYPE(None, ctypes.c_void_p)

    def release(program, found=Program.release.fget):
        def counted(recording):
            addresses.append(recording)
            kind(found(program))(recording)

        held.append(kind(counted))
        return ctypes.cast(held[-1], ctypes.c_void_p).value

    monkeypatch.setattr(Program, "release", property(release))
    vars(net)["_before"] = None  # which has the address of before
    yield addresses
    vars(net)["_before"] = None


def test_recorded_steps_are_given_back_after_the_backward_pass(net, given_back):
    ys = odeint(net, starts(), T)
    loss = ys.sum()
    for _ in range(3):
        loss.backward(retain_graph=True)
    assert not given_back
    loss.backward()
    assert len(given_back) == 1
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        ys.sum().backward()


def test_recorded_steps_are_given_back_with_a_graph_that_nobody_went_through(net, given_back):
    ys = odeint(net, starts(), T)
    assert not given_back
    del ys
    assert len(given_back) == 1


def test_without_gradients_steps_are_given_back_at_once(net, given_back):
    frozen = flashode.compile(copy.deepcopy(net.func).requires_grad_(False))
    held = [odeint(frozen, starts(), T)]
    assert len(given_back) == 1
    with torch.no_grad():
        held += [odeint(net, starts(), T) for _ in range(2)]
    assert len(given_back) == 3


def test_a_field_counts_what_its_programs_evaluate():
    field = flashode.compile(oscillator)
    assert field.evaluations is None
    with torch.no_grad():
        for t in (T, T, 2 * T, T):  # the second time as before, the last by the program that there is
            odeint(field, starts(), t)
            assert field.evaluations == solve(oscillator, starts(), t, engine="reference").stats.nfe
    ys = odeint_adjoint(field, starts().requires_grad_(), T, adjoint_params=())
    assert field.evaluations == solve(oscillator, starts(), T, engine="reference").stats.nfe
    ys.sum().backward()


def test_a_call_like_the_one_before_is_still_looked_at(net):
    y0, call = starts(), dict(rtol=1e-6, atol=1e-8, options={"max_num_steps": 50})
    first, second = (odeint(net, y0, T, **call) for _ in range(2))
    assert torch.equal(first, second) and second.grad_fn is not None
    moved = odeint(net, y0 + 1, T, **call)
    assert torch.equal(moved, odeint(net, y0 + 1, T, engine="compiled", **call))
    assert not torch.equal(moved, first)
    with pytest.raises(ArgumentError, match="y0 must be finite"):
        odeint(net, y0 * math.nan, T, **call)
    with pytest.raises(ArgumentTypeError, match="args must be a tuple"):
        odeint(net, y0, T, args=1, **call)
    with torch.no_grad():
        assert odeint(net, y0, T, **call).grad_fn is None
    assert odeint(net, y0[:2], T, **call).shape == (len(T), 2, *y0.shape[1:])
    with pytest.raises(RuntimeError, match="dtype"):
        odeint(net, y0.float(), T, **call)
    with pytest.raises(SolveError, match="max_num_steps"):
        odeint(net, 1e4 * y0, T, rtol=1e-13, atol=1e-13, options={"max_num_steps": 2})


def test_times_that_are_written_to_are_seen(net):
    t, y0 = T.clone(), starts()
    ys = [odeint(net, y0, t, rtol=1e-6, atol=1e-8) for _ in range(2)][-1]
    t.mul_(0.5)
    others = odeint(net, y0, T.clone(), rtol=1e-6, atol=1e-8)
    for ours, theirs in zip(
        *(torch.autograd.grad((x**2).sum(), list(net.parameters())) for x in (ys, others))
    ):
        assert torch.equal(ours, theirs)  # of the times that it was solved with
    assert torch.equal(
        odeint(net, y0, t, rtol=1e-6, atol=1e-8), odeint(net, y0, t.clone(), rtol=1e-6, atol=1e-8)
    )


def test_the_same_times_in_another_tensor_are_a_call_like_the_one_before(net):
    ys = [odeint(net, starts(), T.clone()) for _ in range(3)]
    before, solved = net._before, net._before.solved
    other = solve(net, starts(), t := T.clone())
    assert torch.equal(ys[0], ys[2]) and torch.equal(ys[0], other.ys) and other.ts is t
    assert net._before is before and before.solved is solved
    assert torch.equal(odeint(net, starts(), T.float()), odeint(net, starts(), T.float().double()))


def _replace_data(t):
    t.data = t.data[:-1] / 2


@pytest.mark.parametrize("write", [lambda t: t.data.mul_(0.5), lambda t: t.numpy().sort(), _replace_data])
def test_times_that_are_written_to_past_autograd_are_seen(net, write):
    t, y0 = T.flip(0), starts()
    for _ in range(2):
        odeint(net, y0, t)
    write(t)
    assert torch.equal(odeint(net, y0, t), odeint(net, y0, t.clone()))


@pytest.mark.parametrize("batched", [False, True])
def test_gradients_of_times_and_start_where_the_start_is_written_to(net, batched):
    options = {"batched": batched}
    grads = []
    for spoil in (False, True):
        y0, t = starts().requires_grad_(), T.clone().requires_grad_()
        t2 = torch.cat([t[:1], t[:1], t[1:]]) if batched else t
        start = y0 * 1.0
        ys = odeint(net, start, t2, rtol=1e-6, atol=1e-8, options=options)
        if spoil:
            start.data.fill_(7.0)
        grads.append(torch.autograd.grad((ys**3).sum(), [y0, t]))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


# ---- what cannot be served -----------------------------------------------------------------------


class WithCallback(nn.Module):
    def forward(self, t, y):
        return -y

    def callback_step(self, t0, y0, dt):
        pass


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda f: odeint(f, starts(), T[:2], event_fn=lambda t, y: y[0, 0]), "event functions"),
        (lambda f: odeint(f, starts(), T, method="kvaerno5"), "no programs are generated for kvaerno5"),
        (lambda f: odeint(f, starts(), T, method="explicit_adams"), "no programs are generated for explicit_adams"),
        (lambda f: odeint(f, starts(), T, options={"norm": lambda x: x.abs().max()}), "options\\['norm'\\]"),
        (lambda f: odeint(f, starts(dtype=torch.float16), T, rtol=0.1, atol=0.1), "float16"),
        (lambda f: odeint(flashode.compile(WithCallback()), starts(), T), "callbacks"),
        (lambda f: odeint(f, starts(), T, progress=True), "progress bar"),
        (lambda f: odeint(f, (starts(), starts().float()), T), "different dtypes"),
    ],
)  # fmt: skip
def test_what_programs_cannot_do_is_said_with_a_way_out(field, call, words):
    with pytest.raises(ArgumentError, match=f"compiled engine cannot serve.*{words}.*engine='native'"):
        call(field)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda f: solve(f, starts(), T, dense=True), "no dense output"),
        (lambda f: odeint_adjoint(f, starts().requires_grad_(), T, adjoint="interpolated"), "no(t keep| dense)"),
        (lambda f: odeint_adjoint(f, starts().requires_grad_(), T, adjoint="checkpoint", checkpoints=3), "checkpoints=3"),
    ],
)  # fmt: skip
def test_modes_without_programs_are_refused(field, call, words):
    with pytest.raises(ArgumentError, match=words):
        call(field)


def test_another_engine_calls_the_field_as_it_is(field):
    ours, theirs = (solve(f, starts(), T, engine="reference") for f in (field, oscillator))
    assert ours.stats.engine == "reference" and torch.equal(ours.ys, theirs.ys)


def test_a_named_engine_needs_a_compiled_field():
    with pytest.raises(ArgumentError, match="pass flashode.compile"):
        odeint(oscillator, starts(), T, engine="compiled")


# ---- failures ------------------------------------------------------------------------------------


def test_a_field_that_turns_nan_is_named_with_the_element():
    field = flashode.compile(lambda t, y: torch.sqrt(0.5 - t) * torch.ones_like(y))
    with pytest.raises(
        SolveError, match="func returned non-finite values.*nan at element \\[0, 0\\]"
    ) as error:
        odeint(field, starts(), T)
    assert error.value.reason == Status.NONFINITE_FIELD and error.value.t == pytest.approx(0.5, abs=0.1)


def test_a_solution_that_leaves_its_dtype_fails_as_everywhere():
    def blow_up(t, y):
        return y**2

    errors = []
    for func, name in ((flashode.compile(blow_up), "auto"), (blow_up, "reference")):
        with pytest.raises(SolveError) as error:
            odeint(func, torch.full((3, 1), 2.0, dtype=F64), T, engine=name)
        errors.append(error.value)
    assert errors[0].reason == errors[1].reason
    assert errors[0].t == pytest.approx(errors[1].t, rel=1e-9) and errors[0].accepted == errors[1].accepted


def test_the_limit_of_steps_holds_inside(field):
    with pytest.raises(SolveError, match="max_num_steps exceeded") as error:
        odeint(field, starts(), T, options={"max_num_steps": 3})
    assert error.value.reason == Status.MAX_STEPS and error.value.accepted + error.value.rejected == 3
    failed = solve(field, starts(), T, options={"max_num_steps": 3}, throw=False)
    assert failed.status == Status.MAX_STEPS and failed.ys[-1].isnan().all()


def test_samples_fail_on_their_own():
    field = flashode.compile(lambda t, y: y**2)
    y0 = torch.tensor([[0.1], [5.0], [math.nan], [-1.0]], dtype=F64)
    solution = solve(field, y0, T, options={"batched": True}, throw=False)
    assert solution.succeeded.tolist() == [True, False, False, True]
    alone = solve(field, y0[:1], T, options={"batched": True})
    assert torch.allclose(solution.ys[:, 0], alone.ys[:, 0], rtol=1e-13)


def test_ctrl_c_ends_a_long_solve():
    field = flashode.compile(lambda t, y: torch.stack([y[:, 1], -1e6 * y[:, 0]], 1))
    y0, t = starts(), torch.tensor([0.0, 1.0], dtype=F64)
    odeint(field, y0, t * 1e-3)
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    began = time.perf_counter()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        odeint(field, y0, t * 1e6, options={"max_num_steps": 10**8})  # a minute's
    assert time.perf_counter() - began < 20


# ---- compilation ---------------------------------------------------------------------------------


def test_a_wrong_program_is_never_used(monkeypatch):
    monkeypatch.setitem(operations.POINTWISE, "tanh", "sin({0})")
    with pytest.raises(CompileError, match="is wrong: f\\(t, y\\) is off by"):
        odeint(flashode.compile(lambda t, y: torch.tanh(2 * y)), starts(), T)


def test_a_wrong_backward_program_is_never_used(monkeypatch):
    field = flashode.compile(lambda t, y: torch.sin(y) * 1.5)
    y0 = starts().requires_grad_()
    monkeypatch.setitem(operations.POINTWISE, "cos", "sin({0})")
    with torch.no_grad():
        odeint(field, y0, T)
    with pytest.raises(CompileError, match="the gradient to y is off"):
        odeint(field, y0, T)


def test_without_a_compiler_the_other_engines_work(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    field = flashode.compile(lambda t, y: -1.25 * y)
    with pytest.raises(CompileError, match="C\\+\\+ compiler"):
        odeint(field, starts(), T)
    assert torch.allclose(
        odeint(field, starts(), T, engine="reference")[-1], starts() * math.exp(-1.25 * 1.7)
    )


def test_explain_tells_what_was_compiled(net):
    assert "nothing is compiled yet" in flashode.compile(oscillator).explain()
    odeint(net, starts(), T)
    text = net.explain()
    for words in (
        "dopri5 for a state of (5, 2), float64",
        "flops of a sample",
        ".cpp",
        "tanh x12",
        "test_compile.py:",
        "solve: ",
    ):
        assert words in text, words
