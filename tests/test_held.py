"""Tensors put in the place of a Module's own for one call are there in a later backward pass too."""

import functools

import pytest
import torch
from torch.func import functional_call

import flashode
from flashode.nn import CNF, MLPField, ODEBlock

F64 = torch.float64
T = torch.tensor([0.0, 1.0], dtype=F64)
Y = torch.tensor([[0.5, -1.0], [0.2, 0.9], [-1.5, 0.3]], dtype=F64)
TIGHT = {"rtol": 1e-10, "atol": 1e-12}
WAYS = {
    "direct": flashode.odeint,
    "backsolve": flashode.odeint_adjoint,
    "restart": functools.partial(flashode.odeint_adjoint, adjoint_options={"restart": True}),
    "interpolated": functools.partial(flashode.odeint_adjoint, adjoint="interpolated"),
    "checkpoint": functools.partial(flashode.odeint_adjoint, adjoint="checkpoint"),
}
# Every program of a compiled field takes seconds to build, and is no different for what it is called by.
FIELDS = {
    "module": lambda net: (net, None),
    "method": lambda net: (net.forward, tuple(net.parameters())),
    "closure": lambda net: (lambda t, y: net(t, y), tuple(net.parameters())),
    "partial": lambda net: (functools.partial(net, scale=1.0), tuple(net.parameters())),
    "compiled": lambda net: (flashode.compile(net), None),
}


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 2, dtype=F64)
        self.register_buffer("gain", torch.tensor(0.8, dtype=F64))

    def forward(self, t, y, scale: float = 1.0):
        return scale * torch.tanh(self.gain * self.linear(y))


class Model(torch.nn.Module):
    """From a state at time 0 to that at time 1."""

    def __init__(self, way, field):
        super().__init__()
        self.net, self.way, self.field = Net(), way, field

    def forward(self, y):
        func, params = FIELDS[self.field](self.net)
        listed = {} if params is None or self.way == "direct" else {"adjoint_params": params}
        return WAYS[self.way](func, y, T, **listed, **TIGHT)[-1]


def replaced(module, factor=1.3):
    """What tensors were computed from that take the place of a module's parameters; these, and others for its buffers."""
    origins = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    return origins, {name: factor * x for name, x in [*origins.items(), *module.named_buffers()]}


def derivatives(ys, module):
    grads = torch.autograd.grad(ys[-1].square().sum(), list(module.parameters()))
    return torch.cat([g.reshape(-1) for g in grads])


def gradients_of_a_call(model, *inputs):
    """To what stood behind the parameters during the call; the model has its own before and after."""
    own = list(model.parameters())
    origins, stand_ins = replaced(model)
    value = functional_call(model, stand_ins, inputs).square().sum()
    assert all(p is q for p, q in zip(model.parameters(), own))
    value.backward()
    assert all(p is q and p.grad is None for p, q in zip(model.parameters(), own))
    return torch.cat([x.grad.reshape(-1) for x in origins.values()])


def gradients_of_a_copy(model, *inputs):
    """The same from a model whose own parameters have these values."""
    with torch.no_grad():
        for x in (*model.parameters(), *model.buffers()):
            x *= 1.3
    value = model(*inputs).square().sum()
    return 1.3 * torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, list(model.parameters()))])


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_the_parameters_of_the_solve(way, field):
    if field == "compiled" and way in ("interpolated", "restart"):
        pytest.skip("programs of compiled fields have neither dense output nor fresh starts")
    model = Model(way, field)
    found = gradients_of_a_call(model, Y)
    torch.testing.assert_close(found, gradients_of_a_copy(model, Y), rtol=1e-7, atol=1e-9)


def test_second_derivatives_are_too():
    hessians = []
    for way in ("direct", "checkpoint"):
        torch.manual_seed(1)
        model = Model(way, "module")
        origins, stand_ins = replaced(model)
        value = functional_call(model, stand_ins, (Y,)).square().sum()
        grads = torch.autograd.grad(value, list(origins.values()), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), list(origins.values()))
        hessians.append(torch.cat([g.reshape(-1) for g in second]))
    torch.testing.assert_close(*hessians, rtol=1e-7, atol=1e-9)


def test_a_backward_pass_that_fails_leaves_a_module_its_own():
    model = Model("checkpoint", "module")
    own = list(model.parameters())
    value = functional_call(model, replaced(model)[1], (Y,)).sum()

    def refuse(t, y):
        raise RuntimeError("called")

    model.net.forward = refuse
    with pytest.raises(RuntimeError, match="called"):
        value.backward()
    assert all(p is q for p, q in zip(model.parameters(), own))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "scripted", [torch.jit.script, lambda net: torch.jit.trace(net, (T[0], Y))], ids=["script", "trace"]
)
@pytest.mark.parametrize("way", WAYS)
def test_scripts_keep_their_parameters_and_get_gradients(way, scripted):
    net = Net()
    expected = derivatives(WAYS["direct"](net, Y, T, **TIGHT), net)
    script = scripted(net)
    found = derivatives(WAYS[way](script, Y, T, **TIGHT), script)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


class Gravity(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.strength = torch.nn.Parameter(torch.tensor(-10.0, dtype=F64))

    def forward(self, t, y):
        return torch.stack([y[1], self.strength + 0 * y[1]])


class Ground(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.height, self.unit = (torch.nn.Parameter(torch.tensor(x, dtype=F64)) for x in (1.0, 0.5))

    def forward(self, t, y):
        return (y[0] - self.height) / self.unit


class Fall(torch.nn.Module):
    """When and how fast a ball comes down to the ground."""

    def __init__(self):
        super().__init__()
        self.gravity, self.ground = Gravity(), Ground()

    def forward(self, height):
        y0 = torch.stack([height, torch.zeros_like(height)])
        event_t, ys = flashode.odeint_event(self.gravity, y0, 0.0, event_fn=self.ground, **TIGHT)
        return torch.cat([event_t.reshape(1), ys[-1]])


def test_events_move_with_the_parameters_of_the_solve():
    model, height = Fall(), torch.tensor(6.0, dtype=F64)
    found = gradients_of_a_call(model, height)
    torch.testing.assert_close(found, gradients_of_a_copy(model, height), rtol=1e-7, atol=1e-9)


class LogProb(torch.nn.Module):
    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, x):
        return self.flow.log_prob(x)


@pytest.mark.parametrize("adjoint", ["backsolve", "checkpoint"])
@pytest.mark.parametrize(
    "model",
    [
        lambda **how: ODEBlock(MLPField(2, (8,)).to(F64), **how),
        lambda **how: LogProb(CNF(MLPField(2, (8,)).to(F64), **how)),
    ],
    ids=["block", "flow"],
)
def test_models_of_nn_are_called_with_other_parameters(model, adjoint):
    model = model(adjoint=adjoint, **TIGHT)
    found = gradients_of_a_call(model, Y)
    torch.testing.assert_close(found, gradients_of_a_copy(model, Y), rtol=1e-7, atol=1e-9)
