"""Continuous normalizing flows: densities that a field carries along."""

from __future__ import annotations

import functools
import math

import torch
from torch import nn
from torch.distributions import Distribution, Independent, Normal, constraints

from .. import ArgumentError, ArgumentTypeError, CompiledField, compile, odeint, odeint_adjoint
from ..arguments import kind_of, real_number, require_whole
from .divergence import exact_divergence, hutchinson_divergence, per_sample

TRACES = ("exact", "hutchinson")
NOISES = ("rademacher", "gaussian")
ADJOINTS = (None, "checkpoint", "backsolve", "interpolated")
# An absolute tolerance that no error exceeds: what has it does not choose the steps.
UNBOUNDED = 1e30


class CNF(nn.Module, Distribution):
    """A continuous normalizing flow: a distribution whose samples are those of a base, carried along by a field.

    A base sample ``z`` at ``t[0]`` becomes data ``x`` at ``t[1]`` by ``dz/dt = field(t, z)``; the log-density along
    its path falls by the divergence of the field (Chen et al. 2018, Neural ordinary differential equations,
    arXiv:1806.07366, theorem 1). `log_prob` solves from data back to the base, `rsample` from the base to data. It is
    a Module, trained by its parameters, and a `torch.distributions.Distribution` without batch shape::

        flow = CNF(flashode.compile(MLPField(2, time="squash")))
        loss = -flow.log_prob(x).mean()          # x of shape (n, 2)
        x = flow.sample(1000)

    Args:
        field: Module called as ``field(t, z)`` with ``z`` of shape (n, *event); samples must not depend on each other.
            A field made by `flashode.compile` has the log-density and its gradients compiled as well.
        trace: ``"exact"``: by ``field.slope_and_divergence(t, z)`` where the field has such a method, as `GatedSum`
            does, else by a vector-Jacobian product per dimension. ``"hutchinson"``: an estimate without bias from
            one product, with a noise drawn for every solve (Grathwohl et al. 2019, FFJORD, arXiv:1810.01367).
        t: times of the base and of the data.
        base: `torch.distributions.Distribution` of the event's shape, without batch shape; standard normal of size
            ``field.dim`` by default, in the precision of the flow.
        noise: of the estimate, ``"rademacher"`` (signs, least variance) or ``"gaussian"``.
        method, rtol, atol, options: of every solve, as for `odeint`.
        adjoint: how gradients go back through a solve: as ``adjoint`` of `odeint_adjoint`; None for `odeint`.
        log_density_in_norm: whether the errors of the log-density and of `log_prob_and_costs` choose the steps along
            with those of the path. They feed back into nothing, so without them solves take fewer steps and
            their errors go unseen.

    Raises:
        ArgumentError, ArgumentTypeError: an argument cannot be used.
    """

    arg_constraints = {}

    def __init__(
        self, field, *, trace="exact", t=(0.0, 1.0), base=None, noise="rademacher", method="dopri5", rtol=1e-5,
        atol=1e-5, options=None, adjoint="checkpoint", log_density_in_norm=True,
    ):  # fmt: skip
        nn.Module.__init__(self)
        if not isinstance(field, nn.Module):
            raise ArgumentTypeError(
                f"field must be a Module called as field(t, z), got {type(field).__name__}"
            )
        _require_one_of("trace", trace, TRACES)
        _require_one_of("noise", noise, NOISES)
        _require_one_of("adjoint", adjoint, ADJOINTS)
        self.field, self.trace, self.noise, self.adjoint = field, trace, noise, adjoint
        self.t0, self.t1 = _interval(t)
        self.method, self.rtol, self.atol, self.options = method, rtol, atol, options
        self.log_density_in_norm = log_density_in_norm
        self._given = base
        if base is None:
            if not isinstance(getattr(field, "dim", None), int):
                raise ArgumentError("base is None, and field has no attribute dim, its event size; give base")
            self.register_buffer("_zero", torch.zeros(field.dim), persistent=False)
        elif not isinstance(base, Distribution) or base.batch_shape:
            raise ArgumentError(
                f"base must be a Distribution without batch shape, got {base!r}; see torch.distributions.Independent"
            )
        Distribution.__init__(self, torch.Size(), self.base.event_shape, validate_args=False)
        bare = field.func if isinstance(field, CompiledField) else field
        dynamics = {costs: _Dynamics(bare, trace, costs) for costs in (False, True)}
        # In a dict, not as submodules, which would put their parameters twice into the state_dict.
        self._dynamics = dynamics if bare is field else {costs: compile(d) for costs, d in dynamics.items()}

    @property
    def base(self) -> Distribution:
        """The distribution at ``t[0]``."""
        if self._given is not None:
            return self._given
        return Independent(Normal(self._zero, torch.ones_like(self._zero)), 1)

    @property
    def has_rsample(self):
        return self.base.has_rsample

    @property
    def support(self):
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape, _instance=None):
        raise NotImplementedError("a CNF has no batch shape; draw more samples")

    # ---- between base and data ---------------------------------------------------------------

    def forward(self, z, t=None):
        """Points that base points ``z``, of shape (..., *event), have become at time ``t``, the data's by default."""
        return self._carried(z, self.t0, self._time(t))

    def inverse(self, x, t=None):
        """Base points of the points ``x``, of shape (..., *event), of time ``t``, the data's by default."""
        return self._carried(x, self._time(t), self.t0)

    def rsample(self, sample_shape=torch.Size(), t=None):
        """Samples with gradients, of shape (*sample_shape, *event), as they are at time ``t``, data by default.

        ``sample_shape`` may be an int. The base must have ``rsample``.
        """
        return self(self.base.rsample(_size(sample_shape)), t)

    def sample(self, sample_shape=torch.Size(), t=None):
        """Samples without gradients, of any base; otherwise as `rsample`."""
        with torch.no_grad():
            return self(self.base.sample(_size(sample_shape)), t)

    # ---- densities -----------------------------------------------------------------------------

    def log_prob(self, x, t=None):
        """Log-density of time ``t``, the data's by default, at ``x`` of shape (..., *event); of shape (...)."""
        return self._log_prob(x, self._time(t), costs=False)[0]

    def log_prob_and_costs(self, x):
        """`log_prob`, and what the paths of ``x`` to the base cost, in one solve: to regularise a training with.

        Returns:
            Three Tensors of shape (...): the log-density, the kinetic energy, which is the integral of ``|field|^2``
            along the path, and the integral of the squared Frobenius norm of the field's Jacobian, an estimate with
            ``trace="hutchinson"`` (Finlay et al. 2020, How to train your neural ODE, arXiv:2002.02798).
        """
        return self._log_prob(x, self.t1, costs=True)

    def _log_prob(self, x, t, costs):
        flat = self._flat(x)
        sums = [flat.new_zeros(len(flat)) for _ in range(3 if costs else 1)]
        if t != self.t0 and len(flat):
            noise = () if self.trace == "exact" else (self._drawn(flat),)
            flat, *sums = self._solved(self._dynamics[costs], (flat, *sums), t, self.t0, noise)
        # torch's Independent cannot sum over the event of no samples.
        log_prob = self.base.log_prob(flat) - sums[0] if len(flat) else sums[0]
        shape = x.shape[: x.ndim - len(self.event_shape)]
        return tuple(y.reshape(shape) for y in (log_prob, *(cost.abs() for cost in sums[1:])))

    def _drawn(self, like):
        if self.noise == "gaussian":
            return torch.randn_like(like)
        return torch.randint_like(like, 2) * 2 - 1

    # ---- solves --------------------------------------------------------------------------------

    def _carried(self, y, begin, end):
        flat = self._flat(y)
        if begin == end or not len(flat):
            return y
        return self._solved(self.field, flat, begin, end).reshape(y.shape)

    def _solved(self, func, y0, begin, end, args=()):
        solver = dict(method=self.method, rtol=self.rtol, atol=self.atol, options=self.options, args=args)
        if isinstance(y0, tuple) and not self.log_density_in_norm:
            solver["atol"] = (self.atol, *[UNBOUNDED] * (len(y0) - 1))
        times = _times(begin, end)
        if self.adjoint is None:
            ys = odeint(func, y0, times, **solver)
        else:
            ys = odeint_adjoint(func, y0, times, adjoint=self.adjoint, **solver)
        return tuple(y[-1] for y in ys) if isinstance(ys, tuple) else ys[-1]

    def _flat(self, y):
        """Points as a batch, of shape (n, *event)."""
        if not isinstance(y, torch.Tensor):
            raise ArgumentTypeError(f"points must be a Tensor, got {type(y).__name__}")
        event = self.event_shape
        if y.shape[y.ndim - len(event) :] != event or y.ndim < len(event):
            raise ArgumentError(
                f"points must have shape (..., {', '.join(map(str, event))}), got {tuple(y.shape)}"
            )
        return y.reshape(y.shape[: y.ndim - len(event)].numel(), *event)

    def _time(self, t) -> float:
        if t is None:
            return self.t1
        number = real_number(t)
        if number is None:
            raise ArgumentTypeError(f"t must be a number, a time of the flow, got {kind_of(t)}")
        t = number
        if not min(self.t0, self.t1) <= t <= max(self.t0, self.t1):
            raise ArgumentError(f"t must be from {self.t0:g} to {self.t1:g}, got {t:g}")
        return t

    __repr__ = nn.Module.__repr__


class _Dynamics(nn.Module):
    """The field along with what is integrated along its paths: the log-density's fall, and costs."""

    def __init__(self, field, trace, costs):
        super().__init__()
        self.field, self.trace, self.costs = field, trace, costs

    def forward(self, t, state, *noise):
        z = state[0]
        if self.costs:
            measure = exact_divergence if self.trace == "exact" else hutchinson_divergence
            slope, divergence, jacobian = measure(self.field, t, z, *noise, frobenius=True)
            return slope, -divergence, per_sample(slope).square().sum(1), jacobian
        if self.trace == "hutchinson":
            slope, divergence = hutchinson_divergence(self.field, t, z, *noise)
        elif hasattr(self.field, "slope_and_divergence"):
            slope, divergence = self.field.slope_and_divergence(t, z)
        else:
            slope, divergence = exact_divergence(self.field, t, z)
        return slope, -divergence


class GatedSum(nn.Module):
    """The field of a flow as a sum of gated units, all of whose parameters a hypernetwork gives for the time:
    ``f(t, z) = sum_i sigma_i(t) w_i(t) tanh(u_i(t) . z + b_i(t))``.

    Chen et al. 2018, arXiv:1806.07366, section 4; hypernetworks: Ha et al. 2016, arXiv:1609.09106. Its divergence has
    a closed form, in which nothing is differentiated.

    Args:
        dim: size of a state; called with z of shape (..., dim).
        units: number of terms.
        hidden: width of the two hidden layers of the hypernetwork.
    """

    def __init__(self, dim: int, units: int = 64, hidden: int = 32):
        super().__init__()
        for name, value in (("dim", dim), ("units", units), ("hidden", hidden)):
            require_whole(name, value)
        self.dim, self.units = dim, units
        self.hyper = nn.Sequential(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh())
        self.w, self.u = nn.Linear(hidden, units * dim), nn.Linear(hidden, units * dim)
        self.b, self.gate = nn.Linear(hidden, units), nn.Linear(hidden, units)
        with torch.no_grad():  # u and b of the size of the data, w so small that the sum is, too
            for head in (self.w, self.u, self.b, self.gate):
                head.bias.normal_()
            for x in self.w.parameters():
                x /= math.sqrt(units)

    def parameters_at(self, t):
        """Gated weights ``sigma_i w_i`` (units, dim), ``u_i`` (units, dim) and ``b_i`` (units,) at a time."""
        features = self.hyper(t.reshape(1))
        w, u = (head(features).reshape(self.units, self.dim) for head in (self.w, self.u))
        return torch.sigmoid(self.gate(features))[:, None] * w, u, self.b(features)

    def forward(self, t, z):
        w, u, b = self.parameters_at(t)
        return torch.tanh(z @ u.t() + b) @ w

    def slope_and_divergence(self, t, z):
        """The slope at z of shape (..., dim), and the trace of its Jacobian, of shape (...)."""
        w, u, b = self.parameters_at(t)
        bent = torch.tanh(z @ u.t() + b)
        return bent @ w, (1 - bent.square()) @ (w * u).sum(1)


def _require_one_of(name, value, allowed):
    if value not in allowed:
        raise ArgumentError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _size(sample_shape) -> torch.Size:
    shape = sample_shape if isinstance(sample_shape, (tuple, list)) else (sample_shape,)
    for size in shape:
        require_whole("every number in sample_shape", size, 0)
    return torch.Size(shape)


def _interval(t) -> tuple[float, float]:
    try:
        t0, t1 = (float(x) for x in t)
    except (TypeError, ValueError, OverflowError):
        raise ArgumentTypeError(f"t must be two numbers, the times of base and data, got {t!r}") from None
    if not (math.isfinite(t0) and math.isfinite(t1) and t0 != t1):
        raise ArgumentError(f"t must be two different finite times, of base and data, got {t!r}")
    return t0, t1


@functools.lru_cache(maxsize=64)
def _times(begin, end) -> torch.Tensor:
    """The same Tensor every time, by which compiled fields know a call like the one before."""
    return torch.tensor([begin, end], dtype=torch.float64)
