"""Solves under forward-mode differentiation and torch.func: right derivatives, or an error that says why."""

import functools

import pytest
import torch
from problems import EXPLICIT, Net, growth
from torch.autograd import forward_ad

import flashode

# torch compiles its forward-mode formulas at the first use, by means that it has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

T = torch.tensor([0.0, 0.4, 0.9, 1.7], dtype=torch.float64)
Y0 = torch.tensor([1.0, -2.0], dtype=torch.float64)
A = torch.tensor(1.3, dtype=torch.float64)
POINT = {"y0": Y0, "t": T, "a": A}
DIRECTION = {"y0": torch.tensor([0.3, -1.0]).double(), "t": torch.tensor([0.5, -1.0, 2.0, 0.7]).double(),
             "a": torch.tensor(-0.8).double()}  # fmt: skip
TIGHT = dict(rtol=1e-9, atol=1e-11)

by_argument = pytest.mark.parametrize("name", POINT)


def field(a):
    return lambda t, y: a * growth(t, y)


def solution(y0=Y0, t=T, a=A):
    return y0 * torch.exp(a * (torch.sin(t) - torch.sin(t[0])))[:, None]


def solve(y0=Y0, t=T, a=A, **call):
    return flashode.odeint(field(a), y0, t, **(TIGHT | call))


def of_one(function, name, **call):
    return lambda x: function(**{name: x}, **call)


def tangent(function, x, v):
    """The derivative of ``function`` at ``x`` along ``v``, by dual numbers."""
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, v))).tangent


# ---- forward mode ----------------------------------------------------------------------------


@by_argument
@pytest.mark.parametrize("method", ["dopri5", "dopri8"])
def test_tangents_are_those_of_the_solution(name, method):
    x, v = POINT[name], DIRECTION[name]
    expected = torch.func.jvp(of_one(solution, name), (x,), (v,))[1]
    result = tangent(of_one(solve, name, method=method), x, v)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.func.jvp(of_one(solve, name, method=method), (x,), (v,))[1], result)


STEPS = {
    "adaptive": dict(rtol=1e-4, atol=1e-6),
    "given steps": dict(rtol=1e-4, atol=1e-6, options=dict(first_step=0.1, step_t=[0.6], jump_t=[1.1])),
    "beyond the end": dict(rtol=1e-4, atol=1e-6, options=dict(overshoot=True)),
}
GRIDS = {
    "on t": {},
    "even": dict(options=dict(step_size=0.23)),
    "cubic": dict(options=dict(step_size=0.23, interp="cubic", perturb=True)),
    "constructed": dict(
        options=dict(grid_constructor=lambda f, y, t: torch.cat([t[:2], t[1:3] * 1.1, t[3:]]))
    ),
}
CASES = [(m, s) for m in EXPLICIT for s in (STEPS if EXPLICIT[m].adaptive else GRIDS)]


@pytest.mark.filterwarnings("ignore:.*overshoot")
@pytest.mark.parametrize("method, steps", CASES)
def test_forward_and_backward_mode_agree_to_rounding(method, steps):
    """<w, J v> = <J^T w, v> in the state, the times and the field at once."""
    call = dict(method=method) | (STEPS | GRIDS)[steps]
    w = torch.randn(len(T), len(Y0), dtype=torch.float64)
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(POINT[name], DIRECTION[name]) for name in POINT}
        forwards = forward_ad.unpack_dual(solve(**dual, **call)).tangent
    leaves = {name: x.clone().requires_grad_() for name, x in POINT.items()}
    solve(**leaves, **call, engine="reference").backward(w)
    backwards = sum((leaves[name].grad * DIRECTION[name]).sum() for name in POINT)
    torch.testing.assert_close((w * forwards).sum(), backwards, rtol=1e-11, atol=1e-11)


def test_tangents_reach_tuples_args_and_times_that_run_backwards():
    def func(t, y, a):
        return a * growth(t, y[0]), -y[1]

    def run(x):
        ys = flashode.odeint(func, (x * Y0, Y0.float()), (x * T).flip(0), args=(x * A,), **TIGHT)
        return ys[0][-1]

    x, v, h = torch.ones((), dtype=torch.float64), torch.ones((), dtype=torch.float64), 1e-4
    difference = (run(x + h) - run(x - h)) / (2 * h)
    torch.testing.assert_close(tangent(run, x, v), difference, rtol=1e-6, atol=1e-6)


def test_tangents_pass_through_float32():
    x, v = Y0.float(), DIRECTION["y0"].float()
    result = tangent(lambda y0: solve(y0, T.float(), A.float(), rtol=1e-5, atol=1e-6), x, v)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, solution(y0=DIRECTION["y0"]).float(), rtol=1e-3, atol=1e-3)


def test_values_do_not_change_while_a_level_is_active():
    with forward_ad.dual_level():
        for call in (dict(method="dopri5"), dict(method="rk4", options=dict(step_size=0.23))):
            assert torch.equal(solve(**call), solve(**call, engine="reference"))
    for call in (dict(method="dopri5"), dict(method="rk4", options=dict(step_size=0.23))):
        plain = solve(**call, engine="reference")
        with forward_ad.dual_level():
            assert torch.equal(plain, solve(**call))


def test_the_native_engine_declines_forward_mode(native):
    with forward_ad.dual_level():
        assert "native: declines: a level of forward-mode" in flashode.explain(growth, Y0, T)
        with pytest.raises(flashode.ArgumentError, match="native engine cannot serve.*forward-mode"):
            solve(engine="native")
    assert "native: can serve" in flashode.explain(growth, Y0, T)


@pytest.mark.parametrize("which", ["y0", "slope", "coef"])
def test_the_fused_operations_refuse_tangents_rather_than_drop_them(native, which):
    ops, plain = (
        torch.ops.flashode,
        {name: torch.ones(1, dtype=torch.float64) for name in ("y0", "slope", "coef")},
    )
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(x, torch.ones_like(x)) for name, x in plain.items()}
        given = plain | {which: dual[which]}
        refused = pytest.raises(NotImplementedError, match="no forward-mode derivative; solve with engine")
        with refused:
            ops.combine(given["y0"], [given["slope"]], given["coef"])
        with refused:
            ops.spread(dual["y0"], plain["coef"])
        with refused:
            ops.inner(plain["y0"], [dual["slope"]])


# ---- torch.func ------------------------------------------------------------------------------


@by_argument
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_jacobians_forwards_backwards_and_by_autograd_agree(name, method):
    run = of_one(solve, name, method=method)
    by_autograd = torch.autograd.functional.jacobian(
        of_one(solve, name, method=method, engine="reference"), POINT[name]
    )
    for jacobian in (torch.func.jacfwd, torch.func.jacrev):
        torch.testing.assert_close(jacobian(run)(POINT[name]), by_autograd, rtol=1e-11, atol=1e-11)


@by_argument
def test_gradients_and_second_derivatives_are_those_of_the_solution(name):
    x = POINT[name]
    ours, exact = (lambda x, f=f: f(**{name: x})[-1].square().sum() for f in (solve, solution))
    close = dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.func.grad(ours)(x), torch.func.grad(exact)(x), **close)
    value, pull = torch.func.vjp(ours, x)
    torch.testing.assert_close(pull(torch.ones_like(value))[0], torch.func.grad(exact)(x), **close)
    expected = torch.func.hessian(exact)(x)
    for nested in (torch.func.hessian, lambda f: torch.func.jacrev(torch.func.jacfwd(f))):
        torch.testing.assert_close(nested(ours)(x), expected, rtol=1e-4, atol=1e-4)


# ---- vmap ------------------------------------------------------------------------------------

FIXED = [dict(method="euler"), dict(method="rk4", options=dict(step_size=0.23))]


@pytest.mark.parametrize("call", FIXED, ids=["euler", "rk4"])
@pytest.mark.parametrize("name", ["y0", "a"])
def test_fixed_steps_may_be_batched(name, call):
    run, batch = of_one(solve, name, **call), torch.stack([POINT[name] * scale for scale in (1, -0.5, 2)])
    torch.testing.assert_close(torch.func.vmap(run)(batch), torch.stack([run(x) for x in batch]))

    def loss(x):
        return run(x)[-1].sum()

    grads = torch.stack([torch.func.grad(loss)(x) for x in batch])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(batch), grads)


BATCHES = {
    "y0": lambda x: solve(y0=x * Y0),
    "func": lambda x: solve(a=x),
    "func, first_step given": lambda x: solve(a=x, options=dict(first_step=0.1)),
    "norm": lambda x: solve(y0=x * Y0, options=dict(norm=lambda y: y.abs().max())),
    "t": lambda x: solve(t=x * T),
    "t of fixed steps": lambda x: solve(t=x * T, method="rk4"),
    "event": lambda x: solve(t=T[:2], event_fn=lambda t, y: x - t, method="rk4", options=dict(step_size=0.1)),
    "gradients": torch.func.grad(lambda x: solve(y0=x * Y0).sum()),
}


@pytest.mark.parametrize("run", BATCHES.values(), ids=BATCHES)
def test_a_batch_that_must_be_read_is_refused(run):
    with pytest.raises(
        flashode.ArgumentError,
        match="vmap gives .* a batch.*leading batch dimension, and options={'batched': True}",
    ):
        torch.func.vmap(run)(torch.tensor([1.0, 2.0], dtype=torch.float64))


# ---- parameters as arguments -----------------------------------------------------------------


NET = Net(dtype=torch.float64)


def loss(params, y0, method="rk4"):
    """Of the end of a solve with the weights of a network in ``params``."""
    field = lambda t, y: torch.func.functional_call(NET, params, (t, y))  # noqa: E731
    return flashode.odeint(field, y0, T, method=method, **TIGHT)[-1].square().sum()


def weights():
    return {name: p.detach() for name, p in NET.named_parameters()}


BATCH = torch.tensor([[1.0, -2.0], [0.3, 0.1], [-1.0, 0.7]], dtype=torch.float64)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_gradients_to_parameters_are_those_of_autograd(method):
    params = weights()
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    by_autograd = torch.autograd.grad(loss(leaves, BATCH, method), list(leaves.values()))
    torch.testing.assert_close(list(torch.func.grad(loss)(params, BATCH, method).values()), list(by_autograd))


def test_every_sample_has_a_gradient_of_its_own():
    params = weights()
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, BATCH)
    alone = [torch.func.grad(loss)(params, y0) for y0 in BATCH]
    for name in params:
        torch.testing.assert_close(each[name], torch.stack([grads[name] for grads in alone]))


def test_an_ensemble_of_networks_is_solved_at_once():
    params = weights()
    many = {name: torch.stack([p, -p, 2 * p]) for name, p in params.items()}
    found = torch.func.vmap(loss, (0, None))(many, BATCH)
    alone = [loss({name: p[i] for name, p in many.items()}, BATCH) for i in range(3)]
    torch.testing.assert_close(found, torch.stack(alone))


def test_transforms_nest():
    """Batches of Hessians, a batch of batches, and a Hessian-vector product."""
    params, vmap = weights(), torch.func.vmap
    one = functools.partial(loss, params)
    hessians = torch.stack([torch.autograd.functional.hessian(one, y0) for y0 in BATCH])
    torch.testing.assert_close(vmap(torch.func.hessian(one))(BATCH), hessians)
    values = torch.stack([one(y0) for y0 in BATCH])
    torch.testing.assert_close(vmap(vmap(one))(BATCH.expand(2, 3, 2)), values.expand(2, 3))
    for method in ("rk4", "dopri5"):
        grad = torch.func.grad(lambda y0, m=method: loss(params, y0, m))
        exact = torch.autograd.functional.hessian(lambda y0, m=method: loss(params, y0, m), BATCH[0])
        torch.testing.assert_close(torch.func.jvp(grad, (BATCH[0],), (BATCH[1],))[1], exact @ BATCH[1])


# ---- the adjoint -----------------------------------------------------------------------------


def test_odeint_adjoint_refuses_all_but_backward_passes():
    def run(x):
        return flashode.odeint_adjoint(growth, x, T, adjoint_params=()).sum()

    refused = pytest.raises(
        flashode.ArgumentError, match="odeint_adjoint serves backward passes only.*use odeint"
    )
    for transformed in (torch.func.grad(run), torch.func.jacfwd(run), torch.func.vmap(run)):
        with refused:
            transformed(Y0)
    with refused:
        tangent(run, Y0, Y0)
