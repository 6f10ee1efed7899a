"""The continuous adjoint by a program: that of the reference engine."""

import math

import pytest
import torch
from programs import Program
from test_reverse import F64, JUMPS, assert_equal, problem, times

import flashode
from flashode.engines import reference_sweep
from flashode.problem import Problem


@pytest.fixture
def sweeps(monkeypatch):
    """The backward solves of the reference engine."""
    seen, begin = [], reference_sweep.Sweep.__init__

    def recorded(self, augmented):
        seen.append(self)
        begin(self, augmented)

    monkeypatch.setattr(reference_sweep.Sweep, "__init__", recorded)
    return seen


def both(name, t, weights, *, samples=3, lanes=4, seminorm=False, first_step=None, threads=1, **arguments):
    """The gradients to y0 and to what the field reads, by a program and by the reference engine."""
    text, make, y0, shared, own = problem(name, samples)
    text = text.replace("REAL", "double").replace("LANES", str(lanes))
    arguments = {"rtol": 1e-6, "atol": 1e-8} | arguments
    leaves = [x.clone().requires_grad_() for x in (y0, *shared, *own)]
    options = arguments.get("options") or {}
    ys = flashode.odeint_adjoint(
        make(*leaves), leaves[0], t, engine="reference", adjoint_params=tuple(leaves[1:]),
        adjoint_options=options | {"norm": "seminorm"} if seminorm else None, **arguments,
    )  # fmt: skip
    weights = weights(ys)
    expected = torch.autograd.grad((ys * weights).sum(), leaves)
    func = make(y0, *shared, *own)
    solved = Program(text, backward="sweep").solve(
        func, y0, t, inputs=shared, own=own, threads=threads, **arguments
    )
    back = Problem.from_call(
        func, y0, t.flip(0), arguments["rtol"], arguments["atol"], solved.p.method.name, options, None
    )
    first_step = solved.reals[1, 0].item() if first_step is None else first_step
    found = solved.turn(back, first_step, seminorm).gradients(weights, needs_time=False)
    assert solved.status[0] == 0
    return solved, [found[0], *found[3], *found[4]], expected


def of_all(ys):
    return torch.cos(torch.arange(ys.numel(), dtype=F64)).reshape(ys.shape)


@pytest.mark.parametrize("seminorm", [False, True], ids=["", "seminorm"])
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "tsit5"])
def test_steps_are_those_of_the_reference(sweeps, method, seminorm):
    for name in ("oscillator", "driven", "linear"):
        options = JUMPS if name == "driven" else None
        solved, found, expected = both(
            name, times(rows=2), of_all, method=method, seminorm=seminorm, options=options
        )
        assert (solved.accepted[0], solved.rejected[0]) == (sweeps[-1].accepted, sweeps[-1].rejected)
        assert_equal(found, expected, 1e-9)
        assert solved.call.drift == pytest.approx(sweeps[-1].drift, rel=1e-3)


@pytest.mark.parametrize("direction", [1, -1], ids=["forward", "backward"])
@pytest.mark.parametrize("name", ["oscillator", "driven", "linear"])
def test_gradients_enter_at_their_outputs(name, direction):
    options = JUMPS if name == "driven" else None
    _, found, expected = both(name, times(direction), of_all, rtol=1e-9, atol=1e-11, options=options)
    assert_equal(found, expected, 1e-7)


def test_the_first_step_may_be_chosen():
    _, found, expected = both("linear", times(), of_all, rtol=1e-9, atol=1e-11, first_step=math.nan)
    assert_equal(found, expected, 1e-7)


def test_threads_change_no_bit():
    one, more = (both("linear", times(), of_all, samples=203, lanes=8, threads=n)[1] for n in (1, 3))
    assert all(torch.equal(a, b) for a, b in zip(one, more))


@pytest.mark.parametrize("perturb", [False, True])
@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4"])
def test_fixed_steps(method, perturb):
    t = torch.tensor([0.25, 0.4, 0.5, 0.7, 1.0], dtype=F64)
    _, found, expected = both(
        "driven", t, of_all, method=method, options={"perturb": perturb}, first_step=0.0
    )
    assert_equal(found, expected)


def test_the_integral_of_the_time():
    text, make, y0, shared, _ = problem("driven", 3)
    # Before the jump: where the field jumps, to move it is not to move the times.
    t, func, call = times() / 4, make(y0, *shared), {"rtol": 1e-9, "atol": 1e-11}
    solved = Program(text.replace("REAL", "double").replace("LANES", "4"), backward="sweep").solve(
        func, y0, t, inputs=shared, **call
    )
    weights = of_all(solved.ys)
    back = Problem.from_call(func, y0, t.flip(0), 1e-9, 1e-11, "dopri5", {}, None)
    grad_t = solved.turn(back, math.nan, False).gradients(weights)[1]
    leaf = t.clone().requires_grad_()
    ys = flashode.odeint(func, y0, leaf, engine="reference", **call)
    (expected,) = torch.autograd.grad((ys * weights).sum(), leaf)
    # Moving all times is moving the field.
    assert grad_t[0] == pytest.approx(expected.sum().item(), rel=1e-6)
