"""Fields of mechanics: second order as first order, Hamilton's equations by autograd, training through both."""

import copy
import math

import pytest
import torch
from torch import nn

import flashode
from flashode import ArgumentError, odeint, odeint_adjoint
from flashode.nn import Hamiltonian, SecondOrder, Separable

F64 = torch.float64


class Energy(nn.Module):
    """A network that is no sum of kinetic and potential energy."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1)).to(F64)

    def forward(self, q, p):
        return self.net(torch.cat([q, p], -1)) + (q**2 + p**2).sum(-1, keepdim=True) / 2


@pytest.fixture
def pair():
    return torch.randn(5, 2, dtype=F64), torch.randn(5, 2, dtype=F64)


@pytest.fixture
def t():
    return torch.linspace(0, 2, 5, dtype=F64)


def pendulum_energy(q, p):
    return (p**2 / 2 + 1 - torch.cos(q)).sum(-1)


# ---- second order ----------------------------------------------------------------------------


def test_a_damped_oscillator_is_the_closed_form(t):
    c, k = 0.3, 2.0
    field = SecondOrder(lambda t, y, v: -c * v - k * y)
    y, v = odeint(field, (torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64)), t, rtol=1e-11, atol=1e-12)
    w = math.sqrt(k - c**2 / 4)
    exact = torch.exp(-c / 2 * t) * (torch.cos(w * t) + c / (2 * w) * torch.sin(w * t))
    torch.testing.assert_close(y[:, 0], exact, rtol=1e-8, atol=1e-9)
    slope = -torch.exp(-c / 2 * t) * torch.sin(w * t) * (w + c**2 / (4 * w))
    torch.testing.assert_close(v[:, 0], slope, rtol=1e-8, atol=1e-9)


def test_a_forced_equation_is_told_the_time(t):
    field = SecondOrder(lambda t, y, v: torch.cos(t).expand(y.shape))
    y, _ = odeint(field, (torch.zeros(1, dtype=F64), torch.zeros(1, dtype=F64)), t, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(y[:, 0], 1 - torch.cos(t), rtol=1e-8, atol=1e-9)


class Acceleration(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2, dtype=F64)

    def forward(self, t, y, v):
        return self.linear(torch.tanh(y)) - 0.1 * v


@pytest.mark.parametrize("make", [lambda: SecondOrder(Acceleration()), lambda: Hamiltonian(Energy())])
def test_compiled_fields_give_the_values_and_gradients_of_others(make, pair, t):
    field = make()
    compiled = flashode.compile(field)
    found = []
    for f in (field, compiled):
        q, p = odeint(f, pair, t, method="tsit5", rtol=1e-8, atol=1e-9)
        loss = (q**2).sum() + (p * torch.sin(q)).sum()
        parameters = [x for name, x in field.named_parameters() if name != "H.net.2.bias"]  # moves no force
        found.append((q, p, *torch.autograd.grad(loss, parameters)))
    for x, y in zip(*found):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)


# ---- Hamilton's equations --------------------------------------------------------------------


def test_the_slopes_are_the_derivatives_of_the_energy(pair):
    q, p = pair
    dq, dp = Hamiltonian(pendulum_energy)(torch.tensor(0.0), pair)
    torch.testing.assert_close(dq, p, rtol=1e-15, atol=0)
    torch.testing.assert_close(dp, -torch.sin(q), rtol=1e-15, atol=0)


@pytest.mark.parametrize("shape", [lambda e: e, lambda e: e[..., None], lambda e: e.sum()])
def test_energies_may_be_one_a_sample_or_one_in_all(pair, shape):
    expected = Hamiltonian(pendulum_energy)(None, pair)
    found = Hamiltonian(lambda q, p: shape(pendulum_energy(q, p)))(None, pair)
    assert all(torch.equal(x, y) for x, y in zip(found, expected))


def test_slopes_can_be_had_in_inference_mode(pair):
    field, t = Hamiltonian(lambda q, p: (q**2 * p.cos()).sum(-1)), torch.tensor(0.0)
    with torch.inference_mode():
        found = field(t, pair), field(t, tuple(x.clone() for x in pair))
    for slopes in found:
        torch.testing.assert_close(slopes, field(t, pair))


def test_any_energy_is_conserved(pair):
    field = Hamiltonian(Energy())
    q, p = odeint(field, pair, torch.tensor([0.0, 10.0], dtype=F64), rtol=1e-10, atol=1e-11)
    energy = field.energy(q, p)
    torch.testing.assert_close(energy[1], energy[0], rtol=1e-7, atol=1e-7)


def test_separable_is_the_sum_and_registers_both_networks(pair):
    kinetic, potential = (
        nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).to(F64) for _ in range(2)
    )
    field = Separable(kinetic, potential)
    assert len(list(field.parameters())) == 8
    whole = Hamiltonian(lambda q, p: kinetic(p) + potential(q))
    assert all(torch.equal(x, y) for x, y in zip(field(None, pair), whole(None, pair)))
    # dq/dt does not see q, nor dp/dt p: what leapfrog needs.
    q, p = pair
    (dq, dp), (dq_moved, dp_moved) = field(None, (q, p)), field(None, (q + 1, p))
    assert torch.equal(dq, dq_moved) and not torch.equal(dp, dp_moved)
    assert torch.equal(dp, field(None, (q, p + 1))[1])


def test_a_copy_has_energies_of_its_own(pair):
    field = Separable(nn.Linear(2, 1, dtype=F64), nn.Linear(2, 1, dtype=F64))
    twin = copy.deepcopy(field)
    before = [x.clone() for x in twin(None, pair)]
    with torch.no_grad():
        for x in field.parameters():
            x.zero_()
    assert all(torch.equal(x, y) for x, y in zip(twin(None, pair), before))


def test_a_separable_field_keeps_its_energy_by_leapfrog():
    field = Separable(lambda p: p**2 / 2, lambda q: 1 - torch.cos(q))
    y0, t = (torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64)), torch.linspace(0, 200, 21, dtype=F64)
    with torch.no_grad():
        drift = {}
        for method in ("leapfrog", "heun2"):
            q, p = odeint(field, y0, t, method=method, options={"step_size": 0.1})
            energy = field.energy(q, p)
            drift[method] = (energy - energy[0]).abs().max().item()
    assert drift["leapfrog"] < 1e-3 < drift["heun2"]


def loss_of(solver, field, y0, t, **call):
    q, p = solver(field, y0, t, **call)
    return (q**2).sum() + (p * torch.sin(q)).sum()


@pytest.mark.parametrize(
    "solver, call",
    [
        (odeint, {"method": "leapfrog"}),
        (odeint, {"method": "rk4"}),
        (odeint_adjoint, {"method": "leapfrog", "adjoint": "checkpoint"}),
        (odeint_adjoint, {"method": "rk4", "adjoint": "checkpoint"}),
    ],
)
def test_gradients_of_the_energys_parameters_are_finite_differences(solver, call, pair, t):
    kinetic, potential = (
        nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).to(F64) for _ in range(2)
    )
    field = Separable(kinetic, potential)
    for weight in (kinetic[0].weight, potential[2].weight):
        (gradient,) = torch.autograd.grad(loss_of(solver, field, pair, t, **call), weight)
        with torch.no_grad():
            moved = []
            for step in (1e-6, -1e-6):
                weight[0, 1] += step
                moved.append(loss_of(odeint, field, pair, t, method=call["method"]))
                weight[0, 1] -= step
        expected = (moved[0] - moved[1]) / 2e-6
        torch.testing.assert_close(gradient[0, 1], expected, rtol=1e-7, atol=1e-8)


def test_the_continuous_adjoint_goes_through_the_energy(pair, t):
    field = Hamiltonian(Energy())
    weight, call = field.H.net[0].weight, {"rtol": 1e-10, "atol": 1e-11}
    (direct,) = torch.autograd.grad(loss_of(odeint, field, pair, t, **call), weight)
    (adjoint,) = torch.autograd.grad(loss_of(odeint_adjoint, field, pair, t, **call), weight)
    torch.testing.assert_close(adjoint, direct, rtol=1e-6, atol=1e-7)


def test_nothing_is_recorded_where_nothing_gets_a_gradient(pair, t):
    q, p = odeint(Hamiltonian(pendulum_energy), pair, t)
    assert not q.requires_grad and not p.requires_grad
    rate = torch.tensor(1.5, dtype=F64, requires_grad=True)  # of a closure: known to nobody
    q, _ = odeint(Hamiltonian(lambda q, p: rate * pendulum_energy(q, p)), pair, t)
    assert torch.autograd.grad(q.sum(), rate)[0] != 0


def test_an_energy_without_derivative_is_refused(pair):
    with pytest.raises(ArgumentError, match=r"H\(q, p\) must depend on q or p"):
        Hamiltonian(lambda q, p: (q > 0).double())(None, pair)
    with pytest.raises(ArgumentError, match=r"H\(q, p\) must depend on q or p"):
        Hamiltonian(lambda q, p: q.detach() ** 2)(None, pair)


def test_a_field_moves_to_other_precisions_with_its_energy(t):
    field = Hamiltonian(Energy()).float()
    y0 = torch.randn(3, 2), torch.randn(3, 2)
    q, _ = odeint(field, y0, t, method="rk4")
    assert q.dtype == torch.float32
