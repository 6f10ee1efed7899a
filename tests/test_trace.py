"""What a field computes is recorded as a graph, with the tensors that it captures; what a graph cannot hold is refused."""

import contextlib
import random
import threading

import numpy as np
import pytest
import torch
from torch import nn

from flashode.errors import CompileError
from flashode.program.trace import trace, trace_joint

F64 = torch.float64
T = torch.tensor(0.3, dtype=F64)


def state(*shape):
    return torch.randn(*shape or (4, 2), dtype=F64)


def run(recorded, *given, inputs=None):
    """Does what a graph says."""
    inputs = recorded.inputs if inputs is None else inputs
    values, sources = {}, iter([*given, *inputs])
    for node in recorded.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(sources)
        elif node.op == "get_attr":
            values[node] = recorded.constants[node.target]
        elif node.op == "call_function":
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
        else:
            return torch.fx.node.map_arg(node.args[0], values.__getitem__)


def check(func, y=None, inputs=0):
    """The graphs of ``func`` give its values and derivatives, at a state that they were not recorded with."""
    y = state() if y is None else y
    recorded = trace(func, T, y)
    assert len(recorded.inputs) == inputs
    t, y, adj = T + 0.1, torch.randn_like(y), torch.randn_like(y)
    with torch.no_grad():
        torch.testing.assert_close(run(recorded, t, y)[0], func(t, y))
        joint = trace_joint(func, T, y, recorded.inputs)
        ours = run(joint, t, y, adj)
    for node in [*recorded.graph.nodes, *joint.graph.nodes]:
        assert (
            node.op != "call_function"
            or not getattr(node.target, "_schema", None)
            or not node.target._schema.is_mutable
        )
    assert joint.inputs == recorded.inputs
    y, t = y.requires_grad_(), t.requires_grad_()
    f = func(t, y)
    wanted = [x if x.requires_grad else None for x in (y, t, *recorded.inputs)]
    theirs = iter(torch.autograd.grad(f, [x for x in wanted if x is not None], adj, allow_unused=True))
    torch.testing.assert_close(ours[0], f.detach())
    for x, ours_x in zip(wanted, ours[1:]):
        theirs_x = None if x is None else next(theirs)
        if x is None or theirs_x is None:
            assert ours_x is None
        else:
            torch.testing.assert_close(ours_x, theirs_x)
    return recorded, joint


def linear(*sizes):
    return nn.Linear(*sizes, dtype=F64)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(linear(2, 8), nn.Tanh(), linear(8, 2))
        self.register_buffer("scale", torch.tensor([1.0, 2.0], dtype=F64))
        self.nfe = 0

    def forward(self, t, y):
        self.nfe += 1
        return self.net(y) * self.scale * torch.cos(t)


class Energy(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(linear(2, 8), nn.Softplus(), linear(8, 1))

    def forward(self, t, y):
        with torch.enable_grad():
            y = y if y.requires_grad else y.requires_grad_()
            (slope,) = torch.autograd.grad(self.net(y).sum(), y, create_graph=True)
        return slope.flip(-1)


def writes(t, y):
    z = y * 2
    z[:, 0] += t
    z.clamp_(min=-1)
    part = z[1:]
    part.mul_(3)
    return z


def test_values_and_derivatives_of_modules_are_those_of_the_module():
    net = Net()
    recorded, _ = check(net, inputs=5)
    assert {id(x) for x in recorded.inputs} == {id(x) for x in (*net.parameters(), net.scale)}


def test_a_gradient_inside_of_func_is_recorded_and_differentiated_again():
    check(Energy(), inputs=4)  # the last bias gives a shape


def test_writing_to_its_own_tensors_is_recorded_without_writing():
    check(writes)


def test_numbers_made_into_tensors_are_constants():
    recorded, _ = check(lambda t, y: y * torch.tensor([1.0, 2.0], dtype=F64) + torch.arange(2))
    assert [x.tolist() for x in recorded.constants.values()] == [[1.0, 2.0]]


def test_closures_and_results_of_other_computations_are_inputs():
    weight = linear(2, 2)
    encoded = weight(torch.ones(2, dtype=F64))
    recorded, joint = check(lambda t, y: y * encoded, inputs=1)
    assert recorded.inputs[0] is encoded


def test_a_captured_result_is_not_differentiated_through():
    """Its own gradient and that of the weight it came from are apart: the caller's graph joins them."""
    weight = torch.ones(2, dtype=F64, requires_grad=True)
    encoded = weight * 3

    def func(t, y):
        return y * encoded + weight

    y, adj = state(), state()
    recorded = trace(func, T, y)
    assert [id(x) for x in recorded.inputs] == [id(encoded), id(weight)]
    results = run(trace_joint(func, T, y, recorded.inputs), T, y, adj)
    torch.testing.assert_close(results[3], (adj * y).sum(0))
    torch.testing.assert_close(results[4], adj.sum(0))


def test_hooks_of_parameters_are_left_to_the_callers_graph():
    weight = torch.ones(2, dtype=F64, requires_grad=True)
    weight.register_hook(lambda grad: grad * 100)
    y = state()
    recorded = trace(lambda t, y: y * weight, T, y)
    results = run(trace_joint(lambda t, y: y * weight, T, y, recorded.inputs), T, y, torch.ones_like(y))
    torch.testing.assert_close(results[3], y.sum(0))


def test_custom_backward_passes_are_kept():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sin()

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    check(lambda t, y: Doubled.apply(y))


def test_torch_func_and_torch_vmap_are_recorded():
    net = Net()

    def func(t, y):
        return torch.func.vmap(lambda x: torch.func.grad(lambda z: net(t, z).square().sum())(x))(y)

    check(func, inputs=5)


def test_detached_tensors_and_data_carry_no_gradient():
    weight = torch.ones(2, dtype=F64, requires_grad=True)
    recorded, joint = check(lambda t, y: y * weight.data + y.detach(), inputs=1)
    assert next(iter(reversed(joint.graph.nodes))).args[0][3] is None


def test_lines_are_those_of_func_also_in_the_backward_pass():
    def func(t, y):
        hidden = torch.tanh(y)
        return hidden * t.cos()

    recorded = trace(func, T, state())
    joint = trace_joint(func, T, state(), ())
    for traced in (recorded, joint):
        lines = {str(node.target): line for node, line in traced.lines.items()}
        assert lines["aten.tanh.default"].startswith("test_trace.py:")
        assert lines["aten.tanh.default"].endswith(": hidden = torch.tanh(y)")
    backward = [joint.lines[n] for n in joint.graph.nodes if n.target is torch.ops.aten.sin.default]
    assert all(line.endswith(": return hidden * t.cos()") for line in backward) and backward


def test_func_is_called_three_times_and_twice_for_derivatives():
    net = Net()
    recorded = trace(net, T, state())
    assert net.nfe == 3
    trace_joint(net, T, state(), recorded.inputs)
    assert net.nfe == 5


def test_func_that_writes_is_called_once_more():
    calls = []

    def func(t, y):
        calls.append(1)
        return writes(t, y)

    recorded = trace(func, T, state())
    assert len(calls) == 4
    trace_joint(func, T, state(), recorded.inputs)
    assert len(calls) == 7


def test_a_lazy_func_may_set_itself_up():
    cache = {}

    def func(t, y):
        if "scale" not in cache:
            cache["scale"] = torch.tensor([1.0, 2.0], dtype=F64)
        return y * cache["scale"]

    assert trace(func, T, state()).inputs == (cache["scale"],)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_fields_are_recorded_without_grad_and_in_inference_mode(mode):
    net = Net()
    with mode():
        y = state()
        recorded = trace(net, T, y)
        torch.testing.assert_close(run(recorded, T, y)[0], net(T, y))


# ---- refusals --------------------------------------------------------------------------------


def refused(func, match, y=None):
    with pytest.raises(CompileError, match=match) as error:
        trace(func, T, state() if y is None else y)
    return str(error.value)


def chooses(t, y):
    if y.sum() > 0:
        return y
    return -y


def test_a_choice_by_numbers_is_refused_with_its_line():
    message = refused(chooses, "depends on a number that it computes")
    assert "test_trace.py:" in message and "if y.sum() > 0:" in message and "torch.where" in message


CAPTURED = torch.tensor([2.0, 3.0], dtype=F64)
MEMORY = np.ones(2)


def adds_to_captured(t, y):
    CAPTURED.add_(1)
    return y


def writes_to_state(t, y):
    y *= 2
    return y


def sets_data(t, y):
    y = y.clone()
    y.data = y * 2
    return y


REFUSED = {
    "float": (lambda t, y: y * float(y[0, 0]), "depends on a number"),
    "time": (lambda t, y: y * (1 if t < 1 else 2), "depends on a number"),
    "item of captured": (lambda t, y: y * CAPTURED[0].item(), "reads a number of a captured tensor"),
    "numpy": (lambda t, y: torch.from_numpy(np.sin(y.numpy())), r"numbers out of torch \(\.numpy"),
    "array": (lambda t, y: torch.tensor(np.asarray(y)), "numbers out of torch"),
    "tolist": (lambda t, y: y * y.tolist()[0][0], r"numbers out of torch \(\.tolist"),
    "shape by values": (lambda t, y: y * y[y > 0].sum(), "depends on values"),
    "nonzero": (lambda t, y: y * y.nonzero().shape[0], "depends on values"),
    "random": (lambda t, y: y + torch.randn(2), "random numbers"),
    "dropout": (lambda t, y: nn.functional.dropout(y), r"random numbers.*\.eval\(\)"),
    "bernoulli": (lambda t, y: y + torch.zeros(2).bernoulli_(), "random numbers"),
    "writes to captured": (adds_to_captured, "writes to a tensor"),
    "writes to state": (writes_to_state, "writes to a tensor"),
    "sets data": (sets_data, r"\.data"),
    "complex": (lambda t, y: (y * 1j).real, "complex"),
    "fft": (lambda t, y: torch.fft.fft(y).real, "complex"),
    "sparse": (lambda t, y: torch.eye(4, dtype=F64).to_sparse() @ y, "sparse"),
    "python random": (lambda t, y: y * random.random(), "two calls of it did not compute the same"),
    "random constant": (
        lambda t, y: y * torch.tensor(random.random()),
        "two calls of it did not compute the same",
    ),
    "memory of numpy": (lambda t, y: y * torch.from_numpy(MEMORY), "memory that changes unseen"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_graph_cannot_hold_is_refused(case):
    func, match = REFUSED[case]
    assert "test_trace.py:" in refused(func, match)


def test_a_tensor_subclass_is_refused():
    class Named(torch.Tensor):
        pass

    scale = torch.ones(2, dtype=F64).as_subclass(Named)
    refused(lambda t, y: (y * scale).as_subclass(torch.Tensor), "subclass, Named")


def test_a_captured_tensor_elsewhere_is_refused():
    scale = torch.ones((), dtype=F64, device="meta")
    with pytest.raises((CompileError, RuntimeError, NotImplementedError)):
        trace(lambda t, y: y * scale, T, state())


def test_dependence_on_the_number_of_calls_is_refused_with_both_graphs():
    calls = []

    def func(t, y):
        calls.append(1)
        return y * len(calls)

    assert "first mul 2, then mul 3" in refused(func, "two calls").replace(".Tensor", "")


def test_another_operation_in_another_call_is_refused():
    calls = []

    def func(t, y):
        calls.append(1)
        return y.sin() if len(calls) % 2 else y.cos()

    refused(func, "two calls of it did not compute the same, at test_trace.py")


def test_exceptions_of_func_pass_unchanged():
    def func(t, y):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        trace(func, T, state())


def test_numbers_that_slip_out_unseen_are_noticed():
    def func(t, y):
        return y * torch.from_dlpack(torch._C._to_dlpack(y))

    refused(func, "two calls of it did not compute the same")


def test_known_numbers_may_be_read():
    def func(t, y):
        weights = torch.tensor([1.0, 3.0])
        return y * float(weights.sum()) if weights[0] > 0 else y

    check(func)


@pytest.mark.parametrize(
    "layer",
    [
        linear(2, 2),
        nn.Tanh(),
        nn.Sigmoid(),
        nn.ReLU(),
        nn.SiLU(),
        nn.Softplus(),
        nn.Softplus(beta=3.0, threshold=1.0),
        nn.GELU(),
        nn.ELU(),
        nn.LayerNorm(2, dtype=F64),
        nn.Bilinear(2, 2, 2, dtype=F64),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_have_the_values_and_derivatives_of_torch(layer):
    y = torch.cat([state(), torch.tensor([[30.0, -30.0], [0.0, 1000.0]], dtype=F64)])
    pair = isinstance(layer, nn.Bilinear)
    check(lambda t, y: layer(y, y) if pair else layer(y), y, inputs=len(list(layer.parameters())))


@pytest.mark.parametrize("name", ["addmm", "baddbmm"])
def test_products_are_scaled_as_torch_does(name):
    shape = (3, 2, 2) if name == "baddbmm" else (2, 2)
    function, weight = getattr(torch, name), torch.randn(shape, dtype=F64)
    check(lambda t, y: function(y, y, weight, beta=2.0, alpha=0.5), torch.randn(shape, dtype=F64), inputs=1)


def test_threads_that_record_leave_torch_compile_as_it_was(monkeypatch):
    import torch._dynamo  # with it, functions that torch.compile has compiled are recorded as they were written

    stance = torch._dynamo.eval_frame._stance.stance
    both_inside = threading.Barrier(2)

    def func(t, y):
        with contextlib.suppress(threading.BrokenBarrierError):
            both_inside.wait(0.2)  # would let two threads at once in, if they came in at once
        return -y

    threads = [
        threading.Thread(target=trace, args=(func, torch.tensor(0.0), torch.ones(2))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch._dynamo.eval_frame._stance.stance == stance
