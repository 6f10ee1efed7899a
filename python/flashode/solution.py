"""What a solve returns: values, status and statistics, and the error a failed one raises."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from .errors import SolveError, Status


class Landing(IntEnum):
    """What the end of a step lands on."""

    FREE, STOP, JUMP, END = range(4)


@dataclass
class Stats:
    """What a solve cost.

    ``accepted`` and ``rejected`` count steps, ``nfe`` calls of ``func``; ``forward_times`` are the ends of the
    accepted steps on a clock that runs forward, ``direction * t``.
    """

    engine: str
    method: str
    nfe: int = 0
    accepted: int = 0
    rejected: int = 0
    forward_times: Sequence[float] = field(default=(), repr=False)
    direction: float = field(default=1.0, repr=False)

    @property
    def accepted_times(self) -> list[float]:
        """The ends of the accepted steps on the caller's clock."""
        return [self.direction * t for t in self.forward_times]


@dataclass(eq=False)  # Tensors have no one answer to ==
class Solution:
    """A finished solve.

    Attributes:
        ts: times of the values, shape (T,); with events, of the start and of the end.
        ys: values, shape (T, *state); a tuple of such for tuple states. Where ``status`` is a
            failure, the rows that were not reached are NaN.
        status: how it ended.
        stats: what it cost.
        event_t: with events, the time at which the solve ended, a 0-d tensor: an event's, or ``until``.
            None without events, and where ``status`` is a failure.
        event_index: which event fired: its number, where the elements of all that the event functions
            return are counted from 0 in the order given. For a tuple of functions with one element each
            that is the place in the tuple. -1 where none fired.
        sol: the `DenseOutput`, a function of time, of a solve with ``dense=True``.

    A deep copy and a pickle hold the values without the graphs behind them.
    """

    ts: torch.Tensor
    ys: torch.Tensor | tuple[torch.Tensor, ...]
    status: Status
    stats: Stats
    event_t: torch.Tensor | None = None
    event_index: int = -1
    dense: object = field(default=None, repr=False)

    @property
    def sol(self):
        if self.dense is None:  # an AttributeError, so that hasattr and getattr answer
            raise AttributeError(
                "this Solution has values at its output times only; pass dense=True to solve for sol"
            )
        return self.dense

    def __copy__(self):
        return replace(self)

    def __getstate__(self):
        return tree_map_only(torch.Tensor, torch.Tensor.detach, dict(vars(self)))

    def __repr__(self):
        shapes = ", ".join(f"{tuple(y.shape)} {str(y.dtype)[6:]}" for y in tree_leaves(self.ys))
        s, first, last = self.stats, self.ts[0].item(), self.ts[-1].item()
        event = f" {self.event_index}" if self.event_index >= 0 else ""
        return (
            f"Solution({self.status.name.lower()}{event}: {s.method} on the {s.engine} engine, "
            f"t = {first:g} … {last:g}, ys {shapes}; "
            f"{s.accepted} steps, {s.rejected} rejected, {s.nfe} calls of func)"
        )


@dataclass
class Outcome:
    """What an engine hands back: enough for a `Solution` or for a `SolveError` that names causes.

    Times are on the engine's forward clock. ``k`` and ``y1`` are those of the last trial step; they
    are read only to find the element at fault. ``message`` is what another library said of a failure.
    """

    status: Status
    ys: torch.Tensor
    nfe: int = 0
    accepted: int = 0
    rejected: int = 0
    accepted_times: Sequence[float] = ()
    t: float = math.nan
    dt: float = math.nan
    error_ratio: float = math.nan
    k: list[torch.Tensor] = field(default_factory=list)
    y1: torch.Tensor | None = None
    event_t: float = math.nan
    event_index: int = -1
    unsolved: float | None = None
    message: str = ""


def rows_of(rows: list[torch.Tensor], problem) -> torch.Tensor:
    """The outputs that a solve has reached, with NaN for the others."""
    reached = torch.stack(rows)
    missing = reached.new_full((len(problem.times) - len(rows), *reached.shape[1:]), math.nan)
    return torch.cat([reached, missing]) if len(missing) else reached


def finish(problem, outcome: Outcome, engine: str, throw: bool) -> Solution:
    """The `Solution` of an outcome; raises the `SolveError` of a failed one unless told not to."""
    stats = Stats(
        engine=engine,
        method=problem.method.name,
        nfe=outcome.nfe,
        accepted=outcome.accepted,
        rejected=outcome.rejected,
        forward_times=outcome.accepted_times,
        direction=problem.direction,
    )
    if not outcome.status.ok:
        if throw:  # held by no variable here: a traceback would hold its error, and the state, in a circle
            raise _failure(problem, outcome)
        outcome.status = _failure(problem, outcome).reason
    solution = Solution(problem.t, problem.unflatten(outcome.ys, batch=1), outcome.status, stats)
    if problem.events:
        # What had fired at the start, or ended there, moves with the start.
        at_start = outcome.status.ok and outcome.accepted == 0
        end = problem.t[0] if at_start else problem.t.new_tensor(problem.direction * outcome.event_t)
        solution.ts = torch.stack([problem.t[0], end])
        solution.event_t = end if outcome.status.ok else None
        solution.event_index = outcome.event_index
    return solution


def backward_failure(problem, result) -> SolveError:
    """The `SolveError` of a failed backward solve, from its `Gradients`."""
    outcome = Outcome(
        result.status, result.adj_y, result.nfe, result.accepted, result.rejected,
        t=result.t, dt=result.dt, error_ratio=result.error_ratio, k=result.k, y1=result.y1,
    )  # fmt: skip
    source = "func returned"
    if all(torch.isfinite(x).all() for x in result.k):
        outcome.k, source = result.adj_k, "the vector-Jacobian product of func has"
    return _failure(problem, outcome, source, "in the backward solve, ")


def _failure(problem, outcome: Outcome, source="func returned", prefix="") -> SolveError:
    t, dt = problem.direction * outcome.t, problem.direction * outcome.dt
    reason, culprit = _cause(problem, outcome)
    index = None if culprit is None else _first_nonfinite(problem, culprit)
    where = "" if index is None else f" ({_element(problem, culprit, index)} at element {list(index)})"
    text, remedy = {
        Status.NONFINITE_FIELD: (
            f"{source} non-finite values{where} in the step from t={t!r}, the last good state",
            "check func for overflow, division by zero, or arguments outside its domain; or the "
            "solution itself grows beyond its dtype",
        ),
        Status.NONFINITE_STATE: (
            f"non-finite values in state `y`{where} after t={t!r}, the last good state",
            "the solution overflows its dtype, or leaves the domain of func",
        ),
        Status.NONFINITE_ERROR: _nonfinite_error(problem, outcome, t, index),
        Status.NONCONVERGENCE: (
            f"the stage equations of {problem.method.name} could not be solved in step {outcome.accepted + 1}, from "
            f"t={t!r} with dt={dt!r}: the last change that Newton's method made is {outcome.unsolved} "
            + ("tolerances" if problem.adaptive else "of the state"),
            "take smaller steps; check that func is smooth in y"
            + (
                f", or raise options={{'max_iters': ...}}, now {problem.max_iters}"
                if not problem.corrections
                else ""
            ),
        ),
        Status.STEP_UNDERFLOW: (
            f"underflow in dt {dt!r} at t={t!r}: "
            + (
                outcome.message
                or f"the error test fails however small the step (error ratio {outcome.error_ratio:.3g})"
            ),
            "the solution may have a singularity here, the tolerances may be below the rounding "
            "of the state's dtype, or the step below the resolution of t; loosen rtol or atol "
            "(an atol of 0 needs a state that never vanishes)",
        ),
        Status.MAX_STEPS: (
            (
                f"max_num_steps exceeded ({problem.max_num_steps}>={problem.max_num_steps})"
                if outcome.accepted + outcome.rejected >= problem.max_num_steps
                else "the greatest time that numbers can hold was reached"
            )
            + f" before an event, at t={t!r}",
            "event_fn may never change sign: flashode.Event(event_fn, until=...) ends such a solve; or raise "
            "options={'max_num_steps': ...}, or the step_size of fixed steps",
        )
        if problem.events
        else (
            f"max_num_steps exceeded ({problem.max_num_steps}>={problem.max_num_steps}) between "
            f"two output times, at t={t!r} with dt={dt!r}"
            + (f"; the last trial met non-finite values{where}" if where else ""),
            "raise options={'max_num_steps': ...}; if the steps are far smaller than the solution "
            "looks, the problem is stiff and an explicit method cannot do better",
        ),
    }[reason]
    counts = (
        f"{outcome.accepted} steps accepted, {outcome.rejected} rejected, "
        f"{outcome.nfe} calls of func, last dt={dt!r}"
    )
    return SolveError(
        f"{prefix}{text} [{problem.method.name}; {counts}]. {remedy[0].upper()}{remedy[1:]}.",
        reason=reason,
        t=t,
        dt=dt,
        accepted=outcome.accepted,
        rejected=outcome.rejected,
        nfe=outcome.nfe,
        index=index,
    )


def _nonfinite_error(problem, outcome: Outcome, t, index):
    """What went wrong, and the remedy, where only the error estimate is not finite."""
    start = f"the error relative to the tolerance is {outcome.error_ratio} at t={t!r}, though y and func are finite: "
    if index is not None:
        return (
            f"{start}the tolerance atol + rtol * |y| is 0 at element {list(index)}",
            "give an atol above 0, or a state that never vanishes",
        )
    if problem.norm is not None:
        return f"{start}options['norm'] overflows", "return a finite norm of a finite tensor"
    return (
        f"{start}its norm overflows",
        "func is more than 1e150 times steeper than rtol and atol allow for; rescale the problem or loosen them",
    )


def _cause(problem, outcome: Outcome):
    """The true reason behind a step that could not be taken, and a tensor that is not finite at
    the element to blame, if one is."""
    status = outcome.status
    if (
        not outcome.k
        or status == Status.NONCONVERGENCE
        or (status == Status.STEP_UNDERFLOW and math.isfinite(outcome.error_ratio))
    ):
        return status, None
    suspects = [(Status.NONFINITE_FIELD, k) for k in outcome.k] + [(Status.NONFINITE_STATE, outcome.y1)]
    for reason, x in suspects:
        if not torch.isfinite(x).all():
            return (status if status == Status.MAX_STEPS else reason), x
    if status == Status.MAX_STEPS:
        return status, None
    if not problem.adaptive or math.isfinite(outcome.error_ratio):
        return Status.NONFINITE_STATE, None  # an output between steps
    tolerance = problem.atol + problem.rtol * outcome.y1.detach().abs().reshape(-1)
    vanished = (tolerance == 0).reshape(outcome.y1.shape)
    return Status.NONFINITE_ERROR, torch.where(vanished, math.nan, 0.0)


def _first_nonfinite(problem, flat: torch.Tensor):
    members = problem.unflatten(flat.detach())
    for number, member in enumerate(members if isinstance(members, tuple) else (members,)):
        bad = (~torch.isfinite(member)).nonzero()
        if len(bad):
            index = tuple(bad[0].tolist())
            return (number, *index) if isinstance(members, tuple) else index
    return None


def _element(problem, flat: torch.Tensor, index):
    members = problem.unflatten(flat.detach())
    return members[index[0]][index[1:]].item() if isinstance(members, tuple) else members[index].item()
