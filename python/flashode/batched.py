"""Every sample of a batch solved on its own: one checked call becomes one frozen `BatchProblem`."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch.utils._pytree import tree_leaves

from . import arguments, transforms
from . import options as choices
from .arguments import kind_of
from .errors import ArgumentError, ArgumentTypeError, SolveError, Status
from .methods import METHODS
from .problem import Problem
from .solution import Solution, Stats

# What a batch cannot be solved with, and why.
_REFUSED = {
    "norm": "every sample has its own root mean square norm",
    "overshoot": "samples end on their own final times; torchdiffeq has no such mode to be compared with",
    "step_t": "samples have their own times; put the times to land on into t",
    "jump_t": "samples have their own times; solve up to the jump and from it on",
}
_SHOWN = 8  # failed samples that an error message tells of


def asked_for(options) -> bool:
    """Whether ``options`` ask for a batch of samples solved on their own."""
    if not isinstance(options, dict):
        return False
    batched = choices.flag(options, "batched")
    if choices.flag(options, "compact") and not batched:
        raise ArgumentError(
            "options['compact'] drops finished samples of a batch; it needs options['batched']"
        )
    return batched


def require_one_clock(progress, dense):
    """Refuses what only a solve with one clock for the whole state has."""
    for name, asked in (("progress", progress), ("dense", dense)):
        if asked:
            raise ArgumentError(
                f"{name}=True cannot be used with options['batched']: samples have clocks of their own"
            )


@dataclass(frozen=True, eq=False)
class BatchProblem(Problem):
    """A `Problem` for every index of the state's leading dimension.

    ``y0`` is laid out as in `Problem`. Engines that prefer one row of N numbers a sample, the members
    of a tuple one after the other, get it from `rows`, and go back by `flat`.

    Attributes:
        times: on the forward clock of each sample, ascending, float64 on the CPU of shape (B, T).
        direction: of the samples' clocks, 1 or -1, float64 on the CPU of shape (B,).
        rtol, atol: floats, or tensors with one entry per element, laid out as ``y0`` and flat.
        usable: samples whose ``y0`` is finite, on the CPU, shape (B,).
        compact: ``func`` may be called with some of the samples.
    """

    times: torch.Tensor
    direction: torch.Tensor
    usable: torch.Tensor | None = None
    compact: bool = False

    @property
    def samples(self) -> int:
        return len(self.direction)

    @cached_property
    def columns(self) -> list[int]:
        """Where each member begins in the row of a sample, and the end."""
        shapes = [self.y0.shape] if self.shapes is None else self.shapes
        ends = [0]
        for shape in shapes:
            ends.append(ends[-1] + math.prod(shape[1:]))
        return ends

    @cached_property
    def time_shape(self) -> tuple[int, ...]:
        """Shape in which the times reach ``func``: they broadcast against y, the first member of a tuple."""
        first = self.y0 if self.shapes is None else torch.empty(self.shapes[0], device="meta")
        return (self.samples, *[1] * (first.ndim - 1))

    @cached_property
    def differentiates_time(self) -> bool:
        return torch.is_grad_enabled() and self.t.requires_grad

    @cached_property
    def time_bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Least and greatest forward time of each sample that ``func`` may see: no rounding leaves them."""
        low, high = (_round_up(x, self.time_dtype) for x in (self.times[:, 0], -self.times[:, -1]))
        bounded = low <= -high
        return low.where(bounded, low.new_tensor(-math.inf)), (-high).where(bounded, low.new_tensor(math.inf))

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """Something laid out as ``y0`` as one row a sample, shape (B, N)."""
        if self.shapes is None:
            return x.reshape(len(x), self.columns[-1])
        members = (x[begin:end] for begin, end in zip(self.offsets, self.offsets[1:]))
        widths = (end - begin for begin, end in zip(self.columns, self.columns[1:]))
        return torch.cat([m.reshape(self.shapes[0][0], width) for m, width in zip(members, widths)], 1)

    def flat(self, rows: torch.Tensor) -> torch.Tensor:
        """The layout of ``y0`` again, from (..., B, N)."""
        lead = rows.shape[:-2]
        if self.shapes is None:
            return rows.reshape(*lead, *self.y0.shape)
        members = (rows[..., begin:end] for begin, end in zip(self.columns, self.columns[1:]))
        return torch.cat([m.flatten(-2) for m in members], -1)

    @property
    def start(self) -> torch.Tensor:
        """``y0``, with a mate in place of samples that are not usable: what ``func`` sees."""
        return self.flat(with_mates(self.rows(self.y0.detach()), self.usable))

    def look_at_start(self):
        """Which samples can be solved."""
        vars(self)["usable"] = torch.isfinite(self.rows(self.y0.detach())).all(1).cpu()

    def of_samples(self, count: int) -> BatchProblem:
        """The same problem for fewer samples, as `slope` and `unflatten` see it."""
        shapes = None if self.shapes is None else tuple((count, *s[1:]) for s in self.shapes)
        y0 = self.y0.new_empty((count, *self.y0.shape[1:]) if shapes is None else count * self.columns[-1])
        shapes = shapes and tuple(torch.Size(s) for s in shapes)
        return replace(self, y0=y0, shapes=shapes, direction=self.direction[:count])

    @staticmethod
    def from_call(func, y0, t, rtol, atol, method, options, event_fn, args=()) -> BatchProblem:
        """Checks every argument of one call; raises before ``func`` is called."""
        if not callable(func):
            raise ArgumentTypeError(f"func must be callable as func(t, y), got {kind_of(func)}")
        arguments.require_tuple(args)
        if event_fn is not None:
            raise ArgumentError(
                "options['batched'] has no events: solve without event_fn, or without 'batched'"
            )
        y0, shapes, dtypes = arguments.flat_state(y0)
        members = [y0.shape] if shapes is None else list(shapes)
        samples = _batch_size(members)
        chosen = _method(method)
        options = choices.known_options(options, chosen)
        for name, reason in _REFUSED.items():
            if options.get(name) is not None and options.get(name) is not False:
                raise ArgumentError(f"options[{name!r}] cannot be used with options['batched']: {reason}")
        particular = choices.adaptive_fields(options, chosen, 0.0, 1.0)
        times, direction = sample_times(t, samples)
        if t.device != y0.device and t.device.type != "cpu":
            warnings.warn(
                f"t is not on the same device as y0 ({t.device}, {y0.device}). Coercing to y0.device."
            )
        transforms.require_readable(y0, "step-size control")
        rtol, atol = (_tolerance(n, v, y0, members, samples) for n, v in (("rtol", rtol), ("atol", atol)))
        arguments.require_plausible(rtol, atol)
        callbacks = {name for name in arguments.CALLBACKS if getattr(func, name, None) is not None}
        if callbacks:
            warnings.warn(f"options['batched'] does not support callbacks {callbacks}")
        problem = BatchProblem(
            func=func, y0=y0, shapes=shapes, dtypes=dtypes, t=t, times=times, direction=direction,
            method=chosen, rtol=rtol, atol=atol, args=args, compact=choices.flag(options, "compact"),
            **particular,
        )  # fmt: skip
        rows = problem.rows(y0.detach())
        rtol, atol = _floored(problem, rows)
        return replace(problem, rtol=rtol, atol=atol, usable=torch.isfinite(rows).all(1).cpu())


def with_mates(rows, fit):
    """Rows of samples that are fit, and in place of the others a row of one that is."""
    if fit.all():
        return rows
    mate = fit.int().argmax().item()
    return torch.where(fit.to(rows.device)[:, None], rows, rows[mate : mate + 1].detach())


def _batch_size(members) -> int:
    for i, shape in enumerate(members):
        if not shape:
            raise ArgumentError(
                "options['batched'] needs a state with a leading batch dimension, "
                f"{f'member {i} of y0' if len(members) > 1 else 'y0'} has none"
            )
        if shape[0] != members[0][0]:
            raise ArgumentError(
                f"options['batched']: the members of y0 must have the same leading dimension, member 0 has "
                f"{members[0][0]} samples and member {i} has {shape[0]}"
            )
    return members[0][0]


def _method(method):
    chosen = arguments.method_named(method)
    if chosen.family != "explicit" or not chosen.adaptive:
        names = [m.name for m in METHODS.values() if m.family == "explicit" and m.adaptive]
        raise ArgumentError(
            f"options['batched'] needs one of the adaptive explicit methods {names}, got method {chosen.name!r}"
        )
    return chosen


def sample_times(t, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The times on every sample's forward clock, (B, T), and the directions of the clocks, (B,)."""
    if not isinstance(t, torch.Tensor):
        raise ArgumentTypeError(f"t must be a torch.Tensor, got {kind_of(t)}")
    arguments.require_dense("t", t)
    transforms.require_readable(t, "the check of t")
    if not t.is_floating_point():
        raise ArgumentTypeError(f"`t` must be a floating point Tensor but is a {t.dtype}")
    if t.ndim not in (1, 2) or (t.ndim == 2 and len(t) != samples):
        raise ArgumentError(
            f"options['batched'] takes t of shape (T,), shared by all samples, or ({samples}, T); "
            f"got shape {tuple(t.shape)}"
        )
    if t.shape[-1] == 0:
        raise ArgumentError("t is empty; it must hold at least the initial time")
    given = t.detach().to("cpu", torch.float64).reshape(-1, t.shape[-1])
    infinite = ~torch.isfinite(given)
    if infinite.any():
        raise ArgumentError(f"t must be finite, got {_entry(t, given, infinite)}")
    direction = torch.where(given[:, -1] < given[:, 0], -1.0, 1.0).double()
    times = given * direction[:, None]
    turned = torch.zeros_like(infinite)
    turned[:, 1:] = times[:, 1:] < times[:, :-1]
    if turned.any():
        before = torch.roll(turned, -1, 1)
        raise ArgumentError(
            "t must be increasing or decreasing for every sample (times may repeat), got "
            f"{_entry(t, given, before)} and {_entry(t, given, turned)}"
        )
    return times.expand(samples, -1), direction.expand(samples)


def _entry(t, given, marked) -> str:
    """The first marked entry of ``t``, for an error message."""
    row, column = marked.nonzero()[0].tolist()
    place = f"{row}, {column}" if t.ndim == 2 else column
    return f"t[{place}] = {given[row, column].item()!r}"


def _tolerance(name, value, y0, members, samples):
    """A float, or one entry per element of the state, flat."""
    each = [value] * len(members)
    if isinstance(value, (tuple, list)):
        if len(value) != len(members):
            raise ArgumentError(f"{name} has {len(value)} entries for {len(members)} members of y0")
        each = list(value)
    each = [arguments.check_tolerance(name, v) for v in each]
    if all(isinstance(v, float) and v == each[0] for v in each):
        return each[0]
    wide = torch.promote_types(y0.dtype.to_real(), torch.float32)
    return torch.cat(
        [_spread(name, torch.as_tensor(v), s, samples).to(y0.device, wide) for v, s in zip(each, members)]
    )


def _spread(name, value, shape, samples):
    """A tolerance for every element of a member: one entry a sample, or whatever broadcasts."""
    if value.shape == (samples,):
        value = value.reshape(samples, *[1] * (len(shape) - 1))
    try:
        return value.expand(shape).reshape(-1)
    except RuntimeError:
        raise ArgumentError(
            f"{name} has shape {tuple(value.shape)}: neither one entry for each of {samples} samples nor "
            f"anything that broadcasts to the state's {tuple(shape)}"
        ) from None


def _floored(problem, rows):
    """Tolerances that a 16-bit state can meet, from each sample's own size."""
    dtype = problem.time_dtype
    rtol, atol = problem.rtol, problem.atol
    if dtype not in (torch.float16, torch.bfloat16) or rows.numel() == 0:
        return rtol, atol
    eps = torch.finfo(dtype).eps
    size = rows.float().abs().amax(1, keepdim=True)
    least_atol = torch.where(size > 0, size * eps, eps).expand(rows.shape)
    least = torch.full_like(least_atol, 4 * eps), least_atol
    given = [torch.as_tensor(v, dtype=torch.float32, device=rows.device) for v in (rtol, atol)]
    given = [problem.rows(v.expand(rows.numel()).reshape(problem.y0.shape)) for v in given]
    if any((g < low).any() for g, low in zip(given, least)):
        warnings.warn(
            f"{dtype} cannot meet these tolerances: rtol raised to at least {4 * eps:.3g}, atol to at least "
            f"{eps:.3g} of the sample's largest number. Use a float32 state for more accuracy."
        )
    return tuple(problem.flat(torch.maximum(g, low)).reshape(-1) for g, low in zip(given, least))


def _round_up(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The least values of a dtype that are not below ``x``."""
    rounded = x.to(dtype)
    above = torch.nextafter(rounded, torch.full_like(rounded, math.inf))
    return torch.where(rounded.double() >= x, rounded, above).double()


# ---- what comes back -----------------------------------------------------------------------


@dataclass
class BatchOutcome:
    """What an engine hands back; all but ``ys`` and ``nfe`` are CPU tensors with one entry a sample.

    ``filled`` counts the outputs that were reached; ``ys`` beyond them is anything. ``t`` and ``dt`` are
    on the forward clocks, at the last accepted state.
    """

    status: torch.Tensor
    ys: torch.Tensor
    nfe: int
    accepted: torch.Tensor
    rejected: torch.Tensor
    filled: torch.Tensor
    t: torch.Tensor
    dt: torch.Tensor
    error_ratio: torch.Tensor


@dataclass(eq=False)
class BatchSolution(Solution):
    """A batch whose samples were solved on their own.

    Attributes:
        ts: the caller's times, shape (T,) or (B, T).
        ys: values, shape (T, B, *state); a tuple of such for tuple states. Outputs that a failed sample
            did not reach are NaN.
        status: `Status` of each sample, an int64 Tensor of shape (B,) on the CPU.
        stats: what it cost: ``nfe`` counts calls of ``func`` with the batch; ``accepted`` and ``rejected``
            are Tensors of shape (B,).
    """

    status: torch.Tensor
    stats: Stats

    @property
    def succeeded(self) -> torch.Tensor:
        """Which samples were solved to the end, a bool Tensor of shape (B,)."""
        return self.status == Status.SUCCESS

    def __repr__(self):
        shapes = ", ".join(f"{tuple(y.shape)} {str(y.dtype)[6:]}" for y in tree_leaves(self.ys))
        s = self.stats
        return (
            f"BatchSolution({int(self.succeeded.sum())} of {len(self.status)} samples solved: {s.method} on the "
            f"{s.engine} engine, ys {shapes}; {_range(s.accepted)} steps, {_range(s.rejected)} rejected, "
            f"{s.nfe} calls of func)"
        )


def _range(counts: torch.Tensor) -> str:
    if len(counts) == 0 or counts.min() == counts.max():
        return str(counts[0].item() if len(counts) else 0)
    return f"{counts.min().item()} … {counts.max().item()}"


def finish(problem: BatchProblem, outcome: BatchOutcome, engine: str, throw: bool) -> BatchSolution:
    """The solution of an outcome; raises a `SolveError` that names the failed samples unless told not to."""
    failed = outcome.status != Status.SUCCESS
    if throw and failed.any():
        raise _failure(problem, outcome, failed.nonzero().reshape(-1).tolist())
    ys = problem.unflatten(outcome.ys, batch=1)
    if failed.any():
        missing = torch.arange(len(outcome.ys))[:, None] >= torch.where(
            failed, outcome.filled, len(outcome.ys)
        )
        missing = missing.to(problem.y0.device)
        nan = [_without(y, missing) for y in (ys if isinstance(ys, tuple) else (ys,))]
        ys = tuple(nan) if isinstance(ys, tuple) else nan[0]
    stats = Stats(engine, problem.method.name, outcome.nfe, outcome.accepted, outcome.rejected)
    return BatchSolution(problem.t, ys, outcome.status, stats)


def _without(y, missing):
    """Outputs with NaN where they are missing; no gradient passes there."""
    return y.masked_fill(missing.reshape(*missing.shape, *[1] * (y.ndim - 2)), math.nan)


def _failure(problem, outcome, failed) -> SolveError:
    def told(b):
        t, dt = ((problem.direction[b] * x[b]).item() for x in (outcome.t, outcome.dt))
        return f"sample {b}: {_reason(Status(outcome.status[b].item()), problem)} at t={t!r}, dt={dt!r}"

    first = failed[0]
    more = len(failed) - _SHOWN
    return SolveError(
        f"{len(failed)} of {problem.samples} samples failed: "
        + "; ".join(told(b) for b in failed[:_SHOWN])
        + (f"; and {more} more" if more > 0 else "")
        + f" [{problem.method.name}; {outcome.nfe} calls of func]. The others were solved: "
        "solve(..., throw=False) returns them, a status for every sample, and NaN where samples failed.",
        reason=Status(outcome.status[first].item()),
        t=(problem.direction[first] * outcome.t[first]).item(),
        dt=(problem.direction[first] * outcome.dt[first]).item(),
        accepted=outcome.accepted[first].item(),
        rejected=outcome.rejected[first].item(),
        nfe=outcome.nfe,
        index=(first,),
    )


def _reason(status: Status, problem) -> str:
    return {
        Status.NONFINITE_FIELD: "func returned non-finite values",
        Status.NONFINITE_STATE: "non-finite values in state `y`",
        Status.NONFINITE_ERROR: "the error relative to the tolerance is not finite",
        Status.STEP_UNDERFLOW: "underflow in dt, the error test fails however small the step",
        Status.MAX_STEPS: f"max_num_steps exceeded ({problem.max_num_steps}) between two output times",
    }[status]
