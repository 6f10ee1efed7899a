"""Implicit Runge-Kutta methods: tables, orders, stiff problems, the equations of the stages, gradients."""

import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from problems import Counted, Net, twisted, twisted_solution, twisted_start
from test_methods import numbers, residuals

import flashode
from flashode import ArgumentError, SolveError, Status
from flashode.engines import krylov, stages
from flashode.methods import METHODS
from flashode.nn import ConvField

# Tolerances far too large let a test prescribe the steps of an adaptive method.
pytestmark = pytest.mark.filterwarnings("ignore:rtol is 1000")
F64 = torch.float64
IMPLICIT = {name: method for name, method in METHODS.items() if method.family == "implicit"}
by_name = pytest.mark.parametrize("method", list(IMPLICIT.values()), ids=lambda m: m.name)
adaptive = pytest.mark.parametrize("name", ["kvaerno3", "kvaerno5"])
some = pytest.mark.parametrize("name", ["implicit_euler", "trbdf2", "gl4", "kvaerno3"])
END = torch.tensor([0.0, 0.02], dtype=F64)
UNIT, ONES = torch.tensor([0.0, 1.0], dtype=F64), torch.ones(2, dtype=F64)


def held(name, h):
    """Options that make any method take steps of length h."""
    return {"first_step": h, "max_step": h} if IMPLICIT[name].adaptive else {"step_size": h}


# ---- tables --------------------------------------------------------------------------------


def test_every_method_is_there_under_its_name():
    expected = "implicit_euler implicit_midpoint trapezoid sdirk2 trbdf2 gl4 gl6 radauIIA3 radauIIA5 kvaerno3 kvaerno5"
    assert list(IMPLICIT) == expected.split()


@by_name
def test_weights_satisfy_all_order_conditions(method):
    *a, b = numbers([*method.tableau.a, method.tableau.b], method.order)
    assert max(map(abs, residuals(b, a, method.order))) < 2e-15
    assert max(map(abs, residuals(b, a, method.order + 1))) > 1e-9, "the order is claimed too low"


@adaptive
def test_embedded_weights_have_the_order_below(name):
    method = IMPLICIT[name]
    b_hat = [b - e for b, e in zip(method.tableau.b, method.tableau.b_err)]
    assert max(map(abs, residuals(b_hat, method.tableau.a, method.order - 1))) < 2e-15
    assert max(map(abs, residuals(b_hat, method.tableau.a, method.order))) > 1e-4


@pytest.mark.parametrize("x", [0.1, 0.5, 0.77, 1])
@by_name
def test_continuous_extensions_satisfy_the_order_conditions(method, x):
    for dense, order in ((method.cubic, min(3, method.order)), (method.dense, method.dense.order)):
        weights = [sum(w * Fraction(x) ** (d + 1) for d, w in enumerate(w_j)) for w_j in dense.weights]
        a = [*method.tableau.a, *dense.extra_a]
        assert max(map(abs, residuals(weights, a, order, x))) < 1e-14
    assert method.dense.order == {"kvaerno3": 3, "kvaerno5": 4}.get(method.name, 1)


def stability(tableau, z):
    """R(z) of y' = z y."""
    a = np.array([[*map(float, a_i), *[0.0] * (tableau.stages - len(a_i))] for a_i in tableau.a])
    b, ones = np.array([float(b_j) for b_j in tableau.b]), np.ones(tableau.stages)
    return 1 + z * b @ np.linalg.solve(np.eye(tableau.stages) - z * a, ones)


@by_name
def test_stability(method):
    """A-stable all, as far as a sample of the imaginary axis shows; those that should be, L-stable."""
    for y in (1e-2, 0.3, 1, 3, 10, 1e3):
        assert abs(stability(method.tableau, 1j * y)) < 1 + 1e-12
    at_infinity = abs(stability(method.tableau, -1e9))
    symmetric = method.name in ("implicit_midpoint", "trapezoid", "gl4", "gl6")
    assert abs(at_infinity - symmetric) < 1e-6


# ---- orders --------------------------------------------------------------------------------


def errors(method, between, counts):
    """With steps that stand whatever their error: tolerances small, so that stages are solved for."""
    result = []
    for n in counts:
        h = 1.5 / n
        options = {"first_step": h, "max_step": h, "min_step": h * 0.999}
        if not method.adaptive:
            options = {"step_size": h, "interp": "cubic"}
        inner = torch.tensor([0.2, 0.45, 0.8], dtype=F64)
        t = ((torch.arange(n, dtype=F64)[:, None] + inner) * h).reshape(-1)
        t = torch.cat([torch.zeros(1, dtype=F64), t, torch.tensor([1.5], dtype=F64)])
        t = t if between else t[[0, -1]]
        with torch.no_grad():
            ys = flashode.odeint(
                twisted,
                twisted_start(dtype=F64),
                t,
                rtol=1e-12,
                atol=1e-12,
                method=method.name,
                options=options,
            )
        rows = slice(1, -1) if between else slice(-1, None)
        result.append((ys - twisted_solution(t))[rows].abs().max().item())
    return result


@by_name
def test_measured_order(method):
    counts = [30, 60] if method.order <= 3 else [16, 32]
    e = errors(method, False, counts)
    assert abs(math.log2(e[0] / e[1]) - method.order) < 0.2, e
    e = errors(method, True, counts)
    # A cubic is good to fourth order locally; the extension of order 4 is held back by nothing.
    order = 5 if method.name == "kvaerno5" else min(4, method.order)
    assert math.log2(e[0] / e[1]) > order - 0.3, e


@some
def test_both_directions_of_time_and_tuples(name):
    options = {} if IMPLICIT[name].adaptive else {"step_size": 0.01}
    net = Net(dtype=F64)
    y0, t = torch.linspace(-1, 1, 6, dtype=F64).reshape(3, 2), torch.tensor([0.1, 0.4, 1.0], dtype=F64)

    def pair(t, y):
        return net(t, y[0]), -y[1] * y[0].sum()

    with torch.no_grad():
        for times in (t, t.flip(0)):
            y, z = flashode.odeint(
                pair, (y0, ONES), times, method=name, options=options, rtol=1e-6, atol=1e-6
            )
            want, want_z = flashode.odeint(pair, (y0, ONES), times, rtol=1e-10, atol=1e-10)
            tol = 1e-4 if IMPLICIT[name].adaptive else 2e-2
            torch.testing.assert_close(y, want, rtol=tol, atol=tol)
            torch.testing.assert_close(z, want_z, rtol=tol, atol=tol)


# ---- stiff problems ------------------------------------------------------------------------


def robertson(t, y):
    a, b, c = y.unbind(-1)
    slow, back, fast = 0.04 * a, 1e4 * b * c, 3e7 * b * b
    return torch.stack([back - slow, slow - back - fast, fast], -1)


def van_der_pol(t, y):
    x, v = y.unbind(-1)
    return torch.stack([v, 1000 * (1 - x * x) * v - x], -1)


# Mazzia and Magherini, *Test Set for Initial Value Problem Solvers*, 2008: ROBER, and VDPOL in its own time.
ROBERTSON = [0.2083340149701255e-7, 0.8333360770334713e-13, 0.9999999791665050]
VAN_DER_POL = [1.706167732170483, -0.8928097010247975e-3]
STIFF = pytest.mark.parametrize(
    "field, y0, end, want, atol, steps",
    [
        (robertson, [1.0, 0.0, 0.0], 1e11, ROBERTSON, 1e-10, 371),
        (van_der_pol, [2.0, 0.0], 2000.0, VAN_DER_POL, 1e-6, 616),
    ],
    ids=["robertson", "van der pol"],
)


@STIFF
def test_stiff_problems_to_their_ends(field, y0, end, want, atol, steps):
    """``steps`` are those of scipy 1.17's Radau at the same tolerances."""
    y0, t, want = (torch.tensor(x, dtype=F64) for x in (y0, [0, end], want))
    with torch.no_grad():
        solution = flashode.solve(field, y0, t, rtol=1e-6, atol=atol, method="kvaerno5")
    assert ((solution.ys[-1] - want).abs() / (atol + 1e-6 * want.abs())).max() < 10
    assert solution.stats.accepted + solution.stats.rejected < steps
    with pytest.raises(SolveError) as caught:
        flashode.odeint(field, y0, t, rtol=1e-6, atol=atol, options={"max_num_steps": 1000})
    assert caught.value.reason == Status.MAX_STEPS


def test_a_predicted_step_saves_refused_ones():
    y0, t = torch.tensor([2.0, 0.0], dtype=F64), torch.tensor([0.0, 850.0], dtype=F64)
    with torch.no_grad():
        rejected = [
            flashode.solve(
                van_der_pol, y0, t, rtol=1e-5, atol=1e-6, method="kvaerno5", options=options
            ).stats.rejected
            for options in ({}, {"controller": "i"})
        ]
    assert rejected[0] < rejected[1] / 2


@pytest.mark.parametrize("name", ["radauIIA5", "sdirk2", "trbdf2", "implicit_euler"])
def test_one_long_step_of_an_l_stable_method_damps(name):
    y = flashode.odeint(lambda t, y: -1e8 * (y - torch.cos(t)), ONES * 3, UNIT, method=name)[-1]
    assert (y - math.cos(1)).abs().max() < 1e-6


# ---- the equations of the stages -----------------------------------------------------------


def test_a_linear_stage_takes_two_calls():
    field = Counted(lambda t, y: -y)
    flashode.odeint(field, ONES, UNIT, method="implicit_euler")
    assert field.times == [1.0, 1.0]


def test_calls_are_counted_with_those_of_jacobians_and_graphs():
    weight = torch.tensor(2.0, dtype=F64, requires_grad=True)
    for name, options in (("kvaerno5", {}), ("gl4", {"step_size": 0.3}), ("trbdf2", {"step_size": 0.3})):
        field = Counted(lambda t, y: -weight * y**2)
        solution = flashode.solve(field, ONES, UNIT, method=name, options=options, rtol=1e-6)
        assert solution.stats.nfe == field.nfe


@some
def test_a_field_that_does_not_depend_on_y(name):
    options = {} if IMPLICIT[name].adaptive else {"step_size": 0.01}
    for field in (
        lambda t, y: torch.cos(t) * torch.ones_like(y),
        lambda t, y: torch.cos(t) + 0 * y.detach(),
        lambda t, y: torch.cos(t) + 0 * y,
    ):
        y = flashode.odeint(field, ONES, UNIT, method=name, options=options)[-1]
        assert (y - 1 - math.sin(1)).abs().max() < 1e-2


@some
def test_modes_of_autograd_do_not_matter(name):
    options = {} if IMPLICIT[name].adaptive else {"step_size": 0.1}

    def end(**how):
        return flashode.odeint(
            lambda t, y: -(y**2),
            torch.ones(3, dtype=F64),
            UNIT,
            method=name,
            options=options,
            rtol=1e-6,
            atol=1e-6,
        )[-1]

    want = end()
    with torch.no_grad():
        torch.testing.assert_close(end(), want, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        got = end()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@some
def test_a_field_that_writes_into_its_argument_does_no_harm(name):
    options = {} if IMPLICIT[name].adaptive else {"step_size": 0.1}
    a, b = (
        flashode.odeint(field, ONES, UNIT, method=name, options=options)
        for field in (lambda t, y: y.mul_(-1), lambda t, y: -y)
    )
    assert torch.equal(a, b)


@some
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.complex64], ids=str)
def test_dtypes(name, dtype):
    """Complex fields need not be analytic."""
    options = {} if IMPLICIT[name].adaptive else {"step_size": 0.05}
    t = UNIT if dtype.is_complex else UNIT.to(dtype)
    factor = 1j if dtype.is_complex else -1

    def field(t, y):
        return factor * y + (y.conj() if dtype.is_complex else y**2) * 0.5

    y0 = torch.ones(3, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = flashode.odeint(field, y0, t, method=name, options=options, rtol=1e-3, atol=1e-3)[-1]
        want = flashode.odeint(field, y0.to(torch.promote_types(dtype, F64)), UNIT)[-1]
    assert y.dtype == dtype
    torch.testing.assert_close(y.to(want), want, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("shape", [(0,), (), (1, 1), (33,)], ids=str)
@some
def test_odd_sizes(name, shape):
    options = {} if IMPLICIT[name].adaptive else {"step_size": 0.01}
    y = flashode.odeint(lambda t, y: -y, torch.ones(shape, dtype=F64), UNIT, method=name, options=options)
    torch.testing.assert_close(y[-1], torch.full(shape, math.exp(-1), dtype=F64), rtol=1e-2, atol=0)


def test_an_event_is_found():
    t, y = flashode.odeint(lambda t, y: -y, ONES, UNIT, method="kvaerno5", event_fn=lambda t, y: y[0] - 0.5)
    assert abs(t - math.log(2)) < 1e-6


# ---- large states --------------------------------------------------------------------------


def heat(t, y):
    """y_t = y_xx on a ring, with a source; dx = 1/20 of a unit."""
    return 400 * (torch.roll(y, 1) - 2 * y + torch.roll(y, -1)) - y**3


def one_step(field, y, dt):
    """Where a step of implicit Euler ends, and how far from a solution of its equation."""
    t = torch.tensor([0.0, dt], dtype=y.dtype)
    end = flashode.odeint(field, y, t, method="implicit_euler", options={"step_size": dt})[-1]
    return end, (end - y - dt * field(t[1], end)).abs().max()


def test_newton_comes_back_from_steps_that_overshoot_hundredfold():
    # y1 = f(y1) where atan(10 (y1 - 5)) = 0: from 0 Newton's first step ends at 388, and a half of it no better.
    end, left = one_step(lambda t, y: y - torch.atan(10 * (y - 5)), torch.zeros(3, dtype=torch.float64), 1.0)
    assert (end - 5).abs().max() < 1e-12 and left < 1e-12


def test_newton_crosses_places_without_a_tangent():
    torch.manual_seed(4)  # of twelve seeds the one that no damping solves
    field = ConvField(8, norm="group", activation="relu").double()
    with torch.no_grad():
        _, left = one_step(field, 0.3 * torch.randn(8, 8, 4, 4, dtype=torch.float64), 0.5)
    assert left < 1e-10


def test_a_matrix_from_beyond_a_kink_is_not_believed():
    # The old matrix makes 1/2000 of the residual, and 1/2000 of that: below rounding, and far from y1 = -1.
    end, left = one_step(lambda t, y: -2e3 * torch.relu(y) - 2, torch.ones(1), 1.0)
    assert left < 1e-6 and abs(end + 1) < 1e-6


def test_the_step_of_a_new_matrix_is_not_judged_by_the_contraction_of_an_old_one():
    s, r = 1e4, torch.relu

    def field(t, y):  # steep, then flat at 1.01, with a solution at 1.1125
        left = -(1.001 * s + 0.03) + 2 * s * y - s * r(y - 1e-3) - (s - 1) * r(y - 1) - 0.8 * r(y - 1.01)
        return y - left

    try:
        end, _ = one_step(field, torch.zeros(1), 1.0)
    except SolveError as error:
        assert error.reason == Status.NONCONVERGENCE
    else:
        assert abs(end - 1.1125) < 1e-2  # 1.0298 was taken for it


def test_recording_changes_no_value(monkeypatch):
    for limit in (0, 1000):
        monkeypatch.setattr(stages, "DENSE_LIMIT", limit)
        y = 0.5 + torch.rand(3, 2, dtype=torch.float64)
        free, _ = one_step(twisted, y, 0.25)
        recorded, _ = one_step(twisted, y.requires_grad_(), 0.25)
        assert torch.equal(free, recorded)


def test_a_gradient_solves_linear_equations_once_a_stage(monkeypatch):
    monkeypatch.setattr(stages, "DENSE_LIMIT", 0)
    solved = []

    def counted(product, b, tol, gmres=krylov.gmres):
        solved.append(b)
        return gmres(product, b, tol)

    monkeypatch.setattr(krylov, "gmres", counted)  # of gradients; Newton's method has its own name for it
    y = torch.tensor([[1.0, 2.0], [0.5, 3.0]], dtype=torch.float64, requires_grad=True)
    end, _ = one_step(twisted, y, 0.25)
    assert not solved
    end.sum().backward()
    assert len(solved) == 1


def test_gmres_solves_and_says_what_is_left():
    generator = torch.Generator().manual_seed(3)
    matrix = torch.eye(120, dtype=F64) * 3 + torch.randn(120, 120, generator=generator, dtype=F64) / 8
    b = torch.randn(120, generator=generator, dtype=F64)
    x, left = krylov.gmres(lambda v: matrix @ v, b, 1e-12)
    assert left <= 1e-12 and (matrix @ x - b).norm() <= 1e-11 * b.norm()
    x, left = krylov.gmres(lambda v: torch.zeros_like(v), b, 1e-12)
    assert left == 1 and not x.any()
    assert krylov.gmres(lambda v: v, torch.zeros_like(b), 1e-12)[1] == 0


@pytest.mark.parametrize("name", ["trbdf2", "gl4", "kvaerno5"])
def test_products_and_factors_give_the_same(name, monkeypatch):
    options = {
        **held(name, 0.05),
        "max_iters": 50,
    }  # such tolerances would be met before Newton's method ends
    results = []
    for limit in (1024, 0):
        monkeypatch.setattr(stages, "DENSE_LIMIT", limit)
        y0 = torch.sin(torch.arange(12, dtype=F64)).requires_grad_()
        weight = torch.tensor(0.7, dtype=F64, requires_grad=True)
        y = flashode.odeint(
            lambda t, y: weight * heat(t, y), y0, 0.2 * UNIT, method=name, options=options, rtol=1e3, atol=1e3
        )[-1]
        grads = torch.autograd.grad((y**2).sum(), (y0, weight), create_graph=True)
        second = torch.autograd.grad(grads[1], (y0, weight))
        results.append([y.detach(), *grads, *second])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["implicit_euler", "trbdf2"])
def test_a_state_of_many_numbers_never_makes_a_matrix(name):
    """100,000 numbers: their Jacobian would take 80 GB. No tensor of 60 states' size is made."""
    place = torch.arange(100_000, dtype=F64)
    y0 = torch.sin(place * (2 * math.pi / 1000)) + 0.01 * torch.cos(math.pi * place)
    y0.requires_grad_()
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.untyped_storage().nbytes())
            return out

    with Watch():
        y = flashode.odeint(
            heat, y0, END, method=name, rtol=1e-3, atol=1e-3,
            options={"first_step": 0.02} if IMPLICIT[name].adaptive else None,
        )[-1]  # fmt: skip
        (grad,) = torch.autograd.grad(y.sum(), y0)
    assert largest < 60 * y0.nbytes
    want = flashode.odeint(heat, y0.detach(), END, rtol=1e-4, atol=1e-4)[-1]
    assert (y - want).abs().max() < 2e-3
    assert torch.isfinite(grad).all() and 0.5 < grad.mean() < 1


# ---- gradients -----------------------------------------------------------------------------


def solved(name, h):
    def function(y0, t, a):
        return flashode.odeint(
            lambda t, y: torch.sin(a @ y) * torch.cos(2 * t) + t * y, y0, t,
            rtol=1e3, atol=1e3, method=name, options=held(name, h),
        )  # fmt: skip

    a = torch.tensor([[0.3, -1.0], [0.8, 0.1]], dtype=F64, requires_grad=True)
    y0 = torch.tensor([0.7, -0.4], dtype=F64, requires_grad=True)
    return function, y0, a


@pytest.mark.parametrize(
    "name, backward",
    [*((name, False) for name in IMPLICIT), *((name, True) for name in ("trbdf2", "gl4", "kvaerno3"))],
)
def test_gradients_are_those_of_the_discrete_solve(name, backward):
    function, y0, a = solved(name, 0.29)
    t = torch.tensor([0.1, 0.4, 1.0], dtype=F64)
    t = (t.flip(0) if backward else t).requires_grad_()
    assert torch.autograd.gradcheck(function, (y0, t, a))


@by_name
def test_second_derivatives(method):
    function, y0, a = solved(method.name, 0.3)
    t = torch.tensor([0.1, 0.5, 0.8], dtype=F64, requires_grad=True)
    assert torch.autograd.gradgradcheck(function, (y0, t, a))


def gradients(solve, name, **arguments):
    net = Net(dtype=F64)
    y0 = torch.linspace(-1, 1, 6, dtype=F64).reshape(3, 2).requires_grad_()
    t = torch.tensor([0.1, 0.3, 0.6], dtype=F64, requires_grad=True)
    options = None if IMPLICIT[name].adaptive else {"step_size": 0.05}
    tol = 1e-4 if name == "kvaerno3" else 1e-6
    ys = solve(net, y0, t, method=name, options=options, rtol=tol, atol=tol, **arguments)
    weights = torch.cos(torch.arange(ys.numel(), dtype=F64)).reshape(ys.shape)
    inputs = [y0, *net.parameters(), t]
    # Twice: what the first pass has freed or kept must not matter.
    torch.autograd.grad((ys * weights).sum(), inputs, retain_graph=True)
    return torch.autograd.grad((ys * weights).sum(), inputs)


@pytest.mark.parametrize("name", ["trapezoid", "sdirk2", "gl4", "kvaerno3", "kvaerno5"])
def test_checkpoint_gradients_are_the_direct_ones(name):
    direct = gradients(flashode.odeint, name)
    for limit in (None, 2):
        replayed = gradients(flashode.odeint_adjoint, name, adjoint="checkpoint", checkpoints=limit)
        for a, b in zip(replayed, direct):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_continuous_adjoint_is_solved_by_the_same_method():
    direct = gradients(flashode.odeint, "kvaerno5")
    for arguments in ({}, {"adjoint_method": "dopri5"}):
        for a, b in zip(gradients(flashode.odeint_adjoint, "kvaerno5", **arguments), direct):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_continuous_adjoint_of_many_parameters_makes_products_only(monkeypatch):
    monkeypatch.setattr(stages, "DENSE_LIMIT", 40)  # the state alone is below, with its parameters above
    direct = gradients(flashode.odeint, "kvaerno5")
    for a, b in zip(gradients(flashode.odeint_adjoint, "kvaerno5"), direct):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_interpolated_gradients_take_an_explicit_method_backwards():
    direct = gradients(flashode.odeint, "kvaerno5")
    interpolated = gradients(
        flashode.odeint_adjoint, "kvaerno5", adjoint="interpolated", adjoint_method="dopri5"
    )
    for a, b in zip(interpolated, direct):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with pytest.raises(ArgumentError, match="adjoint_method='dopri5'.*adjoint='checkpoint'"):
        gradients(flashode.odeint_adjoint, "kvaerno5", adjoint="interpolated")


def test_gradients_through_a_stiff_solve():
    """Against a difference quotient, where an explicit method would not get through."""
    rate = torch.tensor(0.04, dtype=F64, requires_grad=True)
    y0, t = torch.tensor([1.0, 0.0, 0.0], dtype=F64), torch.tensor([0.0, 40.0], dtype=F64)

    def end(rate):
        def field(t, y):
            a, b, c = y.unbind(-1)
            slow, back, fast = rate * a, 1e4 * b * c, 3e7 * b * b
            return torch.stack([back - slow, slow - back - fast, fast], -1)

        return flashode.odeint(field, y0, t, rtol=1e-7, atol=1e-11, method="kvaerno5")[-1, 0]

    (grad,) = torch.autograd.grad(end(rate), rate)
    with torch.no_grad():
        quotient = (end(rate + 1e-4) - end(rate - 1e-4)) / 2e-4
    assert abs(grad / quotient - 1) < 1e-3


# ---- states of zero, and of no elements ----------------------------------------------------


@pytest.mark.parametrize("name", IMPLICIT)
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.complex128])
def test_a_state_may_begin_at_zero(name, dtype):
    t, y0 = torch.linspace(0, 1, 33, dtype=F64), torch.zeros(2, dtype=dtype, requires_grad=True)
    y = flashode.odeint(lambda t, y: 1 - y, y0, t, method=name)[-1]
    assert abs(y.detach() - (1 - math.exp(-1))).max() < 0.01
    (grad,) = torch.autograd.grad(y.real.sum(), y0)
    assert abs(grad - math.exp(-1)).max() < 0.01


@pytest.mark.parametrize("length", [1.0, 2.0])
def test_an_iterate_or_a_solution_may_vanish(length):
    """The trapezoidal rule's first iterate vanishes at 1, its solution at 2: (1 - length / 2) / (1 + length / 2)."""
    y = flashode.odeint(lambda t, y: -y, ONES, length * UNIT, method="trapezoid")[-1]
    assert abs(y - (2 - length) / (2 + length)).max() < 1e-15


@pytest.mark.parametrize("name", IMPLICIT)
@pytest.mark.parametrize("dtype", [F64, torch.complex128])
def test_a_state_of_no_elements(name, dtype):
    ys = flashode.odeint(lambda t, y: -y, torch.zeros(3, 0, dtype=dtype), UNIT, method=name)
    assert ys.shape == (2, 3, 0) and ys.dtype == dtype


# ---- what cannot be served -----------------------------------------------------------------


def cut(t, y):
    return torch.from_numpy(-y.detach().numpy())


@some
def test_a_field_without_derivatives_is_refused(name):
    with pytest.raises(
        ArgumentError, match=f"method='{name}' solves for its stages by derivatives .* 'dopri5'"
    ):
        flashode.odeint(cut, ONES, UNIT, method=name)


@some
def test_a_field_that_cannot_be_differentiated_is_refused_in_our_words(name):
    """torch refuses NumPy a tensor that requires grad, and autograd the tensors of inference mode."""
    with pytest.raises(ArgumentError, match=f"method='{name}' solves for .* NumPy"):
        flashode.odeint(lambda t, y: torch.from_numpy(-y.numpy()), ONES, UNIT, method=name)
    with torch.inference_mode():
        weight = 2 * ONES
        with pytest.raises(ArgumentError, match="func uses a tensor that was made in inference mode"):
            flashode.odeint(lambda t, y: y * weight * y, ONES, UNIT, method=name)

    def broken(t, y):
        raise RuntimeError("the field's own")

    with pytest.raises(RuntimeError, match="the field's own"):
        flashode.odeint(broken, ONES, UNIT, method=name)


@some
def test_transforms_are_refused(name):
    with pytest.raises(ArgumentError, match="torch.func transform is active"):
        torch.func.grad(lambda y: flashode.odeint(lambda t, y: -y, y, UNIT, method=name).sum())(ONES)


@some
def test_the_native_engine_declines(name):
    with pytest.raises(ArgumentError, match="implicit methods are solved by the reference engine"):
        flashode.odeint(lambda t, y: -y, ONES, UNIT, method=name, engine="native")
    assert "declines: implicit methods" in flashode.explain(lambda t, y: -y, ONES, UNIT, method=name)


def test_stages_without_a_solution_end_a_fixed_solve():
    """y' = y^3 has no solution of an implicit Euler step this long."""
    with pytest.raises(SolveError) as caught:
        flashode.odeint(
            lambda t, y: 1 + y**2, ONES, 4 * UNIT, method="implicit_euler", options={"step_size": 2.0}
        )
    assert caught.value.reason == Status.NONCONVERGENCE
    message = str(caught.value)
    assert (
        "stage equations of implicit_euler could not be solved in step 1, from t=0.0 with dt=2.0" in message
    )
    assert "max_iters" in message and "of the state" in message
    assert (caught.value.t, caught.value.dt, caught.value.accepted) == (0.0, 2.0, 0)


def test_stages_without_a_solution_shorten_an_adaptive_step():
    rejected = []
    field = Counted(lambda t, y: -(y**3) * 50)
    field.callback_reject_step = lambda t, y, dt: rejected.append(dt.item())
    solution = flashode.solve(
        field, ONES * 5, UNIT, method="kvaerno3", rtol=1e-3, options={"first_step": 1.0, "max_iters": 3}
    )
    assert solution.stats.rejected == len(rejected) > 0
    assert (solution.ys[-1] - 0.1).abs().max() < 1e-3


def test_an_adaptive_solve_whose_stages_never_converge_says_so():
    with pytest.raises(SolveError) as caught:
        flashode.odeint(
            lambda t, y: 1 + y**2, ONES, 4 * UNIT, method="kvaerno3",
            options={"first_step": 2.0, "min_step": 2.0, "max_iters": 4},
        )  # fmt: skip
    assert caught.value.reason == Status.NONCONVERGENCE
    assert "tolerances" in str(caught.value)


@some
def test_a_field_of_nan_is_no_failure_of_newtons_method(name):
    options = None if IMPLICIT[name].adaptive else {"step_size": 0.1}
    with pytest.raises(SolveError) as caught:
        flashode.odeint(lambda t, y: -y * torch.sqrt(0.45 - t), ONES, UNIT, method=name, options=options)
    assert caught.value.reason == Status.NONFINITE_FIELD
    assert "nan at element [0]" in str(caught.value)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"max_iters": 0}, "max_iters.*at least 1"),
        ({"max_iters": 2.5}, "max_iters.*whole number"),
        ({"max_iters": "many"}, "max_iters.*number"),
        ({"controller": "gustafsson"}, "controller.*predictive"),
    ],
    ids=str,
)
def test_bad_options(options, words):
    with pytest.raises(AssertionError, match=words):
        flashode.odeint(lambda t, y: -y, ONES, UNIT, method="kvaerno5", options=options)


def test_explicit_methods_take_no_option_of_newtons():
    with pytest.warns(UserWarning, match="max_iters"):
        flashode.odeint(lambda t, y: -y, ONES, UNIT, method="rk4", options={"max_iters": 3})
    with pytest.raises(ArgumentError, match="controller"):
        flashode.odeint(lambda t, y: -y, ONES, UNIT, options={"controller": "predictive"})
