"""Flows: divergences are those of the Jacobian, densities those of closed forms, and both directions agree."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.distributions import (
    AffineTransform,
    Categorical,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
    Uniform,
)  # fmt: skip

import flashode
from flashode import ArgumentError, ArgumentTypeError, datasets
from flashode.nn import CNF, GatedSum, MLPField, exact_divergence, hutchinson_divergence

TIGHT = {"rtol": 1e-9, "atol": 1e-9}


class Linear(nn.Module):
    """dz/dt = A z + c: carries a normal distribution to a normal distribution."""

    dim = 2

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([[0.5, -1.2], [0.8, -0.3]], dtype=torch.float64))
        self.c = nn.Parameter(torch.tensor([0.3, -0.7], dtype=torch.float64))

    def forward(self, t, z):
        return z @ self.a.t() + self.c

    def law(self, t=1.0) -> MultivariateNormal:
        """The density at time t, in closed form, of a standard normal at time 0."""
        expm = torch.linalg.matrix_exp(t * self.a)
        mean = (expm - torch.eye(2, dtype=torch.float64)) @ torch.linalg.solve(self.a, self.c)
        return MultivariateNormal(mean, expm @ expm.t())


FIELDS = {
    "gated": lambda: GatedSum(3, units=7, hidden=5),
    "squash": lambda: MLPField(3, (8, 8), time="squash"),
    "concat": lambda: MLPField(3, (8,), activation="softplus"),
}


def jacobians(field, t, y):
    return torch.stack(
        [torch.autograd.functional.jacobian(lambda z: field(t, z[None])[0], each) for each in y]
    )


def compiled(field):
    return flashode.compile(copy.deepcopy(field))


# ---- divergence ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIELDS)
def test_the_exact_divergence_is_the_trace_of_the_jacobian(name):
    field, t = FIELDS[name]().double(), torch.tensor(0.4, dtype=torch.float64)
    y = torch.randn(5, 3, dtype=torch.float64)
    slope, divergence, frobenius = exact_divergence(field, t, y, frobenius=True)
    jacobian = jacobians(field, t, y)
    torch.testing.assert_close(slope, field(t, y), rtol=0, atol=1e-12)
    torch.testing.assert_close(divergence, jacobian.diagonal(dim1=1, dim2=2).sum(1), rtol=0, atol=1e-10)
    torch.testing.assert_close(frobenius, jacobian.square().sum((1, 2)), rtol=0, atol=1e-10)
    if hasattr(field, "slope_and_divergence"):
        for one, other in zip(field.slope_and_divergence(t, y), (slope, divergence)):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_the_gated_sum_is_the_sum_that_it_says():
    field, t, z = FIELDS["gated"]().double(), torch.tensor(0.7).double(), torch.randn(4, 3).double()
    features = field.hyper(t.reshape(1))
    w, u = field.w(features).view(7, 3), field.u(features).view(7, 3)
    b, sigma = field.b(features), 1 / (1 + torch.exp(-field.gate(features)))
    expected = sum(sigma[i] * w[i] * torch.tanh(z @ u[i] + b[i])[:, None] for i in range(7))
    torch.testing.assert_close(field(t, z), expected, rtol=0, atol=1e-12)
    assert (field(torch.tensor(0.1).double(), z) - expected).abs().max() > 1e-3  # it depends on the time


@pytest.mark.parametrize("draw", [torch.randn, lambda *n: torch.randint(2, n) * 2.0 - 1])
def test_hutchinson_has_no_bias(draw):
    field, t = FIELDS["squash"](), torch.tensor(0.4)
    nn.init.normal_(field.layers[0].linear.weight)
    y = torch.randn(1, 3).expand(40_000, 3)
    _, exact, frobenius = exact_divergence(field, t, y[:1], frobenius=True)
    _, estimates, squares = hutchinson_divergence(field, t, y, draw(*y.shape), frobenius=True)
    for estimate, right in ((estimates, exact), (squares, frobenius)):
        assert estimate.std() > 1e-3
        assert (estimate.mean() - right).abs() < 3 * estimate.std() / math.sqrt(len(y))


def test_divergences_are_of_samples_of_any_shape():
    y = torch.randn(2, 3, 4, dtype=torch.float64)
    noise = torch.ones_like(y)
    t = torch.tensor(0.0)
    for found in (
        exact_divergence(lambda t, y: y**3, t, y),
        hutchinson_divergence(lambda t, y: y**3, t, y, noise),
    ):
        torch.testing.assert_close(found[1], 3 * y.square().sum((1, 2)))


def test_divergences_keep_graphs_only_where_gradients_are_recorded():
    field, t, y = FIELDS["squash"](), torch.tensor(0.4), torch.randn(2, 3)
    exact_divergence(field, t, y)[1].sum().backward()
    assert field.layers[0].linear.weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert not any(x.requires_grad for x in exact_divergence(field, t, y, frobenius=True))


@pytest.mark.parametrize("make", [lambda field: field, flashode.compile], ids=["called", "compiled"])
@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_inference_mode_changes_no_density(make, trace):
    flow, x = CNF(make(MLPField(2, hidden=(8,))), trace=trace), torch.randn(5, 2)
    found = []
    for mode in (torch.inference_mode, torch.no_grad):
        torch.manual_seed(0)
        with mode():
            found.append(flow.log_prob(1 * x))
    torch.testing.assert_close(*found)


def test_a_field_without_space_has_no_divergence():
    slope, divergence = exact_divergence(
        lambda t, y: torch.ones_like(y) * t, torch.tensor(2.0), torch.randn(4, 2)
    )
    assert torch.equal(slope, torch.full((4, 2), 2.0)) and torch.equal(divergence, torch.zeros(4))


# ---- densities -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "adjoint"),
    [(lambda f: f, None), (lambda f: f, "checkpoint"), (lambda f: f, "backsolve"), (compiled, "checkpoint")],
    ids=["direct", "checkpoint", "backsolve", "compiled"],
)
def test_a_linear_field_carries_a_normal_to_a_normal(make, adjoint):
    field = Linear()
    flow = CNF(make(field), adjoint=adjoint, **TIGHT).double()
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    found, right = flow.log_prob(x), field.law().log_prob(x)
    torch.testing.assert_close(found, right, rtol=0, atol=1e-7)
    torch.testing.assert_close(flow.log_prob(x, t=0.3), field.law(0.3).log_prob(x), rtol=0, atol=1e-7)
    torch.testing.assert_close(flow.log_prob(x, t=0.0), flow.base.log_prob(x))
    wrt = [x, *field.parameters()]
    expected = torch.autograd.grad(right.sum(), wrt)
    for gradient, other in zip(torch.autograd.grad(found.sum(), [x, *flow.parameters()]), expected):
        torch.testing.assert_close(gradient, other, rtol=0, atol=1e-6)


def test_samples_have_the_law_and_its_gradients():
    field = Linear()
    flow, law = CNF(field, **TIGHT).double(), field.law()
    torch.manual_seed(1)
    x = flow.rsample(4000)
    assert x.shape == (4000, 2) and flow.sample((2, 3)).shape == (2, 3, 2) and flow.sample().shape == (2,)
    assert not flow.sample(3).requires_grad
    assert (x.mean(0) - law.mean).abs().max() < 0.1
    assert (x.t().cov() - law.covariance_matrix).abs().max() < 0.2
    x.mean(0).sum().backward()
    (expected,) = torch.autograd.grad(law.mean.sum(), field.c)
    torch.testing.assert_close(field.c.grad, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "make"),
    [("gated", lambda f: f), ("squash", lambda f: f), ("squash", compiled)],
    ids=["gated", "squash", "squash-compiled"],
)
@torch.no_grad()
def test_there_and_back_again(name, make):
    flow = CNF(make(FIELDS[name]()), rtol=1e-6, atol=1e-6)
    z = torch.randn(200, 3)
    x = flow(z)
    assert (x - z).abs().max() > 0.05
    assert (flow.inverse(x) - z).abs().max() < 1e-4
    half = flow(z, t=0.5)
    assert (flow.inverse(half, t=0.5) - z).abs().max() < 1e-4 and torch.equal(flow(z, t=0.0), z)


@pytest.mark.parametrize("name", ["gated", "squash"])
def test_a_density_integrates_to_one(name):
    field = {"gated": GatedSum(2, 16), "squash": MLPField(2, (16, 16), time="squash")}[name]
    with torch.no_grad():
        for p in field.parameters():
            p.mul_(1.5)
    side = torch.linspace(-10, 10, 201)
    with torch.no_grad():
        density = CNF(field).log_prob(torch.cartesian_prod(side, side)).exp()
    assert abs(density.sum().item() * 0.1**2 - 1) < 0.01
    assert density.max() > 0.02


def solved_with_costs(flow, x):
    log_prob, *costs = flow.log_prob_and_costs(x)
    (log_prob.sum() + sum(cost.sum() for cost in costs)).backward()
    return [log_prob, *costs]


def solved(flow, x):
    log_prob = flow.log_prob(x)
    log_prob.sum().backward()
    return [log_prob]


@pytest.mark.parametrize(
    ("name", "trace", "results"),
    [
        ("gated", "exact", solved),
        ("gated", "exact", solved_with_costs),
        ("concat", "exact", solved),
        ("squash", "hutchinson", solved_with_costs),
    ],
)
def test_compiled_flows_are_the_same(name, trace, results):
    field = FIELDS[name]().double()
    x = torch.randn(5, 3, dtype=torch.float64)
    found = []
    for each in (field, compiled(field)):
        flow = CNF(each, trace=trace).double()
        torch.manual_seed(7)
        found.append([*results(flow, x), *(p.grad for p in flow.parameters())])
    assert len(found[0]) == len(found[1]) > 4
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "noise"),
    [(lambda f: f, "rademacher"), (lambda f: f, "gaussian"), (compiled, "rademacher")],
    ids=["rademacher", "gaussian", "compiled"],
)
@torch.no_grad()
def test_a_solve_keeps_its_noise(make, noise):
    """The estimate of a linear field does not depend on where and when: noise . A noise, if the noise stays."""
    field = Linear()
    flow = CNF(make(field), trace="hutchinson", noise=noise, adjoint=None, **TIGHT).double()
    x = torch.randn(8, 2, dtype=torch.float64)
    torch.manual_seed(3)
    first = flow.log_prob(x)
    torch.manual_seed(3)
    drawn = flow._drawn(x)
    fallen = flow.base.log_prob(CNF(field, **TIGHT).double().inverse(x)) - first
    torch.testing.assert_close(fallen, ((drawn @ field.a) * drawn).sum(1), rtol=0, atol=1e-6)
    assert not torch.equal(flow.log_prob(x), first)  # and the next solve draws another


def test_gradients_are_of_the_noise_that_the_solve_had():
    flow = CNF(FIELDS["squash"](), trace="hutchinson").double()
    x = torch.randn(8, 3, dtype=torch.float64)
    torch.manual_seed(3)
    expected = torch.autograd.grad(flow.log_prob(x).sum(), list(flow.parameters()))
    torch.manual_seed(3)
    first = flow.log_prob(x).sum()
    flow.log_prob(x)  # another noise, before the first solve's backward pass
    for one, other in zip(torch.autograd.grad(first, list(flow.parameters())), expected):
        assert torch.equal(one, other)


def test_costs_are_integrals_along_the_path():
    field = Linear()
    flow = CNF(field, **TIGHT).double()
    x = torch.randn(4, 2, dtype=torch.float64)
    log_prob, kinetic, jacobian = flow.log_prob_and_costs(x)
    torch.testing.assert_close(log_prob, flow.log_prob(x), rtol=0, atol=1e-7)
    torch.testing.assert_close(jacobian, field.a.square().sum().expand(4), rtol=0, atol=1e-7)
    nodes = torch.linspace(0, 1, 201, dtype=torch.float64)
    energy = torch.stack(
        [field(0, flow.inverse(x) if t == 0 else flow(flow.inverse(x), t)).square().sum(1) for t in nodes]
    )
    torch.testing.assert_close(kinetic, torch.trapezoid(energy, nodes, dim=0), rtol=1e-4, atol=0)
    backwards = CNF(field, t=(1.0, 0.0), **TIGHT).double().log_prob_and_costs(x)
    assert all((cost > 0).all() for cost in backwards[1:])


@pytest.mark.parametrize("make", [lambda f: f, compiled], ids=["called", "compiled"])
@torch.no_grad()
def test_the_log_density_can_be_left_out_of_step_control(make):
    """A divergence that is far harder than the path then goes unseen."""

    class Hard(nn.Module):
        dim = 2

        def forward(self, t, z):
            return -z + 1e-3 * torch.sin(40 * z)

        def slope_and_divergence(self, t, z):
            return self(t, z), 0.04 * torch.cos(40 * z).sum(1) - 2 + 5 * torch.sin(90 * t)

    x = torch.randn(50, 2)
    right = CNF(Hard(), rtol=1e-8, atol=1e-8).double().log_prob(x.double())
    careful, careless = (
        (CNF(make(Hard()), rtol=1e-3, atol=1e-3, log_density_in_norm=flag).log_prob(x) - right).abs().max()
        for flag in (True, False)
    )
    assert careful < 0.05 and careless > 10 * careful


def test_a_short_training_finds_two_moons():
    points, _ = datasets.moons(256, noise=0.05)
    flow = CNF(GatedSum(2, 32), rtol=1e-3, atol=1e-3, adjoint=None)
    adam = torch.optim.Adam(flow.parameters(), 0.02)
    first = None
    for _ in range(60):
        adam.zero_grad()
        loss = -flow.log_prob(points).mean()
        loss.backward()
        adam.step()
        first = first or loss.item()
    assert loss < first - 0.8


# ---- as a distribution, and as a Module ---------------------------------------------------------------


def test_it_is_a_distribution_of_the_base_given():
    base = Independent(Uniform(torch.zeros(1, 2), torch.ones(1, 2)), 2)
    flow = CNF(MLPField(2, (4,)), base=base, trace="exact")
    assert isinstance(flow, torch.distributions.Distribution) and flow.has_rsample
    assert flow.batch_shape == () and flow.event_shape == (1, 2)
    x = flow.sample((5, 2))
    assert x.shape == (5, 2, 1, 2) and flow.log_prob(x).shape == (5, 2)


@pytest.mark.parametrize("make", [lambda f: f, compiled], ids=["called", "compiled"])
@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_an_event_may_be_one_number(make, trace):
    class Shrinks(nn.Module):
        def forward(self, t, x):
            return -x

    flow = CNF(make(Shrinks()), base=Normal(0.0, 1.0), trace=trace, rtol=1e-6, atol=1e-6)
    x = torch.randn(4)
    log_prob, kinetic, jacobian = flow.log_prob_and_costs(x)
    torch.testing.assert_close(log_prob, Normal(0.0, math.exp(-1)).log_prob(x), rtol=0, atol=1e-4)
    torch.testing.assert_close(flow.log_prob(x), log_prob, rtol=0, atol=1e-4)
    torch.testing.assert_close(kinetic, x.square() * (math.exp(2) - 1) / 2, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(jacobian, torch.ones(4))
    assert flow.sample((2, 3)).shape == (2, 3) and flow.log_prob(x[0]).shape == ()


def test_a_base_without_reparametrised_samples_has_samples():
    modes = Independent(Normal(torch.tensor([[-3.0, 0.0], [3.0, 0.0]]), 0.1), 1)
    flow = CNF(Linear().float(), base=MixtureSameFamily(Categorical(torch.ones(2)), modes))
    assert not flow.has_rsample and CNF(Linear()).has_rsample
    torch.manual_seed(0)
    base = flow.inverse(flow.sample(500))
    assert 0.4 < (base[:, 0] > 0).float().mean() < 0.6 and (base[:, 0].abs() - 3).abs().max() < 0.5
    with pytest.raises(NotImplementedError):
        flow.rsample()


def test_it_goes_into_other_distributions():
    flow = CNF(Linear(), **TIGHT).double()
    shift, scale = torch.tensor([1.0, -2.0]).double(), torch.tensor([2.0, 0.5]).double()
    whole = TransformedDistribution(flow, AffineTransform(shift, scale, event_dim=1))
    x = whole.rsample((3,))
    expected = flow.log_prob((x - shift) / scale) - scale.log().sum()
    torch.testing.assert_close(whole.log_prob(x), expected)


@torch.no_grad()
def test_it_is_a_module_with_the_names_of_its_field(tmp_path):
    flow = CNF(compiled(MLPField(2, (4,))))
    assert [name for name, _ in flow.named_parameters()] == [
        "field." + name for name, _ in MLPField(2, (4,)).named_parameters()
    ]
    x = torch.randn(3, 2)
    for other in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        torch.testing.assert_close(other.log_prob(x), flow.log_prob(x))
        next(other.parameters()).add_(1.0)
        assert not torch.allclose(other.log_prob(x), flow.log_prob(x))
    fresh = CNF(MLPField(2, (4,)))
    fresh.load_state_dict(flow.state_dict())
    torch.testing.assert_close(fresh.log_prob(x), flow.log_prob(x))
    assert fresh.double().sample(2).dtype == torch.float64


# ---- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"trace": "hutch"}, ArgumentError, "trace must be one of 'exact', 'hutchinson', got 'hutch'"),
        ({"noise": "uniform"}, ArgumentError, "noise must be one of 'rademacher', 'gaussian', got 'uniform'"),
        ({"adjoint": "yes"}, ArgumentError, "adjoint must be one of None, 'checkpoint'"),
        ({"t": (0.0, 0.0)}, ArgumentError, "t must be two different finite times"),
        ({"t": 1.0}, ArgumentTypeError, "t must be two numbers"),
        ({"base": Normal(torch.zeros(2), 1.0)}, ArgumentError, "base must be a Distribution without batch shape"),
        ({"field": lambda t, z: -z}, ArgumentTypeError, "field must be a Module called as field"),
        ({"field": nn.Linear(2, 2)}, ArgumentError, "field has no attribute dim, its event size; give base"),
    ],
)  # fmt: skip
def test_a_flow_refuses_what_it_cannot_use(kwargs, error, message):
    with pytest.raises(error, match=message):
        CNF(kwargs.pop("field", MLPField(2, (4,))), **kwargs)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda flow: flow.log_prob(torch.zeros(5, 3)), ArgumentError, r"shape \(..., 2\), got \(5, 3\)"),
        (lambda flow: flow.log_prob(torch.tensor(1.0)), ArgumentError, r"shape \(..., 2\), got \(\)"),
        (lambda flow: flow(torch.zeros(3)), ArgumentError, r"shape \(..., 2\), got \(3,\)"),
        (lambda flow: flow.inverse([0.0, 0.0]), ArgumentTypeError, "points must be a Tensor, got list"),
        (lambda flow: flow.log_prob(torch.zeros(2), t=1.5), ArgumentError, "t must be from 0 to 1, got 1.5"),
        (lambda flow: flow.log_prob(torch.zeros(1, 2).long()), ArgumentTypeError, "floating point"),
        (lambda flow: GatedSum(0), ArgumentError, "dim must be at least 1, got 0"),
        (lambda flow: GatedSum(2, units=1.5), ArgumentTypeError, "units must be an int, .* got float 1.5"),
    ],
)  # fmt: skip
def test_points_of_another_size_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(CNF(MLPField(2, (4,))))


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_an_empty_batch_has_empty_densities(trace):
    flow = CNF(MLPField(2, (4,)), trace=trace)
    for shape in (0, 2), (4, 0, 2):
        x = torch.zeros(shape)
        assert flow.log_prob(x).shape == shape[:-1] and flow(x).shape == flow.inverse(x).shape == shape
        assert [y.shape for y in flow.log_prob_and_costs(x)] == [shape[:-1]] * 3
    assert flow.sample(0).shape == (0, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda flow: flow.sample(-1), ArgumentError, "sample_shape must be at least 0, got -1"),
        (lambda flow: flow.rsample((2, 1.5)), ArgumentTypeError, "sample_shape must be an int, .* got float 1.5"),
        (lambda flow: flow.sample(None), ArgumentTypeError, "sample_shape must be an int, .* got None"),
        (lambda flow: flow.sample(True), ArgumentTypeError, "sample_shape must be an int, .* got bool True"),
        (lambda flow: flow.sample(3, "a"), ArgumentTypeError, "t must be a number, a time of the flow, got str 'a'"),
        (lambda flow: CNF(MLPField(2), t=(0, 10**400)), ArgumentTypeError, "t must be two numbers"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(CNF(MLPField(2, (4,))))
