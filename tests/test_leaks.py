"""Nothing stays behind: neither tensors nor memory nor reference cycles, whatever ends a solve."""

import gc
import os
import weakref
from pathlib import Path

import pytest
import torch

import flashode

MODES = ["direct", "checkpoint", "backsolve"]
# Of 32 kB: one that is left behind in each iteration shows in the memory of the process.
SIZE = 4000


class Field(torch.nn.Module):
    """Raises at call number ``fatal``, and calls back before every step where it is told to."""

    def __init__(self, fatal=None, calls_back=False):
        super().__init__()
        self.w = torch.nn.Parameter(torch.full((SIZE,), 0.5, dtype=torch.float64))
        self.fatal, self.calls, self.seen = fatal, 0, None
        if calls_back:
            self.callback_step = self.callback_step_adjoint = self.look

    def forward(self, t, y):
        self.calls += 1
        if self.calls == self.fatal:
            raise OverflowError("too much")
        return torch.sin(self.w * y)

    def look(self, t0, y0, dt):
        self.seen = y0


def integrate(mode, func, y0, t, **arguments):
    if mode == "direct":
        return flashode.odeint(func, y0, t, **arguments)
    params = tuple(func.parameters())
    return flashode.odeint_adjoint(func, y0, t, adjoint=mode, adjoint_params=params, **arguments)


def start():
    return torch.ones(SIZE, dtype=torch.float64, requires_grad=True)


T = torch.tensor([0.0, 0.1], dtype=torch.float64)
LOOSE = {"rtol": 1e-2, "atol": 1e-2}


def live_tensors() -> int:
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())


def resident() -> int:
    """Bytes of memory in use; 0 where the system does not tell."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


@pytest.fixture
def leaves_nothing():
    """Runs an iteration many times without the garbage collector, which then must find nothing.

    An iteration returns a tensor that must die at once.
    """

    def run(iteration, times):
        for _ in range(times):
            ghost = weakref.ref(iteration())
            assert ghost() is None

    def check(iteration, times=60):
        run(iteration, times // 5)
        gc.collect()
        tensors, memory = live_tensors(), resident()
        run(iteration, times)
        assert live_tensors() <= tensors
        assert resident() - memory < times * SIZE * 8 / 2
        assert gc.collect() == 0

    gc.collect()
    gc.freeze()  # only what is made from here on is looked at
    gc.disable()
    yield check
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def thaw():
    yield
    gc.unfreeze()


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("mode", MODES)
def test_training(mode, method, engine, leaves_nothing):
    field = Field()
    optimizer = torch.optim.SGD(field.parameters(), lr=1e-3)

    def iteration():
        optimizer.zero_grad()
        ys = integrate(mode, field, start(), T, **LOOSE, method=method, engine=engine)
        ys.square().sum().backward()
        optimizer.step()
        return ys

    leaves_nothing(iteration, 1000 if (engine, method) == ("native", "dopri5") else 200)


@pytest.mark.parametrize(
    "method, options",
    [
        ("kvaerno3", {}),
        ("implicit_midpoint", {}),
        ("radauIIA3", {}),
        ("implicit_adams", {"step_size": 0.02}),
        ("implicit_adams", {"step_size": 0.02, "max_iters": 1}),
    ],
)
@pytest.mark.parametrize("mode", ["direct", "checkpoint"])
def test_training_with_methods_that_solve_equations(mode, method, options, leaves_nothing):
    if (mode, method) == ("checkpoint", "implicit_adams"):
        pytest.skip("a step of an Adams method cannot be taken again alone")
    field = Field()

    def iteration():
        ys = integrate(mode, field, start(), T, rtol=1e-4, atol=1e-4, method=method, options=options)
        ys.square().sum().backward()
        return ys

    leaves_nothing(iteration, 100)


@pytest.mark.parametrize("what", ["event", "dense"])
def test_events_and_dense_output(what, leaves_nothing):
    field = Field()

    def iteration():
        if what == "event":
            solution = flashode.solve(field, start(), T, **LOOSE, event_fn=lambda t, y: y[0] - 1.02)
            solution.event_t.backward()
            return solution.ys
        y = flashode.odeint_dense(field, start(), 0.0, 0.1, **LOOSE)(torch.tensor([0.03, 0.05]))
        y.sum().backward()
        return y

    leaves_nothing(iteration, 20)


@pytest.mark.parametrize("mode", MODES)
def test_fields_and_parameters_that_live_for_one_iteration(mode, engine, leaves_nothing):
    def iteration():
        field = Field(calls_back=True)
        ys = integrate(mode, field, start(), T, **LOOSE, engine=engine)
        ys.sum().backward()
        del field.callback_step, field.callback_step_adjoint  # methods of an object that holds them: a cycle
        return field.w

    leaves_nothing(iteration)


@pytest.mark.parametrize("mode", MODES)
def test_solves_that_are_never_differentiated(mode, engine, leaves_nothing):
    field = Field()
    leaves_nothing(lambda: integrate(mode, field, start(), T, **LOOSE, engine=engine))


def test_unlisted_tensors(engine, leaves_nothing):
    """A field made anew for every solve is remembered no longer than it lives."""

    def iteration():
        w = torch.full((SIZE,), 0.5, dtype=torch.float64, requires_grad=True)
        with pytest.warns(UserWarning, match="no gradient to w"):
            ys = flashode.odeint_adjoint(
                lambda t, y: w * y, start(), T, **LOOSE, adjoint_params=(), engine=engine
            )
            ys.sum().backward()
        return ys

    leaves_nothing(iteration)


@pytest.mark.parametrize("mode", MODES)
def test_events(mode, leaves_nothing):
    field = Field()

    def iteration():
        event_t, ys = integrate(mode, field, start(), T, event_fn=lambda t, y: y[0] - 1.02, **LOOSE)
        ys.sum().backward()
        return ys

    leaves_nothing(iteration)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fatal", [1, 5])
def test_a_field_that_raises_in_the_forward_pass(mode, fatal, engine, leaves_nothing):
    def iteration():
        y0 = start()
        try:
            integrate(mode, Field(fatal), y0, T, **LOOSE, engine=engine)
        except OverflowError:
            return y0

    leaves_nothing(iteration)


def test_a_field_that_raises_in_the_backward_pass(engine, leaves_nothing):
    field = Field()
    flashode.odeint_adjoint(field, start(), T, **LOOSE, engine=engine)
    forward = field.calls

    def iteration():
        y0, field = start(), Field(forward + 3)
        ys = flashode.odeint_adjoint(field, y0, T, **LOOSE, engine=engine)
        try:
            ys.sum().backward()
        except OverflowError:
            return ys

    leaves_nothing(iteration)


@pytest.mark.parametrize("throw", [True, False])
def test_solves_that_fail(throw, engine, leaves_nothing):
    def iteration():
        y0 = start()
        options = {"max_num_steps": 3, "max_step": 1e-3}
        try:
            flashode.solve(Field(), y0, T, options=options, engine=engine, throw=throw)
        except flashode.SolveError:
            pass
        return y0

    leaves_nothing(iteration)


@pytest.mark.parametrize("mode", MODES)
def test_two_backward_passes(mode, engine, leaves_nothing):
    field = Field()

    def iteration():
        ys = integrate(mode, field, start(), T, **LOOSE, engine=engine)
        ys.sum().backward(retain_graph=True)
        ys.sum().backward(retain_graph=True)
        return ys

    leaves_nothing(iteration)


def test_second_derivatives(engine, leaves_nothing):
    field = Field()

    def iteration():
        y0 = start()
        ys = flashode.odeint(field, y0, T, **LOOSE, engine=engine)
        (grad,) = torch.autograd.grad(ys.square().sum(), y0, create_graph=True)
        torch.autograd.grad(grad.square().sum(), [y0, field.w])
        return ys

    leaves_nothing(iteration)
