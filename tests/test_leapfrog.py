"""method="leapfrog": second order, reversible, symplectic, and part of everything that fixed steps are part of."""

import math

import pytest
import torch

import flashode
from flashode import ArgumentError, odeint, odeint_adjoint, solve

F64 = torch.float64


def oscillator(t, state):
    q, p = state
    return p, -q


def pendulum(t, state):
    q, p = state
    return p, -torch.sin(q)


def driven(t, state):
    """Both halves depend on time, and on parameters; separable."""
    q, p = state
    return p * (1 + 0.3 * torch.sin(t)), -torch.sin(q) + 0.5 * torch.cos(2 * t)


class Spring(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stiffness = torch.nn.Parameter(torch.tensor([1.3, 0.7], dtype=F64))
        self.calls = 0

    def forward(self, t, state):
        q, p = state
        self.calls += 1
        return p * (1 + 0.2 * torch.sin(t)), -self.stiffness * torch.sin(q) + 0.1 * torch.cos(t)


@pytest.fixture
def start():
    return torch.tensor([0.4, -1.2], dtype=F64), torch.tensor([0.3, 0.8], dtype=F64)


def times(*values):
    return torch.tensor(values, dtype=F64)


def end(field, y0, t, steps, **call):
    h = abs(t[-1] - t[0]).item() / steps
    return [x[-1] for x in odeint(field, y0, t, method="leapfrog", options={"step_size": h}, **call)]


def test_one_step_is_the_formula(start):
    q0, p0 = start
    q, p = odeint(pendulum, start, times(0, 0.25), method="leapfrog")
    p_mid = p0 - 0.125 * torch.sin(q0)
    q1 = q0 + 0.25 * p_mid
    torch.testing.assert_close(q[-1], q1, rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(p[-1], p_mid - 0.125 * torch.sin(q1), rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("t", [times(0.2, 1.7), times(1.7, 0.2)], ids=["forwards", "backwards"])
def test_the_order_is_two_in_both_directions_of_time(start, t):
    exact = [x[-1] for x in odeint(driven, start, t, method="dopri8", rtol=1e-13, atol=1e-13)]
    errors = []
    for steps in (50, 100, 200):
        found = end(driven, start, t, steps)
        errors.append(max((x - y).abs().max().item() for x, y in zip(found, exact)))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.05)
    assert math.log2(errors[1] / errors[2]) == pytest.approx(2, abs=0.05)


def test_the_order_is_two_even_where_each_slope_depends_on_both_members(start):
    def damped(t, state):
        q, p = state
        return p + 0.2 * q * torch.cos(t), -torch.sin(q) - 0.5 * p * (1 + q**2)

    t = times(0, 2)
    exact = [x[-1] for x in odeint(damped, start, t, method="dopri8", rtol=1e-13, atol=1e-13)]
    errors = []
    for steps in (100, 200):
        errors.append(max((x - y).abs().max().item() for x, y in zip(end(damped, start, t, steps), exact)))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.1)


def test_the_field_may_write_into_what_it_is_shown(start):
    def careless(t, state):
        slopes = tuple(x.clone() for x in pendulum(t, state))
        for x in state:
            x.fill_(torch.nan)
        return slopes

    expected, found = end(pendulum, start, times(0, 1), 5), end(careless, start, times(0, 1), 5)
    assert all(torch.equal(x, y) for x, y in zip(found, expected))


def test_the_same_steps_backwards_return_to_the_start(start):
    t = times(0, 50)
    there = end(driven, start, t, 1000)
    back = end(driven, tuple(there), t.flip(0), 1000)
    assert max((x - y).abs().max() for x, y in zip(back, start)) < 1e-11
    away = odeint(driven, start, t, method="rk4", options={"step_size": 0.05})
    rk4 = odeint(driven, tuple(x[-1] for x in away), t.flip(0), method="rk4", options={"step_size": 0.05})
    assert max((x[-1] - y).abs().max() for x, y in zip(rk4, start)) > 1e-7, "rk4 is not reversible"


def test_the_energy_of_the_oscillator_does_not_drift():
    """Leapfrog keeps p^2 + (1 - h^2/4) q^2 of the oscillator exactly: the energy's error is at most h^2/8 of it."""
    h, y0 = 0.1, (torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64))
    t = torch.arange(0, 2_001, dtype=F64) * 10 * h
    q, p = odeint(oscillator, y0, t, method="leapfrog", options={"step_size": h})
    energy = (q**2 + p**2)[:, 0] / 2
    assert (energy - 0.5).abs().max() < 1.01 * h**2 / 8
    kept = (p**2 + (1 - h**2 / 4) * q**2)[:, 0]
    assert (kept / kept[0] - 1).abs().max() < 1e-11


def test_the_flow_is_symplectic(start):
    def flow(state):
        return torch.cat(end(pendulum, tuple(state.chunk(2)), times(0, 3), 15))

    jacobian = torch.autograd.functional.jacobian(flow, torch.cat(start))
    zero, one = torch.zeros(2, 2, dtype=F64), torch.eye(2, dtype=F64)
    J = torch.cat([torch.cat([zero, one], 1), torch.cat([-one, zero], 1)])
    torch.testing.assert_close(jacobian.T @ J @ jacobian, J, rtol=0, atol=1e-13)


def test_a_step_calls_the_field_twice_and_the_first_once_more(start):
    field = Spring()
    odeint(field, start, times(0, 1), method="leapfrog", options={"step_size": 0.1})
    assert field.calls == 21


# ---- gradients -------------------------------------------------------------------------------


def loss(solver, field, y0, t, **call):
    q, p = solver(field, y0, t, method="leapfrog", options={"step_size": 0.13}, **call)
    return (q * torch.tensor([1.0, -2.0], dtype=F64)).sum() + (p**2).sum()


@pytest.mark.parametrize("solver, call", [(odeint, {}), (odeint_adjoint, {"adjoint": "checkpoint"})])
def test_gradients_are_those_of_finite_differences(start, solver, call):
    field, t = Spring(), times(0, 0.5, 0.71, 1.4)

    def value(q0, p0, stiffness, t):
        with torch.no_grad():
            field.stiffness.copy_(stiffness)
        return loss(solver, field, (q0, p0), t, **call)

    point = [*start, field.stiffness.detach().clone(), t]
    inputs = [x.clone().requires_grad_() for x in point[:2]]
    t_leaf = t.clone().requires_grad_()
    total = loss(solver, field, tuple(inputs), t_leaf, **call)
    found = torch.autograd.grad(total, [*inputs, field.stiffness, t_leaf])
    for number, gradient in enumerate(found):
        for i in range(len(gradient)):
            step = torch.zeros_like(point[number])
            step[i] = 1e-6
            with torch.no_grad():
                ahead, behind = (
                    value(*[x + sign * step if j == number else x for j, x in enumerate(point)])
                    for sign in (1, -1)
                )
            assert gradient[i].item() == pytest.approx(((ahead - behind) / 2e-6).item(), abs=2e-7)


def test_second_derivatives_are_there(start):
    q0, p0 = start

    def final(q0):
        return odeint(pendulum, (q0, p0), times(0, 0.5), method="leapfrog", options={"step_size": 0.1})[0][-1]

    assert torch.autograd.gradgradcheck(final, q0.clone().requires_grad_())


@pytest.mark.parametrize("checkpoints", [None, 3])
def test_checkpointed_gradients_are_the_direct_ones(start, checkpoints):
    field, t = Spring(), times(0, 0.5, 0.71, 1.4)
    direct = torch.autograd.grad(loss(odeint, field, start, t), field.stiffness)
    call = {"adjoint": "checkpoint", "checkpoints": checkpoints}
    replayed = torch.autograd.grad(loss(odeint_adjoint, field, start, t, **call), field.stiffness)
    torch.testing.assert_close(direct, replayed, rtol=1e-12, atol=1e-12)


def test_the_adjoint_can_be_solved_for_by_another_method(start):
    field, t = Spring(), times(0, 1)
    options = {"step_size": 1e-3}
    q, _ = odeint_adjoint(field, start, t, method="leapfrog", options=options,
                          adjoint_method="dopri5", adjoint_options={})  # fmt: skip
    (found,) = torch.autograd.grad(q[-1].sum(), field.stiffness)
    q, _ = odeint(field, start, t, method="leapfrog", options=options)
    (expected,) = torch.autograd.grad(q[-1].sum(), field.stiffness)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# ---- outputs, events, structures -------------------------------------------------------------


@pytest.mark.parametrize("interp, order", [("linear", 2), ("cubic", 2)])
def test_outputs_between_steps_have_the_methods_order(start, interp, order):
    t = torch.linspace(0, 2, 40, dtype=F64)
    exact = odeint(driven, start, t, method="dopri8", rtol=1e-13, atol=1e-13)
    errors = []
    for h in (0.05, 0.025):
        found = odeint(driven, start, t, method="leapfrog", options={"step_size": h, "interp": interp})
        errors.append(max((x - y).abs().max().item() for x, y in zip(found, exact)))
    assert math.log2(errors[0] / errors[1]) > order - 0.35


def test_the_cubic_goes_through_the_ends_of_steps_and_their_slopes(start):
    options = {"interp": "cubic", "step_size": 0.3}
    sol = solve(pendulum, start, times(0, 0.6), method="leapfrog", options=options, dense=True).sol
    for t in (0.0, 0.3, 0.3 + 1e-15, 0.6):  # in the middle, from the left and from the right
        for slope, expected in zip(sol.derivative(t), pendulum(None, sol(t))):
            torch.testing.assert_close(slope, expected, rtol=1e-12, atol=1e-12)


def test_perturb_shows_the_field_both_sides_of_a_steps_ends(start):
    seen = []

    def field(t, state):
        seen.append(t.item())
        return pendulum(t, state)

    options = {"step_size": 0.5, "perturb": True}
    odeint(field, start, times(0, 1), method="leapfrog", options=options)
    before, after = (math.nextafter(0.5, end) for end in (0, 1))
    assert seen == [math.nextafter(0, 1), 0.25, before, after, 0.75, math.nextafter(1, 0)]


def test_a_grid_of_ones_own_is_stepped_on(start):
    grid = times(0, 0.1, 0.4, 1)
    on_grid = odeint(driven, start, grid, method="leapfrog")
    options = {"grid_constructor": lambda func, y0, t: grid}
    constructed = odeint(driven, start, times(0, 1), method="leapfrog", options=options)
    assert all(torch.equal(x[-1], y[-1]) for x, y in zip(on_grid, constructed))


def test_an_event_ends_a_solve():
    y0 = torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64)
    t, (q, p) = odeint(oscillator, y0, times(0, 1), method="leapfrog", options={"step_size": 1e-3, "interp": "cubic"},
                       event_fn=lambda t, state: state[0])  # fmt: skip
    assert t.item() == pytest.approx(math.pi / 2, abs=1e-6)
    assert p[-1].item() == pytest.approx(-1, abs=1e-6)


def test_states_may_be_any_structure_of_two_tensors():
    y0 = {"q": torch.ones(3, dtype=F64), "p": torch.zeros(3, dtype=F64)}
    found = solve(lambda t, y: {"q": y["p"], "p": -y["q"]}, y0, times(0, 1), method="leapfrog",
                  options={"step_size": 0.01})  # fmt: skip
    torch.testing.assert_close(found.ys["q"][-1], torch.cos(times(1)).expand(3), rtol=1e-5, atol=1e-5)


def test_complex_and_single_precision_states_are_served():
    for dtype in (torch.float32, torch.complex128):
        y0 = torch.ones(2, dtype=dtype), torch.zeros(2, dtype=dtype)
        q, _ = odeint(oscillator, y0, times(0, 1), method="leapfrog", options={"step_size": 0.01})
        assert q.dtype == dtype and (q[-1] - math.cos(1)).abs().max() < 1e-5


def test_nothing_is_made_on_the_default_device(start):
    expected = odeint(pendulum, start, times(0, 1), method="leapfrog")
    t = times(0, 1)
    with torch.device("meta"):
        found = odeint(pendulum, start, t, method="leapfrog")
    assert all(torch.equal(x, y) for x, y in zip(found, expected))


# ---- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "y0",
    [
        torch.ones(4),
        (torch.ones(2),),
        (torch.ones(2), torch.ones(3)),
        (torch.ones(2), torch.ones(2), torch.ones(2)),
    ],
    ids=["one tensor", "one member", "two shapes", "three members"],
)
def test_a_state_that_is_no_pair_is_refused(y0):
    with pytest.raises(
        ArgumentError, match=r"needs a state \(q, p\), a tuple of two Tensors of the same shape"
    ):
        odeint(oscillator, y0, torch.tensor([0.0, 1.0]), method="leapfrog")


def test_other_engines_say_why_they_do_not_serve(start):
    with pytest.raises(ArgumentError, match="leapfrog has no compiled steps"):
        odeint(pendulum, start, times(0, 1), method="leapfrog", engine="native")
    with pytest.raises(
        ArgumentError, match="no programs are generated for leapfrog.*call the field as it is"
    ):
        odeint(flashode.compile(pendulum), start, times(0, 1), method="leapfrog")
    assert "leapfrog on the reference engine" in flashode.explain(
        pendulum, start, times(0, 1), method="leapfrog"
    )


def test_backsolve_is_refused_before_the_backward_pass(start):
    with pytest.raises(ArgumentError, match="no pair .* use adjoint='checkpoint'"):
        odeint_adjoint(Spring(), start, times(0, 1), method="leapfrog")
