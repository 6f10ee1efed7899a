"""The base classes of solvers: what a subclass of a user's own is built on."""

import abc

import torch

import flashode
from flashode.errors import ArgumentError
from flashode.options import MAX_NUM_STEPS, even_grid

from .event_handling import find_event
from .misc import _all_callback_names, _evaluate, _field_of, _handle_unused_kwargs, _null_callback


class AdaptiveStepsizeODESolver(metaclass=abc.ABCMeta):
    """A solver that is asked for one output time after the other: `_advance`."""

    def __init__(self, dtype, y0, norm, **unused_kwargs):
        _handle_unused_kwargs(self, unused_kwargs)
        self.y0, self.dtype, self.norm = y0, dtype, norm

    def _before_integrate(self, t):
        pass

    @abc.abstractmethod
    def _advance(self, next_t):
        """The state at ``next_t``."""

    @classmethod
    def valid_callbacks(cls):
        return set()

    def integrate(self, t):
        t = t.to(self.y0.device, self.dtype)
        self._before_integrate(t)
        return torch.stack([self.y0, *(self._advance(next_t) for next_t in t[1:])])


class AdaptiveStepsizeEventODESolver(AdaptiveStepsizeODESolver, metaclass=abc.ABCMeta):
    @abc.abstractmethod
    def _advance_until_event(self, event_fn):
        """The time and the state at which ``event_fn`` changes sign."""

    def integrate_until_event(self, t0, event_fn):
        self._before_integrate(t0.to(self.y0.device, self.dtype).reshape(-1))
        event_time, y1 = self._advance_until_event(event_fn)
        return event_time, torch.stack([self.y0, y1])


class FixedGridODESolver(metaclass=abc.ABCMeta):
    """A solver that steps over a grid: a subclass gives the increment of one step, `_step_func`."""

    order: int

    def __init__(
        self, func, y0, step_size=None, grid_constructor=None, interp="linear", perturb=False, **unused_kwargs
    ):
        if step_size is not None and grid_constructor is not None:
            raise ArgumentError("step_size and grid_constructor are mutually exclusive arguments.")
        if interp not in ("linear", "cubic"):
            raise ArgumentError(f"Unknown interpolation method {interp!r}; it is 'linear' or 'cubic'")
        self.atol = unused_kwargs.pop("atol", 1e-9)
        for name in ("rtol", "norm"):
            unused_kwargs.pop(name, None)
        _handle_unused_kwargs(self, unused_kwargs)
        self.func, self.y0, self.dtype, self.device = func, y0, y0.dtype, y0.device
        self.step_size, self.interp, self.perturb = step_size, interp, perturb
        if step_size is not None:
            grid_constructor = self._grid_constructor_from_step_size(step_size)
        self.grid_constructor = grid_constructor or (lambda func, y0, t: t)

    @classmethod
    def valid_callbacks(cls):
        return {"callback_step"}

    @staticmethod
    def _grid_constructor_from_step_size(step_size):
        def constructor(func, y0, t):
            return even_grid(t.to("cpu", torch.float64), t.tolist(), float(step_size)).to(t)

        return constructor

    @abc.abstractmethod
    def _step_func(self, func, t0, dt, t1, y0):
        """``y(t1) - y0`` and the slope at ``t0``, for one step of length ``dt``."""

    def integrate(self, t):
        grid = self.grid_constructor(self.func, self.y0, t)
        if grid[0] != t[0] or grid[-1] != t[-1]:
            raise ArgumentError(
                f"the grid must run from t[0] = {t[0]} to t[-1] = {t[-1]}, it runs from {grid[0]} to {grid[-1]}"
            )
        on_step = getattr(self.func, "callback_step", _null_callback)
        rows, y0 = [self.y0], self.y0
        for t0, t1 in zip(grid[:-1], grid[1:]):
            on_step(t0, y0, t1 - t0)
            dy, f0 = self._step_func(self.func, t0, t1 - t0, t1, y0)
            y1 = y0 + dy
            between = None
            while len(rows) < len(t) and t1 >= t[len(rows)]:
                between = between or self._between(t0, t1, y0, y1, f0)
                rows.append(between(t[len(rows)]))
            y0 = y1
        return torch.stack(rows)

    def integrate_until_event(self, t0, event_fn):
        if self.step_size is None:
            raise ArgumentError(
                "Event handling for fixed step solvers currently requires `step_size` to be provided in options."
            )
        t0, y0 = t0.to(self.y0.device, self.dtype.to_real()), self.y0
        sign0 = torch.sign(event_fn(t0, y0))
        for _ in range(MAX_NUM_STEPS):
            t1 = t0 + self.step_size
            dy, f0 = self._step_func(self.func, t0, t1 - t0, t1, y0)
            y1 = y0 + dy
            if torch.sign(event_fn(t1, y1)) != sign0:
                between = self._between(t0, t1, y0, y1, f0)
                event_time, y1 = find_event(between, sign0, t0, t1, event_fn, self.atol)
                return event_time, torch.stack([self.y0, y1])
            t0, y0 = t1, y1
        raise RuntimeError(f"Reached maximum number of iterations {MAX_NUM_STEPS} before an event.")

    def _between(self, t0, t1, y0, y1, f0):
        """The state as a function of a time in the step."""
        if self.interp == "linear":
            return lambda t: self._linear_interp(t0, t1, y0, y1, t)
        f1 = _evaluate(self.func, t1, y1)
        return lambda t: self._cubic_hermite_interp(t0, y0, f0, t1, y1, f1, t)

    def _linear_interp(self, t0, t1, y0, y1, t):
        if t == t0 or t == t1:
            return y0 if t == t0 else y1
        return y0 + (t - t0) / (t1 - t0) * (y1 - y0)

    def _cubic_hermite_interp(self, t0, y0, f0, t1, y1, f1, t):
        """Values and slopes at both ends (Hairer, Nørsett, Wanner I, II.6)."""
        dt = t1 - t0
        x = (t - t0) / dt
        chord = (1 - x) * y0 + x * y1
        return chord + x * (x - 1) * ((1 - 2 * x) * (y1 - y0) + (x - 1) * dt * f0 + x * dt * f1)


class _WholeSolver(metaclass=abc.ABCMeta):
    """A method that is served whole: it has no step of its own to override."""

    method: str

    def __init__(self, func, y0, rtol=1e-7, atol=1e-9, **options):
        self.func, self.y0, self.rtol, self.atol, self.options = func, y0, rtol, atol, options
        self.dtype, self.device = y0.dtype, y0.device

    @classmethod
    def valid_callbacks(cls):
        method = flashode.methods.METHODS[cls.method]
        return set(_all_callback_names) if method.adaptive else {"callback_step"}

    def _solve(self, t, event_fn=None):
        return flashode.odeint(
            _field_of(self.func), self.y0, t, rtol=self.rtol, atol=self.atol, method=self.method,
            options=self.options, event_fn=event_fn,
        )  # fmt: skip

    def integrate(self, t):
        return self._solve(t)

    def integrate_until_event(self, t0, event_fn):
        return self._solve(torch.stack([t0, t0.detach() + 1]), event_fn)
