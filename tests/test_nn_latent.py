"""Latent ODEs against closed forms, hand-written loops and finite differences, in float64; what is not observed."""

import math
import re

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal

import flashode
from flashode.nn import LatentODE, ODERNNEncoder, RNNEncoder, kl_annealing

F64 = torch.float64
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


class Field(nn.Module):
    """A network of the state and of the sample's own time."""

    def __init__(self, dim):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim + 1, 8), nn.Tanh(), nn.Linear(8, dim))

    def forward(self, t, z):
        return self.net(torch.cat([z, t.expand(len(z), 1)], -1))


class Linear(nn.Module):
    def __init__(self, A):
        super().__init__()
        self.A = nn.Parameter(A)

    def forward(self, t, z):
        return z @ self.A.T


class Fixed(nn.Module):
    """An encoder that says the same of every series."""

    def __init__(self, mean, std):
        super().__init__()
        self.latent, self.mean, self.std = len(mean), nn.Parameter(mean), std

    def forward(self, times, values, mask, t0):
        return Normal(self.mean.expand(len(values), -1), self.std.expand(len(values), -1))


def encoder_of(kind, compiled=False):
    if kind == "rnn":
        return RNNEncoder(2, 3, 5)
    field = Field(5).double()
    return ODERNNEncoder(2, 3, flashode.compile(field) if compiled else field, 5, **TIGHT)


def model_of(kind="rnn", compiled=False):
    torch.manual_seed(3)
    field = Field(3).double()
    model = LatentODE(
        encoder_of(kind, compiled), flashode.compile(field) if compiled else field, nn.Linear(3, 2), t0=-0.5, **TIGHT
    )  # fmt: skip
    return model.double()


def series(samples=4, points=6):
    """Times, values and a mask in which every sample lacks whole rows and single numbers."""
    times = 2 * torch.rand(samples, points, dtype=F64).sort(1).values
    mask = torch.rand(samples, points, 2) < 0.6
    mask[:, 1] = True
    mask[:, 2] = mask[0, -1] = mask[1, 0] = False
    return times, torch.randn(samples, points, 2, dtype=F64), mask


def elbo_and_gradients(model, *data, seed=1, **more):
    torch.manual_seed(seed)
    elbo = model.elbo(*data, **more)
    return elbo.detach(), torch.autograd.grad(elbo.sum(), list(model.parameters()))


# ---- the bound -------------------------------------------------------------------------------


def test_the_divergence_is_that_of_normals_from_the_standard_one():
    model, data = model_of(), series()
    posterior = model.posterior(*data)
    mean, variance = posterior.mean, posterior.variance
    expected = 0.5 * (mean**2 + variance - 1 - variance.log()).sum(-1)
    bounds = []
    for weight in (0.0, 1.0, 0.25):
        torch.manual_seed(1)
        bounds.append(model.elbo(*data, kl_weight=weight))
    torch.testing.assert_close(bounds[0] - bounds[1], expected)
    torch.testing.assert_close(bounds[0] - bounds[2], 0.25 * expected)
    assert bounds[0].shape == (4,)


def test_the_bound_counts_what_was_observed_and_nothing_else():
    model, (times, values, mask) = model_of(), series()
    torch.manual_seed(1)
    found = model.elbo(times, values, mask, kl_weight=0.0)
    torch.manual_seed(1)
    z0 = model.posterior(times, values, mask).rsample()
    for i in range(4):
        means = model.decode(z0[i : i + 1], times[i])[0]
        squares = ((values[i] - means) / 0.1)[mask[i]].square()
        expected = -(squares / 2 + math.log(0.1 * math.sqrt(2 * math.pi))).sum()
        torch.testing.assert_close(found[i], expected)


def linear_gaussian(mean, std, samples):
    A, C = torch.tensor([[-0.2, -1.0], [1.0, 0.1]], dtype=F64), torch.tensor([[1.0, 0.5]], dtype=F64)
    decoder = nn.Linear(2, 1, bias=False, dtype=F64)
    decoder.weight.data = C
    model = LatentODE(Fixed(mean, std), Linear(A), decoder, noise=0.7, **TIGHT)
    times = torch.tensor([0.0, 0.3, 1.1, 2.0], dtype=F64)
    observes = torch.stack([C @ torch.matrix_exp(t * A) for t in times])[:, 0]  # (T, latent)
    values = torch.tensor([0.5, -0.2, 1.0, 0.3], dtype=F64)
    return model, times, values, observes, values[None, :, None].expand(samples, -1, 1)


def test_the_mean_of_the_bound_is_that_of_the_closed_form():
    """E log N(x; H z, s^2) = log N(x; H m, s^2) - sum |H std|^2 / (2 s^2)."""
    mean, std = torch.tensor([0.4, -0.3], dtype=F64), torch.tensor([0.6, 0.9], dtype=F64)
    model, times, values, H, batch = linear_gaussian(mean, std, 4000)
    bounds = model.elbo(times, batch).detach()
    likely = Normal(H @ mean, 0.7).log_prob(values).sum() - (H * std).square().sum() / (2 * 0.7**2)
    expected = likely - 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).sum()
    assert abs(bounds.mean() - expected) < 4 * bounds.std() / math.sqrt(4000)
    assert bounds.std() < 0.5 * expected.abs()  # or the line above would say little


def test_the_bound_is_the_log_evidence_where_the_posterior_is_exact():
    """One latent number has a posterior that is a Normal."""
    decoder = nn.Linear(1, 2, bias=False, dtype=F64)
    times, values = torch.tensor([0.0, 1.0, 2.0], dtype=F64), torch.randn(3, 2, dtype=F64)
    H = (torch.exp(-0.5 * times)[:, None] * decoder.weight.detach()[:, 0]).flatten()
    precision = 1 + H.square().sum() / 0.5**2
    mean, std = (H @ values.flatten()) / 0.5**2 / precision, precision.rsqrt()
    field = Linear(torch.full((1, 1), -0.5, dtype=F64))
    model = LatentODE(Fixed(mean[None], std[None]), field, decoder, noise=0.5, **TIGHT)
    bounds = model.elbo(times, values.expand(4000, -1, -1)).detach()
    covariance = 0.25 * torch.eye(6, dtype=F64) + torch.outer(H, H)
    evidence = MultivariateNormal(torch.zeros(6, dtype=F64), covariance).log_prob(values.flatten())
    assert abs(bounds.mean() - evidence) < 4 * bounds.std() / math.sqrt(4000) < 0.1


@pytest.mark.parametrize("kind", ["rnn", "ode-rnn"])
def test_gradients_are_those_of_finite_differences(kind):
    model, data = model_of(kind), series(3, 4)
    parameters = list(model.parameters())
    _, gradients = elbo_and_gradients(model, *data)
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients)
    directions = [torch.randn_like(p) for p in parameters]
    ends = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            for p, d in zip(parameters, directions):
                p += step * d
            torch.manual_seed(1)
            ends.append(model.elbo(*data).sum())
            for p, d in zip(parameters, directions):
                p -= step * d
    along = sum((g * d).sum() for g, d in zip(gradients, directions))
    torch.testing.assert_close((ends[0] - ends[1]) / 2e-5, along, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["rnn", "ode-rnn"])
def test_compiled_fields_give_what_others_do(kind):
    data = series()
    plain, compiled = (elbo_and_gradients(model_of(kind, c), *data) for c in (False, True))
    torch.testing.assert_close(compiled, plain, rtol=1e-7, atol=1e-7)
    names = [name for name, _ in model_of(kind, True).named_parameters()]
    assert names == [name for name, _ in model_of(kind).named_parameters()]


# ---- what is not observed --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rnn", "ode-rnn"])
@pytest.mark.parametrize("other", [7.0, math.nan])
def test_what_is_not_observed_has_no_influence(kind, other):
    times, values, mask = series()
    model = model_of(kind)
    expected = elbo_and_gradients(model, times, values, mask)
    values = torch.where(mask, values, other).requires_grad_()
    times = torch.where(mask.any(-1), times, other)
    found = elbo_and_gradients(model, times, values, mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.manual_seed(1)
    (gradient,) = torch.autograd.grad(model.elbo(times, values, mask).sum(), values)
    assert (gradient[~mask] == 0).all() and (gradient[mask] != 0).all()


@pytest.mark.parametrize("kind", ["rnn", "ode-rnn"])
def test_a_series_in_a_batch_is_read_as_alone_and_without_its_padding(kind):
    times, values, mask = series()
    model = model_of(kind)
    together = model.posterior(times, values, mask)
    for i in range(4):
        rows = mask[i].any(-1)
        alone = model.posterior(times[i][rows], values[i][rows][None], mask[i][rows][None])
        torch.testing.assert_close(alone.mean[0], together.mean[i])
        torch.testing.assert_close(alone.stddev[0], together.stddev[i])


def test_a_mask_of_rows_is_one_of_all_their_numbers():
    times, values, mask = series()
    model, rows = model_of(), mask.any(-1)
    narrow = elbo_and_gradients(model, times, values, rows)
    wide = elbo_and_gradients(model, times, values, rows[..., None].expand(-1, -1, 2))
    torch.testing.assert_close(narrow, wide, rtol=0, atol=0)
    everywhere = elbo_and_gradients(model, times, values, torch.ones(4, 6, dtype=torch.bool))
    torch.testing.assert_close(elbo_and_gradients(model, times, values), everywhere, rtol=0, atol=0)


# ---- encoders --------------------------------------------------------------------------------


def by_hand(encoder, cell, times, values, mask, t0, between):
    """The posterior of one series, row by row from its end; ``between(h, late, early)`` goes on to the next."""
    h, rows = torch.zeros(1, 5, dtype=F64), [i for i in range(len(times)) if mask[i].any()]
    for place in reversed(range(len(rows))):
        i = rows[place]
        early = times[rows[place - 1]] if place else torch.tensor(t0, dtype=F64)
        row = torch.cat([torch.where(mask[i], values[i], 0), mask[i].double()])
        h = between(cell, row, h, times[i], early)
    mean, log_variance = encoder.head(h)[0].chunk(2)
    return mean, torch.exp(0.5 * log_variance)


@pytest.mark.parametrize("kind", ["rnn", "ode-rnn"])
def test_encoders_are_loops_from_the_end_to_the_beginning(kind):
    times, values, mask = series()
    model = model_of(kind)
    encoder = model.encoder
    if kind == "rnn":
        cell = nn.GRUCell(5, 5, dtype=F64)
        cell.load_state_dict({name.removesuffix("_l0"): p for name, p in encoder.gru.state_dict().items()})

        def between(cell, row, h, late, early):
            return cell(torch.cat([row, (late - early)[None]])[None], h)
    else:
        cell, encoder.field = encoder.cell, Linear(torch.randn(5, 5, dtype=F64))

        def between(cell, row, h, late, early):
            return cell(row[None], h) @ torch.matrix_exp((early - late) * encoder.field.A).T

    posterior = model.posterior(times, values, mask)
    for i in range(4):
        mean, std = by_hand(encoder, cell, times[i], values[i], mask[i], -0.5, between)
        torch.testing.assert_close(posterior.mean[i], mean, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(posterior.stddev[i], std, rtol=1e-8, atol=1e-8)


# ---- decoding --------------------------------------------------------------------------------


def test_every_sample_is_decoded_at_its_own_times():
    """z' = t has the solution z0 + (t^2 - t0^2) / 2, whatever the clocks of others; times may repeat."""
    field = flashode.compile(lambda t, z: t + 0 * z)
    model = LatentODE(Fixed(torch.zeros(1), torch.ones(1)), field, nn.Identity(), t0=-1.0, **TIGHT)
    times = torch.tensor([[-1.0, 0.0, 0.0, 2.0], [5.0, 6.0, 7.0, 7.0], [0.0, 0.0, 0.0, 0.0]], dtype=F64)
    z0 = torch.tensor([[1.0], [2.0], [3.0]], dtype=F64)
    expected = z0 + (times**2 - 1) / 2
    torch.testing.assert_close(model.decode(z0, times)[..., 0], expected)
    torch.testing.assert_close(model.decode(z0, times[0])[..., 0], z0 + (times[0] ** 2 - 1) / 2)


def test_reconstruction_goes_through_the_mean_between_and_beyond_the_observations():
    mean = torch.tensor([0.4, -0.3], dtype=F64)
    model, times, _, H, batch = linear_gaussian(mean, torch.ones(2, dtype=F64), 3)
    torch.testing.assert_close(model.reconstruct(times, batch), (H @ mean).expand(3, 4)[..., None])
    at = torch.tensor([0.1, 9.0], dtype=F64)
    A, C = model.field.A, model.decoder.weight
    expected = torch.stack([C @ torch.matrix_exp(t * A) @ mean for t in at])
    torch.testing.assert_close(model.reconstruct(times, batch, at=at), expected.expand(3, 2, 1))


def test_samples_start_from_a_standard_normal():
    model, times, _, H, _ = linear_gaussian(torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64), 1)
    made = [model.sample(2000, times, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert made[0].shape == (2000, 4, 1)
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    torch.testing.assert_close(torch.cov(made[0][..., 0].T), H @ H.T, rtol=0, atol=0.1)


def test_annealing_grows_from_nothing_to_one():
    assert [kl_annealing(step, 4) for step in (0, 1, 2, 4, 9)] == [0, 0.25, 0.5, 1, 1]
    assert kl_annealing(0, 0) == 1


# ---- what cannot be used ---------------------------------------------------------------------


def without(mask, sample):
    mask = mask.clone()
    mask[sample] = False
    return mask


def with_entry(x, *place, value):
    x = x.clone()
    x[place] = value
    return x


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, v, m: (with_entry(t, 2, 1, value=1.8), v, None),
         "sample 2 has 1.4 at index 2, after 1.8"),
        (lambda t, v, m: (with_entry(t, 1, 0, value=-0.6), v, None),
         "times must be finite and ascend from t0 = -0.5 in every sample; sample 1 has -0.6 at index 0, after -0.5"),
        (lambda t, v, m: (with_entry(t, 3, 5, value=math.nan), v, None), "sample 3 has nan at index 5"),
        (lambda t, v, m: (with_entry(t, 3, 5, value=math.inf), v, None), "sample 3 has inf at index 5"),
        (lambda t, v, m: (t, with_entry(v, 1, 3, 0, value=math.nan), None),
         "values must be finite where observed; sample 1 has nan at index 3, entry 0: set its mask to False"),
        (lambda t, v, m: (t, v, without(m, 2)), "mask: sample 2 has no observation; leave it out"),
        (lambda t, v, m: (t, v, m[:, :-1]),
         "mask must be (4, 6) or of shape (4, 6, 2), got a torch.bool Tensor of shape (4, 5, 2)"),
        (lambda t, v, m: (t, v, m.double()), "mask must be a bool Tensor"),
        (lambda t, v, m: (t[:, :-1], v, m), "times must be of shape (6,)"),
        (lambda t, v, m: (t[:3], v, m), "times must be of shape (T,) or (4, T)"),
        (lambda t, v, m: (t.long(), v, m), "times must be a floating point Tensor, got a torch.int64"),
        (lambda t, v, m: (t.tolist(), v, m), "times must be a floating point Tensor, got list"),
        (lambda t, v, m: (t, v[..., 0], m), "values must be a Tensor of shape (samples, times, D)"),
        (lambda t, v, m: (t[:0], v[:0], m[:0]), "of at least one sample, got a torch.float64 Tensor of shape (0, 6, 2)"),
        (lambda t, v, m: (t[:, :0], v[:, :0], m[:, :0]), "mask: sample 0 has no observation"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named(change, message):
    times = (torch.arange(6, dtype=F64) * 0.7).expand(4, -1)
    _, values, mask = series()
    for call in (LatentODE.elbo, LatentODE.posterior, LatentODE.reconstruct):
        with pytest.raises((flashode.ArgumentError, flashode.ArgumentTypeError), match=re.escape(message)):
            call(model_of(), *change(times, values, mask))


def test_times_to_decode_at_are_in_order_too():
    model, z0 = model_of(), torch.zeros(2, 3, dtype=F64)
    with pytest.raises(flashode.ArgumentError, match="sample 0 has 1 at index 1, after 2"):
        model.decode(z0, torch.tensor([2.0, 1.0], dtype=F64))
    with pytest.raises(flashode.ArgumentError, match="sample 0 has -1 at index 0, after -0.5"):
        model.sample(2, torch.tensor([-1.0, 1.0], dtype=F64))


def test_a_model_of_other_sizes_is_refused():
    times, values, mask = series()
    with pytest.raises(flashode.ArgumentError, match="noise must be finite and positive, got 0"):
        LatentODE(RNNEncoder(2, 3), Field(3), nn.Linear(3, 2), noise=0)
    model = model_of()
    model.decoder = nn.Linear(3, 1, dtype=F64)
    with pytest.raises(flashode.ArgumentError, match=re.escape("decoder must return of shape (4, 6, 2)")):
        model.elbo(times, values, mask)


@pytest.mark.parametrize("size", [0, 1.5, True, None, "5", 10**30])
def test_sizes_are_whole_numbers(size):
    errors = flashode.ArgumentError, flashode.ArgumentTypeError
    for name in ("dim", "latent", "hidden"):
        sizes = {"dim": 2, "latent": 3, "hidden": 4, name: size}
        with pytest.raises(errors, match=f"^{name} must be"):
            RNNEncoder(**sizes)
        with pytest.raises(errors, match=f"^{name} must be"):
            ODERNNEncoder(**sizes, field=lambda t, h: -h)
