"""Solves of compiled fields where users come to the edges: of time, of shapes, of autograd and of modes."""

import pytest
import torch
from solves import F64
from torch import nn

import flashode
from flashode import ArgumentError
from flashode.nn import MLPField, ODEBlock

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


# ---- autocast --------------------------------------------------------------------------------


def bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("adjoint", [None, "checkpoint", "backsolve"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_leaves_a_program_alone(adjoint, dtype):
    """What it gives is what the called field gives without autocast, from the same start in float32."""
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    start = torch.randn(5, 2).to(dtype)
    solver = {"rtol": 1e-4, "atol": 1e-4}
    if adjoint:
        solver |= {"adjoint": adjoint, "adjoint_params": tuple(net.parameters())}
    solve = flashode.odeint_adjoint if adjoint else flashode.odeint

    def solved(func, y0):
        y = solve(func, y0, T, **solver)
        inputs = [y0, *net.parameters()]
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    compiled = flashode.compile(lambda t, y: net(y))
    for _ in range(2):  # with a program to be made, and with one that is there
        with bfloat16():
            y, of_start, *of_net = solved(compiled, start.clone().requires_grad_())
        expected = solved(compiled.func, start.float().requires_grad_())
        assert y.dtype == torch.float32 and of_start.dtype == dtype
        for found, right in zip([y, *of_net], [expected[0], *expected[2:]]):
            torch.testing.assert_close(found, right, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(of_start, expected[1].to(dtype), rtol=1e-2, atol=1e-3)


def test_a_block_is_trained_in_mixed_precision():
    stem, head = nn.Linear(3, 2), nn.Linear(2, 1)
    block = ODEBlock(flashode.compile(MLPField(2, (8,))))
    parameters = [p for part in (stem, block, head) for p in part.parameters()]
    x = torch.randn(6, 3)

    def gradients(block):
        with bfloat16():
            state = stem(x)
            assert state.dtype == torch.bfloat16
            loss = head(block(state)).square().mean()
        return torch.autograd.grad(loss, parameters)

    class Called(nn.Module):
        def forward(self, y):
            with torch.autocast("cpu", enabled=False):
                return ODEBlock(block.field.func)(y.float())

    for found, right in zip(gradients(block), gradients(Called())):
        assert found.abs().max() > 0
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


def test_autocast_takes_members_and_args_of_16_bits_to_float32():
    w = torch.randn(2, 2)

    def func(t, state, c):
        return state[0] @ w * c, c * state[1]

    state, c = (torch.ones(3, 2).bfloat16(), torch.ones(3, 1)), torch.full((3, 1), 0.5).half()
    wide = tuple(x.float() for x in state)
    t = T.float()
    for options in {}, {"batched": True}:
        call = dict(rtol=1e-5, atol=1e-6, options=options)
        expected = flashode.odeint(func, wide, t, args=(c.float(),), **call)
        with bfloat16():
            found = flashode.odeint(flashode.compile(func), state, t, args=(c,), **call)
        for x, y in zip(found, expected):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_autocast_is_that_of_the_call_where_the_field_is_called(net, y0):
    seen = set()

    def func(t, y):
        seen.add(torch.is_autocast_enabled("cpu"))
        return -y

    with bfloat16():
        flashode.odeint(flashode.compile(func), y0, T, engine="native")
    assert seen == {True}


def test_states_of_16_bits_are_refused_without_autocast():
    start = torch.ones(3, 2).bfloat16()
    with pytest.raises(ArgumentError, match=r"bfloat16 states; solve from y0.float\(\)"):
        flashode.odeint(flashode.compile(lambda t, y: -y), start, T, method="rk4")


def test_a_captured_tensor_of_16_bits_gets_its_gradient_under_autocast():
    def solve(func):
        weight = torch.full((2, 2), 0.5, requires_grad=True)
        with bfloat16():
            rate = torch.ones(3, 2) @ weight  # as a layer before the solve returns it
            y = flashode.odeint(func(rate), torch.ones(3, 2), torch.tensor([0.0, 1.0]))
        y.sum().backward()
        return y, weight.grad

    ys, grad = solve(lambda rate: flashode.compile(lambda t, y: -y * rate))
    want, of_weight = solve(lambda rate: lambda t, y: -y * rate.float())
    assert torch.allclose(ys, want, atol=1e-5)
    assert torch.allclose(grad, of_weight, rtol=2e-2)


def test_a_start_on_the_meta_device_is_refused_as_by_a_called_field():
    with pytest.raises(NotImplementedError, match="meta"):
        flashode.odeint(
            flashode.compile(lambda t, y: -y), torch.ones(2, device="meta"), torch.tensor([0.0, 1.0])
        )


def test_explain_and_solve_agree_under_autocast():
    y = {"a": torch.ones(2)}
    with bfloat16():
        said = flashode.explain(flashode.compile(lambda t, y: {"a": -y["a"]}), y, torch.tensor([0.0, 1.0]))
    assert said.startswith("dopri5 on the ") and "compiled: declines" in said
