"""Solves of compiled fields where users come to the edges: of time, of shapes, of autograd and of modes."""

import pytest
import torch
from solves import F64
from torch import nn

import flashode
from flashode import ArgumentError

T = torch.tensor([0.0, 0.4, 1.0], dtype=F64)


def field(t, y):
    return -y * torch.sin(3 * t) + 0.1 * y * y


@pytest.fixture
def net():
    return nn.Linear(2, 2, dtype=F64)


@pytest.fixture
def y0():
    return torch.randn(5, 2, dtype=F64)


MANNERS = {
    "steps": {},
    "grid": {"method": "rk4"},
    "step_size": {"method": "rk4", "options": {"step_size": 0.1}},
    "clocks": {"options": {"batched": True}},
}


@pytest.mark.parametrize("manner", MANNERS)
def test_times_that_fall_have_gradients_of_their_sign(y0, manner):
    def gradient(f, **kwargs):
        t = (-T).requires_grad_()
        ys = flashode.odeint(f, y0, t, rtol=1e-9, atol=1e-9, **MANNERS[manner], **kwargs)
        return torch.autograd.grad((ys * torch.arange(3.0)[:, None, None]).sum(), t)[0]

    found, expected = gradient(flashode.compile(field)), gradient(field, engine="reference")
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("shape", [(0,), (0, 2), (3, 0), (2, 0, 2)])
def test_a_state_without_numbers_is_solved(shape, batched):
    y0 = torch.zeros(shape, dtype=F64, requires_grad=True)
    ys = flashode.odeint(flashode.compile(field), y0, T, options={"batched": True} if batched else None)
    assert ys.shape == (3, *shape)
    ys.sum().backward()
    assert y0.grad.shape == shape


def test_an_empty_batch_is_solved_between_others(net, y0):
    compiled = flashode.compile(lambda t, y: net(y))
    for solve in flashode.odeint, flashode.odeint_adjoint:
        for n in 5, 0, 3:
            assert solve(compiled, y0[:n], T).shape == (3, n, 2)


def test_whole_numbers_may_change(y0):
    power, order = torch.tensor(2), torch.tensor([0, 1])

    def func(t, y):
        return 0.1 * (y * power)[:, order]

    compiled = flashode.compile(func)
    for change in lambda: None, lambda: power.fill_(3), lambda: order.copy_(order.flip(0)):
        change()
        expected = flashode.odeint(func, y0, T, method="rk4", engine="reference")
        torch.testing.assert_close(flashode.odeint(compiled, y0, T, method="rk4"), expected)


def test_second_derivatives_are_refused(net, y0):
    y = flashode.odeint(flashode.compile(lambda t, y: net(y)), y0, T)
    (grad,) = torch.autograd.grad(y.square().sum(), net.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only.*uncompiled"):
        grad.sum().backward()


def test_gradients_come_one_at_a_time(net, y0):
    y = flashode.odeint(flashode.compile(lambda t, y: net(y)), y0, T).sum((1, 2))
    with pytest.raises(ArgumentError, match="leave out is_grads_batched"):
        torch.autograd.grad(y, net.weight, torch.eye(3, dtype=F64), is_grads_batched=True)


def test_autocast_is_refused_whether_a_program_is_there_or_not(net, y0):
    compiled = flashode.compile(lambda t, y: net(y))
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ArgumentError, match="autocast"):
            flashode.odeint(compiled, y0, T)
        flashode.odeint(compiled, y0, T)
