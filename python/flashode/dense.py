"""A finished solve as a function of time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .arguments import kind_of, real_number, require_dense
from .augmented import Path
from .errors import ArgumentError, ArgumentTypeError
from .problem import Problem, members_of
from .pytrees import Tree
from .solution import Outcome
from .transforms import is_batched


@dataclass(frozen=True, eq=False, repr=False)
class DenseOutput:
    """The solution at any time of the solved interval: ``sol(t)``.

    Between the ends of the steps it is the method's interpolant, of which ``ys`` is made too; there
    it is the computed state itself. It can be differentiated by ``t``, and where the solve recorded
    gradients, by all that the solve depends on: state, parameters, ``args`` and its own times.
    Holds ``1 + degree`` states a step: 5 for `dopri5`, 8 for `dopri8`, 2 where it is linear.

    Attributes:
        t0, t1: the solved interval on the caller's clock; it ends at the event, or with the last
            accepted step of a solve that failed.

    Example:
        >>> t = torch.tensor([0.0, 1.0], dtype=torch.float64)
        >>> sol = solve(lambda t, y: -y, torch.ones(1), t, dense=True).sol
        >>> sol(torch.tensor([0.5, 0.25])).shape, round(sol.derivative(0.0).item(), 3)
        (torch.Size([2, 1]), -1.0)
    """

    t0: float
    t1: float
    direction: float
    # Of the steps, and of one more, which begins where the last one ended: every end of a step is a
    # beginning, where the polynomial is its constant term to the last bit. Times are float64, on the
    # forward clock, on the CPU.
    begins: torch.Tensor
    lengths: torch.Tensor
    polynomials: torch.Tensor
    eps: float  # rounding of the solve's own times
    offsets: list[int]
    shapes: tuple[torch.Size, ...] | None
    dtypes: tuple[torch.dtype, ...] | None
    tree: Tree | None = None  # the structure of the state, where it is more than a tuple

    def __call__(self, t):
        """y at a time, or at every time of a Tensor, in any order.

        Args:
            t: number, or real Tensor of any shape S on any device, from ``t0`` to ``t1``; the
                rounding of its dtype, and that of the solve's times, is let pass. To look, a
                Tensor on a GPU is waited for.

        Returns:
            Tensor of shape (*S, *state), or what the state is made of such Tensors.

        Raises:
            ArgumentError: a time lies outside. ArgumentTypeError: ``t`` holds no times.
        """
        t = _as_times(t)
        step, x, _ = self._place(t)
        return self._combine(t.shape, step, self._powers(x))

    def derivative(self, t):
        """dy/dt of the interpolant, shaped like ``self(t)``.

        Where two steps meet it is that of the later one, in the direction of the solve: with linear
        interpolation it jumps there. ArgumentError as above, and where the solve made no step.
        """
        t = _as_times(t)
        if self.t0 == self.t1:
            raise ArgumentError(
                f"the solve made no step from t={self.t0!r}: nothing is known of the slope there"
            )
        step, x, length = self._place(t)
        powers = self._powers(x)
        by_x = [torch.zeros_like(x), *((i + 1) * power for i, power in enumerate(powers[:-1]))]
        return self._combine(t.shape, step, [self.direction * w / length for w in by_x])

    def __repr__(self):
        shapes = [tuple(self.polynomials.shape[2:])] if self.shapes is None else [*map(tuple, self.shapes)]
        return (
            f"DenseOutput(t = {self.t0:g} … {self.t1:g}, state {', '.join(map(str, shapes))}; "
            f"{len(self.begins) - 1} polynomials of degree {self.polynomials.shape[1] - 1})"
        )

    def __getstate__(self):
        """For copies and pickles, which hold values without their graphs."""
        return {
            name: value.detach() if isinstance(value, torch.Tensor) else value
            for name, value in vars(self).items()
        }

    def _place(self, t):
        """The step that each time lies in, the place there, from 0 to 1, and the step's length."""
        t = self._forward(t)
        step = torch.searchsorted(self.begins.detach(), t.detach(), right=True) - 1
        begin, length = self.begins[step], self.lengths[step]
        return step, (t - begin) / length, length

    def _forward(self, given):
        """Times on the forward clock, flat, and none outside."""
        t = self.direction * given.to("cpu", torch.float64).reshape(-1)
        begin, end = self.direction * self.t0, self.direction * self.t1
        inside = t.detach().clamp(begin, end)
        eps = max(torch.finfo(given.dtype).eps, self.eps)
        outside = ~((t.detach() - inside).abs() <= eps * max(abs(begin), abs(end)))  # NaN too
        if outside.any():
            first, count = self.direction * t[outside][0].item(), int(outside.sum())
            raise ArgumentError(
                f"t = {first!r} is outside the solved interval, {self.t0!r} to {self.t1!r}"
                + (f", and so are {count - 1} other of {t.numel()} times" if count > 1 else "")
            )
        return t + (inside - t.detach())

    def _powers(self, x):
        """1, x, x^2, ... as far as the polynomials go."""
        powers = [torch.ones_like(x)]
        for _ in range(self.polynomials.shape[1] - 1):
            powers.append(powers[-1] * x)
        return powers

    def _combine(self, shape, step, weights):
        """The states that the coefficients give with these weights, one for each time."""
        like = self.polynomials
        wide = torch.promote_types(like.dtype, torch.float32)
        step = step.to(like.device)
        y = 0
        # Term by term: all coefficients at all times would take many times the memory of the result.
        for w, coefficient in zip(weights, like.unbind(1)):
            w = w.to(wide.to_real()).to(like.device).reshape(-1, *[1] * (coefficient.ndim - 1))
            y = y + w * coefficient.index_select(0, step).to(wide)
        y = y.to(like.dtype).reshape((*shape, *like.shape[2:]))
        if self.shapes is None:
            return y
        members = members_of(y, self.offsets, self.shapes, self.dtypes, batch=len(shape))
        return members if self.tree is None else self.tree.rebuild(members)


def dense_output(problem: Problem, path: Path, outcome: Outcome) -> DenseOutput:
    """What an engine recorded of a solve, as a function; takes the polynomials out of ``path``."""
    begin, end, polynomials = problem.times[0], problem.times[-1], path.release()
    if not polynomials:  # one time only, or an event or a failure at the start
        end, polynomials = begin, [problem.y0[None]]
        begins, lengths = torch.tensor([[begin], [1.0]], dtype=torch.float64, device="cpu")
    else:
        begins, lengths = _clock(path)
        if not outcome.status.ok:
            end = path.ends[-1]
        elif not math.isnan(outcome.event_t):
            end = outcome.event_t
        is_last = outcome.status.ok and path.ends[-1] == end
        polynomials.append(_continued(polynomials[-1], outcome.ys[-1] if is_last else None))
    return DenseOutput(
        t0=problem.direction * begin,
        t1=problem.direction * end,
        direction=problem.direction,
        begins=begins,
        lengths=lengths,
        polynomials=torch.stack(polynomials),
        eps=torch.finfo(problem.t.dtype).eps,
        offsets=problem.offsets,
        shapes=problem.shapes,
        dtypes=problem.dtypes,
    )


def _clock(path: Path):
    """Beginnings and lengths of the steps and of one after them, as long as the last, with their gradients."""
    begins = torch.tensor([*path.begins, path.ends[-1]], dtype=torch.float64, device="cpu")
    lengths = torch.tensor([e - b for b, e in zip(path.begins, path.ends)], dtype=torch.float64, device="cpu")
    lengths = torch.cat([lengths, lengths[-1:]])
    if path.shifts[0][0] is None:
        return begins, lengths
    shift0, shift1 = (torch.stack(shifts) for shifts in zip(*path.shifts))
    stretch = shift1 - shift0
    return begins + torch.cat([shift0, shift1[-1:]]), lengths + torch.cat([stretch, stretch[-1:]])


def _continued(polynomial, y1):
    """The same polynomial from the end of its step on; ``y1`` is the computed state there, if it is known."""
    terms = list(polynomial)
    for i in range(len(terms) - 1):  # x = 1 + (x - 1), by repeated synthetic division
        for j in reversed(range(i, len(terms) - 1)):
            terms[j] = terms[j] + terms[j + 1]
    return torch.stack([terms[0] if y1 is None else y1, *terms[1:]])


def _as_times(t) -> torch.Tensor:
    """What the caller gave, as a floating point Tensor."""
    if not isinstance(t, torch.Tensor):
        number = real_number(t)
        if number is None:
            raise ArgumentTypeError(f"t must be a number or a Tensor of times, got {kind_of(t)}")
        return torch.tensor(number, dtype=torch.float64, device="cpu")
    require_dense("t", t)
    if is_batched(t):
        raise ArgumentError(
            "torch.func.vmap hides the times; call sol with the Tensor of all of them, of any shape"
        )
    if t.is_complex() or t.dtype == torch.bool:
        raise ArgumentTypeError(f"t must hold real times, got {t.dtype}")
    return t if t.is_floating_point() else t.double()
