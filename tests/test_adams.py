"""Adams methods: weights of any grid, torchdiffeq's steps on uniform ones, and the order on all others."""

import math
import warnings
from fractions import Fraction

import pytest
import torch
from problems import Counted, Net, growth, growth_solution, twisted, twisted_start

import flashode
from flashode.errors import ArgumentError, SolveError, Status
from flashode.methods import METHODS
from flashode.methods.adams import MAX_ORDER, weights

NAMES = pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams"])
F64 = {"dtype": torch.float64}


# ---- weights ---------------------------------------------------------------------------------


def exact_weights(nodes):
    """Integrals from 0 to 1 of the Lagrange polynomials, in fractions."""
    found = []
    for j, node in enumerate(nodes):
        others = [x for i, x in enumerate(nodes) if i != j]
        coefficients = [Fraction(1)]  # of the product of (x - other) / (node - other), lowest power first
        for x in others:
            shifted = [Fraction(0), *coefficients]
            scaled = [*(-x * c for c in coefficients), Fraction(0)]
            coefficients = [(a + b) / (node - x) for a, b in zip(shifted, scaled)]
        found.append(sum(c / (power + 1) for power, c in enumerate(coefficients)))
    return found


def uniform(slopes, implicit):
    return [Fraction(int(implicit) - j) for j in range(slopes)]


# Hairer, Nørsett, Wanner I, III.1: (1.5) and (1.8), newest slope first.
EXPLICIT = {1: "1", 2: "3/2 -1/2", 3: "23/12 -16/12 5/12", 4: "55/24 -59/24 37/24 -9/24"}
IMPLICIT = {1: "1", 2: "1/2 1/2", 3: "5/12 8/12 -1/12", 4: "9/24 19/24 -5/24 1/24"}


@pytest.mark.parametrize("implicit", [False, True])
def test_weights_of_low_order_are_the_published_ones(implicit):
    for slopes, text in (IMPLICIT if implicit else EXPLICIT).items():
        published = [Fraction(w) for w in text.split()]
        assert exact_weights(uniform(slopes, implicit)) == published
        found = weights(torch.tensor([float(x) for x in uniform(slopes, implicit)], **F64))
        torch.testing.assert_close(
            found, torch.tensor([float(w) for w in published], **F64), rtol=0, atol=1e-15
        )


@pytest.mark.parametrize("slopes", range(1, MAX_ORDER + 1))
@pytest.mark.parametrize("implicit", [False, True])
def test_every_weight_of_every_order_is_right_to_rounding(slopes, implicit):
    """Not only their sum: relative to each weight, on uniform grids and others."""
    for gap in (1, Fraction(3, 7)):
        nodes = [
            x if x >= 0 else x * gap ** (j % 3) - Fraction(j * j, 9)
            for j, x in enumerate(uniform(slopes, implicit))
        ]
        exact = torch.tensor([float(w) for w in exact_weights([Fraction(float(x)) for x in nodes])], **F64)
        found = weights(torch.tensor([float(x) for x in nodes], **F64))
        torch.testing.assert_close(found, exact, rtol=1e-14, atol=0)


def test_weights_are_those_of_torchdiffeq():
    adams = pytest.importorskip("torchdiffeq._impl.fixed_adams", reason="the comparison needs torchdiffeq")
    for slopes in range(1, MAX_ORDER):
        nodes = -torch.arange(slopes, **F64)
        torch.testing.assert_close(weights(nodes), adams._BASHFORTH_DIVISOR[slopes], rtol=1e-14, atol=0)
    for slopes in range(2, MAX_ORDER + 1):
        nodes = 1 - torch.arange(slopes, **F64)
        torch.testing.assert_close(weights(nodes), adams._MOULTON_DIVISOR[slopes], rtol=1e-14, atol=0)


@pytest.mark.parametrize("slopes", [1, 4, 12])
def test_weights_integrate_polynomials_exactly(slopes):
    nodes = -torch.rand(slopes, **F64).cumsum(0)
    for degree in range(slopes):
        w, powers = weights(nodes), nodes**degree
        assert abs(w @ powers - 1 / (degree + 1)) < 1e-14 * (w.abs() @ powers.abs())


def test_weights_are_differentiable_in_the_nodes():
    nodes = (-torch.rand(5, **F64).cumsum(0)).requires_grad_()
    assert torch.autograd.gradcheck(weights, nodes) and torch.autograd.gradgradcheck(weights, nodes)


# ---- orders ----------------------------------------------------------------------------------


def errors_on(grid, method, max_order, counts, **options):
    errors = []
    for n in counts:
        t = grid(n)
        y = flashode.odeint(
            growth, torch.ones(1, **F64), t, method=method, rtol=1e-13, atol=1e-13,
            options={"max_order": max_order, **options},
        )  # fmt: skip
        errors.append((y - growth_solution(t)[:, None]).abs().max().item())
    return errors


GRIDS = {
    "uniform": lambda n: torch.linspace(0, 2, n + 1, **F64),
    "growing": lambda n: 2 * torch.linspace(0, 1, n + 1, **F64) ** 1.5,
    "alternating": lambda n: (
        torch.cat([torch.zeros(1), torch.tensor([1.0, 0.4]).repeat(n // 2)]).double().cumsum(0)
        * (2 / 0.7 / n)
    ),
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    "method, max_order, order",
    [("explicit_adams", 4, 3), ("explicit_adams", 5, 4), ("explicit_adams", 12, 4), ("implicit_adams", 4, 4),
     ("implicit_adams", 5, 5), ("implicit_adams", 12, 5), ("explicit_adams", 3, 4)],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:max_order is below 4")
def test_the_order_is_kept_on_every_grid(grid, method, max_order, order):
    """torchdiffeq uses the weights of uniform grids on all: there its methods are of first order. The first
    steps limit the order: three slopes are a formula of order 3, or 4 with the one to come, used once."""
    coarse, fine = errors_on(GRIDS[grid], method, max_order, [320, 640])
    assert fine < 3e-13 or math.log2(coarse / fine) > order - 0.25, (coarse, fine)


@NAMES
def test_a_short_last_step_costs_no_accuracy(method):
    """A step_size that does not divide the interval."""
    t = torch.tensor([0.0, 2.0], **F64)
    y = flashode.odeint(growth, torch.ones(1, **F64), t, method=method, options={"step_size": 0.003})
    assert (y[-1] - growth_solution(t[-1])).abs() < 1e-9


@NAMES
def test_steps_of_very_different_lengths_are_taken_with_fewer_slopes(method):
    """The polynomial through slopes a thousandth of the step apart would amplify their errors."""
    lengths = torch.tensor([1.0, 1e-3, 1e-3, 1e-3, 1e-3, 1.0, 1.0, 1e-6, 1.0, 1.0, 1.0] * 12, **F64)
    t = torch.cat([torch.zeros(1, **F64), lengths.cumsum(0)])
    t = t * (2 / t[-1])
    y = flashode.odeint(growth, torch.ones(1, **F64), t, method=method)
    assert (y - growth_solution(t)[:, None]).abs().max() < 2e-5


# ---- torchdiffeq -----------------------------------------------------------------------------


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams", "fixed_adams"])
@pytest.mark.parametrize(
    "options",
    [{}, {"max_order": 4}, {"max_order": 7}, {"max_iters": 12}, {"perturb": True}, {"step_size": 0.0125},
     {"step_size": 0.0125, "interp": "cubic"},
     {"grid_constructor": lambda f, y0, t: torch.linspace(t[0].item(), t[-1].item(), 97, dtype=t.dtype)}],
    ids=lambda o: " ".join(o) or "default",
)  # fmt: skip
def test_uniform_grids_agree_with_torchdiffeq(method, options, backward):
    torchdiffeq = pytest.importorskip("torchdiffeq", reason="the comparison needs torchdiffeq")
    # The explicit method of order 11 is hardly stable: over longer times rounding grows in both.
    field, t = Net(**F64), torch.linspace(0, 0.3, 33, **F64)
    t = t.flip(0) if backward else t
    y0 = torch.rand(33, 2, **F64)
    theirs, ours = Counted(field), Counted(field)
    with torch.no_grad():
        a = torchdiffeq.odeint(theirs, y0, t, method=method, options=dict(options))
        b = flashode.odeint(ours, y0, t, method=method, options=dict(options))
    torch.testing.assert_close(b, a, rtol=1e-11, atol=1e-11)
    if "interp" in options:
        assert ours.nfe <= theirs.nfe  # theirs interpolates at the ends of steps too
        return
    torch.testing.assert_close(
        torch.tensor(ours.times, **F64), torch.tensor(theirs.times, **F64), rtol=1e-13, atol=1e-13
    )


@NAMES
def test_tuples_and_tolerances_of_their_members_agree(method):
    torchdiffeq = pytest.importorskip("torchdiffeq", reason="the comparison needs torchdiffeq")
    y0, t = (
        (torch.rand(3, **F64), torch.rand(2, 0, **F64), torch.rand((), **F64)),
        torch.linspace(0, 1, 21, **F64),
    )
    counted, results = [], []
    for lib in (torchdiffeq, flashode):
        calls = Counted(lambda t, state: tuple(growth(t, y) for y in state))
        results.append(
            lib.odeint(calls, y0, t, method=method, rtol=[1e-5, 1e-3, 1e-9], atol=[1e-5, 1.0, 1e-9])
        )
        counted.append(calls.nfe)
    assert counted[0] == counted[1]
    for a, b in zip(*results):
        torch.testing.assert_close(b, a, rtol=1e-13, atol=1e-13)


@NAMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_other_dtypes(method, dtype):
    """Corrections that are lost in the rounding of the state are as good as none: no warning, no error."""
    y0 = torch.tensor([1.0, 0.5]).to(dtype)
    field = (lambda t, y: (1j - 0.5) * y) if dtype.is_complex else (lambda t, y: -0.5 * y)
    t = torch.linspace(0, 1, 65)
    y = flashode.odeint(field, y0, t, method=method, options={"max_order": 5})
    exact = y0 * torch.exp(((1j if dtype.is_complex else 0) - 0.5) * t[:, None])
    assert y.dtype == dtype
    assert (y - exact).abs().max() < 30 * torch.finfo(dtype).eps


# ---- the implicit formula --------------------------------------------------------------------


def test_corrections_go_on_where_max_iters_do_not_suffice():
    """torchdiffeq warns, and goes on with a value that is not the formula's."""
    y0, t = torch.ones(2, **F64), torch.linspace(0, 3, 31, **F64)
    tight = dict(method="implicit_adams", rtol=1e-13, atol=1e-13)
    few = flashode.odeint(growth, y0, t, options={"max_iters": 1}, **tight)
    many = flashode.odeint(growth, y0, t, options={"max_iters": 100}, **tight)
    torch.testing.assert_close(few, many, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["tensor", "tuple", "complex"])
def test_newtons_method_takes_over_where_corrections_do_not_shrink(kind):
    """y' = -50 y in steps of 0.1: the equations of the fourth-order formula (HNW I, III.1 (1.9)) hold."""
    dtype = torch.complex128 if kind == "complex" else torch.float64
    y0, t = torch.tensor([1.0, 2.0], dtype=dtype), torch.linspace(0, 1, 11, **F64)
    rate = -50 + 10j if kind == "complex" else -50
    field = (lambda t, y: (rate * y[0],)) if kind == "tuple" else (lambda t, y: rate * y)
    start = (y0,) if kind == "tuple" else y0
    y = flashode.odeint(field, start, t, method="implicit_adams", options={"max_order": 4})
    y = y[0] if kind == "tuple" else y
    for n in range(3, 11):
        slopes = rate * (9 * y[n] + 19 * y[n - 1] - 5 * y[n - 2] + y[n - 3]) / 24
        torch.testing.assert_close(y[n], y[n - 1] + 0.1 * slopes, rtol=1e-12, atol=1e-12)


def test_gradients_through_newtons_method():
    t = torch.tensor([0.0, 0.1, 0.25, 0.35, 0.5, 0.55], **F64).requires_grad_()
    y0, A = (torch.randn(s, **F64).requires_grad_() for s in ((1, 2), (2, 2)))

    def solve(y0, A, t):
        return flashode.odeint(
            lambda s, y: -40 * y + torch.tanh(y @ A) * torch.cos(3 * s), y0, t, method="implicit_adams"
        )

    assert torch.autograd.gradcheck(solve, (y0, A, t), atol=1e-5)
    assert torch.autograd.gradgradcheck(solve, (y0, A, t), atol=1e-4)


def test_a_step_whose_equations_have_no_solution_says_so():
    """From t = -0.25 on y' = 10^4 (1 + y^2), which no step of 0.1 can follow."""
    y0, t = torch.ones(2, **F64), torch.linspace(0, -1, 11, **F64)

    def field(t, y):
        return -torch.where(t < -0.25, 1e4, 0.0) * (1 + y**2)

    solution = flashode.solve(field, y0, t, method="implicit_adams", throw=False)
    assert solution.status == Status.NONCONVERGENCE and solution.stats.accepted == 2
    assert torch.isfinite(solution.ys[:3]).all() and torch.isnan(solution.ys[3:]).all()
    with pytest.raises(
        SolveError, match=r"implicit_adams could not be solved in step 3, from t=-0\.2 .*smaller steps"
    ) as e:
        flashode.odeint(field, y0, t, method="implicit_adams")
    assert e.value.reason == Status.NONCONVERGENCE and abs(e.value.dt + 0.1) < 1e-12


@pytest.mark.parametrize("tolerance", [0.0, 1e-300])
def test_tolerances_that_cannot_be_met_do_not_hang(tolerance):
    y0, t = torch.rand(5, **F64), torch.linspace(0, 1, 11, **F64)
    calls = Counted(growth)
    flashode.solve(calls, y0, t, method="implicit_adams", rtol=tolerance, atol=tolerance, throw=False)
    assert calls.nfe < 400


@NAMES
def test_a_field_that_is_not_finite_is_named(method):
    y0, t = torch.ones(3, **F64), torch.linspace(0, 1, 21, **F64)
    with pytest.raises(SolveError, match="func returned non-finite values") as raised:
        flashode.odeint(lambda t, y: torch.sqrt(0.52 - t) * y, y0, t, method=method)
    assert raised.value.reason == Status.NONFINITE_FIELD and 0.49 < raised.value.t < 0.56


# ---- gradients -------------------------------------------------------------------------------


@NAMES
@pytest.mark.parametrize(
    "options", [{}, {"step_size": 0.11, "interp": "cubic"}, {"step_size": 0.11, "max_order": 5}]
)
def test_direct_gradients_are_those_of_the_steps(method, options):
    """To the state, to a parameter, and to the times, which the weights of an uneven grid depend on."""
    t = torch.tensor([0.0, 0.1, 0.25, 0.35, 0.4, 0.6, 0.7], **F64).requires_grad_()
    y0, A = (torch.randn(s, **F64).requires_grad_() for s in ((1, 2), (2, 2)))

    def solve(y0, A, t):
        return flashode.odeint(
            lambda s, y: torch.tanh(y @ A) * torch.cos(3 * s), y0, t, method=method, options=options
        )

    assert torch.autograd.gradcheck(solve, (y0, A, t), atol=1e-7)
    assert "interp" in options or torch.autograd.gradgradcheck(solve, (y0, A, t), atol=1e-6)


@NAMES
@pytest.mark.parametrize("adjoint_method", [None, "dopri5", "rk4"])
def test_the_backward_solve_gives_the_gradients(method, adjoint_method):
    t = torch.linspace(0, 1, 65, **F64).requires_grad_()
    grads, options = [], {"max_order": 6}
    for solve, more in (
        (flashode.odeint, {}),
        (flashode.odeint_adjoint, {"adjoint_method": adjoint_method, "adjoint_options": {}}),
    ):
        net, y0 = Net(**F64), twisted_start(**F64).requires_grad_()
        y = solve(net, y0, t, method=method, options=options, **more)
        grads.append(torch.autograd.grad(y.square().sum(), [y0, t, *net.parameters()]))
    # To the times they differ more: those of the first steps, of lower order, move the steps.
    for i, (a, b) in enumerate(zip(*grads)):
        torch.testing.assert_close(b, a, rtol=2e-2 if i == 1 else 1e-3, atol=1e-4)


def test_an_adams_method_can_be_the_backward_one():
    """In solves from output to output, as torchdiffeq makes them."""
    torchdiffeq = pytest.importorskip("torchdiffeq", reason="the comparison needs torchdiffeq")
    t, found = torch.linspace(0, 1, 3, **F64), []
    for lib in (torchdiffeq, flashode):
        net, y0 = Net(**F64), twisted_start(**F64).requires_grad_()
        options = dict(adjoint_method="explicit_adams", adjoint_options={"step_size": 0.05})
        y = lib.odeint_adjoint(net, y0, t, **options)
        found.append(torch.autograd.grad(y.square().sum(), [y0, *net.parameters()]))
    for a, b in zip(*found):
        torch.testing.assert_close(b, a, rtol=1e-7, atol=1e-9)


@NAMES
def test_checkpoints_are_refused(method):
    """A step depends on the slopes of steps before it, which a replay of one step does not have."""
    with pytest.raises(ArgumentError, match="adjoint='checkpoint' replays steps one by one.*backsolve"):
        flashode.odeint_adjoint(
            Net(**F64),
            twisted_start(**F64),
            torch.linspace(0, 1, 5, **F64),
            method=method,
            adjoint="checkpoint",
        )


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own
def test_forward_mode_and_vmap():
    y0, t = torch.randn(3, 2, **F64), torch.linspace(0, 1, 9, **F64)

    def solve(y):
        return flashode.odeint(lambda s, y: torch.sin(y) * torch.cos(s), y, t, method="explicit_adams")

    torch.testing.assert_close(torch.func.vmap(solve)(y0), solve(y0).transpose(0, 1))
    jacobians = [f(solve)(y0) for f in (torch.func.jacrev, torch.func.jacfwd)]
    torch.testing.assert_close(*jacobians)


# ---- arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize("interp, tol", [("linear", 5e-4), ("cubic", 1e-6)])
@NAMES
def test_events(method, interp, tol):
    """y = cos t falls through zero at pi / 2."""
    event_t, ys = flashode.odeint(
        lambda t, y: torch.stack([-y[1], y[0]]), torch.tensor([1.0, 0.0], **F64), torch.tensor([0.0, 1.0], **F64),
        method=method, options={"step_size": 0.03, "interp": interp, "max_order": 6}, event_fn=lambda t, y: y[0],
    )  # fmt: skip
    assert abs(event_t - math.pi / 2) < tol and abs(ys[-1, 1] - 1) < tol


@NAMES
@pytest.mark.parametrize(
    "options, error",
    [({"max_order": 13}, "max_order.*at most 12, got 13"), ({"max_order": 0}, "max_order.*at least 1"),
     ({"max_order": 4.5}, "max_order.*whole number"), ({"max_iters": 0}, "max_iters.*at least 1"),
     ({"max_iters": "4"}, "max_iters.*must be a number")],
)  # fmt: skip
def test_bad_options_are_named(method, options, error):
    with pytest.raises(AssertionError, match=error):
        flashode.odeint(growth, torch.ones(1), torch.linspace(0, 1, 3), method=method, options=options)


@NAMES
def test_a_low_order_is_rk4_with_a_warning(method):
    y0, t = twisted_start(**F64), torch.linspace(0, 1, 9, **F64)
    for order in (1, 2, 3):
        with pytest.warns(UserWarning, match="max_order is below 4, so the solver reduces to `rk4`"):
            y = flashode.odeint(twisted, y0, t, method=method, options={"max_order": order})
        torch.testing.assert_close(y, flashode.odeint(twisted, y0, t, method="rk4"), rtol=1e-14, atol=1e-14)


def test_other_methods_do_not_take_the_options():
    with pytest.warns(UserWarning, match="rk4: Unexpected arguments {'max_order': 5}"):
        flashode.odeint(
            growth, torch.ones(1), torch.linspace(0, 1, 3), method="rk4", options={"max_order": 5}
        )
    assert {"max_order", "max_iters"} <= set(METHODS["fixed_adams"].options)


@NAMES
def test_the_solution_between_its_outputs(method):
    t, inner = torch.linspace(0, 1.5, 65, **F64), torch.linspace(0, 1.5, 101, **F64)
    options = {"interp": "cubic", "max_order": 6}
    solution = flashode.solve(growth, torch.ones(1, **F64), t, method=method, options=options, dense=True)
    exact = growth_solution(inner)[:, None]
    torch.testing.assert_close(solution.sol(inner), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        solution.sol.derivative(inner), growth(inner[:, None], exact), rtol=1e-4, atol=1e-4
    )


@NAMES
@pytest.mark.parametrize("size", [0, 1])
def test_small_states_and_single_times(method, size):
    y0 = torch.ones(size, **F64)
    assert flashode.odeint(growth, y0, torch.linspace(0, 1, 9, **F64), method=method).shape == (9, size)
    assert torch.equal(flashode.odeint(growth, y0, torch.zeros(1), method=method), y0[None])


@NAMES
def test_the_native_engine_says_why_it_declines(method):
    if flashode.build_config()["extension"]:
        text = flashode.explain(growth, torch.ones(1), torch.linspace(0, 1, 3), method=method)
        assert f"native: declines: {method} has no compiled steps" in text


@NAMES
def test_the_field_may_write_into_its_argument_and_return_one_buffer(method):
    y0, t = torch.rand(3, **F64), torch.linspace(0, 1, 21, **F64)
    buffer = torch.empty_like(y0)

    def careless(t, y):
        buffer.copy_(growth(t, y))
        y.zero_()
        return buffer

    with torch.no_grad(), warnings.catch_warnings():
        expected = flashode.odeint(growth, y0, t, method=method)
        torch.testing.assert_close(flashode.odeint(careless, y0, t, method=method), expected, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams"])
def test_single_precision_is_not_lost_in_high_orders(method):
    """torchdiffeq's order 12 is off by 6% here; every weight of it multiplies the rounding of a slope."""

    def field(t, y):
        return 2 * y / t + t**4 * torch.sin(2 * t) - t**2 + 4 * t**3

    ys = {}
    for dtype in (torch.float32, torch.float64):
        y0, t = torch.full((1,), 4.0, dtype=dtype), torch.tensor([1.0, 2.6], dtype=dtype)
        ys[dtype] = flashode.odeint(field, y0, t, method=method, options={"step_size": 0.01, "max_order": 6})[
            -1
        ]
        if dtype == torch.float32:
            default = flashode.odeint(field, y0, t, method=method, options={"step_size": 0.01})[-1]
    torch.testing.assert_close(default, ys[torch.float32], rtol=1e-6, atol=0)
    torch.testing.assert_close(default.double(), ys[torch.float64], rtol=1e-5, atol=0)
