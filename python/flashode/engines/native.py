"""The C++ engine: compiled loops over an opaque ``func``, one fused kernel per operation.

The loops are ``csrc/torch/driver.cpp`` and ``sweep.cpp``, the twins of ``engines/reference.py`` and
``reference_sweep.py``.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from .. import extension, transforms
from ..augmented import Augmented, Gradients
from ..errors import Status, StepFailure
from ..interp import Dense
from ..problem import Problem
from ..solution import Outcome, rows_of
from ..tableau import Tableau
from .reference_events import solve_until_event

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def supports(problem: Problem) -> str | None:
    """Why this engine cannot serve a problem, or None."""
    y0 = problem.y0
    if extension.C is None:
        return extension.missing
    if problem.method.family == "implicit":
        return "implicit methods are solved by the reference engine"
    if y0.dtype not in _DTYPES:
        return f"no kernels for {y0.dtype} states"
    if y0.device.type not in ("cpu", "cuda"):
        return f"no kernels for {y0.device}"
    if y0.device.type == "cuda" and not extension.C.with_cuda:
        return "the extension was compiled without CUDA; rebuild where nvcc is found"
    if problem.method.family != "explicit":
        return f"{problem.method.name} has no compiled steps"
    if problem.events and torch.is_grad_enabled():
        return "states at events are recorded by the reference engine; without gradients, or by odeint_adjoint, this one serves"
    if problem.dtypes is not None and len(set(problem.dtypes)) > 1:
        return "the members of y0 have different dtypes"
    if type(y0) not in (torch.Tensor, torch.nn.Parameter) or torch._C._len_torch_dispatch_stack():
        return "y0 is a tensor subclass, or a dispatch mode is active"
    return transforms.active()


def solve(problem: Problem, recording=None) -> Outcome:
    """Integrates through all output times."""
    if problem.events:
        run = _Steps(problem, recording)
        try:
            return solve_until_event(run)
        except StepFailure as failure:
            return run.outcome(failure.status)
    tableau, dense = table_of(problem.method.tableau), interpolant_of(problem.dense)
    fields = extension.C.solve(problem, tableau, dense, recording)
    return Outcome(**{**fields, "status": Status(fields["status"])})


@dataclass
class _Step:
    t0: float
    t1: float
    y1: torch.Tensor
    k: object = None


class _Steps:
    """The C++ loop as `solve_until_event` leads it: what it uses of a `reference.Run`."""

    shifts = None  # nothing is recorded

    def __init__(self, problem: Problem, recording):
        tableau, dense = table_of(problem.method.tableau), interpolant_of(problem.dense)
        self.p, self.loop = problem, extension.C.steps(problem, tableau, dense, recording)
        self.t0, self.y0, self.rows = problem.times[0], problem.y0.detach(), [problem.y0.detach()]
        self.event_t, self.event_index = math.nan, -1

    def start(self):
        self.succeeded(self.loop["start"]())

    def advance(self) -> _Step:
        step = _Step(*self.succeeded(self.loop["advance"]()))
        self.t0, self.y0 = step.t1, step.y1
        return step

    def succeeded(self, result):
        if isinstance(result, int):
            raise StepFailure(Status(result))
        return result

    def extended(self, step: _Step):
        """The loop keeps the slopes to itself."""

    def interpolate(self, step: _Step, times, shifts):
        return list(self.succeeded(self.loop["states_at"](times)))

    def outcome(self, status: Status) -> Outcome:
        fields = self.loop["outcome"](int(status))
        found = {
            "status": status,
            "ys": rows_of(self.rows, self.p),
            "event_t": self.event_t,
            "event_index": self.event_index,
        }
        return Outcome(**(fields | found))


def replay(problem: Problem, shifts):
    """Takes accepted steps of a solve again: `engines.reference.Run.replay`, of the C++ loop."""
    return extension.C.replay(
        problem, table_of(problem.method.tableau), interpolant_of(problem.dense), shifts
    )


def sweep(augmented: Augmented) -> Gradients:
    """The backward solve, from the last output back to the first."""
    method = augmented.problem.method
    tableau, dense = table_of(method.tableau), interpolant_of(augmented.problem.dense)
    fields = extension.C.sweep(augmented, tableau, dense)
    return Gradients(**{**fields, "status": Status(fields["status"])})


@functools.cache
def _numbers_of(dense: Dense):
    return (
        [[float(w) for w in w_j] for w_j in dense.weights],
        [float(c) for c in dense.extra_c],
        [[float(x) for x in a_i] for a_i in dense.extra_a],
    )


@functools.cache
def table_of(tableau: Tableau):
    c, a, b, b_err = tableau.numbers
    return extension.C.Table(c, a, b, b_err, tableau.fsal)


@functools.cache
def interpolant_of(dense: Dense):
    return extension.C.Interpolant(*_numbers_of(dense))


def _register_fakes():
    """Shapes of the registered operations, for torch.compile and fake tensors."""

    @torch.library.register_fake("flashode::combine")
    def _(y0, k, coef):
        return y0.new_empty((*coef.shape[:-1], *y0.shape))

    @torch.library.register_fake("flashode::spread")
    def _(g, coef):
        return g.new_empty((coef.shape[-1], *g.shape[coef.ndim - 1 :]))

    @torch.library.register_fake("flashode::inner")
    def _(g, k):
        return g.new_empty((*g.shape[: g.ndim - k[0].ndim], len(k)), dtype=torch.float64)

    @torch.library.register_fake("flashode::scaled_error")
    def _(y0, y1, k, coef, rtol, atol):
        return y0.new_empty(y0.shape, dtype=torch.promote_types(y0.dtype, torch.float32))

    @torch.library.register_fake("flashode::error_norm")
    def _(y0, y1, k, coef, rtol, atol, offsets):
        return y0.new_empty((), dtype=torch.float64)


if extension.C is not None:
    _register_fakes()
