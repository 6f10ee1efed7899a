"""Step-size control with a memory: the formula, both engines alike, fewer refused steps."""

import math

import pytest
import torch
from problems import Counted, Net, detest

import flashode
from flashode.control import ELEMENTARY, Controller, next_step, remember
from flashode.problem import Problem

PI, PID = (0.6, -0.2, 0.0), (0.49, -0.34, 0.10)
controllers = pytest.mark.parametrize("name", ["pi", "pid"])


def van_der_pol(t, y):
    a, b = y.unbind(-1)
    return torch.stack([b, 5 * (1 - a * a) * b - a], -1)


@pytest.mark.parametrize("betas", [PI, PID])
def test_the_next_step_filters_the_last_three_ratios(betas):
    control = Controller(order=5, betas=betas, safety=0.8)
    r, past = 0.3, (0.7, 0.02)
    expected = 0.8 * math.prod(x ** (-b / 5) for x, b in zip((r, *past), betas))
    assert next_step(r, 0.1, control, past) == pytest.approx(0.1 * expected, rel=1e-14)


@pytest.mark.parametrize("name, betas", [("i", ELEMENTARY), ("pi", PI), ("pid", PID)])
def test_controllers_have_the_published_exponents(name, betas):
    """PI.4.2 of Söderlind; Kennedy and Carpenter's PID."""
    t = torch.tensor([0.0, 1.0])
    problem = Problem.from_call(van_der_pol, t, t, 1e-7, 1e-9, None, {"controller": name}, None)
    assert problem.control.betas == pytest.approx(betas, abs=1e-15)


def test_a_refused_step_shrinks_by_its_own_error_alone():
    control = Controller(order=5, betas=PI)
    assert next_step(7.0, 0.1, control, (0.01, 0.5)) == next_step(7.0, 0.1, Controller(order=5))


def test_an_accepted_step_may_shrink_the_next_only_where_control_remembers():
    assert next_step(0.99, 0.1, Controller(order=5, betas=PI), (0.1, 1.0)) < 0.1
    assert next_step(0.99, 0.1, Controller(order=5, betas=ELEMENTARY), (0.1, 1.0)) == 0.1


def test_a_shortened_step_does_not_throttle_the_one_after():
    """A step that lands on a time may be a thousandth of its length, with an error of next to nothing."""
    control = Controller(order=5, betas=PI)
    past = remember(1e-30, control, (1.0, 1.0))
    assert next_step(0.5, 0.1, control, past) > 0.05
    assert remember(0.5, control, past) == (0.5, past[0])


@controllers
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "dopri8"])
def test_engines_take_the_same_steps(name, method, native):
    y0, t = torch.tensor([2.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 7.0, 20.0], dtype=torch.float64)
    arguments = dict(rtol=1e-6, atol=1e-6, method=method, options={"controller": name})
    a, b = (
        flashode.solve(van_der_pol, y0, t, engine=engine, **arguments) for engine in ("reference", native)
    )
    assert (a.stats.accepted, a.stats.rejected) == (b.stats.accepted, b.stats.rejected)
    torch.testing.assert_close(a.ys, b.ys, rtol=1e-7, atol=1e-7)


@controllers
def test_the_backward_sweep_is_controlled_alike(name, native):
    field, t = Net(dtype=torch.float64), torch.linspace(0, 3, 4, dtype=torch.float64)
    grads = []
    for engine in ("reference", native):
        y0 = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
        y = flashode.odeint_adjoint(
            field, y0, t, rtol=1e-6, atol=1e-6, options={"controller": name}, engine=engine
        )
        grads.append(torch.autograd.grad(y.square().sum(), [y0, *field.parameters()]))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3", "dopri8"])
def test_pi_control_refuses_fewer_steps_and_is_no_less_accurate(method, native):
    refused, error = {}, {}
    for name in ("i", "pi"):
        refused[name], error[name] = 0, []
        for problem in detest().values():
            solution = flashode.solve(
                problem.field(), problem.y0, problem.t, rtol=1e-5, atol=1e-5, method=method,
                options={"controller": name}, engine=native,
            )  # fmt: skip
            refused[name] += solution.stats.rejected
            error[name].append((solution.ys[-1] - problem.y_end).abs().max().item())
    assert refused["pi"] < 0.6 * refused["i"]
    assert sorted(error["pi"])[12] < 1.2 * sorted(error["i"])[12]


def test_the_default_is_the_elementary_controller(engine):
    y0, t = torch.tensor([2.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 5.0], dtype=torch.float64)
    calls = []
    for options in ({}, {"controller": "i"}, {"pcoeff": 0.0, "icoeff": 1.0, "dcoeff": 0.0}):
        field = Counted(van_der_pol)
        flashode.odeint(field, y0, t, options=options, engine=engine)
        calls.append(field.times)
    assert calls[0] == calls[1] == calls[2]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"controller": "pd"}, ["controller", "'pd'", "Did you mean"]),
        ({"controller": 3}, ["controller", "int 3"]),
        ({"icoeff": 0.0}, ["icoeff=0.0", "positive"]),
        ({"controller": "pi", "dcoeff": -1.0}, ["dcoeff=-1.0", "positive"]),
        ({"pcoeff": "0.2"}, ["pcoeff", "'0.2'"]),
        ({"pcoeff": math.nan}, ["pcoeff", "nan"]),
    ],
)
def test_what_cannot_control_is_refused(options, words):
    with pytest.raises((flashode.ArgumentError, flashode.ArgumentTypeError)) as raised:
        flashode.odeint(van_der_pol, torch.ones(2), torch.tensor([0.0, 1.0]), options=options)
    for word in words:
        assert word in str(raised.value)
