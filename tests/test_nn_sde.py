"""Stochastic equations: strong and weak orders against exact solutions, seeds, noise of one's own, gradients."""

import math

import pytest
import torch
from torch import nn

from flashode import ArgumentError, ArgumentTypeError
from flashode.nn import NeuralSDE, sdeint

F64 = torch.float64
MU, SIGMA = 0.8, 0.6
METHODS = ["euler_maruyama", "milstein"]
each_method = pytest.mark.parametrize("method", METHODS)
ENDS = torch.tensor([0.0, 1.0], dtype=F64)


def growth(t, y):
    return MU * y


def growing_noise(t, y):
    return SIGMA * y


def brownian(steps, *shape, seed=1):
    """Increments of paths over [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, *shape, dtype=F64, generator=generator) / math.sqrt(steps)


def coarser(noise, times):
    """The same paths in steps that many times as long."""
    return noise.reshape(-1, times, *noise.shape[1:]).sum(1)


@pytest.mark.parametrize("method, order", [("euler_maruyama", 0.5), ("milstein", 1.0)])
def test_the_strong_order_on_geometric_brownian_motion(method, order):
    """On the same Brownian paths, against y0 exp((mu - sigma^2 / 2) t + sigma W)."""
    paths, finest = 4000, 256
    fine, y0 = brownian(finest, paths), torch.ones(paths, dtype=F64)
    exact = torch.exp(torch.tensor(MU - SIGMA**2 / 2) + SIGMA * fine.sum(0))
    steps, errors = [16, 32, 64, 128, 256], []
    for n in steps:
        call = {"method": method, "step_size": 1 / n, "noise": coarser(fine, finest // n)}
        y = sdeint(growth, growing_noise, y0, ENDS, **call)
        errors.append((y[-1] - exact).abs().mean().item())
    slope = math.log(errors[0] / errors[-1]) / math.log(steps[-1] / steps[0])
    assert slope == pytest.approx(order, abs=0.06), errors


def test_refining_the_noise_converges_to_one_path():
    fine, y0 = brownian(1024, 50), torch.full((50,), 0.5, dtype=F64)
    t = torch.linspace(0, 1, 5, dtype=F64)

    def path(times):
        noise = coarser(fine, times)
        return sdeint(lambda t, y: torch.sin(y), lambda t, y: 0.5 * torch.cos(y), y0, t, method="milstein",
                      step_size=times / 1024, noise=noise)  # fmt: skip

    finest = path(1)
    distances = [(path(times) - finest).abs().mean().item() for times in (32, 16, 8)]
    assert distances[0] > 1.7 * distances[1] > 2.8 * distances[2] > 0


@each_method
def test_moments_of_an_ornstein_uhlenbeck_process(method):
    """Mean and variance at every output within three standard errors, beside the step's own bias."""
    theta, sigma, mean, n = 1.5, 0.7, 0.4, 40_000
    y0, t = torch.full((n,), 2.0, dtype=F64), torch.tensor([0.0, 0.5, 1.0, 3.0], dtype=F64)
    y = sdeint(
        lambda t, y: theta * (mean - y), lambda t, y: torch.full_like(y, sigma), y0, t, method=method,
        step_size=0.005, generator=3,
    )  # fmt: skip
    bias = 0.005 * theta
    for time, row in zip(t[1:].tolist(), y[1:]):
        decay = math.exp(-theta * time)
        variance = sigma**2 * (1 - decay**2) / (2 * theta)
        expected = mean + (2.0 - mean) * decay
        assert abs(row.mean().item() - expected) < 3 * math.sqrt(variance / n) + bias * abs(expected - mean)
        assert abs(row.var().item() - variance) < 3 * variance * math.sqrt(2 / n) + bias * variance


def test_milstein_is_euler_maruyama_where_noise_is_additive():
    y0 = torch.randn(4, 3, dtype=F64)
    paths = [
        sdeint(lambda t, y: -y, lambda t, y: (1 + t) * torch.ones_like(y), y0, ENDS, method=method,
               step_size=0.1, generator=7)
        for method in METHODS
    ]  # fmt: skip
    assert torch.equal(*paths)


def test_one_step_is_the_formula():
    y0, dW = torch.tensor([0.7, -0.3], dtype=F64), torch.tensor([[0.2, -0.5]], dtype=F64)
    t, h = torch.tensor([0.5, 0.75], dtype=F64), 0.25

    def diffusion(t, y):
        return t * y**2

    def drift(t, y):
        return t - y

    em = y0 + drift(0.5, y0) * h + diffusion(0.5, y0) * dW[0]
    milstein = em + 0.5 * diffusion(0.5, y0) * (0.5 * 2 * y0) * (dW[0] ** 2 - h)
    for method, expected in (("euler_maruyama", em), ("milstein", milstein)):
        y = sdeint(drift, diffusion, y0, t, method=method, step_size=h, noise=dW)
        torch.testing.assert_close(y[-1], expected, rtol=1e-14, atol=1e-15)


# ---- paths and their noise -------------------------------------------------------------------


@each_method
def test_a_seed_gives_one_path_whatever_is_looked_at(method):
    y0, call = torch.ones(3, dtype=F64), {"method": method, "step_size": 0.05}
    few = sdeint(growth, growing_noise, y0, ENDS, generator=5, **call)
    many = sdeint(growth, growing_noise, y0, torch.linspace(0, 1, 21, dtype=F64), generator=5, **call)
    odd = sdeint(growth, growing_noise, y0, torch.tensor([0, 0.33, 1], dtype=F64), generator=5, **call)
    assert torch.equal(few[-1], many[-1]) and torch.equal(few[-1], odd[-1])
    torch.testing.assert_close(odd[1], many[6] + (many[7] - many[6]) * 0.6, rtol=1e-12, atol=1e-12)
    other = sdeint(growth, growing_noise, y0, ENDS, generator=6, **call)
    assert not torch.equal(few[-1], other[-1])


def test_generators_and_torchs_own_seed_are_followed():
    y0, call = torch.ones(3), {"step_size": 0.1}
    t = ENDS.float()
    seeded = sdeint(growth, growing_noise, y0, t, generator=torch.Generator().manual_seed(5), **call)
    assert torch.equal(seeded, sdeint(growth, growing_noise, y0, t, generator=5, **call))
    torch.manual_seed(5)
    assert torch.equal(seeded, sdeint(growth, growing_noise, y0, t, **call))


def test_the_last_step_ends_at_the_end():
    seen = []

    def drift(t, y):
        seen.append(t.item())
        return torch.ones_like(y)

    y = sdeint(drift, lambda t, y: torch.zeros_like(y), torch.zeros(1, dtype=F64), ENDS, step_size=0.3)
    assert seen == pytest.approx([0, 0.3, 0.6, 0.9]) and y[-1].item() == pytest.approx(1)
    seen.clear()
    sdeint(drift, lambda t, y: torch.zeros_like(y), torch.zeros(1, dtype=F64), ENDS, step_size=0.1)
    assert len(seen) == 10


@each_method
def test_paths_may_be_those_of_vmap(method):
    y0, noise = torch.tensor([0.3, 0.9], dtype=F64), brownian(4, 5, 2)

    def path(dW):
        return sdeint(growth, growing_noise, y0, ENDS, method=method, step_size=0.25, noise=dW)

    together = sdeint(
        growth, growing_noise, y0.expand(5, 2), ENDS, method=method, step_size=0.25, noise=noise
    )
    if method == "euler_maruyama":
        torch.testing.assert_close(torch.func.vmap(path, in_dims=1)(noise).transpose(0, 1), together)
    torch.testing.assert_close(path(noise[:, 3]), together[:, 3])


def test_one_time_is_the_start():
    assert torch.equal(
        sdeint(growth, growing_noise, torch.ones(2), torch.zeros(1), step_size=0.1), torch.ones(1, 2)
    )


# ---- gradients -------------------------------------------------------------------------------


class Scaled(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(values, dtype=F64))

    def forward(self, t, y):
        return self.scale * torch.sin(y + t)


@each_method
def test_gradients_are_finite_differences(method):
    model = NeuralSDE(Scaled([0.5, -0.2]), Scaled([0.3, 0.9]), step_size=0.125, method=method)
    t, noise = torch.tensor([0.0, 0.4, 1.0], dtype=F64), brownian(8, 2)
    point = [torch.tensor([0.4, 1.1], dtype=F64), noise, *(p.detach().clone() for p in model.parameters())]

    def value(y0, noise, *scales):
        with torch.no_grad():
            for parameter, scale in zip(model.parameters(), scales):
                parameter.copy_(scale)
        return (model(y0, t, noise=noise)[1:] ** 2).sum()

    y0, dW = point[0].clone().requires_grad_(), noise.clone().requires_grad_()
    found = torch.autograd.grad(value(y0, dW, *point[2:]), [y0, dW, *model.parameters()])
    for number, gradient in enumerate(found):
        for i in range(2):
            step = torch.zeros_like(point[number])
            step[(3, i) if number == 1 else i] = 1e-6
            with torch.no_grad():
                ahead, behind = (
                    value(*(x + sign * step if j == number else x for j, x in enumerate(point)))
                    for sign in (1, -1)
                )
            exact = gradient[3, i] if number == 1 else gradient[i]
            assert exact.item() == pytest.approx(((ahead - behind) / 2e-6).item(), abs=1e-8)


@each_method
def test_nothing_is_recorded_where_nothing_gets_a_gradient(method):
    call = {"method": method, "step_size": 0.25}
    assert not sdeint(growth, growing_noise, torch.ones(2), ENDS, **call).requires_grad
    model = NeuralSDE(Scaled([0.5, -0.2]), Scaled([0.3, 0.9]), **call)
    assert model(torch.ones(2, dtype=F64), ENDS).requires_grad
    with torch.no_grad():
        assert not model(torch.ones(2, dtype=F64), ENDS).requires_grad


def test_inference_mode_changes_no_path():
    found = []
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            y0, t = torch.ones(4), torch.tensor([0.0, 1.0])
            solved = sdeint(
                lambda t, y: -y, lambda t, y: t * y, y0, t, step_size=0.5, method="milstein", generator=0
            )
            found.append(solved)
    assert torch.equal(*found)


def test_a_model_learns_the_size_of_the_noise():
    """Maximum likelihood by hand would be exact; this only has to move the right way, by gradients alone."""
    model = NeuralSDE(lambda t, y: -y, nn.Module(), step_size=0.1)
    model.diffusion = Scaled([0.1])
    y0, t = torch.full((500, 1), math.pi / 2, dtype=F64), torch.tensor([0.0, 0.1], dtype=F64)
    adam = torch.optim.Adam(model.parameters(), 0.05)
    for step in range(100):
        adam.zero_grad()
        spread = model(y0, t, generator=step)[-1].std()
        (spread - 0.5 * math.sqrt(0.1)).square().mul(100).backward()
        adam.step()
    assert model.diffusion.scale.item() == pytest.approx(0.5, abs=0.05)


# ---- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"t": torch.tensor([1.0, 0.0])}, ArgumentError, "t must be finite and strictly increasing"),
        ({"t": [0.0, 1.0]}, ArgumentTypeError, "t must be a floating point Tensor"),
        ({"step_size": 0}, ArgumentError, "step_size must be finite and positive, got 0"),
        (
            {"step_size": "0.1"},
            ArgumentTypeError,
            "step_size must be a number, the length of a step, got str",
        ),
        ({"method": "heun"}, ArgumentError, "method must be one of .*'milstein'.*, got 'heun'"),
        ({"noise": torch.zeros(3, 2)}, ArgumentError, r"each of the 10 steps: shape \(10, 2\), got \(3, 2\)"),
        ({"noise": torch.zeros(10, 2), "generator": 1}, ArgumentError, "give one of them"),
        ({"generator": "seed"}, ArgumentTypeError, "generator must be a torch.Generator or a whole number"),
        ({"y0": torch.ones(2, dtype=torch.int64)}, ArgumentTypeError, "y0 must be a floating point Tensor"),
        ({"drift": None}, ArgumentTypeError, r"drift must be callable as drift\(t, y\), got NoneType"),
        ({"drift": lambda t, y: 0.0}, ArgumentTypeError, "drift must return a Tensor, got float"),
        (
            {"diffusion": lambda t, y: y[:1]},
            ArgumentError,
            r"diffusion returned shape \(1,\), expected \(2,\)",
        ),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_what_cannot_be_used_is_named(change, error, message):
    call = {"drift": growth, "diffusion": growing_noise, "y0": torch.ones(2), "t": ENDS, "step_size": 0.1}
    with pytest.raises(error, match=message):
        sdeint(**(call | change))


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 2**70])
def test_a_seed_has_64_bits(seed):
    with pytest.raises(ArgumentError, match="generator must be a seed of 64 bits, from -2.*, got"):
        sdeint(
            lambda t, y: -y,
            lambda t, y: y,
            torch.ones(1),
            torch.tensor([0.0, 1.0]),
            step_size=0.5,
            generator=seed,
        )


def test_steps_without_end_are_refused():
    with pytest.raises(ArgumentError, match="step_size = 1e-300 asks for 1e[+]300 steps"):
        sdeint(growth, growing_noise, torch.ones(1, dtype=F64), ENDS, step_size=1e-300)
