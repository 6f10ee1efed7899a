"""`ODEBlock` and the fields of `flashode.nn`: values, gradients, calls, and what a Module is expected to do."""

import copy
import math
import pickle
import re

import numpy as np
import pytest
import torch
from torch import nn

import flashode
from flashode import ArgumentError, ArgumentTypeError, odeint
from flashode.datasets import moons
from flashode.nn import (
    ConcatConv2d,
    ConcatLinear,
    ConcatSquashConv2d,
    ConcatSquashLinear,
    ConvField,
    MLPField,
    ODEBlock,
)

F64 = torch.float64
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


class Counting(nn.Module):
    """A field that counts its calls."""

    def __init__(self, field):
        super().__init__()
        self.field, self.calls = field, 0

    def forward(self, t, y):
        self.calls += 1
        return self.field(t, y)


def growth(t, y):
    return y


def mlp(time="concat"):
    return MLPField(3, (8, 8), time=time).double()


def batch(*shape):
    return torch.randn(*shape, dtype=F64)


# ---- layers that know the time ---------------------------------------------------------------


def test_concat_linear_is_affine_in_state_and_time():
    layer = ConcatLinear(3, 5).double()
    t, x = torch.tensor(0.7, dtype=F64), batch(4, 2, 3)
    by_state, by_time = layer.weight[:, :3], layer.weight[:, 3]
    torch.testing.assert_close(layer(t, x), x @ by_state.T + 0.7 * by_time + layer.bias)


def test_concat_conv_sees_the_time_as_a_constant_channel():
    layer = ConcatConv2d(2, 3, 3, padding=1).double()
    t, x = torch.tensor(0.7, dtype=F64), batch(4, 2, 5, 6)
    with_time = torch.cat([x, torch.full((4, 1, 5, 6), 0.7, dtype=F64)], 1)
    expected = nn.functional.conv2d(with_time, layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(t, x), expected)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_squash_layers_gate_and_shift_by_the_time(kind):
    layer = (
        ConcatSquashLinear(2, 3) if kind == "linear" else ConcatSquashConv2d(2, 3, 3, padding=1)
    ).double()
    inner, shape = (layer.linear, (4, 2)) if kind == "linear" else (layer.conv, (4, 2, 5, 5))
    x = batch(*shape)
    for t in (-1.0, 0.0, 2.0):
        gate = torch.sigmoid(t * layer.gate.weight[:, 0] + layer.gate.bias)
        shift = t * layer.shift.weight[:, 0]
        if kind == "conv":
            gate, shift = gate[:, None, None], shift[:, None, None]
        torch.testing.assert_close(layer(torch.tensor(t, dtype=F64), x), inner(x) * gate + shift)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (ConcatLinear(2, 3), (4, 2)),
        (ConcatLinear(2, 3), (4, 6, 2)),
        (ConcatSquashLinear(2, 3), (4, 2)),
        (ConcatSquashLinear(2, 3), (4, 6, 2)),
        (ConcatConv2d(2, 3, 3), (4, 2, 5, 5)),
        (ConcatSquashConv2d(2, 3, 3), (4, 2, 5, 5)),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else str(len(x)),
)
def test_every_sample_may_have_a_time_of_its_own(layer, shape):
    layer = layer.double()
    t, x = batch(4, *[1] * (len(shape) - 1)), batch(*shape)
    expected = torch.cat([layer(t[i].reshape(()), x[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(layer(t, x), expected)


@pytest.mark.parametrize("time", ["concat", "squash"])
@pytest.mark.parametrize(
    "make", [lambda time: mlp(time), lambda time: ConvField(4, activation="tanh").double()]
)
def test_fields_have_the_time_derivative_of_finite_differences(time, make):
    field = make(time)
    y = batch(2, 3) if isinstance(field, MLPField) else batch(2, 4, 5, 5)
    t, h = torch.tensor(0.3, dtype=F64, requires_grad=True), 1e-5
    (slope,) = torch.autograd.grad(field(t, y).sum(), t)
    difference = (field(t + h, y) - field(t - h, y)).sum() / (2 * h)
    assert slope.abs() > 1e-3
    torch.testing.assert_close(slope, difference, rtol=1e-6, atol=1e-8)


def test_fields_without_time_do_not_change_with_it():
    for field, y in ((mlp(None), batch(2, 3)), (ConvField(4, time=False).double(), batch(2, 4, 5, 5))):
        assert torch.equal(field(torch.tensor(0.0), y), field(torch.tensor(5.0), y))


def test_mlp_field_without_hidden_layers_is_linear():
    field = MLPField(2, (), time=None).double()
    y = batch(6, 2)
    torch.testing.assert_close(field(None, y), y @ field.layers[0].weight.T + field.layers[0].bias)


@pytest.mark.parametrize("activation", ["softplus", torch.sin, nn.PReLU()], ids=["softplus", "sin", "PReLU"])
def test_activations_are_names_functions_and_modules(activation):
    field = MLPField(2, (4,), activation=activation, time=None)
    act = nn.functional.softplus if activation == "softplus" else activation
    y = torch.randn(3, 2)
    assert torch.equal(field(None, y), field.layers[1](act(field.layers[0](y))))
    learned = isinstance(activation, nn.Module)
    assert len(list(field.parameters())) == 4 + learned


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLPField(2, activation="thanh"), "activation must be a callable or one of .*'thanh'"),
        (
            lambda: MLPField(2, time="concatenate"),
            "time must be 'concat', 'squash' or None, got 'concatenate'",
        ),
        (lambda: ConvField(4, norm="batch"), "norm must be 'group' or None, got 'batch'"),
    ],
)
def test_fields_refuse_what_they_do_not_know(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


# ---- values and gradients --------------------------------------------------------------------


@pytest.mark.parametrize("adjoint", [None, "backsolve", "checkpoint", "interpolated"])
def test_a_block_is_odeint_by_hand(adjoint):
    field, y = mlp(), batch(5, 3).requires_grad_()
    block = ODEBlock(field, adjoint=adjoint, **TIGHT)
    block(y).square().sum().backward()
    ours = [y.grad, *(p.grad for p in field.parameters())]
    inputs = [y, *field.parameters()]
    final = odeint(field, y, torch.tensor([0.0, 1.0], dtype=F64), **TIGHT)[-1]
    expected = torch.autograd.grad(final.square().sum(), inputs)
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("adjoint", [None, "checkpoint"])
@pytest.mark.parametrize("time", ["concat", "squash", None])
def test_a_compiled_field_gives_what_the_field_gives(adjoint, time):
    field, y = mlp(time), batch(5, 3)
    results = []
    for f in (field, flashode.compile(field)):
        block = ODEBlock(f, adjoint=adjoint, augment=1, rtol=1e-6, atol=1e-6)
        out = block(y[:, :2])
        results.append([out, *torch.autograd.grad(out.square().sum(), list(field.parameters()))])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_blocks_agree_with_the_reference_engine():
    field, y = mlp(), batch(5, 3)
    expected = odeint(field, y, torch.tensor([0.0, 1.0], dtype=F64), rtol=1e-3, atol=1e-3, engine="reference")
    for f in (field, flashode.compile(field)):
        torch.testing.assert_close(ODEBlock(f)(y), expected[-1], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("adjoint", [None, "backsolve", "checkpoint", "interpolated"])
@pytest.mark.parametrize("times", [(0.0, 1.5), (0.5, 0.8, 2.0), (1.0, -0.5)])
def test_a_learned_time_has_the_closed_form_gradient(adjoint, times):
    """y(t) = y0 exp(t - t0): dy(t_i)/ds at s = log_stretch is (t_i - t0) y(t_i)."""
    block = ODEBlock(growth, times, adjoint=adjoint, learn_t=True, return_path=True, **TIGHT).double()
    with torch.no_grad():
        block.log_stretch.fill_(0.2)
    y = torch.tensor([1.0, 2.0], dtype=F64)
    path = block(y)
    spans = math.exp(0.2) * (torch.tensor(times, dtype=F64) - times[0])
    expected = spans.exp()[:, None] * y
    torch.testing.assert_close(path, expected, rtol=1e-8, atol=0)
    path.sum().backward()
    torch.testing.assert_close(block.log_stretch.grad, (spans[:, None] * expected).sum(), rtol=1e-7, atol=0)


def test_a_learned_time_finds_the_time_that_solves_a_problem():
    block = ODEBlock(growth, learn_t=True, rtol=1e-6, atol=1e-6)
    adam = torch.optim.Adam(block.parameters(), 0.05)
    for _ in range(200):
        adam.zero_grad()
        (block(torch.ones(1)) - 5).square().sum().backward()
        adam.step()
    assert block.t[-1].item() == pytest.approx(math.log(5), abs=1e-3)


def test_a_path_passes_through_every_time():
    times = [0.0, 0.3, 1.0]
    block = ODEBlock(growth, times, return_path=True, **TIGHT)
    y = batch(4)
    path = block(y)
    torch.testing.assert_close(path, y * torch.tensor(times, dtype=F64).exp()[:, None], rtol=1e-8, atol=0)
    other = block.path(y, torch.tensor([0.0, 2.0], dtype=F64))
    torch.testing.assert_close(other[-1], y * math.exp(2), rtol=1e-8, atol=0)


# ---- augmentation ----------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "axis"), [((3,), 0), ((5, 3), 1), ((2, 5, 3), 2), ((2, 3, 4, 4), 1)])
def test_zeros_are_appended_to_the_features_and_dropped_at_the_end(shape, axis):
    y, seen = batch(*shape), []

    def field(t, state):
        seen.append(state)
        return torch.ones_like(state)

    for kept in (False, True):
        out = ODEBlock(field, (0.0, 2.0), augment=2, keep_augmented=kept, return_path=True)(y)
        start = seen[0]
        assert start.shape == tuple(n + 2 * (i == axis) for i, n in enumerate(shape))
        assert torch.equal(start.narrow(axis, 0, 3), y) and not start.narrow(axis, 3, 2).any()
        torch.testing.assert_close(out[-1].narrow(axis, 0, 3), y + 2)
        assert out.shape == (2, *(start if kept else y).shape)
        seen.clear()


@pytest.mark.parametrize("field", [mlp(), ConvField(3, activation="tanh").double()], ids=["mlp", "conv"])
def test_samples_may_be_solved_each_with_its_own_steps(field):
    y = batch(4, 3) if isinstance(field, MLPField) else batch(4, 3, 5, 5)
    alone = torch.cat([ODEBlock(field, rtol=1e-6, atol=1e-6)(y[i : i + 1]) for i in range(4)])
    together = ODEBlock(field, rtol=1e-6, atol=1e-6, options={"batched": True})(y)
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)


def test_augmented_dimensions_reach_what_is_kept():
    def feeding(t, y):  # dy/dt = z, dz/dt = 1 with z(0) = 0: y grows by t^2 / 2
        return torch.stack([y[..., 1], torch.ones_like(y[..., 1])], -1)

    y = batch(4, 1)
    torch.testing.assert_close(ODEBlock(feeding, (0.0, 3.0), augment=1, **TIGHT)(y), y + 4.5)


# ---- calls -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "adjoint"),
    [(method, adjoint) for method in ("dopri5", "rk4") for adjoint in (None, "backsolve", "checkpoint")]
    + [("dopri5", "interpolated")],
)
def test_the_calls_of_a_block_are_those_of_its_field(method, adjoint):
    field = Counting(mlp())
    block = ODEBlock(field, method=method, adjoint=adjoint)
    assert block.nfe_forward is None and block.nfe_backward is None
    y = batch(5, 3)
    flashode.odeint(field, y, torch.tensor([0.0, 1.0], dtype=F64), method=method, rtol=1e-3, atol=1e-3)
    by_hand, field.calls = field.calls, 0
    out = block(y)
    assert block.nfe_forward == field.calls == by_hand and block.nfe_backward == 0
    out.sum().backward()
    assert block.nfe_forward == by_hand and block.nfe_backward == field.calls - by_hand
    assert (block.nfe_backward > 0) == (adjoint is not None)


def test_the_calls_are_those_of_the_last_solve():
    field = Counting(mlp())
    block = ODEBlock(field, adjoint="checkpoint")
    first, second = block(batch(5, 3)), block(batch(5, 3))
    solving = field.calls
    first.sum().backward()
    assert field.calls > solving and block.nfe_backward == 0
    second.sum().backward()
    assert block.nfe_backward > 0


def test_the_calls_of_a_compiled_field_are_those_of_its_program():
    field, y = mlp(), batch(5, 3)
    by_hand, block = ODEBlock(field), ODEBlock(flashode.compile(field))
    by_hand(y), block(y).sum().backward()
    assert block.nfe_forward == by_hand.nfe_forward
    assert block.nfe_backward is None
    block = ODEBlock(flashode.compile(field), adjoint="checkpoint")
    block(y).sum().backward()
    assert block.nfe_forward == by_hand.nfe_forward and block.nfe_backward is None


# ---- as a Module -----------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True], ids=["called", "compiled"])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_solve_alike_and_share_nothing(compiled, copied):
    field = mlp()
    block = ODEBlock(flashode.compile(field) if compiled else field, (0.0, 2.0), augment=1, learn_t=True)
    y = batch(5, 2)
    expected = block(y)
    other = copied(block)
    assert torch.equal(other(y), expected)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert torch.equal(block(y), expected)


def test_state_dicts_fit_whether_the_field_is_compiled_or_not():
    plain, compiled = ODEBlock(mlp(), learn_t=True), ODEBlock(flashode.compile(mlp()), learn_t=True)
    compiled.load_state_dict(plain.state_dict())
    y = batch(5, 3)
    torch.testing.assert_close(compiled(y), plain(y), rtol=1e-12, atol=1e-12)
    assert "log_stretch" in plain.state_dict() and "log_stretch" not in ODEBlock(mlp()).state_dict()


def test_blocks_move_to_other_precisions_and_keep_exact_times():
    block = ODEBlock(MLPField(3), (0.0, 0.1), learn_t=True).double()
    assert block(batch(5, 3)).dtype == F64
    assert block.t.dtype == F64 and block.t[-1].item() == 0.1
    assert block.float()(torch.randn(5, 3)).dtype == torch.float32


def test_modes_reach_the_field():
    for field in (mlp(), flashode.compile(mlp())):
        block = ODEBlock(field)
        assert not block.eval().field.layers[0].training and block.train().field.layers[0].training


def test_blocks_serve_functional_transforms():
    block, y = ODEBlock(mlp(), method="rk4"), batch(4, 3)
    params = dict(block.named_parameters())
    found = torch.func.grad(lambda p: torch.func.functional_call(block, p, (y,)).sum())(params)
    block(y).sum().backward()
    for name, p in params.items():
        torch.testing.assert_close(found[name], p.grad)
    torch.testing.assert_close(torch.func.vmap(block)(y), block(y))


def test_a_block_says_what_it_is():
    text = repr(ODEBlock(mlp(), (0.0, 2.0), method="rk4", adjoint="checkpoint", augment=3))
    assert re.search(r"t=\(0\.0, 2\.0\), method='rk4', .*adjoint='checkpoint', augment=3\n", text)
    assert "MLPField" in text and "learn_t" not in text
    assert "growth" in repr(ODEBlock(growth)) and "learn_t=True" in repr(ODEBlock(growth, learn_t=True))


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        (
            {"adjoint": "backward"},
            ArgumentError,
            r"adjoint must be one of \[None, 'backsolve', .*got 'backward'",
        ),
        ({"augment": -1}, ArgumentError, "augment must be a whole number of features, 0 or more, got -1"),
        ({"augment": 1.0}, ArgumentError, "augment must be a whole number of features, 0 or more, got 1.0"),
        ({"augment": True}, ArgumentError, "augment must be a whole number"),
        ({"t": 1.0}, ArgumentTypeError, "t must be two or more times, numbers, got 1.0"),
        ({"t": ("a", "b")}, ArgumentTypeError, "t must be two or more times, numbers"),
        ({"t": (0.0,)}, ArgumentError, r"t must be two or more finite times .*got \[0.0\]"),
        ({"t": (0.0, 1.0, 1.0)}, ArgumentError, "strictly increase or decrease"),
        ({"t": (0.0, 1.0, 0.5)}, ArgumentError, "strictly increase or decrease"),
        ({"t": (0.0, math.inf)}, ArgumentError, "finite"),
        ({"t": (0.0, math.nan)}, ArgumentError, "finite"),
        ({"field": 3}, ArgumentTypeError, r"field must be callable as field\(t, y\), got int"),
    ],
)
def test_a_block_refuses_what_it_cannot_solve(keywords, error, message):
    with pytest.raises(error, match=message):
        ODEBlock(**{"field": growth, **keywords})


def test_a_block_refuses_states_without_features():
    with pytest.raises(
        ArgumentTypeError, match="y must be a Tensor, got tuple; flashode.odeint solves tuples"
    ):
        ODEBlock(growth)((batch(3), batch(3)))
    with pytest.raises(ArgumentError, match="y has no axis of features to augment"):
        ODEBlock(growth, augment=1)(torch.tensor(1.0))


@pytest.mark.parametrize("size", [0, -1, 1.5, True, None, "5", 10**30])
def test_sizes_of_fields_are_whole_numbers(size):
    for make, name in (
        (lambda n: MLPField(n), "dim"),
        (lambda n: MLPField(2, (8, n)), r"hidden\[1\]"),
        (lambda n: ConvField(n), "channels"),
        (lambda n: ConcatLinear(n, 2), "in_features"),
        (lambda n: ConcatSquashLinear(2, n), "out_features"),
        (lambda n: ConcatConv2d(n, 2, 3), "in_channels"),
        (lambda n: ConcatSquashConv2d(2, n, 3), "out_channels"),
    ):
        with pytest.raises((ArgumentError, ArgumentTypeError), match=f"^{name} must be"):
            make(size)
    with pytest.raises(ArgumentTypeError, match="activation is the class Tanh; give an instance"):
        MLPField(2, activation=nn.Tanh)


def test_sizes_may_be_numpys():
    four = np.int64(4)
    field = MLPField(four, hidden=list(np.array([3, 3])))
    assert field(torch.tensor(0.0), torch.zeros(2, 4)).shape == (2, 4)
    assert moons(four)[0].shape == (4, 2)
