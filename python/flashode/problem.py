"""One checked call becomes one frozen `Problem`, which is all that an engine sees."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from . import arguments, transforms
from . import options as choices
from .arguments import kind_of, require_dense
from .control import Controller
from .errors import ArgumentError, ArgumentTypeError
from .events import Event, end_of, events_of
from .interp import Dense
from .methods import Method
from .options import MAX_NUM_STEPS
from .progress import Progress


@dataclass(frozen=True, eq=False)
class Problem:
    """Solve ``dy/dt = func(t, y, *args)`` from ``y0``.

    Engines run on a forward clock, ``direction * t``, that always increases. A tuple state is one
    flat tensor in here; ``shapes`` and ``dtypes`` are None unless the caller gave a tuple.

    Attributes:
        y0: the state, of any shape, or flat (N,) for tuples.
        t: the caller's times, shape (T,). With events the second gives but the direction, and carries
            no gradient.
        times: the same on the forward clock, as floats.
        grid: step ends of a fixed-step method on the forward clock (float64 tensor, may carry
            gradients of ``t``); None for adaptive methods.
        steps_on_times: the grid is ``t`` itself.
        offsets: where the members of the state begin and end in the flat state.
        rtol, atol: floats, or flat tensors with one entry per element.
        norm: the caller's norm of the flat scaled error, or None for the default, the largest
            root mean square over the members.
        stops: ``(time, is_jump)`` that steps must end on, ascending.
        max_num_steps: trial steps allowed between two output times.
        max_iters: iterations of Newton's method allowed for a stage of an implicit method.
        max_order, corrections: of Adams methods; corrections that need not be half of the one before.
        solver: SciPy's name of the one to use, with method="scipy_solver".
        events: what the solve ends at; none for a solve through all times.
        until: forward time at which a solve without event ends.
        callbacks: bound callbacks of ``func``, or None, in the order step, accept, reject.
        counted: members that the default norm covers, from the first; None for all.
        args: what ``func`` is called with after ``(t, y)``.
    """

    func: Callable
    y0: torch.Tensor
    shapes: tuple[torch.Size, ...] | None
    dtypes: tuple[torch.dtype, ...] | None
    t: torch.Tensor
    times: list[float]
    direction: float
    method: Method
    dense: Dense
    control: Controller
    rtol: float | torch.Tensor
    atol: float | torch.Tensor
    norm: Callable | None = None
    first_step: float | None = None
    max_num_steps: int = MAX_NUM_STEPS
    overshoot: bool = False
    stops: tuple[tuple[float, bool], ...] = ()
    grid: torch.Tensor | None = None
    steps_on_times: bool = False
    perturb: bool = False
    max_order: int = 0
    corrections: int = 0
    max_iters: int = 1
    solver: str | None = None
    callbacks: tuple[Callable | None, ...] = (None, None, None)
    events: tuple[Event, ...] = ()
    until: float = math.inf
    counted: int | None = None
    args: tuple = ()

    @property
    def adaptive(self) -> bool:
        return self.method.adaptive

    @cached_property
    def time_dtype(self) -> torch.dtype:
        """dtype in which ``t`` reaches ``func``: the real dtype of the state."""
        return self.y0.dtype.to_real()

    @cached_property
    def differentiates_time(self) -> bool:
        if transforms.active():  # which of them reach t is theirs to know
            return True
        return torch.is_grad_enabled() and (
            self.t.requires_grad or (self.grid is not None and self.grid.requires_grad)
        )

    @property  # not cached, or torch.compile could not trace it
    def offsets(self) -> list[int]:
        """Where each member of the state begins in the flat state, and the end."""
        sizes = [self.y0.numel()] if self.shapes is None else [s.numel() for s in self.shapes]
        ends = [0]
        for size in sizes:
            ends.append(ends[-1] + size)
        return ends

    @cached_property
    def end(self) -> float:
        """Forward time that no step passes, inf where steps may pass all times."""
        return self.until if self.events or self.overshoot else self.times[-1]

    @cached_property
    def time_bounds(self) -> tuple[float, float]:
        """Least and greatest forward time that ``func`` may see, as values of `time_dtype`.

        Rounding to a dtype coarser than the clock must not leave the interval.
        """
        # A method with a node beyond 1, as kvaerno5 has, needs the field a part of a step past the end.
        tableau, begin, end = self.method.tableau, self.times[0], self.end
        if end == math.inf or (tableau is not None and tableau.reaches_beyond):
            return -math.inf, math.inf
        if self.grid is not None and not self.steps_on_times:
            begin, end = min(begin, self.grid[0].item()), max(end, self.grid[-1].item())
        if self.time_dtype == torch.float64:
            return begin, end
        low, high = _round_up(begin, self.time_dtype), -_round_up(-end, self.time_dtype)
        return (low, high) if low <= high else (-math.inf, math.inf)

    @property
    def norm_offsets(self) -> list[int]:
        """`offsets` of the members that the norm covers."""
        return self.offsets if self.counted is None else self.offsets[: self.counted + 1]

    def again(self, y0, t, args) -> Problem | None:
        """The same problem from another start, with other ``args``, and with the same times in another Tensor; None
        if the start is of another kind."""
        y0, shapes, dtypes = arguments.flat_state(y0)
        mine = self.y0
        if (y0.shape, y0.dtype, y0.device, shapes, dtypes) != (
            mine.shape, mine.dtype, mine.device, self.shapes, self.dtypes,
        ):  # fmt: skip
            return None
        arguments.require_tuple(args)
        problem = copy.copy(self)  # with what was derived of times and tolerances
        vars(problem).update(y0=y0, t=t, args=args)
        vars(problem).pop("differentiates_time", None)
        problem.look_at_start()
        return problem

    def released(self) -> Problem:
        """The same without what the caller may want to be rid of: graphs behind the start, and ``args``."""
        problem = copy.copy(self)
        vars(problem).update(y0=self.y0.detach(), args=())
        return problem

    def look_at_start(self):
        """Refuses a start that is not finite."""
        arguments.require_finite(self.y0, self.shapes, self.method)

    def unflatten(self, y: torch.Tensor, batch: int = 0):
        """The caller's view of a flat state with ``batch`` leading dimensions."""
        return y if self.shapes is None else members_of(y, self.offsets, self.shapes, self.dtypes, batch)

    def slope(self, value) -> torch.Tensor:
        """What ``func`` returned, checked and in the layout of ``y0``.

        A dtype of other precision is cast. Raises ArgumentTypeError or ArgumentError.
        """
        if self.shapes is None:
            return self._member_slope(value, "func", self.y0.shape, self.y0.dtype).contiguous()
        if isinstance(value, torch.Tensor) or not isinstance(value, (tuple, list)):
            raise ArgumentTypeError(
                f"func must return a tuple of {len(self.shapes)} Tensors like y0, got {kind_of(value)}"
            )
        if len(value) != len(self.shapes):
            raise ArgumentError(
                f"func returned a tuple of {len(value)} members, expected {len(self.shapes)} like y0"
            )
        return torch.cat(
            [
                self._member_slope(v, f"func: member {i}", shape, dtype).reshape(-1)
                for i, (v, shape, dtype) in enumerate(zip(value, self.shapes, self.dtypes))
            ]
        )

    def _member_slope(self, value, name: str, shape, dtype) -> torch.Tensor:
        if not isinstance(value, torch.Tensor):
            raise ArgumentTypeError(
                f"{name} must return a Tensor of shape {tuple(shape)}, got {kind_of(value)}"
            )
        if value.layout != torch.strided or value.is_nested or value.is_quantized:
            require_dense(f"what {name} returned", value)
        if value.shape != shape:
            raise ArgumentError(
                f"{name} returned shape {tuple(value.shape)}, expected {tuple(shape)} like y0; "
                "slopes are never broadcast"
            )
        if value.device != self.y0.device:
            raise ArgumentError(f"{name} returned a Tensor on {value.device}, y0 is on {self.y0.device}")
        if value.is_complex() and not dtype.is_complex:
            raise ArgumentTypeError(
                f"{name} returned {value.dtype} for a state of {dtype}; return a real Tensor"
            )
        return value.to(self.y0.dtype).resolve_conj().resolve_neg()

    def norm_value(self, scaled: torch.Tensor) -> float:
        """The caller's norm of a flat scaled error, as a non-negative float."""
        returned = self.norm(self.unflatten(scaled))
        return arguments.norm_result(returned, lambda: torch.isfinite(scaled).all())

    def report(self, callback, t0: float, y0: torch.Tensor, dt: float):
        """Calls one of the caller's callbacks, if there is one, with ``(t0, y0, dt)``."""
        if isinstance(callback, Progress):
            callback.advance(t0, dt)
            callback = callback.inner
        if callback is not None:
            t0, dt = (
                torch.tensor(x, dtype=torch.float64, device=y0.device) for x in (self.direction * t0, dt)
            )
            # A copy: a callback may keep the state, or write into it.
            callback(t0, self.unflatten(y0.detach().clone()), dt)

    @staticmethod
    def from_call(func, y0, t, rtol, atol, method, options, event_fn, args=()) -> Problem:
        """Checks every argument of one `odeint` call; raises before ``func`` is called."""
        if not callable(func):
            raise ArgumentTypeError(f"func must be callable as func(t, y), got {kind_of(func)}")
        arguments.require_tuple(args)
        y0, shapes, dtypes = arguments.flat_state(y0)
        chosen = arguments.method_named(method)
        if chosen.family == "symplectic":
            arguments.require_pair(shapes, chosen)
        options = choices.known_options(options, chosen)
        times, direction = arguments.forward_times(t, "t")
        events = events_of(event_fn)
        if events and len(times) != 2:
            raise ArgumentError(
                f"We require len(t) == 2 when in event handling mode, but got len(t)={len(times)}."
            )
        if events and chosen.family == "scipy":
            raise ArgumentError(
                f"method={chosen.name!r} locates no events; take one of flashode's own methods"
            )
        until = end_of(events, times[0], direction)
        if events:
            t = torch.cat([t[:1], t[1:].detach()])
        if t.device != y0.device:
            if t.device.type != "cpu":
                warnings.warn(
                    f"t is not on the same device as y0 ({t.device}, {y0.device}). Coercing to y0.device."
                )
        arguments.require_finite(y0, shapes, chosen)
        if chosen.adaptive or chosen.corrects or events:
            sizes = None if shapes is None else [s.numel() for s in shapes]
            rtol, atol = (arguments.tolerance(n, v, y0, sizes) for n, v in (("rtol", rtol), ("atol", atol)))
        else:
            rtol = atol = 0.0  # ignored, whatever they are
        if chosen.adaptive:
            arguments.require_plausible(rtol, atol)
            rtol, atol = arguments.floored(rtol, atol, y0)
            particular = choices.adaptive_fields(options, chosen, times[0], direction)
        else:
            particular = choices.fixed_fields(
                options, chosen, func, y0, t, times, direction, until if events else None
            )
        return Problem(
            func=func,
            y0=y0,
            shapes=shapes,
            dtypes=dtypes,
            t=t,
            times=times,
            direction=direction,
            method=chosen,
            rtol=rtol,
            atol=atol,
            callbacks=arguments.callbacks_of(func, chosen),
            events=events,
            until=until,
            args=args,
            **particular,
        )


def members_of(y: torch.Tensor, offsets, shapes, dtypes, batch: int) -> tuple[torch.Tensor, ...]:
    """The members of a flat tuple state with ``batch`` leading dimensions."""
    return tuple(
        arguments.to_dtype(dtype, y[..., begin:end].reshape((*y.shape[:batch], *shape)))
        for begin, end, shape, dtype in zip(offsets, offsets[1:], shapes, dtypes)
    )


def _round_up(x: float, dtype: torch.dtype) -> float:
    """The least value of a dtype that is not below ``x``."""
    if dtype == torch.float32:  # NumPy takes a microsecond where tensors take ten, once a solve
        rounded = np.float32(x)
        return float(rounded if float(rounded) >= x else np.nextafter(rounded, np.float32(np.inf)))
    rounded = torch.tensor(x, dtype=dtype, device="cpu")
    return (rounded if rounded.item() >= x else torch.nextafter(rounded, rounded.new_tensor(math.inf))).item()
