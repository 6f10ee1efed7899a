"""Latent ODEs: generative models of series observed at irregular times, with their encoders."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from .. import ArgumentError, ArgumentTypeError, odeint
from ..arguments import kind_of, real_number, require_generator, require_number, require_whole

BATCHED = {"batched": True}  # every sample has its own clock


class LatentODE(nn.Module):
    """Series explained by a latent state that follows an ordinary differential equation.

    ``z(t0) ~ N(0, I)``, ``dz/dt = field(t, z)``, ``x_i ~ N(decoder(z(t_i)), noise**2)`` (Chen et al. 2018,
    section 5; Rubanova et al. 2019). The encoder reads a series and gives the approximate posterior of
    ``z(t0)``; ``-model.elbo(times, values, mask).mean()`` is the loss. Every sample of a batch is solved at
    its own times, with its own steps.

    Args:
        encoder: `RNNEncoder`, `ODERNNEncoder`, or a Module with the number ``latent`` that, called
            as ``encoder(times, values, mask, t0)``, returns a Normal over (B, latent). It is given what
            `elbo` checked: ``times`` of unobserved rows repeat the observed time before, unobserved
            ``values`` are 0, and ``mask`` has the shape of ``values``.
        field: callable ``field(t, z)`` on (B, latent), with ``t`` of shape (B, 1); may be compiled by
            `flashode.compile`, which makes a solve with gradients some 20 times as fast.
        decoder: Module from (..., latent) to (..., D).
        t0: time of the latent start, not later than any observation.
        noise: standard deviation of the observations; a Parameter is learned.
        method, rtol, atol: of the solves; an adaptive explicit method.

    Times are Tensors of shape (T,), for all samples, or (B, T), ascending along T; equal ones may follow
    each other. Values are (B, T, D). The mask, bool of shape (B, T) or (B, T, D), is True where a value was
    observed; None stands for everywhere. What was not observed may hold anything, NaN too, and counts
    for nothing, nor do the times of rows without any observation: pad series to one length as you like.

    Raises:
        ArgumentError, ArgumentTypeError: of all methods, where arguments do not have these shapes and
            dtypes, or times or observed values are not in order or not finite; the sample is named.
    """

    def __init__(self, encoder, field, decoder, *, t0=0.0, noise=0.1, method="dopri5", rtol=1e-3, atol=1e-4):
        super().__init__()
        if not isinstance(noise, torch.Tensor):
            require_number("noise", noise, "a standard deviation")
        if real_number(t0) is None or not math.isfinite(real_number(t0)):
            raise ArgumentError(f"t0 must be a finite number, a time, got {kind_of(t0)}")
        self.encoder, self.field, self.decoder = encoder, field, decoder
        self.t0, self.noise = float(t0), noise
        self.solver = {"method": method, "rtol": rtol, "atol": atol, "options": BATCHED}

    def posterior(self, times, values, mask=None) -> Normal:
        """The approximate posterior of ``z(t0)``, a Normal over (B, latent)."""
        return self.encoder(*_checked(times, values, mask, self.t0), self.t0)

    def elbo(self, times, values, mask=None, *, kl_weight=1.0) -> torch.Tensor:
        """A lower bound of the log density of every series, estimated from one latent sample.

        Args:
            kl_weight: of the divergence between posterior and prior; see `kl_annealing`.

        Returns:
            Tensor (B,): ``log p(values | z) - kl_weight KL(q(z) || N(0, I))``, over what was observed.
        """
        times, values, mask = _checked(times, values, mask, self.t0)
        posterior = self.encoder(times, values, mask, self.t0)
        means = self.decode(posterior.rsample(), times)
        _require(means.shape == values.shape, "decoder must return", tuple(values.shape), means)
        log_density = Normal(means, self.noise).log_prob(values)
        prior = Normal(torch.zeros_like(posterior.loc), torch.ones_like(posterior.scale))
        divergence = kl_divergence(posterior, prior).sum(-1)
        return torch.where(mask, log_density, 0).sum((1, 2)) - kl_weight * divergence

    def reconstruct(self, times, values, mask=None, *, at=None) -> torch.Tensor:
        """The series that starts at the posterior's mean, decoded.

        Args:
            at: times (S,) or (B, S) to decode at, between the observations or after them, which
                interpolates and extrapolates; None for ``times``.

        Returns:
            Tensor (B, S, D), without noise.
        """
        return self.decode(self.posterior(times, values, mask).mean, times if at is None else at)

    def sample(self, n, times, *, generator=None) -> torch.Tensor:
        """``n`` series from the prior at ``times`` (T,) or (n, T): Tensor (n, T, D), without noise."""
        require_whole("n", n)
        require_generator(generator)
        like = next(self.parameters())
        size = (n, self.encoder.latent)
        return self.decode(
            torch.randn(size, generator=generator, dtype=like.dtype, device=like.device), times
        )

    def decode(self, z0, times) -> torch.Tensor:
        """What the decoder makes of the solution through ``z0`` (B, latent) at ``times``: (B, T, D)."""
        times = _of_every_sample(times, len(z0))
        _require_order(times, torch.ones_like(times, dtype=torch.bool), self.t0)
        start = torch.full_like(times[:, :1], self.t0)
        zs = odeint(self.field, z0, torch.cat([start, times], 1), **self.solver)
        return self.decoder(zs[1:].transpose(0, 1))


class RNNEncoder(nn.Module):
    """A gated recurrent unit that reads a series from its end to its beginning (Chen et al. 2018).

    It is given values, mask, and the time from each observation to the one before it, of the first one
    to ``t0``; rows without an observation are passed over.

    Args:
        dim: D, numbers of an observation.
        latent: numbers of the latent state.
        hidden: numbers of the unit's state.
    """

    def __init__(self, dim, latent, hidden=32):
        super().__init__()
        _require_sizes(dim, latent, hidden)
        self.latent = latent
        self.gru = nn.GRU(2 * dim + 1, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 2 * latent)

    def forward(self, times, values, mask, t0) -> Normal:
        late, early, rows, counts = _backwards(times, values, mask, t0)
        rows = torch.cat([rows, (late - early)[..., None].to(rows)], -1)
        states, _ = self.gru(rows)
        last = (counts - 1)[:, None, None].expand(-1, 1, states.shape[-1])
        return _normal(self.head(states.gather(1, last)[:, 0]))


class ODERNNEncoder(nn.Module):
    """A gated recurrent unit whose state follows a differential equation between observations.

    It reads a series from its end to its beginning, and the state is solved on to ``t0`` (Rubanova et al.
    2019, Latent ODEs for irregularly-sampled time series, algorithm 1). Rows without an observation
    are passed over. One solve an observation: far slower than `RNNEncoder`, unless ``field`` is compiled.

    Args:
        dim: D, numbers of an observation.
        latent: numbers of the latent state.
        field: callable ``field(t, h)`` on (B, hidden), with ``t`` of shape (B, 1).
        hidden: numbers of the unit's state.
        method, rtol, atol: of the solves; an adaptive explicit method.
    """

    def __init__(self, dim, latent, field, hidden=32, *, method="dopri5", rtol=1e-3, atol=1e-4):
        super().__init__()
        _require_sizes(dim, latent, hidden)
        self.latent, self.field = latent, field
        self.cell = nn.GRUCell(2 * dim, hidden)
        self.head = nn.Linear(hidden, 2 * latent)
        self.solver = {"method": method, "rtol": rtol, "atol": atol, "options": BATCHED}

    def forward(self, times, values, mask, t0) -> Normal:
        late, early, rows, counts = _backwards(times, values, mask, t0)
        gaps = torch.stack([late, early], -1)
        h = rows.new_zeros(len(rows), self.cell.hidden_size)
        for i, row in enumerate(rows.unbind(1)):
            h = torch.where((i < counts)[:, None], self.cell(row, h), h)
            h = odeint(self.field, h, gaps[:, i], **self.solver)[-1]
        return _normal(self.head(h))


def kl_annealing(step, warmup) -> float:
    """A weight of the divergence that grows from 0 to 1 over the first ``warmup`` steps of a training.

    It lets the decoder learn to use the latent state before the prior pulls at it (Bowman et al. 2016,
    Generating sentences from a continuous space).
    """
    return min(1.0, step / warmup) if warmup > 0 else 1.0


def _require_sizes(dim, latent, hidden):
    for name, size in (("dim", dim), ("latent", latent), ("hidden", hidden)):
        require_whole(name, size)


def _normal(parameters) -> Normal:
    mean, log_variance = parameters.chunk(2, -1)
    return Normal(mean, torch.exp(log_variance / 2))


def _backwards(times, values, mask, t0):
    """The observed rows of every sample, the last one first, and after them rows to be ignored.

    Returns:
        Times of the rows and of the ones before them in the series, ``t0`` for the first, both (B, L) and
        equal in rows to be ignored; values and mask side by side (B, L, 2 D); how many there are (B,).
    """
    seen = mask.any(-1)
    counts = seen.sum(1)
    order = (times.shape[1] - 1) - seen.flip(1).int().argsort(dim=1, descending=True, stable=True)
    order = order[:, : int(counts.max())]
    read = torch.arange(order.shape[1], device=times.device) < counts[:, None]
    late = torch.where(read, times.gather(1, order), t0)
    early = torch.cat([late[:, 1:], torch.full_like(late[:, :1], t0)], 1)
    rows = torch.cat([values, mask.to(values)], -1)
    return late, early, rows.gather(1, order[..., None].expand(-1, -1, rows.shape[-1])), counts


def _checked(times, values, mask, t0):
    """Times (B, T) in order, values without what was not observed, and a mask of their shape."""
    if not isinstance(values, torch.Tensor) or values.ndim != 3 or len(values) == 0:
        _refuse("values must be", "a Tensor of shape (samples, times, D), of at least one sample", values)
    times = _of_every_sample(times, len(values))
    _require(times.shape == values.shape[:2], "times must be", (values.shape[1],), times)
    if mask is None:
        mask = torch.ones_like(values, dtype=torch.bool)
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        raise ArgumentTypeError(
            f"mask must be a bool Tensor, True where a value was observed, got {_kind(mask)}; call mask.bool()"
        )
    if mask.shape == times.shape:
        mask = mask[..., None].expand(values.shape)
    _require(mask.shape == values.shape, f"mask must be {tuple(times.shape)} or", tuple(values.shape), mask)
    seen = mask.any(-1)
    if not seen.any(1).all():
        sample = (~seen.any(1)).nonzero()[0].item()
        raise ArgumentError(f"mask: sample {sample} has no observation; leave it out")
    _require_order(times, seen, t0)
    values = torch.where(mask, values, 0)
    if not values.isfinite().all():
        sample, row, entry = (~values.isfinite()).nonzero()[0].tolist()
        raise ArgumentError(
            f"values must be finite where observed; sample {sample} has {values[sample, row, entry]} at index "
            f"{row}, entry {entry}: set its mask to False"
        )
    return torch.where(seen, times, t0).cummax(1).values, values, mask


def _of_every_sample(times, samples):
    """Times (B, T) of times (T,) or (B, T)."""
    if not isinstance(times, torch.Tensor) or not times.is_floating_point():
        raise ArgumentTypeError(f"times must be a floating point Tensor, got {_kind(times)}")
    if times.ndim == 1:
        times = times.expand(samples, -1)
    if times.ndim != 2 or len(times) != samples:
        _refuse("times must be", f"of shape (T,) or ({samples}, T)", times)
    return times


def _require_order(times, seen, t0):
    """Observed times ascend from ``t0``."""
    highest = torch.where(seen, times, t0).cummax(1).values
    before = torch.cat([torch.full_like(highest[:, :1], t0), highest[:, :-1]], 1)
    wrong = seen & ~((times >= before) & times.isfinite())
    if wrong.any():
        sample, index = wrong.nonzero()[0].tolist()
        raise ArgumentError(
            f"times must be finite and ascend from t0 = {t0:g} in every sample; sample {sample} has "
            f"{times[sample, index]:g} at index {index}, after {before[sample, index]:g}"
        )


def _require(met, must, shape, given):
    if not met:
        _refuse(must, f"of shape {shape}", given)


def _refuse(must, what, given):
    raise ArgumentError(f"{must} {what}, got {_kind(given)}")


def _kind(given) -> str:
    if not isinstance(given, torch.Tensor):
        return type(given).__name__
    return f"a {given.dtype} Tensor of shape {tuple(given.shape)}"
