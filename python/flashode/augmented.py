"""The augmented problem of a backward solve: the state, its adjoint, and integrals along the way."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from . import arguments
from .errors import Status
from .problem import Problem
from .progress import Progress


@dataclass
class Path:
    """A solve as one polynomial a step: what its dense output makes of it.

    Times are on the forward clock of the solve. ``polynomials[i]`` has shape (1 + degree, *state),
    with one degree for all, and holds y at ``begins[i]`` and the coefficients of x, x^2, ..., where x runs from 0 there to 1
    at ``ends[i]``. ``shifts[i]`` are zeros that carry the gradients of both ends, or None.
    """

    begins: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    polynomials: list[torch.Tensor] = field(default_factory=list)
    shifts: list[tuple] = field(default_factory=list)
    as_polynomials = True

    def add(self, t0: float, t1: float, polynomial: torch.Tensor, shift0=None, shift1=None):
        """Called by an engine for every step it accepts; a step begins where the one before it ended."""
        self.begins.append(t0)
        self.ends.append(t1)
        self.polynomials.append(polynomial)
        self.shifts.append((shift0, shift1))

    def release(self) -> list[torch.Tensor]:
        """Hands over the polynomials."""
        polynomials, self.polynomials = self.polynomials, []
        return polynomials

    def step_at(self, t: float) -> int:
        """Number of the step that ends at or after a time."""
        return min(bisect.bisect_left(self.ends, t), len(self.ends) - 1)

    def __call__(self, t: float) -> torch.Tensor:
        """y at a time of the solve."""
        i = self.step_at(t)
        x = (t - self.begins[i]) / (self.ends[i] - self.begins[i])
        y, *coefficients = self.polynomials[i]
        return y + sum(x ** (power + 1) * c for power, c in enumerate(coefficients))


@dataclass(frozen=True, eq=False)
class Augmented:
    """Solve for ``(vjp_t, y, adj_y, *adj_params)`` from the last output of a solve to its first.

    With ``a(t) = dL/dy(t)``: ``da/dt = -a^T df/dy``, ``d vjp_t/dt = -a^T df/dt`` and
    ``d adj_params/dt = -a^T df/dp``. ``vjp_t`` and ``adj_params`` feed back into nothing: they are
    integrals. ``a`` jumps by the gradient of an output wherever there is one.

    Attributes:
        problem: the state's own solve, backwards; its times are those of the outputs, last first,
            its callbacks and its norm are given the augmented state as a tuple.
        ys, grad_ys: outputs and their gradients, shape (T, *flat state), first one first.
        jumps: whether the gradient of an output is not all zero, last one first.
        params: tensors that get a gradient.
        needs_t: whether ``vjp_t`` is wanted.
        seminorm: whether ``adj_params`` are left out of step-size control.
        path: y as a function of time, where it is not to be solved for again; else None.
        first_step: size of the first step to try, or None to choose one.
        examine: called once, with the first slope, the leaf y and the leaf t behind it.
    """

    problem: Problem
    ys: torch.Tensor
    grad_ys: torch.Tensor
    jumps: list[bool]
    params: tuple[torch.Tensor, ...]
    needs_t: bool
    seminorm: bool
    path: Path | None
    first_step: float | None
    examine: Callable

    @property
    def tolerances(self) -> tuple[float, float]:
        """rtol and atol of the integrals: the least of the state's."""
        return tuple(
            tol.min().item() if isinstance(tol, torch.Tensor) else tol
            for tol in (self.problem.rtol, self.problem.atol)
        )

    def members(self, vjp_t, y, adj_y, adj_params):
        """The augmented state as callbacks and norms are given it."""
        p = self.problem
        split = (lambda x: (x,)) if p.shapes is None else p.unflatten
        return (vjp_t, *split(y), *split(adj_y), *adj_params)

    def norm_value(self, vjp_t, y, adj_y, adj_params) -> float:
        """The caller's norm of the scaled errors, as a non-negative float."""
        scaled = self.members(vjp_t, y, adj_y, adj_params)
        return arguments.norm_result(
            self.problem.norm(scaled), lambda: all(torch.isfinite(x).all() for x in scaled)
        )

    def report(self, callback, t0: float, vjp_t, y, adj_y, adj_params, dt: float):
        """Calls one of the caller's callbacks, if there is one, with ``(t0, augmented state, dt)``."""
        if isinstance(callback, Progress):
            callback.advance(t0, dt)
            callback = callback.inner
        if callback is not None:
            t0, dt = (
                torch.tensor(x, dtype=torch.float64, device=y.device)
                for x in (self.problem.direction * t0, dt)
            )
            callback(t0, tuple(x.clone() for x in self.members(vjp_t, y, adj_y, adj_params)), dt)


@dataclass
class Gradients:
    """What an engine makes of an `Augmented` problem.

    ``drift`` is the largest distance, in tolerances, between the state as it was rebuilt at an
    output and as it was stored, and ``drift_t`` the time of that output. The rest is as in
    `solution.Outcome`; ``k`` and ``adj_k`` are slopes of the last trial step.
    """

    status: Status
    vjp_t: torch.Tensor
    adj_y: torch.Tensor
    adj_params: list[torch.Tensor]
    nfe: int = 0
    accepted: int = 0
    rejected: int = 0
    t: float = math.nan
    dt: float = math.nan
    error_ratio: float = math.nan
    k: list[torch.Tensor] = field(default_factory=list)
    adj_k: list[torch.Tensor] = field(default_factory=list)
    y1: torch.Tensor | None = None
    drift: float = 0.0
    drift_t: float = math.nan
