"""`ODEBlock`: a solve as a layer of a network."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from .. import ArgumentError, ArgumentTypeError, CompiledField, odeint, odeint_adjoint

_ADJOINTS = (None, "backsolve", "checkpoint", "interpolated")


class ODEBlock(nn.Module):
    """The layer ``y -> y(t[-1])``, where ``dy/dt = field(t, y)`` and ``y(t[0]) = y`` (Chen et al. 2018).

    Args:
        field: called as ``field(t, y)``; a Module, a function, or either compiled by `flashode.compile`.
        t: two or more times, numbers that strictly increase or decrease.
        method, rtol, atol, options: of the solver, as for `flashode.odeint`. The tolerances are loose, as suits
            training; plots and likelihoods want them tighter.
        adjoint: how gradients are taken (docs/gradients.md): None, through the solver's own operations; or
            ``"backsolve"``, ``"checkpoint"`` or ``"interpolated"``, by `flashode.odeint_adjoint`.
        augment: zeros that are appended to the features before the solve, so that trajectories may pass each other
            in more dimensions (Dupont et al. 2019, Augmented neural ODEs). Features are the last axis of a state; of
            one with four axes or more, (B, C, H, W), they are the channels, axis 1.
        keep_augmented: whether the result has the appended features too.
        return_path: whether the result is the state at all times ``t``, shape (T, ...), in place of the last.
        learn_t: whether the times are learned: a parameter ``log_stretch``, 0 at first, stretches them away from
            the first one by ``exp(log_stretch)``, so that the last one keeps its side of it.

    Attributes:
        t: the times, float64 on the CPU, shape (T,); learned ones have a gradient.
        nfe_forward: calls of the field in the last solve; None before the first. Of a compiled field, the slopes that
            its program evaluated in their place.
        nfe_backward: calls of the field in the backward passes of that solve so far: 0 with direct gradients, which
            go back through the graph of the calls made. None for compiled fields, whose programs do not count them.

    Raises:
        ArgumentError, ArgumentTypeError: an argument cannot be used.

    Example:
        >>> block = ODEBlock(lambda t, y: -y, rtol=1e-6, atol=1e-6)
        >>> round(block(torch.ones(1)).item(), 4)
        0.3679
    """

    def __init__(
        self, field, t=(0.0, 1.0), *, method="dopri5", rtol=1e-3, atol=1e-3, options=None, adjoint=None,
        augment=0, keep_augmented=False, return_path=False, learn_t=False,
    ):  # fmt: skip
        super().__init__()
        if not callable(field):
            raise ArgumentTypeError(f"field must be callable as field(t, y), got {type(field).__name__}")
        if adjoint not in _ADJOINTS:
            raise ArgumentError(f"adjoint must be one of {list(_ADJOINTS)}, got {adjoint!r}")
        if not isinstance(augment, int) or isinstance(augment, bool) or augment < 0:
            raise ArgumentError(f"augment must be a whole number of features, 0 or more, got {augment!r}")
        self.field = field
        self.method, self.rtol, self.atol, self.options = method, rtol, atol, options
        self.adjoint = adjoint
        self.augment, self.keep_augmented, self.return_path = augment, keep_augmented, return_path
        self._t = _times(t)
        self.log_stretch = nn.Parameter(torch.zeros(())) if learn_t else None
        self._calls = _Calls(None, None)

    @property
    def t(self) -> torch.Tensor:
        if self.log_stretch is None:
            return self._t
        return self._t[0] + self.log_stretch.exp().to(self._t) * (self._t - self._t[0])

    @property
    def nfe_forward(self) -> int | None:
        return self._calls.solving

    @property
    def nfe_backward(self) -> int | None:
        made, solving = self._calls.made, self._calls.solving
        return None if made is None else made - solving

    def forward(self, y):
        """The state at the last time, or with ``return_path`` at all of them, (T, ...).

        Args:
            y: Tensor, the state at the first time; (..., features), or (B, C, H, W).
        """
        path = self.path(y, self.t)
        return path if self.return_path else path[-1]

    def path(self, y, t):
        """The states at times of one's own, (T, ...), from ``y`` at the first of them.

        Args:
            y: as for `forward`.
            t: 1-d floating point Tensor, strictly increasing or decreasing.
        """
        if not isinstance(y, torch.Tensor):
            raise ArgumentTypeError(
                f"y must be a Tensor, got {type(y).__name__}; flashode.odeint solves tuples of Tensors"
            )
        if not self.augment:
            return self._solved(y, t)
        if not y.ndim:
            raise ArgumentError("y has no axis of features to augment; give it shape (..., features)")
        axis = -1 if y.ndim < 4 else 1 - y.ndim  # counted from the end, where a path's axes are the state's
        zeros = y.new_zeros(*y.shape[:axis], self.augment, *y.shape[axis:][1:])
        path = self._solved(torch.cat([y, zeros], axis), t)
        return path if self.keep_augmented else path.narrow(axis, 0, y.shape[axis])

    def _solved(self, y, t):
        solver = {"method": self.method, "rtol": self.rtol, "atol": self.atol, "options": self.options}
        if isinstance(self.field, CompiledField):
            if self.adjoint is None:
                path = odeint(self.field, y, t, **solver)
            else:
                path = odeint_adjoint(self.field, y, t, adjoint=self.adjoint, **solver)
            self._calls = _Calls(None, self.field.evaluations)
            return path
        field, calls = self.field, _Calls(0, 0)

        def counted(t, y):
            calls.made += 1
            return field(t, y)

        if self.adjoint is None:
            path = odeint(counted, y, t, **solver)
        else:
            params = tuple(field.parameters()) if isinstance(field, nn.Module) else ()
            path = odeint_adjoint(counted, y, t, adjoint=self.adjoint, adjoint_params=params, **solver)
        calls.solving = calls.made
        self._calls = calls
        return path

    def extra_repr(self):
        words = [] if isinstance(self.field, nn.Module) else [f"field={self.field!r}"]
        words += [f"t={tuple(self.t.tolist())}", f"method={self.method!r}"]
        words += [f"rtol={self.rtol}", f"atol={self.atol}"]
        for name in ("options", "adjoint", "augment", "keep_augmented", "return_path"):
            if value := getattr(self, name):
                words.append(f"{name}={value!r}")
        return ", ".join(words + ["learn_t=True"] * (self.log_stretch is not None))


@dataclass
class _Calls:
    """Calls of the field made for one solve: those while ``solving``, and with those of its backward passes."""

    made: int | None
    solving: int | None


def _times(t) -> torch.Tensor:
    """Times that can be solved for, as a float64 Tensor."""
    try:
        times = [float(x) for x in t]
    except (TypeError, ValueError, OverflowError):
        raise ArgumentTypeError(f"t must be two or more times, numbers, got {t!r}") from None
    steps = [after - before for before, after in zip(times, times[1:])]
    ordered = all(s > 0 for s in steps) or all(s < 0 for s in steps)
    if len(times) < 2 or not ordered or not all(map(math.isfinite, times)):
        raise ArgumentError(
            f"t must be two or more finite times that strictly increase or decrease, got {times}"
        )
    return torch.tensor(times, dtype=torch.float64)
