"""Gradients: finite differences, the engines and the two modes against each other, torchdiffeq."""

import math

import pytest
import torch
from problems import EXPLICIT, Counted, Net, growth, twisted, twisted_start

import flashode

# Tolerances far too large let a test prescribe the steps of an adaptive method.
pytestmark = pytest.mark.filterwarnings("ignore:rtol is 1000")
F64 = torch.float64
BACKWARD = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])


def options_for(method):
    return {} if EXPLICIT[method].adaptive else {"step_size": 0.01}


def times(backward=False):
    t = torch.tensor([0.1, 0.4, 0.75, 1.0], dtype=F64)
    return (t.flip(0) if backward else t).requires_grad_()


@BACKWARD
@pytest.mark.parametrize("method", list(EXPLICIT))
def test_direct_gradients_are_those_of_the_discrete_solve(method, backward, engine, device):
    """Against finite differences of the solve itself, with its steps held: first_step and max_step
    fix them, so that a difference quotient does not see step-size control."""
    options = {"first_step": 0.19, "max_step": 0.19} if EXPLICIT[method].adaptive else {"step_size": 0.19}
    a = torch.tensor([[0.3, -1.0], [0.8, 0.1]], dtype=F64, requires_grad=True)
    y0 = torch.tensor([0.7, -0.4], dtype=F64, requires_grad=True)

    def function(y0, t, a):
        return flashode.odeint(
            lambda t, y: torch.sin(a @ y) * torch.cos(2 * t) + t, y0, t,
            rtol=1e3, atol=1e3, method=method, options=options, engine=engine,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, (y0, times(backward), a))


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "tsit5", "bosh3", "rk4", "euler"])
def test_second_derivatives(method, engine):
    options = {"first_step": 0.27, "max_step": 0.27} if EXPLICIT[method].adaptive else {"step_size": 0.27}
    a = torch.tensor([[0.3, -1.0], [0.8, 0.1]], dtype=F64, requires_grad=True)
    y0 = torch.tensor([0.7, -0.4], dtype=F64, requires_grad=True)
    t = torch.tensor([0.1, 0.4, 1.0], dtype=F64, requires_grad=True)

    def function(y0, t, a):
        return flashode.odeint(
            lambda t, y: torch.sin(a @ y) + t * y, y0, t,
            rtol=1e3, atol=1e3, method=method, options=options, engine=engine,
        )  # fmt: skip

    assert torch.autograd.gradgradcheck(function, (y0, t, a))


def gradients(solve, *, y0=None, method="dopri5", backward=False, needs_t=True, **arguments):
    """Gradients of a fixed linear function of all outputs, to y0, t and the parameters."""
    net = Net(dtype=F64)
    y0 = (torch.linspace(-1, 1, 6, dtype=F64).reshape(3, 2) if y0 is None else y0).requires_grad_()
    t = times(backward)
    t.requires_grad_(needs_t)
    ys = solve(net, y0, t, method=method, options=options_for(method), rtol=1e-9, atol=1e-11, **arguments)
    weights = torch.cos(torch.arange(ys.numel(), dtype=F64)).reshape(ys.shape)
    inputs = [y0, *net.parameters()] + ([t] if needs_t else [])
    return torch.autograd.grad((ys * weights).sum(), inputs)


@BACKWARD
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "tsit5", "fehlberg45", "rk4"])
def test_adjoint_gradients_agree_with_direct_ones(method, backward, engine):
    direct = gradients(flashode.odeint, method=method, backward=backward, engine=engine)
    adjoint = gradients(flashode.odeint_adjoint, method=method, backward=backward, engine=engine)
    # With fixed steps the two differ by the discretisation, most in the slopes of chords.
    tol = 1e-6 if EXPLICIT[method].adaptive else 3e-2
    for a, b in zip(adjoint, direct):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@BACKWARD
def test_the_gradient_of_an_output_time_on_a_grid_point(backward, engine):
    """It is the slope there, also where the value needs no interpolation."""
    t = torch.tensor([1.0, 0.5, 0.0] if backward else [0.0, 0.5, 1.0], dtype=F64, requires_grad=True)
    y0 = torch.ones((), dtype=F64, requires_grad=True)
    for options in ({"step_size": 1 / 64}, {"step_size": 1 / 64, "interp": "cubic"}):
        ys = flashode.odeint(
            lambda t, y: y * torch.cos(t), y0, t, method="rk4", options=options, engine=engine
        )
        (g,) = torch.autograd.grad(ys[1], t)
        slope = (ys[1] * torch.cos(t[1])).detach()
        expected = torch.stack([-ys[1] * torch.cos(t[0]), slope, torch.zeros_like(slope)]).detach()
        torch.testing.assert_close(g, expected, rtol=1e-2, atol=1e-6)


@BACKWARD
@pytest.mark.parametrize("mode", ["odeint", "odeint_adjoint"])
def test_gradients_agree_with_torchdiffeq(mode, backward, engine):
    torchdiffeq = pytest.importorskip("torchdiffeq")
    theirs = gradients(getattr(torchdiffeq, mode), backward=backward)
    ours = gradients(getattr(flashode, mode), backward=backward, engine=engine)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("needs_t", [False, True])
@pytest.mark.parametrize("norm", [None, "seminorm", "callable"])
def test_adjoint_norms(norm, needs_t, engine):
    seen = []

    def largest(augmented):
        seen.append([tuple(part.shape) for part in augmented])
        return max(part.abs().max() for part in augmented)

    options = {} if norm is None else {"norm": largest if norm == "callable" else norm}
    direct = gradients(flashode.odeint, engine=engine, needs_t=needs_t)
    adjoint = gradients(flashode.odeint_adjoint, engine=engine, needs_t=needs_t, adjoint_options=options)
    for a, b in zip(adjoint, direct):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    if norm == "callable":
        assert seen[0] == [(), (3, 2), (3, 2), (3, 8), (8, 2)]


def test_seminorm_spares_calls(engine):
    """The parameters' gradients are integrals: their error need not limit the steps."""
    calls = {}
    for name, options in (("norm", {}), ("seminorm", {"norm": "seminorm"})):
        net = Net(hidden=64, dtype=F64)
        field = Counted(net)
        ys = flashode.odeint_adjoint(
            field, 0.1 * torch.ones(1, 2, dtype=F64), torch.tensor([0.0, 3.0], dtype=F64),
            rtol=1e-7, atol=1e-9, adjoint_params=tuple(net.parameters()), adjoint_options=options, engine=engine,
        )  # fmt: skip
        forward = field.nfe
        ys[-1].sum().backward()
        calls[name] = field.nfe - forward
    assert calls["seminorm"] < calls["norm"]


@pytest.mark.parametrize("mode", ["odeint", "odeint_adjoint"])
def test_tuple_states(mode, engine):
    """Members of any shape, one of them of none; tolerances per member reach the backward solve."""

    class Field(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor([0.3, -0.7], dtype=F64))

        def forward(self, t, state):
            a, b = state
            return torch.tanh(a * self.w) * t, (a * self.w).sum() - b

    def solve(y0, a, b):
        field = Field()
        t = torch.linspace(0, 1, 4, dtype=F64)
        extra = {"adjoint_params": tuple(field.parameters())} if mode == "odeint_adjoint" else {}
        ys = getattr(flashode, mode)(
            field, (a, b), t, rtol=[1e-10, 1e-9], atol=[1e-12, 1e-11], engine=engine, **extra
        )
        loss = (ys[0] * torch.arange(8.0, dtype=F64).reshape(4, 2)).sum() + (ys[1] ** 2).sum()
        return torch.autograd.grad(loss, [a, b, *field.parameters()])

    a, b = (
        torch.tensor([1.0, -0.5], dtype=F64, requires_grad=True),
        torch.tensor(0.2, dtype=F64, requires_grad=True),
    )
    grads = solve(None, a, b)
    for g, (x, i) in zip(grads, [(a, 0), (b, ())]):
        assert g.shape == x.shape
    flat = Field()

    def joined(t, y):
        da, db = flat(t, (y[:2], y[2]))
        return torch.cat([da, db[None]])

    y = flashode.odeint(
        joined,
        torch.cat([a, b[None]]),
        torch.linspace(0, 1, 4, dtype=F64),
        rtol=1e-10,
        atol=1e-12,
        engine="reference",
    )
    loss = (y[:, :2] * torch.arange(8.0, dtype=F64).reshape(4, 2)).sum() + (y[:, 2] ** 2).sum()
    for x, z in zip(grads, torch.autograd.grad(loss, [a, b, *flat.parameters()])):
        torch.testing.assert_close(x, z, rtol=1e-6, atol=1e-8)


def test_closures_get_gradients_in_direct_mode(engine):
    """The state need not require any for what the field reaches to have one."""
    a = torch.tensor(0.5, dtype=F64, requires_grad=True)
    t = torch.tensor([0.0, 2.0], dtype=F64)
    ys = flashode.odeint(
        lambda t, y: a * y, torch.ones(1, dtype=F64), t, rtol=1e-10, atol=1e-12, engine=engine
    )
    (g,) = torch.autograd.grad(ys[-1].sum(), a)
    torch.testing.assert_close(g, 2 * torch.exp(2 * a.detach()), rtol=1e-8, atol=1e-8)


def test_nothing_is_recorded_where_nothing_requires_grad(engine):
    t = torch.linspace(0, 1, 5)
    assert not flashode.odeint(growth, torch.ones(2), t, engine=engine).requires_grad
    with torch.no_grad():
        assert not flashode.odeint(
            Net(), torch.ones(3, 2, requires_grad=True), t, engine=engine
        ).requires_grad


def test_a_field_without_graph_leaves_the_state_its_own_gradient(engine):
    """torchdiffeq answers 0.994 here: it differentiates the choice of the first step."""
    y0 = torch.ones(2, dtype=F64, requires_grad=True)
    ys = flashode.odeint(
        lambda t, y: -y.detach(), y0, torch.tensor([0.0, 0.6, 1.0], dtype=F64), engine=engine
    )
    assert torch.equal(torch.autograd.grad(ys[-1].sum(), y0)[0], torch.ones(2, dtype=F64))


def test_a_field_constant_in_the_state_through_the_adjoint(engine):
    y0 = torch.ones(2, dtype=F64, requires_grad=True)
    ys = flashode.odeint_adjoint(
        lambda t, y: torch.ones_like(y),
        y0,
        torch.tensor([0.0, 1.0], dtype=F64),
        adjoint_params=(),
        engine=engine,
    )
    assert torch.equal(torch.autograd.grad(ys[-1].sum(), y0)[0], torch.ones(2, dtype=F64))


def test_gradients_in_single_precision_follow_those_in_double(engine):
    results = []
    for dtype in (torch.float32, F64):
        net = Net(dtype=dtype)
        y0 = torch.full((3, 2), 0.5, dtype=dtype, requires_grad=True)
        ys = flashode.odeint(net, y0, torch.linspace(0, 1, 5), rtol=1e-5, atol=1e-6, engine=engine)
        results.append(torch.autograd.grad(ys.sum(), [y0, *net.parameters()]))
    for a, b in zip(*results):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_engines_give_the_same_gradients_to_rounding(native):
    for mode in (flashode.odeint, flashode.odeint_adjoint):
        for a, b in zip(gradients(mode, engine="reference"), gradients(mode, engine=native)):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_adjoint_takes_fewer_and_other_parameters(engine):
    """One tensor, repeated ones, frozen ones, ones the field does not use."""
    w = torch.tensor([0.4, 0.6], dtype=F64, requires_grad=True)
    unused = torch.ones(3, dtype=F64, requires_grad=True)
    frozen = torch.ones(3, dtype=F64)
    y0, t = torch.ones(2, dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)

    def grad(params):
        ys = flashode.odeint_adjoint(lambda t, y: -w * y, y0, t, adjoint_params=params, engine=engine)
        return torch.autograd.grad(ys[-1].sum(), [w, unused], allow_unused=True)

    expected = -torch.exp(-w.detach())
    for params in (w, (w,), (w, w), [w, frozen], iter((w, unused))):
        g, of_unused = grad(params)
        torch.testing.assert_close(g, expected, rtol=1e-6, atol=1e-8)
    assert torch.equal(of_unused, torch.zeros(3, dtype=F64))


def test_adjoint_needs_parameters_or_a_module():
    with pytest.raises(ValueError, match="adjoint_params"):
        flashode.odeint_adjoint(growth, torch.ones(2), torch.tensor([0.0, 1.0]))


def test_adjoint_with_another_method_needs_its_own_options():
    with pytest.raises(ValueError, match="adjoint_options"):
        flashode.odeint_adjoint(
            Net(),
            torch.ones(1, 2),
            torch.tensor([0.0, 1.0]),
            method="dopri5",
            options={"safety": 0.8},
            adjoint_method="rk4",
        )


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"adjoint_rtol": -1e-3}, "adjoint_rtol must be finite and not negative, got -0.001"),
        ({"adjoint_atol": float("nan")}, "adjoint_atol must be finite"),
        ({"adjoint_rtol": "small"}, "adjoint_rtol must be a number"),
        ({"adjoint_method": "dopri6"}, 'Invalid adjoint_method "dopri6"'),
        ({"adjoint_options": {"norm": "seminrom"}}, "seminrom"),
        ({"adjoint_options": {"safety": 7}}, "safety"),
    ],
    ids=lambda a: next(iter(a)) if isinstance(a, dict) else "",
)
def test_bad_arguments_of_the_backward_solve_are_refused_at_the_call(arguments, text):
    field = Counted(Net())
    with pytest.raises((ValueError, TypeError), match=text):
        flashode.odeint_adjoint(
            field, torch.ones(1, 2), torch.tensor([0.0, 1.0]), adjoint_params=(), **arguments
        )
    assert field.nfe == 0


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside a loss"])
def test_double_backward_through_the_adjoint_is_refused_not_wrong(alone, engine):
    """torchdiffeq drops the second-order part of a gradient penalty without a word."""
    net, y0 = Net(dtype=F64), torch.ones(1, 2, dtype=F64, requires_grad=True)
    ys = flashode.odeint_adjoint(net, y0, torch.tensor([0.0, 1.0], dtype=F64), engine=engine)
    loss = ys[-1].square().sum()
    (g,) = torch.autograd.grad(loss, y0, create_graph=True)
    with pytest.raises(RuntimeError, match="odeint_adjoint gives first derivatives only"):
        (g.square().sum() + (0 if alone else loss)).backward()


@pytest.mark.parametrize("adjoint", ["backsolve", "interpolated"])
def test_a_hessian_through_the_adjoint_is_refused_not_zero(adjoint, engine):
    def loss(y0, end):
        t = torch.stack([torch.zeros((), dtype=F64), end])
        return flashode.odeint_adjoint(
            lambda t, y: -(y**3), y0, t, engine=engine, adjoint=adjoint, adjoint_params=()
        )[-1].sum()

    for of in range(2):
        given = [torch.ones((), dtype=F64), torch.ones((), dtype=F64)]
        with pytest.raises(RuntimeError, match="odeint_adjoint gives first derivatives only"):
            torch.autograd.functional.hessian(
                lambda x: loss(*given[:of], x.reshape(() if of else 1), *given[of + 1 :]), given[of]
            )


def test_a_changed_parameter_is_noticed_in_the_backward_pass(engine):
    net, y0 = Net(dtype=F64), torch.ones(1, 2, dtype=F64)
    ys = flashode.odeint_adjoint(net, y0, torch.tensor([0.0, 1.0], dtype=F64), engine=engine)
    with torch.no_grad():
        net.w[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ys.sum().backward()


def test_two_backward_passes(engine):
    net, y0 = Net(dtype=F64), torch.ones(1, 2, dtype=F64, requires_grad=True)
    for mode in (flashode.odeint, flashode.odeint_adjoint):
        ys = mode(net, y0, torch.tensor([0.0, 0.5, 1.0], dtype=F64), engine=engine)
        a, b = (torch.autograd.grad(ys.sum(), y0, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(a, b)


def test_backward_callbacks(engine):
    class Watched(Net):
        steps = 0

        def callback_accept_step_adjoint(self, t0, state, dt):
            assert len(state) == 5
            type(self).steps += 1

    ys = flashode.odeint_adjoint(Watched(), torch.ones(1, 2), torch.tensor([0.0, 1.0]), engine=engine)
    assert Watched.steps == 0
    ys.sum().backward()
    assert Watched.steps > 0


def test_a_failing_backward_solve_says_where(engine):
    class Touchy(torch.nn.Module):
        """Finite slopes, but no finite derivatives."""

        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor(1.0))

        def forward(self, t, y):
            y = y * 1
            if y.requires_grad:
                y.register_hook(lambda g: g * float("nan"))
            return -self.w * y

    ys = flashode.odeint_adjoint(Touchy(), torch.ones(1), torch.tensor([0.0, 2.0]), engine=engine)
    with pytest.raises(
        flashode.SolveError, match="vector-Jacobian product of func has non-finite values"
    ) as caught:
        ys[-1].sum().backward()
    assert caught.value.t == 2.0


@pytest.mark.parametrize("shape", [(2,), ()], ids=str)
def test_a_loss_that_is_not_finite_is_named_as_the_cause(shape, engine):
    y0 = torch.ones(shape, requires_grad=True)
    ys = flashode.odeint_adjoint(
        lambda t, y: -y, y0, torch.tensor([0.0, 0.5, 1.0]), adjoint_params=(), engine=engine
    )
    with pytest.raises(ValueError, match=r"gradient of the loss .* output 1 \(t=0.5\)"):
        (ys[1] * float("nan")).sum().backward()


def test_events_through_the_adjoint(engine):
    """The state at the event has gradients; the time it found has none, and says so."""
    net = Net(dtype=F64)
    y0 = torch.full((1, 2), 0.3, dtype=F64, requires_grad=True)
    event_t, ys = flashode.odeint_adjoint(
        net,
        y0,
        torch.tensor([0.0, 1.0], dtype=F64),
        event_fn=lambda t, y: t - 0.7,
        rtol=1e-9,
        atol=1e-10,
        engine=engine,
    )
    assert not event_t.requires_grad
    torch.testing.assert_close(event_t, torch.tensor(0.7, dtype=F64), rtol=1e-8, atol=1e-9)
    (g,) = torch.autograd.grad(ys[-1].sum(), y0)
    plain = flashode.odeint(net, y0, torch.tensor([0.0, 0.7], dtype=F64), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(g, torch.autograd.grad(plain[-1].sum(), y0)[0], rtol=1e-6, atol=1e-8)


def test_an_overshooting_solve_that_stops_at_the_end_has_its_gradient_in_time(engine):
    t = torch.tensor([0.0, 1.0], dtype=F64, requires_grad=True)
    options = {"overshoot": True, "step_t": [1.0]}
    ys = flashode.odeint(lambda t, y: -y, torch.ones((), dtype=F64), t, options=options, engine=engine)
    (grad,) = torch.autograd.grad(ys[-1], t)
    torch.testing.assert_close(grad, torch.tensor([1.0, -1.0], dtype=F64) / math.e, rtol=1e-6, atol=0)


def test_training_reduces_a_loss(engine):
    torch.manual_seed(0)
    net, y0 = Net(hidden=16), twisted_start()[None]
    t = torch.linspace(0, 1, 10)
    with torch.no_grad():
        target = flashode.odeint(twisted, y0, t)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = (
            (flashode.odeint_adjoint(net, y0, t, rtol=1e-4, atol=1e-5, engine=engine) - target)
            .square()
            .mean()
        )
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


ADJOINTS = ["backsolve", "interpolated", "checkpoint"]


class Encoded(torch.nn.Module):
    """A field whose own encoder makes what it is called with, or starts from."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = torch.nn.Linear(3, 2, dtype=F64)
        self.w = torch.nn.Parameter(torch.randn(2, 2, dtype=F64))

    def forward(self, t, y, z, twice):
        return torch.tanh(y @ self.w + z * twice["z"])


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_listed_tensors_made_from_listed_ones_count_once(adjoint, order, engine):
    """The encoder's weights are parameters of the field, and behind the field's arguments and y0."""
    if order == 2 and adjoint != "checkpoint":
        pytest.skip("first derivatives only")
    results = []
    for odeint, more in ((flashode.odeint, {}), (flashode.odeint_adjoint, {"adjoint": adjoint})):
        field = Encoded()
        z = field.encoder(torch.ones(3, dtype=F64))
        ys = odeint(
            field, z.sin(), torch.linspace(0, 1, 4, dtype=F64), args=(z, {"z": z.exp()}),
            rtol=1e-9, atol=1e-11, engine=engine, **more,
        )  # fmt: skip
        params = list(field.parameters())
        grads = torch.autograd.grad(ys.square().sum(), params, create_graph=order == 2)
        if order == 2:
            grads = torch.autograd.grad(sum(g.square().sum() for g in grads), params)
        results.append(torch.cat([g.reshape(-1) for g in grads]))
    direct, got = results
    tol = 1e-11 if adjoint == "checkpoint" else 1e-6
    torch.testing.assert_close(got, direct, rtol=tol, atol=tol)


def test_checkpoints_of_a_tuple_are_not_written_over(engine):
    """A recording holds the flat state; the field sees views of it."""

    def field(t, y):
        return torch.tanh(y[0]) * torch.cos(t), y[0].sum() * y[1]

    results = []
    for odeint, more in (
        (flashode.odeint, {}),
        (flashode.odeint_adjoint, {"adjoint": "checkpoint", "adjoint_params": ()}),
    ):
        y0 = torch.linspace(-1, 1.5, 4, dtype=F64).requires_grad_(), torch.ones((), dtype=F64)
        ys = odeint(field, y0, torch.linspace(0, 2, 5, dtype=F64), engine=engine, **more)
        results += torch.autograd.grad(ys[0].square().sum() + ys[1].sum(), y0[0])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_an_event_at_the_start_leaves_the_gradient_as_it_is(adjoint):
    y0 = torch.ones(2, dtype=F64, requires_grad=True)
    t = torch.tensor([0.0, 1.0], dtype=F64, requires_grad=True)
    w = torch.ones((), dtype=F64, requires_grad=True)
    _, ys = flashode.odeint_adjoint(
        lambda t, y: -w * y, y0, t, event_fn=lambda t, y: y[0] - 1, adjoint=adjoint, adjoint_params=(w,)
    )
    (3 * ys[0] + ys[1]).sum().backward()
    assert y0.grad.tolist() == [4.0, 4.0]
    assert w.grad.item() == 0
    assert t.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_the_backward_pass_takes_up_the_autocast_of_the_forward_pass(adjoint, engine):
    seen = set()

    def field(t, y):
        seen.add(torch.is_autocast_enabled("cpu"))
        return -y

    for enabled in (False, True):
        seen.clear()
        y0 = torch.ones(2, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            ys = flashode.odeint_adjoint(
                field, y0, torch.tensor([0.0, 1.0]), adjoint_params=(), adjoint=adjoint, engine=engine
            )
        with torch.autocast("cpu", torch.bfloat16, enabled=not enabled):
            ys.sum().backward()
        assert seen == {enabled}
