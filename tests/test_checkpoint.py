"""adjoint='checkpoint': the gradients of direct mode, from states in place of graphs."""

import gc
import math
import warnings
import weakref

import pytest
import torch
from problems import EXPLICIT, Counted, Net
from test_schedule import recorded

import flashode
from flashode.adjoint.checkpoint import Recording
from flashode.adjoint.schedule import reversal, thinned

pytestmark = pytest.mark.filterwarnings("ignore:rtol is 1000")
F64 = torch.float64


# ---- gradients -----------------------------------------------------------------------------


def gradients(odeint, field, y0, t, *extra, **arguments):
    """Of a fixed linear function of all outputs, to what requires any of y0, t and ``extra``."""
    if odeint is flashode.odeint_adjoint:
        arguments = {"adjoint": "checkpoint", "adjoint_params": extra} | arguments
    ys = odeint(field, y0, t, **arguments)
    ys = ys[1] if "event_fn" in arguments else ys
    flat = torch.cat([y.reshape(-1) for y in (ys if isinstance(ys, tuple) else (ys,))])
    weights = torch.cos(torch.arange(flat.numel(), dtype=F64)).to(flat)
    members = y0 if isinstance(y0, tuple) else (y0,)
    inputs = [x for x in (*members, t, *extra) if x.requires_grad]
    return torch.autograd.grad((flat * weights).sum().real, inputs)


def assert_equals_direct(field, y0, t, *extra, checkpoints=None, tol=1e-12, **arguments):
    direct = gradients(flashode.odeint, field, y0, t, *extra, **arguments)
    ours = gradients(flashode.odeint_adjoint, field, y0, t, *extra, checkpoints=checkpoints, **arguments)
    for a, b in zip(ours, direct, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        tol = max(tol, 4 * torch.finfo(b.dtype).eps)
        assert (a - b).abs().max() <= tol * b.abs().max()


def start(shape=(3, 2)):
    return torch.linspace(-1, 1, math.prod(shape), dtype=F64).reshape(shape).requires_grad_()


def times(backward=False, needs_t=True):
    t = torch.tensor([0.1, 0.4, 0.75, 1.0], dtype=F64)
    return (t.flip(0) if backward else t).requires_grad_(needs_t)


@pytest.mark.parametrize("needs_t", [False, True], ids=["", "t"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("method", list(EXPLICIT))
def test_gradients_are_those_of_direct_mode(method, backward, needs_t, engine):
    net = Net(dtype=F64)
    options = {} if EXPLICIT[method].adaptive else {"step_size": 0.06}
    for checkpoints in (None, 1, 2, 3, 6):
        assert_equals_direct(
            net, start(), times(backward, needs_t), *net.parameters(), checkpoints=checkpoints,
            method=method, options=options, rtol=1e-4, atol=1e-6, engine=engine,
        )  # fmt: skip


def uneven(t):
    x = torch.linspace(0, 1, 9, dtype=F64) ** 2
    return (1 - x) * t[0] + x * t[-1]


OPTIONS = [
    ("dopri5", {"step_t": torch.tensor([0.3, 0.4], dtype=F64)}),
    ("dopri5", {"jump_t": torch.tensor([0.3, 0.4, 0.8], dtype=F64)}),
    ("adaptive_heun", {"jump_t": torch.tensor([0.5], dtype=F64)}),
    ("dopri8", {"overshoot": True}),
    ("tsit5", {"overshoot": True, "first_step": 0.11}),
    ("rk4", {"step_size": 0.07, "perturb": True}),
    ("rk4", {"step_size": 0.07, "interp": "cubic"}),
    ("heun3", {"interp": "cubic"}),
    ("midpoint", {"grid_constructor": lambda f, y, t: uneven(t)}),
]  # fmt: skip


@pytest.mark.parametrize("method, options", OPTIONS, ids=lambda x: "-".join(x) if isinstance(x, dict) else x)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_options(method, options, backward, engine):
    net = Net(dtype=F64)
    for needs_t in (False, True):
        for checkpoints in (None, 3):
            assert_equals_direct(
                net, start(), times(backward, needs_t), *net.parameters(), checkpoints=checkpoints,
                method=method, options=options, rtol=1e-5, atol=1e-7, engine=engine,
            )  # fmt: skip


def test_a_field_that_jumps(engine):
    """The slope handed on at the jump is evaluated past it."""
    a = torch.tensor([0.7, -0.3], dtype=F64, requires_grad=True)
    options = {"jump_t": torch.tensor([0.5], dtype=F64)}
    for t in (times(), times(backward=True)):
        assert_equals_direct(
            lambda t, y: torch.where(t < 0.5, a, -2 * a * y) * y.cos(), start((2,)), t, a, options=options,
            engine=engine,
        )  # fmt: skip


def test_tuple_states(engine):
    w = torch.tensor([0.3, -0.7], dtype=F64, requires_grad=True)

    def field(t, state):
        a, b = state
        return torch.tanh(a * w) * t, (a * w).sum() - b

    state = (start((2,)), torch.tensor(0.2, dtype=F64, requires_grad=True))
    assert_equals_direct(field, state, times(), w, engine=engine, checkpoints=2)


def test_complex_states():
    w = torch.tensor([0.3 + 1j, -0.7j], dtype=torch.complex128, requires_grad=True)
    y0 = torch.tensor([1.0 + 0.5j, -0.3j], dtype=torch.complex128, requires_grad=True)
    assert_equals_direct(lambda t, y: w * y * torch.cos(t) - y * y.conj(), y0, times(), w, checkpoints=2)


@pytest.mark.parametrize("method, options", [("dopri5", {}), ("dopri8", {}), ("rk4", {"step_size": 0.06})])
@pytest.mark.parametrize("t_dtype", [F64, torch.float32], ids=str)
def test_events(method, options, t_dtype):
    """The state at the event; also where the time it found is rounded to a coarser dtype."""
    net = Net(dtype=F64)
    t = torch.tensor([0.1, 3.0], dtype=t_dtype, requires_grad=True)
    arguments = {"method": method, "options": options, "rtol": 1e-5, "atol": 1e-7}
    for event_fn in (lambda t, y: y[0, 0], lambda t, y: t - 0.7):
        assert_equals_direct(
            net, start(), t, *net.parameters(), event_fn=event_fn, checkpoints=2, **arguments
        )


def test_an_event_that_has_fired_at_the_start():
    y0 = start()
    assert_equals_direct(Net(dtype=F64), y0, times(needs_t=False)[:2], event_fn=lambda t, y: 0 * t)


def test_arguments_of_the_field_get_gradients(engine):
    w, factor = torch.tensor([0.4, 0.6], dtype=F64, requires_grad=True), 2.0

    def field(t, y, scaled, factor):
        return -scaled["w"] * y * factor

    def grad(**arguments):
        odeint = flashode.odeint_adjoint if arguments else flashode.odeint
        ys = odeint(field, start((2,)), times(), args=({"w": 3 * w}, factor), engine=engine, **arguments)
        return torch.autograd.grad(ys.sum(), w)[0]

    ours = grad(adjoint="checkpoint", adjoint_params=())
    torch.testing.assert_close(ours, grad(), rtol=1e-12, atol=0)


def test_parameters_that_only_some_stages_reach(engine):
    a, b, unused = (torch.tensor(x, dtype=F64, requires_grad=True) for x in (0.5, -0.8, 1.0))
    arguments = {"engine": engine, "rtol": 1e-4, "atol": 1e-6}

    def field(t, y):
        return a * y if t < 0.5 else torch.cos(b * y)

    y0, t = start((2,)), times()
    assert_equals_direct(field, y0, t, a, b, **arguments)
    ys = flashode.odeint_adjoint(
        field, y0, t, adjoint="checkpoint", adjoint_params=(a, b, unused), **arguments
    )
    assert torch.autograd.grad(ys.sum(), unused)[0] == 0


def test_a_field_whose_slopes_carry_no_graph(engine):
    y0 = torch.ones(2, dtype=F64, requires_grad=True)
    ys = flashode.odeint_adjoint(
        lambda t, y: -y.detach(), y0, times(), adjoint="checkpoint", adjoint_params=(), engine=engine
    )
    assert torch.equal(torch.autograd.grad(ys[-1].sum(), y0)[0], torch.ones(2, dtype=F64))


def test_a_field_that_writes_into_its_argument(engine):
    """In direct mode and in this one, with slopes at the start of every step."""
    a = torch.tensor(0.5, dtype=F64, requires_grad=True)
    for method in ("rk4", "dopri5"):
        grads = [
            gradients(odeint, field, start((2,)), times(), a, method=method, engine=engine)
            for odeint in (flashode.odeint, flashode.odeint_adjoint)
            for field in (lambda t, y: -a * y, lambda t, y: y.mul_(-a))
        ]
        for other in grads[1:]:
            for x, y in zip(grads[0], other):
                torch.testing.assert_close(x, y, rtol=1e-12, atol=0)


def test_a_field_that_returns_one_buffer_every_time(engine):
    """The slopes that are held must not be the buffer."""
    buffer, a = torch.empty(2, dtype=F64), torch.tensor(0.5, dtype=F64, requires_grad=True)

    def reusing(t, y):
        slope = -a * y * y
        return slope if slope.requires_grad else buffer.copy_(slope)

    y0, t = start((2,)), times()
    ours = gradients(flashode.odeint_adjoint, reusing, y0, t, a, engine=engine)
    direct = gradients(flashode.odeint, lambda t, y: -a * y * y, y0, t, a, engine=engine)
    for x, y in zip(ours, direct):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=0)


def test_a_field_that_takes_derivatives_itself(engine):
    """As continuous normalizing flows do, whose fields require gradients of what they are shown."""
    w = torch.tensor([[0.3, -1.0], [0.8, 0.1]], dtype=F64, requires_grad=True)

    def field(t, y):
        with torch.enable_grad():
            y = y.requires_grad_()
            return torch.autograd.grad(torch.sin(w @ y).sum(), y, create_graph=True)[0]

    assert_equals_direct(field, start((2,)), times(needs_t=False), w, engine=engine, checkpoints=2)


def test_single_precision(engine):
    net = Net()
    y0 = start().detach().float().requires_grad_()
    assert_equals_direct(net, y0, torch.linspace(0, 1, 4), *net.parameters(), tol=1e-6, engine=engine)


def test_one_output_and_none_of_the_others(engine):
    """Only one row has a cotangent; a single time asks for no step at all."""
    net, y0 = Net(dtype=F64), start()
    grads = [
        torch.autograd.grad(solve(net, y0, times(), engine=engine, **more)[1].sum(), [y0, *net.parameters()])
        for solve, more in ((flashode.odeint, {}), (flashode.odeint_adjoint, {"adjoint": "checkpoint"}))
    ]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    only = flashode.odeint_adjoint(net, y0, torch.zeros(1, dtype=F64), adjoint="checkpoint", engine=engine)
    assert torch.equal(torch.autograd.grad(only.sum(), y0)[0], torch.ones_like(y0))


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "adaptive_heun", "rk4"])
def test_first_and_second_derivatives_against_finite_differences(method, engine):
    options = {"first_step": 0.27, "max_step": 0.27} if EXPLICIT[method].adaptive else {"step_size": 0.27}
    a = torch.tensor([[0.3, -1.0], [0.8, 0.1]], dtype=F64, requires_grad=True)
    y0 = torch.tensor([0.7, -0.4], dtype=F64, requires_grad=True)
    t = torch.tensor([0.1, 0.4, 1.0], dtype=F64, requires_grad=True)

    def function(y0, t, a):
        return flashode.odeint_adjoint(
            lambda t, y: torch.sin(a @ y) + t * y, y0, t, adjoint="checkpoint", adjoint_params=(a,),
            checkpoints=2, rtol=1e3, atol=1e3, method=method, options=options, engine=engine,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, (y0, t, a))
    assert torch.autograd.gradgradcheck(function, (y0, t, a))


@pytest.mark.parametrize("needs_y0, needs_t", [(True, False), (False, True), (False, False)])
def test_second_derivatives_where_some_inputs_need_none(needs_y0, needs_t, engine):
    """A gradient penalty on the parameters."""
    net = Net(dtype=F64)
    y0, t = start().requires_grad_(needs_y0), times(needs_t=needs_t)

    def penalty(solve, **more):
        ys = solve(net, y0, t, rtol=1e-5, atol=1e-7, engine=engine, **more)
        grads = torch.autograd.grad(ys[-1].square().sum(), list(net.parameters()), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), list(net.parameters()))

    ours = penalty(flashode.odeint_adjoint, adjoint="checkpoint")
    for a, b in zip(ours, penalty(flashode.odeint)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


def test_second_derivatives_with_an_event():
    net, y0 = Net(dtype=F64), start()
    t = torch.tensor([0.1, 3.0], dtype=F64, requires_grad=True)
    inputs = [y0, t, *net.parameters()]

    def second(solve, **more):
        _, ys = solve(net, y0, t, event_fn=lambda t, y: y[0, 0], rtol=1e-5, atol=1e-7, **more)
        grads = torch.autograd.grad(ys[-1].square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)

    ours = second(flashode.odeint_adjoint, adjoint="checkpoint")
    for a, b in zip(ours, second(flashode.odeint)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("end", [3.0, 10.0])
def test_a_stiff_problem_where_solving_backwards_goes_wrong(end, engine):
    """y' = -50 (y - cos t): backwards in time every error grows by exp(50 t)."""
    y0 = torch.tensor([0.4], dtype=F64, requires_grad=True)
    rate = torch.tensor(50.0, dtype=F64, requires_grad=True)
    t = torch.tensor([0.0, end], dtype=F64)

    def grad(solve, **more):
        ys = solve(
            lambda t, y: -rate * (y - torch.cos(t)), y0, t, rtol=1e-3, atol=1e-6, engine=engine, **more
        )
        return torch.autograd.grad(ys[-1].sum(), rate)[0]

    direct = grad(flashode.odeint)
    ours = grad(flashode.odeint_adjoint, adjoint="checkpoint", adjoint_params=(rate,), checkpoints=10)
    torch.testing.assert_close(ours, direct, rtol=1e-6, atol=0)


# ---- cost ----------------------------------------------------------------------------------


def solved(net, checkpoints=None, end=1.0, engine="auto", **arguments):
    field = Counted(net)
    t = torch.tensor([0.0, 0.4 * end, end], dtype=F64)
    arguments = {"rtol": 1e-7, "atol": 1e-9} | arguments
    ys = flashode.odeint_adjoint(
        field, start(), t, adjoint="checkpoint", checkpoints=checkpoints, engine=engine,
        adjoint_params=tuple(net.parameters()), **arguments,
    )  # fmt: skip
    steps = flashode.solve(net, start().detach(), t, engine=engine, **arguments).stats.accepted
    return field, ys, steps


def test_calls_of_the_field(engine):
    """Held states: each step once, and the first slope. Recomputation: as the schedule has it."""
    for checkpoints in (None, 1, 3, 5):
        field, ys, steps = solved(Net(dtype=F64), checkpoints, engine=engine)
        assert steps > 8
        field.times.clear()
        ys.sum().backward()
        schedule = list(
            reversal(
                steps,
                checkpoints or steps,
                thinned(steps, checkpoints or steps, recorded(steps, checkpoints)),
            )
        )
        replays = steps + sum(stop - start for start, stop, _ in schedule)
        first_slopes = sum(start == 0 for start, _, _ in schedule)
        assert field.nfe == 6 * replays + first_slopes
        if checkpoints is None:
            assert field.nfe == 6 * steps + 1


def test_callbacks_are_not_called_in_the_backward_pass(engine):
    class Watched(Net):
        calls = 0

        def callback_step(self, t, y, dt):
            self.calls += 1

        callback_accept_step = callback_reject_step = callback_step

    net = Watched(dtype=F64)
    _, ys, _ = solved(net, engine=engine)
    net.calls = 0
    ys.sum().backward()
    assert net.calls == 0


class Node(torch.autograd.Function):
    """A node of a graph that does nothing but be there."""

    alive = weakref.WeakSet()

    @staticmethod
    def forward(ctx, x):
        Node.alive.add(ctx)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_no_graph_is_kept(engine):
    """The solve records none; the backward pass has that of one step, however many there are."""
    net, most = Net(dtype=F64), 0

    def field(t, y):
        nonlocal most
        slope = Node.apply(net(t, y))
        most = max(most, len(Node.alive))
        return slope

    t = torch.linspace(0, 8, 5, dtype=F64)
    gc.collect()
    ys = flashode.odeint(field, start(), t, engine=engine)
    assert most > 60
    del ys
    most = 0
    arguments = {"adjoint": "checkpoint", "adjoint_params": tuple(net.parameters()), "engine": engine}
    ys = flashode.odeint_adjoint(field, start(), t, **arguments)
    assert most <= 1  # that of the call at hand, which goes with it
    ys.sum().backward()
    assert most <= 8
    assert not Node.alive


@pytest.fixture
def young_objects():
    """`gc.get_objects` lists those only that a test made, which is fast."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class States(torch.nn.Module):
    """A field whose states have a shape that no other tensor has, and that counts those alive."""

    shape = (3, 2, 1, 1, 1)

    def __init__(self, watch=False):
        super().__init__()
        self.net, self.watch, self.most = Net(dtype=F64), watch, 0

    def forward(self, t, y):
        if self.watch:
            self.most = max(self.most, self.alive())
        return self.net(t, y.reshape(3, 2)).reshape(self.shape)

    def alive(self):
        return len({
            x.untyped_storage().data_ptr()
            for x in gc.get_objects()
            if type(x) is torch.Tensor and x.shape == self.shape
        })  # fmt: skip

    def solve(self, end, **arguments):
        y0, t = start().reshape(self.shape).detach(), torch.linspace(0, end, 2, dtype=F64)
        return flashode.odeint_adjoint(self, y0, t, adjoint="checkpoint", **arguments)


@pytest.mark.parametrize("retain", [False, True], ids=["", "retained"])
def test_states_are_released_by_the_backward_pass(retain, engine, young_objects):
    field = States()
    before = field.alive()
    ys = field.solve(4.0, engine=engine)
    assert field.alive() >= before + 20  # state and slope of more than ten steps
    ys.sum().backward(retain_graph=retain)
    assert field.alive() <= before + 1


def test_never_more_states_than_asked_for(engine, young_objects):

    def most(checkpoints):
        field = States(watch=True)
        ys = field.solve(2.0, rtol=1e-5, atol=1e-7, checkpoints=checkpoints, engine=engine)
        ys.sum().backward()
        return field.most

    # A held state is two tensors; what the step at hand needs comes on top.
    assert most(3) <= most(1) + 4
    assert most(1) + 12 <= most(None)


def test_two_backward_passes_are_equal(engine):
    for checkpoints in (None, 2):
        net = Net(dtype=F64)
        _, ys, _ = solved(net, checkpoints, engine=engine)
        passes = [torch.autograd.grad(ys.sum(), list(net.parameters()), retain_graph=True) for _ in range(2)]
        for a, b in zip(*passes):
            assert torch.equal(a, b)
        torch.autograd.grad(ys.sum(), list(net.parameters()))
        with pytest.raises(RuntimeError, match="second time"):
            ys.sum().backward()


def test_no_growth_over_many_iterations(engine, young_objects):
    net = Net(dtype=F64)
    t = torch.linspace(0, 1, 3, dtype=F64)

    def iteration():
        y = flashode.odeint_adjoint(
            net, start(), t, rtol=1e-3, atol=1e-4, adjoint="checkpoint", checkpoints=2, engine=engine
        )
        y.sum().backward()

    def tensors():
        gc.collect()
        return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())

    iteration()
    before = tensors()
    for _ in range(300):
        iteration()
    assert tensors() <= before


def test_nothing_is_held_where_nothing_requires_gradients(engine, monkeypatch):
    monkeypatch.setattr(Recording, "add", lambda *_: pytest.fail("a step was recorded"))
    net = Net(dtype=F64)
    with torch.no_grad():
        flashode.odeint_adjoint(net, start(), times(), adjoint="checkpoint", engine=engine)
    net.requires_grad_(False)
    flashode.odeint_adjoint(net, start().detach(), times(needs_t=False), adjoint="checkpoint", engine=engine)


# ---- misuse --------------------------------------------------------------------------------


def test_a_field_that_does_not_repeat_itself_is_reported_once(engine):
    class Noisy(Net):
        def forward(self, t, y):
            return super().forward(t, y) * (1 + 0.1 * torch.rand((), dtype=y.dtype))

    net = Noisy(dtype=F64)
    ys = flashode.odeint_adjoint(
        net, start(), times(), method="rk4", options={"step_size": 0.1}, adjoint="checkpoint", engine=engine
    )
    with pytest.warns(UserWarning, match="not the same function in the backward pass") as caught:
        ys.sum().backward()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solved(Net(dtype=F64), 3, engine=engine)[1].sum().backward()


def test_a_changed_parameter_is_noticed(engine):
    net = Net(dtype=F64)
    _, ys, _ = solved(net, engine=engine)
    with torch.no_grad():
        net.w[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ys.sum().backward()


def test_the_caller_may_write_into_a_state_that_requires_no_gradients(engine):
    net, y0 = Net(dtype=F64), start().detach()
    expected = gradients(flashode.odeint, net, y0.clone(), times(), *net.parameters(), engine=engine)
    ys = flashode.odeint_adjoint(net, y0, times(), adjoint="checkpoint", engine=engine)
    y0.zero_()
    weights = torch.cos(torch.arange(ys.numel(), dtype=F64)).reshape(ys.shape)
    for a, b in zip(torch.autograd.grad((ys * weights).sum(), list(net.parameters())), expected[1:]):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_a_failing_solve_fails_in_the_forward_pass(engine):
    with pytest.raises(flashode.SolveError, match="max_num_steps"):
        flashode.odeint_adjoint(
            Net(dtype=F64), start(), times(), adjoint="checkpoint", options={"max_num_steps": 2}, rtol=1e-10,
            engine=engine,
        )  # fmt: skip
