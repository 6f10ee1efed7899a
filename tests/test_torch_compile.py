"""Solves inside torch.compile and torch.export, and solves of fields that torch.compile has compiled."""

import functools
import shutil

import pytest
import torch
from problems import EXPLICIT, Net, growth
from solves import F64, MODES, Block, T, derivatives, each_solve, run, same
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import flashode
from flashode import extension

pytestmark = [
    # torch.compile looks for a gradient wherever there could be one, and compiles forward-mode formulas.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]

FIXED = [name for name, method in EXPLICIT.items() if not method.adaptive]


@pytest.fixture
def net():
    return Net(dtype=F64)


@pytest.fixture
def y0():
    return torch.randn(3, 2, dtype=F64, requires_grad=True)


# ---- torch.compile ---------------------------------------------------------------------------


@pytest.fixture
def compiled():
    """torch.compile without what earlier tests have compiled."""
    torch._dynamo.reset()
    yield functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()


@pytest.mark.parametrize("method, perturb", [*((method, False) for method in FIXED), ("rk4", True)])
def test_fixed_steps_compile_into_one_graph(compiled, net, y0, method, perturb):
    t = T.clone().requires_grad_()

    def model(y0, t):
        ys = flashode.odeint(net, torch.sin(y0), 2 * t, method=method, options={"perturb": perturb})
        return ys.cos()

    # aot_eager makes a graph of the backward pass as well.
    backend = "aot_eager" if method == "midpoint" else "eager"
    ours, theirs = compiled(model, backend=backend)(y0, t), model(y0, t)
    assert torch.equal(ours, theirs)
    inputs = [y0, t, *net.parameters()]
    same(derivatives(ours, inputs), derivatives(theirs, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128])
def test_a_graph_takes_the_steps_of_the_reference_engine_in_every_dtype(compiled, dtype):
    """Tuples, times of another dtype that run backwards, and further arguments."""

    def func(t, y, a):
        return a * growth(t, y[0]), -t * y[1]

    def model(y0, y1, t, a):
        return flashode.odeint(func, (y0, y1), t, method="rk4", args=(a,), engine="reference")

    arguments = [torch.randn(5).to(dtype), torch.randn(()).to(dtype), (T * 1.1).flip(0), torch.tensor(0.7)]
    inputs = [x.requires_grad_() for x in arguments]
    ours, theirs = compiled(model, backend="eager")(*arguments), model(*arguments)
    assert all(map(torch.equal, ours, theirs))
    close = dict(rtol=1e-10, atol=1e-10) if dtype == torch.complex128 else dict(rtol=0.05, atol=0.05)
    same(derivatives(ours, inputs), derivatives(theirs, inputs), **close)


def test_one_graph_serves_all_times(compiled, net, y0):
    counter = CompileCounter()
    solve = compiled(lambda y0, t: flashode.odeint(net, y0, t, method="rk4"), backend=counter)
    for t in (T, 3 * T, -T):
        assert torch.equal(solve(y0, t), flashode.odeint(net, y0, t, method="rk4"))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_field_is_not_called_outside_the_interval(compiled, dtype):
    t = torch.tensor([0.7, 0.9, 1.1], dtype=F64)  # rounding takes both ends outside
    for times in (t, t.flip(0)):
        seen = []

        def func(t, y, seen=seen):
            seen.append(t)
            return y

        def model(y0, t, seen=seen, func=func):
            flashode.odeint(func, y0, t, method="rk4")
            return torch.stack(seen)

        stages = compiled(model, backend="eager")(torch.ones(1, dtype=dtype), times).double()
        assert len(stages) == 8 and stages.min() >= 0.7 and stages.max() <= 1.1


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of inductor's own
def test_inductor_compiles_a_solve(compiled):
    y0, t = torch.randn(3, requires_grad=True), torch.tensor([0.0, 0.4, 1.0])

    def model(y0, t):
        return flashode.odeint(growth, y0, t, method="midpoint")

    ours, theirs = compiled(model, backend="inductor")(y0, t), model(y0, t)
    same(ours, theirs, rtol=1e-5, atol=1e-6)
    same(derivatives(ours, y0), derivatives(theirs, y0), rtol=1e-5, atol=1e-6)


class Reporting(Net):
    def callback_step(self, t, y, dt):
        pass


REPORTING = Reporting(dtype=F64)
NEED_VALUES = {
    "adaptive": lambda f, y: flashode.odeint(f, y, T),
    "step_size": lambda f, y: flashode.odeint(f, y, T, method="rk4", options={"step_size": 0.25}),
    "native": lambda f, y: flashode.odeint(f, y, T, method="rk4", engine="native"),
    "callbacks": lambda f, y: flashode.odeint(REPORTING, y, T, method="rk4"),
    "event": lambda f, y: flashode.odeint(f, y, T[:2], event_fn=lambda t, y: t - 0.4)[1],
    "solve": lambda f, y: flashode.solve(f, y, T, method="rk4").ys,
    "adjoint": lambda f, y: flashode.odeint_adjoint(f, y, T),
    "checkpoint": lambda f, y: flashode.odeint_adjoint(f, y, T, method="rk4", adjoint="checkpoint"),
}


@pytest.mark.parametrize("call", NEED_VALUES.values(), ids=NEED_VALUES)
def test_a_solve_that_reads_values_stands_between_two_graphs(compiled, net, y0, call):
    if call is NEED_VALUES["native"] and extension.C is None:
        pytest.skip("no compiled extension")

    def model(y0):
        return call(net, torch.sin(y0)).cos()

    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"fixed-step method on the times.*torch.compile\(func\)"):  # fmt: skip
        compiled(model)(y0)
    torch._dynamo.reset()
    counter = CompileCounter()
    ours, theirs = compiled(model, backend=counter, fullgraph=False)(y0), model(y0)
    assert counter.frame_count >= 2
    inputs = [y0] if call is NEED_VALUES["callbacks"] else [y0, *net.parameters()]
    same(ours, theirs)
    same(derivatives(ours, inputs), derivatives(theirs, inputs))


def test_a_compiled_solve_refuses_what_shapes_tell(compiled, y0):
    for func, times, match in [
        (lambda t, y: y.sum(), T, "func returned shape .* expected"),
        (lambda t, y: y, T[None], "t must be one dimensional"),
        (lambda t, y: y, T.long(), "floating point"),
    ]:
        with pytest.raises((flashode.ArgumentError, flashode.ArgumentTypeError), match=match):
            compiled(flashode.odeint, fullgraph=False)(func, y0, times, method="rk4")


@each_solve
def test_a_compiled_field_may_be_solved(compiled, net, y0, method, mode):
    ours = run(compiled(net), y0, mode=mode, method=method)
    theirs = run(net, y0, mode=mode, method=method)
    inputs = [y0, *net.parameters()]
    same(ours, theirs)
    same(derivatives(ours, inputs), derivatives(theirs, inputs))


class WalkedOnce(torch.autograd.Function):
    """The identity with a backward pass that spends what it saved, as inductor's do on some devices."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if torch._C._autograd._get_current_graph_task_keep_graph():
            raise RuntimeError(
                "This backward function was compiled with non-empty donated buffers which requires ..."
            )
        return grad


@pytest.mark.parametrize("restart", [False, True])
@each_solve
def test_a_field_whose_graph_can_be_walked_only_once_has_gradients(engine, net, y0, method, mode, restart):
    if restart and mode != "backsolve":
        pytest.skip("a way of backsolve alone")
    call = dict(mode=mode, method=method, engine=engine)
    if restart:
        call |= dict(adjoint_options=dict(restart=True))
    inputs = [y0, *net.parameters()]
    once = lambda t, y: WalkedOnce.apply(net(t, y))  # noqa: E731
    given = {} if mode == "direct" else dict(adjoint_params=tuple(net.parameters()))
    same(derivatives(run(once, y0, **call, **given), inputs), derivatives(run(net, y0, **call), inputs))


def test_errors_of_a_backward_pass_are_passed_on(engine, y0):
    class Fails(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x.clone())

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("no gradient today")

    for mode in MODES[1:]:
        ys = run(lambda t, y: Fails.apply(y), y0, mode=mode, engine=engine, adjoint_params=())
        with pytest.raises(RuntimeError, match="no gradient today"):
            ys.sum().backward()


# ---- torch.export and fake tensors -----------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
def test_fixed_steps_can_be_exported(compiled, y0, strict):
    block = Block(method="rk4")
    shapes = ({0: torch.export.Dim("batch")}, None)
    program = torch.export.export(block, (y0.detach(), T), dynamic_shapes=shapes, strict=strict)
    other = torch.randn(7, 2, dtype=F64)
    same(program.module()(other, 2 * T), block(other, 2 * T))


@pytest.mark.parametrize("call", [dict(), dict(method="rk4", options=dict(step_size=0.1))], ids=["adaptive", "step_size"])  # fmt: skip
def test_other_solves_say_why_they_cannot_be_exported(compiled, y0, call):
    with pytest.raises(flashode.ArgumentError, match="fake Tensor.*only odeint with a fixed-step method"):
        torch.export.export(Block(**call), (y0.detach(), T), strict=False)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="fixed-step method on the times"):
        torch.export.export(Block(**call), (y0.detach(), T), strict=True)


def test_fake_tensors_are_solved_where_shapes_suffice(y0):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake, t = mode.from_tensor(y0.detach()), mode.from_tensor(T)
    ys = flashode.odeint(lambda t, y: (growth(t, y[0]), y[1]), (fake, fake[0]), t, method="rk4")
    assert [y.shape for y in ys] == [(3, 3, 2), (3, 2)]
    for times in (t, T):
        with pytest.raises(flashode.ArgumentError, match="is a fake Tensor, which has no values"):
            flashode.odeint(growth, fake, times)
